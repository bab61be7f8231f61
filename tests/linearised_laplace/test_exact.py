"""The exact posterior over weights and over outputs against dense algebra, and each other."""

import pytest
import torch

import pushforward as pf
from laplace_scenarios import PROBLEMS, Problem, numbers
from oracles.linear_gaussian import dense_jacobian
from pushforward.errors import ResourceError
from pushforward.linearised_laplace import exact
from pushforward.linearised_laplace.exact import dual_factor, primal_factor
from pushforward.runs.distributed import ProcessGrid

KINDS = {"isotropic": 2.5, "layerwise": {"0": 0.7, "2": 4.0}, "gprior": 1.3}


@pytest.fixture(params=PROBLEMS, ids=str)
def problem(request):
    return PROBLEMS[request.param]


def factorisations(problem, kind="isotropic"):
    """Primal and dual posterior, with the dense model and its precisions."""
    linear = problem.linear(kind, KINDS[kind])
    found = []
    for make in (primal_factor, dual_factor):
        factor = make(linear)
        prior = linear.prior.with_scale(factor.diagonal)
        found.append(factor.rescaled(prior.scale).factorise(prior))
    dense = problem.dense()
    dense = dense.g_prior() if kind == "gprior" else dense
    return *found, dense, linear.prior.diagonal()


def close(actual, expected, rtol=1e-8):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-9 * expected.abs().max().item())


def test_both_factors_hold_the_gauss_newton_matrix(problem):
    linear, dense = problem.linear(), problem.dense()
    primal, dual = primal_factor(linear), dual_factor(linear)
    close(primal.curvature, dense.gauss_newton)
    close(dual.rows.T @ dual.rows, dense.gauss_newton)
    close(primal.diagonal, dual.diagonal)


@pytest.mark.parametrize("kind", KINDS)
def test_log_determinants(problem, kind):
    primal, dual, dense, precision = factorisations(problem, kind)
    expected = dense.posterior_precision(precision).logdet() - precision.log().sum()
    assert primal.log_determinant_ratio == pytest.approx(expected.item(), rel=1e-8)
    assert dual.log_determinant_ratio == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_effective_dimensions(problem, kind):
    primal, dual, dense, precision = factorisations(problem, kind)
    gammas = dense.effective_dimensions(precision)
    index = problem.groups("layerwise")
    expected = torch.zeros(2, dtype=torch.float64).index_add(0, index, gammas)
    close(primal.effective_dimensions(), expected)
    close(dual.effective_dimensions(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_solutions_and_variances(problem, kind):
    primal, dual, dense, precision = factorisations(problem, kind)
    vectors = numbers(4, len(precision), seed=30)
    expected = vectors @ dense.covariance(precision)
    close(primal.solve(vectors), expected)
    close(dual.solve(vectors), expected)
    _, jacobian, _ = dense_jacobian(problem.net, 2 * numbers(6, 3, seed=31))
    rows = jacobian * dense.scale
    form = rows @ dense.covariance(precision) @ rows.mT
    close(primal.variance_form(rows), form)
    close(dual.variance_form(rows), form)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_covariance(problem, kind, monkeypatch):
    # Draws are linear in their noise: its unit vectors give their covariance without sampling.
    primal, dual, dense, precision = factorisations(problem, kind)
    sizes = {"weights": len(precision), "outputs": problem.dense().outputs.numel()}

    def unit_vectors(count, size, _seed, name, _device):
        first = 0 if name == "weights" else sizes["weights"]
        return torch.eye(count, dtype=torch.float64)[:, first : first + size].clone()

    monkeypatch.setattr(exact, "_noise", unit_vectors)
    expected = dense.covariance(precision)
    drawn = primal.sample(sizes["weights"], 0)
    close(drawn.T @ drawn, expected)
    drawn = dual.sample(sum(sizes.values()), 0)
    close(drawn.T @ drawn, expected)


def test_a_draw_depends_on_its_number_alone(problem):
    for factor in factorisations(problem)[:2]:
        five = factor.sample(5, 7)
        torch.testing.assert_close(factor.sample(3, 7), five[:3], rtol=1e-12, atol=1e-14)
        assert (factor.sample(3, 8) - five[:3]).abs().min() > 0
        assert (five[0] - five[1]).abs().max() > 1e-3


@pytest.mark.statistical
def test_noise_is_standard_normal():
    # 1e5 numbers: mean and variance within four standard errors, wrong once in 16,000 each.
    noise = exact._noise(100, 1000, 3, "weights", torch.device("cpu"))
    count = noise.numel()
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.var() - 1) < 4 * (2 / count) ** 0.5
    correlation = (noise @ noise.T / 1000).fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / 1000**0.5


def test_rescaling_is_a_change_of_coordinates(problem):
    linear, dense = problem.linear(), problem.dense()
    scale = numbers(len(dense.trained), seed=32).exp()
    matrix = 3.0 * scale[:, None] * dense.gauss_newton * scale
    close(3.0 * primal_factor(linear).rescaled(scale).curvature, matrix)
    rows = dual_factor(linear).rescaled(scale).factorise(linear.prior, 3.0).rows
    close(rows.T @ rows, matrix)


def test_the_dual_wants_all_examples():
    grid = ProcessGrid(1, 2, 0, 0)
    linear = PROBLEMS["categorical"].linear(grid=grid)
    with pytest.raises(ResourceError, match="one process"):
        dual_factor(linear)


def test_more_weights_than_outputs_and_fewer():
    # `laplace` takes the smaller side; both sides of the choice give the oracle's numbers.
    problem = PROBLEMS["categorical"]
    few = Problem(problem.net, problem.x[:5], problem.y[:5], problem.likelihood, problem.log_prob)
    for case in (problem, few):
        posterior = pf.laplace(case.net, case.data, case.likelihood, prior_precision=2.5)
        dense = case.dense()
        assert posterior.method == "exact"
        assert posterior.log_evidence.value.dtype == torch.float64
        close(posterior.log_evidence.value, dense.log_evidence(2.5))
        close(posterior.effective_dimension.value, dense.effective_dimensions(2.5).sum())
        _, jacobian, _ = dense_jacobian(case.net, problem.x)
        close(posterior.predict(problem.x).epistemic_variance, dense.variance(2.5, jacobian))
