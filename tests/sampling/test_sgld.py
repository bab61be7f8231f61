"""SGLD against the variance that it must have, discretisation and minibatch noise included."""

import math

import pytest
import torch

from oracles.markov import F64, begin, draw_noise, drive, isotropic_potential, offset_potential
from pushforward.errors import OptionError
from pushforward.sampling.potential import Potential
from pushforward.sampling.sgld import SGLD, sgld_stationary_variance

CURVATURE = 10.0


@pytest.mark.parametrize(
    ("size", "measured", "predicted"),
    [(1e-3, 1.0022, 1.0025), (1e-2, 1.019, 1.0256), (1e-1, 1.3319, 1.3333)],
)
def test_the_formula_at_known_values(size, measured, predicted):
    # Measured elsewhere, by a run of another implementation.
    found = sgld_stationary_variance(CURVATURE, size) * CURVATURE
    assert abs(found - predicted) < 1e-4
    assert abs(found / measured - 1) < 0.01


def test_the_formula_solves_the_recursion():
    a = torch.tensor([0.5, 3.0, 39.0], dtype=F64)
    for size, noise in ((0.1, 0.0), (0.05, 7.0)):
        variance = sgld_stationary_variance(a, size, noise)
        following = (1 - size * a / 2) ** 2 * variance + size + size**2 * noise / 4
        torch.testing.assert_close(following, variance)
    unstable = sgld_stationary_variance(torch.tensor([39.0, 41.0], dtype=F64), 0.1)
    assert torch.isfinite(unstable).tolist() == [True, False]
    assert sgld_stationary_variance(41.0, 0.1) == math.inf
    with pytest.raises(OptionError):
        sgld_stationary_variance(1.0, 0.0)


@pytest.mark.statistical
@pytest.mark.parametrize("size", [1e-2, 1e-1])
def test_the_variance_of_a_quadratic(size):
    # 200,000 numbers of the stationary law: 1 % is 3.2 standard errors of one set, and there are
    # several hundred steps to average over.
    kernel = SGLD(isotropic_potential(100, CURVATURE), step_size=size)
    start = torch.randn(2000, 100, generator=torch.Generator().manual_seed(6), dtype=F64)
    steps = round(2 / (size * CURVATURE)) * 10
    _, squares, _ = drive(
        kernel,
        2000,
        0,
        steps,
        initial={"x": start / CURVATURE**0.5},
        keep=lambda state: state["vectors"].square().mean(-1),
    )
    found = squares[:, steps // 2 :].mean() * CURVATURE
    assert abs(found / (1 / (1 - size * CURVATURE / 4)) - 1) < 0.01


@pytest.mark.statistical
@pytest.mark.parametrize("size", [0.1, 0.3])
def test_averaged_noise_has_no_bias_on_a_quadratic(size):
    # The plain scheme is off by 33 % and by a factor of 4; 1 % is 3.2 standard errors of one set.
    kernel = SGLD(isotropic_potential(100, CURVATURE), step_size=size, averaged_noise=True)
    start = torch.randn(2000, 100, generator=torch.Generator().manual_seed(6), dtype=F64)
    _, squares, _ = drive(
        kernel,
        2000,
        0,
        60,
        initial={"x": start / CURVATURE**0.5},
        keep=lambda state: state["vectors"].square().mean(-1),
    )
    assert abs(squares[:, 30:].mean() * CURVATURE - 1) < 0.01


@pytest.mark.statistical
@pytest.mark.parametrize("batch_size", [2, 10])
def test_the_variance_with_minibatches(batch_size):
    potential, curvature, noise = offset_potential(batch_size)
    size = 0.8 / curvature
    kernel = SGLD(potential, step_size=size)
    _, draws, _ = drive(kernel, 4000, 0, 60, seed=3)
    expected = sgld_stationary_variance(curvature, size, noise)
    found = draws[:, 20:].square().mean((1, 2))
    error = found.std() / math.sqrt(4000)
    assert abs(found.mean() - expected) < 4.5 * error
    # And the noise of the batches is what it is about.
    assert abs(found.mean() - sgld_stationary_variance(curvature, size)) > 4.5 * error


@pytest.mark.statistical
def test_a_frozen_preconditioner_is_exact_up_to_discretisation():
    curvatures = torch.tensor([1.0, 25.0, 400.0], dtype=F64)
    potential = Potential.of_density(
        lambda p: -0.5 * (curvatures * p["x"] * p["x"]).sum(), {"x": torch.zeros(3, dtype=F64)}
    )
    size, chains = 5e-3, 4000
    kernel = SGLD(potential, step_size=size, preconditioner="rmsprop")
    start = torch.randn(chains, 3, generator=torch.Generator().manual_seed(7), dtype=F64)
    start = {"x": start * curvatures.rsqrt()}
    state, draws, _ = drive(kernel, chains, 150, 600, initial=start)
    factor = state["preconditioner"]
    typical = factor.mean(0)
    assert typical[0] > 2 * typical[1] > 4 * typical[2]
    assert factor.max() <= 11
    # Each chain has its own preconditioner, and with it its own stationary variance.
    expected = 1 / (curvatures * (1 - size * factor * curvatures / 4))
    ratio = (draws[:, 100:].square().mean(1) / expected).double()
    error = ratio.std(0) / math.sqrt(chains)
    assert bool(((ratio.mean(0) - 1).abs() < 4.5 * error).all())
    assert bool((error < 0.02).all())


def test_a_preconditioner_of_equal_gradients_changes_nothing():
    plain = SGLD(isotropic_potential(1, CURVATURE), step_size=0.01)
    learned = SGLD(isotropic_potential(1, CURVATURE), step_size=0.01, preconditioner="rmsprop")
    one, generator = begin(plain, 4)
    other, _ = begin(learned, 4)
    for step in range(20):
        noise = draw_noise(plain.noise_size, 4, generator)
        one, other = plain.warm_up(one, noise, step, 20), learned.warm_up(other, noise, step, 20)
        torch.testing.assert_close(one["vectors"], other["vectors"])


def test_a_step_is_the_convention():
    kernel = SGLD(isotropic_potential(3, CURVATURE), step_size=0.04)
    state, generator = begin(kernel, 2)
    noise = draw_noise(kernel.noise_size, 2, generator)
    expected = state["vectors"] - 0.02 * CURVATURE * state["vectors"] + 0.2 * noise.normals
    torch.testing.assert_close(kernel.step(state, noise)["vectors"], expected)


def test_a_chain_that_is_lost_says_so():
    kernel = SGLD(isotropic_potential(3, CURVATURE), step_size=100.0)
    _, _, statistics = drive(kernel, 4, 0, 250)
    assert bool((statistics["divergent"][:, 0] == 0).all())
    assert bool((statistics["divergent"][:, -1] == 1).all())


def anisotropic():
    curvatures = torch.tensor([1.0, 25.0, 400.0], dtype=F64)

    def density(p):
        return -0.5 * (curvatures * p["x"] * p["x"]).sum()

    return curvatures, Potential.of_density(density, {"x": torch.zeros(3, dtype=F64)})


@pytest.mark.parametrize("averaged", [False, True])
def test_a_given_preconditioner_is_a_change_of_units(averaged):
    """Steps of ``x`` with ``G`` are steps of ``x / sqrt(G)`` without."""
    curvatures, potential = anisotropic()
    factor = 1 / curvatures
    given = SGLD(potential, step_size=0.3, preconditioner=factor, averaged_noise=averaged)
    plain = SGLD(isotropic_potential(3, 1.0), step_size=0.3, averaged_noise=averaged)
    start = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    noise = draw_noise(given.start_size, 5, torch.Generator().manual_seed(2))
    one = given.start({"x": start * factor.sqrt()}, noise)
    other = plain.start({"x": start}, noise)
    for seed in range(10):
        noise = draw_noise(given.noise_size, 5, torch.Generator().manual_seed(seed))
        step = SGLD.warm_up if seed < 3 else SGLD.step
        extra = (seed, 3) if seed < 3 else ()
        one, other = step(given, one, noise, *extra), step(plain, other, noise, *extra)
        torch.testing.assert_close(one["vectors"] / factor.sqrt(), other["vectors"])
    assert "preconditioner" not in one  # nothing is learned


@pytest.mark.statistical
def test_a_given_preconditioner_has_the_variance_of_its_units():
    curvatures, potential = anisotropic()
    factor, size = torch.tensor([1.0, 0.1, 0.002], dtype=F64), 0.3
    kernel = SGLD(potential, step_size=size, preconditioner=factor)
    start = torch.randn(4000, 3, generator=torch.Generator().manual_seed(7), dtype=F64)
    start = {"x": start * curvatures.rsqrt()}
    _, draws, _ = drive(kernel, 4000, 0, 120, initial=start)
    expected = factor * sgld_stationary_variance(factor * curvatures, size)
    ratio = draws[:, 60:].square().mean(1) / expected
    error = ratio.std(0) / math.sqrt(4000)
    assert bool(((ratio.mean(0) - 1).abs() < 4.5 * error).all())
    assert bool((error < 0.03).all())


@pytest.mark.parametrize(
    "given",
    [
        torch.ones(2, dtype=F64),
        torch.ones(3, 1, dtype=F64),
        torch.ones(3, dtype=torch.int64),
        torch.tensor([1.0, 0.0, 1.0], dtype=F64),
        torch.tensor([1.0, -1.0, 1.0], dtype=F64),
        torch.tensor([1.0, math.nan, 1.0], dtype=F64),
        torch.tensor([1.0, math.inf, 1.0], dtype=F64),
    ],
)
def test_preconditioners_that_are_none_are_refused(given):
    with pytest.raises(OptionError, match=r"preconditioner.*\n?.*3 positive numbers"):
        SGLD(isotropic_potential(3, 1.0), step_size=0.1, preconditioner=given)


def test_names_of_preconditioners_that_there_are_not():
    with pytest.raises(OptionError, match="'adam'"):
        SGLD(isotropic_potential(3, 1.0), step_size=0.1, preconditioner="adam")


def test_preconditioners_tell_kernels_apart():
    potential = isotropic_potential(3, 1.0)
    given = [None, "rmsprop", torch.ones(3, dtype=F64), 2 * torch.ones(3, dtype=F64)]
    found = {
        str(SGLD(potential, step_size=0.1, preconditioner=g, averaged_noise=noise).identity())
        for g in given
        for noise in (False, True)
    }
    assert len(found) == 8
