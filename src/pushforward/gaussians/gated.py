"""Gaussian units through an activation and through its tangent, jointly: moments of all pairs.

For jointly Gaussian ``s`` and ``v`` an activation gives ``a = phi(s)`` and, to first order in a
change ``v`` of its argument, ``da = phi'(s) v``. By Stein's lemma second moments of ``(a, da)`` are
polynomials in the moments of ``v`` with coefficients that depend on the law of ``s`` alone:

    E[F(s_i) G(s_j) v_i v_j] = (E v_i + D_i) (E v_j + D_j) E[F G] + Cov(v_i, v_j) E[F G],
    D_i = sum_k Cov(v_i, s_k) d/ds_k,

with ``F = G = phi'`` and derivatives in the sense of distributions: for a ReLU a step, a delta
function and its derivative. `GatedPairs` holds the coefficients, and pushing a law of ``v`` is a
handful of elementwise products of matrices, as differentiable as those are.

Steps of ``phi'`` are exact: with ``x, y`` standard normal of correlation ``R``,
``P(x > u, y > w)`` follows from Plackett's integral, every other coefficient from it and from the
normal law of one given the other. What of ``phi'`` is continuous is expanded in Mehler's series.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.gaussians.activations import Activation, PiecewisePolynomial, SmoothActivation
from pushforward.gaussians.bivariate import mehler_series
from pushforward.gaussians.blocks import block_elements
from pushforward.gaussians.hermite import hermite_functions, normal_cdf, normal_density
from pushforward.gaussians.joint_tails import joint_upper_tail

__all__ = ["GatedPairs", "derivative"]

_SERIES_DEGREE = 96
# Beyond 39 standard deviations the normal density underflows to zero in float64.
_FARTHEST = 39.0
# 1 - R^2 is known to a few roundings only. Below this the density of a pair, whose weight in any
# moment is 1 - R^2 itself, is left out: an error of 1e-7 of the covariance of two changes.
_LEAST_SPREAD = 1e-14
# Relative to the widest unit of a component: less is rounding of a constant.
_LEAST_STD = 1e-12
_NEGLIGIBLE = 1e-16
_STEP_WIDTH = 1e-6
_LEAST_STEP = 1e-4


@dataclass(frozen=True, eq=False)
class GatedPairs:
    """What the law of ``s`` decides about ``(phi(s), phi'(s) v)``; nothing in it has a gradient.

    With ``F_i = phi'(s_i)``, and primes for derivatives in units of the standard deviation of
    ``s_i``; on the diagonals what makes the formulas of `push` exact there too.

    Parameters
    ----------
    mean
        ``E[a]``, ``(*c, n)``.
    covariance
        ``Cov(a)``, ``(*c, n, n)``.
    inverse_std
        Of ``s``; 0 for constants.
    gate, gate_slope, gate_bend
        ``E[F]``, ``E[F']`` and ``E[F'']``, ``(*c, n)``.
    value_gate, value_slope
        ``Cov(a_i, F_j)`` and ``Cov(a_i, F'_j)``, ``(*c, n, n)``.
    gates, slope_gate, bend_gate, slopes
        ``Cov(F_i, F_j)``, ``Cov(F'_i, F_j)``, ``Cov(F''_i, F_j)`` and ``Cov(F'_i, F'_j)``.
    """

    mean: Tensor
    covariance: Tensor
    inverse_std: Tensor
    gate: Tensor
    gate_slope: Tensor
    gate_bend: Tensor
    value_gate: Tensor
    value_slope: Tensor
    gates: Tensor
    slope_gate: Tensor
    bend_gate: Tensor
    slopes: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        activations: Activation | Sequence[tuple[slice, Activation]],
        mean: Float[Tensor, "*c n"],
        covariance: Float[Tensor, "*c n n"],
    ) -> GatedPairs:
        """Compute the coefficients of all pairs.

        Steps of the derivative at declared breakpoints are exact to 1e-12. What of it is continuous
        is a series of 94 terms, exact for polynomials. Relative to the largest moment it is good to
        1e-11 at any correlation for GELU, SiLU and tanh on units of standard deviation 1, and to
        1e-3 for kinks in the derivative (SELU). On units 3 (10) wide the error is below 1e-6 (2e-4)
        up to a correlation of 0.95, and up to 2e-4 (2e-2) for units that are almost copies.

        Parameters
        ----------
        activations
            Of all units, or slices that partition them with the activation of each.
        mean, covariance
            Of ``s``, float64. A unit of no variance is a constant; at a kink it counts as half on
            either side.

        Returns
        -------
        GatedPairs
            Without gradients.

        Raises
        ------
        OptionError
            For an activation that jumps, which a tangent does not describe.
        """
        if isinstance(activations, Activation):
            activations = [(slice(0, mean.shape[-1]), activations)]
        batch, n = mean.shape[:-1], mean.shape[-1]
        e, s = mean.reshape(-1, n), covariance.reshape(-1, n, n)
        std, inverse = _spreads(s)
        correlation = s * inverse[:, :, None] * inverse[:, None, :]
        correlation = correlation.clamp(-1, 1)
        correlation.diagonal(dim1=-2, dim2=-1).zero_()  # diagonals have formulas of their own
        smooth = any(_is_curved(activation) for _, activation in activations)
        degree = _SERIES_DEGREE if smooth else 0
        sides = [
            (units, _side(activation, e[:, units], std[:, units], degree))
            for units, activation in activations
        ]
        pairs = _Kernels(*(torch.empty_like(s) for _ in _Kernels._fields))
        for (rows, left), (columns, right) in itertools.product(sides, sides):
            block = _kernels(left, right, correlation[:, rows, columns])
            for whole, part in zip(pairs, block, strict=True):
                whole[:, rows, columns] = part
        for whole, name in zip(pairs, _Kernels._fields, strict=True):
            own = torch.cat([getattr(side.own, name) for _, side in sides], dim=-1)
            whole.diagonal(dim1=-2, dim2=-1).copy_(own)
        units = [
            torch.cat([side.mean for _, side in sides], dim=-1),
            inverse,
            *torch.cat([side.gates[:3] for _, side in sides], dim=-1),
        ]
        shape = (*batch, n)
        mean_, inverse_, *gate = (unit.reshape(shape) for unit in units)
        values, *matrices = (m.reshape(*shape, n) for m in pairs)
        return cls(mean_, values, inverse_, *gate, *matrices)

    def push(
        self,
        change_mean: Float[Tensor, "*c n"],
        cross: Float[Tensor, "*c n n"],
        change_covariance: Float[Tensor, "*c n n"],
    ) -> tuple[Float[Tensor, "*c n"], Float[Tensor, "*c n n"], Float[Tensor, "*c n n"]]:
        """Moments of ``da = phi'(s) v``.

        Parameters
        ----------
        change_mean
            ``E[v]``.
        cross
            ``Cov(s, v)``, rows ``s``. Jointly positive semidefinite with the others: what a unit of
            no variance would have in common with ``v`` is not looked at.
        change_covariance
            ``Cov(v)``.

        Returns
        -------
        mean
            ``E[da]``.
        cross
            ``Cov(a, da)``.
        covariance
            ``Cov(da)``, symmetric. All are zero where the arguments are.
        """
        f0, f1, f2 = self.gate, self.gate_slope, self.gate_bend
        e = change_mean
        x = cross * self.inverse_std.unsqueeze(-1)  # Cov(x_i, v_j) for standardised s
        own = x.diagonal(dim1=-2, dim2=-1)
        mean = f0 * e + f1 * own
        both = self.gates + _outer(f0, f0)  # E[F_i F_j], and so on
        new_cross = (
            self.value_gate * e.unsqueeze(-2) + self.value_slope * own.unsqueeze(-2) + both * cross
        )
        # Terms that have a mirror image; D_i acts on F_i and on F_j.
        half = x * (
            e.unsqueeze(-1) * (self.slope_gate + _outer(f1, f0))
            + own.unsqueeze(-1) * (self.bend_gate + _outer(f2, f0))
        ) + self.slope_gate * _outer(own, e)
        covariance = (
            both * change_covariance
            + self.gates * _outer(e, e)
            + self.slopes * (_outer(own, own) + x * x.mT)
            + _outer(f1, f1) * (x * x.mT)
            + half
            + half.mT
        )
        return mean, new_cross, covariance


def derivative(activation: Activation) -> Activation:
    """The derivative of an activation, where there is one.

    Parameters
    ----------
    activation
        Continuous.

    Returns
    -------
    Activation
        A piecewise polynomial of one; else by automatic differentiation.

    Raises
    ------
    OptionError
        For an activation that jumps.
    """
    if isinstance(activation, PiecewisePolynomial):
        jumps = any(order == 0 for order in activation.jump_orders)
        pieces = tuple(
            tuple(k * c for k, c in enumerate(piece))[1:] or (0.0,) for piece in activation.pieces
        )
        slope: Activation = PiecewisePolynomial(
            f"{activation.name}'", activation.breakpoints, pieces
        )
    else:
        breaks = _breakpoints(activation)
        jumps = any(_jump(activation, index) for index in range(len(breaks)))
        slope = SmoothActivation(f"{activation.name}'", _Derivative(activation), breaks)
    if jumps:
        raise OptionError(
            f"the activation {activation.name!r} jumps",
            where="derivative",
            advice="A change of its argument has no first order there: sample the change instead.",
        )
    return slope


class _Kernels(NamedTuple):
    """Covariances of all pairs of a block: fields of `GatedPairs`, the values first."""

    values: Tensor
    value_gate: Tensor
    value_slope: Tensor
    gates: Tensor
    slope_gate: Tensor
    bend_gate: Tensor
    slopes: Tensor


@dataclass(frozen=True, eq=False)
class _Side:
    """Units that share an activation: their means, diagonals, steps and Hermite coefficients.

    ``gates`` are ``E[F He_k] = E[F^(k)]`` at ``[k]``, ``step_gates`` those of the steps in ``F``
    alone; ``steps`` their places in standard deviations and their heights.
    """

    mean: Tensor
    std: Tensor
    own: _Kernels
    steps: list[tuple[Tensor, float]]
    gates: Tensor
    step_gates: Tensor
    linear: bool
    curved: bool


@dataclass(frozen=True)
class _Derivative:
    """Of an elementwise function, by automatic differentiation."""

    function: Activation

    @torch.enable_grad()
    def __call__(self, z: Tensor) -> Tensor:
        try:
            leaf = z.detach().requires_grad_()
        except RuntimeError:  # inside a transform of torch.func, which takes seconds to import
            return torch.func.grad(lambda w: self.function(w).sum())(z)
        (slope,) = torch.autograd.grad(self.function(leaf).sum(), leaf)
        return slope


def _spreads(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviations kept above zero, and their inverses, which are 0 for constants."""
    std = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    least = (_LEAST_STD * std.amax(-1, keepdim=True)).clamp(min=1e-100)
    inverse = torch.where(std > least, 1 / std, 0.0)
    return torch.maximum(std, least), inverse


def _is_curved(activation: Activation) -> bool:
    """Whether its derivative is more than steps."""
    return not isinstance(activation, PiecewisePolynomial) or activation.degree > 1


def _breakpoints(activation: Activation) -> tuple[float, ...]:
    assert isinstance(activation, PiecewisePolynomial | SmoothActivation)
    return activation.breakpoints


def _jump(function: Activation, index: int) -> float:
    """Of a function at one of its breakpoints; 0 for what the series takes as well."""
    position = _breakpoints(function)[index]
    if isinstance(function, PiecewisePolynomial):
        left, right = (
            sum(c * position**k for k, c in enumerate(piece))
            for piece in function.pieces[index : index + 2]
        )
        return right - left
    width = _STEP_WIDTH * max(1.0, abs(position))
    below, above = function(torch.tensor([-width, width], dtype=torch.float64) + position).tolist()
    return above - below if abs(above - below) > _LEAST_STEP * (1 + abs(position)) else 0.0


def _side(activation: Activation, mean: Tensor, std: Tensor, degree: int) -> _Side:
    slope = derivative(activation)
    linear = isinstance(activation, PiecewisePolynomial) and len(activation.breakpoints) == 0
    linear = linear and not _is_curved(activation)
    steps = []
    for index, position in enumerate(_breakpoints(activation)):
        height = _jump(slope, index)
        if height:
            steps.append((((position - mean) / std).clamp(-_FARTHEST, _FARTHEST), height))
    # Values and gates, shifted by what they are at the mean: E[psi^p He_k].
    center, psi = activation.hermite_table(mean, std, 2, 2)
    slope_center, chi = slope.hermite_table(mean, std, 2, max(degree, 2))
    gates = chi[0].clone()
    gates[0] += slope_center
    return _Side(
        center + psi[0, 0],
        std,
        _diagonals(std, psi, chi, slope_center),
        steps,
        gates,
        _step_gates(gates, steps),
        linear,
        _is_curved(activation),
    )


def _diagonals(std: Tensor, psi: Tensor, chi: Tensor, slope_center: Tensor) -> _Kernels:
    """Exact moments of one unit, as `GatedPairs.push` reads them."""
    # From (psi^2)' = 2 std psi F and Stein's lemma. E[G'] and E[G''] of G = F^2 are shared out
    # between the terms that stand for them in a pair; a product of two deltas is none of these.
    f = chi[0, :3].clone()
    f[0] += slope_center
    square = chi[1, :3] + 2 * slope_center * chi[0, :3]  # E[F^2 He_k]
    square[0] += slope_center.square()
    value_gate = psi[1, 1] / (2 * std) - psi[0, 0] * f[0]
    value_slope = psi[1, 2] / (2 * std) - std * square[0] - psi[0, 0] * f[1]
    return _Kernels(
        psi[1, 0] - psi[0, 0].square(),
        value_gate,
        value_slope,
        square[0] - f[0].square(),
        square[1] / 2 - f[1] * f[0],
        square[2] / 2 - f[2] * f[0],
        -f[1].square(),
    )


def _step_gates(gates: Tensor, steps: list[tuple[Tensor, float]]) -> Tensor:
    """``E[F He_k]`` of steps alone: tails, then ``He_{k-1} density`` at the steps."""
    total = torch.zeros_like(gates)
    for u, height in steps:
        total[0] += height * normal_cdf(-u)
        for k, function in enumerate(hermite_functions(u, len(gates) - 2), start=1):
            total[k] += height * math.sqrt(math.factorial(k - 1)) * function
    return total


def _kernels(left: _Side, right: _Side, correlation: Tensor) -> _Kernels:
    """Of a block of pairs: steps exactly, the rest by the series."""
    total = _Kernels(*(torch.empty_like(correlation) for _ in _Kernels._fields))
    rows = max(1, block_elements(correlation.device) // correlation.shape[-1])
    for component in range(len(correlation)):
        for start in range(0, correlation.shape[1], rows):
            part = slice(start, start + rows)
            r = correlation[component, part]
            kernels = _series_kernels(left, right, component, part, r)
            for (u, height), (w, other) in itertools.product(left.steps, right.steps):
                u_, w_ = torch.broadcast_tensors(u[component, part, None], w[component])
                steps = _step_kernels(u_, w_, r)
                kernels = [k + height * other * s for k, s in zip(kernels, steps, strict=True)]
            for whole, block in zip(total, kernels, strict=True):
                whole[component, part] = block
    first, second = left.std.unsqueeze(-1), right.std.unsqueeze(-2)
    values, value_gate, value_slope, *others = total
    return _Kernels(values * first * second, value_gate * first, value_slope * first, *others)


def _series_kernels(
    left: _Side, right: _Side, component: int, part: slice, correlation: Tensor
) -> list[Tensor]:
    """Mehler's series of all kernels, less what the steps of both units contribute to it."""
    # The antiderivative of a linear function, or of steps beside a constant, has one term to add.
    single = left.linear or right.linear or not (left.curved or right.curved)
    terms = 1 if single else _terms(left, right, component, part, correlation)

    def series(first: int, second: int) -> Tensor:
        """``sum_{k >= 1} f_{k + first} g_{k + second} R^k / k!``."""
        if single and first >= 0 and second >= 0:
            return torch.zeros_like(correlation)
        f, g = slice(1 + first, 1 + first + terms), slice(1 + second, 1 + second + terms)
        total = mehler_series(
            left.gates[f, component, part, None], right.gates[g, component, None, :], correlation
        )
        if left.steps and right.steps:
            total = total - mehler_series(
                left.step_gates[f, component, part, None],
                right.step_gates[g, component, None, :],
                correlation,
            )
        return total

    shifts = [(-1, -1), (-1, 0), (-1, 1), (0, 0), (1, 0), (2, 0), (1, 1)]
    return [series(*shift) for shift in shifts]


def _terms(left: _Side, right: _Side, component: int, part: slice, correlation: Tensor) -> int:
    """How many terms of the series are more than rounding, whatever derivatives it is of."""
    degrees = torch.arange(len(left.gates), dtype=correlation.dtype, device=correlation.device)
    size = left.gates[:, component, part].abs().amax(-1)
    size = size * right.gates[:, component].abs().amax(-1)
    log_size = size.log() - torch.lgamma(degrees + 1) + 2 * (degrees + 1).log()
    log_size = log_size + degrees * correlation.abs().max().clamp(min=1e-30).log()
    significant = log_size > log_size.max() + math.log(_NEGLIGIBLE)
    return min(int(degrees[significant].max()) + 1, len(left.gates) - 3)


def _step_kernels(u: Tensor, w: Tensor, correlation: Tensor) -> _Kernels:
    """For ``F_i = 1[x > u]`` and ``F_j = 1[y > w]``, values ``(x - u)_+`` and ``(y - w)_+``."""
    r = correlation
    spread = (1 - r) * (1 + r)
    q = spread.clamp(min=_LEAST_SPREAD).sqrt()
    density_u, density_w = normal_density(u), normal_density(w)
    tail_u, tail_w = normal_cdf(-u), normal_cdf(-w)
    joint = joint_upper_tail(u, w, r)
    z = (w - r * u) / q
    given_u = density_u * normal_cdf(-z)  # at x = u: P(y > w) times the density of x
    given_w = density_w * normal_cdf((r * w - u) / q)
    density = torch.where(spread > _LEAST_SPREAD, density_u * normal_density(z) / q, 0.0)
    slope_gate = given_u - density_u * tail_w
    gate_slope = given_w - density_w * tail_u
    flat = spread * density - density_u * density_w
    return _Kernels(
        r * (joint + tail_u * tail_w) + u * w * joint - w * slope_gate - u * gate_slope + flat,
        slope_gate + r * given_w - u * joint,
        r * w * given_w - u * gate_slope + flat,
        joint,
        slope_gate,
        u * slope_gate - r * density,
        density - density_u * density_w,
    )


def _outer(first: Tensor, second: Tensor) -> Tensor:
    return first.unsqueeze(-1) * second.unsqueeze(-2)
