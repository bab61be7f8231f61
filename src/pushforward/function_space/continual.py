"""``learn_tasks``: one network learns tasks one after the other, held near what it was before."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from pushforward.errors import (
    DataError,
    NetworkError,
    OptionError,
    PushforwardError,
    WeightsError,
)
from pushforward.function_space.measure import DistanceMeasure
from pushforward.function_space.metrics import Metric
from pushforward.function_space.network import unwrapped
from pushforward.function_space.penalty import FunctionSpacePenalty
from pushforward.function_space.task_sequence import TaskSequence
from pushforward.function_space.tasks import OpenTask, Task, evaluating
from pushforward.options import whole_number
from pushforward.runs.progress import track
from pushforward.runs.rng import derived_seed, stream
from pushforward.runs.store import Checkpoint, fingerprint

__all__ = ["Task", "learn_tasks"]

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Outputs of the task and its targets -> mean over the batch."""


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Adam with learning rate 0.001."""
    return torch.optim.Adam(parameters, lr=1e-3)


def learn_tasks(
    net: nn.Module,
    tasks: Sequence[Task],
    *,
    summarise: Callable[[nn.Module, Task], DistanceMeasure] | None,
    scale: float = 1.0,
    metric: Metric | None = None,
    tasks_per_step: int | None = None,
    resample: bool = False,
    distance_options: dict[str, Any] | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    optimiser: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = adam,
    loss: Loss = functional.cross_entropy,
    evaluate: Callable[[nn.Module, Task], float] | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> TaskSequence:
    """Train a network on one task after the other, penalised for leaving what it was.

    The loss on a batch of the present task plus a `FunctionSpacePenalty` over the tasks before it;
    after each task what `summarise` makes of it is kept, and its data are not needed any more. The
    optimiser goes on from task to task.

    Parameters
    ----------
    net
        Trained in place, in training mode. One in wrappers, of ``torch.compile`` or for several
        devices, is trained as it is; what is inside is summarised and kept.
    tasks
        In the order of learning.
    summarise
        ``(net, task) -> measure``, such as ``lambda net, task: pf.summarize(net, task.train)``;
        called when a task has been learned, with the network itself, without wrappers, in
        evaluation mode. None: no penalty.
    scale, metric, tasks_per_step, resample
        Of the penalty, see `FunctionSpacePenalty`.
    distance_options
        What else is passed to ``measure.distance``, such as ``{"estimator": "gaussian"}``. What has
        an argument of its own here is refused.
    epochs, batch_size
        Passes over the training data of each task, and examples at a time.
    optimiser
        Trainable parameters -> optimiser. Default: Adam with learning rate 0.001.
    loss
        ``(outputs of the task, targets) ->`` mean over a batch. Integer labels are those among the
        outputs of the task by then. A number on the graph of the outputs.
    evaluate
        ``(net, task) -> number``. Default: the share of the test data whose largest output, among
        those of the task, is that of the label; it needs integer labels ``(N,)`` and two outputs
        or more, so that regression or a single logit need a function here.
    seed
        Of orders, dropout and draws.
    checkpoint
        Folder in which the state is kept after every epoch: the same call, with the same initial
        weights, goes on from there, to the same result bit for bit. Measures are not stored:
        `summarise` is called again with the weights of then, and must give the same. A `loss` of
        another name is refused; one that was changed under its name is not noticed.
    progress
        Whether to show a bar; None: on a terminal, when it takes long.

    Returns
    -------
    TaskSequence
        Accuracies of all tasks after each.

    Raises
    ------
    OptionError
        For no tasks, options out of range, a loss or a score that is no number, or what is no
        measure.
    DataError
        For data that cannot be read, or that the network does not take; labels outside of the
        outputs of their task, targets that the loss does not take, or those that are no labels when
        `evaluate` is not given.
    NetworkError
        For what is no network or has nothing to train, and when a loss is not finite.
    WeightsError
        For a folder with the state of another computation, or a measure that `summarise` does not
        give again.
    PushforwardError
        Whatever `summarise` or the measures refuse.

    Examples
    --------
    >>> import pushforward as pf, torch
    >>> from pushforward.function_space.continual import Task, learn_tasks
    >>> x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    >>> tasks = [Task((x, (x[:, i] > 0).long()), (x, (x[:, i] > 0).long())) for i in range(2)]
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> found = learn_tasks(
    ...     net, tasks, summarise=lambda net, task: pf.summarize(net, task.train), epochs=1
    ... )
    >>> found.accuracy.shape
    torch.Size([2, 2])
    """
    _require_tasks(tasks)
    _require_trainable(net)
    epochs, batch_size = whole_number(epochs, "epochs"), whole_number(batch_size, "batch_size")
    options = _distance_options(distance_options)
    penalty = FunctionSpacePenalty(
        scale=scale,
        metric=metric,
        tasks_per_step=tasks_per_step,
        resample=resample,
        seed=seed,
        **options,
    )
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    inner = unwrapped(net)
    opened = [OpenTask.of(task, number, inner, device) for number, task in enumerate(tasks)]
    if evaluate is None:
        for task in opened:
            task.require_classes()
    optimiser_of_all = optimiser([p for p in net.parameters() if p.requires_grad])
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimiser_of_all.param_groups]
    settings = {
        "optimiser": f"{type(optimiser_of_all).__name__} {groups}",
        "seed": seed,
        "epochs": epochs,
        "batch_size": batch_size,
        "loss": _named(loss),
        "penalty": None if summarise is None else repr(penalty),
        "net": fingerprint(_tensors(inner)),
        "tasks": [task.identity for task in opened],
    }
    learner = _Learner(net, opened, summarise, penalty, optimiser_of_all, loss, evaluate, settings)
    store = None if checkpoint is None else _Store(checkpoint, settings)
    with track(len(tasks) * epochs, "Learning tasks", enabled=progress) as advance:
        learner.run(store, advance)
    return learner.result()


def _require_tasks(tasks: object) -> None:
    advice = "Give a list of Task(train, test), at least one."
    if not isinstance(tasks, Sequence):
        raise OptionError(f"got {type(tasks).__name__}", where="tasks", advice=advice)
    if not tasks:
        raise OptionError("there are none", where="tasks", advice=advice)
    for number, task in enumerate(tasks):
        if not isinstance(task, Task):
            raise OptionError(
                f"number {number} is {type(task).__name__}, no Task", where="tasks", advice=advice
            )


def _require_trainable(net: object) -> None:
    if not isinstance(net, nn.Module):
        raise NetworkError(
            f"got {type(net).__name__}", where="net", advice="Pass a torch.nn.Module."
        )
    if not any(p.requires_grad for p in net.parameters()):
        raise NetworkError(
            "none of its parameters is trained",
            where="net",
            advice="Leave some of them trainable: net.requires_grad_(True).",
        )


def _distance_options(given: object) -> dict[str, Any]:
    """Options of distances, without those of the penalty.

    Returns
    -------
    dict
        By name.

    Raises
    ------
    OptionError
        For what has a name of its own in `learn_tasks`.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise OptionError(
            f"got {type(given).__name__}",
            where="distance_options",
            advice='Give options by name, such as {"estimator": "gaussian"}.',
        )
    places = {
        **{name: f"{name}=" for name in ("scale", "metric", "tasks_per_step", "resample", "seed")},
        "outputs": "Task(..., outputs=)",
    }
    for name in given:
        if name in places:
            raise OptionError(
                f"{name!r} is no option of distances alone",
                where="distance_options",
                advice=f"Give it as {places[name]}.",
            )
    return dict(given)


class _Learner:
    """The loop and its state: what has been learned, and where it is."""

    def __init__(
        self,
        net: nn.Module,
        tasks: list[OpenTask],
        summarise: Callable[[nn.Module, Task], DistanceMeasure] | None,
        penalty: FunctionSpacePenalty,
        optimiser: torch.optim.Optimizer,
        loss: Loss,
        evaluate: Callable[[nn.Module, Task], float] | None,
        settings: dict[str, Any],
    ) -> None:
        # What is trained, perhaps in wrappers, and what is inside.
        self.net, self.inner = net, unwrapped(net)
        self.tasks, self.summarise, self.penalty = tasks, summarise, penalty
        self.loss, self.evaluate = loss, evaluate
        self.seed, self.epochs = settings["seed"], settings["epochs"]
        self.batch_size = settings["batch_size"]
        self.optimiser = optimiser
        self.initial = {name: tensor.clone() for name, tensor in _tensors(self.inner).items()}
        count = len(tasks)
        self.finished = 0  # epochs, over all tasks
        self.measured = 0  # tasks with a column of accuracies
        self.accuracy = [[float("nan")] * count for _ in range(count)]
        self.losses: list[list[float]] = [[] for _ in tasks]
        self.penalties: list[list[float]] = [[] for _ in tasks]
        self.training_seconds = [0.0] * count
        self.summary_seconds = [0.0] * count
        self.distances: list[float] = []  # from the initial weights, to know a measure again

    def run(self, store: _Store | None, advance: Callable[[int], None]) -> None:
        if store is not None and store.load(self):
            self.recall(store)
            advance(self.finished)
        for number, task in enumerate(self.tasks):
            while self.finished < self.epochs * (number + 1):
                epoch = self.finished - self.epochs * number
                start = perf_counter()
                self.train(number, epoch)
                self.training_seconds[number] += perf_counter() - start
                self.finished += 1
                if store is not None:
                    store.save(self)
                advance(1)
            if self.measured > number:
                continue
            with evaluating(self.net):
                for i, earlier in enumerate(self.tasks[: number + 1]):
                    self.accuracy[i][number] = self.score(earlier)
            self.measured = number + 1
            if self.summarise is not None and number + 1 < len(self.tasks):
                start = perf_counter()
                self.distances.append(self.keep(task))
                self.summary_seconds[number] = perf_counter() - start
                if store is not None:
                    store.save_past(number, self.inner)
            if store is not None:
                store.save(self)

    def train(self, number: int, epoch: int) -> None:
        """One pass over the data of a task."""
        task = self.tasks[number]
        order = stream(self.seed, "continual learning", "order", number, epoch)
        count = 0
        sums = torch.zeros(2, dtype=torch.float64)
        self.net.train()
        # Dropout draws from the global generator; its state stays what the caller left.
        with _global_seed(self.net, self.seed, "dropout", number, epoch):
            for batch in task.train.minibatches(self.batch_size, order):
                outputs, targets = task.outputs_and_targets(self.net, batch)
                loss = self.loss_on(outputs, targets, task)
                penalty = self.penalty(self.net)
                self.optimiser.zero_grad()
                (loss + penalty).backward()
                self.optimiser.step()
                pair = torch.stack([loss.detach(), penalty.detach().to(loss)]).double()
                sums, count = sums.to(pair) + len(batch) * pair, count + len(batch)
        means = (sums / count).tolist()
        if not all(map(_is_finite, means)):
            self.require_labels(number, epoch)
            raise NetworkError(
                f"the loss is {means[0]:g} and the penalty {means[1]:g}",
                where=f"{task.name}, epoch {epoch + 1}",
                advice="Lower the learning rate or the scale of the penalty.",
            )
        self.losses[number].append(means[0])
        self.penalties[number].append(means[1])

    def require_labels(self, number: int, epoch: int) -> None:
        """Refuse batches without a label: the mean over nothing is no fault of the training.

        Raises
        ------
        DataError
            When an epoch had one.
        """
        task = self.tasks[number]
        order = stream(self.seed, "continual learning", "order", number, epoch)
        for batch in task.train.minibatches(self.batch_size, order):
            if task.labels_are_ignored(batch):
                raise DataError(
                    f"the labels of a whole batch of {len(batch)} are below 0, which cross-entropy "
                    "leaves out: the mean over it is no number",
                    where=task.train.name,
                    advice="Leave out examples without a label, or use larger batches.",
                )

    def loss_on(self, outputs: Tensor, targets: Tensor, task: OpenTask) -> Tensor:
        try:
            found: Any = self.loss(outputs, targets)
        except PushforwardError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise DataError(
                f"the loss failed on outputs {tuple(outputs.shape)} and targets of type "
                f"{targets.dtype} and shape {tuple(targets.shape)}: {error}",
                where=task.train.name,
                advice="Give targets that it takes; cross-entropy wants integer labels (N,) below "
                "the number of outputs.",
            ) from error
        if not isinstance(found, Tensor):
            what = type(found).__name__
        elif found.dim() > 0:
            what = f"a tensor of shape {tuple(found.shape)}"
        elif not found.requires_grad:
            what = "a number that does not depend on what is trained"
        else:
            return found
        raise OptionError(
            f"it returned {what}",
            where="loss",
            advice='Return the mean over the batch (reduction="mean"), computed from the outputs '
            "by torch.",
        )

    def score(self, task: OpenTask) -> float:
        if self.evaluate is not None:
            value: Any = self.evaluate(self.net, task.given)
            try:
                return float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise OptionError(
                    f"it returned {value!r:.80}",
                    where="evaluate",
                    advice="Return one number, the score of the network on the task.",
                ) from error
        return task.accuracy(self.net)

    def keep(self, task: OpenTask) -> float:
        """Summarise a task at the present weights, and say how far the initial ones are."""
        assert self.summarise is not None
        number = len(self.penalty)
        with evaluating(self.net), _global_seed(self.net, self.seed, "summary", number):
            measure = self.summarise(self.inner, task.given)
        self.penalty.add(measure, outputs=task.given.outputs)
        options = dict(self.penalty.options)
        if self.penalty.metric is not None:
            options["metric"] = self.penalty.metric
        with torch.no_grad():
            moved = measure.distance(self.initial, **options)
        return float(moved)

    def recall(self, store: _Store) -> None:
        """Make the measures of the past tasks again, from the weights of then."""
        now = {name: tensor.clone() for name, tensor in _tensors(self.inner).items()}
        for number, known in enumerate(self.distances):
            _load(self.inner, store.load_past(number))
            if self.keep(self.tasks[number]) != known:
                raise WeightsError(
                    f"summarise does not give the measure of {self.tasks[number].name} again",
                    where="checkpoint",
                    advice="Go on with the same function, and give what it draws a fixed seed.",
                )
        _load(self.inner, now)

    def result(self) -> TaskSequence:
        kept = [getattr(past.measure, "num_bytes", 0) for past in self.penalty.past]
        return TaskSequence(
            tuple(task.name for task in self.tasks),
            torch.tensor(self.accuracy, dtype=torch.float64),
            torch.tensor(self.losses, dtype=torch.float64),
            torch.tensor(self.penalties, dtype=torch.float64),
            tuple(self.training_seconds),
            tuple(self.summary_seconds),
            tuple(kept + [0] * (len(self.tasks) - len(kept))),
        )


_LISTS = ("accuracy", "losses", "penalties", "training_seconds", "summary_seconds", "distances")


class _Store:
    """The state of a `_Learner` on disk: where it is, and its weights after each past task."""

    def __init__(self, folder: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        self.folder, self.identity = Path(folder), identity
        self.state = Checkpoint(self.folder, identity)

    def save(self, learner: _Learner) -> None:
        optimiser = learner.optimiser.state_dict()
        tensors = {f"net.{name}": tensor for name, tensor in _tensors(learner.inner).items()}
        numbers: dict[str, dict[str, Any]] = {}
        for index, values in optimiser["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser.{index}.{name}"] = value
                else:
                    numbers.setdefault(str(index), {})[name] = value
        tensors["penalty"] = learner.penalty.get_extra_state()
        state = {name: getattr(learner, name) for name in (*_LISTS, "finished", "measured")}
        self.state.save(tensors, state | {"optimiser": numbers})

    def load(self, learner: _Learner) -> bool:
        """Put the learner where it was; False when nothing was saved."""
        loaded = self.state.load()
        if loaded is None:
            return False
        tensors, state = loaded
        _load(learner.inner, _under("net.", tensors))
        optimiser = learner.optimiser.state_dict()
        values: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in state["optimiser"].items()}
        for path, tensor in _under("optimiser.", tensors).items():
            index, name = path.split(".", 1)
            values.setdefault(int(index), {})[name] = tensor
        learner.optimiser.load_state_dict({**optimiser, "state": values})
        learner.penalty.set_extra_state(tensors["penalty"])
        for name in (*_LISTS, "finished", "measured"):
            setattr(learner, name, state[name])
        return True

    def save_past(self, number: int, net: nn.Module) -> None:
        self._past(number).save(_tensors(net), {})

    def load_past(self, number: int) -> dict[str, Tensor]:
        loaded = self._past(number).load()
        if loaded is None:
            raise WeightsError(
                f"the weights after task {number + 1} are missing",
                where=str(self._past(number).path),
                advice="Begin again in another folder.",
            )
        return loaded[0]

    def _past(self, number: int) -> Checkpoint:
        return Checkpoint(self.folder / f"task-{number + 1}", self.identity)


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that are not saved usually too."""
    return {n: t.detach() for n, t in chain(net.named_parameters(), net.named_buffers())}


def _load(net: nn.Module, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _tensors(net).items():
            tensor.copy_(tensors[name])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _named(function: Any) -> str:
    """A function by its name, the same in every process: addresses do not count."""
    if isinstance(function, partial):
        keywords = (f"{name}={value!r}" for name, value in sorted(function.keywords.items()))
        inner = ", ".join([_named(function.func), *map(repr, function.args), *keywords])
        return re.sub(r" at 0x[0-9a-fA-F]+", "", f"partial({inner})")
    name = getattr(function, "__qualname__", None)
    if name is not None:
        return f"{getattr(function, '__module__', '')}.{name}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(function))


def _is_finite(value: float) -> bool:
    return value - value == 0


@contextmanager
def _global_seed(net: nn.Module, seed: int, *path: str | int) -> Iterator[None]:
    """The global generators on a stream of their own for a while."""
    cuda = {p.device.index or 0 for p in net.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(cuda)):
        torch.manual_seed(derived_seed(seed, "continual learning", *path))
        yield
