"""Hamiltonian Monte Carlo: long moves along the dynamics, accepted by the energy error.

Neal (2011), with a diagonal mass and steps whose number varies, so that no direction is ever in
resonance with the length of a trajectory.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from math import ceil, floor
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.options import number, whole_number
from pushforward.sampling.dynamics import (
    LARGEST_ENERGY_ERROR,
    Point,
    acceptance_probability,
    leapfrog,
)
from pushforward.sampling.gradient_kernel import AdaptiveKernel
from pushforward.sampling.kernel import State
from pushforward.sampling.noise import Noise, NoiseSize
from pushforward.typing import Params

__all__ = ["HMC"]

_DEFAULT_STEPS = 16
_MOST_STEPS = 1024  # of a trajectory whose length is given
_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, cover [0, 1) evenly at every length


@dataclass(frozen=True, eq=False)
class HMC(AdaptiveKernel):
    """Hamiltonian Monte Carlo.

    Numbers of steps follow a fixed even sequence, not random numbers: chains that run side by side
    then make equally many and none waits for another. A cycle of kernels that leave a law invariant
    does so too.

    Parameters
    ----------
    potential
        Minus the log density.
    step_size
        Of the leapfrog integrator, in units of the scale (see `mass`); None to learn it in the
        warm-up. Without any warm-up chains keep the guess with which they start.
    num_steps
        Leapfrog steps of a trajectory. Default: 16, unless `trajectory_length` is given.
    trajectory_length
        Of a trajectory, in units of time; the number of steps is then its ratio to the step size
        of each chain, at most 1024.
    jitter
        How far, relative to their middle, numbers of steps vary: 16 and 0.5 give 8 to 24.
    target_acceptance
        That the learned step size aims at.
    mass
        ``"diagonal"``: the standard deviations of the parameters are learned in the warm-up.
        ``"dense"``: their covariance, by windows with twice as many draws as parameters.
        ``"identity"``: the identity. A tensor: inverse variances ``(P,)``, or an inverse covariance
        ``(P, P)``.

    Raises
    ------
    OptionError
        For settings out of their range.
    """

    name = "HMC"

    _: KW_ONLY
    num_steps: int | None = None
    trajectory_length: float | None = None
    jitter: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps is not None and self.trajectory_length is not None:
            raise OptionError(
                "both a number of steps and a length",
                where="trajectory_length",
                advice="Give num_steps or trajectory_length, not both.",
            )
        if self.num_steps is not None:
            object.__setattr__(self, "num_steps", whole_number(self.num_steps, "num_steps"))
        if self.trajectory_length is not None:
            length = number(self.trajectory_length, "trajectory_length", above=0)
            object.__setattr__(self, "trajectory_length", length)
        object.__setattr__(self, "jitter", number(self.jitter, "jitter", least=0, below=1))

    @property
    def noise_size(self) -> NoiseSize:
        """A momentum and an acceptance."""
        return NoiseSize(normals=self.space.size, uniforms=1)

    @property
    def _held_vectors(self) -> int:
        return 12

    def start(self, initial: Params | None, noise: Noise) -> State:
        """Chains where the potential starts them, at the beginning of the sequence of lengths."""
        state = super().start(initial, noise)
        return state | {"turn": torch.zeros_like(state["potential"], dtype=torch.int64)}

    def step(self, state: State, noise: Noise) -> State:
        """One trajectory of every chain and its acceptance."""
        here = Point(state["vectors"], noise.normals, state["gradient"], state["potential"])
        there = leapfrog(self.potential, here, self._stride(state), self._counts(state))
        log_ratio = here.energy - there.energy
        acceptance = acceptance_probability(log_ratio)
        accepted = noise.uniforms[:, 0] < acceptance
        wide = accepted[:, None]
        return state | {
            "vectors": torch.where(wide, there.vectors, here.vectors),
            "gradient": torch.where(wide, there.gradient, here.gradient),
            "potential": torch.where(accepted, there.value, here.value),
            "acceptance": acceptance,
            "divergent": (~(log_ratio > -LARGEST_ENERGY_ERROR)).to(acceptance.dtype),
            "turn": state["turn"] + 1,
        }

    def _counts(self, state: State) -> Int[Tensor, " chains"]:
        """How many steps the next trajectory of each chain has."""
        fraction = ((state["turn"] + 1).double() * _GOLDEN).frac()
        if self.trajectory_length is None:
            middle = self.num_steps or _DEFAULT_STEPS
            fewest = max(1, ceil(middle * (1 - self.jitter)))
            most = max(fewest, floor(middle * (1 + self.jitter)))
            return fewest + (fraction * (most - fewest + 1)).long()
        length = self.trajectory_length * (1 + self.jitter * (2 * fraction - 1))
        return (length / state["step_size"]).round().clamp(1, _MOST_STEPS).long()

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {
            "num_steps": self.num_steps,
            "trajectory_length": self.trajectory_length,
            "jitter": self.jitter,
        }
