"""The same result however a call is interrupted or chunked."""

import pytest
import torch

from degeneracy_problems import estimate, regression, relu_network, same
from pushforward.errors import WeightsError
from pushforward.sampling import runner
from pushforward.sampling.mala import MALA
from pushforward.sampling.sgld import SGLD


class Crash(RuntimeError):
    pass


def short(sampler, **options):
    net, data, _ = regression()
    chosen = {"sampler": sampler, "num_chains": 4, "num_draws": 20, "num_warmup": 30}
    return estimate(net, data, **(chosen | {"localization": 5.0} | options))


def interrupted(monkeypatch, kernel, after, kind, call):
    """Run until so many steps are made, then as if the process had ended there."""
    original, made = kernel.step, []

    def step(self, state, noise):
        made.append(None)
        if len(made) == after:
            raise kind
        return original(self, state, noise)

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "step", step)
        try:
            call()
        except kind:
            return len(made)
    return len(made)


@pytest.mark.parametrize(("sampler", "kernel"), [("langevin", SGLD), ("mala", MALA)])
def test_killed_anywhere_it_goes_on_to_the_same_result(sampler, kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_SEGMENT_SECONDS", 0.01)
    expected = short(sampler)
    steps = interrupted(monkeypatch, kernel, -1, Crash, lambda: short(sampler))
    for share in (0.6, 0.8, 0.97):
        folder = tmp_path / str(share)
        after = round(share * steps)

        def call(folder=folder):
            return short(sampler, checkpoint=folder)

        assert interrupted(monkeypatch, kernel, after, Crash, call) == after
        assert same(call(), expected)


@pytest.mark.parametrize(("sampler", "kernel"), [("sgld", SGLD), ("mala", MALA)])
def test_stopped_by_ctrl_c_it_goes_on_to_the_same_result(sampler, kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_SEGMENT_SECONDS", 0.01)
    expected = short(sampler)
    steps = interrupted(monkeypatch, kernel, -1, Crash, lambda: short(sampler))
    for share in (0.6, 0.72):  # of SGLD in the warm-up and in the main run
        folder = tmp_path / str(share)

        def call(folder=folder):
            return short(sampler, checkpoint=folder)

        interrupted(monkeypatch, kernel, round(share * steps), KeyboardInterrupt, call)
        assert same(call(), expected)


@pytest.mark.parametrize("after", [30, 80, 110])
def test_ctrl_c_ends_it(after, monkeypatch):
    """In a pilot of 60 steps, in the warm-up, in the main run."""
    net, data, _ = regression()
    original, made = SGLD.step, []

    def step(self, state, noise):
        made.append(None)
        if len(made) == after:
            raise KeyboardInterrupt
        return original(self, state, noise)

    monkeypatch.setattr(runner, "_SEGMENT_SECONDS", 0.01)
    monkeypatch.setattr(SGLD, "step", step)
    with pytest.raises(KeyboardInterrupt):
        estimate(net, data, sampler="sgld", num_chains=4, num_draws=40, num_warmup=40)
    assert len(made) == after


def test_a_finished_run_is_read(tmp_path, monkeypatch):
    expected = short("sgld", checkpoint=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "main-0",
        "spaced",
        "state.safetensors",
        "warmup-0",
    ]
    before = interrupted(monkeypatch, SGLD, -1, Crash, lambda: short("sgld"))
    after = interrupted(monkeypatch, SGLD, -1, Crash, lambda: short("sgld", checkpoint=tmp_path))
    assert after == before - (30 + 20 + 2 + 20) == 60  # a pilot, which is not kept
    assert same(short("sgld", checkpoint=tmp_path), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed was"),
        ({"step_size": 1e-3}, "step_size was"),
        ({"localization": 6.0}, "localization"),
        ({"nbeta": 3.0}, "inverse_temperature was"),
        ({"num_chains": 5}, "num_chains was 4 and is 5"),
        ({"batch_size": 9}, "batch_size was"),
        ({"metric": "layerwise"}, "metric was"),
    ],
)
def test_checkpoints_of_other_computations_are_refused(changed, message, finished):
    with pytest.raises(WeightsError, match=message):
        short("sgld", checkpoint=finished, **changed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    short("sgld", checkpoint=folder)
    return folder


def test_checkpoints_of_other_networks_are_refused(finished):
    net, data = relu_network()
    options = {"sampler": "sgld", "num_chains": 4, "num_draws": 20, "num_warmup": 30}
    with pytest.raises(WeightsError, match=r"network was.*\n?.*another folder"):
        estimate(net, data, checkpoint=finished, localization=5.0, **options)
    _, data, _ = regression()
    other = regression(count=99)
    with pytest.raises(WeightsError, match="data was"):
        estimate(*other[:2], checkpoint=finished, localization=5.0, nbeta=21.7, **options)


# --- however it is chunked ----------------------------------------------------------------------


def test_chunks_do_not_matter(monkeypatch):
    expected = short("sgld")
    monkeypatch.setattr(runner, "_CHUNK_BYTES", {"cpu": 1})  # a chain at a time
    found = short("sgld")
    torch.testing.assert_close(found.excess, expected.excess, rtol=1e-9, atol=1e-9)
    assert float(found) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("changed", [{"num_warmup": 40}, {"num_draws": 16}, {"nbeta": 7.0}])
def test_a_call_that_is_refused_leaves_the_folder_as_it_was(tmp_path, changed):
    before = short("langevin", checkpoint=tmp_path)
    with pytest.raises(WeightsError, match=next(iter(changed)) + "|temperature"):
        short("langevin", checkpoint=tmp_path, **changed)
    assert same(short("langevin", checkpoint=tmp_path), before)
