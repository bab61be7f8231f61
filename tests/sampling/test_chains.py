"""What chains say about themselves."""

import json

import pytest
import torch

from pushforward.errors import OptionError
from pushforward.sampling.chains import Chains
from sampling_kernels import MEAN, Dying, RandomWalk, assert_same, run


@pytest.fixture(scope="module")
def chains():
    return run(num_draws=40, record=lambda p: {"total": p["layer.w"].sum()})


@pytest.fixture(scope="module")
def bare():
    return run(num_draws=40, keep_parameters=False)


def test_draws_of_all_chains_one_after_the_other(chains):
    draws = chains.draws()["layer.w"]
    assert draws.shape == (160, 2)
    assert torch.equal(draws[40:80], chains.parameters["layer.w"][1])


def test_draws_that_were_not_kept(bare):
    for use in (bare.draws, lambda: bare.apply(lambda p: p["layer.w"])):
        with pytest.raises(OptionError, match="keep_parameters=True"):
            use()


@pytest.mark.parametrize("chunk_size", [1, 7, 64, None])
def test_functions_are_applied_to_every_draw(chains, chunk_size):
    found = chains.apply(lambda p: (p["layer.w"] - MEAN) ** 2, chunk_size=chunk_size)
    assert torch.equal(found, (chains.parameters["layer.w"] - MEAN) ** 2)
    total = chains.apply(lambda p: p["layer.w"].sum())
    assert torch.equal(total, chains.observations["total"])


def test_sizes(chains, bare):
    for found in (chains, bare):
        assert (found.num_chains, found.num_draws) == (4, 40)
        assert found.moments.mean["layer.w"].shape == (4, 2)


def test_everything_is_diagnosed(chains, bare):
    assert [q.name for q in chains.diagnosis.quantities] == ["potential", "total", "layer.w"]
    assert [q.name for q in bare.diagnosis.quantities] == ["potential"]
    assert chains.diagnosis is chains.diagnosis  # computed once


def test_checks_are_of_the_run_and_of_the_chains(chains):
    assert chains.checks[: len(chains.run_checks)] == chains.run_checks
    assert {c.name for c in chains.checks} >= {"chains-alive", "chains-agree", "effective-draws"}
    assert chains.status == max(
        (c.status for c in chains.checks), key=["pass", "warn", "fail"].index
    )
    assert chains.status != "pass"  # forty draws


def test_plain_objects(chains):
    found = json.loads(json.dumps(chains.to_dict()))
    assert found["kernel"] == "RandomWalk"
    assert (found["num_chains"], found["num_draws"], found["seed"]) == (4, 40, 7)
    assert [c["name"] for c in found["checks"]] == [c.name for c in chains.checks]
    assert found["diagnosis"]["quantities"][0]["name"] == "potential"
    assert found["settings"] == chains.settings
    assert "parameters" not in found
    assert "moments" not in found


def test_a_summary_in_words(chains, bare):
    text = repr(chains)
    assert "Chains of RandomWalk: 4 chains, 40 draws of 2 parameters (warm-up 20, thin 1)" in text
    for name in ("potential", "total", "layer.w"):
        assert name in text
    assert all((check.name in text) == (check.status != "pass") for check in chains.checks)
    assert "240 steps of single chains" in text
    assert "2 parameters" in repr(bare)


def test_one_call_each(chains, tmp_path):
    from matplotlib import pyplot

    chains.save(tmp_path / "c")
    assert_same(Chains.load(tmp_path / "c"), chains)
    assert chains.to_datatree()["posterior"].sizes["draw"] == 40
    figure = chains.plot()
    assert len(figure.axes) == 4
    pyplot.close(figure)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("thin", [1, 3])
def test_where_the_chains_are_now(keep, thin):
    found = run(num_draws=12, thin=thin, keep_parameters=keep)
    assert {name: value.shape for name, value in found.last.items()} == {"layer.w": (4, 2)}
    whole = run(num_draws=12, thin=thin)
    assert torch.equal(found.last["layer.w"], whole.parameters["layer.w"][:, -1])
    assert torch.equal(whole.last["layer.w"], found.last["layer.w"])


def test_another_run_begins_where_one_ended():
    first = run(num_draws=12)
    still = run(RandomWalk(step_size=0.0), initial=first.last, num_draws=1, num_warmup=0)
    assert torch.equal(still.last["layer.w"], first.last["layer.w"])


def test_where_the_chains_are_is_saved(chains, tmp_path):
    chains.save(tmp_path / "c")
    loaded = Chains.load(tmp_path / "c")
    assert torch.equal(loaded.last["layer.w"], chains.last["layer.w"])


def test_chains_that_are_lost_are_nowhere():
    starts = torch.tensor([[5.0, 0.0], [-5.0, 0.0]], dtype=torch.float64)
    found = run(Dying(step_size=0.01), num_chains=2, num_warmup=0, initial={"layer.w": starts})
    assert found.last["layer.w"].isfinite().all(1).tolist() == [True, False]
