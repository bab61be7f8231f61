"""Sequences of tasks: what is learned, what is kept, and runs that go on where they were."""

import json
from functools import partial, wraps

import pytest
import torch
from torch import nn
from torch.nn import functional

from pushforward.errors import (
    DataError,
    NetworkError,
    OptionError,
    PushforwardError,
    ShapeError,
    WeightsError,
)
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.continual import learn_tasks
from pushforward.function_space.summarize import summarize
from pushforward.function_space.tasks import Task
from scenarios import fill, normal


def make_network(dropout=0.0):
    layers = [nn.Linear(4, 12), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, 3)]
    return fill(nn.Sequential(*layers, nn.ReLU(), nn.Linear(3, 4)), 2, 1.0, 0.1).train()


def make_tasks(count=3, examples=48, heads=None):
    """Which of two inputs is larger, for other inputs in each task."""
    tasks = []
    for number in range(count):
        head = None if heads is None else heads[number]
        parts = []
        for part in range(2):
            x = normal(50 + 10 * number + part, examples, 4)
            label = (x[:, number] > x[:, number + 1]).long()
            parts.append((x, label if head is None else torch.tensor(head)[label]))
        tasks.append(Task(*parts, outputs=head, name=f"pair {number}"))
    return tasks


def exact(net, task):
    return ExactDistance.of(net, task.train)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def learn(net, tasks, **options):
    settings = {"summarise": exact, "scale": 1.0, "epochs": 3, "batch_size": 16, "seed": 7}
    return learn_tasks(net, tasks, progress=False, **(settings | options))


def same(one, other):
    """Everything but the times."""
    for name in ("accuracy", "losses", "penalties"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True
        )
    return one.names == other.names and one.num_bytes == other.num_bytes


def test_without_penalty_it_is_plain_training():
    tasks, net = make_tasks(2), make_network()
    found = learn(net, tasks, summarise=None, optimiser=sgd)
    by_hand = make_network()
    optimiser = sgd(by_hand.parameters())
    # The order of the examples is the learner's own; a batch of all has none.
    whole = learn(make_network(), tasks, summarise=None, optimiser=sgd, batch_size=48)
    losses = []
    for task in tasks:
        for _ in range(3):
            optimiser.zero_grad()
            loss = functional.cross_entropy(by_hand(task.train[0]), task.train[1])
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    torch.testing.assert_close(whole.losses.flatten().tolist(), losses)
    assert whole.penalties.eq(0).all()
    accuracy = [
        (by_hand(task.test[0]).argmax(1) == task.test[1]).double().mean().item() for task in tasks
    ]
    assert whole.final.tolist() == accuracy
    assert not torch.equal(found.losses, whole.losses)
    assert found.num_bytes == (0, 0)


def test_the_penalty_is_over_all_tasks_before():
    tasks, states = make_tasks(3), []

    def summarise(net, task):
        assert not net.training
        states.append(({n: p.detach().clone() for n, p in net.named_parameters()}, task))
        return exact(net, task)

    net = make_network()
    found = learn(
        net, tasks, summarise=summarise, scale=2.0, epochs=1, batch_size=48, optimiser=sgd
    )
    assert [task for _, task in states] == tasks[:2]
    assert net.training
    # One step a task: each penalty is taken at the weights at which the task before ended.
    assert found.penalties[:2, 0].tolist() == [0.0, 0.0]
    last, first = states[1][0], states[0][0]
    rows = [torch.func.functional_call(net, w, tasks[0].train[0]) for w in (first, last)]
    expected = 2.0 * (rows[1] - rows[0]).square().sum(1).mean() / 2 / 2
    torch.testing.assert_close(found.penalties[2, 0], expected.detach())
    assert found.num_bytes == (48 * 4 * 8, 48 * 4 * 8, 0)


def test_a_penalty_keeps_what_was_learned():
    tasks = make_tasks(2, examples=100)
    options = {"epochs": 10, "optimiser": partial(torch.optim.Adam, lr=0.01)}
    naive = learn(make_network(), tasks, summarise=None, **options)
    kept = learn(make_network(), tasks, scale=10.0, **options)
    summaries = learn(
        make_network(),
        tasks,
        summarise=lambda net, task: summarize(net, task.train, progress=False),
        scale=10.0,
        distance_options={"estimator": "gated"},
        **options,
    )
    assert naive.backward_transfer < kept.backward_transfer - 0.05
    assert naive.backward_transfer < summaries.backward_transfer - 0.05
    assert kept.accuracy[0, 0] > 0.8


def test_heads_are_trained_and_tested_alone():
    heads = [[0, 1], [3, 2]]
    tasks, net = make_tasks(2, heads=heads), make_network()
    untouched = net[-1].weight[3].clone(), net[-1].weight[2].clone()
    learn(net, tasks[:1], epochs=2)
    assert torch.equal(net[-1].weight[3], untouched[0])
    assert torch.equal(net[-1].weight[2], untouched[1])
    found = learn(make_network(), tasks, epochs=30, optimiser=partial(torch.optim.Adam, lr=0.01))
    assert found.accuracy[1, 1] > 0.8
    # The same by a mask and by a slice, in the order of the outputs.
    by_slice = make_tasks(1, heads=[[0, 1]])[0]
    masked = Task(by_slice.train, by_slice.test, torch.tensor([True, True, False, False]), "pair 0")
    sliced = Task(by_slice.train, by_slice.test, slice(0, 2), "pair 0")
    runs = [learn(make_network(), [task]) for task in (by_slice, masked, sliced)]
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_seeds_decide_and_the_global_generator_is_left_alone():
    tasks = make_tasks(2)
    nets = [make_network(0.4) for _ in range(3)]
    before = torch.get_rng_state()
    runs = [learn(net, tasks, seed=seed) for net, seed in zip(nets, (1, 1, 2), strict=True)]
    assert torch.equal(torch.get_rng_state(), before)
    assert same(runs[0], runs[1])
    assert not torch.equal(runs[0].losses, runs[2].losses)


def test_other_losses_and_scores():
    x = normal(90, 40, 4)
    tasks = [Task((x, x[:, :2] * sign), (x, x[:, :2]), slice(0, 2)) for sign in (1.0, -1.0)]

    def score(net, task):
        assert not net.training
        return -functional.mse_loss(net(task.test[0])[:, :2], task.test[1]).item()

    found = learn(
        make_network(), tasks, loss=functional.mse_loss, evaluate=score, epochs=40, summarise=None
    )
    assert found.names == ("task 1", "task 2")
    assert found.accuracy[0, 0] > -0.9
    assert found.accuracy[0, 1] < found.accuracy[0, 0] - 0.1


# --- what it says ---------------------------------------------------------------------------------


def test_the_result_says_what_was_kept():
    found = learn(make_network(), make_tasks(3), epochs=1)
    assert found.accuracy.isnan().tolist() == [
        [False, False, False],
        [True, False, False],
        [True, True, False],
    ]
    assert found.mean_accuracy == pytest.approx(found.accuracy[:, 2].mean().item())
    change = found.accuracy[:2, 2] - torch.stack([found.accuracy[0, 0], found.accuracy[1, 1]])
    assert found.backward_transfer == pytest.approx(change.mean().item())
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["accuracy"][1] == [None, *found.accuracy[1, 1:].tolist()]
    assert stored["names"] == ["pair 0", "pair 1", "pair 2"]
    assert min(stored["training_seconds"]) > 0
    assert "3 tasks one after the other" in repr(found)
    assert repr(found).count("when learned") == 3


def test_a_single_task_has_nothing_to_forget():
    assert learn(make_network(), make_tasks(1), epochs=1).backward_transfer == 0


def test_the_plot_has_a_line_for_each_task():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    figure = learn(make_network(), make_tasks(3), epochs=1).plot()
    lines = figure.axes[0].get_lines()
    assert [len(line.get_xdata()) for line in lines] == [3, 2, 1, 3]
    pyplot.close(figure)


# --- interruptions --------------------------------------------------------------------------------


class InterruptedError_(Exception):
    """Stands for whatever ends a process."""


def stopping(loss, after):
    """A loss that ends the run at its call number `after`."""
    calls = iter(range(10**6))

    @wraps(loss)  # a checkpoint knows a loss by its name
    def counted(outputs, targets):
        if next(calls) == after:
            raise InterruptedError_
        return loss(outputs, targets)

    return counted


@pytest.mark.parametrize("optimiser", [sgd, partial(torch.optim.Adam, lr=0.01)])
@pytest.mark.parametrize("after", [0, 4, 9, 13, 22])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, after, optimiser):
    tasks = make_tasks(3)
    options = {"optimiser": optimiser, "tasks_per_step": 1, "metric": "softmax"}
    whole, net = make_network(0.3), make_network(0.3)
    expected = learn(whole, tasks, **options)
    with pytest.raises(InterruptedError_):
        learn(
            net,
            tasks,
            checkpoint=tmp_path,
            loss=stopping(functional.cross_entropy, after),
            **options,
        )
    resumed = make_network(0.3)
    found = learn(resumed, tasks, checkpoint=tmp_path, **options)
    assert same(found, expected)
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("after", [0, 1])
def test_a_run_that_ends_while_it_summarises(tmp_path, after):
    tasks, count = make_tasks(3), iter(range(100))

    def failing(net, task):
        if next(count) == after:
            raise InterruptedError_
        return exact(net, task)

    with pytest.raises(InterruptedError_):
        learn(make_network(), tasks, checkpoint=tmp_path, summarise=failing)
    found = learn(make_network(), tasks, checkpoint=tmp_path)
    assert same(found, learn(make_network(), tasks))


def test_a_finished_run_is_not_run_again(tmp_path):
    tasks = make_tasks(2)
    first = learn(make_network(), tasks, checkpoint=tmp_path)
    net = make_network()
    again = learn(net, tasks, checkpoint=tmp_path, loss=stopping(functional.cross_entropy, 0))
    assert same(first, again)
    assert first.training_seconds == again.training_seconds


def test_batchnorm_statistics_are_part_of_the_state(tmp_path):
    def network():
        layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)
        return fill(nn.Sequential(*layers), 1).train()

    tasks = make_tasks(2)
    expected = learn(network(), tasks)
    with pytest.raises(InterruptedError_):
        learn(network(), tasks, checkpoint=tmp_path, loss=stopping(functional.cross_entropy, 14))
    assert same(learn(network(), tasks, checkpoint=tmp_path), expected)


def test_a_state_of_something_else_is_refused(tmp_path):
    tasks = make_tasks(2)
    net = make_network()
    learn(net, tasks, checkpoint=tmp_path)
    others = [{"scale": 2.0}, {"seed": 8}, {"optimiser": sgd}, {"batch_size": 8}]
    others += [{"loss": lambda outputs, targets: 2 * functional.cross_entropy(outputs, targets)}]
    for options in others:
        with pytest.raises(WeightsError, match="another computation"):
            learn(make_network(), tasks, checkpoint=tmp_path, **options)
    with pytest.raises(WeightsError, match="net was"):
        learn(net, tasks, checkpoint=tmp_path)  # trained weights are not where it began
    with pytest.raises(WeightsError, match="tasks"):
        learn(make_network(), tasks[::-1], checkpoint=tmp_path)


def test_a_loss_is_known_by_its_name_and_options(tmp_path):
    tasks = make_tasks(1)

    class Scaled:
        def __call__(self, outputs, targets):
            return 2 * functional.cross_entropy(outputs, targets)

    losses = [
        nn.CrossEntropyLoss,
        lambda: partial(functional.cross_entropy, label_smoothing=0.1),
        lambda: partial(functional.cross_entropy, label_smoothing=0.2),
        lambda: partial(Scaled()),  # its address differs each time
    ]
    for number, make in enumerate(losses):
        folder = tmp_path / str(number)
        first = learn(make_network(), tasks, checkpoint=folder, loss=make())
        assert same(first, learn(make_network(), tasks, checkpoint=folder, loss=make()))
        with pytest.raises(WeightsError, match="loss was"):
            learn(make_network(), tasks, checkpoint=folder, loss=losses[number - 1]())


def test_another_summary_is_noticed(tmp_path):
    tasks = make_tasks(2)
    learn(make_network(), tasks, checkpoint=tmp_path)
    for other in (lambda net, task: ExactDistance.of(net, task.test),):
        with pytest.raises(WeightsError, match="measure of pair 0 again"):
            learn(make_network(), tasks, checkpoint=tmp_path, summarise=other)


def test_missing_weights_of_a_past_task_are_noticed(tmp_path):
    tasks = make_tasks(2)
    learn(make_network(), tasks, checkpoint=tmp_path)
    (tmp_path / "task-1" / "state.safetensors").unlink()
    with pytest.raises(WeightsError, match="after task 1 are missing"):
        learn(make_network(), tasks, checkpoint=tmp_path)


# --- refusals -------------------------------------------------------------------------------------


def test_bad_input():
    tasks, net = make_tasks(2), make_network()
    with pytest.raises(OptionError, match="none"):
        learn(net, [])
    for name in ("epochs", "batch_size"):
        with pytest.raises(OptionError) as caught:
            learn(net, tasks, **{name: 0})
        assert caught.value.where == name
    x, y = tasks[0].train
    with pytest.raises(ShapeError, match="outputs"):
        learn(net, [Task((x, y), (x, y), [7])])
    with pytest.raises(DataError, match="label outside of the outputs"):
        learn(net, [Task((x, y), (x, y), [1, 2])])
    with pytest.raises(DataError, match="inputs are dict"):
        learn(net, [Task(({"a": x}, y), (x, y))])
    with pytest.raises(DataError, match=r"training data of task 1"):
        learn(net, [Task((x[:0], y[:0]), (x, y))])
    with pytest.raises(PushforwardError, match="measures no distance"):
        learn(net, tasks, summarise=lambda net, _: net)
    with pytest.raises(NetworkError, match="loss is nan") as caught:
        learn(net, tasks, loss=lambda outputs, _: outputs.sum() * torch.nan)
    assert caught.value.where == "pair 0, epoch 1"


@pytest.mark.wrong_types
@pytest.mark.parametrize("value", [1.5, "many", True])
@pytest.mark.parametrize("name", ["epochs", "batch_size"])
def test_counts_are_whole_numbers(name, value):
    with pytest.raises(OptionError, match="positive whole number") as caught:
        learn(make_network(), make_tasks(1), **{name: value})
    assert caught.value.where == name


def one_logit():
    return fill(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)), 1, 1.0, 0.1)


def refused(net, targets, **options):
    """What `learn_tasks` says about targets, and that it has not trained."""
    x = normal(90, 40, 4)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(DataError) as caught:
        learn(net, [Task((x, targets(x)), (x, targets(x)))], **options)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    return caught.value


def sign(x):
    return x[:, :1] > 0


@pytest.mark.parametrize(
    ("make", "targets", "loss"),
    [
        (one_logit, lambda x: sign(x).to(x), functional.binary_cross_entropy_with_logits),
        (one_logit, lambda x: x[:, :1], functional.mse_loss),
        (make_network, lambda x: x, functional.mse_loss),
        (make_network, lambda x: sign(x)[:, 0], functional.mse_loss),
        (make_network, lambda x: sign(x).long(), functional.cross_entropy),
    ],
)
def test_without_classes_there_is_no_default_accuracy(make, targets, loss):
    error = refused(make(), targets, loss=loss)
    assert error.where == "test data of task 1"
    assert "are no labels" in str(error)
    assert "Give evaluate=" in error.advice


def test_the_default_accuracy_needs_two_outputs():
    def labels(x):
        return sign(x)[:, 0].long()

    error = refused(one_logit(), labels)
    assert "outputs of shape (1,) for each example are no classes" in str(error)
    error = refused(nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))).double(), labels)
    assert "outputs of shape (2, 3)" in str(error)
    x = normal(90, 40, 4)
    data = x, 0 * labels(x)
    with pytest.raises(DataError, match=r"shape \(1,\) for each example") as caught:
        learn(make_network(), [Task(data, data, outputs=[0])])
    assert "evaluate=" in caught.value.advice


def test_a_single_logit_learns_with_a_score_of_its_own():
    x = normal(90, 60, 4)
    data = x, sign(x).to(x)

    def score(net, task):
        return ((net(task.test[0]) > 0) == (task.test[1] > 0)).double().mean().item()

    loss = functional.binary_cross_entropy_with_logits
    optimiser = partial(torch.optim.Adam, lr=0.02)
    tasks = [Task(data, data)]
    net = one_logit()
    found = learn(net, tasks, loss=loss, evaluate=score, epochs=20, optimiser=optimiser)
    assert found.final.item() == score(net, tasks[0]) > 0.9


def test_targets_that_the_loss_does_not_take():
    error = refused(make_network(), lambda x: sign(x).long(), evaluate=lambda *_: 0.0)
    assert error.where == "training data of task 1"
    assert "targets of type torch.int64 and shape (16, 1)" in str(error)
    error = refused(make_network(), lambda x: sign(x)[:, 0].long() + 4, evaluate=lambda *_: 0.0)
    assert error.where == "training data of task 1"
    assert "below the number of outputs" in error.advice


@pytest.mark.parametrize("outputs", [None, [0, 1]])
@pytest.mark.parametrize("label", [-1, 4, 7])
def test_a_test_label_outside_of_the_outputs_is_no_wrong_answer(label, outputs):
    x = normal(90, 40, 4)
    labels = sign(x)[:, 0].long()
    wrong = labels.clone()
    wrong[3] = label
    net, called = make_network(), []

    def loss(*given):
        called.append(given)
        return functional.cross_entropy(*given)

    with pytest.raises(DataError, match="example 3 has a label outside") as caught:
        learn(net, [Task((x, labels), (x, wrong), outputs)], loss=loss)
    assert not called  # before anything was trained
    assert caught.value.where == "test data of task 1"
    assert "below the number of outputs, 4" in caught.value.advice
    # With a score of one's own any targets will do.
    learn(net, [Task((x, labels), (x, wrong), outputs)], evaluate=lambda *_: 0.5, epochs=1)


def test_labels_that_cross_entropy_leaves_out_may_be_trained_on():
    x = normal(90, 40, 4)
    labels = sign(x)[:, 0].long()
    some = torch.where(torch.arange(40) % 4 == 0, -100, labels)
    assert learn(make_network(), [Task((x, some), (x, labels))]).losses.isfinite().all()
    whole = Task((x, torch.full_like(labels, -100)), (x, labels))
    with pytest.raises(DataError, match="labels of a whole batch of 16 are below 0") as caught:
        learn(make_network(), [whole])
    assert caught.value.where == "training data of task 1"
    assert "examples without a label" in caught.value.advice


@pytest.mark.parametrize("part", ["training", "test"])
@pytest.mark.parametrize("change", [torch.Tensor.float, lambda x: x[:, :3]])
def test_inputs_that_the_network_does_not_take(change, part):
    x = normal(90, 40, 4)
    data = x, sign(x)[:, 0].long()
    other = change(x), data[1]
    task = Task(other, data) if part == "training" else Task(data, other)
    with pytest.raises(DataError, match="the network does not take an input of type") as caught:
        learn(make_network(), [task])
    assert caught.value.where == f"{part} data of task 1"
    assert f"type {other[0].dtype} and shape {(1, *other[0].shape[1:])}" in str(caught.value)
    assert "torch.float64" in caught.value.advice


@pytest.mark.wrong_types
def test_what_is_no_network_or_has_nothing_to_train():
    for net in (None, make_network().state_dict()):
        with pytest.raises(NetworkError, match=f"got {type(net).__name__}") as caught:
            learn(net, make_tasks(1))
        assert caught.value.where == "net"
    for net in (make_network().requires_grad_(False), nn.Sequential(nn.ReLU())):
        with pytest.raises(NetworkError, match="none of its parameters is trained") as caught:
            learn(net, make_tasks(1))
        assert caught.value.where == "net"

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_network()

        def forward(self, x):
            return self.inner(x), x

    with pytest.raises(NetworkError, match="it returns tuple"):
        learn(Pair(), make_tasks(1))


@pytest.mark.wrong_types
def test_what_are_no_tasks():
    x, y = make_tasks(1)[0].train
    for tasks, said in (
        ([(x, y)], "number 0 is tuple"),
        ([make_tasks(1)[0], None], "number 1 is NoneType"),
        (make_tasks(1)[0], "got Task"),
        (iter(make_tasks(1)), "iterator"),
    ):
        with pytest.raises(OptionError, match=said) as caught:
            learn(make_network(), tasks)
        assert caught.value.where == "tasks"
        assert "Task(train, test)" in caught.value.advice


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"metric": "kl"}, "metric="),
        ({"scale": 2.0}, "scale="),
        ({"seed": 1}, "seed="),
        ({"outputs": [0]}, r"Task\(\.\.\., outputs=\)"),
        ("gaussian", "options by name"),
        ({1: 2}, "options by name"),
    ],
)
def test_options_of_distances_are_those_of_distances_alone(options, advice):
    with pytest.raises(OptionError, match=advice) as caught:
        learn(make_network(), make_tasks(1), distance_options=options)
    assert caught.value.where == "distance_options"


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (partial(functional.cross_entropy, reduction="none"), "a tensor of shape (16,)"),
        (lambda outputs, _: outputs.mean().item(), "float"),
        (lambda *_: None, "NoneType"),
        (lambda outputs, _: outputs.mean().detach(), "a number that does not depend"),
    ],
)
def test_a_loss_is_one_number_with_a_gradient(loss, said):
    net = make_network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(OptionError) as caught:
        learn(net, make_tasks(1), loss=loss)
    assert caught.value.where == "loss"
    assert said in str(caught.value)
    assert 'reduction="mean"' in caught.value.advice
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("value", [None, "well", torch.ones(2)])
def test_a_score_is_one_number(value):
    with pytest.raises(OptionError, match="it returned") as caught:
        learn(make_network(), make_tasks(1), evaluate=lambda *_: value)
    assert caught.value.where == "evaluate"


@pytest.mark.parametrize(
    "wrap",
    [
        partial(torch.compile, backend="eager"),
        nn.DataParallel,
        lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
    ],
)
def test_a_network_in_wrappers_is_trained_and_summarised(wrap, tmp_path):
    def summarise(net, task):
        assert type(net) is nn.Sequential
        return summarize(net, task.train, progress=False)

    tasks = make_tasks(2)
    bare, inside = make_network(0.3), make_network(0.3)
    expected = learn(bare, tasks, summarise=summarise, checkpoint=tmp_path)
    wrapped = wrap(inside)
    assert same(learn(wrapped, tasks, summarise=summarise), expected)
    assert wrapped.training
    for one, other in zip(inside.parameters(), bare.parameters(), strict=True):
        assert torch.equal(one, other)
    # The state of the one is that of the other.
    again = learn(wrap(make_network(0.3)), tasks, summarise=summarise, checkpoint=tmp_path)
    assert same(again, expected)
