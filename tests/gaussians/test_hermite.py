"""Hermite polynomials, partial moments and quadrature rules against independent formulas."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import hermite_e
from scipy.integrate import quad
from scipy.special import ndtr

from pushforward.gaussians.hermite import (
    gauss_legendre,
    hermite_functions,
    hermite_polynomials,
    normal_cdf,
    normal_density,
    upper_moments,
)

X = torch.tensor([-7.5, -2.0, -0.3, 0.0, 1e-8, 1.0, 3.3, 12.0], dtype=torch.float64)


def test_density_is_the_standard_normal_one():
    expected = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in X.tolist()]
    torch.testing.assert_close(normal_density(X), torch.tensor(expected).double())
    assert quad(lambda x: float(normal_density(torch.tensor(x))), -9, 9)[0] == pytest.approx(1.0)


def test_distribution_function_keeps_its_digits_far_out():
    x = torch.linspace(-37, 9, 47, dtype=torch.float64)
    expected = torch.from_numpy(ndtr(x.numpy()))
    torch.testing.assert_close(normal_cdf(x), expected, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(normal_cdf, torch.linspace(-6, 6, 9).double().requires_grad_())


@pytest.mark.parametrize("max_degree", [0, 1, 2, 9])
def test_polynomials_agree_with_numpy(max_degree):
    found = hermite_polynomials(X, max_degree)
    assert len(found) == max_degree + 1
    for k, values in enumerate(found):
        expected = hermite_e.hermeval(X.numpy(), np.eye(max_degree + 1)[k])
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("max_degree", [0, 1, 6])
def test_functions_are_scaled_polynomials_times_the_density(max_degree):
    found = hermite_functions(X, max_degree)
    polynomials = hermite_polynomials(X, max_degree)
    assert len(found) == max_degree + 1
    for k, (function, polynomial) in enumerate(zip(found, polynomials, strict=True)):
        expected = polynomial * normal_density(X) / math.sqrt(math.factorial(k))
        torch.testing.assert_close(function, expected, rtol=1e-12, atol=1e-14)


def test_functions_stay_orthonormal_at_high_degree():
    # int h_j h_k / density = delta_jk; the functions reach out to 2 sqrt(60) = 15.5 and a bit.
    nodes, weights = gauss_legendre(400, like=torch.zeros((), dtype=torch.float64))
    x = 22 * nodes
    functions = torch.stack(hermite_functions(x, 60)) / normal_density(x).sqrt()
    gram = (functions * (22 * weights)) @ functions.T
    torch.testing.assert_close(gram, torch.eye(61, dtype=torch.float64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("threshold", [-6.0, -1.2, 0.0, 0.7, 5.0])
def test_upper_moments_are_integrals(threshold):
    t = torch.tensor([threshold], dtype=torch.float64)
    found = upper_moments(t, normal_density(t), 7)
    assert len(found) == 8
    for order, value in enumerate(found):
        expected = quad(
            lambda x, order=order: x**order * math.exp(-x * x / 2) / math.sqrt(2 * math.pi),
            threshold,
            12,
            epsabs=1e-13,
        )[0]
        assert value.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("max_order", [0, 1])
def test_upper_moments_of_low_order(max_order):
    assert len(upper_moments(X, normal_density(X), max_order)) == max_order + 1


@pytest.mark.parametrize("count", [1, 2, 16])
def test_gauss_legendre_is_exact_for_polynomials(count):
    nodes, weights = gauss_legendre(count, like=torch.zeros((), dtype=torch.float64))
    for power in range(2 * count):
        expected = 0.0 if power % 2 else 2 / (power + 1)
        assert (weights * nodes**power).sum().item() == pytest.approx(expected, abs=1e-14)


def test_gauss_legendre_follows_the_dtype():
    nodes, weights = gauss_legendre(3, like=torch.zeros((), dtype=torch.float32))
    assert nodes.dtype == weights.dtype == torch.float32
