"""One-dimensional laws by brute integration: scanned for their mass, then Gauss-Legendre on panels.

A law is given by its log density, up to a constant, as a NumPy function. Nothing is known of it
beyond the places where it may bend or jump. SciPy supplies the normal distribution function.
"""

import itertools
import math

import numpy as np
from scipy.special import erfcx, log_ndtr

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)
SCANNED = 20_001
PANELS = 200
NEGLIGIBLE = 60.0  # in the logarithm, below the peak


def log_integral(log_density, low, high, kinks=()):
    """``log of the integral of exp(log_density)`` over a finite interval."""
    inside = [k for k in kinks if low < k < high]
    edges = [low, *inside, high]
    parts = [_smooth_log_integral(log_density, a, b) for a, b in itertools.pairwise(edges)]
    return np.logaddexp.reduce(parts)


def _smooth_log_integral(log_density, low, high):
    for _ in range(4):  # zoom in on the mass: it may be a thousandth of the interval
        grid = np.linspace(low, high, SCANNED)
        # The ends belong to this piece: look just inside.
        grid[0], grid[-1] = np.nextafter(low, high), np.nextafter(high, low)
        values = log_density(grid)
        (heavy,) = np.nonzero(values > values.max() - NEGLIGIBLE)
        first, last = max(heavy[0] - 1, 0), min(heavy[-1] + 1, SCANNED - 1)
        low, high = (
            (low if first == 0 else grid[first]),
            (high if last == SCANNED - 1 else grid[last]),
        )
    edges = np.linspace(low, high, PANELS + 1)
    half = np.diff(edges)[:, None] / 2
    z = edges[:-1, None] + half * (1 + NODES)
    values = log_density(z)
    return math.log((np.exp(values - values.max()) * half * WEIGHTS).sum()) + values.max()


def noisy_unit(function, m, x, dz, dx):
    """Log density of ``z ~ N(m, dz)`` and ``x ~ N(function(z), dx)``, jointly."""

    def log_density(z):
        prior = -0.5 * (z - m) ** 2 / dz - 0.5 * math.log(2 * math.pi * dz)
        return prior - 0.5 * (x - function(z)) ** 2 / dx - 0.5 * math.log(2 * math.pi * dx)

    return log_density


def largest_score(means, label, d):
    """Log density of the label's score, jointly with its being the largest: others integrated."""

    def log_density(z):
        value = -0.5 * (z - means[label]) ** 2 / d - 0.5 * math.log(2 * math.pi * d)
        for c, mean in enumerate(means):
            if c != label:
                value = value + log_ndtr((z - mean) / math.sqrt(d))
        return value

    return log_density


def log_tail(a):
    """``log Q(a)``, ``Q`` the upper tail of the standard normal law."""
    return log_ndtr(-a)


def excess_mass(a, s):
    """``1 - Q(a + s) / Q(a)`` for ``a >= 0``: the mass of a tail up to the excess `s`."""
    root = math.sqrt(0.5)
    kept = erfcx((a + s) * root) / erfcx(a * root)
    return -np.expm1(np.log(kept) - s * (a + 0.5 * s))


def ks_pvalue(draws, distribution):
    """Of a Kolmogorov-Smirnov test that the draws have this distribution function."""
    from scipy.stats import kstest

    return kstest(draws, distribution).pvalue
