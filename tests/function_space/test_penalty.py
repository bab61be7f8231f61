"""The penalty is the mean of its distances, in any training loop, and refuses what is none."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from pushforward.errors import NetworkError, OptionError, PushforwardError, WeightsError
from pushforward.function_space.baselines.diagonal import DiagonalDistance
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.baselines.subset import SubsetDistance
from pushforward.function_space.penalty import FunctionSpacePenalty
from pushforward.function_space.summarize import summarize
from scenarios import fill, normal


def network(seed=0, hidden=6, outputs=4, **options):
    net = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    return fill(net, seed, 2.0, 0.3, **options)


def moved(net, seed, by=0.3):
    other = copy.deepcopy(net)
    with torch.no_grad():
        for number, parameter in enumerate(other.parameters()):
            parameter += by * normal(100 * seed + number, *parameter.shape)
    return other


@pytest.fixture
def past():
    """Three earlier networks and their data."""
    return [(network(seed), normal(10 + seed, 20, 3)) for seed in range(3)]


def test_it_is_the_weighted_mean_of_the_distances(past):
    penalty = FunctionSpacePenalty(scale=2.5, metric="softmax")
    heads = [None, slice(0, 2), [1, 3]]
    weights = [1.0, 2.0, 3.0]
    for (net, x), outputs, weight in zip(past, heads, weights, strict=True):
        penalty.add(ExactDistance.of(net, x), outputs=outputs, weight=weight)
    net = network(9)
    expected = 0.0
    for (old, x), outputs, weight in zip(past, heads, weights, strict=True):
        rows = [model(x) if outputs is None else model(x)[:, outputs] for model in (old, net)]
        gap = rows[0].softmax(1) - rows[1].softmax(1)
        expected += 2.5 * weight / 6 * gap.square().sum(1).mean() / 2
    torch.testing.assert_close(penalty(net), expected)
    found = torch.autograd.grad(penalty(net), list(net.parameters()))
    for one, other in zip(
        found, torch.autograd.grad(expected, list(net.parameters())), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert len(penalty) == len(penalty.past) == 3
    assert penalty.num_bytes == 3 * 20 * 3 * 8
    assert repr(penalty) == "FunctionSpacePenalty(scale=2.5, metric='softmax'; 3 past tasks)"


def test_without_a_past_it_is_zero_and_training_goes_on():
    net, penalty = network(), FunctionSpacePenalty()
    value = penalty(net)
    assert value.item() == 0
    assert value.dtype == torch.float64
    value.backward()  # of the penalty alone
    loss = net(normal(1, 5, 3)).square().mean()
    expected = torch.autograd.grad(loss, net[0].weight, retain_graph=True)[0]
    (loss + penalty(net)).backward()
    torch.testing.assert_close(net[0].weight.grad, expected, rtol=0, atol=0)
    assert list(penalty.parameters()) == []
    assert penalty


def test_at_the_weights_of_a_past_task_there_is_no_force(past):
    net, x = past[0]
    penalty = FunctionSpacePenalty()
    penalty.add(ExactDistance.of(net, x))
    value = penalty(net)
    value.backward()
    assert value.item() == 0
    for parameter in net.parameters():
        assert (parameter.grad == 0).all()


@pytest.mark.parametrize("estimator", ["gated", "reference", "sampled", "synthetic"])
def test_a_summary_is_a_measure(past, estimator):
    net, x = past[0]
    summary = summarize(net, x)
    penalty = FunctionSpacePenalty(estimator=estimator, metric="euclidean", scale=3.0)
    penalty.add(summary, outputs=[0, 2])
    other = moved(net, 5)
    value = penalty(other)
    expected = 3 * summary.distance(other, estimator=estimator, outputs=[0, 2])
    torch.testing.assert_close(value, expected)
    assert value.item() > 0
    value.backward()
    assert other[0].weight.grad.abs().sum() > 0
    assert net[0].weight.grad is None


def test_dropout_and_batchnorm_of_a_network_in_training_do_not_count():
    net = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2)
    )
    net = fill(net, 3, 2.0, 0.3).train()
    penalty = FunctionSpacePenalty()
    penalty.add(SubsetDistance.of(net, normal(4, 30, 3), 10, seed=0))
    assert penalty(net).item() == 0
    assert net.training
    other = moved(net, 6)
    assert penalty(other).item() == penalty(other).item() > 0
    assert other[1].num_batches_tracked == 0


def test_frozen_parameters_stay_out_of_it(past):
    net, x = past[0]
    penalty = FunctionSpacePenalty()
    penalty.add(ExactDistance.of(net, x))
    other = moved(net, 7)
    other[0].requires_grad_(False)
    penalty(other).backward()
    assert other[0].weight.grad is None
    assert other[2].weight.grad.abs().sum() > 0


def test_wrapped_networks_are_looked_through(past):
    net, x = past[0]
    penalty = FunctionSpacePenalty()
    penalty.add(ExactDistance.of(net, x))
    other = moved(net, 8)
    assert penalty(nn.DataParallel(other)).item() == penalty(other).item()
    # As they are where a past task is measured.
    compiled = torch.compile(net, backend="eager")
    for wrapped in (compiled, nn.DataParallel(net)):
        among = FunctionSpacePenalty()
        among.add(summarize(wrapped, x))
        assert among(wrapped).item() == 0
        assert among(other).item() == among(torch.compile(other, backend="eager")).item() > 0


def test_training_with_it_forgets_less():
    x, later = normal(20, 60, 3), normal(21, 60, 3)
    net = network(11)
    reference = copy.deepcopy(net)
    changes = {}
    for scale in (0.0, 30.0):
        learner = copy.deepcopy(net)
        penalty = FunctionSpacePenalty(scale=scale, estimator="gated")
        penalty.add(summarize(net, x))
        optimiser = torch.optim.Adam(learner.parameters(), lr=0.02)
        targets = (later[:, 0] > 0).long()
        for _ in range(60):
            optimiser.zero_grad()
            (functional.cross_entropy(learner(later), targets) + penalty(learner)).backward()
            optimiser.step()
        changes[scale] = (learner(x) - reference(x)).square().mean().item()
    assert changes[30.0] < 0.1 * changes[0.0]


# --- choices of a step ----------------------------------------------------------------------------


def chosen_tasks(past, count, seed=0):
    penalty = FunctionSpacePenalty(tasks_per_step=count, seed=seed)
    for net, x in past:
        penalty.add(ExactDistance.of(net, x))
    return penalty


def test_drawn_tasks_have_the_mean_of_all(past):
    net = network(9)
    whole = chosen_tasks(past, None)(net).item()
    for count in (1, 2):
        penalty = chosen_tasks(past, count)
        # Each choice of tasks is equally likely, so its few values say what the mean is.
        values = {round(penalty(net).item(), 10) for _ in range(60)}
        assert len(values) == 3
        assert sum(values) / 3 == pytest.approx(whole)
    assert chosen_tasks(past, 5)(net).item() == pytest.approx(whole)


def test_evaluation_takes_all_tasks_and_uses_up_nothing(past):
    net = network(9)
    penalty = chosen_tasks(past, 1)
    state = penalty.state_dict()
    whole = chosen_tasks(past, None)(net)
    torch.testing.assert_close(penalty.eval()(net), whole)
    assert torch.equal(penalty.state_dict()["_extra_state"], state["_extra_state"])


def test_the_state_dict_resumes_the_choices(past):
    net = network(9)
    first = chosen_tasks(past, 1, seed=4)
    [first(net) for _ in range(7)]
    second = chosen_tasks(past, 1, seed=5)
    second.load_state_dict(first.state_dict())
    values = [first(net).item() for _ in range(12)]
    assert values == [second(net).item() for _ in range(12)]
    assert len(set(values)) == 3


def test_draws_are_made_anew_only_on_request(past):
    net, x = past[0]
    summary, other = summarize(net, x), moved(net, 9)
    for resample in (False, True):
        penalty = FunctionSpacePenalty(
            estimator="sampled", num_samples=20, resample=resample, seed=1
        )
        penalty.add(summary)
        assert len({penalty(other).item() for _ in range(3)}) == (3 if resample else 1)


def test_the_seed_decides_the_tasks_and_the_draws(past):
    net, x = past[0]
    other, summary = moved(net, 9), summarize(net, x)

    def resampled(seed):
        penalty = FunctionSpacePenalty(
            estimator="sampled", num_samples=20, resample=True, seed=seed
        )
        penalty.add(summary)
        return penalty

    for make in (lambda seed: chosen_tasks(past, 1, seed), resampled):
        first, again, second = (
            [penalty(other).item() for _ in range(12)] for penalty in map(make, (1, 1, 2))
        )
        assert first == again
        assert first != second


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"scale": -1.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"tasks_per_step": 0}, "tasks_per_step"),
        ({"metric": "cosine"}, "metric"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range(options, where):
    with pytest.raises(OptionError) as caught:
        FunctionSpacePenalty(**options)
    assert caught.value.where == where


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    "options",
    [
        {"scale": "a"},
        {"scale": None},
        {"scale": True},
        {"tasks_per_step": 1.5},
        {"tasks_per_step": "a"},
        {"tasks_per_step": True},
    ],
)
def test_options_that_are_no_numbers(options):
    with pytest.raises(OptionError) as caught:
        FunctionSpacePenalty(**options)
    assert [caught.value.where] == list(options)


@pytest.mark.wrong_types
def test_a_weight_that_is_no_number(past):
    net, x = past[0]
    with pytest.raises(OptionError) as caught:
        FunctionSpacePenalty().add(ExactDistance.of(net, x), weight="a")
    assert caught.value.where == "weight"


@pytest.mark.wrong_types
def test_numbers_of_numpy_are_numbers():
    penalty = FunctionSpacePenalty(scale=np.float32(0.5), tasks_per_step=np.int64(2))
    assert (penalty.scale, penalty.tasks_per_step) == (0.5, 2)


def test_what_is_no_measure_is_refused(past):
    net, x = past[0]
    with pytest.raises(OptionError, match="Sequential measures no distance"):
        FunctionSpacePenalty().add(net)
    measure = ExactDistance.of(net, x)
    for weight in (0.0, -1.0, float("inf")):
        with pytest.raises(OptionError) as caught:
            FunctionSpacePenalty().add(measure, weight=weight)
        assert caught.value.where == "weight"
    with pytest.raises(OptionError, match="does not take estimator") as caught:
        FunctionSpacePenalty(estimator="gated").add(measure)
    assert "metric" in caught.value.advice
    with pytest.raises(OptionError, match="does not take seed") as caught:
        FunctionSpacePenalty(resample=True).add(measure)
    assert caught.value.where == "resample"


def test_what_a_measure_refuses_is_refused_when_it_is_added(past):
    net, x = past[0]
    penalty = FunctionSpacePenalty(metric="kl")
    with pytest.raises(PushforwardError):
        penalty.add(DiagonalDistance.of(net, x, metric="euclidean"))
    with pytest.raises(PushforwardError, match="9") as caught:
        penalty.add(ExactDistance.of(net, x), outputs=[9])
    assert caught.value.where == "outputs"
    assert len(penalty) == 0


def test_other_architectures_are_refused(past):
    net, x = past[0]
    penalty = FunctionSpacePenalty()
    penalty.add(ExactDistance.of(net, x))
    with pytest.raises(WeightsError, match="another architecture"):
        penalty.add(ExactDistance.of(network(hidden=7), x))
    with pytest.raises(WeightsError, match="shape"):
        penalty(network(hidden=7))


def test_other_modules_with_the_same_weights_are_refused(past):
    net, x = past[0]
    other = nn.Sequential(net[0], nn.Tanh(), net[2])
    for measure in (ExactDistance.of(net, x), summarize(net, x)):
        penalty = FunctionSpacePenalty()
        penalty.add(measure)
        with pytest.raises(WeightsError, match=r"'1' is Tanh\(.*reference ReLU\("):
            penalty(other)


@pytest.mark.wrong_types
def test_what_is_no_network_is_refused(past):
    net, x = past[0]
    penalty = FunctionSpacePenalty()
    for given in (None, net.state_dict()):
        with pytest.raises(NetworkError, match=r"^net: got"):
            penalty(given)
        penalty.add(ExactDistance.of(net, x))


def test_it_goes_from_process_to_process(past):
    penalty = FunctionSpacePenalty(scale=2.0, tasks_per_step=2, seed=3)
    for net, x in past:
        penalty.add(summarize(net, x), outputs=[0, 2])
    other = network(9)
    penalty(other)
    again = pickle.loads(pickle.dumps(penalty))
    assert [again(other).item() for _ in range(5)] == [penalty(other).item() for _ in range(5)]


@pytest.mark.parametrize("answer", [None, torch.zeros(2), torch.tensor(float("nan"))])
def test_a_measure_that_answers_with_no_number_is_refused(past, answer):
    class Odd:
        reference = ExactDistance.of(*past[0]).reference

        def distance(self, other, *, metric=None, outputs=None):  # noqa: ARG002
            return answer

    with pytest.raises(OptionError, match="distance of the reference from itself"):
        FunctionSpacePenalty().add(Odd())
