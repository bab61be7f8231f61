"""`pushforward degeneracy` from end to end, its status, and its section of the report."""

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
from safetensors.torch import save_file
from torch import nn

import pushforward as pf
from pushforward.cli import main
from pushforward.cli.degeneracy import CODES
from pushforward.degeneracy.coefficient import Verdict
from pushforward.degeneracy.neighbourhood import Metric
from pushforward.degeneracy.settings import SamplerChoice

FACTORY = """
    from torch import nn

    def line():
        return nn.Linear(3, 1).double()

    def build():
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "degenerate_factories.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "degenerate_factories", raising=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(60, 1, generator=generator, dtype=torch.float64)
    design = torch.cat([x, torch.ones(60, 1, dtype=torch.float64)], 1)
    y = x.sum(1, keepdim=True) + noise
    fitted = torch.linalg.lstsq(design, y).solution[:, 0]
    save_file({"weight": fitted[None, :3].clone(), "bias": fitted[3:].clone()}, "line.safetensors")
    np.savez("line.npz", x=x.numpy(), y=y.numpy())
    labels = (x[:, 0] > 0).long()
    np.savez("classes.npz", x=x.numpy(), y=labels.numpy())
    return tmp_path


LINE = ["degenerate_factories:line", "--weights", "line.safetensors"]
DATA = ["--data", "line.npz", "--likelihood", "gaussian", "--noise-variance", "1"]
SHORT = ["--draws", "32", "--warmup", "16", "--chains", "2", "--localization", "1"]
CLASSES = ["--data", "classes.npz", "--likelihood", "categorical", "--realisable"]


def results(folder: Path) -> dict:
    saved = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return saved["sections"]["degeneracy"]


def fitted_line() -> nn.Module:
    from safetensors.torch import load_file

    net = nn.Linear(3, 1).double()
    net.load_state_dict(load_file("line.safetensors"))
    return net.eval()


def test_an_answer_has_a_page_and_status_0(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("degeneracy", *LINE, *DATA, "--sampler", "mala", "--chains", "4", "--draws", "300"),
        *("--warmup", "100", "--localization", "1", "--nbeta", "20", "--seed", "3"),
        *("--output", "out", "--title", "<How> degenerate"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Plan: 4 chains of 4 parameters by mala on 60 examples, at n beta 20" in printed
    assert "100 steps of warm-up and 300 draws; up to" in printed
    page = (workplace / "out" / "index.html").read_text(encoding="utf-8")
    assert "<h1>&lt;How&gt; degenerate</h1>" in page
    section = results(workplace / "out")
    assert section["headline"] in printed
    assert section["headline"] in page
    saved = json.loads((workplace / "out" / "result.json").read_text(encoding="utf-8"))
    assert saved["environment"]["Command"] == shlex.join(["pushforward", *arguments])

    # The same by hand: the command is a thin layer.
    with np.load("line.npz") as file:
        data = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    again = pf.learning_coefficient(
        fitted_line(),
        data,
        pf.Gaussian(noise_variance=1.0),
        sampler="mala",
        num_chains=4,
        num_draws=300,
        num_warmup=100,
        localization=1.0,
        nbeta=20.0,
        seed=3,
    )
    assert section["results"]["value"] == float(again)
    assert section["results"]["chain_values"] == again.chain_values.tolist()
    assert again.verdict == "OK"


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        (["--sampler", "langevin", "--step-size", "1e-6", "--draws", "64"], "NOT_EQUILIBRATED"),
        (["--sampler", "langevin", "--step-size", "0.2", "--draws", "100"], "STEP_TOO_LARGE"),
    ],
)
def test_the_status_tells_the_verdict(
    workplace: Path, capsys: pytest.CaptureFixture[str], options: list[str], verdict: str
) -> None:
    more = ["--warmup", "20", "--chains", "4", "--localization", "1"]
    assert main(["degeneracy", *LINE, *DATA, *more, *options]) == CODES[verdict]
    section = results(workplace / "degeneracy")
    assert section["results"]["verdict"] == verdict
    assert section["status"] == "fail"
    assert section["results"]["advice"] in capsys.readouterr().out
    page = (workplace / "degeneracy" / "index.html").read_text(encoding="utf-8")
    assert section["results"]["advice"] in page.replace("&#39;", "'")


def test_weights_that_were_not_trained_are_no_minimum(workplace: Path) -> None:
    more = ["--sampler", "mala", "--warmup", "100", "--draws", "100", "--chains", "2"]
    untrained = ["degenerate_factories:line", *DATA, *more, "--localization", "1"]
    assert main(["degeneracy", *untrained]) == CODES["NOT_A_MINIMUM"]
    assert results(workplace / "degeneracy")["results"]["value"] < 0


def test_every_verdict_has_a_status() -> None:
    assert set(CODES) == set(get_args(Verdict))
    assert CODES["OK"] == 0
    assert len(set(CODES.values())) == len(CODES)
    assert not {1, 2} & set(CODES.values())  # a defect, and input that was refused


def test_the_command_line_knows_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["degeneracy", "--help"]) == 0
    helped = "".join(capsys.readouterr().out.split())
    assert f"{{{','.join(get_args(SamplerChoice))}}}" in helped
    assert f"{{{','.join(get_args(Metric))}}}" in helped
    for code in CODES.values():
        assert str(code) in helped
    assert all(verdict in helped for verdict in CODES)


def test_what_was_chosen_is_said(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--chains", "2", "--draws", "16", "--warmup", "16"]
    main(["degeneracy", *LINE, *DATA, *more])
    assert "HMC on all data" in capsys.readouterr().out
    section = results(workplace / "degeneracy")["results"]
    assert section["sampler"] == "hmc"
    (note,) = [note for note in section["notes"] if "--localization" in note]
    assert f"{section['localization']:.4g}" in note
    page = (workplace / "degeneracy" / "index.html").read_text(encoding="utf-8")
    assert note in page


def test_minibatches_of_some_parameters(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--sampler", "sgld", "--batch-size", "20", "--subset", "2.*", "--seed", "1"]
    metric = ["--metric", "layerwise"]
    main(["degeneracy", "degenerate_factories:build", *CLASSES, *SHORT, *options, *metric])
    assert "2 chains of 10 parameters by sgld" in capsys.readouterr().out
    found = results(workplace / "degeneracy")["results"]
    assert (found["batch_size"], found["num_parameters"]) == (20, 10)
    assert (found["num_chains"], found["num_draws"]) == (2, 32)
    assert found["metric"] == "layerwise"
    page = (workplace / "degeneracy" / "index.html").read_text(encoding="utf-8")
    assert "the parameters 2.* of the network" in page
    assert "its own outputs as targets" in page


def test_a_run_goes_on_from_its_checkpoint(workplace: Path) -> None:
    command = ["degeneracy", *LINE, *DATA, *SHORT, "--sampler", "mala", "--checkpoint", "state"]
    main([*command, "--output", "a"])
    assert any((workplace / "state").iterdir())
    main([*command, "--output", "b"])
    first, second = (results(workplace / name)["results"]["chain_values"] for name in "ab")
    assert first == second
    assert main([*command, "--nbeta", "7"]) == 2  # another law


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([*LINE, "--data", "no.npz", *DATA[2:]], ["no.npz"]),
        ([*LINE, *DATA[:4]], ["--noise-variance"]),
        ([*LINE, *DATA[:3], "poisson", "--noise-variance", "1"], ["no noise variance"]),
        ([*LINE, *DATA, "--nbeta", "-1"], ["nbeta", "positive"]),
        ([*LINE, *DATA, "--localization", "0"], ["localization", "positive"]),
        ([*LINE, *DATA, "--chains", "1"], ["num_chains", "from 2 on"]),
        ([*LINE, *DATA, "--draws", "3"], ["num_draws"]),
        ([*LINE, *DATA, "--step-size", "-1"], ["step_size", "positive"]),
        ([*LINE, *DATA, "--batch-size", "0"], ["batch_size"]),
        ([*LINE, *DATA, "--subset", "head.*"], ["head.*"]),
        (
            [*LINE, *DATA, *SHORT, "--sampler", "langevin", "--step-size", "1e9"],
            ["finite", "smaller step_size"],
        ),
        ([*LINE, *DATA, "--output", "line.npz/x"], ["cannot be written"]),
    ],
)
def test_bad_input_is_explained_without_traceback(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["degeneracy", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    for part in parts:
        assert part in captured.err


# --- the section of the report --------------------------------------------------------------------

LAW = ["degenerate_factories:build", "--data", "classes.npz", "--key", "x", "--samples", "64"]
TRAINED = ["--likelihood", "categorical", "--train", "classes.npz", "--test", "classes.npz"]


def test_the_report_has_the_section_when_it_is_asked_for(workplace: Path) -> None:
    few = ["--draws", "4", "--degeneracy-draws", "16", "--localization", "7"]
    assert main(["report", *LAW, *TRAINED, *few, "--degeneracy", "langevin"]) == 0
    found = results(workplace / "report")["results"]
    assert (found["sampler"], found["num_draws"], found["localization"]) == ("langevin", 16, 7.0)
    page = (workplace / "report" / "index.html").read_text(encoding="utf-8")
    order = [page.index(f'id="{key}"') for key in ("expected-output", "uncertainty", "degeneracy")]
    assert order == sorted(order)


def test_a_report_without_training_data_refuses_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *LAW, "--degeneracy", "auto"]) == 2
    assert "--train" in capsys.readouterr().err
