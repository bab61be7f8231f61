"""`pushforward distance` from end to end, and its section of the report."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pushforward as pf
from pushforward.cli import main
from pushforward.cli.distance import EstimatorName, MetricName
from pushforward.function_space.compression import pruned, quantised
from pushforward.function_space.estimators import Estimator
from pushforward.function_space.metrics import Metric

FACTORY = """
    from torch import nn

    def build(width=12):
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).double()

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build()

        def forward(self, x):
            return self.inner(x) * x.sum(1, keepdim=True)
"""
NAME = "distant_factories:build"


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3)).double()


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "distant_factories.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "distant_factories", raising=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        reference, other = network(0), network(1)
    save_file(reference.state_dict(), "reference.safetensors")
    save_file(other.state_dict(), "other.safetensors")
    broken = {name: torch.full_like(t, torch.inf) for name, t in other.state_dict().items()}
    save_file(broken, "broken.safetensors")
    save_file({"weight": torch.zeros(2, 2)}, "foreign.safetensors")
    labels = (x[:, 0] > 0).long().numpy()
    np.savez("data.npz", x=x.numpy(), y=labels, odd=2 * labels, wide=x[:, [0, 1, 2, 3, 0]].numpy())
    return tmp_path


REFERENCE = [NAME, "--weights", "reference.safetensors"]
DATA = ["--data", "data.npz"]


def loaded(name: str = "reference") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        net = network(0)
    net.load_state_dict(load_file(f"{name}.safetensors"))
    return net.requires_grad_(False).eval()


def inputs() -> torch.Tensor:
    with np.load("data.npz") as file:
        return torch.from_numpy(file["x"])


def results(folder: str = "distance") -> dict:
    saved = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    return saved["sections"]["function-space"]


def made(*options: str) -> None:
    assert main(["distance", *REFERENCE, *DATA, "--save-summary", "s.safetensors", *options]) == 0


def test_a_summary_is_kept_and_stands_for_the_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made()
    printed = capsys.readouterr().out
    assert "over 200 examples" in printed
    assert "Summary: s.safetensors" in printed
    assert not Path("distance").exists()  # nothing was measured
    Path("data.npz").unlink()
    arguments = [
        *("distance", NAME, "--summary", "s.safetensors", "--other", "other.safetensors"),
        *("reference.safetensors", "--prune", "0.5", "--quantise", "4", "8"),
        *("--json", "numbers.json", "--title", "<How> far"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    page = Path("distance/index.html").read_text(encoding="utf-8")
    assert "<h1>&lt;How&gt; far</h1>" in page
    section = results()
    assert section["headline"] in printed
    saved = json.loads(Path("numbers.json").read_text(encoding="utf-8"))
    assert saved["command"] == shlex.join(["pushforward", *arguments])
    assert saved["versions"] == section["results"]["versions"]

    # The same by hand: the command is a thin layer.
    summary = pf.FunctionSummary.load("s.safetensors", network(5))
    net = loaded()
    versions = {
        "other.safetensors": loaded("other"),
        "reference.safetensors": net,
        "50 % pruned": pruned(net, 0.5),
        "4 bits": quantised(net, 4),
        "8 bits": quantised(net, 8),
    }
    found = {row["name"]: row for row in saved["versions"]}
    assert list(found) == list(versions)
    for name, other in versions.items():
        estimate = summary.estimate(other)
        assert found[name]["distance"] == float(estimate)
        assert found[name]["standard_error"] == float(estimate.standard_error)
        assert found[name]["distance_on_data"] is None
    assert found["reference.safetensors"]["distance"] == 0


def test_with_data_the_estimates_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--other", "other.safetensors", "--metric", "euclidean", "fisher"]
    assert main(["distance", *REFERENCE, *DATA, *options, "--outputs", "0", "2"]) == 0
    printed = capsys.readouterr().out
    assert "on the data" in printed
    rows = results()["results"]["versions"]
    assert [row["metric"] for row in rows] == ["euclidean", "fisher"]
    old, new = (net(inputs())[:, [0, 2]] for net in (loaded(), loaded("other")))
    truth = float((new - old).square().sum(1).mean()) / 2
    assert rows[0]["distance_on_data"] == pytest.approx(truth)
    assert results()["results"]["outputs"] == [0, 2]
    made()
    assert main(["distance", NAME, "--summary", "s.safetensors", *DATA, *options]) == 0
    again = results()["results"]["versions"]
    whole = float((loaded("other")(inputs()) - loaded()(inputs())).square().sum(1).mean()) / 2
    assert again[0]["distance_on_data"] == pytest.approx(whole)


def test_what_is_kept_is_chosen_when_the_summary_is_made() -> None:
    made("--classes", "targets", "--layer-moments", "--input-moments", "2")
    summary = pf.FunctionSummary.load("s.safetensors", network(5))
    assert (summary.num_components, summary.input_moments, summary.layer_moments) == (2, 2, True)
    made("--clusters", "3", "--input-moments", "diagonal")
    summary = pf.FunctionSummary.load("s.safetensors", network(5))
    assert (summary.num_components, summary.input_moments) == (3, "diagonal")
    assert not summary.layer_moments


def test_the_estimator_is_the_one_asked_for() -> None:
    made()
    options = ["--summary", "s.safetensors", "--prune", "0.5", "--estimator", "reference"]
    assert main(["distance", NAME, *options]) == 0
    summary = pf.FunctionSummary.load("s.safetensors", network(5))
    expected = summary.distance(pruned(loaded(), 0.5), estimator="reference")
    (row,) = results()["results"]["versions"]
    assert row["distance"] == pytest.approx(float(expected))
    assert results()["results"]["estimator"] == "reference"


def test_files_of_one_name_are_told_apart() -> None:
    Path("a").mkdir()
    Path("a/other.safetensors").write_bytes(Path("reference.safetensors").read_bytes())
    files = ["--other", "other.safetensors", "a/other.safetensors"]
    assert main(["distance", *REFERENCE, *DATA, *files]) == 0
    rows = {row["name"]: row["distance"] for row in results()["results"]["versions"]}
    assert rows["a/other.safetensors"] == 0
    assert rows["other.safetensors"] > 0


def test_the_command_line_knows_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(get_args(EstimatorName)) == {"auto", *get_args(Estimator)}
    assert get_args(MetricName) == get_args(Metric)
    assert main(["distance", "--help"]) == 0
    helped = "".join(capsys.readouterr().out.split())
    assert f"{{{','.join(get_args(EstimatorName))}}}" in helped


PRUNE = ["--prune", "0.5"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([*REFERENCE, *PRUNE], ["--data and --summary"]),
        ([*REFERENCE, *DATA], ["--other", "--save-summary"]),
        ([*REFERENCE, "--data", "no.npz", *PRUNE], ["no.npz"]),
        ([NAME, "--summary", "no.safetensors", *PRUNE], ["no.safetensors"]),
        ([NAME, "--summary", "other.safetensors", *PRUNE], ["other.safetensors"]),
        ([NAME, "--summary", "x", "--clusters", "2", *PRUNE], ["--clusters", "already"]),
        ([*REFERENCE, *DATA, "--prune", "1.5"], ["--prune", "from 0 to 1"]),
        ([*REFERENCE, *DATA, "--quantise", "1"], ["--quantise", "from 2 to 16"]),
        ([*REFERENCE, *DATA, "--other", "no.safetensors"], ["no.safetensors", "no such file"]),
        ([*REFERENCE, *DATA, "--other", "foreign.safetensors"], ["foreign", "do not belong"]),
        ([*REFERENCE, *DATA, "--other", "broken.safetensors"], ["broken.safetensors", "NaN"]),
        ([*REFERENCE, *DATA, *PRUNE, "--outputs", "3"], ["--outputs", "0 to 2."]),
        ([*REFERENCE, *DATA, *PRUNE, "--input-moments", "some"], ["--input-moments", "some"]),
        (
            [*REFERENCE, *DATA, *PRUNE, "--estimator", "anchored"],
            ["--estimator anchored", "--layer-moments"],
        ),
        (
            [*REFERENCE, *DATA, *PRUNE, "--clusters", "2", "--classes", "targets"],
            ["--classes and --clusters"],
        ),
        ([*REFERENCE, *DATA, *PRUNE, "--clusters", "0"], ["--clusters", "positive"]),
        ([*REFERENCE, *DATA, *PRUNE, "--clusters", "999"], ["--clusters", "1 to the number"]),
        ([*REFERENCE, *DATA, *PRUNE, "--metric", "kl", "kl"], ["--metric", "once"]),
        ([*REFERENCE, *DATA, *PRUNE, "--metric", "kl", "--outputs", "1"], ["--metric", "there is"]),
        ([*REFERENCE, *DATA, *PRUNE, "--seed", "-1"], ["--seed", "from 0 on"]),
        ([*REFERENCE, *DATA, *PRUNE, "--scale", "0"], ["--scale"]),
        ([*REFERENCE, *DATA, *PRUNE, "--key", "wide"], ["data.npz", "--input-shape", "--key"]),
        (
            [*REFERENCE, *DATA, *PRUNE, "--classes", "targets", "--target-key", "odd"],
            ["--classes", "without gaps"],
        ),
        (
            ["distant_factories:Odd", *DATA, *PRUNE, "--estimator", "gated"],
            ["--estimator gated", "--estimator synthetic"],
        ),
        ([*REFERENCE, *DATA, *PRUNE, "--json", "data.npz/x/y.json"], ["cannot be written"]),
        ([*REFERENCE, *DATA, *PRUNE, "--json", "folder"], ["folder", "cannot be written"]),
        ([*REFERENCE, *DATA, "--save-summary", "folder"], ["folder", "cannot be written"]),
        ([*REFERENCE, *DATA, *PRUNE, "--output", "data.npz/x"], ["cannot be written"]),
    ],
)
def test_bad_input_is_explained_before_the_pass_over_the_data(
    arguments: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError

    Path("folder").mkdir()
    monkeypatch.setattr("pushforward.function_space.summarize.batch_statistics", never)
    assert main(["distance", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    for part in parts:
        assert part in captured.err


def test_moments_of_the_layers_that_a_summary_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    made()
    options = ["--summary", "s.safetensors", *PRUNE, "--estimator", "anchored"]
    assert main(["distance", NAME, *options]) == 2
    assert "Make it with --layer-moments." in capsys.readouterr().err


def test_a_summary_of_one_network_serves_any_estimator_that_takes_it() -> None:
    odd = "distant_factories:Odd"
    assert main(["distance", odd, *DATA, *PRUNE, "--estimator", "synthetic"]) == 0
    options = [*DATA, *PRUNE, "--layer-moments", "--estimator", "anchored", "--metric", "kl"]
    assert main(["distance", *REFERENCE, *options]) == 0


@pytest.mark.parametrize(
    ("arguments", "option", "kept"),
    [
        ([*DATA, "--save-summary", "data.npz"], "--save-summary", "data.npz"),
        ([*DATA, "--save-summary", "./folder/../data.npz"], "--save-summary", "data.npz"),
        ([*DATA, "--save-summary", "link.npz"], "--save-summary", "--data"),
        ([*DATA, *PRUNE, "--json", "hard.npz"], "--json", "--data"),
        ([*DATA, "--save-summary", "reference.safetensors"], "--save-summary", "--weights"),
        ([*DATA, *PRUNE, "--json", "data.npz"], "--json", "--data"),
        (
            [*DATA, "--other", "other.safetensors", "--save-summary", "other.safetensors"],
            "--save-summary",
            "--other",
        ),
        (["--summary", "s", *PRUNE, "--json", "s"], "--json", "--summary"),
        (["--summary", "s", *PRUNE, "--save-summary", "s"], "--save-summary", "--summary"),
        ([*DATA, *PRUNE, "--save-summary", "new", "--json", "new"], "--json", "--save-summary"),
        ([*DATA, *PRUNE, "--json", "distance/result.json"], "--json", "--output"),
        (["--data", "distance/index.html", *PRUNE], "--output", "--data"),
    ],
)
def test_nothing_that_is_read_or_written_is_overwritten(
    arguments: list[str], option: str, kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("folder", "distance"):
        Path(name).mkdir()
    for name in ("s", "distance/index.html"):
        Path(name).write_bytes(Path("data.npz").read_bytes())
    Path("link.npz").symlink_to("data.npz")
    Path("hard.npz").hardlink_to("data.npz")
    before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    assert main(["distance", *REFERENCE, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option}: ")
    assert kept in error
    assert {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()} == before


def test_a_file_of_another_run_is_written_anew() -> None:
    for _ in range(2):
        made(*PRUNE, "--json", "numbers.json")


def test_a_summary_belongs_to_one_network_and_its_weights(
    capsys: pytest.CaptureFixture[str],
) -> None:
    made()
    kept = ["--summary", "s.safetensors", *PRUNE]
    assert main(["distance", *REFERENCE, *kept]) == 0  # the same weights, said once more
    assert main(["distance", NAME, "--weights", "other.safetensors", *kept]) == 2
    assert "--other other.safetensors" in capsys.readouterr().err
    assert main(["distance", NAME, "--factory-options", '{"width": 5}', *kept]) == 2
    assert "another network" in capsys.readouterr().err
    damaged = bytearray(Path("s.safetensors").read_bytes())
    damaged[-100] ^= 1
    Path("s.safetensors").write_bytes(damaged)
    assert main(["distance", NAME, *kept]) == 2
    assert "s.safetensors" in capsys.readouterr().err


# --- the section of the report --------------------------------------------------------------------


def test_the_report_has_the_section_when_it_is_asked_for() -> None:
    law = [*REFERENCE, *DATA, "--key", "x", "--samples", "64"]
    assert main(["report", *law, *PRUNE, "--quantise", "4"]) == 0
    rows = results("report")["results"]["versions"]
    assert [row["name"] for row in rows] == ["50 % pruned", "4 bits"]
    net = loaded()
    expected = float(pf.summarize(net, inputs()).distance(pruned(net, 0.5)))
    assert rows[0]["distance"] == pytest.approx(expected)
    page = Path("report/index.html").read_text(encoding="utf-8")
    assert page.index('id="expected-output"') < page.index('id="function-space"')


def test_a_report_without_examples_refuses_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *REFERENCE, "--standard", "4", "--samples", "64", *PRUNE]) == 2
    assert "--prune" in capsys.readouterr().err
