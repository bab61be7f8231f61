"""Perceptrons on a few digits, moved a little."""

import importlib
import json

import pytest


@pytest.fixture
def study(monkeypatch):
    """Few digits and few changes."""
    module = importlib.import_module("reproductions.function_space_distance.nets")
    x, y, test_x, test_y = module.load_digits()
    monkeypatch.setattr(module, "load_digits", lambda: (x[:100], y[:100], test_x, test_y))
    monkeypatch.setattr(module, "NOISES", (0.01, 0.1))
    return module


@pytest.fixture
def main():
    pytest.importorskip("tyro")
    return importlib.import_module("reproductions.function_space_distance.__main__").main


def test_methods_are_compared_with_the_truth(study, main, tmp_path, capsys, monkeypatch):
    call = ["nets", "--output", str(tmp_path), "--steps", "2", "--metrics", "euclidean", "kl"]
    call += ["--draws", "20", "--epochs", "1", "--seeds", "0", "--without", "gated"]
    call += ["--methods", "gated", "synthetic, 10", "subset", "EK-FAC"]
    assert main(call) == 0
    found = json.loads((tmp_path / "digits-0.json").read_text())
    changes = list(found["truth"]["euclidean"])
    assert changes[:3] == ["noise 0.01", "noise 0.1", "pixels 0, 2 steps"]
    assert len(changes) == 2 + 2 * 3
    assert not {"gaussian", "gated"} & set(found["methods"])
    assert "gated, 10 classes" in found["methods"]
    for name, row in found["methods"].items():
        assert row["bytes"] > 0
        for metric in ("euclidean", "kl"):
            assert len(row[metric]["values"]) == len(row[metric]["cosines"]) == len(changes)
            assert len(row[metric]["errors"]) in ({0} if "FAC" in name else {0, len(changes)})
            assert row[metric]["seconds"] > 0
    # All examples are a subset that is the whole.
    subset = found["methods"]["subset of 200"]["euclidean"]
    assert subset["values"] == pytest.approx(list(found["truth"]["euclidean"].values()), rel=1e-4)
    assert min(subset["cosines"]) > 0.999
    table = (tmp_path / "digits.md").read_text()
    assert "| subset of 200 | 25.6 kB | 0.00 | 0.00 | 0.00 | 0.00 | 1.00 | 1.000 | 1.000 |" in table
    assert table in capsys.readouterr().out
    monkeypatch.setattr(study, "methods", lambda *_, **__: dict.fromkeys(found["methods"]))
    assert main(call) == 0  # what is finished is not run again
    assert (tmp_path / "digits.md").read_text() == table
