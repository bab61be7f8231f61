"""The classifiers of the studies."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import sqrt

import torch
from torch import nn

from pushforward.runs.rng import stream

__all__ = ["perceptron"]


def perceptron(widths: Sequence[int], seed: int) -> nn.Sequential:
    """ReLU units, weights uniform as PyTorch has them, from a stream of its own."""
    generator = stream(seed, "weights")
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) / sqrt(inputs))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
