"""Tail probabilities against gamma and noncentral chi-squared laws, and their own contract."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pushforward.errors import OptionError
from pushforward.gaussians.tails import quantile, tail_probability

METHODS = ("saddlepoint", "edgeworth", "gaussian")
every_method = pytest.mark.parametrize("method", METHODS)


def f64(*values):
    return [torch.as_tensor(value, dtype=torch.float64) for value in values]


def gamma_cumulants(shape):
    return f64(shape, shape, 2 * shape, 6 * shape)


def tail(law, cumulants, deviations, method="saddlepoint"):
    """Estimated over true probability at thresholds in standard deviations."""
    mean, variance, third, fourth = cumulants
    level = mean + variance.sqrt() * torch.tensor(deviations, dtype=torch.float64)
    estimate = tail_probability(level, mean, variance, third, fourth, method)
    truth = torch.from_numpy(np.asarray(law.sf(level.numpy())))
    return estimate / truth


def test_a_gaussian_is_exact_by_every_method():
    from scipy import stats

    level = torch.linspace(-9, 50, 60, dtype=torch.float64)
    mean, variance = f64(0.4, 2.25)
    expected = torch.from_numpy(stats.norm.sf(level.numpy(), 0.4, 1.5))
    zero = torch.zeros((), dtype=torch.float64)
    for method in METHODS:
        for higher in ((), (zero, zero)):
            found = tail_probability(level, mean, variance, *higher, method=method)
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("shape", "near", "far"), [(300.0, 1e-3, 0.09), (50.0, 0.005, 0.31), (10.0, 0.03, 0.56)]
)
def test_saddlepoint_on_gamma_laws(shape, near, far):
    from scipy import stats

    law, cumulants = stats.gamma(shape), gamma_cumulants(shape)
    ratios = tail(law, cumulants, [-1.5, -0.5, 0.0, 0.5, 1.0, 2.0])
    assert (ratios - 1).abs().max() < near
    ratios = tail(law, cumulants, [3.0, 4.0, 5.0, 6.0])
    assert (ratios - 1).abs().max() < far
    # Four cumulants underestimate a tail that decays like exp(-x).
    assert bool((ratios < 1).all())


def test_saddlepoint_on_a_noncentral_chi_squared_law():
    from scipy import stats

    df, shift = 20.0, 10.0
    cumulants = f64(df + shift, 2 * (df + 2 * shift), 8 * (df + 3 * shift), 48 * (df + 4 * shift))
    ratios = tail(stats.ncx2(df, shift), cumulants, [-1.5, 0.0, 1.0, 2.0, 4.0, 6.0])
    assert (ratios[:4] - 1).abs().max() < 0.02
    assert (ratios[4:] - 1).abs().max() < 0.5


def test_edgeworth_wins_near_the_mean_and_loses_in_the_tail():
    from scipy import stats

    law, cumulants = stats.gamma(20.0), gamma_cumulants(20.0)
    near, far = [-0.5, 0.0, 0.5, 1.0], [4.0, 5.0, 6.0]
    errors = {
        method: [(tail(law, cumulants, z, method) - 1).abs() for z in (near, far)]
        for method in METHODS
    }
    assert errors["edgeworth"][0].max() < 3e-3
    assert bool((errors["saddlepoint"][1] < errors["edgeworth"][1]).all())
    assert bool((errors["edgeworth"][1] < errors["gaussian"][1]).all())


@pytest.mark.parametrize("shape", [10.0, 100.0])
def test_the_left_tail_of_a_reflected_law_is_the_right_tail(shape):
    mean, variance, third, fourth = gamma_cumulants(shape)
    level = mean + variance.sqrt() * torch.linspace(-4, 6, 21, dtype=torch.float64)
    for method in METHODS:
        right = tail_probability(level, mean, variance, third, fourth, method)
        left = 1 - tail_probability(-level, -mean, variance, -third, fourth, method)
        torch.testing.assert_close(right, left, rtol=1e-9, atol=1e-14)


cumulant = st.floats(-1, 1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(-5, 5), st.floats(-3, 3), cumulant, st.floats(-0.5, 2.0))
def test_saddlepoint_is_a_survival_function(mean, log_variance, c3, c4):
    mean, variance = f64(mean, 10.0**log_variance)
    level = mean + variance.sqrt() * torch.linspace(-8, 8, 161, dtype=torch.float64)
    found = tail_probability(level, mean, variance, c3 * variance**1.5, c4 * variance**2)
    assert bool(((found >= 0) & (found <= 1)).all())
    assert found.diff().max() <= 1e-4
    assert found[0] > 0.999
    assert found[-1] < 1e-3


EXTREMES = (-1e12, -300.0, -10.0, -2.0, 0.0, 3.0, 50.0, 1e4, 1e12)


@every_method
@pytest.mark.parametrize(("c3", "c4"), list(itertools.product(EXTREMES, EXTREMES)))
def test_extreme_cumulants_give_probabilities(c3, c4, method):
    # Propagation that breaks down produces such cumulants; the answer may be poor but not NaN.
    level = torch.tensor([-torch.inf, -1e150, -30, -2, 0, 1e-9, 1, 7, 1e9, torch.inf]).double()
    zero, one, third, fourth = f64(0.0, 1.0, c3, c4)
    found = tail_probability(level, zero, one, third, fourth, method)
    assert bool(((found >= 0) & (found <= 1)).all())
    if method == "saddlepoint":
        assert found.diff().max() <= 2e-3


@every_method
def test_infinite_thresholds(method):
    level = torch.tensor([-torch.inf, torch.inf], dtype=torch.float64)
    found = tail_probability(level, *f64(1.0, 4.0, 0.3, 0.2), method=method)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]).double(), rtol=0, atol=1e-10)


@every_method
def test_without_variance_the_variable_is_a_constant(method):
    level = torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64)
    for variance in (0.0, -1e-3):
        mean, spread, third, fourth = f64(1.0, variance, 0.1, 0.1)
        spread.requires_grad_()
        found = tail_probability(level, mean, spread, third, fourth, method)
        assert found.tolist() == [1.0, 0.0, 0.0]
        found.sum().backward()
        assert bool(spread.grad.isfinite())


@every_method
@pytest.mark.parametrize("q", [1e-6, 0.01, 0.4, 0.5, 0.93, 1 - 1e-5])
def test_quantile_inverts_the_tail(method, q):
    probability, mean, variance, third, fourth = f64(q, 3.0, 4.0, 2.0, 1.5)
    level = quantile(probability, mean, variance, third, fourth, method)
    found = 1 - tail_probability(level, mean, variance, third, fourth, method)
    if method != "edgeworth":  # clipped, so not every probability is attained
        assert found.item() == pytest.approx(q, rel=1e-7, abs=1e-12)
    else:
        assert found.item() == pytest.approx(q, abs=1e-2)


def test_quantiles_of_a_gaussian():
    from scipy import stats

    q = torch.tensor([1e-9, 0.2, 0.5, 0.999], dtype=torch.float64)
    found = quantile(q, *f64(-1.0, 9.0))
    torch.testing.assert_close(found, torch.from_numpy(stats.norm.ppf(q.numpy(), -1.0, 3.0)))
    constant = quantile(q, *f64(2.0, 0.0))
    torch.testing.assert_close(constant, torch.full_like(q, 2.0))


@pytest.mark.parametrize("q", [0.0, 1.0, -0.1, float("nan")])
def test_quantile_refuses_improbable_probabilities(q):
    with pytest.raises(OptionError, match="quantile"):
        quantile(*f64(q, 0.0, 1.0))


def test_an_unknown_method_is_named():
    with pytest.raises(OptionError, match=r"'normal'.*Choose one of 'saddlepoint'"):
        tail_probability(*f64(0.0, 0.0, 1.0), method="normal")


@every_method
@pytest.mark.parametrize(("c3", "c4"), [(0.0, 0.0), (0.4, 0.3), (-0.8, 0.5), (0.3, -0.4)])
def test_gradients(method, c3, c4):
    # z = 0 is the removable singularity of Lugannani and Rice's formula.
    level = torch.tensor([-2.0, -1e-6, 0.0, 1e-5, 0.7, 3.0], dtype=torch.float64)
    arguments = [level, *(x.expand(6).clone() for x in f64(0.0, 1.0, c3, c4))]
    for argument in arguments:
        argument.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *args: tail_probability(*args, method=method), arguments, atol=1e-6, rtol=1e-4
    )


def test_the_density_is_continuous_through_the_mean():
    level = torch.linspace(-0.01, 0.01, 401, dtype=torch.float64, requires_grad=True)
    found = tail_probability(level, *f64(0.0, 1.0, 0.6, 0.4))
    (slope,) = torch.autograd.grad(found.sum(), level)
    assert bool((slope < 0).all())
    assert slope.diff().abs().max() < 1e-4


def test_shapes_broadcast():
    level = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mean = torch.zeros(3, dtype=torch.float64)
    variance = torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64)
    for method in METHODS:
        third = 0.1 * variance
        assert tail_probability(level, mean, variance, third, third, method).shape == (2, 3)
        q = torch.tensor([[0.1], [0.9]], dtype=torch.float64)
        assert quantile(q, mean, variance, third, third, method).shape == (2, 3)


def test_precision_follows_the_input():
    one = torch.ones(2)
    assert tail_probability(one, 0 * one, one, 0.1 * one, 0.1 * one).dtype == torch.float32


def test_a_slightly_negative_fourth_cumulant_does_not_spoil_far_quantiles():
    one = torch.ones(1, dtype=torch.float64)
    for q in (0.025, 1e-6, 1 - 1e-6):
        level = torch.tensor([q], dtype=torch.float64)
        found = quantile(level, 0 * one, one, -0.004 * one, -0.001 * one)
        torch.testing.assert_close(found, torch.special.ndtri(level), rtol=0.02, atol=0.0)
