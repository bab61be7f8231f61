"""The demonstration: it trains, and reports through the command that users have."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pushforward.cli import main
from pushforward.cli.demo import digits_classifier, prepare_digits

pytest.importorskip("sklearn")


def test_training_depends_on_the_seed_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = prepare_digits(tmp_path / "a", seed=2, epochs=1)
    torch.manual_seed(9)
    second = prepare_digits(tmp_path / "b", seed=2, epochs=1)
    weights = load_file(first.weights), load_file(second.weights)
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert first.accuracy == second.accuracy
    other = load_file(prepare_digits(tmp_path / "c", seed=3, epochs=1).weights)
    assert not torch.equal(weights[0]["0.weight"], other["0.weight"])


def test_a_few_epochs_learn_the_digits(tmp_path: Path) -> None:
    run = prepare_digits(tmp_path, epochs=6)
    # Chance is 0.1 with a standard deviation of 0.014 for 449 digits.
    assert run.num_test == 449
    assert run.accuracy > 0.8
    with np.load(run.data) as data:
        assert data["x"].shape == (1797, 64)
        assert data["x"].min() == 0
        assert data["x"].max() == 1
    digits_classifier().load_state_dict(load_file(run.weights))
    lengths = {}
    for path in (run.train, run.validation, run.test):
        with np.load(path) as data:
            lengths[path.name] = len(data["y"])
            assert data["x"].shape == (len(data["y"]), 64)
    assert lengths == {"train.npz": 1348, "validation.npz": 149, "test.npz": 300}


def test_demo_writes_the_report_of_its_own_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    arguments = ["--output", str(folder), "--samples", "256", "--epochs", "1", "--draws", "4"]
    assert main(["demo", *arguments, "--steps", "16", "--problems", "2"]) == 0
    printed = capsys.readouterr().out
    assert str(folder / "index.html") in printed
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "1,797 examples in digits.npz" in page
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    outputs = result["sections"]["expected-output"]["results"]["outputs"]
    assert len(outputs["mean"]) == 10
    evaluation = result["sections"]["uncertainty"]["results"]["evaluation"]
    assert evaluation["num_examples"] == 300
    assert len(evaluation["rows"]) == 4
    assert page.count('class="thumb"') == 12
    degeneracy = result["sections"]["degeneracy"]["results"]
    assert (degeneracy["num_draws"], degeneracy["num_examples"]) == (16, 1348)
    assert degeneracy["verdict"] in printed
    versions = result["sections"]["function-space"]["results"]["versions"]
    assert [row["name"] for row in versions] == [
        *("30 % pruned", "50 % pruned", "70 % pruned", "8 bits", "4 bits"),
    ]
    assert all(row["distance"] > 0 for row in versions)
    assert (folder / "posterior.safetensors").exists()

    found = json.loads((folder / "thermalization" / "result.json").read_text(encoding="utf-8"))
    section = found["sections"]["thermalization"]["results"]
    assert len(section["instances"]) == 2
    assert section["verdict"] in printed
    assert str(folder / "thermalization" / "index.html") in printed

    command = printed.split("Make it again: ")[1].splitlines()[0]
    again = shlex.split(command)[1:]
    again[again.index("--output") + 1] = str(tmp_path / "again")
    assert main(again) == 0
    repeated = json.loads((tmp_path / "again" / "result.json").read_text(encoding="utf-8"))
    assert repeated["sections"]["expected-output"]["results"]["outputs"] == outputs
    again_rows = repeated["sections"]["uncertainty"]["results"]["evaluation"]["rows"]
    assert again_rows == evaluation["rows"]
    assert repeated["sections"]["degeneracy"]["results"]["value"] == degeneracy["value"]


def test_folder_that_cannot_be_made_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file" / "demo"), "--epochs", "0"]) == 2
    assert "cannot be written" in capsys.readouterr().err
