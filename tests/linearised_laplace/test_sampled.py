"""Posterior draws by optimisation against dense algebra, with one noise and by moments."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from laplace_scenarios import PROBLEMS, numbers
from oracles.linear_gaussian import gaussian, mackay
from pushforward.linalg.conjugate_gradients import BlockIterate
from pushforward.linearised_laplace.linear_model import NOISE_BLOCK
from pushforward.linearised_laplace.resumable import run
from pushforward.linearised_laplace.sampled import (
    SampledState,
    SampledTask,
    current_likelihood,
    effective_dimensions,
    prior_draws,
    right_hand_sides,
    step,
    unsettled,
)
from pushforward.networks.likelihoods import Gaussian
from pushforward.runs.distributed import ProcessGrid
from pushforward.runs.rng import stream

PRECISION = {"isotropic": 2.5, "layerwise": {"0": 0.7, "2": 4.0}}
SEED = 5


@pytest.fixture(params=PROBLEMS, ids=str)
def problem(request):
    return PROBLEMS[request.param]


def task_for(linear, num_draws, **settings):
    defaults = {"learn_prior": False, "learn_noise": False, "tolerance": 1e-6}
    return SampledTask(linear, num_draws, SEED, **(defaults | settings))


def finished(linear, num_draws, *, noise=None, **settings):
    return run(task_for(linear, num_draws, **settings), linear.prior, noise, None)


def dense_factors(problem, dense):
    """The likelihood's own factor of the curvature as matrices ``(N, C, C)``."""
    outputs = dense.outputs
    units = torch.eye(outputs[0].numel(), dtype=torch.float64)
    columns = units.reshape(-1, 1, *outputs.shape[1:]).expand(-1, *outputs.shape)
    factors = problem.likelihood.curvature_factor(outputs, columns)
    return factors.flatten(2).permute(1, 2, 0)


def dense_noise(problem, dense, draw):
    """``theta0`` and the standard normal noise of the targets, from their streams."""
    weights = torch.randn(
        len(dense.trained), generator=stream(SEED, "weights", draw), dtype=torch.float64
    )
    shape, blocks = (NOISE_BLOCK, *dense.outputs.shape[1:]), -(-len(problem.x) // NOISE_BLOCK)
    parts = [
        torch.randn(shape, generator=stream(SEED, "targets", draw, b), dtype=torch.float64)
        for b in range(blocks)
    ]
    return weights, torch.cat(parts)[: len(problem.x)].flatten(1)


# --- one draw -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PRECISION)
def test_draws_minimise_both_objectives(problem, kind):
    linear, dense = problem.linear(kind, PRECISION[kind]), problem.dense()
    draws = finished(linear, 3).draws
    precision = linear.prior.diagonal()
    curvature, factors = dense.curvature_at(dense.outputs), dense_factors(problem, dense)
    torch.testing.assert_close(factors @ factors.mT, curvature, rtol=1e-9, atol=1e-11)
    values, vectors = torch.linalg.eigh(curvature)
    root = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    features = (root @ dense.jacobian).flatten(0, 1)
    stacked = torch.cat([features, precision.sqrt().diag()])
    for draw in range(3):
        e0, e = dense_noise(problem, dense, draw)
        pushed = (factors @ e[..., None])[..., 0]  # B times the target's noise
        theta0, gathered = e0 * precision.rsqrt(), torch.einsum("ncp,nc->p", dense.jacobian, pushed)
        # Targets drawn once: 1/2 sum |J z - e|_B^2 + 1/2 |z - theta0|_A^2.
        targets = (torch.linalg.pinv(root) @ pushed[..., None]).flatten()
        right = torch.cat([targets, precision.sqrt() * theta0])
        first = torch.linalg.lstsq(stacked, right).solution
        # Noise in the prior's mean: 1/2 sum |J z|_B^2 + 1/2 |z - theta_n|_A^2.
        shifted = theta0 + gathered / precision
        right = torch.cat([torch.zeros_like(targets), precision.sqrt() * shifted])
        second = torch.linalg.lstsq(stacked, right).solution
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(draws[draw], second, rtol=1e-4, atol=1e-5)


def test_draws_solve_the_linear_system(problem):
    linear, dense = problem.linear("isotropic", 2.5), problem.dense()
    state = finished(linear, 4, tolerance=1e-8)
    sketch = linear.sketch(range(4), SEED)
    right = right_hand_sides(linear.prior, sketch.vectors, range(4), SEED, None)
    expected = right @ dense.covariance(2.5)
    torch.testing.assert_close(state.draws, expected, rtol=1e-6, atol=1e-7)
    moved = torch.einsum("kp,pq,kq->k", expected, dense.gauss_newton, expected)
    torch.testing.assert_close(state.gammas.sum(1), moved, rtol=1e-5, atol=1e-6)


def test_a_g_prior_is_scaled_by_the_sketch(problem):
    linear = problem.linear("gprior", 1.3)
    state = finished(linear, 4)
    diagonal = linear.sketch(range(4), SEED).diagonal
    torch.testing.assert_close(state.prior.scale, diagonal.rsqrt())
    dense = replace(problem.dense(), scale=state.prior.scale)
    sketch = linear.with_prior(state.prior).sketch(range(4), SEED)
    torch.testing.assert_close(sketch.diagonal, torch.ones_like(diagonal))
    right = right_hand_sides(state.prior, sketch.vectors, range(4), SEED, None)
    torch.testing.assert_close(state.draws, right @ dense.covariance(1.3), rtol=1e-5, atol=1e-6)


def test_effective_dimensions_of_draws(problem):
    linear, dense = problem.linear(), problem.dense()
    draws, right = (numbers(3, linear.model.space.size, seed=seed) for seed in (50, 51))
    residual = right - draws @ dense.posterior_precision(1.0)
    iterate = BlockIterate(draws, residual, residual, torch.zeros(0, 3, dtype=torch.float64))
    curved = draws * (draws @ dense.gauss_newton)
    index = problem.groups("layerwise")
    expected = torch.zeros(3, 2, dtype=torch.float64).index_add(1, index, curved)
    torch.testing.assert_close(effective_dimensions(linear, iterate, right), expected)


def test_the_error_estimate_is_about_the_error(problem):
    linear, dense = problem.linear("isotropic", 0.05), problem.dense()
    state = finished(linear, 6, tolerance=0.1)
    right = right_hand_sides(
        linear.prior, linear.sketch(range(6), SEED).vectors, range(6), SEED, None
    )
    difference = state.draws - right @ dense.covariance(0.05)
    true = torch.einsum("kp,pq,kq->k", difference, dense.posterior_precision(0.05), difference)
    gamma = dense.effective_dimensions(0.05).sum()
    assert state.errors.mean() <= 0.1**2
    assert true.mean() / gamma < 9 * 0.1**2


# --- noise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", [1, 3_000, 2**25])
def test_a_sketch_depends_on_seed_and_number_alone(problem, workspace):
    whole = problem.linear().sketch(range(6), SEED).vectors
    small = problem.linear(workspace=workspace).sketch(range(2, 5), SEED).vectors
    torch.testing.assert_close(small, whole[2:5], rtol=1e-11, atol=1e-11)
    other = problem.linear().sketch(range(6), SEED + 1).vectors
    assert (other - whole).abs().max() > 0.1


@pytest.mark.statistical
def test_sketches_have_the_covariance_of_the_curvature(problem):
    linear, dense = problem.linear(), problem.dense()
    sketch = linear.sketch(range(400), SEED)
    exact = dense.gauss_newton.diagonal()
    # Squares of Gaussians: relative error sqrt(2 / 400); 5 of them for the largest of 26 or so.
    assert ((sketch.vectors.square().mean(0) / exact - 1).abs() < 5 * (2 / 400) ** 0.5).all()
    assert ((sketch.diagonal / exact - 1).abs() < 5 * (2 / 400) ** 0.5).all()
    # In the eigenvectors of the curvature the components are independent.
    values, vectors = torch.linalg.eigh(dense.gauss_newton)
    kept = values > 1e-6 * values.max()
    white = (sketch.vectors @ vectors)[:, kept] * values[kept].rsqrt()
    covariance = white.T @ white / 400
    assert (covariance - torch.eye(int(kept.sum()))).abs().max() < 5 * (2 / 400) ** 0.5


def test_prior_draws_are_what_draws_are_without_data():
    linear = PROBLEMS["gaussian"].linear("layerwise", {"0": 0.7, "2": 4.0})
    like = torch.zeros(3, linear.model.space.size, dtype=torch.float64)
    drawn = prior_draws(linear.prior, like, range(3), SEED)
    right = right_hand_sides(linear.prior, like, range(3), SEED, None)
    torch.testing.assert_close(right / linear.prior.diagonal(), drawn)
    torch.testing.assert_close(prior_draws(linear.prior, like[:1], range(2, 3), SEED), drawn[2:])


def test_a_sketch_outlives_the_noise():
    problem = PROBLEMS["gaussian"]
    unit = problem.with_noise(1.0).linear("isotropic", 2.5)
    sketch = unit.sketch(range(3), SEED).vectors
    found = right_hand_sides(unit.prior, sketch, range(3), SEED, 0.1)
    direct = problem.linear("isotropic", 2.5)
    expected = right_hand_sides(
        direct.prior, direct.sketch(range(3), SEED).vectors, range(3), SEED, None
    )
    torch.testing.assert_close(found, expected)
    assert current_likelihood(Gaussian(1.0), 0.1) == Gaussian(0.1)
    assert current_likelihood(Gaussian(1.0), None) == Gaussian(1.0)


# --- what does not matter -----------------------------------------------------------------------


@pytest.mark.parametrize("workspace", [1, 3_000])
@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("recycled", [0, 256])
def test_the_workspace_does_not_matter(workspace, learn, recycled):
    problem, settings = PROBLEMS["categorical"], {"learn_prior": learn, "recycled": recycled}
    expected = finished(problem.linear(), 6, **settings, tolerance=0.03)
    small = finished(problem.linear(workspace=workspace), 6, **settings, tolerance=0.03)
    # Recycled directions are made orthonormal again and again, which multiplies rounding.
    exactness = 1e-7 if recycled == 0 else 1e-3
    torch.testing.assert_close(small.draws, expected.draws, rtol=exactness, atol=exactness)
    torch.testing.assert_close(small.prior.precision, expected.prior.precision, rtol=1e-8, atol=0)


def test_blocks_and_company_do_not_matter_to_a_solved_draw():
    linear = PROBLEMS["categorical"].linear("isotropic", 2.5)
    together = finished(linear, 9, block=64).draws
    for settings in ({"block": 1}, {"block": 4}, {"block": 9, "recycled": 0}):
        torch.testing.assert_close(
            finished(linear, 9, **settings).draws, together, rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(finished(linear, 3).draws, together[:3], rtol=1e-4, atol=1e-5)


def test_blocks_divide_the_draws():
    linear = PROBLEMS["categorical"].linear()
    assert task_for(linear, 9, block=4).blocks == (range(4), range(4, 8), range(8, 9))
    assert task_for(linear, 3, block=4).blocks == (range(3),)


@pytest.mark.statistical
def test_single_precision_is_enough_for_draws():
    problem = PROBLEMS["categorical"]
    linear = replace(
        problem, net=deepcopy(problem.net).float(), x=problem.x.float()
    ).linear("isotropic", 2.5)  # fmt: skip
    single = finished(linear, 64, tolerance=0.01)
    assert single.draws.dtype == torch.float32
    dense = problem.dense()
    mean = single.gammas.sum(1).mean()
    spread = (2 * dense.spectrum(2.5).square().sum() / 64).sqrt()
    assert abs(mean - dense.effective_dimensions(2.5).sum()) < 5 * spread


# --- many draws ---------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("kind", PRECISION)
def test_the_effective_dimension_is_within_its_error(problem, kind):
    linear, dense = problem.linear(kind, PRECISION[kind]), problem.dense()
    state = finished(linear, 512, tolerance=0.03, block=512)
    precision = linear.prior.diagonal()
    spread = (2 * dense.spectrum(precision).square().sum() / 512).sqrt()
    gamma = state.gammas.sum(1)
    # Four standard errors: wrong once in 16,000.
    assert abs(gamma.mean() - dense.effective_dimensions(precision).sum()) < 4 * spread
    assert gamma.std() / 512**0.5 == pytest.approx(spread.item(), rel=0.3)
    layers = torch.zeros(2, dtype=torch.float64).index_add(
        0, problem.groups("layerwise"), dense.effective_dimensions(precision)
    )
    error = state.gammas.std(0) / 512**0.5
    assert ((state.gammas.mean(0) - layers).abs() < 4.5 * error + 1e-3 * layers).all()


@pytest.mark.statistical
def test_draws_have_the_covariance(problem):
    linear, dense = problem.linear("isotropic", 2.5), problem.dense()
    draws = finished(linear, 512, tolerance=0.03, block=512).draws
    factor = torch.linalg.cholesky(dense.posterior_precision(2.5))
    white = draws @ factor  # covariance one
    covariance = white.T @ white / 512
    # Entries have a standard error of sqrt(1 / 512) beside and sqrt(2 / 512) on the diagonal.
    assert (covariance.diagonal() - 1).abs().max() < 5 * (2 / 512) ** 0.5
    beside = covariance - covariance.diagonal().diag()
    assert beside.abs().max() < 5 / 512**0.5
    assert white.mean(0).abs().max() < 5 / 512**0.5


# --- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "offset"),
    [
        ("categorical", "isotropic", "affine"),
        ("categorical", "isotropic", "linear"),
        ("poisson", "layerwise", "affine"),
        ("bernoulli", "layerwise", "affine"),
    ],
)
def test_the_prior_reaches_the_fixed_point(name, kind, offset):
    problem = PROBLEMS[name]
    state = finished(
        problem.linear(kind, 1.0, offset), 300, learn_prior=True, em_draws=300, block=300,
        tolerance=0.1, max_rounds=40,
    )  # fmt: skip
    expected, _ = mackay(problem.dense(affine=offset == "affine"), problem.groups(kind), 1.0)
    # Errors of a few percent in the effective dimension grow on the way to the fixed point.
    torch.testing.assert_close(state.prior.precision.log(), expected.log(), rtol=0, atol=0.2)
    assert state.rounds
    assert state.settled


@pytest.mark.parametrize("by", [0.0, 1e-3])
@pytest.mark.parametrize("kind", ["isotropic", "gprior"])
def test_small_weights_do_not_hold_the_prior(kind, by):
    problem = replace(PROBLEMS["categorical"], net=deepcopy(PROBLEMS["categorical"].net)[:1])
    with torch.no_grad():
        for p in problem.net.parameters():
            p.mul_(by)
    problem = replace(problem, y=problem.x.argmax(1) + numbers(len(problem.x), seed=9).gt(1) * 1)
    state = finished(
        problem.linear(kind), 200, learn_prior=True, em_draws=200, block=200,
        tolerance=0.1, max_rounds=40,
    )  # fmt: skip
    dense = problem.dense().g_prior() if kind == "gprior" else problem.dense()
    expected, _ = mackay(dense, problem.groups(kind), 1.0)
    torch.testing.assert_close(state.prior.precision.log(), expected.log(), rtol=0, atol=0.2)
    assert state.settled


@pytest.mark.parametrize(
    ("change", "gamma", "expected"),
    [
        (3.0, 5.0, 3.0),
        (-3.0, 5.0, 3.0),
        (3.0, 1e-4, 0.0),  # runs off, to no effect
        (-3.0, 1e-4, 3.0),  # comes back
        (-3.0, 1e-12, 0.0),  # rounding
    ],
)
def test_what_of_a_change_matters(change, gamma, expected):
    numbers_of = [torch.tensor([value], dtype=torch.float64) for value in (change, gamma)]
    assert unsettled(*numbers_of).item() == expected


@pytest.mark.parametrize("index", [0, 1])
def test_every_process_has_the_g_prior_of_one(index):
    linear = PROBLEMS["categorical"].linear("gprior", 1.3)
    alone = step(task_for(linear, 7, block=4), SampledState("sketch", linear.prior))
    shared = task_for(replace(linear, grid=ProcessGrid(2, 1, index, 0)), 7, block=4)
    state = step(shared, SampledState("sketch", linear.prior))
    assert torch.equal(state.prior.scale, alone.prior.scale)
    # The block that is solved first is that of this process.
    while state.iterate is None:
        state = step(shared, state)
    expected = linear.with_prior(alone.prior).sketch(shared.blocks[0], SEED).vectors
    torch.testing.assert_close(state.sketch, expected)


def test_the_noise_is_learned_too():
    problem = PROBLEMS["gaussian"].with_noise(1.0)
    state = finished(
        problem.linear(), 300, noise=1.0, learn_prior=True, learn_noise=True,
        em_draws=300, block=300, tolerance=0.05, max_rounds=40,
    )  # fmt: skip
    dense = problem.dense()
    (alpha,), noise = mackay(dense, problem.groups("isotropic"), 1.0, noise=1.0)
    assert state.noise_variance == pytest.approx(noise, rel=0.02)
    assert state.prior.precision.item() == pytest.approx(alpha.item(), rel=0.15)
    # The draws are those of the learned prior and noise.
    here = replace(dense, log_prob=gaussian(state.noise_variance))
    gamma = here.effective_dimensions(state.prior.precision.item()).sum()
    spread = (2 * here.spectrum(state.prior.precision.item()).square().sum() / 300).sqrt()
    assert abs(state.gammas.sum(1).mean() - gamma) < 4 * spread + 0.01 * gamma


def test_the_noise_alone_can_be_learned():
    problem = PROBLEMS["gaussian"].with_noise(1.0)
    state = finished(
        problem.linear("isotropic", 3.0), 300, noise=1.0, learn_noise=True, em_draws=300,
        block=300, tolerance=0.05, max_rounds=40,
    )  # fmt: skip
    _, noise = mackay(
        problem.dense(), problem.groups("isotropic"), 3.0, noise=1.0, learn_prior=False
    )
    assert state.prior.precision.tolist() == [3.0]
    assert state.noise_variance == pytest.approx(noise, rel=0.02)


def test_rounds_record_what_happened():
    state = finished(PROBLEMS["poisson"].linear("layerwise"), 8, learn_prior=True, tolerance=0.1)
    assert len(state.rounds) <= 12
    works = [entry.passes for entry in state.rounds]
    assert works == sorted(set(works))
    for entry in state.rounds:
        assert entry.noise_variance is None
        assert len(entry.precision) == len(entry.effective_dimension) == 2
        assert all(
            0 < g <= size for g, size in zip(entry.effective_dimension, (16, 5), strict=True)
        )
        assert all(e > 0 for e in entry.standard_error)
        assert all(n > 0 for n in entry.squared_norm)
    assert state.work >= works[-1]
