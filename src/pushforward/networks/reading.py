"""Sources of examples opened for access by number, and found out when they change when re-read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from pushforward.errors import DataError, ResourceError
from pushforward.networks.batches import (
    Table,
    check_finite,
    row_checksums,
    split_batch,
    to_tensor,
)

__all__ = ["Storage", "open_source"]

_BATCH_SIZE = 256
_PROBED = 64  # examples that are read twice where all would be too many
_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Storage(ABC):
    """Examples by number."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(
        self, blocks: Iterable[Int64[Tensor, " _n"]], *, workers: bool = False
    ) -> Iterator[Table]:
        """Examples of every block of numbers, block by block."""


@dataclass(frozen=True, eq=False)
class _InMemory(Storage):
    """Examples that are tensors."""

    table: Table

    def __len__(self) -> int:
        return len(self.table)

    def read(
        self, blocks: Iterable[Int64[Tensor, " _n"]], *, workers: bool = False
    ) -> Iterator[Table]:
        """Copies: a network that writes into its inputs must not change the data."""
        del workers
        for block in blocks:
            yield self._rows(block)

    def _rows(self, block: Int64[Tensor, " n"]) -> Table:
        return self.table.map(lambda column: column[block.to(column.device)])


@dataclass(frozen=True, eq=False)
class _ByIndex(Storage):
    """Examples that are fetched from a map-style data set whenever they are needed."""

    loader: DataLoader[Any]
    order: Sequence[Any]
    first: Table
    targets: bool
    name: str

    def __len__(self) -> int:
        return len(self.order)

    def read(
        self, blocks: Iterable[Int64[Tensor, " _n"]], *, workers: bool = False
    ) -> Iterator[Table]:
        """Every block is collated as one batch; worker processes as the user's loader has them."""
        numbers: list[list[int]] = [block.tolist() for block in blocks]
        batches = DataLoader(
            self.loader.dataset,
            batch_sampler=[[self.order[i] for i in block] for block in numbers],
            collate_fn=self.loader.collate_fn,
            num_workers=self.loader.num_workers if workers else 0,
            worker_init_fn=self.loader.worker_init_fn if workers else None,
            generator=torch.Generator(),  # torch's global one is the user's
        )
        for block, batch in zip(numbers, batches, strict=True):
            where = f"examples {block[0]} to {block[-1]} of {self.name}"
            table = split_batch(batch, where, targets=self.targets)
            if len(table) != len(block):
                raise DataError(
                    f"{len(block)} examples were collated to {len(table)}",
                    where=where,
                    advice="collate_fn must keep every example.",
                )
            table.check_like(self.first, where)
            check_finite(table, block, where)
            yield table


def open_source(source: Any, *, name: str, cache_bytes: int, targets: bool) -> Storage:
    """Examples by number, from any source.

    Parameters
    ----------
    source, name, cache_bytes, targets
        As in `pushforward.networks.data.Examples.read`.

    Returns
    -------
    Storage
        Checked: finite, of one shape, the same when read again.

    Raises
    ------
    DataError
        As there.
    ResourceError
        As there.
    """
    if isinstance(source, Dataset):
        source = DataLoader(source, batch_size=_BATCH_SIZE, generator=torch.Generator())
    order = None
    if isinstance(source, DataLoader):
        _refuse_samplers(source, name)
        order = _order(source, name)
        source = _plain_tensors(source, order)
    _refuse_lists_of_numbers(source, name)
    if _is_one_batch(source, targets):
        table = split_batch(source, name, targets=targets)
        if len(table) == 0:
            _refuse_empty(name)
        check_finite(table, range(len(table)), name)
        return _InMemory(table)
    if isinstance(source, Iterator):
        raise DataError(
            f"{type(source).__name__} can be read only once",
            where=name,
            advice="The data are read many times: pass tensors, a DataLoader or a list of batches.",
        )
    if not isinstance(source, Iterable):
        raise DataError(
            f"got {type(source).__name__}",
            where=name,
            advice="Pass (inputs, targets), a Dataset, a DataLoader or an iterable of batches.",
        )
    return _read_twice(source, order, name=name, cache_bytes=cache_bytes, targets=targets)


def _is_one_batch(source: Any, targets: bool) -> bool:
    """Whether the source is all data in tensors rather than an iterable of batches."""
    if isinstance(source, Mapping) or to_tensor(source) is not None:
        return True
    if isinstance(source, tuple) or (targets and isinstance(source, list)):
        return len(source) > 1 and to_tensor(source[-1]) is not None
    return False


def _refuse_lists_of_numbers(source: Any, name: str) -> None:
    """A pair whose targets are a list would be taken for two batches.

    Raises
    ------
    DataError
        When the last of several things is a list of numbers.
    """
    if not isinstance(source, tuple | list) or len(source) < 2:
        return
    last = source[-1]
    if isinstance(last, list | tuple) and last and all(isinstance(y, Number) for y in last):
        raise DataError(
            f"targets are a {type(last).__name__} of numbers",
            where=name,
            advice="Give a tensor or a NumPy array: torch.tensor(targets).",
        )


def _refuse_samplers(loader: DataLoader[Any], name: str) -> None:
    samplers = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    for sampler in samplers:
        if isinstance(sampler, _SHUFFLING):
            _refuse_shuffling(name, f" (its sampler is a {type(sampler).__name__})")
        if isinstance(sampler, DistributedSampler):
            raise DataError(
                "the loader gives this process a share of the data (its sampler is a "
                "DistributedSampler)",
                where=name,
                advice="Pass the whole data set on every process: it is shared out here.",
            )


def _order(loader: DataLoader[Any], name: str) -> list[Any] | None:
    """Keys of the loader's examples, in its order; None where it has no such thing."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return None
    order = [key for batch in loader.batch_sampler for key in batch]
    if order != [key for batch in loader.batch_sampler for key in batch]:
        _refuse_shuffling(name, f" (its sampler is a {type(loader.batch_sampler).__name__})")
    return order


def _plain_tensors(loader: DataLoader[Any], order: list[Any] | None) -> Any:
    """The tensors behind a loader that does nothing with them: not read, not copied."""
    dataset = loader.dataset
    if (
        type(dataset) is TensorDataset
        and loader.collate_fn is default_collate
        and isinstance(loader.sampler, SequentialSampler)
        and order == list(range(len(dataset)))
        and len(dataset.tensors) > 1
    ):
        return dataset.tensors
    return loader


def _read_twice(
    source: Iterable[Any], order: list[Any] | None, *, name: str, cache_bytes: int, targets: bool
) -> Storage:
    """Read once for sizes and checksums and again into memory, so that one copy is all it takes."""
    first: Table | None = None
    sums: list[_Checksums] = []
    count = 0
    for table in _tables(source, first, name, targets):
        if first is None:
            first = table.map(lambda column: column[:1].clone())
        size = first.bytes_per_example
        if order is not None and len(order) * size > cache_bytes:
            return _probed(_ByIndex(source, order, first, targets, name))  # type: ignore[arg-type]
        sums.append(_Checksums.of(table))
        count += len(table)
        if count * size > cache_bytes:
            _refuse_size(count, size, cache_bytes, name)
    if first is None:
        _refuse_empty(name)
    memory = first.map(lambda column: column.new_empty(count, *column.shape[1:]))
    again: list[_Checksums] = []
    filled = 0
    for table in _tables(source, first, name, targets):
        again.append(_Checksums.of(table))
        room = min(len(table), count - filled)
        for key, column in memory.columns().items():
            column[filled : filled + room] = table.columns()[key][:room]
        filled += room
    _compare(_Checksums.joined(sums), _Checksums.joined(again), name)
    return _InMemory(memory)


def _tables(
    source: Iterable[Any], first: Table | None, name: str, targets: bool
) -> Iterator[Table]:
    count = 0
    for i, batch in enumerate(source):
        where = f"batch {i} of {name}"
        table = split_batch(batch, where, targets=targets)
        if len(table) == 0:
            continue
        first = first or table
        table.check_like(first, where)
        check_finite(table, range(count, count + len(table)), where)
        count += len(table)
        yield table


def _probed(storage: _ByIndex) -> _ByIndex:
    """The storage, after some examples all over it have been the same twice."""
    spread = torch.linspace(0, len(storage) - 1, min(_PROBED, len(storage)), dtype=torch.float64)
    blocks = spread.round().long().unique().split(_PROBED // 4)
    once, twice = (
        _Checksums.joined([_Checksums.of(table) for table in storage.read(blocks)])
        for _ in range(2)
    )
    _compare(once, twice, storage.name)
    return storage


@dataclass(frozen=True, eq=False)
class _Checksums:
    """Of the inputs and of the targets of each example."""

    inputs: np.ndarray[Any, np.dtype[np.uint64]]
    targets: np.ndarray[Any, np.dtype[np.uint64]]

    @classmethod
    def of(cls, table: Table) -> _Checksums:
        targets = {} if table.targets is None else {"targets": table.targets}
        count = len(table)
        return cls(row_checksums(table.input_columns(), count), row_checksums(targets, count))

    @classmethod
    def joined(cls, parts: Sequence[_Checksums]) -> _Checksums:
        none = np.empty(0, dtype=np.uint64)
        return cls(
            np.concatenate([none, *(part.inputs for part in parts)]),
            np.concatenate([none, *(part.targets for part in parts)]),
        )

    @property
    def both(self) -> np.ndarray[Any, np.dtype[np.uint64]]:
        # Multiplied by an odd number, so that swapping targets does not leave the set the same.
        return self.inputs * np.uint64(0x9E3779B97F4A7C15) + self.targets


def _compare(once: _Checksums, again: _Checksums, name: str) -> None:
    """Refuse data that were not the same twice, and say in what way."""
    n, m = len(once.inputs), len(again.inputs)
    if n != m:
        raise DataError(
            f"the first pass gives {n} examples, the second {m}",
            where=name,
            advice="Pass data that can be read again and again: tensors, a DataLoader, a list.",
        )
    moved = once.both != again.both
    if not moved.any():
        return
    if np.array_equal(np.sort(once.both), np.sort(again.both)):
        _refuse_shuffling(name, f": {moved.sum()} of {n} examples are somewhere else")
    changed = int((once.inputs != again.inputs).sum())
    what = "inputs" if changed else "targets"
    changed = changed or int((once.targets != again.targets).sum())
    order = (
        ""
        if np.array_equal(once.targets, again.targets) or what == "targets"
        else (" (and their order changes too, or their targets do)")
    )
    raise DataError(
        f"the {what} of {changed} of {n} examples change between passes: the source applies random "
        f"augmentation or noise{order}",
        where=name,
        advice="Use the evaluation transform: each example must be the same whenever it is read.",
    )


def _refuse_shuffling(name: str, detail: str) -> NoReturn:
    raise DataError(
        f"the loader shuffles between passes{detail}",
        where=name,
        advice="Results are tied to the examples by their numbers: pass DataLoader(dataset, "
        "shuffle=False), or the tensors themselves.",
    )


def _refuse_empty(name: str) -> NoReturn:
    raise DataError("no examples", where=name, advice="Give at least one example.")


def _refuse_size(count: int, size: int, cache_bytes: int, name: str) -> NoReturn:
    raise ResourceError(
        f"the first {count} examples of {size:,} bytes already need more than the "
        f"{cache_bytes:,} bytes of cache_bytes, and the source cannot be read by number",
        where=name,
        advice="Raise cache_bytes if there is memory for all, or pass a DataLoader over a "
        "map-style Dataset (with __getitem__ and __len__), or memory-mapped arrays.",
    )
