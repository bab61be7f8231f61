"""Measures of predictive laws against slow ones, and their error bars against replication."""

import itertools
import math

import pytest
import torch
from torch import distributions

from pushforward.errors import DataError, OptionError, ShapeError
from pushforward.linearised_laplace.calibration import (
    Metric,
    accuracy,
    auroc,
    expected_calibration_error,
    fit_temperature,
    gaussian_nll,
    interval_coverage,
    log_losses,
    mean_with_error,
    negative_log_likelihood,
    reliability_curve,
)
from pushforward.networks.likelihoods import Categorical
from pushforward.runs.rng import stream
from scenarios import normal

NAN = float("nan")


def predictions(seed, examples=300, classes=4, temperature=1.0):
    """Probabilities (N, C), and labels drawn from them at another temperature."""
    logits = 2 * normal(seed, examples, classes)
    labels = Categorical().sample(logits / temperature, stream(seed, "labels"))
    return logits.softmax(-1), labels


P, Y = predictions(1, temperature=2.0)


@pytest.fixture
def stats():
    from scipy import stats

    return stats


# --- classification ----------------------------------------------------------------------------


def test_accuracy_counts_hits():
    hits = [int(max(range(4), key=row.__getitem__) == y) for row, y in zip(P, Y, strict=True)]
    metric = accuracy(P, Y)
    assert metric.value == pytest.approx(sum(hits) / 300)
    rate = metric.value
    assert metric.standard_error == pytest.approx(math.sqrt(rate * (1 - rate) / 299))
    assert metric.count == 300


def test_log_loss_is_the_mean_of_the_log_losses(stats):
    losses = [-math.log(row[y]) for row, y in zip(P.tolist(), Y.tolist(), strict=True)]
    assert log_losses(P, Y).tolist() == pytest.approx(losses)
    metric = negative_log_likelihood(P, Y)
    assert metric.value == pytest.approx(sum(losses) / 300)
    assert metric.standard_error == pytest.approx(stats.sem(losses))


def test_log_loss_is_minus_the_log_probability():
    logits = normal(2, 7, 3)
    labels = torch.arange(7).remainder(3)
    losses = log_losses(logits.softmax(-1), labels)
    torch.testing.assert_close(losses, -Categorical().log_prob(logits, labels))


def test_underflow_is_not_impossibility():
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert log_losses(p, torch.tensor([1, 0])).tolist() == pytest.approx(
        [-math.log(torch.finfo(torch.float32).tiny), math.log(2)]
    )


def bins_by_hand(p, y, bins):
    """Confidences and hits of each bin (b/bins, (b + 1)/bins], by a loop over the examples."""
    held = [[] for _ in range(bins)]
    for row, label in zip(p.tolist(), y.tolist(), strict=True):
        confidence = max(row)
        index = next(b for b in range(bins) if confidence <= (b + 1) / bins)
        held[index].append((confidence, float(row.index(confidence) == label)))
    return held


@pytest.mark.parametrize("bins", [1, 4, 15, 100])
def test_calibration_error_by_hand(bins):
    total = sum(
        abs(sum(hit for _, hit in held) - sum(confidence for confidence, _ in held))
        for held in bins_by_hand(P, Y, bins)
    )
    metric = expected_calibration_error(P, Y, bins)
    assert metric.value == pytest.approx(total / 300)
    assert 0 < metric.standard_error < 0.5 / math.sqrt(300)


def test_calibration_error_of_one_bin_is_the_distance_of_the_means():
    metric = expected_calibration_error(P, Y, 1)
    gap = float(accuracy(P, Y)) - float(P.max(-1).values.mean())
    assert metric.value == pytest.approx(abs(gap))


def test_fifteen_bins_are_customary():
    assert expected_calibration_error(P, Y) == expected_calibration_error(P, Y, 15)
    assert expected_calibration_error(P, Y) != expected_calibration_error(P, Y, 14)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_reliability_curve_by_hand(bins, stats):
    curve = reliability_curve(P, Y, bins, level=0.9)
    held = [(b, inside) for b, inside in enumerate(bins_by_hand(P, Y, bins)) if inside]
    assert len(curve.count) == len(held)
    assert curve.level == 0.9
    for position, (b, inside) in enumerate(held):
        assert curve.edges[position].tolist() == pytest.approx([b / bins, (b + 1) / bins])
        n, hits = len(inside), sum(hit for _, hit in inside)
        assert int(curve.count[position]) == n
        confidence = sum(confidence for confidence, _ in inside) / n
        assert float(curve.confidence[position]) == pytest.approx(confidence)
        assert float(curve.accuracy[position]) == pytest.approx(hits / n)
        interval = stats.binomtest(int(hits), n).proportion_ci(0.9, method="wilson")
        assert float(curve.accuracy_lower[position]) == pytest.approx(interval.low, abs=1e-12)
        assert float(curve.accuracy_upper[position]) == pytest.approx(interval.high, abs=1e-12)


@pytest.mark.parametrize("label", [0, 1])
def test_intervals_stay_between_zero_and_one(label):
    for n in range(1, 60):
        p = torch.tensor([[0.9, 0.1]]).expand(n, 2)
        curve = reliability_curve(p, torch.full((n,), label))
        assert float(curve.accuracy_lower.min()) >= 0
        assert float(curve.accuracy_upper.max()) <= 1
        assert float(curve.accuracy_upper - curve.accuracy_lower) > 0.05


def test_curve_and_calibration_error_agree():
    curve = reliability_curve(P, Y)
    weighted = (curve.count * (curve.accuracy - curve.confidence).abs()).sum() / 300
    assert float(weighted) == pytest.approx(float(expected_calibration_error(P, Y)))
    assert int(curve.count.sum()) == 300


def test_certain_and_undecided_rows_find_their_bins():
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    curve = reliability_curve(p, torch.tensor([0, 1, 0]), bins=2)
    assert curve.count.tolist() == [1, 2]
    assert curve.accuracy.tolist() == [0.0, 0.5]
    assert curve.confidence.tolist() == [0.5, 1.0]


def test_positions_count_as_examples():
    p, y = P.reshape(100, 3, 4), Y.reshape(100, 3)
    for metric in (accuracy, negative_log_likelihood, expected_calibration_error):
        assert metric(p, y) == metric(P, Y)
    assert torch.equal(reliability_curve(p, y).accuracy, reliability_curve(P, Y).accuracy)
    assert fit_temperature(p.log(), y) == fit_temperature(P.log(), Y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_serves(dtype):
    p = (2 * normal(3, 50, 100)).to(dtype).softmax(-1)
    y = p.argmax(-1)
    assert float(accuracy(p, y)) == 1
    assert 0 < float(expected_calibration_error(p, y)) < 1
    assert math.isfinite(float(negative_log_likelihood(p, y)))


def test_a_single_example_has_no_error_bar():
    for metric in (accuracy, negative_log_likelihood, expected_calibration_error):
        assert metric(P[:1], Y[:1]).standard_error == math.inf


@pytest.mark.parametrize(
    ("p", "y", "kind", "message"),
    [
        (P, Y[:-1], ShapeError, r"shape \(299,\)"),
        (P, P, DataError, "labels are torch.float64"),
        (P[:3], torch.tensor([0, 4, 0]), DataError, r"4 at position \[1\]"),
        (P[:, 0], Y, ShapeError, "two classes"),
        (P.log(), Y, DataError, "row 0 is no law of the classes"),
        (2 * P, Y, DataError, "row 0 is no law of the classes"),
        (P[:0], Y[:0], DataError, "no examples"),
        (torch.tensor([[0.5, 0.5], [NAN, 1.0]]), Y[:2] * 0, DataError, "row 1 holds NaN"),
        (torch.tensor([[0.5, 0.5], [-0.5, 1.5]]), Y[:2] * 0, DataError, "row 1 is no law"),
    ],
)
def test_rows_and_labels_are_checked(p, y, kind, message):
    for function in (
        accuracy,
        log_losses,
        negative_log_likelihood,
        expected_calibration_error,
        reliability_curve,
    ):
        with pytest.raises(kind, match=message):
            function(p, y)


@pytest.mark.parametrize("bins", [0, -3])
def test_bins_are_counted(bins):
    for function in (expected_calibration_error, reliability_curve):
        with pytest.raises(OptionError, match=r"^bins: "):
            function(P, Y, bins)


@pytest.mark.parametrize("level", [0.0, 1.0, NAN])
def test_the_level_of_the_curve_is_checked(level):
    with pytest.raises(OptionError, match="not levels of intervals"):
        reliability_curve(P, Y, level=level)


# --- ranking -----------------------------------------------------------------------------------


def by_pairs(positive, negative):
    pairs = list(itertools.product(positive.tolist(), negative.tolist()))
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 3), (40, 60)])
@pytest.mark.parametrize("digits", [None, 0])
def test_auroc_by_pairs(m, n, digits):
    positive, negative = normal(4, m) + 0.5, normal(5, n)
    if digits is not None:  # rounded, so that many tie
        positive, negative = positive.round(decimals=digits), negative.round(decimals=digits)
    expected = by_pairs(positive, negative)
    metric = auroc(positive, negative)
    assert metric.value == pytest.approx(expected)
    assert metric.count == m + n
    assert auroc(negative, positive).value == pytest.approx(1 - expected)
    assert auroc(negative, positive).standard_error == pytest.approx(metric.standard_error)


def test_auroc_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    positive, negative = normal(6, 30).round(decimals=1), normal(7, 50).round(decimals=1)
    truth = [1] * 30 + [0] * 50
    expected = roc_auc_score(truth, torch.cat([positive, negative]).numpy())
    assert auroc(positive, negative).value == pytest.approx(expected)


def test_auroc_at_its_ends():
    low, high = torch.arange(4.0), torch.arange(10.0, 14.0)
    assert auroc(high, low).value == 1
    assert auroc(low, high).value == 0
    assert auroc(low, low).value == 0.5
    assert auroc(torch.zeros(3), torch.zeros(4)).value == 0.5
    assert auroc(torch.tensor([math.inf, 0.0]), torch.tensor([-math.inf, 0.0])).value == 0.875


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (torch.zeros(0), torch.zeros(2), "scores_positive: no scores"),
        (torch.zeros(2), torch.zeros(0), "scores_negative: no scores"),
        (torch.tensor([1.0, NAN]), torch.zeros(2), "scores_positive: scores are NaN"),
    ],
)
def test_scores_are_checked(positive, negative, message):
    with pytest.raises(DataError, match=message):
        auroc(positive, negative)


# --- temperature -------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [0.3, 1.0, 2.5, 8.0])
def test_temperature_minimises_the_log_loss(truth):
    logits = 3 * normal(8, 500, 5)
    labels = Categorical().sample(logits / truth, stream(9, "labels"))
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(truth, rel=0.3)

    def loss(t):
        return float(negative_log_likelihood((logits / t).softmax(-1), labels))

    best = loss(temperature)
    assert all(best < loss(temperature * factor) for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2.0))


def test_temperature_knows_no_scale_and_no_offset():
    logits, labels = P.log(), Y
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(2.0, rel=0.3)
    assert fit_temperature(7 * logits + 1e3, labels) == pytest.approx(7 * temperature, rel=1e-9)
    scaled = fit_temperature(1e-3 * logits, labels, bounds=(1e-6, 1e6))
    assert scaled == pytest.approx(1e-3 * temperature, rel=1e-9)


def test_temperature_stays_within_its_bounds():
    logits = normal(10, 20, 3)
    best, worst = logits.argmax(-1), logits.argmin(-1)
    assert fit_temperature(logits, best) == 0.01
    assert fit_temperature(logits, best, bounds=(0.5, 2.0)) == 0.5
    assert fit_temperature(logits, worst) == 100.0
    assert fit_temperature(logits, worst, bounds=(0.5, 2.0)) == 2.0
    assert fit_temperature(torch.zeros(20, 3), best) == 1.0


def test_temperature_of_extreme_logits():
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4], [1e4, -1e4]])
    labels = torch.tensor([0, 0, 1])
    # Two of three: the odds are 2 at a temperature of 2e4/log 2.
    temperature = fit_temperature(logits, labels, bounds=(1e-3, 1e6))
    assert temperature == pytest.approx(2e4 / math.log(2), rel=1e-6)
    assert fit_temperature(logits, labels) == 100.0


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (1.0, math.inf)])
def test_bounds_are_checked(bounds):
    with pytest.raises(OptionError, match="does not bound a temperature"):
        fit_temperature(P.log(), Y, bounds)


def test_logits_are_checked():
    with pytest.raises(DataError, match="row 1 holds NaN"):
        fit_temperature(torch.tensor([[0.0, 1.0], [0.0, math.inf]]), torch.tensor([0, 0]))
    with pytest.raises(DataError, match=r"4 at position \[0\]"):
        fit_temperature(P.log()[:1], torch.tensor([4]))
    with pytest.raises(DataError, match="no examples"):
        fit_temperature(P.log()[:0], Y[:0])


# --- regression --------------------------------------------------------------------------------

MEAN, VARIANCE = normal(11, 200, 3), normal(12, 200, 3).square() + 0.1
TARGETS = MEAN + 1.3 * VARIANCE.sqrt() * normal(13, 200, 3)


def test_coverage_by_hand(stats):
    levels = [0.1, 0.5, 0.95]
    result = interval_coverage(MEAN, VARIANCE, TARGETS, levels)
    assert result.levels.tolist() == levels
    assert result.count == 200
    for position, level in enumerate(levels):
        low, high = stats.norm(MEAN.numpy(), VARIANCE.sqrt().numpy()).interval(level)
        inside = (low <= TARGETS.numpy()) & (TARGETS.numpy() <= high)
        assert float(result.coverage[position]) == pytest.approx(inside.mean())
        error = stats.sem(inside.mean(1))
        assert float(result.standard_error[position]) == pytest.approx(error)


def test_equal_outputs_of_an_example_do_not_shrink_the_error():
    one = interval_coverage(MEAN[:, :1], VARIANCE[:, :1], TARGETS[:, :1], [0.5])
    three = interval_coverage(
        *(values[:, :1].repeat(1, 3) for values in (MEAN, VARIANCE, TARGETS)), [0.5]
    )
    torch.testing.assert_close(one.standard_error, three.standard_error)


def test_gaussian_log_loss_is_that_of_the_law(stats):
    law = distributions.Normal(MEAN, VARIANCE.sqrt())
    losses = -law.log_prob(TARGETS).sum(1)
    metric = gaussian_nll(MEAN, VARIANCE, TARGETS)
    assert metric.value == pytest.approx(float(losses.mean()))
    assert metric.standard_error == pytest.approx(stats.sem(losses.numpy()))


def test_outputs_of_any_shape():
    shaped = [values[:198].reshape(99, 2, 3) for values in (MEAN, VARIANCE, TARGETS)]
    flat = [values.reshape(99, 6) for values in shaped]
    assert gaussian_nll(*shaped) == gaussian_nll(*flat)
    single = [values[:, 0] for values in (MEAN, VARIANCE, TARGETS)]
    column = [values[:, :1] for values in (MEAN, VARIANCE, TARGETS)]
    assert gaussian_nll(*single) == gaussian_nll(*column)
    assert gaussian_nll(column[0], column[1], single[2]) == gaussian_nll(*column)


@pytest.mark.parametrize(
    ("mean", "variance", "targets", "kind", "message"),
    [
        (MEAN, VARIANCE[:, :1], TARGETS, ShapeError, r"variance has shape \(200, 1\)"),
        (MEAN, VARIANCE, TARGETS[:10], ShapeError, r"targets have shape \(10, 3\)"),
        (MEAN, 0 * VARIANCE, TARGETS, DataError, "variance: row 0 is not positive"),
        (MEAN, VARIANCE * NAN, TARGETS, DataError, "variance: row 0"),
        (MEAN * NAN, VARIANCE, TARGETS, DataError, "mean: row 0 holds NaN"),
        (MEAN, VARIANCE, TARGETS * NAN, DataError, r"nan at position \[0, 0\]"),
        (MEAN[:0], VARIANCE[:0], TARGETS[:0], DataError, "no examples"),
    ],
)
def test_predictive_laws_are_checked(mean, variance, targets, kind, message):
    with pytest.raises(kind, match=message):
        gaussian_nll(mean, variance, targets)
    with pytest.raises(kind, match=message):
        interval_coverage(mean, variance, targets)


@pytest.mark.parametrize("levels", [[], [0.5, 1.0], [0.0], [NAN]])
def test_levels_are_checked(levels):
    with pytest.raises(OptionError, match="not levels of intervals"):
        interval_coverage(MEAN, VARIANCE, TARGETS, levels)


# --- error bars --------------------------------------------------------------------------------


def ranked(generator):
    positive = torch.randn(60, generator=generator, dtype=torch.float64) + 1
    return auroc(positive, torch.randn(40, generator=generator, dtype=torch.float64))


def classified(function):
    def measure(generator):
        logits = 2 * torch.randn(200, 4, generator=generator, dtype=torch.float64)
        labels = Categorical().sample(logits / 3, generator)  # far from calibrated
        return function(logits.softmax(-1), labels)

    return measure


def regressed(generator):
    mean = torch.randn(200, generator=generator, dtype=torch.float64)
    noise = torch.randn(200, generator=generator, dtype=torch.float64)
    return gaussian_nll(mean, torch.ones_like(mean), mean + 1.2 * noise)


def covered(generator):
    noise = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    result = interval_coverage(torch.zeros_like(noise), torch.ones_like(noise), noise, [0.8])
    return Metric(float(result.coverage[0]), float(result.standard_error[0]), result.count)


@pytest.mark.statistical
@pytest.mark.parametrize(
    "measure",
    [
        ranked,
        classified(accuracy),
        classified(negative_log_likelihood),
        classified(lambda p, y: expected_calibration_error(p, y, 5)),
        regressed,
        covered,
    ],
    ids=["auroc", "accuracy", "nll", "ece", "gaussian nll", "coverage"],
)
def test_error_bars_match_the_spread_over_replications(measure):
    replications = 400
    metrics = [measure(stream(14, "replication", i)) for i in range(replications)]
    values = torch.tensor([metric.value for metric in metrics], dtype=torch.float64)
    stated = torch.tensor([metric.standard_error for metric in metrics], dtype=torch.float64)
    # The spread of 400 values is known to 3.5 %; four of these, and one for curvature.
    assert float(stated.mean() / values.std()) == pytest.approx(1, abs=0.18)


@pytest.mark.statistical
def test_the_calibrated_have_the_stated_calibration_error():
    values, expected = [], []
    for i in range(200):
        p, y = predictions(1000 + i, examples=500)
        values.append(float(expected_calibration_error(p, y)))
        curve = reliability_curve(p, y)
        confidence = p.max(-1).values
        for_bins = 0.0
        for low, high in curve.edges.tolist():
            inside = confidence[(confidence > low) & (confidence <= high)]
            for_bins += float((2 / math.pi * (inside * (1 - inside)).sum()).sqrt())
        expected.append(for_bins / 500)
    mean = sum(values) / 200
    # 3 %: the sums over small bins are not normal; the mean is known to about 1 %.
    assert mean == pytest.approx(sum(expected) / 200, rel=0.06)


def test_means_and_errors():
    metric = mean_with_error(torch.tensor([1.0, 2.0, 6.0]))
    assert metric.value == 3
    assert metric.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert metric.count == 3
    assert float(metric) == 3.0
    assert str(metric) == "3 ± 1.5"
    with pytest.raises(DataError, match="no examples"):
        mean_with_error(torch.zeros(0))


def test_a_paired_comparison_sees_more_than_two_means():
    p, y = predictions(15, examples=400)
    worse = (1.3 * p.log()).softmax(-1)
    paired = mean_with_error(log_losses(worse, y) - log_losses(p, y))
    assert paired.value == pytest.approx(
        float(negative_log_likelihood(worse, y)) - float(negative_log_likelihood(p, y))
    )
    assert paired.standard_error < 0.5 * negative_log_likelihood(p, y).standard_error


def test_gradients_stop_here():
    p = P.clone().requires_grad_()
    assert isinstance(negative_log_likelihood(p, Y).value, float)
    assert not log_losses(p, Y).requires_grad
    assert not reliability_curve(p, Y).confidence.requires_grad
