"""The section on degeneracy: every verdict, exact samplers, lost chains, and no matplotlib."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.degeneracy.coefficient import Measured
from pushforward.report import degeneracy as module
from pushforward.report.chain_figures import Panel, traces_svg
from pushforward.report.degeneracy import degeneracy_section
from pushforward.report.formatting import MISSING, number, with_error
from pushforward.report.page import CheckList, Figure, Paragraph, Report, Table, render, write

CACHE = {}


def found_of(sampler="langevin", **options):
    key = (sampler, *options.items())
    if key not in CACHE:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
        line = nn.Linear(3, 1, bias=False).double().eval()
        options = {"num_chains": 4, "num_draws": 200, "localization": 1.0} | options
        loss = options.pop("loss", pf.Gaussian(noise_variance=1.0))
        CACHE[key] = pf.learning_coefficient(
            line, (x, line(x).detach()), loss, sampler=sampler, progress=False, **options
        )
    return CACHE[key]


def tables(section):
    return {block.title: block for block in section.blocks if isinstance(block, Table)}


def tiles(section):
    return {tile.label: tile for tile in section.verdict.tiles}


def rows(table):
    return {row[0].text: row[1] for row in table.rows}


def page_of(section):
    return render(Report("Title", "Subtitle", (section,)))


def test_an_answer_is_a_page(tmp_path):
    found = found_of()
    assert found.verdict == "OK"
    section = degeneracy_section(found, about="A <line>.", notes=("By Langevin.",))
    answer = with_error(float(found), float(found.standard_error))
    assert section.verdict.status == found.status
    assert answer in section.verdict.headline
    assert "3 parameters has 1.5." in section.verdict.headline
    page = page_of(section)
    assert "A &lt;line&gt;." in page
    assert "By Langevin." in page
    assert "nan" not in page.lower().replace("nan or infinity", "")
    for table in tables(section).values():
        assert all(len(row) == len(table.columns) for row in table.rows)
    write(Report("Title", "Subtitle", (section,)), tmp_path / "index.html")
    saved = json.loads((tmp_path / "result.json").read_text())["sections"]["degeneracy"]
    assert saved["results"]["verdict"] == "OK"
    assert saved["results"]["value"] == pytest.approx(float(found))
    assert saved["results"]["chain_values"] == pytest.approx(found.chain_values.tolist())
    assert saved["results"]["notes"] == ["By Langevin."]


def test_tiles_show_the_number_beside_what_it_is_compared_with():
    found = found_of()
    shown = tiles(degeneracy_section(found))
    assert list(shown) == [
        "Learning coefficient",
        "Half the parameters",
        "If the loss were quadratic",
        "Drift",
        "R-hat",
        "Halving the step",
    ]
    assert shown["Half the parameters"].value == "1.5"
    quadratic = found.quadratic
    expected = with_error(quadratic.value, quadratic.standard_error)
    assert shown["If the loss were quadratic"].value == expected
    change = shown["Halving the step"].value.split(" ± ")[0].replace("\u2212", "-")
    assert float(change) == pytest.approx(found.runs[1].value - found.runs[0].value, abs=0.05)
    assert f"of {4 * 200:,}" in shown["R-hat"].detail
    assert shown["Drift"].tone == "good"


def test_the_evidence_has_every_road_and_its_caveat():
    found = found_of()
    found_tables = tables(degeneracy_section(found))
    assert list(found_tables) == [
        "Other roads to the number",
        "What else the draws say",
        "Settings",
    ]
    roads = found_tables["Other roads to the number"]
    assert [row[0].text.split(",")[0] for row in roads.rows] == [
        "the answer",
        "main run",
        "second run",
        "two temperatures",
        "variance of the loss",
        "curvature at the weights",
    ]
    assert number(found.step_size / 2, 3) in roads.rows[2][0].text
    for row, value in (
        (roads.rows[2], found.runs[1]),
        (roads.rows[4], found.crosschecks["variance"]),
    ):
        assert row[1].text == with_error(value.value, value.standard_error)
        share = float(row[2].text.split("\u00a0")[0])
        assert share == pytest.approx(value.value / float(found), rel=0.06)
    assert "only where the localisation is weak" in roads.note
    draws = rows(found_tables["What else the draws say"])
    assert draws["WAIC, nats an example"].text == number(found.waic, 5)
    assert draws["WBIC, nats in all"].text == number(found.wbic, 6)
    assert "singular fluctuation" in draws
    assert "bias that theory expects of step and minibatches" in draws
    low, high = draws["mean of a chain, lowest to highest"].text.split(" to ")
    assert float(low) == pytest.approx(float(found.chain_values.min()), rel=0.01)
    assert float(high) == pytest.approx(float(found.chain_values.max()), rel=0.01)
    settings = rows(found_tables["Settings"])
    assert settings["localisation"].text == "1"
    assert settings["examples in a minibatch"].text == "all"
    assert settings["step size"].text == number(found.step_size, 3)
    assert settings["chains lost"].text == "0"


def test_exact_samplers_have_no_step_to_halve():
    found = found_of("mala", num_warmup=100)
    section = degeneracy_section(found)
    shown = tiles(section)
    assert "Halving the step" not in shown
    assert shown["Step size"].value == "exact"
    roads = tables(section)["Other roads to the number"]
    assert not [row for row in roads.rows if "run" in row[0].text]
    assert rows(tables(section)["Settings"])["step size"].text == "learned"
    figure = next(block for block in section.blocks if isinstance(block, Figure))
    assert "extrapolated" not in figure.caption
    assert "in grey" not in figure.caption
    assert "nan" not in page_of(section).lower().replace("nan or infinity", "")


def test_a_loss_that_is_no_likelihood_has_no_criteria():
    def squares(outputs, targets):
        return (outputs - targets).square().flatten(1).sum(1)

    section = degeneracy_section(found_of(loss=squares))
    found_rows = rows(tables(section)["What else the draws say"])
    assert not [name for name in found_rows if "WAIC" in name or "fluctuation" in name]
    page_of(section)


@pytest.mark.parametrize(
    ("verdict", "words", "check"),
    [
        ("NOT_EQUILIBRATED", "not yet the local", "equilibrated"),
        ("STEP_TOO_LARGE", "depends on the step size", "step-size"),
        ("NOT_A_MINIMUM", "not at a minimum", "at-a-minimum"),
        ("DEAD_CHAINS", "without the 2 of 4 chains", "chains-alive"),
    ],
)
def test_every_verdict_has_its_headline_and_advice(verdict, words, check):
    found = found_of()
    checks = tuple(
        replace(one, status="fail", detail="it was seen", advice="Mind it.")
        if one.name == check
        else one
        for one in found.checks
    )
    dead = 2 if verdict == "DEAD_CHAINS" else 0
    drift = Measured(5.0, 0.1) if verdict == "NOT_EQUILIBRATED" else found.drift
    bad = replace(found, verdict=verdict, checks=checks, dead_chains=dead, drift=drift)
    section = degeneracy_section(bad)
    assert section.verdict.status == "fail"
    assert words in section.verdict.headline
    assert section.verdict.sentences[:2] == (bad.advice, "It was seen.")
    shown = tiles(section)
    assert shown["Learning coefficient"].tone == "bad"
    assert shown["Learning coefficient"].detail == verdict.replace("_", " ")
    assert (shown["Drift"].tone == "bad") == (verdict == "NOT_EQUILIBRATED")
    assert (shown["Halving the step"].tone == "bad") == (verdict == "STEP_TOO_LARGE")
    lost = rows(tables(section)["Settings"])["chains lost"]
    assert (lost.text, lost.tone) == (str(dead), "bad" if dead else "")
    listed = next(block for block in section.blocks if isinstance(block, CheckList))
    assert [pair[1].name for pair in listed.raised] == [check]
    assert "Mind it." in page_of(section)


def test_a_warning_keeps_the_answer():
    found = found_of()
    checks = tuple(
        replace(one, status="warn", detail="20 % of the value", advice="Take more draws.")
        if one.name == "standard-error"
        else replace(one, status="pass")
        for one in found.checks
    )
    section = degeneracy_section(replace(found, checks=checks))
    assert section.verdict.status == "warn"
    assert section.verdict.sentences[0] == (
        "The standard error is 20 % of the value. Take more draws."
    )
    assert tiles(section)["Learning coefficient"].tone == "warn"


def test_what_is_not_known_is_a_dash():
    nothing = torch.tensor(torch.nan, dtype=torch.float64)
    unknown = Measured(torch.nan, torch.nan)
    found = replace(
        found_of(),
        standard_error=nothing,
        r_hat=torch.nan,
        effective_draws=torch.nan,
        drift=unknown,
        acceptance=torch.nan,
        slope=torch.nan,
        quadratic=None,
        crosschecks={},
        singular_fluctuation=None,
    )
    section = degeneracy_section(found)
    shown = tiles(section)
    assert "If the loss were quadratic" not in shown
    assert shown["R-hat"].value == MISSING
    assert shown["R-hat"].tone == "muted"
    assert "nan" not in page_of(section).lower().replace("nan or infinity", "")


def test_a_negative_answer_has_no_ratios():
    found = replace(found_of(), value=torch.tensor(-20.0, dtype=torch.float64))
    roads = tables(degeneracy_section(found))["Other roads to the number"]
    assert {row[2].text for row in roads.rows} == {MISSING}


def test_the_figure_has_the_traces_and_their_means():
    section = degeneracy_section(found_of())
    figure = next(block for block in section.blocks if isinstance(block, Figure))
    assert "n beta times the excess loss" in figure.svg
    assert "its mean so far" in figure.svg
    assert "extrapolated to step size 0" in figure.caption


def test_the_strip_is_in_view_however_far_from_the_lines():
    lines = [[1.0, 2.0, 1.0], [2.0, 1.0, 2.0]]
    plain = traces_svg([Panel("mean", lines)], "a")
    marked = traces_svg([Panel("mean", lines, strip=(800.0, 900.0))], "a")
    assert ">750<" in marked
    assert ">750<" not in plain


def test_without_matplotlib_the_page_has_tables(monkeypatch):
    monkeypatch.setattr(module, "can_draw", lambda: False)
    section = degeneracy_section(found_of())
    assert not [block for block in section.blocks if isinstance(block, Figure)]
    assert any("pushforward[plot]" in b.text for b in section.blocks if isinstance(b, Paragraph))
    assert len(tables(section)) == 3
