"""Layers of ReLU networks that are rescaled: the same function, and the same coefficient."""

import pytest

from degeneracy_problems import estimate, relu_network, same, scaled


def rescaled(metric, factor, bias=True, sampler="langevin"):
    net, data = relu_network(bias=bias)
    options = {"num_chains": 4, "num_draws": 20, "num_warmup": 20, "localization": 5.0}
    return estimate(scaled(net, factor), data, sampler=sampler, metric=metric, **options)


@pytest.mark.parametrize(
    ("bias", "factors"), [(True, (1e-4, 1e-2, 1e2, 1e4)), (False, (1e-4, 1e4))]
)
def test_layers_may_be_rescaled(bias, factors):
    here = rescaled("layerwise", 1.0, bias)
    assert here.metric == "layerwise"
    for factor in factors:
        there = rescaled("layerwise", factor, bias)
        assert abs(float(there) / float(here) - 1) < 0.02, factor
        assert there.quadratic.value == pytest.approx(here.quadratic.value, rel=1e-3)


def test_euclidean_distances_see_scales():
    here, *there = (float(rescaled("euclidean", factor)) for factor in (1.0, 1e-2, 1e2))
    assert all(abs(each / here - 1) > 0.05 for each in there)


@pytest.mark.parametrize("sampler", ["langevin", "mala"])
def test_powers_of_two_change_nothing_at_all(sampler):
    """They round nothing: not only the mean but every draw is the same."""
    here, there = (rescaled("layerwise", factor, sampler=sampler) for factor in (1.0, 2.0**13))
    assert same(here, there)


def test_a_step_of_our_own_choice_keeps_chains_near():
    net, data = relu_network()
    options = {"num_chains": 16, "num_draws": 50, "metric": "layerwise", "sampler": "langevin"}
    found = estimate(net, data, **options)
    assert float(found) < 6 * found.num_parameters
