"""Entropy-SGD beside SGD."""

import importlib

import pytest
import torch


@pytest.fixture
def optimisers():
    return importlib.import_module("reproductions.learning_coefficient.optimisers")


@pytest.fixture
def perceptron():
    return importlib.import_module("reproductions.learning_coefficient.perceptron").perceptron


def test_entropy_sgd_with_one_inner_step_is_sgd(optimisers, perceptron):
    def trained(train, **settings):
        net = perceptron((3, 2), 0)
        x, y = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
        gradient = optimisers.minibatch_gradients(net, x, y, 4, 0)
        train(net, gradient, 6, settings.pop("rate"), 0.0, 0, **settings)
        return torch.nn.utils.parameters_to_vector(net.parameters()).detach()

    plain = {"inner": 1, "inner_rate": 0.1, "memory": 1.0, "noise": 0.0}
    torch.testing.assert_close(
        trained(optimisers.entropy_sgd, rate=0.5, **plain), trained(optimisers.sgd, rate=0.05)
    )
    spring = trained(optimisers.entropy_sgd, rate=0.5, **plain | {"inner": 2, "scope": 5.0})
    free = trained(optimisers.entropy_sgd, rate=0.5, **plain | {"inner": 2, "scope": 0.0})
    start = trained(optimisers.sgd, rate=0.0)
    assert (spring - start).norm() < 0.95 * (free - start).norm()
