"""Joint tails of two correlated Gaussian units, at every correlation."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.gaussians.hermite import gauss_legendre, normal_cdf

__all__ = ["joint_upper_tail"]

_NODES = 20
# From this correlation on the integral is taken from the other end, where what is steep is known.
_STRONG = 0.9


def joint_upper_tail(
    u: Float[Tensor, "*n"], w: Float[Tensor, "*n"], correlation: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """``P(x > u, y > w) - P(x > u) P(y > w)`` of standard normal ``x, y``.

    Plackett's integral over the angle ``asin R``; for strong correlations from the other end, where
    the integrand is ``exp(-(u - w)^2 / 2 t^2)`` times a smooth function of ``t = cos``, the first
    two terms of which are integrated in closed form (as A. Genz, Statistics and Computing 14, 2004,
    suggests).

    Parameters
    ----------
    u, w
        Thresholds.
    correlation
        In [-1, 1].

    Returns
    -------
    Tensor
        To 1e-14, with the sign of the correlation.
    """
    result = torch.empty_like(correlation)
    strong = correlation.abs() > _STRONG
    weak = ~strong
    result[weak] = _plackett(u[weak], w[weak], correlation[weak])
    if bool(strong.any()):
        result[strong] = _plackett_from_the_end(u[strong], w[strong], correlation[strong])
    return result


def _plackett(u: Tensor, w: Tensor, correlation: Tensor) -> Tensor:
    """``int_0^R`` of the bivariate density over the correlation, by ``theta = asin``."""
    limit = torch.asin(correlation)
    squares, product = (u * u + w * w) / 2, u * w
    total = torch.zeros_like(limit)
    nodes, weights = gauss_legendre(_NODES, like=limit)
    for node, weight in zip(((nodes + 1) / 2).tolist(), weights.tolist(), strict=True):
        sine = torch.sin(node * limit)
        exponent = (product * sine - squares) / (1 - sine * sine)
        total += weight * torch.exp(exponent)
    return total * limit / (4 * math.pi)


def _plackett_from_the_end(u: Tensor, w: Tensor, correlation: Tensor) -> Tensor:
    """The same from ``|R| = 1`` downwards; a negative correlation by the mirror image of ``y``."""
    sign = torch.sign(correlation)
    w = sign * w
    r = correlation.abs()
    a = ((1 - r) * (1 + r)).sqrt()
    b, k = (u - w).abs(), u * w
    extreme = normal_cdf(-torch.maximum(u, w)) - normal_cdf(-u) * normal_cdf(-w)
    bend = (4 - k) / 8
    safe = a.clamp(min=1e-30)
    edge = torch.exp(-(b * b) / (2 * safe * safe) - k / 2)
    # int_0^a exp(-b^2 / 2 t^2) (1 + bend t^2) dt, times exp(-k / 2)
    # Where the exponential would overflow, thresholds have opposite signs and the tail is zero.
    far = math.sqrt(2 * math.pi) * b * normal_cdf(-b / safe) * torch.exp((-k / 2).clamp(max=700))
    zeroth = a * edge - far
    known = zeroth + bend * (a**3 * edge - b * b * zeroth) / 3
    rest = torch.zeros_like(a)
    nodes, weights = gauss_legendre(_NODES, like=a)
    for node, weight in zip(((nodes + 1) / 2).tolist(), weights.tolist(), strict=True):
        t = safe * node
        root = (1 - t * t).sqrt()
        core = torch.exp(-(b * b) / (2 * t * t) - k / 2)
        whole = torch.exp(-(b * b) / (2 * t * t) - k / (1 + root)) / root
        rest += weight * (whole - core * (1 + bend * t * t))
    return sign * (extreme - (known + rest * a / 2) / (2 * math.pi))
