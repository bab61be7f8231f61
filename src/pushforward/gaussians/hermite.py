"""Hermite polynomials, truncated normal moments and Gauss-Legendre rules: the shared arithmetic."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from numpy.polynomial.legendre import leggauss
from torch import Tensor

__all__ = [
    "gauss_legendre",
    "hermite_functions",
    "hermite_polynomials",
    "normal_cdf",
    "normal_density",
    "upper_moments",
]

_INVERSE_SQRT_TWO_PI = 1 / math.sqrt(2 * math.pi)


def normal_density(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Density of the standard normal law.

    Parameters
    ----------
    x
        Any shape.

    Returns
    -------
    Tensor
        Same shape.
    """
    return _INVERSE_SQRT_TWO_PI * torch.exp(-0.5 * x * x)


def normal_cdf(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Distribution function of the standard normal law, accurate relative to itself far out.

    `torch.special.ndtr` is not on every platform: computed as ``(1 + erf) / 2`` it loses all digits
    below -8.

    Parameters
    ----------
    x
        Any shape.

    Returns
    -------
    Tensor
        Same shape.
    """
    return 0.5 * torch.erfc(-math.sqrt(0.5) * x)


def hermite_polynomials(x: Float[Tensor, "*n"], max_degree: int) -> list[Tensor]:
    """Probabilists' Hermite polynomials ``He_0(x) ... He_max_degree(x)``.

    Parameters
    ----------
    x
        Any shape.
    max_degree
        Highest degree, at least 0.

    Returns
    -------
    list of Tensor
        ``max_degree + 1`` tensors shaped like `x`.
    """
    values = [torch.ones_like(x), x]
    for degree in range(1, max_degree):
        values.append(x * values[-1] - degree * values[-2])
    return values[: max_degree + 1]


def hermite_functions(x: Float[Tensor, "*n"], max_degree: int) -> list[Tensor]:
    """``He_k(x) density(x) / sqrt(k!)`` for ``k = 0 ... max_degree``, stable at every degree.

    Parameters
    ----------
    x
        Any shape.
    max_degree
        Highest degree, at least 0.

    Returns
    -------
    list of Tensor
        ``max_degree + 1`` tensors shaped like `x`.
    """
    density = normal_density(x)
    values = [density, x * density]
    for degree in range(1, max_degree):
        values.append((x * values[-1] - math.sqrt(degree) * values[-2]) / math.sqrt(degree + 1))
    return values[: max_degree + 1]


def upper_moments(
    threshold: Float[Tensor, "*n"], density: Float[Tensor, "*n"], max_order: int
) -> list[Tensor]:
    """Partial moments ``E[x^a 1(x > threshold)]`` of a standard normal, ``a = 0 ... max_order``.

    Integration by parts gives ``m_a = (a - 1) m_{a-2} + threshold^{a-1} density(threshold)``.

    Parameters
    ----------
    threshold
        Lower limit of integration, any shape.
    density
        `normal_density` at `threshold`, passed in because callers have it already.
    max_order
        Highest power, at least 0.

    Returns
    -------
    list of Tensor
        ``max_order + 1`` tensors shaped like `threshold`.
    """
    moments = [normal_cdf(-threshold), density]
    boundary = density
    for order in range(2, max_order + 1):
        boundary = boundary * threshold
        moments.append((order - 1) * moments[order - 2] + boundary)
    return moments[: max_order + 1]


@lru_cache(maxsize=32)
def _gauss_legendre(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    nodes, weights = leggauss(count)
    return tuple(nodes.tolist()), tuple(weights.tolist())


def gauss_legendre(count: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the Gauss-Legendre rule on [-1, 1].

    Parameters
    ----------
    count
        Number of nodes.
    like
        Tensor whose dtype and device the result takes.

    Returns
    -------
    nodes, weights
        Two tensors of shape ``(count,)``.
    """
    nodes, weights = _gauss_legendre(count)
    return like.new_tensor(nodes), like.new_tensor(weights)
