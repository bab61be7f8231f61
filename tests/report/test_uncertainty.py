"""The section on uncertainty: MAP beside Laplace, every kind of target, and honest headlines."""

import json
import re

import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.errors import ShapeError
from pushforward.linearised_laplace.evaluation import evaluate
from pushforward.report import uncertainty as module
from pushforward.report.page import CheckList, Figure, Report, Table, render, write
from pushforward.report.uncertain_inputs import rank
from pushforward.report.uncertainty import uncertainty_section

LIKELIHOODS = {
    "categorical": (pf.Categorical(), 3),
    "bernoulli": (pf.Bernoulli(), 2),
    "gaussian": (pf.Gaussian([0.3, 0.1]), 2),
    "learned noise": (pf.Gaussian(), 1),
    "poisson": (pf.Poisson(), 1),
}


def network(outputs, boast=1.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs)).double()
    with torch.no_grad():
        for parameter in net[2].parameters():
            parameter *= boast
    return net.eval()


def draw(net, likelihood, count, seed, boast=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    if isinstance(likelihood, pf.Gaussian) and likelihood.noise_variance is None:
        likelihood = likelihood.with_noise(0.2)
    with torch.no_grad():
        return x, likelihood.sample(net(x) / boast, generator)


def problem(kind="categorical", boast=1.0, precision=1.0, **options):
    likelihood, outputs = LIKELIHOODS[kind]
    net = network(outputs, boast)
    data = draw(net, likelihood, 50, 1, boast)
    posterior = pf.laplace(
        net, data, likelihood, prior_precision=precision, num_draws=16, **options
    )
    return posterior, draw(net, likelihood, 80, 2, boast), draw(net, likelihood, 60, 3, boast)


def tables(section):
    return {block.title: block for block in section.blocks if isinstance(block, Table)}


def page_of(section):
    return render(Report("Title", "Subtitle", (section,)))


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_every_kind_of_target_makes_a_page(kind, method, tmp_path):
    posterior, test, validation = problem(kind, method=method)
    section = uncertainty_section(posterior, test, validation=validation)
    page = page_of(section)
    found = tables(section)
    assert list(found) == [
        "Laplace beside the network alone",
        "The most uncertain inputs",
        "The prior, and what the data determine",
    ]
    scores = found["Laplace beside the network alone"]
    assert scores.rows[0][0].text == "MAP"
    assert all(len(row) == len(table.columns) for table in found.values() for row in table.rows)
    assert "nan" not in page.lower().replace("nanumeric", "")
    assert [type(block) for block in section.blocks][-1] is CheckList
    write(Report("Title", "Subtitle", (section,)), tmp_path / "index.html")
    saved = json.loads((tmp_path / "result.json").read_text())["sections"]["uncertainty"]
    assert saved["results"]["evaluation"]["num_examples"] == 80
    assert saved["results"]["posterior"]["prior"] == "isotropic"
    assert len(saved["results"]["most_uncertain"]) == 12


def test_the_scores_are_those_of_the_evaluation():
    posterior, test, validation = problem()
    section = uncertainty_section(posterior, test, validation=validation, bins=9)
    result = evaluate(posterior, test, validation=validation, bins=9)
    table = tables(section)["Laplace beside the network alone"]
    assert [row[0].text for row in table.rows] == [row.name for row in result.rows]
    at = table.columns.index("NLL")
    shown = [float(row[at].text.split()[0]) for row in table.rows]
    assert shown == pytest.approx([row.nll.value for row in result.rows], rel=0.05)
    assert table.rows[table.strong][0].text == "Laplace, probit"
    assert section.results["evaluation"]["rows"] == result.to_dict()["rows"]


def test_the_most_uncertain_inputs_come_first():
    posterior, test, _ = problem()
    section = uncertainty_section(posterior, test, labels=("a", "<b>", "c"))
    prediction = posterior.predict(test[0])
    guess = prediction.map_expected.argmax(1)
    kept = prediction.expected.gather(1, guess[:, None])[:, 0]
    order = kept.argsort(stable=True)[:12]
    rows = tables(section)["The most uncertain inputs"].rows
    assert [row[0].text for row in rows] == [str(int(i)) for i in order]
    names = ("a", "<b>", "c")
    for i, row in zip(order.tolist(), rows, strict=True):
        label, chosen = int(test[1][i]), int(guess[i])
        assert (row[1].text, row[2].text) == (names[label], names[chosen])
        assert row[2].tone == ("" if label == chosen else "bad")
        alone = float(prediction.map_expected[i, chosen])
        assert float(row[3].text) == pytest.approx(alone, abs=6e-4)
        assert float(row[4].text) == pytest.approx(float(kept[i]), abs=6e-4)
    assert "&lt;b&gt;" in page_of(section)


def test_outputs_of_a_regression_are_ranked_by_their_spread():
    posterior, test, _ = problem("gaussian")
    result = posterior.evaluate(test)
    ranking = rank(posterior.likelihood, result, ("left", "right"))
    spread = posterior.predict(test[0]).epistemic_variance.sqrt()
    torch.testing.assert_close(ranking.uncertainty, spread.max(1).values)
    i = int(ranking.uncertainty.argmax())
    at = int(spread[i].argmax())
    assert ranking.columns["output"](i).text == ("left", "right")[at]
    noise = float(ranking.columns["s.d., noise alone"](i).text)
    assert noise == pytest.approx((0.3, 0.1)[at] ** 0.5, rel=1e-3)
    total = float(ranking.columns["s.d., Laplace"](i).text)
    assert total**2 == pytest.approx(noise**2 + float(spread[i, at]) ** 2, rel=1e-3)
    assert ranking.right is None


def test_headlines_say_which_is_better():
    helped, test, _ = problem(boast=6.0)
    section = uncertainty_section(helped, test)
    assert "makes the predictions better" in section.verdict.headline
    assert section.verdict.tiles[0].tone == "good"
    harmed, test, _ = problem(boast=0.3, precision=1e-3)
    section = uncertainty_section(harmed, test)
    assert "worse than those of the network alone" in section.verdict.headline
    assert section.verdict.status == "warn"
    assert section.verdict.tiles[0].tone == "warn"
    assert any("fit_temperature" in sentence for sentence in section.verdict.sentences)
    same = uncertainty_section(harmed.with_temperature(1e-9), test)
    assert "changes the predictions little" in same.verdict.headline
    assert any("temperature 1.0" in block.text for block in same.blocks if hasattr(block, "text"))


def test_figures_are_drawn_for_what_can_be_judged():
    pytest.importorskip("matplotlib")
    titles = {
        kind: [b.title for b in uncertainty_section(*problem(kind)[:2]).blocks if type(b) is Figure]
        for kind in ("categorical", "gaussian", "poisson")
    }
    assert titles == {
        "categorical": ["Are the probabilities right?", "Does it know when it is wrong?"],
        "gaussian": ["Are the intervals right?", "Are larger errors foreseen?"],
        "poisson": [],
    }


def test_colours_follow_the_page_and_identifiers_are_unique():
    pytest.importorskip("matplotlib")
    page = page_of(uncertainty_section(*problem()[:2]))
    figures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--propagated)" in figures
    assert "var(--sampled)" in figures
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_without_matplotlib_there_are_tables(monkeypatch):
    monkeypatch.setattr(module, "can_draw", lambda: False)
    section = uncertainty_section(*problem()[:2])
    assert not any(isinstance(block, Figure) for block in section.blocks)
    assert "pip install" in page_of(section)
    assert "The most uncertain inputs" in tables(section)


def test_inputs_that_are_pictures_are_shown():
    posterior, test, _ = problem()
    section = uncertainty_section(posterior, test, image_shape=(2, 2))
    assert page_of(section).count('<img class="thumb" src="data:image/png;base64,') == 12
    assert "<img" not in page_of(uncertainty_section(posterior, test))


def test_layers_have_their_own_precision():
    posterior, test, _ = problem(prior="layerwise", precision={"0": 2.0, "2": 30.0})
    rows = tables(uncertainty_section(posterior, test))[
        "The prior, and what the data determine"
    ].rows
    assert [(row[0].text, row[1].text, row[2].text) for row in rows] == [
        ("0", "40", "2.00"),
        ("2", "27", "30.0"),
    ]
    shown = [float(row[3].text.split()[0]) for row in rows]
    assert shown == pytest.approx(posterior.layer_effective_dimension.value.tolist(), rel=1e-3)


def test_labels_and_picture_shapes_must_fit():
    posterior, test, _ = problem()
    with pytest.raises(ShapeError, match="2 labels for 3 outputs"):
        uncertainty_section(posterior, test, labels=("a", "b"))
    with pytest.raises(ShapeError, match="no shape of a picture"):
        uncertainty_section(posterior, test, image_shape=(3, 3))
