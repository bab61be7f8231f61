"""Counted operations against torch's own counter and against the closed forms."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pushforward.cumulants.flops import propagation_flops, unit_flops
from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.propagation import propagate
from pushforward.networks.graph import read_network
from scenarios import conv_network, correlated_law, he_network, standard_law

CLOSURES = {"covariance": (2, False), "radial": (2, True), "full": (3, None)}


def products(net, law, order, augmented):
    """Operations in matrix products and convolutions, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        propagate(net, law, order, augmented=augmented, standard_error=False, angular=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("closure", CLOSURES)
@pytest.mark.parametrize("depth", [1, 3])
def test_matrix_products_are_counted(closure, depth):
    # At width 128 products dominate; the vectors of means are left out, nothing else.
    net, law = he_network(128, depth, bias=0.1), correlated_law(128, spread=0.05)
    counted = products(net, law, *CLOSURES[closure])
    claimed = propagation_flops(read_network(net, (128,)), closure)
    assert 0.99 * counted <= claimed <= 1.35 * counted


def test_covariance_propagation_in_closed_form():
    # Two products of n^3 multiply-adds for each linear map: 4 n^3 each, plus pairs and units.
    n, depth = 200, 3
    graph = read_network(he_network(n, depth), (n,))
    found = propagation_flops(graph, "covariance")
    leading = 4 * n**3 * (depth + 1)
    assert leading < found < 1.05 * leading
    assert propagation_flops(graph, "radial") == pytest.approx(1.5 * leading, rel=0.1)


def test_convolutions_cost_less_than_their_matrix():
    graph = read_network(conv_network(), (1, 6, 6))
    pixels, features = 36, 108
    dense = 2.0 * pixels * features * (pixels + features)
    assert propagation_flops(graph, "covariance") < dense + 1e6
    assert graph.stages[0].affine.linear.flops < 2.0 * pixels * features / 2


def test_order_one_costs_two_forward_passes():
    n, depth = 300, 2
    graph = read_network(he_network(n, depth), (n,))
    forward = 2.0 * n * n * (depth + 1)
    assert unit_flops(graph, full_input=False) == pytest.approx(2 * forward, rel=0.2)
    full = unit_flops(graph, full_input=True) - unit_flops(graph, full_input=False)
    assert full == pytest.approx(2.0 * n**3)


def test_costs_rise_with_the_order():
    graph = read_network(he_network(32, 3), (32,))
    costs = [unit_flops(graph, full_input=False)]
    costs += [propagation_flops(graph, closure) for closure in CLOSURES]
    assert costs == sorted(costs)
    for closure, kernels in (("covariance", 1), ("radial", 4), ("full", 4)):
        # One kernel is 32 nodes of some tens of operations; higher orders need four for a pair.
        each = propagation_flops(graph, closure, 110) - propagation_flops(graph, closure, 10)
        assert 32 * 10 < each / 100 / kernels < 32 * 100


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_error_bar_is_charged(order):
    net, law = he_network(16, 2), standard_law(16)
    without = propagate(net, law, order, standard_error=False)
    with_bar = propagate(net, law, order)
    assert with_bar.flops > without.flops > 0
    assert with_bar.cost.seconds > 0


def test_every_law_of_a_batch_is_charged():
    net = he_network(16, 2, bias=0.1)
    one = propagate(net, GaussianLaw(torch.zeros(1, 16).double(), 0.1), standard_error=False)
    five = propagate(net, GaussianLaw(torch.zeros(5, 16).double(), 0.1), standard_error=False)
    assert five.flops == pytest.approx(5 * one.flops, rel=0.05)


def test_a_linear_network_costs_its_map():
    graph = read_network(nn.Linear(10, 3), (10,))
    assert propagation_flops(graph, "covariance") == 2 * 10 * 3 * (10 + 3)
