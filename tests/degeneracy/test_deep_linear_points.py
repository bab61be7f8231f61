"""Local learning coefficients of deep linear networks at points of every kind."""

import itertools
from collections import Counter
from fractions import Fraction

import pytest
import torch

from oracles.linear_chains import decompositions, dense_rank, factors_of
from pushforward.degeneracy.deep_linear_points import (
    coefficient_of_intervals,
    deep_linear_local,
    interval_counts,
    jacobian_rank,
)
from pushforward.degeneracy.known import (
    KnownCoefficient,
    deep_linear,
    normal_crossing,
    regular,
    two_layer_local,
)
from pushforward.errors import OptionError, ShapeError

F64 = torch.float64
EVERY = [
    (widths, intervals)
    for depth, widest in ((1, 4), (2, 4), (3, 3), (4, 2))
    for widths in itertools.product(range(1, widest + 1), repeat=depth + 1)
    for intervals in decompositions(widths)
]


def generic(widths, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, m, generator=generator, dtype=F64).to(dtype)
        for m, n in itertools.pairwise(widths)
    ]


def through(widths, rank, seed=0):
    """Factors that all have the same rank, and so has their product."""
    generator = torch.Generator().manual_seed(seed)
    bases = [torch.linalg.qr(torch.randn(w, w, generator=generator, dtype=F64))[0] for w in widths]
    return [
        b[:, :rank] @ torch.diag(torch.linspace(1, 0.5, rank, dtype=F64)) @ a[:, :rank].T
        for a, b in itertools.pairwise(bases)
    ]


def test_decompositions_are_found_again():
    for position, (widths, intervals) in enumerate(EVERY[:: len(EVERY) // 300]):
        factors = factors_of(widths, intervals, seed=position)
        assert interval_counts(factors, tolerance=1e-9) == intervals


def test_the_rank_of_the_jacobian():
    smooth = 0
    for position, (widths, intervals) in enumerate(EVERY[:: len(EVERY) // 300]):
        depth = len(widths) - 1
        found = jacobian_rank(intervals, depth)
        assert found == dense_rank(factors_of(widths, intervals, seed=position))
        try:
            smooth += coefficient_of_intervals(intervals, depth) == regular(found)
        except OptionError:
            continue
    assert smooth > 100


def test_a_submersion_merges_two_factors():
    """Next to an injective or a surjective factor the product is as good as the two factors."""
    merged = 0
    for widths, intervals in EVERY:
        depth = len(widths) - 1
        for layer in range(1, depth):
            injective = not any(last == layer - 1 for _, last in intervals)
            surjective = not any(first == layer + 1 for first, _ in intervals)
            if not (injective or surjective):
                continue
            fewer = Counter()
            for (i, j), n in intervals.items():
                if (i, j) != (layer, layer):
                    fewer[i - (i > layer), j - (j >= layer)] += n
            try:
                expected = coefficient_of_intervals(fewer, depth - 1)
            except OptionError:
                continue
            assert coefficient_of_intervals(intervals, depth) == expected
            merged += 1
    assert merged > 1000


def test_two_layers_have_their_own_formula():
    cases = [(widths, intervals) for widths, intervals in EVERY if len(widths) == 3]
    for widths, intervals in cases:
        first, second = (
            sum(n for (i, j), n in intervals.items() if i <= layer <= j - 1) for layer in (0, 1)
        )
        expected = two_layer_local(widths, first, second, intervals.get((0, 2), 0))
        assert coefficient_of_intervals(intervals, 2) == expected
    assert len(cases) > 500


def test_the_worst_point_of_every_fibre_has_the_global_coefficient():
    worst = {}
    refused = 0
    for widths, intervals in EVERY:
        depth = len(widths) - 1
        rank = intervals.get((0, depth), 0)
        try:
            found = coefficient_of_intervals(intervals, depth)
        except OptionError:
            refused += 1
            continue
        pole = (found.value, -found.multiplicity)
        worst[widths, rank] = min(worst.get((widths, rank), pole), pole)
    for (widths, rank), (value, order) in worst.items():
        assert deep_linear(widths, rank) == KnownCoefficient(value, -order)
    assert refused < 0.15 * len(EVERY)


@pytest.mark.parametrize(
    "widths", [(3, 3), (2, 5, 3), (5, 2, 5), (5, 6, 7, 5), (4, 7, 3, 6, 5), (20, 30, 10, 25)]
)
def test_generic_points_are_smooth(widths):
    factors = generic(widths)
    rank = min(widths)
    found = deep_linear_local(factors)
    assert found == regular(rank * (widths[0] + widths[-1] - rank))
    assert found.value == Fraction(dense_rank(factors), 2)


@pytest.mark.parametrize("widths", [(3, 3), (5, 6, 7, 5), (4, 4, 4, 4, 4), (2, 7, 3, 1)])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_points_of_one_rank_throughout_are_the_worst(widths, rank):
    if rank <= min(widths):
        assert deep_linear_local(through(widths, rank)) == deep_linear(widths, rank)


def test_full_rank_of_every_factor_does_not_make_a_point_smooth():
    up, down = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0, 1.0]])
    factors = [up, down, up, down]
    assert dense_rank(factors) == 0
    assert deep_linear_local(factors) == normal_crossing([1, 1])
    # Without the last two nothing is lost: the product of two is a submersion there.
    assert deep_linear_local(factors[:2]) == regular(1)


def test_mixed_points_by_hand():
    identity, zero = torch.eye(2, dtype=F64), torch.zeros(2, 2, dtype=F64)
    assert deep_linear_local([identity, zero]) == regular(4)
    # An invertible factor can be multiplied into its neighbour.
    assert deep_linear_local([zero, identity, zero]) == deep_linear((2, 2, 2), 0)
    assert deep_linear_local([zero, zero, identity]) == deep_linear((2, 2, 2), 0)


def test_parts_without_common_factors_add():
    # 1/2 of the Jacobian, and two products of two scalars.
    apart = {(0, 0): 1, (1, 1): 1, (2, 4): 1, (0, 2): 1, (3, 3): 1, (4, 4): 1}
    assert jacobian_rank(apart, 4) == 1
    assert coefficient_of_intervals(apart, 4) == KnownCoefficient(Fraction(3, 2), 3)
    factors = factors_of((2, 2, 2, 2, 2), apart, seed=0)
    assert deep_linear_local(factors, tolerance=1e-9) == KnownCoefficient(Fraction(3, 2), 3)


def test_products_with_common_factors_are_refused():
    shared = {(0, 0): 1, (1, 1): 1, (2, 2): 1, (2, 3): 1, (3, 3): 1}
    with pytest.raises(OptionError, match="common factors"):
        coefficient_of_intervals(shared, 3)


def test_scales_and_bases_do_not_matter():
    factors = through((5, 6, 7, 5), 2)
    expected = deep_linear((5, 6, 7, 5), 2)
    assert deep_linear_local([1e-6 * factors[0], 1e6 * factors[1], factors[2]]) == expected
    assert deep_linear_local([w.T for w in reversed(factors)]) == expected
    assert deep_linear_local([w.float() for w in factors]) == expected


def test_long_chains_lose_no_direction_to_rounding():
    widths = (8,) * 61
    factors = generic(widths)
    product = torch.linalg.multi_dot(factors[::-1])
    assert torch.linalg.matrix_rank(product) < 8
    assert deep_linear_local(factors) == regular(64)


def test_single_precision_is_taken_at_its_word():
    assert deep_linear_local(generic((300,) * 4, dtype=torch.float32)) == regular(300**2)


def test_the_tolerance_decides_what_counts_as_zero():
    factors = [
        w + 1e-4 * noise
        for w, noise in zip(through((4, 4, 4), 1), generic((4, 4, 4), 1), strict=True)
    ]
    assert deep_linear_local(factors) == regular(16)
    assert deep_linear_local(factors, tolerance=1e-2) == deep_linear((4, 4, 4), 1)


@pytest.mark.parametrize(
    ("factors", "tolerance", "error"),
    [
        ([], None, ShapeError),
        ([torch.zeros(0, 3)], None, ShapeError),
        ([torch.ones(2, 3), torch.ones(2, 3)], None, ShapeError),
        ([torch.full((2, 3), torch.nan)], None, OptionError),
        ([torch.ones(2, 3)], 1.0, OptionError),
        ([torch.ones(2, 3)], -0.1, OptionError),
    ],
)
def test_refusals(factors, tolerance, error):
    with pytest.raises(error) as caught:
        deep_linear_local(factors, tolerance=tolerance)
    assert caught.value.advice.endswith(".")
