"""The section on thermalization: every verdict, curves that meet or not, and what is warned of."""

import json
import math
from dataclasses import replace

import pytest
import torch

from pushforward.report import thermalization as module
from pushforward.report.page import Figure, Paragraph, Report, Table, render, write
from pushforward.report.thermalization import thermalization_section
from pushforward.sampling.thermalization.thermalize import thermalize
from thermalising import Relaxation, linear_posterior, linear_problem

CACHE = {}


def report_of(seeds=8, budget=128, problem=None, starts=("informed", "zero", "prior"), **faults):
    key = (seeds, budget, problem is None, starts, *faults.items())
    if key not in CACHE:
        CACHE[key] = thermalize(
            linear_problem() if problem is None else problem,
            lambda instance: Relaxation(instance, **faults),
            seeds=seeds,
            budget=budget,
            starts=starts,
            records=64,
            progress=False,
        )
    return CACHE[key]


def tables(section):
    return {block.title: block for block in section.blocks if isinstance(block, Table)}


def tiles(section):
    return {tile.label: tile for tile in section.verdict.tiles}


def page_of(section):
    return render(Report("Title", "Subtitle", (section,)))


def test_a_pass_is_a_page(tmp_path):
    report = report_of()
    assert report.verdict == "PASS"
    section = thermalization_section(report, about="Exact <draws>.", notes=("No step size.",))
    assert section.verdict.status == "pass"
    assert tiles(section)["Verdict"].value == "PASS"
    assert tiles(section)["Verdict"].tone == "good"
    assert report.advice in section.verdict.sentences
    page = page_of(section)
    assert "Exact &lt;draws&gt;." in page
    assert "No step size." in page
    assert "nan" not in page.lower()
    found = tables(section)
    assert list(found) == [
        "How often chains thermalise",
        "What is known in advance",
        "Ranks of the truth among the draws",
        "Problem by problem",
    ]
    for table in found.values():
        assert all(len(row) == len(table.columns) for row in table.rows)
    row = found["How often chains thermalise"].rows[0]
    low, high = report.success["zero"].interval
    assert row[0].text == "zero"
    assert row[1].text == str(report.success["zero"].thermalized)
    ends = [float(part.split(" %")[0]) / 100 for part in row[5].text.split(" to ")]
    assert ends == pytest.approx([low, high], abs=1e-3)
    assert len(found["Problem by problem"].rows) == 8
    write(Report("Title", "Subtitle", (section,)), tmp_path / "index.html")
    saved = json.loads((tmp_path / "result.json").read_text())["sections"]["thermalization"]
    assert saved["results"]["verdict"] == "PASS"
    assert saved["results"]["notes"] == ["No step size."]


def test_slow_chains_fail_however_quiet_they_are():
    report = report_of(memory=0.9999)
    assert report.verdict in {"NOT_CONVERGED", "INCONCLUSIVE"}
    section = thermalization_section(report)
    assert (
        section.verdict.status == {"NOT_CONVERGED": "fail", "INCONCLUSIVE": "warn"}[report.verdict]
    )
    assert tiles(section)["Verdict"].value == report.verdict.replace("_", " ")
    assert tiles(section)["Thermalised, zero start"].tone in {"bad", "warn"}
    text = next(
        block.text
        for block in section.blocks
        if isinstance(block, Paragraph) and "usual checks" in block.title
    )
    assert "They pass when chains are stuck" in text
    quiet, away = report.quiet_failures
    if away:
        assert f"{quiet} of {away} runs" in text


def test_a_wrong_kernel_is_called_so():
    report = report_of(seeds=12, inflation=3.0)
    assert report.verdict == "KERNEL_BUG"
    section = thermalization_section(report)
    assert section.verdict.status == "fail"
    assert "another law" in section.verdict.headline
    assert tiles(section)["Known means that are missed"].tone == "bad"
    table = tables(section)["What is known in advance"]
    assert table.rows[0][-1].text == "missed"  # the worst comes first
    sizes = [abs(float(row[2].text.replace("\u2212", "-"))) for row in table.rows]
    assert sizes == sorted(sizes, reverse=True)


def test_the_curves_are_medians_relative_to_equilibrium():
    report = report_of()
    shown = list(report.instances)
    band = module._band(shown, "zero", relative=True)
    at = band.steps.index(shown[0].steps[0])
    ratios = sorted(result.curves["zero"][0] / result.equilibrium.mean for result in shown)
    assert band.middle[at] == pytest.approx((ratios[3] + ratios[4]) / 2)
    assert band.lower[at] <= band.middle[at] <= band.upper[at]
    assert band.middle[-1] == pytest.approx(1.0, abs=0.4)
    figure = next(b for b in thermalization_section(report).blocks if isinstance(b, Figure))
    for word in ("informed", "zero start", "prior start", "equilibrium", "steps of each chain"):
        assert word in figure.svg
    assert module._band(shown, "nowhere", relative=True) is None


def test_chains_that_left_are_not_drawn():
    shown = list(report_of().instances)[:3]
    lost = {**shown[0].curves, "zero": tuple(math.nan for _ in shown[0].steps)}
    shown[0] = replace(shown[0], curves=lost)
    band = module._band(shown, "zero", relative=False)
    rest = [result.curves["zero"][0] for result in shown[1:]]
    assert band.middle[0] == pytest.approx(sum(rest) / 2)
    assert module._band(shown[:1], "zero", relative=False) is None


def test_problems_without_label_noise_have_no_identities():
    report = report_of(seeds=2, problem=linear_problem(label_noise=False))
    section = thermalization_section(report)
    assert "What is known in advance" not in tables(section)
    assert any("labels have no noise" in sentence for sentence in section.verdict.sentences)
    page_of(section)


def test_one_start_alone_says_nothing_of_convergence():
    section = thermalization_section(report_of(seeds=2, starts=("informed",)))
    assert section.verdict.status == "warn"
    assert "How often chains thermalise" not in tables(section)
    page_of(section)


def test_draws_without_a_start_are_judged_by_ranks():
    def draw(instance, num_draws, seed):
        mean, factor = linear_posterior(instance)
        generator = torch.Generator().manual_seed(seed % 2**31)
        normals = torch.randn(num_draws, len(mean), generator=generator, dtype=mean.dtype)
        return instance.problem.space.unravel(mean + normals @ factor.T)

    report = thermalize(linear_problem(), draw, seeds=10, budget=50, progress=False)
    section = thermalization_section(report)
    assert not [block for block in section.blocks if isinstance(block, Figure)]
    assert list(tables(section)) == ["Ranks of the truth among the draws"]
    page_of(section)


def test_without_matplotlib_the_page_has_tables(monkeypatch):
    monkeypatch.setattr(module, "can_draw", lambda: False)
    section = thermalization_section(report_of())
    assert not [block for block in section.blocks if isinstance(block, Figure)]
    assert any("pushforward[plot]" in b.text for b in section.blocks if isinstance(b, Paragraph))
