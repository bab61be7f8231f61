"""Interrupted anywhere and resumed, a run ends with the same numbers, bit for bit."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import pushforward as pf
from laplace_scenarios import PROBLEMS
from pushforward.errors import WeightsError
from pushforward.linearised_laplace import resumable
from pushforward.linearised_laplace.resumable import run
from pushforward.linearised_laplace.sampled import SampledState, SampledTask, step
from pushforward.runs.store import Checkpoint


class Interruption(KeyboardInterrupt):
    pass


def sampled(problem, checkpoint=None, **settings):
    defaults = {"num_draws": 6, "block": 4, "tolerance": 0.05, "seed": 3}
    return pf.laplace(
        problem.net, problem.data, problem.likelihood, method="sampled", checkpoint=checkpoint,
        **(defaults | settings),
    )  # fmt: skip


def interrupted_after(monkeypatch, pieces):
    """Make the run stop when so many pieces of work are done."""
    left = [pieces]

    def limited(task, state):
        if left[0] == 0:
            raise Interruption
        left[0] -= 1
        return step(task, state)

    monkeypatch.setattr(resumable, "step", limited)


def count_pieces(monkeypatch, problem, **settings):
    done = []

    def counted(task, state):
        done.append(state.phase)
        return step(task, state)

    with monkeypatch.context() as patch:
        patch.setattr(resumable, "step", counted)
        posterior = sampled(problem, **settings)
    return done, posterior


def assert_identical(found, expected):
    assert torch.equal(found.draws, expected.draws)
    assert found.prior_precision == expected.prior_precision
    assert found.noise_variance == expected.noise_variance
    assert found.rounds == expected.rounds
    assert torch.equal(found.effective_dimension.value, expected.effective_dimension.value)
    assert [check.name for check in found.checks] == [check.name for check in expected.checks]
    assert [check.status for check in found.checks] == [check.status for check in expected.checks]


SETTINGS = {
    "learned": (PROBLEMS["categorical"], {}),
    "g-prior": (PROBLEMS["categorical"], {"prior": "gprior"}),
    "layerwise with noise": (
        replace(PROBLEMS["gaussian"], likelihood=pf.Gaussian()),
        {"prior": "layerwise", "offset": "linear"},
    ),
    "given": (PROBLEMS["poisson"], {"prior_precision": 2.0}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_interrupted_anywhere_the_draws_are_the_same(name, tmp_path, monkeypatch):
    problem, settings = SETTINGS[name]
    phases, expected = count_pieces(monkeypatch, problem, **settings)
    assert len(phases) > 5
    for pieces in sorted({0, 1, 2, 3, len(phases) // 2, len(phases) - 2, len(phases) - 1}):
        folder = tmp_path / str(pieces)
        with monkeypatch.context() as patch:
            interrupted_after(patch, pieces)
            with pytest.raises(Interruption):
                sampled(problem, folder, **settings)
        rest, resumed = count_pieces(monkeypatch, problem, checkpoint=folder, **settings)
        assert rest == phases[pieces:]
        assert_identical(resumed, expected)


def test_interrupted_again_and_again(tmp_path, monkeypatch):
    problem, settings = SETTINGS["learned"]
    phases, expected = count_pieces(monkeypatch, problem, **settings)
    attempts = 0
    with monkeypatch.context() as patch:
        while True:
            interrupted_after(patch, 3)
            try:
                resumed = sampled(problem, tmp_path, **settings)
                break
            except Interruption:
                attempts += 1
    assert attempts == (len(phases) - 1) // 3
    assert_identical(resumed, expected)


def test_interrupted_within_a_pass(tmp_path):
    problem = PROBLEMS["categorical"]
    passed = [0]

    def advance(count):
        passed[0] += count
        if passed[0] > 700:
            raise Interruption

    def task(advance):
        return SampledTask(problem.linear(advance=advance), 6, 3, True, False, block=4)

    checkpoint = Checkpoint(tmp_path, {"name": "test"})
    with pytest.raises(Interruption):
        run(task(advance), problem.linear().prior, None, checkpoint)
    assert checkpoint.path.exists()
    expected = run(task(lambda _: None), problem.linear().prior, None, None)
    found = run(task(lambda _: None), problem.linear().prior, None, checkpoint)
    assert found.phase == "done"
    assert torch.equal(found.draws, expected.draws)


def test_a_finished_run_is_only_read(tmp_path, monkeypatch):
    problem, settings = SETTINGS["layerwise with noise"]
    expected = sampled(problem, tmp_path, **settings)
    interrupted_after(monkeypatch, 0)
    assert_identical(sampled(problem, tmp_path, **settings), expected)


def test_states_are_saved_now_and_then(tmp_path, monkeypatch):
    saved = []
    original = Checkpoint.save

    def recorded(self, tensors, state):
        saved.append(state["phase"])
        original(self, tensors, state)

    monkeypatch.setattr(Checkpoint, "save", recorded)
    monkeypatch.setattr(resumable, "_SAVE_EVERY", -1.0)
    phases, _ = count_pieces(monkeypatch, PROBLEMS["categorical"], checkpoint=tmp_path)
    assert len(saved) == len(phases) + 2  # at once, and at the end
    assert saved[-1] == "done"


def test_a_step_does_not_change_its_arguments():
    problem = PROBLEMS["categorical"]
    task = SampledTask(problem.linear(), 4, 3, True, False)
    state = SampledState("sketch", task.linear.prior)
    while state.phase != "done":
        before = {
            name: value.clone()
            for name, value in vars(state).items()
            if isinstance(value, torch.Tensor)
        }
        following, again = step(task, state), step(task, state)
        for name, value in before.items():
            assert torch.equal(getattr(state, name), value)
        if following.draws is not None:
            assert torch.equal(following.draws, again.draws)
        state = following


def changed_network(problem):
    net = deepcopy(problem.net)
    with torch.no_grad():
        net[2].bias[0] += 1e-9
    return replace(problem, net=net)


def changed_data(problem):
    x = problem.x.clone()
    x[0, 0] += 1e-9
    return replace(problem, x=x)


@pytest.mark.parametrize(
    ("key", "change", "settings"),
    [
        ("network", changed_network, {}),
        ("data", changed_data, {}),
        ("likelihood", lambda p: replace(p, likelihood=pf.Gaussian(0.2)), {}),
        ("prior", None, {"prior": "layerwise"}),
        ("prior.precision", None, {"prior_precision": 3.0}),
        ("learn", None, {"prior_precision": 1.0}),
        ("offset", None, {"offset": "linear"}),
        ("num_draws", None, {"num_draws": 7}),
        ("block", None, {"block": 3}),
        ("tolerance", None, {"tolerance": 0.1}),
        ("seed", None, {"seed": 4}),
        ("parameters", None, {"subset": "2"}),
    ],
)
def test_a_checkpoint_of_another_computation_is_refused(
    tmp_path, monkeypatch, key, change, settings
):
    problem = PROBLEMS["gaussian"]
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        with pytest.raises(Interruption):
            sampled(problem, tmp_path)
    other = problem if change is None else change(problem)
    with pytest.raises(WeightsError, match="of another computation") as caught:
        sampled(other, tmp_path, **settings)
    assert f"{key} was" in str(caught.value) or f"{key}." in str(caught.value)
    # What was refused is not overwritten.
    sampled(problem, tmp_path)
