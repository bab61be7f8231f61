"""The scripts are imported from the root, and read a few synthetic images."""

from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN, TEST = 64, 32


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("PUSHFORWARD_DATA", raising=False)


@pytest.fixture
def mnist_folder(tmp_path):
    """A data folder: digits are a bright square in the place of their class."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = rng.integers(0, 40, size=(count, 28, 28)).astype(np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[2 + 8 * row : 9 + 8 * row, 7 * column : 7 + 7 * column] = 230
        arrays |= {f"x_{split}": pixels, f"y_{split}": labels}
    data = tmp_path / "data"
    data.mkdir()
    np.savez(data / "mnist.npz", **arrays)
    return data
