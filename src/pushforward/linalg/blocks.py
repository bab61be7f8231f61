"""Products of tall blocks of vectors, accumulated in float64 without a float64 copy of them."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["gram", "inner"]

_COLUMNS = 2**16  # converted to float64 at a time


def gram(left: Float[Tensor, "J P"], right: Float[Tensor, "K P"]) -> Float[Tensor, "J K"]:
    """Inner products of every row of one block with every row of another, ``left @ right.T``.

    Parameters
    ----------
    left, right
        Vectors as rows, ``(J, P)`` and ``(K, P)``.

    Returns
    -------
    Tensor
        ``(J, K)`` float64.
    """
    total = left.new_zeros(len(left), len(right), dtype=torch.float64)
    for start in range(0, left.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        total += left[:, part].double() @ right[:, part].double().T
    return total


def inner(left: Float[Tensor, "K P"], right: Float[Tensor, "K P"]) -> Float[Tensor, " K"]:
    """Inner product of each row of one block with the same row of another.

    Parameters
    ----------
    left, right
        ``(K, P)``.

    Returns
    -------
    Tensor
        ``(K,)`` float64.
    """
    total = left.new_zeros(len(left), dtype=torch.float64)
    for start in range(0, left.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        total += (left[:, part].double() * right[:, part].double()).sum(1)
    return total
