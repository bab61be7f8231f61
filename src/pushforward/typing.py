"""Types and dimension letters that every floor shares.

Dimension letters in shapes, the same everywhere: ``B`` a batch of laws or examples, ``N`` examples,
``D`` input features, ``K`` outputs, ``P`` parameters, ``C`` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Batch", "DataSource", "ModelFn", "Params"]

Params: TypeAlias = dict[str, Tensor]
"""Parameters of a network by name, as ``dict(module.named_parameters())`` gives them."""

Batch: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""What a data loader yields: inputs alone, ``(inputs, targets, ...)`` or a mapping."""

ModelFn: TypeAlias = Callable[[Tensor], Tensor]
"""A network as a function of a batch of inputs ``(N, ...)`` with outputs ``(N, K)``."""

DataSource: TypeAlias = Tensor | Iterable[Batch]
"""A tensor of examples ``(N, ...)`` or anything that yields batches."""
