"""Joint tails against one-dimensional quadrature and where they are known."""

import itertools
import math

import numpy as np
import pytest
import torch

from pushforward.gaussians.joint_tails import joint_upper_tail
from scenarios import normal


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("rho", [0.3, 0.89, 0.91, 0.999, 1.0])
def test_joint_tails_by_quadrature(rho, sign):
    # P(x > u, y > w) as an integral over x of the tail of y given x, cut where that is steep.
    x, weights = np.polynomial.legendre.leggauss(40)
    q = math.sqrt(max(1 - rho * rho, 1e-30))
    for u, w in [(0.2, -0.4), (-1.0, -1.0), (0.5, 0.5), (2.0, 2.001), (-30.0, 0.1), (39.0, -39.0)]:
        turn = w / (sign * rho)
        near = [turn + q * t for t in np.linspace(-10, 10, 41)]
        edges = np.unique(np.clip([*np.linspace(-10, 10, 41), *near], max(u, -10.0), 10.0))
        total = 0.0
        for low, high in itertools.pairwise(edges):
            z = (low + high) / 2 + (high - low) / 2 * x
            density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
            tail = torch.special.ndtr(torch.from_numpy((sign * rho * z - w) / q)).numpy()
            total += (high - low) / 2 * (weights * density * tail).sum()
        product = math.erfc(u / math.sqrt(2)) * math.erfc(w / math.sqrt(2)) / 4
        arguments = [torch.tensor([value], dtype=torch.float64) for value in (u, w, sign * rho)]
        found = joint_upper_tail(*arguments).item()
        assert found == pytest.approx(total - product, abs=1e-12)


def test_limits():
    u, w = normal(0, 50), normal(1, 50)
    below, above = torch.special.ndtr(torch.stack([u, w])), torch.special.ndtr(-torch.stack([u, w]))
    product, one = above.prod(0), torch.ones(50, dtype=torch.float64)
    torch.testing.assert_close(joint_upper_tail(u, w, one), above.amin(0) - product)
    opposite = (above[0] - below[1]).clamp(min=0) - product
    torch.testing.assert_close(joint_upper_tail(u, w, -one), opposite, atol=1e-12, rtol=1e-10)
    assert not joint_upper_tail(u, w, 0 * one).any()


def test_at_the_origin_it_is_an_arc_sine():
    r = torch.linspace(-1, 1, 101, dtype=torch.float64)
    zero = torch.zeros_like(r)
    torch.testing.assert_close(joint_upper_tail(zero, zero, r), torch.asin(r) / (2 * math.pi))


def test_the_two_rules_meet():
    u, w = 3 * normal(2, 400), 3 * normal(3, 400)
    at = torch.full((400,), 0.9, dtype=torch.float64)
    below, above = (joint_upper_tail(u, w, at + step) for step in (-1e-9, 1e-9))
    # The bivariate density is at most 0.37 at this correlation.
    assert float((above - below).abs().max()) < 1e-9
