"""What everything that measures a distance has in common: summaries, baselines, a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from pushforward.function_space.network import ReferenceNetwork

__all__ = ["DistanceMeasure"]


@runtime_checkable
class DistanceMeasure(Protocol):
    """What measures how far other weights are, as a function, from those of a reference."""

    @property
    def reference(self) -> ReferenceNetwork:
        """The network from which it measures."""

    @property
    def distance(self) -> Callable[..., Tensor]:
        """``distance(other, *, metric=..., outputs=...)``: a scalar from 0, differentiable."""
