"""Means of ``nbeta K`` under ``exp(-nbeta K - localization/2 |w|^2)`` on grids as they come."""

import torch

F64 = torch.float64


def _mean(potential, nbeta, localization, parts):
    """From parts of points with their weights; energies are taken to be at least 0."""
    mass = moment = 0.0
    for points, weights in parts:
        excess = nbeta * potential(points)
        density = weights * torch.exp(-excess - localization / 2 * points.square().sum(1))
        mass, moment = mass + float(density.sum()), moment + float((excess * density).sum())
    return moment / mass


def midpoint_mean(potential, nbeta, localization, box, counts):
    """Two variables on equal cells."""
    x, y = (
        low + (high - low) / n * (torch.arange(n, dtype=F64) + 0.5)
        for (low, high), n in zip(box, counts, strict=True)
    )
    parts = ((torch.cartesian_prod(some, y), 1.0) for some in x.split(100))
    return _mean(potential, nbeta, localization, parts)


def even_mean(potential, dimensions, nbeta, localization):
    """Potentials even in every variable, by the trapezoidal rule in their logarithms.

    The least variables matter only where the potential does not depend on them.
    """
    lowest, count = (-26.0, 700) if dimensions < 3 else (-20.0, 120)
    t = torch.linspace(lowest, 2.4, count, dtype=F64)
    rows = [t] * (dimensions - 1)

    def parts():
        for first in t.split(20):
            logs = torch.cartesian_prod(first, *rows)
            yield logs.exp(), logs.sum(1).exp()

    return _mean(potential, nbeta, localization, parts())
