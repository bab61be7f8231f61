"""SGD beside entropy-SGD, on a few images."""

import importlib
import json

import pytest


@pytest.fixture
def study():
    return importlib.import_module("reproductions.learning_coefficient.mnist")


@pytest.fixture
def main():
    return importlib.import_module("reproductions.learning_coefficient.__main__").main


def test_two_optimisers_are_compared(main, mnist_folder, tmp_path, capsys):
    output = tmp_path / "out"
    call = ["mnist", "--output", str(output), "--hidden", "4", "--seeds", "0", "--epochs", "2"]
    call += ["--num-train", "60", "--batch-size", "16", "--data-dir", str(mnist_folder)]
    call += ["--localizations", "100", "--chains", "2", "--draws", "16", "--warmup", "16"]
    assert main(call) == 0
    for optimiser in ("sgd", "entropy-sgd"):
        found = json.loads((output / f"mnist-{optimiser}-0-100.json").read_text("utf-8"))
        assert 0 <= found["train error"] <= 1
        assert found["num_examples"] == 60
    assert len(list(output.glob("network-4-*-60-2-16-0.01-0.9-0.safetensors"))) == 2
    assert "| 100 | " in capsys.readouterr().out
    assert main([*call, "--num-train", "65"]) == 2
    assert "only 64 training images" in capsys.readouterr().err


@pytest.mark.parametrize(("difference", "sign"), [(1.0, 1), (-1.0, -1), (0.2, 0), (-0.2, 0)])
def test_a_difference_counts_beyond_two_errors(study, difference, sign):
    sgd = {"value": 5.0, "standard_error": 0.1}
    entropy = {"value": 5.0 + difference, "standard_error": 0.1}
    assert study._comparison(sgd, entropy) == sign
