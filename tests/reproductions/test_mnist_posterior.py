"""The posteriors of MNIST networks, on a few digits."""

import importlib
import json

import pytest
import torch


@pytest.mark.parametrize(
    ("network", "sampler"),
    [("mlp", "gibbs"), ("mlp", "hmc"), ("mlp", "mala"), ("cnn", "gibbs"), ("cnn", "mala")],
)
def test_posteriors_of_a_few_digits(network, sampler, mnist_folder, tmp_path, capsys):
    module = importlib.import_module("reproductions.mnist_posterior")
    arguments = ["--network", network, "--sampler", sampler, "--steps", "4", "--every", "2"]
    arguments += ["--leapfrogs", "3", "--output", str(tmp_path), "--data-dir", str(mnist_folder)]
    assert module.main(arguments) == 0
    (path,) = tmp_path.glob(f"{network}-{sampler}-*.json")
    result = json.loads(path.read_text("utf-8"))
    assert result["steps"] == [2, 4]
    assert all(0 <= error <= 1 for error in result["test error"])
    assert result["training images"] == 64
    assert "2 steps  test error" in capsys.readouterr().out


def test_the_posterior_of_digits_is_the_published_one(tmp_path):
    """Cross-entropy over twice the noise, and prior precisions equal to the fan-in."""
    module = importlib.import_module("reproductions.mnist_posterior")
    net = module.build("mlp").double()
    x, y = torch.randn(6, 1, 28, 28, dtype=torch.float64), torch.arange(6)
    options = module.MnistPosterior(sampler="hmc", output=tmp_path)
    kernel, initial = module._kernel(options, net, x, y, noise=2.0)
    weights = {name: value[0] for name, value in initial.items()}
    loss = torch.nn.functional.cross_entropy(
        torch.func.functional_call(net, weights, (x,)), y, reduction="sum"
    )
    prior = 784 * (weights["1.weight"].square().sum() + weights["1.bias"].square().sum())
    prior += 12 * (weights["3.weight"].square().sum() + weights["3.bias"].square().sum())
    vector = kernel.potential.space.ravel(initial)
    torch.testing.assert_close(kernel.potential.value(vector)[0], loss / 4 + prior / 2)
