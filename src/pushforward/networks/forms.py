"""Affine forms: each value of a traced network as an affine function of atoms.

Atoms are the input and the outputs of activations; a value is ``sum_a maps[a](atom_a) + bias``.
Linear layers compose the maps, residual connections add them, and an activation makes a new atom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import ShapeError
from pushforward.gaussians.activations import Activation
from pushforward.networks.layers import refuse
from pushforward.networks.linear_maps import Dense, LinearMap, Structured, add, compose

__all__ = ["Atom", "Form", "concatenated"]

# The batch size that shape queries report. No number of features is equal to it by accident, so a
# reshaping that mixes examples shows; nothing of this size is ever computed.
_SHADOW_BATCH = 7919


@dataclass(frozen=True)
class Atom:
    """The input (level 0) or the output of an activation applied to a form."""

    level: int
    size: int
    name: str
    activation: Activation | None
    form: Form | None


@dataclass(frozen=True)
class Form:
    """An affine function of atoms, ``sum_a maps[a](atom_a) + bias``, and its example shape.

    Parameters
    ----------
    maps
        From the atoms, by their numbers, to the entries of the value.
    bias
        Float64, flat.
    shape
        Of one example of the value.
    name
        Module path or traced name of what computes it.
    """

    maps: dict[int, LinearMap]
    bias: Tensor
    shape: tuple[int, ...]
    name: str

    @property
    def has_bias(self) -> bool:
        """Whether a bias is there at all: a zero that is no parameter stays out of autograd."""
        return self.bias.requires_grad or bool(self.bias.any())

    def mapped(
        self, name: str, linear: LinearMap, shape: tuple[int, ...], offset: Tensor | None = None
    ) -> Form:
        """The value behind an affine map.

        Parameters
        ----------
        name
            Of the new value.
        linear
            The map of the entries.
        shape
            Of one example behind it.
        offset
            What is added behind it, flat.

        Returns
        -------
        Form
            Of the same atoms.
        """
        maps = {atom: compose(linear, inner) for atom, inner in self.maps.items()}
        if self.has_bias:
            bias = linear.apply(self.bias)
        else:
            bias = self.bias.new_zeros(linear.out_features)
        return Form(maps, bias if offset is None else bias + offset, shape, name)

    def scaled(self, name: str, factor: Tensor, offset: Tensor | None = None) -> Form:
        """The value times a constant.

        Parameters
        ----------
        name
            Of the new value.
        factor
            A scalar, or one for each entry.
        offset
            What is added behind it, flat.

        Returns
        -------
        Form
            Of the same atoms and shape.
        """

        def scale(linear: LinearMap) -> LinearMap:
            if isinstance(linear, Dense):
                return Dense(linear.matrix * (factor[:, None] if factor.dim() else factor))
            size = linear.out_features
            return compose(Structured(lambda x: x * factor, (size,), (size,), float(size)), linear)

        maps = {atom: scale(linear) for atom, linear in self.maps.items()}
        bias = self.bias * factor if self.has_bias else self.bias.new_zeros(self.bias.numel())
        return Form(maps, bias if offset is None else bias + offset, self.shape, name)

    def negated(self, name: str) -> Form:
        """The value times minus one."""
        return self.scaled(name, self.bias.new_full((), -1.0))

    def plus(self, name: str, other: Any) -> Form:
        """The sum with another form or a constant.

        Parameters
        ----------
        name
            Of the sum.
        other
            A form of the same shape, a number, or a tensor that broadcasts over one example.

        Returns
        -------
        Form
            Of the atoms of both.

        Raises
        ------
        UnsupportedLayerError
            For two forms of different shapes.
        """
        if not isinstance(other, Form):
            return Form(self.maps, self.bias + self.constant(name, other), self.shape, name)
        if self.shape != other.shape:
            reason = f"it broadcasts shapes {self.shape} and {other.shape}"
            refuse(name, "add", reason)
        maps = dict(self.maps)
        for atom, linear in other.maps.items():
            maps[atom] = add(maps[atom], linear, self.bias) if atom in maps else linear
        return Form(maps, self.bias + other.bias, self.shape, name)

    def constant(self, name: str, value: Any) -> Tensor:
        """A constant that meets this value in an operation.

        Parameters
        ----------
        name
            Of the operation, for errors.
        value
            A number, or a tensor that broadcasts over one example.

        Returns
        -------
        Tensor
            Float64: a scalar, or flat with one entry for each of this value.

        Raises
        ------
        ShapeError
            For a tensor that does not broadcast.
        UnsupportedLayerError
            For anything else.
        """
        if isinstance(value, int | float):
            return self.bias.new_zeros(()) + value
        if not isinstance(value, Tensor):
            refuse(name, type(value).__name__, "as a constant")
        value = value.to(torch.float64)
        if value.dim() == len(self.shape) + 1 and value.shape[0] == 1:
            value = value[0]
        try:
            return value.expand(self.shape).reshape(-1)
        except RuntimeError as error:
            raise ShapeError(
                f"a constant of shape {tuple(value.shape)} meets an example of shape {self.shape}",
                where=name,
                advice="Constants must broadcast over one example.",
            ) from error

    def structured(self, name: str, label: str, function: Callable[[Tensor], Tensor]) -> Form:
        """The value behind an affine function of shaped examples, such as a pooling.

        Parameters
        ----------
        name
            Of the new value.
        label
            What the function is called, for errors.
        function
            Affine, on a batch of examples.

        Returns
        -------
        Form
            Of the same atoms.
        """
        two = self.image(name, label, function)
        shape = tuple(two.shape[1:])
        offset = two[0] if bool(two.any()) else None  # padding with a value is not linear

        def linear_part(x: Tensor) -> Tensor:
            return function(x) if offset is None else function(x) - offset

        linear = Structured(linear_part, self.shape, shape, float(math.prod(self.shape)))
        return self.mapped(name, linear, shape, None if offset is None else offset.reshape(-1))

    def image(self, name: str, label: str, function: Callable[[Tensor], Tensor]) -> Tensor:
        """What a function makes of a batch of two zeros, checked to keep examples apart.

        Parameters
        ----------
        name
            Of the new value, for errors.
        label
            What the function is called, for errors.
        function
            On a batch of examples.

        Returns
        -------
        Tensor
            Two examples.

        Raises
        ------
        ShapeError
            When the function does not take examples of this shape.
        UnsupportedLayerError
            When it mixes or drops the batch dimension.
        """

        def image(batch: int) -> Tensor:
            probe = torch.zeros(batch, *self.shape, dtype=torch.float64, device=self.bias.device)
            try:
                return function(probe)
            except (RuntimeError, IndexError, TypeError) as error:
                raise ShapeError(
                    str(error),
                    where=f"{label} ({name})",
                    advice="Check the event_shape of the law.",
                ) from error

        # Two sizes of batch, so that no dimension of the features passes for the batch.
        two, three = image(2), image(3)
        if (*two.shape[:1], *three.shape) != (2, 3, *two.shape[1:]):
            refuse(name, label, "it mixes or drops the batch dimension")
        return two

    def reshaped(self, name: str, label: str, function: Callable[[Tensor], Tensor]) -> Form:
        """The value with its examples in another shape; it keeps its own name.

        Parameters
        ----------
        name
            Of the operation, for errors.
        label
            What the function is called, for errors.
        function
            A reshaping of a batch of examples.

        Returns
        -------
        Form
            Of the same atoms and entries.

        Raises
        ------
        ShapeError
            When the function does not take examples of this shape.
        UnsupportedLayerError
            When it mixes the batch dimension into the features.
        """
        try:
            shape = tuple(function(self.shadow()).shape)
        except (RuntimeError, IndexError) as error:
            raise ShapeError(
                str(error),
                where=f"{label} ({name})",
                advice="Check the event_shape of the law.",
            ) from error
        if not shape or shape[0] != _SHADOW_BATCH:
            refuse(name, label, "it mixes the batch dimension into the features")
        return Form(self.maps, self.bias, shape[1:], self.name)

    def shadow(self) -> Tensor:
        """A batch of such values without storage, for the shapes of what becomes of it."""
        return torch.empty(_SHADOW_BATCH, *self.shape, device="meta")


def concatenated(name: str, parts: Sequence[Any], dim: int) -> Form:
    """Values joined along the first dimension of an example.

    Parameters
    ----------
    name
        Of the new value.
    parts
        Forms, from first to last.
    dim
        Of a batch, along which they are joined.

    Returns
    -------
    Form
        Of the atoms of all, by dense maps.

    Raises
    ------
    UnsupportedLayerError
        For constants among the parts, or another dimension.
    ShapeError
        When the other dimensions of the parts differ.
    """
    constants = [p for p in parts if not isinstance(p, Form)]
    if constants or (dim % (len(parts[0].shape) + 1)) != 1:
        refuse(name, "cat", f"along dimension {dim}, or with constants")
    if len({part.shape[1:] for part in parts}) > 1:
        raise ShapeError(
            f"it joins examples of shapes {', '.join(str(part.shape) for part in parts)}",
            where=f"cat ({name})",
            advice="All dimensions but the first of an example must agree.",
        )
    bias = torch.cat([part.bias for part in parts])
    maps: dict[int, LinearMap] = {}
    start = 0
    for part in parts:
        stop = start + part.bias.numel()
        for atom, linear in part.maps.items():
            block = linear.dense(bias)
            above = block.new_zeros(start, block.shape[1])
            below = block.new_zeros(bias.numel() - stop, block.shape[1])
            placed = Dense(torch.cat([above, block, below]))
            maps[atom] = add(maps[atom], placed, bias) if atom in maps else placed
        start = stop
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Form(maps, bias, shape, name)
