"""The section on expected outputs: its numbers are right, fair, and on the page."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.monte_carlo import monte_carlo
from pushforward.cumulants.propagation import propagate
from pushforward.errors import LawError, OptionError, ResourceError, ShapeError
from pushforward.report import comparison
from pushforward.report.comparison import Comparison, EventProbabilities, compare
from pushforward.report.events import Event, parse_event
from pushforward.report.expected_output import expected_output_section
from pushforward.report.formatting import probability, with_error
from pushforward.report.page import Report, Section, render, write

SAMPLES = 4000
LABELS = ("low", "middle", "<high>")


def small_network(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return net


def linear_network() -> nn.Module:
    net = nn.Linear(4, 2).double().eval()
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 2.0, 0.0, -1.0], [0.0, 1.0, 1.0, 0.5]]))
        net.bias.copy_(torch.tensor([3.0, -1.0]))
    return net


def normals(count: int, dimension: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def data() -> Tensor:
    return normals(200, 6) + 0.3


@pytest.fixture(scope="module")
def law(data: Tensor) -> GaussianLaw:
    return GaussianLaw.from_data(data)


@pytest.fixture(scope="module")
def section(law: GaussianLaw, data: Tensor) -> Section:
    return expected_output_section(
        small_network(), law, labels=LABELS, data=data, num_samples=SAMPLES, progress=False
    )


@pytest.fixture(scope="module")
def result(section: Section) -> Comparison:
    assert isinstance(section.results, Comparison)
    return section.results


def test_columns_are_those_of_propagate_and_monte_carlo(
    result: Comparison, law: GaussianLaw
) -> None:
    net = small_network()
    assert [p.method for p in result.propagated] == ["order 1", "order 2 augmented", "order 3"]
    direct = propagate(net, law, 3)
    assert direct.standard_error is not None
    torch.testing.assert_close(result.outputs.mean, direct.mean.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.outputs.error, direct.standard_error.detach())
    sampled = result.sampled
    z = (result.outputs.mean - sampled.mean) / torch.hypot(
        result.outputs.error, sampled.standard_error
    )
    torch.testing.assert_close(result.outputs.difference, z)


def test_linear_network_agrees_with_its_exact_law() -> None:
    law = GaussianLaw.standard(4, dtype=torch.float64)
    result = compare(linear_network(), law, num_samples=20_000, progress=False)
    outputs, events = result.outputs, result.events
    assert outputs.mean.tolist() == pytest.approx([3, -1])
    assert outputs.deviation.tolist() == pytest.approx([math.sqrt(6), 1.5])
    # Six events with a 95 % interval each; a factor 1.5 outside one is more than 6 standard errors
    # at these probabilities (at least 27 expected occurrences).
    exact = [0.5 * math.erfc(z / math.sqrt(2)) for z in (2, 2, 3, 3)]
    assert events.saddlepoint[:4].tolist() == pytest.approx(exact, rel=1e-9)
    assert max(events.distance) < 1.5
    # |z| < 4 for two means and two deviations: false alarm in 3 of 10,000 runs.
    spread = outputs.sampled_deviation - outputs.deviation
    assert float((spread / outputs.sampled_deviation_error).abs().max()) < 4
    assert (
        float(((outputs.sampled_mean - outputs.mean).abs()).max()) < 1e-9
    )  # frames are exact here


def test_rounding_of_a_single_precision_network_is_no_disagreement() -> None:
    law = GaussianLaw.standard(4, dtype=torch.float64)
    result = compare(linear_network().float(), law, num_samples=2000, progress=False)
    # The design is exact on linear networks: its standard error is below the rounding.
    rounding = 1e-7 * (result.outputs.mean.abs() + result.outputs.deviation)
    assert bool((result.outputs.sampled_error < rounding).all())
    named = [item for _, item in result.checks if item.name == "means-agree"]
    assert named[0].status == "pass"


def test_events_are_read_off_the_same_samples(law: GaussianLaw) -> None:
    net = small_network()
    event = parse_event("f[0] - f[2] > 0.5", ["0", "1", "2"])
    result = compare(net, law, events=[event], num_samples=SAMPLES, progress=False)
    direct = propagate(net, law, 3).project(event.functional[None])
    expected = direct.tail_probability(0.5)
    torch.testing.assert_close(result.events.saddlepoint, expected.detach().double())
    margin = monte_carlo(
        net,
        law,
        50_000,
        projection=event.functional[None],
        thresholds=0.5,
        seed=3,
        progress=False,
    )
    assert margin.exceedance is not None
    # Frames make the samples at least as good as independent ones: |z| < 4, 6 in 100,000.
    p = float(margin.exceedance.probability)
    error = math.sqrt(p * (1 - p) * (1 / SAMPLES + 1 / 50_000))
    assert abs(float(result.events.sampled) - p) < 4 * error


def test_monte_carlo_is_charged_for_its_passes_only(result: Comparison, law: GaussianLaw) -> None:
    alone = monte_carlo(small_network(), law, SAMPLES, covariance=False, progress=False)
    assert result.sampled.num_samples == alone.num_samples
    assert result.sampled.flops == pytest.approx(alone.flops, rel=1e-12)


def test_costs_compare_at_equal_flops(result: Comparison) -> None:
    check = result.costs[-1]
    total = float(result.sampled.variance.sum())
    assert check.stated == pytest.approx(
        math.sqrt(float(result.sampled.standard_error.square().sum()) / total)
    )
    for cost, law in zip(result.costs, result.propagated, strict=False):
        each = result.sampled.flops / result.sampled.num_samples
        assert cost.passes == pytest.approx(law.flops / each)
        assert cost.plain == pytest.approx(cost.passes**-0.5)
        assert cost.designed == pytest.approx(check.stated * math.sqrt(check.passes / cost.passes))
    means = result.propagated[0].mean - result.sampled.mean
    difference = float(means.square().sum()) / total
    expected = math.sqrt(difference - check.stated**2)
    assert result.costs[0].measured == pytest.approx(expected)


def test_data_columns_are_the_outputs_on_the_data(result: Comparison, data: Tensor) -> None:
    with torch.no_grad():
        outputs = small_network()(data)
    torch.testing.assert_close(result.outputs.data_mean, outputs.mean(0))
    assert result.events.observed is not None
    above = (outputs[:, 0] > result.events.thresholds[0]).double().mean()
    assert float(result.events.observed[0]) == float(above)
    assert result.num_examples == len(data)


def test_event_that_the_law_misjudges_is_named(section: Section, result: Comparison) -> None:
    page = render(Report("A network", "", (section,)))
    events = result.events
    assert events.observed is not None
    named = re.search(r"the law misjudges (.*?) most: probability (\S+) .*? share (\S+) of", page)
    assert named is not None
    name = named[1].replace("&lt;", "<").replace("&gt;", ">")
    i = events.names.index(name)
    assert probability(float(events.sampled[i])) == named[2]
    assert probability(float(events.observed[i])) == named[3]


def test_page_shows_the_numbers(section: Section, result: Comparison) -> None:
    page = render(Report("A network", "", (section,)))
    for mean, error in zip(result.outputs.mean, result.outputs.error, strict=True):
        assert with_error(float(mean), float(error)) in page
    columns = (result.outputs.sampled_mean, result.outputs.sampled_error)
    for mean, error in zip(*columns, strict=True):
        assert with_error(float(mean), float(error)) in page
    for values in (result.events.saddlepoint, result.events.sampled, result.events.gaussian):
        for value in values:
            assert probability(float(value)) in page
    assert page.count("<svg") == 2
    assert "<high>" not in page
    assert "&lt;high&gt;" in page


def test_drawings_follow_the_page(section: Section) -> None:
    page = render(Report("A network", "", (section,)))
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    identifiers = re.findall(r' id="([^"]+)"', "".join(drawings))
    assert len(identifiers) == len(set(identifiers))
    for drawing in drawings:
        assert re.findall(r"#0[1-6]0[1-6]0[1-6]", drawing) == []
        assert "var(--propagated)" in drawing
        assert "<style" not in drawing
        used = re.findall(r'(?:url\(#|href="#)([^)"]+)', drawing)
        assert set(used) <= set(identifiers)


def test_without_matplotlib_the_page_has_tables(
    law: GaussianLaw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    section = expected_output_section(small_network(), law, num_samples=500, progress=False)
    page = render(Report("A network", "", (section,)))
    assert "<svg" not in page
    assert "pushforward[plot]" in page
    assert page.count("<table>") == 5


def test_json_holds_every_output_and_event(section: Section, tmp_path: Path) -> None:
    write(Report("A network", "", (section,)), tmp_path / "index.html")
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    numbers = json.loads(text)["sections"]["expected-output"]["results"]
    assert numbers["labels"] == list(LABELS)
    assert numbers["outputs"]["mean"] == section.results.outputs.mean.tolist()
    assert numbers["events"]["saddlepoint"] == section.results.events.saddlepoint.tolist()
    assert len(numbers["propagated"]) == 3


def test_many_outputs_are_cut_on_the_page_and_whole_in_the_numbers() -> None:
    net = nn.Linear(3, 25).double().eval()
    section = expected_output_section(
        net, GaussianLaw.standard(3, dtype=torch.float64), num_samples=500, progress=False
    )
    page = render(Report("A network", "", (section,)))
    assert "5 more outputs are in result.json" in page
    assert len(section.results.outputs.mean) == 25


def test_distance_is_the_factor_outside_the_interval() -> None:
    def column(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    events = EventProbabilities(
        names=("a", "b", "c", "d"),
        groups=("g",) * 4,
        thresholds=(0.0,) * 4,
        saddlepoint=column(0.1, 0.3, 0.01, 1e-7),
        gaussian=column(0.1, 0.1, 0.1, 0.1),
        sampled=column(0.1, 0.1, 0.1, 0.0),
        lower=column(0.08, 0.08, 0.08, 0.0),
        upper=column(0.12, 0.12, 0.12, 1e-4),
        observed=None,
    )
    assert events.inside == [True, False, False, True]
    assert events.distance == pytest.approx([1.0, 2.5, 8.0, 1.0])


def test_wrong_tails_are_named_in_the_verdict(
    law: GaussianLaw, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = comparison._probabilities

    def spoiled(*arguments: object) -> EventProbabilities:
        right = original(*arguments)  # type: ignore[arg-type]
        factor = torch.ones_like(right.saddlepoint)
        factor[0] = 10.0
        return replace(right, saddlepoint=right.saddlepoint * factor)

    monkeypatch.setattr(comparison, "_probabilities", spoiled)
    section = expected_output_section(small_network(), law, num_samples=SAMPLES, progress=False)
    assert section.verdict.status == "warn"
    assert "not all tail probabilities do" in section.verdict.headline
    named = [item for _, item in section.results.checks if item.name == "tails-agree"]
    assert named[0].status == "warn"
    assert named[0].advice


def test_wrong_means_are_named_in_the_verdict(
    law: GaussianLaw, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = comparison.propagate

    def shifted(*arguments: object, **options: object) -> object:
        right = original(*arguments, **options)  # type: ignore[arg-type]
        return replace(right, mean=right.mean + 0.5 * right.variance.sqrt())

    monkeypatch.setattr(comparison, "propagate", shifted)
    section = expected_output_section(small_network(), law, num_samples=SAMPLES, progress=False)
    named = [item for _, item in section.results.checks if item.name == "means-agree"]
    assert named[0].status == "warn"
    assert "not all means" in section.verdict.headline
    # The shift is half a standard deviation of each output.
    assert section.results.costs[2].measured == pytest.approx(0.5, rel=0.05)


def test_order_that_does_not_fit_is_left_out(
    law: GaussianLaw, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = comparison.propagate

    def limited(net: nn.Module, law: GaussianLaw, order: int, **options: bool) -> object:
        if order == 3:
            raise ResourceError("too large", where="propagate", advice="Use less.")
        return original(net, law, order, **options)

    monkeypatch.setattr(comparison, "propagate", limited)
    section = expected_output_section(small_network(), law, num_samples=500, progress=False)
    assert section.results.best.order == 2
    assert "Order 3 was left out: too large." in section.verdict.sentences


def test_constant_network_is_reported_without_nan() -> None:
    net = nn.Linear(3, 2).double().eval()
    nn.init.zeros_(net.weight)
    law = GaussianLaw.standard(3, dtype=torch.float64)
    section = expected_output_section(net, law, num_samples=500, progress=False)
    assert section.verdict.status != "fail"
    assert not re.search(r"\bnan\b", render(Report("Constant", "", (section,))), re.IGNORECASE)


def test_requests_that_do_not_fit_are_refused(law: GaussianLaw, data: Tensor) -> None:
    net = small_network()
    wide = Event("wide", torch.ones(5, dtype=torch.float64), 0.0)
    batch = GaussianLaw(torch.zeros(2, 6), torch.tensor(1.0))
    with pytest.raises(OptionError, match="labels"):
        compare(net, law, labels=["a"], num_samples=500)
    with pytest.raises(OptionError, match="no events"):
        compare(net, law, events=[], num_samples=500)
    # A type checker, where one is switched on, objects first.
    with pytest.raises((OptionError, TypeError), match="highest_order"):
        compare(net, law, highest_order=4, num_samples=500)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="coefficients"):
        compare(net, law, events=[wide], num_samples=500)
    with pytest.raises(ShapeError, match="examples of shape"):
        compare(net, law, data=data[:, :3], num_samples=500)
    with pytest.raises(LawError):
        compare(net, batch, num_samples=500)
