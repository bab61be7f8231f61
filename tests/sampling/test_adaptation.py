"""What is learned in a warm-up: schedule, dual averaging, scales, and all of it together."""

import itertools
import math

import pytest
import torch

from oracles.markov import F64, begin, draw_noise, drive, gaussian_potential
from pushforward.sampling.adaptation import (
    Phase,
    average_step_size,
    collect_moments,
    fresh_averaging,
    log_lengths,
    phase,
    scale_of_moments,
)
from pushforward.sampling.hmc import HMC
from pushforward.sampling.mala import MALA
from pushforward.sampling.nuts import NUTS


def windows(total):
    """First and last step of each slow window."""
    found, begin_ = [], None
    for step in range(total):
        now = phase(step, total)
        if now.slow and now.collected == 1:
            begin_ = step
        if now.closes:
            found.append((begin_, step))
    return found


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (1000, [(75, 99), (100, 149), (150, 249), (250, 449), (450, 949)]),
        (500, [(75, 99), (100, 149), (150, 249), (250, 449)]),
        (200, [(75, 99), (100, 149)]),
        (199, [(75, 148)]),
        (150, [(75, 99)]),
        (100, [(15, 89)]),
        (50, [(7, 44)]),
        (49, []),
        (1, []),
    ],
)
def test_windows_are_those_of_stan(total, expected):
    assert windows(total) == expected


@pytest.mark.parametrize("total", [1, 7, 20, 100, 149, 150, 151, 333, 1000, 4321])
def test_phases_follow_each_other(total):
    phases = [phase(step, total) for step in range(total)]
    assert [now.last for now in phases] == [False] * (total - 1) + [True]
    for now, following in itertools.pairwise(phases):
        assert following.position == (0 if now.closes else now.position + 1)
        if following.slow:
            assert following.collected == (1 if now.closes or not now.slow else now.collected + 1)
        else:
            assert following.collected == 0
    assert not phases[-1].closes
    assert phases[0].position == 0


def naive_dual_averaging(first, acceptances, target):
    """Algorithm 5 of Hoffman and Gelman (2014) in plain numbers."""
    mu, total, log_average = math.log(10 * first), 0.0, 0.0
    sizes = []
    for m, acceptance in enumerate(acceptances, start=1):
        total = (1 - 1 / (m + 10)) * total + (target - acceptance) / (m + 10)
        log_size = mu - math.sqrt(m) / 0.05 * total
        log_average = m**-0.75 * log_size + (1 - m**-0.75) * log_average
        sizes.append(math.exp(log_size))
    return [*sizes[:-1], math.exp(log_average)]


def test_dual_averaging_against_the_algorithm():
    acceptances = torch.rand(15, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    size = torch.tensor([0.1, 1.0, 3.0], dtype=F64)
    firsts, found = size.tolist(), []
    averaging = torch.full((3, 3), torch.nan, dtype=F64)  # forgotten at position 0
    for step in range(15):
        averaging, size = average_step_size(
            averaging, size, acceptances[step], 0.8, phase(step, 15)
        )
        found.append(size)
    for chain, first in enumerate(firsts):
        expected = naive_dual_averaging(first, acceptances[:, chain].tolist(), 0.8)
        torch.testing.assert_close(
            torch.stack(found)[:, chain], torch.tensor(expected, dtype=F64), rtol=1e-12, atol=0
        )


def test_dual_averaging_finds_its_target():
    target = torch.tensor([0.6, 0.6, 0.6], dtype=F64)
    hardness = torch.tensor([0.01, 1.0, 1000.0], dtype=F64)  # acceptance exp(-hardness size)
    size = torch.ones(3, dtype=F64)
    averaging = fresh_averaging(size)
    for step in range(4000):
        now = Phase(slow=False, collected=0, closes=False, position=step, last=step == 3999)
        averaging, size = average_step_size(averaging, size, (-hardness * size).exp(), 0.6, now)
    torch.testing.assert_close((-hardness * size).exp(), target, rtol=0.02, atol=0)


def test_hopeless_chains_do_not_overflow():
    size = torch.ones(2, dtype=F64)
    averaging = fresh_averaging(size)
    for step in range(3000):
        now = Phase(slow=False, collected=0, closes=False, position=step, last=False)
        acceptance = torch.tensor([0.0, 1.0], dtype=F64)
        averaging, size = average_step_size(averaging, size, acceptance, 0.8, now)
    assert bool(torch.isfinite(size).all())
    assert bool((size > 0).all())
    assert bool(torch.isfinite(averaging).all())


def moments(draws, *, dense=False):
    """Over ``(draws, chains, P)``, in one window."""
    mean = spread = torch.full_like(draws[0], torch.nan)  # forgotten at the first draw
    spread = spread.diag_embed() if dense else spread
    for step, vectors in enumerate(draws):
        now = Phase(slow=True, collected=step + 1, closes=False, position=step, last=False)
        mean, spread = collect_moments(mean, spread, vectors, now)
    return mean, spread


def test_moments_are_those_of_the_window():
    draws = 1e4 + torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    mean, spread = moments(draws)
    torch.testing.assert_close(mean, draws.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(spread / 49, draws.var(0), rtol=1e-9, atol=0)


def test_scales_are_pulled_together_whatever_the_units():
    units = torch.tensor([1e-6, 1.0, 1e5], dtype=F64)
    draws = torch.randn(10, 4, 3, generator=torch.Generator().manual_seed(2), dtype=F64)
    spread = moments(draws)[1]
    old = torch.ones(4, 3, dtype=F64)
    scale = scale_of_moments(spread, old, 10)
    expected = draws.std(0).log()
    expected = (10 * expected + 5 * expected.mean(-1, keepdim=True)) / 15
    torch.testing.assert_close(scale, expected.exp())
    # One unit for all parameters is no information about their scales relative to each other.
    torch.testing.assert_close(scale_of_moments(spread * 1e-12, old, 10), 1e-6 * scale)
    long = scale_of_moments(spread * units**2 * (9999 / 9), old, 10_000)
    torch.testing.assert_close(long, draws.std(0) * units, rtol=0.02, atol=0)


def correlated_draws(count):
    torch.manual_seed(3)
    mixed = torch.randn(4, 3, 3, dtype=F64) @ torch.tensor([1e-3, 1.0, 1e3], dtype=F64).diag()
    return 1e4 + torch.einsum("cij,ncj->nci", mixed, torch.randn(count, 4, 3, dtype=F64))


def test_a_root_of_the_covariance_from_many_draws():
    draws = correlated_draws(500)
    mean, spread = moments(draws, dense=True)
    torch.testing.assert_close(mean, draws.mean(0), rtol=1e-13, atol=0)
    root = scale_of_moments(spread, torch.eye(3, dtype=F64).expand(4, 3, 3), 500)
    assert torch.equal(root, root.tril())
    away = draws - draws.mean(0)
    covariance = torch.einsum("nci,ncj->cij", away, away) / 499
    lengths = draws.std(0)
    # A ridge of 1e-5 of the variances, nearly.
    error = (root @ root.mT - covariance) / lengths[..., None] / lengths[..., None, :]
    assert error.abs().max() < 2e-5
    ridge = error.diagonal(dim1=-2, dim2=-1)
    assert ridge.min() > 2e-6
    torch.testing.assert_close(log_lengths(root).sum(-1), torch.linalg.det(root).log())


def test_variances_where_draws_are_too_few_for_a_covariance():
    draws = correlated_draws(5)
    spread, one = moments(draws, dense=True)[1], torch.ones(4, 3, dtype=F64)
    found = scale_of_moments(spread, one.diag_embed(), 5)
    expected = scale_of_moments(moments(draws)[1], one, 5)
    torch.testing.assert_close(found, expected.diag_embed())
    assert torch.equal(log_lengths(found), log_lengths(expected).view(4, 3))


def test_a_covariance_that_is_none_leaves_variances():
    draws = correlated_draws(50)
    draws[:, 0, 1] = 7.0  # did not move
    draws[:, 1, 2] = draws[:, 1, 0]
    spread = moments(draws, dense=True)[1]
    spread[2, 1, 0] = torch.inf
    old = 2 * torch.eye(3, dtype=F64).expand(4, 3, 3)
    found = scale_of_moments(spread, old, 50)
    assert bool(torch.isfinite(found).all())
    assert found[0, 1, 1] == 2
    assert all(torch.equal(found[c], found[c].diagonal().diag()) for c in (0, 2))
    assert not torch.equal(found[1], found[1].diagonal().diag())
    assert torch.equal(scale_of_moments(spread, old, 1), old)


@pytest.mark.statistical
@pytest.mark.parametrize("kind", [HMC, NUTS])
def test_a_learned_covariance_takes_correlations_away(kind):
    """A law a hundred times longer than wide, in no direction of the axes."""
    torch.manual_seed(0)
    turned = torch.linalg.qr(torch.randn(8, 8, dtype=F64)).Q * torch.logspace(-2, 0, 8, dtype=F64)
    covariance = turned @ turned.mT
    kernel = kind(gaussian_potential(torch.zeros(8, dtype=F64), covariance), mass="dense")
    state, vectors, _ = drive(kernel, 16, 500, 100, seed=4)
    root = state["scale"]
    fit = torch.linalg.solve_triangular(root, covariance.expand_as(root), upper=False)
    fit = torch.linalg.solve_triangular(root, fit.mT, upper=False)
    eigenvalues = torch.linalg.eigvalsh(fit)
    assert eigenvalues.min() > 0.3
    assert eigenvalues.max() < 3
    ratio = vectors.flatten(0, 1).var(0) / covariance.diagonal()
    assert bool(((ratio - 1).abs() < 0.3).all())


def test_what_did_not_move_keeps_its_scale():
    old = torch.tensor([[2.0, 3.0, 4.0]], dtype=F64)
    spread = torch.tensor([[0.0, 9.0, torch.inf]], dtype=F64)
    found = scale_of_moments(spread, old, 100)
    assert found[0, 0] == 2
    assert found[0, 2] == 4
    assert torch.equal(scale_of_moments(spread, old, 1), old)


SCALES = torch.logspace(-2, -1, 12, dtype=F64)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("kind", "warmup", "low", "high"),
    [(HMC, 200, 0.7, 0.97), (NUTS, 200, 0.75, 0.95), (MALA, 400, 0.5, 0.66)],
)
def test_scales_and_step_size_are_found(kind, warmup, low, high):
    # Standard deviations over a decade, and chains that start a hundred of them away.
    mean = torch.zeros(12, dtype=F64)
    potential = gaussian_potential(mean, (SCALES**2).diag())
    kernel = kind(potential)
    state, vectors, statistics = drive(kernel, 16, warmup, 60, seed=4)
    ratio = state["scale"] / SCALES
    assert ratio.min() > 0.3 and ratio.max() < 2  # noqa: PT018 - one range
    assert low < statistics["acceptance"].mean() < high
    if kind is not MALA:
        spread = (vectors**2).mean((0, 1)).sqrt() / SCALES
        assert bool(((spread - 1).abs() < 0.25).all())


@pytest.mark.parametrize(("kind", "power"), [(HMC, 1), (NUTS, 1), (MALA, 2)])
def test_new_units_leave_the_steps_as_long_as_they_were(kind, power):
    potential = gaussian_potential(torch.zeros(12, dtype=F64), (SCALES**2).diag())
    kernel, total = kind(potential), 60
    state, generator = begin(kernel, 4)
    for step in range(total):
        before = state["scale"]
        state = kernel.warm_up(state, draw_noise(kernel.noise_size, 4, generator), step, total)
        if phase(step, total).closes:
            longer = (state["scale"] / before).log().mean(-1).exp() ** power
            assert longer.max() < 0.5
            torch.testing.assert_close(state["step_size"] * longer, state["averaging"][:, 0].exp())


@pytest.mark.parametrize("kind", [HMC, NUTS, MALA])
def test_what_is_learned_is_frozen(kind):
    potential = gaussian_potential(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64))
    kernel = kind(potential)
    state, _, statistics = drive(kernel, 3, 80, 10)
    assert bool((statistics["step_size"] == statistics["step_size"][:, :1]).all())
    first, _ = begin(kernel, 3)
    assert bool((state["scale"] != first["scale"]).any())
    fixed = kind(potential, step_size=0.3, mass="identity")
    state, _, statistics = drive(fixed, 3, 40, 10)
    assert bool((statistics["step_size"] == 0.3).all())
    assert "scale" not in state
    assert "averaging" not in state


def test_a_given_mass_is_used():
    potential = gaussian_potential(torch.zeros(12, dtype=F64), (SCALES**2).diag())
    kernel = HMC(potential, step_size=0.5, mass=SCALES**-2)
    start = {"x": SCALES * torch.ones(8, 12, dtype=F64)}
    _, _, statistics = drive(kernel, 8, 0, 20, initial=start)
    assert statistics["acceptance"].min() > 0.4
