import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from pushforward.cumulants.expectation import expect
from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.monte_carlo import monte_carlo
from pushforward.cumulants.propagation import propagate
from pushforward.errors import OptionError, ShapeError

LAW = GaussianLaw.standard(8, dtype=torch.float64)


def net_of(*sizes, seed=0):
    torch.manual_seed(seed)
    layers = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def test_a_loose_tolerance_needs_no_samples():
    net = net_of(8, 64, 64, 3)
    found, third = expect(net, LAW, 0.1), propagate(net, LAW, 3)
    assert found.cost.evaluations == 0
    assert found.method == "cumulant propagation, order 3"
    torch.testing.assert_close(found.value, third.mean)
    torch.testing.assert_close(found.standard_error, third.standard_error)
    assert {check.name: check.status for check in found.checks}["tolerance"] == "pass"


@pytest.mark.statistical
def test_a_tight_tolerance_is_reached_with_samples_and_the_truth_is_near():
    net = net_of(8, 32, 32, 3)
    found = expect(net, LAW, 2e-3)
    truth = monte_carlo(net, LAW, 2**20, seed=99)
    spread = truth.variance.sqrt()
    assert found.cost.evaluations > 0
    assert "averaged with" in found.method
    assert bool((found.standard_error <= 2e-3 * spread * 1.02).all())
    # |z| < 4.5 in three outputs: false alarm below 1e-4.
    z = (found.value - truth.mean) / torch.hypot(found.standard_error, truth.standard_error)
    assert z.abs().max() < 4.5


def test_the_average_is_no_worse_than_either_part():
    net = net_of(8, 32, 32, 3)
    found, third = expect(net, LAW, 2e-3), propagate(net, LAW, 3)
    sampled = monte_carlo(net, LAW, found.cost.evaluations, covariance=False)
    assert bool((found.standard_error <= third.standard_error + 1e-15).all())
    assert bool((found.standard_error <= sampled.standard_error + 1e-15).all())
    weight = sampled.standard_error**2 / (sampled.standard_error**2 + third.standard_error**2)
    torch.testing.assert_close(found.value, weight * third.mean + (1 - weight) * sampled.mean)


def test_without_samples_the_tolerance_is_missed_aloud():
    found = expect(net_of(8, 16, 16, 2), LAW, 1e-6, max_samples=0)
    assert found.cost.evaluations == 0
    assert {check.name: check.status for check in found.checks}["tolerance"] == "warn"
    assert found.status == "warn"


def test_where_propagation_breaks_down_samples_answer():
    deep = net_of(8, *[8] * 16, 2, seed=3)
    with torch.no_grad():
        for layer in deep[::2]:
            layer.weight *= 3
            layer.bias.zero_()
    found, truth = expect(deep, LAW, 0.02), monte_carlo(deep, LAW, 2**18, seed=7)
    z = (found.value - truth.mean) / torch.hypot(found.standard_error, truth.standard_error)
    assert found.cost.evaluations > 0
    assert z.abs().max() < 6


def test_the_answer_is_reproducible_and_json():
    net = net_of(8, 16, 16, 2)
    first, second = (expect(net, LAW, 5e-3, seed=4) for _ in range(2))
    assert torch.equal(first.value, second.value)
    assert not torch.equal(first.value, expect(net, LAW, 5e-3, seed=5).value)
    assert json.loads(json.dumps(first.to_dict()))["method"] == first.method


@pytest.mark.parametrize(
    ("tolerance", "max_samples", "where"),
    [
        *((bad, 100, "tolerance") for bad in (0.0, -1.0, math.nan, math.inf)),
        *((0.1, bad, "max_samples") for bad in (-1, True)),
    ],
)
def test_unusable_goals_are_refused(tolerance, max_samples, where):
    with pytest.raises(OptionError, match=f"^{where}: "):
        expect(net_of(8, 4, 1), LAW, tolerance, max_samples=max_samples)


def test_a_batch_of_laws_is_refused():
    with pytest.raises(ShapeError, match="batch of 2 laws"):
        expect(net_of(8, 4, 1), GaussianLaw(torch.zeros(2, 8).double(), 1.0))
