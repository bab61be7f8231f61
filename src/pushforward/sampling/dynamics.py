"""Hamiltonian dynamics of many chains, in units in which every momentum is standard normal.

With a mass ``M`` and the potential ``U(w)``, choose a scale ``S`` of the parameters with
``S S^T = M^{-1}`` and write ``r = S^T p`` for the momentum. Then ``H = U(w) + |r|^2 / 2``,
``dw = S r dt`` and ``dr = -S^T grad U dt``; the stride ``h S`` is all that a step of length ``h``
has to know of mass and step size, and inner products of the mass metric are plain ones. A diagonal
scale is kept as its diagonal.
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
    "kicked",
    "kinetic_energy",
    "leapfrog",
    "moved",
    "strides",
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


def strides(
    step_size: Float[Tensor, " chains"], scale: Float[Tensor, "#chains ..."]
) -> Float[Tensor, "chains ..."]:
    """Step sizes times scales.

    Parameters
    ----------
    step_size
        ``(chains,)``.
    scale
        ``(chains, P)``, or matrices ``(chains, P, P)``, or something that broadcasts.

    Returns
    -------
    Tensor
        Of the dtype of `scale`.
    """
    return step_size.to(scale.dtype).view(-1, *(1,) * (scale.dim() - 1)) * scale


def moved(
    vectors: Float[Tensor, "chains P"],
    stride: Float[Tensor, "chains ..."],
    momentum: Float[Tensor, "chains P"],
    value: float = 1.0,
) -> Float[Tensor, "chains P"]:
    """``w + value h S r``.

    Parameters
    ----------
    vectors, momentum
        ``(chains, P)``.
    stride
        ``h S``: ``(chains, P)``, ``(chains, 1)`` or ``(chains, P, P)``.
    value
        A factor.

    Returns
    -------
    Tensor
        ``(chains, P)``.
    """
    if stride.dim() == 2:
        return torch.addcmul(vectors, stride, momentum, value=value)
    return torch.baddbmm(vectors[..., None], stride, momentum[..., None], alpha=value)[..., 0]


def kicked(
    momentum: Float[Tensor, "chains P"],
    stride: Float[Tensor, "chains ..."],
    gradient: Float[Tensor, "chains P"],
    value: float,
) -> Float[Tensor, "chains P"]:
    """``r + value h S^T grad U``.

    Parameters
    ----------
    momentum, gradient
        ``(chains, P)``.
    stride
        As in `moved`.
    value
        A factor: -1 for a whole step.

    Returns
    -------
    Tensor
        ``(chains, P)``.
    """
    return moved(momentum, stride if stride.dim() == 2 else stride.mT, gradient, value)


def leapfrog(
    potential: Potential,
    point: Point,
    stride: Float[Tensor, "chains ..."],
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
        ``(chains, P)``, ``(chains, 1)`` or ``(chains, P, P)``: step size times scale.
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
    momentum = kicked(momentum, stride, gradient, -0.5)
    for done in range(int(most)):
        ahead = moved(vectors, stride, momentum)
        value_ahead, gradient_ahead = potential.value_and_gradient(ahead)
        if done < fewest:
            vectors, gradient, value = ahead, gradient_ahead, value_ahead
            momentum = kicked(momentum, stride, gradient, -1.0)
            continue
        moves = done < counts
        wide = moves[:, None]
        momentum_ahead = kicked(momentum, stride, gradient_ahead, -1.0)
        vectors, gradient = (
            torch.where(wide, ahead, vectors),
            torch.where(wide, gradient_ahead, gradient),
        )
        momentum, value = (
            torch.where(wide, momentum_ahead, momentum),
            torch.where(moves, value_ahead, value),
        )
    # The last kick was a whole one, as between two steps; half of it is taken back.
    return Point(vectors, kicked(momentum, stride, gradient, 0.5), gradient, value)


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
    potential: Potential, point: Point, scale: Float[Tensor, "#chains ..."]
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
        Of the parameters, as in `strides`.

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
        ahead = leapfrog(potential, point, strides(size, scale), once)
        good = acceptance_probability(energy - ahead.energy) > _FIRST_ACCEPTANCE
        if grows is None or going is None:
            grows, going = good, torch.ones_like(good)
        going = going & (good == grows)
        if not bool(going.any()):
            break
        size = torch.where(going, torch.where(grows, 2 * size, size / 2), size)
    return size
