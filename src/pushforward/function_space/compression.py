"""Smaller versions of a network: small weights set to 0, weights rounded to a few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from pushforward.errors import WeightsError
from pushforward.function_space.network import Other, unwrapped
from pushforward.options import number, whole_number
from pushforward.typing import Params

__all__ = ["prune_tensor", "pruned", "quantise_tensor", "quantised"]


def pruned(weights: Other, share: float) -> Params:
    """Weights of which the smallest are 0: magnitude pruning, in each tensor apart.

    Parameters
    ----------
    weights
        A network, or tensors by name.
    share
        Of the entries that become 0, from 0 to 1. Tensors with fewer than two axes (biases, the
        parameters of normalisation layers) and buffers stay as they are.

    Returns
    -------
    Params
        All tensors by name, detached; what is left alone shares its memory with `weights`. Pass
        them to `FunctionSummary.distance`, or to `torch.func.functional_call`.

    Raises
    ------
    OptionError
        For a share that is none.
    WeightsError
        For what is neither a network nor tensors by name.

    Examples
    --------
    >>> import torch
    >>> pruned({"weight": torch.tensor([[3.0, -1.0, 2.0, -4.0]])}, 0.5)["weight"]
    tensor([[ 3.,  0.,  0., -4.]])
    """
    share = number(share, "share", least=0, most=1)
    return _changed(weights, lambda tensor: prune_tensor(tensor, share))


def quantised(weights: Other, bits: int) -> Params:
    """Weights rounded to a symmetric grid, whose step is chosen for each tensor.

    With ``b`` bits the grid has the ``2^b - 1`` points from ``-m`` to ``m`` times the step, where
    ``m = 2^(b-1) - 1`` and the step is the largest magnitude in the tensor over ``m``.

    Parameters
    ----------
    weights
        A network, or tensors by name.
    bits
        From 2 to 16. Tensors with fewer than two axes and buffers stay as they are.

    Returns
    -------
    Params
        All tensors by name, detached, as floating-point numbers: the points of the grid, rounded to
        the type of the tensor. Half precision has fewer digits than a grid of more than 11 bits.

    Raises
    ------
    OptionError
        For another number of bits.
    WeightsError
        For what is neither a network nor tensors by name.

    Examples
    --------
    >>> import torch
    >>> quantised({"weight": torch.tensor([[3.0, -1.0, 1.6, 0.2]])}, 3)["weight"]
    tensor([[ 3., -1.,  2.,  0.]])
    """
    bits = whole_number(bits, "bits", least=2, most=16)
    return _changed(weights, lambda tensor: quantise_tensor(tensor, bits))


def prune_tensor(tensor: Tensor, share: float) -> Tensor:
    """Set the smallest entries to 0.

    Parameters
    ----------
    tensor
        Any; with fewer than two axes it is returned as it is.
    share
        Of the entries that become 0, rounded to whole entries; among equals the first.

    Returns
    -------
    Tensor
        Of the same shape.
    """
    count = round(share * tensor.numel())
    if tensor.dim() < 2 or count == 0:
        return tensor
    smallest = tensor.detach().abs().flatten().argsort(stable=True)[:count]
    return tensor.flatten().index_fill(0, smallest, 0.0).view_as(tensor)


def quantise_tensor(tensor: Tensor, bits: int) -> Tensor:
    """Round entries to the symmetric grid of `quantised`.

    Parameters
    ----------
    tensor
        Any; with fewer than two axes, or all 0, it is returned as it is.
    bits
        From 2 on.

    Returns
    -------
    Tensor
        Of the same shape.
    """
    if tensor.dim() < 2 or tensor.numel() == 0:
        return tensor
    # In double: the step of a tensor in half precision may be 0 there, and a number of steps large.
    entries = tensor.double()
    largest = entries.abs().max()
    if float(largest) == 0:
        return tensor
    most = 2 ** (bits - 1) - 1
    return ((entries / largest * most).round() / most * largest).to(tensor.dtype)


def _changed(weights: Other, change: Callable[[Tensor], Tensor]) -> Params:
    """Apply a change to every floating-point parameter.

    Returns
    -------
    Params
        All tensors, detached.

    Raises
    ------
    WeightsError
        For what are no weights.
    """
    if isinstance(weights, nn.Module):
        weights = unwrapped(weights)
        left = dict(weights.named_buffers())
        given: Params = {**dict(weights.named_parameters()), **left}
    elif isinstance(weights, Mapping) and all(isinstance(t, Tensor) for t in weights.values()):
        left, given = {}, dict(weights)
    else:
        raise WeightsError(
            f"got {type(weights).__name__}",
            where="weights",
            advice="Give a network, or its tensors by name.",
        )
    return {
        name: change(tensor.detach())
        if tensor.is_floating_point() and name not in left
        else tensor.detach()
        for name, tensor in given.items()
    }
