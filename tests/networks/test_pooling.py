"""Max pooling read as ReLUs of differences computes what the module computes, with few units."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import pushforward as pf
from pushforward.errors import ShapeError, UnsupportedLayerError
from pushforward.networks.graph import read_network
from pushforward.networks.pooling import pair_maxima
from scenarios import Elementwise, fill, normal


def evaluate(graph, x):
    """The chain of stages applied to a batch."""
    state = x.flatten(1)
    for stage in graph.stages:
        before = stage.affine.apply(state)
        state = torch.cat([g.activation(before[:, g.units]) for g in stage.groups], dim=1)
    return graph.output.apply(state)


def assert_same(net, shape):
    graph = read_network(net, shape)
    x = normal(31, 6, *shape)
    expected = net(x.clone()).reshape(6, -1)
    torch.testing.assert_close(evaluate(graph, x), expected, rtol=1e-12, atol=1e-12)
    return graph


def widths(net, shape):
    return [stage.width for stage in assert_same(net, shape).stages]


def pooled_network(pool, inputs, outputs, seed=0):
    """Convolution, ReLU, pooling, a linear head; `inputs` channels of two axes."""
    net = nn.Sequential(
        nn.Conv2d(inputs, 3, 3, padding=1), nn.ReLU(), pool, nn.Flatten(), nn.LazyLinear(outputs)
    )
    net(torch.zeros(1, inputs, 6, 6))
    return fill(net, seed, 2.0, 0.3).eval()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.MaxPool1d(2), (8,)),
        (nn.MaxPool1d(2), (3, 8)),
        (nn.MaxPool1d(3), (2, 9)),
        (nn.MaxPool1d(5, stride=1), (2, 9)),
        (nn.MaxPool1d(3, stride=2, padding=1), (2, 7)),
        (nn.MaxPool1d(3, stride=1, dilation=2), (2, 8)),
        (nn.MaxPool1d(3, stride=5), (2, 12)),
        (nn.MaxPool1d(2, ceil_mode=True), (2, 7)),
        (nn.MaxPool1d(4, stride=3, padding=2, ceil_mode=True), (2, 8)),
        (nn.MaxPool1d(1, stride=2), (2, 7)),
        (nn.MaxPool1d(1), (2, 4)),
        (nn.MaxPool2d(2), (2, 4, 6)),
        (nn.MaxPool2d(2), (4, 6)),
        (nn.MaxPool2d((1, 3), stride=(2, 1)), (2, 5, 5)),
        (nn.MaxPool2d(3, stride=2, padding=1), (2, 6, 5)),
        (nn.MaxPool2d((3, 2), stride=1, padding=(1, 0), dilation=(2, 1)), (2, 6, 5)),
        (nn.MaxPool2d(7), (1, 7, 7)),
        (nn.MaxPool3d(2), (2, 4, 4, 2)),
        (nn.MaxPool3d((2, 3, 1), stride=1, padding=(0, 1, 0)), (1, 3, 3, 2)),
        (nn.AdaptiveMaxPool1d(3), (2, 7)),
        (nn.AdaptiveMaxPool2d(1), (2, 3, 4)),
        (nn.AdaptiveMaxPool2d((None, 2)), (2, 3, 5)),
        (nn.AdaptiveMaxPool3d(2), (1, 3, 2, 5)),
        (Elementwise(lambda x: functional.max_pool1d(x, 2, 1)), (2, 5)),
        (Elementwise(lambda x: functional.max_pool2d(x, (2, 2), padding=1)), (2, 5, 5)),
        (Elementwise(lambda x: functional.max_pool3d(x, kernel_size=2)), (2, 2, 2, 5)),
        (Elementwise(lambda x: torch.max_pool1d(x, 3, 2)), (2, 7)),
        (Elementwise(lambda x: torch.max_pool2d(x, [2, 2], [1, 1])), (2, 3, 4)),
        (Elementwise(lambda x: torch.max_pool3d(x, 2)), (2, 2, 2, 5)),
        (Elementwise(lambda x: functional.adaptive_max_pool2d(x, (2, 3))), (2, 5, 5)),
        (Elementwise(lambda x: functional.max_pool1d(x.tanh(), 2).relu() + x[..., ::2]), (2, 6)),
    ],
)
def test_the_stages_compute_the_pooling(layer, shape):
    assert_same(layer, shape)  # the functions that its forward calls
    assert_same(nn.Sequential(layer), shape)  # the module
    # Values that are all negative: a padded entry taken for a zero would win.
    x = -normal(32, 4, *shape).abs() - 1
    found = evaluate(read_network(layer, shape), x)
    torch.testing.assert_close(found, layer(x).reshape(4, -1))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, stride=1),
        nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        nn.Sequential(nn.MaxPool2d(2), nn.Tanh(), nn.MaxPool2d(2, stride=1)),
    ],
)
def test_networks_with_pooling_and_their_gradients(pool):
    net = pooled_network(copy.deepcopy(pool), 2, 3)
    graph = assert_same(net, (2, 6, 6))
    x = normal(33, 4, 2, 6, 6)
    evaluate(graph, x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    net(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_units_are_as_few_as_a_tree_of_shared_pairs_has():
    # Three maxima make that of four values; without overlaps nothing can be shared.
    assert widths(nn.MaxPool2d(2), (1, 8, 8)) == [32, 16]
    assert widths(nn.MaxPool1d(8), (8,)) == [4, 2, 1]
    assert widths(nn.MaxPool1d(5), (5,)) == [2, 1, 1]
    # Neighbouring windows share: at most one maximum an entry and level.
    assert widths(nn.MaxPool1d(4, stride=1), (10,)) == [9, 7]
    assert widths(nn.MaxPool1d(3, stride=1), (10,)) == [8, 8]
    # An axis that shrinks first spares maxima along the other.
    assert widths(nn.MaxPool2d((2, 8), stride=(1, 8)), (1, 8, 8)) == [32, 16, 8, 7]


def test_what_is_pooled_is_not_carried_further():
    net = nn.Sequential(*list(pooled_network(nn.MaxPool2d(4), 1, 2))[2:-1])
    graph = read_network(net, (3, 6, 6))
    states = [sum(g.units.stop - g.units.start for g in s.groups) for s in graph.stages]
    # Differences and what they are added to, of 3 channels and windows of 4 x 4 at one place.
    assert states == [3 * 6 * 4, 3 * 6 * 2, 3 * 4, 3 * 2]


def test_increasing_activations_act_on_the_maxima():
    graph = read_network(pooled_network(nn.MaxPool2d(2), 1, 2), (1, 6, 6))
    assert [stage.width for stage in graph.stages] == [3 * 6 * 3, 3 * 9, 3 * 9]
    for activation in (nn.GELU(), nn.Threshold(0.5, 1.0), nn.LeakyReLU(-0.5), nn.Tanh()):
        net = nn.Sequential(nn.Linear(4, 8), activation, nn.MaxPool1d(2))
        graph = assert_same(fill(net, 5, 2.0, 0.3), (4,))
        assert [stage.width for stage in graph.stages] == [8, 4]
    for activation in (nn.LeakyReLU(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Softshrink()):
        net = nn.Sequential(nn.Linear(4, 8), activation, nn.MaxPool1d(2))
        graph = assert_same(fill(net, 5, 2.0, 0.3), (4,))
        assert [stage.width for stage in graph.stages] == [4, 4]


class UsedTwice(nn.Module):
    """The activation is pooled and needed as it is."""

    def __init__(self):
        super().__init__()
        self.linear, self.pool = nn.Linear(4, 6), nn.MaxPool1d(3)

    def forward(self, x):
        h = self.linear(x).relu()
        return torch.cat([self.pool(h), h, self.pool(h + 1) + self.pool(-h)], dim=1)


def test_what_is_pooled_may_be_needed_elsewhere():
    assert_same(fill(UsedTwice(), 6, 2.0, 0.3), (4,))


def test_names_lead_to_the_module():
    net = nn.Sequential(
        nn.Linear(4, 8), nn.MaxPool1d(2), nn.Linear(4, 4), nn.ReLU(), nn.MaxPool1d(4)
    )
    graph = assert_same(fill(net, 3, 2.0, 0.3), (4,))
    names = [[g.name for g in stage.groups] for stage in graph.stages]
    assert names == [["1.1.gain", ""], ["4.1.gain", ""], ["4.2.gain", ""], ["4"]]
    inputs = [s.groups[0].input_name for s in graph.stages]
    assert inputs == ["1.1.difference", "4.1.difference", "4.2.difference", "4.max"]
    assert graph.stacked == ()


def test_a_pooling_used_twice_has_distinct_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.MaxPool1d(3)

        def forward(self, x):
            return self.pool(self.pool(x))

    graph = assert_same(Twice(), (9,))
    names = [g.name for stage in graph.stages for g in stage.groups if not g.carried]
    assert len(set(names)) == len(names) == 4


@pytest.mark.parametrize("size", range(1, 14))
def test_maxima_of_any_windows(size):
    windows = [w for k in range(1, size + 1) for w in itertools.combinations(range(size), k)][-60:]
    levels, last = pair_maxima(windows)
    values = normal(34 + size, size).tolist()
    current = values
    for level in levels:
        fresh = [current[i] for i in level.first]
        for left, right, place in zip(level.left, level.right, level.places, strict=True):
            assert fresh[place] == current[left]
            fresh[place] = max(current[left], current[right])
        current = fresh
    assert [current[i] for i in last] == [max(values[i] for i in w) for w in windows]
    assert len(levels) == (size - 1).bit_length()


@pytest.mark.parametrize(
    ("net", "shape", "reason"),
    [
        (nn.MaxPool1d(2, return_indices=True), (2, 4), "returns indices"),
        (nn.AdaptiveMaxPool1d(2, return_indices=True), (2, 4), "returns indices"),
        (
            Elementwise(lambda x: functional.max_pool1d(x, 2, return_indices=True)[0]),
            (2, 4),
            "max_pool1d_with_indices",
        ),
        (nn.MaxPool1d(2, stride=6, padding=1, dilation=4, ceil_mode=True), (1, 2), "padding"),
        (nn.FractionalMaxPool2d(2, output_size=2), (1, 4, 4), "FractionalMaxPool2d"),
    ],
)
def test_what_has_no_rule_is_refused(net, shape, reason):
    with pytest.raises(UnsupportedLayerError, match=reason) as caught:
        read_network(nn.Sequential(net), shape)
    assert "MaxPool1d-3d" in caught.value.advice


def test_sizes_that_do_not_fit_are_located():
    net = nn.Sequential(nn.Linear(3, 4), nn.MaxPool2d(2))
    with pytest.raises(ShapeError, match="MaxPool2d") as caught:
        read_network(net, (3,))
    assert "(1)" in caught.value.where


@pytest.mark.statistical
def test_the_law_behind_a_pooling_agrees_with_sampling():
    net = pooled_network(nn.MaxPool2d(2), 1, 2, seed=4)
    law = pf.GaussianLaw(torch.zeros(36), torch.eye(36), (1, 6, 6))
    found = pf.propagate(net, law)
    sampled = pf.monte_carlo(net, law, 40_000, seed=0)
    # Maxima of maxima are not of Gaussian variables: 2 % of a standard deviation beside sampling.
    tolerance = 4 * sampled.standard_error + 0.02 * sampled.variance.sqrt()
    assert ((found.mean - sampled.mean).abs() < tolerance).all()
    assert ((found.variance / sampled.variance).log().abs() < 0.15).all()


@pytest.mark.statistical
def test_the_mean_of_a_maximum_of_two_is_exact():
    # One ReLU of a Gaussian: E max(a, b) = sqrt((1 - rho) / pi) for standard normals.
    found = pf.propagate(nn.MaxPool1d(2), pf.GaussianLaw.standard(2))
    torch.testing.assert_close(found.mean.item(), float(torch.tensor(torch.pi) ** -0.5))
    sampled = pf.monte_carlo(nn.MaxPool1d(2), pf.GaussianLaw.standard(2), 20_000, seed=1)
    assert abs(sampled.mean - found.mean).item() < 4 * sampled.standard_error.item()
    torch.testing.assert_close(found.variance.item(), 1 - 1 / torch.pi)
