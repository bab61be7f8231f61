"""Means of chains with their errors, and whether the chains have stopped moving."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.sampling.diagnostics import diagnose

__all__ = ["Agreement", "agreement", "extrapolated"]

_FEWEST_DRAWS = 8
_EXACT = 1e-12  # relative errors below it are as good as none


@dataclass(frozen=True)
class Agreement:
    """The mean of a quantity over chains, and how far it can be trusted.

    Parameters
    ----------
    mean
        Over all draws.
    standard_error
        The larger of two: from the effective number of draws, and from the spread of the means of
        the chains, which also sees chains that are in different places.
    effective_draws
        Of all chains.
    r_hat
        Rank-normalised split R-hat.
    drift
        Mean of the second half minus that of the first.
    drift_error
        Its standard error.
    """

    mean: float
    standard_error: float
    effective_draws: float
    r_hat: float
    drift: float
    drift_error: float

    @property
    def settled(self) -> bool:
        """Whether the drift is within three errors, or within 1 % of the mean."""
        return abs(self.drift) <= max(3 * self.drift_error, 0.01 * abs(self.mean))


def agreement(trace: Float[Tensor, "chain draw"]) -> Agreement:
    """Summarise what chains recorded.

    Parameters
    ----------
    trace
        Finite.

    Returns
    -------
    Agreement
        Numbers that too few draws or chains cannot give are NaN.
    """
    trace = trace.double().cpu()
    half = trace.shape[1] // 2
    first, second = trace[:, :half], trace[:, trace.shape[1] - half :]
    error, effective, r_hat = _monte_carlo(trace)
    halves = [_monte_carlo(part)[0] for part in (first, second)] if half else [torch.nan]
    means = trace.mean(1)
    between = float(means.std()) / sqrt(len(means)) if len(means) > 1 else torch.nan
    known = [value for value in (error, between) if isfinite(value)]
    return Agreement(
        mean=float(trace.mean()),
        standard_error=max(known, default=torch.nan),
        effective_draws=effective,
        r_hat=r_hat,
        drift=float(second.mean() - first.mean()) if half else torch.nan,
        drift_error=sqrt(sum(value**2 for value in halves)),
    )


def extrapolated(
    coarse: tuple[float, float], fine: tuple[float, float], bias: tuple[float, float]
) -> tuple[float, float]:
    """The value at step size 0 from runs at ``eps`` and ``eps / 2``.

    Both have a bias that is linear in the step size, ``2 b`` and ``b``. What is known of ``b`` in
    advance enters as a normal law, and the value is that of least squares. So runs are averaged
    where no bias is to be expected, and where it may be anything this is Richardson's ``2 fine -
    coarse`` with its larger error; in between there is no threshold.

    Parameters
    ----------
    coarse, fine
        Mean and standard error of each run.
    bias
        Mean and standard deviation of what is expected of ``b``, that of the fine run.

    Returns
    -------
    tuple
        Value and standard error.

    Examples
    --------
    >>> value, error = extrapolated((10.4, 0.1), (10.2, 0.1), (0.0, 1e9))
    >>> round(value, 3), round(error, 3)
    (10.0, 0.224)
    """
    unit = max(map(abs, (*coarse, *fine, *bias))) or 1.0
    (x, s), (y, t), (expected, spread) = (
        (mean / unit, max(error / unit, _EXACT)) for mean, error in (coarse, fine, bias)
    )
    # Precisions of x = value + 2 b, of y = value + b and of b = expected.
    u, v, w = (error**-2 for error in (s, t, spread))
    # Solved by hand, so that nothing cancels: Richardson's value, and both runs less their bias.
    total = u * v + w * (u + v)
    value = (u * v * (2 * y - x) + w * (u * (x - 2 * expected) + v * (y - expected))) / total
    return unit * value, unit * sqrt((4 * u + v + w) / total)


def _monte_carlo(trace: Tensor) -> tuple[float, float, float]:
    """Standard error of the mean, effective draws, R-hat."""
    if trace.numel() > 1 and float(trace.std()) == 0:
        return 0.0, torch.nan, torch.nan
    if trace.shape[1] < _FEWEST_DRAWS:
        return torch.nan, torch.nan, torch.nan
    (found,) = diagnose({}, {"trace": trace}, {}).quantities
    return float(found.standard_error), float(found.ess_bulk), float(found.r_hat)
