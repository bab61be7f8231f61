"""Lanczos quadrature against dense eigenvalues."""

import pytest
import torch

from laplace_scenarios import numbers
from pushforward.linalg.lanczos import quadratic_forms, quadrature, tridiagonalise


def matrix(size, seed=0):
    root = numbers(size, size, seed=seed)
    return root @ root.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


def applied(a, function):
    values, vectors = torch.linalg.eigh(a)
    return (vectors * function(values)) @ vectors.T


FUNCTIONS = [torch.log1p, torch.sqrt, torch.reciprocal, lambda x: x / (x + 1)]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_forms_are_those_of_the_dense_function(function):
    a, probes = matrix(40), numbers(5, 40, seed=1)
    expected = ((probes @ applied(a, function)) * probes).sum(1)
    found = quadratic_forms(lambda rows: rows @ a, probes, function, 30)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


def test_polynomials_are_exact_before_convergence():
    a, probes = matrix(40), numbers(3, 40, seed=2)
    # Gauss quadrature with n nodes integrates polynomials of degree 2 n - 1.
    cube = ((probes @ a @ a @ a) * probes).sum(1)
    found = quadratic_forms(lambda rows: rows @ a, probes, lambda x: x**3, 2)
    torch.testing.assert_close(found, cube, rtol=1e-12, atol=0)
    fourth = ((probes @ a @ a @ a @ a) * probes).sum(1)
    short = quadratic_forms(lambda rows: rows @ a, probes, lambda x: x**4, 2)
    assert (short - fourth).abs().min() > 1e-3


def test_signs_estimate_the_trace_without_bias():
    a = matrix(6)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    found = quadratic_forms(lambda rows: rows @ a, corners, torch.log, 6).mean()
    torch.testing.assert_close(found, torch.linalg.slogdet(a)[1], rtol=1e-10, atol=0)


def test_the_tridiagonal_matrix_has_the_eigenvalues():
    a = matrix(12, seed=3)
    diagonal, beside = tridiagonalise(lambda rows: rows @ a, numbers(2, 12, seed=4), 12)
    assert diagonal.shape == beside.shape == (2, 12)
    for d, b in zip(diagonal, beside, strict=True):
        t = torch.diag(d) + torch.diag(b[:-1], 1) + torch.diag(b[:-1], -1)
        torch.testing.assert_close(
            torch.linalg.eigvalsh(t), torch.linalg.eigvalsh(a), rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_krylov_space_that_is_exhausted_does_no_harm(steps):
    a = torch.diag(torch.tensor([2.0, 2.0, 5.0, 5.0], dtype=torch.float64))
    probes = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    found = quadratic_forms(lambda rows: rows @ a, probes[:1], torch.log, steps)
    assert found[0] == pytest.approx(2 * torch.log(torch.tensor(2.0)).item(), rel=1e-6)
    if steps >= 3:
        both = quadratic_forms(lambda rows: rows @ a, probes, torch.log, steps)
        assert both[1].item() == pytest.approx(torch.log(torch.tensor(10.0)).item(), rel=1e-6)


def test_the_zero_matrix_has_forms_of_zero():
    probes = numbers(2, 5, seed=5)
    found = quadratic_forms(torch.zeros_like, probes, torch.log1p, 4)
    assert found.tolist() == [0.0, 0.0]


def test_single_precision():
    a, probes = matrix(40), numbers(5, 40, seed=6)
    expected = ((probes @ applied(a, torch.log1p)) * probes).sum(1)
    found = quadratic_forms(lambda rows: rows @ a.float(), probes.float(), torch.log1p, 20)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_a_known_lower_end_counts_what_lies_there():
    """Ninety eigenvalues at the lower end, ten far above: the plain rule finds the ninety last."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.ones(90), torch.logspace(2, 7, 10)]).double()
    basis = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64, generator=generator))[0]
    matrix = basis * values @ basis.mT
    start = torch.randn(3, 100, dtype=torch.float64, generator=generator)
    exact = ((start @ basis).square() * (1 - 1 / values)).sum(1) / start.square().sum(1)
    diagonals, beside = tridiagonalise(lambda v: v @ matrix, start, 6)

    def error(lowest):
        nodes, weights = quadrature(diagonals, beside, lowest=lowest)
        assert torch.allclose(weights.sum(1), torch.ones(3, dtype=torch.float64))
        return ((weights * (1 - 1 / nodes.clamp(min=1))).sum(1) - exact).abs().max()

    assert error(0.999) < 0.05 * error(None)
    # What is no lower bound is not taken for one.
    assert torch.allclose(error(1e9), error(None))
