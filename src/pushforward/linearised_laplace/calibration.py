"""How good predictive laws are: accuracy, log-loss, calibration, ranking, coverage, temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from pushforward.errors import DataError, OptionError, ShapeError
from pushforward.networks.likelihoods import Categorical, Gaussian
from pushforward.options import whole_number

__all__ = [
    "IntervalCoverage",
    "Metric",
    "ReliabilityCurve",
    "accuracy",
    "auroc",
    "expected_calibration_error",
    "fit_temperature",
    "gaussian_nll",
    "interval_coverage",
    "log_losses",
    "mean_with_error",
    "negative_log_likelihood",
    "reliability_curve",
]

_SUM_TOLERANCE = 5e-3  # bfloat16 has 8 bits: rows in it add up to one no better


@dataclass(frozen=True)
class Metric:
    """A number measured on a sample of examples.

    Parameters
    ----------
    value
        The number itself.
    standard_error
        Of the value as an estimate for the population, from the spread over examples; infinite for
        a single example.
    count
        Number of examples.
    """

    value: float
    standard_error: float
    count: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


@dataclass(frozen=True)
class ReliabilityCurve:
    """Accuracy against confidence, bin by bin; bins without examples are left out.

    Parameters
    ----------
    edges
        ``(M, 2)``, each bin's interval ``(lower, upper]`` of confidence.
    confidence
        ``(M,)``, mean confidence in the bin.
    accuracy
        ``(M,)``, fraction of right answers in the bin.
    accuracy_lower, accuracy_upper
        ``(M,)``, Wilson's interval for the accuracy.
    count
        ``(M,)``, examples in the bin.
    level
        Of the intervals.
    """

    edges: Float[Tensor, "M 2"]
    confidence: Float[Tensor, " M"]
    accuracy: Float[Tensor, " M"]
    accuracy_lower: Float[Tensor, " M"]
    accuracy_upper: Float[Tensor, " M"]
    count: Int[Tensor, " M"]
    level: float


@dataclass(frozen=True)
class IntervalCoverage:
    """How many targets fall into central intervals of their predictive laws.

    Parameters
    ----------
    levels
        ``(L,)``, probability that the laws give to the intervals.
    coverage
        ``(L,)``, fraction of targets inside.
    standard_error
        ``(L,)``, of the coverage, from the spread over examples.
    count
        Number of examples.
    """

    levels: Float[Tensor, " L"]
    coverage: Float[Tensor, " L"]
    standard_error: Float[Tensor, " L"]
    count: int


def mean_with_error(values: Float[Tensor, " N"]) -> Metric:
    """Mean over examples and its standard error.

    Of the difference of two methods' `log_losses` on the same examples it gives a paired
    comparison, whose error is far smaller than those of the two means.

    Parameters
    ----------
    values
        ``(N,)``, one number for each example.

    Returns
    -------
    Metric
        In the units of the values.

    Raises
    ------
    DataError
        Without examples.
    """
    values = values.detach().to(torch.float64)
    if not len(values):
        raise DataError("no examples", where="values", advice="Give at least one.")
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf
    return Metric(float(values.mean()), error, len(values))


def accuracy(
    probabilities: Float[Tensor, "*examples C"], targets: Shaped[Tensor, "*targets"]
) -> Metric:
    """Fraction of examples whose most probable class is their label.

    Parameters
    ----------
    probabilities
        ``(N, C)``, or ``(N, T, C)`` where every row counts as an example of its own.
    targets
        ``(N,)`` or ``(N, T)``, integer labels from 0 to C − 1.

    Returns
    -------
    Metric
        Between 0 and 1.

    Raises
    ------
    ShapeError
        If the shapes disagree.
    DataError
        For rows that are no probabilities, labels out of range, or no examples.
    """
    p, labels = _rows(probabilities, targets)
    return mean_with_error((p.argmax(-1) == labels).to(torch.float64))


def log_losses(
    probabilities: Float[Tensor, "*examples C"], targets: Shaped[Tensor, "*targets"]
) -> Float[Tensor, " N"]:
    """Negative log-probability of each label, in nats.

    Probabilities below the smallest normal number of their dtype count as that number: an
    underflow is not a proof of impossibility.

    Parameters
    ----------
    probabilities
        ``(N, C)``, or ``(N, T, C)`` where every row counts as an example of its own.
    targets
        ``(N,)`` or ``(N, T)``, integer labels from 0 to C − 1.

    Returns
    -------
    Tensor
        ``(N,)``, or ``(N T,)``, float64.

    Raises
    ------
    ShapeError
        If the shapes disagree.
    DataError
        For rows that are no probabilities, labels out of range, or no examples.
    """
    p, labels = _rows(probabilities, targets)
    chosen = p.gather(-1, labels[:, None]).squeeze(-1)
    return -chosen.clamp(min=torch.finfo(probabilities.dtype).tiny).log()


def negative_log_likelihood(
    probabilities: Float[Tensor, "*examples C"], targets: Shaped[Tensor, "*targets"]
) -> Metric:
    """Mean of `log_losses`, in nats per example.

    Parameters
    ----------
    probabilities
        ``(N, C)``, or ``(N, T, C)`` where every row counts as an example of its own.
    targets
        ``(N,)`` or ``(N, T)``, integer labels from 0 to C − 1.

    Returns
    -------
    Metric
        In nats.

    Raises
    ------
    ShapeError
        If the shapes disagree.
    DataError
        For rows that are no probabilities, labels out of range, or no examples.
    """
    return mean_with_error(log_losses(probabilities, targets))


def expected_calibration_error(
    probabilities: Float[Tensor, "*examples C"], targets: Shaped[Tensor, "*targets"], bins: int = 15
) -> Metric:
    """Mean distance of accuracy from confidence over bins of equal width.

    The confidence of an example is the probability of its most probable class.

    Parameters
    ----------
    probabilities
        ``(N, C)``, or ``(N, T, C)`` where every row counts as an example of its own.
    targets
        ``(N,)`` or ``(N, T)``, integer labels from 0 to C − 1.
    bins
        Number of intervals ``(lower, upper]`` that divide [0, 1].

    Returns
    -------
    Metric
        Between 0 and 1.

    Raises
    ------
    ShapeError
        If the shapes disagree.
    DataError
        For rows that are no probabilities, labels out of range, or no examples.
    OptionError
        If `bins` is no positive integer.

    Notes
    -----
    The standard error is that of the mean of ``± (right − confidence)`` with each bin's sign held
    fixed (delta method). It does not cover the bias: a perfectly calibrated predictor has an
    expected value of about ``Σ_b √(2/π Σ_{i∈b} c_i (1 − c_i)) / N``, not zero.
    """
    confidence, right, index = _binned(probabilities, targets, bins)
    gap = right - confidence
    sign = torch.zeros(bins, dtype=gap.dtype, device=gap.device).index_add_(0, index, gap).sign()
    return mean_with_error(sign[index] * gap)


def reliability_curve(
    probabilities: Float[Tensor, "*examples C"],
    targets: Shaped[Tensor, "*targets"],
    bins: int = 15,
    level: float = 0.95,
) -> ReliabilityCurve:
    """Accuracy against confidence in bins of equal width, with Wilson's intervals.

    Parameters
    ----------
    probabilities
        ``(N, C)``, or ``(N, T, C)`` where every row counts as an example of its own.
    targets
        ``(N,)`` or ``(N, T)``, integer labels from 0 to C − 1.
    bins
        Number of intervals ``(lower, upper]`` that divide [0, 1].
    level
        Probability with which an interval holds the bin's true accuracy.

    Returns
    -------
    ReliabilityCurve
        Only bins that hold examples.

    Raises
    ------
    ShapeError
        If the shapes disagree.
    DataError
        For rows that are no probabilities, labels out of range, or no examples.
    OptionError
        If `bins` is no positive integer or `level` not between 0 and 1.

    Notes
    -----
    Wilson (1927): the accuracies ``q`` for which the observed one is within ``z`` standard errors
    ``√(q (1 − q)/n)``; unlike ``± z`` estimated errors it does not collapse at 0 and 1.
    """
    z = _normal_quantiles([level], "level")[0]
    confidence, right, index = _binned(probabilities, targets, bins)
    count = torch.bincount(index, minlength=bins)
    used = count > 0
    n = count[used].to(torch.float64)
    empty = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    mean_confidence = empty.index_add(0, index, confidence)[used] / n
    q = empty.index_add(0, index, right)[used] / n
    shrunk = (q + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (q * (1 - q) / n + z**2 / (4 * n**2)).sqrt()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    return ReliabilityCurve(
        edges=torch.stack([edges[:-1], edges[1:]], 1)[used],
        confidence=mean_confidence,
        accuracy=q,
        # Clamped, as rounding would otherwise leave [0, 1] by a bit where all or none are right.
        accuracy_lower=(shrunk - half).clamp(0, 1),
        accuracy_upper=(shrunk + half).clamp(0, 1),
        count=count[used],
        level=level,
    )


def auroc(scores_positive: Float[Tensor, " m"], scores_negative: Float[Tensor, " n"]) -> Metric:
    """Probability that a positive example scores above a negative one; ties count half.

    Parameters
    ----------
    scores_positive
        ``(m,)``, of the examples to be detected, for example the entropies out of distribution.
    scores_negative
        ``(n,)``, of the others.

    Returns
    -------
    Metric
        Between 0 and 1 (½ is chance), with the standard error of DeLong et al.; its count is
        ``m + n``. The error is zero, and too small, when the two do not overlap at all.

    Raises
    ------
    DataError
        For NaN among the scores, or no scores.

    Notes
    -----
    DeLong, DeLong, Clarke-Pearson (1988), https://doi.org/10.2307/2531595, equation 2: the spread
    of each example's own fraction of comparisons won. Cost ``O((m + n) log(m + n))``.
    """
    positive = _scores(scores_positive, "scores_positive")
    negative = _scores(scores_negative, "scores_negative")
    wins = _fraction_below(positive, negative)
    losses = _fraction_below(negative, positive)
    first, second = mean_with_error(wins), mean_with_error(losses)
    error = math.hypot(first.standard_error, second.standard_error)
    return Metric(first.value, error, len(positive) + len(negative))


def fit_temperature(
    logits: Float[Tensor, "*examples C"],
    targets: Shaped[Tensor, "*targets"],
    bounds: tuple[float, float] = (0.01, 100.0),
) -> float:
    """The temperature by which to divide logits so that the labels become most probable.

    Parameters
    ----------
    logits
        ``(N, C)``, or ``(N, T, C)`` where every row counts as an example of its own. They should
        not be those of training examples.
    targets
        ``(N,)`` or ``(N, T)``, integer labels from 0 to C − 1.
    bounds
        The temperature is held between these. It ends at the lower one if every label has the
        largest logit, at the upper one if the logits say nothing of the labels or the contrary.

    Returns
    -------
    float
        Minimises the mean of ``−log softmax(logits/T)_y``; above 1 for over-confident logits.
        Logits that do not differ leave it at 1.

    Raises
    ------
    ShapeError
        If the shapes disagree.
    DataError
        For logits that are not finite, labels out of range, or no examples.
    OptionError
        If the bounds are not positive, finite and increasing.

    Notes
    -----
    The loss is convex in ``β = 1/T``, so that the root of its derivative in ``β`` is bracketed and
    found by Brent's method on ``log β``.
    """
    from scipy.optimize import brentq

    low, high = bounds
    if not 0 < low < high < math.inf:
        raise OptionError(
            f"({low}, {high}) does not bound a temperature",
            where="bounds",
            advice="Give two positive numbers, the smaller one first.",
        )
    rows, labels = _labelled_rows(logits, targets, "logits")
    # Relative to the label's logit the loss is logsumexp(beta d), without cancellation.
    d = rows - rows.gather(-1, labels[:, None])

    def slope(log_beta: float) -> float:
        beta = math.exp(log_beta)
        return float(((beta * d).softmax(-1) * d).sum(-1).mean())

    coldest, hottest = -math.log(low), -math.log(high)
    if low <= 1 <= high and slope(0.0) == 0:
        return 1.0
    if slope(coldest) <= 0:
        return low
    if slope(hottest) >= 0:
        return high
    return math.exp(-float(brentq(slope, hottest, coldest, xtol=1e-12)))


def interval_coverage(
    mean: Float[Tensor, " N *event"],
    variance: Float[Tensor, " N *event"],
    targets: Shaped[Tensor, "*targets"],
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99),
) -> IntervalCoverage:
    """Fraction of targets inside central intervals of normal predictive laws.

    Parameters
    ----------
    mean
        ``(N, *event)``.
    variance
        Of the targets, noise included, same shape; in squared units of the targets.
    targets
        Same shape.
    levels
        Probabilities of the intervals, between 0 and 1.

    Returns
    -------
    IntervalCoverage
        The outputs of an example are averaged before the spread over examples is taken: they need
        not be independent.

    Raises
    ------
    ShapeError
        If the shapes disagree.
    DataError
        For variances that are not positive, entries that are not finite, or no examples.
    OptionError
        If a level is not between 0 and 1, or there are none.
    """
    z = _normal_quantiles(levels, "levels")
    squared, _ = _standardised(mean, variance, targets)
    metrics = [
        mean_with_error((squared <= limit**2).to(torch.float64).mean(1)) for limit in z.tolist()
    ]
    return IntervalCoverage(
        levels=torch.tensor(list(levels), dtype=torch.float64),
        coverage=torch.tensor([metric.value for metric in metrics], dtype=torch.float64),
        standard_error=torch.tensor(
            [metric.standard_error for metric in metrics], dtype=torch.float64
        ),
        count=len(squared),
    )


def gaussian_nll(
    mean: Float[Tensor, " N *event"],
    variance: Float[Tensor, " N *event"],
    targets: Shaped[Tensor, "*targets"],
) -> Metric:
    """Mean negative log-density of targets under normal predictive laws, in nats per example.

    Parameters
    ----------
    mean
        ``(N, *event)``.
    variance
        Of the targets, noise included, same shape; in squared units of the targets.
    targets
        Same shape.

    Returns
    -------
    Metric
        Summed over the outputs of an example, with all constants. Standardised targets give a
        value that is smaller by the sum of the logarithms of their scales.

    Raises
    ------
    ShapeError
        If the shapes disagree.
    DataError
        For variances that are not positive, entries that are not finite, or no examples.
    """
    squared, spread = _standardised(mean, variance, targets)
    return mean_with_error(0.5 * (squared + (2 * math.pi * spread).log()).sum(1))


def _labelled_rows(values: Tensor, targets: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Rows ``(N, C)`` in float64 and their labels ``(N,)``.

    Returns
    -------
    tuple of Tensor
        Positions of an example count as examples.

    Raises
    ------
    DataError
        For rows that are not finite, or none.
    """
    labels = Categorical().check_targets(values, targets).flatten()
    rows = values.detach().to(torch.float64).flatten(0, -2)
    if not len(rows):
        raise DataError("no examples", where=where, advice="Give at least one.")
    _refuse_rows(~torch.isfinite(rows).all(-1), "holds NaN or infinite entries", where)
    return rows, labels


def _rows(probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of probabilities ``(N, C)`` in float64, as they are, and their labels ``(N,)``."""
    rows, labels = _labelled_rows(probabilities, targets, "probabilities")
    wrong = (rows < 0).any(-1) | ((rows.sum(-1) - 1).abs() > _SUM_TOLERANCE)
    _refuse_rows(
        wrong, "is no law of the classes: negative, or not adding up to one", "probabilities"
    )
    return rows, labels


def _refuse_rows(bad: Tensor, complaint: str, where: str) -> None:
    """Refuse with the number of the first row that is wrong, if there is one."""
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(
            f"row {row} {complaint}",
            where=where,
            advice="Look at the network's outputs for this example.",
        )


def _binned(probabilities: Tensor, targets: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, rightness (0 or 1) and index of the bin for each example.

    Returns
    -------
    tuple of Tensor
        Each ``(N,)``.

    Raises
    ------
    OptionError
        If `bins` is no positive integer.
    """
    bins = whole_number(bins, "bins")
    p, labels = _rows(probabilities, targets)
    confidence, guess = p.max(-1)
    inner = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=p.device)[1:-1]
    return confidence, (guess == labels).to(torch.float64), torch.bucketize(confidence, inner)


def _normal_quantiles(levels: Sequence[float], where: str) -> Tensor:
    """Half widths, in standard deviations, of central intervals with these probabilities.

    Returns
    -------
    Tensor
        ``(L,)``, float64.

    Raises
    ------
    OptionError
        If a level is not between 0 and 1, or there are none.
    """
    probabilities = torch.tensor([float(level) for level in levels], dtype=torch.float64)
    if not len(probabilities) or not bool(((probabilities > 0) & (probabilities < 1)).all()):
        raise OptionError(
            f"{list(levels)} are not levels of intervals",
            where=where,
            advice="Give numbers between 0 and 1, such as 0.95.",
        )
    return torch.special.ndtri(0.5 + 0.5 * probabilities)


def _scores(scores: Tensor, where: str) -> Tensor:
    scores = scores.detach().to(torch.float64)
    if not len(scores) or bool(scores.isnan().any()):
        raise DataError(
            "no scores" if not len(scores) else "scores are NaN",
            where=where,
            advice="Give one number for each example of either kind.",
        )
    return scores


def _fraction_below(values: Tensor, others: Tensor) -> Tensor:
    """For each value the fraction of the others below it, those equal to it counted half."""
    ordered = others.to(values.device).sort().values
    below = torch.searchsorted(ordered, values)
    not_above = torch.searchsorted(ordered, values, right=True)
    return 0.5 * (below + not_above).to(torch.float64) / len(ordered)


def _standardised(mean: Tensor, variance: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Squared standardised residuals and variances, both ``(N, C)`` in float64.

    Returns
    -------
    tuple of Tensor
        Outputs of an example along the last axis.

    Raises
    ------
    ShapeError
        If mean and variance have different shapes.
    DataError
        For variances that are not positive, entries that are not finite, or no examples.
    """
    mean, variance = mean.detach().to(torch.float64), variance.detach().to(torch.float64)
    if mean.shape != variance.shape:
        raise ShapeError(
            f"variance has shape {tuple(variance.shape)}, mean {tuple(mean.shape)}",
            where="variance",
            advice="Give one variance for each mean.",
        )
    if not mean.numel():
        raise DataError("no examples", where="mean", advice="Give at least one.")
    y = Gaussian().check_targets(mean, targets)
    mean, variance, y = (value.reshape(len(value), -1) for value in (mean, variance, y))
    _refuse_rows(~torch.isfinite(mean).all(1), "holds NaN or infinite entries", "mean")
    usable = torch.isfinite(variance) & (variance > 0)
    _refuse_rows(~usable.all(1), "is not positive and finite", "variance")
    return (y - mean).square() / variance, variance
