"""What samplers that follow a gradient have in common; what those with a Metropolis test share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.networks.parameters import ParameterSpace
from pushforward.options import number
from pushforward.runs.store import fingerprint
from pushforward.sampling.adaptation import (
    Phase,
    average_step_size,
    collect_moments,
    fresh_averaging,
    log_lengths,
    phase,
    scale_of_moments,
)
from pushforward.sampling.dynamics import Point, first_step_size, strides
from pushforward.sampling.kernel import Kernel, State
from pushforward.sampling.noise import Noise, NoiseSize
from pushforward.sampling.potential import Potential
from pushforward.typing import Params

__all__ = ["AdaptiveKernel", "GradientKernel"]

_MASSES = ("diagonal", "dense", "identity")


@dataclass(frozen=True, eq=False)
class GradientKernel(Kernel):
    """A kernel of a potential, whose state holds ``"vectors"`` and ``"gradient"``.

    Parameters
    ----------
    potential
        Minus the log density.
    """

    potential: Potential

    def __post_init__(self) -> None:
        if not isinstance(self.potential, Potential):
            raise OptionError(
                f"{type(self.potential).__name__} is no potential",
                where=self.name,
                advice="Pass pf.Potential.of_network(net, data, likelihood), or of_density(...).",
            )

    @property
    def space(self) -> ParameterSpace:
        """Of the potential."""
        return self.potential.space

    @property
    def dtype(self) -> torch.dtype:
        """Of the potential."""
        return self.potential.dtype

    @property
    def device(self) -> torch.device:
        """Of the potential."""
        return self.potential.device

    def vectors(self, state: State) -> Float[Tensor, "chains P"]:
        """Where the chains are."""
        return state["vectors"]

    @property
    def bytes_per_chain(self) -> int:
        """Of the potential, and the vectors that a step holds."""
        itemsize = torch.empty((), dtype=self.dtype).element_size()
        held = self._held_vectors * self.space.size + self._held_entries
        return self.potential.bytes_per_chain + held * itemsize

    @property
    @abstractmethod
    def _held_vectors(self) -> int:
        """How many vectors of one chain are in memory at once."""

    @property
    def _held_entries(self) -> int:
        """How many numbers besides."""
        return 0

    def identity(self) -> dict[str, Any]:
        """Name, potential and settings."""
        return {
            "kernel": self.name,
            "potential": self.potential.identity(),
            "settings": self._settings(),
        }

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """All that tells two kernels of one kind and one potential apart."""


@dataclass(frozen=True, eq=False)
class AdaptiveKernel(GradientKernel):
    """A Metropolis kernel whose step size and scale are learned in the warm-up, then frozen.

    Parameters
    ----------
    potential
        Minus the log density.
    step_size
        In units of the scale; None to learn it in the warm-up. Without any warm-up a chain keeps
        the guess with which it starts: the size at which one step is accepted with probability 0.8.
    target_acceptance
        That the learned step size aims at.
    mass
        ``"diagonal"`` learns the standard deviations of the parameters. ``"dense"`` learns their
        covariance, of use where they are strongly correlated and few: memory and time of a step
        grow with ``P^2``. It is taken from windows with at least ``2 P`` draws, which wants a
        warm-up of some ``4 P`` steps; shorter ones leave standard deviations. ``"identity"`` learns
        nothing. A tensor gives the mass itself: inverse variances ``(P,)`` or an inverse covariance
        ``(P, P)``.

    Raises
    ------
    OptionError
        For settings out of their range.
    """

    _: KW_ONLY
    step_size: float | None = None
    target_acceptance: float = 0.8
    mass: str | Tensor = "diagonal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None:
            step_size = number(self.step_size, "step_size", above=0)
            object.__setattr__(self, "step_size", step_size)
        advice = "Give a number between 0 and 1, such as 0.8."
        aim = number(self.target_acceptance, "target_acceptance", above=0, below=1, advice=advice)
        object.__setattr__(self, "target_acceptance", aim)
        self._check_mass()

    def _check_mass(self) -> None:
        size = self.space.size
        if isinstance(self.mass, Tensor):
            good = self.mass.shape in {(size,), (size, size)} and self.mass.is_floating_point()
            if not (good and _is_positive(self.mass)):
                raise OptionError(
                    f"a tensor {tuple(self.mass.shape)} that is no mass matrix, or its diagonal",
                    where="mass",
                    advice=f"Give {size} positive numbers, inverse variances, or a positive "
                    f"definite matrix ({size}, {size}).",
                )
        elif not (isinstance(self.mass, str) and self.mass in _MASSES):
            raise OptionError(
                f"there is no mass {self.mass!r:.80}",
                where="mass",
                advice=f"Choose one of {', '.join(_MASSES)}, or give a tensor of inverse "
                "variances or an inverse covariance.",
            )

    @property
    def start_size(self) -> NoiseSize:
        """A start of the potential, and a momentum to guess the step size with."""
        return NoiseSize(normals=self.potential.start_normals + self.space.size)

    def start(self, initial: Params | None, noise: Noise) -> State:
        """Chains where the potential starts them, with a guess of the step size."""
        own = self.potential.start_normals
        vectors = self.potential.start(initial, noise.normals[:, :own])
        value, gradient = self.potential.value_and_gradient(vectors)
        state = {
            "vectors": vectors,
            "gradient": gradient,
            "potential": value,
            "acceptance": torch.ones_like(value),
            "divergent": torch.zeros_like(value),
        }
        if self._learns_scale:
            ones = torch.ones_like(vectors)
            state["scale"] = ones.diag_embed() if self.mass == "dense" else ones
            state["moments_mean"] = torch.zeros_like(vectors)
            state["moments_spread"] = torch.zeros_like(state["scale"])
        if self.step_size is None:
            point = Point(vectors, noise.normals[:, own:], gradient, value)
            size = self._of_leapfrog(first_step_size(self.potential, point, self._scale(state)))
            state["averaging"] = fresh_averaging(size)
        else:
            size = torch.full_like(value, self.step_size)
        return state | {"step_size": size}

    @property
    def _held_entries(self) -> int:
        """Of matrices: the stride; where they are learned, also scale, moments and a root."""
        if isinstance(self.mass, Tensor):
            return self.space.size**2 if self.mass.dim() == 2 else 0
        return 4 * self.space.size**2 if self.mass == "dense" else 0

    def warm_up(self, state: State, noise: Noise, step: int, total: int) -> State:
        """Move every chain once; learn its step size, and its scale in the slow windows."""
        return self._learn(self.step(state, noise), phase(step, total))

    def statistics(self, state: State) -> Mapping[str, Float[Tensor, " chains"]]:
        """Acceptance, potential, divergences and step size."""
        return {name: state[name] for name in ("acceptance", "potential", "divergent", "step_size")}

    def _of_leapfrog(self, size: Tensor) -> Tensor:
        """The step size that corresponds to one of the leapfrog integrator."""
        return size

    def _scale(self, state: State) -> Tensor:
        """A root of the inverse mass, as `strides` takes it."""
        return state.get("scale", self._fixed_scale)

    @property
    def _learns_scale(self) -> bool:
        return isinstance(self.mass, str) and self.mass != "identity"

    @cached_property
    def _fixed_scale(self) -> Tensor:
        if not isinstance(self.mass, Tensor):
            return torch.ones(1, 1, dtype=self.dtype, device=self.device)
        mass = self.mass.to(self.device, torch.float64)
        return (mass.rsqrt() if mass.dim() == 1 else _inverse_root(mass)).to(self.dtype)[None]

    def _stride(self, state: State) -> Float[Tensor, "chains ..."]:
        """Step size times scale."""
        return strides(state["step_size"], self._scale(state))

    def _learn(self, state: State, now: Phase) -> State:
        learned: State = {}
        if self.step_size is None:
            learned["averaging"], learned["step_size"] = average_step_size(
                state["averaging"],
                state["step_size"],
                state["acceptance"],
                self.target_acceptance,
                now,
            )
        if now.slow and self._learns_scale:
            mean, spread = collect_moments(
                state["moments_mean"], state["moments_spread"], state["vectors"], now
            )
            learned |= {"moments_mean": mean, "moments_spread": spread}
            if now.closes:
                learned["scale"] = scale_of_moments(spread, state["scale"], now.collected)
                if self.step_size is None:
                    # The same steps in the new units, as far as one number can say it.
                    before, after = (log_lengths(s["scale"]) for s in (state, learned))
                    shrinks = (before - after).mean(-1)
                    factor = self._of_leapfrog(shrinks.to(torch.float64).exp())
                    learned["step_size"] = learned["step_size"] * factor
        return state | learned

    def _settings(self) -> dict[str, Any]:
        mass = self.mass if isinstance(self.mass, str) else fingerprint({"mass": self.mass})
        return {
            "step_size": self.step_size,
            "target_acceptance": self.target_acceptance,
            "mass": mass,
        }


def _is_positive(mass: Tensor) -> bool:
    if not bool(torch.isfinite(mass).all()):
        return False
    if mass.dim() == 1:
        return bool((mass > 0).all())
    symmetric = torch.allclose(mass, mass.mT, rtol=1e-4, atol=1e-6 * float(mass.abs().max()))
    return symmetric and int(torch.linalg.cholesky_ex(mass.double()).info) == 0


def _inverse_root(mass: Float[Tensor, "P P"]) -> Float[Tensor, "P P"]:
    """``S`` with ``S S^T = M^{-1}``."""
    factor = torch.linalg.cholesky(mass)
    unit = torch.eye(len(mass), dtype=mass.dtype, device=mass.device)
    return torch.linalg.solve_triangular(factor.mT, unit, upper=True)
