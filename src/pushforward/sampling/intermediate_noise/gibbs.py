"""Gibbs sampling of a network with noise behind every map: no step size, nothing is rejected.

A sweep goes from the outputs to the inputs. It draws the latent outputs of a classifier, then, map
by map, its parameters jointly and what it takes; each from its exact law given all others (for
smooth activations: by a slice update that leaves that law invariant).

References
----------
G. Piccioli, E. Troiani, L. Zdeborová, *Gibbs sampling the posterior of neural networks*, arXiv
2306.02729. The joint draw of weights and bias, the perturb-then-condition forms, mixtures for all
piecewise linear activations, learned variances and the scale move go beyond it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import DataError, OptionError, ShapeError
from pushforward.networks.parameters import ParameterSpace
from pushforward.options import number
from pushforward.runs.store import fingerprint
from pushforward.sampling.intermediate_noise.maps import ActivationMap, AffineMap
from pushforward.sampling.intermediate_noise.moves import (
    ClassMove,
    LatentMove,
    LinkedMap,
    Move,
    ParameterMove,
    Values,
    linked_maps,
)
from pushforward.sampling.intermediate_noise.network import IntermediateNoiseNetwork, sum_squares
from pushforward.sampling.intermediate_noise.scales import Hyperprior, PrecisionMove, ScaleMove
from pushforward.sampling.kernel import Kernel, State
from pushforward.sampling.noise import Noise, NoiseSize
from pushforward.typing import Params

__all__ = ["Gibbs", "gibbs"]

_LOG_TWO_PI = math.log(2 * math.pi)
_COPIES = 8  # of the latent variables, while a chain is moved


def gibbs(
    model: IntermediateNoiseNetwork,
    x: Float[Tensor, "n *shape"],
    y: Tensor,
    *,
    scale_move: bool = False,
    overrelaxation: float | None = None,
    learn_noise: bool = False,
    learn_prior_precision: bool = False,
    hyperprior: float = 1.0,
) -> Gibbs:
    """The Gibbs sampler of a network with noise behind every map, as a kernel for `sample`.

    Parameters
    ----------
    model
        The network, its variances and its prior.
    x
        Inputs ``(n, *shape)``. Their dtype is that of the chains: float64 for small variances;
        factorisations and tails are computed in float64 in any case.
    y
        Targets ``(n, outputs)``, or ``(n,)`` for one output; integer labels ``(n,)``.
    scale_move
        End each sweep by rescaling every hidden unit against its outgoing weights, where the
        activations are positively homogeneous (ReLU, LeakyReLU, Abs, Identity).
    overrelaxation
        ``alpha`` in ``(-1, 0]``: Gaussian blocks are reflected at their mean, more the closer
        it is to -1, which moves along narrow valleys faster. None draws afresh.
    learn_noise
        Draw the variance of the noise behind each map as well.
    learn_prior_precision
        Draw the precision of the prior of each parameter tensor as well.
    hyperprior
        Shape of the Gamma law that learned inverse variances have a priori. Its mean is what the
        model says, its standard deviation ``1 / sqrt(hyperprior)`` of that.

    Returns
    -------
    Gibbs
        The kernel.

    Raises
    ------
    DataError
        For data that do not fit the network, NaN, or labels out of range.
    OptionError
        For options out of range, or a scale move where no layer allows one.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    >>> x = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
    >>> kernel = gibbs(IntermediateNoiseNetwork(net, 0.1, 0.1), x, x[:, 0])
    >>> kernel.noise_size
    NoiseSize(normals=26, uniforms=10)
    """
    alpha = 0.0
    if overrelaxation is not None:
        advice = "Give a number above -1 and up to 0, such as -0.9."
        alpha = number(overrelaxation, "overrelaxation", above=-1, most=0, advice=advice)
    advice = "Give a positive number, the shape of a Gamma law; 1 is weak."
    hyperprior = number(hyperprior, "hyperprior", above=0, advice=advice)
    x, y = model.check_data(x, y)
    return Gibbs(
        model, x, y, scale_move, alpha, learn_noise, learn_prior_precision, Hyperprior(hyperprior)
    )


@dataclass(frozen=True, eq=False)
class Gibbs(Kernel):
    """Sweeps over all blocks of a network with intermediate noise; made by `gibbs`.

    A state holds the parameters by name and the latent variables ``"latent.<module>"``; with
    learned variances also ``"noise.<module>"`` and ``"precision.<parameter>"``.

    Parameters
    ----------
    model
        The network.
    x, y
        Checked inputs, and targets ``(n, outputs)`` or labels ``(n,)``.
    scale_move, alpha, learn_noise, learn_prior_precision, hyperprior
        As in `gibbs`; ``alpha`` is the over-relaxation.
    """

    model: IntermediateNoiseNetwork
    x: Tensor
    y: Tensor
    scale_move: bool
    alpha: float
    learn_noise: bool
    learn_prior_precision: bool
    hyperprior: Hyperprior

    name = "Gibbs"

    def __post_init__(self) -> None:
        _ = self._plan  # refuse what cannot be moved at once

    # --- what there is ----------------------------------------------------------------------------

    @property
    def space(self) -> ParameterSpace:
        """Names and shapes of the parameters of the network."""
        return self.model.space

    @property
    def dtype(self) -> torch.dtype:
        """That of the inputs."""
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        """That of the inputs."""
        return self.x.device

    @property
    def start_size(self) -> NoiseSize:
        """For parameters from the prior and latent variables from the network."""
        return NoiseSize(normals=self.space.size + self.model.generate_size(self.x))

    @cached_property
    def noise_size(self) -> NoiseSize:
        """Fixed by the sizes of network and data."""
        sizes = [move.size for move, _, _ in self._plan]
        return NoiseSize(sum(s.normals for s in sizes), sum(s.uniforms for s in sizes))

    @cached_property
    def latent_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the latent variables of a chain, examples first, by name."""
        shapes = self.model.latent_shapes(tuple(self.x.shape[1:]))
        return {name: (len(self.x), *shape) for name, shape in shapes.items()}

    @property
    def bytes_per_chain(self) -> int:
        """Latent variables with what is computed of them, parameters and random numbers."""
        latents = sum(math.prod(shape) for shape in self.latent_shapes.values())
        numbers = _COPIES * (latents + self.space.size) + 2 * self.noise_size.normals
        return numbers * self.x.element_size() + 16 * self.noise_size.uniforms

    def identity(self) -> dict[str, Any]:
        """Model, data and options.

        Returns
        -------
        dict
            In JSON's types.
        """
        return {
            "kernel": self.name,
            "model": self.model.to_config(),
            "data": fingerprint({"x": self.x, "y": self.y}),
            "scale_move": self.scale_move,
            "overrelaxation": self.alpha,
            "learn_noise": self.learn_noise,
            "learn_prior_precision": self.learn_prior_precision,
            "hyperprior": self.hyperprior.shape,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    # --- starting ---------------------------------------------------------------------------------

    def zero_start(self, num_chains: int) -> Params:
        """Chains whose parameters and latent variables are all zero, as `start` takes them.

        Parameters
        ----------
        num_chains
            How many.

        Returns
        -------
        dict
            Tensors ``(chains, ...)`` by name.
        """
        shapes = dict(zip(self.space.names, self.space.shapes, strict=True)) | self.latent_shapes
        return {name: self.x.new_zeros(num_chains, *shape) for name, shape in shapes.items()}

    def start(self, initial: Params | None, noise: Noise) -> State:
        """The chains at their beginning.

        Parameters
        ----------
        initial
            None for parameters from the prior. Parameters alone get latent variables by a run
            through the noisy network; with ``"latent.<module>"`` for all modules the chains start
            exactly there: at a posterior draw, if both are those of the teacher of the data.
        noise
            Of size `start_size`.

        Returns
        -------
        dict
            A state.

        Raises
        ------
        ShapeError
            When something is missing, not known, or of another shape.
        """
        chains = len(noise.normals)
        first, second = noise.normals.split(
            [self.space.size, self.start_size.normals - self.space.size], 1
        )
        given = dict(initial or {})
        self._check_start(given, chains)
        state: State = {name: value.to(self.x) for name, value in given.items()}
        if self.space.names[0] not in state:
            state |= self.model.sample_prior(first)
        if not any(name in state for name in self.latent_shapes):
            latents, _ = self.model.generate(self.model_parameters(state), self.x, second)
            if self.model.output == "classification":
                last = f"latent.{self.model.maps[-1].name}"
                latents[last] = _with_largest(latents[last], self.y)
            state |= latents
        ones = torch.ones(chains, dtype=torch.float64, device=self.device)
        if self.learn_noise:
            for name, value in self.model.variances.items():
                state.setdefault(f"noise.{name}", value * ones)
        if self.learn_prior_precision:
            for name, value in self.model.precisions.items():
                state.setdefault(f"precision.{name}", value * ones)
        for name in self._counters:
            state[name] = 0 * ones
        return {name: value.contiguous() for name, value in state.items()}

    def model_parameters(self, state: State) -> Params:
        """The parameters of the network in a state.

        Parameters
        ----------
        state
            Of some chains.

        Returns
        -------
        dict
            ``(chains, *shape)`` by name.
        """
        return {name: state[name] for name in self.space.names}

    def latents(self, state: State) -> Params:
        """The latent variables in a state.

        Parameters
        ----------
        state
            Of some chains.

        Returns
        -------
        dict
            ``(chains, n, *shape)`` by name.
        """
        return {name: state[name] for name in self.latent_shapes}

    def _check_start(self, given: Params, chains: int) -> None:
        shapes = dict(zip(self.space.names, self.space.shapes, strict=True))
        variances = [f"noise.{name}" for name in self.model.variances] * self.learn_noise
        variances += [f"precision.{name}" for name in shapes] * self.learn_prior_precision
        known = shapes | self.latent_shapes | dict.fromkeys(variances, ())
        groups = (tuple(shapes), tuple(self.latent_shapes))
        for group in groups:
            missing = [name for name in group if name not in given]
            if 0 < len(missing) < len(group):
                raise ShapeError(
                    f"{', '.join(missing[:5])} missing",
                    where="initial",
                    advice="Give all parameters or none, and all latent variables or none.",
                )
        if groups[1] and groups[1][0] in given and groups[0][0] not in given:
            raise ShapeError(
                "there are latent variables without parameters",
                where="initial",
                advice="Give the parameters as well.",
            )
        for name, value in given.items():
            if name not in known or tuple(value.shape) != (chains, *known[name]):
                raise ShapeError(
                    f"{name!r} of shape {tuple(value.shape)}",
                    where="initial",
                    advice=f"It takes {', '.join(known)}, with {chains} chains in front.",
                )
        last = f"latent.{self.model.maps[-1].name}"
        if last in given and self.model.output == "classification":
            value = given[last]
            labels = self.y.to(value.device).expand(value.shape[:2])[..., None]
            if not bool((value.gather(2, labels) >= value).all()):
                raise DataError(
                    "the largest latent output of an example is not that of its label",
                    where=f"initial {last!r}",
                    advice="Start from the latent variables that generated the labels, or give "
                    "parameters only.",
                )

    # --- moving -----------------------------------------------------------------------------------

    @cached_property
    def links(self) -> tuple[LinkedMap, ...]:
        """The maps between the variables, in order."""
        return linked_maps(self.model, tuple(self.x.shape[1:]))

    @cached_property
    def _plan(self) -> tuple[tuple[Move, slice, slice], ...]:
        """All moves of a sweep, and which random numbers each takes."""
        plan, normals, uniforms = [], 0, 0
        for move in self._moves():
            size = move.size
            plan.append(
                (
                    move,
                    slice(normals, normals + size.normals),
                    slice(uniforms, uniforms + size.uniforms),
                )
            )
            normals, uniforms = normals + size.normals, uniforms + size.uniforms
        return tuple(plan)

    def _moves(self) -> list[Move]:
        count, links = len(self.x), self.links
        moves: list[Move] = []
        learned = self.learn_noise or self.learn_prior_precision
        if self.model.output == "classification":
            moves.append(ClassMove(links[-1], count))
        for k in reversed(range(len(links))):
            if isinstance(links[k].item, AffineMap):
                moves.append(ParameterMove(links[k], self.model, self.x, self.alpha, learned))
            if k > 0:
                moves.append(LatentMove(links[k - 1], links[k], count, self.alpha))
        if self.scale_move:
            moves += self._scale_moves()
        if learned:
            moves.append(self._precision_move())
        return moves

    def _scale_moves(self) -> list[Move]:
        affine = [k for k, link in enumerate(self.links) if isinstance(link.item, AffineMap)]
        moves: list[Move] = []
        for first, last in itertools.pairwise(affine):
            between = [link.item for link in self.links[first:last]]
            if all(
                item.activation.positively_homogeneous
                for item in between
                if isinstance(item, ActivationMap)
            ):
                group = self.links[first : last + 1]
                moves.append(ScaleMove(group, len(self.x), self.model.precisions))
        if not moves:
            raise OptionError(
                "no layer has positively homogeneous activations between linear maps",
                where="scale_move",
                advice="Leave it out: it is for ReLU, LeakyReLU, Abs and Identity.",
            )
        return moves

    def _precision_move(self) -> Move:
        links = self.links if self.learn_noise else ()
        precisions = self.model.precisions if self.learn_prior_precision else {}
        counts = [len(self.x) * link.outputs for link in links]
        sizes = dict(zip(self.space.names, self.space.sizes, strict=True))
        counts += [sizes[name] for name in precisions]
        return PrecisionMove(links, precisions, counts, self.hyperprior, self.device)

    @cached_property
    def _counters(self) -> tuple[str, ...]:
        """Names in the state under which moves report."""
        moves = [move for move, _, _ in self._plan]
        names = ["unsolved"] * any(isinstance(m, LatentMove) and m.iterates for m in moves)
        return (*names, "scale_acceptance") if self.scale_move else tuple(names)

    def step(self, state: State, noise: Noise) -> State:
        """One sweep.

        Parameters
        ----------
        state
            Not changed.
        noise
            Of size `noise_size`.

        Returns
        -------
        dict
            The next state.
        """
        return self.sweep(state, noise, self.y)

    @torch.no_grad()
    def sweep(self, state: State, noise: Noise, y: Tensor) -> State:
        """One sweep for any data: each chain may have targets of its own.

        Parameters
        ----------
        state
            Not changed.
        noise
            Of size `noise_size`.
        y
            ``(n, outputs)`` or ``(chains, n, outputs)``; labels ``(n,)`` or ``(chains, n)``.

        Returns
        -------
        dict
            The next state.
        """
        values: Values = dict(state)
        values["input"] = self.x
        if self.model.output == "classification":
            values["labels"] = y
        else:
            values["target"] = y if y.dim() == 3 else y[None]
        for name in self._counters:
            values[name] = torch.zeros_like(values[name])
        for move, normals, uniforms in self._plan:
            move.apply(values, noise.normals[:, normals], noise.uniforms[:, uniforms])
        return {name: values[name] for name in state}

    # --- what is said of a step -------------------------------------------------------------------

    def vectors(self, state: State) -> Float[Tensor, "chains P"]:
        """The parameters of each chain, laid out by `space`.

        Returns
        -------
        Tensor
            ``(chains, P)``.
        """
        return self.space.ravel(state)

    @torch.no_grad()
    def statistics(self, state: State) -> Mapping[str, Float[Tensor, " chains"]]:
        """Minus the log density of all that is sampled, and the energy of each noise.

        Parameters
        ----------
        state
            Of some chains.

        Returns
        -------
        dict
            ``"potential"``; ``"energy.<module>"``, the squares of the noise behind a module in
            units of its variance (on average over data from the model: their number); learned
            variances and precisions; ``"scale_acceptance"``, the share of accepted scales;
            ``"unsolved"``, examples on which conjugate gradients did not converge.
        """
        found: dict[str, Tensor] = {}
        potential: Tensor | float = 0.0
        y = self.y if self.model.output == "regression" else self.y[:, None]
        parts = self.model.residuals(self.model_parameters(state), self.latents(state), self.x, y)
        for (item, rest, axes), link in zip(parts, self.links, strict=True):
            inverse = self._inverse(state, f"noise.{item.name}", link.variance)
            count = len(self.x) * link.outputs
            energy = sum_squares(rest, axes) * inverse
            potential = potential + 0.5 * (energy - count * _log(inverse) + count * _LOG_TWO_PI)
            found[f"energy.{item.name}"] = energy
        for name, size in zip(self.space.names, self.space.sizes, strict=True):
            precision = state.get(f"precision.{name}", self.model.precisions[name])
            squares = sum_squares(state[name].flatten(1), 1)
            potential = potential + 0.5 * (precision * squares - size * _log(precision))
            potential = potential + 0.5 * size * _LOG_TWO_PI
        for name, value in state.items():
            if name.startswith(("noise.", "precision.")):
                potential = potential + self._hyper_potential(name, value)
                found[name] = value
        found |= {name: state[name] for name in self._counters}
        if self.scale_move:
            scales = sum(isinstance(move, ScaleMove) for move, _, _ in self._plan)
            found["scale_acceptance"] = found["scale_acceptance"] / scales
        return {"potential": torch.as_tensor(potential), **found}

    def _inverse(self, state: State, name: str, fixed: float) -> Tensor | float:
        return 1 / state[name] if name in state else 1 / fixed

    def _hyper_potential(self, name: str, value: Tensor) -> Tensor:
        """Minus the log density of an inverse variance under its Gamma law."""
        kind, _, rest = name.partition(".")
        given = self.model.variances[rest] if kind == "noise" else 1 / self.model.precisions[rest]
        inverse = 1 / value if kind == "noise" else value
        shape = self.hyperprior.shape
        rate = shape * given
        constant = shape * math.log(rate) - math.lgamma(shape)
        return rate * inverse - (shape - 1) * inverse.log() - constant


def _log(value: Tensor | float) -> Tensor | float:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def _with_largest(latents: Tensor, labels: Tensor) -> Tensor:
    """The same numbers with the largest of each example at the place of its label."""
    places = labels.expand(latents.shape[:2])[..., None]
    largest = latents.argmax(2, keepdim=True)
    swapped = latents.scatter(2, largest, latents.gather(2, places))
    return swapped.scatter(2, places, latents.amax(2, keepdim=True))
