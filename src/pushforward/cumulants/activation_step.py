"""One layer of activations: the tower of ``phi(Z)`` from the tower of ``Z`` (orders 2 and 3).

The expansion is about independent Gaussians with the exact mean and variance of each unit;
covariances between units and all higher cumulants enter as perturbations, kept up to the order of
the method (arXiv 2605.05179; equations of sections 2.7 and 2.8 of its restatement in
`docs/method.md`). Everything is written for the standardised unit ``x = (Z - m) / s``, so that
``rho = C_ij / (s_i s_j)``, ``B_ij = kappa_iij / (s_i^2 s_j)``, ``Q_ij = kappa_iijj / (s_i^2
s_j^2)`` and Hermite coefficients ``A[p, k]`` of ``(phi - phi(m))^p`` are all of order one.

Power cumulants ``P_p = kappa[psi_i^p]`` and ``P_pq = kappa[psi_i^p, psi_j^q]``, ``psi = phi(Z) -
phi(m)``:

    P_p  = A[p,0] + k3 A[p,3] / 6 + k4 A[p,4] / 24
    P_pq = G_pq + B_ij A[p,2]_i A[q,1]_j / 2 + B_ji A[p,1]_i A[q,2]_j / 2
           + Q_ij A[p,2]_i A[q,2]_j / 4

with ``G_pq`` the covariance for Gaussian units, as a series in ``rho`` for weakly and exactly for
strongly correlated pairs. Cumulants follow from power cumulants: ``K_21 = P_21 - 2 P_1 P_11`` and
so on (section 2.5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.cumulants.pair_expansion import (
    PairBlock,
    StrongPairs,
    find_strong_pairs,
    pair_blocks,
)
from pushforward.cumulants.towers import CumulantTower, FactoredThird, RadialThird, Source
from pushforward.gaussians.activations import HermiteTable
from pushforward.networks.graph import UnitGroup

__all__ = ["Closure", "StepReport", "activate", "hermite_tables", "positive_std"]

Closure = Literal["covariance", "radial", "full"]
"""What is tracked beyond the covariance: nothing (order 2), the radial parts of the third and
fourth cumulant (order 2 augmented), or the full third and the radial fourth cumulant (order 3)."""

# In front of the first activation the units are exactly Gaussian, and all pairs are treated
# exactly: strong ones by the kernel, weak ones by the series, cut where the next power of the
# largest correlation is below this (its coefficients, a share of the variance that the first terms
# leave over, make the error some hundred times smaller still).
_SERIES_TOLERANCE = 1e-3
_LEAST_RELATIVE_VARIANCE = 1e-20
_LEAST_SCALE = 1e-100


@dataclass(frozen=True)
class StepReport:
    """What happened in one layer, for the checks.

    Parameters
    ----------
    negative_variances
        Units whose propagated variance was not positive although their inputs vary.
    strong_pairs
        Pairs of units treated by the exact bivariate kernel.
    pairs
        All pairs of units.
    truncation
        Largest bound on a covariance error of the exact kernel, relative to the standard
        deviations.
    """

    negative_variances: int
    strong_pairs: int
    pairs: int
    truncation: float


def positive_std(variance: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], int]:
    """Standard deviations, with variances clamped away from zero.

    Parameters
    ----------
    variance
        Propagated variances; rounding or breakdown can make them negative.

    Returns
    -------
    std
        Positive.
    broken
        How many variances were negative beyond rounding.
    """
    # The floor keeps the fourth power of a reciprocal deviation finite when nothing varies.
    scale = variance.detach().abs().amax().clamp(min=_LEAST_SCALE)
    broken = int((variance.detach() < -1e-12 * scale).sum())
    # Only what is not positive is replaced: a unit may be small beside the others and matter.
    floor = torch.full_like(variance, float(_LEAST_RELATIVE_VARIANCE * scale))
    return torch.where(variance > _LEAST_SCALE, variance, floor).sqrt(), broken


def hermite_tables(
    groups: tuple[UnitGroup, ...], mean: Tensor, std: Tensor, max_power: int, max_degree: int
) -> HermiteTable:
    """Coefficients of every unit of a stage, each group by its own activation.

    Parameters
    ----------
    groups
        Of the stage, in order.
    mean, std
        ``(*batch, n)``.
    max_power, max_degree
        Of the table.

    Returns
    -------
    HermiteTable
        Center ``(*batch, n)`` and values ``(max_power, max_degree + 1, *batch, n)``.
    """
    tables = [
        group.activation.hermite_table(
            mean[..., group.units], std[..., group.units], max_power, max_degree
        )
        for group in groups
    ]
    if len(tables) == 1:
        return tables[0]
    return HermiteTable(
        torch.cat([t.center for t in tables], dim=-1), torch.cat([t.values for t in tables], dim=-1)
    )


def activate(
    tower: CumulantTower,
    groups: tuple[UnitGroup, ...],
    closure: Closure,
    exact_above: float | None,
) -> tuple[CumulantTower, StepReport]:
    """Push a tower through a layer of activations.

    Parameters
    ----------
    tower
        Of the pre-activations.
    groups
        Which activation acts on which units.
    closure
        What the result tracks.
    exact_above
        Pairs with ``|rho|`` above this get the exact bivariate kernel; None never, and then the
        expansion is the published one term by term.

    Returns
    -------
    CumulantTower
        Of the activations, metric the identity.
    StepReport
        For the checks.
    """
    higher = closure != "covariance"
    std, broken = positive_std(tower.variance)
    series = 2 if higher else 1
    if tower.gaussian and exact_above is not None:
        series = max(series, _series_degree(tower, std, exact_above))
    max_power, max_degree = (4, max(4, series)) if higher else (2, series)
    center, table = hermite_tables(groups, tower.mean, std, max_power, max_degree)
    inverse = 1 / std
    p = _unit_powers(tower, table, inverse)
    mean, variance = center + p[0], p[1] - p[0].square()

    strong = None
    if exact_above is not None:
        wanted = ((1, 1), (2, 1), (2, 2)) if higher else ((1, 1),)
        strong = find_strong_pairs(tower, groups, table, std, series, exact_above, wanted)
    report = _report(tower, broken, strong)
    sums = _PairSums(p[0], strong, keep_pairs=closure == "full")
    if not higher and series == 1:
        slope = table[0, 1] * inverse
        sums.add(slice(0, None), tower.covariance * (slope[..., :, None] * slope[..., None, :]))
        blocks: Iterable[PairBlock] = ()
    else:
        blocks = pair_blocks(tower, table, inverse, series)
    for block in blocks:
        p11 = block.power_covariance(1, 1)
        if higher:
            p21, p22 = block.power_covariance(2, 1), block.power_covariance(2, 2)
            sums.add(block.rows, p11, p21, p22)
        else:
            sums.add(block.rows, p11)
    covariance = torch.diagonal_scatter(sums.covariance(), variance, dim1=-2, dim2=-1)
    if not higher:
        return CumulantTower(mean, covariance), report

    n = mean.shape[-1]
    k3 = p[2] - 3 * p[0] * p[1] + 2 * p[0] ** 3
    k4 = p[3] - 4 * p[0] * p[2] - 3 * p[1] ** 2 + 12 * p[0] ** 2 * p[1] - 6 * p[0] ** 4
    fourth = 3 / (n * (n + 2)) * (k4.sum(-1) + sums.total22())
    third: RadialThird | FactoredThird
    if closure == "radial":
        third = RadialThird(3 / (n + 2) * (k3 + sums.column21()))
    else:
        third = _full_third(tower, table, inverse, k3, sums.pairs21())
    return CumulantTower(mean, covariance, third, fourth), report


@torch.no_grad()
def _series_degree(tower: CumulantTower, std: Tensor, exact_above: float) -> int:
    """Terms after which the series has converged for the weakly correlated pairs."""
    scaled = tower.covariance.abs() / std[..., None, :]
    scaled.diagonal(dim1=-2, dim2=-1).zero_()
    largest = float((scaled.amax(-1) / std).amax())
    rho = min(max(largest, 1e-3), exact_above, 0.99)
    return min(12, math.ceil(math.log(_SERIES_TOLERANCE) / math.log(max(rho, 1e-3))))


def _unit_powers(tower: CumulantTower, table: Tensor, inverse: Tensor) -> Tensor:
    """``P_1 ... P_4`` of each unit, ``(P, *batch, n)``."""
    powers = table[:, 0]
    k3, k4 = tower.marginal_third(), tower.marginal_fourth()
    if k3 is not None:
        powers = powers + table[:, 3] * (k3 * inverse**3) / 6
    if k4 is not None:
        powers = powers + table[:, 4] * (k4 * inverse**4) / 24
    return powers


class _PairSums:
    """What the tower needs of the pair cumulants, gathered from blocks of rows.

    The covariance is ``K_11 = P_11``. Of ``K_21 = P_21 - 2 P_1i P_11`` the column sums suffice for
    a radial third cumulant, of ``K_22`` its sum over all pairs, in which ``P_21`` and its
    transpose count alike: ``sum K_22 = sum (P_22 - 4 P_1j P_21 + 4 P_1i P_1j P_11 - 2 P_11^2)``.
    """

    def __init__(self, p1: Tensor, strong: StrongPairs | None, *, keep_pairs: bool) -> None:
        self._p1 = p1
        self._strong = strong
        self._keep_pairs = keep_pairs
        self._p11: list[Tensor] = []
        self._k21: list[Tensor] = []
        self._column21: list[Tensor] = []
        self._total22: list[Tensor] = []

    def add(
        self, rows: slice, p11: Tensor, p21: Tensor | None = None, p22: Tensor | None = None
    ) -> None:
        self._p11.append(p11)
        if p21 is None or p22 is None:
            return
        row, column = self._p1[..., rows, None], self._p1[..., None, :]
        k21 = self._without_diagonal(rows, p21 - 2 * row * p11)
        inner = 4 * column * (row * p11 - p21) - 2 * p11.square() + p22
        self._total22.append(self._without_diagonal(rows, inner).sum((-2, -1)))
        if self._keep_pairs:
            self._k21.append(k21)
        else:
            self._column21.append(k21.sum(-2))

    def covariance(self) -> Tensor:
        """``K_11``, diagonal undefined."""
        self._base = self._p11[0] if len(self._p11) == 1 else torch.cat(self._p11, dim=-2)
        if self._strong is None:
            return self._base
        return self._put(self._base, self._strong.corrections[1, 1])

    def column21(self) -> Tensor:
        """``sum_i K_21,ik`` over ``i != k``."""
        total = sum(self._column21[1:], start=self._column21[0])
        if self._strong is None:
            return total
        batch, _, column = self._strong.index
        flat = total.reshape(-1, total.shape[-1])
        flat = flat.index_put((batch, column), self._delta21(), accumulate=True)
        return flat.reshape(total.shape)

    def pairs21(self) -> Tensor:
        """``K_21`` off the diagonal."""
        pairs = torch.cat(self._k21, dim=-2)
        return pairs if self._strong is None else self._put(pairs, self._delta21())

    def total22(self) -> Tensor:
        """``sum K_22`` over ``i != j``."""
        total = sum(self._total22[1:], start=self._total22[0])
        if self._strong is None:
            return total
        batch, i, j = self._strong.index
        d11, d21, d22 = (self._strong.corrections[key] for key in ((1, 1), (2, 1), (2, 2)))
        n = self._p1.shape[-1]
        p1, p11 = self._p1.reshape(-1, n), self._base.reshape(-1, n, n)[batch, i, j]
        delta = d22 + 4 * p1[batch, j] * (p1[batch, i] * d11 - d21) - 2 * d11 * (2 * p11 + d11)
        flat = total.reshape(-1).index_put((batch,), delta, accumulate=True)
        return flat.reshape(total.shape)

    def _delta21(self) -> Tensor:
        assert self._strong is not None
        batch, i, _ = self._strong.index
        p1 = self._p1.reshape(-1, self._p1.shape[-1])
        return self._strong.corrections[2, 1] - 2 * p1[batch, i] * self._strong.corrections[1, 1]

    def _put(self, matrix: Tensor, values: Tensor) -> Tensor:
        assert self._strong is not None
        flat = matrix.reshape(-1, *matrix.shape[-2:])
        return flat.index_put(self._strong.index, values, accumulate=True).reshape(matrix.shape)

    @staticmethod
    def _without_diagonal(rows: slice, block: Tensor) -> Tensor:
        diagonal = block.diagonal(offset=rows.start, dim1=-2, dim2=-1)
        zeros = torch.zeros_like(diagonal)
        return torch.diagonal_scatter(block, zeros, offset=rows.start, dim1=-2, dim2=-1)


def _full_third(
    tower: CumulantTower, table: Tensor, inverse: Tensor, k3: Tensor, k21: Tensor
) -> FactoredThird:
    """Third cumulant of the activations: scaled old sources and one new (section 2.9)."""
    # The new source holds the covariance paths w1_i C_ir w2_r C_jr w1_j and, in its rest, what the
    # factors miss on slices with repeated indices, so that those slices are exact.
    slope = table[0, 1] * inverse
    old = tower.third.sources if isinstance(tower.third, FactoredThird) else ()
    sources = tuple(source.scaled(slope) for source in old)
    edge = tower.covariance * slope[..., :, None] * inverse[..., None, :]
    edge = torch.diagonal_scatter(edge, torch.zeros_like(slope), dim1=-2, dim2=-1)
    gain = table[0, 2]
    # Slices of what the factors hold so far. The edge vanishes on the diagonal, the new leg off it.
    rest_diagonal = k3
    rest_pairs = k21 - gain[..., None, :] * edge.square()
    if sources:
        factored = FactoredThird(sources)
        rest_diagonal = rest_diagonal - factored.diagonal()
        rest_pairs = rest_pairs - factored.pairs()
    rest = torch.diagonal_scatter(3 * rest_pairs.mT, rest_diagonal, dim1=-2, dim2=-1)
    eye = torch.eye(rest.shape[-1], dtype=rest.dtype, device=rest.device)
    new = Source(eye.expand_as(rest), edge, rest, gain)
    return FactoredThird((*sources, new))


def _report(tower: CumulantTower, broken: int, strong: StrongPairs | None) -> StepReport:
    n = tower.mean.shape[-1]
    pairs = tower.mean.numel() * (n - 1) // 2
    if strong is None:
        return StepReport(broken, 0, pairs, 0.0)
    return StepReport(broken, strong.count, pairs, strong.truncation)
