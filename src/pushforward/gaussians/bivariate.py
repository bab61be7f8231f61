"""Covariances of functions of two correlated Gaussian units, stable at every correlation.

For standard normal ``x, y`` with correlation ``rho``, Mehler's formula gives

    Cov(f(x), g(y)) = sum_{k >= 1} a_k b_k rho^k / k!,    a_k = E[f He_k],  b_k = E[g He_k].

Cut after ``K - 1`` terms, the exact remainder is Price's theorem applied ``K`` times,

    int_0^rho (rho - r)^{K-1} / (K-1)! E_r[f^(K)(x) g^(K)(y)] dr.

For piecewise polynomials of degree below ``K`` the K-th derivatives are delta functions at the
breakpoints, the expectation is a derivative of the bivariate normal density, and one smooth
integral over ``theta = asin r`` remains: nothing is subtracted that was large. For smooth
functions the series itself converges fast, and what is left of it is bounded by the variance that
the coefficients miss.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.gaussians.activations import Activation, Jumps, PiecewisePolynomial
from pushforward.gaussians.blocks import block_elements
from pushforward.gaussians.hermite import gauss_legendre

__all__ = [
    "SERIES_DEGREE",
    "PairCovariance",
    "PowerKernel",
    "exact_order",
    "mehler_series",
    "pair_covariance",
    "power_kernel",
]

SERIES_DEGREE = 48
_QUADRATURE_NODES = 32


class PairCovariance(NamedTuple):
    """Covariances of a list of pairs, with a bound on what was left out.

    Attributes
    ----------
    value
        ``Cov(f(x)^p, g(y)^q)`` of each pair, shape ``(pairs,)``.
    truncation
        Bound on the absolute error of each value from cutting the series; 0 where the kernel is
        exact (quadrature error below 1e-9 for continuous functions, 1e-5 for steps).
    """

    value: Tensor
    truncation: Tensor


def mehler_series(
    first: Float[Tensor, " K *#pairs"],
    second: Float[Tensor, " K *#pairs"],
    correlation: Float[Tensor, "*#pairs"],
) -> Float[Tensor, "*pairs"]:
    """Sum of Mehler's series over the degrees 1 ... K that are given.

    Parameters
    ----------
    first, second
        Hermite coefficients ``E[f He_k]`` and ``E[g He_k]`` for ``k = 1 ... K``; anything that
        broadcasts against `correlation` behind the leading dimension.
    correlation
        In [-1, 1].

    Returns
    -------
    Tensor
        The truncated covariance.
    """
    total = torch.zeros_like(correlation)
    for degree in range(len(first), 0, -1):
        product = first[degree - 1] * second[degree - 1] / float(math.factorial(degree))
        total = (total + product) * correlation
    return total


def exact_order(
    first: Activation, first_power: int, second: Activation, second_power: int
) -> int | None:
    """Number of times Price's theorem is applied to make the remainder of a pair a sum of jumps.

    Parameters
    ----------
    first, second
        The activations of the two units.
    first_power, second_power
        Their powers.

    Returns
    -------
    int or None
        One more than the degree of the higher power; None when a function is no piecewise
        polynomial, and the series is all there is.
    """
    if isinstance(first, PiecewisePolynomial) and isinstance(second, PiecewisePolynomial):
        return 1 + max(first.degree * first_power, second.degree * second_power)
    return None


class PowerKernel(NamedTuple):
    """A power of an activation, as `pair_covariance` reads it.

    Attributes
    ----------
    coefficients
        Hermite coefficients of degree 1 ... K, shape ``(K, n)``.
    jumps
        Of a piecewise polynomial of degree at most K; None for a kernel by the series alone.
    missing
        For a kernel by the series alone, the variance that the coefficients do not explain,
        ``(n,)``.
    """

    coefficients: Tensor
    jumps: Jumps | None
    missing: Tensor | None


def power_kernel(
    activation: Activation,
    mean: Float[Tensor, " n"],
    std: Float[Tensor, " n"],
    power: int,
    order: int | None,
    known: Float[Tensor, "K n"] | None = None,
) -> PowerKernel:
    """Prepare a power of ``phi(Z) - phi(E Z)`` for the exact kernel.

    Parameters
    ----------
    activation
        The function ``phi``.
    mean, std
        Of the units it acts on.
    power
        The power.
    order
        From `exact_order`, the same for both kernels of a pair; None for a kernel by the series
        alone.
    known
        Hermite coefficients of the power from degree 0 on, if at least `order` are at hand.

    Returns
    -------
    PowerKernel
        Differentiable in `mean` and `std`.
    """
    if order is not None and isinstance(activation, PiecewisePolynomial):
        if known is None or len(known) < order:
            known = activation.hermite_table(mean, std, power, order - 1).values[power - 1]
        return PowerKernel(known[1:order], activation.jumps(mean, std, power, order), None)
    table = activation.hermite_table(mean, std, 2 * power, SERIES_DEGREE).values
    coefficients = table[power - 1]
    squares = coefficients.detach().square()
    factorials = squares.new_tensor([float(math.factorial(k)) for k in range(len(squares))])
    missing = table[2 * power - 1, 0].detach() - (squares / factorials[:, None]).sum(0)
    return PowerKernel(coefficients[1:], None, missing.clamp(min=0))


def pair_covariance(
    first: PowerKernel,
    second: PowerKernel,
    pairs: tuple[Tensor, Tensor],
    correlation: Float[Tensor, " pairs"],
) -> PairCovariance:
    """Exact covariances over a list of correlated pairs of units.

    Parameters
    ----------
    first, second
        What the first and the second unit of each pair compute, from `power_kernel` with the same
        order.
    pairs
        Two index tensors ``(pairs,)`` into the units of `first` and of `second`.
    correlation
        Of each pair, in [-1, 1].

    Returns
    -------
    PairCovariance
        Differentiable in the units and in the correlation.
    """
    terms = len(first.coefficients)
    values, truncations = [], []
    chunk = block_elements(correlation.device) // max(terms, _QUADRATURE_NODES)
    for i, j, rho in zip(
        pairs[0].split(chunk), pairs[1].split(chunk), correlation.split(chunk), strict=True
    ):
        value = mehler_series(first.coefficients[:, i], second.coefficients[:, j], rho)
        truncation = torch.zeros_like(rho.detach())
        if first.jumps is not None and second.jumps is not None:
            left, right = _take(first.jumps, i), _take(second.jumps, j)
            value = value + _jump_integral(left, right, terms + 1, rho)
        elif first.missing is not None and second.missing is not None:
            # Cauchy-Schwarz on the tail of the series: sum_{k>K} a_k b_k rho^k / k!.
            tail = torch.sqrt(first.missing[i] * second.missing[j])
            truncation = rho.detach().abs() ** (terms + 1) * tail
        values.append(value)
        truncations.append(truncation)
    if not values:
        return PairCovariance(correlation, correlation)
    return PairCovariance(torch.cat(values), torch.cat(truncations))


def _jump_integral(first: Jumps, second: Jumps, order: int, correlation: Tensor) -> Tensor:
    """Price's remainder of piecewise polynomials: an integral over the correlation."""
    node, weight = gauss_legendre(_QUADRATURE_NODES, like=correlation)
    # Squaring the distance to the upper end gathers nodes where the density narrows as |rho| -> 1.
    s = (1 - node) / 2
    fraction, jacobian = 1 - s * s, s * weight
    # At |rho| = 1 the derivative of the arc sine is infinite, that of the integral is not: the
    # integrand vanishes at its upper end. A constant limit there leaves what is finite.
    inside = 1 - correlation.abs() > 1e-15
    end = torch.copysign(torch.full_like(correlation, math.pi / 2), correlation)
    limit = torch.where(inside, torch.asin(torch.where(inside, correlation, 0.0)), end)[:, None]
    r = torch.sin(limit * fraction)
    one_minus_r2 = torch.cos(limit * fraction) ** 2
    kernel = limit * jacobian * (correlation[:, None] - r) ** (order - 1)
    kernel = kernel / (2 * math.pi * math.factorial(order - 1))
    total = torch.zeros_like(correlation)
    for u, left in zip(*first, strict=True):
        for v, right in zip(*second, strict=True):
            u_, v_ = u[:, None], v[:, None]
            exponent = (u_ * u_ - 2 * r * u_ * v_ + v_ * v_) / (2 * one_minus_r2)
            density = kernel * torch.exp(-exponent)
            hermite = _bivariate_hermite(u_, v_, r, one_minus_r2, order - 1)
            for i, jump in enumerate(left):
                for j, other in enumerate(right):
                    if jump is not None and other is not None:
                        polynomial = hermite[order - 1 - i][order - 1 - j]
                        total = total + jump * other * (density * polynomial).sum(1)
    return total


def _take(jumps: Jumps, units: Tensor) -> Jumps:
    return Jumps(
        [u[units] for u in jumps.breakpoints],
        [[None if h is None else h[units] for h in heights] for heights in jumps.heights],
    )


def _bivariate_hermite(
    x: Tensor, y: Tensor, r: Tensor, one_minus_r2: Tensor, max_order: int
) -> list[list[Tensor]]:
    """``(-1)^{a+b} d^a/dx^a d^b/dy^b p / p`` of the bivariate normal density, at ``[a][b]``."""
    # With g = Sigma^{-1} (x, y): H_{a+1,b} = g_x H_ab - (a H_{a-1,b} - r b H_{a,b-1}) / (1 - r^2).
    gx, gy = (x - r * y) / one_minus_r2, (y - r * x) / one_minus_r2
    table: list[list[Tensor]] = [[torch.ones_like(gx)]]
    for b in range(max_order):
        value = gy * table[0][b]
        if b:
            value = value - b * table[0][b - 1] / one_minus_r2
        table[0].append(value)
    for a in range(max_order):
        row = []
        for b in range(max_order + 1):
            value = gx * table[a][b]
            if a:
                value = value - a * table[a - 1][b] / one_minus_r2
            if b:
                value = value + b * r * table[a][b - 1] / one_minus_r2
            row.append(value)
        table.append(row)
    return table
