"""Exact learning coefficients against tables, against each other, and against volumes."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from pushforward.degeneracy.known import (
    KnownCoefficient,
    cusp,
    deep_linear,
    normal_crossing,
    product_of,
    reduced_rank_regression,
    regular,
    sum_of,
    sum_of_powers,
    tanh_network,
    two_component,
    two_layer_local,
)
from pushforward.errors import OptionError

F64 = torch.float64
HALF = Fraction(1, 2)

# Widths, rank, coefficient, multiplicity: computed elsewhere by Aoyagi's formula.
TABLE = [
    ((1, 1), 0, HALF, 1),
    ((1, 1, 1), 0, HALF, 2),
    ((1, 1, 1, 1, 1), 0, HALF, 4),
    ((2, 2, 2), 0, 3 * HALF, 1),
    ((2, 2, 2), 1, 2, 2),
    ((2, 2, 2), 2, 2, 1),
    ((3, 2, 3), 0, 5 * HALF, 1),
    ((3, 3, 3), 0, 7 * HALF, 2),
    ((3, 3, 3), 1, 4, 1),
    ((5, 3, 5), 0, 13 * HALF, 2),
    ((5, 4, 5), 0, 8, 1),
    ((4, 3, 8), 0, 6, 1),
    ((8, 3, 4), 0, 6, 1),
    ((3, 8, 4), 0, 6, 1),
    ((5, 6, 7, 5), 0, 21 * HALF, 3),
    ((5, 6, 7, 5), 2, 12, 1),
    ((5, 6, 7, 5), 5, 25 * HALF, 1),
    ((10, 10, 10), 0, 75 * HALF, 1),
    ((10, 10, 10), 5, 47, 2),
    ((10, 20, 20, 10), 0, 50, 1),
    ((10, 20, 20, 10), 5, 50, 1),
    ((10, 20, 20, 10), 10, 50, 1),
    ((4, 4, 4, 4, 4), 0, 5, 1),
    ((4, 4, 4, 4, 4), 2, 15 * HALF, 5),
    ((100,) * 3, 0, 3750, 1),
    ((100,) * 5, 0, 3125, 1),
    ((100,) * 11, 0, 2750, 1),
    ((100,) * 101, 0, 2525, 1),
    ((455, 395, 125, 350, 277, 261, 297), 28, 41093 * HALF, 3),
    ((14, 4, 10, 10, 27, 8, 8, 27, 16, 18, 12, 4, 19, 13, 11, 29, 24, 3), 3, 21, 1),
    ((9, 29, 20, 6, 28, 12, 4, 28, 15, 17, 7, 27, 18, 27, 23, 17), 4, 44, 1),
]


@pytest.mark.parametrize(("widths", "rank", "value", "multiplicity"), TABLE)
def test_deep_linear_networks_of_the_table(widths, rank, value, multiplicity):
    found = deep_linear(widths, rank)
    assert found == KnownCoefficient(Fraction(value), multiplicity)
    assert isinstance(found.value, Fraction)
    assert float(found) == float(value)


def test_two_layers_are_reduced_rank_regression():
    cases = 0
    for widths in itertools.product(range(1, 7), repeat=3):
        for rank in range(min(widths) + 1):
            assert deep_linear(widths, rank) == reduced_rank_regression(*widths, rank)
            cases += 1
    assert cases == 657


def test_the_order_of_widths_only_matters_through_the_ends_and_the_rank():
    for widths in itertools.product((1, 2, 4, 5), repeat=4):
        # At rank 0 not at all; otherwise the two ends may be swapped, and the hidden widths.
        assert len({deep_linear(w, 0) for w in itertools.permutations(widths)}) == 1
        first, second, third, fourth = widths
        found = deep_linear(widths, 1)
        assert found == deep_linear((fourth, third, second, first), 1)
        assert found == deep_linear((first, third, second, fourth), 1)


def test_deep_linear_bounds():
    for widths in itertools.product((1, 2, 3, 5), repeat=4):
        previous = None
        for rank in range(min(widths) + 1):
            found = deep_linear(widths, rank)
            # Not above the generic points of the fibre, nor above all matrices of the ends.
            narrowest = min(widths)
            assert found.value <= Fraction(narrowest * (widths[0] + widths[-1] - narrowest), 2)
            assert found.value >= Fraction(rank * (widths[0] + widths[-1] - rank), 2)
            # A further layer only adds ways to be degenerate.
            assert deep_linear((*widths[:2], 5, *widths[2:]), rank).value <= found.value
            assert previous is None or previous <= found.value
            previous = found.value


def test_one_layer_and_wide_layers_are_regular():
    for m, n in itertools.product(range(1, 6), repeat=2):
        for rank in range(min(m, n) + 1):
            assert deep_linear((m, n), rank) == regular(m * n)
            assert deep_linear((m, m + n, n), rank).value == Fraction(m * n, 2)


def test_scalar_chains_are_normal_crossings():
    for depth in range(1, 7):
        assert deep_linear((1,) * (depth + 1), 0) == normal_crossing([1] * depth)
        assert deep_linear((1,) * (depth + 1), 1) == regular(1)


def test_two_layers_locally():
    # At the balanced point, the worst of its fibre, it is the global value.
    for widths in itertools.product(range(1, 6), repeat=3):
        for rank in range(min(widths) + 1):
            assert two_layer_local(widths, rank, rank, rank) == deep_linear(widths, rank)
    assert two_layer_local((2, 2, 2), 2, 0, 0) == regular(4)
    assert two_layer_local((2, 2, 2), 0, 2, 0) == regular(4)
    assert two_layer_local((2, 3, 2), 2, 2, 1) == regular(4)  # a submersion at any rank
    # Both factors 0 but for one direction each, which do not meet.
    assert two_layer_local((2, 2, 2), 1, 1, 0) == regular(3)


def test_two_layers_reversed_are_the_transpose():
    for widths in itertools.product(range(1, 5), repeat=3):
        m, h, n = widths
        for a, b in itertools.product(range(min(m, h) + 1), range(min(h, n) + 1)):
            for r in range(max(0, a + b - h), min(a, b) + 1):
                found = two_layer_local(widths, a, b, r)
                assert found == two_layer_local((n, h, m), b, a, r)
                assert found.value >= deep_linear(widths, r).value


@pytest.mark.parametrize(
    ("exponents", "priors", "value", "multiplicity"),
    [
        ((0, 1), None, HALF, 1),
        ((1, 1), None, HALF, 2),
        ((1, 2), None, HALF / 2, 1),
        ((2, 2), None, HALF / 2, 2),
        ((2, 3), None, HALF / 3, 1),
        ((3, 3), None, HALF / 3, 2),
        ((1, 2), (0, 1), HALF, 2),
        ((1, 1), (0, 3), HALF, 1),
        ((1, 3), (5, 2), HALF, 1),
        ((0, 1, 0), (9, 0, 9), HALF, 1),
    ],
)
def test_normal_crossings(exponents, priors, value, multiplicity):
    assert normal_crossing(exponents, priors) == KnownCoefficient(value, multiplicity)


@pytest.mark.parametrize("exponents", [(1, 1), (1, 2), (2, 2), (1, 1, 1)])
def test_volumes_of_normal_crossings(exponents):
    """``vol(K < t)`` in the unit cube, which is elementary, falls as its coefficient says."""
    found = normal_crossing(exponents)

    def volume(t):
        # -log w_i are exponential: the volume is P(sum 2 k_i e_i > -log t).
        level = -math.log(t)
        if len(set(exponents)) == 1:
            x = level / (2 * exponents[0])
            return math.exp(-x) * sum(x**j / math.factorial(j) for j in range(len(exponents)))
        a, b = (1 / (2 * k) for k in exponents)
        return (a * math.exp(-b * level) - b * math.exp(-a * level)) / (a - b)

    low, high = 1e-200, 1e-100
    ratio = math.log(volume(low) / volume(high))
    logs = math.log(math.log(low) / math.log(high))
    slope = (ratio - (found.multiplicity - 1) * logs) / math.log(low / high)
    assert slope == pytest.approx(float(found), abs=1e-4)


def test_sums_and_products():
    a, b = KnownCoefficient(HALF, 2), KnownCoefficient(Fraction(1, 3), 3)
    assert sum_of(a, b) == KnownCoefficient(Fraction(5, 6), 4)
    assert sum_of() == KnownCoefficient(Fraction(0))
    assert sum_of(a) == a
    assert product_of(a, b) == b
    assert product_of(a, regular(1), b, b) == KnownCoefficient(Fraction(1, 3), 6)
    assert sum_of(*[regular(1)] * 7) == regular(7)
    assert product_of(regular(1), regular(1)) == normal_crossing([1, 1])
    assert sum_of_powers([1, 2, 3]) == KnownCoefficient(Fraction(11, 12))
    assert sum_of_powers([1] * 5) == regular(5)


def test_others():
    assert cusp() == KnownCoefficient(Fraction(5, 12))
    assert cusp(1, 3) == regular(1)
    assert cusp(2, 2) == normal_crossing([1, 1])
    assert cusp(4, 4) == KnownCoefficient(Fraction(1, 4))
    assert two_component(1, 2, at_origin=False) == KnownCoefficient(HALF)
    assert two_component(1, 2, at_origin=True) == KnownCoefficient(HALF / 2)
    assert tanh_network(1) == normal_crossing([1, 1])
    assert tanh_network(2) == KnownCoefficient(Fraction(2, 3))
    assert tanh_network(3) == KnownCoefficient(Fraction(5, 6))
    assert tanh_network(4) == KnownCoefficient(Fraction(1), 2)
    assert tanh_network(9) == KnownCoefficient(Fraction(3, 2), 2)
    # Where two strata tie the formula may use either, hence the double pole.
    for hidden in (4, 9, 16):
        i = math.isqrt(hidden) - 1
        assert tanh_network(hidden).value == Fraction(hidden + i * i + i, 4 * i + 2)


def test_the_leading_finite_temperature_value():
    assert regular(10).at(50.0) == 5
    assert normal_crossing([1, 1]).at(math.e**4) == pytest.approx(0.25)
    assert normal_crossing([1, 1, 1]).at(1e3) == pytest.approx(0.5 - 2 / math.log(1e3))
    for nbeta in (1.0, 0.0, -3.0, math.nan):
        with pytest.raises(OptionError, match="nbeta"):
            regular(1).at(nbeta)


@pytest.mark.parametrize(
    "call",
    [
        lambda: KnownCoefficient(Fraction(-1)),
        lambda: KnownCoefficient(math.nan),
        lambda: KnownCoefficient(Fraction(1), 0),
        lambda: regular(-1),
        lambda: normal_crossing([]),
        lambda: normal_crossing([0, 0]),
        lambda: normal_crossing([1, -1]),
        lambda: normal_crossing([1, 1], [0]),
        lambda: normal_crossing([1], [-1]),
        lambda: product_of(),
        lambda: sum_of_powers([1, 0]),
        lambda: cusp(0, 3),
        lambda: two_component(0, 1, at_origin=True),
        lambda: tanh_network(0),
        lambda: deep_linear([3], 0),
        lambda: deep_linear([3, 0, 3], 0),
        lambda: deep_linear([3, -2, 3], 0),
        lambda: deep_linear([3, 2, 3], 3),
        lambda: deep_linear([3, 2, 3], -1),
        lambda: reduced_rank_regression(3, 2, 3, 3),
        lambda: reduced_rank_regression(-3, 2, 3, 0),
        lambda: two_layer_local((3, 2, 3), 3, 0, 0),
        lambda: two_layer_local((3, 2, 3), 1, 1, 2),
        lambda: two_layer_local((3, 2, 3), 2, 2, 1),
        lambda: two_layer_local((3, 2, 3), -1, 0, 0),
    ],
)
def test_refusals(call):
    with pytest.raises(OptionError) as caught:
        call()
    assert caught.value.advice.endswith(".")
