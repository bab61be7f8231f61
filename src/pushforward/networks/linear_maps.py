"""Linear maps between flat feature vectors, dense or structured, as layers define them.

Every map acts on the last axis of a batch of rows, so that a covariance ``C`` becomes ``A C A^T``
by two applications: ``A.apply(A.apply(C).mT)``. A convolution stays a convolution there; it is
written out as a matrix only where squares of its entries are needed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Block", "Dense", "Identity", "JointMap", "LinearMap", "Structured", "add", "compose"]


class LinearMap(ABC):
    """A linear map from ``in_features`` to ``out_features``."""

    in_features: int
    out_features: int

    @abstractmethod
    def apply(self, rows: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Map each row."""

    @abstractmethod
    def dense(self, like: Tensor) -> Float[Tensor, "d_out d_in"]:
        """The matrix of the map, in the dtype and on the device of `like`."""

    @property
    @abstractmethod
    def flops(self) -> float:
        """Operations to map one row, a multiply-add counted as two."""

    def apply_squared(self, rows: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Map each row by the matrix of squared entries: variances of independent inputs.

        Returns
        -------
        Tensor
            ``rows @ (A * A).T``.
        """
        matrix = self.dense(rows)
        return rows @ (matrix * matrix).mT


@dataclass(frozen=True)
class Identity(LinearMap):
    """The map that changes nothing."""

    in_features: int

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """As many as go in."""
        return self.in_features

    @property
    def flops(self) -> float:
        """None."""
        return 0.0

    def apply(self, rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return the rows.

        Returns
        -------
        Tensor
            `rows` itself.
        """
        return rows

    def apply_squared(self, rows: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return the rows.

        Returns
        -------
        Tensor
            `rows` itself.
        """
        return rows

    def dense(self, like: Tensor) -> Float[Tensor, "d d"]:
        """The identity matrix.

        Returns
        -------
        Tensor
            In the dtype of `like`.
        """
        return torch.eye(self.in_features, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Dense(LinearMap):
    """A map given by its matrix ``(d_out, d_in)``."""

    matrix: Tensor

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Columns of the matrix."""
        return self.matrix.shape[1]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Rows of the matrix."""
        return self.matrix.shape[0]

    @property
    def flops(self) -> float:
        """Two for each entry."""
        return 2.0 * self.matrix.numel()

    def apply(self, rows: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Multiply each row by the matrix.

        Returns
        -------
        Tensor
            ``rows @ matrix.T``.
        """
        if rows.dim() == 3 and rows.shape[0] == 1:
            # One matrix product instead of a batched one, whatever the memory layout of the rows.
            return (rows[0] @ self.matrix.mT)[None]
        return rows @ self.matrix.mT

    def dense(self, like: Tensor) -> Float[Tensor, "d_out d_in"]:  # noqa: ARG002 - one signature
        """The matrix itself.

        Returns
        -------
        Tensor
            `matrix`.
        """
        return self.matrix


@dataclass(frozen=True)
class Structured(LinearMap):
    """A map given by a linear function of shaped examples, such as a convolution or a pooling.

    Parameters
    ----------
    function
        Linear, from ``(rows, *in_shape)`` to ``(rows, *out_shape)``.
    in_shape, out_shape
        Of one example.
    flops
        Operations for one row.
    """

    function: Callable[[Tensor], Tensor]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    flops: float = 0.0

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """Product of the input shape."""
        return math.prod(self.in_shape)

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Product of the output shape."""
        return math.prod(self.out_shape)

    def apply(self, rows: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Reshape the rows into examples, apply the function, flatten.

        Returns
        -------
        Tensor
            Rows of ``out_features`` entries.
        """
        shaped = rows.reshape(-1, *self.in_shape)
        return self.function(shaped).reshape(*rows.shape[:-1], self.out_features)

    def dense(self, like: Tensor) -> Float[Tensor, "d_out d_in"]:
        """The matrix, column by column from the unit vectors.

        Returns
        -------
        Tensor
            In the dtype of `like`.
        """
        return self.apply(Identity(self.in_features).dense(like)).mT


def compose(outer: LinearMap, inner: LinearMap) -> LinearMap:
    """The map ``outer(inner(.))``.

    Parameters
    ----------
    outer, inner
        Maps whose sizes fit.

    Returns
    -------
    LinearMap
        The identity is dropped; a product with a dense map is dense; structured maps are chained.
    """
    if isinstance(inner, Identity):
        return outer
    if isinstance(outer, Identity):
        return inner
    if isinstance(inner, Dense):
        return Dense(outer.apply(inner.matrix.mT).mT)
    return Structured(
        lambda x: outer.apply(inner.apply(x)),
        (inner.in_features,),
        (outer.out_features,),
        inner.flops + outer.flops,
    )


def add(first: LinearMap, second: LinearMap, like: Tensor) -> LinearMap:
    """The map ``first(.) + second(.)``, dense.

    Parameters
    ----------
    first, second
        Maps of the same sizes.
    like
        Tensor whose dtype and device the matrices take.

    Returns
    -------
    Dense
        Their sum.
    """
    return Dense(first.dense(like) + second.dense(like))


@dataclass(frozen=True)
class Block:
    """One group of rows of a `JointMap`: a sum of maps, each of a slice of the columns."""

    out_features: int
    terms: tuple[tuple[slice, LinearMap], ...]


@dataclass(frozen=True)
class JointMap(LinearMap):
    """Rows stacked from blocks: how residual connections and concatenations read a state.

    Parameters
    ----------
    in_features
        Number of columns.
    blocks
        From top to bottom.
    """

    in_features: int
    blocks: tuple[Block, ...]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """Sum over the blocks."""
        return sum(block.out_features for block in self.blocks)

    @property
    def flops(self) -> float:
        """Sum over the blocks."""
        return sum(linear.flops for block in self.blocks for _, linear in block.terms)

    def apply(self, rows: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Map each row by every block.

        Returns
        -------
        Tensor
            Blocks side by side.
        """
        return self._join(rows, [[m.apply(rows[..., c]) for c, m in b.terms] for b in self.blocks])

    def apply_squared(self, rows: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Map each row by the squared entries of every block.

        Returns
        -------
        Tensor
            Blocks side by side.
        """
        terms = [[m.apply_squared(rows[..., c]) for c, m in b.terms] for b in self.blocks]
        return self._join(rows, terms)

    def dense(self, like: Tensor) -> Float[Tensor, "d_out d_in"]:
        """The matrix of the whole map.

        Returns
        -------
        Tensor
            In the dtype of `like`.
        """
        only = self.blocks[0].terms if len(self.blocks) == 1 else ()
        if len(only) == 1 and only[0][1].in_features == self.in_features:
            return only[0][1].dense(like)
        return self.apply(Identity(self.in_features).dense(like)).mT

    def _join(self, rows: Tensor, terms: list[list[Tensor]]) -> Tensor:
        outputs = []
        for block, parts in zip(self.blocks, terms, strict=True):
            if parts:
                outputs.append(sum(parts[1:], start=parts[0]))
            else:
                outputs.append(rows.new_zeros(*rows.shape[:-1], block.out_features))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
