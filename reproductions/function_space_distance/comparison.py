"""Values, gradients, stated errors and time of methods beside the truth, kept in a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pushforward.errors import PushforwardError
from pushforward.function_space.metrics import Metric
from pushforward.typing import Params
from reproductions.function_space_distance.methods import Method
from reproductions.results import read_result, write_result

__all__ = ["fill_in", "is_wanted"]


def is_wanted(name: str, *, begins: tuple[str, ...], without: tuple[str, ...]) -> bool:
    """Whether a method is asked for: by how its name begins, unless there is nothing to begin."""
    return (not begins or name.startswith(begins)) and name not in without


def fill_in(
    path: Path,
    settings: dict[str, Any],
    known: Callable[[], dict[str, Any]],
    builders: Callable[[], dict[str, Callable[[], Method]]],
    changes: Callable[[], dict[str, Params]],
    wants: Callable[[str], bool],
    *,
    exact: Callable[[], Method],
    metrics: Sequence[Metric],
    slope: bool,
) -> dict[str, Any]:
    """What a file holds, with all methods that are wanted and missing."""
    found = read_result(path, settings)
    if found is None:
        found = {"settings": settings, **known(), "methods": {}}
    wanted = builders()
    missing = [n for n in wanted if wants(n) and n not in found["methods"]]
    if not missing:
        return found
    moved, truth, slopes = changes(), exact(), {}
    found["truth"] = {}
    for metric in metrics:
        rows = {n: _measured(truth.distance, w, metric, slope=slope) for n, w in moved.items()}
        found["truth"][metric] = {name: row[0] for name, row in rows.items()}
        slopes[metric] = {name: row[1] for name, row in rows.items()}
        found["truth"]["seconds"] = median(row[2] for row in rows.values())
    found["truth"]["bytes"] = truth.num_bytes
    for name in missing:
        began = process_time()
        try:
            method = wanted[name]()
            row = _compared(method, moved, metrics, slopes if slope else None)
        except (PushforwardError, ImportError, RuntimeError) as error:
            row = {"failure": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        found["methods"][name] = row
        write_result(path, found)
        print(f"{path.name}: {name}, {process_time() - began:.0f} s", flush=True)
    return found


def _compared(
    method: Method,
    changes: dict[str, Params],
    metrics: Sequence[Metric],
    slopes: dict[str, dict[str, Tensor]] | None,
) -> dict[str, Any]:
    """Values, errors, cosines and seconds of one method at all changes; or why there are none."""
    found: dict[str, Any] = {"bytes": method.num_bytes}
    for metric in metrics:
        columns: dict[str, list[float]] = {"values": [], "errors": [], "cosines": []}
        seconds = []
        for name, weights in changes.items():
            value, slope, spent = _measured(
                method.distance, weights, metric, slope=slopes is not None
            )
            columns["values"].append(value)
            seconds.append(spent)
            if slopes is not None:
                true = slopes[metric][name]
                columns["cosines"].append(float(functional.cosine_similarity(slope, true, dim=0)))
            if method.error is not None:
                columns["errors"].append(method.error(weights, metric, value))
        # The first prepares what depends on the reference alone.
        found[metric] = columns | {"seconds": median(seconds), "first seconds": seconds[0]}
    return found


def _measured(
    measure: Callable[[Params, Metric], Tensor], weights: Params, metric: Metric, *, slope: bool
) -> tuple[float, Tensor, float]:
    """Value, gradient in all weights, and seconds of the processor."""
    leaves = {n: t.detach().clone().requires_grad_(slope) for n, t in weights.items()}
    began = process_time()
    if not slope:
        with torch.no_grad():
            value = float(measure(leaves, metric))
        return value, torch.zeros(0), process_time() - began
    distance = measure(leaves, metric)
    parts = torch.autograd.grad(distance, list(leaves.values()))
    seconds = process_time() - began
    return float(distance.detach()), torch.cat([p.flatten() for p in parts]).double(), seconds
