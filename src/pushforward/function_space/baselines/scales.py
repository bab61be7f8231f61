"""Scales and shifts of normalisation layers: squares of their gradients, example by example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from pushforward.function_space.baselines.layers import closeness, other_squares, watched, wide
from pushforward.function_space.network import ReferenceNetwork
from pushforward.networks.batches import Inputs
from pushforward.typing import Params

__all__ = ["ScaleLayer", "find_scales", "scale_squares"]


@dataclass(frozen=True, eq=False)
class ScaleLayer:
    """A normalisation layer with a scale and a shift of its own, in evaluation mode.

    Parameters
    ----------
    path
        Of the module.
    weight, bias
        Names of its parameters; None without a shift.
    """

    path: str
    weight: str
    bias: str | None


def find_scales(reference: ReferenceNetwork, inputs: Inputs) -> tuple[ScaleLayer, ...]:
    """Layers whose squares, on a few examples, are those of the general and slow way.

    Parameters
    ----------
    reference
        The network.
    inputs
        Three examples, which may be the same.

    Returns
    -------
    tuple of ScaleLayer
        In order.
    """
    layers = tuple(_candidates(reference.module))
    with watched(reference.module, layers) as (_, probes), torch.no_grad():
        rows = reference.outputs(reference.tensors, inputs)
    layers = tuple(
        layer
        for layer in layers
        if probes[layer.path] and all(len(probe) == len(rows) for probe in probes[layer.path])
    )
    # Examples pull differently, or one could stand for another.
    entries = torch.linspace(-1, 2, rows.numel(), dtype=rows.dtype, device=rows.device)
    directions = entries.reshape(1, *rows.shape)
    names = tuple(name for layer in layers for name in (layer.weight, layer.bias) if name)
    truth = other_squares(reference, names, inputs, directions)
    found = scale_squares(reference, layers, inputs, directions)
    near = closeness(rows.dtype)
    close = {
        name: torch.allclose(found[name], own, rtol=0, atol=near * float(own.max()))
        for name, own in truth.items()
    }
    return tuple(
        layer
        for layer in layers
        if close[layer.weight] and (layer.bias is None or close[layer.bias])
    )


def scale_squares(
    reference: ReferenceNetwork,
    layers: tuple[ScaleLayer, ...],
    inputs: Inputs,
    cotangents: Float[Tensor, "R B K"],
) -> Params:
    """Squares of gradients of single examples, summed over a batch and over cotangents.

    Parameters
    ----------
    reference
        The network.
    layers
        Those to look at.
    inputs
        A batch.
    cotangents
        At its outputs.

    Returns
    -------
    Params
        Float64, by name of the parameter.
    """
    if not layers:
        return {}
    with watched(reference.module, layers) as (seen, probes), torch.enable_grad():
        rows = reference.outputs(reference.tensors, inputs)
    normal = {
        layer.path: _normalised(reference.module, layer, seen[layer.path]) for layer in layers
    }
    flat = [probe for layer in layers for probe in probes[layer.path]]
    totals: Params = {}
    for direction in cotangents.to(rows.dtype):
        pulled = iter(
            torch.autograd.grad(
                rows, flat, direction, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )
        for layer in layers:
            calls = [(next(pulled), x) for x in normal[layer.path]]
            shape = reference.tensors[layer.weight].shape
            module = reference.module.get_submodule(layer.path)
            last = len(shape) if isinstance(module, nn.LayerNorm) else 0
            parts = {layer.weight: sum(_by_example(g * x, last) for g, x in calls)}
            if layer.bias is not None:
                parts[layer.bias] = sum(_by_example(g, last) for g, _ in calls)
            for name, part in parts.items():
                assert isinstance(part, Tensor)
                found = wide(part).square().sum(0, dtype=torch.float64).reshape(shape)
                totals[name] = totals[name] + found if name in totals else found
    return totals


def _candidates(module: nn.Module) -> Iterator[ScaleLayer]:
    known = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
    names = {id(p): name for name, p in module.named_parameters()}
    for path, part in module.named_modules():
        own = dict(part.named_parameters(recurse=False))
        if type(part) in known and "weight" in own:
            bias = own.get("bias")
            shift = None if bias is None else names[id(bias)]
            yield ScaleLayer(path, names[id(own["weight"])], shift)


def _normalised(module: nn.Module, layer: ScaleLayer, seen: list[Tensor]) -> list[Tensor]:
    """What the scale multiplies, call by call."""
    part = module.get_submodule(layer.path)
    plain = {
        name: torch.ones_like(p) if name == "weight" else torch.zeros_like(p)
        for name, p in part.named_parameters()
    }
    return [functional_call(part, plain, (x,)) for x in seen]


def _by_example(entries: Tensor, last: int) -> Float[Tensor, "B entries"]:
    """Sum over all axes but that of the examples and those of the parameter."""
    if last:
        return entries.reshape(len(entries), -1, entries.shape[-last:].numel()).sum(1)
    return entries.reshape(*entries.shape[:2], -1).sum(2)
