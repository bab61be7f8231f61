"""What a long run will need, said before it starts: memory, passes over the data, time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pushforward.errors import ResourceError
from pushforward.runs.estimate import to_jsonable

__all__ = [
    "MemoryItem",
    "Plan",
    "available_memory",
    "format_bytes",
    "format_seconds",
    "largest_fitting",
]

_FALLBACK_BYTES = 4 * 2**30  # where the system does not say
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_LARGEST_SHOWN = 3


@dataclass(frozen=True)
class MemoryItem:
    """One thing that takes memory.

    Parameters
    ----------
    name
        What it is, as a reader would call it: ``"posterior draws"``.
    bytes
        How much it takes at its largest.
    advice
        What would make it smaller, as a sentence; empty when nothing would.
    """

    name: str
    bytes: int
    advice: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Parameters
    ----------
    title
        The run: ``"sampled posterior of 64 draws"``.
    items
        What takes memory on each process.
    passes
        Passes over the data.
    examples
        Examples in one pass, over all processes.
    seconds
        Expected time, in seconds; None when it is not known.
    processes
        How many share the work.
    chunks
        Sizes of the pieces in which the work is done, by name: ``{"examples": 128}``.

    Examples
    --------
    >>> Plan("a run", (MemoryItem("draws", 2**21),), passes=3, examples=1000)
    Plan of a run
      memory     2.0 MiB
                 2.0 MiB  draws
      work       3 passes over 1,000 examples
      time       not known
    """

    title: str
    items: tuple[MemoryItem, ...]
    passes: float
    examples: int
    seconds: float | None = None
    processes: int = 1
    chunks: Mapping[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Memory of all items on one process, in bytes."""
        return sum(item.bytes for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            The fields and `total_bytes`.
        """
        fields: dict[str, Any] = to_jsonable(self)
        return fields | {"chunks": dict(self.chunks), "total_bytes": self.total_bytes}

    def require(self, available: int) -> None:
        """Refuse to start what does not fit.

        Parameters
        ----------
        available
            Memory that may be used by one process, in bytes.

        Raises
        ------
        ResourceError
            With the largest items and what would need less.
        """
        if self.total_bytes <= available:
            return
        largest = sorted(self.items, key=lambda item: -item.bytes)[:_LARGEST_SHOWN]
        listed = ", ".join(f"{item.name} {format_bytes(item.bytes)}" for item in largest)
        advice = list(dict.fromkeys(item.advice for item in largest if item.advice))
        raise ResourceError(
            f"needs {format_bytes(self.total_bytes)} of memory where {format_bytes(available)} are "
            f"available; the most for {listed}",
            where=self.title,
            advice=" ".join(advice) or "Use a machine with more memory.",
        )

    def __repr__(self) -> str:
        passes = f"{self.passes:,.4g}" if self.passes < 10_000 else f"{self.passes:,.0f}"
        time = "not known" if self.seconds is None else f"about {format_seconds(self.seconds)}"
        rows = [("memory", format_bytes(self.total_bytes))]
        rows += [("", f"{format_bytes(item.bytes)}  {item.name}") for item in self.items]
        rows += [
            ("work", f"{passes} passes over {self.examples:,} examples"),
            ("time", time),
        ]
        if self.processes > 1:
            rows.append(("processes", f"{self.processes}; memory is that of each"))
        if self.chunks:
            sizes = ", ".join(f"{size:,} {name}" for name, size in self.chunks.items())
            rows.append(("pieces", sizes))
        lines = [f"  {label:<10} {text}" for label, text in rows]
        return "\n".join([f"Plan of {self.title}", *lines])


def largest_fitting(limit_bytes: int, fixed: int, per_item: int, most: int) -> int:
    """How many items fit beside what is always there.

    Parameters
    ----------
    limit_bytes
        Memory that may be used.
    fixed
        Bytes needed whatever the number of items.
    per_item
        Bytes of each item.
    most
        How many are wanted.

    Returns
    -------
    int
        From 0, when not even one fits, to `most`.
    """
    room = limit_bytes - fixed
    if room < 0:
        return 0
    return min(most, room // per_item) if per_item > 0 else most


def available_memory(device: torch.device | str = "cpu") -> int:
    """Memory that can be used right now.

    Parameters
    ----------
    device
        A CPU: what the system can give without swapping, or what the limit of this process's
        control group (a container's, a batch job's) leaves, whichever is less. A CUDA device: what
        is free there, with what PyTorch holds in reserve. Others count as CPU.

    Returns
    -------
    int
        Bytes; 4 GiB where the system does not say.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserve)
    return _system_memory(Path("/"))


def format_bytes(count: float) -> str:
    """A number of bytes for readers.

    Parameters
    ----------
    count
        Bytes.

    Returns
    -------
    str
        Such as ``"812 bytes"``, ``"1.5 GiB"``; a kibibyte is 1024 bytes.
    """
    for unit in _UNITS[:-1]:
        if abs(count) < 1023.5:
            return _three_digits(count, unit)
        count /= 1024
    return _three_digits(count, _UNITS[-1])


def format_seconds(seconds: float) -> str:
    """A duration for readers.

    Parameters
    ----------
    seconds
        Seconds.

    Returns
    -------
    str
        Such as ``"0.03 s"``, ``"4.2 s"``, ``"3 min 20 s"``, ``"2 h 5 min"``, ``"3 d 4 h"``.
    """
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for size, name, part, part_name in (
        (86_400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        # Rounded to the smaller unit first, or 59 min 59.9 s would become 60 min.
        rounded = (whole + part // 2) // part * part
        if rounded >= size:
            count, rest = divmod(rounded, size)
            return f"{count:,} {name} {rest // part} {part_name}" if rest else f"{count:,} {name}"
    return f"{whole} s"


def _three_digits(count: float, unit: str) -> str:
    digits = 1 if unit != "bytes" and abs(count) < 99.95 else 0
    return f"{count:,.{digits}f} {unit}"


def _system_memory(root: Path) -> int:
    """Of the machine whose files are under `root`."""
    known = [_meminfo(root / "proc/meminfo"), _group_memory(root)]
    found = [amount for amount in known if amount is not None]
    return max(0, min(found)) if found else _unspecified_memory()


def _meminfo(path: Path) -> int | None:
    try:
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _group_memory(root: Path) -> int | None:
    """What the limits of the control group and of those above it leave; None without limits."""
    left = []
    for folder, limit, usage, cache in _group_folders(root):
        try:
            allowed = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
        except (OSError, ValueError):  # no such group here, or "max": no limit
            continue
        left.append(allowed - used + _statistic(folder / "memory.stat", cache))
    return min(left, default=None)


def _group_folders(root: Path) -> list[tuple[Path, str, str, str]]:
    """Folders of the group and its ancestors, and the names of the files in them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            top = root / "sys/fs/cgroup"
            files = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's; then only the top is there, and is the group.
        parts = [part for part in group.split("/") if part and part != ".."]
        folders += [(top.joinpath(*parts[:n]), *files) for n in range(len(parts) + 1)]
    return folders


def _statistic(path: Path, name: str) -> int:
    """File pages that the system takes back when memory runs short."""
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def _unspecified_memory() -> int:
    """Of a system that is not Linux: half of what is installed, or what is safe to assume."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return _FALLBACK_BYTES
