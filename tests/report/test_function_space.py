"""The section on distances: its numbers, what is not known, and no matplotlib."""

import json
import math

import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.function_space.compression import pruned, quantised
from pushforward.function_space.plots import named_calibration
from pushforward.function_space.versions import measure_versions
from pushforward.report import function_space as module
from pushforward.report.distance_figures import Dot, calibration_dots_svg, distances_svg
from pushforward.report.formatting import MISSING, number, with_error
from pushforward.report.function_space import function_space_section, percent
from pushforward.report.page import CheckList, Figure, Paragraph, Report, Table, render, write
from pushforward.runs.plan import format_bytes

CACHE = {}


def network():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4)).double()
    return net.requires_grad_(False)


def found_of(checked=True, names=("half", "4 bits", "same"), **options):
    key = (checked, names, *options.items())
    if key not in CACHE:
        net, generator = network(), torch.Generator().manual_seed(0)
        inputs = torch.randn(300, 6, generator=generator, dtype=torch.float64)
        versions = {"half": pruned(net, 0.5), "4 bits": quantised(net, 4), "same": net}
        CACHE[key] = measure_versions(
            pf.summarize(net, inputs),
            {name: versions[name] for name in names},
            estimator="gated",
            data=inputs if checked else None,
            **options,
        )
    return CACHE[key]


def tables(section):
    return {block.title: block for block in section.blocks if isinstance(block, Table)}


def tiles(section):
    return {tile.label: tile for tile in section.verdict.tiles}


def page_of(section):
    return render(Report("Title", "Subtitle", (section,)))


def test_an_answer_is_a_page(tmp_path):
    found = found_of(metrics=("euclidean", "kl"))
    section = function_space_section(found, about="A <line>.", notes=("By choice.",))
    assert section.verdict.status == found.status
    page = page_of(section)
    assert "A &lt;line&gt;." in page
    assert "By choice." in page
    assert "nan" not in page.lower()
    for table in tables(section).values():
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert len([block for block in section.blocks if isinstance(block, Figure)]) == 2
    write(Report("Title", "Subtitle", (section,)), tmp_path / "index.html")
    saved = json.loads((tmp_path / "result.json").read_text())["sections"]["function-space"]
    assert saved["results"]["versions"] == found.to_dict()["versions"]
    assert saved["results"]["notes"] == ["By choice."]


def test_the_verdict_names_the_nearest_and_the_farthest():
    found = found_of()
    section = function_space_section(found)
    half, four, _ = found.rows
    far = max((half, four), key=lambda row: float(row.estimate))
    value = with_error(float(far.estimate), float(far.estimate.standard_error))
    assert section.verdict.headline == (
        f"Nearest: same, the same function. Farthest: {far.name}, {value} away, "
        f"{percent(far.share)} of the outputs' variance."
    )
    shown = tiles(section)
    assert list(shown) == ["Farthest", "Nearest", "Typical error", "Kept of the data"]
    assert shown["Farthest"].value == percent(far.share)
    assert shown["Kept of the data"].value == format_bytes(found.summary.num_bytes)
    assert "300 examples" in shown["Kept of the data"].detail
    logs = named_calibration(found.summary, "euclidean", "gated").values()
    typical = math.exp(math.sqrt(sum(log**2 for log in logs) / len(logs)))
    assert shown["Typical error"].value.split("\u00a0")[0] == number(typical, 3)


def test_one_version_is_both():
    section = function_space_section(found_of(names=("half",), metrics=("kl",), checked=False))
    assert "Nearest" not in section.verdict.headline
    assert "Nearest" not in tiles(section)
    assert tiles(section)["Farthest"].detail == "kl distance: half"


def test_the_tables_have_the_numbers():
    found = found_of(metrics=("euclidean", "kl"))
    shown = tables(function_space_section(found))
    assert list(shown) == ["Distances", "Estimate over truth", "What is kept"]
    distances = shown["Distances"]
    assert distances.columns[1] == "metric"
    for cells, row in zip(distances.cells, found.rows, strict=True):
        assert (cells[0].text, cells[1].text) == (row.name, row.metric)
        assert cells[2].text == with_error(float(row.estimate), float(row.estimate.standard_error))
        assert cells[3].text == percent(row.share)
        assert cells[4].text == number(row.truth)
    assert distances.cells[4][5].text == MISSING  # 0 over 0
    share = float(distances.cells[0][5].text.split("\u00a0")[0])
    assert share == pytest.approx(float(found.rows[0].estimate) / found.rows[0].truth, rel=0.05)
    ratios = named_calibration(found.summary, "kl", "gated")
    assert [row[0].text for row in shown["Estimate over truth"].cells] == [
        *ratios,
        "typical factor",
    ]
    kept = {row[0].text: row[1].text for row in shown["What is kept"].cells}
    assert kept == {name: f"{size:,}" for name, size in found.summary.sizes.items()}
    assert "No example is kept" in shown["What is kept"].note


def test_without_data_nothing_is_said_about_them():
    section = function_space_section(found_of(checked=False))
    assert tables(section)["Distances"].columns == (
        "version",
        "distance",
        "of the outputs' variance",
    )
    assert not [text for text in section.verdict.sentences if "On the data" in text]
    figure = next(block for block in section.blocks if isinstance(block, Figure))
    assert "diamonds" not in figure.caption
    assert "on the data" not in figure.svg


def test_a_warning_has_its_advice():
    found = found_of(metrics=("kl", "euclidean"))
    section = function_space_section(found)
    raised = [(metric, check) for metric, check in found.checks if check.status == "warn"]
    for metric, check in raised:
        assert f"For {metric}: {check.detail}. {check.advice}" in section.verdict.sentences
    listed = next(block for block in section.blocks if isinstance(block, CheckList))
    assert listed.raised == raised


def test_distances_of_zero_have_no_point():
    dots = [Dot("a", 0.0, 0.0, 0.0), Dot("b", 2.0, 0.5, 3.0), Dot("c", 500.0, 1.0)]
    svg = distances_svg({"kl": dots}, "key")
    assert ">a<" in svg
    assert ">kl<" in svg
    assert ">on the data<" in svg
    assert distances_svg({"kl": dots[:1]}, "key")  # nothing but zeros


def test_the_calibration_is_about_one():
    svg = calibration_dots_svg({"kl": {"noise": 0.01}, "fisher": {"noise": -0.5}}, "key")
    assert ">noise<" in svg
    assert ">1<" in svg


def test_without_matplotlib_the_page_has_tables(monkeypatch):
    monkeypatch.setattr(module, "can_draw", lambda: False)
    section = function_space_section(found_of())
    assert not [block for block in section.blocks if isinstance(block, Figure)]
    assert any("pushforward[plot]" in b.text for b in section.blocks if isinstance(b, Paragraph))
    assert len(tables(section)) == 3
