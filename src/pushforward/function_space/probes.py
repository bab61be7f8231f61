"""Perturbed weights on which estimators are tried while the data are still there.

They depend on the reference weights alone, so that everyone who holds a summary can make them
again: only the true distances have to be kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pushforward.function_space.compression import prune_tensor, quantise_tensor
from pushforward.function_space.network import ReferenceNetwork
from pushforward.runs.rng import stream
from pushforward.typing import Params

__all__ = ["NUM_PROBES", "PROBE_NAMES", "probe"]

_NOISE = (0.05, 0.2)  # norm of the change of a tensor over that of the tensor
_ROTATION = (0.1, 0.7)
_PRUNED = (0.3, 0.6)  # share of a tensor that is set to 0, smallest entries first
_BITS = (4.0, 6.0)  # of a symmetric quantisation
PROBE_NAMES = (
    *(f"noise of {100 * size:.0f} %" for size in _NOISE),
    *(f"mixed inputs, {100 * size:.0f} %" for size in _ROTATION),
    *(f"{100 * share:.0f} % pruned" for share in _PRUNED),
    *(f"{bits:.0f} bits" for bits in _BITS),
)
"""What each of them does to every tensor of weights."""
NUM_PROBES = len(PROBE_NAMES)
"""How many there are."""


def probe(reference: ReferenceNetwork, number: int) -> Params:
    """Weights near those of the reference: noise, mixed inputs, pruning, quantisation.

    Parameters
    ----------
    reference
        The network.
    number
        From 0 to `NUM_PROBES` - 1.

    Returns
    -------
    Params
        All tensors of the reference; buffers and vectors are left alone by pruning and
        quantisation.
    """
    kinds: list[tuple[Callable[[Tensor, float, torch.Generator], Tensor], float]] = []
    kinds += [(_noisy, size) for size in _NOISE] + [(_mixed, size) for size in _ROTATION]
    kinds += [(_pruned, share) for share in _PRUNED] + [(_quantised, bits) for bits in _BITS]
    change, size = kinds[number]
    generator = stream(0, "function-space probes", number)
    tensors = {}
    for name, tensor in reference.tensors.items():
        uncertain = name in reference.parameter_names and tensor.is_floating_point()
        tensors[name] = change(tensor, size, generator) if uncertain else tensor
    return tensors


def _normals(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def _noisy(tensor: Tensor, size: float, generator: torch.Generator) -> Tensor:
    noise = _normals(tensor.shape, tensor, generator)
    return tensor + size * tensor.norm() / noise.norm().clamp(min=1e-30) * noise


def _mixed(tensor: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Inputs of a layer are mixed by one random direction: a coherent change, as training makes."""
    if tensor.dim() < 2:
        return _noisy(tensor, size, generator)
    rows = tensor.flatten(1)
    into = _normals(torch.Size((rows.shape[1],)), tensor, generator)
    change = torch.outer(rows @ into, into)
    return tensor + (size * rows.norm() / change.norm().clamp(min=1e-30) * change).view_as(tensor)


def _pruned(tensor: Tensor, share: float, generator: torch.Generator) -> Tensor:
    del generator
    return prune_tensor(tensor, share)


def _quantised(tensor: Tensor, bits: float, generator: torch.Generator) -> Tensor:
    del generator
    return quantise_tensor(tensor, int(bits))
