"""Moments of two activations and of their linearised changes, by two-dimensional quadrature.

``s_0 = m_0 + d_0 x`` and ``s_1 = m_1 + d_1 (R x + sqrt(1 - R^2) w)`` with independent standard
normal ``x, w``; changes ``v`` are a linear function of ``x, w`` plus Gaussian noise, so that given
both their moments are polynomials. Both integrals are cut into panels at every kink.
"""

import math
from typing import NamedTuple

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)
_REACH = 9.0


class Unit(NamedTuple):
    """A function with its derivative and where they bend, on a Gaussian argument."""

    function: object
    slope: object
    kinks: tuple
    mean: float
    std: float


def _rule(edges):
    low, high = edges[..., :-1, None], edges[..., 1:, None]
    nodes = (low + high) / 2 + (high - low) / 2 * _NODES
    weights = (high - low) / 2 * _WEIGHTS
    shape = (*edges.shape[:-1], -1)
    return nodes.reshape(shape), weights.reshape(shape)


def _density(x):
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def pair_moments(units, rho, mean, loadings, noise):
    """E[a], E[da], Cov(a), Cov(a, da), Cov(da) of two units.

    Parameters
    ----------
    units
        Two of `Unit`.
    rho
        Correlation of ``s_0, s_1``.
    mean, loadings, noise
        ``v = mean + loadings @ (x, w) + Gaussian of covariance noise``.
    """
    first, second = units
    q = math.sqrt((1 - rho) * (1 + rho))
    bends = [(t - first.mean) / first.std for t in first.kinks]
    for t in second.kinks:
        # As a function of x the inner integral varies on the scale q / rho there.
        u = (t - second.mean) / second.std
        if rho:
            bends += [u / rho + q / abs(rho) * step for step in np.linspace(-9, 9, 19)]
    grid = np.concatenate([np.linspace(-_REACH, _REACH, 31), bends])
    x, weight = _rule(np.unique(np.clip(grid, -_REACH, _REACH)))
    cuts = [((t - second.mean) / second.std - rho * x) / max(q, 1e-300) for t in second.kinks]
    edges = np.broadcast_to(np.linspace(-_REACH, _REACH, 15)[:, None], (15, len(x)))
    w, inner = _rule(np.sort(np.clip(np.stack([*edges, *cuts]), -_REACH, _REACH), axis=0).T)
    weight = (weight * _density(x))[:, None] * inner * _density(w)
    x = np.broadcast_to(x[:, None], w.shape)
    arguments = [
        first.mean + first.std * x,
        second.mean + second.std * (rho * x + q * w),
    ]
    a = [unit.function(z) for unit, z in zip(units, arguments, strict=True)]
    gate = [unit.slope(z) for unit, z in zip(units, arguments, strict=True)]
    v = [mean[i] + loadings[i][0] * x + loadings[i][1] * w for i in range(2)]
    da = [g * change for g, change in zip(gate, v, strict=True)]

    def expect(values):
        return float((weight * values).sum())

    ea, eda = np.array([expect(f) for f in a]), np.array([expect(f) for f in da])

    def covariance(left, right, means, others):
        product = [[expect(f * g) for g in right] for f in left]
        return np.array(product) - np.outer(means, others)

    changes = covariance(da, da, eda, eda)
    changes += np.array(
        [[expect(gate[i] * gate[j]) * noise[i][j] for j in range(2)] for i in range(2)]
    )
    return ea, eda, covariance(a, a, ea, ea), covariance(a, da, ea, eda), changes
