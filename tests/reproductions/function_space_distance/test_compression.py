"""A small convolutional network, pruned and quantised."""

import importlib
import json

import pytest
import torch


@pytest.fixture
def study():
    return importlib.import_module("reproductions.function_space_distance.compression")


@pytest.fixture
def main():
    pytest.importorskip("tyro")
    return importlib.import_module("reproductions.function_space_distance.__main__").main


def test_distances_are_compared_with_the_accuracy_lost(main, tmp_path, mnist_folder):
    call = ["compression", "--output", str(tmp_path), "--channels", "1", "1", "--seeds", "0"]
    call += ["--metrics", "euclidean", "kl", "--draws", "20", "--epochs", "1"]
    call += ["--data-dir", str(mnist_folder), "--pooling", "avg", "--num-train", "60"]
    assert main([*call, "--methods", "synthetic, diagonal", "diagonal"]) == 0
    found = json.loads((tmp_path / "compression-avg-0.json").read_text())
    assert list(found["accuracy lost"]) == list(found["truth"]["kl"])
    assert len(found["accuracy lost"]) == 7
    assert not any("failure" in row for row in found["methods"].values())
    table = (tmp_path / "compression-avg.md").read_text()
    assert "| 90% pruned |" in table
    assert "| diagonal | " in table


def test_changes_are_what_they_say(study):
    net = study.convolutional((8, 16), "max", 0)
    changes = study._compressed(net)
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


def test_the_table_says_why_a_method_refused(study):
    found = {
        "settings": {"pooling": "max", "metrics": ["kl"]},
        "accuracy": 0.5,
        "accuracy lost": {"noise": 0.1},
        "truth": {"kl": {"noise": 1.0}},
        "methods": {"other": {"failure": "OptionError: too wide"}},
    }
    assert "| other | OptionError: too wide | |" in study.compression_table([found])
