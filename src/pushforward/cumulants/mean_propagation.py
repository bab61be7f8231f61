"""Order 1: means and independent variances, at the cost of one forward pass or two.

Two forms. The default keeps one variance for each unit, ``var <- (A o A) v``. The scalar form of
arXiv 2605.05179 keeps their average ``tau`` alone, ``var_i = tau sum_j A_ij^2`` (section 2.6 of
its restatement in `docs/method.md`); it costs the same and is a little worse, and is kept for
comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pushforward.cumulants.activation_step import hermite_tables, positive_std
from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.towers import Metric
from pushforward.networks.graph import AffineMap, UnitGroup

__all__ = ["UnitMoments", "activate_units", "affine_units", "first_affine_units"]


@dataclass(frozen=True)
class UnitMoments:
    """Mean and variance of each unit, units taken as independent.

    Parameters
    ----------
    mean, variance
        ``(*batch, n)``.
    """

    mean: Tensor
    variance: Tensor


def first_affine_units(
    law: GaussianLaw, affine: AffineMap, scalar: bool, metric: Metric
) -> UnitMoments:
    """Moments behind the first affine map.

    The default form reads the variances off the full covariance of the law, exactly; the scalar
    form reduces it to its average variance, as published.

    Parameters
    ----------
    law
        Of the inputs, float64.
    affine
        The first affine map.
    scalar
        Whether to keep the average variance alone.
    metric
        For the scalar form.

    Returns
    -------
    UnitMoments
        Of the first pre-activations.
    """
    moments = UnitMoments(law.mean, law.diagonal())
    if scalar or law.covariance.dim() < 2:
        return affine_units(moments, affine, scalar, metric)
    linear = affine.linear
    rows = linear.apply(law.dense_covariance())  # (*batch, d, n): C A^T
    variance = (linear.dense(law.mean) * rows.mT).sum(-1)
    return UnitMoments(affine.apply(law.mean), variance.expand(*law.mean.shape[:-1], -1))


def affine_units(
    moments: UnitMoments, affine: AffineMap, scalar: bool, metric: Metric
) -> UnitMoments:
    """Moments behind an affine map of independent units.

    Parameters
    ----------
    moments
        Of its inputs.
    affine
        The map.
    scalar
        Whether to spread the average variance of the inputs evenly over them.
    metric
        ``"average"`` also replaces the row sums of squares by their mean (scalar form only).

    Returns
    -------
    UnitMoments
        Of its outputs.
    """
    variance = moments.variance
    if scalar:
        variance = variance.mean(-1, keepdim=True).expand_as(variance)
    variance = affine.linear.apply_squared(variance)
    if scalar and metric == "average":
        variance = variance.mean(-1, keepdim=True).expand_as(variance)
    return UnitMoments(affine.apply(moments.mean), variance)


def activate_units(moments: UnitMoments, groups: tuple[UnitGroup, ...]) -> tuple[UnitMoments, int]:
    """Exact mean and variance of the activation of each Gaussian unit.

    Parameters
    ----------
    moments
        Of the pre-activations.
    groups
        Which activation acts on which units.

    Returns
    -------
    UnitMoments
        Of the activations.
    int
        How many variances were negative beyond rounding.
    """
    std, broken = positive_std(moments.variance)
    center, table = hermite_tables(groups, moments.mean, std, 2, 0)
    first, second = table[0, 0], table[1, 0]
    return UnitMoments(center + first, second - first.square()), broken
