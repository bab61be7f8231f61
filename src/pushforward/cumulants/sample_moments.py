"""Streaming moments and exceedance frequencies of samples that come in independent units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from pushforward.cumulants.designs import Layout

__all__ = ["Exceedance", "MomentAccumulator"]

# Outputs accumulated together, on a CPU and on an accelerator: small enough for the caches of the
# one, large enough to keep the other busy.
_PORTION_ENTRIES = (2**16, 2**23)
_MOST_GROUPS = 4096  # their variance is then known to 1.6 %, its root to 0.8 %
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Exceedance:
    """How often the outputs exceeded a threshold.

    Parameters
    ----------
    threshold
        The thresholds ``t``, shape (k,) or (T, k).
    probability
        Observed frequency of ``f_i > t``, same shape.
    standard_error
        Its standard error from the variance between units; 0 where no unit differed, so use the
        interval.
    lower, upper
        Wilson score interval at the sample size that plain sampling would need for the same
        standard error (the nominal one where no unit differed), with the quantile of Student's t
        for the degrees of freedom.
    confidence
        Nominal coverage of each interval.
    """

    threshold: Float[Tensor, "*T K"]
    probability: Float[Tensor, "*T K"]
    standard_error: Float[Tensor, "*T K"]
    lower: Float[Tensor, "*T K"]
    upper: Float[Tensor, "*T K"]
    confidence: float = _CONFIDENCE


class _Scatter:
    """Weighted mean and scatter of independent vectors, updated without cancellation.

    The pairwise update of T. F. Chan, G. H. Golub and R. J. LeVeque (1979), of "p" coordinates
    jointly, for each of "k" columns. A vector that averages "size" points has that weight.
    """

    def __init__(self) -> None:
        self.count = 0
        self.weight = 0
        self.mean: Tensor = torch.zeros(())
        self.scatter: Tensor = torch.zeros(())

    def add(self, vectors: Float[Tensor, "G p k"], size: int) -> None:
        weight = len(vectors) * size
        mean = vectors.mean(0)
        apart = vectors - mean
        scatter = size * torch.einsum("gpk,gqk->pqk", apart, apart)
        if self.count:
            total = self.weight + weight
            step = mean - self.mean
            outer = step.unsqueeze(0) * step.unsqueeze(1)
            scatter = self.scatter + scatter + outer * (self.weight * weight / total)
            mean = self.mean + step * (weight / total)
        self.count += len(vectors)
        self.weight += weight
        self.mean, self.scatter = mean, scatter

    def covariance_of_mean(self) -> Float[Tensor, "p p k"]:
        return self.scatter / ((self.count - 1) * self.weight)


class MomentAccumulator:
    """Streams output rows into moments, with the variance between groups of whole units.

    A group is one unit, or several consecutive ones when there are very many: that costs a little
    of the standard error's own precision and saves most of the work.
    """

    def __init__(
        self, layout: Layout, pilot: Float[Tensor, " k"], bounds: Tensor | None, *, covariance: bool
    ) -> None:
        units = max(1, min(layout.num_units // _MOST_GROUPS, layout.block_size // layout.unit_size))
        self.group_size = layout.unit_size << (units.bit_length() - 1)
        self.pilot = pilot
        self.bounds = bounds
        self.portion = _PORTION_ENTRIES[pilot.device.type != "cpu"]
        self.moments = _Scatter()
        self.exceedances = _Scatter()
        outputs = len(pilot)
        products = pilot.new_zeros((2, outputs, outputs)) if covariance else None
        self.products: Tensor | None = products
        self._open_sums: Tensor | None = None
        self._open_count = 0

    def add(self, values: Float[Tensor, "N k"]) -> None:
        """Take in the next rows, in the order of the design.

        Parameters
        ----------
        values
            Outputs, float64.
        """
        for piece in self._pieces(values):
            self._add_piece(piece)

    def _pieces(self, values: Float[Tensor, "N k"]) -> Iterator[Float[Tensor, "n k"]]:
        """Cut rows into portions that stay in the processor's cache.

        Yields
        ------
        Tensor
            Several whole groups, or a part of one.
        """
        rows = max(1, self.portion // values.shape[1])
        whole = max(1, rows // self.group_size) * self.group_size
        for groups in torch.split(values, whole):
            yield from torch.split(groups, rows if whole > rows else whole)

    def _add_piece(self, values: Float[Tensor, "n k"]) -> None:
        first = values - self.pilot
        second = first * first
        columns = [first, second, second * first, second * second]
        if self.bounds is not None:
            columns += [(values > bound).to(values) for bound in self.bounds]
        if self.products is not None:
            self.products[0].addmm_(first.T, first)
        count = len(values)
        whole = count // self.group_size * self.group_size
        if whole:
            shape = (-1, self.group_size, values.shape[1])
            groups = [column[:whole].reshape(shape).mean(1) for column in columns]
            self._add_groups(torch.stack(groups, dim=1), self.group_size)
        if whole < count:
            # A part of a unit that is larger than a piece, or of the last, shorter group.
            sums = torch.stack([c[whole:].sum(0) for c in columns]).unsqueeze(0)
            self._open_sums = sums if self._open_sums is None else self._open_sums + sums
            self._open_count += count - whole
            if self._open_count == self.group_size:
                self._close()

    def _close(self) -> None:
        if self._open_sums is not None:
            self._add_groups(self._open_sums / self._open_count, self._open_count)
            self._open_sums, self._open_count = None, 0

    def _add_groups(self, means: Float[Tensor, "G p k"], size: int) -> None:
        self.moments.add(means[:, :4], size)
        if self.bounds is not None:
            self.exceedances.add(means[:, 4:].flatten(1).unsqueeze(1), size)
        if self.products is not None:
            self.products[1].addmm_(means[:, 0].T, means[:, 0], alpha=size)

    def cumulants(self) -> dict[str, Tensor]:
        """Give the first four cumulants with standard errors, biases removed to second order.

        Returns
        -------
        dict
            Fields of :class:`SampledLaw`.
        """
        self._close()
        m1, m2, m3, m4 = self.moments.mean
        spread = self.moments.covariance_of_mean()
        one, zero = torch.ones_like(m1), torch.zeros_like(m1)

        def error(*gradient: Tensor) -> Tensor:
            slope = torch.stack((*gradient, *[zero] * (4 - len(gradient))))
            return torch.einsum("pk,pqk,qk->k", slope, spread, slope).clamp(min=0).sqrt()

        return {
            "mean": self.pilot + m1,
            "standard_error": error(one),
            "variance": m2 - m1**2 + spread[0, 0],
            "variance_standard_error": error(-2 * m1, one),
            "third": m3 - 3 * m1 * m2 + 2 * m1**3 - (6 * m1 * spread[0, 0] - 3 * spread[0, 1]),
            "third_standard_error": error(6 * m1**2 - 3 * m2, -3 * m1, one),
            "fourth": m4
            - 4 * m1 * m3
            - 3 * m2**2
            + 12 * m1**2 * m2
            - 6 * m1**4
            - ((12 * m2 - 36 * m1**2) * spread[0, 0] + 24 * m1 * spread[0, 1])
            + (4 * spread[0, 2] + 3 * spread[1, 1]),
            "fourth_standard_error": error(
                24 * m1 * m2 - 4 * m3 - 24 * m1**3, 12 * m1**2 - 6 * m2, -4 * m1, one
            ),
        }

    def covariance(self, variance: Float[Tensor, " k"]) -> Float[Tensor, "k k"] | None:
        """Unbiased covariance of the outputs; its diagonal is the variance given.

        Returns
        -------
        Tensor or None
            None when it was not wanted.
        """
        if self.products is None:
            return None
        total, groups = self.moments.weight, self.moments.count
        product_of_means = torch.outer(self.moments.mean[0], self.moments.mean[0])
        within, between = self.products / total - product_of_means
        result: Tensor = within + between / (groups - 1)
        result.diagonal().copy_(variance)
        return result

    def exceedance(self, shape: tuple[int, ...]) -> Exceedance | None:
        """How often the thresholds were exceeded.

        Parameters
        ----------
        shape
            Of the thresholds as they were given.

        Returns
        -------
        Exceedance or None
            None without thresholds.
        """
        if self.bounds is None:
            return None
        frequency = self.exceedances.mean.flatten()
        error = self.exceedances.covariance_of_mean().flatten().clamp(min=0).sqrt()
        binomial = frequency * (1 - frequency)
        informative = (binomial > 0) & (error > 0)
        shrink = torch.where(informative, error**2 / binomial, 1 / self.exceedances.weight)
        level = (1 + _CONFIDENCE) / 2
        student = float(special.stdtrit(self.exceedances.count - 1, level))
        quantile = torch.full_like(frequency, float(special.ndtri(level)))
        quantile = quantile.masked_fill(informative, student)
        lower, upper = _wilson(frequency, shrink, quantile)
        return Exceedance(
            threshold=self.bounds.reshape(shape),
            probability=frequency.reshape(shape),
            standard_error=error.reshape(shape),
            lower=lower.reshape(shape),
            upper=upper.reshape(shape),
        )


def _wilson(
    frequency: Float[Tensor, " n"], inverse_size: Float[Tensor, " n"], quantile: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Score interval of a proportion (E. B. Wilson, JASA 22, 1927).

    Returns
    -------
    tuple
        Lower and upper ends.
    """
    weight = quantile**2 * inverse_size
    centre = frequency + weight / 2
    reach = (frequency * (1 - frequency) * weight + weight**2 / 4).sqrt()
    lower, upper = (centre - reach) / (1 + weight), (centre + reach) / (1 + weight)
    return lower.clamp(min=0), upper.clamp(max=1)
