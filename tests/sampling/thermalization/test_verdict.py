"""The rule on curves that are made up: every outcome, every verdict."""

import math

import pytest
import torch

from pushforward.sampling.thermalization.verdict import (
    Success,
    compare,
    overall_verdict,
    plateau,
    success,
    wilson_interval,
    window_mean,
)

STEPS = tuple(range(10, 2001, 10))


def _flat(level, spread=0.1, chains=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(chains, len(STEPS), generator=generator, dtype=torch.float64)
    return level * (1 + spread * noise)


def _at():
    return torch.tensor(STEPS, dtype=torch.float64)


def test_wilson_against_known_numbers():
    """Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 29 of 29."""
    for (successes, total), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (29, 29): (0.8830, 1.0),
    }.items():
        assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_window_mean_takes_the_larger_error():
    alike = _flat(1.0, 0.1)
    mean, error = window_mean(alike)
    assert mean == pytest.approx(1.0, abs=0.02)
    assert 0.001 < error < 0.01  # 0.1 / sqrt(800) = 0.0035
    apart = alike + torch.tensor([0.0, 0.0, 0.0, 4.0])[:, None]
    assert window_mean(apart)[1] == pytest.approx(1.0, rel=0.05)
    assert math.isnan(window_mean(torch.ones(1, 1))[1])


def test_a_plateau_settles():
    found = plateau(_flat(2.0), STEPS)
    assert found.settled
    assert found.mean == pytest.approx(2.0, rel=0.02)
    assert found.drift == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("curve", "reason"),
    [
        (torch.ones(4, len(STEPS), dtype=torch.float64), "never moved"),
        (_at().expand(4, -1), "still drift"),
        (torch.where(_at() > 1500, torch.nan, _flat(1.0)), "NaN"),
    ],
)
def test_a_plateau_that_does_not(curve, reason):
    found = plateau(curve, STEPS)
    assert not found.settled
    assert reason in found.reason
    other = compare(_flat(1.0), found, STEPS)
    assert other.outcome == "unclear"
    assert other.reason == found.reason


def test_curves_that_meet():
    found = compare(
        _flat(2.0, seed=1) + 50 * (-_at() / 100).exp(), plateau(_flat(2.0), STEPS), STEPS
    )
    assert found.outcome == "thermalized"
    assert found.ratio == pytest.approx(1.0, abs=0.02)
    assert 350 < found.convergence_step < 550  # 50 exp(-t / 100) = 0.5 at 461


def test_curves_that_do_not():
    rest = plateau(_flat(2.0), STEPS)
    away = compare(_flat(6.0, seed=1), rest, STEPS)
    assert away.outcome == "away"
    assert away.ratio == pytest.approx(3.0, rel=0.02)
    below = compare(_flat(1.0, seed=1), rest, STEPS)
    assert below.outcome == "away"
    near = compare(_flat(2.2, seed=1), rest, STEPS)  # within the band, not within the errors
    assert near.outcome == "away"
    assert "standard errors" in near.reason
    dead = compare(torch.full((4, len(STEPS)), torch.nan, dtype=torch.float64), rest, STEPS)
    assert dead.outcome == "away"


def test_chains_that_still_fall_are_away():
    falling = _flat(2.0, seed=1) * (1 + 9 * (1 - _at() / 2000))
    found = compare(falling, plateau(_flat(2.0), STEPS), STEPS)
    assert found.outcome == "away"
    assert found.ratio == pytest.approx(2.1, rel=0.05)


@pytest.mark.statistical
def test_chains_in_equilibrium_are_seldom_away():
    """Squares of autoregressive chains, 20 correlation times long; 1 % is what was measured."""
    generator = torch.Generator().manual_seed(0)
    memory = math.exp(-20 / len(STEPS))
    shape = (200, 8, 10)
    state, curve = torch.randn(shape, generator=generator, dtype=torch.float64), []
    for _ in STEPS:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        state = memory * state + (1 - memory**2) ** 0.5 * noise
        curve.append(state.square().mean(-1))
    outcomes = [
        compare(chains[4:], plateau(chains[:4], STEPS), STEPS).outcome
        for chains in torch.stack(curve, -1)
    ]
    assert outcomes.count("away") <= 6
    assert outcomes.count("thermalized") > 140


def test_one_stuck_chain_among_four_is_away():
    curves = _flat(2.0, seed=1)
    curves[2] = 60.0
    assert compare(curves, plateau(_flat(2.0), STEPS), STEPS).outcome == "away"


def test_noise_that_hides_the_band_is_unclear():
    loud = torch.tensor([0.2, 1.0, 2.0, 6.0], dtype=torch.float64)[:, None] * _flat(1.0)
    rest = plateau(loud, STEPS)
    assert rest.settled
    assert compare(_flat(rest.mean, seed=1), rest, STEPS).outcome == "unclear"
    assert compare(_flat(2 * rest.mean, seed=1), rest, STEPS).outcome == "unclear"
    assert compare(_flat(100 * rest.mean, seed=1), rest, STEPS).outcome == "away"


def test_the_floor_is_what_counts_can_resolve():
    never = torch.zeros(4, len(STEPS), dtype=torch.float64)
    never[0, 0] = 0.01
    rest = plateau(never, STEPS, floor=0.005)
    assert rest.settled
    assert compare(never, rest, STEPS, floor=0.005).outcome == "thermalized"
    assert compare(never + 0.3, rest, STEPS, floor=0.005).outcome == "away"


def _verdict(kernel_wrong=False, ranks_wrong=False, **counts):
    found = {name: Success(*value) for name, value in counts.items()}
    return overall_verdict(found, kernel_wrong=kernel_wrong, ranks_wrong=ranks_wrong, required=0.9)


def test_every_verdict():
    assert _verdict(zero=(18, 2, 0), prior=(18, 1, 1)) == "PASS"
    assert _verdict(zero=(20, 0, 0), prior=(17, 3, 0)) == "NOT_CONVERGED"
    assert _verdict(zero=(4, 0, 0), prior=(3, 1, 0)) == "INCONCLUSIVE"  # one is chance
    assert _verdict(zero=(4, 0, 0), prior=(2, 2, 0)) == "NOT_CONVERGED"
    assert _verdict(zero=(17, 1, 2)) == "INCONCLUSIVE"
    assert _verdict(zero=(20, 0, 0), ranks_wrong=True) == "NOT_CONVERGED"
    assert _verdict(zero=(0, 20, 0), kernel_wrong=True) == "KERNEL_BUG"
    assert _verdict() == "INCONCLUSIVE"


def test_outcomes_are_counted():
    found = success(["thermalized", "away", "thermalized", "unclear"])
    assert (found.thermalized, found.away, found.unclear, found.fraction) == (2, 1, 1, 0.5)
    assert found.interval == wilson_interval(2, 4)
