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
from pushforward.sampling.hmc import HMC
from pushforward.sampling.mala import MALA
from pushforward.sampling.noise import Noise

# Steps on a standard normal law, of which other implementations of the ratio give the acceptance,
# in single precision: logarithms of up to 700 leave four digits.
KNOWN = [
    ((0.0, 0.0), (1.5, 5.5), 0.1, 0.6661436),
    ((0.0, 0.0), (10.5, 5.5), 0.1, 0.17268492),
    ((0.0, 0.0), (10.5, 5.5), 0.5, 0.00015359),
    ((1.0, 2.0), (1.5, 2.5), 0.1, 0.95719343),
]


def step_to(kernel, start, end, root):
    """The step that proposes `end`, with the noise that leads there."""
    nothing = Noise(torch.zeros(1, 2 * len(start), dtype=F64), torch.zeros(1, 0, dtype=F64))
    state = kernel.start({"x": start[None]}, nothing)
    size = float(kernel.step_size)
    drift = size / 2 * root @ root.mT @ state["gradient"][0]
    normals = torch.linalg.solve(root, end - start + drift) / size**0.5
    return kernel.step(state, Noise(normals[None], torch.zeros(1, 1, dtype=F64)))


@pytest.mark.parametrize(("start", "end", "size", "known"), KNOWN)
def test_known_acceptances(start, end, size, known):
    unit = torch.eye(2, dtype=F64)
    kernel = MALA(
        gaussian_potential(torch.zeros(2, dtype=F64), unit), step_size=size, mass="identity"
    )
    start, end = (torch.tensor(values, dtype=F64) for values in (start, end))
    found = step_to(kernel, start, end, unit)
    assert torch.allclose(found["vectors"][0], end)
    assert float(found["acceptance"]) == pytest.approx(known, rel=5e-5, abs=1e-8)


@pytest.mark.parametrize("mass", ["identity", "diagonal", "matrix"])
def test_the_ratio_is_that_of_target_and_proposals(mass):
    torch.manual_seed(0)
    covariance, mean = correlated_covariance(3), torch.randn(3, dtype=F64)
    inverse = {
        "identity": torch.eye(3, dtype=F64),
        "diagonal": torch.tensor([1.0, 0.3, 4.0], dtype=F64).diag(),
        "matrix": torch.linalg.inv(correlated_covariance(3).flip(0, 1) + torch.eye(3, dtype=F64)),
    }[mass]
    spread = torch.linalg.inv(inverse)
    given = {"identity": "identity", "diagonal": inverse.diagonal(), "matrix": inverse}[mass]
    kernel = MALA(gaussian_potential(mean, covariance), step_size=0.7, mass=given)
    law = torch.distributions.MultivariateNormal(mean, covariance)

    def proposals(at):
        slope = torch.linalg.solve(covariance, at - mean)
        return torch.distributions.MultivariateNormal(at - 0.35 * spread @ slope, 0.7 * spread)

    start, end = torch.randn(2, 3, dtype=F64)
    ratio = law.log_prob(end) - law.log_prob(start)
    ratio += proposals(end).log_prob(start) - proposals(start).log_prob(end)
    root = torch.linalg.cholesky(inverse).mT.inverse()
    found = step_to(kernel, start, end, root)
    torch.testing.assert_close(found["vectors"][0], end)
    assert float(found["acceptance"]) == pytest.approx(float(ratio.clamp(max=0).exp()))


@pytest.mark.parametrize(
    "mass", ["identity", torch.tensor([1.0, 0.3, 4.0]), correlated_covariance(3)]
)
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
