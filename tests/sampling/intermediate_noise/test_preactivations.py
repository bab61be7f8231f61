"""Units before their activation: exact laws against brute integration, the fast path, smooth ones.

The exact sampler is a quantile function, so the tests ask that the integrated law up to a draw be
the uniform it was made with, which no sampling test could resolve.
"""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr, ndtri

from oracles.elementwise_conditionals import ks_pvalue, log_integral, noisy_unit
from pushforward.errors import OptionError, UnsupportedLayerError
from pushforward.gaussians.activations import PiecewisePolynomial, identity
from pushforward.sampling.intermediate_noise import preactivations
from pushforward.sampling.intermediate_noise.preactivations import (
    PiecewiseLinear,
    sample_preactivations,
    segment_log_weights,
    update_preactivations_smooth,
)

ACTIVATIONS = {
    "relu": PiecewiseLinear.relu(),
    "leaky": PiecewiseLinear.leaky_relu(0.1),
    "abs": PiecewiseLinear.absolute(),
    "sign": PiecewiseLinear.sign(),
    "hardtanh": PiecewiseLinear.hardtanh(),
    "identity": PiecewiseLinear.identity(),
    "bent elsewhere": PiecewiseLinear((0.7,), (0.3, -0.5), (1.0, 0.2)),
    "softshrink": PiecewiseLinear((-0.5, 0.5), (1.0, 0.0, 1.0), (0.5, 0.0, -0.5)),
}
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)
# m, x, d_z, d_x: typical, unequal noises, small noises, and images that contradict the prior.
CASES = (
    (0.3, 0.5, 0.4, 0.2),
    (-0.8, 0.1, 1.0, 1.0),
    (1.2, -0.7, 0.05, 0.5),
    (0.01, 0.02, 1e-4, 1e-4),
    (0.5, -0.5, 1e-2, 1e-3),
    (3.0, -9.0, 1.0, 1.0),
    (12.0, -30.0, 1.0, 1.0),
    (40.0, -100.0, 1.0, 1.0),
    (-30.0, 60.0, 1.0, 0.5),
)
UNIFORMS = (1e-9, 1e-3, 0.1, 0.37, 0.5, 0.77, 0.99, 1 - 1e-9)


def f64(*values):
    return [torch.as_tensor(value, dtype=torch.float64) for value in values]


def as_numpy(activation):
    def function(z):
        values = activation.slopes[0] * z + activation.intercepts[0]
        for b, s, c in zip(
            activation.breaks, activation.slopes[1:], activation.intercepts[1:], strict=True
        ):
            values = np.where(z < b, values, s * z + c)
        return values

    return function


def support(activation, m, x, dz, dx):
    """A finite interval beyond which there is nothing."""
    places = [m, x, -x, *activation.breaks]
    reach = 40 * math.sqrt(max(dz, dx))
    return min(places) - reach, max(places) + reach


def log_law(activation, m, x, dz, dx, low=-math.inf, high=math.inf):
    """``log p(x, low < z < high | m)``."""
    least, greatest = support(activation, m, x, dz, dx)
    density = noisy_unit(as_numpy(activation), m, x, dz, dx)
    return log_integral(density, max(low, least), min(high, greatest), activation.breaks)


@every_activation
@pytest.mark.parametrize("case", CASES)
def test_log_weights_are_integrals_over_the_segments(name, case):
    activation = ACTIVATIONS[name]
    m, x = f64(*case[:2])
    weights = segment_log_weights(activation, m, x, *case[2:]).tolist()
    ends = (-math.inf, *activation.breaks, math.inf)
    for weight, low, high in zip(weights, ends, ends[1:], strict=False):
        expected = log_law(activation, *case, low, high)
        assert weight == pytest.approx(expected, abs=1e-10, rel=1e-12)


@pytest.mark.parametrize(
    ("m", "x", "d", "expected"),
    [
        (3, -9, 1, 0.3425),
        (4, -12, 1, 0.3391),
        (6, -15, 1, 0.4007),
        (12, -30, 1, 0.4002),
        (40, -100, 1, 0.4000),
        (0.5, -4, 1e-5, 0.1250),
    ],
)
def test_probability_of_the_positive_side_far_out(m, x, d, expected):
    # The published formula, with erf and erfc, gives 0 or 1 in the last three of these.
    m, x = f64(m, x)
    weights = segment_log_weights(PiecewiseLinear.relu(), m, x, d, d)
    assert torch.softmax(weights, 0)[1].item() == pytest.approx(expected, abs=6e-5)


@every_activation
@pytest.mark.parametrize("case", CASES)
def test_the_law_up_to_a_draw_is_its_uniform(name, case):
    activation = ACTIVATIONS[name]
    (uniforms,) = f64(UNIFORMS)
    m, x = torch.full_like(uniforms, case[0]), torch.full_like(uniforms, case[1])
    draws = sample_preactivations(activation, m, x, *case[2:], uniforms).tolist()
    whole = log_law(activation, *case)
    for z, uniform in zip(draws, UNIFORMS, strict=True):
        if uniform < 0.5:
            share = math.exp(log_law(activation, *case, high=z) - whole)
            assert share == pytest.approx(uniform, abs=1e-10, rel=1e-8)
        else:
            share = math.exp(log_law(activation, *case, low=z) - whole)
            assert share == pytest.approx(1 - uniform, abs=1e-10, rel=1e-6)


@pytest.mark.parametrize("case", [CASES[1], CASES[5]])
def test_the_cases_could_tell_a_mixture_without_its_probabilities(case, monkeypatch):
    # Dropping Phi() from the weights is the mistake that simulation-based calibration finds best.
    m, x = f64(*case[:2])
    right = torch.softmax(segment_log_weights(PiecewiseLinear.relu(), m, x, *case[2:]), 0)
    gaussian = lambda low, high: 0 * (low + high).nan_to_num() - 0.5 * math.log(2 * math.pi)  # noqa: E731
    monkeypatch.setattr(preactivations, "log_interval_mills", gaussian)
    wrong = torch.softmax(segment_log_weights(PiecewiseLinear.relu(), m, x, *case[2:]), 0)
    assert abs(right - wrong).max() > 0.01


def spread(generator, scale, shape=(6000,)):
    draw = lambda: scale * torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(), draw(), torch.rand(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", [n for n, a in ACTIVATIONS.items() if len(a.slopes) > 1])
@pytest.mark.parametrize("noises", [(1.0, 1.0), (1e-4, 1e-4), (0.3, 0.05)])
def test_the_fast_path_gives_what_the_general_one_gives(name, noises):
    g = torch.Generator().manual_seed(7)
    for scale in (0.01, 1.0, 10.0, 100.0):
        m, x, uniforms = spread(g, scale)
        fast = sample_preactivations(ACTIVATIONS[name], m, x, *noises, uniforms)
        parts = preactivations._draw_segments(ACTIVATIONS[name], m, x, *noises, uniforms)
        # In deviations; a uniform within rounding of the share of a segment may fall either way.
        apart = (fast - parts).abs() / min(noises) ** 0.5
        assert apart.quantile(0.999) < 1e-9
        assert apart.max() < 1e-7


def test_the_fast_path_hands_over_what_underflows():
    g = torch.Generator().manual_seed(8)
    m, x, uniforms = spread(g, 1.0)
    calls = []
    general = preactivations._draw_segments

    def spy(activation, *tensors):
        calls.append(len(tensors[-1]))
        return general(activation, *tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preactivations, "_draw_segments", spy)
        sample_preactivations(PiecewiseLinear.relu(), m, x, 1.0, 1.0, uniforms)
        assert calls == []
        far = torch.where(torch.arange(6000) < 10, 300.0, m)
        sample_preactivations(PiecewiseLinear.relu(), far, -3 * far, 1.0, 1.0, uniforms)
        assert calls == [10]


@every_activation
def test_draws_increase_with_their_uniform(name):
    uniforms = torch.linspace(0, 1 - 2.0**-53, 4001, dtype=torch.float64)
    for m, x, dz, dx in CASES:
        images = torch.full_like(uniforms, x)
        draws = sample_preactivations(
            ACTIVATIONS[name], torch.full_like(uniforms, m), images, dz, dx, uniforms
        )
        assert bool(draws.isfinite().all())
        assert bool((draws.diff() > -1e-10 * dz**0.5).all())


def test_one_segment_is_a_gaussian():
    g = torch.Generator().manual_seed(9)
    m, x, uniforms = spread(g, 3.0)
    dz, dx = 0.5, 0.2
    draws = sample_preactivations(PiecewiseLinear.identity(), m, x, dz, dx, uniforms)
    variance = 1 / (1 / dz + 1 / dx)
    expected = variance * (m / dz + x / dx) + math.sqrt(variance) * torch.special.ndtri(uniforms)
    assert torch.allclose(draws, expected, atol=1e-12)


def test_a_break_without_a_bend_changes_nothing():
    g = torch.Generator().manual_seed(10)
    m, x, uniforms = spread(g, 2.0)
    straight = sample_preactivations(PiecewiseLinear.identity(), m, x, 0.5, 0.2, uniforms)
    for breaks in ((0.3,), (-1.0, 0.3)):
        one = (1.0,) * (len(breaks) + 1)
        broken = PiecewiseLinear(breaks, one, (0.0,) * len(one))
        draws = sample_preactivations(broken, m, x, 0.5, 0.2, uniforms)
        assert torch.allclose(draws, straight, atol=1e-10)


def test_a_sign_tells_the_side_when_it_is_seen_clearly():
    g = torch.Generator().manual_seed(11)
    m, x, uniforms = spread(g, 1.0)
    draws = sample_preactivations(PiecewiseLinear.sign(), m, x.sign(), 1.0, 1e-3, uniforms)
    assert torch.equal(draws.sign(), x.sign())


@pytest.mark.parametrize("name", ["relu", "hardtanh"])
def test_noises_of_each_chain_are_those_of_chains_run_alone(name):
    g = torch.Generator().manual_seed(12)
    m, x, uniforms = spread(g, 30.0, (3, 40, 5))
    dz, dx = f64([1.0, 0.1, 1e-3], [0.5, 1.0, 1e-2])
    together = sample_preactivations(
        ACTIVATIONS[name], m, x, dz[:, None, None], dx[:, None, None], uniforms
    )
    for chain in range(3):
        alone = sample_preactivations(
            ACTIVATIONS[name],
            m[chain],
            x[chain],
            dz[chain].item(),
            dx[chain].item(),
            uniforms[chain],
        )
        assert torch.allclose(together[chain], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["relu", "sign", "hardtanh"])
def test_prior_means_shared_by_chains_broadcast(name):
    g = torch.Generator().manual_seed(13)
    _, x, uniforms = spread(g, 1.0, (3, 20, 2))
    m = torch.randn(1, 20, 2, generator=g, dtype=torch.float64)
    draws = sample_preactivations(ACTIVATIONS[name], m, x, 0.1, 0.2, uniforms)
    whole = sample_preactivations(ACTIVATIONS[name], m.expand(3, 20, 2), x, 0.1, 0.2, uniforms)
    assert torch.equal(draws, whole)


@every_activation
def test_float32_is_computed_in_float64_and_arguments_are_left_alone(name):
    g = torch.Generator().manual_seed(14)
    m, x, uniforms = spread(g, 5.0)
    m, x = m.float(), x.float()
    kept = [t.clone() for t in (m, x, uniforms)]
    draws = sample_preactivations(ACTIVATIONS[name], m, x, 0.25, 0.5, uniforms)
    assert draws.dtype == torch.float32
    assert all(torch.equal(t, k) for t, k in zip((m, x, uniforms), kept, strict=True))
    double = sample_preactivations(ACTIVATIONS[name], m.double(), x.double(), 0.25, 0.5, uniforms)
    assert torch.equal(draws, double.float())


@every_activation
def test_nan_is_not_hidden(name):
    m, x, uniforms = f64([math.nan, 0.0, 0.0], [0.0, math.nan, 0.0], [0.5] * 3)
    draws = sample_preactivations(ACTIVATIONS[name], m, x, 1.0, 1.0, uniforms)
    assert draws.isnan().tolist() == [True, True, False]


@every_activation
def test_a_function_is_what_its_segments_say(name):
    z = torch.linspace(-3, 3, 61, dtype=torch.float64)
    expected = torch.from_numpy(as_numpy(ACTIVATIONS[name])(z.numpy()))
    assert torch.equal(ACTIVATIONS[name](z), expected)


def test_functions_with_names():
    z = torch.linspace(-3, 3, 60, dtype=torch.float64)
    assert torch.equal(PiecewiseLinear.relu()(z), torch.relu(z))
    assert torch.equal(PiecewiseLinear.leaky_relu(0.2)(z), torch.nn.functional.leaky_relu(z, 0.2))
    assert torch.equal(PiecewiseLinear.absolute()(z), z.abs())
    assert torch.equal(PiecewiseLinear.sign()(z), z.sign())
    assert torch.equal(PiecewiseLinear.hardtanh()(z), torch.nn.functional.hardtanh(z))
    assert torch.equal(PiecewiseLinear.identity()(z), z)


def test_functions_of_the_gaussian_calculus_convert():
    relu = PiecewisePolynomial("relu", (0.0,), ((0.0,), (0.0, 1.0)))
    assert PiecewiseLinear.of(relu) == PiecewiseLinear.relu()
    assert PiecewiseLinear.of(identity()) == PiecewiseLinear.identity()


def test_a_curved_piece_is_refused():
    square = PiecewisePolynomial("square", (), ((0.0, 0.0, 1.0),))
    with pytest.raises(UnsupportedLayerError, match="not linear"):
        PiecewiseLinear.of(square)


@pytest.mark.parametrize(
    ("breaks", "slopes", "intercepts"),
    [((0.0,), (1.0,), (0.0,)), ((1.0, 0.0), (0.0,) * 3, (0.0,) * 3), ((), (1.0,), ())],
)
def test_segments_that_do_not_fit_are_refused(breaks, slopes, intercepts):
    with pytest.raises(OptionError, match="breaks"):
        PiecewiseLinear(breaks, slopes, intercepts)


# --- smooth activations --------------------------------------------------------------------------

SMOOTH = {
    "tanh": (torch.tanh, np.tanh),
    "silu": (torch.nn.functional.silu, lambda z: z / (1 + np.exp(-z))),
}


def quantiles(density, low, high, levels):
    """Exact draws, by tabulating the law on a grid finer than any feature of it."""
    grid = np.linspace(low, high, 200_001)
    mass = np.exp(density(grid) - density(grid).max())
    cumulative = np.concatenate([[0], np.cumsum((mass[1:] + mass[:-1]) / 2)])
    cumulative /= cumulative[-1]
    distribution = lambda z: np.interp(z, grid, cumulative)  # noqa: E731
    return np.interp(levels, cumulative, grid), distribution


@pytest.mark.statistical
@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize(
    "case", [(0.3, 0.5, 0.4, 0.2), (-1.5, -0.2, 1.0, 0.01), (0.5, 2.0, 0.3, 0.3)]
)
@pytest.mark.parametrize("proposals", [1, 3, 16])
def test_a_smooth_update_leaves_the_law_invariant(name, case, proposals):
    # Starting from exact draws, one update gives exact draws, however soon it gives up. Draws are
    # stratified before the update, so the statistic is smaller than its usual law would have it.
    function, in_numpy = SMOOTH[name]
    m, x, dz, dx = case
    count = 40_000
    density = noisy_unit(in_numpy, m, x, dz, dx)
    start, distribution = quantiles(
        density, m - 8 * dz**0.5 - 2, m + 8 * dz**0.5 + 2, (np.arange(count) + 0.5) / count
    )
    g = torch.Generator().manual_seed(15)
    (current,) = f64(start)
    rows = torch.rand(2 + proposals, count, generator=g, dtype=torch.float64)
    mean, image = torch.full_like(current, m), torch.full_like(current, x)
    moved = update_preactivations_smooth(function, current, mean, image, dz, dx, rows)
    assert (moved != current).double().mean() > 0.1
    assert ks_pvalue(moved.numpy(), distribution) > 1e-4


def way_back(current, m, x, dz, dx, rows):
    """The update of one unit in plain numbers: where it goes, and uniforms that lead back."""

    def misfit(z):
        return (x - math.tanh(z)) ** 2 / (2 * dx)

    level, direction, first, *following = rows
    highest = misfit(current) - math.log(1 - level)
    deviation, other = current - m, ndtri(direction) * math.sqrt(dz)
    angle = 2 * math.pi * first
    low, high, tried = angle - 2 * math.pi, angle, 1
    start = angle
    while misfit(z := m + deviation * math.cos(angle) + other * math.sin(angle)) > highest:
        if tried > len(following):
            return current, rows
        low, high = (angle, high) if angle < 0 else (low, angle)
        angle = low + (high - low) * following[tried - 1]
        tried += 1
    back = list(rows)
    back[0] = -math.expm1(misfit(z) - highest)
    back[1] = ndtr((other * math.cos(angle) - deviation * math.sin(angle)) / math.sqrt(dz))
    if tried == 1:
        back[2] = 1 - first
    else:  # the same proposals in the same brackets, seen from the new point, then the old point
        back[2] = (start - angle) / (2 * math.pi)
        back[1 + tried] = (0 - low) / (high - low)
    return z, back


def test_a_smooth_update_can_be_walked_back():
    # Every move has a reverse of the same probability: that is detailed balance, path by path.
    m, x, dz, dx = 0.3, 0.5, 0.4, 0.02
    g = torch.Generator().manual_seed(18)
    rows = torch.rand(6, 500, generator=g, dtype=torch.float64)
    current = m + 0.3 * torch.randn(500, generator=g, dtype=torch.float64)
    mean, image = torch.full_like(current, m), torch.full_like(current, x)
    walks = [
        way_back(z, m, x, dz, dx, r) for z, r in zip(current.tolist(), rows.T.tolist(), strict=True)
    ]
    expected, back = f64([z for z, _ in walks], [r for _, r in walks])
    moved = update_preactivations_smooth(torch.tanh, current, mean, image, dz, dx, rows)
    assert torch.allclose(moved, expected, atol=1e-12)
    returned = update_preactivations_smooth(torch.tanh, moved, mean, image, dz, dx, back.T)
    assert torch.allclose(returned, current, atol=1e-9)
    assert 0.5 < (moved != current).double().mean() < 0.99


def test_sixteen_proposals_serve_a_hundredth_of_the_prior_variance():
    g = torch.Generator().manual_seed(19)
    z = 0.1 * torch.randn(5000, generator=g, dtype=torch.float64)
    image = z.tanh()
    rows = torch.rand(18, 5000, generator=g, dtype=torch.float64)
    moved = update_preactivations_smooth(torch.tanh, z, 0 * z, image, 1.0, 0.01, rows)
    assert (moved != z).double().mean() > 0.99


@pytest.mark.statistical
def test_smooth_updates_forget_where_they_started():
    m, x, dz, dx = 0.3, 0.5, 0.4, 0.2
    count = 20_000
    density = noisy_unit(np.tanh, m, x, dz, dx)
    _, distribution = quantiles(density, -6, 6, np.array([0.5]))
    g = torch.Generator().manual_seed(16)
    z = torch.full((count,), 25.0, dtype=torch.float64)
    mean, image = torch.full_like(z, m), torch.full_like(z, x)
    for _ in range(30):
        rows = torch.rand(18, count, generator=g, dtype=torch.float64)
        z = update_preactivations_smooth(torch.tanh, z, mean, image, dz, dx, rows)
    assert ks_pvalue(z.numpy(), distribution) > 1e-4


def test_a_smooth_update_is_a_pure_function_of_its_uniforms():
    g = torch.Generator().manual_seed(17)
    z, x, _ = spread(g, 1.0, (2, 30))
    rows = torch.rand(10, 2, 30, generator=g, dtype=torch.float64)
    kept = z.clone()
    moved = update_preactivations_smooth(torch.tanh, z, 0 * z, x, 0.5, 0.1, rows)
    again = update_preactivations_smooth(torch.tanh, z, 0 * z, x, 0.5, 0.1, rows)
    alone = update_preactivations_smooth(torch.tanh, z[1:], 0 * z[1:], x[1:], 0.5, 0.1, rows[:, 1:])
    assert torch.equal(z, kept)
    assert torch.equal(moved, again)
    assert torch.equal(moved[1:], alone)
    single = update_preactivations_smooth(
        torch.tanh, z.float(), 0 * z.float(), x.float(), 0.5, 0.1, rows
    )
    assert single.dtype == torch.float32


def test_a_smooth_update_without_proposals_is_refused():
    z = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(OptionError, match="2 rows"):
        update_preactivations_smooth(torch.tanh, z, z, z, 1.0, 1.0, torch.zeros(2, 3).double())
