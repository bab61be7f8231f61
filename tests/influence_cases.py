"""A small trained network, the same for the oracle, and a distance over its data."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from oracles.proximal_response import TanhNetwork
from pushforward.function_space.metrics import discrepancy
from pushforward.function_space.network import ReferenceNetwork

__all__ = ["Case", "Exact", "PlainZero", "trained"]


class Exact:
    """Mean discrepancy over the data."""

    def __init__(self, net, x):
        self.reference = ReferenceNetwork.of(net, tuple(x.shape[1:]))
        self.x = x
        self.num_examples = len(x)

    def distance(self, other, *, metric):
        tensors = self.reference.tensors_of(other)
        old = self.reference.outputs(self.reference.tensors, self.x).detach()
        return discrepancy(old, self.reference.outputs(tensors, self.x), metric).mean()


class PlainZero(Exact):
    """At the reference a zero without a graph."""

    def distance(self, other, *, metric):
        tensors = self.reference.tensors_of(other)
        if self.reference.unchanged(tensors):
            return sum((t * 0).sum() for t in tensors.values())
        return super().distance(other, metric=metric)


@dataclass(frozen=True)
class Case:
    loss: str
    metric: str
    net: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    measure: Any
    oracle: TanhNetwork
    vector: np.ndarray

    @property
    def pairs(self):
        ys = self.y.numpy() if self.loss == "squared" else self.y.tolist()
        return list(zip(self.x.numpy(), ys, strict=True))


@lru_cache
def _weights(loss, outputs):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(24, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(24, outputs, generator=generator, dtype=torch.float64)
    values = torch.stack([x[:, 0] * x[:, 1], x.sum(1), -x[:, 2]], 1)[:, :outputs] + 0.3 * noise
    y = values if loss == "squared" else values.argmax(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    measured = nn.functional.mse_loss if loss == "squared" else nn.functional.cross_entropy
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(300):
        optimiser.zero_grad()
        measured(net(x), y).backward()
        optimiser.step()
    return x, y, {n: p.detach().clone() for n, p in net.named_parameters()}


def trained(loss):
    """3-4-2 for squared loss, 3-4-3 for cross-entropy; a fresh module every time."""
    outputs = 2 if loss == "squared" else 3
    x, y, weights = _weights(loss, outputs)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    net.load_state_dict(weights)
    vector = np.concatenate([p.numpy().ravel() for p in weights.values()])
    metric = "euclidean" if loss == "squared" else "fisher"
    return Case(
        loss,
        metric,
        net,
        x.clone(),
        y.clone(),
        Exact(net, x.clone()),
        TanhNetwork(3, 4, outputs),
        vector,
    )
