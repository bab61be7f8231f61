"""Processes that share draws and data: a grid over the process group of torch.distributed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.options import whole_number

__all__ = ["ProcessGrid"]


@dataclass(frozen=True)
class ProcessGrid:
    """Where this process stands among those that share a computation.

    Processes form a grid. Those of one row work on the same draws, each on its share of the data;
    those of one column work on the same data, each on its share of the draws. Every process calls
    the same methods in the same order.

    Parameters
    ----------
    draw_shards
        Rows: the draws are divided by so many.
    data_shards
        Columns: the data are divided by so many.
    draw_index
        Row of this process.
    data_index
        Column of this process.

    Examples
    --------
    >>> ProcessGrid.serial().draws(5)
    range(0, 5)
    """

    draw_shards: int
    data_shards: int
    draw_index: int
    data_index: int
    # Sub-groups of torch.distributed: the processes of this row, and of this column.
    _row: Any = field(default=None, repr=False, compare=False)
    _column: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def serial(cls) -> ProcessGrid:
        """The grid of one process, whatever others there are."""
        return cls(draw_shards=1, data_shards=1, draw_index=0, data_index=0)

    @classmethod
    def from_environment(cls, data_shards: int = 1) -> ProcessGrid:
        """The grid of all processes of the default process group; serial when there is none.

        Parameters
        ----------
        data_shards
            By how many the data are divided; the draws are divided by the number of processes over
            this. With 1 processes exchange next to nothing; more are for data or models with
            which one process cannot keep up.

        Returns
        -------
        ProcessGrid
            Process ``r`` of the group has row ``r // data_shards`` and column ``r % data_shards``.

        Raises
        ------
        OptionError
            If the number of processes is no multiple of `data_shards`, or ``torchrun`` started
            several processes and no group joins them.
        """
        joined = dist.is_available() and dist.is_initialized()
        if not joined and _started_by_torchrun() > 1:
            raise OptionError(
                f"torchrun started {_started_by_torchrun()} processes and no group joins them",
                where="torch.distributed",
                advice="Call torch.distributed.init_process_group() first: each process would do "
                "all the work otherwise.",
            )
        size, rank = (dist.get_world_size(), dist.get_rank()) if joined else (1, 0)
        data_shards = whole_number(data_shards, "data_shards")
        if size % data_shards:
            raise OptionError(
                f"{size} processes cannot share the data by {data_shards}",
                where="data_shards",
                advice="Choose a divisor of the number of processes.",
            )
        if size == 1:
            return cls.serial()
        rows, columns = _rows_and_columns(size, data_shards)
        # Every process has to take part in making every group, in the same order.
        row_groups = [dist.new_group(ranks) for ranks in rows]
        column_groups = [dist.new_group(ranks) for ranks in columns]
        draw_index, data_index = divmod(rank, data_shards)
        return cls(
            draw_shards=len(rows),
            data_shards=data_shards,
            draw_index=draw_index,
            data_index=data_index,
            _row=row_groups[draw_index],
            _column=column_groups[data_index],
        )

    @property
    def num_processes(self) -> int:
        """Processes in the grid."""
        return self.draw_shards * self.data_shards

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once: checkpoints, progress, results."""
        return self.draw_index == self.data_index == 0

    def draws(self, num_draws: int) -> range:
        """Which draws belong to this process.

        Parameters
        ----------
        num_draws
            Draws in all, K.

        Returns
        -------
        range
            Numbers among all draws, consecutive; the shares differ by one at most.

        Raises
        ------
        OptionError
            If there are fewer draws than processes that divide them.
        """
        if num_draws < self.draw_shards:
            raise OptionError(
                f"{num_draws} draws for {self.draw_shards} processes",
                where="num_draws",
                advice="Take more draws, fewer processes, or a larger data_shards.",
            )
        start, end = (
            num_draws * i // self.draw_shards for i in (self.draw_index, self.draw_index + 1)
        )
        return range(start, end)

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Add up what the processes of this row computed from their shares of the data.

        Parameters
        ----------
        tensor
            Of the same shape and type on all of them; not changed.

        Returns
        -------
        Tensor
            The sum, equal bit for bit on the processes of the row; `tensor` itself without others.
            It rounds differently from a sum by one process.
        """
        if self.data_shards == 1:
            return tensor
        total = _carried(tensor, self._row, copy=True)
        dist.all_reduce(total, group=self._row)
        return total.to(tensor.device)

    def gather_draws(self, tensor: Tensor) -> Tensor:
        """Put together what the processes hold of all draws.

        Parameters
        ----------
        tensor
            ``(k, ...)``: of the draws of this process. Shapes and types agree but for k.

        Returns
        -------
        Tensor
            ``(K, ...)``, the same on every process; `tensor` itself without others.
        """
        if self.draw_shards == 1:
            return tensor
        ours = _carried(tensor, self._column)
        counts = torch.zeros(self.draw_shards, dtype=torch.int64, device=ours.device)
        counts[self.draw_index] = len(ours)
        dist.all_reduce(counts, group=self._column)
        result = ours.new_empty(int(counts.sum()), *ours.shape[1:])
        # Each share is sent straight to its place: nothing is padded or held twice.
        for i, part in enumerate(result.split(counts.tolist())):
            if i == self.draw_index:
                part.copy_(ours)
            dist.broadcast(part, group=self._column, src=dist.get_global_rank(self._column, i))
        return result.to(tensor.device)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Give every process what the first one holds.

        Parameters
        ----------
        tensor
            On the first process the contents; on the others anything of that shape and type. Not
            changed.

        Returns
        -------
        Tensor
            The contents; `tensor` itself without others.
        """
        if self.num_processes == 1:
            return tensor
        result = _carried(tensor, None, copy=True)
        dist.broadcast(result, src=0)
        return result.to(tensor.device)

    def barrier(self) -> None:
        """Wait until every process has come this far."""
        if self.num_processes > 1:
            dist.barrier()


def _rows_and_columns(size: int, data_shards: int) -> tuple[list[list[int]], list[list[int]]]:
    """Numbers of the processes of each row and of each column."""
    rows = [list(range(i, i + data_shards)) for i in range(0, size, data_shards)]
    return rows, [list(column) for column in zip(*rows, strict=True)]


def _carried(tensor: Tensor, group: Any, *, copy: bool = False) -> Tensor:
    """The tensor, contiguous, on a device whose tensors the group can carry."""
    plain = tensor.detach()
    device = _carrier(plain.device, dist.get_backend_config(group))
    moved = plain.to(device).contiguous()
    shared = moved.data_ptr() == plain.data_ptr()
    return moved.clone() if copy and shared else moved


def _carrier(device: torch.device, config: str) -> torch.device:
    """The device itself if it can be carried.

    Parameters
    ----------
    device
        Where a tensor is.
    config
        Backends by kind of device, such as ``"cpu:gloo,cuda:nccl"``.

    Returns
    -------
    torch.device
        Else the CPU, or for NCCL alone the current CUDA device.
    """
    backends = dict(entry.split(":") for entry in config.split(","))
    # Gloo goes by way of the CPU in any case, and not with every operation.
    if device.type in backends and (device.type == "cpu" or backends[device.type] != "gloo"):
        return device
    if "cpu" in backends:
        return torch.device("cpu")
    kind = next(iter(backends))
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _started_by_torchrun() -> int:
    """How many processes; 1 when it was not torchrun that started this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 1
    return int(os.environ.get("WORLD_SIZE", "1"))
