"""The expansion over pairs of units: power cumulants term by term, and its strong pairs."""

import numpy as np
import pytest
import torch

from oracles.dense_cumulants import power_cumulants
from oracles.dense_towers import dense_fourth, dense_third
from oracles.wick import ACTIVATIONS, wick_table
from pushforward.cumulants.pair_expansion import find_strong_pairs, pair_blocks
from pushforward.cumulants.towers import CumulantTower, FactoredThird, RadialThird, Source
from pushforward.gaussians.activations import PiecewisePolynomial, SmoothActivation, identity
from pushforward.gaussians.bivariate import mehler_series
from pushforward.networks.graph import UnitGroup
from scenarios import normal

N = 5
RELU = PiecewisePolynomial("relu", (0.0,), ((0.0,), (0.0, 1.0)))
SQUARE = PiecewisePolynomial("square", (), ((0.0, 0.0, 1.0),))
TANH = SmoothActivation("tanh", torch.tanh)
POWERS = ((1, 1), (2, 1), (2, 2))


def covariance(seed, size=N, strength=0.4):
    root = strength * normal(seed, size, size)
    return root @ root.T + torch.diag(0.5 + normal(seed + 1, size).abs())


def towers():
    mean, matrix, metric = normal(0, N), covariance(1), covariance(2)
    fourth = torch.tensor(-0.1, dtype=torch.float64)
    source = Source(*(0.4 * normal(5 + i, N, 3) for i in range(3)), normal(8, 3))
    return {
        "gaussian": CumulantTower(mean, matrix),
        "radial": CumulantTower(mean, matrix, RadialThird(0.2 * normal(4, N)), fourth, metric),
        "radial, identity": CumulantTower(mean, matrix, RadialThird(0.2 * normal(4, N)), fourth),
        "fourth only": CumulantTower(mean, matrix, None, fourth, metric),
        "factored": CumulantTower(mean, matrix, FactoredThird((source,)), fourth, metric),
    }


@pytest.mark.parametrize("name", towers())
@pytest.mark.parametrize("height", [1, 2, N])
def test_power_covariances_are_those_of_the_diagrams(monkeypatch, name, height):
    # psi = phi - phi(m) has the power cumulants of the oracle with shifted activations.
    one = towers()[name]
    std = one.variance.sqrt()
    center, table = RELU.hermite_table(one.mean, std, 4, 4)
    functions = [ACTIVATIONS["relu"]] * N
    wick = wick_table(functions, one.mean.numpy(), one.variance.numpy(), 4, 4)
    shifted = wick.copy()
    c = center.numpy()
    for p in range(1, 5):  # (phi - c)^p by the binomial theorem
        shifted[p] = sum(float(_binomial(p, q)) * (-c) ** (p - q) * wick[q] for q in range(p + 1))
    cumulants = {
        1: one.mean.numpy(),
        2: one.covariance.numpy(),
        3: dense_third(one).numpy(),
        4: dense_fourth(one).numpy(),
    }
    expected = power_cumulants(cumulants, shifted, 2, True)
    module = "pushforward.cumulants.pair_expansion.block_elements"
    monkeypatch.setattr(module, lambda device: height * N)  # noqa: ARG005
    blocks = list(pair_blocks(one, table, 1 / std, 2))
    assert len(blocks) == -(-N // height)
    off = ~torch.eye(N, dtype=torch.bool)
    for p, q in POWERS:
        found = torch.cat([block.power_covariance(p, q) for block in blocks])
        truth = torch.from_numpy(expected[p, q])
        torch.testing.assert_close(found[off], truth[off], rtol=1e-11, atol=1e-12)
        if p != q:
            found = torch.cat([block.power_covariance(q, p) for block in blocks])
            torch.testing.assert_close(found[off], truth.T[off], rtol=1e-11, atol=1e-12)


def _binomial(n, k):
    return np.prod([(n - i) / (i + 1) for i in range(k)]) if k else 1.0


@pytest.mark.parametrize("series", [1, 3, 6])
def test_longer_series(series):
    one = towers()["gaussian"]
    std = one.variance.sqrt()
    table = RELU.hermite_table(one.mean, std, 2, series).values
    (block,) = pair_blocks(one, table, 1 / std, series)
    rho = one.covariance / torch.outer(std, std)
    expected = mehler_series(table[0, 1:, :, None], table[1, 1:, None, :], rho)
    torch.testing.assert_close(block.power_covariance(1, 2), expected)


# --- strong pairs --------------------------------------------------------------------------------

GROUPS = (
    UnitGroup("relu", "a", RELU, slice(0, 3)),
    UnitGroup("tanh", "b", TANH, slice(3, 6)),
    UnitGroup("", "", identity(), slice(6, 8)),
)
SIZE = 8


def strong_setting(seed, batch=None):
    shape = () if batch is None else (batch,)
    mean = normal(seed, *shape, SIZE)
    matrix = torch.stack([covariance(seed + i, SIZE, 0.9) for i in range(batch or 1)])
    one = CumulantTower(mean, matrix if batch else matrix[0])
    std = one.variance.sqrt()
    parts = [
        g.activation.hermite_table(mean[..., g.units], std[..., g.units], 4, 4).values
        for g in GROUPS
    ]
    return one, std, torch.cat(parts, dim=-1)


def reference(one, std):
    """Correlations, and coefficients up to a degree where the series has converged."""
    rho = one.covariance / (std[..., :, None] * std[..., None, :])
    parts = [
        g.activation.hermite_table(one.mean[..., g.units], std[..., g.units], 2, 150).values
        for g in GROUPS
    ]
    return rho, torch.cat(parts, dim=-1)


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5])
def test_strong_pairs_are_those_above_the_threshold(batch, threshold):
    one, std, table = strong_setting(20, batch)
    rho, _ = reference(one, std)
    found = find_strong_pairs(one, GROUPS, table, std, 2, threshold, POWERS)
    above = (rho.abs() > threshold) & ~torch.eye(SIZE, dtype=torch.bool)
    expected = {tuple(index) for index in above.reshape(-1, SIZE, SIZE).nonzero().tolist()}
    listed = list(zip(*(index.tolist() for index in found.index), strict=True))
    assert len(listed) == len(set(listed)) == 2 * found.count
    assert set(listed) == expected
    assert set(found.corrections) == set(POWERS)


@pytest.mark.parametrize("batch", [None, 2])
def test_corrections_turn_the_series_into_the_exact_kernel(batch):
    one, std, table = strong_setting(30, batch)
    rho, long = reference(one, std)
    found = find_strong_pairs(one, GROUPS, table, std, 2, 0.3, POWERS)
    at, i, j = found.index
    rho, long = rho.reshape(-1, SIZE, SIZE), long.reshape(2, 151, -1, SIZE)
    pair = rho[at, i, j]
    assert pair.abs().max() < 0.95  # where 150 terms are enough
    for p, q in POWERS:
        first, second = long[p - 1, 1:, at, i], long[q - 1, 1:, at, j]
        exact = _stable_series(first, second, pair)
        cut = mehler_series(first[:2], second[:2], pair)
        torch.testing.assert_close(found.corrections[p, q], exact - cut, rtol=1e-5, atol=1e-7)
    # tanh has a series of 48 terms only; its bound is small at these correlations.
    assert found.truncation < 1e-3


def _stable_series(first, second, rho):
    """Mehler's series with the factorials taken root by root, to 150 terms."""
    degrees = torch.arange(1, len(first) + 1, dtype=torch.float64)
    root = torch.exp(torch.lgamma(degrees + 1) / 2)[:, None]
    return ((first / root) * (second / root) * rho ** degrees[:, None]).sum(0)


def test_no_strong_pairs():
    one, std, table = strong_setting(40)
    assert find_strong_pairs(one, GROUPS, table, std, 2, 0.999999, POWERS) is None


def test_polynomials_whose_series_is_complete_need_no_correction():
    groups = (UnitGroup("square", "a", SQUARE, slice(0, N)),)
    one = towers()["gaussian"]
    std = one.variance.sqrt()
    table = SQUARE.hermite_table(one.mean, std, 4, 4).values
    found = find_strong_pairs(one, groups, table, std, 2, 0.0, ((1, 1), (2, 2)))
    assert not found.corrections[1, 1].any()
    assert found.corrections[2, 2].abs().max() > 1e-3
    shorter = find_strong_pairs(one, groups, table, std, 1, 0.0, ((1, 1),))
    assert shorter.corrections[1, 1].abs().max() > 1e-3


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("powers", [((1, 1),), POWERS])
def test_gradients_of_duplicated_units_are_finite(sign, powers):
    # A duplicate has correlation one up to rounding, on either side of one.
    root = normal(50, SIZE, 4)
    root[1], root[4] = sign * root[0], sign * root[3]
    root.requires_grad_()
    for jitter in (0.0, 1e-16, 3e-16):
        matrix = root @ root.T * (1 + jitter)
        std = torch.diag(root @ root.T).sqrt()
        mean = torch.zeros(SIZE, dtype=torch.float64)
        parts = [
            g.activation.hermite_table(mean[g.units], std[g.units], 4, 4).values for g in GROUPS
        ]
        one = CumulantTower(mean, matrix)
        found = find_strong_pairs(one, GROUPS, torch.cat(parts, -1), std, 2, 0.5, powers)
        total = sum(values.sum() for values in found.corrections.values())
        (gradient,) = torch.autograd.grad(total, root)
        assert bool(gradient.isfinite().all())
