"""The local learning coefficient of a deep linear network at the weights it has.

Aoyagi's formula (``deep_linear`` in ``known.py``) is for the most singular point of the fibre
``W_L ... W_1 = T``. What holds at another point follows from the ranks of all partial products.

These ranks say how the factors, as a chain of linear maps, decompose into *intervals*: an interval
``(i, j)`` is a direction that is born in layer ``i``, passes through and dies after layer ``j``
(inputs are layer 0, outputs layer ``L``). Up to a change of bases in all layers, weights near the
given ones are the canonical ones of the intervals plus one block for each pair ``(a, b)``, ``(c,
d)`` with ``a < c <= b + 1 <= d``, which leads from the end of the first interval into the second.
Their product differs from the given one by

- ``r (m + n - r)`` coordinates of the change of bases, where ``r`` intervals go all the way;
- for every source ``(0, j)`` and sink ``(i, L)`` a block: the sum, over all paths from the source
  to the sink, of the products of the blocks along the path.

Where ``i <= j + 1`` the block of the path of one step is a free coordinate, so that the whole
block counts as regular: regular coordinates are as many as the rank of the Jacobian of the product,
and each adds 1/2. Where ``i > j + 1`` there is no such path. What is left is a product of matrices
at zero, a smaller deep linear network in variables of its own, to which Aoyagi's formula applies;
or several, which add up; or nothing, and the fibre is smooth. Products that share factors are
refused.

That every factor has full rank does not suffice for it: at weights ``W1 = W3 = (1, 0)'`` and
``W2 = W4 = (0, 1)``, widths 1, 2, 1, 2, 1, the two inner products vanish and so does the Jacobian.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.degeneracy.known import (
    KnownCoefficient,
    deep_linear,
    regular,
    sum_of,
)
from pushforward.errors import OptionError, ShapeError

__all__ = [
    "Interval",
    "coefficient_of_intervals",
    "deep_linear_local",
    "interval_counts",
    "jacobian_rank",
]

Interval: TypeAlias = tuple[int, int]
"""First and last layer of a direction, inputs being layer 0."""

_Edges: TypeAlias = set[tuple[Interval, Interval]]

# Singular values below this many rounding errors, times the width, count as zero.
_ROUNDING_ERRORS: Final = 2.0


def deep_linear_local(
    factors: Sequence[Float[Tensor, "_ _"]], *, tolerance: float | None = None
) -> KnownCoefficient:
    """Of ``|W_L ... W_1 - T|^2`` at the given weights, ``T`` being their product.

    The covariance of the inputs does not matter as long as it has full rank.

    Parameters
    ----------
    factors
        ``W_1, ..., W_L`` in the order in which they act, each ``(outputs, inputs)`` as in
        `torch.nn.Linear`.
    tolerance
        Singular values below this fraction of the largest of a factor count as zero; default a few
        rounding errors. Trained weights need a larger one to count as rank-deficient.

    Returns
    -------
    KnownCoefficient
        Exact. At a smooth point half the rank of the Jacobian of the product, multiplicity 1.

    Raises
    ------
    OptionError
        At points where what is left besides the regular directions is not one product of matrices,
        nor several without common factors: for these no formula is known here. It takes three
        factors, and ranks that differ in a particular way.
    ShapeError
        For factors that do not compose.
    """
    return coefficient_of_intervals(interval_counts(factors, tolerance=tolerance), len(factors))


def interval_counts(
    factors: Sequence[Float[Tensor, "_ _"]], *, tolerance: float | None = None
) -> dict[Interval, int]:
    """How many directions are born in layer ``i`` and die after layer ``j``.

    Parameters
    ----------
    factors
        ``W_1, ..., W_L`` in the order in which they act, each ``(outputs, inputs)``.
    tolerance
        As in `deep_linear_local`.

    Returns
    -------
    dict
        Positive counts only. Those of the intervals through a layer add up to its width.

    Raises
    ------
    OptionError
        For factors that are not finite or a tolerance outside ``[0, 1)``.
    ShapeError
        For no factors, or factors that do not compose.
    """
    if not factors or any(w.ndim != 2 or 0 in w.shape for w in factors):
        raise ShapeError(
            f"factors of shapes {[tuple(w.shape) for w in factors]}",
            where="factors",
            advice="Give at least one matrix (outputs, inputs), none of them empty.",
        )
    for position, (first, second) in enumerate(itertools.pairwise(factors)):
        if first.shape[0] != second.shape[1]:
            raise ShapeError(
                f"{tuple(second.shape)} after {tuple(first.shape)}",
                where=f"factors[{position + 1}]",
                advice="Give factors in the order in which they act, each (outputs, inputs).",
            )
    if not all(bool(w.isfinite().all()) for w in factors):
        raise OptionError("not finite", where="factors", advice="Check the weights for NaN.")
    if tolerance is None:
        widest = max(max(w.shape) for w in factors)
        tolerance = _ROUNDING_ERRORS * widest * max(torch.finfo(w.dtype).eps for w in factors)
    if not 0 <= tolerance < 1:
        raise OptionError(
            f"tolerance {tolerance:g}", where="tolerance", advice="Use a number from 0 to below 1."
        )
    ranks = _partial_ranks([w.detach().to(torch.float64) for w in factors], tolerance)

    def rank(i: int, j: int) -> int:
        return ranks.get((i, j), 0)

    counts = {
        (i, j): rank(i, j) - rank(i - 1, j) - rank(i, j + 1) + rank(i - 1, j + 1) for i, j in ranks
    }
    if min(counts.values()) < 0:
        raise OptionError(
            "ranks of partial products that contradict each other",
            where="tolerance",
            advice="Use another tolerance: some singular values lie just about there.",
        )
    return {interval: count for interval, count in counts.items() if count}


def coefficient_of_intervals(intervals: Mapping[Interval, int], depth: int) -> KnownCoefficient:
    """The local learning coefficient of a chain of linear maps by its decomposition.

    Parameters
    ----------
    intervals
        How many directions are born in layer ``i`` and die after layer ``j``.
    depth
        ``L``, the number of factors.

    Returns
    -------
    KnownCoefficient
        As in `deep_linear_local`.

    Raises
    ------
    OptionError
        Where no formula is known.
    """
    edges = _singular_edges(intervals, depth)
    chains = [_chain(part, depth) for part in _components(edges)]
    singular = [
        deep_linear([sum(intervals[x] for x in layer) for layer in chain], 0) for chain in chains
    ]
    return sum_of(regular(jacobian_rank(intervals, depth)), *singular)


def jacobian_rank(intervals: Mapping[Interval, int], depth: int) -> int:
    """Rank of the derivative of ``W_L ... W_1`` by all factors, which is that of the Hessian.

    Parameters
    ----------
    intervals
        How many directions are born in layer ``i`` and die after layer ``j``.
    depth
        ``L``, the number of factors.

    Returns
    -------
    int
        Half of it is a lower bound of the local learning coefficient everywhere.
    """
    # Whoever goes all the way is source and sink, and meets everyone.
    return sum(
        sources * sinks
        for (born, death), sources in intervals.items()
        for (birth, last), sinks in intervals.items()
        if born == 0 and last == depth and birth <= death + 1
    )


def _partial_ranks(factors: Sequence[Tensor], tolerance: float) -> dict[Interval, int]:
    """Ranks of ``W_j ... W_{i+1}``; of an empty product the width of the layer."""
    # Bases of images are made orthonormal after each factor, so that the product of many factors
    # loses no direction just because it is ill-conditioned.
    widths = [factors[0].shape[1], *(w.shape[0] for w in factors)]
    cuts = [tolerance * float(torch.linalg.matrix_norm(w, 2)) for w in factors]
    ranks = {}
    for start, width in enumerate(widths):
        ranks[start, start] = width
        basis = torch.eye(width, dtype=torch.float64, device=factors[0].device)
        for layer in range(start, len(factors)):
            image = factors[layer] @ basis
            left, values, _ = torch.linalg.svd(image, full_matrices=False)
            basis = left[:, values > cuts[layer]]
            ranks[start, layer + 1] = basis.shape[1]
    return ranks


def _leads_into(first: Interval, second: Interval) -> bool:
    """Whether weights nearby can join the end of an interval to another that outlives it."""
    return first[0] < second[0] <= first[1] + 1 <= second[1]


def _singular_edges(intervals: Mapping[Interval, int], depth: int) -> _Edges:
    """Blocks on paths from a source to a sink that cannot be joined directly, as few as will do."""
    ends = [x for x in intervals if x != (0, depth)]
    edges = _on_paths({(x, y) for x in ends for y in ends if _leads_into(x, y)}, depth)
    # A detour over b from a to all that follow b changes nothing where a leads there directly too:
    # the sum of the direct block and the product along the detour is a new coordinate in place of
    # the direct block. The same holds for detours from all that precede b.
    while True:
        after, before = _neighbours(edges)
        detour = next(
            (
                (a, b)
                for a, b in sorted(edges)
                if (b in after and after[b] <= after[a]) or (a in before and before[a] <= before[b])
            ),
            None,
        )
        if detour is None:
            return edges
        edges = _on_paths(edges - {detour}, depth)


def _neighbours(
    edges: _Edges,
) -> tuple[dict[Interval, set[Interval]], dict[Interval, set[Interval]]]:
    """Those that follow and those that precede each interval."""
    after: dict[Interval, set[Interval]] = {}
    before: dict[Interval, set[Interval]] = {}
    for x, y in edges:
        after.setdefault(x, set()).add(y)
        before.setdefault(y, set()).add(x)
    return after, before


def _on_paths(edges: _Edges, depth: int) -> _Edges:
    """Edges on paths from a source to a sink to which it does not lead directly."""
    # Edges lead to later ends, so that one pass in this order finds all that can be reached.
    nodes = sorted({x for edge in edges for x in edge}, key=lambda x: (x[1], x[0]))
    reached = {x: {x} for x in nodes}
    for x in reversed(nodes):
        reached[x].update(*(reached[y] for start, y in edges if start == x))
    apart = [
        (x, y)
        for x in nodes
        for y in reached[x]
        if x[0] == 0 and y[1] == depth and not _leads_into(x, y)
    ]
    return {(x, y) for x, y in edges if any(x in reached[s] and t in reached[y] for s, t in apart)}


def _components(edges: _Edges) -> list[_Edges]:
    """Edges by connected component."""
    parts: list[tuple[set[Interval], _Edges]] = []
    for edge in sorted(edges):
        touched = [part for part in parts if part[0] & set(edge)]
        parts = [part for part in parts if part not in touched]
        nodes = set(edge).union(*(part[0] for part in touched))
        parts.append((nodes, {edge}.union(*(part[1] for part in touched))))
    return [part for _, part in parts]


def _chain(edges: _Edges, depth: int) -> list[list[Interval]]:
    """Layers of intervals of which each leads into all of the next and into no others."""
    nodes = {x for edge in edges for x in edge}
    after, _ = _neighbours(edges)
    chain = [sorted(x for x in nodes if x[0] == 0)]
    while following := after.get(chain[-1][0]):
        if any(after.get(x) != following for x in chain[-1]):
            break
        chain.append(sorted(following))
    # Nobody was left out, and no edge skips or comes in twice.
    whole = sum(map(len, chain)) == len(nodes) and len(edges) == sum(
        len(x) * len(y) for x, y in itertools.pairwise(chain)
    )
    apart = not any(_leads_into(x, y) for x in chain[0] for y in chain[-1])
    if not (whole and apart and all(x[1] == depth for x in chain[-1])):
        raise OptionError(
            f"products of blocks with common factors, between the intervals {sorted(nodes)}",
            where="deep_linear_local(factors)",
            advice="No formula is known here. deep_linear of the same widths and rank is a lower "
            "bound; sampling (MALA or HMC) or a point of other ranks gives a value.",
        )
    return chain
