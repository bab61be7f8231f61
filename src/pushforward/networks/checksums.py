"""Numbers that tell whether the tensors of a network have changed, computed where they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["checksums"]

_PIECE = 2**18  # numbers at a time
_WORDS = {1: torch.uint8, 2: torch.int16}  # by the size of an element; others are 32 bits or more
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, odd
_MIXER = 0xBF58476D1CE4E5B9 - 2**64  # of the splitmix64 generator, odd


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A number for each tensor that changes whenever its bits do.

    They are to be compared between two moments of one process. A cryptographic hash would do for
    files too, but is many times slower, and takes all weights to the CPU.

    Parameters
    ----------
    tensors
        By name, on any device. Those that are not dense are passed over.

    Returns
    -------
    dict
        The bits of a tensor in words of at most 32, times pseudo-random odd factors of 64, summed
        modulo ``2^64``: a change of one word is always seen, since its factor is odd; any other but
        with a probability of about ``2^-32``.
    """
    dense = {
        name: tensor.detach()
        for name, tensor in tensors.items()
        if tensor.layout is torch.strided and not tensor.is_quantized
    }
    factors: dict[torch.device, Tensor] = {}
    for device in {tensor.device for tensor in dense.values()}:
        words = [t.numel() * max(1, t.element_size() // 4) for t in dense.values()]
        factors[device] = _factors(min(_PIECE, max(words)), device)
    return {name: _checksum(tensor, factors[tensor.device]) for name, tensor in dense.items()}


def _factors(count: int, device: torch.device) -> Tensor:
    """Odd numbers of 64 bits without a pattern, ``(count,)``."""
    mixed = (torch.arange(count, device=device) + 1) * _GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * _MIXER
    return (mixed ^ (mixed >> 27)) | 1


def _checksum(tensor: Tensor, factors: Tensor) -> int:
    flat = tensor.resolve_conj().resolve_neg().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for piece in flat.view(_WORDS.get(tensor.element_size(), torch.int32)).split(_PIECE):
        total = total * _MIXER + (piece * factors[: len(piece)]).sum()
    return int(total)
