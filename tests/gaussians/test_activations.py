"""Hermite tables of piecewise polynomials and smooth activations against brute-force quadrature."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from oracles.hermite_tables import assert_table
from pushforward.errors import OptionError
from pushforward.gaussians.activations import (
    PiecewisePolynomial,
    SmoothActivation,
    identity,
)

RELU = PiecewisePolynomial("relu", (0.0,), ((0.0,), (0.0, 1.0)))
LEAKY = PiecewisePolynomial("leaky_relu", (0.0,), ((0.0, 0.1), (0.0, 1.0)))
ABS = PiecewisePolynomial("abs", (0.0,), ((0.0, -1.0), (0.0, 1.0)))
SIGN = PiecewisePolynomial("sign", (0.0,), ((-1.0,), (1.0,)))
HARDTANH = PiecewisePolynomial("hardtanh", (-1.0, 1.0), ((-1.0,), (0.0, 1.0), (1.0,)))
HARDSHRINK = PiecewisePolynomial("hardshrink", (-0.5, 0.5), ((0.0, 1.0), (0.0,), (0.0, 1.0)))
SQUARE = PiecewisePolynomial("square", (), ((0.0, 0.0, 1.0),))
CUBIC = PiecewisePolynomial("cubic", (), ((0.3, -1.0, 0.5, 0.2),))
HARDSWISH = PiecewisePolynomial("hardswish", (-3.0, 3.0), ((0.0,), (0.0, 0.5, 1 / 6), (0.0, 1.0)))
PIECEWISE = [RELU, LEAKY, ABS, SIGN, HARDTANH, HARDSHRINK, SQUARE, CUBIC, HARDSWISH, identity()]
SMOOTH = [
    SmoothActivation("tanh", torch.tanh),
    SmoothActivation("gelu", functional.gelu),
    SmoothActivation("silu", functional.silu),
    SmoothActivation("softplus", functional.softplus),
    SmoothActivation("sigmoid", torch.sigmoid),
    SmoothActivation("sine", torch.sin),
    SmoothActivation("elu", functional.elu, (0.0,)),
    SmoothActivation("softsign", functional.softsign, (0.0,)),
]

MEANS = torch.tensor([0.0, 0.4, -1.3, 2.0, 3.0, 0.5, -40.0, 25.0], dtype=torch.float64)
STDS = torch.tensor([1.0, 0.6, 1.6, 0.2, 1e-3, 6.0, 0.7, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("activation", PIECEWISE, ids=lambda a: a.name)
def test_piecewise_tables_are_exact(activation):
    assert_table(activation, MEANS, STDS, relative=1e-12)


@pytest.mark.parametrize("activation", SMOOTH, ids=lambda a: a.name)
def test_smooth_tables_converge(activation):
    assert_table(activation, MEANS, STDS, relative=1e-11)


@pytest.mark.parametrize("activation", [RELU, CUBIC, HARDSHRINK, *SMOOTH], ids=lambda a: a.name)
def test_tables_at_tiny_spread(activation):
    # A dead unit has a spread of 1e-10 or so; away from kinks phi is then its tangent.
    mean = torch.tensor([0.7, -0.8, 5.0], dtype=torch.float64)
    std = torch.full_like(mean, 1e-6)
    table = activation.hermite_table(mean, std, 2, 2).values
    point = mean.clone().requires_grad_()
    (slope,) = torch.autograd.grad(activation(point).sum(), point)
    torch.testing.assert_close(table[0, 1] / std, slope, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(table[1, 0] / std**2, slope.square(), rtol=1e-5, atol=1e-8)


# Softsign levels off so slowly that the brute force does not resolve it at the widest spreads.
@pytest.mark.parametrize("activation", [*SMOOTH[:5], SMOOTH[6]], ids=lambda a: a.name)
@pytest.mark.parametrize("std", [30.0, 200.0, 1e3, 1e4])
def test_wide_units_see_the_whole_activation(activation, std):
    # Unnormalised inputs give such spreads; the bend at zero is then narrow in standard units.
    mean = torch.tensor([0.0, 3.0, -0.4 * std], dtype=torch.float64)
    assert_table(activation, mean, torch.full_like(mean, std), relative=1e-9, max_degree=4)


def test_one_narrow_unit_among_many_flat_ones_is_resolved():
    # The panels are chosen from a sample of the units, which must hold the difficult one.
    mean = torch.full((1000,), 1000.0, dtype=torch.float64)
    mean[501] = 0.0
    std = torch.full_like(mean, 10.0)
    alone = SMOOTH[0].hermite_table(mean[501:502], std[501:502], 2, 4).values[..., 0]
    among = SMOOTH[0].hermite_table(mean, std, 2, 4).values[..., 501]
    torch.testing.assert_close(among, alone, rtol=0, atol=1e-10)


def test_a_difference_of_large_numbers_still_converges_at_tiny_spread():
    shrink = SmoothActivation("tanhshrink", lambda z: z - torch.tanh(z))
    table = shrink.hermite_table(
        torch.zeros(1, dtype=torch.float64), torch.full((1,), 1e-10, dtype=torch.float64), 4, 4
    )
    assert table.values.abs().max() < 1e-20


@pytest.mark.parametrize("activation", [RELU, HARDTANH, CUBIC, *SMOOTH[:3]], ids=lambda a: a.name)
def test_derivatives_move_along_the_table(activation):
    # w_k = A_k / s^k satisfies dw_k/dm = w_{k+1} and, by the heat equation, dw_k/ds = s w_{k+2}.
    mean = MEANS[:4].clone().requires_grad_()
    std = STDS[:4].clone().requires_grad_()
    center, values = activation.hermite_table(mean, std, 1, 6)
    w = [values[0, k] / std**k for k in range(7)]
    w[0] = w[0] + center
    for k in range(4):
        by_mean, by_std = torch.autograd.grad(w[k].sum(), (mean, std), retain_graph=True)
        torch.testing.assert_close(by_mean, w[k + 1], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(by_std, std * w[k + 2], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "activation", [RELU, HARDSHRINK, SMOOTH[0], SMOOTH[6]], ids=lambda a: a.name
)
def test_gradients_of_every_power(activation):
    mean = torch.tensor([0.3, -0.6], dtype=torch.float64, requires_grad=True)
    std = torch.tensor([0.8, 1.4], dtype=torch.float64, requires_grad=True)

    def table(m, s):
        center, values = activation.hermite_table(m, s, 4, 4)
        return center, values

    assert torch.autograd.gradcheck(table, (mean, std))


def test_relu_coefficients_in_closed_form():
    # Spec: k < p: p! / (p - k)! J_{p-k}, J_q = E[Z^q 1(Z > 0)]; w_k = (-1)^k s^{1-k} He_{k-2} phi.
    mean, std = MEANS[:6], STDS[:6]
    alpha = mean / std
    density = torch.exp(-alpha.square() / 2) / math.sqrt(2 * math.pi)
    tail = torch.special.ndtr(alpha)
    center, values = RELU.hermite_table(mean, std, 2, 5)
    w = values[0] / std ** torch.arange(6)[:, None]
    torch.testing.assert_close(center + w[0], mean * tail + std * density)
    torch.testing.assert_close(w[1], tail, rtol=1e-12, atol=1e-14)
    hermite = [torch.ones_like(alpha), alpha, alpha**2 - 1, alpha**3 - 3 * alpha]
    for k in range(2, 6):
        expected = (-1) ** k * std ** (1 - k) * hermite[k - 2] * density
        torch.testing.assert_close(w[k], expected, rtol=1e-9, atol=1e-12)
    second = (mean**2 + std**2) * tail + mean * std * density
    raw = values[1, 0] + 2 * center * values[0, 0] + center**2
    torch.testing.assert_close(raw, second, rtol=1e-12, atol=1e-14)


def test_gelu_coefficients_in_closed_form():
    mean, std = MEANS[:6], STDS[:6]
    tau = torch.sqrt(1 + std**2)
    c = mean / tau
    density = torch.exp(-c.square() / 2) / math.sqrt(2 * math.pi)
    center, values = SMOOTH[1].hermite_table(mean, std, 1, 4)
    w = values[0] / std ** torch.arange(5)[:, None]
    tail = torch.special.ndtr(c)
    torch.testing.assert_close(center + w[0], mean * tail + std**2 / tau * density)
    torch.testing.assert_close(w[1], tail + c * density / tau**2, rtol=1e-8, atol=1e-9)
    hermite = [torch.ones_like(c), c, c**2 - 1, c**3 - 3 * c, c**4 - 6 * c**2 + 3]
    usual = std > 0.1  # at s = 1e-3 the division by s^k amplifies the quadrature error
    for k in range(2, 5):
        expected = (-1) ** k * density
        expected = expected * (hermite[k - 2] / tau ** (k - 1) - hermite[k] / tau ** (k + 1))
        torch.testing.assert_close(w[k][usual], expected[usual], rtol=1e-8, atol=1e-9)


coefficient = st.floats(-2, 2).map(lambda c: round(c, 3))


@st.composite
def pieces_between_breakpoints(draw):
    count = draw(st.integers(0, 3))
    positions = draw(
        st.lists(st.integers(-30, 30), min_size=count, max_size=count, unique=True).map(sorted)
    )
    pieces = [tuple(draw(st.lists(coefficient, min_size=1, max_size=4))) for _ in range(count + 1)]
    return tuple(p / 10 for p in positions), tuple(pieces)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pieces_between_breakpoints(), st.floats(-3, 3), st.floats(0.05, 3))
def test_random_piecewise_polynomials(function, mean, std):
    activation = PiecewisePolynomial("random", *function)
    m = torch.tensor([mean], dtype=torch.float64)
    s = torch.tensor([std], dtype=torch.float64)
    assert_table(activation, m, s, relative=1e-10, max_power=3, max_degree=5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(pieces_between_breakpoints())
def test_values_and_jumps_of_random_pieces(function):
    positions, pieces = function
    activation = PiecewisePolynomial("random", positions, pieces)
    edges = [-10.0, *positions, 10.0]
    for low, high, piece in zip(edges, edges[1:], pieces, strict=False):
        z = torch.linspace(low, high, 7, dtype=torch.float64)[:-1]
        expected = sum(c * z**i for i, c in enumerate(piece))
        torch.testing.assert_close(activation(z), expected)
    for position, order in zip(positions, activation.jump_orders, strict=True):
        left, right = activation.pieces[positions.index(position) :][:2]
        for derivative in range(order):
            polys = [np.polynomial.Polynomial(p).deriv(derivative) for p in (left, right)]
            gap = polys[1](position) - polys[0](position)
            assert abs(gap) < 1e-10


@pytest.mark.parametrize(
    ("activation", "homogeneous"),
    [
        (RELU, True),
        (LEAKY, True),
        (ABS, True),
        (identity(), True),
        (SIGN, False),
        (HARDTANH, False),
        (SQUARE, False),
        (PiecewisePolynomial("shifted", (1.0,), ((0.0,), (0.0, 1.0))), False),
        (PiecewisePolynomial("offset", (0.0,), ((0.5,), (0.0, 1.0))), False),
        (SMOOTH[0], False),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_positive_homogeneity(activation, homogeneous):
    assert activation.positively_homogeneous is homogeneous
    z = torch.tensor([-1.7, -0.2, 0.6, 3.0], dtype=torch.float64)
    scales = all(
        torch.allclose(activation(a * z), a * activation(z), rtol=1e-12) for a in (0.1, 7.0)
    )
    assert scales is homogeneous


@pytest.mark.parametrize(
    ("breakpoints", "pieces"),
    [
        ((0.0,), ((0.0,),)),
        ((), ((0.0,), (1.0,))),
        ((1.0, 0.0), ((0.0,), (1.0,), (2.0,))),
        ((0.0, 0.0), ((0.0,), (1.0,), (2.0,))),
        ((0.0,), ((), (1.0,))),
    ],
)
def test_malformed_pieces_are_refused(breakpoints, pieces):
    with pytest.raises(OptionError, match="PiecewisePolynomial 'odd'"):
        PiecewisePolynomial("odd", breakpoints, pieces)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: (z > 0.123).double(),  # an undeclared jump
        lambda z: 1 / z,
    ],
)
def test_integrals_that_do_not_converge_are_refused(function):
    mean, std = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    with pytest.raises(OptionError, match="did not converge"):
        SmoothActivation("rough", function).hermite_table(mean, std, 2, 3)


def test_a_declared_breakpoint_makes_the_jump_converge():
    step = SmoothActivation("step", lambda z: (z > 0.123).double(), (0.123,))
    exact = PiecewisePolynomial("step", (0.123,), ((0.0,), (1.0,)))
    mean, std = MEANS[:6], STDS[:6]
    found, expected = (a.hermite_table(mean, std, 2, 5) for a in (step, exact))
    torch.testing.assert_close(found.values, expected.values, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", [RELU, SMOOTH[1], SMOOTH[6]], ids=lambda a: a.name)
def test_units_may_come_in_any_shape(activation):
    mean, std = MEANS[:6].reshape(2, 3), STDS[:6].reshape(2, 3)
    shaped = activation.hermite_table(mean, std, 2, 3)
    flat = activation.hermite_table(mean.reshape(-1), std.reshape(-1), 2, 3)
    assert shaped.values.shape == (2, 4, 2, 3)
    assert shaped.center.shape == (2, 3)
    torch.testing.assert_close(shaped.values, flat.values.reshape(2, 4, 2, 3))


def test_standardised_pieces_are_the_function():
    mean, std = MEANS[:4], STDS[:4]
    for activation in (HARDTANH, CUBIC, HARDSWISH):
        center, breakpoints, pieces = activation.standardised(mean, std)
        for x in (-3.0, -0.4, 0.0, 1.9):
            value = activation(mean + std * x) - center
            index = sum((u <= x).long() for u in breakpoints) if breakpoints else 0 * mean.long()
            polynomial = torch.stack(
                [sum(c * x**i for i, c in enumerate(piece)) for piece in pieces]
            )
            chosen = polynomial.gather(0, index[None])[0]
            torch.testing.assert_close(chosen, value, rtol=1e-10, atol=1e-12)
