"""Sweeps over checkpoints: measured alike, resumed bit for bit, restricted."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pushforward as pf
from degeneracy_problems import UNIT, draws, regression
from pushforward.degeneracy import checkpoints as module
from pushforward.degeneracy import walk as walking
from pushforward.degeneracy.calibration import calibrate
from pushforward.degeneracy.checkpoints import learning_coefficient_sweep
from pushforward.degeneracy.quadrature import quadratic
from pushforward.degeneracy.settings import Settings
from pushforward.degeneracy.stored import coefficient_from, parts_of
from pushforward.degeneracy.walk import Walk
from pushforward.errors import NetworkError, OptionError, SamplingError, WeightsError
from pushforward.sampling.sgld import SGLD

F64 = torch.float64
SHORT = {"sampler": "langevin", "num_chains": 4, "num_draws": 64, "progress": False}
FIXED = SHORT | {"localization": 1.0, "step_size": 0.02, "num_warmup": 40}


def hidden(scale):
    """A tanh unit whose curvature grows with its output weight, at its own targets."""
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False)).to(F64)
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.5, -0.3]]))
        net[2].weight.fill_(scale)
    return net.eval()


X = draws(40, 2, seed=5)
DATA = (X, X[:, :1])


def same(one, other):
    (a, b), (c, d) = parts_of(one), parts_of(other)
    b, d = dict(b), dict(d)
    assert b.pop("cost")["fields"][2] == d.pop("cost")["fields"][2]  # seconds may differ
    assert set(a) == set(c)
    for name, tensor in a.items():
        assert torch.equal(tensor.nan_to_num(), c[name].nan_to_num()), name
    assert json.dumps(b) == json.dumps(d)


@pytest.fixture(scope="module")
def sweep():
    """Two minima and a point that is none, by one call."""
    net, data, _ = regression()
    at = net.state_dict()["0.weight"]
    weights = {0: {"0.weight": at - 2}, 100: {"0.weight": at + 0.01}, 200: net}
    return learning_coefficient_sweep(
        net, weights, data, UNIT, **SHORT | {"num_draws": 250, "num_warmup": 150}
    )


def test_a_sweep_finds_what_is_no_minimum(sweep):
    assert sweep.labels == (0, 100, 200)
    assert sweep.not_minima == (0,)
    assert sweep.verdicts[0] == "NOT_A_MINIMUM"
    assert float(sweep.values[0]) < -50
    assert sweep.missing == ()


@pytest.mark.statistical
def test_values_of_a_sweep_are_those_of_theory(sweep):
    _, _, curvatures = regression()
    for label in (100, 200):
        found = sweep[label]
        truth = quadratic(curvatures, found.nbeta, found.localization)
        assert abs(float(found) - truth) < 4 * float(found.standard_error)  # 1 in 16,000


def test_tables_and_dictionaries(sweep):
    text = sweep.table().splitlines()
    assert len(text) == 4
    assert "NOT_A_MINIMUM" in text[1]
    assert f"{sweep[200].initial_loss:.4g}" in text[3]
    markdown = sweep.table("markdown").splitlines()
    assert len({line.count("|") for line in markdown}) == 1
    plain = json.loads(json.dumps(sweep.to_dict(), allow_nan=False))
    assert [one["label"] for one in plain["checkpoints"]] == [0, 100, 200]
    assert plain["not_minima"] == [0]
    assert math.isclose(plain["checkpoints"][2]["value"], float(sweep[200]))
    assert "no minimum at this temperature: 0" in repr(sweep)
    with pytest.raises(KeyError):
        sweep[1]
    with pytest.raises(OptionError, match="there is no style"):
        sweep.table("html")


def test_pictures(sweep):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    figure = sweep.plot()
    left, right = figure.axes
    assert torch.allclose(torch.tensor(right.lines[0].get_ydata()), sweep.initial_losses)
    assert any("not a minimum" in text.get_text() for text in left.texts)
    pyplot.close(figure)


def test_all_checkpoints_are_measured_with_what_the_most_demanding_needs():
    scales = {"flat": 0.1, "sharp": 3.0, "middle": 1.0}
    nets = {label: hidden(scale) for label, scale in scales.items()}
    found = learning_coefficient_sweep(hidden(1.0), nets, DATA, UNIT, realisable=True, **SHORT)
    settings = Settings(**{k: v for k, v in SHORT.items() if k != "progress"})
    alone = {}
    for label, net in nets.items():
        around = settings.neighbourhood(net, DATA, UNIT, subset=None, realisable=True, seed=0)
        alone[label] = calibrate(
            Walk(around, "langevin", 0), num_chains=4, num_draws=64, step_size=None, localize=True
        )
    gammas = {label: one.walk.around.localization for label, one in alone.items()}
    assert max(gammas, key=gammas.get) == "sharp"
    shared = {one.localization for _, one in found}
    assert len(shared) == 1
    # Other noise and other pilots: the same up to what they scatter.
    assert shared.pop() == pytest.approx(gammas["sharp"], rel=0.5)
    assert gammas["flat"] < 0.2 * gammas["sharp"]
    assert {one.step_size for _, one in found} == {found.step_size}
    assert found.step_size <= 1.5 * alone["sharp"].step_size
    assert len({one.nbeta for _, one in found}) == 1


def watch_starts(monkeypatch):
    """Where chains begin and how far from the weights they end, of every checkpoint."""
    starts, ends, walk_through = [], [], module.walk_through

    def watched(walk, settings, start=None):
        runs = walk_through(walk, settings, start)
        starts.append(start)
        centre = walk.around.potential.model.parameters
        ends.append({n: p - centre[n] for n, p in runs.spaced.survivors().items()})
        return runs

    monkeypatch.setattr(module, "walk_through", watched)
    return starts, ends


def test_chains_begin_where_those_before_ended(monkeypatch):
    starts, ends = watch_starts(monkeypatch)
    nets = [(name, hidden(scale)) for name, scale in (("a", 1.0), ("b", 2.0))]
    learning_coefficient_sweep(hidden(1.0), nets, DATA, UNIT, realisable=True, **FIXED)
    assert starts[0] is None
    for name, weight in nets[1][1].state_dict().items():
        assert torch.allclose(starts[1][name], weight + ends[0][name], rtol=0, atol=1e-12)


def test_what_is_no_minimum_tells_the_next_checkpoint_nothing(monkeypatch):
    starts, _ = watch_starts(monkeypatch)
    net, data, _ = regression()
    weights = {0: {"0.weight": net[0].weight - 2}, 1: net, 2: net}
    found = learning_coefficient_sweep(net, weights, data, UNIT, **FIXED)
    assert found.not_minima == (0,)
    assert [start is None for start in starts] == [True, True, False]


def test_another_problem_is_not_taken_for_this_one(tmp_path):
    """Neither results nor the calibration of other data or settings."""
    nets = {1: hidden(1.0)}
    options = SHORT | {"checkpoint": tmp_path, "num_warmup": 10}
    learning_coefficient_sweep(hidden(1.0), nets, DATA, UNIT, realisable=True, **options)
    (tmp_path / "0000" / "state.safetensors").unlink()
    for data, more in (((X + 1, X[:, :1]), {}), (DATA, {"num_draws": 50}), (DATA, {"seed": 1})):
        with pytest.raises(WeightsError, match="of another computation"):
            learning_coefficient_sweep(
                hidden(1.0), nets, data, UNIT, realisable=True, **options | more
            )


def test_a_sweep_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    net = hidden(1.0)
    files = {}
    for step, scale in ((10, 0.5), (20, 1.0), (30, 2.0)):
        files[step] = tmp_path / f"{step}.safetensors"
        save_file(hidden(scale).state_dict(), files[step])

    def run(folder):
        return learning_coefficient_sweep(
            net, files, DATA, UNIT, realisable=True, checkpoint=folder, num_warmup=50, **SHORT
        )

    whole = run(tmp_path / "whole")
    run_once, calls = Walk.run, []

    def interrupted(self, name, **options):
        calls.append(name)
        if calls.count("spaced") == 2:
            raise KeyboardInterrupt
        return run_once(self, name, **options)

    monkeypatch.setattr(Walk, "run", interrupted)
    part = run(tmp_path / "part")
    assert part.labels == (10,)
    assert part.missing == (20, 30)
    assert "interrupted before: 20, 30" in repr(part)
    monkeypatch.setattr(Walk, "run", run_once)
    monkeypatch.setattr(module, "calibrate", None)  # kept, not done again
    after = run(tmp_path / "part")
    monkeypatch.setattr(module, "walk_through", None)  # all is read back
    again = run(tmp_path / "part")
    for label in (10, 20, 30):
        same(whole[label], after[label])
        same(whole[label], again[label])
    assert not list(tmp_path.glob("part/*/running"))


def test_a_run_that_was_interrupted_halfway_goes_on(tmp_path, monkeypatch):
    """Ctrl-C in a step of the sampler, of which the runner returns the draws until then."""
    nets = {1: hidden(1.0), 2: hidden(2.0)}
    options = FIXED | {"realisable": True}
    whole = learning_coefficient_sweep(hidden(1.0), nets, DATA, UNIT, **options)
    step, calls = SGLD.step, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 400:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(SGLD, "step", interrupted)
    options["checkpoint"] = tmp_path
    part = learning_coefficient_sweep(hidden(1.0), nets, DATA, UNIT, **options)
    assert part.labels == (1,)
    again = learning_coefficient_sweep(hidden(1.0), nets, DATA, UNIT, **options)
    for label in nets:
        same(whole[label], again[label])


def test_interrupted_before_anything_was_done(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Walk, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learning_coefficient_sweep(hidden(1.0), {1: hidden(1.0)}, DATA, UNIT, **FIXED)


def test_half_a_run_is_not_taken_for_a_whole_one(monkeypatch):
    """Ctrl-C while sampling: the runner returns the draws until then."""
    sample = walking.sample
    monkeypatch.setattr(
        walking, "sample", lambda *a, **k: sample(*a, **k | {"num_draws": k["num_draws"] - 1})
    )
    with pytest.raises(KeyboardInterrupt):
        learning_coefficient_sweep(hidden(1.0), {1: hidden(1.0)}, DATA, UNIT, **FIXED)


def test_checkpoints_are_added_at_the_end(tmp_path):
    nets = {1: hidden(1.0), 2: hidden(1.2)}
    options = FIXED | {"realisable": True, "checkpoint": tmp_path}
    first = learning_coefficient_sweep(hidden(1.0), nets, DATA, UNIT, **options)
    nets[3] = hidden(0.8)
    more = learning_coefficient_sweep(hidden(1.0), nets, DATA, UNIT, **options)
    same(first[2], more[2])
    assert more.labels == (1, 2, 3)
    with pytest.raises(WeightsError, match="of another computation: label was 1 and is 3"):
        learning_coefficient_sweep(hidden(1.0), {3: nets[3]}, DATA, UNIT, **options)


def test_restricted_to_weights_and_to_data():
    nets = {1: hidden(1.0), 2: hidden(2.0)}

    def run(**more):
        data = more.pop("data", DATA)
        return learning_coefficient_sweep(
            hidden(1.0), nets, data, UNIT, realisable=True, **FIXED | more
        )

    last = run(subset="2.*", num_draws=300)
    assert {one.num_parameters for _, one in last} == {1}
    with torch.no_grad():
        curvature = torch.tanh(X @ nets[1][0].weight.T).square().mean(0)
    for _, one in last:
        truth = quadratic(curvature, one.nbeta, one.localization)
        assert abs(float(one) - truth) < 4 * float(one.standard_error)
    part = run(data=(X[:15], X[:15, :1]))
    assert {one.num_examples for _, one in part} == {15}
    assert part[1].nbeta == pytest.approx(15 / math.log(15))


LEARNING = {"num_chains": 2, "num_draws": 16, "num_warmup": 20, "progress": False}


def test_samplers_that_learn_their_step_share_a_spring(tmp_path, monkeypatch):
    nets = [("flat", hidden(0.1)), ("sharp", hidden(3.0))]
    options = LEARNING | {"realisable": True, "sampler": "mala", "checkpoint": tmp_path}
    found = learning_coefficient_sweep(hidden(1.0), nets, DATA, UNIT, **options)
    assert math.isnan(found.step_size)
    assert found.to_dict()["step_size"] is None
    alone = learning_coefficient_sweep(
        hidden(1.0), nets[:1], DATA, UNIT, **options | {"checkpoint": None}
    )
    (shared,) = {one.localization for _, one in found}
    assert shared > 5 * alone["flat"].localization
    monkeypatch.setattr(module, "settling", None)  # it is read back
    again = learning_coefficient_sweep(hidden(1.0), nets, DATA, UNIT, **options)
    same(found["sharp"], again["sharp"])


def test_a_spring_that_is_given_needs_no_calibration(monkeypatch):
    monkeypatch.setattr(module, "settling", None)
    nets = {"a": hidden(1.0), "b": hidden(2.0)}
    options = LEARNING | {"sampler": "hmc", "localization": 3.0}
    found = learning_coefficient_sweep(hidden(1.0), nets, DATA, UNIT, realisable=True, **options)
    assert {one.localization for _, one in found} == {3.0}


def test_checkpoints_that_cannot_be_swept():
    data, net = DATA, hidden(1.0)
    with pytest.raises(OptionError, match="there are none"):
        learning_coefficient_sweep(net, {}, data, UNIT)
    with pytest.raises(OptionError, match="'1' is there twice"):
        learning_coefficient_sweep(net, [(1, net), ("1", net)], data, UNIT)
    with pytest.raises(WeightsError, match=r"checkpoint 2, 0\.weight: it is missing"):
        learning_coefficient_sweep(net, {1: net, 2: {}}, data, UNIT)
    with pytest.raises(OptionError, match="checkpoint 1, subset"):
        learning_coefficient_sweep(net, {1: net}, data, UNIT, subset="nothing.*")
    with pytest.raises(SamplingError, match="checkpoint 1, learning_coefficient"):
        learning_coefficient_sweep(net, {1: net}, data, UNIT, **FIXED | {"step_size": 1e9})


@pytest.mark.wrong_types
def test_a_function_has_no_state_dict():
    model = pf.FunctionalModel(lambda p, x: x @ p["w"], {"w": torch.ones(2, 1, dtype=F64)})
    with pytest.raises(NetworkError, match="got FunctionalModel"):
        learning_coefficient_sweep(model, {1: {}}, DATA, UNIT)
    with pytest.raises(OptionError, match="not all are pairs"):
        learning_coefficient_sweep(hidden(1.0), [1, 2], DATA, UNIT)


def test_estimates_are_stored_bit_for_bit(sweep):
    for _, found in sweep:
        tensors, plain = parts_of(found)
        back = coefficient_from(tensors, json.loads(json.dumps(plain)))
        same(found, back)
        assert repr(back) == repr(found)
        assert back.checks == found.checks
    with pytest.raises(WeightsError, match="only one side knows: colour"):
        coefficient_from(tensors, plain | {"colour": 1})
