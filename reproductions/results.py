"""What the studies share: one JSON file for each result, made once, and a table at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pushforward.errors import PushforwardError

__all__ = ["mean_and_spread", "read_result", "report", "settings_of", "write_result"]


def settings_of(options: Any, without: Iterable[str], **own: Any) -> dict[str, Any]:
    """What decides a result, as JSON has it.

    Parameters
    ----------
    options
        A dataclass.
    without
        Fields that do not matter to this one result: places, and lists of which it is one element.
    own
        What is chosen for this result.

    Returns
    -------
    dict
        Compares equal to what `read_result` finds in a file.
    """
    left_out = set(without)
    settings = {name: value for name, value in asdict(options).items() if name not in left_out}
    return json.loads(json.dumps(settings | own, default=str))


def read_result(path: Path, settings: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """What a file holds; None if there is none, or if it was made with other settings.

    Returns
    -------
    dict or None
        `settings` among its items; where None are asked for, any will do.
    """
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if settings is None or found.get("settings") == settings else None


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write what `read_result` reads."""
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")


def report(
    path: Path,
    results: Iterable[dict[str, Any]],
    table: Callable[[Sequence[dict[str, Any]]], str],
) -> int:
    """Run a study to its end; write its table to a file and print it.

    Parameters
    ----------
    path
        Of the table; its folder is made first.
    results
        A generator, which runs the study.
    table
        What is made of all results.

    Returns
    -------
    int
        Exit code: 0, or 2 when something was refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        text = table(list(results))
    except PushforwardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path.write_text(text, encoding="utf-8")
    print(text)
    return 0


def mean_and_spread(values: Sequence[float], style: str = ".4g", spread_style: str = ".2g") -> str:
    """Mean, and ± the standard deviation where there are several."""
    spread = f" ± {stdev(values):{spread_style}}" if len(values) > 1 else ""
    return f"{mean(values):{style}}{spread}"
