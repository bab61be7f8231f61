"""Parameters of a network as one vector: names, layers, slices, many vectors at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pushforward.errors import NetworkError, OptionError, ShapeError
from pushforward.typing import Params

__all__ = ["ParameterSpace", "as_patterns", "match_names"]


@dataclass(frozen=True)
class ParameterSpace:
    """Named tensors laid end to end, so that linear algebra sees vectors ``(..., P)``.

    Parameters
    ----------
    names
        Of the tensors, in the order in which they are laid.
    shapes
        Of the tensors.

    Examples
    --------
    >>> import torch
    >>> space = ParameterSpace.of({"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(3)})
    >>> space.size, space.layers
    (9, ('0',))
    >>> space.unravel(torch.zeros(5, 9))["0.weight"].shape
    torch.Size([5, 3, 2])
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> ParameterSpace:
        """The space that the tensors of a mapping span.

        Parameters
        ----------
        parameters
            Tensors by name; their order is kept.

        Returns
        -------
        ParameterSpace
            With their names and shapes.

        Raises
        ------
        NetworkError
            When there are none.
        """
        if not parameters:
            raise NetworkError(
                "there are no parameters",
                where="net",
                advice="Give a network with at least one parameter that is to be uncertain.",
            )
        return cls(tuple(parameters), tuple(tuple(p.shape) for p in parameters.values()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each tensor."""
        return tuple(prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Entries of all tensors: ``P``."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each tensor lies in the vector."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return {
            name: slice(end - size, end)
            for name, size, end in zip(self.names, self.sizes, ends, strict=True)
        }

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Modules that own the tensors, in order: a layer's weight and bias belong together."""
        return tuple(dict.fromkeys(map(_layer_of, self.names)))

    @cached_property
    def layer_sizes(self) -> tuple[int, ...]:
        """Entries of each layer."""
        totals = dict.fromkeys(self.layers, 0)
        for name, size in zip(self.names, self.sizes, strict=True):
            totals[_layer_of(name)] += size
        return tuple(totals.values())

    def layer_index(self, device: torch.device | str = "cpu") -> Int[Tensor, " P"]:
        """The layer of every entry.

        Parameters
        ----------
        device
            Where the result lives.

        Returns
        -------
        Tensor
            ``(P,)`` positions in `layers`.
        """
        numbers = [self.layers.index(_layer_of(name)) for name in self.names]
        return torch.repeat_interleave(
            torch.tensor(numbers, device=device), torch.tensor(self.sizes, device=device)
        )

    def layer_sums(self, vectors: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch layers"]:
        """Sums over the entries of each layer, in float64.

        Parameters
        ----------
        vectors
            ``(..., P)``.

        Returns
        -------
        Tensor
            ``(..., layers)`` float64.
        """
        totals = vectors.new_zeros(*vectors.shape[:-1], len(self.layers), dtype=torch.float64)
        for name, where in self.slices.items():
            layer = self.layers.index(_layer_of(name))
            totals[..., layer] += vectors[..., where].sum(-1, dtype=torch.float64)
        return totals

    def ravel(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "*batch P"]:
        """Lay tensors end to end.

        Parameters
        ----------
        tensors
            Every tensor of the space, with the same leading axes in front of its own shape.

        Returns
        -------
        Tensor
            ``(..., P)``.

        Raises
        ------
        ShapeError
            When a tensor is missing or its shape does not end in the one of the space.
        """
        flat = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            tensor = tensors.get(name)
            if tensor is None or tuple(tensor.shape[tensor.dim() - len(shape) :]) != shape:
                raise ShapeError(
                    "it is missing" if tensor is None else f"it has shape {tuple(tensor.shape)}",
                    where=f"parameter {name}",
                    advice=f"Give a tensor of shape (..., {', '.join(map(str, shape))}).",
                )
            flat.append(tensor.reshape(*tensor.shape[: tensor.dim() - len(shape)], -1))
        return torch.cat(flat, -1)

    def unravel(self, vectors: Float[Tensor, "*batch P"]) -> Params:
        """The tensors that a vector holds, as views.

        Parameters
        ----------
        vectors
            ``(..., P)``.

        Returns
        -------
        dict
            Tensors ``(..., *shape)`` by name.
        """
        leading = vectors.shape[:-1]
        return {
            name: vectors[..., where].reshape((*leading, *shape))
            for (name, where), shape in zip(self.slices.items(), self.shapes, strict=True)
        }

    def fingerprint(self) -> str:
        """A short hash of names and shapes.

        Returns
        -------
        str
            Sixteen hexadecimal digits.
        """
        text = repr((self.names, self.shapes))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def match_names(
    names: Sequence[str], patterns: str | Iterable[str], *, where: str = "subset"
) -> tuple[str, ...]:
    """Names that match any of several patterns.

    Parameters
    ----------
    names
        To choose from.
    patterns
        Shell-style, ``*`` for any characters: ``"blocks.0.*"``, ``"*.lora_*"``; a pattern without
        wildcard also matches everything inside the module of that name.
    where
        How messages call the patterns.

    Returns
    -------
    tuple of str
        In the order of `names`.

    Raises
    ------
    OptionError
        For what is no pattern, or when one matches nothing.

    Examples
    --------
    >>> match_names(["0.weight", "0.bias", "2.weight"], "0")
    ('0.weight', '0.bias')
    """
    chosen: set[str] = set()
    for pattern in as_patterns(patterns, where=where) or ("",):
        found = {name for name in names if _matches(name, pattern)}
        if not found:
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise OptionError(
                f"{pattern!r} matches no parameter",
                where=where,
                advice=f"The parameters are {shown}.",
            )
        chosen |= found
    return tuple(name for name in names if name in chosen)


def as_patterns(patterns: str | Iterable[str], *, where: str = "subset") -> tuple[str, ...]:
    """One pattern or several as a tuple.

    Parameters
    ----------
    patterns
        What the caller gave.
    where
        How messages call it.

    Returns
    -------
    tuple of str
        Not compared with any names yet.

    Raises
    ------
    OptionError
        For anything but strings.
    """
    found = (
        (patterns,)
        if isinstance(patterns, str) or not isinstance(patterns, Iterable)
        else (tuple(patterns))
    )
    for pattern in found:
        if not isinstance(pattern, str):
            raise OptionError(
                f"{pattern!r:.80} is no pattern",
                where=where,
                advice="Give names or patterns of parameters as strings, such as 'head' or "
                "['blocks.0.*', 'head.weight'].",
            )
    return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or (pattern != "" and name.startswith(f"{pattern}."))


def _layer_of(name: str) -> str:
    return name.rpartition(".")[0] or name
