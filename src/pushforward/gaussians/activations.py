"""Activations as the Gaussian calculus sees them: Hermite coefficients of their powers.

For a unit ``Z = m + s x`` with ``x`` standard normal, everything the library needs to know about an
activation ``phi`` is the table

    A[p, k] = E[(phi(Z) - c)^p He_k(x)],      c = phi(m).

With ``c = 0`` and divided by ``s^k`` these are the coefficients ``w_k^(p)`` of arXiv 2605.05179.
The shift by ``c`` leaves every cumulant of order two and more unchanged and keeps it from being
lost in the difference of large numbers when ``|m|`` is much greater than ``s``. The division by
``s^k`` is left out for the same reason: a table of order one comes out, however small ``s`` is.

Two kinds cover the activations in use. `PiecewisePolynomial` is exact; `SmoothActivation` is
integrated by an adaptive composite Gauss-Legendre rule.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.gaussians.blocks import block_elements
from pushforward.gaussians.hermite import (
    gauss_legendre,
    hermite_functions,
    hermite_polynomials,
    normal_density,
    upper_moments,
)

__all__ = [
    "Activation",
    "HermiteTable",
    "Jumps",
    "PiecewisePolynomial",
    "SmoothActivation",
    "identity",
]

# Beyond 39 standard deviations the normal density underflows to zero in float64.
_FARTHEST_BREAKPOINT = 39.0
# The integrand phi(Z)^p He_k(x) density(x) is below 1e-16 of its maximum outside this range.
_INTEGRATION_RANGE = 12.5
_PANEL_NODES = 16
_MAX_PANELS = 512
# Activations bend within a few units of zero, or level off algebraically from there. On a wide
# unit that is narrow in standard deviations, so panels are cut there as at a breakpoint.
_WIDE_STD = 16.0
_GRADED_EDGES = (0.0, *(sign * 8.0**power for power in range(1, 6) for sign in (-1, 1)))
_QUADRATURE_TOLERANCE = 1e-11


class HermiteTable(NamedTuple):
    """Hermite coefficients of the powers of an activation.

    Attributes
    ----------
    center
        ``phi(m)``, shape ``(*units)``.
    values
        ``E[(phi(m + s x) - center)^p He_k(x)]`` at ``[p - 1, k]``, shape ``(P, K + 1, *units)``.
    """

    center: Tensor
    values: Tensor


class Jumps(NamedTuple):
    """Where a piecewise polynomial of the standardised variable jumps, and by how much.

    Attributes
    ----------
    breakpoints
        ``(t - m) / s`` for each breakpoint, a list of tensors ``(*units)``.
    heights
        For each breakpoint the jumps of the derivatives of order 0, 1, ... at it. A derivative
        that is continuous there is None.
    """

    breakpoints: list[Tensor]
    heights: list[list[Tensor | None]]


class Activation(ABC):
    """A scalar function applied to Gaussian units.

    Subclasses are final: `PiecewisePolynomial` when the function is one, else `SmoothActivation`.
    """

    name: str

    @abstractmethod
    def __call__(self, z: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
        """Apply the function elementwise."""

    @abstractmethod
    def hermite_table(
        self,
        mean: Float[Tensor, "*units"],
        std: Float[Tensor, "*units"],
        max_power: int,
        max_degree: int,
    ) -> HermiteTable:
        """Coefficients of the powers 1 ... `max_power` up to degree `max_degree`.

        Parameters
        ----------
        mean, std
            Of each Gaussian unit, float64, `std` positive.
        max_power
            Highest power ``p``.
        max_degree
            Highest degree ``k``.

        Returns
        -------
        HermiteTable
            Differentiable in `mean` and `std`.
        """

    @property
    @abstractmethod
    def positively_homogeneous(self) -> bool:
        """Whether ``phi(a z) = a phi(z)`` for every ``a > 0``."""


@dataclass(frozen=True)
class PiecewisePolynomial(Activation):
    """A function that is a polynomial between breakpoints; its coefficients are in closed form.

    Parameters
    ----------
    name
        Shown in messages.
    breakpoints
        Increasing positions where one piece ends and the next begins; may be empty.
    pieces
        One more than `breakpoints`: ascending coefficients of each polynomial in ``z``.

    Raises
    ------
    OptionError
        When the counts disagree or the breakpoints do not increase.

    Examples
    --------
    >>> relu = PiecewisePolynomial("relu", (0.0,), ((0.0,), (0.0, 1.0)))
    """

    name: str
    breakpoints: tuple[float, ...]
    pieces: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        increasing = all(low < high for low, high in itertools.pairwise(self.breakpoints))
        if len(self.pieces) != len(self.breakpoints) + 1 or not all(self.pieces) or not increasing:
            raise OptionError(
                f"{len(self.breakpoints)} breakpoints with {len(self.pieces)} pieces",
                where=f"PiecewisePolynomial {self.name!r}",
                advice="Give increasing breakpoints and one more non-empty piece than breakpoints.",
            )

    @property
    def degree(self) -> int:
        """Highest degree among the pieces."""
        return max(len(piece) for piece in self.pieces) - 1

    @property
    def positively_homogeneous(self) -> bool:
        """Whether every piece is linear through the origin and zero is the only breakpoint."""
        linear = all(
            coefficient == 0
            for piece in self.pieces
            for i, coefficient in enumerate(piece)
            if i != 1
        )
        return linear and self.breakpoints in {(), (0.0,)}

    @property
    def jump_orders(self) -> tuple[int, ...]:
        """For each breakpoint the lowest derivative that jumps there (0: a step, 1: a kink)."""
        orders = []
        for position, left, right in zip(
            self.breakpoints, self.pieces[:-1], self.pieces[1:], strict=True
        ):
            jumps = [
                _derivative_at(right, order, position) - _derivative_at(left, order, position)
                for order in range(self.degree + 1)
            ]
            scale = 1e-12 * (1 + max(abs(jump) for jump in jumps))
            orders.append(
                next((i for i, jump in enumerate(jumps) if abs(jump) > scale), len(jumps))
            )
        return tuple(orders)

    def __call__(self, z: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
        """Apply the function elementwise; at a breakpoint the piece on its right holds.

        Returns
        -------
        Tensor
            Same shape as `z`.
        """
        value = _horner([torch.full_like(z, c) for c in self.pieces[0]], z)
        for position, piece in zip(self.breakpoints, self.pieces[1:], strict=True):
            right = _horner([torch.full_like(z, c) for c in piece], z)
            value = torch.where(z < position, value, right)
        return value

    def standardised(
        self, mean: Tensor, std: Tensor
    ) -> tuple[Tensor, list[Tensor], list[list[Tensor]]]:
        """The function of ``x = (z - mean) / std``, shifted by its value at the mean.

        Parameters
        ----------
        mean, std
            Shape ``(*units)``.

        Returns
        -------
        center
            ``phi(mean)``.
        breakpoints
            Positions in ``x``.
        pieces
            Ascending coefficients in ``x`` of each piece of ``phi - center``.
        """
        center = self(mean)
        pieces = []
        for piece in self.pieces:
            shifted, factor = [], torch.ones_like(std)
            for order in range(len(piece)):
                derivative = [
                    c * math.perm(i, order) / math.factorial(order)
                    for i, c in enumerate(piece)
                    if i >= order
                ]
                value = _horner([torch.full_like(mean, c) for c in derivative], mean)
                shifted.append((value - center) if order == 0 else value * factor)
                factor = factor * std
            pieces.append(shifted)
        breakpoints = [
            ((position - mean) / std).clamp(-_FARTHEST_BREAKPOINT, _FARTHEST_BREAKPOINT)
            for position in self.breakpoints
        ]
        return center, breakpoints, pieces

    def hermite_table(
        self,
        mean: Float[Tensor, "*units"],
        std: Float[Tensor, "*units"],
        max_power: int,
        max_degree: int,
    ) -> HermiteTable:
        """Closed form, from ``E[F He_k] = E[F^(k)]`` with the derivative of a distribution.

        Between breakpoints ``F^(k)`` is a polynomial, integrated by partial moments; a jump
        ``d_j`` of the j-th derivative at ``u`` adds ``d_j He_{k-1-j}(u) density(u)``.

        Returns
        -------
        HermiteTable
            Exact up to rounding.
        """
        center, breakpoints, pieces = self.standardised(mean, std)
        highest = self.degree * max_power
        # (breakpoint, moment): upper partial moments, from which the moments of each interval
        # follow.
        densities = [normal_density(u) for u in breakpoints]
        upper = [
            upper_moments(u, density, highest)
            for u, density in zip(breakpoints, densities, strict=True)
        ]
        whole = [
            torch.full_like(mean, 0.0 if order % 2 else math.prod(range(1, order, 2)))
            for order in range(highest + 1)
        ]
        ends = [whole, *upper]
        intervals = [
            [low - high for low, high in zip(start, stop, strict=True)]
            for start, stop in itertools.pairwise(ends)
        ] + [ends[-1]]
        polynomials = [hermite_polynomials(u, max_degree - 1) for u in breakpoints]

        rows = []
        powers = pieces
        for power in range(1, max_power + 1):
            if power > 1:
                powers = [
                    _multiply(current, piece) for current, piece in zip(powers, pieces, strict=True)
                ]
            jumps = self._jump_heights(breakpoints, powers, max_degree)
            row = []
            for degree in range(max_degree + 1):
                total = torch.zeros_like(mean)
                for piece, moments in zip(powers, intervals, strict=True):
                    for order in range(degree, len(piece)):
                        total = (
                            total
                            + math.perm(order, degree) * piece[order] * moments[order - degree]
                        )
                for heights, hermite, density in zip(jumps, polynomials, densities, strict=True):
                    for order, height in enumerate(heights[:degree]):
                        if height is not None:
                            total = total + height * hermite[degree - 1 - order] * density
                row.append(total)
            rows.append(torch.stack(row))
        return HermiteTable(center, torch.stack(rows))

    def jumps(self, mean: Tensor, std: Tensor, power: int, max_order: int) -> Jumps:
        """Jumps of the derivatives of ``(phi - phi(mean))^power`` in the standardised coordinate.

        Parameters
        ----------
        mean, std
            Shape ``(*units)``.
        power
            The power of the shifted function.
        max_order
            Derivatives of order ``0 ... max_order - 1`` are given.

        Returns
        -------
        Jumps
            Breakpoints and heights.
        """
        _, breakpoints, pieces = self.standardised(mean, std)
        powers = pieces
        for _ in range(power - 1):
            powers = [_multiply(a, b) for a, b in zip(powers, pieces, strict=True)]
        return Jumps(breakpoints, self._jump_heights(breakpoints, powers, max_order))

    def _jump_heights(
        self, breakpoints: list[Tensor], pieces: list[list[Tensor]], max_order: int
    ) -> list[list[Tensor | None]]:
        result = []
        for index, (u, smooth) in enumerate(zip(breakpoints, self.jump_orders, strict=True)):
            heights: list[Tensor | None] = []
            left, right = pieces[index], pieces[index + 1]
            for order in range(max_order):
                if order < smooth or order >= max(len(left), len(right)):
                    heights.append(None)
                    continue
                heights.append(_derivative(right, order, u) - _derivative(left, order, u))
            result.append(heights)
        return result


@dataclass(frozen=True)
class SmoothActivation(Activation):
    """A function without a closed form; its coefficients come from adaptive quadrature.

    The rule is composite Gauss-Legendre, 16 nodes a panel, on 12.5 standard deviations either
    side, cut at the breakpoints of the function and, when a unit is spread by more than 16, at 0,
    ±8, ±64 and so on. Panels are doubled until all requested coefficients change by less than
    1e-11 of their scale (or by the rounding of ``phi(Z) - phi(m)``, if that is more), and the
    finer rule is used.

    Parameters
    ----------
    name
        Shown in messages.
    function
        Elementwise on float64 tensors, differentiable by autograd away from `breakpoints`; it
        should not grow faster than a polynomial.
    breakpoints
        Every point where the function or one of its derivatives jumps.

    Examples
    --------
    >>> swish = SmoothActivation("silu", torch.nn.functional.silu)
    """

    name: str
    function: Callable[[Tensor], Tensor]
    breakpoints: tuple[float, ...] = ()

    @property
    def positively_homogeneous(self) -> bool:
        """False: homogeneous functions of one variable are piecewise linear."""
        return False

    def __call__(self, z: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
        """Apply the function elementwise.

        Returns
        -------
        Tensor
            Same shape as `z`.
        """
        return self.function(z)

    def hermite_table(
        self,
        mean: Float[Tensor, "*units"],
        std: Float[Tensor, "*units"],
        max_power: int,
        max_degree: int,
    ) -> HermiteTable:
        """Adaptive quadrature to 1e-11 of the scale of each coefficient.

        Returns
        -------
        HermiteTable
            Relative accuracy 1e-11.

        Raises
        ------
        OptionError
            When the rule does not converge, which means an undeclared breakpoint or a function that
            grows too fast.
        """
        flat_mean, flat_std = mean.reshape(-1), std.reshape(-1)
        cuts = self._cuts(flat_mean, flat_std)
        panels = self._converged_panels(flat_mean, flat_std, max_power, max_degree, cuts)
        nodes = (len(cuts) + 1) * panels * _PANEL_NODES
        chunk = max(1, 32 * block_elements(mean.device) // nodes)
        values = torch.cat(
            [
                self._integrate(m, s, max_power, max_degree, panels, cuts)
                for m, s in zip(flat_mean.split(chunk), flat_std.split(chunk), strict=True)
            ],
            dim=-1,
        )
        return HermiteTable(self(mean), values.reshape(*values.shape[:2], *mean.shape))

    @torch.no_grad()
    def _cuts(self, mean: Tensor, std: Tensor) -> tuple[float, ...]:
        """Where panels end, in the units of the argument."""
        if float(std.max()) <= _WIDE_STD:
            return self.breakpoints
        reach = float((mean.abs() + _INTEGRATION_RANGE * std).max())
        graded = {edge for edge in _GRADED_EDGES if abs(edge) < reach}
        return tuple(sorted(graded.union(self.breakpoints)))

    @torch.no_grad()
    def _converged_panels(
        self, mean: Tensor, std: Tensor, max_power: int, max_degree: int, cuts: tuple[float, ...]
    ) -> int:
        # The widest units vary fastest in x, most of all those that straddle the bend near zero;
        # the ones nearest a breakpoint have the shortest panels: a sample of the units that holds
        # them all decides for the rest.
        widest = min(16, len(std))
        sample = torch.arange(0, len(std), max(1, len(std) // 48), device=std.device)
        straddling = (std / (1 + mean.abs())).topk(widest).indices
        chosen = torch.unique(torch.cat([std.topk(widest).indices, straddling, sample]))
        mean, std = mean[chosen], std[chosen]
        panels = 8
        coarse = self._integrate(mean, std, max_power, max_degree, panels, cuts)
        while panels < _MAX_PANELS:
            panels *= 2
            fine = self._integrate(mean, std, max_power, max_degree, panels, cuts)
            # E[He_k^2] = k!, so Cauchy-Schwarz bounds row p by the norm of psi^p times sqrt(k!).
            factorials = fine.new_tensor(
                [math.sqrt(math.factorial(k)) for k in range(max_degree + 1)]
            )
            norm = (fine / factorials[:, None]).abs().amax(dim=1, keepdim=True)
            scale = norm * factorials[:, None] + torch.finfo(fine.dtype).tiny
            # Rounding of phi(m + s x) - phi(m) limits what a unit of tiny spread can reach.
            size = mean.abs() + std + self(mean).abs()
            rounding = 256 * torch.finfo(fine.dtype).eps * size
            tolerance = _QUADRATURE_TOLERANCE + rounding / (
                norm[0, 0] + torch.finfo(fine.dtype).tiny
            )
            error = ((fine - coarse) / scale).abs()
            if not torch.isfinite(error).all():
                break
            if bool((error < tolerance).all()):
                return panels
            coarse = fine
        raise OptionError(
            f"the integral of a power of {self.name!r} against a normal density did not converge",
            where=f"SmoothActivation {self.name!r}, std up to {std.max().item():.3g}",
            advice="Declare every kink or jump in `breakpoints`; the function may grow at most "
            "polynomially and must be finite in float64.",
        )

    def _integrate(
        self,
        mean: Tensor,
        std: Tensor,
        max_power: int,
        max_degree: int,
        panels: int,
        cuts: tuple[float, ...],
    ) -> Tensor:
        edges = [torch.full_like(mean, -_INTEGRATION_RANGE)]
        for position in cuts:
            u = (position - mean) / std
            edges.append(u.clamp(-_INTEGRATION_RANGE, _INTEGRATION_RANGE))
        edges.append(torch.full_like(mean, _INTEGRATION_RANGE))
        if not cuts:
            # Without cuts all units share their nodes.
            edges = [edge[:1] for edge in edges]
        node, weight = gauss_legendre(_PANEL_NODES, like=mean)
        offsets = torch.arange(panels, dtype=mean.dtype, device=mean.device)
        unit_nodes = ((offsets[:, None] + (node + 1) / 2) / panels).reshape(-1)
        unit_weights = (weight / (2 * panels)).repeat(panels)
        xs, weights = [], []
        for start, stop in itertools.pairwise(edges):
            width = (stop - start)[:, None]
            xs.append(start[:, None] + width * unit_nodes)
            weights.append(width * unit_weights)
        x, w = torch.cat(xs, dim=1), torch.cat(weights, dim=1)  # (units or 1, nodes)
        basis = torch.stack(
            [
                math.sqrt(math.factorial(k)) * function * w
                for k, function in enumerate(hermite_functions(x, max_degree))
            ]
        )  # (K + 1, units or 1, nodes)
        psi = self.function(mean[:, None] + std[:, None] * x) - self.function(mean)[:, None]
        rows, power = [], torch.ones_like(psi)
        for _ in range(max_power):
            power = power * psi
            if cuts:
                rows.append(torch.einsum("nx,knx->kn", power, basis))
            else:
                rows.append(basis[:, 0] @ power.mT)
        return torch.stack(rows)


def identity() -> PiecewisePolynomial:
    """The activation that does nothing, as residual connections need it.

    Returns
    -------
    PiecewisePolynomial
        ``phi(z) = z``.
    """
    return PiecewisePolynomial("identity", (), ((0.0, 1.0),))


def _horner(coefficients: list[Tensor], x: Tensor) -> Tensor:
    value = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _multiply(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    product: list[Tensor | None] = [None] * (len(a) + len(b) - 1)
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            term = left * right
            previous = product[i + j]
            product[i + j] = term if previous is None else previous + term
    return [term for term in product if term is not None]


def _derivative(coefficients: list[Tensor], order: int, x: Tensor) -> Tensor:
    """Value at `x` of a derivative of a polynomial with tensor coefficients."""
    terms = [math.perm(i, order) * c for i, c in enumerate(coefficients) if i >= order]
    return _horner(terms, x) if terms else torch.zeros_like(x)


def _derivative_at(coefficients: tuple[float, ...], order: int, x: float) -> float:
    """Value at `x` of a derivative of a polynomial with plain coefficients."""
    terms = (
        math.perm(i, order) * c * x ** (i - order) for i, c in enumerate(coefficients) if i >= order
    )
    return sum(terms, start=0.0)
