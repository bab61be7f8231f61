"""Random numbers of chains: a pure function of seed, chain and step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.runs.rng import stream

__all__ = ["ChainNoise", "Noise", "NoiseSize"]

_BLOCK_NUMBERS = 2**14  # a stream is opened for about so many numbers,
_MOST_STEPS = 64  # or this many steps


@dataclass(frozen=True)
class NoiseSize:
    """How many random numbers one step of one chain takes, whatever happens in it.

    Parameters
    ----------
    normals
        Standard normal, in the dtype of the kernel.
    uniforms
        Between 0 and 1, in float64: tails are reached through them.
    """

    normals: int = 0
    uniforms: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.normals + self.uniforms


@dataclass(frozen=True, eq=False)
class Noise:
    """The random numbers of one step.

    Parameters
    ----------
    normals
        ``(chains, normals)``.
    uniforms
        ``(chains, uniforms)`` float64, in ``[0, 1)``.
    """

    normals: Float[Tensor, "chains normals"]
    uniforms: Float[Tensor, "chains uniforms"]


class ChainNoise:
    """Noise for some chains of a run, the same whoever asks for it and in which order.

    Chain ``c`` has its numbers from streams of its own, so nothing depends on which chains run
    together, on how many processes there are, or on where a run was interrupted. One stream serves
    a fixed number of steps, because opening one costs more than the numbers of a small step.

    Parameters
    ----------
    seed
        Of the run.
    chains
        Numbers of the chains, one for each row.
    size
        Of one step.
    purpose
        Names the streams: runs of one seed and different purposes are independent.
    dtype
        Of the normal numbers.
    device
        Where they are made.
    """

    def __init__(
        self,
        seed: int,
        chains: range,
        size: NoiseSize,
        *,
        purpose: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._seed, self._chains, self._size, self._purpose = seed, chains, size, purpose
        self._dtype, self._device = dtype, device
        self._steps = max(1, min(_MOST_STEPS, _BLOCK_NUMBERS // max(size.total, 1)))
        self._block = -1
        self._normals = self._uniforms = torch.empty(0)

    def at(self, step: int) -> Noise:
        """The numbers of one step.

        Parameters
        ----------
        step
            From 0.

        Returns
        -------
        Noise
            For all chains.
        """
        block, offset = divmod(step, self._steps)
        if block != self._block:
            self._open(block)
        return Noise(self._normals[:, offset], self._uniforms[:, offset])

    def _open(self, block: int) -> None:
        shape = (len(self._chains), self._steps)
        self._normals = torch.empty(
            *shape, self._size.normals, dtype=self._dtype, device=self._device
        )
        self._uniforms = torch.empty(
            *shape, self._size.uniforms, dtype=torch.float64, device=self._device
        )
        for row, chain in enumerate(self._chains):
            generator = stream(self._seed, self._purpose, chain, block, device=self._device)
            self._normals[row].normal_(generator=generator)
            self._uniforms[row].uniform_(generator=generator)
        self._block = block
