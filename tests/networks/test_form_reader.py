"""Modules and calls without a rule are refused by name, and sizes that do not fit are located."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pushforward.errors import NetworkError, ShapeError, UnsupportedLayerError
from pushforward.networks.form_reader import trace_forms
from scenarios import Elementwise

CPU = torch.device("cpu")


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class Nested(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(4),
        nn.Softmax(1),
        nn.PReLU(),
        nn.RReLU(),
        nn.GLU(),
        nn.MaxPool1d(2, return_indices=True),
        nn.LPPool1d(2, 2),
        nn.GroupNorm(2, 4),
        nn.Bilinear(4, 4, 4),
        nn.Upsample(scale_factor=2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_unknown_layers_are_named_with_their_path(layer):
    kind = type(layer).__name__
    with pytest.raises(UnsupportedLayerError, match=kind) as caught:
        trace_forms(Nested(layer).eval(), (4,), CPU)
    assert caught.value.where == "module 'body.1'"
    assert "register_activation" in caught.value.advice


@pytest.mark.parametrize(
    ("function", "shape", "label"),
    [
        (lambda x: torch.softmax(x, 1), (3,), "softmax"),
        (lambda x: x.max(1)[0], (3,), "max"),
        (lambda x: x * x.relu(), (3,), "mul"),
        (lambda x: 1 / x, (3,), "truediv"),
        (lambda x: 2**x, (3,), "pow"),
        (lambda x: torch.add(x, x, alpha=2), (3,), "add"),
        (lambda x: x + x[:, :1], (3,), "broadcasts"),
        (lambda x: x @ x.T, (3,), "T"),
        (lambda x: x.T + x.T, (3,), "T"),
        (lambda x: x + x.mT, (3, 3), "mT"),
        (lambda x: x.sum(), (3,), "batch"),
        (lambda x: x.mean(0), (3,), "batch"),
        (lambda x: x[0], (3,), "batch"),
        (lambda x: x.permute(1, 0), (3,), "batch"),
        (lambda x: x.reshape(-1), (3,), "batch"),
        (lambda x: torch.cat([x, x], 0), (3,), "dimension 0"),
        (lambda x: torch.cat([x, torch.ones(2, 3)], 1), (3,), "constants"),
        (lambda x: (x, x), (3,), "tuple"),
        (lambda x: {"logits": x}, (3,), "dict"),
        (lambda _: torch.ones(3), (3,), "Tensor"),
    ],
)
def test_unknown_functions_are_refused(function, shape, label):
    with pytest.raises(UnsupportedLayerError, match=label):
        trace_forms(Elementwise(function), shape, CPU)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x.mean(0), (2, 3)),
        (lambda x: x.mean(0), (3, 3)),
        (lambda x: x[0], (2, 3)),
        (lambda x: x[:2], (3,)),
        (lambda x: x.permute(1, 0), (2,)),
        (lambda x: x.transpose(0, 1), (2, 2)),
        (lambda x: x.reshape(2, -1), (4,)),
        (lambda x: x.view(-1, 2), (2, 3)),
    ],
)
def test_mixing_examples_is_refused_whatever_the_sizes(function, shape):
    # A probe with one batch size would take a feature dimension of that size for the batch.
    with pytest.raises(UnsupportedLayerError, match="batch"):
        trace_forms(Elementwise(function), shape, CPU)


def test_a_second_input_is_refused():
    with pytest.raises(UnsupportedLayerError, match="network TwoInputs"):
        trace_forms(TwoInputs(), (3,), CPU)


@pytest.mark.parametrize("layer", [nn.Dropout(0.2), nn.BatchNorm1d(4), nn.AlphaDropout(0.1)])
def test_training_mode_is_refused(layer):
    with pytest.raises(NetworkError, match="training mode") as caught:
        trace_forms(Nested(layer).train(), (4,), CPU)
    assert caught.value.where == "module 'body.1'"
    assert "net.eval()" in caught.value.advice


def test_dropout_of_nothing_may_train():
    trace_forms(Nested(nn.Dropout(0.0)).train(), (4,), CPU)


def test_functional_dropout_in_training_is_refused():
    net = Elementwise(lambda x: functional.dropout(x, 0.5, training=True))
    with pytest.raises(NetworkError, match="dropout is active"):
        trace_forms(net, (3,), CPU)


@pytest.mark.parametrize(
    ("net", "shape", "where"),
    [
        (Elementwise(lambda x: x.view(x.size(0), 5)), (3,), "view"),
        (Elementwise(lambda x: x[:, 7]), (3,), "getitem"),
        (Elementwise(lambda x: x + torch.ones(5)), (3,), "add"),
        (nn.Sequential(Elementwise(lambda x: x.sum(1)), nn.Linear(3, 1)), (3,), "Linear"),
    ],
)
def test_sizes_that_do_not_fit_are_located(net, shape, where):
    with pytest.raises(ShapeError) as caught:
        trace_forms(net.eval(), shape, CPU)
    assert where in caught.value.where
    assert caught.value.advice
