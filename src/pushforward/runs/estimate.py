"""What every answer carries: its value, standard error, cost, and checks with advice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Check", "Cost", "Estimate", "Status", "to_jsonable", "worst_status"]

Status = Literal["pass", "warn", "fail"]
_SEVERITY: dict[str, int] = {"pass": 0, "warn": 1, "fail": 2}


@dataclass(frozen=True)
class Check:
    """One thing that was verified about an answer.

    Parameters
    ----------
    name
        Short stable identifier, for example ``"positive-variance"``.
    status
        ``"pass"``, ``"warn"`` (the error bar may be too small) or ``"fail"`` (do not use the
        value).
    detail
        What was seen, with its number.
    advice
        What to do when the status is not ``"pass"``; empty otherwise.
    """

    name: str
    status: Status
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        stop = "" if self.detail.endswith((".", "!", "?")) else "."
        advice = f"{stop} {self.advice}" if self.advice else ""
        return f"[{self.status}] {self.name}: {self.detail}{advice}"


@dataclass(frozen=True)
class Cost:
    """What an answer cost.

    Parameters
    ----------
    flops
        Floating-point operations, a multiply-add counted as two; 0 when they were not counted.
    seconds
        Wall-clock time.
    evaluations
        Forward passes of the network over one example; 0 for a method that draws no samples.
    """

    flops: float
    seconds: float
    evaluations: int = 0

    def __str__(self) -> str:
        passes = f", {self.evaluations:,} forward passes" if self.evaluations else ""
        counted = f"{self.flops:.3g} FLOPs, " if self.flops else ""
        return f"{counted}{self.seconds:.3g} s{passes}"


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error, its cost and the checks it passed.

    Parameters
    ----------
    value
        The estimated quantity, any shape.
    standard_error
        Standard error of `value`, same shape.
    cost
        What it took to compute.
    method
        One sentence that says how the value was obtained.
    checks
        What was verified, worst news included.
    """

    value: Tensor
    standard_error: Tensor
    cost: Cost
    method: str
    checks: tuple[Check, ...] = field(default_factory=tuple)

    @property
    def status(self) -> Status:
        """The worst status among the checks."""
        return worst_status(self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            Tensors as nested lists, dataclasses as dictionaries.
        """
        return to_jsonable(self)

    def __float__(self) -> float:
        return float(self.value)

    def __repr__(self) -> str:
        lines = [f"Estimate by {self.method}"]
        values, errors = self.value.flatten().tolist(), self.standard_error.flatten().tolist()
        shown = list(zip(values, errors, strict=True))[:10]
        lines += [f"  {value: .6g} ± {error:.2g}" for value, error in shown]
        if len(values) > len(shown):
            lines.append(f"  ... {len(values) - len(shown)} more")
        lines.append(f"  cost: {self.cost}")
        lines += [f"  {check}" for check in self.checks if check.status != "pass"]
        return "\n".join(lines)


def worst_status(checks: Iterable[Check]) -> Status:
    """The most severe status of several checks; ``"pass"`` when there are none.

    Returns
    -------
    str
        ``"pass"``, ``"warn"`` or ``"fail"``.
    """
    return max((check.status for check in checks), key=_SEVERITY.__getitem__, default="pass")


def to_jsonable(value: Any) -> Any:
    """Turn results into objects that the standard library's JSON writer accepts.

    Parameters
    ----------
    value
        A result dataclass, tensor, mapping, sequence or plain scalar. Private fields (leading
        underscore) and fields marked with ``metadata={"json": False}`` are left out.

    Returns
    -------
    object
        Dictionaries, lists, strings, numbers, booleans and None.
    """
    if isinstance(value, Tensor):
        return (
            value.detach().to(torch.float64 if value.is_floating_point() else value.dtype).tolist()
        )
    if hasattr(value, "__dataclass_fields__"):
        return {
            name: to_jsonable(getattr(value, name))
            for name, entry in value.__dataclass_fields__.items()
            if not name.startswith("_") and entry.metadata.get("json", True)
        }
    if isinstance(value, dict):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    return value
