"""Linear, convolution and BatchNorm layers as affine maps of the form in front of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import NetworkError, ShapeError
from pushforward.networks.forms import Form
from pushforward.networks.layers import CONVOLUTIONS, refuse
from pushforward.networks.linear_maps import Dense, LinearMap, Structured

__all__ = ["batch_norm", "convolution", "linear"]


def linear(path: str, form: Form, weight: Tensor, bias: Tensor | None) -> Form:
    """The value behind a linear layer, which acts on the last dimension of an example.

    Parameters
    ----------
    path
        Of the layer.
    form
        In front of it.
    weight, bias
        Of the layer, ``(outputs, features)`` and ``(outputs,)``.

    Returns
    -------
    Form
        By a dense map where examples are vectors.

    Raises
    ------
    ShapeError
        When the layer expects another number of features.
    """
    if form.shape[-1:] != weight.shape[1:]:
        features = form.shape[-1] if form.shape else "a scalar"
        raise ShapeError(
            f"expects {weight.shape[1]} features but gets {features} "
            f"(one example has shape {form.shape} there)",
            where=f"module {path!r} (Linear)",
            advice="Check the dimension of the law, and Flatten before the first Linear layer.",
        )
    matrix = weight.to(torch.float64)
    shape = (*form.shape[:-1], weight.shape[0])
    if len(form.shape) == 1:
        layer: LinearMap = Dense(matrix)
    else:
        flops = 2.0 * math.prod(shape[:-1]) * matrix.numel()
        layer = Structured(lambda x: x @ matrix.mT, form.shape, shape, flops)
    offset = None if bias is None else bias.to(torch.float64).expand(shape).reshape(-1)
    return form.mapped(path, layer, shape, offset)


def convolution(path: str, form: Form, module: Any) -> Form:
    """The value behind a convolution layer.

    Parameters
    ----------
    path
        Of the layer.
    form
        In front of it.
    module
        The layer, one of `CONVOLUTIONS`.

    Returns
    -------
    Form
        By a map that stays a convolution.

    Raises
    ------
    ShapeError
        When the layer expects other channels or spatial dimensions.
    UnsupportedLayerError
        For padding with anything but zeros.
    """
    if module.padding_mode != "zeros":
        refuse(path, type(module).__name__, f"padding_mode={module.padding_mode!r}")
    weight = module.weight.to(torch.float64)
    convolve = next(f for kind, f in CONVOLUTIONS.items() if isinstance(module, kind))

    def function(x: Tensor) -> Tensor:
        return convolve(
            x, weight, None, module.stride, module.padding, module.dilation, module.groups
        )

    if len(form.shape) != weight.dim() - 1 or form.shape[0] != module.in_channels:
        raise ShapeError(
            f"expects examples of {module.in_channels} channels and {weight.dim() - 2} spatial "
            f"dimensions but gets shape {form.shape}",
            where=f"module {path!r} ({type(module).__name__})",
            advice="Give the law the event_shape of one image, for example (1, 28, 28).",
        )
    shape = tuple(function(form.bias.new_zeros(1, *form.shape)).shape[1:])
    layer = Structured(function, form.shape, shape, 2.0 * weight[0].numel() * math.prod(shape))
    offset = None
    if module.bias is not None:
        per_channel = module.bias.to(torch.float64).reshape(-1, *[1] * (len(shape) - 1))
        offset = per_channel.expand(shape).reshape(-1)
    return form.mapped(path, layer, shape, offset)


def batch_norm(path: str, form: Form, module: Any) -> Form:
    """The value behind a BatchNorm layer in eval mode, which scales and shifts each channel.

    Parameters
    ----------
    path
        Of the layer.
    form
        In front of it.
    module
        The layer.

    Returns
    -------
    Form
        By its running statistics.

    Raises
    ------
    NetworkError
        When it keeps no running statistics.
    ShapeError
        When it expects another number of features.
    """
    if module.running_mean is None:
        raise NetworkError(
            "BatchNorm keeps no running statistics",
            where=f"module {path!r}",
            advice="Without them its output depends on the batch: track_running_stats=True.",
        )
    if form.shape[0] != module.num_features:
        raise ShapeError(
            f"expects {module.num_features} features but gets shape {form.shape}",
            where=f"module {path!r} ({type(module).__name__})",
            advice="Check the layer in front of it.",
        )
    scale = torch.rsqrt(module.running_var.to(torch.float64) + module.eps)
    if module.weight is not None:
        scale = scale * module.weight.to(torch.float64)
    shift = -scale * module.running_mean.to(torch.float64)
    if module.bias is not None:
        shift = shift + module.bias.to(torch.float64)
    spread = [1] * (len(form.shape) - 1)
    scales = scale.reshape(-1, *spread).expand(form.shape).reshape(-1)
    offset = shift.reshape(-1, *spread).expand(form.shape).reshape(-1)
    return form.scaled(path, scales, offset)
