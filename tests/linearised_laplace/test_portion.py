"""A few examples that stand for the curvature of all."""

import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.linearised_laplace.linear_model import LinearModel, Portion
from pushforward.linearised_laplace.mode import find_mode
from pushforward.linearised_laplace.priors import Prior
from pushforward.networks.data import Examples
from pushforward.networks.model import FunctionalModel


def heavy_tailed(count=5000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, generator=generator, dtype=torch.float64)).exp()


def test_examples_with_most_curvature_are_all_there_and_count_once():
    curvature = heavy_tailed()
    portion = Portion.of(curvature, 800)
    largest = curvature.topk(100).indices
    assert set(largest.tolist()) <= set(portion.indices.tolist())
    weight = dict(zip(portion.indices.tolist(), portion.weights.tolist(), strict=True))
    assert all(weight[i] == 1.0 for i in largest.tolist())


@pytest.mark.parametrize("count", [200, 800, 2000])
def test_as_many_as_asked_for(count):
    assert abs(len(Portion.of(heavy_tailed(), count).indices) - count) <= 1


def test_sums_are_right():
    curvature = heavy_tailed()
    portion = Portion.of(curvature, 800)
    seen = portion.weights @ curvature[portion.indices]
    assert abs(float(seen / curvature.sum()) - 1) < 0.02
    assert abs(float(portion.weights.sum()) / len(curvature) - 1) < 0.1


def test_equal_examples_are_thinned_evenly():
    portion = Portion.of(torch.ones(1000), 100, first=50)
    assert set(portion.indices.diff().tolist()) <= {9, 10, 11}
    torch.testing.assert_close(portion.weights, torch.full((100,), 10.0, dtype=torch.float64))
    assert int(portion.indices.min()) >= 50


def test_no_curvature_at_all():
    portion = Portion.of(torch.zeros(1000), 100)
    assert abs(len(portion.indices) - 100) <= 1


@pytest.fixture
def linear():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for p in net.parameters():
        p.data *= 10
    x = torch.randn(3000, 4, dtype=torch.float64)
    y = net(x).detach().argmax(1)
    model = FunctionalModel.of(net)
    prior = Prior.start("isotropic", model.space, 0.1, model.device)
    return LinearModel(model, Examples.read((x, y)), pf.Categorical(), prior)


def test_the_product_of_a_portion_stands_for_that_of_all(linear):
    point = linear.model.vector
    slope = linear.slope(point)
    vectors = torch.randn(3, linear.model.space.size, dtype=torch.float64)
    whole = linear.product_at(slope.outputs, vectors)
    portion = linear.portion(slope, 600)
    part = linear.product_at(slope.outputs, vectors, portion)
    assert (part - whole).norm() < 0.2 * whole.norm()
    everything = Portion(torch.arange(3000), torch.ones(3000))
    torch.testing.assert_close(linear.product_at(slope.outputs, vectors, everything), whole)
    rows = portion.indices
    uniform = Portion(rows, torch.full((len(rows),), 3000 / len(rows)))  # a forgotten weight
    off = linear.product_at(slope.outputs, vectors, uniform)
    assert (off - whole).norm() > 5 * (part - whole).norm()


def test_a_portion_is_not_taken_of_few_examples(linear):
    slope = linear.slope(linear.model.vector)
    assert linear.portion(slope, 1500) is None
    assert linear.portion(slope, 1000) is not None


def test_the_mode_is_that_of_all_examples(linear, monkeypatch):
    def mode():
        return find_mode(linear, linear.model.vector, lambda rows: rows, tolerance=1e-8)

    whole = mode()
    monkeypatch.setattr("pushforward.linearised_laplace.mode._HESSIAN_EXAMPLES", 400)
    part = mode()
    assert part.decrement < 1e-8
    torch.testing.assert_close(part.point, whole.point, rtol=1e-3, atol=1e-3)
