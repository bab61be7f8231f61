import pytest
import torch
from torch import nn

from oracles.gated_network import enumerated_distance
from pushforward.function_space.chain import Moments
from pushforward.function_space.gated import Gates, gated_values, push_gated
from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.statistics import batch_statistics, walk
from scenarios import moved, small_mlp


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Linear(3, 4), nn.Linear(4, 4)
        self.readout = nn.Linear(4, 2)

    def forward(self, x):
        h = torch.relu(self.embed(x))
        return self.readout(h + torch.relu(self.inner(h)))


def _affine(net):
    return [(m.weight.detach(), m.bias.detach()) for m in net if isinstance(m, nn.Linear)]


def _gaussian_input(n, seed=3):
    torch.manual_seed(seed)
    factor = torch.randn(n, n, dtype=torch.float64)
    return torch.randn(n, dtype=torch.float64), factor @ factor.mT


def _distance(net, other, mean, covariance, gates):
    reference = ReferenceNetwork.of(net, mean.shape)
    inputs = Moments(mean[None], covariance[None])
    graph = reference.graph_of(reference.tensors_of(other))
    steps = gated_values(reference.graph, inputs, gates)
    change = push_gated(reference.graph, graph, inputs, steps)
    square = change.covariance + change.mean.unsqueeze(-1) * change.mean.unsqueeze(-2)
    return square.diagonal(dim1=-2, dim2=-1).sum() / 2


def _relu_gates(probabilities):
    return [Gates(p[None], p[None]) for p in probabilities]


@pytest.mark.parametrize("sizes", [(3, 4, 2), (3, 4, 3, 2), (2, 3, 3, 2, 1)])
def test_equals_enumeration_of_all_gates(sizes):
    net = small_mlp(sizes)
    other = moved(net, 0.5)
    mean, covariance = _gaussian_input(sizes[0])
    torch.manual_seed(4)
    probabilities = [torch.rand(n, dtype=torch.float64) for n in sizes[1:-1]]
    expected = enumerated_distance(
        _affine(net), _affine(other), mean, covariance, [p.tolist() for p in probabilities]
    )
    got = _distance(net, other, mean, covariance, _relu_gates(probabilities))
    assert torch.allclose(got, expected, rtol=1e-12)


def test_gates_that_never_change_make_it_exact():
    """With large biases every unit is active: the network is linear, and so is the truth."""
    net = small_mlp((3, 5, 4, 2))
    with torch.no_grad():
        net[0].bias.fill_(50.0)
        net[2].bias.fill_(500.0)
    other = moved(net, 0.1)
    mean, covariance = _gaussian_input(3)
    x = torch.randn(200_000, 3, dtype=torch.float64)
    x = x - x.mean(0)
    factor = torch.linalg.cholesky(torch.linalg.inv(x.mT @ x / len(x)))
    x = mean + x @ factor @ torch.linalg.cholesky(covariance).mT
    with torch.no_grad():
        truth = (other(x) - net(x)).square().sum(1).mean() / 2
    ones = [torch.ones(5, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    got = _distance(net, other, mean, covariance, _relu_gates(ones))
    assert torch.allclose(got, truth, rtol=1e-9)


def test_no_change_is_exactly_zero_with_zero_gradient_and_a_psd_hessian():
    net = small_mlp((3, 4, 2))
    mean, covariance = _gaussian_input(3)
    reference = ReferenceNetwork.of(net, (3,))
    gates = _relu_gates([torch.tensor([0.2, 0.9, 0.5, 0.0], dtype=torch.float64)])
    inputs = Moments(mean[None], covariance[None])
    steps = gated_values(reference.graph, inputs, gates)
    names = list(reference.tensors)
    shapes = [reference.tensors[n].shape for n in names]
    flat = torch.cat([reference.tensors[n].flatten() for n in names])

    def distance(vector):
        parts = vector.split([s.numel() for s in shapes])
        tensors = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        change = push_gated(reference.graph, reference.graph_of(tensors), inputs, steps)
        square = change.covariance + change.mean.unsqueeze(-1) * change.mean.unsqueeze(-2)
        return square.diagonal(dim1=-2, dim2=-1).sum() / 2

    assert distance(flat) == 0
    assert torch.func.grad(distance)(flat).abs().max() == 0
    hessian = torch.autograd.functional.hessian(distance, flat)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert eigenvalues.min() > -1e-10 * eigenvalues.max()
    assert eigenvalues.max() > 0


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.LeakyReLU, nn.Hardtanh, nn.Tanh])
def test_gradient_equals_finite_differences(activation):
    net = small_mlp((3, 4, 4, 2), activation)
    other = moved(net, 0.4)
    mean, covariance = _gaussian_input(3)
    x = torch.randn(400, 3, dtype=torch.float64) @ torch.linalg.cholesky(covariance).mT + mean
    reference = ReferenceNetwork.of(net, (3,))
    stages = walk(reference.graph, x)
    kept = batch_statistics(torch.zeros(400, dtype=torch.long), 1, x, stages=stages)
    gates = [Gates(s.gate_mean, s.gate_square) for s in kept.stages]
    value = _distance(net, other, mean, covariance, gates)
    value.backward()
    torch.manual_seed(8)
    direction = torch.randn_like(other[2].weight)
    slope = (other[2].weight.grad * direction).sum()
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            other[2].weight.add_(step * direction)
            values.append(_distance(net, other, mean, covariance, gates))
            other[2].weight.sub_(step * direction)
    assert torch.allclose(slope, (values[0] - values[1]) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.Hardtanh])
def test_smooth_activations_against_sampling_of_the_linearised_network(activation):
    """One hidden layer, slopes drawn apart from the values: what the closed form assumes."""
    net = small_mlp((3, 5, 2), activation)
    other = moved(net, 0.3)
    mean, covariance = _gaussian_input(3)
    torch.manual_seed(5)
    count = 400_000
    x = mean + torch.randn(count, 3, dtype=torch.float64) @ torch.linalg.cholesky(covariance).mT
    mu = torch.rand(5, dtype=torch.float64)
    square = mu.square() + 0.1 * torch.rand(5, dtype=torch.float64)
    with torch.no_grad():
        s = net[0](x)
        slopes = mu + (square - mu.square()).sqrt() * torch.randn(count, 5, dtype=torch.float64)
        a = net[1](s)
        change = slopes * (other[0](x) - s)
        dz = (other[2](a) - net[2](a)) + change @ other[2].weight.mT
        each = dz.square().sum(1) / 2
    got = _distance(net, other, mean, covariance, [Gates(mu[None], square[None])])
    # Values and slopes are taken as uncorrelated given the linear part: a few per cent here.
    assert torch.allclose(got.detach(), each.mean(), rtol=0.05)


def test_residual_networks_carry_joint_moments():
    """Active units make the network linear: sampling of the network itself is the truth."""
    torch.manual_seed(2)
    net = Skip().double()
    with torch.no_grad():
        net.embed.bias.fill_(30.0)
        net.inner.bias.fill_(300.0)
    other = moved(net, 0.05)
    mean, covariance = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    reference = ReferenceNetwork.of(net, (3,))
    gates = [
        Gates(*[torch.ones(1, stage.affine.linear.out_features, dtype=torch.float64)] * 2)
        for stage in reference.graph.stages
    ]
    got = _distance(net, other, mean, covariance, gates)
    torch.manual_seed(6)
    x = torch.randn(100_000, 3, dtype=torch.float64)
    x = torch.cat([x, -x])
    x = x @ torch.linalg.cholesky(torch.linalg.inv(x.mT @ x / len(x)))
    with torch.no_grad():
        truth = (other(x) - net(x)).square().sum(1).mean() / 2
    assert torch.allclose(got, truth, rtol=1e-8)
