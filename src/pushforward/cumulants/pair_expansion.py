"""Covariances of powers of activations over all pairs of units of a layer.

For standardised units the expansion of `activation_step` reads

    P_pq = sum_k A[p,k]_i A[q,k]_j rho_ij^k / k!  +  A[p,2]_i A[q,1]_j B_ij / 2
           + A[p,1]_i A[q,2]_j B_ji / 2  +  A[p,2]_i A[q,2]_j Q_ij / 4.

Each term is a matrix times a product of two vectors. The matrices are worked through in blocks of
rows that stay in the cache, and the few pairs that are strongly correlated are corrected
afterwards, as a list, by the exact bivariate kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.cumulants.towers import CumulantTower, RadialThird
from pushforward.gaussians.activations import PiecewisePolynomial
from pushforward.gaussians.bivariate import (
    PowerKernel,
    exact_order,
    mehler_series,
    pair_covariance,
    power_kernel,
)
from pushforward.gaussians.blocks import block_elements
from pushforward.networks.graph import UnitGroup

__all__ = ["PairBlock", "StrongPairs", "find_strong_pairs", "pair_blocks"]


@dataclass(frozen=True)
class PairBlock:
    """The expansion for some rows ``i`` and all columns ``j``.

    Parameters
    ----------
    rows
        Which units the rows are.
    table
        Hermite coefficients ``(P, K + 1, *batch, n)``.
    series
        Number of terms of Mehler's series.
    rho
        Correlations ``(*batch, rows, n)``; the diagonal entries are 1.
    third, third_transposed
        ``B_ij`` and ``B_ji`` without the parts that `core` and `scale` hold; None where zero.
    metric
        ``M_ij / (s_i s_j)``; None where no radial cumulant is present.
    scale
        ``M_ii / s_i^2``.
    core
        ``u_i / s_i`` of a radial third cumulant.
    fourth
        Core of the fourth cumulant.
    """

    rows: slice
    table: Tensor
    series: int
    rho: Tensor
    third: Tensor | None = None
    third_transposed: Tensor | None = None
    metric: Tensor | None = None
    scale: Tensor | None = None
    core: Tensor | None = None
    fourth: Tensor | None = None

    def power_covariance(self, p: int, q: int) -> Float[Tensor, "*batch rows n"]:
        """``P_pq``; entries on the diagonal have no meaning.

        Parameters
        ----------
        p, q
            Powers of the row unit and of the column unit.

        Returns
        -------
        Tensor
            ``(*batch, rows, n)``.
        """
        a, b = self.table[p - 1], self.table[q - 1]
        value: Tensor | None = None
        for k in range(self.series, 0, -1):
            left = a[k] if k == 1 else a[k] * (1 / math.factorial(k))
            column, row = left[..., self.rows, None], b[k][..., None, :]
            term = column * row if value is None else torch.addcmul(value, column, row)
            value = self.rho * term
        assert value is not None
        if self.third is not None and self.third_transposed is not None:
            value = torch.addcmul(value, self.third, self._outer((a[2] / 2, b[1])))
            value = torch.addcmul(value, self.third_transposed, self._outer((a[1] / 2, b[2])))
        if self.metric is None or self.scale is None:
            return value
        plain = []
        if self.core is not None:
            linear = self._outer((a[2] * self.core / 3, b[1]), (a[1], b[2] * self.core / 3))
            value = torch.addcmul(value, self.metric, linear)
            plain += [
                (a[2] * self.scale / 6, b[1] * self.core),
                (a[1] * self.core / 6, b[2] * self.scale),
            ]
        if self.fourth is not None:
            weight = self.fourth[..., None] / 12
            square = self._outer((2 * weight * a[2], b[2]))
            value = torch.addcmul(value, self.metric.square(), square)
            plain.append((weight * a[2] * self.scale, b[2] * self.scale))
        return value + self._outer(*plain)

    def _outer(self, *factors: tuple[Tensor, Tensor]) -> Tensor:
        """Sum of products ``left_i right_j`` over the rows of the block."""
        total: Tensor | None = None
        for left, right in factors:
            column, row = left[..., self.rows, None], right[..., None, :]
            total = column * row if total is None else torch.addcmul(total, column, row)
        assert total is not None
        return total


def pair_blocks(
    tower: CumulantTower, table: Tensor, inverse: Tensor, series: int
) -> Iterator[PairBlock]:
    """The expansion of a layer, block of rows by block of rows.

    Parameters
    ----------
    tower
        Of the pre-activations.
    table
        Hermite coefficients ``(P, K + 1, *batch, n)``.
    inverse
        Reciprocal standard deviations ``(*batch, n)``.
    series
        Number of terms of Mehler's series.

    Yields
    ------
    PairBlock
        From the first rows to the last.
    """
    radial = isinstance(tower.third, RadialThird)
    third = None if tower.third is None or radial else tower.pair_third()
    metric = scale = core = None
    if radial or tower.fourth is not None:
        metric = tower.resolved_metric()
        scale = metric.diagonal() * inverse.square()
        core = tower.third.core * inverse if isinstance(tower.third, RadialThird) else None
    square = inverse.square()
    n = inverse.shape[-1]
    height = max(1, block_elements(inverse.device) // inverse.numel())
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        left, right = inverse[..., rows, None], inverse[..., None, :]
        b = bt = None
        if third is not None:
            b = third[..., rows, :] * square[..., rows, None] * right
            bt = third[..., :, rows].mT * left * square[..., None, :]
        yield PairBlock(
            rows,
            table,
            series,
            tower.covariance[..., rows, :] * left * right,
            b,
            bt,
            None if metric is None else metric[rows] * left * right,
            scale,
            core,
            tower.fourth,
        )


@dataclass(frozen=True)
class StrongPairs:
    """Corrections of the strongly correlated pairs: exact kernel minus series.

    Parameters
    ----------
    index
        Batch, row and column of each ordered pair, three tensors ``(pairs,)``; both orders are
        listed.
    corrections
        For ``(p, q)`` the correction of ``P_pq`` at each of them.
    truncation
        Largest bound on the error of a corrected covariance, relative to the standard deviations
        of the activations.
    """

    index: tuple[Tensor, Tensor, Tensor]
    corrections: dict[tuple[int, int], Tensor]
    truncation: float

    @property
    def count(self) -> int:
        """Number of unordered pairs."""
        return len(self.index[0]) // 2


def find_strong_pairs(
    tower: CumulantTower,
    groups: tuple[UnitGroup, ...],
    table: Tensor,
    std: Tensor,
    series: int,
    exact_above: float,
    powers: tuple[tuple[int, int], ...],
) -> StrongPairs | None:
    """Pairs with ``|rho| > exact_above`` and what the series gets wrong about them.

    Parameters
    ----------
    tower
        Of the pre-activations.
    groups
        Activations of the layer.
    table
        Hermite coefficients ``(P, K + 1, *batch, n)``.
    std
        Standard deviations ``(*batch, n)``.
    series
        Number of terms of the series that is corrected.
    exact_above
        Threshold on the correlation.
    powers
        The ``(p, q)`` to correct.

    Returns
    -------
    StrongPairs or None
        None when there are no such pairs.
    """
    n = std.shape[-1]
    covariance, flat_std = tower.covariance.reshape(-1, n, n), std.reshape(-1, n)
    batch, i, j = _strong_upper(covariance.detach(), flat_std.detach(), exact_above)
    if not len(batch):
        return None
    index = (batch.repeat(2), torch.cat([i, j]), torch.cat([j, i]))
    rho = covariance[batch, i, j] / (flat_std[batch, i] * flat_std[batch, j])
    rho = rho.clamp(-1, 1)
    mean = tower.mean.reshape(-1, n)
    coefficients = table.reshape(*table.shape[:2], -1, n)
    kernels: dict[tuple[int, int, int | None], PowerKernel] = {}

    def kernel(position: int, power: int, order: int | None) -> PowerKernel:
        key = (position, power, order)
        if key not in kernels:
            group = groups[position]
            units = mean[:, group.units].reshape(-1), flat_std[:, group.units].reshape(-1)
            known = coefficients[power - 1, ..., group.units].flatten(1)
            kernels[key] = power_kernel(group.activation, *units, power, order, known)
        return kernels[key]

    corrections: dict[tuple[int, int], Tensor] = {}
    truncation = 0.0
    for p, q in powers:
        parts = []
        for rows, columns in [(i, j)] if p == q else [(i, j), (j, i)]:
            correction = torch.zeros_like(rho)
            for left, right, chosen in _group_pairs(groups, rows, columns):
                first, second = groups[left], groups[right]
                if _series_is_exact(first, p, series) or _series_is_exact(second, q, series):
                    continue
                order = exact_order(first.activation, p, second.activation, q)
                at, row, column = batch[chosen], rows[chosen], columns[chosen]
                local = (
                    at * (first.units.stop - first.units.start) + row - first.units.start,
                    at * (second.units.stop - second.units.start) + column - second.units.start,
                )
                exact = pair_covariance(
                    kernel(left, p, order), kernel(right, q, order), local, rho[chosen]
                )
                approximate = mehler_series(
                    coefficients[p - 1, 1 : series + 1, at, row],
                    coefficients[q - 1, 1 : series + 1, at, column],
                    rho[chosen],
                )
                correction = correction.index_put((chosen,), exact.value - approximate)
                if p == q == 1:
                    spread = coefficients[1, 0].detach()
                    scale = (spread[at, row] * spread[at, column]).sqrt().clamp(min=1e-300)
                    truncation = max(truncation, float((exact.truncation / scale).max()))
            parts.append(correction)
        corrections[p, q] = parts[0].repeat(2) if p == q else torch.cat(parts)
    return StrongPairs(index, corrections, truncation)


def _group_pairs(
    groups: tuple[UnitGroup, ...], rows: Tensor, columns: Tensor
) -> Iterator[tuple[int, int, Tensor]]:
    """Which of the pairs belong to which two groups."""
    for left, first in enumerate(groups):
        in_first = (rows >= first.units.start) & (rows < first.units.stop)
        for right, second in enumerate(groups):
            in_second = (columns >= second.units.start) & (columns < second.units.stop)
            chosen = (in_first & in_second).nonzero()[:, 0]
            if len(chosen):
                yield left, right, chosen


@torch.no_grad()
def _strong_upper(
    covariance: Tensor, std: Tensor, exact_above: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch, row and column of the pairs above the diagonal that are strongly correlated."""
    n = std.shape[-1]
    height = max(1, block_elements(std.device) // std.numel())
    found = []
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        bound = (exact_above * std[:, rows, None]) * std[:, None, :]
        hits = (covariance[:, rows].abs() > bound).nonzero()
        found.append(hits + hits.new_tensor([0, start, 0]))
    batch, i, j = torch.cat(found).unbind(1)
    upper = i < j
    return batch[upper], i[upper], j[upper]


def _series_is_exact(group: UnitGroup, power: int, series: int) -> bool:
    """A polynomial has no Hermite coefficients beyond its degree."""
    activation = group.activation
    return (
        isinstance(activation, PiecewisePolynomial)
        and not activation.breakpoints
        and activation.degree * power <= series
    )
