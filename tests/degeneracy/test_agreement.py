"""Errors of means of chains, on chains whose law is known, and the value at step size zero."""

from math import isnan, nan, sqrt

import pytest
import torch

from degeneracy_problems import F64, draws
from pushforward.degeneracy.agreement import Agreement, agreement, extrapolated


def autoregressive(chains, count, memory, seed=0):
    """Of variance one, from its stationary law on."""
    noise = draws(chains, count, seed=seed)
    trace = noise.clone()
    for step in range(1, count):
        trace[:, step] = memory * trace[:, step - 1] + sqrt(1 - memory**2) * noise[:, step]
    return trace


@pytest.mark.statistical
@pytest.mark.parametrize("memory", [0.0, 0.8])
def test_the_error_is_that_of_the_mean(memory):
    found = [agreement(3 + autoregressive(8, 400, memory, seed)) for seed in range(12)]
    exact = sqrt((1 + memory) / (1 - memory) / (8 * 400))
    errors = torch.tensor([each.standard_error for each in found])
    # The larger of two estimates is too large on average; 12 of them are known to some 10 %.
    assert 0.9 * exact < errors.mean() < 1.5 * exact
    scores = torch.tensor([(each.mean - 3) / each.standard_error for each in found])
    # 12 squares of standard normals: from their quantile of 0.1 % to 4 standard deviations above.
    assert 2.2 < scores.square().sum() < 12 + 4 * sqrt(24)
    effective = torch.tensor([each.effective_draws for each in found]).mean()
    assert abs(effective * exact**2 - 1) < 0.25
    assert all(each.settled for each in found)
    assert all(abs(each.r_hat - 1) < 0.05 for each in found)


def test_chains_in_different_places_have_the_error_of_their_places():
    apart = torch.tensor([0.0, 0.0, 10.0, 10.0], dtype=F64)[:, None]
    found = agreement(autoregressive(4, 200, 0.0) + apart)
    assert abs(found.mean - 5) < 0.2
    assert found.standard_error >= 0.98 * float(apart.std()) / 2
    assert found.r_hat > 1.5
    assert found.settled  # they do not move


def test_a_drift_is_the_second_half_minus_the_first():
    trace = autoregressive(6, 201, 0.5)
    found = agreement(trace)
    half = trace[:, 101:].mean() - trace[:, :100].mean()
    assert found.drift == pytest.approx(float(half), abs=1e-12)
    errors = [agreement(part).standard_error for part in (trace[:, :100], trace[:, 101:])]
    assert found.drift_error < 1.01 * sqrt(errors[0] ** 2 + errors[1] ** 2)
    assert found.drift_error > 0.05
    moving = agreement(trace + torch.linspace(0, 4, 201, dtype=F64))
    assert moving.drift == pytest.approx(found.drift + 2, abs=0.05)
    assert not moving.settled


@pytest.mark.parametrize(
    ("mean", "drift", "error", "settled"),
    [
        (1.0, 0.29, 0.1, True),
        (1.0, -0.29, 0.1, True),
        (1.0, 0.31, 0.1, False),
        (1.0, -0.31, 0.1, False),
        (100.0, 0.9, 0.1, True),
        (-100.0, 0.9, 0.1, True),
        (100.0, 1.1, 0.1, False),
        (1.0, nan, nan, False),
    ],
)
def test_settled_is_within_errors_or_within_a_hundredth(mean, drift, error, settled):
    assert Agreement(mean, 0.1, 100.0, 1.0, drift, error).settled is settled


def test_what_cannot_be_told_is_nan():
    short = agreement(draws(4, 4))
    assert isnan(short.effective_draws)
    assert isnan(short.r_hat)
    assert short.standard_error == pytest.approx(float(draws(4, 4).mean(1).std()) / 2)
    alone = agreement(draws(1, 1))
    assert isnan(alone.standard_error)
    assert isnan(alone.drift)
    assert alone.mean == float(draws(1, 1))


def test_single_precision_is_averaged_in_double():
    trace = 1e4 + draws(4, 64)
    found = agreement(trace.float())
    assert found.mean == pytest.approx(float(trace.float().double().mean()), abs=1e-9)


# --- step size zero ------------------------------------------------------------------------------


def by_least_squares(coarse, fine, bias):
    """Three weighted equations in value and bias, and the covariance of the normal equations."""
    (x, s), (y, t), (expected, spread) = coarse, fine, bias
    rows = torch.tensor([[1 / s, 2 / s], [1 / t, 1 / t], [0, 1 / spread]], dtype=F64)
    right = torch.tensor([x / s, y / t, expected / spread], dtype=F64)
    covariance = torch.linalg.inv(rows.T @ rows)
    return float((covariance @ rows.T @ right)[0]), sqrt(float(covariance[0, 0]))


@pytest.mark.parametrize("spread", [1e-3, 0.05, 0.2, 1.0, 30.0])
@pytest.mark.parametrize("expected", [0.0, 0.3, -0.1])
def test_the_extrapolation_is_weighted_least_squares(expected, spread):
    given = (10.7, 0.1), (10.2, 0.17), (expected, spread)
    assert extrapolated(*given) == pytest.approx(by_least_squares(*given), rel=1e-9)


def test_without_bias_runs_are_averaged():
    value, error = extrapolated((10.0, 0.1), (10.6, 0.2), (0.0, 0.0))
    assert value == pytest.approx((4 * 10.0 + 10.6) / 5)
    assert error == pytest.approx(1 / sqrt(100 + 25))


def test_a_bias_that_is_known_is_taken_off():
    """Twice from the coarse run, once from the fine one; here they then agree."""
    value, error = extrapolated((10.6, 0.1), (10.3, 0.2), (0.3, 0.0))
    assert value == pytest.approx(10.0)
    assert error == pytest.approx(1 / sqrt(100 + 25))


def test_with_any_bias_it_is_richardson():
    value, error = extrapolated((10.7, 0.1), (10.2, 0.2), (0.0, 1e5))
    assert value == pytest.approx(2 * 10.2 - 10.7)
    assert error == pytest.approx(sqrt(4 * 0.2**2 + 0.1**2))


def test_errors_grow_with_the_bias_that_is_possible():
    errors = [
        extrapolated((10.0, 0.1), (10.0, 0.1), (0.0, b))[1] for b in (0.0, 0.01, 0.1, 1.0, 10.0)
    ]
    assert errors == sorted(errors)
    assert errors[-1] > 3 * errors[0]


def test_runs_that_are_exact():
    for value in (0.0, 4.0):
        found, error = extrapolated((value, 0.0), (value, 0.0), (0.0, 0.0))
        assert found == pytest.approx(value, abs=1e-9)
        assert error < 1e-9
