"""Learning coefficients at equal time."""

import json
import sys

import pytest
import torch


@pytest.fixture
def coefficients(benchmark, monkeypatch):
    """The benchmark of learning coefficients, without its processes."""
    script = benchmark("learning_coefficient")
    monkeypatch.setattr(script, "CHECKPOINTS", (2, 3))
    monkeypatch.setattr(
        script, "measure", lambda _, folder, **job: script.perform(script.complete(folder, job))
    )
    return script


def test_learning_coefficients_are_compared_at_equal_time(coefficients, tmp_path):
    options = ["--examples", "40", "--chains", "2", "--steps", "16", "--repeats", "1"]
    options += ["--seconds", "0.1", "--truth", "1", "0.1", "2", "0.1"]
    options += ["--batches", "8", "--draws", "16", "--output", str(tmp_path)]
    assert coefficients.main([*options, "--parts", "cost", "batch"]) == 0
    assert coefficients.main([*options, "--parts", "error"]) == 0  # adds to what is there
    found = json.loads((tmp_path / "learning_coefficient.json").read_text("utf-8"))
    (row,) = found["cost"]
    assert row["us"] > 0
    assert [row["batch"] for row in found["batch"]] == [8]
    for row, truth in zip(found["error"]["rows"], (1, 2), strict=True):
        assert row["truth"] == truth
        assert row["error"] == pytest.approx(abs(row["values"][0] - truth))
    report = (tmp_path / "learning_coefficient.md").read_text("utf-8")
    assert report.count("| ours |") == 4


def test_learning_coefficients_ask_for_a_rival_that_works(benchmark, tmp_path):
    script = benchmark("learning_coefficient")
    script.write_problem(tmp_path, (1,), 40)
    job = {"part": "cost", "side": script.RIVALS[0], "checkpoint": 1, "chains": 2, "steps": 2}
    with pytest.raises(SystemExit, match="devinterp"):
        script.measure(sys.executable, tmp_path, **job)


def test_cut_batches_hold_every_digit_once(benchmark):
    script = benchmark("learning_coefficient")
    x = torch.arange(10)
    data = torch.utils.data.TensorDataset(x, -x)
    loader = script.CutBatches(data, batch_size=5, shuffle=True, drop_last=True)
    inputs, targets = (torch.cat(part) for part in zip(*loader, strict=True))
    assert inputs.sort().values.tolist() == x.tolist()
    assert torch.equal(targets, -inputs)
