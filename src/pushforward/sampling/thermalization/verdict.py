"""The rule that decides whether chains have thermalised, on curves alone.

Chains that start informed, at a known posterior draw, are in equilibrium once they forgot where
they started. Chains that start uninformed have thermalised when they reach the same plateau. That
is judged for each problem and start on a positive statistic such as the test error; the fraction of
problems in which it holds is what a sampler is measured by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "Comparison",
    "Outcome",
    "Plateau",
    "Success",
    "Verdict",
    "compare",
    "overall_verdict",
    "plateau",
    "success",
    "wilson_interval",
    "window_mean",
]

Outcome: TypeAlias = Literal["thermalized", "away", "unclear"]
Verdict: TypeAlias = Literal[
    "PASS", "NOT_CONVERGED", "KERNEL_BUG", "NOT_CALIBRATED", "INCONCLUSIVE"
]

_BATCHES = 5  # of a window of one chain, for its standard error
_ERRORS = 3.0  # standard errors that a difference may have
_ALIKE = 2.0  # times the error expected in equilibrium, that of chains which may be there
_RUNNING = 0.1  # window of the running median, relative to the step


@dataclass(frozen=True)
class Plateau:
    """Where informed chains ended, which is equilibrium if they came to rest.

    Parameters
    ----------
    mean, standard_error
        Of the statistic over the last half.
    drift
        That mean relative to the one over the quarter before: 1 at rest.
    settled
        Whether the chains moved, and came to rest.
    reason
        Why not.
    """

    mean: float
    standard_error: float
    drift: float
    settled: bool
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """Uninformed chains against informed ones.

    Parameters
    ----------
    outcome
        ``"thermalized"``, ``"away"``, or ``"unclear"`` when the informed chains do not say where
        equilibrium is, or not precisely enough.
    reason
        In words.
    ratio
        Mean over the last quarter, relative to equilibrium.
    errors
        Difference of the two in standard errors.
    convergence_step
        From which the running median stays within the band, where it does.
    """

    outcome: Outcome
    reason: str
    ratio: float
    errors: float
    convergence_step: int | None = None


@dataclass(frozen=True)
class Success:
    """How often chains from one start thermalised.

    Parameters
    ----------
    thermalized, away, unclear
        Numbers of problems.
    """

    thermalized: int
    away: int
    unclear: int

    @property
    def total(self) -> int:
        """Problems."""
        return self.thermalized + self.away + self.unclear

    @property
    def fraction(self) -> float:
        """Thermalised problems among all."""
        return self.thermalized / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of 95 % for the fraction."""
        return wilson_interval(self.thermalized, self.total)


def wilson_interval(
    successes: int, total: int, z: float = 1.959963984540054
) -> tuple[float, float]:
    """An interval for a probability, sensible for few trials and at 0 and 1 (Wilson 1927).

    Parameters
    ----------
    successes, total
        Of the trials.
    z
        Standard errors; the default covers 95 %.

    Returns
    -------
    tuple of float
        Its ends.

    Examples
    --------
    >>> low, high = wilson_interval(8, 10)
    >>> round(low, 4), round(high, 4)
    (0.4902, 0.9433)
    """
    p, square = successes / total, z * z / total
    centre = (p + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(p * (1 - p) / total + square / (4 * total))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == total else min(1.0, centre + half)
    return low, high


def window_mean(values: Float[Tensor, "chains draws"]) -> tuple[float, float]:
    """Mean over chains and draws with its standard error.

    Parameters
    ----------
    values
        ``(chains, draws)``.

    Returns
    -------
    tuple of float
        The error is the larger of two: from means of five batches of each chain, and from the means
        of the chains, which a single slow one spreads.
    """
    chains, draws = values.shape
    batches = min(_BATCHES, draws)
    blocks = values[:, draws % batches :].reshape(chains * batches, -1).mean(1)
    errors = [
        float(means.std()) / math.sqrt(len(means))
        for means in (blocks, values.mean(1))
        if len(means) > 1
    ]
    return float(values.mean()), max(errors, default=math.nan)


def plateau(
    informed: Float[Tensor, "chains draws"],
    steps: Sequence[int],
    *,
    floor: float = 0.0,
    tolerance: float = 1.25,
) -> Plateau:
    """Equilibrium, as informed chains know it.

    Parameters
    ----------
    informed
        ``(chains, draws)`` of a positive statistic.
    steps
        At which the draws were taken.
    floor
        Added to means before they are divided: what the statistic can resolve.
    tolerance
        Largest ratio of two means that count as equal.

    Returns
    -------
    Plateau
        Settled when the means over the last half and over the quarter before agree.
    """
    last, before = _window(informed, steps, 0.5, 1.0), _window(informed, steps, 0.25, 0.5)
    mean, error = window_mean(last)
    earlier, _ = window_mean(before)
    if not math.isfinite(mean + earlier):
        return Plateau(mean, error, math.nan, False, "an informed chain left for NaN or infinity")
    if bool((informed == informed[:, :1]).all()):
        return Plateau(mean, error, 1.0, False, "informed chains never moved")
    drift = _ratio(mean, earlier, floor)
    if not _within(drift, tolerance):
        return Plateau(
            mean, error, drift, False, f"informed chains still drift (by {drift:.3g} in an octave)"
        )
    return Plateau(mean, error, drift, True)


def compare(
    uninformed: Float[Tensor, "chains draws"],
    equilibrium: Plateau,
    steps: Sequence[int],
    *,
    floor: float = 0.0,
    tolerance: float = 1.25,
) -> Comparison:
    """Whether uninformed chains reached the plateau of the informed ones.

    Parameters
    ----------
    uninformed
        ``(chains, draws)``.
    equilibrium
        Of the informed chains of the same problem.
    steps
        At which the draws were taken.
    floor, tolerance
        As in `plateau`.

    Returns
    -------
    Comparison
        Thermalised when the mean over the last quarter is within the tolerance of equilibrium and
        within three standard errors. Away when it is not, unless the informed chains themselves are
        too noisy, or not at rest: then unclear.
    """
    window = _window(uninformed, steps, 0.75, 1.0)
    end, own_error = window_mean(window)
    ratio = _ratio(end, equilibrium.mean, floor)
    pooled = math.hypot(own_error, equilibrium.standard_error)
    difference = abs(end - equilibrium.mean)
    errors = 0.0 if difference == 0 else difference / pooled if pooled > 0 else math.inf
    # Stuck chains spread their own error, so what the band is held against is the error that chains
    # in equilibrium would have, twice the variance in a window half as long; or how differently
    # they change within the window, which neither stuck chains do nor such that fall together.
    expected = max(
        math.sqrt(3.0) * equilibrium.standard_error,
        math.hypot(equilibrium.standard_error, _within_error(window)),
    )
    resolved = expected <= math.log(tolerance) * (equilibrium.mean + floor)
    near = _within(ratio, tolerance)

    def found(outcome: Outcome, reason: str, step: int | None = None) -> Comparison:
        return Comparison(outcome, reason, ratio, errors, step)

    if not equilibrium.settled:
        return found("unclear", equilibrium.reason)
    if not math.isfinite(end):
        return found("away", "a chain left for NaN or infinity")
    if not near:
        alike = own_error <= _ALIKE * expected
        if difference <= _ERRORS * (max(expected, pooled) if alike else expected):
            return found("unclear", f"{ratio:.3g} of equilibrium, but informed chains vary as much")
        return found("away", f"{ratio:.3g} of equilibrium")
    if errors > _ERRORS:
        return found("away", f"{ratio:.3g} of equilibrium, {errors:.1f} standard errors away")
    if not resolved:
        return found("unclear", "the statistic varies too much for the band")
    since = _convergence_step(uninformed, equilibrium.mean, steps, floor, tolerance)
    return found("thermalized", f"{ratio:.3g} of equilibrium", since)


def success(outcomes: Sequence[Outcome]) -> Success:
    """Count outcomes.

    Parameters
    ----------
    outcomes
        Of the problems.

    Returns
    -------
    Success
        How many there are of each.
    """
    return Success(*(outcomes.count(kind) for kind in ("thermalized", "away", "unclear")))


def overall_verdict(
    successes: Mapping[str, Success],
    *,
    kernel_wrong: bool,
    ranks_wrong: bool,
    required: float,
) -> Verdict:
    """What all problems together say of a sampler.

    Parameters
    ----------
    successes
        By uninformed start.
    kernel_wrong
        Whether informed chains left the law that they started from.
    ranks_wrong
        Whether the ranks of uninformed chains are not uniform.
    required
        Fraction of problems in which every start has to thermalise.

    Returns
    -------
    str
        ``"KERNEL_BUG"`` goes before all else: then nothing can be said of convergence.
        ``"NOT_CONVERGED"`` by the ranks, or when too many problems are away for any start: more
        than `required` leaves, and not a single one beside others that thermalised.
        ``"PASS"`` when enough thermalised for every start; else ``"INCONCLUSIVE"``.
    """
    if kernel_wrong:
        return "KERNEL_BUG"
    found = successes.values()
    # A fraction such as 0.9 of 10 must not fail by rounding.
    allowed = [s.total * (1 - required) + 1e-9 for s in found]
    # One problem in a hundred is away by chance: a single one beside others that thermalised.
    away = [
        s.away > most and not (s.away == 1 and s.thermalized > 0)
        for s, most in zip(found, allowed, strict=True)
    ]
    if ranks_wrong or any(away):
        return "NOT_CONVERGED"
    enough = [s.total - s.thermalized <= most for s, most in zip(found, allowed, strict=True)]
    return "PASS" if enough and all(enough) else "INCONCLUSIVE"


def _window(values: Tensor, steps: Sequence[int], begin: float, end: float) -> Tensor:
    """Draws at steps in ``(begin, end]`` of the last; the nearest one if there are none."""
    at = torch.tensor(steps, dtype=torch.float64) / steps[-1]
    inside = ((at > begin) & (at <= end)).nonzero().flatten()
    if not len(inside):
        inside = (at - end).abs().argmin()[None]
    return values[:, inside.to(values.device)]


def _within_error(values: Tensor) -> float:
    """Standard error of the mean by how differently chains change between the two halves."""
    half = values.shape[1] // 2
    if half < 1 or len(values) < 2:
        return 0.0
    changes = values[:, :half].mean(1) - values[:, half : 2 * half].mean(1)
    return 0.5 * float(changes.std()) / math.sqrt(len(values))


def _ratio(mean: float, reference: float, floor: float) -> float:
    above, below = mean + floor, reference + floor
    return above / below if below > 0 else math.inf if above > 0 else 1.0


def _within(ratio: float, tolerance: float) -> bool:
    return 1 / tolerance <= ratio <= tolerance


def _convergence_step(
    values: Tensor, reference: float, steps: Sequence[int], floor: float, tolerance: float
) -> int | None:
    """First step from which the running median of the mean curve stays within the band."""
    curve = values.mean(0)
    since: int | None = None
    for index, step in enumerate(steps):
        window = [i for i in range(index + 1) if steps[i] >= (1 - _RUNNING) * step]
        middle = float(curve[window[0] : index + 1].median())
        if not _within(_ratio(middle, reference, floor), tolerance):
            since = None
        elif since is None:
            since = step
    return since
