"""What the tables of both studies say."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, log
from typing import Any

from reproductions.results import mean_and_spread

__all__ = ["finite_mean", "log_ratios", "names_of", "size_of", "spearman"]


def log_ratios(values: Sequence[float], truth: Sequence[float]) -> list[float]:
    """``log(estimate / truth)``, an estimate of nothing counted as very little."""
    return [log(max(v, 1e-12 * t) / t) for v, t in zip(values, truth, strict=True)]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation; NaN where one side is constant."""
    from scipy.stats import spearmanr

    if len(set(first)) == 1 or len(set(second)) == 1:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def finite_mean(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation of what is finite."""
    finite = [v for v in values if isfinite(v)]
    style = f".{digits}f"
    return mean_and_spread(finite, style, style) if finite else ""


def size_of(count: int) -> str:
    """Bytes in kB or MB."""
    return f"{count / 1e6:.1f} MB" if count > 1e5 else f"{count / 1e3:.1f} kB"


def names_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """Methods that any of the results has."""
    return list(dict.fromkeys(name for found in results for name in found["methods"]))
