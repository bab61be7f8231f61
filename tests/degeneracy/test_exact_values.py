"""``pf.learning_coefficient`` against exact values, by every sampler."""

from math import sqrt

import pytest
import torch
from torch import nn

from degeneracy_problems import (
    F64,
    default_nbeta,
    draws,
    estimate,
    linear,
    network,
    regression,
    score,
)
from pushforward.degeneracy.quadrature import finite_temperature, quadratic

MANY = {
    "langevin": {"num_chains": 32, "num_draws": 100},
    "sgld": {"num_chains": 64, "num_draws": 150},
    "hmc": {"num_chains": 32, "num_draws": 40, "num_warmup": 40},
    "mala": {"num_chains": 32, "num_draws": 100, "num_warmup": 100},
}
SAMPLERS = tuple(MANY)


def noisy_regression():
    """With residuals at ``w*``, which is their least-squares fit; minibatches then differ."""
    net, (x, y), h = regression()
    offset = draws(100, 1, seed=12)
    residuals = offset - x @ torch.linalg.lstsq(x, offset).solution
    return net, (x, y + residuals), h


@pytest.mark.statistical
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_quadratic_has_half_its_effective_number_of_parameters(sampler):
    net, data, h = regression()
    exact = quadratic(h, default_nbeta(100), 1.0)
    assert exact < 1.5  # one of the four directions hardly counts
    found = estimate(net, data, sampler=sampler, **MANY[sampler])
    assert abs(score(found, exact)) < 4
    assert found.standard_error < 0.08 * exact
    assert found.verdict in {"OK", "NOT_EQUILIBRATED"}  # plain SGLD in the flat direction
    assert abs(found.quadratic.value - exact) < 4.5 * found.quadratic.standard_error + 1e-9
    assert found.slope == pytest.approx(0, abs=1e-9)


@pytest.mark.statistical
@pytest.mark.parametrize("sampler", ["langevin", "mala"])
def test_errors_are_honest(sampler):
    net, data, h = noisy_regression()
    exact = quadratic(h, default_nbeta(100), 5.0)
    options = {"num_chains": 16, "num_draws": 60, "localization": 5.0, "sampler": sampler}
    if sampler == "mala":
        options |= {"num_warmup": 60}
    scores = torch.tensor([score(estimate(net, data, seed=s, **options), exact) for s in range(6)])
    assert scores.abs().max() < 4
    # 6 squares of standard normals: between their quantiles of 0.1 % and 99.99 %.
    assert 0.38 < scores.square().sum() < 28


def isotropic():
    inputs = torch.linalg.qr(draws(20, 4))[0] * sqrt(20)
    net = network(linear(4, 1, bias=False))
    return net, (inputs, net(inputs).detach())


@pytest.mark.statistical
def test_the_bias_of_plain_steps_is_its_formula_and_extrapolated():
    net, data = isotropic()
    size = 0.4 / 22.0
    found = estimate(
        net,
        data,
        sampler="sgld",
        nbeta=20.0,
        localization=2.0,
        step_size=size,
        num_chains=64,
        num_draws=150,
        num_warmup=30,
    )
    ones = torch.ones(4, dtype=F64)
    exact = quadratic(ones, 20.0, 2.0)
    for run, step in zip(found.runs, (size, size / 2), strict=True):
        expected = quadratic(ones, 20.0, 2.0, step_size=step)
        assert abs(run.value - expected) < 4 * run.standard_error
    assert found.runs[0].value - exact > 4 * found.runs[0].standard_error
    assert abs(score(found, exact)) < 4
    assert found.expected_bias == pytest.approx(size * 20 * 4 / 8, rel=1e-6)


class Crossing(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.powers = (first, second)

    def forward(self, inputs):
        (first, second), w = self.powers, self.w
        return inputs * w[0] ** first * w[1] ** second


@pytest.mark.statistical
@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 2)])
def test_normal_crossings_have_the_value_of_quadrature(first, second):
    """Where the Hessian is zero: nothing of this is quadratic."""
    net = network(lambda: Crossing(first, second))
    x = draws(40, 1)
    half = 0.5 * float(x.square().mean())
    exact = finite_temperature(
        lambda w: half * (w[:, 0] ** first * w[:, 1] ** second).square(),
        2,
        150.0,
        localization=1.0,
    )
    data = (x, torch.zeros(40, 1, dtype=F64))
    options = {"nbeta": 150.0, "num_chains": 32, "num_draws": 100, "num_warmup": 100}
    found = estimate(net, data, sampler="hmc", **options)
    assert abs(score(found, exact)) < 4
    assert found.standard_error < 0.1 * exact
    assert found.quadratic.value == pytest.approx(0, abs=1e-9)
    assert found.verdict == "OK"


@pytest.mark.statistical
def test_batches_do_not_matter():
    net, data, h = noisy_regression()
    exact = quadratic(h, default_nbeta(100), 2.0)
    for batch_size in (16, 64, None):
        found = estimate(
            net,
            data,
            sampler="langevin",
            batch_size=batch_size,
            localization=2.0,
            num_chains=32,
            num_draws=120,
        )
        assert abs(score(found, exact)) < 4, batch_size
        assert found.nbeta == default_nbeta(100)
        assert found.batch_size == (batch_size or 100)
        assert found.standard_error < 0.1 * exact


def test_single_precision_gives_the_same():
    net, (x, y), h = regression()
    exact = quadratic(h, default_nbeta(100), 1.0)
    found = estimate(net.float(), (x.float(), y.float()), sampler="mala", **MANY["mala"])
    assert found.excess.dtype == torch.float64
    assert abs(score(found, exact)) < 4
