"""The comparison of function-space distances, on networks and images of a moment."""

import importlib
import json
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--metrics", "euclidean", "kl", "--draws", "20", "--epochs", "1", "--seeds", "0"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("reproductions.function_space_distance")


@pytest.fixture
def few_digits(script, monkeypatch):
    x, y, test_x, test_y = script._digits()
    monkeypatch.setattr(script, "_digits", lambda: (x[:100], y[:100], test_x, test_y))
    monkeypatch.setattr(script, "NOISES", (0.01, 0.1))


@pytest.fixture
def images(tmp_path):
    """A data folder with a few noise images."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        arrays[f"x_{split}"] = rng.integers(0, 255, size=(60, 28, 28)).astype(np.uint8)
        arrays[f"y_{split}"] = (np.arange(60) % 10).astype(np.uint8)
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path


@pytest.mark.usefixtures("few_digits")
def test_methods_are_compared_with_the_truth(script, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tyro")
    arguments = ["nets", "--output", str(tmp_path), "--steps", "2", *FEW, "--without", "gated"]
    arguments += ["--methods", "gated", "synthetic, 10", "subset", "EK-FAC"]
    assert script.main(arguments) == 0
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
    monkeypatch.setattr(script, "methods", lambda *_, **__: dict.fromkeys(found["methods"]))
    assert script.main(arguments) == 0  # what is finished is not run again
    assert (tmp_path / "digits.md").read_text() == table


def test_compression_is_compared_with_the_accuracy_lost(script, tmp_path, images):
    pytest.importorskip("tyro")
    arguments = ["compression", "--output", str(tmp_path), "--channels", "1", "1", *FEW]
    arguments += ["--data-dir", str(images), "--pooling", "avg", "--num-train", "60"]
    assert script.main([*arguments, "--methods", "synthetic, diagonal", "diagonal"]) == 0
    found = json.loads((tmp_path / "compression-avg-0.json").read_text())
    assert list(found["accuracy lost"]) == list(found["truth"]["kl"])
    assert len(found["accuracy lost"]) == 7
    assert not any("failure" in row for row in found["methods"].values())
    table = (tmp_path / "compression-avg.md").read_text()
    assert "| 90% pruned |" in table
    assert "| diagonal | " in table


def test_a_method_that_refuses_says_why(script, tmp_path, images):
    def refuse():
        raise script.PushforwardError("too wide", where="estimator", advice="Take another.")

    options = script.Compression(tmp_path, channels=(2, 2), data_dir=images)
    net = script._convolutional(options, 0)
    found = script._fill(
        tmp_path / "file.json",
        {"pooling": "max", "metrics": ["kl"]},
        lambda: {"accuracy": 0.5, "accuracy lost": {"noise": 0.1}},
        lambda: {"other": refuse, "unwanted": refuse},
        lambda: {"noise": {n: 1.1 * p.detach() for n, p in net.named_parameters()}},
        lambda name: name != "unwanted",
        exact=lambda: script._exact(net, torch.ones(3, 1, 28, 28)),
        metrics=["kl"],
        slope=False,
    )
    assert list(found["methods"]) == ["other"]
    assert "too wide" in found["methods"]["other"]["failure"]
    assert "too wide" in script._compression_table([found])


def test_changes_are_what_they_say(script, tmp_path):
    options = script.Compression(tmp_path)
    net = script._convolutional(options, 0)
    changes = script._compressed(net)
    for name, weights in changes.items():
        matrices = torch.cat([w.flatten() for w in weights.values() if w.dim() > 1])
        if "pruned" in name:
            share = float(name.split("%")[0]) / 100
            assert float((matrices == 0).double().mean()) == pytest.approx(share, abs=2e-3)
        else:
            bits = int(name.split()[0])
            for weight in weights.values():
                if weight.dim() > 1:
                    assert len(weight.unique()) <= 2**bits
    biases = [n for n, p in net.named_parameters() if p.dim() == 1]
    assert all(
        torch.equal(w[n], dict(net.named_parameters())[n]) for w in changes.values() for n in biases
    )


def test_an_estimate_of_nothing_counts_as_little(script):
    assert script._log_ratios([2.0, 0.0], [1.0, 3.0]) == pytest.approx([log(2), log(1e-12)])
