"""One loop for all samplers: the same draws however it is chunked, shared or interrupted."""

import json
import re
import signal

import numpy as np
import pytest
import torch
from torch import nn

from pushforward.errors import OptionError, ResourceError, SamplingError, ShapeError, WeightsError
from pushforward.runs.store import Checkpoint
from pushforward.sampling import runner
from pushforward.sampling.hmc import HMC
from pushforward.sampling.potential import Potential
from pushforward.sampling.runner import sample
from sampling_kernels import (
    MEAN,
    STD,
    Dying,
    RandomWalk,
    Stopping,
    assert_same,
    normal_density,
    normal_potential,
    run,
    tensors_of,
)

F64 = torch.float64


def first_entry(parameters):
    return parameters["layer.w"][0]


def both(parameters):
    return {"double": 2 * parameters["layer.w"], "sum": parameters["layer.w"].sum()}


# --- what comes back -----------------------------------------------------------------------------


def test_everything_has_its_shape():
    chains = run(record=both)
    assert chains.parameters["layer.w"].shape == (4, 30, 2)
    assert chains.parameters["layer.w"].dtype == F64
    assert {n: t.shape for n, t in chains.observations.items()} == {
        "double": (4, 30, 2),
        "sum": (4, 30),
    }
    names = {"acceptance", "potential", "step_size", "divergent"}
    assert {n: t.shape for n, t in chains.statistics.items()} == dict.fromkeys(names, (4, 30))
    assert {n: t.shape for n, t in chains.warmup_statistics.items()} == dict.fromkeys(
        names, (4, 20)
    )
    assert (chains.num_chains, chains.num_draws) == (4, 30)
    assert (chains.kernel, chains.seed, chains.num_warmup, chains.thin) == ("RandomWalk", 7, 20, 1)
    assert chains.cost.evaluations == 4 * 50
    assert chains.cost.seconds > 0
    assert json.loads(json.dumps(chains.settings)) == RandomWalk().identity()


def test_what_is_recorded_of_all_chains_is_that_of_each():
    def of_all(parameters):
        weights = parameters["layer.w"]
        return {"double": 2 * weights, "sum": weights.sum(1)}

    assert_same(run(record=both), run(record=runner.RecordAll(of_all)))


@pytest.mark.statistical
def test_draws_are_of_the_law():
    chains = run(num_draws=1000, num_warmup=200, num_chains=30)
    quantity = chains.diagnosis["layer.w"]
    # Thresholds at 4.5 standard errors, as the effective number of draws has it.
    assert ((quantity.mean - MEAN).abs() / quantity.standard_error).max() < 4.5
    effective = quantity.ess_bulk
    assert effective.min() > 500
    assert ((quantity.std / STD - 1).abs() / (0.5 / effective).sqrt()).max() < 4.5
    assert (chains.moments.mean["layer.w"].mean(0) - quantity.mean).abs().max() < 1e-12


def test_a_draw_is_what_its_statistics_say():
    chains = run(record=first_entry)
    draws = chains.parameters["layer.w"]
    energy = (((draws - MEAN) / STD) ** 2).sum(-1) / 2
    torch.testing.assert_close(chains.statistics["potential"], energy)
    assert torch.equal(chains.observations["recorded"], draws[..., 0])


def test_what_is_learned_is_frozen_with_the_warm_up():
    chains = run(num_warmup=25)
    learning = chains.warmup_statistics["step_size"]
    assert (learning[:, 1:] != learning[:, :-1]).all()
    frozen = chains.statistics["step_size"]
    assert torch.equal(frozen, learning[:, -1:].expand_as(frozen))
    assert len(frozen[:, 0].unique()) == 4  # each chain for itself


def test_thinning_leaves_out_draws():
    whole = run(num_draws=30, num_warmup=20, record=both)
    thinned = run(num_draws=10, num_warmup=20, thin=3, record=both)
    for name, value in tensors_of(thinned).items():
        if name.startswith(("mean", "variance")):
            continue
        every = tensors_of(whole)[name][:, 2::3]
        assert torch.equal(value, every), name
    assert thinned.warmup_statistics["potential"].shape == (4, 6)
    assert thinned.thin == 3
    assert thinned.cost.evaluations == whole.cost.evaluations


def test_without_warm_up():
    chains = run(num_warmup=0)
    assert chains.warmup_statistics == {}
    assert (chains.statistics["step_size"] == 1.0).all()


@pytest.mark.parametrize("thin", [1, 4])
def test_moments_without_draws(thin, monkeypatch):
    whole = run(num_draws=60, thin=thin, record=both)
    # Draws make room after every one, after three, or never.
    for room in (0, 3 * 4 * 4 * 2 * 8, 2**30):
        monkeypatch.setattr(runner, "_CHUNK_BYTES", {"cpu": room})
        monkeypatch.setattr(runner, "_SEGMENT_SECONDS", 1e9)
        bare = run(num_draws=60, thin=thin, record=both, keep_parameters=False, chunk_size=4)
        assert bare.parameters == {}
        assert bare.moments.count == bare.num_draws == 60
        draws = whole.parameters["layer.w"]
        close = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(bare.moments.mean["layer.w"], draws.mean(1), **close)
        torch.testing.assert_close(bare.moments.variance["layer.w"], draws.var(1), **close)
        for name in ("mean", "variance"):
            ours, theirs = getattr(bare.moments, name), getattr(whole.moments, name)
            torch.testing.assert_close(ours["layer.w"], theirs["layer.w"], **close)
        assert torch.equal(bare.observations["double"], whole.observations["double"])
        assert torch.equal(bare.statistics["potential"], whole.statistics["potential"])


@pytest.mark.parametrize(("keep", "longest"), [(True, 256), (False, 3 * 2)])
def test_draws_that_are_not_kept_make_room(keep, longest, monkeypatch):
    lengths = []
    original = runner._Run.segment

    def noted(self, progress, steps):
        lengths.append(steps)
        return original(self, progress, steps)

    monkeypatch.setattr(runner._Run, "segment", noted)
    monkeypatch.setattr(runner, "_SEGMENT_SECONDS", 1e9)
    monkeypatch.setattr(runner, "_CHUNK_BYTES", {"cpu": 4 * 3 * 4 * 2 * 8})  # a quarter: 3 draws
    run(num_draws=300, num_warmup=0, thin=2, keep_parameters=keep, chunk_size=4)
    assert sum(lengths) == 600
    assert max(lengths) == longest


@pytest.mark.parametrize("keep", [True, False])
def test_a_single_draw_has_no_variance(keep):
    chains = run(num_draws=1, keep_parameters=keep)
    assert chains.moments.variance["layer.w"].isnan().all()
    assert chains.moments.mean["layer.w"].isfinite().all()
    assert [c.status for c in chains.checks if c.name == "enough-draws-to-compare"] == ["warn"]


# --- independent of how it is done ---------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 100])
def test_chunks_do_not_matter(chunk_size):
    expected = run(num_chains=5, record=both)
    assert_same(run(num_chains=5, record=both, chunk_size=chunk_size), expected)


def test_chunks_are_as_large_as_memory_has_it(monkeypatch):
    sizes = []
    original = RandomWalk.step

    def counted(self, state, noise):
        sizes.append(len(noise.uniforms))
        return original(self, state, noise)

    monkeypatch.setattr(RandomWalk, "step", counted)
    monkeypatch.setattr(runner, "_CHUNK_BYTES", {"cpu": 2 * RandomWalk().bytes_per_chain + 1})
    run(num_chains=5, num_draws=1, num_warmup=0)
    assert sizes == [2, 2, 1]


def test_a_chain_is_the_same_whatever_others_there_are():
    few, many = run(num_chains=2, record=both), run(num_chains=6, record=both)
    for name, value in tensors_of(few).items():
        assert torch.equal(value, tensors_of(many)[name][:2]), name


def test_seeds_differ_and_repeat():
    assert_same(run(), run())
    assert not torch.equal(run(seed=8).parameters["layer.w"], run().parameters["layer.w"])
    draws = run().parameters["layer.w"]
    assert len(draws[:, 0, 0].unique()) == 4


def test_segments_do_not_matter(monkeypatch):
    expected = run(record=both)
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(runner, "_SEGMENT_SECONDS", seconds)
        assert_same(run(record=both), expected)


def test_float32():
    chains = run(RandomWalk(normal_potential(torch.float32)), record=both)
    assert chains.parameters["layer.w"].dtype == torch.float32
    assert chains.observations["sum"].dtype == torch.float32
    assert chains.statistics["potential"].dtype == F64
    assert chains.moments.mean["layer.w"].dtype == F64


# --- where chains begin --------------------------------------------------------------------------


def still(**options):
    """Chains that stay where they begin."""
    kernel = RandomWalk(step_size=0.0)
    return run(kernel, num_draws=1, num_warmup=0, num_chains=3, **options).parameters["layer.w"][
        :, 0
    ]


def test_beginnings():
    one, three = torch.tensor([3.0, 4.0], dtype=F64), torch.arange(6, dtype=F64).reshape(3, 2)
    assert torch.equal(still(initial={"layer.w": one}), one.expand(3, 2))
    assert torch.equal(still(initial={"layer.w": three}), three)
    assert torch.equal(still(initial={"layer.w": three}, chunk_size=2), three)
    net = nn.Module()
    net.layer = nn.Module()
    net.layer.w = nn.Parameter(one.clone())
    assert torch.equal(still(initial=net), one.expand(3, 2))
    assert len(still()[:, 0].unique()) == 3  # apart, when nobody says where


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        ({}, "it is missing"),
        ({"other": torch.zeros(2, dtype=F64)}, "it is missing"),
        ({"layer.w": torch.zeros(3, dtype=F64)}, r"shape \(3,\)"),
        ({"layer.w": torch.zeros(2, 2, dtype=F64)}, r"shape \(2, 2\).*\n?.*\(3, 2\)"),
    ],
)
def test_beginnings_that_do_not_fit_are_refused(initial, message):
    with pytest.raises(ShapeError, match=message) as caught:
        still(initial=initial)
    assert "layer.w" in str(caught.value)


# --- interrupted and resumed ---------------------------------------------------------------------

LENGTH = {"num_draws": 20, "num_warmup": 15, "thin": 2, "record": both}
STEPS = 15 + 2 * 20


class Crash(RuntimeError):
    pass


def crash():
    raise Crash


def stopping(after, action=crash):
    return Stopping(after=after, action=action)


@pytest.mark.parametrize("after", [0, 1, 7, 14, 15, 16, 30, STEPS - 1])
def test_killed_anywhere_it_goes_on_to_the_same_draws(after, tmp_path):
    expected = run(**LENGTH)
    with pytest.raises(Crash):
        run(stopping(after), checkpoint=tmp_path, **LENGTH)
    assert_same(run(checkpoint=tmp_path, **LENGTH), expected)


def test_killed_in_the_midst_of_a_chunk(tmp_path):
    expected = run(**LENGTH)
    for after in (1, 60, 150):  # steps of single chains
        folder = tmp_path / str(after)
        with pytest.raises(Crash):
            run(stopping(after), checkpoint=folder, chunk_size=1, **LENGTH)
        assert_same(run(checkpoint=folder, chunk_size=3, **LENGTH), expected)


def test_killed_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_SEGMENT_SECONDS", 0.0)  # a step at a time
    attempts = 0
    while True:
        try:
            found = run(stopping(4), checkpoint=tmp_path, **LENGTH)
            break
        except Crash:
            attempts += 1
    assert attempts == (STEPS - 1) // 4
    assert_same(found, run(**LENGTH))


@pytest.mark.parametrize("after", [20, 33, STEPS - 1])
def test_moments_go_on_as_well(after, tmp_path):
    options = LENGTH | {"keep_parameters": False}
    with pytest.raises(Crash):
        run(stopping(after), checkpoint=tmp_path, **options)
    found, expected = run(checkpoint=tmp_path, **options), run(**LENGTH)
    assert found.moments.count == 20
    for name in ("mean", "variance"):
        ours, theirs = getattr(found.moments, name), getattr(expected.moments, name)
        torch.testing.assert_close(ours["layer.w"], theirs["layer.w"], rtol=1e-12, atol=1e-12)
    assert torch.equal(found.observations["double"], expected.observations["double"])


@pytest.mark.parametrize("keep", [True, False])
def test_ctrl_c_returns_the_draws_until_then(keep, tmp_path, monkeypatch, request):
    monkeypatch.setattr(runner, "_SEGMENT_SECONDS", 0.0)
    # A shell starts jobs in the background deaf to Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    options = LENGTH | {"keep_parameters": keep}
    expected = run(**options)
    kernel = stopping(15 + 2 * 9 + 1, lambda: signal.raise_signal(signal.SIGINT))
    part = run(kernel, checkpoint=tmp_path, **options)
    assert part.num_draws == 9
    for name in ("double", "sum"):
        assert torch.equal(part.observations[name], expected.observations[name][:, :9])
    if keep:
        assert torch.equal(part.parameters["layer.w"], expected.parameters["layer.w"][:, :9])
    complete = [check for check in part.checks if check.name == "complete"]
    assert [check.status for check in complete] == ["warn"]
    assert "9 of 20" in complete[0].detail
    rest = run(checkpoint=tmp_path, **options)
    assert all(check.name != "complete" for check in rest.checks)
    torch.testing.assert_close(
        tensors_of(rest), tensors_of(expected), rtol=0, atol=0 if keep else 1e-12
    )


def test_ctrl_c_without_a_checkpoint():
    def stop():
        raise KeyboardInterrupt

    part = run(stopping(40, stop), num_draws=100)
    assert 0 < part.num_draws <= 20  # those of whole segments
    whole = run(num_draws=100).parameters["layer.w"]
    assert torch.equal(part.parameters["layer.w"], whole[:, : part.num_draws])


def test_ctrl_c_in_the_warm_up_has_nothing_to_return(tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stopping(10, stop), checkpoint=tmp_path, **LENGTH)
    assert Checkpoint(tmp_path, {}).path.exists()
    assert_same(run(checkpoint=tmp_path, **LENGTH), run(**LENGTH))


def test_a_finished_run_is_only_read(tmp_path):
    first = run(checkpoint=tmp_path, **LENGTH)
    again = run(stopping(0), checkpoint=tmp_path, **LENGTH)
    assert_same(again, first)


def test_states_are_saved_now_and_then(tmp_path, monkeypatch):
    saved = []
    original = Checkpoint.save

    def recorded(self, tensors, state):
        saved.append(state["step"])
        original(self, tensors, state)

    monkeypatch.setattr(Checkpoint, "save", recorded)
    run(checkpoint=tmp_path / "rarely", **LENGTH)
    assert saved == [0, STEPS]
    saved.clear()
    monkeypatch.setattr(runner, "_SAVE_EVERY", -1.0)
    monkeypatch.setattr(runner, "_SEGMENT_SECONDS", 0.0)
    expected = run(checkpoint=tmp_path / "often", **LENGTH)
    assert saved == [0, *range(1, STEPS + 1), STEPS]
    assert_same(expected, run(**LENGTH))


def other_density(parameters):
    return 0.5 * normal_density(parameters)


@pytest.mark.parametrize(
    ("key", "kernel", "options"),
    [
        ("kernel", "renamed", {}),
        ("target.step_size", RandomWalk(step_size=0.5), {}),
        (
            "target.potential.values",
            RandomWalk(Potential.of_density(other_density, {"layer.w": torch.zeros(2, dtype=F64)})),
            {},
        ),
        ("seed", None, {"seed": 8}),
        ("num_chains", None, {"num_chains": 5}),
        ("num_warmup", None, {"num_warmup": 16}),
        ("thin", None, {"thin": 1}),
        ("keep_parameters", None, {"keep_parameters": False}),
        ("recorded", None, {"record": None}),
        ("initial", None, {"initial": {"layer.w": torch.zeros(2, dtype=F64)}}),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(key, kernel, options, tmp_path):
    with pytest.raises(Crash):
        run(stopping(20), checkpoint=tmp_path, **LENGTH)
    if kernel == "renamed":
        kernel = RandomWalk()
        object.__setattr__(kernel, "name", "Other")
    with pytest.raises(WeightsError, match=re.escape(f"{key} was")):
        run(kernel, checkpoint=tmp_path, **(LENGTH | options))
    # What was refused is not overwritten; how chains are chunked is no difference.
    assert_same(run(checkpoint=tmp_path, chunk_size=1, **LENGTH), run(**LENGTH))


@pytest.mark.parametrize("keep", [True, False])
def test_a_finished_run_is_extended(keep, tmp_path):
    options = {"num_warmup": 7, "thin": 2, "keep_parameters": keep}
    run(num_draws=9, checkpoint=tmp_path, **options)
    longer = run(num_draws=31, checkpoint=tmp_path, **options)
    assert_same(longer, run(num_draws=31, **options))
    with pytest.raises(OptionError, match="already holds 31 draws"):
        run(num_draws=30, checkpoint=tmp_path, **options)


# --- what goes wrong -----------------------------------------------------------------------------


def check_of(chains, name):
    return {check.name: check for check in chains.checks}[name]


def test_all_is_well():
    chains = run(num_draws=2000, num_warmup=150, num_chains=8)
    assert chains.status == "pass", chains.checks
    names = [check.name for check in chains.checks]
    assert names == [
        "chains-alive", "acceptance", "no-divergences", "chains-agree", "effective-draws",
    ]  # fmt: skip


def test_nothing_moves():
    chains = run(RandomWalk(step_size=1e9), num_warmup=0)
    check = check_of(chains, "acceptance")
    assert check.status == "fail"
    assert "warm-up" in check.advice
    assert check_of(chains, "chains-agree").status == "fail"


def test_low_acceptance():
    chains = run(RandomWalk(step_size=4.0), num_warmup=0, num_draws=200)
    check = check_of(chains, "acceptance")
    assert check.status == "warn"
    share = float(chains.statistics["acceptance"].mean())
    assert f"{100 * share:.3g} %" in check.detail


def test_divergences():
    chains = run(RandomWalk(step_size=30.0), num_warmup=0, num_draws=100)
    share = float(chains.statistics["divergent"].mean())
    assert 0 < share < 1
    check = check_of(chains, "no-divergences")
    assert check.status == "warn"
    assert f"{100 * share:.3g} %" in check.detail


def beginning_at(*first):
    return {"layer.w": torch.tensor([[x, 0.0] for x in first], dtype=F64)}


def test_all_chains_are_lost(tmp_path):
    initial = beginning_at(-5.0, -5.0, -5.0)
    kernel = Dying(step_size=0.01)
    options = {"num_chains": 3, "initial": initial, "checkpoint": tmp_path}
    for _ in range(2):  # also when it is called again
        with pytest.raises(SamplingError, match=r"all 3 chains .* by step \d+"):
            run(kernel, **options)
    with pytest.raises(SamplingError, match="all 3 chains"):
        run(kernel, **(options | {"checkpoint": None, "num_warmup": 0, "num_draws": 1}))


@pytest.mark.parametrize("keep", [True, False])
def test_some_chains_are_lost(keep):
    chains = run(
        Dying(step_size=0.01),
        num_warmup=0,
        num_chains=4,
        initial=beginning_at(5.0, -5.0, 5.0, 5.0),
        keep_parameters=keep,
    )
    check = check_of(chains, "chains-alive")
    assert check.status == "fail"
    assert check.detail.startswith("1 of 4 chains")
    assert chains.status == "fail"
    assert chains.moments.mean["layer.w"][[0, 2, 3]].isfinite().all()
    assert chains.moments.mean["layer.w"][1].isnan().all()


def test_too_few_draws_for_r_hat():
    chains = run(num_draws=7)
    check = check_of(chains, "enough-draws-to-compare")
    assert check.status == "warn"
    assert "7 draws" in check.detail
    assert run(num_draws=8).diagnosis.enough_draws


def test_what_does_not_fit_is_refused(monkeypatch):
    needed = 2 * 4 * 30 * 2 * 8 + 4 * RandomWalk().bytes_per_chain
    monkeypatch.setattr(runner, "available_memory", lambda _device: needed)
    run()
    run(keep_parameters=False)
    monkeypatch.setattr(runner, "available_memory", lambda _device: needed - 1)
    with pytest.raises(ResourceError, match="draws of the parameters") as caught:
        run()
    assert "keep_parameters=False" in str(caught.value)
    assert "chunk_size" in str(caught.value)
    run(keep_parameters=False)
    run(chunk_size=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_draws", 0), ("num_chains", 0), ("num_warmup", -1), ("thin", 0), ("chunk_size", 0),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(OptionError, match=name):
        run(**{name: value})


@pytest.mark.wrong_types
@pytest.mark.parametrize(("name", "value"), [("num_draws", 1.5), ("thin", True), ("seed", "1")])
def test_options_of_a_wrong_type_are_refused(name, value):
    with pytest.raises(OptionError, match=name):
        run(**{name: value})


@pytest.mark.wrong_types
def test_numbers_of_numpy_are_as_good(tmp_path):
    plain = run(num_draws=8, num_chains=2, num_warmup=4, thin=2, seed=3)
    counts = {"num_draws": 8, "num_chains": 2, "num_warmup": 4, "thin": 2, "seed": 3}
    found = run(**{name: np.int64(count) for name, count in counts.items()}, checkpoint=tmp_path)
    assert torch.equal(found.parameters["layer.w"], plain.parameters["layer.w"])
    again = run(**counts, checkpoint=tmp_path)  # the same run by its checkpoint
    assert torch.equal(again.parameters["layer.w"], plain.parameters["layer.w"])


@pytest.mark.wrong_types
def test_settings_of_kernels_may_be_numbers_of_numpy(tmp_path):
    potential = Potential.of_density(lambda p: -(p["x"] ** 2).sum() / 2, {"x": torch.zeros(2)})
    theirs = HMC(potential, step_size=np.float32(0.5), num_steps=np.int64(4), jitter=np.float32(0))
    ours = HMC(potential, step_size=0.5, num_steps=4, jitter=0.0)
    assert json.dumps(theirs.identity()) == json.dumps(ours.identity())
    options = {"num_draws": 5, "num_chains": 2, "num_warmup": 3}
    one = sample(theirs, **options, checkpoint=tmp_path).parameters["x"]
    assert torch.equal(one, sample(ours, **options).parameters["x"])


@pytest.mark.wrong_types
def test_records_that_are_no_tensors_are_refused():
    with pytest.raises(OptionError, match="record"):
        run(record=lambda p: [p["layer.w"]])


def test_the_bar_says_how_it_goes(capsys):
    run(progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"RandomWalk, acceptance [01]\.\d\d", shown)
    assert "100%" in shown
    run(progress=False)
    assert capsys.readouterr().err == ""


def test_the_bar_begins_where_the_run_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_SEGMENT_SECONDS", 0.0)
    with pytest.raises(Crash):
        run(stopping(30), checkpoint=tmp_path, **LENGTH)
    told = []

    class Bar:
        def __init__(self, total, *_args, **_options):
            assert total == STEPS

        def __enter__(self):
            return lambda amount, _note="": told.append(amount)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(runner, "track", Bar)
    run(checkpoint=tmp_path, **LENGTH)
    assert told == [30, *[1] * (STEPS - 30)]


def test_steps_are_counted(monkeypatch):
    """A warm-up is told its length, and steps come in order."""
    numbers = []
    original = RandomWalk.warm_up

    def noted(self, state, noise, step, total):
        numbers.append((step, total))
        return original(self, state, noise, step, total)

    monkeypatch.setattr(RandomWalk, "warm_up", noted)
    run(num_warmup=12)
    assert numbers == list(zip(range(12), [12] * 12, strict=True))
