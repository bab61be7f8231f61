"""Progress bars on standard error, silent when asked or when nobody is watching."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol, runtime_checkable

__all__ = ["Advance", "track"]

_PATIENCE = 1.0  # seconds before a bar appears of its own accord


@runtime_checkable  # for run-time type checks
class Advance(Protocol):
    """Tells a bar that work was done."""

    def __call__(self, amount: int, note: str = "", /) -> None:
        """Report `amount` more units; `note` says how it goes, behind the description."""


@contextmanager
def track(total: int | None, description: str, *, enabled: bool | None = None) -> Iterator[Advance]:
    """Show how far a long computation has come.

    Parameters
    ----------
    total
        Amount of work in any unit; None when it is not known.
    description
        What is being done, shown before the bar.
    enabled
        True: always show the bar. False: never. None: show it on a terminal, once the work has
        lasted a second, so that short calls leave no trace.

    Yields
    ------
    callable
        ``advance(n)``: report that `n` more units are done; ``advance(n, "note")`` also says how it
        goes.

    Examples
    --------
    >>> with track(3, "Counting", enabled=False) as advance:
    ...     for _ in range(3):
    ...         advance(1)
    """
    if enabled is False or (enabled is None and not _watched()):
        yield lambda _amount, _note="", /: None
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = progress.add_task(description, total=total)
    visible_from = monotonic() + (0.0 if enabled else _PATIENCE)
    shown = False

    def show_when_due() -> None:
        nonlocal shown
        if not shown and monotonic() >= visible_from:
            progress.start()
            shown = True

    def advance(amount: int, note: str = "", /) -> None:
        progress.advance(task, amount)
        if note:
            progress.update(task, description=f"{description}, {note}")
        show_when_due()

    show_when_due()
    try:
        yield advance
    finally:
        if shown:
            progress.stop()


def _watched() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()
