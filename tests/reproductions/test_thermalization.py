"""The script of the thermalization study, on problems of a moment."""

import importlib
import json

import pytest
import torch

SMALL = ["--seeds", "2", "--steps", "40", "--chains", "2", "--examples", "12"]
SMALL += ["--features", "2", "--hidden", "2", "--test-examples", "20", "--hmc-steps", "2"]
SMALL += ["--noises", "0.5"]


@pytest.fixture
def script():
    return importlib.import_module("reproductions.thermalization")


def test_every_sampler_has_its_row(script, tmp_path, capsys):
    pytest.importorskip("tyro")
    assert script.main(["--output", str(tmp_path), *SMALL]) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "thermalization.md").read_text()
    assert table in printed
    for sampler in ("gibbs", "hmc-intermediate", "hmc-classical", "mala-classical"):
        assert f"| {sampler} | 0.5 |" in table
        report = json.loads((tmp_path / f"{sampler}-0.5-report.json").read_text())
        assert [instance["seed"] for instance in report["instances"]] == [0, 1]
    results = json.loads((tmp_path / "thermalization.json").read_text())
    assert all(set(found["starts"]) == {"zero", "prior"} for found in results)
    assert all(found["equilibrium error"] > 0 for found in results)


def test_what_is_finished_is_not_run_again(script, tmp_path, monkeypatch):
    pytest.importorskip("tyro")
    arguments = ["--output", str(tmp_path), *SMALL, "--samplers", "gibbs"]
    assert script.main(arguments) == 0
    monkeypatch.setattr(script, "thermalize", None)
    assert script.main(arguments) == 0


def test_steps_are_those_that_fit_the_time(script, tmp_path):
    options = script.Thermalization(
        tmp_path, ("gibbs",), (0.5,), seconds=0.02, examples=12, features=2, hidden=2
    )
    problem = script._problem(options, "gibbs", 0.5)
    kernel = script._kernel(options, "gibbs")
    steps = script._affordable(options, "gibbs", problem, kernel)
    assert steps >= 200
    assert json.loads((tmp_path / "gibbs-steps.json").read_text())["steps"] == steps
    assert script._affordable(options, "gibbs", problem, None) == steps


def test_labels_without_noise(script, tmp_path):
    options = script.Thermalization(tmp_path, label_noise=False, examples=9, features=2)
    noisy = script._problem(options, "gibbs", 0.1).instance(0)
    plain = script._problem(options, "hmc-classical", 0.1).instance(0)
    assert torch.allclose(noisy.targets, plain.targets)  # one data set for both posteriors
    assert not noisy.exact
    assert plain.problem.precisions["0.weight"] == 2.0
