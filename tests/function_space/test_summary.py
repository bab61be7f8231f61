import gc
from dataclasses import replace

import pytest
import torch
from torch import nn

from oracles.gated_network import published_distance
from pushforward.errors import (
    LawError,
    NetworkError,
    OptionError,
    ResourceError,
    ShapeError,
    WeightsError,
)
from pushforward.function_space import estimators, synthetic
from pushforward.function_space.metrics import discrepancy
from pushforward.function_space.probes import NUM_PROBES, probe
from pushforward.function_space.summarize import summarize
from scenarios import moved, small_mlp

ESTIMATORS = ("gated", "gaussian", "anchored", "reference", "sampled", "synthetic")
METRICS = ("euclidean", "softmax", "kl", "fisher")


def _data(count=2000):
    torch.manual_seed(5)
    y = torch.arange(count) % 3
    centres = 2 * torch.randn(3, 4, dtype=torch.float64)
    return centres[y] + torch.randn(count, 4, dtype=torch.float64), y


@pytest.fixture(scope="module")
def trained():
    """A network that tells three Gaussian classes apart, its data and its summary by class."""
    x, y = _data()
    net = small_mlp((4, 16, 16, 3))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net, x, y, summarize(net, (x, y), classes="targets", layer_moments=True)


def _truth(net, other, x, metric, outputs=None):
    with torch.no_grad():
        old, new = net(x), other(x)
    if outputs is not None:
        old, new = old[:, outputs], new[:, outputs]
    return float(discrepancy(old, new, metric).mean())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("estimator", "within"),
    [("gated", 2.0), ("gaussian", 1.4), ("anchored", 1.4), ("sampled", 2.0), ("synthetic", 1.2)],
)
def test_near_the_truth_on_gaussian_classes(trained, estimator, within, metric):
    net, x, _, summary = trained
    for size in (0.02, 0.1):
        other = moved(net, size)
        got = float(summary.distance(other, metric=metric, estimator=estimator).detach())
        truth = _truth(net, other, x, metric)
        assert truth / within < got < truth * within, (size, got, truth)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_exactly_zero_at_the_same_weights(trained, estimator, metric):
    net, _, _, summary = trained
    same = moved(net, 0.0)
    value = summary.distance(same, metric=metric, estimator=estimator)
    value.backward()
    assert value.item() == 0.0
    assert max(float(p.grad.abs().max()) for p in same.parameters()) < 1e-12


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_equals_finite_differences(trained, estimator, metric):
    net, _, _, summary = trained
    other = moved(net, 0.2)
    torch.manual_seed(9)
    direction = torch.randn_like(other[0].weight)

    def value():
        return summary.distance(other, metric=metric, estimator=estimator, num_samples=300)

    value().backward()
    slope = float((other[0].weight.grad * direction).sum())
    ends = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            other[0].weight.add_(step * direction)
            ends.append(float(value()))
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=2e-3)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("estimator", ["gaussian", "sampled", "synthetic"])
def test_outputs_can_be_chosen(trained, estimator, metric):
    net, x, _, summary = trained
    other = moved(net, 0.2)
    got = summary.distance(other, metric=metric, estimator=estimator, outputs=[2, 0])
    truth = _truth(net, other, x, metric, [2, 0])
    within = 3.0 if estimator == "sampled" else 1.6  # independent gates are coarse here
    assert truth / within < float(got.detach()) < truth * within


def test_a_distance_has_the_type_of_the_other_weights_and_takes_mappings(trained):
    net, _, _, summary = trained
    other = moved(net, 0.1)
    from_module = summary.distance(other)
    assert from_module.dtype == torch.float64
    assert torch.equal(from_module, summary.distance(dict(other.named_parameters())))
    single = {name: p.float() for name, p in other.named_parameters()}
    assert summary.distance(single).dtype == torch.float32
    assert float(summary.distance(single).detach()) == pytest.approx(
        float(from_module.detach()), rel=1e-5
    )


def test_seeds_decide_the_draws(trained):
    net, _, _, summary = trained
    other = moved(net, 0.1)
    with torch.no_grad():
        first, again, second = (summary.distance(other, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert first != second
    assert float(second) == pytest.approx(float(first), rel=0.1)


def test_draws_of_earlier_seeds_are_not_kept(trained):
    """A penalty that draws anew in each of a million steps must not fill the memory."""
    net, x, _, _ = trained
    summary = summarize(net, x, progress=False)
    for seed in range(3):
        summary.distance(moved(net), seed=seed)
    gc.collect()
    runs = [found for found in gc.get_objects() if type(found) is synthetic.SyntheticRun]
    assert sum(run.reference is summary.reference for run in runs) == 1


@pytest.mark.parametrize("metric", METRICS)
def test_an_estimate_covers_the_truth(trained, metric):
    net, x, _, summary = trained
    inside = 0
    for seed in range(10):
        other = moved(net, 0.1, seed=seed)
        estimate = summary.estimate(other, metric=metric)
        assert not estimate.value.requires_grad
        truth = _truth(net, other, x, metric)
        inside += abs(float(estimate.value) - truth) < 3 * float(estimate.standard_error)
    assert inside >= 9
    assert estimate.checks[0].name == "calibrated"


def test_the_error_is_that_on_the_probes(trained):
    _, _, _, summary = trained
    ratios = summary.calibration(estimator="gated")
    better = summary.calibration(estimator="synthetic")
    assert len(ratios) == len(summary.probe_distances)
    assert better.abs().mean() < ratios.abs().mean()
    assert better.abs().max() < 0.2


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"metric": "kl"}, "with classes or clusters"),
        ({"estimator": "reference"}, 'Use estimator="synthetic"'),
    ],
)
def test_a_summary_that_fits_badly_says_what_would_help(options, advice):
    net, (x, y) = small_mlp((4, 8, 3)), _data(300)
    check = summarize(net, (x.abs().pow(4), y)).estimate(moved(net, 0.1), **options).checks[0]
    assert check.status == "warn"
    assert advice in check.advice


def test_shards_add_up(trained):
    net, x, y, summary = trained
    parts = [
        summarize(net, (x[i], y[i]), classes="targets", layer_moments=True)
        for i in (slice(0, 500), slice(500, None))
    ]
    both = parts[0] + parts[1]
    other = moved(net, 0.2)
    assert both.num_examples == 2000
    assert torch.allclose(both.probe_distances, summary.probe_distances)
    for estimator in ESTIMATORS:
        with torch.no_grad():
            got = both.distance(other, estimator=estimator)
            assert torch.allclose(got, summary.distance(other, estimator=estimator), rtol=1e-6)


def test_shards_of_different_kinds_are_refused(trained):
    net, x, y, summary = trained
    with pytest.raises(WeightsError, match="different networks"):
        _ = summary + summarize(moved(net, 0.1), (x, y), classes="targets", layer_moments=True)
    with pytest.raises(OptionError, match="layer_moments is True in one and False"):
        _ = summary + summarize(net, (x, y), classes="targets")
    with pytest.raises(OptionError, match="components is 'classes' in one and 'all'"):
        _ = summary + summarize(net, (x, y), layer_moments=True)


def test_sizes_are_counted_in_numbers(trained):
    net, _, _, summary = trained
    assert summary.sizes == {
        "weights": sum(p.numel() for p in net.parameters()),
        "input mean": 3 * 4,
        "input covariance": 3 * 16,
        "gates": 3 * 32,
        "layers": 3 * 2 * (16 + 256),
        "outputs": 3 * (3 + 9 + 9 + 9),
    }
    assert "2,000 examples in 3 components" in repr(summary)
    assert "no example is kept" in repr(summary)
    assert summary.to_dict()["num_bytes"] == summary.num_bytes


def test_what_was_not_kept_is_refused_with_advice(trained):
    net, x, _, _ = trained
    summary = summarize(net, x)
    with pytest.raises(OptionError, match=r"no moments of the layers.*layer_moments=True"):
        summary.distance(net, estimator="anchored")


def test_bad_options_are_refused(trained):
    net, _, _, summary = trained
    with pytest.raises(ShapeError, match="does not select outputs of a network that has 3"):
        summary.distance(net, outputs=[3])
    with pytest.raises(OptionError, match=r"^num_samples: 1 "):
        summary.distance(net, num_samples=1)
    with pytest.raises(WeightsError, match="has shape"):
        summary.distance(small_mlp((4, 8, 16, 3)))


@pytest.mark.wrong_types
def test_unknown_names_are_refused(trained):
    net, _, _, summary = trained
    with pytest.raises(OptionError, match="there is no estimator 'exact'"):
        summary.distance(net, estimator="exact")
    with pytest.raises(OptionError, match="there is no metric 'l1'"):
        summary.distance(net, metric="l1")


def test_layers_too_wide_for_covariances_are_refused(trained, monkeypatch):
    net, _, _, _ = trained
    summary = summarize(net, _data()[0])
    monkeypatch.setattr(estimators, "_TOO_WIDE", 10)
    with pytest.raises(ResourceError, match="a layer has 16 units"):
        summary.distance(net, estimator="gaussian")
    assert summary.distance(net).item() == 0.0


def test_indefinite_moments_are_refused(trained):
    net, x, _, _ = trained
    summary = summarize(net, x)
    inputs = summary.statistics.inputs
    flipped = replace(inputs, covariance=-inputs.covariance)
    broken = replace(summary, statistics=replace(summary.statistics, inputs=flipped))
    with pytest.raises(LawError, match="has the eigenvalue -"):
        broken.distance(moved(net, 0.1))


@pytest.fixture(scope="module")
def unequal():
    """Classes of 100, 40 and 10 skewed examples: network, data, summaries of all and of each."""
    torch.manual_seed(6)
    y = torch.tensor([0] * 100 + [1] * 40 + [2] * 10)
    x = torch.randn(150, 4, dtype=torch.float64).abs().pow(1.5) * (1.0 + 2.0 * y[:, None])
    net = small_mlp((4, 6, 3))
    parts = [summarize(net, x[y == label]) for label in range(3)]
    return net, x, y, summarize(net, (x, y), classes="targets"), parts


@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_components_count_by_their_examples(unequal, metric):
    net, _, _, summary, parts = unequal
    other = moved(net, 0.2)
    options = {"metric": metric, "estimator": "gaussian"}
    with torch.no_grad():
        each = [float(part.distance(other, **options)) for part in parts]
        whole = float(summary.distance(other, **options))
    expected = sum(n * d for n, d in zip((100, 40, 10), each, strict=True)) / 150
    assert whole == pytest.approx(expected, rel=1e-10)
    estimate = summary.estimate(other, **options)
    assert estimate.value.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("metric", METRICS)
def test_the_calibration_is_the_logarithm_of_estimate_over_truth(unequal, metric):
    net, x, _, summary, _ = unequal
    expected = []
    for number in range(NUM_PROBES):
        weights = probe(summary.reference, number)
        with torch.no_grad():
            new = torch.func.functional_call(net, weights, (x,))
            truth = discrepancy(net(x), new, metric).mean()
            guess = summary.distance(weights, metric=metric, estimator="gaussian")
        expected.append((guess / truth).log())
    ratios = summary.calibration(metric=metric, estimator="gaussian")
    assert torch.allclose(ratios, torch.stack(expected), rtol=1e-6)


def test_the_error_adds_what_draws_and_probes_say(unequal):
    net, _, _, summary, _ = unequal
    other = moved(net, 0.3)
    closed = summary.estimate(other, estimator="gaussian")
    ratios = summary.calibration(estimator="gaussian")
    assert ratios.std() > 0.02  # or the mean and the mean square would be the same
    expected = closed.value * ratios.square().mean().sqrt()
    assert float(closed.standard_error) == pytest.approx(float(expected))
    drawn = summary.estimate(other, num_samples=60)
    _, spread = summary._estimators.components(
        other, metric="euclidean", estimator=None, outputs=None, num_samples=60, seed=0
    )
    known = drawn.value * summary.calibration().square().mean().sqrt()
    square = known.square() + (summary.weights * spread).square().sum()
    assert float(drawn.standard_error) == pytest.approx(float(square.sqrt()))


@pytest.mark.statistical
@pytest.mark.parametrize("estimator", ["sampled", "synthetic"])
def test_the_spread_of_draws_is_that_over_seeds(unequal, estimator):
    net, _, _, summary, _ = unequal
    other = moved(net, 0.3)

    def components(seed):
        with torch.no_grad():
            return summary._estimators.components(
                other,
                metric="euclidean",
                estimator=estimator,
                outputs=None,
                num_samples=300,
                seed=seed,
            )

    found = [components(seed) for seed in range(60)]
    values = torch.stack([value for value, _ in found])
    stated = torch.stack([spread for _, spread in found]).square().mean(0).sqrt()
    # 60 seeds tell a standard deviation to 9 %; antithetic pairs and exact second moments make it
    # smaller than what is stated.
    ratio = stated / values.std(0)
    assert float(ratio.min()) > 0.7, ratio
    assert float(ratio.max()) < 20.0, ratio


def test_seeds_decide_what_closed_forms_draw(unequal):
    net, _, _, summary, _ = unequal
    other = moved(net, 0.3)
    with torch.no_grad():
        first, again, second = (
            float(summary.distance(other, metric="kl", estimator="gaussian", seed=s))
            for s in (1, 1, 2)
        )
    assert first == again
    assert first != second


def test_the_reference_estimator_is_the_published_recursion_on_the_data(unequal):
    net, x, _, _, _ = unequal
    other = moved(net, 0.3)
    affine = [
        [(m.weight.detach(), m.bias.detach()) for m in n if isinstance(m, nn.Linear)]
        for n in (net, other)
    ]
    with torch.no_grad():
        gates = [(net[0](x) >= 0).double().mean(0).tolist()]
        got = summarize(net, x).distance(other, estimator="reference")
    covariance = torch.cov(x.mT, correction=0) + 1e-4 * torch.eye(4, dtype=torch.float64)
    expected = published_distance(*affine, x.mean(0), covariance, gates)
    assert float(got) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_drawn_outputs_get_the_moments_of_the_data_where_probabilities_are_compared(
    unequal, monkeypatch, metric
):
    net, x, y, summary, _ = unequal
    seen = []

    def noting(old, new, metric):
        seen.append(old.detach())
        return discrepancy(old, new, metric)

    monkeypatch.setattr(synthetic, "discrepancy", noting)
    summary.distance(moved(net, 0.3), metric=metric, num_samples=3 * estimators._ANCHORING)
    own = net(x).detach()
    for label, drawn in enumerate(seen[0].unflatten(0, (3, -1))):
        true = own[y == label]
        same = torch.allclose(drawn.mean(0), true.mean(0), rtol=1e-6)
        assert same == (metric != "euclidean")
        first, second = (torch.cov(rows.mT, correction=0) for rows in (drawn, true))
        same = torch.allclose(first, second, rtol=1e-3, atol=1e-4 * float(second.max()))
        assert same == (metric != "euclidean")


@pytest.mark.parametrize("metric", ["softmax", "kl", "fisher"])
def test_probabilities_of_one_output_are_refused(trained, metric):
    """They are 1 whatever the weights: the distance would be a silent zero."""
    _, x, _, summary = trained
    with pytest.raises(ShapeError, match="probabilities of several outputs, and there is 1"):
        summary.distance(summary.reference.module, metric=metric, outputs=[2])
    net = small_mlp((4, 5, 1))
    single = summarize(net, x)
    other = moved(net, 0.3)
    with pytest.raises(ShapeError, match="a single logit becomes two"):
        single.distance(other, metric=metric)
    assert single.estimate(other).checks[0].status == "pass"


def test_outputs_with_several_axes_have_no_probabilities_of_their_own():
    net, x = nn.Linear(4, 3).double(), torch.randn(100, 5, 4, dtype=torch.float64)
    summary = summarize(net, x)
    with pytest.raises(ShapeError, match=r"outputs of shape \(5, 3\)"):
        summary.distance(moved(net), metric="kl")
    assert summary.distance(moved(net)).item() > 0


def test_mixed_precision_does_not_count_as_a_distance(trained):
    net, x, _, _ = trained
    single = small_mlp((4, 16, 16, 3), dtype=torch.float32)
    single.load_state_dict({name: t.float() for name, t in net.state_dict().items()})
    summary = summarize(single, x.float())
    other = moved(single, 1e-4)
    with torch.no_grad():
        expected = summary.distance(other)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(summary.distance(other), expected, rtol=1e-4)


def test_outputs_that_overflow_are_refused():
    net, x = small_mlp((4, 8, 3), dtype=torch.float32), _data(100)[0].float()
    summary = summarize(net, x)
    huge = {name: 1e30 * t for name, t in net.state_dict().items()}
    with pytest.raises(NetworkError, match="other: its outputs are not finite"):
        summary.distance(huge)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1e30)
    with pytest.raises(NetworkError, match="net: its outputs are not finite"):
        summarize(net, x)


@pytest.mark.parametrize("estimator", ["gated", "gaussian", "anchored"])
@pytest.mark.parametrize("metric", ["softmax", "kl"])
def test_changes_of_low_rank_are_no_trouble(estimator, metric):
    """More outputs than hidden units, of which only the last layer is scaled."""
    net, x = small_mlp((6, 8, 3, 10)), torch.randn(300, 6, dtype=torch.float64)
    summary = summarize(net, x, layer_moments=True)
    other = moved(net, 0.0)
    with torch.no_grad():
        other[4].weight.mul_(1.1)
        other[4].bias.mul_(1.1)
    value = summary.distance(other, metric=metric, estimator=estimator)
    value.backward()
    assert value.item() > 0
    assert all(torch.isfinite(p.grad).all() for p in other.parameters())


def test_a_distance_in_inference_mode_leaves_later_ones_their_gradient(trained):
    net, x, _, _ = trained
    with torch.inference_mode():
        summary = summarize(net, x)
        first = {e: summary.distance(moved(net), estimator=e).item() for e in ESTIMATORS[:2]}
    for estimator, value in first.items():
        other = moved(net)
        again = summary.distance(other, estimator=estimator)
        again.backward()
        assert again.item() == value


def test_a_shard_may_lack_a_class_if_their_number_is_given(trained):
    net, x, y, summary = trained
    first = y != 1
    parts = [
        summarize(net, (x[i], y[i]), classes="targets", num_classes=3, layer_moments=True)
        for i in (first, ~first)
    ]
    both, other = parts[0] + parts[1], moved(net, 0.2)
    assert both.statistics.counts.tolist() == summary.statistics.counts.tolist()
    for estimator in ("gated", "gaussian", "anchored", "synthetic"):
        with torch.no_grad():
            got = both.distance(other, estimator=estimator)
            assert torch.allclose(got, summary.distance(other, estimator=estimator), rtol=1e-6)
            assert torch.isfinite(parts[1].distance(other, estimator=estimator))


def test_clusters_of_two_parts_do_not_add_up(trained):
    net, x, _, _ = trained
    parts = [summarize(net, rows, clusters=3) for rows in x.chunk(2)]
    with pytest.raises(OptionError, match="clusters of one part"):
        _ = parts[0] + parts[1]


def test_linear_networks_are_measured_exactly_by_drawing():
    """Drawn inputs have exactly the moments of the data where there are enough of them."""
    net, x = nn.Linear(4, 3).double(), _data(500)[0]
    other = moved(net)
    with torch.no_grad():
        got = summarize(net, x).distance(other)
    assert float(got) == pytest.approx(_truth(net, other, x, "euclidean"), rel=1e-9)


def test_fisher_with_one_component_has_the_curvature_of_the_data(trained):
    net, x, _, _ = trained
    summary, other = summarize(net, x), moved(net, 0.02)
    truth = _truth(net, other, x, "fisher")
    got = summary.distance(other, metric="fisher").item()
    assert truth / 1.3 < got < truth * 1.3


def test_tied_weights_may_come_as_a_state_dict():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    net = Tied().double()
    summary = summarize(net, _data(100)[0])
    assert summary.distance(net.state_dict()).item() == 0.0
    torn = {**net.state_dict(), "second.weight": torch.zeros(4, 4).double()}
    with pytest.raises(WeightsError, match=r"unknown 'second\.weight'"):
        summary.distance(torn)


@pytest.mark.wrong_types
@pytest.mark.parametrize("other", [None, [1], {"0.weight": 3.0}])
def test_what_are_no_weights_is_refused(trained, other):
    with pytest.raises(WeightsError, match="Give a network of the same architecture"):
        trained[3].distance(other)


@pytest.mark.wrong_types
@pytest.mark.parametrize("outputs", ["abc", {0, 1}])
def test_what_selects_no_outputs_is_refused(trained, outputs):
    with pytest.raises(ShapeError, match="does not select outputs"):
        trained[3].distance(trained[0], outputs=outputs)


@pytest.mark.statistical
@pytest.mark.parametrize("moments", ["full", "diagonal", 2])
def test_drawn_inputs_have_the_moments_that_were_kept(unequal, moments):
    net, x, _, _, _ = unequal
    summary = summarize(net, x, input_moments=moments)
    rows, _ = summary._estimators._drawn_inputs(40_000, 0)
    assert torch.allclose(rows.mean(0), x.mean(0), atol=1e-9)  # pairs mirror each other
    kept = summary._estimators._inputs.covariance[0]
    size = kept.diagonal().sqrt()
    # Correlations of 20,000 pairs: 0.01 is one sigma of a variance.
    assert (
        ((rows - x.mean(0)).mT @ (rows - x.mean(0)) / len(rows) - kept) / size.outer(size)
    ).abs().max() < 0.05


def test_low_ranks_add_up_with_their_offsets(unequal):
    net, x, _, _, _ = unequal
    first, second = (summarize(net, x[i], input_moments=2) for i in (slice(100), slice(100, None)))
    both = (first + second).statistics.inputs.whole
    assert torch.allclose(both.mean[0], x.mean(0))
    assert torch.allclose(both.covariance[0].diagonal(), x.var(0, correction=0))


def test_parts_in_a_list_are_summed(trained):
    net, x, _, _ = trained
    parts = [summarize(net, rows) for rows in x.chunk(2)]
    whole = sum(parts)
    assert whole.num_examples == 2000
    other = moved(net, 0.2)
    with torch.no_grad():
        assert torch.equal(whole.distance(other), (parts[0] + parts[1]).distance(other))
    assert sum(parts[:1]).num_examples == 1000


@pytest.mark.parametrize("other", [1, 0, None, 0.5, "summary"])
def test_nothing_but_summaries_is_added(trained, other):
    _, _, _, summary = trained
    with pytest.raises(TypeError, match="unsupported operand"):
        _ = summary + other
    if other != 0:
        with pytest.raises(TypeError, match=r"unsupported operand|can only concatenate"):
            _ = other + summary
