"""SGNHT: the right variance, and a thermostat that takes the noise of minibatches away."""

import math

import pytest
import torch

from oracles.linear_recursions import langevin_position_variance
from oracles.markov import (
    F64,
    begin,
    draw_noise,
    drive,
    isotropic_potential,
    logistic_features,
    logistic_moments,
    logistic_potential,
    offset_potential,
    scores_of_chains,
)
from pushforward.sampling.noise import Noise
from pushforward.sampling.sghmc import SGHMC
from pushforward.sampling.sgnht import SGNHT


@pytest.mark.statistical
def test_the_variance_and_the_thermostat():
    curvature, dimension = 4.0, 50
    kernel = SGNHT(isotropic_potential(dimension, curvature), step_size=0.1, diffusion=1.0)
    start = torch.randn(1000, dimension, generator=torch.Generator().manual_seed(6), dtype=F64) / 2
    _, squares, statistics = drive(
        kernel,
        1000,
        0,
        300,
        initial={"x": start},
        keep=lambda state: state["vectors"].square().mean(-1),
    )
    assert abs(squares[:, 100:].mean() * curvature - 1) < 0.01
    thermostat = statistics["thermostat"][:, 100:]
    assert abs(thermostat.mean() - 1) < 0.02
    assert abs(thermostat.var() * dimension - 1) < 0.1
    assert abs(statistics["temperature"][:, 100:].mean() - 1) < 0.02


@pytest.mark.statistical
def test_the_bias_is_of_second_order():
    errors = []
    for size in (0.4, 0.2):
        kernel = SGNHT(isotropic_potential(20, 4.0), step_size=size)
        start = torch.randn(3000, 20, generator=torch.Generator().manual_seed(6), dtype=F64) / 2
        _, squares, _ = drive(
            kernel,
            3000,
            0,
            120,
            initial={"x": start},
            keep=lambda state: state["vectors"].square().mean(-1),
        )
        errors.append(abs(squares[:, 30:].mean().item() * 4 - 1))
    assert errors[0] < 0.03
    assert errors[1] < 0.01


@pytest.mark.statistical
def test_minibatch_noise_is_taken_away():
    potential, curvature, noise = offset_potential(batch_size=4, outputs=40)
    size = 0.03
    kernel = SGNHT(potential, step_size=size, diffusion=2.0)
    start = {"bias": torch.zeros(200, 40, dtype=F64)}
    _, squares, statistics = drive(
        kernel,
        200,
        0,
        500,
        initial=start,
        keep=lambda state: state["vectors"].square().mean(-1),
    )
    ratio = squares[:, 200:].mean() * curvature
    thermostat = statistics["thermostat"][:, 200:].mean()
    heated = langevin_position_variance(curvature, size, 2.0, noise) * curvature
    assert heated > 1.4  # so much without a thermostat
    assert abs(ratio - 1) < 0.05
    assert abs(thermostat / (2.0 + size * noise / 2) - 1) < 0.05


@pytest.mark.statistical
def test_logistic_regression_up_to_its_bias():
    kernel = SGNHT(logistic_potential(), step_size=0.15, diffusion=1.0)
    _, vectors, _ = drive(kernel, 256, 200, 500, seed=3)
    assert scores_of_chains(logistic_features(vectors), logistic_moments()).abs().max() < 4


def test_a_thermostat_at_zero_is_no_division_by_zero():
    kernel = SGNHT(isotropic_potential(3, 1.0), step_size=0.1, diffusion=1.0)
    state, generator = begin(kernel, 2)
    momentum = torch.ones_like(state["momentum"])  # of temperature 1: friction stays 0
    state |= {"thermostat": torch.zeros(2, dtype=F64), "momentum": momentum}
    noise = draw_noise(kernel.noise_size, 2, generator)
    moved = kernel.step(state, noise)
    drifted = state["vectors"] + 0.05 * momentum
    after = momentum + math.sqrt(2 * 0.1) * noise.normals
    torch.testing.assert_close(moved["vectors"], drifted + 0.05 * after)


def test_a_held_thermostat_is_sghmc():
    # In so many dimensions that one step does not move the friction.
    potential = isotropic_potential(50_000, 1.0)
    one, other = SGNHT(potential, step_size=1e-3), SGHMC(potential, step_size=1e-3, friction=1.0)
    state, generator = begin(other, 1)
    noise = draw_noise(other.noise_size, 1, generator)
    expected = other.step(state, noise)
    found = one.step(state | {"thermostat": torch.ones(1, dtype=F64)}, Noise(*vars(noise).values()))
    torch.testing.assert_close(found["vectors"], expected["vectors"], rtol=0, atol=1e-7)
