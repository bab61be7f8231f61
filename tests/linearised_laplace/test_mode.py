"""The mode of the linear model against a dense Newton method."""

import pytest
import torch

from laplace_scenarios import PROBLEMS, numbers
from pushforward.linearised_laplace import linear_model
from pushforward.linearised_laplace.exact import primal_factor
from pushforward.linearised_laplace.mode import find_mode

PRECISION = {"isotropic": 2.5, "layerwise": {"0": 0.7, "2": 4.0}, "gprior": 1.3}


@pytest.fixture(params=PROBLEMS, ids=str)
def problem(request):
    return PROBLEMS[request.param]


def unpreconditioned(linear):
    return lambda rows: rows / linear.prior.diagonal()


@pytest.mark.parametrize("offset", ["affine", "linear"])
@pytest.mark.parametrize("kind", PRECISION)
def test_the_mode_is_that_of_a_dense_newton_method(problem, kind, offset):
    linear = problem.linear(kind, PRECISION[kind], offset)
    dense = problem.dense(affine=offset == "affine")
    if kind == "gprior":
        dense = dense.g_prior()
        linear = linear.with_prior(linear.prior.with_scale(primal_factor(linear).diagonal))
    precision = linear.prior.diagonal()
    expected = dense.mode(precision)
    start = linear.prior.coordinates(linear.model.vector)
    found = find_mode(linear, start, unpreconditioned(linear), tolerance=1e-12)
    assert found.decrement <= 1e-12
    difference = found.point - expected
    assert difference @ dense.posterior_precision(precision) @ difference < 1e-10
    loss = -dense.log_prob(dense.linear_outputs(expected), dense.targets)
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)


def test_the_decrement_bounds_the_distance(problem):
    linear, dense = problem.linear("isotropic", 2.5), problem.dense()
    expected = dense.mode(2.5)
    at_mode = dense.log_joint(expected, 2.5)
    for tolerance in (1.0, 1e-2, 1e-4):
        found = find_mode(
            linear, linear.model.vector, unpreconditioned(linear), tolerance=tolerance
        )
        assert found.decrement <= tolerance
        left = at_mode - dense.log_joint(found.point, 2.5)
        assert -1e-9 <= left <= tolerance


def test_a_far_start_is_no_harm(problem):
    linear, dense = problem.linear("isotropic", 2.5), problem.dense()
    start = 10 * numbers(linear.model.space.size, seed=40)
    found = find_mode(linear, start, unpreconditioned(linear), tolerance=1e-10)
    torch.testing.assert_close(found.point, dense.mode(2.5), rtol=1e-4, atol=1e-4)


def test_exact_newton_systems_save_passes(problem):
    linear = problem.linear("isotropic", 2.5)
    posterior = primal_factor(linear).factorise(linear.prior)
    start = linear.model.vector
    slow = find_mode(linear, start, unpreconditioned(linear), tolerance=1e-10)
    quick = find_mode(linear, start, posterior.solve, tolerance=1e-10)
    assert quick.passes < slow.passes
    torch.testing.assert_close(quick.point, slow.point, rtol=1e-4, atol=1e-5)


def test_starting_at_the_mode_ends_there(problem):
    linear, mode = problem.linear("isotropic", 2.5), problem.dense().mode(2.5)
    found = find_mode(linear, mode, unpreconditioned(linear), tolerance=1e-8)
    assert torch.equal(found.point, mode)
    assert found.passes <= 4


def test_passes_are_bounded(problem):
    linear = problem.linear("isotropic", 1e-4)
    found = find_mode(
        linear, linear.model.vector, unpreconditioned(linear), tolerance=1e-14, max_passes=5
    )
    assert found.passes < 5 + 200
    assert torch.isfinite(found.point).all()


def test_the_gradient_and_the_losses_are_those_of_the_objective(problem):
    linear, dense = problem.linear("isotropic", 1.0, "affine"), problem.dense()
    point = linear.model.vector + 0.1 * numbers(linear.model.space.size, seed=41)
    loss, gradient, outputs, _ = linear.slope(point)
    tracked = point.clone().requires_grad_()
    value = -dense.log_prob(dense.linear_outputs(tracked), dense.targets)
    (expected,) = torch.autograd.grad(value, tracked)
    torch.testing.assert_close(loss, value.detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    for batch in linear.examples.batches(13):
        there = dense.linear_outputs(point)[batch.indices]
        torch.testing.assert_close(outputs(batch), there)
    direction = numbers(len(point), seed=42)
    steps = torch.tensor([0.0, 0.5, -1.0], dtype=torch.float64)
    losses = linear.losses_along(point, direction, steps)
    for step, found in zip(steps, losses, strict=True):
        there = dense.linear_outputs(point + step * direction)
        torch.testing.assert_close(found, -dense.log_prob(there, dense.targets))


def test_products_are_those_of_the_gauss_newton_matrix(problem):
    linear, dense = problem.linear(), problem.dense()
    vectors = numbers(3, linear.model.space.size, seed=43)
    torch.testing.assert_close(
        linear.product(vectors), vectors @ dense.gauss_newton, rtol=1e-9, atol=1e-9
    )
    point = linear.model.vector + 0.3 * numbers(linear.model.space.size, seed=44)
    there = dense._pulled_back(dense.linear_outputs(point))
    _, _, outputs, _ = linear.slope(point)
    torch.testing.assert_close(
        linear.product_at(outputs, vectors), vectors @ there, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("remembered", [0, 2**20])
def test_outputs_are_remembered_or_computed_anew(problem, remembered, monkeypatch):
    monkeypatch.setattr(linear_model, "_REMEMBERED_BYTES", remembered)
    linear, dense = problem.linear(), problem.dense()
    point = linear.model.vector + 0.3 * numbers(linear.model.space.size, seed=44)
    _, _, outputs, _ = linear.slope(point)
    expected = dense.linear_outputs(point)
    for batch in linear.examples.batches(7, start=3):
        torch.testing.assert_close(outputs(batch), expected[batch.indices])


@pytest.mark.parametrize("workspace", [1, 2_000, 2**25])
def test_the_workspace_changes_nothing(problem, workspace):
    vectors = numbers(5, problem.linear().model.space.size, seed=45)
    expected = problem.linear().product(vectors)
    small = problem.linear(workspace=workspace)
    torch.testing.assert_close(small.product(vectors), expected, rtol=1e-11, atol=1e-11)
    examples, chunk = small.batch_sizes(5)
    assert 1 <= chunk <= 5
    assert examples >= 1
    if workspace == 1:
        assert (examples, chunk) == (1, 1)


def test_squared_residuals():
    problem = PROBLEMS["gaussian"]
    linear, dense = problem.linear(offset="linear"), problem.dense(affine=False)
    point = numbers(26, seed=46)
    expected = (problem.y - dense.linear_outputs(point)).square().sum()
    torch.testing.assert_close(linear.squared_residuals(point), expected)
