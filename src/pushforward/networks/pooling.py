"""Max pooling as maxima of pairs, so that each is one ReLU: ``max(a, b) = a + relu(b - a)``.

A window over several axes is pooled axis after axis, and along an axis by a balanced tree whose
pairs overlapping windows share. All of it is exact; padding never wins, so padded entries are left
out of their windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pushforward.gaussians.activations import Activation, PiecewisePolynomial
from pushforward.networks.linear_maps import Structured

__all__ = [
    "MaxPooling",
    "PairMaps",
    "PairMaxima",
    "gathered",
    "is_increasing",
    "max_pooling_of_call",
    "max_pooling_of_module",
    "pair_maxima",
]

_MODULES: dict[type[nn.Module], int] = {
    nn.MaxPool1d: 1,
    nn.MaxPool2d: 2,
    nn.MaxPool3d: 3,
}
_ADAPTIVE_MODULES: dict[type[nn.Module], int] = {
    nn.AdaptiveMaxPool1d: 1,
    nn.AdaptiveMaxPool2d: 2,
    nn.AdaptiveMaxPool3d: 3,
}
_FUNCTIONS: dict[Any, int] = {
    functional.max_pool1d: 1,
    functional.max_pool2d: 2,
    functional.max_pool3d: 3,
    torch.max_pool1d: 1,
    torch.max_pool2d: 2,
    torch.max_pool3d: 3,
}
_ADAPTIVE_FUNCTIONS: dict[Any, int] = {
    functional.adaptive_max_pool1d: 1,
    functional.adaptive_max_pool2d: 2,
    functional.adaptive_max_pool3d: 3,
}


@dataclass(frozen=True)
class MaxPooling:
    """What a max pooling takes the maxima of.

    Parameters
    ----------
    dimensions
        How many of the last axes it pools.
    function
        Of torch, on a batch of examples.
    windows
        ``(axis among the pooled ones, entries in, entries out) -> entries of each window``.
    """

    dimensions: int
    function: Callable[[Tensor], Any]
    windows: Callable[[int, int, int], list[tuple[int, ...]]]


@dataclass(frozen=True)
class PairMaxima:
    """One level of a tree along one axis: every new entry is an old one or the larger of two.

    Parameters
    ----------
    first
        The old entry that each new one starts from.
    left, right
        The pairs of old entries.
    places
        Which new entries the pairs make.
    """

    first: tuple[int, ...]
    left: tuple[int, ...]
    right: tuple[int, ...]
    places: tuple[int, ...]

    def maps(self, shape: tuple[int, ...], axis: int, device: torch.device) -> PairMaps:
        """The level as linear maps around its ReLUs.

        Parameters
        ----------
        shape
            Of one example.
        axis
            Of `shape` that is pooled.
        device
            Of the values.

        Returns
        -------
        PairMaps
            From the old entries to the new ones.
        """
        first = gathered(shape, axis, self.first, device)
        left, right = _indices(self.left, device), _indices(self.right, device)
        places = _indices(self.places, device)
        new = first.out_shape
        pairs = (*shape[:axis], len(self.left), *shape[axis + 1 :])

        def difference(x: Tensor) -> Tensor:
            return x.index_select(axis + 1, right) - x.index_select(axis + 1, left)

        def place(x: Tensor) -> Tensor:
            return x.new_zeros(x.shape[0], *new).index_add(axis + 1, places, x)

        flops = float(math.prod(pairs))
        steps = Structured(difference, shape, pairs, flops)
        return PairMaps(first, steps, Structured(place, pairs, new, flops))


@dataclass(frozen=True)
class PairMaps:
    """``new = first(old) + place(relu(steps(old)))``."""

    first: Structured
    steps: Structured
    place: Structured


def max_pooling_of_module(module: nn.Module) -> MaxPooling | None:
    """The max pooling that a module does, or None.

    Returns
    -------
    MaxPooling or None
        None also when it returns indices.
    """
    kind = type(module)
    if getattr(module, "return_indices", False):
        return None
    if kind in _MODULES:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        options = {name: getattr(module, name) for name in names}
        return _fixed(_MODULES[kind], module.forward, **options)
    if kind in _ADAPTIVE_MODULES:
        return MaxPooling(_ADAPTIVE_MODULES[kind], module.forward, _adaptive_windows)
    return None


def max_pooling_of_call(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> MaxPooling | None:
    """The max pooling that a call of a function does, or None.

    Parameters
    ----------
    target
        The function.
    args, kwargs
        Its arguments behind the input.

    Returns
    -------
    MaxPooling or None
        None also when it returns indices.
    """

    def call(x: Tensor) -> Any:
        return target(x, *args, **kwargs)

    # Functions that return indices are others in a trace, or say so by keyword.
    if kwargs.get("return_indices", False) or not callable(target):
        return None
    if target in _FUNCTIONS:
        return _fixed(_FUNCTIONS[target], call, *args, **kwargs)
    if target in _ADAPTIVE_FUNCTIONS:
        return MaxPooling(_ADAPTIVE_FUNCTIONS[target], call, _adaptive_windows)
    return None


def pair_maxima(
    windows: Sequence[tuple[int, ...]],
) -> tuple[tuple[PairMaxima, ...], tuple[int, ...]]:
    """Maxima over windows along one axis by levels of maxima of two.

    Parameters
    ----------
    windows
        Entries of each, all different, at least one.

    Returns
    -------
    levels
        ``ceil(log2 k)`` for the largest window of ``k`` entries. Windows share pairs.
    last
        The entry behind the last level that is the maximum of each window.
    """
    levels = []
    while any(len(window) > 1 for window in windows):
        pairs = {p for window in windows for p in zip(window[::2], window[1::2], strict=False)}
        numbers: dict[tuple[int, ...], int] = {}
        merged = []
        for window in windows:
            nodes: list[tuple[int, ...]] = list(zip(window[::2], window[1::2], strict=False))
            if len(window) % 2:
                # A maximum over an entry twice is the same: a pair of another window may do.
                overlap = window[-2:]
                nodes.append(overlap if overlap in pairs else window[-1:])
            merged.append(tuple(numbers.setdefault(node, len(numbers)) for node in nodes))
        both = [node for node in numbers if len(node) == 2]
        levels.append(
            PairMaxima(
                tuple(node[0] for node in numbers),
                tuple(node[0] for node in both),
                tuple(node[1] for node in both),
                tuple(numbers[node] for node in both),
            )
        )
        windows = merged
    return tuple(levels), tuple(window[0] for window in windows)


def is_increasing(activation: Activation | None) -> bool:
    """Whether a larger value never becomes a smaller one, as far as that can be decided exactly.

    Returns
    -------
    bool
        For piecewise linear activations, ReLU and its kin; False for all others.
    """
    if not isinstance(activation, PiecewisePolynomial) or activation.degree > 1:
        return False
    lines = [(piece[0], piece[1] if len(piece) > 1 else 0.0) for piece in activation.pieces]
    steps = [
        (high[0] - low[0]) + (high[1] - low[1]) * position
        for position, (low, high) in zip(activation.breakpoints, pairwise(lines), strict=True)
    ]
    # Pieces that meet do so up to rounding.
    return all(slope >= 0 for _, slope in lines) and all(step >= -1e-12 for step in steps)


def gathered(
    shape: tuple[int, ...], axis: int, entries: tuple[int, ...], device: torch.device
) -> Structured:
    """The map that picks entries along one axis.

    Parameters
    ----------
    shape
        Of one example.
    axis
        Of `shape`.
    entries
        To pick, in their new order.
    device
        Of the values.

    Returns
    -------
    Structured
        A copy, no arithmetic.
    """
    index = _indices(entries, device)
    out = (*shape[:axis], len(entries), *shape[axis + 1 :])
    return Structured(lambda x: x.index_select(axis + 1, index), shape, out)


def _indices(entries: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(entries, dtype=torch.long, device=device)


def _fixed(
    dimensions: int,
    function: Callable[[Tensor], Any],
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,  # noqa: ARG001 - the number of windows says it
    return_indices: bool = False,  # noqa: ARG001 - torch's signature
) -> MaxPooling:
    kernels = _each(kernel_size, dimensions)
    strides = _each(stride, dimensions) if stride not in (None, (), []) else kernels
    paddings, dilations = _each(padding, dimensions), _each(dilation, dimensions)

    def windows(axis: int, size: int, count: int) -> list[tuple[int, ...]]:
        starts = [i * strides[axis] - paddings[axis] for i in range(count)]
        reach = range(0, kernels[axis] * dilations[axis], dilations[axis])
        return [tuple(start + k for k in reach if 0 <= start + k < size) for start in starts]

    return MaxPooling(dimensions, function, windows)


def _adaptive_windows(axis: int, size: int, count: int) -> list[tuple[int, ...]]:  # noqa: ARG001
    return [
        tuple(range(i * size // count, math.ceil((i + 1) * size / count))) for i in range(count)
    ]


def _each(option: Any, dimensions: int) -> tuple[int, ...]:
    values = (option,) if isinstance(option, int) else tuple(option)
    return values * dimensions if len(values) == 1 else values
