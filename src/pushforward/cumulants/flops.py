"""Floating-point operations of a propagation, counted from the graph.

Matrix products count ``2 m n k``; a product with a symmetric matrix is charged in full, because it
is computed in full. Elementwise work on pairs of units counts the operations of the expansion that
is evaluated; work on single units is charged at a flat rate, which hardly matters.
"""

from __future__ import annotations

from pushforward.networks.graph import AffineMap, NetworkGraph

__all__ = ["propagation_flops", "unit_flops"]

_PER_UNIT = 200.0
_PER_PAIR = {"covariance": 6.0, "radial": 60.0, "full": 80.0}
_PER_STRONG_PAIR = 32 * 25.0


def unit_flops(graph: NetworkGraph, *, full_input: bool) -> float:
    """FLOPs of order 1 for one law.

    Parameters
    ----------
    graph
        The network.
    full_input
        Whether the first layer reads a full input covariance.

    Returns
    -------
    float
        Means and variances through every layer.
    """
    affines = [stage.affine for stage in graph.stages] + [graph.output]
    total = sum(2 * affine.linear.flops for affine in affines)
    total += sum(_PER_UNIT * stage.affine.linear.out_features for stage in graph.stages)
    if full_input:
        total += affines[0].linear.flops * graph.input_features
    return total


def propagation_flops(graph: NetworkGraph, closure: str, strong_pairs: int = 0) -> float:
    """FLOPs of orders 2 and 3 for one law.

    Parameters
    ----------
    graph
        The network.
    closure
        ``"covariance"``, ``"radial"`` or ``"full"``.
    strong_pairs
        Pairs that the exact kernel treated.

    Returns
    -------
    float
        Covariances, metrics, third cumulants and the expansion over pairs.
    """
    total = strong_pairs * _PER_STRONG_PAIR * (1.0 if closure == "covariance" else 4.0)
    born: list[int] = []
    for stage in graph.stages:
        total += _affine_flops(stage.affine, closure, born)
        n = stage.affine.linear.out_features
        total += _PER_UNIT * n + _PER_PAIR[closure] * n * n
        if closure == "full":
            # Slices: three products for each source, on the pre-activations and again behind them.
            total += sum(2 * 3 * 2.0 * n * n * rank for rank in born)
            born.append(n)
    return total + _affine_flops(graph.output, closure, born)


def _affine_flops(affine: AffineMap, closure: str, born: list[int]) -> float:
    linear = affine.linear
    rows = linear.in_features + linear.out_features  # C -> A C -> A C A^T
    total = linear.flops * rows
    if closure != "covariance":
        total += linear.flops * linear.out_features  # A A^T
    return total + sum(3 * rank * linear.flops for rank in born)
