import pytest
import torch
from torch import nn

from pushforward.function_space.chain import Moments
from pushforward.function_space.gated import Gates, gated_values, push_gated
from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.sampled import sampled_outputs
from scenarios import moved, small_mlp


def _drawn(net, other, gates, count, seed=0):
    reference = ReferenceNetwork.of(net, (3,))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, count, 3, dtype=torch.float64, generator=generator)
    graph = reference.graph_of(reference.tensors_of(other))
    with torch.no_grad():
        return sampled_outputs(reference.graph, graph, rows, gates, generator)


@pytest.mark.statistical
@pytest.mark.parametrize("activation", [nn.ReLU, lambda: nn.LeakyReLU(0.3)])
def test_unbiased_for_the_closed_form(activation):
    net = small_mlp((3, 5, 4, 2), activation)
    other = moved(net, 0.4)
    low = 0.0 if activation is nn.ReLU else 0.3
    torch.manual_seed(1)
    gates = []
    for n in (5, 4):
        p = torch.rand(1, n, dtype=torch.float64)
        gates.append(Gates(low + (1 - low) * p, low**2 + (1 - low**2) * p))
    inputs = Moments(torch.zeros(1, 3).double(), torch.eye(3).double()[None])
    reference = ReferenceNetwork.of(net, (3,))
    steps = gated_values(reference.graph, inputs, gates)
    graph = reference.graph_of(reference.tensors_of(other))
    change = push_gated(reference.graph, graph, inputs, steps)
    exact = (change.covariance + change.mean.mT @ change.mean)[0].trace().detach() / 2
    _, moves = _drawn(net, other, gates, 200_000)
    each = moves[0].square().sum(1) / 2
    error = each.std() / len(each) ** 0.5
    assert abs(each.mean() - exact) < 4 * error  # 4 sigma
    assert error < 0.02 * exact


def test_certain_gates_leave_the_network_as_it_is():
    net = small_mlp((3, 5, 2))
    with torch.no_grad():
        net[0].bias.fill_(20.0)
    other = moved(net, 0.1)
    ones = torch.ones(1, 5, dtype=torch.float64)
    outputs, moves = _drawn(net, other, [Gates(ones, ones)], 50)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, dtype=torch.float64, generator=generator)
    assert torch.allclose(outputs[0], net(x).detach())
    assert torch.allclose(moves[0], (other(x) - net(x)).detach())


def test_gates_are_drawn_for_each_example():
    """Shared gates would move all examples in the same way."""
    net = small_mlp((3, 1, 1))
    other = moved(net, only="0.bias")
    half = torch.full((1, 1), 0.5, dtype=torch.float64)
    _, moves = _drawn(net, other, [Gates(half, half)], 1000)
    open_ = (moves[0, :, 0] != 0).double().mean()
    assert 0.4 < open_ < 0.6


@pytest.mark.statistical
def test_slopes_of_smooth_activations_have_their_mean_and_square():
    net = small_mlp((3, 5, 2), nn.GELU)
    other = moved(net, 0.4, only="0")
    torch.manual_seed(1)
    mean = torch.rand(1, 5, dtype=torch.float64)
    gates = [Gates(mean, mean.square() + 0.1 * torch.rand(1, 5, dtype=torch.float64))]
    inputs = Moments(torch.zeros(1, 3).double(), torch.eye(3).double()[None])
    reference = ReferenceNetwork.of(net, (3,))
    steps = gated_values(reference.graph, inputs, gates)
    graph = reference.graph_of(reference.tensors_of(other))
    change = push_gated(reference.graph, graph, inputs, steps)
    exact = (change.covariance + change.mean.mT @ change.mean)[0].trace().detach() / 2
    _, moves = _drawn(net, other, gates, 200_000)
    each = moves[0].square().sum(1) / 2
    error = each.std() / len(each) ** 0.5
    assert abs(each.mean() - exact) < 4 * error  # 4 sigma
    assert error < 0.02 * exact
