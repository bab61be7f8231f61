"""The scripts are imported from the root, and read a few synthetic images."""

from pathlib import Path

import pytest

from image_files import write_cifar10, write_mnist

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("PUSHFORWARD_DATA", raising=False)


@pytest.fixture
def mnist_folder(tmp_path):
    """A data folder with 64 and 32 digits."""
    write_mnist(tmp_path / "data", 64, 32)
    return tmp_path / "data"


@pytest.fixture
def image_folder(mnist_folder):
    """The same with as many colour images."""
    write_cifar10(mnist_folder, 64, 32)
    return mnist_folder
