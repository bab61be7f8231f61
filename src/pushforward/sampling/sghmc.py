"""Stochastic gradient Hamiltonian Monte Carlo: Langevin dynamics with a momentum.

Chen, Fox and Guestrin (2014) for the dynamics ``dw = r dt``, ``dr = -grad U dt - friction r dt +
sqrt(2 friction) dB``. The integrator is that of Leimkuhler and Matthews (2013), which alternates
exact drifts, an exact Ornstein-Uhlenbeck step and kicks; with one gradient a step its positions
have exactly the right variance on a quadratic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.options import number
from pushforward.sampling.gradient_kernel import GradientKernel
from pushforward.sampling.kernel import State
from pushforward.sampling.noise import Noise, NoiseSize
from pushforward.sampling.sgld import gradient_statistics
from pushforward.typing import Params

__all__ = ["SGHMC", "MomentumKernel"]


@dataclass(frozen=True, eq=False)
class MomentumKernel(GradientKernel):
    """What kernels with a momentum and stochastic gradients share.

    Parameters
    ----------
    potential
        Minus the log density, with or without minibatches.
    step_size
        Time of a step.

    Raises
    ------
    OptionError
        For settings out of their range.
    """

    _: KW_ONLY
    step_size: float

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "step_size", number(self.step_size, "step_size", above=0))

    @property
    def start_size(self) -> NoiseSize:
        """A start of the potential, a momentum and a first batch."""
        return NoiseSize(
            self.potential.start_normals + self.space.size, self.potential.batch_uniforms
        )

    @property
    def noise_size(self) -> NoiseSize:
        """A fluctuation and a batch."""
        return NoiseSize(self.space.size, self.potential.batch_uniforms)

    @property
    def _held_vectors(self) -> int:
        return 6

    def start(self, initial: Params | None, noise: Noise) -> State:
        """Chains where the potential starts them, with momenta in equilibrium."""
        own = self.potential.start_normals
        vectors = self.potential.start(initial, noise.normals[:, :own])
        value, gradient = self.potential.stochastic_value_and_gradient(vectors, noise.uniforms)
        # The state is half a kick ahead of the moment at which momenta are standard normal.
        momentum = torch.add(noise.normals[:, own:], gradient, alpha=-self.step_size / 2)
        return {
            "vectors": vectors,
            "momentum": momentum,
            "gradient": gradient,
            "potential": value,
        }

    def statistics(self, state: State) -> Mapping[str, Float[Tensor, " chains"]]:
        """Those of SGLD, and ``"temperature"``: the mean squared momentum, 1 when all is well."""
        momentum = torch.add(state["momentum"], state["gradient"], alpha=self.step_size / 2)
        temperature = momentum.square().mean(-1, dtype=torch.float64)
        return gradient_statistics(state, self.step_size) | {"temperature": temperature}

    def _moved(self, state: State, vectors: Tensor, momentum: Tensor, noise: Noise) -> State:
        """Half a drift, and a whole kick by the gradient of a fresh batch."""
        vectors = torch.add(vectors, momentum, alpha=self.step_size / 2)
        value, gradient = self.potential.stochastic_value_and_gradient(vectors, noise.uniforms)
        return state | {
            "vectors": vectors,
            "momentum": torch.add(momentum, gradient, alpha=-self.step_size),
            "gradient": gradient,
            "potential": value,
        }


@dataclass(frozen=True, eq=False)
class SGHMC(MomentumKernel):
    """Stochastic gradient Hamiltonian Monte Carlo.

    On a quadratic ``U = a w^2 / 2`` the stationary variance is exactly ``1 / a`` at every stable
    step size, ``step_size^2 a < 4``. A minibatch that adds variance ``s^2`` to the gradient heats
    it: by the factor ``1 + step_size s^2 / (2 friction)`` to first order.

    Parameters
    ----------
    potential
        Minus the log density, with or without minibatches.
    step_size
        Time of a step; its square compares with the step size of SGLD.
    friction
        Rate at which momentum is forgotten. Small: long moves, but hotter with minibatches.

    Raises
    ------
    OptionError
        For settings out of their range.
    """

    name = "SGHMC"

    _: KW_ONLY
    friction: float

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "friction", number(self.friction, "friction", above=0))

    def step(self, state: State, noise: Noise) -> State:
        """Drift, fluctuate, drift, kick."""
        kept = math.exp(-self.friction * self.step_size)
        vectors = torch.add(state["vectors"], state["momentum"], alpha=self.step_size / 2)
        momentum = torch.add(
            kept * state["momentum"], noise.normals, alpha=math.sqrt(1 - kept * kept)
        )
        return self._moved(state, vectors, momentum, noise)

    def _settings(self) -> dict[str, Any]:
        return {"step_size": self.step_size, "friction": self.friction}
