"""Restricted Gaussians: probabilities and quantiles against SciPy and integration, far out too."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr, ndtr

from oracles.elementwise_conditionals import excess_mass, log_integral, log_tail
from pushforward.gaussians.truncated import (
    log_interval_mills,
    log_interval_probability,
    truncated_normal,
)

ENDS = (-40.0, -8.0, -5.0, -1.0, -1e-3, 0.0, 0.5, 3.0, 8.0, 20.0, 29.9, 30.1, 40.0, 1e3, 1e4)
WIDTHS = (1e-9, 1e-3, 0.3, 0.7, 2.0, 50.0)
UNIFORMS = (0.0, 1e-12, 1e-6, 0.01, 0.3, 0.5, 0.7, 0.99, 1 - 1e-6, 1 - 1e-12, 1 - 2.0**-53)
LEAST = 2.0**-54  # what a uniform of zero stands for


def f64(*values):
    return [torch.as_tensor(value, dtype=torch.float64) for value in values]


def log_normal(z):
    return -0.5 * z * z - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("low", ENDS)
def test_log_probability_of_an_interval_is_its_integral(low, width):
    high = low + width
    truth = log_integral(log_normal, low, high)
    value = log_interval_probability(*f64(low, high)).item()
    mirrored = log_interval_probability(*f64(-high, -low)).item()
    assert value == pytest.approx(truth, rel=1e-12, abs=1e-11)
    assert mirrored == value


@pytest.mark.parametrize("end", ENDS)
def test_log_probability_of_a_tail_is_that_of_scipy(end):
    below, above = f64([-math.inf, end], [-end, math.inf])
    expected = np.full(2, log_tail(end))
    assert log_interval_probability(below, above).numpy() == pytest.approx(expected, rel=1e-14)


def test_log_probability_of_everything_and_of_nothing():
    low, high = f64([-math.inf, 2.0], [math.inf, 2.0])
    assert log_interval_probability(low, high).tolist() == [0.0, -math.inf]


def test_log_probability_loses_nothing_next_to_one():
    low, high = f64(-9.0, 10.0)
    missing = ndtr(-9.0) + ndtr(-10.0)
    assert log_interval_probability(low, high).item() == pytest.approx(-missing, rel=1e-12)


def test_mills_ratio_is_moderate_where_probability_and_density_underflow():
    low, high = f64(1e6, math.inf)
    assert log_interval_mills(low, high).item() == pytest.approx(-math.log(1e6), abs=1e-11)


def test_log_probability_broadcasts_and_keeps_the_dtype():
    low, high = torch.tensor([[-1.0], [0.0]]), torch.tensor([1.0, 2.0, 3.0])
    value = log_interval_probability(low, high)
    assert value.shape == (2, 3)
    assert value.dtype == torch.float32
    assert value[0, 0].item() == pytest.approx(math.log(ndtr(1) - ndtr(-1)), rel=1e-6)


def assert_quantile(z, low, high, uniform):
    """`z` is the quantile at `uniform` to 1e-10 of the distance from the end at which mass sits."""
    assert low <= z <= high
    uniform = max(uniform, LEAST)
    if low + high < 0:  # mirror, so that the interval has its middle to the right of zero
        z, low, high, uniform = -z, -high, -low, 1 - uniform
    if low >= 0:
        whole = excess_mass(low, high - low) if math.isfinite(high) else 1.0
        reached = excess_mass(low, z - low) / whole
        slope = math.exp(log_normal(z) - log_tail(low)) / whole
    else:
        whole = -math.expm1(np.logaddexp(log_ndtr(low), log_tail(high)))
        middle = max(0.0, low)
        head = (ndtr(z) - ndtr(low)) if z < middle else whole - (ndtr(-z) - ndtr(-high))
        reached, slope = head / whole, math.exp(log_normal(z)) / whole
    # The mass is known to rounding only, which costs this much of the quantile.
    rounding = 4e-16 / slope
    assert abs(reached - uniform) / slope <= 1e-10 * max(abs(z), 1e-3) + rounding


@pytest.mark.parametrize("low", ENDS)
def test_one_sided_draws_are_quantiles(low):
    (uniforms,) = f64(UNIFORMS)
    zeros = torch.zeros_like(uniforms)
    right = truncated_normal(zeros, 1.0, low, math.inf, uniforms)
    left = truncated_normal(zeros, 1.0, -math.inf, -low, uniforms)
    for z, mirrored, uniform in zip(right.tolist(), left.tolist(), UNIFORMS, strict=True):
        assert_quantile(z, low, math.inf, uniform)
        assert_quantile(mirrored, -math.inf, -low, uniform)


@pytest.mark.parametrize("low", ENDS)
def test_two_sided_draws_are_quantiles(low):
    for width in (*WIDTHS, math.inf):
        for a, b in ((low, low + width), (-low - width, -low)):
            (uniforms,) = f64(UNIFORMS)
            zeros = torch.zeros_like(uniforms)
            draws = truncated_normal(zeros, 1.0, zeros + a, zeros + b, uniforms)
            for z, uniform in zip(draws.tolist(), UNIFORMS, strict=True):
                assert_quantile(z, a, b, uniform)


def test_draws_just_beyond_a_far_end_keep_the_digits_of_their_distance():
    (uniforms,) = f64([1e-9, 0.1, 0.5])
    mean, bound = f64([-1e4] * 3, [0.0] * 3)
    draws = truncated_normal(mean, 1.0, bound, math.inf, uniforms)
    # Beyond 1e4 deviations the tail is exponential with rate 1e4, up to 1e-8 of itself.
    assert torch.allclose(draws, -torch.log1p(-uniforms) / 1e4, rtol=3e-8, atol=0)


def test_draws_increase_with_their_uniform():
    uniforms = torch.linspace(0, 1 - 1e-9, 2001, dtype=torch.float64)
    zeros = torch.zeros_like(uniforms)
    for low, high in ((-1.0, 0.5), (-12.0, 9.0), (25.0, 60.0), (-31.0, -30.0), (2.0, 2.0 + 1e-7)):
        draws = truncated_normal(zeros, 1.0, zeros + low, zeros + high, uniforms)
        # The last bits are rounding's.
        assert bool((draws.diff() >= -1e-15 * abs(low)).all())


def test_without_ends_a_draw_is_a_gaussian_quantile():
    (uniforms,) = f64([0.1, 0.5, 0.9])
    draws = truncated_normal(torch.full((3,), 2.0), 3.0, -math.inf, math.inf, uniforms)
    assert torch.allclose(draws.double(), 2 + 3 * torch.special.ndtri(uniforms), atol=1e-6)


def test_mean_and_std_shift_and_scale():
    g = torch.Generator().manual_seed(0)
    uniforms = torch.rand(4, 50, generator=g, dtype=torch.float64)
    mean, (std,) = torch.randn(4, 1, generator=g, dtype=torch.float64), f64([[0.2], [1], [3], [9]])
    draws = truncated_normal(mean, std, -0.5, mean + 2, uniforms)
    standard = truncated_normal(
        torch.zeros(4, 50).double(), 1.0, (-0.5 - mean) / std, 2 / std, uniforms
    )
    assert torch.allclose(draws, mean + std * standard, atol=1e-12)


def test_plain_ends_and_tensors_of_ends_agree():
    g = torch.Generator().manual_seed(1)
    uniforms = torch.rand(500, generator=g, dtype=torch.float64)
    mean = 30 * torch.randn(500, generator=g, dtype=torch.float64)
    infinity = torch.full_like(mean, math.inf)
    for low, high in ((0.0, math.inf), (-math.inf, 0.0), (-math.inf, math.inf)):
        plain = truncated_normal(mean, 1.0, low, high, uniforms)
        ends = (torch.full_like(mean, low), torch.full_like(mean, high))
        assert torch.allclose(plain, truncated_normal(mean, 1.0, *ends, uniforms), rtol=1e-11)
    assert bool((plain < infinity).all())


def test_float32_draws_respect_their_ends():
    g = torch.Generator().manual_seed(2)
    uniforms = torch.rand(20_000, generator=g, dtype=torch.float64)
    for bound in (-4.0, 4.0, 12.0, 50.0):
        draws = truncated_normal(torch.zeros(20_000), 1.0, bound, math.inf, uniforms)
        assert draws.dtype == torch.float32
        assert bool((draws >= bound).all())
        double = truncated_normal(torch.zeros(20_000).double(), 1.0, bound, math.inf, uniforms)
        assert torch.equal(draws, double.float())


def test_nan_is_not_hidden():
    (mean, uniforms) = f64([math.nan, 0.0], [0.5, 0.5])
    draws = truncated_normal(mean, 1.0, 0.0, math.inf, uniforms)
    assert draws.isnan().tolist() == [True, False]
