"""Learning coefficients on disk: what was computed once is read back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from pushforward.degeneracy.coefficient import LearningCoefficient, Measured
from pushforward.errors import WeightsError
from pushforward.runs.estimate import Check, Cost

__all__ = ["coefficient_from", "parts_of"]

_KINDS: Mapping[str, type] = {"Measured": Measured, "Check": Check, "Cost": Cost}


def parts_of(found: LearningCoefficient) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take an estimate apart for `pushforward.runs.store`.

    Parameters
    ----------
    found
        Any estimate, traces included.

    Returns
    -------
    tuple
        Its tensors by the name of their field, and all the rest in JSON's types.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for entry in fields(found):
        value = getattr(found, entry.name)
        if isinstance(value, Tensor):
            tensors[entry.name] = value
        else:
            plain[entry.name] = _plain(value)
    return tensors, plain


def coefficient_from(
    tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> LearningCoefficient:
    """Put an estimate together again.

    Parameters
    ----------
    tensors, plain
        Of `parts_of`; JSON's lists in place of tuples are what is expected.

    Returns
    -------
    LearningCoefficient
        Equal to the one that was taken apart.

    Raises
    ------
    WeightsError
        When fields are missing or unknown: another release wrote them.
    """
    known = {entry.name for entry in fields(LearningCoefficient)}
    if differing := known ^ (set(tensors) | set(plain)):
        raise WeightsError(
            f"fields that only one side knows: {', '.join(sorted(differing))}",
            where="a stored learning coefficient",
            advice="Delete it and compute it again: another release wrote it.",
        )
    values: dict[str, Any] = {name: _restored(value) for name, value in plain.items()}
    values |= tensors
    return LearningCoefficient(**values)


def _plain(value: Any) -> Any:
    kind = type(value).__name__
    if kind in _KINDS:
        return {"kind": kind, "fields": [getattr(value, entry.name) for entry in fields(value)]}
    if isinstance(value, Mapping):
        return {"kind": "mapping", "fields": {key: _plain(item) for key, item in value.items()}}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_restored(item) for item in value)
    if not isinstance(value, Mapping):
        return value
    if value["kind"] == "mapping":
        return {key: _restored(item) for key, item in value["fields"].items()}
    return _KINDS[value["kind"]](*value["fields"])
