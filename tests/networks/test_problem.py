"""Networks, data and likelihoods that do not belong together; memory that an example takes."""

import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.errors import DataError, ShapeError
from pushforward.networks.data import Examples
from pushforward.networks.model import FunctionalModel
from pushforward.networks.problem import activation_bytes, check_problem


def examples(targets=None, count=5):
    x = torch.randn(count, 3, dtype=torch.float64)
    return Examples.read((x, torch.zeros(count, 2) if targets is None else targets))


def test_activations_are_those_that_a_backward_pass_keeps():
    net = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    data = examples()
    found = [
        activation_bytes(FunctionalModel.of(net), data.select(torch.arange(n))) for n in (1, 4)
    ]
    # Inputs, tanh (once, though two layers keep it) and outputs; whatever the size of the batch.
    assert found == [8 * (3 + 7 + 2)] * 2


def test_what_belongs_together_passes():
    check_problem(FunctionalModel.of(nn.Linear(3, 2).double()), examples(), pf.Gaussian(1.0))


def test_targets_are_looked_at_only_with_a_likelihood():
    model = FunctionalModel.of(nn.Linear(3, 2).double())
    wrong = examples(torch.full((5,), 7))
    with pytest.raises(DataError):
        check_problem(model, wrong, pf.Categorical())
    check_problem(model, wrong)


def test_a_network_that_mixes_examples_away():
    model = FunctionalModel(lambda p, x: (x @ p["w"]).sum(0, keepdim=True), {"w": torch.ones(3, 2)})
    data = Examples.read((torch.randn(5, 3), torch.zeros(5, 2)))
    with pytest.raises(ShapeError, match="1 rows of outputs for 5 examples"):
        check_problem(model, data)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, x: (x @ p["w"]) / 0 * 0, "NaN"),
        (lambda p, x: x @ p["w"] + torch.randn(len(x), 2), "two passes"),
        (lambda p, x: (x - x.mean(0)) @ p["w"], "depend on the other examples"),
        (lambda p, x: x @ p["w"] + len(x), "depend on the other examples"),
        (lambda p, x: (x @ p["w"]).cumsum(0), "depend on the other examples"),
        pytest.param(
            lambda p, x: (x @ p["w"]).argmax(1),
            "outputs are torch.int64",
            marks=pytest.mark.wrong_types,
        ),
    ],
)
def test_networks_that_are_no_functions(function, message):
    model = FunctionalModel(function, {"w": torch.ones(3, 2)})
    data = Examples.read((torch.randn(5, 3), torch.zeros(5, 2)))
    with pytest.raises(DataError, match=message):
        check_problem(model, data)
