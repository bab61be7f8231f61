"""An estimate with its cost, kept in a file, and verdicts as tables say them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time
from typing import Any

from torch import nn

import pushforward as pf
from reproductions.results import read_result, write_result

__all__ = ["count_verdicts", "estimated", "stored_estimate"]


def estimated(net: nn.Module, data: Any, loss: Any, **options: Any) -> dict[str, Any]:
    """The coefficient as plain numbers, and what it cost."""
    began = process_time()
    found = pf.learning_coefficient(net.eval(), data, loss, progress=False, **options)
    return found.to_dict() | {"cpu_seconds": process_time() - began}


def stored_estimate(
    path: Path, settings: dict[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What a file holds, if it was made with these settings; otherwise make it."""
    found = read_result(path, settings)
    if found is not None:
        return found
    found = {"settings": settings, **compute()}
    write_result(path, found)
    shown = f"{found['value']:.5g} ± {found['standard_error']:.2g} {found['verdict']}"
    print(f"{path.name}: {shown}, {found['cpu_seconds']:.0f} s of a processor", flush=True)
    return found


def count_verdicts(results: Sequence[dict[str, Any]]) -> str:
    """How many estimates have each verdict."""
    counts = Counter(found["verdict"] for found in results)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
