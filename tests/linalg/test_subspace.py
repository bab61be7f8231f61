"""Recycled directions: systems are solved on their span, whatever the weight and the diagonal."""

import pytest
import torch

from pushforward.linalg.conjugate_gradients import solve
from pushforward.linalg.subspace import Subspace

SIZE, KEPT = 30, 7


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def problem():
    root = numbers(SIZE, SIZE, seed=1)
    matrix = root @ root.T
    diagonal = numbers(SIZE, seed=2).exp()
    vectors = numbers(KEPT, SIZE, seed=3)
    return matrix, diagonal, Subspace(vectors, vectors @ matrix)


@pytest.mark.parametrize("weight", [1.0, 0.1, 40.0])
def test_the_error_on_the_span_is_the_smallest(problem, weight):
    matrix, diagonal, space = problem
    whole = weight * matrix + torch.diag(diagonal)
    right, guess = numbers(4, SIZE, seed=4), numbers(4, SIZE, seed=5)
    found, residual = space.project(guess, right - guess @ whole, diagonal, weight)
    # Galerkin's condition by dense algebra: guess + c V with V (b - H x) = 0.
    v = space.vectors
    c = torch.linalg.solve(v @ whole @ v.T, v @ (right - guess @ whole).T).T
    assert torch.allclose(found, guess + c @ v, rtol=1e-9)
    assert torch.allclose(residual, right - found @ whole, atol=1e-9)
    assert (residual @ v.T).abs().max() < 1e-9


def test_dependent_directions_do_no_harm(problem):
    _, diagonal, space = problem
    twice = space.extended(space.vectors[:3], space.images[:3], 100)
    right = numbers(2, SIZE, seed=6)
    zero = torch.zeros_like(right)
    once, _ = space.project(zero, right, diagonal)
    again, _ = twice.project(zero, right, diagonal)
    assert torch.allclose(once, again, atol=1e-8)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_preconditioner_is_an_inverse_on_the_span(problem, weight):
    matrix, diagonal, space = problem
    whole = weight * matrix + torch.diag(diagonal)
    apply = space.preconditioner(diagonal, weight)
    assert torch.allclose(apply(space.vectors @ whole), space.vectors, atol=1e-9)
    dense = apply(torch.eye(SIZE, dtype=torch.float64))
    assert torch.allclose(dense, dense.T, atol=1e-10)
    assert torch.linalg.eigvalsh(dense).min() > 0


def test_without_directions_there_is_only_the_diagonal(problem):
    _, diagonal, _ = problem
    rows = numbers(3, SIZE, seed=7)
    empty = Subspace.empty(rows)
    assert len(empty) == 0
    assert torch.equal(empty.preconditioner(diagonal)(rows), rows / diagonal)
    solution, residual = empty.project(rows, rows + 1, diagonal)
    assert torch.equal(solution, rows)
    assert torch.equal(residual, rows + 1)


def test_a_full_space_keeps_where_the_matrix_is_largest():
    values = torch.arange(1.0, SIZE + 1, dtype=torch.float64)
    matrix = torch.diag(values)
    basis = torch.eye(SIZE, dtype=torch.float64)
    space = Subspace.empty(basis)
    for part in basis.split(10):
        space = space.extended(part, part @ matrix, 5)
    assert 5 <= len(space) < 10
    assert torch.allclose(space.images, space.vectors @ matrix)
    energy = (space.vectors**2).sum(0)  # of each coordinate: the five largest are spanned
    assert torch.allclose(energy[-5:], torch.ones(5, dtype=torch.float64), atol=1e-10)


def test_the_next_system_takes_fewer_steps(problem):
    matrix, diagonal, _ = problem
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    space = Subspace(vectors.T[-15:], (vectors * eigenvalues).T[-15:])
    whole = matrix + torch.diag(diagonal)
    right = numbers(1, SIZE, seed=8)
    plain = solve(lambda rows: rows @ whole, right, tolerance=1e-4)
    helped = solve(
        lambda rows: rows @ whole,
        right,
        tolerance=1e-4,
        precondition=space.preconditioner(diagonal),
    )
    assert helped.steps < plain.steps
    assert torch.allclose(helped.solution, torch.linalg.solve(whole, right.T).T, atol=1e-3)
