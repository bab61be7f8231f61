"""Hamiltonian dynamics of many chains, in units in which every momentum is standard normal.

With a diagonal mass ``m`` and the potential ``U(w)``, write ``r = m^{-1/2} p`` for the momentum and
``s = m^{-1/2}`` for the scale of the parameters. Then ``H = U(w) + |r|^2 / 2``, ``dw = s r dt`` and
``dr = -s grad U dt``; the stride ``h s`` is all that a step of length ``h`` has to know of mass and
step size, and inner products of the mass metric are plain ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pushforward.sampling.potential import Potential

__all__ = [
    "LARGEST_ENERGY_ERROR",
    "Point",
    "acceptance_probability",
    "first_step_size",
    "kinetic_energy",
    "leapfrog",
]

LARGEST_ENERGY_ERROR = 1000.0
"""An energy that grows by more is no longer that of the trajectory: it has diverged."""

_FIRST_ACCEPTANCE = 0.8
_MOST_DOUBLINGS = 60


class Point(NamedTuple):
    """Where chains are in phase space.

    Parameters
    ----------
    vectors, momentum, gradient
        ``(chains, P)``.
    value
        ``(chains,)`` float64: the potential.
    """

    vectors: Tensor
    momentum: Tensor
    gradient: Tensor
    value: Tensor

    @property
    def energy(self) -> Float[Tensor, " chains"]:
        """Potential and kinetic, in float64."""
        return self.value + kinetic_energy(self.momentum)


def kinetic_energy(momentum: Float[Tensor, "chains P"]) -> Float[Tensor, " chains"]:
    """Half the squared length, summed in float64.

    Parameters
    ----------
    momentum
        ``(chains, P)``.

    Returns
    -------
    Tensor
        ``(chains,)`` float64.
    """
    return 0.5 * (momentum * momentum).sum(-1, dtype=torch.float64)


def leapfrog(
    potential: Potential,
    point: Point,
    stride: Float[Tensor, "chains #P"],
    counts: Int[Tensor, " chains"],
) -> Point:
    """Follow the dynamics; volume is preserved, and a negated momentum leads back.

    Parameters
    ----------
    potential
        With gradient.
    point
        Not changed.
    stride
        ``(chains, P)`` or ``(chains, 1)``: step size times scale.
    counts
        ``(chains,)`` steps of each chain, at least 1. All chains go as far as the longest, and
        those that have arrived wait.

    Returns
    -------
    Point
        At the end.
    """
    fewest, most = torch.stack(torch.aminmax(counts)).tolist()
    vectors, momentum, gradient, value = point
    momentum = torch.addcmul(momentum, stride, gradient, value=-0.5)
    for done in range(int(most)):
        ahead = torch.addcmul(vectors, stride, momentum)
        value_ahead, gradient_ahead = potential.value_and_gradient(ahead)
        if done < fewest:
            vectors, gradient, value = ahead, gradient_ahead, value_ahead
            momentum = torch.addcmul(momentum, stride, gradient, value=-1.0)
            continue
        moves = done < counts
        wide = moves[:, None]
        kicked = torch.addcmul(momentum, stride, gradient_ahead, value=-1.0)
        vectors, gradient = (
            torch.where(wide, ahead, vectors),
            torch.where(wide, gradient_ahead, gradient),
        )
        momentum, value = (
            torch.where(wide, kicked, momentum),
            torch.where(moves, value_ahead, value),
        )
    # The last kick was a whole one, as between two steps; half of it is taken back.
    return Point(vectors, torch.addcmul(momentum, stride, gradient, value=0.5), gradient, value)


def acceptance_probability(log_ratio: Float[Tensor, " chains"]) -> Float[Tensor, " chains"]:
    """``min(1, exp(log_ratio))``, and 0 where the ratio is NaN.

    Parameters
    ----------
    log_ratio
        ``(chains,)``.

    Returns
    -------
    Tensor
        ``(chains,)`` of the same dtype.
    """
    return log_ratio.clamp(max=0.0).exp().nan_to_num(nan=0.0)


def first_step_size(
    potential: Potential, point: Point, scale: Float[Tensor, "#chains #P"]
) -> Float[Tensor, " chains"]:
    """A step size at which one step is about as good as wanted, by doubling or halving.

    Hoffman and Gelman (2014), algorithm 4, with the acceptance of 0.8 that Stan asks for.

    Parameters
    ----------
    potential
        With gradient.
    point
        Where the chains begin, with a random momentum.
    scale
        Of the parameters.

    Returns
    -------
    Tensor
        ``(chains,)`` float64; each for its own chain.
    """
    energy = point.energy
    size = torch.ones_like(energy)
    once = torch.ones_like(energy, dtype=torch.int64)
    grows = going = None
    for _ in range(_MOST_DOUBLINGS):
        stride = size.to(scale.dtype)[:, None] * scale
        ahead = leapfrog(potential, point, stride, once)
        good = acceptance_probability(energy - ahead.energy) > _FIRST_ACCEPTANCE
        if grows is None or going is None:
            grows, going = good, torch.ones_like(good)
        going = going & (good == grows)
        if not bool(going.any()):
            break
        size = torch.where(going, torch.where(grows, 2 * size, size / 2), size)
    return size
