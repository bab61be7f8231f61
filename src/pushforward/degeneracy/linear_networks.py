"""Deep linear networks at weights of a given rank, whose learning coefficient is known."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.options import whole_number

__all__ = ["balanced_factors", "realised", "second_moments", "square_widths"]

_DEEP = 12  # parameters from which on there are three layers


def square_widths(num_parameters: int) -> tuple[int, ...]:
    """Two or three square layers with about so many weights.

    Parameters
    ----------
    num_parameters
        Wanted.

    Returns
    -------
    tuple of int
        Widths from inputs to outputs, all the same; three layers from 12 weights on.

    Raises
    ------
    OptionError
        For less than one.
    """
    advice = "Give the number of weights that are sampled, from 1 on."
    num_parameters = whole_number(num_parameters, "num_parameters", advice=advice)
    layers = 2 if num_parameters < _DEEP else 3
    width = max(1, round(sqrt(num_parameters / layers)))
    return (width,) * (layers + 1)


def balanced_factors(
    widths: tuple[int, ...], rank: int, generator: torch.Generator
) -> list[Float[Tensor, "_ _"]]:
    """Layers that share the singular values 1 ... 1/2 of their product evenly, in random bases.

    Parameters
    ----------
    widths
        From inputs to outputs.
    rank
        Of the product and of every layer.
    generator
        Of the bases.

    Returns
    -------
    list of Tensor
        ``(outputs, inputs)`` float64, in the order in which they act.
    """
    bases = [
        torch.linalg.qr(torch.randn(w, w, generator=generator, dtype=torch.float64))[0][:, :rank]
        for w in widths
    ]
    shares = torch.linspace(1.0, 0.5, rank, dtype=torch.float64) ** (1 / (len(widths) - 1))
    return [after * shares @ before.T for before, after in pairwise(bases)]


def realised(
    factors: list[Float[Tensor, "_ _"]], inputs: Float[Tensor, "N inputs"]
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The network, and inputs with its own outputs as targets.

    Parameters
    ----------
    factors
        Its layers, ``(outputs, inputs)`` in the order in which they act.
    inputs
        Their dtype and device become those of the network.

    Returns
    -------
    tuple
        Network in evaluation mode, and data.
    """
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=False) for w in factors]
    net = nn.Sequential(*layers).to(inputs)
    with torch.no_grad():
        for layer, weight in zip(layers, factors, strict=True):
            layer.weight.copy_(weight)
        return net.eval(), (inputs, net(inputs))


def second_moments(inputs: Float[Tensor, "N inputs"]) -> Float[Tensor, "few inputs"]:
    """As many examples as inputs, with the same matrix of second moments.

    Parameters
    ----------
    inputs
        At least as many examples as inputs.

    Returns
    -------
    Tensor
        ``(inputs, inputs)``: under squared error a linear network has the same mean loss on them.
    """
    count, width = inputs.shape
    _, values, directions = torch.linalg.svd(inputs, full_matrices=False)
    return sqrt(width / count) * values[:, None] * directions
