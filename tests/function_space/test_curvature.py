"""Gauss-Newton matrices of distances: products, dense, solves, and what is refused."""

from dataclasses import replace

import pytest
import torch

from influence_cases import Exact, PlainZero, trained
from oracles import proximal_response as oracle
from pushforward.errors import NetworkError, OptionError, ResourceError, ShapeError
from pushforward.function_space import curvature as module
from pushforward.function_space.baselines.diagonal import DiagonalDistance
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.baselines.kronecker import KroneckerDistance
from pushforward.function_space.baselines.subset import SubsetDistance
from pushforward.function_space.baselines.tangent import TangentDistance
from pushforward.function_space.curvature import GaussNewton
from pushforward.function_space.summarize import summarize


@pytest.fixture(params=["squared", "cross_entropy"])
def case(request):
    return trained(request.param)


def test_dense_is_the_mean_of_jacobians_squared(case):
    found = GaussNewton.of(case.measure, metric=case.metric).dense()
    expected = oracle.gauss_newton(case.oracle, case.vector, case.x.numpy(), case.loss)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-10, atol=1e-12)


def test_kl_and_fisher_have_the_same_matrix():
    case = trained("cross_entropy")
    first, second = (GaussNewton.of(case.measure, metric=m).dense() for m in ("kl", "fisher"))
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_products_are_those_of_the_dense_matrix(case):
    matrix = GaussNewton.of(case.measure, metric=case.metric)
    vectors = torch.randn(matrix.space.size, 3, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(matrix.product(vectors), matrix.dense() @ vectors)


def test_a_measure_that_returns_plain_zero_at_the_reference_is_differenced(case):
    measure = PlainZero(case.net, case.x)
    matrix = GaussNewton.of(measure, metric=case.metric)
    assert matrix.differences
    exact = GaussNewton.of(case.measure, metric=case.metric).dense()
    torch.testing.assert_close(matrix.dense(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["cholesky", "conjugate_gradients"])
def test_solves(case, method):
    matrix = GaussNewton.of(case.measure, metric=case.metric)
    vectors = torch.randn(matrix.space.size, 4, generator=torch.Generator().manual_seed(1)).double()
    vectors[:, 1] *= 1e-6  # unlike sizes count alike
    found = matrix.solver(0.01, method, tolerance=1e-10).solve(vectors)
    damped = matrix.dense() + 0.01 * torch.eye(matrix.space.size).double()
    expected = torch.linalg.solve(damped, vectors)
    error = (found.vectors - expected).norm(dim=0) / expected.norm(dim=0)
    assert float(error.max()) < 1e-8
    assert found.residual < 1e-8
    assert (found.steps > 0) == (method == "conjugate_gradients")


def test_the_own_solve_of_a_measure_comes_first(case):
    class Own(Exact):
        def solve(self, gradients, damping):
            return {name: g / (damping + 1) for name, g in gradients.items()}

    matrix = GaussNewton.of(Own(case.net, case.x), metric=case.metric)
    assert matrix.solver(1.0).method == "own"
    ones = torch.ones(matrix.space.size, 2).double()
    torch.testing.assert_close(matrix.solve(ones, 1.0), ones / 2)
    # It knows nothing of a subset.
    part = GaussNewton.of(Own(case.net, case.x), metric=case.metric, subset="2.*")
    assert part.solver(1.0).method == "cholesky"


def test_subset_is_the_block_of_the_whole(case):
    whole = GaussNewton.of(case.measure, metric=case.metric)
    part = GaussNewton.of(case.measure, metric=case.metric, subset=["2.weight", "2.bias"])
    size = part.space.size
    torch.testing.assert_close(part.dense(), whole.dense()[-size:, -size:])


def test_single_precision_networks(case):
    measure = Exact(case.net.float(), case.x.float())
    matrix = GaussNewton.of(measure, metric=case.metric)
    assert matrix.dtype == torch.float32
    expected = oracle.gauss_newton(case.oracle, case.vector, case.x.numpy(), case.loss)
    torch.testing.assert_close(
        matrix.dense().double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-5
    )


def test_an_indefinite_curvature_is_refused_with_its_eigenvalue():
    class Saddle(Exact):
        def distance(self, other, *, metric):
            return -super().distance(other, metric=metric)

    case = trained("squared")
    solver = GaussNewton.of(Saddle(case.net, case.x), metric="euclidean").solver(1e-3)
    with pytest.raises(OptionError, match=r"eigenvalue of -.*not positive definite"):
        solver.solve(torch.ones(solver.curvature.space.size, 1).double())


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_damping_has_to_be_positive(damping):
    case = trained("squared")
    with pytest.raises(OptionError, match="damping"):
        GaussNewton.of(case.measure, metric="euclidean").solver(damping)


def test_refusals(monkeypatch):
    case = trained("squared")
    matrix = GaussNewton.of(case.measure, metric="euclidean")
    with pytest.raises(ShapeError, match="as columns"):
        matrix.product(torch.ones(3, 2).double())
    with pytest.raises(OptionError, match="there is no metric"):
        GaussNewton.of(case.measure, metric="l1")
    with pytest.raises(OptionError, match="has no solve"):
        matrix.solver(1.0, "own")
    with pytest.raises(OptionError, match="there is no method"):
        matrix.solver(1.0, "lu")
    with pytest.raises(OptionError, match="measures no distance"):
        GaussNewton.of(object(), metric="euclidean")
    exact = ExactDistance.of(case.net, case.x)
    with pytest.raises(OptionError, match=r"^estimator: ExactDistance\.distance does not take"):
        GaussNewton.of(exact, metric="euclidean", estimator="gated")
    with pytest.raises(OptionError, match=r"^outputs: Exact\.distance does not take outputs"):
        GaussNewton.of(case.measure, metric="euclidean", outputs=[0])
    monkeypatch.setattr(module, "_DENSE_LIMIT", 10)
    assert matrix.solver(1.0).method == "conjugate_gradients"
    with pytest.raises(ResourceError, match="GiB"):
        matrix.dense()


def test_a_distance_that_never_changes_is_refused():
    class Constant(Exact):
        def distance(self, other, *, metric):  # noqa: ARG002
            return sum((t * 0).sum() for t in other.values())

    case = trained("squared")
    with pytest.raises(NetworkError, match="curvature of the distance at the reference is zero"):
        GaussNewton.of(Constant(case.net, case.x), metric="euclidean")


# --- the distances of the library -----------------------------------------------------------------


def _measures(case):
    # Several batches: their gradients are recomputed on the way back.
    yield ExactDistance.of(case.net, case.x, batch_size=10)
    yield SubsetDistance.of(case.net, case.x, 12, seed=0)
    yield TangentDistance.of(case.net, case.x)
    yield KroneckerDistance.of(case.net, case.x, metric=case.metric)
    yield DiagonalDistance.of(case.net, case.x, metric=case.metric)
    yield summarize(case.net, case.x)
    yield summarize(case.net, case.x, layer_moments=True)


def test_every_distance_has_a_curvature_that_is_positive_semidefinite(case):
    for measure in _measures(case):
        matrix = GaussNewton.of(measure, metric=case.metric)
        assert not matrix.differences, measure
        values = torch.linalg.eigvalsh(matrix.dense())
        assert float(values[0]) > -1e-9 * float(values[-1]), measure


def test_exact_and_tangent_distances_have_the_exact_curvature(case):
    expected = torch.from_numpy(
        oracle.gauss_newton(case.oracle, case.vector, case.x.numpy(), case.loss)
    )
    exact, _, tangent, *_ = _measures(case)
    for measure in (exact, tangent):
        found = GaussNewton.of(measure, metric=case.metric).dense()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_solves_of_their_own_are_those_of_their_curvature(case):
    own = [m for m in _measures(case) if hasattr(m, "solve")]
    assert len(own) == 2
    for measure in own:
        matrix = GaussNewton.of(measure, metric=case.metric)
        vectors = torch.randn(matrix.space.size, 3, generator=torch.Generator().manual_seed(2))
        found, dense = (matrix.solve(vectors.double(), 0.1, m) for m in ("own", "cholesky"))
        torch.testing.assert_close(found, dense, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("estimator", ["gated", "gaussian", "reference", "anchored"])
def test_estimators_of_a_summary(case, estimator):
    summary = summarize(case.net, case.x, layer_moments=True)
    found = GaussNewton.of(summary, metric=case.metric, estimator=estimator)
    vectors = torch.ones(found.space.size, 1).double()
    moved = found.solve(vectors, 0.1)
    assert 0 < float((vectors * moved).sum()) <= float((vectors**2).sum()) / 0.1


@pytest.mark.parametrize("kind", [ExactDistance, TangentDistance, KroneckerDistance, None])
def test_mixed_precision_leaves_products_as_they_are(kind):
    """Single precision is what mixed precision would round."""
    case = trained("squared")
    make = summarize if kind is None else kind.of
    measure = make(case.net.float(), case.x.float())
    matrix = GaussNewton.of(measure, metric="euclidean")
    matrix = replace(matrix, dtype=torch.float32)
    vectors = torch.ones(matrix.space.size, 2)
    expected = matrix.product(vectors)
    with torch.autocast("cpu", torch.bfloat16):
        found = matrix.product(vectors)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
