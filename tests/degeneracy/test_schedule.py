"""The order of runs, which of them begins where, and with which step."""

from dataclasses import replace
from itertools import pairwise
from math import isnan

import pytest
import torch

from degeneracy_problems import (
    neighbourhood,
    regression,
)
from pushforward.degeneracy import schedule as module
from pushforward.degeneracy.calibration import relaxation_steps
from pushforward.degeneracy.schedule import walk_through
from pushforward.degeneracy.settings import Settings
from pushforward.degeneracy.walk import Walk
from pushforward.errors import SamplingError


@pytest.fixture
def calls(monkeypatch):
    """Of runs, with what they were asked for and what they gave; pilots apart."""
    made = []
    original = Walk.run

    def noted(self, name, **options):
        found = original(self, name, **options)
        if not name.startswith("pilot"):
            made.append({"name": name, "found": found, "walk": self} | options)
        return found

    monkeypatch.setattr(Walk, "run", noted)
    return made


def walked(sampler="sgld", start=None, net=None, data=None, **options):
    if net is None:
        net, data, _ = regression()
    defaults = {"num_chains": 4, "num_draws": 40, "localization": 5.0}
    settings = Settings(sampler=sampler, **(defaults | options))
    around = neighbourhood(net, data, localization=settings.localization)
    return walk_through(Walk(around, settings.sampler_for(around), 0, None, False), settings, start)


def names(calls):
    return [call["name"] for call in calls]


def where(start):
    return torch.cat([value.flatten(1) for value in start.values()], 1)


# --- the order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["sgld", "langevin"])
def test_warm_up_main_and_half_the_step(calls, sampler):
    runs = walked(sampler, num_warmup=30)
    assert names(calls) == ["warmup-0", "main-0", "spaced"]
    warmup, main, spaced = calls
    assert [call["steps"] for call in calls] == [30, 40, 40]
    assert warmup["step_size"] == main["step_size"] == runs.step_size
    assert spaced["step_size"] == runs.step_size / 2
    assert warmup["start"] == 4
    assert torch.equal(where(main["start"]), warmup["found"].positions)
    assert torch.equal(where(spaced["start"]), main["found"].positions)
    assert runs.warmups == (warmup["found"],)
    assert runs.main is main["found"]
    assert runs.spaced is spaced["found"]
    assert runs.main.losses is None
    assert runs.spaced.losses.shape == (4, 40, 100)


def test_without_warm_up(calls):
    runs = walked(num_warmup=0)
    assert names(calls) == ["main-0", "spaced"]
    assert runs.warmups == ()
    assert calls[0]["start"] == 4


def test_the_warm_up_is_as_long_as_a_flat_direction_takes(calls):
    runs = walked()
    first = calls[0]
    expected = relaxation_steps(5.0, runs.step_size, most=20 * 40)
    assert first["steps"] == expected
    assert first["steps"] > 100


def test_a_step_too_large_where_the_chains_came_to_is_made_smaller(calls, monkeypatch):
    wanted = iter([1e-4, 1e-4, 1e-4])
    monkeypatch.setattr(module, "sustained_step", lambda *_: next(wanted))
    runs = walked()
    assert names(calls)[:3] == ["warmup-0", "warmup-1", "main-0"]
    assert calls[0]["step_size"] > 1e-3
    assert calls[1]["step_size"] == runs.step_size == 1e-4
    assert torch.equal(where(calls[1]["start"]), calls[0]["found"].positions)
    assert len(runs.warmups) >= 2


def test_a_given_step_stays_wherever_the_chains_come_to(calls, monkeypatch):
    monkeypatch.setattr(module, "sustained_step", lambda *_: 1e-9)
    runs = walked(step_size=2e-3)
    assert runs.step_size == 2e-3
    assert names(calls).count("warmup-0") == 1
    assert "warmup-1" not in names(calls)


def test_a_warm_up_in_which_a_chain_is_lost_begins_again_with_a_smaller_step(calls, monkeypatch):
    original = Walk.run
    lost = []

    def losing(self, name, **options):
        if name in {"warmup-0", "warmup-1"}:
            lost.append(options["step_size"])
            raise SamplingError("all is lost", where="here", advice="Retry.")
        return original(self, name, **options)

    monkeypatch.setattr(Walk, "run", losing)
    runs = walked()
    assert names(calls)[0] == "warmup-2"
    assert lost[1] == lost[0] / 8
    assert calls[0]["step_size"] == runs.step_size == lost[0] / 64
    assert calls[0]["start"] == 4  # at the weights, not where the lost ones were


def test_the_last_warm_up_says_what_is_wrong(monkeypatch):
    original = Walk.run

    def losing(self, name, **options):
        if name.startswith("warmup"):
            raise SamplingError("all is lost", where="here", advice="Retry.")
        return original(self, name, **options)

    monkeypatch.setattr(Walk, "run", losing)
    with pytest.raises(SamplingError, match="all is lost"):
        walked()
    with pytest.raises(SamplingError, match="all is lost"):
        walked(step_size=1e-3)


def far(net, distance=300.0):
    return {"0.weight": net[0].weight.detach().expand(4, 1, 4) + distance}


def test_a_main_run_that_drifts_becomes_a_warm_up(calls):
    net, data, _ = regression(scales=(1.0, 1.0, 1.0, 0.05))
    # The slowest direction forgets too little of a far beginning in one run.
    runs = walked(start=far(net), net=net, data=data, num_draws=200, localization=1.0)
    mains = [call for call in calls if call["name"].startswith("main")]
    assert len(mains) > 1
    assert [call["name"] for call in mains] == [f"main-{i}" for i in range(len(mains))]
    assert runs.main is mains[-1]["found"]
    assert [call["found"] for call in mains[:-1]] == list(runs.warmups[-len(mains) + 1 :])
    for before, after in pairwise(mains):
        assert torch.equal(where(after["start"]), before["found"].positions)


def test_a_warm_up_that_was_given_is_not_extended(calls):
    net, data, _ = regression(scales=(1.0, 1.0, 1.0, 0.05))
    walked(start=far(net), net=net, data=data, num_draws=200, localization=1.0, num_warmup=5)
    assert names(calls) == ["warmup-0", "main-0", "spaced"]
    assert torch.equal(where(calls[0]["start"]), far(net)["0.weight"].flatten(1))


@pytest.mark.parametrize(
    ("num_draws", "most", "kept", "thin"),
    [(40, 2**28, 40, 1), (200, 2**28, 64, 3), (200, 20 * 4 * 100, 20, 10), (200, 1, 8, 25)],
)
def test_losses_of_examples_are_noted_at_spaced_draws(
    calls, monkeypatch, num_draws, most, kept, thin
):
    monkeypatch.setattr(module, "_MOST_LOSSES", most)
    walked(num_draws=num_draws, num_warmup=10)
    spaced = calls[-1]
    assert (spaced["steps"], spaced["thin"], spaced["losses"]) == (kept, thin, True)
    assert spaced["found"].losses.shape == (4, kept, 100)
    assert spaced["warmup"] == num_draws // 10


# --- samplers with a Metropolis test -------------------------------------------------------------


def test_one_run_is_enough_for_metropolis(calls):
    runs = walked("mala", num_warmup=20)
    assert names(calls) == ["main"]
    assert runs.main is runs.spaced
    assert runs.warmups == ()
    assert isnan(runs.step_size)
    assert (calls[0]["warmup"], calls[0]["start"], calls[0]["losses"]) == (20, 4, True)
    assert runs.main.losses.shape == (4, 40, 100)


def test_losses_are_left_out_where_they_are_too_many(calls, monkeypatch):
    monkeypatch.setattr(module, "_MOST_LOSSES", 40 * 4 * 100 - 1)
    assert walked("mala", num_warmup=20).main.losses is None
    assert calls[0]["losses"] is False


def test_a_step_of_metropolis_can_be_given(calls):
    runs = walked("hmc", num_warmup=4, num_draws=16, step_size=0.02)
    assert runs.step_size == 0.02
    assert (runs.main.chains.statistics["step_size"] == 0.02).all()
    assert len(calls) == 1


@pytest.mark.parametrize(("sampler", "steps"), [("hmc", 300), ("mala", 1000)])
def test_how_long_metropolis_learns(monkeypatch, sampler, steps):
    asked = []

    def refused(_self, _name, **options):
        asked.append(options["warmup"])
        raise SamplingError("enough", where="here", advice="None.")

    monkeypatch.setattr(Walk, "run", refused)
    with pytest.raises(SamplingError):
        walked(sampler)
    assert asked == [steps]


@pytest.mark.parametrize("sampler", ["mala"])
def test_when_nobody_lives_that_is_said(monkeypatch, sampler):
    original = Walk.run

    def dead(self, name, **options):
        found = original(self, name, **options)
        return replace(found, excess=torch.full_like(found.excess, torch.nan))

    monkeypatch.setattr(Walk, "run", dead)
    with pytest.raises(SamplingError, match=r"no chain stayed finite.*\n?.*smaller step_size"):
        walked(sampler, num_warmup=5)
