"""Networks with Gaussian noise behind every map, whose inner variables have simple laws.

Behind every linear map, activation and pooling of a network stands independent Gaussian noise; the
noisy values are latent variables. Given all others, weights are Gaussian and pre-activations are
mixtures of truncated Gaussians: what `gibbs` draws in turn. With the prior on the weights this is a
model of its own, close to the network without noise when the variances are small.

References
----------
G. Piccioli, E. Troiani, L. Zdeborová, *Gibbs sampling the posterior of neural networks*, arXiv
2306.02729.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.errors import DataError, NetworkError, OptionError
from pushforward.networks.parameters import ParameterSpace, match_names
from pushforward.options import choice, number
from pushforward.sampling.intermediate_noise.maps import AffineMap, NoisyMap, PoolingMap, read_maps
from pushforward.typing import Params

__all__ = ["IntermediateNoiseNetwork", "Noise", "laid", "sum_squares"]

_LOG_TWO_PI = math.log(2 * math.pi)

Noise: TypeAlias = Tensor | torch.Generator
"""Standard normals ``(chains, size)``, or where to draw them from."""


@dataclass(frozen=True, eq=False)
class IntermediateNoiseNetwork:
    """A network with Gaussian noise behind every map, and Gaussian priors on its parameters.

    With ``V_0 = x``, map ``k`` gives ``V_k = map_k(V_{k-1}) + sqrt(variance_k) noise``. For
    regression the last ``V`` is the target; for classification it is latent as well and the label
    is the position of its largest entry. The latent variable behind module ``"2"`` is called
    ``"latent.2"`` and has the shape that the module gives, before any `Flatten`.

    Parameters
    ----------
    net
        An `nn.Sequential` of linear maps, convolutions, average pooling, `Flatten` and activations
        that ends in an `nn.Linear`. Only its structure counts, not the values of its parameters.
    preactivation_noise
        Variance behind linear maps and convolutions: one number, or one for each in order.
    postactivation_noise
        Variance behind activations and pooling: one number, or one for each in order.
    output
        What is observed: ``"regression"`` or ``"classification"``.
    output_noise
        Variance behind the last linear map: label noise, or that of the largest-entry rule. By
        default it follows `preactivation_noise`, whose sequence may leave it out when it is given.
    prior_precision
        Inverse variance of every parameter: a number, or numbers by name of a parameter or module;
        what is not named keeps its fan-in, which is the default.

    Raises
    ------
    NetworkError
        For a layer that is not supported, or no layer to learn.
    OptionError
        For variances or precisions that are not positive, or of the wrong number.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> model = IntermediateNoiseNetwork(net, 0.1, 0.1)
    >>> model.latent_shapes((3,))
    {'latent.0': (2,), 'latent.1': (2,)}
    """

    net: nn.Sequential
    preactivation_noise: float | Sequence[float]
    postactivation_noise: float | Sequence[float]
    output: Literal["regression", "classification"] = "regression"
    output_noise: float | None = None
    prior_precision: float | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        choice(self.output, "output", ("regression", "classification"))
        _ = self.maps, self.variances, self.precisions
        if self.output == "classification" and self.units < 2:
            raise NetworkError(
                "its last layer has one output",
                where="net",
                advice="Classification needs one output for each class, at least two.",
            )

    # --- structure --------------------------------------------------------------------------------

    @cached_property
    def maps(self) -> tuple[NoisyMap, ...]:
        """The noisy maps in order."""
        return read_maps(self.net)

    @cached_property
    def affine(self) -> tuple[AffineMap, ...]:
        """Those with parameters."""
        return tuple(item for item in self.maps if isinstance(item, AffineMap))

    @property
    def units(self) -> int:
        """Outputs, or classes."""
        return self.affine[-1].units

    @cached_property
    def space(self) -> ParameterSpace:
        """Names and shapes of the parameters."""
        return ParameterSpace.of(dict(self.net.named_parameters()))

    @cached_property
    def variances(self) -> dict[str, float]:
        """Of the noise behind each map, by module name."""
        affine = [item.name for item in self.maps if isinstance(item, AffineMap)]
        others = [item.name for item in self.maps if not isinstance(item, AffineMap)]
        before = self.preactivation_noise
        if self.output_noise is None:
            values = _spread(before, len(affine), "preactivation_noise")
        elif isinstance(before, Sequence) and len(before) == len(affine):
            values = [*_spread(before, len(affine), "preactivation_noise")[:-1]]
            values += _spread(self.output_noise, 1, "output_noise")
        else:
            values = _spread(before, len(affine) - 1, "preactivation_noise")
            values += _spread(self.output_noise, 1, "output_noise")
        after = _spread(self.postactivation_noise, len(others), "postactivation_noise")
        found = dict(zip((*affine, *others), (*values, *after), strict=True))
        return {item.name: found[item.name] for item in self.maps}

    @cached_property
    def precisions(self) -> dict[str, float]:
        """Of the prior, by parameter name."""
        given = self.prior_precision
        found: dict[str, float] = {}
        for item in self.affine:
            for name in (item.weight, item.bias):
                if name is not None:
                    found[name] = float(item.fan_in)
        if isinstance(given, Mapping):
            for pattern, value in given.items():
                names = match_names(tuple(found), pattern)
                found.update(dict.fromkeys(names, _precision(value)))
        elif given is not None:
            found = dict.fromkeys(found, _precision(given))
        return {name: found[name] for name in self.space.names}

    def shapes(self, example: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes of what the maps take and, last, of the output, for examples of a shape.

        Parameters
        ----------
        example
            Shape of one input.

        Returns
        -------
        tuple of tuple of int
            Before any `Flatten`; one more than there are maps.

        Raises
        ------
        NetworkError
            When a map does not fit.
        """
        shapes: list[tuple[int, ...]] = [tuple(example)]
        for item in self.maps:
            shape = shapes[-1]
            if item.flatten:
                shape = (math.prod(shape),)
            if isinstance(item, AffineMap) and item.kernel is None and shape != (item.fan_in,):
                raise NetworkError(
                    f"its inputs have shape {shape}",
                    where=f"layer {item.name}",
                    advice=f"It takes vectors of {item.fan_in} features; put an nn.Flatten in "
                    "front of it for images, and check the shape of the data.",
                )
            shapes.append(item.output_shape(shape))
        return tuple(shapes)

    def latent_shapes(self, example: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of the latent variables of one example, by name.

        Parameters
        ----------
        example
            Shape of one input.

        Returns
        -------
        dict
            In the order of the maps; the last map has one only for classification.
        """
        shapes = self.shapes(example)[1:]
        maps = self.maps if self.output == "classification" else self.maps[:-1]
        return {f"latent.{item.name}": shape for item, shape in zip(maps, shapes, strict=False)}

    def generate_size(self, inputs: Float[Tensor, "n *shape"]) -> int:
        """Standard normals that `generate` takes for each chain."""
        shapes = self.shapes(tuple(inputs.shape[1:]))[1:]
        return len(inputs) * sum(math.prod(shape) for shape in shapes)

    # --- the model --------------------------------------------------------------------------------

    def sample_prior(
        self,
        noise: Noise,
        num_chains: int = 1,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Params:
        """Parameters from their prior.

        Parameters
        ----------
        noise
            Standard normals ``(chains, P)``, or a generator.
        num_chains, dtype, device
            For a generator.

        Returns
        -------
        dict
            Tensors ``(chains, *shape)`` by name.
        """
        if isinstance(noise, torch.Generator):
            shape = (num_chains, self.space.size)
            noise = torch.randn(shape, generator=noise, dtype=dtype, device=device)
        drawn = self.space.unravel(noise)
        return {name: value / math.sqrt(self.precisions[name]) for name, value in drawn.items()}

    def generate(
        self, parameters: Params, inputs: Float[Tensor, "n *shape"], noise: Noise
    ) -> tuple[Params, Tensor]:
        """Run the inputs through the noisy network: what a teacher with these parameters does.

        Parameters
        ----------
        parameters
            Tensors ``(chains, *shape)`` by name.
        inputs
            ``(n, *shape)``, the same for all chains.
        noise
            Standard normals ``(chains, generate_size(inputs))``, or a generator.

        Returns
        -------
        latents
            ``(chains, n, *shape)`` by name.
        targets
            ``(chains, n, outputs)``, or labels ``(chains, n)``.
        """
        chains = len(parameters[self.affine[0].weight])
        if isinstance(noise, torch.Generator):
            shape = (chains, self.generate_size(inputs))
            noise = torch.randn(shape, generator=noise, dtype=inputs.dtype, device=inputs.device)
        shapes = self.shapes(tuple(inputs.shape[1:]))
        sizes = [len(inputs) * math.prod(shape) for shape in shapes[1:]]
        value, latents = inputs, {}
        parts = noise.split(sizes, 1)
        for item, before, after, part in zip(self.maps, shapes, shapes[1:], parts, strict=False):
            mean = item.mean(parameters, laid(item, value, before))
            std = math.sqrt(self.variances[item.name])
            value = mean + std * part.unflatten(1, (len(inputs), *after))
            latents[f"latent.{item.name}"] = value
        if self.output == "classification":
            return latents, value.argmax(2)
        latents.popitem()
        return latents, value

    def outputs(
        self, parameters: Params, inputs: Float[Tensor, "n *shape"]
    ) -> Float[Tensor, "*lead n K"]:
        """The network without noise, whose outputs are the predictions.

        Parameters
        ----------
        parameters
            Tensors ``(*lead, *shape)`` by name.
        inputs
            ``(n, *shape)``.

        Returns
        -------
        Tensor
            ``(*lead, n, outputs)``.
        """
        value = inputs
        shapes = self.shapes(tuple(inputs.shape[1:]))
        for item, shape in zip(self.maps, shapes, strict=False):
            value = item.mean(parameters, laid(item, value, shape))
        return value

    def residuals(
        self, parameters: Params, latents: Params, x: Tensor, y: Tensor
    ) -> Iterator[tuple[NoisyMap, Tensor, int]]:
        """What the noise behind each map is.

        Parameters
        ----------
        parameters, latents
            Tensors ``(*lead, ...)`` by name.
        x
            ``(n, *shape)``.
        y
            Targets ``(..., n, outputs)`` or ``(n,)``; not used for classification.

        Yields
        ------
        tuple
            Each map, ``V_k - map_k(V_{k-1})`` of shape ``(*lead, n, *shape)``, and the number of
            axes of ``(n, *shape)``.
        """
        value = x
        targets = y.unsqueeze(-1) if y.dim() == 1 else y
        shapes = self.shapes(tuple(x.shape[1:]))
        for item, before, after in zip(self.maps, shapes, shapes[1:], strict=False):
            mean = item.mean(parameters, laid(item, value, before))
            name = f"latent.{item.name}"
            value = latents.get(name, targets)
            yield item, value - mean, 1 + len(after)

    def residual_energies(
        self, parameters: Params, latents: Params, x: Tensor, y: Tensor
    ) -> dict[str, Float[Tensor, "*lead"]]:
        """Squares of the noise behind each map in units of its variance, summed, in float64.

        Over data that the model itself generated, each is on average its number of entries once a
        chain has thermalised: a known answer.

        Parameters
        ----------
        parameters, latents, x, y
            As in `residuals`.

        Returns
        -------
        dict
            ``(*lead,)`` by module name.
        """
        return {
            item.name: sum_squares(rest, axes) / self.variances[item.name]
            for item, rest, axes in self.residuals(parameters, latents, x, y)
        }

    def log_prior(self, parameters: Params) -> Float[Tensor, "*lead"]:
        """Log density of the parameters, normalised, in float64.

        Parameters
        ----------
        parameters
            Tensors ``(*lead, *shape)`` by name.

        Returns
        -------
        Tensor
            ``(*lead,)``.
        """
        terms = []
        for name, shape in zip(self.space.names, self.space.shapes, strict=True):
            precision = self.precisions[name]
            constant = math.prod(shape) * (math.log(precision) - _LOG_TWO_PI)
            squares = sum_squares(parameters[name], len(shape))
            terms.append(0.5 * (constant - precision * squares))
        return torch.stack(terms).sum(0)

    def log_joint(
        self, parameters: Params, latents: Params, x: Tensor, y: Tensor
    ) -> Float[Tensor, "*lead"]:
        """Log density of parameters, latent variables and targets, normalised, in float64.

        Parameters
        ----------
        parameters, latents
            Tensors with any leading axes, or none (under `torch.func.vmap`).
        x
            ``(n, *shape)``.
        y
            Targets ``(n, outputs)`` or ``(n,)``; labels ``(n,)``.

        Returns
        -------
        Tensor
            ``(*lead,)``; minus infinity where a label is not the position of the largest latent
            output.
        """
        total = self.log_prior(parameters)
        for item, rest, axes in self.residuals(parameters, latents, x, y):
            variance = self.variances[item.name]
            count = math.prod(rest.shape[rest.dim() - axes :])
            constant = count * (math.log(variance) + _LOG_TWO_PI)
            total = total - 0.5 * (sum_squares(rest, axes) / variance + constant)
        if self.output == "classification":
            last = latents[f"latent.{self.maps[-1].name}"]
            chosen = last.gather(-1, y.expand(last.shape[:-1]).unsqueeze(-1))
            allowed = (chosen >= last).flatten(-2).all(-1)
            total = torch.where(allowed, total, -torch.inf)
        return total

    # --- data -------------------------------------------------------------------------------------

    def check_data(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets as the samplers take them.

        Parameters
        ----------
        x
            ``(n, *shape)`` floating point.
        y
            Targets ``(n, outputs)``, or ``(n,)`` for one output; integer labels ``(n,)``.

        Returns
        -------
        tuple of Tensor
            `x`, and targets ``(n, outputs)`` in its dtype or labels ``(n,)`` int64.

        Raises
        ------
        DataError
            For shapes that do not fit, NaN, or labels out of range.
        """
        for name, given in (("x", x), ("y", y)):
            if not isinstance(given, Tensor):
                raise DataError(
                    f"it is {type(given).__name__}, not a tensor",
                    where=name,
                    advice="Convert it with torch.as_tensor; collect the batches of a loader.",
                )
        if not x.is_floating_point() or x.dim() < 2 or not len(x):
            raise DataError(
                f"inputs are {x.dtype} of shape {tuple(x.shape)}",
                where="x",
                advice="Give floating-point examples (n, features) or (n, channels, height, "
                "width), at least one.",
            )
        if not bool(torch.isfinite(x).all()):
            row = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
            raise DataError(
                f"example {row} holds NaN or infinite entries",
                where="x",
                advice="Clean or impute the data first.",
            )
        self.shapes(tuple(x.shape[1:]))
        if self.output == "classification":
            return x, self._labels(y, len(x)).to(x.device)
        targets = y.unsqueeze(-1) if y.dim() == 1 else y
        if tuple(targets.shape) != (len(x), self.units):
            raise DataError(
                f"targets have shape {tuple(y.shape)}",
                where="y",
                advice=f"Give {len(x)} rows of {self.units} numbers.",
            )
        targets = targets.to(x)
        if not bool(torch.isfinite(targets).all()):
            raise DataError(
                "it holds NaN or infinite entries",
                where="y",
                advice="Leave out examples without a target.",
            )
        return x, targets

    def _labels(self, y: Tensor, count: int) -> Tensor:
        whole = not y.is_floating_point() and not y.is_complex() and y.dtype != torch.bool
        if tuple(y.shape) != (count,) or not whole:
            raise DataError(
                f"labels are {y.dtype} of shape {tuple(y.shape)}",
                where="y",
                advice=f"Give {count} integers, one for each example.",
            )
        if int(y.min()) < 0 or int(y.max()) >= self.units:
            raise DataError(
                f"labels run from {int(y.min())} to {int(y.max())}",
                where="y",
                advice=f"The network has {self.units} outputs: labels are 0 to {self.units - 1}.",
            )
        return y.long()

    def to_config(self) -> dict[str, Any]:
        """The model in JSON's types; equal for equal models.

        Returns
        -------
        dict
            Maps, variances, precisions and shapes of the parameters.
        """
        return {
            "output": self.output,
            "maps": [_described(item) for item in self.maps],
            "variances": dict(self.variances),
            "precisions": dict(self.precisions),
            "parameters": {
                name: list(shape)
                for name, shape in zip(self.space.names, self.space.shapes, strict=True)
            },
        }


def laid(item: NoisyMap, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A value of one shape as a map takes it: flat when a `Flatten` stands before the map."""
    return value.flatten(-len(shape)) if item.flatten else value


def sum_squares(values: Tensor, axes: int) -> Tensor:
    """Sum of squares over the last axes, in float64; over none, the squares."""
    squares = values.double().square()
    return squares.sum(tuple(range(-axes, 0))) if axes else squares


def _described(item: NoisyMap) -> dict[str, Any]:
    found: dict[str, Any] = {"name": item.name, "kind": type(item).__name__}
    if isinstance(item, AffineMap):
        return found | {
            "flatten": item.flatten,
            "kernel": item.kernel and list(item.kernel),
            "stride": list(item.stride),
            "padding": list(item.padding),
        }
    if isinstance(item, PoolingMap):
        return found | {"kernel": list(item.kernel)}
    # Parameters such as a slope are part of the repr of a piecewise polynomial.
    return found | {"activation": item.signature}


def _spread(value: float | Sequence[float], count: int, where: str) -> list[float]:
    """One variance for each of several maps."""
    given: Any = value  # arrays and tensors are as good as lists
    several = isinstance(given, Sequence) or getattr(given, "ndim", 0) > 0
    values = list(given) if several else [given] * count
    if len(values) != count:
        raise OptionError(
            f"{len(values)} variances for {count} maps",
            where=where,
            advice="Give one number for all, or one for each map in order.",
        )
    advice = (
        "Give positive variances. The smaller they are, the closer the model is to the network "
        "without noise and the slower the chains."
    )
    return [number(item, where, above=0, advice=advice) for item in values]


def _precision(value: object) -> float:
    advice = "Give positive numbers: the inverse of the prior variance."
    return number(value, "prior_precision", above=0, advice=advice)
