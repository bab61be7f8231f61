"""Activations and their linearised changes, jointly, against quadrature and Monte Carlo."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from oracles.gated_pairs import Unit, pair_moments
from pushforward.errors import OptionError
from pushforward.gaussians.activations import PiecewisePolynomial, SmoothActivation, identity
from pushforward.gaussians.gated import GatedPairs, derivative
from scenarios import normal

RELU = PiecewisePolynomial("relu", (0.0,), ((0.0,), (0.0, 1.0)))
LEAKY = PiecewisePolynomial("leaky", (0.0,), ((0.0, 0.1), (0.0, 1.0)))
HARDTANH = PiecewisePolynomial("hardtanh", (-1.0, 1.0), ((-1.0,), (0.0, 1.0), (1.0,)))
ABS = PiecewisePolynomial("abs", (0.0,), ((0.0, -1.0), (0.0, 1.0)))
HARDSWISH = PiecewisePolynomial("hardswish", (-3.0, 3.0), ((0.0,), (0.0, 0.5, 1 / 6), (0.0, 1.0)))
SQUARE = PiecewisePolynomial("square", (), ((0.0, 0.0, 1.0),))
GELU = SmoothActivation("gelu", functional.gelu)
TANH = SmoothActivation("tanh", torch.tanh)
SELU = SmoothActivation("selu", functional.selu, (0.0,))
IDENTITY = identity()


def _selu_slope(z):
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    return np.where(z > 0, scale, scale * alpha * np.exp(np.minimum(z, 0)))


def _gelu_slope(z):
    cdf = torch.special.ndtr(torch.from_numpy(z)).numpy()
    return cdf + z * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


SLOPES = {
    "relu": lambda z: 1.0 * (z > 0),
    "leaky": lambda z: np.where(z > 0, 1.0, 0.1),
    "hardtanh": lambda z: 1.0 * (np.abs(z) < 1),
    "abs": np.sign,
    "hardswish": lambda z: np.where(np.abs(z) < 3, 0.5 + z / 3, 1.0 * (z > 3)),
    "square": lambda z: 2 * z,
    "gelu": _gelu_slope,
    "tanh": lambda z: 1 - np.tanh(z) ** 2,
    "selu": _selu_slope,
    "identity": np.ones_like,
}
EXACT = [RELU, LEAKY, HARDTANH, ABS, IDENTITY, SQUARE]
SMOOTH = [GELU, TANH, HARDSWISH, SELU]
KINDS = [*EXACT, *SMOOTH]

MEANS, STDS = (0.3, -0.5), (1.2, 0.8)
CHANGE_MEAN = (0.4, -0.7)
LOADINGS = ((0.5, -0.3), (-0.2, 0.6))
NOISE = ((0.30, 0.11), (0.11, 0.25))


def unit(activation, mean, std):
    def function(z):
        return activation(torch.from_numpy(z)).numpy()

    kinks = getattr(activation, "breakpoints", ())
    return Unit(function, SLOPES[activation.name], kinks, mean, std)


def law(rho, stds=STDS, loadings=LOADINGS, noise=NOISE):
    """Covariances of s, of s with v, and of v for the oracle's parametrisation."""
    q = math.sqrt((1 - rho) * (1 + rho))
    to_s = torch.tensor([[stds[0], 0.0], [stds[1] * rho, stds[1] * q]], dtype=torch.float64)
    to_v = torch.tensor(loadings, dtype=torch.float64)
    noise = torch.tensor(noise, dtype=torch.float64)
    return to_s @ to_s.T, to_s @ to_v.T, to_v @ to_v.T + noise


def library(activations, rho, means=MEANS, stds=STDS):
    s, x, v = law(rho, stds)
    pairs = GatedPairs.of(
        [(slice(0, 1), activations[0]), (slice(1, 2), activations[1])],
        torch.tensor(means, dtype=torch.float64),
        s,
    )
    pushed = pairs.push(torch.tensor(CHANGE_MEAN, dtype=torch.float64), x, v)
    return pairs.mean, pushed[0], pairs.covariance, pushed[1], pushed[2]


def compare(activations, rho, tolerance, means=MEANS, stds=STDS):
    units = [unit(a, m, s) for a, m, s in zip(activations, means, stds, strict=True)]
    expected = pair_moments(units, rho, CHANGE_MEAN, LOADINGS, NOISE)
    for found, truth in zip(library(activations, rho, means, stds), expected, strict=True):
        torch.testing.assert_close(
            found, torch.from_numpy(truth), rtol=tolerance, atol=tolerance * (1 + max(stds))
        )


def tolerance(first, second):
    """Relative and absolute; a derivative with kinks has a series that converges slowly."""
    if SELU in (first, second):
        return 3e-4
    exact = first in EXACT and second in EXACT
    return 1e-10 if exact or IDENTITY in (first, second) else 1e-6


@pytest.mark.parametrize("rho", [-0.99, 0.0, 0.4, 0.92, 0.9999])
@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.name)
def test_moments_agree_with_quadrature(activation, rho):
    compare((activation, activation), rho, tolerance(activation, activation))


@pytest.mark.parametrize("rho", [-0.8, 0.3, 0.97])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (RELU, IDENTITY),
        (IDENTITY, HARDTANH),
        (GELU, IDENTITY),
        (ABS, LEAKY),
        (RELU, TANH),
        (SELU, RELU),
    ],
    ids=lambda a: a.name,
)
def test_two_units_may_have_different_activations(first, second, rho):
    compare((first, second), rho, tolerance(first, second))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("distance", [1e-6, 1e-12])
@pytest.mark.parametrize("activation", [RELU, LEAKY, HARDTANH, ABS, IDENTITY], ids=lambda a: a.name)
def test_almost_copies(activation, distance, sign):
    # The same threshold in both units where the limit is delicate, another where it is not.
    compare((activation, activation), sign * (1 - distance), 2e-7, (0.36, sign * 0.24))
    compare((activation, activation), sign * (1 - distance), 2e-7)


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.name)
def test_a_unit_and_its_copy_are_the_same(activation):
    # Off the diagonal, where pairs are computed, stands what is exact on it.
    root, load = normal(0, 3, 2), normal(1, 4, 2)
    twice = torch.tensor([0, 1, 2, 0, 1, 2])
    s = (root @ root.T)[twice][:, twice]
    x, v = (root @ load[:3].T)[twice][:, twice], (load[:3] @ load[:3].T)[twice][:, twice]
    mean = (0.4 * normal(2, 3))[twice]
    pairs = GatedPairs.of(activation, mean, s)
    change = normal(3, 3)[twice]
    _, cross, covariance = pairs.push(change, x, v)
    tolerance = 5e-3 if activation in SMOOTH else 1e-6
    for matrix in (pairs.covariance, cross, covariance):
        own, copies = matrix[:3, :3].diagonal(), matrix[:3, 3:].diagonal()
        torch.testing.assert_close(copies, own, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.name)
@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_units_far_from_their_kinks_are_linear(activation, shift):
    if activation in (SQUARE,):
        pytest.skip("bent everywhere")
    means = tuple(shift * s for s in STDS)
    s, x, v = law(0.7)
    far = torch.tensor(means, dtype=torch.float64)
    slope = torch.from_numpy(SLOPES[activation.name](far.numpy()))
    change = torch.tensor(CHANGE_MEAN, dtype=torch.float64)
    pairs = GatedPairs.of(activation, far, s)
    mean, cross, covariance = pairs.push(change, x, v)
    both = torch.outer(slope, slope)
    for found, truth in [
        (pairs.mean, activation(far)),
        (mean, slope * change),
        (pairs.covariance, both * s),
        (cross, both * x),
        (covariance, both * v),
    ]:
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", [RELU, HARDTANH, GELU, TANH], ids=lambda a: a.name)
@pytest.mark.parametrize("std", [1e-3, 1e-6, 1e-10])
def test_units_of_a_tiny_spread(activation, std):
    # Far from a kink everything is linear; at one it scales with the spread.
    compare((activation, activation), 0.4, 1e-6, (0.3, -0.5), (std, 2 * std))
    compare((activation, activation), 0.4, 1e-6, (0.3 * std, -0.5 * std), (std, 2 * std))


@pytest.mark.parametrize("activation", [RELU, LEAKY, GELU, TANH], ids=lambda a: a.name)
def test_constants(activation):
    s, x, v = torch.zeros(2, 2).double(), torch.zeros(2, 2).double(), law(0.2)[2]
    at = torch.tensor([0.7, -0.4], dtype=torch.float64)
    change = torch.tensor(CHANGE_MEAN, dtype=torch.float64)
    pairs = GatedPairs.of(activation, at, s)
    mean, cross, covariance = pairs.push(change, x, v)
    slope = torch.from_numpy(SLOPES[activation.name](at.numpy()))
    torch.testing.assert_close(pairs.mean, activation(at))
    torch.testing.assert_close(mean, slope * change)
    torch.testing.assert_close(covariance, torch.outer(slope, slope) * v, rtol=1e-10, atol=1e-12)
    assert float(pairs.covariance.abs().max()) < 1e-100
    assert float(cross.abs().max()) < 1e-12


def test_a_constant_at_a_kink_is_on_either_side_half_the_time():
    zero, one = torch.zeros(1).double(), torch.ones(1, 1).double()
    pairs = GatedPairs.of(RELU, zero, 0 * one)
    mean, _, covariance = pairs.push(zero + 3, 0 * one, one)
    assert mean.item() == pytest.approx(1.5)
    assert covariance.item() == pytest.approx(0.5 * (9 + 1) - 1.5**2)


def test_steps_however_small_and_far():
    # A kink of 1e-6 at 1e7 and the same function moved there, less its straight part.
    far = PiecewisePolynomial("far", (1e7,), ((0.0, 1.0), (-10.0, 1.0 + 1e-6)))
    s, x, v = law(0.5)
    at = torch.tensor(MEANS, dtype=torch.float64)
    change = torch.tensor(CHANGE_MEAN, dtype=torch.float64)
    kinked, straight = (GatedPairs.of(a, at + 1e7, s).push(change, x, v) for a in (far, IDENTITY))
    relu = GatedPairs.of(RELU, at, s).push(change, x, v)
    torch.testing.assert_close((kinked[0] - straight[0]) * 1e6, relu[0], rtol=1e-5, atol=1e-5)


@pytest.mark.statistical
@pytest.mark.parametrize("activation", [RELU, HARDTANH, GELU], ids=lambda a: a.name)
def test_monte_carlo(activation):
    # 30 moments of each activation, four standard errors: fails by chance once in 500.
    draws, n = 200_000, 3
    root = normal(10, 2 * n, 2 * n) * 0.6
    mean = 0.5 * normal(11, 2 * n)
    joint = root @ root.T
    pairs = GatedPairs.of(activation, mean[:n], joint[:n, :n])
    moments = pairs.push(mean[n:], joint[:n, n:], joint[n:, n:])
    z = mean + normal(12, draws, 2 * n) @ root.T
    slope = torch.from_numpy(SLOPES[activation.name](z[:, :n].numpy()))
    a, da = activation(z[:, :n]), slope * z[:, n:]
    a_, da_ = a - pairs.mean, da - moments[0]
    for sample, truth in [
        (a, pairs.mean),
        (da, moments[0]),
        (a_[:, :, None] * a_[:, None, :], pairs.covariance),
        (a_[:, :, None] * da_[:, None, :], moments[1]),
        (da_[:, :, None] * da_[:, None, :], moments[2]),
    ]:
        error = sample.std(0) / math.sqrt(draws)
        assert bool(((sample.mean(0) - truth).abs() < 4 * error).all())


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.name)
def test_second_moments_are_positive_semidefinite(activation):
    # Singular joint law of rank four over twelve units, some of them all but copies.
    root = normal(20, 24, 4) / 2
    root[6:12] = root[:6] + 1e-3 * normal(21, 6, 4)
    joint = root @ root.T
    n = 12
    pairs = GatedPairs.of(activation, 0.5 * normal(22, n), joint[:n, :n])
    _, cross, covariance = pairs.push(0.5 * normal(23, n), joint[:n, n:], joint[n:, n:])
    whole = torch.cat(
        [
            torch.cat([pairs.covariance, cross], dim=1),
            torch.cat([cross.T, covariance], dim=1),
        ]
    )
    torch.testing.assert_close(covariance, covariance.T, rtol=1e-12, atol=1e-12)
    smallest = torch.linalg.eigvalsh(whole).min() / whole.diagonal().max()
    assert smallest > (-1e-4 if activation in SMOOTH else -1e-9)


def _arguments(n):
    root = normal(30, 2 * n, 2 * n) / 2
    joint = root @ root.T
    return joint[:n, :n], (normal(31, n), joint[:n, n:].contiguous(), joint[n:, n:].contiguous())


@pytest.mark.parametrize("activation", [RELU, HARDTANH, GELU], ids=lambda a: a.name)
def test_gradients(activation):
    s, arguments = _arguments(3)
    pairs = GatedPairs.of(activation, normal(32, 3), s)
    leaves = tuple(value.clone().requires_grad_() for value in arguments)
    assert torch.autograd.gradcheck(pairs.push, leaves)
    assert torch.autograd.gradgradcheck(pairs.push, leaves)


# Forward-mode differentiation warns of torch's own use of torch.jit when it is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.name)
@pytest.mark.parametrize("copies", [False, True])
def test_no_change_stays_none_with_a_finite_curvature(activation, copies):
    s, _ = _arguments(4)
    if copies:
        s[2:], s[:, 2:] = s[:2].clone(), s[:, :2].clone()
        s[2:, 2:] = s[:2, :2]
        s[3, :], s[:, 3] = 0.0, 0.0  # and a constant
    pairs = GatedPairs.of(activation, 0 * normal(33, 4), s)
    root = torch.linalg.cholesky(s + 1e-9 * torch.eye(4))

    def square(weights):
        # A change that is linear in weights, v = weights @ x for s = root @ x.
        cross, covariance = root @ weights.mT, weights @ weights.mT
        mean, _, second = pairs.push(weights.sum(1), cross, covariance)
        return mean.square().sum() + second.diagonal().sum()

    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert square(zero) == 0
    assert not torch.func.grad(square)(zero).any()
    hessian = torch.func.hessian(square)(zero).reshape(16, 16)
    assert bool(hessian.isfinite().all())
    assert hessian.abs().max() > 0.1
    assert torch.linalg.eigvalsh(hessian).min() > -1e-8
    direction = normal(34, 4, 4)
    _, product = torch.func.jvp(torch.func.grad(square), (zero,), (direction,))
    torch.testing.assert_close(product.reshape(-1), hessian @ direction.reshape(-1))


def test_components_do_not_mix():
    s, arguments = _arguments(3)
    mean = normal(35, 2, 3)
    stack = [torch.stack([value, value * 0.5]) for value in (s, *arguments)]
    groups = [(slice(0, 1), RELU), (slice(1, 3), TANH)]
    both = GatedPairs.of(groups, mean, stack[0])
    pushed = both.push(*stack[1:])
    for i in range(2):
        one = GatedPairs.of(groups, mean[i], stack[0][i])
        torch.testing.assert_close(both.covariance[i], one.covariance)
        for found, alone in zip(pushed, one.push(*[v[i] for v in stack[1:]]), strict=True):
            torch.testing.assert_close(found[i], alone)


@pytest.mark.parametrize("activation", KINDS, ids=lambda a: a.name)
def test_derivatives(activation):
    z = torch.linspace(-4, 4, 50, dtype=torch.float64)
    expected = torch.from_numpy(SLOPES[activation.name](z.numpy()))
    torch.testing.assert_close(derivative(activation)(z), expected)


@pytest.mark.parametrize(
    "activation",
    [
        PiecewisePolynomial("sign", (0.0,), ((-1.0,), (1.0,))),
        SmoothActivation("step", lambda z: torch.where(z > 1, z, 0.0), (1.0,)),
    ],
    ids=lambda a: a.name,
)
def test_a_jump_is_refused(activation):
    with pytest.raises(OptionError, match=r"jumps") as refusal:
        GatedPairs.of(activation, torch.zeros(1).double(), torch.ones(1, 1).double())
    assert activation.name in str(refusal.value)
