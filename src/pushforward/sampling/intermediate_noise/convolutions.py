"""Convolutions and average pooling as matrices: patches, their Gram matrices, adjoints.

Everything is written with patches (``torch.nn.functional.unfold``): the convolution of many chains,
each with weights of its own, is then a batch of matrix products, as are the sums over examples and
positions that the law of the weights needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from pushforward.errors import NetworkError

__all__ = ["Convolution", "block_means", "spread_blocks"]

_CHUNK_ELEMENTS = 2**22  # of patches held at once: 32 MB


@dataclass(frozen=True)
class Convolution:
    """The geometry of a two-dimensional convolution; filters are ``(*lead, out, in, kh, kw)``.

    Parameters
    ----------
    kernel, stride, padding
        Rows and columns; padding is with zeros.
    input_shape
        ``(channels, height, width)``.
    channels
        Of the output.

    Raises
    ------
    NetworkError
        When the kernel is larger than the padded image.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    input_shape: tuple[int, int, int]
    channels: int

    def __post_init__(self) -> None:
        if min(self.output_shape) < 1:
            raise NetworkError(
                f"a kernel {self.kernel} does not fit into images {self.input_shape} with "
                f"padding {self.padding}",
                where="convolution",
                advice="Use a smaller kernel, more padding or larger images.",
            )

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        rows, columns = (
            (size + 2 * pad - kernel) // stride + 1
            for size, pad, kernel, stride in zip(
                self.input_shape[1:], self.padding, self.kernel, self.stride, strict=True
            )
        )
        return self.channels, rows, columns

    @property
    def positions(self) -> int:
        """Places where the filters are put."""
        return math.prod(self.output_shape[1:])

    @property
    def patch(self) -> int:
        """Entries of a filter: ``in * kh * kw``."""
        return self.input_shape[0] * math.prod(self.kernel)

    def patches(self, images: Float[Tensor, "*lead c h w"]) -> Float[Tensor, "*lead q positions"]:
        """What the filters see at each position.

        Parameters
        ----------
        images
            ``(*lead, channels, height, width)``.

        Returns
        -------
        Tensor
            ``(*lead, patch, positions)``.
        """
        lead = images.shape[:-3]
        flat = images.reshape(-1, *self.input_shape)
        unfolded = functional.unfold(flat, self.kernel, padding=self.padding, stride=self.stride)
        return unfolded.reshape(*lead, self.patch, self.positions)

    def apply(
        self, images: Float[Tensor, "*lead c h w"], weight: Tensor
    ) -> Float[Tensor, "*result out i j"]:
        """The convolution without bias.

        Parameters
        ----------
        images
            ``(*lead, examples, channels, height, width)``.
        weight
            ``(*lead, out, in, kh, kw)``.

        Returns
        -------
        Tensor
            ``(*lead, examples, *output_shape)``.
        """
        rows = self._rows(weight)
        pieces = [rows @ self.patches(part) for part in self._chunks(images)]
        joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -3)
        return joined.reshape(*joined.shape[:-2], *self.output_shape)

    def adjoint(
        self, outputs: Float[Tensor, "*lead out i j"], weight: Tensor
    ) -> Float[Tensor, "*result c h w"]:
        """The transpose of `apply` as a map of the images.

        Parameters
        ----------
        outputs
            ``(*lead, examples, *output_shape)``.
        weight
            ``(*lead, out, in, kh, kw)``.

        Returns
        -------
        Tensor
            ``(*lead, examples, channels, height, width)``.
        """
        columns = self._rows(weight).mT @ outputs.flatten(-2)
        folded = functional.fold(
            columns.reshape(-1, self.patch, self.positions),
            self.input_shape[1:],
            self.kernel,
            padding=self.padding,
            stride=self.stride,
        )
        return folded.reshape(*columns.shape[:-2], *self.input_shape)

    def gram(
        self, images: Float[Tensor, "*lead n c h w"], bias: bool
    ) -> Float[Tensor, "*lead q q"]:
        """Products of all pairs of patch entries, summed over examples and positions, in float64.

        Parameters
        ----------
        images
            ``(*lead, examples, channels, height, width)``.
        bias
            Whether a constant entry 1 comes first.

        Returns
        -------
        Tensor
            ``(*lead, q, q)`` with ``q = bias + patch``; patches of few examples are held at once.
        """
        size = self.patch + bias
        total = images.new_zeros(*images.shape[:-4], size, size, dtype=torch.float64)
        for part in self._chunks(images):
            patches = self.patches(part).double()
            total[..., bias:, bias:] += (patches @ patches.mT).sum(-3)
            if bias:
                total[..., 0, 1:] += patches.sum((-3, -1))
        if bias:
            total[..., 1:, 0] = total[..., 0, 1:]
            total[..., 0, 0] = images.shape[-4] * self.positions
        return total

    def cross(
        self,
        images: Float[Tensor, "*lead n c h w"],
        outputs: Float[Tensor, "*chains n out i j"],
        bias: bool,
    ) -> Float[Tensor, "*chains q out"]:
        """Products of patch entries and outputs, summed over examples and positions, in float64.

        Parameters
        ----------
        images
            ``(*lead, examples, channels, height, width)``; without the axis of the chains when they
            share the images.
        outputs
            ``(chains, examples, *output_shape)``.
        bias
            Whether a constant entry 1 comes first.

        Returns
        -------
        Tensor
            ``(chains, q, out)``.
        """
        size = self.patch + bias
        total = outputs.new_zeros(*outputs.shape[:-4], size, self.channels, dtype=torch.float64)
        if bias:
            total[..., 0, :] = outputs.sum((-4, -2, -1), dtype=torch.float64)
        start = 0
        for part in self._chunks(images, math.prod(outputs.shape[:-4])):
            stop = start + part.shape[-4]
            image = outputs[..., start:stop, :, :, :].flatten(-2)
            total[..., bias:, :] += (self.patches(part) @ image.mT).sum(-3, dtype=torch.float64)
            start = stop
        return total

    def dense(self, weight: Tensor) -> Float[Tensor, "*lead o i"]:
        """The matrix of the convolution: flat outputs by flat inputs.

        Parameters
        ----------
        weight
            ``(*lead, out, in, kh, kw)``.

        Returns
        -------
        Tensor
            ``(*lead, outputs, inputs)``.
        """
        size = math.prod(self.input_shape)
        basis = torch.eye(size, dtype=weight.dtype, device=weight.device)
        basis = basis.reshape(size, *self.input_shape)
        lead = weight.shape[:-4]
        images = self.apply(basis.expand(*lead, *basis.shape), weight)
        return images.flatten(-3).mT

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.flatten(-3).unsqueeze(-3)

    def _chunks(self, images: Tensor, copies: int = 1) -> Iterator[Tensor]:
        """The images in portions whose patches fit; products are `copies` times as large."""
        each = max(1, math.prod(images.shape[:-4]), copies) * self.patch * self.positions
        return iter(images.split(max(1, _CHUNK_ELEMENTS // each), -4))


def block_means(
    images: Float[Tensor, "*lead h w"], kernel: tuple[int, int]
) -> Float[Tensor, "*lead i j"]:
    """Averages over adjacent blocks; pixels beyond the last whole block are left out.

    Parameters
    ----------
    images
        ``(*lead, height, width)``.
    kernel
        Height and width of a block.

    Returns
    -------
    Tensor
        ``(*lead, height // kh, width // kw)``.
    """
    return _blocks(images, kernel).mean((-3, -1))


def spread_blocks(
    blocks: Float[Tensor, "*lead i j"], kernel: tuple[int, int], size: tuple[int, int]
) -> Float[Tensor, "*lead h w"]:
    """Each value at all pixels of its block, zero at pixels beyond the last whole block.

    Parameters
    ----------
    blocks
        ``(*lead, rows, columns)``.
    kernel
        Height and width of a block.
    size
        Height and width of the images.

    Returns
    -------
    Tensor
        ``(*lead, height, width)``.
    """
    rows, columns = blocks.shape[-2:]
    shape = (*blocks.shape[:-2], rows, kernel[0], columns, kernel[1])
    spread = blocks[..., :, None, :, None].expand(shape)
    spread = spread.reshape(*blocks.shape[:-2], rows * kernel[0], columns * kernel[1])
    return functional.pad(spread, (0, size[1] - columns * kernel[1], 0, size[0] - rows * kernel[0]))


def _blocks(images: Tensor, kernel: tuple[int, int]) -> Tensor:
    rows, columns = (size // width for size, width in zip(images.shape[-2:], kernel, strict=True))
    whole = images[..., : rows * kernel[0], : columns * kernel[1]]
    return whole.reshape(*images.shape[:-2], rows, kernel[0], columns, kernel[1])
