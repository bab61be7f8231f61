"""SGHMC: exact on quadratics, heated by minibatches as much as it must be."""

import math

import pytest
import torch

from oracles.linear_recursions import langevin_position_variance
from oracles.markov import (
    F64,
    begin,
    drive,
    isotropic_potential,
    logistic_features,
    logistic_moments,
    logistic_potential,
    offset_potential,
    scores_of_chains,
)
from pushforward.sampling.sghmc import SGHMC


@pytest.mark.parametrize(("size", "friction"), [(0.1, 1.0), (0.5, 0.3), (1.2, 4.0)])
def test_the_integrator_is_exact_on_a_quadratic(size, friction):
    assert abs(langevin_position_variance(2.0, size, friction) * 2 - 1) < 1e-12


@pytest.mark.statistical
def test_the_variance_at_a_coarse_step():
    # Half of the largest stable step. 100,000 numbers a step, of many steps.
    kernel = SGHMC(isotropic_potential(100, 4.0), step_size=0.5, friction=1.0)
    start = torch.randn(1000, 100, generator=torch.Generator().manual_seed(6), dtype=F64) / 2
    _, squares, statistics = drive(
        kernel,
        1000,
        0,
        60,
        initial={"x": start},
        keep=lambda state: state["vectors"].square().mean(-1),
    )
    assert abs(squares[:, 20:].mean() * 4 - 1) < 0.01
    assert abs(statistics["temperature"][:, 20:].mean() - 1) < 0.4


@pytest.mark.statistical
def test_minibatches_heat():
    potential, curvature, noise = offset_potential(batch_size=4)
    size, friction = 0.03, 2.0
    kernel = SGHMC(potential, step_size=size, friction=friction)
    start = {"bias": torch.zeros(4000, 1, dtype=F64)}
    _, draws, _ = drive(kernel, 4000, 0, 250, seed=5, initial=start)
    found = draws[:, 100:].square().mean((1, 2))
    error = found.std() / math.sqrt(4000)
    expected = langevin_position_variance(curvature, size, friction, noise)
    assert abs(found.mean() - expected) < 4.5 * error
    assert abs(found.mean() * curvature - 1) > 20 * error * curvature
    # The formula of the docstring is its beginning.
    tiny = langevin_position_variance(curvature, 1e-4, friction, noise) * curvature - 1
    assert abs(tiny / (1e-4 * noise / (2 * friction)) - 1) < 1e-3


@pytest.mark.statistical
def test_logistic_regression_up_to_its_bias():
    kernel = SGHMC(logistic_potential(), step_size=0.15, friction=1.0)
    _, vectors, _ = drive(kernel, 256, 200, 500, seed=3)
    assert scores_of_chains(logistic_features(vectors), logistic_moments()).abs().max() < 4


def test_momenta_begin_in_equilibrium():
    kernel = SGHMC(isotropic_potential(2000, 4.0), step_size=0.5, friction=1.0)
    state, _ = begin(kernel, 50)
    assert abs(kernel.statistics(state)["temperature"].mean() - 1) < 0.03


def test_a_chain_that_is_lost_says_so():
    kernel = SGHMC(isotropic_potential(3, 4.0), step_size=10.0, friction=1.0)
    _, _, statistics = drive(kernel, 4, 0, 250)
    assert bool((statistics["divergent"][:, -1] == 1).all())
