"""Chains of linear maps: all their decompositions, matrices that have one, a dense Jacobian."""

import torch

F64 = torch.float64


def decompositions(widths):
    """Every way to cover layers of these widths by intervals, as ``{(first, last): count}``."""
    intervals = [(i, j) for i in range(len(widths)) for j in range(i, len(widths))]

    def covers(position, left):
        if position == len(intervals):
            if not any(left):
                yield {}
            return
        first, last = intervals[position]
        if any(left[:first]):  # no later interval begins early enough
            return
        for count in range(min(left[first : last + 1]) + 1):
            rest = [n - count * (first <= layer <= last) for layer, n in enumerate(left)]
            for others in covers(position + 1, rest):
                yield ({(first, last): count} if count else {}) | others

    return covers(0, list(widths))


def factors_of(widths, intervals, seed):
    """Factors with a decomposition, in bases that are far from orthogonal."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        [(x, k) for x, n in intervals.items() for k in range(n) if x[0] <= layer <= x[1]]
        for layer in range(len(widths))
    ]
    bases = [
        torch.eye(w, dtype=F64) + torch.randn(w, w, generator=generator, dtype=F64).triu(1)
        for w in widths
    ]
    factors = []
    for layer in range(len(widths) - 1):
        canonical = torch.tensor(
            [[float(a == b) for a in layers[layer]] for b in layers[layer + 1]], dtype=F64
        )
        factors.append(bases[layer + 1] @ canonical @ torch.linalg.inv(bases[layer]))
    return factors


def dense_rank(factors):
    """Rank of the derivative of the product by all entries of all factors, written out."""

    def product(*weights):
        result = weights[0]
        for weight in weights[1:]:
            result = weight @ result
        return result.flatten()

    factors = [w.to(F64) for w in factors]
    parts = torch.autograd.functional.jacobian(product, tuple(factors))
    matrix = torch.cat([part.flatten(1) for part in parts], 1)
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-9))
