import pytest
import torch
from torch import nn

from pushforward.function_space.chain import Moments
from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.statistics import (
    LowRankMoments,
    batch_statistics,
    mean_curvatures,
    slope,
    walk,
)
from pushforward.gaussians.activations import PiecewisePolynomial, SmoothActivation
from scenarios import small_mlp

RELU = PiecewisePolynomial("relu", (0.0,), ((0.0,), (0.0, 1.0)))


def _statistics(net, x, labels, count):
    reference = ReferenceNetwork.of(net, x.shape[1:])
    stages = walk(reference.graph, x)
    return batch_statistics(labels, count, net(x).detach(), rows=x, stages=stages, layers=True)


def _leaves(statistics):
    yield statistics.counts
    yield statistics.inputs.mean
    yield statistics.inputs.covariance
    for stage in statistics.stages:
        yield from (stage.gate_mean, stage.gate_square, stage.layer.mean, stage.layer.covariance)
    outputs = statistics.outputs
    yield from (outputs.moments.mean, outputs.moments.covariance, outputs.fisher, outputs.softmax)


@pytest.fixture
def labelled():
    torch.manual_seed(0)
    x = 3.0 + torch.randn(60, 4, dtype=torch.float64)
    return x, torch.randint(0, 3, (60,))


def test_each_component_has_the_moments_of_its_examples(labelled):
    x, labels = labelled
    net = small_mlp()
    kept = _statistics(net, x, labels, 3)
    part = x[labels == 1]
    assert torch.allclose(kept.inputs.mean[1], part.mean(0))
    assert torch.allclose(kept.inputs.covariance[1], torch.cov(part.mT, correction=0))
    hidden = net[0](part)
    assert torch.allclose(kept.stages[0].gate_mean[1], (hidden >= 0).double().mean(0))
    assert torch.equal(kept.stages[0].gate_mean, kept.stages[0].gate_square)
    active = torch.relu(hidden)
    assert torch.allclose(kept.stages[0].layer.mean[1], active.mean(0))
    assert torch.allclose(kept.stages[0].layer.covariance[1], torch.cov(active.mT, correction=0))
    p = net(part).softmax(1)
    fisher = torch.diag(p.mean(0)) - p.mT @ p / len(p)
    assert torch.allclose(kept.outputs.fisher[1], fisher)
    assert kept.counts.tolist() == torch.bincount(labels).double().tolist()


def test_mean_curvatures_are_means_of_the_matrices_of_every_example():
    torch.manual_seed(0)
    groups = [torch.randn(count, 4, dtype=torch.float64).softmax(1) for count in (5, 1)]
    fisher, softmax = mean_curvatures(groups)
    for c, group in enumerate(groups):
        each = torch.stack([torch.diag(p) - torch.outer(p, p) for p in group])
        torch.testing.assert_close(fisher[c], each.mean(0))
        torch.testing.assert_close(softmax[c], (each @ each).mean(0))


@pytest.mark.parametrize("cut", [1, 20, 59])
def test_parts_add_up_to_the_whole(labelled, cut):
    x, labels = labelled
    net = small_mlp()
    whole = _statistics(net, x, labels, 3)
    parts = _statistics(net, x[:cut], labels[:cut], 3) + _statistics(net, x[cut:], labels[cut:], 3)
    for got, expected in zip(_leaves(parts), _leaves(whole), strict=True):
        assert torch.allclose(got, expected, atol=1e-12)


def test_a_component_without_examples_adds_nothing(labelled):
    x, _ = labelled
    net = small_mlp()
    first = _statistics(net, x[:30], torch.zeros(30, dtype=torch.long), 2)
    second = _statistics(net, x[30:], torch.ones(30, dtype=torch.long), 2)
    both = first + second
    assert torch.allclose(both.inputs.mean[0], x[:30].mean(0))
    assert torch.allclose(both.inputs.covariance[1], torch.cov(x[30:].mT, correction=0))


def test_large_offsets_do_not_cancel():
    x = 1e6 + torch.randn(200, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.zeros(200, dtype=torch.long)
    parts = [_statistics(small_mlp(), rows, labels[:20], 1) for rows in x.split(20)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert torch.allclose(total.inputs.covariance[0], torch.cov(x.mT, correction=0), rtol=1e-6)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (RELU, nn.functional.relu),
        (SmoothActivation("gelu", nn.functional.gelu), nn.functional.gelu),
        (SmoothActivation("tanh", torch.tanh), torch.tanh),
    ],
)
def test_slopes_are_derivatives(activation, function):
    z = torch.linspace(-3, 3, 12, dtype=torch.float64)
    numeric = (function(z + 1e-6) - function(z - 1e-6)) / 2e-6
    assert torch.allclose(slope(activation, z), numeric, atol=1e-8)


def test_at_a_kink_the_right_side_holds():
    assert slope(RELU, torch.zeros(1, dtype=torch.float64)).item() == 1.0


def test_low_rank_keeps_the_largest_directions_and_the_diagonal():
    torch.manual_seed(0)
    factor = torch.randn(2, 6, 2, dtype=torch.float64)
    noise = torch.rand(2, 6, dtype=torch.float64)
    covariance = 100 * factor @ factor.mT + torch.diag_embed(noise)
    low = LowRankMoments.of(Moments(torch.zeros(2, 6).double(), covariance), 2)
    whole = low.whole.covariance
    assert torch.allclose(whole.diagonal(dim1=-2, dim2=-1), covariance.diagonal(dim1=-2, dim2=-1))
    assert (whole - covariance).abs().max() < 1.0  # of entries up to several hundred


def test_squares_of_slopes_are_kept_beside_their_means():
    """Slopes of smooth activations are not 0 or 1: their squares are other numbers."""
    net = small_mlp((4, 5, 3), nn.GELU)
    torch.manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64)
    stage = _statistics(net, x, torch.zeros(50, dtype=torch.long), 1).stages[0]
    before = net[0](x).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(nn.functional.gelu(before).sum(), before)
    assert torch.allclose(stage.gate_mean[0], slopes.mean(0))
    assert torch.allclose(stage.gate_square[0], slopes.square().mean(0))
