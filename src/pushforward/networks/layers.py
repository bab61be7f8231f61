"""The layers and functions of torch that have a rule, by kind, and the refusal of all others.

Activations and max poolings have lists of their own in `activations` and `pooling`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from pushforward.errors import UnsupportedLayerError
from pushforward.networks.activations import supported_activations

__all__ = [
    "ADDITIONS",
    "BATCH_NORMS",
    "CONCATENATIONS",
    "CONVOLUTIONS",
    "DROPOUTS",
    "DROPOUT_FUNCTIONS",
    "LINEAR_CALLS",
    "NEGATIONS",
    "POOLINGS",
    "PRODUCTS",
    "QUOTIENTS",
    "RESHAPES",
    "SUBTRACTIONS",
    "refuse",
]

_LINEAR_MODULES = (
    "Linear, Conv1d-3d, AvgPool1d-3d, AdaptiveAvgPool1d-3d, MaxPool1d-3d, AdaptiveMaxPool1d-3d, "
    "BatchNorm1d-3d and Dropout in eval mode, Flatten, Unflatten, Identity"
)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
DROPOUT_FUNCTIONS = (functional.dropout, functional.dropout1d, functional.dropout2d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}
POOLINGS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
# Linear, but for a constant, in their first argument; a string is the name of a tensor method.
LINEAR_CALLS: tuple[Any, ...] = (
    functional.avg_pool1d,
    functional.avg_pool2d,
    functional.avg_pool3d,
    functional.adaptive_avg_pool1d,
    functional.adaptive_avg_pool2d,
    functional.adaptive_avg_pool3d,
    functional.pad,
    torch.mean,
    torch.sum,
    torch.permute,
    torch.transpose,
    operator.getitem,
    "mean",
    "sum",
    "permute",
    "transpose",
)
RESHAPES = (
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    torch.unsqueeze,
    "flatten",
    "reshape",
    "view",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "unflatten",
)
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
SUBTRACTIONS = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
NEGATIONS = (operator.neg, torch.neg, "neg")
CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


def refuse(path: str, kind: str, reason: str = "", cause: Exception | None = None) -> NoReturn:
    """Refuse a layer or function that has no rule, and say what has one.

    Parameters
    ----------
    path
        Module path or traced name.
    kind
        What it is.
    reason
        What about it has no rule, if others of its kind have one.
    cause
        The error that showed it.

    Raises
    ------
    UnsupportedLayerError
        Always.
    """
    why = f" ({reason})" if reason else ""
    refusal = UnsupportedLayerError(
        f"no propagation rule for {kind}{why}",
        where=f"module {path!r}",
        advice=f"Supported: {_LINEAR_MODULES}; residual additions and concatenations; "
        f"activations {', '.join(supported_activations())}, abs, sign, heaviside and powers. "
        "Add an elementwise function with pushforward.register_activation, or use "
        "pushforward.monte_carlo.",
    )
    if cause is None:
        raise refusal
    raise refusal from cause
