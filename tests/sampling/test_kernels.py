"""What is asked of every kernel that follows a gradient, and faults that this has to find."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import pushforward as pf
from oracles.markov import (
    F64,
    begin,
    correlated_covariance,
    draw_noise,
    drive,
    gaussian_draws,
    gaussian_potential,
    gaussian_scores,
)
from pushforward.errors import OptionError
from pushforward.sampling.dynamics import Point, leapfrog
from pushforward.sampling.hmc import HMC
from pushforward.sampling.mala import MALA
from pushforward.sampling.noise import Noise
from pushforward.sampling.nuts import NUTS
from pushforward.sampling.potential import Potential
from pushforward.sampling.sghmc import SGHMC
from pushforward.sampling.sgld import SGLD
from pushforward.sampling.sgnht import SGNHT

MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
COVARIANCE = correlated_covariance(3)

KERNELS = {
    "HMC": lambda p: HMC(p, num_steps=5),
    "HMC, dense": lambda p: HMC(p, num_steps=4, mass="dense"),
    "HMC, fixed": lambda p: HMC(p, step_size=0.4, trajectory_length=2.0, mass="identity"),
    "NUTS": lambda p: NUTS(p, max_depth=5),
    "NUTS, fixed": lambda p: NUTS(p, step_size=0.5, max_depth=4, mass="identity"),
    "MALA": MALA,
    "MALA, fixed": lambda p: MALA(p, step_size=0.3, mass=torch.tensor([1.0, 0.5, 0.2])),
    "SGLD": lambda p: SGLD(p, step_size=0.02),
    "SGLD, averaged noise": lambda p: SGLD(p, step_size=0.02, averaged_noise=True),
    "SGLD, tensor": lambda p: SGLD(
        p, step_size=0.02, preconditioner=torch.full((p.space.size,), 0.5, dtype=p.dtype)
    ),
    "SGLD, rmsprop": lambda p: SGLD(p, step_size=0.02, preconditioner="rmsprop"),
    "SGHMC": lambda p: SGHMC(p, step_size=0.1, friction=1.0),
    "SGNHT": lambda p: SGNHT(p, step_size=0.1, diffusion=1.0),
}
METROPOLIS = [name for name in KERNELS if not name.startswith("SG")]
STOCHASTIC = [name for name in KERNELS if name.startswith("SG")]
every_kernel = pytest.mark.parametrize("name", KERNELS)
CHAINS, WARMUP = 5, 30


def make(name, dtype=F64):
    return KERNELS[name](gaussian_potential(MEAN, COVARIANCE, dtype))


def minibatch_potential(batch_size=3):
    """A linear regression of two weights and a bias on eight examples."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(8, 2, generator=generator, dtype=F64)
    targets = inputs @ torch.tensor([[1.0], [-0.5]], dtype=F64) + 0.3
    net = nn.Linear(2, 1, dtype=F64)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.zero_()
    return Potential.of_network(
        net.eval(), (inputs, targets), pf.Gaussian(noise_variance=0.5), batch_size=batch_size
    )


def rows(mapping, which):
    return {name: tensor[which] for name, tensor in mapping.items()}


def noise_rows(noise, which):
    return Noise(noise.normals[which], noise.uniforms[which])


def journey(kernel, noises, which=slice(None), steps=8):
    """States along a warm-up and some steps, for the chosen rows of the noise."""
    state = kernel.start(None, noise_rows(noises[0], which))
    path = [state]
    for step, noise in enumerate(noises[1:]):
        mine = noise_rows(noise, which)
        warming = step < len(noises) - 1 - steps
        state = (
            kernel.warm_up(state, mine, step, len(noises) - 1 - steps)
            if warming
            else kernel.step(state, mine)
        )
        path.append(state)
    return path


def noises_for(kernel, seed=1, count=WARMUP + 8, chains=CHAINS):
    generator = torch.Generator().manual_seed(seed)
    first = draw_noise(kernel.start_size, chains, generator, kernel.dtype)
    return [first] + [
        draw_noise(kernel.noise_size, chains, generator, kernel.dtype) for _ in range(count)
    ]


def assert_same(one, other, tolerance=1e-12):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[name], rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )


@every_kernel
def test_chains_go_their_own_way(name):
    kernel = make(name)
    noises = noises_for(kernel)
    together = journey(kernel, noises)
    for which in (slice(1, 2), slice(2, 5), torch.tensor([4, 0, 1])):
        apart = journey(kernel, noises, which)
        for whole, part in zip(together, apart, strict=True):
            assert_same(rows(whole, which), part, 1e-10)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_chains_have_their_own_batches(name):
    kernel = KERNELS[name](minibatch_potential())
    noises = noises_for(kernel)
    together = journey(kernel, noises)
    apart = journey(kernel, noises, slice(1, 3))
    for whole, part in zip(together, apart, strict=True):
        assert_same(rows(whole, slice(1, 3)), part, 1e-10)
    # The batch is chosen by the uniforms, and matters.
    changed = Noise(noises[-1].normals, 1 - noises[-1].uniforms)
    one, other = kernel.step(together[-2], noises[-1]), kernel.step(together[-2], changed)
    assert bool((one["gradient"] != other["gradient"]).any(-1).all())


@every_kernel
def test_a_step_is_a_pure_function(name):
    kernel = make(name)
    noises = noises_for(kernel)
    for step, state in enumerate(journey(kernel, noises)):
        before = {key: tensor.clone() for key, tensor in state.items()}
        once, again = kernel.step(state, noises[1]), kernel.step(state, noises[1])
        warm = kernel.warm_up(state, noises[1], step % WARMUP, WARMUP)
        assert_same(once, again, 0.0)
        assert_same(state, before, 0.0)
        for following in (once, warm):
            assert following.keys() == state.keys()
            for key, tensor in following.items():
                assert (tensor.shape, tensor.dtype) == (state[key].shape, state[key].dtype), key
                assert len(tensor) == CHAINS


@every_kernel
def test_every_random_number_matters(name):
    kernel = make(name)
    noises = noises_for(kernel, count=6)
    state = journey(kernel, noises, steps=0)[-1]
    noise = draw_noise(kernel.noise_size, CHAINS, torch.Generator().manual_seed(5))
    expected = kernel.step(state, noise)
    for column in range(kernel.noise_size.normals):
        normals = noise.normals.clone()
        normals[2, column] += 0.5
        found = kernel.step(state, Noise(normals, noise.uniforms))
        moved = torch.stack(
            [(found[key] != expected[key]).reshape(CHAINS, -1).any(-1) for key in state]
        ).any(0)
        assert moved.tolist() == [row == 2 for row in range(CHAINS)]
    if name in METROPOLIS:
        # Whatever the uniforms are the chain is told what was likely; one near 1 refuses.
        kernel_high = Noise(noise.normals, torch.full_like(noise.uniforms, 1 - 1e-16))
        refused = kernel.step(state, kernel_high)
        unsure = kernel.statistics(refused)["acceptance"] < 1
        if name.startswith("NUTS"):
            assert bool((refused["vectors"] != expected["vectors"]).any())
        else:
            assert bool(unsure.any())
            assert torch.equal(refused["vectors"][unsure], state["vectors"][unsure])


@every_kernel
def test_statistics_and_vectors_have_their_form(name):
    kernel = make(name)
    state, vectors, statistics = drive(kernel, CHAINS, WARMUP, 3)
    assert vectors.shape == (CHAINS, 3, 3)
    assert {"potential", "divergent", "step_size"} <= statistics.keys()
    assert ("acceptance" in statistics) == (name in METROPOLIS)
    for found in statistics.values():
        assert found.dtype == F64
        assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(
        statistics["potential"][:, -1], kernel.potential.value(kernel.vectors(state))
    )
    assert kernel.space.names == ("x",)
    assert kernel.bytes_per_chain > 0


@every_kernel
def test_single_precision_stays_single(name):
    kernel = make(name, torch.float32)
    state, vectors, statistics = drive(kernel, CHAINS, WARMUP, 3)
    assert vectors.dtype == torch.float32
    assert kernel.dtype == torch.float32
    assert state["potential"].dtype == F64
    assert all(found.dtype == F64 for found in statistics.values())
    assert bool(torch.isfinite(vectors).all())


def test_identities_are_json_and_tell_kernels_apart():
    texts = [json.dumps(make(name).identity(), sort_keys=True) for name in KERNELS]
    assert len(set(texts)) == len(texts)
    assert texts == [json.dumps(make(name).identity(), sort_keys=True) for name in KERNELS]
    kernel = make("HMC")
    for change in (
        {"num_steps": 6},
        {"jitter": 0.2},
        {"step_size": 0.1},
        {"target_acceptance": 0.7},
        {"mass": "identity"},
        {"mass": "dense"},
        {"mass": torch.tensor([1.0, 2.0, 3.0])},
        {"mass": torch.diag(torch.tensor([1.0, 2.0, 3.0]))},
        {"potential": gaussian_potential(MEAN, 2 * COVARIANCE)},
    ):
        assert replace(kernel, **change).identity() != kernel.identity()


P = gaussian_potential(MEAN, COVARIANCE)


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (lambda: HMC(P, step_size=0.0), "step_size"),
        (lambda: HMC(P, step_size=float("nan")), "step_size"),
        (lambda: HMC(P, num_steps=0), "num_steps"),
        (lambda: HMC(P, num_steps=3, trajectory_length=1.0), "trajectory_length"),
        (lambda: HMC(P, trajectory_length=-1.0), "trajectory_length"),
        (lambda: HMC(P, jitter=1.0), "jitter"),
        (lambda: HMC(P, target_acceptance=1.0), "target_acceptance"),
        (lambda: HMC(P, mass="full"), "mass"),
        (lambda: HMC(P, mass=np.eye(3)), "mass"),
        (lambda: HMC(P, mass=torch.diag(torch.tensor([1.0, -1.0, 1.0]))), "mass"),
        (lambda: HMC(P, mass=torch.tensor([[1.0, 1.0, 0], [0, 1.0, 0], [0, 0, 1.0]])), "mass"),
        (lambda: HMC(P, mass=torch.ones(2)), "mass"),
        (lambda: MALA(P, mass=torch.tensor([1.0, -1.0, 1.0])), "mass"),
        (lambda: MALA(P, step_size=float("inf")), "step_size"),
        (lambda: NUTS(P, max_depth=0), "max_depth"),
        (lambda: NUTS(P, target_acceptance=0.0), "target_acceptance"),
        (lambda: SGLD(P, step_size=-1.0), "step_size"),
        (lambda: SGLD(P, step_size=1.0, preconditioner="adam"), "preconditioner"),
        (lambda: SGHMC(P, step_size=0.1, friction=0.0), "friction"),
        (lambda: SGHMC(P, step_size=0.0, friction=1.0), "step_size"),
        (lambda: SGNHT(P, step_size=0.1, diffusion=-1.0), "diffusion"),
    ],
)
def test_settings_out_of_range_are_refused(build, where):
    with pytest.raises(OptionError) as caught:
        build()
    assert caught.value.where == where


def half_line():
    """An exponential law on x > 0, whose log density is NaN to the left of 0."""
    return Potential.of_density(
        lambda p: (torch.log(p["x"]) * 0 - p["x"]).sum(), {"x": torch.ones(1, dtype=F64)}
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda p: HMC(p, step_size=0.5, num_steps=3, mass="identity"),
        lambda p: NUTS(p, step_size=0.5, max_depth=4, mass="identity"),
        lambda p: MALA(p, step_size=1.0, mass="identity"),
    ],
)
@pytest.mark.statistical
def test_a_chain_does_not_enter_where_the_density_is_nan(build):
    # U has a kink's worth of trouble at 0 only: on x > 0 the law is exponential, mean 1 and
    # second moment 2, of which 2000 chains that start in it must keep both.
    start = torch.empty(2000, 1, dtype=F64)
    start = start.exponential_(generator=torch.Generator().manual_seed(4))
    _, vectors, statistics = drive(build(half_line()), 2000, 0, 20, initial={"x": start})
    assert bool((vectors > 0).all())
    assert statistics["divergent"].mean() > 0.01
    assert bool(torch.isfinite(statistics["potential"]).all())
    last = vectors[:, -1, 0]
    assert abs(last.mean() - 1) < 4.5 / 2000**0.5
    assert abs((last**2).mean() - 2) < 4.5 * 20**0.5 / 2000**0.5


def invariance_scores(kernel, chains=4096, steps=4, seed=11):
    """Exact draws are moved; their moments must stay."""
    mean, covariance = MEAN, COVARIANCE
    start = gaussian_draws(mean, covariance, chains, seed)
    state, _, statistics = drive(kernel, chains, 0, steps, seed=seed, initial={"x": start})
    return gaussian_scores(kernel.vectors(state), mean, covariance), statistics


# Another shape than the law's: a mass that fits would hide which way its root is applied. In its
# units the largest curvature of the law is the one that it has without.
SKEWED = COVARIANCE.flip(0, 1) + 0.2 * torch.eye(3, dtype=F64)
SKEWED /= torch.linalg.eigvals(torch.linalg.solve(COVARIANCE, SKEWED)).real.max()
SKEWED /= torch.linalg.eigvalsh(COVARIANCE).min()
COARSE = {  # far from the limit of small steps, so that the acceptance has work to do
    "HMC": lambda p: HMC(p, step_size=0.85, num_steps=4, mass="identity"),
    "HMC, length": lambda p: HMC(p, step_size=0.8, trajectory_length=3.0, mass="identity"),
    "HMC, mass": lambda p: HMC(p, step_size=0.75, num_steps=3, mass=1 / COVARIANCE.diagonal()),
    "HMC, matrix": lambda p: HMC(p, step_size=0.75, num_steps=3, mass=torch.linalg.inv(SKEWED)),
    "NUTS": lambda p: NUTS(p, step_size=0.7, max_depth=6, mass="identity"),
    "NUTS, matrix": lambda p: NUTS(p, step_size=0.7, max_depth=6, mass=torch.linalg.inv(SKEWED)),
    "NUTS, shallow": lambda p: NUTS(p, step_size=0.7, max_depth=2, mass="identity"),
    "MALA": lambda p: MALA(p, step_size=0.5, mass="identity"),
    "MALA, mass": lambda p: MALA(p, step_size=0.6, mass=1 / COVARIANCE.diagonal()),
    "MALA, matrix": lambda p: MALA(p, step_size=0.6, mass=torch.linalg.inv(SKEWED)),
}


@pytest.mark.statistical
@pytest.mark.parametrize("name", COARSE)
def test_a_law_is_left_invariant(name):
    # Nine moments, ten kernels: 4.5 standard errors are exceeded once in 1,600 such tests.
    scores, statistics = invariance_scores(COARSE[name](gaussian_potential(MEAN, COVARIANCE)))
    assert 0.3 < statistics["acceptance"].mean() < 0.93
    assert scores.abs().max() < 4.5


class NoKineticEnergy(HMC):
    """A fault: only the potential is compared."""

    def step(self, state, noise):
        moved = super().step(state, noise)
        here = Point(state["vectors"], noise.normals, state["gradient"], state["potential"])
        there = leapfrog(self.potential, here, self._stride(state), self._counts(state))
        accepted = noise.uniforms[:, 0] < (here.value - there.value).exp()
        chosen = torch.where(accepted[:, None], there.vectors, here.vectors)
        value, gradient = self.potential.value_and_gradient(chosen)
        return moved | {"vectors": chosen, "potential": value, "gradient": gradient}


class NotAcceptedAtAll(HMC):
    """A fault: every proposal is taken."""

    def step(self, state, noise):
        return super().step(state, Noise(noise.normals, torch.zeros_like(noise.uniforms)))


class WrongSign(HMC):
    """A fault: an energy that rises is taken for one that falls."""

    def step(self, state, noise):
        moved = super().step(state, noise)
        here = Point(state["vectors"], noise.normals, state["gradient"], state["potential"])
        there = leapfrog(self.potential, here, self._stride(state), self._counts(state))
        accepted = noise.uniforms[:, 0] < (there.energy - here.energy).exp()
        chosen = torch.where(accepted[:, None], there.vectors, here.vectors)
        value, gradient = self.potential.value_and_gradient(chosen)
        return moved | {"vectors": chosen, "potential": value, "gradient": gradient}


class SymmetricProposal(MALA):
    """A fault: the drift of the proposal is forgotten in its acceptance."""

    def step(self, state, noise):
        stride = self._stride(state).sqrt()
        proposal = state["vectors"] + stride * (noise.normals - stride * state["gradient"] / 2)
        value, gradient = self.potential.value_and_gradient(proposal)
        accepted = noise.uniforms[:, 0] < (state["potential"] - value).exp()
        wide = accepted[:, None]
        return state | {
            "vectors": torch.where(wide, proposal, state["vectors"]),
            "gradient": torch.where(wide, gradient, state["gradient"]),
            "potential": torch.where(accepted, value, state["potential"]),
        }


class SlightlyTooMuchNoise(MALA):
    """A fault: 5 % in the noise of the proposal that its acceptance does not know of."""

    def step(self, state, noise):
        return super().step(state, Noise(1.05 * noise.normals, noise.uniforms))


class StaleGradient(MALA):
    """A fault: the gradient does not follow the chain."""

    def step(self, state, noise):
        return super().step(state, noise) | {"gradient": state["gradient"]}


class PlainTail(NUTS):
    """A fault: a trajectory always ends at its last, unweighted point in one direction."""

    def step(self, state, noise):
        uniforms = torch.where(noise.uniforms < 0.5, noise.uniforms, 0.0 * noise.uniforms)
        return super().step(state, Noise(noise.normals, uniforms))


@pytest.mark.statistical
@pytest.mark.parametrize(
    "build",
    [
        lambda p: NoKineticEnergy(p, step_size=0.85, num_steps=4, mass="identity"),
        lambda p: NotAcceptedAtAll(p, step_size=0.85, num_steps=4, mass="identity"),
        lambda p: WrongSign(p, step_size=0.85, num_steps=4, mass="identity"),
        lambda p: SymmetricProposal(p, step_size=0.5, mass="identity"),
        lambda p: StaleGradient(p, step_size=0.5, mass="identity"),
        lambda p: PlainTail(p, step_size=0.7, max_depth=6, mass="identity"),
    ],
)
def test_a_fault_is_found(build):
    scores, _ = invariance_scores(build(gaussian_potential(MEAN, COVARIANCE)))
    assert scores.abs().max() > 6


@pytest.mark.statistical
def test_unequal_noise_alone_is_no_fault_of_a_metropolis_kernel():
    # Proposals with other noise than the acceptance assumes: seen, if enough steps are made.
    kernel = SlightlyTooMuchNoise(
        gaussian_potential(MEAN, COVARIANCE), step_size=0.5, mass="identity"
    )
    assert invariance_scores(kernel, chains=16384, steps=25)[0].abs().max() > 6


def test_a_start_is_where_it_was_asked_for():
    for name in KERNELS:
        kernel = make(name)
        initial = {"x": torch.arange(6.0, dtype=F64).reshape(2, 3)}
        state, _ = begin(kernel, 2, initial=initial)
        assert torch.equal(kernel.vectors(state), initial["x"])
