"""Order 1: means and independent variances, layer by layer."""

import pytest
import torch
from torch import nn

from oracles.dense_cumulants import propagate_dense
from oracles.wick import ACTIVATIONS, wick_coefficients
from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.mean_propagation import (
    UnitMoments,
    activate_units,
    affine_units,
    first_affine_units,
)
from pushforward.cumulants.propagation import propagate
from pushforward.networks.graph import read_network
from scenarios import correlated_law, fill, normal


def network(seed=0):
    return fill(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
        seed,
        1.4,
    )


def weights(net):
    return [layer.weight.detach() for layer in net[::2]], [
        layer.bias.detach() for layer in net[::2]
    ]


@pytest.mark.parametrize("metric", ["exact", "average"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_scalar_form_is_that_of_the_oracle(metric, seed):
    net, law = network(seed), correlated_law(4, seed=seed)
    matrices, biases = weights(net)
    expected = propagate_dense(
        [m.numpy() for m in matrices],
        [b.numpy() for b in biases],
        [ACTIVATIONS["relu"], ACTIVATIONS["tanh"]],
        law.mean.numpy(),
        law.covariance.numpy(),
        order=1,
        metric=metric,
    )[-1]
    found = propagate(net, law, 1, variance="scalar", metric=metric, standard_error=False)
    torch.testing.assert_close(found.mean, torch.from_numpy(expected[1]), rtol=0, atol=1e-12)
    variance = torch.from_numpy(expected[2]).diagonal()
    torch.testing.assert_close(found.variance, variance, rtol=0, atol=1e-12)


def test_the_unit_form_by_hand():
    net, law = network(2), correlated_law(4, seed=2)
    matrices, biases = weights(net)
    mean = matrices[0] @ law.mean + biases[0]
    variance = (matrices[0] @ law.covariance @ matrices[0].T).diagonal()
    for name, matrix, bias in zip(("relu", "tanh"), matrices[1:], biases[1:], strict=True):
        wick = torch.empty(2, len(mean), dtype=torch.float64)
        for unit in range(len(mean)):
            table = wick_coefficients(ACTIVATIONS[name], mean[unit], variance[unit], 0, 2)
            wick[:, unit] = torch.from_numpy(table[1:, 0, 0])
        mean = matrix @ wick[0] + bias
        variance = matrix.square() @ (wick[1] - wick[0].square())
    found = propagate(net, law, 1, standard_error=False)
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.variance, variance, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "full", "batch"])
def test_the_first_layer_reads_the_law_exactly(kind):
    full = correlated_law(4, seed=3).covariance
    covariance = {
        "scalar": torch.tensor(1.7).double(),
        "diagonal": full.diagonal(),
        "full": full,
        "batch": torch.stack([full, 2 * full]),
    }[kind]
    law = GaussianLaw(normal(4, 2, 4), covariance)
    affine = read_network(network(3), (4,)).stages[0].affine
    matrix = affine.linear.dense(law.mean)
    found = first_affine_units(law, affine, False, "exact")
    dense = law.dense_covariance().expand(2, 4, 4)
    expected = (matrix @ dense @ matrix.T).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found.variance.expand(2, -1), expected)
    torch.testing.assert_close(found.mean, law.mean @ matrix.T + affine.bias)


def test_affine_forms():
    affine = read_network(network(4), (4,)).stages[0].affine
    matrix = affine.linear.dense(affine.bias)
    moments = UnitMoments(normal(5, 4), normal(6, 4).abs())
    unit = affine_units(moments, affine, False, "exact")
    torch.testing.assert_close(unit.variance, matrix.square() @ moments.variance)
    torch.testing.assert_close(unit.mean, matrix @ moments.mean + affine.bias)
    scalar = affine_units(moments, affine, True, "exact")
    expected = matrix.square().sum(1) * moments.variance.mean()
    torch.testing.assert_close(scalar.variance, expected)
    average = affine_units(moments, affine, True, "average")
    torch.testing.assert_close(average.variance, expected.mean().expand(6))


def test_activated_moments_are_exact_and_broken_variances_counted():
    groups = read_network(network(5), (4,)).stages[0].groups
    mean, variance = normal(7, 6), normal(8, 6).square()
    variance[3] = -1.0
    found, broken = activate_units(UnitMoments(mean, variance), groups)
    assert broken == 1
    assert bool(found.variance.isfinite().all())
    z = mean + variance.clamp(min=0).sqrt() * normal(9, 400_000, 6)
    sample = z.relu()
    z_score = (found.mean - sample.mean(0)) / (sample.std(0) / 400_000**0.5).clamp(min=1e-9)
    # |z| < 4.5 for six units: false alarm in 4e-5 of all seeds.
    assert z_score.abs().max() < 4.5
    torch.testing.assert_close(found.variance[[0, 1]], sample.var(0)[[0, 1]], rtol=0.02, atol=1e-4)


def test_constants_have_no_variance():
    net = fill(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 0)
    x = normal(10, 3)
    found = propagate(net, GaussianLaw(x, 0.0), 1)
    torch.testing.assert_close(found.mean, net(x), rtol=1e-9, atol=1e-9)
    assert found.variance.abs().max() < 1e-12
    assert found.standard_error.max() < 1e-6
