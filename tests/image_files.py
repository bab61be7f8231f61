"""Small data sets in the formats that the reproductions read."""

import io
from pathlib import Path

import numpy as np
import pytest

__all__ = ["colour_gradients", "write_cifar10", "write_mnist"]


def write_mnist(folder: Path, train: int, test: int) -> None:
    """Write digits: a bright square in the place of the class, on a dark noisy ground."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        labels = _labels(count)
        pixels = rng.integers(0, 40, size=(count, 28, 28)).astype(np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[2 + 8 * row : 9 + 8 * row, 7 * column : 7 + 7 * column] = 230
        arrays |= {f"x_{split}": pixels, f"y_{split}": labels}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "mnist.npz", **arrays)


def write_cifar10(folder: Path, train: int, test: int) -> None:
    """Write `colour_gradients`; skips the test without Pillow."""
    image_module = pytest.importorskip("PIL.Image")
    arrays = {}
    for seed, (split, count) in enumerate((("train", train), ("test", test))):
        files = []
        for image in colour_gradients(count, seed).astype(np.uint8):
            buffer = io.BytesIO()
            image_module.fromarray(image).save(buffer, "JPEG", quality=95)
            files.append(buffer.getvalue())
        arrays |= {
            f"jpeg_{split}": np.frombuffer(b"".join(files), np.uint8),
            f"offsets_{split}": np.cumsum([0, *map(len, files)]),
            f"y_{split}": _labels(count),
        }
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "cifar10_jpeg.npz", **arrays)


def colour_gradients(count: int, seed: int) -> np.ndarray:
    """Images ``(count, 32, 32, 3)`` of floats up to 255, which JPEG keeps almost unchanged."""
    ramp = np.linspace(0.0, 1.0, 32)
    corners = np.random.default_rng(seed).uniform(40.0, 215.0, size=(count, 2, 3))
    rows = (corners[:, :1] + (corners[:, 1:] - corners[:, :1]) * ramp[None, :, None])[:, None]
    return rows * np.ones((1, 32, 1, 1))


def _labels(count: int) -> np.ndarray:
    return (np.arange(count) % 10).astype(np.uint8)
