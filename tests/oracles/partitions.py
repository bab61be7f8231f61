"""Integer, set and vector partitions, and the diagrams that cumulant propagation sums over.

Notation. A *slice type* p = (p_1, ..., p_m) is an integer partition: m distinct neurons, the a-th
repeated p_a times. A *block* v in N^m is the cumulant in which neuron a appears v_a times. A
*diagram* nu is a multiset of blocks, held as a tuple in descending lexicographic order.

The method is that of Wu, Lecomte, Winer, Robinson, Hilton and Christiano, "Estimating the expected
output of wide random MLPs more efficiently than sampling", arXiv 2605.05179; the truncation is its
equations (13) and (14).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from itertools import permutations, product
from math import factorial, prod

__all__ = [
    "Block",
    "Diagram",
    "SetPartition",
    "block_cost",
    "count_isomorphism_classes",
    "cumulant_from_powers",
    "diagram_budget",
    "diagrams",
    "diagrams_by_definition",
    "integer_partitions",
    "inversion_coefficient",
    "is_connected",
    "is_two_mixed",
    "positions_of_type",
    "set_partitions",
    "slice_types",
    "total_vector",
    "tracked_degrees",
    "vector_partitions",
    "weight",
]

Block = tuple[int, ...]
Diagram = tuple[Block, ...]
SetPartition = tuple[tuple[int, ...], ...]


# ---- partitions ---------------------------------------------------------------------------------


@cache
def integer_partitions(total: int) -> tuple[tuple[int, ...], ...]:
    """All ways to write ``total`` as a non-increasing sum of positive integers."""
    return tuple(_integer_partitions(total, total))


def _integer_partitions(total: int, largest: int) -> Iterator[tuple[int, ...]]:
    if total == 0:
        yield ()
    for first in range(min(total, largest), 0, -1):
        for rest in _integer_partitions(total - first, first):
            yield (first, *rest)


@cache
def set_partitions(size: int) -> tuple[SetPartition, ...]:
    """All partitions of {0, ..., size - 1} into non-empty blocks."""
    if size == 0:
        return ((),)
    last = size - 1
    found: list[SetPartition] = []
    for smaller in set_partitions(last):
        found.append((*smaller, (last,)))
        for i, block in enumerate(smaller):
            found.append((*smaller[:i], (*block, last), *smaller[i + 1 :]))
    return tuple(found)


@cache
def positions_of_type(slice_type: tuple[int, ...]) -> tuple[SetPartition, ...]:
    """Places a slice of this type takes in a symmetric tensor of order sum(slice_type).

    Each is a set partition of the tensor's axes whose a-th block has slice_type[a] axes.
    """
    by_size = (
        tuple(sorted(partition, key=len, reverse=True))
        for partition in set_partitions(sum(slice_type))
    )
    return tuple(blocks for blocks in by_size if tuple(map(len, blocks)) == slice_type)


@cache
def vector_partitions(vector: Block) -> tuple[Diagram, ...]:
    """All multisets of non-zero vectors of natural numbers that sum to ``vector``."""
    return tuple(_vector_partitions(vector, vector))


def _vector_partitions(rest: Block, largest: Block) -> Iterator[Diagram]:
    if not any(rest):
        yield ()
        return
    for block in product(*(range(r, -1, -1) for r in rest)):
        if any(block) and block <= largest:
            remainder = tuple(r - b for r, b in zip(rest, block, strict=True))
            for tail in _vector_partitions(remainder, block):
                yield (block, *tail)


# ---- diagrams -----------------------------------------------------------------------------------


def total_vector(diagram: Diagram, num_neurons: int) -> Block:
    """k = the sum of the blocks: how often each neuron's activation is differentiated."""
    return tuple(sum(block[a] for block in diagram) for a in range(num_neurons))


@cache
def weight(diagram: Diagram) -> Fraction:
    """c(nu): one over the product of mult(v)! (prod_a v_a!)^mult(v) over the distinct blocks."""
    return Fraction(
        1,
        prod(
            factorial(times) * prod(map(factorial, block)) ** times
            for block, times in Counter(diagram).items()
        ),
    )


def is_connected(diagram: Diagram, num_neurons: int) -> bool:
    """Whether the supports of the blocks join all neurons together (one neuron always is)."""
    reached = {0}
    for _ in range(num_neurons):
        for block in diagram:
            support = {a for a, times in enumerate(block) if times}
            if support & reached:
                reached |= support
    return len(reached) == num_neurons


def is_two_mixed(block: Block) -> bool:
    """Whether the block is not already part of the Gaussian: a marginal mean or variance is."""
    return sum(block) > 2 or sum(map(bool, block)) >= 2


def block_cost(block: Block) -> int:
    """Size of a block in wide random networks, as the exponent of n^{-1/2}."""
    all_even = all(times % 2 == 0 for times in block)
    return sum(block) - 1 - int(all_even)


# ---- truncation ---------------------------------------------------------------------------------


def tracked_degrees(order: int, augmented: bool) -> dict[int, int]:
    """Degrees of the cumulants that are carried, each with its radial index.

    Radial index r means that only the part Sym(core (x) I^r) is kept; 0 is the full tensor.
    """
    tracked = dict.fromkeys(range(1, order + 1), 0)
    if augmented:
        tracked[order + 1] = 1
        if order % 2 == 0:
            tracked[order + 2] = (order + 2) // 2
    elif order % 2 == 1:
        tracked[order + 1] = (order + 1) // 2
    return tracked


def diagram_budget(order: int, augmented: bool) -> int:
    """Largest total cost of a diagram that is kept."""
    return order if augmented else order - 1


def slice_types(order: int, max_degree: int) -> tuple[tuple[int, ...], ...]:
    """Slices that are computed: of degree at most max_degree, with sum_a ceil(p_a / 2) <= order."""
    return tuple(
        p
        for degree in range(1, max_degree + 1)
        for p in integer_partitions(degree)
        if sum((times + 1) // 2 for times in p) <= order
    )


@cache
def diagrams(num_neurons: int, budget: int, max_degree: int) -> tuple[Diagram, ...]:
    """Connected, 2-mixed diagrams within the budget, of blocks of degree at most max_degree.

    A 2-mixed block costs at least one, so that picking blocks until the budget is spent ends.
    """
    blocks = [
        block
        for block in product(range(max_degree, -1, -1), repeat=num_neurons)
        if 0 < sum(block) <= max_degree and is_two_mixed(block) and block_cost(block) <= budget
    ]

    def extend(first: int, left: int) -> Iterator[Diagram]:
        yield ()
        for i in range(first, len(blocks)):
            cost = block_cost(blocks[i])
            if cost <= left:
                for tail in extend(i, left - cost):
                    yield (blocks[i], *tail)

    return tuple(nu for nu in extend(0, budget) if is_connected(nu, num_neurons))


def diagrams_by_definition(num_neurons: int, budget: int, max_degree: int) -> tuple[Diagram, ...]:
    """The same set as :func:`diagrams`, by filtering every vector partition of every small k."""
    return tuple(
        nu
        for k in product(range(2 * budget + 1), repeat=num_neurons)
        if sum(k) <= 2 * budget
        for nu in vector_partitions(k)
        if is_connected(nu, num_neurons)
        and all(is_two_mixed(v) and sum(v) <= max_degree for v in nu)
        and sum(map(block_cost, nu)) <= budget
    )


def count_isomorphism_classes(slice_type: tuple[int, ...], found: tuple[Diagram, ...]) -> int:
    """Number of diagrams up to exchanging neurons that have the same power in the slice."""
    neurons = range(len(slice_type))
    symmetries = [
        g for g in permutations(neurons) if all(slice_type[g[a]] == slice_type[a] for a in neurons)
    ]

    def canonical(nu: Diagram) -> Diagram:
        return max(
            tuple(sorted((tuple(v[g[a]] for a in neurons) for v in nu), reverse=True))
            for g in symmetries
        )

    return len({canonical(nu) for nu in found})


# ---- from power cumulants to cumulants ----------------------------------------------------------


def inversion_coefficient(rho: Diagram) -> int:
    """A(rho): coefficient of prod_v pK_v in the cumulant K_p, where p is the sum of rho.

    First factor: number of set partitions of the labelled copies of the neurons that look like
    rho. Second factor: moments of powers split into power cumulants inside the blocks of tau, and
    two power cumulants of the same neuron cannot come from the same moment, since there the copies
    of that neuron have been merged into one power.
    """
    num_neurons = len(rho[0])
    copies = prod(map(factorial, total_vector(rho, num_neurons))) * weight(rho)
    signed = sum(
        (-1) ** (len(tau) - 1) * factorial(len(tau) - 1)
        for tau in set_partitions(len(rho))
        if all(_disjoint([rho[i] for i in block]) for block in tau)
    )
    coefficient = copies * signed
    assert coefficient.denominator == 1
    return int(coefficient)


def _disjoint(blocks: list[Block]) -> bool:
    return all(sum(map(bool, times)) <= 1 for times in zip(*blocks, strict=True))


@cache
def cumulant_from_powers(slice_type: tuple[int, ...]) -> tuple[tuple[int, Diagram], ...]:
    """K_p = sum of A(rho) prod_{v in rho} pK_v, as the pairs (A(rho), rho) with A(rho) != 0."""
    terms = ((inversion_coefficient(rho), rho) for rho in vector_partitions(slice_type))
    return tuple(term for term in terms if term[0])
