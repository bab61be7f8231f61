"""A batch of any common form, taken apart into inputs and targets, and checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from pushforward.errors import DataError

__all__ = [
    "TARGET_KEYS",
    "Batch",
    "Inputs",
    "Table",
    "check_finite",
    "row_checksums",
    "split_batch",
    "to_tensor",
]

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""What a network is called with: ``net(x)``, ``net(*x)`` or ``net(**x)``."""

TARGET_KEYS = ("labels", "label", "targets", "target", "y")
_CHUNK_BYTES = 2**24  # of temporary memory while a tensor is searched for NaN


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples of a data set.

    Parameters
    ----------
    inputs
        A tensor ``(n, ...)``, a tuple or a dict of such tensors.
    targets
        ``(n, ...)``; None when the data have none.
    indices
        ``(n,)``, on the CPU: the examples' numbers in the whole data set.
    """

    inputs: Inputs
    targets: Tensor | None
    indices: Int64[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class Table:
    """Inputs and targets of examples ``(n, ...)``, as columns with names.

    Parameters
    ----------
    inputs
        A tensor ``(n, ...)``, a tuple or a dict of such tensors.
    targets
        ``(n, ...)``, or None.
    """

    inputs: Inputs
    targets: Tensor | None

    def __len__(self) -> int:
        return len(next(iter(self.columns().values())))

    @property
    def bytes_per_example(self) -> int:
        """Bytes that one example takes in memory."""
        return sum(prod(c.shape[1:]) * c.element_size() for c in self.columns().values())

    def input_columns(self) -> dict[str, Tensor]:
        """Tensors of the inputs by name; the names tell a tensor, a tuple and a dict apart."""
        if isinstance(self.inputs, Tensor):
            return {"inputs": self.inputs}
        if isinstance(self.inputs, tuple):
            return {f"inputs[{i}]": x for i, x in enumerate(self.inputs)}
        return {f"inputs[{key!r}]": x for key, x in self.inputs.items()}

    def columns(self) -> dict[str, Tensor]:
        """All tensors by name."""
        targets = {} if self.targets is None else {"targets": self.targets}
        return self.input_columns() | targets

    def map(self, function: Callable[[Tensor], Tensor]) -> Table:
        """Apply a function to every column."""
        inputs: Inputs
        if isinstance(self.inputs, Tensor):
            inputs = function(self.inputs)
        elif isinstance(self.inputs, tuple):
            inputs = tuple(map(function, self.inputs))
        else:
            inputs = {key: function(x) for key, x in self.inputs.items()}
        return Table(inputs, None if self.targets is None else function(self.targets))

    def check_like(self, first: Table, where: str) -> None:
        """Refuse a batch whose entries, shapes or number types are not those of the first.

        Raises
        ------
        DataError
            With the column in which they differ.
        """
        ours, theirs = self.columns(), first.columns()
        if ours.keys() != theirs.keys():
            raise DataError(
                f"a batch of {', '.join(ours)} follows one of {', '.join(theirs)}",
                where=where,
                advice="All batches need the same entries.",
            )
        for name, column in ours.items():
            other = theirs[name]
            if column.shape[1:] != other.shape[1:]:
                raise DataError(
                    f"{name}: examples of shape {tuple(column.shape[1:])} follow examples of shape "
                    f"{tuple(other.shape[1:])}",
                    where=where,
                    advice="All examples need the same shape: resize or pad them alike.",
                )
            if column.dtype != other.dtype:
                raise DataError(
                    f"{name}: numbers of type {column.dtype} follow numbers of type {other.dtype}",
                    where=where,
                    advice="Convert all batches to one type.",
                )


def to_tensor(value: Any) -> Tensor | None:
    """A tensor or NumPy array as a tensor without history, in memory shared with `value`.

    Parameters
    ----------
    value
        Anything.

    Returns
    -------
    Tensor or None
        None for whatever is neither, and for arrays of text or objects.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
        return None
    if any(stride < 0 for stride in value.strides) or not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="), order="C")
    with warnings.catch_warnings():
        # Of read-only arrays, such as memory maps: nothing here writes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(value)


def split_batch(batch: Any, where: str, *, targets: bool = True) -> Table:
    """Take a batch apart into inputs and targets.

    Parameters
    ----------
    batch
        ``(x, y)``; ``(x1, x2, y)``, whose inputs are the tuple ``(x1, x2)``; ``((x1, x2), y)`` and
        ``({"a": x1, "b": x2}, y)``; or a mapping in which one of the keys labels, label, targets,
        target, y holds the targets. A mapping with one other entry is a plain tensor input.
    where
        How messages call the batch.
    targets
        False: inputs alone will do, as a tensor, ``(x,)`` or a mapping; `targets` is then None. Of
        a tuple of two or more the last is the targets even so.

    Returns
    -------
    Table
        Of columns that have as many rows.

    Raises
    ------
    DataError
        If there are no targets, something is not a tensor or array, or lengths differ.
    """
    found: Any = None
    inputs: Any
    if isinstance(batch, Mapping):
        key = next((key for key in TARGET_KEYS if key in batch), None)
        found = None if key is None else batch[key]
        inputs = {str(name): value for name, value in batch.items() if name != key}
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        *head, found = batch
        inputs = head[0] if len(head) == 1 else tuple(head)
    else:
        inputs = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if found is None and targets:
        raise DataError(
            f"{_describe(batch)} has no targets",
            where=where,
            advice=f"Give (inputs, targets), or a mapping with one of {', '.join(TARGET_KEYS)}.",
        )
    if isinstance(inputs, Mapping):
        inputs = {str(k): _column(v, f"inputs[{k!r}]", where) for k, v in inputs.items()}
        if isinstance(batch, Mapping) and len(inputs) == 1:
            (inputs,) = inputs.values()
    elif isinstance(inputs, list | tuple):
        inputs = tuple(_column(v, f"inputs[{i}]", where) for i, v in enumerate(inputs))
    else:
        inputs = _column(inputs, "inputs", where)
    if isinstance(inputs, tuple | dict) and not inputs:
        raise DataError(
            f"{_describe(batch)} has no inputs",
            where=where,
            advice="Give at least one tensor of inputs beside the targets.",
        )
    table = Table(inputs, None if found is None else _column(found, "targets", where))
    lengths = {name: len(column) for name, column in table.columns().items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            "different numbers of examples: " + ", ".join(f"{k} {v}" for k, v in lengths.items()),
            where=where,
            advice="Every example needs its inputs and its target.",
        )
    return table


def check_finite(table: Table, numbers: Sequence[int], where: str) -> None:
    """Refuse NaN and infinite entries.

    Parameters
    ----------
    table
        Examples to look through, in pieces: the temporary memory stays small.
    numbers
        Their numbers in the data set, one a row.
    where
        How messages call them.

    Raises
    ------
    DataError
        With the number of the first example that is damaged.
    """
    for name, column in table.columns().items():
        if not (column.is_floating_point() or column.is_complex()):
            continue
        rows = max(1, _CHUNK_BYTES // max(1, prod(column.shape[1:]) * column.element_size()))
        for start in range(0, len(column), rows):
            bad = ~torch.isfinite(column[start : start + rows])
            if bool(bad.any()):
                row = int(bad.reshape(len(bad), -1).any(1).nonzero()[0])
                raise DataError(
                    f"{name} of example {numbers[start + row]} holds NaN or infinite entries",
                    where=where,
                    advice="Clean or impute the data first.",
                )


def row_checksums(
    columns: Mapping[str, Tensor], count: int
) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """A checksum of the bytes of each example.

    Parameters
    ----------
    columns
        Tensors ``(count, ...)``.
    count
        Number of examples.

    Returns
    -------
    numpy.ndarray
        ``(count,)`` unsigned 64-bit; equal examples have equal checksums on every machine.
    """
    rows = []
    for column in columns.values():
        width = prod(column.shape[1:]) * column.element_size()
        plain = column.resolve_conj().resolve_neg().contiguous().cpu()
        rows.append(plain.reshape(-1).view(torch.uint8).reshape(count, width).numpy())
    digests = np.empty(count, dtype=np.uint64)
    for i in range(count):
        digest = blake2b(digest_size=8)
        for row in rows:
            digest.update(row[i])
        digests[i] = int.from_bytes(digest.digest(), "little")
    return digests


def _column(value: Any, name: str, where: str) -> Tensor:
    tensor = to_tensor(value)
    if tensor is None:
        raise DataError(
            f"{name} are {type(value).__name__}, not numbers in a tensor",
            where=where,
            advice="Give tensors or NumPy arrays with one row an example; a DataLoader makes them "
            "from single examples.",
        )
    if tensor.dim() == 0:
        raise DataError(
            f"{name} are a single number, not a batch",
            where=where,
            advice="Give batches of examples (n, ...), as a DataLoader with a batch_size does.",
        )
    return tensor


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with keys {sorted(map(str, batch))}"
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"
