"""Traces of functions of a symmetric matrix from its products: stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.linalg.blocks import inner

__all__ = ["quadratic_forms", "quadrature", "tridiagonalise"]


def tridiagonalise(
    product: Callable[[Tensor], Tensor], start: Float[Tensor, "K P"], steps: int
) -> tuple[Float[Tensor, "K steps"], Float[Tensor, "K steps"]]:
    """Lanczos' recurrence for each row: the tridiagonal matrices that the matrix becomes.

    Parameters
    ----------
    product
        A symmetric matrix times each row.
    start
        ``(K, P)``, not zero.
    steps
        Products to spend.

    Returns
    -------
    tuple
        Diagonals ``(K, steps)`` and the entries beside them, ``(K, steps)`` (the last one is not
        used), float64. Without reorthogonalisation: extreme eigenvalues may appear twice, which
        does not harm the quadrature.
    """
    current = start / inner(start, start).sqrt().to(start.dtype)[:, None]
    before, beside = torch.zeros_like(current), torch.zeros_like(current[:, 0]).double()
    diagonals: list[Tensor] = []
    offdiagonals: list[Tensor] = []
    for _ in range(steps):
        image = product(current)
        diagonal = inner(image, current)
        if diagonals:  # a space that is exhausted repeats a node, with weight zero
            diagonal = torch.where(beside > 0, diagonal, diagonals[0])
        image = image - diagonal.to(image.dtype)[:, None] * current
        image = image - beside.to(image.dtype)[:, None] * before
        beside = inner(image, image).sqrt()
        diagonals.append(diagonal)
        offdiagonals.append(beside)
        exhausted = beside <= 1e-12 * diagonal.abs().clamp(min=1e-300)
        scale = torch.where(exhausted, 0, 1 / beside.clamp(min=1e-300)).to(image.dtype)
        beside = torch.where(exhausted, 0, beside)
        offdiagonals[-1] = beside
        before, current = current, image * scale[:, None]
    return torch.stack(diagonals, 1), torch.stack(offdiagonals, 1)


def quadratic_forms(
    product: Callable[[Tensor], Tensor],
    probes: Float[Tensor, "K P"],
    function: Callable[[Tensor], Tensor],
    steps: int,
) -> Float[Tensor, " K"]:
    """``z . function(matrix) z`` for each probe, by Gauss quadrature.

    Parameters
    ----------
    product
        A symmetric matrix times each row.
    probes
        ``(K, P)``; with independent entries of mean zero and variance one the forms' mean is the
        trace.
    function
        Applied to eigenvalues, elementwise.
    steps
        Nodes of the quadrature, and products to spend.

    Returns
    -------
    Tensor
        ``(K,)`` float64.

    References
    ----------
    S. Ubaru, J. Chen and Y. Saad, *Fast estimation of tr(f(A)) via stochastic Lanczos quadrature*,
    SIAM J. Matrix Anal. Appl. 38 (2017).
    """
    nodes, weights = quadrature(*tridiagonalise(product, probes, steps))
    return inner(probes, probes) * (weights * function(nodes)).sum(1)


def quadrature(
    diagonals: Float[Tensor, "K steps"],
    beside: Float[Tensor, "K steps"],
    *,
    lowest: float | None = None,
) -> tuple[Float[Tensor, "K nodes"], Float[Tensor, "K nodes"]]:
    """The rule that belongs to what `tridiagonalise` returns, or to its first columns.

    Parameters
    ----------
    diagonals, beside
        ``(K, steps)``.
    lowest
        A lower bound of all eigenvalues, which becomes a node of its own (Gauss-Radau; G. Golub and
        G. Meurant, *Matrices, moments and quadrature*, 2010). Many eigenvalues at or near it are
        then counted at once, where the plain rule finds them last. Rows for which it is no lower
        bound keep the plain rule.

    Returns
    -------
    tuple
        Nodes and weights, ``(K, nodes)`` float64: ``z . f(matrix) z / |z|^2`` is about ``sum_j
        weights_j f(nodes_j)``.
    """
    if lowest is not None:
        diagonals, beside = _with_node(diagonals, beside, lowest)
    matrices = torch.diag_embed(diagonals)
    matrices += torch.diag_embed(beside[:, :-1], 1) + torch.diag_embed(beside[:, :-1], -1)
    nodes, vectors = torch.linalg.eigh(matrices)
    return nodes, vectors[:, 0].square()


def _with_node(
    diagonals: Float[Tensor, "K steps"], beside: Float[Tensor, "K steps"], node: float
) -> tuple[Float[Tensor, "K nodes"], Float[Tensor, "K nodes"]]:
    """Matrices one larger that have this eigenvalue."""
    # Their last diagonal entry is node + beta^2 e . (T - node)^-1 e, with the last unit vector e,
    # by elimination: pivots of T - node are positive as long as it lies below all eigenvalues.
    pivot = diagonals[:, 0] - node
    below = pivot > 0
    for step in range(1, diagonals.shape[1]):
        pivot = (
            diagonals[:, step]
            - node
            - beside[:, step - 1].square() / torch.where(below, pivot, 1.0)
        )
        below &= pivot > 0
    # Where it is no lower bound, or the space was exhausted, the new row stands apart.
    last = torch.where(below, beside[:, -1], 0.0)
    entry = node + last.square() / torch.where(below, pivot, 1.0)
    zero = torch.zeros_like(entry)[:, None]
    return (
        torch.cat([diagonals, entry[:, None]], 1),
        torch.cat([beside[:, :-1], last[:, None], zero], 1),
    )
