"""Data as the library reads it: a stream of input batches from tensors, arrays or loaders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pushforward.errors import DataError
from pushforward.typing import DataSource

__all__ = ["DataStream"]

_BATCH_SIZE = 1024
_INPUT_KEYS = ("inputs", "input", "x", "pixel_values", "features", "data")


@dataclass(frozen=True)
class DataStream:
    """One fixed-order pass over the inputs of a data set.

    Parameters
    ----------
    source
        A tensor or NumPy array of examples ``(N, ...)``, or an iterable of batches: tensors,
        ``(inputs, targets, ...)`` or mappings with one of the keys inputs, input, x, pixel_values,
        features, data.
    name
        How messages call it.

    Examples
    --------
    >>> import torch
    >>> [batch.shape for batch in DataStream(torch.zeros(3, 2)).inputs()]
    [torch.Size([3, 2])]
    """

    source: DataSource | np.ndarray[Any, np.dtype[Any]]
    name: str = "data"

    def inputs(self) -> Iterator[Tensor]:
        """Yield batches of inputs ``(n, ...)``, checked one by one.

        Yields
        ------
        Tensor
            Floating point; integer inputs are converted to the default dtype.

        Raises
        ------
        DataError
            For an empty source, batches of unequal example shape, NaN or infinite entries, or a
            batch in which no inputs can be recognised.
        """
        shape: tuple[int, ...] | None = None
        count = 0
        for index, batch in enumerate(self._batches()):
            x = _inputs_of(batch, f"batch {index} of {self.name}")
            if not x.is_floating_point():
                x = x.to(torch.get_default_dtype())
            if x.dim() < 2:
                raise DataError(
                    f"inputs have shape {tuple(x.shape)}",
                    where=f"batch {index} of {self.name}",
                    advice="Give batches of examples: (N, features), (N, channels, height, width).",
                )
            shape = tuple(x.shape[1:]) if shape is None else shape
            if tuple(x.shape[1:]) != shape:
                raise DataError(
                    f"examples of shape {tuple(x.shape[1:])} follow examples of shape {shape}",
                    where=f"batch {index} of {self.name}",
                    advice="All examples need the same shape.",
                )
            bad = ~torch.isfinite(x)
            if bool(bad.any()):
                row = int(bad.flatten(1).any(1).nonzero()[0])
                raise DataError(
                    f"example {count + row} holds NaN or infinite entries",
                    where=f"batch {index} of {self.name}",
                    advice="Clean or impute the data first.",
                )
            count += len(x)
            if len(x):
                yield x
        if count == 0:
            raise DataError("no examples", where=self.name, advice="Give at least two examples.")

    def _batches(self) -> Iterator[Any]:
        source = (
            torch.from_numpy(self.source) if isinstance(self.source, np.ndarray) else self.source
        )
        if isinstance(source, Tensor):
            yield from source.split(_BATCH_SIZE)
            return
        try:
            iterator = iter(source)
        except TypeError as error:
            raise DataError(
                f"got {type(source).__name__}",
                where=self.name,
                advice="Pass a tensor (N, ...), a NumPy array, or an iterable of batches.",
            ) from error
        yield from iterator


def _inputs_of(batch: Any, where: str) -> Tensor:
    if isinstance(batch, Mapping):
        for key in _INPUT_KEYS:
            if key in batch:
                batch = batch[key]
                break
        else:
            raise DataError(
                f"a mapping with keys {sorted(map(str, batch))}",
                where=where,
                advice=f"Name the inputs one of {', '.join(_INPUT_KEYS)}, or yield tensors.",
            )
    elif isinstance(batch, list | tuple) and batch:
        batch = batch[0]
    if isinstance(batch, np.ndarray):
        batch = torch.from_numpy(batch)
    if not isinstance(batch, Tensor):
        raise DataError(
            f"inputs are {type(batch).__name__}",
            where=where,
            advice="Yield tensors, (inputs, targets) pairs or mappings of tensors.",
        )
    return batch.detach()
