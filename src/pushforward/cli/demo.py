"""The networks of the demonstration: a classifier of digits, trained in seconds; a small one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from pushforward.errors import DataError, OptionError

__all__ = [
    "COMPRESSION",
    "DEGENERACY",
    "THERMALIZATION",
    "DigitsRun",
    "digits_classifier",
    "prepare_digits",
    "small_network",
]

COMPRESSION = ("--prune", "0.3", "0.5", "0.7", "--quantise", "8", "4")
"""Options of the report for its section on how far smaller versions of the classifier are."""

DEGENERACY = ("--degeneracy", "langevin", "--localization", "100")
"""Options of the report for its section on how degenerate the classifier is."""

THERMALIZATION = (
    *("thermalize", "pushforward.cli.demo:small_network", "--likelihood", "gaussian"),
    *("--standard", "4", "--count", "20", "--noise", "0.5", "--budget", "400"),
)
"""Arguments of the command that tests a sampler in seconds."""

_PIXELS, _CLASSES, _BRIGHTEST = 64, 10, 16.0
_TEST_SHARE = 0.25
_BATCH = 64
_LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class DigitsRun:
    """What training left behind.

    Parameters
    ----------
    weights, data
        Files: ``model.safetensors`` and ``digits.npz``.
    train, validation, test
        Files with the digits it was trained on, and two parts of those held out.
    accuracy
        Share of the held-out digits that are classified correctly.
    num_test
        How many were held out.
    """

    weights: Path
    data: Path
    train: Path
    validation: Path
    test: Path
    accuracy: float
    num_test: int


def digits_classifier(width: int = 64) -> nn.Module:
    """A ReLU network with two hidden layers for 8 x 8 images of digits.

    Parameters
    ----------
    width
        Units in each hidden layer.

    Returns
    -------
    nn.Module
        64 pixels in, 10 logits out.
    """
    return nn.Sequential(
        nn.Linear(_PIXELS, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, _CLASSES),
    )


def small_network(width: int = 4) -> nn.Module:
    """A ReLU network with one hidden layer, whose posterior chains reach in seconds.

    Parameters
    ----------
    width
        Units in the hidden layer.

    Returns
    -------
    nn.Module
        4 numbers in, one out.
    """
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))


def prepare_digits(folder: Path, *, seed: int = 0, epochs: int = 30) -> DigitsRun:
    """Train the classifier on scikit-learn's digits, and save its weights and the data.

    Parameters
    ----------
    folder
        Where the files go; made when it does not exist.
    seed
        Of the split, the initial weights and the order of the examples.
    epochs
        Passes over the training data.

    Returns
    -------
    DigitsRun
        Files and accuracy.

    Raises
    ------
    OptionError
        When the files cannot be written.
    """
    pixels, targets = _digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pixels), generator=generator)
    num_test = round(_TEST_SHARE * len(order))
    test, train = order[:num_test], order[num_test:]
    net = digits_classifier()
    _initialise(net, generator)
    with _one_thread():
        _train(net, pixels[train], targets[train], generator, epochs)
    with torch.no_grad():
        correct = net(pixels[test]).argmax(1) == targets[test]
    weights, data = folder / "model.safetensors", folder / "digits.npz"
    third = num_test // 3
    files = [folder / f"{name}.npz" for name in ("train", "validation", "test")]
    parts = (train, test[:third], test[third:])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, weights)
        np.savez_compressed(data, x=pixels.numpy(), y=targets.numpy())
        for path, chosen in zip(files, parts, strict=True):
            np.savez_compressed(path, x=pixels[chosen].numpy(), y=targets[chosen].numpy())
    except OSError as error:
        raise OptionError(
            f"the files of the demonstration cannot be written ({error.strerror or error})",
            where=str(folder),
            advice="Choose a folder that you may write to.",
        ) from error
    return DigitsRun(
        weights, data, files[0], files[1], files[2], float(correct.double().mean()), num_test
    )


def _digits() -> tuple[Float[Tensor, "N D"], Int[Tensor, " N"]]:
    """The images scaled to [0, 1], and their digits.

    Returns
    -------
    tuple
        Float32 and int64.

    Raises
    ------
    DataError
        Without scikit-learn, which ships the data.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "scikit-learn, which ships the handwritten digits, is not installed",
            where="pushforward demo",
            advice="Install it with: pip install 'pushforward[demo]'.",
        ) from error
    digits = load_digits()
    pixels = torch.tensor(digits.data / _BRIGHTEST, dtype=torch.float32)
    return pixels, torch.tensor(digits.target, dtype=torch.int64)


def _initialise(net: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights from `generator` rather than from PyTorch's global one."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.uniform_(module.bias, -bound, bound, generator=generator)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small only wait for each other when several threads share them.

    Yields
    ------
    None
        While PyTorch uses one thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(
    net: nn.Module, pixels: Tensor, targets: Tensor, generator: torch.Generator, epochs: int
) -> None:
    optimiser = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
    for _ in range(epochs):
        for batch in torch.randperm(len(pixels), generator=generator).split(_BATCH):
            optimiser.zero_grad()
            functional.cross_entropy(net(pixels[batch]), targets[batch]).backward()
            optimiser.step()
    net.eval()
