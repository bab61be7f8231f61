"""Deep linear networks of given rank, and data of given second moments."""

import itertools
from fractions import Fraction

import pytest
import torch

from degeneracy_problems import draws
from pushforward.degeneracy.deep_linear_points import deep_linear_local
from pushforward.degeneracy.known import deep_linear
from pushforward.degeneracy.linear_networks import (
    balanced_factors,
    realised,
    second_moments,
    square_widths,
)
from pushforward.errors import OptionError

F64 = torch.float64


def factors(widths, rank, seed=0):
    return balanced_factors(widths, rank, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("wanted", "widths"),
    [(1, (1, 1, 1)), (2, (1, 1, 1)), (8, (2, 2, 2)), (12, (2,) * 4), (1000, (18,) * 4)],
)
def test_widths(wanted, widths):
    assert square_widths(wanted) == widths


def test_widths_of_no_parameters():
    with pytest.raises(OptionError, match=r"^num_parameters: 0"):
        square_widths(0)


def test_layers_share_the_singular_values_of_their_product():
    for rank in (1, 2, 3):
        layers = factors((3, 3, 3, 3), rank)
        product = torch.linalg.multi_dot(layers[::-1])
        values = torch.linalg.svdvals(product)
        assert torch.allclose(values[:rank], torch.linspace(1, 0.5, rank, dtype=F64))
        assert bool((values[rank:] < 1e-12).all())
        for before, after in itertools.pairwise(layers):
            assert torch.allclose(after.T @ after, before @ before.T, atol=1e-12)  # balanced
    assert all(not bool(layer.any()) for layer in factors((2, 2, 2), 0))


def test_their_coefficients_are_known():
    full, zero, reduced = (deep_linear_local(factors((3,) * 4, rank)) for rank in (3, 0, 1))
    assert full.value == Fraction(9, 2)
    assert zero == deep_linear([3] * 4, 0)
    assert reduced == deep_linear([3] * 4, 1)


def test_second_moments_are_all_that_a_linear_network_sees():
    inputs = draws(50, 3) @ draws(3, 3, seed=1)
    few = second_moments(inputs)
    assert few.shape == (3, 3)
    net, (_, targets) = realised(factors((3, 3, 3), 2), inputs)
    other, (_, few_targets) = realised(factors((3, 3, 3), 2), few)
    for weights in (net, other):
        with torch.no_grad():
            weights[0].weight.add_(0.3)
    losses = [
        (there(x) - y).square().sum(1).mean()
        for there, x, y in ((net, inputs, targets), (other, few, few_targets))
    ]
    assert torch.allclose(losses[0], losses[1])
