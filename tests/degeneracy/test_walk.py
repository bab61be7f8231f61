"""Chains around weights: what they note, which of them live, and what they are moved by."""

from dataclasses import replace

import pytest
import torch

from degeneracy_problems import F64, UNIT, draws, neighbourhood, regression, relu_network, scaled
from pushforward.degeneracy.walk import Walk
from pushforward.errors import SamplingError
from pushforward.sampling.hmc import HMC
from pushforward.sampling.mala import MALA
from pushforward.sampling.sgld import SGLD


def walk_of(sampler="sgld", *, net=None, data=None, checkpoint=None, seed=0, **options):
    if net is None:
        net, data = relu_network()
    return Walk(neighbourhood(net, data, **options), sampler, seed, checkpoint, False)


def walled(radius):
    """NaN beyond a distance from the targets, and so is the gradient."""

    def loss(outputs, targets):
        away = (outputs - targets).square().sum(1)
        return away * torch.where(away.detach() < radius, 1.0, torch.nan)

    return loss


# --- what is noted -------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["langevin", "sgld", "hmc", "mala"])
@pytest.mark.parametrize("metric", ["euclidean", "layerwise"])
def test_the_excess_is_n_beta_times_what_the_loss_exceeds(sampler, metric):
    walk = walk_of(sampler, metric=metric, nbeta=11.0, localization=4.0)
    found = walk.run("test", steps=3, start=4, step_size=0.01)
    around = walk.around
    losses = around.potential.losses(found.positions)
    expected = 11.0 * (losses - around.initial_loss)
    torch.testing.assert_close(found.excess[:, -1], expected, rtol=1e-9, atol=1e-11)
    assert found.excess.shape == (4, 3)
    assert found.losses is None


def test_losses_of_examples_are_those_of_the_network():
    net, (x, y) = relu_network()
    walk = walk_of(net=net, data=(x, y), batch_size=8)
    found = walk.run("test", steps=5, start=3, step_size=0.01, thin=2, losses=True)
    assert found.losses.shape == (3, 5, 60)
    for chain in range(3):
        parameters = {name: value[chain] for name, value in found.survivors().items()}
        outputs = torch.func.functional_call(net, parameters, (x,))
        torch.testing.assert_close(found.losses[chain, -1], -UNIT.log_prob(outputs, y))
    # With them the excess is exact, whatever the batch.
    expected = walk.around.nbeta * (found.losses.mean(-1) - walk.around.initial_loss)
    torch.testing.assert_close(found.excess, expected)


@pytest.mark.statistical
def test_minibatches_know_the_losses_at_the_weights():
    """Without noise at ``w*``, and without bias around it."""
    net, (x, y) = relu_network()
    walk = walk_of(net=net, data=(x, y + draws(60, 1, seed=9)), batch_size=6)
    still = walk.run("test", steps=1, start=400, step_size=1e-14)
    spread = float(walk.around.potential.anchor_losses.std()) * walk.around.nbeta
    assert still.excess.abs().max() < 1e-4 * spread
    moved = walk.run("test", steps=1, start=400, step_size=0.02)
    exact = walk.around.nbeta * (
        walk.around.potential.losses(moved.positions) - walk.around.initial_loss
    )
    away = (moved.excess[:, 0] - exact).double()
    assert away.std() > 0.01
    assert away.mean().abs() < 4.5 * away.std() / 400**0.5


def test_chains_begin_where_they_are_told():
    walk = walk_of()
    here = walk.run("test", steps=1, start=3, step_size=1e-12)
    torch.testing.assert_close(here.positions, walk.around.centre.expand(3, -1), rtol=0, atol=1e-4)
    there = {name: value + 1.0 for name, value in here.survivors().items()}
    found = walk.run("test", steps=1, start=there, step_size=1e-12)
    torch.testing.assert_close(found.positions, here.positions + 1.0, rtol=0, atol=1e-4)


def test_runs_of_other_names_have_other_noise():
    walk = walk_of()

    def excess(name, seed=0):
        return walk_of(seed=seed).run(name, steps=2, start=2, step_size=0.01).excess

    first = walk.run("a", steps=2, start=2, step_size=0.01).excess
    assert torch.equal(first, excess("a"))
    assert not torch.equal(first, excess("b"))
    assert not torch.equal(first, excess("a", seed=1))
    assert len(first[:, -1].unique()) == 2


# --- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "averaged"), [("langevin", True), ("sgld", False)])
def test_langevin_averages_its_noise(sampler, averaged):
    kernel = walk_of(sampler, batch_size=5).kernel(0.03)
    assert isinstance(kernel, SGLD)
    assert (kernel.step_size, kernel.averaged_noise) == (0.03, averaged)
    assert kernel.preconditioner is None
    assert kernel.potential.batch_size == 5
    scaled_ = walk_of(sampler, metric="layerwise")
    assert torch.equal(scaled_.kernel(0.03).preconditioner, scaled_.around.scale.square())


@pytest.mark.parametrize(("sampler", "kind"), [("hmc", HMC), ("mala", MALA)])
def test_metropolis_takes_all_data(sampler, kind):
    walk = walk_of(sampler, batch_size=5)
    assert walk.learns
    kernel = walk.kernel(None)
    assert isinstance(kernel, kind)
    assert kernel.potential.batch_size is None
    found = walk.run("test", steps=2, start=2, warmup=5)
    assert found.chains.num_warmup == 5
    fixed = walk.run("test", steps=2, start=2, step_size=0.01, warmup=5)
    assert (fixed.chains.statistics["step_size"] == 0.01).all()


@pytest.mark.parametrize("sampler", ["langevin", "sgld", "hmc", "mala"])
def test_layerwise_walks_do_not_see_scales(sampler):
    """A power of two rounds nothing, so even what a Metropolis test decides is the same."""
    net, data = relu_network()
    found = [
        walk_of(sampler, net=scaled(net, factor), data=data, metric="layerwise").run(
            "test", steps=6, start=3, warmup=6, step_size=None if sampler in "hmc mala" else 0.05
        )
        for factor in (1.0, 2.0**13, 2.0**-13)
    ]
    assert torch.equal(found[0].excess, found[1].excess)
    assert torch.equal(found[0].excess, found[2].excess)


# --- who lives -----------------------------------------------------------------------------------


def test_the_dead_are_told_from_the_living():
    net, data, _ = regression()
    walk = walk_of(net=net, data=data, loss=walled(2.5))
    there = draws(4, 1, 4)
    there[:2] *= 1e-3
    there[2:] *= 1e3  # beyond the wall
    found = walk.run("test", steps=4, start={"0.weight": net[0].weight + there}, step_size=1e-4)
    assert found.alive.tolist() == [True, True, False, False]
    assert found.excess[:2].isfinite().all()
    assert not found.excess[2:].isfinite().any()
    survivors = found.survivors()["0.weight"]
    assert survivors.shape == (2, 1, 4)
    assert torch.equal(survivors.flatten(1), found.positions[:2])


def test_attempts_are_all_or_nothing(tmp_path):
    net, data, _ = regression()
    walk = walk_of(net=net, data=data, loss=walled(2.5), checkpoint=tmp_path)
    good = walk.attempt("test", steps=4, start=4, step_size=1e-4)
    assert bool(good.alive.all())
    start = net[0].weight.detach().expand(4, 1, 4).clone()
    start[3] += 1e3
    assert walk.attempt("test", steps=4, start={"0.weight": start}, step_size=1e-4) is None
    assert walk.attempt("test", steps=4, start={"0.weight": start + 1e3}, step_size=1e-4) is None
    with pytest.raises(SamplingError, match="all 4 chains"):
        walk.run("test", steps=4, start={"0.weight": start + 1e3}, step_size=1e-4)
    assert not list(tmp_path.glob("pilot*"))


def test_every_run_has_a_folder_of_its_own(tmp_path):
    walk = walk_of(checkpoint=str(tmp_path / "state"))
    first = walk.run("one", steps=3, start=2, step_size=0.01)
    walk.run("two", steps=3, start=2, step_size=0.01)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["one", "two"]
    again = walk.run("one", steps=3, start=2, step_size=0.01)
    assert torch.equal(again.excess, first.excess)
    walk.attempt("three", steps=3, start=2, step_size=0.01)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["one", "two"]


def test_positions_have_the_order_of_the_parameters():
    walk = walk_of()
    found = walk.run("test", steps=1, start=2, step_size=0.01)
    ravelled = walk.around.potential.space.ravel(found.chains.last)
    assert torch.equal(found.positions, ravelled)
    assert found.positions.dtype == F64


# --- chains that ran away ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begun", "peak", "away"),
    [(0.0, 99.0, False), (0.0, 101.0, True), (2.0, 199.0, False), (2.0, 201.0, True)],
)
def test_a_chain_that_rose_a_hundredfold_has_run_away_even_if_it_came_back(
    begun, peak, away, monkeypatch
):
    walk = walk_of()
    walked = walk.run("test", steps=5, start=3, step_size=1e-4)
    most = walk.around.num_parameters + 10.0
    excess = torch.zeros(3, 5, dtype=F64)
    excess[:, 0], excess[1, 2] = begun * most, peak * most
    walked = replace(walked, excess=excess)
    assert walk.ran_away(walked) == away
    monkeypatch.setattr(Walk, "run", lambda *_args, **_options: walked)
    found = walk.attempt("test", steps=5, start=3, step_size=1e-4)
    assert (found is None) == away
