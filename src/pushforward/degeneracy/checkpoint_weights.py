"""Weights of a checkpoint, from a state dict, a module or a file, into a copy of a network."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pushforward.errors import NetworkError, WeightsError

__all__ = ["Label", "Weights", "check_weights", "loaded"]

Label: TypeAlias = str | int | float
"""What a checkpoint is called: a step of the training, or a name."""

Weights: TypeAlias = Mapping[str, Tensor] | str | os.PathLike[str] | nn.Module
"""A state dict, a file of the format safetensors, or a module whose state dict is meant."""

_Shape: TypeAlias = tuple[int, ...]
_T = TypeVar("_T")
_ADVICE = "Give checkpoints of the very network that is passed: the same names and shapes."


def check_weights(net: nn.Module, label: Label, weights: Weights) -> None:
    """Whether a network can take these weights; of a file only the header is read.

    Parameters
    ----------
    net
        Whose names and shapes count.
    label
        Of the checkpoint, for messages.
    weights
        Its weights.

    Raises
    ------
    WeightsError
        When the file cannot be read, or a parameter is missing, unknown or of another shape: the
        message names checkpoint and parameter.
    """
    where = f"checkpoint {label!r}"
    shapes = _shapes(weights, where)
    state = net.state_dict()
    given = {_place(state[name]) for name in shapes if name in state}
    for name, tensor in state.items():
        if name not in shapes:
            if _place(tensor) not in given:  # tied weights are enough once
                raise WeightsError("it is missing", where=f"{where}, {name}", advice=_ADVICE)
        elif shapes[name] != tuple(tensor.shape):
            raise WeightsError(
                f"it has shape {shapes[name]} instead of {tuple(tensor.shape)}",
                where=f"{where}, {name}",
                advice=_ADVICE,
            )
    for name in shapes:
        if name not in state:
            raise WeightsError(
                f"{type(net).__name__} has no such parameter or buffer",
                where=f"{where}, {name}",
                advice=_ADVICE,
            )


def loaded(net: nn.Module, label: Label, weights: Weights) -> nn.Module:
    """A copy of a network with the weights of a checkpoint.

    Parameters
    ----------
    net
        Not changed. The copy is in the same mode, on the same device, of the same dtypes.
    label
        Of the checkpoint, for messages.
    weights
        Its weights.

    Returns
    -------
    nn.Module
        Sharing nothing with `net` nor with `weights`.

    Raises
    ------
    WeightsError
        As `check_weights`.
    NetworkError
        For weights that are not finite.
    """
    check_weights(net, label, weights)
    tensors = _tensors(weights, f"checkpoint {label!r}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NetworkError(
                "it holds NaN or infinite entries",
                where=f"checkpoint {label!r}, {name}",
                advice="Leave this checkpoint out: training had diverged.",
            )
    found = copy.deepcopy(net)
    found.load_state_dict(tensors, strict=False)  # checked above, ties allowed
    return found


def _shapes(weights: Weights, where: str) -> dict[str, _Shape]:
    if isinstance(weights, str | os.PathLike):
        return _read(weights, where, lambda file, key: tuple(file.get_slice(key).get_shape()))
    return {name: tuple(tensor.shape) for name, tensor in _tensors(weights, where).items()}


def _tensors(weights: Weights, where: str) -> dict[str, Tensor]:
    if isinstance(weights, str | os.PathLike):
        return _read(weights, where, lambda file, key: file.get_tensor(key))
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    wanted = isinstance(state, Mapping) and all(isinstance(x, Tensor) for x in state.values())
    if not wanted:
        raise WeightsError(
            f"{type(weights).__name__} holds no weights",
            where=where,
            advice="Give a state dict, the path of a safetensors file, or a module.",
        )
    return {name: tensor.detach() for name, tensor in state.items()}


def _read(
    path: str | os.PathLike[str], where: str, get: Callable[[safe_open, str], _T]
) -> dict[str, _T]:
    where = f"{where}, {Path(path)}"
    try:
        with safe_open(path, framework="pt") as file:
            return {key: get(file, key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError as error:
        raise WeightsError("no such file", where=where, advice="Check the path.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"not a complete safetensors file ({error})",
            where=where,
            advice="Write it with safetensors.torch.save_file(net.state_dict(), path); other "
            "formats, pickles included, are not read.",
        ) from error


def _place(tensor: Tensor) -> tuple[int, _Shape, _Shape]:
    """Memory behind a tensor: equal for tied weights."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
