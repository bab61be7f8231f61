"""Deep linear networks at chosen ranks, and what is known of them exactly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

__all__ = ["INPUT_VARIANCE", "exact_quadratic", "linear_network", "stand_ins"]

INPUT_VARIANCE = 100 / 3  # of the uniform law on [-10, 10]
_DENSE_OUTPUTS = 2500  # up to which all curvatures are computed


def linear_network(
    widths: Sequence[int], ranks: Sequence[int], generator: torch.Generator
) -> nn.Sequential:
    """Gaussian factors that keep the size of what passes, cut to their ranks."""
    layers = [
        nn.Linear(i, o, bias=False, dtype=torch.float64) for i, o in itertools.pairwise(widths)
    ]
    with torch.no_grad():
        for layer, rank in zip(layers, ranks, strict=True):
            weight = layer.weight
            drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.copy_(_of_rank(drawn / sqrt(weight.shape[1]), rank))
    return nn.Sequential(*layers)


def stand_ins(widths: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Factors whose partial products have the ranks that generic factors of these ranks have.

    Those are the least on the way; the products of many Gaussian factors are too ill-conditioned
    to be told so.

    Returns
    -------
    list of Tensor
        Parts of identities.
    """
    pairs = zip(itertools.pairwise(widths), ranks, strict=True)
    return [_of_rank(torch.eye(o, i), rank) for (i, o), rank in pairs]


def _of_rank(matrix: Tensor, rank: int) -> Tensor:
    if rank == min(matrix.shape):
        return matrix
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def exact_quadratic(net: nn.Sequential, nbeta: float, localization: float) -> float | None:
    """``1/2 sum n beta h / (n beta h + gamma)`` from all curvatures of the loss at the weights.

    Without noise the Hessian is ``2 v / outputs J'J``, ``J`` the Jacobian of the product of the
    factors and ``v`` the variance of the inputs; ``JJ'`` is a sum of Kronecker products.

    Returns
    -------
    float or None
        None where the matrix is too large.
    """
    factors = [layer.weight.detach() for layer in net if isinstance(layer, nn.Linear)]
    outputs, inputs = factors[-1].shape[0], factors[0].shape[1]
    if outputs * inputs > _DENSE_OUTPUTS:
        return None
    # Products of what comes before and after each factor.
    before = [torch.eye(inputs, dtype=torch.float64)]
    after = [torch.eye(outputs, dtype=torch.float64)]
    for factor, last in zip(factors[:-1], reversed(factors[1:]), strict=True):
        before.append(factor @ before[-1])
        after.append(after[-1] @ last)
    gram = torch.zeros(outputs * inputs, outputs * inputs, dtype=torch.float64)
    for first, second in zip(before, reversed(after), strict=True):
        gram += torch.kron(second @ second.mT, first.mT @ first)
    curvatures = torch.linalg.eigvalsh(gram).clamp(min=0) * 2 * INPUT_VARIANCE / outputs
    return float(0.5 * (nbeta * curvatures / (nbeta * curvatures + localization)).sum())
