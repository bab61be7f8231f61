"""The networks that are moved, their data, training and accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from math import prod, sqrt
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pushforward.runs.rng import stream
from pushforward.typing import Params
from reproductions.datasets import load_images

__all__ = [
    "accuracy_of",
    "convolutional",
    "load_digits",
    "load_mnist",
    "perceptron",
    "train_by_adam",
]


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four fifths of scikit-learn's digits with labels, and the rest with theirs."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=stream(0, "digits", "split"))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    count = len(y) * 4 // 5
    return x[:count], y[:count], x[count:], y[count:]


def load_mnist(
    num_train: int, data_dir: Path | None, *, flat: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first training images with labels, and all test images with theirs."""
    train, test = (load_images("mnist", split, data_dir) for split in ("train", "test"))
    train = train.slice(0, num_train)
    rows = [part.inputs() for part in (train, test)]
    x, test_x = (part.flatten(1) for part in rows) if flat else rows
    return x, train.labels, test_x, test.labels


def perceptron(widths: Sequence[int], seed: int) -> nn.Module:
    """ReLU units between linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return initialised(nn.Sequential(*layers[:-1]), seed)


def convolutional(
    channels: tuple[int, int], pooling: Literal["max", "avg"], seed: int
) -> nn.Module:
    """Inputs 28 x 28, 12 x 12 behind the first convolution, 4 x 4 behind the second."""
    first, second = channels
    pool = nn.MaxPool2d if pooling == "max" else nn.AvgPool2d
    net = nn.Sequential(
        nn.Conv2d(1, first, 5, stride=2),
        nn.ReLU(),
        pool(2),
        nn.Conv2d(first, second, 3),
        nn.ReLU(),
        pool(2),
        nn.Flatten(),
        nn.Linear(4 * second, 10),
    )
    return initialised(net, seed)


def initialised(net: nn.Module, seed: int) -> nn.Module:
    """Weights uniform as PyTorch has them, from a stream of their own."""
    generator = stream(seed, "weights")
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                bound = 1 / sqrt(prod(layer.weight.shape[1:]))
                for p in layer.parameters():
                    p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) * bound)
    return net


def train_by_adam(
    net: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int, purpose: str
) -> None:
    """Train on batches of 64, drawn anew in every epoch."""
    optimiser = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    generator = stream(seed, purpose)
    batches: Iterator[Tensor] = iter(())
    for _ in range(steps):
        batch = next(batches, None)
        if batch is None or len(batch) < min(64, len(y)):
            batches = iter(torch.randperm(len(y), generator=generator).split(64))
            batch = next(batches)
        optimiser.zero_grad()
        functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimiser.step()


@torch.no_grad()
def accuracy_of(
    net: nn.Module, x: Tensor, y: Tensor, weights: Params | None = None
) -> dict[str, float]:
    """Share of labels that the network has right, with its own weights or with others."""
    rows = net(x) if weights is None else torch.func.functional_call(net, weights, (x,))
    return {"accuracy": float((rows.argmax(-1) == y).double().mean())}
