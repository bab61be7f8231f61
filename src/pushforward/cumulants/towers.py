"""Joint cumulants of a layer, as far as they are tracked, and what affine maps do to them.

A tower holds the mean, the covariance and, where they are tracked, a third and a fourth cumulant
in a compressed form:

- the *radial* third cumulant ``Sym(v (x) M)`` with a vector core ``v``, or the full one as a sum
  of rank-one terms,
- the *radial* fourth cumulant ``s Sym(M (x) M)`` with a scalar core ``s``,

where ``M`` is the metric: the identity behind an activation, ``A A^T`` behind an affine map ``A``.
Cumulants are multilinear, so affine maps act exactly. Sources: arXiv 2605.05179; notation of
`docs/notation.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.networks.graph import AffineMap
from pushforward.networks.linear_maps import LinearMap

__all__ = [
    "CumulantTower",
    "FactoredThird",
    "Metric",
    "RadialThird",
    "Radius",
    "Source",
    "concatenate_towers",
    "gram",
]

Metric = Literal["exact", "average"]


@dataclass(frozen=True)
class RadialThird:
    """Third cumulant ``Sym(core (x) metric)``: what the radius of the state has to do with it.

    Parameters
    ----------
    core
        ``(*batch, n)``.
    """

    core: Tensor

    def mapped(self, linear: LinearMap) -> RadialThird:
        """The core behind a linear map; the metric changes in the tower.

        Returns
        -------
        RadialThird
            With ``core <- A core``.
        """
        return RadialThird(linear.apply(self.core))

    def diagonal(self, metric: Float[Tensor, "n n"]) -> Float[Tensor, "*batch n"]:
        """``kappa_iii = u_i M_ii``.

        Returns
        -------
        Tensor
            ``(*batch, n)``.
        """
        return self.core * metric.diagonal()

    def pairs(self, metric: Float[Tensor, "n n"]) -> Float[Tensor, "*batch n n"]:
        """``kappa_iij = (2 u_i M_ij + u_j M_ii) / 3`` at ``[i, j]``.

        Returns
        -------
        Tensor
            ``(*batch, n, n)``.
        """
        u = self.core
        return (2 * u[..., :, None] * metric + metric.diagonal()[:, None] * u[..., None, :]) / 3


@dataclass(frozen=True)
class Source:
    """What one activation layer contributes to the third cumulant, as rank-one terms.

    ``Sym( sum_r  3 gain_r  edge_r (x) edge_r (x) leg_r  +  rest_r (x) leg_r (x) leg_r )``: the
    first sum are the covariance paths centred at unit ``r`` of that layer, the second its slices
    with repeated indices. Both share the leg, born as the identity, so a later layer transports
    three matrices and not six.

    Parameters
    ----------
    leg, edge, rest
        ``(*batch, n, r)``, ``r`` being the width of the layer where the source was born.
    gain
        ``(*batch, r)``.
    """

    leg: Tensor
    edge: Tensor
    rest: Tensor
    gain: Tensor

    def mapped(self, linear: LinearMap) -> Source:
        """Each factor behind a linear map.

        Returns
        -------
        Source
            With ``n`` the outputs of the map.
        """
        leg, edge, rest = (linear.apply(f.mT).mT for f in (self.leg, self.edge, self.rest))
        return Source(leg, edge, rest, self.gain)

    def select(self, units: slice) -> Source:
        """Some of the units.

        Parameters
        ----------
        units
            Which.

        Returns
        -------
        Source
            With `n` of them, the same ranks.
        """
        leg, edge, rest = (f[..., units, :] for f in (self.leg, self.edge, self.rest))
        return Source(leg, edge, rest, self.gain)

    def scaled(self, factor: Float[Tensor, "*batch n"]) -> Source:
        """Each factor with its rows multiplied.

        Returns
        -------
        Source
            The tensor ``f_i f_j f_k kappa_ijk``.
        """
        f = factor[..., None]
        return Source(f * self.leg, f * self.edge, f * self.rest, self.gain)

    def diagonal(self) -> Float[Tensor, "*batch n"]:
        """``kappa_iii``.

        Returns
        -------
        Tensor
            ``(*batch, n)``.
        """
        gain = self.gain[..., None, :]
        terms = 3 * gain * self.edge.square() * self.leg + self.rest * self.leg.square()
        return terms.sum(-1)

    def pairs(self) -> Float[Tensor, "*batch n n"]:
        """``kappa_iij`` at ``[i, j]``, by three matrix products.

        Returns
        -------
        Tensor
            ``(*batch, n, n)``.
        """
        weighted = self.gain[..., None, :] * self.edge
        product = self.rest * self.leg
        return (
            (weighted * self.edge + product * (2 / 3)) @ self.leg.mT
            + (2 * weighted * self.leg) @ self.edge.mT
            + (self.leg.square() / 3) @ self.rest.mT
        )


@dataclass(frozen=True)
class FactoredThird:
    """Full third cumulant as a sum of `Source` terms, one for each layer behind."""

    sources: tuple[Source, ...]

    def mapped(self, linear: LinearMap) -> FactoredThird:
        """Every source behind a linear map.

        Returns
        -------
        FactoredThird
            With the same ranks.
        """
        return FactoredThird(tuple(source.mapped(linear) for source in self.sources))

    def diagonal(self, metric: Tensor | None = None) -> Float[Tensor, "*batch n"]:  # noqa: ARG002
        """``kappa_iii``.

        Returns
        -------
        Tensor
            ``(*batch, n)``.
        """
        parts = [source.diagonal() for source in self.sources]
        return sum(parts[1:], start=parts[0])

    def pairs(self, metric: Tensor | None = None) -> Float[Tensor, "*batch n n"]:  # noqa: ARG002
        """``kappa_iij`` at ``[i, j]``.

        Returns
        -------
        Tensor
            ``(*batch, n, n)``.
        """
        parts = [source.pairs() for source in self.sources]
        return sum(parts[1:], start=parts[0])


@dataclass(frozen=True)
class CumulantTower:
    """Tracked joint cumulants of ``n`` units.

    Parameters
    ----------
    mean
        ``(*batch, n)``.
    covariance
        ``(*batch, n, n)``.
    third
        None where it is zero or not tracked.
    fourth
        Core ``s`` of shape ``(*batch)`` or ``()``; None where it is zero or not tracked.
    metric
        ``(n, n)``; None stands for the identity.
    """

    mean: Tensor
    covariance: Tensor
    third: RadialThird | FactoredThird | None = None
    fourth: Tensor | None = None
    metric: Tensor | None = None

    @property
    def gaussian(self) -> bool:
        """Whether no cumulant beyond the second is present."""
        return self.third is None and self.fourth is None

    @property
    def variance(self) -> Float[Tensor, "*batch n"]:
        """Diagonal of the covariance."""
        return self.covariance.diagonal(dim1=-2, dim2=-1)

    def resolved_metric(self) -> Float[Tensor, "n n"]:
        """The metric as a matrix.

        Returns
        -------
        Tensor
            ``(n, n)``.
        """
        if self.metric is None:
            n = self.mean.shape[-1]
            return torch.eye(n, dtype=self.mean.dtype, device=self.mean.device)
        return self.metric

    def affine(self, affine: AffineMap, metric: Metric = "exact") -> CumulantTower:
        """Cumulants behind an affine map, exactly.

        Parameters
        ----------
        affine
            The map.
        metric
            ``"average"`` replaces ``A A^T`` by its mean diagonal times the identity (cheaper, a
            little worse).

        Returns
        -------
        CumulantTower
            Of the outputs of the map.
        """
        linear = affine.linear
        return replace(
            self.gaussian_part(affine),
            third=None if self.third is None else self.third.mapped(linear),
            fourth=self.fourth,
            metric=self._mapped_metric(linear, metric),
        )

    def gaussian_part(self, affine: AffineMap) -> CumulantTower:
        """Mean and covariance behind an affine map.

        Returns
        -------
        CumulantTower
            Without third and fourth cumulants.
        """
        linear = affine.linear
        rows = linear.apply(self.covariance)
        return CumulantTower(affine.apply(self.mean), linear.apply(rows.mT))

    def _mapped_metric(self, linear: LinearMap, kind: Metric) -> Tensor | None:
        needs_metric = isinstance(self.third, RadialThird) or self.fourth is not None
        if not needs_metric:
            return None
        if kind == "average":
            if self.metric is None:
                ones = self.mean.new_ones(linear.in_features)
                trace = linear.apply_squared(ones).sum()
            else:
                trace = linear.apply(linear.apply(self.metric).mT).diagonal().sum()
            size = linear.out_features
            eye = torch.eye(size, dtype=self.mean.dtype, device=self.mean.device)
            return eye * (trace / size)
        if self.metric is None:
            return gram(linear, self.mean)
        return linear.apply(linear.apply(self.metric).mT)

    def expanded(self, batch: int) -> CumulantTower:
        """The same with a leading dimension `batch` in every part; laws share some at first.

        Parameters
        ----------
        batch
            Number of laws.

        Returns
        -------
        CumulantTower
            The same cumulants.
        """
        n = self.mean.shape[-1]
        fourth = self.fourth
        return replace(
            self,
            mean=self.mean.expand(batch, n),
            covariance=self.covariance.expand(batch, n, n),
            fourth=fourth if fourth is None else fourth.expand(batch),
        )

    def squeezed(self) -> CumulantTower:
        """Without the batch dimension of a single law.

        Returns
        -------
        CumulantTower
            Its only member.
        """
        third = self.third
        if isinstance(third, RadialThird):
            third = RadialThird(third.core[0])
        elif isinstance(third, FactoredThird):
            third = FactoredThird(
                tuple(Source(s.leg[0], s.edge[0], s.rest[0], s.gain[0]) for s in third.sources)
            )
        fourth = self.fourth if self.fourth is None else self.fourth[0]
        return CumulantTower(self.mean[0], self.covariance[0], third, fourth, self.metric)

    def marginal_third(self) -> Float[Tensor, "*batch n"] | None:
        """Third cumulant of each unit, None when it is zero.

        Returns
        -------
        Tensor or None
            ``(*batch, n)``.
        """
        return None if self.third is None else self.third.diagonal(self._metric_if_radial())

    def marginal_fourth(self) -> Float[Tensor, "*batch n"] | None:
        """Fourth cumulant ``s M_ii^2`` of each unit, None when it is zero.

        Returns
        -------
        Tensor or None
            ``(*batch, n)``.
        """
        if self.fourth is None:
            return None
        return self.fourth[..., None] * self.resolved_metric().diagonal().square()

    def pair_third(self) -> Float[Tensor, "*batch n n"] | None:
        """``kappa_iij`` at ``[i, j]``, None when it is zero.

        Returns
        -------
        Tensor or None
            ``(*batch, n, n)``.
        """
        return None if self.third is None else self.third.pairs(self._metric_if_radial())

    def pair_fourth(self) -> Float[Tensor, "*batch n n"] | None:
        """``kappa_iijj = s / 3 (M_ii M_jj + 2 M_ij^2)``, None when it is zero.

        Returns
        -------
        Tensor or None
            ``(*batch, n, n)``.
        """
        if self.fourth is None:
            return None
        metric = self.resolved_metric()
        diagonal = metric.diagonal()
        shape = torch.outer(diagonal, diagonal) + 2 * metric.square()
        return self.fourth[..., None, None] / 3 * shape

    def select(self, units: slice) -> CumulantTower:
        """Joint cumulants of some of the units.

        Parameters
        ----------
        units
            Which.

        Returns
        -------
        CumulantTower
            Of those units.
        """
        third = self.third
        if isinstance(third, RadialThird):
            third = RadialThird(third.core[..., units])
        elif isinstance(third, FactoredThird):
            third = FactoredThird(tuple(source.select(units) for source in third.sources))
        metric = self.metric if self.metric is None else self.metric[units, units]
        return CumulantTower(
            self.mean[..., units], self.covariance[..., units, units], third, self.fourth, metric
        )

    def _metric_if_radial(self) -> Tensor:
        return self.resolved_metric() if isinstance(self.third, RadialThird) else self.mean


@dataclass(frozen=True)
class Radius:
    """Moments of ``R / sqrt(d)``, the radius of ``N(0, I_d)`` against that of the sphere.

    A network that is positively homogeneous sends ``X = (R / sqrt d) Y``, ``Y`` uniform on the
    sphere of radius ``sqrt d`` and independent of ``R``, to ``(R / sqrt d) f(Y)``. Propagating
    ``Y`` removes the fluctuation of the radius from the approximation; these moments put it back
    exactly.

    Parameters
    ----------
    dimension
        Of the input, ``d``.
    """

    dimension: int

    def moment(self, power: int) -> float:
        """``E (R / sqrt d)^p = (2 / d)^{p/2} Gamma((d + p) / 2) / Gamma(d / 2)``.

        Parameters
        ----------
        power
            ``p``.

        Returns
        -------
        float
            1 for ``p = 2``.
        """
        d = self.dimension
        log = math.lgamma((d + power) / 2) - math.lgamma(d / 2) + power / 2 * math.log(2 / d)
        return math.exp(log)

    @property
    def fourth_core(self) -> float:
        """Core of the fourth cumulant of ``Y``: ``kappa_4 = -6 / (d + 2) Sym(I (x) I)``."""
        return -6 / (self.dimension + 2)

    def remove(self, tower: CumulantTower) -> CumulantTower:
        """From the mean and covariance of ``f(X)`` to those of ``f(Y)``.

        Parameters
        ----------
        tower
            Without higher cumulants.

        Returns
        -------
        CumulantTower
            Of ``f(Y)``.
        """
        a1 = self.moment(1)
        mean = tower.mean / a1
        outer = mean[..., :, None] * mean[..., None, :]
        return CumulantTower(mean, tower.covariance - (1 - a1**2) * outer)

    def restore(self, tower: CumulantTower) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """From the tower of ``f(Y)`` to mean, covariance and marginal cumulants of ``f(X)``.

        Parameters
        ----------
        tower
            Of ``f(Y)``.

        Returns
        -------
        mean, covariance, third, fourth
            Of ``f(X)``; third and fourth are None when the tower does not track them.
        """
        a1, a3, a4 = self.moment(1), self.moment(3), self.moment(4)
        m, variance = tower.mean, tower.variance
        mean = a1 * m
        covariance = tower.covariance + (1 - a1**2) * m[..., :, None] * m[..., None, :]
        k3, k4 = tower.marginal_third(), tower.marginal_fourth()
        if k3 is None:
            return mean, covariance, None, None
        k4 = torch.zeros_like(m) if k4 is None else k4
        k2 = covariance.diagonal(dim1=-2, dim2=-1)
        raw3 = a3 * (k3 + 3 * variance * m + m**3)
        raw4 = a4 * (k4 + 4 * k3 * m + 3 * variance**2 + 6 * variance * m**2 + m**4)
        third = raw3 - 3 * k2 * mean - mean**3
        fourth = raw4 - 4 * third * mean - 3 * k2**2 - 6 * k2 * mean**2 - mean**4
        return mean, covariance, third, fourth


def concatenate_towers(towers: Sequence[CumulantTower]) -> CumulantTower:
    """Towers of several batches of laws as one batch.

    Parameters
    ----------
    towers
        Of the same network at the same order, each with a batch dimension.

    Returns
    -------
    CumulantTower
        One batch.
    """
    first = towers[0]
    third = first.third
    if isinstance(third, RadialThird):
        cores = [t.third.core for t in towers if isinstance(t.third, RadialThird)]
        third = RadialThird(torch.cat(cores))
    elif isinstance(third, FactoredThird):
        members = [t.third.sources for t in towers if isinstance(t.third, FactoredThird)]
        third = FactoredThird(
            tuple(_concatenate_sources(same) for same in zip(*members, strict=True))
        )
    fourths = [t.fourth for t in towers if t.fourth is not None]
    return CumulantTower(
        torch.cat([t.mean for t in towers]),
        torch.cat([t.covariance for t in towers]),
        third,
        torch.cat(fourths) if fourths else None,
        first.metric,
    )


def _concatenate_sources(sources: tuple[Source, ...]) -> Source:
    leg, edge, rest, gain = (
        torch.cat([getattr(source, name) for source in sources])
        for name in ("leg", "edge", "rest", "gain")
    )
    return Source(leg, edge, rest, gain)


def gram(linear: LinearMap, like: Tensor) -> Float[Tensor, "n n"]:
    """``A A^T``.

    Parameters
    ----------
    linear
        The map ``A``.
    like
        Tensor whose dtype and device the result takes.

    Returns
    -------
    Tensor
        ``(n, n)``.
    """
    return linear.apply(linear.dense(like))
