"""Versions beside each other: the same numbers as one by one, the truth, refusals, pictures."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.errors import NetworkError, OptionError, ShapeError, WeightsError
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.compression import pruned, quantised
from pushforward.function_space.plots import error_interval, named_calibration
from pushforward.function_space.probes import PROBE_NAMES, probe
from pushforward.function_space.versions import measure_versions, output_spread

CACHE = {}


def problem(components=1):
    if components not in CACHE:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(300, 6, generator=generator, dtype=torch.float64)
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4))
        net = net.double().requires_grad_(False)
        clusters = components if components > 1 else None
        CACHE[components] = net, inputs, pf.summarize(net, inputs, clusters=clusters)
    return CACHE[components]


def versions_of(net):
    return {"half": pruned(net, 0.5), "4 bits": quantised(net, 4), "same": net}


def test_numbers_are_those_of_each_version_alone():
    net, inputs, summary = problem()
    found = measure_versions(
        summary,
        versions_of(net),
        metrics=("euclidean", "fisher"),
        estimator="gated",
        outputs=[2, 0],
        data=inputs,
    )
    assert found.names == ("half", "4 bits", "same")
    assert found.metrics == ("euclidean", "fisher")
    assert found.outputs == (2, 0)
    exact = ExactDistance.of(net, inputs)
    for row in found.rows:
        other = versions_of(net)[row.name]
        options = {"metric": row.metric, "outputs": [2, 0]}
        alone = summary.estimate(other, estimator="gated", **options)
        assert float(row.estimate) == float(alone)
        assert float(row.estimate.standard_error) == float(alone.standard_error)
        assert row.truth == pytest.approx(float(exact.distance(other, **options)))
    assert float(found.of("euclidean")[2].estimate) == 0
    assert found.of("euclidean")[2].truth == 0
    assert found.of("fisher")[0].share is None


@pytest.mark.parametrize("components", [1, 3])
def test_the_share_is_that_of_the_variance_of_the_outputs(components):
    net, inputs, summary = problem(components)
    outputs = net(inputs).detach()
    spread = float(outputs.var(0, correction=0).sum()) / 2
    assert output_spread(summary) == pytest.approx(spread)
    one = float(outputs[:, 3].var(correction=0)) / 2
    assert output_spread(summary, [3]) == pytest.approx(one)
    (row,) = measure_versions(summary, {"half": pruned(net, 0.5)}).rows
    assert row.share == pytest.approx(float(row.estimate) / spread)


def test_the_calibration_has_the_names_of_the_probes():
    _, inputs, summary = problem()
    ratios = named_calibration(summary, "euclidean", "gated")
    assert tuple(ratios) == PROBE_NAMES
    exact = ExactDistance.of(summary.reference.module, inputs)
    for number, name in enumerate(PROBE_NAMES):
        weights = probe(summary.reference, number)
        guess = float(summary.distance(weights, estimator="gated"))
        truth = float(exact.distance(weights))
        assert ratios[name] == pytest.approx(math.log(guess / truth), abs=1e-6)


def test_results_are_ready_for_json_and_readable():
    net, _, summary = problem()
    found = measure_versions(summary, versions_of(net), metrics=("euclidean", "kl"))
    saved = json.loads(json.dumps(found.to_dict()))
    assert [v["name"] for v in saved["versions"]] == ["half", "half", "4 bits", "4 bits"] + [
        "same"
    ] * 2
    assert saved["versions"][0]["distance"] == float(found.rows[0].estimate)
    assert saved["versions"][0]["distance_on_data"] is None
    assert set(saved["calibration"]) == {"euclidean", "kl"}
    assert [check["metric"] for check in saved["checks"]] == ["euclidean", "kl"]
    assert found.status == max(
        (check.status for _, check in found.checks), key=["pass", "warn", "fail"].index
    )
    assert "half" in repr(found)
    assert saved["estimator"] in repr(found)


def test_what_is_wrong_with_a_version_is_said_under_its_name():
    net, _, summary = problem()
    broken = {name: torch.full_like(t, torch.nan) for name, t in net.state_dict().items()}
    with pytest.raises(NetworkError, match=r"broken: .*NaN"):
        measure_versions(summary, {"broken": broken})
    with pytest.raises(WeightsError, match="narrow: "):
        measure_versions(summary, {"narrow": nn.Linear(6, 4).double()})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"versions": {}}, "no version"),
        ({"metrics": ()}, "no metric"),
        ({"metrics": ("kl", "kl")}, "once"),
        ({"metrics": ("cosine",)}, "cosine"),
        ({"metrics": "cosine"}, "there is no metric 'cosine'"),
        ({"metrics": None}, "there is no metric None"),
        ({"versions": [nn.Linear(6, 4)]}, r"^versions: list .*\{\"pruned\": net\}"),
        ({"versions": nn.Linear(6, 4)}, "^versions: Linear does not give"),
        ({"versions": {1: nn.Linear(6, 4)}}, "^versions: dict does not give every version a name"),
        ({"estimator": "guess"}, "guess"),
        ({"outputs": [4]}, "0 to 3"),
    ],
)
def test_bad_options_are_refused(options, words):
    net, _, summary = problem()
    options = {"versions": versions_of(net)} | options
    with pytest.raises((OptionError, ShapeError), match=words):
        measure_versions(summary, options.pop("versions"), **options)


def test_one_metric_may_come_without_a_list():
    net, _, summary = problem()
    found = measure_versions(summary, {"half": pruned(net, 0.5)}, metrics="kl")
    assert found.metrics == ("kl",)


def test_distances_are_measured_from_a_summary():
    net, inputs, _ = problem()
    versions = versions_of(net)
    with pytest.raises(OptionError, match=r"^summary: Sequential is no summary.*pf\.summarize"):
        measure_versions(net, versions)
    with pytest.raises(OptionError, match=r"^summary: ExactDistance is no summary"):
        measure_versions(ExactDistance.of(net, inputs), versions)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("components", [1, 2])
def test_rounding_is_no_variance_of_the_outputs(kind, components):
    """Outputs for one input in many places of a batch are not the same to the last digit."""
    net = copy.deepcopy(problem()[0]).to(kind)
    same = torch.full((1037, 6), 0.3, dtype=kind)
    labels = torch.arange(1037) % 2
    summary = pf.summarize(net, (same, labels), classes="targets" if components == 2 else None)
    assert float(summary.statistics.outputs.moments.covariance.abs().max()) > 0
    assert output_spread(summary) == 0.0
    (row,) = measure_versions(summary, {"half": pruned(net, 0.5)}).rows
    assert row.share is None
    assert "half" in repr(measure_versions(summary, {"half": pruned(net, 0.5)}))


def test_a_variance_that_is_small_beside_the_mean_is_still_one():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(300, 6, generator=generator)
    net = nn.Linear(6, 2)
    with torch.no_grad():
        net.bias.fill_(1e4)
    outputs = net(inputs).detach().double()
    spread = float(outputs.var(0, correction=0).sum()) / 2
    assert spread < 1e-6 * float(outputs.square().mean(0).sum()) / 2
    assert output_spread(pf.summarize(net, inputs)) == pytest.approx(spread, rel=1e-3)


def test_error_bars_are_a_factor_up_and_down():
    low, high = error_interval(8.0, 2.0)
    assert high == 10.0
    assert low * high == pytest.approx(64)
    assert error_interval(1.0, 3.0)[0] > 0


def test_pictures_show_what_there_is():
    pytest.importorskip("matplotlib").use("Agg")
    net, inputs, summary = problem()
    found = measure_versions(summary, versions_of(net), metrics=("euclidean", "kl"), data=inputs)
    figure = found.plot()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["euclidean", "kl"]
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    shown = [float(line.get_xdata()[0]) for line in points]
    assert shown == [float(row.estimate) for row in found.of("euclidean")[:2]]
    figure = summary.plot(estimator="gated")
    (dots,) = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    ratios = [math.exp(log) for log in named_calibration(summary, estimator="gated").values()]
    assert dots.get_xdata() == pytest.approx(ratios)
    from matplotlib import pyplot

    pyplot.close("all")
