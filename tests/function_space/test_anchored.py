import pytest
import torch
from torch import nn

from pushforward.function_space.anchored import anchored_values, push_anchored
from pushforward.function_space.chain import Change, affine_changes
from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.statistics import batch_statistics, walk
from scenarios import moved, small_mlp


def _change(net, other, x):
    reference = ReferenceNetwork.of(net, x.shape[1:])
    stages = walk(reference.graph, x)
    labels = torch.zeros(len(x), dtype=torch.long)
    kept = batch_statistics(labels, 1, net(x).detach(), rows=x, stages=stages, layers=True)
    layers = [stage.layer for stage in kept.stages]
    steps = anchored_values(reference.graph, kept.inputs, layers)
    graph = reference.graph_of(reference.tensors_of(other))
    return push_anchored(reference.graph, graph, kept.inputs, steps)


def _skewed(count=3000):
    """Inputs that are not at all Gaussian."""
    torch.manual_seed(3)
    x = torch.randn(count, 4, dtype=torch.float64)
    return torch.exp(0.7 * x) * torch.sign(x[:, :1])


def _square(change):
    return (change.covariance + change.mean.mT @ change.mean)[0]


def test_exact_where_only_the_last_layer_moved_whatever_the_data():
    net, x = small_mlp(), _skewed()
    other = moved(net, only="4")
    with torch.no_grad():
        dz = other(x) - net(x)
    change = _change(net, other, x)
    assert torch.allclose(_square(change), dz.mT @ dz / len(x), rtol=1e-7)
    assert torch.allclose(change.mean[0], dz.mean(0))
    z = net(x).detach()
    cross = (z - z.mean(0)).mT @ (dz - dz.mean(0)) / len(x)
    assert torch.allclose(change.cross[0], cross, rtol=1e-6)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_covariances_stay_positive_semidefinite(activation):
    net, x = small_mlp((4, 12, 12, 12, 3), activation), _skewed()
    for size in (0.05, 0.5, 2.0):
        change = _change(net, moved(net, size), x)
        eigenvalues = torch.linalg.eigvalsh(change.covariance)
        assert eigenvalues.min() > -1e-9 * eigenvalues.max()


def test_dead_and_equal_units_do_no_harm():
    net, x = small_mlp(), _skewed()
    with torch.no_grad():
        net[0].bias[0] = -1e4  # never active
        net[0].weight[2], net[0].bias[2] = net[0].weight[1], net[0].bias[1]
    other = moved(net, 0.1)
    with torch.no_grad():
        truth = (other(x) - net(x)).square().sum(1).mean() / 2
    got = torch.trace(_square(_change(net, other, x))) / 2
    assert torch.isfinite(got)
    assert 0.5 < float(got.detach() / truth) < 2.0


def test_no_change_is_exactly_zero():
    net, x = small_mlp(), _skewed()
    assert _square(_change(net, net, x)).abs().max() == 0


def test_a_step_keeps_the_regression_on_activations_and_its_rest():
    """``da = K a + r``: the true moments of ``a`` go through ``K``, those of ``r`` stay."""
    net, x = small_mlp(), _skewed()
    reference = ReferenceNetwork.of(net, (4,))
    labels = torch.zeros(len(x), dtype=torch.long)
    stages = walk(reference.graph, x)
    kept = batch_statistics(labels, 1, net(x).detach(), rows=x, stages=stages, layers=True)
    true = kept.stages[0].layer
    step = anchored_values(reference.graph, kept.inputs, [s.layer for s in kept.stages])[0]
    width = true.mean.shape[1]
    torch.manual_seed(6)
    mean, slope = torch.randn(1, width).double(), torch.randn(1, width, width).double() / 4
    before = affine_changes(reference.graph, reference.graph)[0][0].push(kept.inputs).covariance
    change = Change(mean, before @ slope, slope.mT @ before @ slope + torch.eye(width).double())

    mean, cross, covariance = step.pairs.push(change.mean, change.cross, change.covariance)
    by = torch.linalg.solve(step.pairs.covariance, cross).mT
    rest = covariance - by @ cross
    shift = (true.mean - step.pairs.mean).unsqueeze(-1)
    assert shift.abs().max() > 0.05  # the closure is wrong here
    got = step.push(change)
    for found, expected in (
        (got.mean, mean + (by @ shift).squeeze(-1)),
        (got.cross, true.covariance @ by.mT),
        (got.covariance, by @ true.covariance @ by.mT + rest),
    ):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_every_stage_starts_from_the_true_moments():
    net, x = small_mlp(), _skewed()
    reference = ReferenceNetwork.of(net, (4,))
    labels = torch.zeros(len(x), dtype=torch.long)
    stages = walk(reference.graph, x)
    kept = batch_statistics(labels, 1, net(x).detach(), rows=x, stages=stages, layers=True)
    layers = [stage.layer for stage in kept.stages]
    steps = anchored_values(reference.graph, kept.inputs, layers)
    for linear, step, true in zip((net[0], net[2]), steps, (kept.inputs, layers[0]), strict=True):
        weight = linear.weight.detach()
        mean = true.mean[0] @ weight.mT + linear.bias.detach()
        normal = torch.distributions.Normal(0.0, 1.0)
        std = (weight @ true.covariance[0] @ weight.mT).diagonal().sqrt()
        expected = mean * normal.cdf(mean / std) + std * normal.log_prob(mean / std).exp()
        assert torch.allclose(step.pairs.mean[0], expected, rtol=1e-9)
