"""The No-U-Turn sampler by recursion, one chain, no tricks: lists of points and their weights.

The trees of Betancourt (2017, appendix A.4) with the turning criterion of the summed momentum, for
each subtree and across its seam. Directions are given; instead of a choice the probability of each
point is returned.
"""

from dataclasses import dataclass

import torch


@dataclass
class Trajectory:
    points: list  # (vectors, momentum) in the order of time
    probabilities: list  # of being chosen
    weight: float
    depth: int
    steps: int
    divergent: bool
    acceptance: float


def moves_apart(points):
    """The criterion for a list of points in the order of time that is made of two halves."""
    momenta = [momentum for _, momentum in points]
    half = len(momenta) // 2
    sums = [(0, len(momenta))]
    if half > 1:
        sums += [(0, half + 1), (half - 1, len(momenta))]
    for begin, end in sums:
        total = sum(momenta[begin:end])
        if momenta[begin] @ total <= 0 or momenta[end - 1] @ total <= 0:
            return False
    return True


def trajectory(value_and_gradient, vectors, momentum, step_size, directions, largest_error=1000.0):
    """The whole trajectory from a point of one chain."""

    def energy(point):
        return float(value_and_gradient(point[0])[0] + point[1] @ point[1] / 2)

    origin = energy((vectors, momentum))
    counters = {"steps": 0, "divergent": False, "acceptance": 0.0}

    def leapfrog(point, sign):
        q, p = point
        p = p - sign * step_size / 2 * value_and_gradient(q)[1]
        q = q + sign * step_size * p
        return q, p - sign * step_size / 2 * value_and_gradient(q)[1]

    def build(point, sign, depth):
        """Points in the order of the walk and their weights, or None when the subtree is lost."""
        if depth == 0:
            ahead = leapfrog(point, sign)
            gain = origin - energy(ahead)
            counters["steps"] += 1
            if not gain > -largest_error:
                counters["divergent"] = True
                return None
            counters["acceptance"] += min(1.0, float(torch.tensor(gain).exp()))
            return [ahead], [float(torch.tensor(gain).exp())]
        first = build(point, sign, depth - 1)
        if first is None:
            return None
        second = build(first[0][-1], sign, depth - 1)
        if second is None:
            return None
        points, weights = first[0] + second[0], first[1] + second[1]
        return (points, weights) if moves_apart(points) else None

    points, probabilities, weight, depth = [(vectors, momentum)], [1.0], 1.0, 0
    for forward in directions:
        built = build(points[-1 if forward else 0], 1 if forward else -1, depth)
        if built is None:
            break
        new, weights = built
        total = sum(weights)
        taken = min(1.0, total / weight)
        old = [(1 - taken) * p for p in probabilities]
        fresh = [taken * w / total if total else 0.0 for w in weights]
        if forward:
            points, probabilities = points + new, old + fresh
        else:
            points, probabilities = new[::-1] + points, fresh[::-1] + old
        weight += total
        depth += 1
        if not moves_apart(points):
            break
    steps = counters["steps"]
    return Trajectory(
        points,
        probabilities,
        weight,
        depth,
        steps,
        counters["divergent"],
        counters["acceptance"] / steps,
    )
