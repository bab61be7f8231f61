"""Tables of Hermite coefficients of an activation by brute-force quadrature."""

import math

import numpy as np
import torch

from oracles.wick import ScalarActivation, wick_coefficients, wick_rounding

__all__ = ["assert_table", "brute_force"]


def brute_force(activation, mean, std, max_power, max_degree):
    """E[(phi(m + s x) - phi(m))^p He_k(x)] and the scale of its rounding error, unit by unit."""
    expected = torch.empty(max_power, max_degree + 1, len(mean), dtype=torch.float64)
    rounding = torch.empty_like(expected)
    degrees, powers = np.arange(max_degree + 1), np.arange(max_power)[:, None]
    roots = np.array([math.sqrt(math.factorial(k)) for k in degrees])
    for unit, (m, s) in enumerate(zip(mean.tolist(), std.tolist(), strict=True)):
        center = activation(torch.tensor(m, dtype=torch.float64)).item()
        shifted = ScalarActivation(
            lambda z, c=center: activation(torch.from_numpy(z)).numpy() - c,
            activation.breakpoints,
        )
        scale = s**degrees
        table = wick_coefficients(shifted, m, s * s, max_degree, max_power)
        noise = wick_rounding(shifted, m, s * s, max_degree, max_power)
        expected[..., unit] = torch.from_numpy(table[1:, :, 0] * scale)
        # phi(m + s x) - phi(m) is known to eps (|m| + |phi(m)|) only, in every factor of its power.
        lost = np.finfo(np.float64).eps * (abs(m) + abs(center))
        size = lost + np.max(np.abs(table[1] * scale[:, None] / roots[:, None]))
        noise = noise[1:, :, 0] * scale + 4 * roots * (powers + 1) * lost * size**powers
        rounding[..., unit] = torch.from_numpy(noise)
    return expected, rounding


def assert_table(activation, mean, std, *, relative, max_power=4, max_degree=6):
    """`relative` to the largest coefficient of a row, rounding and 1e-15 aside."""
    found = activation.hermite_table(mean, std, max_power, max_degree)
    expected, rounding = brute_force(activation, mean, std, max_power, max_degree)
    torch.testing.assert_close(found.center, activation(mean))
    assert found.values.shape == expected.shape
    factorials = torch.tensor([math.factorial(k) for k in range(max_degree + 1)])
    root = factorials.double().sqrt()[:, None]
    scale = root * (expected.abs() / root).amax(1, keepdim=True)
    error = (found.values - expected).abs()
    allowed = relative * scale + 16 * rounding + 1e-15
    worst = int((error - allowed).argmax())
    assert bool((error <= allowed).all()), (worst, error.flatten()[worst])
