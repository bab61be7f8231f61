"""Wick (Hermite) coefficients of scalar activations by brute force.

The k-th coefficient of the p-th power of an activation phi at a Gaussian G ~ N(mu, sigma^2) is

    w_k^(p)(mu, sigma^2) = E[ d^k/dG^k phi(G)^p ] = sigma^{-k} E[ He_k(x) phi(mu + sigma x)^p ],

with x ~ N(0, 1) and He_k the probabilists' Hermite polynomials. The right-hand side also holds
when phi has kinks and jumps (the derivative is then the distributional one). It is integrated
here panel by panel, with panels that end at the breakpoints of phi.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

__all__ = [
    "ACTIVATIONS",
    "ScalarActivation",
    "leaky_relu",
    "wick_coefficients",
    "wick_rounding",
    "wick_table",
]

FloatArray = npt.NDArray[np.float64]

HALF_WIDTH = 14.0  # standard deviations; the density there is 1e-43
NODES_PER_PANEL = 24
MIN_VARIANCE = 1e-10  # a clamp: propagated variances can come out negative

# The smooth activations of the table below bend on the scale 1 near z = 0 and are straight to
# double precision beyond |z| = 40, so that panels half a unit wide resolve them at any sigma.
_Z_EDGES = np.arange(-40.0, 40.25, 0.5)
_X_EDGES = np.arange(-HALF_WIDTH, HALF_WIDTH + 0.125, 0.25)


@dataclass(frozen=True)
class ScalarActivation:
    """A function of one variable, acting elementwise on arrays.

    Parameters
    ----------
    function
        Maps a float64 array to an array of the same shape.
    breakpoints
        Where the function or one of its derivatives jumps; it must be analytic between them.
    name
        For messages only.
    """

    function: Callable[[FloatArray], FloatArray]
    breakpoints: tuple[float, ...] = ()
    name: str = "activation"


def wick_coefficients(
    activation: ScalarActivation,
    mean: npt.ArrayLike,
    variance: npt.ArrayLike,
    max_order: int,
    max_power: int,
) -> FloatArray:
    """All w_k^(p)(mean, variance) with p <= max_power and k <= max_order.

    Rounding, not truncation, limits the accuracy: see :func:`wick_rounding`.

    Parameters
    ----------
    activation
        The function phi.
    mean, variance
        Shape (n,) or scalars; variances below 1e-10 are raised to it.
    max_order, max_power
        Largest k and largest p.

    Returns
    -------
    Shape (max_power + 1, max_order + 1, n), indexed [p, k, unit]; p = 0 is the constant one.
    """
    return _integrate(activation, mean, variance, max_order, max_power, absolute=False)


def wick_rounding(
    activation: ScalarActivation,
    mean: npt.ArrayLike,
    variance: npt.ArrayLike,
    max_order: int,
    max_power: int,
) -> FloatArray:
    """Scale of the rounding error of :func:`wick_coefficients`, same arguments and shape.

    It is eps sigma^{-k} E|He_k(x) phi^p|, the size of an error of one unit in the last place of
    every integrand value if all had the same sign. It grows like sigma^{-k}, so that tests should
    allow a few of it beside their relative tolerance.
    """
    scale = _integrate(activation, mean, variance, max_order, max_power, absolute=True)
    return np.finfo(np.float64).eps * scale


def wick_table(
    activations: ScalarActivation | Sequence[ScalarActivation],
    mean: FloatArray,
    variance: FloatArray,
    max_order: int,
    max_power: int,
) -> FloatArray:
    """:func:`wick_coefficients` with, possibly, a different activation for each unit."""
    if isinstance(activations, ScalarActivation):
        return wick_coefficients(activations, mean, variance, max_order, max_power)
    units = [
        wick_coefficients(activation, mu, var, max_order, max_power)
        for activation, mu, var in zip(activations, mean, variance, strict=True)
    ]
    return np.concatenate(units, axis=-1)


def _integrate(
    activation: ScalarActivation,
    mean: npt.ArrayLike,
    variance: npt.ArrayLike,
    max_order: int,
    max_power: int,
    *,
    absolute: bool,
) -> FloatArray:
    means, variances = np.broadcast_arrays(
        np.atleast_1d(np.asarray(mean, dtype=np.float64)),
        np.atleast_1d(np.asarray(variance, dtype=np.float64)),
    )
    result = np.empty((max_power + 1, max_order + 1, means.size))
    for unit, (mu, var) in enumerate(zip(means, variances, strict=True)):
        sigma = np.sqrt(max(float(var), MIN_VARIANCE))
        x, measure = _gaussian_nodes(float(mu), sigma, activation.breakpoints)
        powers = activation.function(mu + sigma * x) ** np.arange(max_power + 1)[:, None]
        hermite = _hermite_polynomials(x, max_order)
        integrand = powers[:, None, :] * hermite[None, :, :] * measure
        if absolute:
            integrand = np.abs(integrand)
        # np.sum adds pairwise, which keeps the rounding error at a few units in the last place.
        result[:, :, unit] = integrand.sum(axis=-1) / sigma ** np.arange(max_order + 1)
    return result


def _gaussian_nodes(
    mu: float, sigma: float, breakpoints: tuple[float, ...]
) -> tuple[FloatArray, FloatArray]:
    """Composite Gauss-Legendre nodes in x, and weights times the standard normal density."""
    special = (np.concatenate([_Z_EDGES, np.asarray(breakpoints, dtype=np.float64)]) - mu) / sigma
    inside = special[np.abs(special) < HALF_WIDTH]
    edges = np.unique(np.concatenate([_X_EDGES, inside]))
    nodes, weights = np.polynomial.legendre.leggauss(NODES_PER_PANEL)
    centre, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    x = (centre[:, None] + half[:, None] * nodes).ravel()
    measure = (half[:, None] * weights).ravel() * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return x, measure


def _hermite_polynomials(x: FloatArray, max_order: int) -> FloatArray:
    """He_0(x), ..., He_max_order(x), by He_{k+1} = x He_k - k He_{k-1}."""
    values = [np.ones_like(x), x]
    for k in range(1, max_order):
        values.append(x * values[k] - k * values[k - 1])
    return np.stack(values[: max_order + 1])


# ---- activations --------------------------------------------------------------------------------


def _sigmoid(z: FloatArray) -> FloatArray:
    return np.asarray(np.exp(-np.logaddexp(0.0, -z)))


def _gelu_tanh(z: FloatArray) -> FloatArray:
    # (1 + tanh(u)) / 2 = sigmoid(2 u), without the cancellation at negative u.
    return z * _sigmoid(2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))


def _elu(z: FloatArray) -> FloatArray:
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0.0)))


def leaky_relu(slope: float) -> ScalarActivation:
    """z for positive z and slope * z otherwise."""
    return ScalarActivation(lambda z: np.where(z > 0, z, slope * z), (0.0,), f"leaky_relu({slope})")


ACTIVATIONS: Mapping[str, ScalarActivation] = MappingProxyType(
    {
        "identity": ScalarActivation(lambda z: z, (), "identity"),
        "square": ScalarActivation(lambda z: z**2, (), "square"),
        "cube": ScalarActivation(lambda z: z**3, (), "cube"),
        "relu": ScalarActivation(lambda z: np.maximum(z, 0.0), (0.0,), "relu"),
        "leaky_relu": leaky_relu(0.01),
        "abs": ScalarActivation(np.abs, (0.0,), "abs"),
        "elu": ScalarActivation(_elu, (0.0,), "elu"),
        "gelu": ScalarActivation(lambda z: z * ndtr(z), (), "gelu"),
        "gelu_tanh": ScalarActivation(_gelu_tanh, (), "gelu_tanh"),
        "silu": ScalarActivation(lambda z: z * _sigmoid(z), (), "silu"),
        "tanh": ScalarActivation(np.tanh, (), "tanh"),
        "sigmoid": ScalarActivation(_sigmoid, (), "sigmoid"),
        "softplus": ScalarActivation(lambda z: np.logaddexp(0.0, z), (), "softplus"),
        "hardtanh": ScalarActivation(lambda z: np.clip(z, -1.0, 1.0), (-1.0, 1.0), "hardtanh"),
        "sign": ScalarActivation(np.sign, (0.0,), "sign"),
        "heaviside": ScalarActivation(lambda z: (z > 0).astype(np.float64), (0.0,), "heaviside"),
    }
)
