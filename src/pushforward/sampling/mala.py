"""The Metropolis-adjusted Langevin algorithm: Langevin steps, corrected exactly.

Roberts and Tweedie (1996). A step of size ``eps`` proposes ``w' = w - (eps / 2) s^2 grad U(w) +
sqrt(eps) s N`` with ``N`` standard normal and ``s`` the scale of the parameters, in the convention
of SGLD, whose exact counterpart it is. That is one leapfrog step of length ``sqrt(eps)`` with ``N``
for a momentum, and the ratio of target times proposal, both ways round, is that of the energies.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from pushforward.sampling.dynamics import (
    LARGEST_ENERGY_ERROR,
    Point,
    acceptance_probability,
    leapfrog,
    strides,
)
from pushforward.sampling.gradient_kernel import AdaptiveKernel
from pushforward.sampling.kernel import State
from pushforward.sampling.noise import Noise, NoiseSize

__all__ = ["MALA"]


@dataclass(frozen=True, eq=False)
class MALA(AdaptiveKernel):
    """The Metropolis-adjusted Langevin algorithm.

    Parameters
    ----------
    potential
        Minus the log density.
    step_size
        ``eps``, the variance of a proposal in units of the squared scale; None to learn it in the
        warm-up. Without any warm-up chains keep the guess with which they start.
    target_acceptance
        That the learned step size aims at. Default 0.574, the best in many dimensions (Roberts and
        Rosenthal 1998).
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

    name = "MALA"

    _: KW_ONLY
    target_acceptance: float = 0.574

    @property
    def noise_size(self) -> NoiseSize:
        """A proposal and an acceptance."""
        return NoiseSize(normals=self.space.size, uniforms=1)

    @property
    def _held_vectors(self) -> int:
        return 10

    def step(self, state: State, noise: Noise) -> State:
        """One proposal to every chain and its acceptance."""
        here = Point(state["vectors"], noise.normals, state["gradient"], state["potential"])
        stride = strides(state["step_size"].sqrt(), self._scale(state))
        there = leapfrog(self.potential, here, stride, torch.ones_like(here.value).long())
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
        }

    def _of_leapfrog(self, size: Tensor) -> Tensor:
        """A Langevin step of ``eps`` is a leapfrog step of ``sqrt(eps)``."""
        return size.square()
