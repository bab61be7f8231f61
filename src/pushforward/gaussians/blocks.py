"""How much of a long elementwise expression on large operands to compute at a time."""

from __future__ import annotations

import torch

__all__ = ["block_elements"]


def block_elements(device: torch.device) -> int:
    """Entries of one temporary of a long elementwise expression.

    On a CPU 8192 float64 entries are 64 KiB: several temporaries fit the second-level cache, and
    none of them is large enough for the allocator to hand back to the system after each operation.
    An accelerator wants few large kernels instead.

    Parameters
    ----------
    device
        Where the computation runs.

    Returns
    -------
    int
        Number of entries.
    """
    return 1 << 13 if device.type == "cpu" else 1 << 22
