"""The Metropolis-adjusted Langevin algorithm: Langevin steps, corrected exactly.

Roberts and Tweedie (1996). A step of size ``eps`` proposes ``w' = w - (eps / 2) s^2 grad U(w) +
sqrt(eps) s N`` with ``N`` standard normal and ``s`` the scale of the parameters, in the convention
of SGLD, whose exact counterpart it is. It is accepted with the ratio of target times proposal, both
ways round.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.sampling.dynamics import LARGEST_ENERGY_ERROR, acceptance_probability
from pushforward.sampling.gradient_kernel import AdaptiveKernel
from pushforward.sampling.kernel import State
from pushforward.sampling.noise import Noise, NoiseSize

__all__ = ["MALA", "langevin_log_ratio"]


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
        ``"identity"``: they are taken as 1. A tensor ``(P,)``: inverse variances.

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
        vectors, gradient, value = state["vectors"], state["gradient"], state["potential"]
        size, scale = state["step_size"], self._scale(state)
        stride = size.sqrt().to(self.dtype)[:, None] * scale
        proposal = vectors + stride * torch.add(noise.normals, stride * gradient, alpha=-0.5)
        value_there, gradient_there = self.potential.value_and_gradient(proposal)
        log_ratio = langevin_log_ratio(
            vectors, gradient, value, proposal, gradient_there, value_there, size, scale
        )
        acceptance = acceptance_probability(log_ratio)
        accepted = noise.uniforms[:, 0] < acceptance
        wide = accepted[:, None]
        return state | {
            "vectors": torch.where(wide, proposal, vectors),
            "gradient": torch.where(wide, gradient_there, gradient),
            "potential": torch.where(accepted, value_there, value),
            "acceptance": acceptance,
            "divergent": (~(log_ratio > -LARGEST_ENERGY_ERROR)).to(acceptance.dtype),
        }

    def _of_leapfrog(self, size: Tensor) -> Tensor:
        """A Langevin step of ``eps`` is a leapfrog step of ``sqrt(eps)``."""
        return size.square()


def langevin_log_ratio(
    vectors: Float[Tensor, "chains P"],
    gradient: Float[Tensor, "chains P"],
    value: Float[Tensor, " chains"],
    proposal: Float[Tensor, "chains P"],
    proposal_gradient: Float[Tensor, "chains P"],
    proposal_value: Float[Tensor, " chains"],
    step_size: Float[Tensor, " chains"],
    scale: Float[Tensor, "#chains #P"],
) -> Float[Tensor, " chains"]:
    """Log of the Metropolis-Hastings ratio of a Langevin proposal.

    ``U(w) - U(w') + log q(w | w') - log q(w' | w)`` with ``q(b | a)`` normal around ``a - (eps / 2)
    s^2 grad U(a)`` with variances ``eps s^2``. As a diagnostic of SGLD, both points have to be
    evaluated on the same batch.

    Parameters
    ----------
    vectors, gradient, value
        ``(chains, P)``, ``(chains, P)`` and ``(chains,)``: where chains are, ``grad U`` and ``U``.
    proposal, proposal_gradient, proposal_value
        The same where they would go.
    step_size
        ``(chains,)``: ``eps``.
    scale
        Of the parameters: ``s``.

    Returns
    -------
    Tensor
        ``(chains,)`` float64, NaN or infinite where a potential is.
    """
    # Residuals of both proposals in units of eps s^2; their difference is that of the squares.
    half_drift = 0.5 * step_size.to(vectors.dtype)[:, None] * scale
    move = (proposal - vectors) / scale
    forth = torch.addcmul(move, half_drift, gradient)
    back = torch.addcmul(-move, half_drift, proposal_gradient)
    squares = (forth * forth - back * back).sum(-1, dtype=torch.float64)
    return value - proposal_value + squares / (2 * step_size)
