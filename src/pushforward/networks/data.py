"""Data as the library reads it: streams of inputs, and examples by number in a fixed order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from pushforward.errors import DataError, OptionError
from pushforward.networks.batches import Batch, Inputs, Table, row_checksums
from pushforward.networks.reading import Storage, open_source
from pushforward.options import whole_number
from pushforward.typing import DataSource

__all__ = ["Batch", "DataStream", "Examples", "Inputs"]

_BATCH_SIZE = 1024
_INPUT_KEYS = ("inputs", "input", "x", "pixel_values", "features", "data")


@dataclass(frozen=True)
class DataStream:
    """One fixed-order pass over the inputs of a data set.

    Parameters
    ----------
    source
        A tensor or NumPy array of examples ``(N, ...)``, or an iterable of batches: tensors,
        ``(inputs, targets, ...)`` or mappings with one of the keys inputs, input, x, pixel_values,
        features, data.
    name
        How messages call it.

    Examples
    --------
    >>> import torch
    >>> [batch.shape for batch in DataStream(torch.zeros(3, 2)).inputs()]
    [torch.Size([3, 2])]
    """

    source: DataSource | np.ndarray[Any, np.dtype[Any]]
    name: str = "data"

    def inputs(self) -> Iterator[Tensor]:
        """Yield batches of inputs ``(n, ...)``, checked one by one.

        Yields
        ------
        Tensor
            Floating point; integer inputs are converted to the default dtype.

        Raises
        ------
        DataError
            For an empty source, batches of unequal example shape, NaN or infinite entries, or a
            batch in which no inputs can be recognised.
        """
        shape: tuple[int, ...] | None = None
        count = 0
        for index, batch in enumerate(self._batches()):
            x = _inputs_of(batch, f"batch {index} of {self.name}")
            if not x.is_floating_point():
                x = x.to(torch.get_default_dtype())
            if x.dim() < 2:
                raise DataError(
                    f"inputs have shape {tuple(x.shape)}",
                    where=f"batch {index} of {self.name}",
                    advice="Give batches of examples: (N, features), (N, channels, height, width).",
                )
            shape = tuple(x.shape[1:]) if shape is None else shape
            if tuple(x.shape[1:]) != shape:
                raise DataError(
                    f"examples of shape {tuple(x.shape[1:])} follow examples of shape {shape}",
                    where=f"batch {index} of {self.name}",
                    advice="All examples need the same shape.",
                )
            bad = ~torch.isfinite(x)
            if bool(bad.any()):
                row = int(bad.flatten(1).any(1).nonzero()[0])
                raise DataError(
                    f"example {count + row} holds NaN or infinite entries",
                    where=f"batch {index} of {self.name}",
                    advice="Clean or impute the data first.",
                )
            count += len(x)
            if len(x):
                yield x
        if count == 0:
            raise DataError("no examples", where=self.name, advice="Give at least two examples.")

    def _batches(self) -> Iterator[Any]:
        source = (
            torch.from_numpy(self.source) if isinstance(self.source, np.ndarray) else self.source
        )
        if isinstance(source, Tensor):
            yield from source.split(_BATCH_SIZE)
            return
        try:
            iterator = iter(source)
        except TypeError as error:
            raise DataError(
                f"got {type(source).__name__}",
                where=self.name,
                advice="Pass a tensor (N, ...), a NumPy array, or an iterable of batches.",
            ) from error
        yield from iterator


@dataclass(frozen=True, eq=False)
class Examples:
    """A data set with random access, whose examples keep their numbers.

    Made by `Examples.read`; `shard` gives a part of it.

    Parameters
    ----------
    num_examples
        How many there are.
    name
        How messages call them.
    device
        Where batches are moved; None leaves them where the data are.

    Examples
    --------
    >>> import torch
    >>> examples = Examples.read((torch.zeros(5, 3), torch.arange(5)))
    >>> [batch.targets.tolist() for batch in examples.batches(2)]
    [[0, 1], [2, 3], [4]]
    """

    num_examples: int
    name: str
    device: torch.device | None
    _storage: Storage
    _first: int = 0

    @classmethod
    def read(
        cls,
        source: Any,
        *,
        name: str = "data",
        device: torch.device | str | None = None,
        cache_bytes: int = 2 * 2**30,
        targets: bool = True,
    ) -> Examples:
        """Open a data set and check that it can be relied on.

        Tensors are used where they are. Everything else is read twice, the first time for sizes and
        checksums of every example, the second time into memory; so one copy is all it takes, and
        a source that shuffles or augments is found out. Of data that would not fit `cache_bytes`,
        some examples all over the set are read twice and no more; all are then read through
        ``loader.dataset`` and ``loader.collate_fn`` whenever they are needed. A loader with a
        random sampler is refused unread.

        Parameters
        ----------
        source
            All data at once: a batch of tensors or NumPy arrays, in any of the forms below. Or a
            `torch.utils.data.Dataset`, a `DataLoader`, or an iterable of batches that can be read
            again. A batch is ``(x, y)``, ``(x1, x2, y)``, ``((x1, x2), y)``, ``({"a": x}, y)`` or a
            mapping with the targets under labels, label, targets, target or y and the inputs under
            its other keys; a mapping with one other key is a plain tensor input.
        name
            How messages call the data.
        device
            Where batches are moved; None leaves them where the data are.
        cache_bytes
            Data of loaders and iterables up to this size, in bytes, are held in memory.
        targets
            False: data without targets will do: a tensor, batches ``x`` or ``(x,)``, mappings
            without target. A tuple of two or more still ends with the targets, a list is always one
            of batches.

        Returns
        -------
        opened : Examples
            In the order of the source; numbers keep their types, integers included.

        Raises
        ------
        DataError
            If the source is empty, shuffles, changes its examples between passes or can be read
            only once, if shapes or lengths disagree, targets are missing, or an entry is NaN or
            infinite.
        ResourceError
            If the data of an iterable do not fit `cache_bytes`.
        """
        place = None if device is None else torch.device(device)
        if isinstance(source, Examples):
            return source if place is None else replace(source, device=place)
        storage = open_source(source, name=name, cache_bytes=cache_bytes, targets=targets)
        return cls(len(storage), name, place, storage)

    def __len__(self) -> int:
        return self.num_examples

    def __repr__(self) -> str:
        end = self._first + self.num_examples
        whole = self.num_examples == len(self._storage)
        part = "" if whole else f", numbers {self._first} to {end - 1}"
        return f"Examples({self.name!r}, {self.num_examples:,} examples{part})"

    def select(self, indices: Int[Tensor, " n"]) -> Batch:
        """Examples by number.

        Parameters
        ----------
        indices
            ``(n,)`` numbers from 0 to ``num_examples - 1`` (of a shard: counted within it), in any
            order, repetitions allowed.

        Returns
        -------
        Batch
            In the order of `indices`; its own `indices` count in the whole data set.

        Raises
        ------
        OptionError
            If there are no indices or one is out of range.
        """
        indices = indices.to("cpu", torch.int64)
        if len(indices) == 0 or int(indices.min()) < 0 or int(indices.max()) >= self.num_examples:
            raise OptionError(
                "no index" if len(indices) == 0 else "an index is out of range",
                where="indices",
                advice=f"Give numbers from 0 to {self.num_examples - 1}.",
            )
        (batch,) = self._read([indices], workers=False)
        return batch

    def batches(
        self, batch_size: int, *, start: int = 0, stop: int | None = None
    ) -> Iterator[Batch]:
        """Each example once, in order.

        Parameters
        ----------
        batch_size
            Examples in a batch; the last may have fewer.
        start, stop
            First example, and the one behind the last (None: to the end). A pass that was
            interrupted goes on with ``start=`` the number of examples it has seen.

        Returns
        -------
        Iterator[Batch]
            Batches of consecutive examples.

        Raises
        ------
        OptionError
            If `batch_size`, `start` or `stop` are out of range.
        """
        stop = self.num_examples if stop is None else stop
        if not 0 <= start <= stop <= self.num_examples:
            raise OptionError(
                f"start {start}, stop {stop}",
                where="start",
                advice=f"Choose 0 <= start <= stop <= {self.num_examples}.",
            )
        numbers = torch.arange(start, stop)
        return self._read(_pieces(numbers, batch_size), workers=True)

    def minibatches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Each example once, in random order.

        Parameters
        ----------
        batch_size
            Examples in a batch; the last may have fewer.
        generator
            Decides the order; it is used before this returns.

        Returns
        -------
        Iterator[Batch]
            Batches of a permutation that depends on `generator` alone.

        Raises
        ------
        OptionError
            If `batch_size` is no positive number.
        """
        order = torch.randperm(self.num_examples, generator=generator, device=generator.device)
        return self._read(_pieces(order.cpu(), batch_size), workers=True)

    def shard(self, rank: int, count: int) -> Examples:
        """One of several contiguous shares, whose sizes differ by one at most.

        Parameters
        ----------
        rank
            Which, from 0.
        count
            How many shares there are.

        Returns
        -------
        share : Examples
            The share; the `indices` of its batches still count in the whole data set.

        Raises
        ------
        OptionError
            If `rank` is not below `count`, or there are fewer examples than shares.
        """
        if not 0 <= rank < count <= self.num_examples:
            raise OptionError(
                f"share {rank} of {count} of {self.num_examples} examples",
                where="rank",
                advice="Choose 0 <= rank < count, and no more shares than examples.",
            )
        start, end = (self.num_examples * part // count for part in (rank, rank + 1))
        return replace(self, num_examples=end - start, _first=self._first + start)

    def fingerprint(self) -> str:
        """What tells these data from others.

        Returns
        -------
        str
            Hash of the number of examples, their names, shapes and types, and all their contents:
            it reads the data once.
        """
        digest = blake2b(str(self.num_examples).encode(), digest_size=16)
        for batch in self.batches(_BATCH_SIZE):
            columns = Table(batch.inputs, batch.targets).columns()
            if batch.indices[0] == self._first:
                kinds = [(name, str(x.dtype), list(x.shape[1:])) for name, x in columns.items()]
                digest.update(repr(kinds).encode())
            digest.update(row_checksums(columns, len(batch)).astype("<u8").tobytes())
        return digest.hexdigest()

    def _read(self, blocks: Sequence[Tensor], *, workers: bool) -> Iterator[Batch]:
        numbers = [block + self._first for block in blocks]
        for block, table in zip(numbers, self._storage.read(numbers, workers=workers), strict=True):
            moved = table if self.device is None else table.map(self._moved)
            yield Batch(moved.inputs, moved.targets, block)

    def _moved(self, column: Tensor) -> Tensor:
        return column.to(self.device)


def _pieces(numbers: Int64[Tensor, " n"], batch_size: int) -> Sequence[Tensor]:
    batch_size = whole_number(batch_size, "batch_size")
    return numbers.split(batch_size) if len(numbers) else []


def _inputs_of(batch: Any, where: str) -> Tensor:
    if isinstance(batch, Mapping):
        for key in _INPUT_KEYS:
            if key in batch:
                batch = batch[key]
                break
        else:
            raise DataError(
                f"a mapping with keys {sorted(map(str, batch))}",
                where=where,
                advice=f"Name the inputs one of {', '.join(_INPUT_KEYS)}, or yield tensors.",
            )
    elif isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if isinstance(batch, np.ndarray):
        batch = torch.from_numpy(batch)
    if not isinstance(batch, Tensor):
        raise DataError(
            f"inputs are {type(batch).__name__}",
            where=where,
            advice="Yield tensors, (inputs, targets) pairs or mappings of tensors.",
        )
    return batch.detach()
