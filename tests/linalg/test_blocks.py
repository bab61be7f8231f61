"""Inner products of blocks, accumulated in float64."""

import pytest
import torch

from laplace_scenarios import numbers
from pushforward.linalg import blocks
from pushforward.linalg.blocks import gram, inner

BLOCKS = numbers(3, 1000, seed=1), numbers(5, 1000, seed=2)


def test_gram_is_a_matrix_of_inner_products():
    left, right = BLOCKS
    torch.testing.assert_close(gram(left, right), left @ right.T)


def test_inner_is_the_diagonal_of_gram():
    left, right = BLOCKS[0], BLOCKS[1][:3]
    torch.testing.assert_close(inner(left, right), gram(left, right).diagonal())


@pytest.mark.parametrize("columns", [1, 7, 999, 1000, 1001])
def test_portions_add_up(monkeypatch, columns):
    left, right = BLOCKS
    monkeypatch.setattr(blocks, "_COLUMNS", columns)
    torch.testing.assert_close(gram(left, right), left @ right.T)
    torch.testing.assert_close(inner(left, right[:3]), (left * right[:3]).sum(1))


def test_float32_is_accumulated_in_float64():
    ones = torch.full((1, 2**20), 0.1)
    exact = float(torch.tensor(0.1).double()) ** 2 * 2**20
    assert gram(ones, ones).dtype == inner(ones, ones).dtype == torch.float64
    assert gram(ones, ones).item() == pytest.approx(exact, rel=1e-12)
    assert inner(ones, ones).item() == pytest.approx(exact, rel=1e-12)


def test_empty_blocks():
    assert gram(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
    assert inner(torch.zeros(2, 0), torch.zeros(2, 0)).tolist() == [0.0, 0.0]
