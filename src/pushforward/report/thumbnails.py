"""Tiny pictures of inputs for a table, as PNG within the page."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import ShapeError

__all__ = ["thumbnails"]

_LARGEST_SIDE = 64  # pixels
_COLOUR_TYPES = {1: 0, 3: 2}  # of the PNG format, by number of channels


def thumbnails(
    examples: Float[Tensor, " N *shape"], image_shape: Sequence[int] = ()
) -> list[str] | None:
    """Inputs as pictures, if that is what they are.

    Parameters
    ----------
    examples
        ``(N, height, width)`` or ``(N, channels, height, width)`` with one or three channels, or
        anything that has as many entries as `image_shape`.
    image_shape
        Shape of one picture, such as ``(8, 8)`` or ``(3, 32, 32)``; default as the examples have
        it.

    Returns
    -------
    list of str or None
        A ``data:`` URI each, from the smallest entry (black) to the largest (white) of all of them;
        None when the examples are no pictures.

    Raises
    ------
    ShapeError
        When `image_shape` is no shape of a picture, or has another number of entries.
    """
    shape = tuple(image_shape) or tuple(examples.shape[1:])
    fits = len(shape) == 2 or (len(shape) == 3 and shape[0] in _COLOUR_TYPES)
    if not image_shape and not fits:
        return None
    if not fits or math.prod(shape) != math.prod(examples.shape[1:]):
        raise ShapeError(
            f"{shape} is no shape of a picture with {math.prod(examples.shape[1:])} entries",
            where="image_shape",
            advice="Give (height, width) or (channels, height, width) with 1 or 3 channels.",
        )
    if not len(examples):
        return []
    pictures = examples.detach().double().cpu().reshape(len(examples), -1, *shape[-2:])
    step = math.ceil(max(shape[-2:]) / _LARGEST_SIDE)
    pictures = pictures[:, :, ::step, ::step]
    low, high = pictures.min(), pictures.max()
    grey = (pictures - low) / (high - low) if bool(high > low) else torch.zeros_like(pictures)
    return [_data_uri(picture) for picture in (255 * grey).round().to(torch.uint8)]


def _data_uri(picture: Tensor) -> str:
    """``(channels, height, width)`` bytes as PNG in base 64.

    Returns
    -------
    str
        For the ``src`` of an image.
    """
    channels, height, width = picture.shape
    rows = picture.permute(1, 2, 0).reshape(height, width * channels).numpy()
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    # Each row of pixels is preceded by the number of its filter: none.
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows), 9)
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", pixels), _chunk(b"IEND", b""))
    encoded = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return f"data:image/png;base64,{encoded.decode()}"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
