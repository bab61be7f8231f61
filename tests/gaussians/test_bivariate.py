"""The exact bivariate kernel against two-dimensional quadrature, and its limits at rho = +-1."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from pushforward.gaussians.activations import PiecewisePolynomial, SmoothActivation, identity
from pushforward.gaussians.bivariate import (
    SERIES_DEGREE,
    exact_order,
    mehler_series,
    pair_covariance,
    power_kernel,
)
from scenarios import normal

RELU = PiecewisePolynomial("relu", (0.0,), ((0.0,), (0.0, 1.0)))
HARDTANH = PiecewisePolynomial("hardtanh", (-1.0, 1.0), ((-1.0,), (0.0, 1.0), (1.0,)))
SIGN = PiecewisePolynomial("sign", (0.0,), ((-1.0,), (1.0,)))
ABS = PiecewisePolynomial("abs", (0.0,), ((0.0, -1.0), (0.0, 1.0)))
SQUARE = PiecewisePolynomial("square", (), ((0.0, 0.0, 1.0),))
RELU2 = PiecewisePolynomial("relu^2", (0.0,), ((0.0,), (0.0, 0.0, 1.0)))
SILU = SmoothActivation("silu", functional.silu)
ELU = SmoothActivation("elu", functional.elu, (0.0,))
TANH = SmoothActivation("tanh", torch.tanh)

PIECEWISE = [RELU, HARDTANH, SIGN, ABS, SQUARE, RELU2]
KINDS = [*PIECEWISE, SILU, ELU, TANH]
POWERS = [(1, 1), (2, 1), (1, 2), (2, 2)]
FIRST, SECOND = (0.3, 1.2), (-0.5, 0.8)  # mean and spread of the two units
CORRELATIONS = [-0.9999, -0.6, 0.25, 0.9, 0.9999]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)


def _rule(edges):
    """Gauss-Legendre on every panel of `edges` (..., E): nodes and weights (..., 12 (E - 1))."""
    low, high = edges[..., :-1, None], edges[..., 1:, None]
    nodes = (low + high) / 2 + (high - low) / 2 * _NODES
    weights = (high - low) / 2 * _WEIGHTS
    return nodes.reshape(*edges.shape[:-1], -1), weights.reshape(*edges.shape[:-1], -1)


def _density(x):
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _shifted(activation, mean, z):
    values = activation(torch.from_numpy(np.asarray(z)))
    return (values - activation(torch.tensor(mean, dtype=torch.float64))).numpy()


def brute_force(first, second, rho):
    """Cov(psi(Z)^p, chi(Z')^q) for p, q = 1, 2, by integrating over Z' given Z and then over Z.

    The inner integral is cut where the second function bends; as a function of Z it varies on the
    scale sqrt(1 - rho^2) there, where the outer panels are refined.
    """
    (m, s), (m2, s2) = FIRST, SECOND
    width = math.sqrt(1 - rho * rho)
    bends = [(b - m) / s for b in first.breakpoints]
    for bend in second.breakpoints:
        center = (bend - m2) / s2 / rho
        bends += [center + width / abs(rho) * t for t in np.linspace(-9, 9, 19)]
    edges = np.unique(np.clip(np.concatenate([np.linspace(-9, 9, 37), bends]), -9, 9))
    x, weight = _rule(edges)
    weight = weight * _density(x)
    cuts = [((b - m2) / s2 - rho * x) / width for b in second.breakpoints]
    inner = np.stack([*np.broadcast_to(np.linspace(-9, 9, 13)[:, None], (13, len(x))), *cuts])
    w, inner_weight = _rule(np.sort(np.clip(inner, -9, 9), axis=0).T)
    inner_weight = inner_weight * _density(w)
    chi = _shifted(second, m2, m2 + s2 * (rho * x[:, None] + width * w))
    psi = _shifted(first, m, m + s * x)
    given = [(inner_weight * chi**q).sum(1) for q in (1, 2)]
    result = {}
    for p, q in POWERS:
        product = (weight * psi**p * given[q - 1]).sum()
        means = (weight * psi**p).sum() * (weight * given[q - 1]).sum()
        result[p, q] = product - means
    return result


def kernel(first, p, second, q, rho):
    """The library's covariance of one pair of units at every correlation in `rho`."""
    order = exact_order(first, p, second, q)

    def side(activation, unit, power):
        mean, std = (torch.tensor([value], dtype=torch.float64) for value in unit)
        return power_kernel(activation, mean, std, power, order)

    index = torch.zeros(len(rho), dtype=torch.long)
    left, right = side(first, FIRST, p), side(second, SECOND, q)
    return pair_covariance(left, right, (index, index), torch.as_tensor(rho, dtype=torch.float64))


def _has_step(activation):
    return 0 in getattr(activation, "jump_orders", ())


@pytest.mark.parametrize(
    ("first", "second"),
    list(itertools.combinations_with_replacement(KINDS, 2)),
    ids=lambda a: a.name,
)
def test_kernel_agrees_with_two_dimensional_quadrature(first, second):
    expected = [brute_force(first, second, rho) for rho in CORRELATIONS]
    # Measured: 1e-12 for continuous functions, 1e-8 with a step at |rho| = 0.9999.
    tolerance = 3e-8 if _has_step(first) or _has_step(second) else 1e-10
    for p, q in POWERS:
        found = kernel(first, p, second, q, CORRELATIONS)
        truth = torch.tensor([values[p, q] for values in expected], dtype=torch.float64)
        error = (found.value - truth).abs()
        assert bool((error <= tolerance * (1 + truth.abs()) + found.truncation).all()), (p, q)
        exact = isinstance(first, PiecewisePolynomial) and isinstance(second, PiecewisePolynomial)
        if exact:
            assert not found.truncation.any()


@pytest.mark.parametrize(("first", "second"), [(SILU, TANH), (ELU, RELU), (SILU, SIGN)])
def test_the_truncation_bound_is_small_unless_correlation_is_extreme(first, second):
    found = kernel(first, 1, second, 1, [0.5, 0.9, 0.9999])
    assert bool((found.truncation[:2] < 1e-3).all())
    assert bool((found.truncation.diff() > 0).all())


@pytest.mark.parametrize("activation", [SIGN, TANH], ids=lambda a: a.name)
def test_the_truncation_bound_bounds_a_steep_series(activation):
    # A step seen as a smooth function converges slowly, so the bound is put to the test.
    steep = SmoothActivation("step", lambda z: activation(5 * z), activation.breakpoints or (0.0,))
    order = None
    mean, std = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    side = power_kernel(steep, mean, std, 1, order)
    index = torch.zeros(4, dtype=torch.long)
    rho = torch.tensor([0.5, 0.95, 0.99, 1.0], dtype=torch.float64)
    found = pair_covariance(side, side, (index, index), rho)
    if activation is SIGN:
        truth = 2 / math.pi * torch.asin(rho)
    else:
        fine = steep.hermite_table(mean, std, 2, 150).values[:, :, 0]
        factorials = torch.tensor([math.factorial(k) for k in range(151)], dtype=torch.float64)
        weights = fine[0].square() / factorials
        truth = torch.stack([(weights[1:] * r ** torch.arange(1, 151)).sum() for r in rho])
        truth[-1] = fine[1, 0] - fine[0, 0] ** 2
    error = (truth - found.value).abs()
    assert bool((error <= found.truncation + 1e-9).all())
    assert error[-1] > 1e-6  # the series alone is not exact here
    assert found.truncation[-1] < 10 * error[-1]
    # Each term that is left out carries at least the power of rho behind the last one.
    powers = rho ** (SERIES_DEGREE + 1)
    torch.testing.assert_close(found.truncation, powers * found.truncation[-1])


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.name)
@pytest.mark.parametrize("power", [1, 2])
def test_a_unit_correlated_fully_with_itself_has_its_variance(activation, power):
    mean, std = normal(0, 5), normal(1, 5).abs() + 0.2
    order = exact_order(activation, power, activation, power)
    side = power_kernel(activation, mean, std, power, order)
    index = torch.arange(5)
    found = pair_covariance(side, side, (index, index), torch.ones(5, dtype=torch.float64))
    table = activation.hermite_table(mean, std, 2 * power, 0).values[:, 0]
    variance = table[2 * power - 1] - table[power - 1] ** 2
    tolerance = 1e-5 if _has_step(activation) else 1e-9
    error = (found.value - variance).abs()
    assert bool((error <= tolerance * (1 + variance) + found.truncation).all())


def test_relu_at_opposite_correlation_in_closed_form():
    # relu(Z) relu(-Z) = 0, so the covariance is minus the product of the means, 1 / (2 pi).
    mean, std = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    side = power_kernel(RELU, mean, std, 1, 2)
    index = torch.zeros(1, dtype=torch.long)
    found = pair_covariance(side, side, (index, index), torch.tensor([-1.0], dtype=torch.float64))
    assert found.value.item() == pytest.approx(-1 / (2 * math.pi), abs=1e-12)


@pytest.mark.parametrize("rho", [-1.0, -0.7, 0.0, 0.3, 1 - 1e-3, 1 - 1e-6, 1 - 1e-10, 1.0])
def test_arc_cosine_kernels(rho):
    # Cho and Saul (2009): E relu relu = (sqrt(1 - r^2) + r (pi - acos r)) / (2 pi).
    mean, std = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    index, r = torch.zeros(1, dtype=torch.long), torch.tensor([rho], dtype=torch.float64)
    side = power_kernel(RELU, mean, std, 1, 2)
    found = pair_covariance(side, side, (index, index), r).value.item()
    expected = math.sqrt(1 - rho * rho) + rho * (math.pi - math.acos(rho)) - 1
    assert found == pytest.approx(expected / (2 * math.pi), abs=1e-11)
    side = power_kernel(SIGN, mean, std, 1, 1)
    found = pair_covariance(side, side, (index, index), r).value.item()
    assert found == pytest.approx(2 / math.pi * math.asin(rho), abs=1e-5)


@pytest.mark.parametrize("activation", [RELU, HARDTANH, SIGN, RELU2, TANH], ids=lambda a: a.name)
def test_kernel_matrix_is_symmetric_and_positive_semidefinite(activation):
    # Singular covariance of rank three, with pairs that are all but duplicates.
    root = normal(3, 12, 3)
    root[6:] = root[:6] + 1e-3 * normal(4, 6, 3)
    covariance = root @ root.T
    std = covariance.diagonal().sqrt()
    rho = (covariance / torch.outer(std, std)).clamp(-1, 1)
    mean = 0.5 * normal(5, 12)
    i, j = (index.reshape(-1) for index in torch.meshgrid(*[torch.arange(12)] * 2, indexing="ij"))
    order = exact_order(activation, 1, activation, 1)
    side = power_kernel(activation, mean, std, 1, order)
    matrix = pair_covariance(side, side, (i, j), rho.reshape(-1)).value.reshape(12, 12)
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-14)
    smallest = torch.linalg.eigvalsh(matrix).min()
    assert smallest > (-2e-5 if _has_step(activation) else -1e-9)


@pytest.mark.parametrize(("p", "q"), POWERS)
def test_exchanging_the_units_exchanges_the_powers(p, q):
    order = exact_order(RELU, p, HARDTANH, q)
    assert order == exact_order(HARDTANH, q, RELU, p)
    mean, std = normal(6, 4), normal(7, 4).abs() + 0.3
    left = power_kernel(RELU, mean, std, p, order)
    right = power_kernel(HARDTANH, mean, std, q, order)
    i, j = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 0])
    rho = torch.tensor([0.3, -0.95, 0.8], dtype=torch.float64)
    one = pair_covariance(left, right, (i, j), rho).value
    other = pair_covariance(right, left, (j, i), rho).value
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_independent_and_absent_pairs():
    mean, std = normal(8, 3), normal(9, 3).abs() + 0.3
    side = power_kernel(RELU, mean, std, 1, 2)
    index = torch.arange(3)
    none = pair_covariance(side, side, (index, index), torch.zeros(3, dtype=torch.float64))
    assert not none.value.any()
    empty = torch.zeros(0, dtype=torch.long)
    found = pair_covariance(side, side, (empty, empty), torch.zeros(0, dtype=torch.float64))
    assert found.value.shape == found.truncation.shape == (0,)


def test_linear_units_keep_their_correlation():
    mean, std = normal(10, 2), torch.tensor([0.5, 2.0], dtype=torch.float64)
    order = exact_order(identity(), 1, identity(), 1)
    side = power_kernel(identity(), mean, std, 1, order)
    i, j = torch.tensor([0]), torch.tensor([1])
    found = pair_covariance(side, side, (i, j), torch.tensor([0.73], dtype=torch.float64))
    assert found.value.item() == pytest.approx(0.73, abs=1e-14)


@pytest.mark.parametrize(
    ("first", "second", "expected"), [(RELU, HARDTANH, 2), (RELU2, RELU, 3), (RELU, TANH, None)]
)
def test_exact_order(first, second, expected):
    assert exact_order(first, 1, second, 1) == expected
    if expected is not None:
        degree = max(first.degree * 2, second.degree)
        assert exact_order(first, 2, second, 1) == degree + 1


def test_coefficients_at_hand_are_used():
    mean, std = normal(11, 3), normal(12, 3).abs() + 0.3
    known = RELU.hermite_table(mean, std, 1, 9).values[0]
    one, other = power_kernel(RELU, mean, std, 1, 2, known), power_kernel(RELU, mean, std, 1, 2)
    torch.testing.assert_close(one.coefficients, other.coefficients)
    short = power_kernel(RELU, mean, std, 1, 2, known[:1])
    torch.testing.assert_close(short.coefficients, other.coefficients)
    assert power_kernel(TANH, mean, std, 1, None).coefficients.shape == (SERIES_DEGREE, 3)


def test_mehler_series_is_the_series():
    first, second, rho = normal(13, 4, 6), normal(14, 4, 6), torch.linspace(-1, 1, 6).double()
    expected = sum(first[k - 1] * second[k - 1] * rho**k / math.factorial(k) for k in range(1, 5))
    torch.testing.assert_close(mehler_series(first, second, rho), expected)


def _covariances(activation, mean, std, rho):
    order = exact_order(activation, 1, activation, 1)
    side = power_kernel(activation, mean, std, 1, order)
    index = torch.arange(len(rho))
    return pair_covariance(side, side, (index, index + 1), rho).value


@pytest.mark.parametrize("activation", [RELU, HARDTANH, RELU2, TANH], ids=lambda a: a.name)
def test_gradients(activation):
    mean = normal(15, 4).requires_grad_()
    std = (normal(16, 4).abs() + 0.3).requires_grad_()
    rho = torch.tensor([0.4, -0.9, 0.99], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *args: _covariances(activation, *args), (mean, std, rho), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("distance", [0.0, 2e-16, 1e-15, 1e-10])
@pytest.mark.parametrize("activation", [RELU, HARDTANH, ABS], ids=lambda a: a.name)
def test_gradients_stay_finite_for_duplicated_units(activation, distance, sign):
    # d Cov / d rho = Cov(phi', phi') + E phi' E phi' is finite although d asin / d rho is not.
    mean = torch.tensor([0.3, 0.3 * sign], dtype=torch.float64, requires_grad=True)
    std = torch.ones(2, dtype=torch.float64, requires_grad=True)
    rho = torch.tensor([sign * (1 - distance)], dtype=torch.float64, requires_grad=True)
    value = _covariances(activation, mean, std, rho)
    by_rho, *others = torch.autograd.grad(value.sum(), (rho, mean, std))
    assert all(bool(gradient.isfinite().all()) for gradient in others)
    x = np.random.default_rng(0).normal(size=400_000)
    points = [torch.from_numpy(0.3 + x), torch.from_numpy(sign * (0.3 + x))]
    slopes = []
    for z in points:
        z.requires_grad_()
        (slope,) = torch.autograd.grad(activation(z).sum(), z)
        slopes.append(slope)
    expected = (slopes[0] * slopes[1]).mean().item()
    # Within six standard errors of the sample, each slope being at most one.
    assert by_rho.item() == pytest.approx(expected, abs=6 / math.sqrt(400_000))
