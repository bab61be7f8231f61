"""The moves of a Gibbs sweep: each redraws one block of variables given all others.

A move reads and writes a dictionary of values: parameters and latent variables ``(chains, ...)`` by
name, ``"input"`` ``(n, *shape)``, ``"target"`` ``(chains or 1, n, outputs)`` or ``"labels"``, and,
where they are learned, ``"noise.<module>"`` and ``"precision.<parameter>"`` ``(chains,)``. It takes
a fixed amount of random numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pushforward.gaussians.activations import Activation, PiecewisePolynomial
from pushforward.sampling.intermediate_noise import gaussian_conditionals as gaussian
from pushforward.sampling.intermediate_noise.class_latents import sample_class_latents
from pushforward.sampling.intermediate_noise.convolutions import Convolution
from pushforward.sampling.intermediate_noise.gaussian_conditionals import Variance
from pushforward.sampling.intermediate_noise.maps import (
    ActivationMap,
    AffineMap,
    NoisyMap,
    PoolingMap,
)
from pushforward.sampling.intermediate_noise.network import (
    IntermediateNoiseNetwork,
    laid,
)
from pushforward.sampling.intermediate_noise.preactivations import (
    PiecewiseLinear,
    sample_preactivations,
    update_preactivations_smooth,
)
from pushforward.sampling.noise import NoiseSize

__all__ = [
    "ClassMove",
    "LatentMove",
    "LinkedMap",
    "Move",
    "ParameterMove",
    "Values",
    "linked_maps",
    "per_chain",
]

Values = dict[str, Tensor]

_SLICE_ROWS = 18  # uniforms for each unit of a smooth activation
# A convolution is treated as a dense matrix where that is small.
_DENSE_ELEMENTS, _DENSE_SIZE = 2**18, 512


@dataclass(frozen=True)
class LinkedMap:
    """A noisy map between two variables.

    Parameters
    ----------
    item
        The map.
    source, target
        Names of what it takes and gives.
    shape
        Of one example of `source`, before any `Flatten`.
    output_shape
        Of one example of `target`.
    variance
        Behind it, where it is not learned.
    """

    item: NoisyMap
    source: str
    target: str
    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    variance: float

    def input(self, values: Values) -> Tensor:
        """What the map takes, laid flat where it has to be."""
        return laid(self.item, values[self.source], self.shape)

    def mean(self, values: Values) -> Tensor:
        """What the map gives without noise, ``(chains, n, *output_shape)``."""
        return self.item.mean(values, self.input(values))

    def noise(self, values: Values) -> Variance:
        """The variance behind it."""
        return values.get(f"noise.{self.item.name}", self.variance)

    @property
    def outputs(self) -> int:
        """Numbers in one example of the target."""
        return math.prod(self.output_shape)


def linked_maps(model: IntermediateNoiseNetwork, example: tuple[int, ...]) -> tuple[LinkedMap, ...]:
    """The maps of a model with the names and shapes of what stands between them.

    Parameters
    ----------
    model
        The network.
    example
        Shape of one input.

    Returns
    -------
    tuple of LinkedMap
        In order.
    """
    shapes = model.shapes(example)
    names = ["input", *(f"latent.{item.name}" for item in model.maps)]
    if model.output == "regression":
        names[-1] = "target"
    return tuple(
        LinkedMap(
            item, names[k], names[k + 1], shapes[k], shapes[k + 1], model.variances[item.name]
        )
        for k, item in enumerate(model.maps)
    )


class Move(ABC):
    """One block that is redrawn."""

    size: NoiseSize
    """Random numbers that it takes."""

    @abstractmethod
    def apply(self, values: Values, normals: Tensor, uniforms: Tensor) -> None:
        """Redraw the block.

        Parameters
        ----------
        values
            Changed in place; no tensor in it is.
        normals, uniforms
            ``(chains, size)``.
        """


# --- parameters ----------------------------------------------------------------------------------


class ParameterMove(Move):
    """Weights and bias of one linear map or convolution, jointly for all units.

    Parameters
    ----------
    link
        The map.
    model
        It belongs to.
    x
        The inputs of the network.
    alpha
        Over-relaxation; 0 for none.
    learned
        Whether noise or prior change: otherwise a factor that depends on the inputs of the network
        only is computed once.
    """

    def __init__(
        self,
        link: LinkedMap,
        model: IntermediateNoiseNetwork,
        x: Tensor,
        alpha: float,
        learned: bool,
    ) -> None:
        item = link.item
        assert isinstance(item, AffineMap)  # for the type checker
        self._link, self._item, self._alpha = link, item, alpha
        self._convolution = None if item.kernel is None else item.convolution(link.shape)
        self._bias = item.bias is not None
        self._fan_in = item.fan_in
        self._columns = item.fan_in + self._bias
        self._wide = self._convolution is None and len(x) < self._columns
        self._names = ([item.bias] if item.bias else []) + [item.weight]
        self._repeats = ([1] if self._bias else []) + [item.fan_in]
        self._given = [model.precisions[name] for name in self._names]
        fixed = [
            torch.full((size,), value, dtype=torch.float64)
            for size, value in zip(self._repeats, self._given, strict=True)
        ]
        self._precision = torch.cat(fixed).to(x.device, torch.float64)
        rows = len(x) if self._wide else 0
        self.size = NoiseSize(normals=(self._columns + rows) * item.units)
        self._design = self._gram = self._lower = None
        if link.source == "input":
            self._design = self._columns_of(link.input({"input": x}))
            if not self._wide:
                self._gram = self._gram_of(self._design)
            if not learned:
                self._lower = self._factor(self._design, link.variance, self._precision)

    def apply(self, values: Values, normals: Tensor, uniforms: Tensor) -> None:  # noqa: ARG002
        """Redraw them."""
        link, targets = self._link, values[self._link.target]
        design = self._columns_of(link.input(values)) if self._design is None else self._design
        noise, precision = link.noise(values), self._prior(values, len(normals))
        lower = self._factor(design, noise, precision) if self._lower is None else self._lower
        if self._wide:
            conditional = partial(gaussian.wide_ridge, lower, design, noise, precision)
            data = targets.expand(len(normals), -1, -1)
        else:
            conditional = partial(gaussian.ridge, lower, noise)
            data = self._cross(design, targets)
            data = data.expand(len(normals), -1, -1)
        current = self._packed(values) if self._alpha else normals
        drawn = gaussian.over_relaxed(conditional, (data,), normals, current, self._alpha)
        self._unpack(values, drawn.to(normals.dtype))

    def _columns_of(self, inputs: Tensor) -> Tensor:
        """Inputs with ones in front, or images as they are."""
        if self._convolution is not None or not self._bias:
            return inputs
        return gaussian.with_ones(inputs)

    def _gram_of(self, design: Tensor) -> Tensor:
        if self._convolution is not None:
            return self._convolution.gram(design, self._bias)
        fine = design.double()
        return fine.mT @ fine

    def _factor(self, design: Tensor, noise: Variance, precision: Tensor) -> Tensor:
        if self._wide:
            return gaussian.wide_ridge_factor(design, noise, precision)
        gram = self._gram_of(design) if self._gram is None else self._gram
        return gaussian.ridge_factor(gram, noise, precision)

    def _cross(self, design: Tensor, targets: Tensor) -> Tensor:
        if self._convolution is not None:
            return self._convolution.cross(design, targets, self._bias)
        return (targets.mT @ design).mT  # in this order the long axis lies well in memory

    def _prior(self, values: Values, chains: int) -> Tensor:
        if not any(f"precision.{name}" in values for name in self._names):
            return self._precision
        parts = [
            values[f"precision.{name}"][:, None].expand(chains, size)
            for name, size in zip(self._names, self._repeats, strict=True)
        ]
        return torch.cat(parts, 1)

    def _packed(self, values: Values) -> Tensor:
        parts = [values[self._item.weight].flatten(2).mT.double()]
        if self._item.bias is not None:
            parts.insert(0, values[self._item.bias][:, None].double())
        return torch.cat(parts, 1)

    def _unpack(self, values: Values, drawn: Tensor) -> None:
        weight = drawn[:, self._bias :].mT
        values[self._item.weight] = weight.reshape(values[self._item.weight].shape).contiguous()
        if self._item.bias is not None:
            values[self._item.bias] = drawn[:, 0].contiguous()


# --- latent variables ----------------------------------------------------------------------------


class LatentMove(Move):
    """What one map gives and the next takes.

    Parameters
    ----------
    before, behind
        The two maps.
    count
        Examples.
    alpha
        Over-relaxation of Gaussian laws; 0 for none.
    """

    def __init__(self, before: LinkedMap, behind: LinkedMap, count: int, alpha: float) -> None:
        self._before, self._behind, self._alpha = before, behind, alpha
        self._name = before.target
        inputs, outputs, item = math.prod(behind.shape), behind.outputs, behind.item
        self._convolution: Convolution | None = None
        self._piecewise: PiecewiseLinear | None = None
        self._identity = self._dense = False
        normals = uniforms = 0
        if isinstance(item, ActivationMap):
            self._piecewise = _piecewise_linear(item.activation)
            if self._piecewise == PiecewiseLinear.identity():
                self._identity, normals = True, count * inputs
            else:
                uniforms = count * inputs * (_SLICE_ROWS if self._piecewise is None else 1)
        elif isinstance(item, PoolingMap):
            normals = count * inputs
        else:
            normals = count * gaussian.linear_inputs_size(inputs, outputs)
            if item.kernel is not None:
                self._convolution = item.convolution(behind.shape)
                self._dense = min(inputs, outputs) <= _DENSE_SIZE
                self._dense = self._dense and inputs * outputs <= _DENSE_ELEMENTS
                if not self._dense:
                    normals = count * (inputs + outputs)
        self.size = NoiseSize(normals, uniforms)

    @property
    def iterates(self) -> bool:
        """Whether it solves by iteration, which can fail."""
        return self._convolution is not None and not self._dense

    def apply(self, values: Values, normals: Tensor, uniforms: Tensor) -> None:
        """Redraw it."""
        item = self._behind.item
        mean, target = self._before.mean(values), values[self._behind.target]
        if self._before.source == "input":  # activations and pooling of the data have one axis less
            mean = mean.expand(len(normals), *mean.shape[-1 - len(self._behind.shape) :])
        variances = self._before.noise(values), self._behind.noise(values)
        if self._identity:
            values[self._name] = gaussian.over_relaxed(
                partial(gaussian.identity_inputs, *variances),
                (mean, target),
                normals,
                values[self._name],
                self._alpha,
            )
        elif isinstance(item, ActivationMap):
            values[self._name] = self._through(item, mean, target, variances, values, uniforms)
        elif isinstance(item, PoolingMap):
            conditional = partial(gaussian.pooling_inputs, item.kernel, *variances)
            values[self._name] = gaussian.over_relaxed(
                conditional, (mean, target), normals, values[self._name], self._alpha
            )
        elif not self.iterates:
            values[self._name] = self._linear(item, mean, target, variances, values, normals)
        else:
            values[self._name] = self._convolved(item, mean, target, variances, values, normals)

    def _through(
        self,
        item: ActivationMap,
        mean: Tensor,
        target: Tensor,
        variances: tuple[Variance, Variance],
        values: Values,
        uniforms: Tensor,
    ) -> Tensor:
        dz, dx = (per_chain(variance, mean.dim()) for variance in variances)
        if self._piecewise is not None:
            numbers = uniforms.unflatten(1, mean.shape[1:])
            return sample_preactivations(self._piecewise, mean, target, dz, dx, numbers)
        rows = uniforms.unflatten(1, (_SLICE_ROWS, *mean.shape[1:])).movedim(1, 0)
        current = values[self._name]
        return update_preactivations_smooth(item.function, current, mean, target, dz, dx, rows)

    def _linear(
        self,
        item: AffineMap,
        mean: Tensor,
        target: Tensor,
        variances: tuple[Variance, Variance],
        values: Values,
        normals: Tensor,
    ) -> Tensor:
        weight = values[item.weight]
        if item.bias is not None:
            target = _less_bias(target, values[item.bias])
        if self._convolution is not None:
            weight = self._convolution.dense(weight)
        conditional = partial(gaussian.linear_inputs, weight, *variances)
        data = mean.flatten(2), target.flatten(2)
        current = values[self._name].flatten(2) if self._alpha else mean
        drawn = gaussian.over_relaxed(conditional, data, normals, current, self._alpha)
        return drawn.reshape(mean.shape)

    def _convolved(
        self,
        item: AffineMap,
        mean: Tensor,
        target: Tensor,
        variances: tuple[Variance, Variance],
        values: Values,
        normals: Tensor,
    ) -> Tensor:
        assert self._convolution is not None  # for the type checker
        convolution, unsolved = self._convolution, values["unsolved"]
        if item.bias is not None:
            target = _less_bias(target, values[item.bias])

        def conditional(mean: Tensor, target: Tensor, normals: Tensor) -> Tensor:
            drawn, failed = gaussian.convolution_inputs(
                convolution, values[item.weight], *variances, mean, target, normals
            )
            values["unsolved"] = unsolved + failed
            return drawn

        return gaussian.over_relaxed(
            conditional, (mean, target), normals, values[self._name], self._alpha
        )


class ClassMove(Move):
    """The latent outputs of a classifier, given which is the largest.

    Parameters
    ----------
    link
        The last map.
    count
        Examples.
    """

    def __init__(self, link: LinkedMap, count: int) -> None:
        self._link = link
        self.size = NoiseSize(uniforms=count * (link.outputs + 1))

    def apply(self, values: Values, normals: Tensor, uniforms: Tensor) -> None:  # noqa: ARG002
        """Redraw them."""
        link = self._link
        mean = link.mean(values)
        noise = per_chain(link.noise(values), mean.dim())
        sizes = [uniforms.shape[1] - mean.shape[1], mean.shape[1]]
        numbers, shifts = uniforms.split(sizes, 1)
        values[link.target] = sample_class_latents(
            mean,
            noise,
            values["labels"],
            numbers.unflatten(1, mean.shape[1:]),
            values[link.target],
            shifts,
        )


# --- small things --------------------------------------------------------------------------------


def _piecewise_linear(activation: Activation) -> PiecewiseLinear | None:
    if isinstance(activation, PiecewisePolynomial) and activation.degree <= 1:
        return PiecewiseLinear.of(activation)
    return None


def per_chain(variance: Variance, dimensions: int) -> float | Tensor:
    """A variance with axes of length one behind that of the chains, to broadcast."""
    if isinstance(variance, Tensor):
        return variance.reshape(-1, *(1,) * (dimensions - 1))
    return variance


def _less_bias(target: Tensor, bias: Tensor) -> Tensor:
    """Targets ``(chains, n, units, ...)`` without the bias of each unit."""
    return target - bias[:, None].reshape(len(bias), 1, -1, *(1,) * (target.dim() - 3))
