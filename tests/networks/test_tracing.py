"""What a trace would lose without a word is refused, and what nothing uses is dropped."""

import pytest
import torch
from torch import nn

from pushforward.errors import UnsupportedLayerError
from pushforward.networks.tracing import trace
from scenarios import Elementwise


class ControlFlow(nn.Module):
    def forward(self, x):
        return x.relu() if x.sum() > 0 else x


class InPlaceResidual(nn.Module):
    """The classical mistake: relu_ changes `h`, which is then added as it no longer was."""

    def __init__(self):
        super().__init__()
        self.linear, self.relu = nn.Linear(3, 3), nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.linear(x)
        return self.relu(h) + h


def overwrite(x):
    """A statement whose result nobody takes is not dead code."""
    x = 2 * x
    x.relu_()
    return x


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_refused_with_the_path_of_their_module(register):
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU()))
    getattr(net[1][0], register)(lambda *_: None)
    with pytest.raises(UnsupportedLayerError, match="hook") as caught:
        trace(net)
    assert caught.value.where == "module '1.0' (ReLU)"


def test_control_flow_is_refused():
    with pytest.raises(UnsupportedLayerError, match="network ControlFlow"):
        trace(ControlFlow())


def test_changing_a_tensor_that_is_used_again_is_refused():
    with pytest.raises(UnsupportedLayerError, match=r"'relu'.*in place"):
        trace(InPlaceResidual())
    for function in (overwrite, lambda x: x.relu_() + x, lambda x: torch.relu_(x) + x):
        with pytest.raises(UnsupportedLayerError, match="in place"):
            trace(Elementwise(function))


def test_changing_a_tensor_through_a_view_is_refused():
    with pytest.raises(UnsupportedLayerError, match="in place"):
        trace(Elementwise(lambda x: x[:, :1].relu_() + x))


def test_in_place_results_may_be_used():
    graph = trace(Elementwise(lambda x: (2 * x).relu_().mul_(2)))
    assert [node.name for node in graph.nodes] == ["x", "mul", "relu_", "mul_", "output"]


def test_values_that_nothing_uses_are_dropped():
    def function(x):
        _ = torch.tanh(x).sum()
        return x.relu()

    assert [node.name for node in trace(Elementwise(function)).nodes] == ["x", "relu", "output"]


def test_modules_with_an_activation_stay_whole():
    graph = trace(nn.Sequential(nn.Linear(3, 3), nn.GELU()))
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "1"]
