"""SGD and entropy-SGD, as Lau, Murfet and Wei (arXiv 2308.12108) train with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pushforward.runs.rng import stream

__all__ = ["entropy_sgd", "minibatch_gradients", "sgd"]


def minibatch_gradients(
    net: nn.Module, x: Tensor, y: Tensor, size: int, seed: int
) -> Callable[[], Tensor]:
    """Gradients from one minibatch after the other, epoch after epoch."""
    generator = stream(seed, "batches")

    def chosen() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(len(y), generator=generator).split(size)

    batches = chosen()

    def gradient() -> Tensor:
        batch = next(batches)
        loss = functional.cross_entropy(net(x[batch]), y[batch])
        return parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))

    return gradient


def sgd(
    net: nn.Module,
    gradient: Callable[[], Tensor],
    steps: int,
    rate: float,
    momentum: float,
    seed: int,  # noqa: ARG001
) -> None:
    """Stochastic gradient descent with Nesterov's momentum."""
    place = parameters_to_vector(net.parameters()).detach()
    velocity = torch.zeros_like(place)
    for _ in range(steps):
        slope = gradient()
        velocity = momentum * velocity + slope
        place = place - rate * (slope + momentum * velocity)
        vector_to_parameters(place, net.parameters())


def entropy_sgd(
    net: nn.Module,
    gradient: Callable[[], Tensor],
    steps: int,
    rate: float,
    momentum: float,
    seed: int,
    *,
    inner: int = 5,
    inner_rate: float = 0.1,
    scope: float = 1e-4,
    growth: float = 1e-3,
    noise: float = 1e-4,
    memory: float = 0.75,
) -> None:
    """Descent on the local entropy (Chaudhari et al., arXiv 1611.01838).

    Every step is towards ``mu``, a running mean of `inner` steps of Langevin dynamics that a spring
    of strength ``scope (1 + growth)^t`` holds. Constants are those of Lau, Murfet and Wei, and so
    is the momentum, in both loops: the inner one begins anew at every step, without Nesterov's
    correction. The number of gradients is that of SGD.
    """
    place = parameters_to_vector(net.parameters()).detach()
    velocity, generator = torch.zeros_like(place), stream(seed, "entropy-SGD")
    for step in range(steps // inner):
        away, centre, inner_velocity = place, place, torch.zeros_like(place)
        for _ in range(inner):
            vector_to_parameters(away, net.parameters())
            inner_velocity = momentum * inner_velocity + gradient()
            spring = scope * (1 + growth) ** step * (place - away)
            shake = torch.randn(place.shape, generator=generator)
            away = away - inner_rate * (inner_velocity - spring)
            away = away + sqrt(inner_rate) * noise * shake
            centre = (1 - memory) * centre + memory * away
        velocity = momentum * velocity + (place - centre)
        place = place - rate * velocity
        vector_to_parameters(place, net.parameters())
