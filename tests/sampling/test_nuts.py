"""NUTS against trees by recursion, and its law."""

import pytest
import torch

from oracles.markov import (
    F64,
    correlated_covariance,
    drive,
    gaussian_potential,
    logistic_features,
    logistic_moments,
    logistic_potential,
    scores_of_chains,
)
from oracles.recursive_nuts import trajectory
from pushforward.sampling.dynamics import LARGEST_ENERGY_ERROR
from pushforward.sampling.noise import Noise
from pushforward.sampling.nuts import NUTS
from pushforward.sampling.potential import Potential

DEPTH = 6


def banana():
    def log_density(p):
        a, b = p["x"]
        return -a * a / 2 - 2 * (b - a * a) ** 2

    return Potential.of_density(log_density, {"x": torch.zeros(2, dtype=F64)})


def one_by_one(potential):
    def value_and_gradient(vector):
        value, gradient = potential.value_and_gradient(vector[None])
        return value[0], gradient[0]

    return value_and_gradient


def scene(potential, chains, step_size, seed):
    """A kernel, a state and noise."""
    generator = torch.Generator().manual_seed(seed)
    kernel = NUTS(potential, step_size=step_size, max_depth=DEPTH, mass="identity")
    size = potential.space.size
    starts = torch.randn(chains, size, generator=generator, dtype=F64)
    state = kernel.start(
        {"x": starts}, Noise(torch.zeros(chains, 2 * size, dtype=F64), starts[:, :0])
    )
    noise = Noise(
        torch.randn(chains, size, generator=generator, dtype=F64),
        torch.rand(chains, kernel.noise_size.uniforms, generator=generator, dtype=F64),
    )
    return kernel, state, noise


def directions(uniforms):
    return [bool(u < 0.5) for u in uniforms[::3]]


@pytest.mark.parametrize(
    ("potential", "step_size"),
    [
        (banana(), 0.15),
        (banana(), 0.4),
        (banana(), 1.5),
        (gaussian_potential(torch.zeros(3, dtype=F64), correlated_covariance(3)), 0.25),
        (gaussian_potential(torch.zeros(3, dtype=F64), correlated_covariance(3)), 0.1),
    ],
)
def test_trees_are_those_of_the_recursion(potential, step_size):
    kernel, state, noise = scene(potential, 40, step_size, seed=2)
    moved = kernel.step(state, noise)
    depths = set()
    for chain in range(40):
        expected = trajectory(
            one_by_one(potential),
            state["vectors"][chain],
            noise.normals[chain],
            step_size,
            directions(noise.uniforms[chain]),
            LARGEST_ENERGY_ERROR,
        )
        assert moved["leapfrog_steps"][chain] == expected.steps
        assert moved["tree_depth"][chain] == expected.depth
        assert bool(moved["divergent"][chain]) == expected.divergent
        torch.testing.assert_close(
            moved["acceptance"][chain], torch.tensor(expected.acceptance, dtype=F64)
        )
        distances = torch.stack([(q - moved["vectors"][chain]).norm() for q, _ in expected.points])
        chosen = int(distances.argmin())
        assert distances[chosen] < 1e-9
        assert expected.probabilities[chosen] > 0
        depths.add(expected.depth)
    assert len(depths) > 1
    value, gradient = potential.value_and_gradient(moved["vectors"])
    torch.testing.assert_close(moved["potential"], value)
    torch.testing.assert_close(moved["gradient"], gradient)


@pytest.mark.statistical
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_points_are_chosen_by_their_weights(depth):
    # The same trajectory 20,000 times over. Pearson's statistic exceeds its mean by 5 standard
    # deviations less than once in 1,000 tests.
    potential = gaussian_potential(torch.zeros(3, dtype=F64), correlated_covariance(3))
    step_size, copies = 0.6 if depth < 4 else 0.25, 20_000
    kernel, state, noise = scene(potential, 40, step_size, seed=5)
    drawn = kernel.step(state, noise)
    chain = int((drawn["tree_depth"] == depth).nonzero()[0])
    expected = trajectory(
        one_by_one(potential),
        state["vectors"][chain],
        noise.normals[chain],
        step_size,
        directions(noise.uniforms[chain]),
    )
    many = {k: v[chain : chain + 1].repeat_interleave(copies, 0) for k, v in state.items()}
    uniforms = torch.rand(
        copies, kernel.noise_size.uniforms, generator=torch.Generator().manual_seed(9), dtype=F64
    )
    uniforms[:, ::3] = noise.uniforms[chain, ::3]
    normals = noise.normals[chain : chain + 1].repeat_interleave(copies, 0)
    moved = kernel.step(many, Noise(normals, uniforms))["vectors"]

    points = torch.stack([q for q, _ in expected.points])
    probabilities = torch.tensor(expected.probabilities, dtype=F64)
    assert abs(probabilities.sum() - 1) < 1e-12
    counts = torch.cdist(moved, points).argmin(1).bincount(minlength=len(points)).double()
    assert bool((counts[probabilities < 1e-12] == 0).all())
    likely = probabilities * copies > 5
    degrees = int(likely.sum()) - 1
    assert degrees >= 2**depth // 2 - 1
    wanted = probabilities[likely] * copies
    pearson = ((counts[likely] - wanted) ** 2 / wanted).sum()
    assert pearson < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.statistical
def test_logistic_regression():
    # Six means: 4 standard errors are exceeded once in 2,600 such tests.
    kernel = NUTS(logistic_potential())
    _, vectors, statistics = drive(kernel, 128, 150, 80, seed=1)
    scores = scores_of_chains(logistic_features(vectors), logistic_moments())
    assert scores.abs().max() < 4
    assert 0.7 < statistics["acceptance"].mean() < 0.95
    assert statistics["divergent"].sum() == 0
    assert statistics["tree_depth"].max() <= 10


@pytest.mark.statistical
def test_a_curved_law():
    # a ~ N(0, 1) and b | a ~ N(a^2, 1 / 4): the means of a, a^2, b, b^2 and a b.
    kernel = NUTS(banana(), step_size=0.25, mass="identity")
    generator = torch.Generator().manual_seed(8)
    a, noise = torch.randn(2, 4096, generator=generator, dtype=F64)
    start = torch.stack([a, a * a + noise / 2], -1)
    _, vectors, _ = drive(kernel, 4096, 0, 5, seed=2, initial={"x": start})
    a, b = vectors[:, -1].unbind(-1)
    for found, mean in ((a, 0), (a * a, 1), (b, 1), (b * b, 3.25), (a * b, 0)):
        assert abs(found.mean() - mean) / found.std() * 64 < 4.5


def test_depth_ends_a_trajectory():
    flat = Potential.of_density(lambda p: 0.0 * p["x"].sum(), {"x": torch.zeros(2, dtype=F64)})
    kernel = NUTS(flat, step_size=1.0, max_depth=4, mass="identity")
    _, _, statistics = drive(kernel, 3, 0, 2)
    assert bool((statistics["tree_depth"] == 4).all())
    assert bool((statistics["leapfrog_steps"] == 15).all())


def test_huge_steps_diverge_and_stay():
    kernel = NUTS(banana(), step_size=1e6, mass="identity")
    state, vectors, statistics = drive(kernel, 4, 0, 3)
    assert bool((statistics["divergent"] == 1).all())
    assert bool((statistics["acceptance"] < 1e-12).all())
    assert torch.equal(vectors[:, 0], vectors[:, 2])
    assert bool(torch.isfinite(state["gradient"]).all())
