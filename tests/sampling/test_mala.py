"""MALA: its ratio against known values and against leapfrog, and its law."""

import pytest
import torch

from oracles.markov import (
    F64,
    begin,
    correlated_covariance,
    draw_noise,
    drive,
    gaussian_potential,
    logistic_features,
    logistic_moments,
    logistic_potential,
    scores_of_chains,
)
from pushforward.sampling.dynamics import acceptance_probability
from pushforward.sampling.hmc import HMC
from pushforward.sampling.mala import MALA, langevin_log_ratio

# Steps of which other implementations of the same ratio give the acceptance, in single precision:
# logarithms of up to 700 leave four digits.
KNOWN = [
    ((0.0, 0.0), (0.0, 0.0), 0.0, (1.5, 5.5), (1.5, 5.5), 16.25, 0.1, 0.6661436),
    ((1.0, 1.0), (1.0, 1.0), 1.0, (1.5, 0.5), (1.5, 0.5), 1.25, 0.5, 0.9692332),
    ((0.0, 0.0), (0.0, 0.0), 0.0, (10.5, 5.5), (10.5, 5.5), 70.25, 0.1, 0.17268492),
    ((0.0, 0.0), (0.0, 0.0), 0.0, (10.5, 5.5), (10.5, 5.5), 70.25, 0.5, 0.00015359),
    ((1.0, 2.0), (1.0, 2.0), 2.5, (1.5, 2.5), (1.5, 2.5), 4.25, 0.1, 0.95719343),
]


def row(values):
    return torch.tensor([values], dtype=F64)


@pytest.mark.parametrize(("a", "slope_a", "u_a", "b", "slope_b", "u_b", "size", "known"), KNOWN)
def test_known_acceptances(a, slope_a, u_a, b, slope_b, u_b, size, known):
    log_ratio = langevin_log_ratio(
        row(a),
        row(slope_a),
        row(u_a),
        row(b),
        row(slope_b),
        row(u_b),
        row(size),
        torch.ones(1, 1, dtype=F64),
    )
    torch.testing.assert_close(acceptance_probability(log_ratio), row(known), rtol=5e-5, atol=1e-8)


@pytest.mark.parametrize("mass", ["identity", torch.tensor([1.0, 0.3, 4.0])])
def test_a_langevin_step_is_one_leapfrog_step(mass):
    potential = gaussian_potential(torch.zeros(3, dtype=F64), correlated_covariance(3))
    mala = MALA(potential, step_size=0.49, mass=mass)
    hmc = HMC(potential, step_size=0.7, num_steps=1, jitter=0.0, mass=mass)
    one, generator = begin(mala, 6)
    other, _ = begin(hmc, 6)
    for _ in range(5):
        noise = draw_noise(mala.noise_size, 6, generator)
        one, other = mala.step(one, noise), hmc.step(other, noise)
        for name in ("vectors", "gradient", "potential", "acceptance"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-10, atol=1e-12)


@pytest.mark.statistical
def test_logistic_regression():
    # Six means: 4 standard errors are exceeded once in 2,600 such tests.
    kernel = MALA(logistic_potential())
    _, vectors, statistics = drive(kernel, 512, 400, 400, seed=3)
    scores = scores_of_chains(logistic_features(vectors), logistic_moments())
    assert scores.abs().max() < 4
    assert 0.5 < statistics["acceptance"].mean() < 0.65


def test_huge_steps_are_refused_and_say_so():
    kernel = MALA(logistic_potential(), step_size=1e12, mass="identity")
    _, vectors, statistics = drive(kernel, 4, 0, 3)
    assert bool((statistics["acceptance"] == 0).all())
    assert bool((statistics["divergent"] == 1).all())
    assert torch.equal(vectors[:, 0], vectors[:, 2])
