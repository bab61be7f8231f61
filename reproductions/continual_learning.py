"""Tasks one after the other on MNIST and CIFAR-10, held back by what is known of the past.

    python -m reproductions.continual_learning --output results --problem permuted
    python -m reproductions.continual_learning --output results --problem split --seeds 0
    python -m reproductions.continual_learning --output results --problem cifar --scale 10

Problems as Dhawan, Huang, Bae and Grosse (arXiv 2302.03519) and their code have them: ten
permutations of the pixels, the first of which leaves them in place; five pairs of digits, or of
classes of CIFAR-10, each with its own two outputs.

| method | what is kept of a task besides the weights |
|---|---|
| none | nothing |
| joint | all data, learned together: no sequence at all |
| exact | all data; the distance over `--samples` of them, drawn anew in each step |
| subset-N | N examples |
| ewc, ekfac | diagonal of the Fisher matrix, Kronecker factors |
| gated, gaussian, anchored, reference, sampled, synthetic | a `FunctionSummary` |
| gated-classes, ..., synthetic-classes | the same with moments for each class |

The scale of the penalty is the one of `--scales` with the best accuracy on validation examples,
held out of the training data, of `--tuning-tasks` tasks with seed 0; never by test data. One JSON
file for each method and seed, and a table. Started again, it goes on where it was.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pushforward.errors import OptionError, ResourceError, UnsupportedLayerError
from pushforward.function_space.baselines.diagonal import DiagonalDistance
from pushforward.function_space.baselines.kronecker import KroneckerDistance
from pushforward.function_space.baselines.subset import SubsetDistance
from pushforward.function_space.continual import learn_tasks
from pushforward.function_space.metrics import Metric, discrepancy
from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.summarize import summarize
from pushforward.function_space.tasks import Task
from pushforward.runs.rng import stream
from reproductions.datasets import load_images, unit_images
from reproductions.results import (
    mean_and_spread,
    read_result,
    report,
    settings_of,
    write_result,
)

__all__ = ["METHODS", "ContinualLearning", "learn", "main"]

Problem = Literal["permuted", "split", "cifar"]

METHODS = (
    "none",
    "joint",
    "exact",
    "subset-40",
    "subset-200",
    "ewc",
    "ekfac",
    "gated",
    "gaussian",
    "sampled",
    "synthetic-classes",
)
_ESTIMATORS = ("gated", "gaussian", "anchored", "reference", "sampled", "synthetic")
# What the published code trains with: tasks, epochs, batch size, learning rate.
_PUBLISHED: dict[Problem, tuple[int, int, int, float]] = {
    "permuted": (10, 15, 128, 1e-4),
    "split": (5, 15, 32, 1e-3),
    "cifar": (5, 50, 512, 1e-3),
}
_WITHOUT_SCALE = ("none", "joint")
# Options that do not decide the result of one method and seed; the last two are other places.
_IMMATERIAL = (
    *("output", "methods", "seeds", "scales", "tuning_tasks", "tuning_epochs"),
    *("device", "data_dir"),
)


@dataclass(frozen=True)
class ContinualLearning:
    """One problem, several methods.

    Parameters
    ----------
    output
        Folder for results.
    problem
        permuted, split or cifar.
    methods
        See above.
    seeds
        Of initial weights and orders; permutations of pixels are the same for all.
    tasks, epochs, batch_size, learning_rate
        Default: published.
    hidden
        Widths of the hidden layers; of the one behind the convolutions for cifar, the last of them.
    channels
        Of the two pairs of convolutions for cifar.
    num_train, num_test
        The first examples of each task; default all. Of those to train on a tenth validates.
    metric
        How outputs are compared, where a method lets one choose.
    samples
        Inputs drawn in each step, by methods that draw.
    input_moments
        What a summary keeps of the covariance of the inputs.
    tasks_per_step
        Past tasks looked at in each step; default all.
    scale
        Of the penalty; default: found by validation among `scales`.
    scales
        To choose from.
    tuning_tasks, tuning_epochs
        Of the runs that choose; default like the others.
    device
        cpu, or another of torch's.
    data_dir
        Folder of the data; default what the environment variable PUSHFORWARD_DATA names.
    """

    output: Path
    problem: Problem = "permuted"
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: int | None = None
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    hidden: tuple[int, ...] = (512, 512)
    channels: tuple[int, int] = (32, 64)
    num_train: int | None = None
    num_test: int | None = None
    metric: Metric = "softmax"
    samples: int = 40
    input_moments: Literal["full", "diagonal"] | int = "full"
    tasks_per_step: int | None = None
    scale: float | None = None
    scales: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)
    tuning_tasks: int | None = None
    tuning_epochs: int | None = None
    device: str = "cpu"
    data_dir: Path | None = None

    @property
    def plan(self) -> tuple[int, int, int, float]:
        """Tasks, epochs, batch size, learning rate."""
        given = (self.tasks, self.epochs, self.batch_size, self.learning_rate)
        published = _PUBLISHED[self.problem]
        tasks, epochs, size, rate = (
            known if own is None else own for own, known in zip(given, published, strict=True)
        )
        return int(tasks), int(epochs), int(size), float(rate)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code."""
    import tyro

    options = tyro.cli(
        ContinualLearning,
        args=list(argv) if argv is not None else None,
        prog="python -m reproductions.continual_learning",
    )
    path = options.output / f"continual-learning-{options.problem}.md"
    return report(path, learn(options), _table)


def learn(options: ContinualLearning) -> Iterator[dict[str, Any]]:
    """Learn all tasks by each method from each seed.

    Yields
    ------
    dict
        The result of each method and seed, as its JSON file holds it. A method that does not know
        the network, or needs too much memory for it, is reported and left out.

    Raises
    ------
    OptionError
        For a method that does not exist, or fewer than two tasks.
    """
    for method in options.methods:
        _check_method(method)
    if not 2 <= options.plan[0] <= _PUBLISHED[options.problem][0]:
        raise OptionError(
            f"{options.plan[0]} tasks",
            where="tasks",
            advice=f"Give 2 to {_PUBLISHED[options.problem][0]}.",
        )
    examples = _Examples.load(options)
    for method in options.methods:
        try:
            scale = _scale(options, examples, method)
            for seed in options.seeds:
                yield _stored(options, examples, method, seed, scale, final=True)
        except (ResourceError, UnsupportedLayerError) as error:
            print(f"{method} is left out: {error}", flush=True)


# --- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Examples:
    """Images as the networks take them, in parts to train, to validate and to test."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def load(cls, options: ContinualLearning) -> _Examples:
        name: Literal["mnist", "cifar10"] = "cifar10" if options.problem == "cifar" else "mnist"
        cache = options.output / "cache"
        parts: list[tuple[Tensor, Tensor]] = []
        splits: tuple[Literal["train", "test"], ...] = ("train", "test")
        for split in splits:
            images = load_images(name, split, options.data_dir, cache=cache)
            inputs = unit_images(images.pixels)
            flat = inputs if options.problem == "cifar" else inputs.flatten(1)
            parts.append((flat.to(options.device), images.labels.to(options.device)))
        (x, y), test = parts
        held = len(x) // 10  # the files are in no order of the classes
        return cls((x[:-held], y[:-held]), (x[-held:], y[-held:]), test)

    def tasks(self, options: ContinualLearning, count: int, *, final: bool) -> list[Task]:
        """Tested on the test data at last, on held out training data before."""
        test = self.test if final else self.validation
        tasks = []
        for number in range(count):
            chosen: list[int] | None = None
            if options.problem == "permuted":
                order = _permutation(number, self.train[0].shape[1]).to(self.train[0].device)
                parts = [
                    (x[:size][:, order], y[:size])
                    for (x, y), size in ((self.train, options.num_train), (test, options.num_test))
                ]
            else:
                chosen = [2 * number, 2 * number + 1]
                parts = [
                    _of_classes(pair, chosen, size)
                    for pair, size in ((self.train, options.num_train), (test, options.num_test))
                ]
            tasks.append(Task(parts[0], parts[1], chosen, f"{options.problem} {number + 1}"))
        return tasks


def _permutation(number: int, width: int) -> Tensor:
    if number == 0:
        return torch.arange(width)
    return torch.randperm(width, generator=stream(number, "reproductions", "permuted pixels"))


def _of_classes(
    pair: tuple[Tensor, Tensor], classes: list[int], size: int | None
) -> tuple[Tensor, Tensor]:
    x, y = pair
    own = torch.isin(y, torch.tensor(classes, device=y.device)).nonzero()[:size, 0]
    return x[own], y[own]


def _network(options: ContinualLearning, seed: int) -> nn.Sequential:
    """Fully connected, or convolutions 32-32-pool-64-64-pool with dropout, as published."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        if options.problem == "cifar":
            before = 3
            for channels in options.channels:
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
                layers += [nn.Conv2d(channels, channels, 3), nn.ReLU()]
                layers += [nn.MaxPool2d(2), nn.Dropout(0.25)]
                before = channels
            layers += [nn.Flatten(), nn.Linear(before * 36, options.hidden[-1]), nn.ReLU()]
            layers += [nn.Dropout(0.5), nn.Linear(options.hidden[-1], 10)]
        else:
            widths = (784, *options.hidden)
            for i, o in pairwise(widths):
                layers += [nn.Linear(i, o), nn.ReLU()]
            layers.append(nn.Linear(widths[-1], 10))
        return nn.Sequential(*layers).to(options.device)


# --- methods --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Redrawn:
    """The true distance over examples drawn anew for each seed: its mean is that over all."""

    reference: ReferenceNetwork
    inputs: Tensor
    samples: int

    @property
    def num_bytes(self) -> int:
        return self.inputs.numel() * self.inputs.element_size()

    def distance(
        self, other: Any, *, metric: Metric = "euclidean", outputs: Any = None, seed: int = 0
    ) -> Tensor:
        generator = stream(seed, "reproductions", "redrawn")
        chosen = torch.randint(len(self.inputs), (self.samples,), generator=generator)
        batch = self.inputs[chosen.to(self.inputs.device)]
        with torch.no_grad():
            old = self.reference.outputs(self.reference.tensors, batch)
        new = self.reference.outputs(self.reference.tensors_of(other), batch)
        if outputs is not None:
            old, new = old[:, outputs], new[:, outputs]
        return discrepancy(old, new, metric).mean()


def _check_method(method: str) -> None:
    estimator = method.removesuffix("-classes")
    subset = method.startswith("subset-") and method.removeprefix("subset-").isdecimal()
    if method not in METHODS and estimator not in _ESTIMATORS and not subset:
        raise OptionError(
            f"there is no method {method!r}",
            where="methods",
            advice=f"Choose from {', '.join(METHODS)}, subset-N, or an estimator.",
        )


def _measured(options: ContinualLearning, method: str) -> dict[str, Any]:
    """How `learn_tasks` measures the past."""
    metric: dict[str, Any] = {"metric": options.metric}
    if method == "none":
        return {"summarise": None}
    if method == "exact":

        def everything(net: nn.Module, task: Task) -> _Redrawn:
            x = task.train[0]
            return _Redrawn(ReferenceNetwork.of(net, tuple(x.shape[1:])), x, options.samples)

        return {"summarise": everything, "resample": True, **metric}
    if method.startswith("subset-"):
        count = int(method.removeprefix("subset-"))
        return {
            "summarise": lambda net, task: SubsetDistance.of(net, task.train, count, seed=0),
            **metric,
        }
    if method in {"ewc", "ekfac"}:
        kind: Any = DiagonalDistance if method == "ewc" else KroneckerDistance
        return {
            "summarise": lambda net, task: kind.of(
                net, task.train, metric="fisher", outputs=task.outputs, progress=False
            )
        }
    estimator = method.removesuffix("-classes")

    def summary(net: nn.Module, task: Task) -> Any:
        # Labels of a pair of classes are numbered from 0, which is what components want.
        classes = torch.unique(task.train[1], return_inverse=True)[1]
        return summarize(
            net,
            task.train,
            classes=classes if method.endswith("-classes") else None,
            input_moments=options.input_moments,
            layer_moments=estimator == "anchored",
            progress=False,
        )

    return {
        "summarise": summary,
        "resample": True,
        "distance_options": {"estimator": estimator, "num_samples": options.samples},
        **metric,
    }


def _scale(options: ContinualLearning, examples: _Examples, method: str) -> float:
    """The given one, or the best on the validation data from seed 0."""
    if method in _WITHOUT_SCALE:
        return 0.0
    if options.scale is not None:
        return options.scale
    found = {
        scale: _stored(options, examples, method, 0, scale, final=False)["mean_accuracy"]
        for scale in options.scales
    }
    return max(found, key=lambda scale: found[scale])


def _stored(
    options: ContinualLearning,
    examples: _Examples,
    method: str,
    seed: int,
    scale: float,
    *,
    final: bool,
) -> dict[str, Any]:
    """What a file holds, if it was made with these settings; otherwise make it."""
    tasks, epochs, batch_size, rate = options.plan
    if not final:
        tasks, epochs = options.tuning_tasks or tasks, options.tuning_epochs or epochs
    plan = {"tasks": tasks, "epochs": epochs, "batch_size": batch_size, "learning_rate": rate}
    settings = settings_of(
        options, _IMMATERIAL, method=method, seed=seed, scale=scale, final=final, **plan
    )
    kind = "" if final else f"-validation-{scale:g}"
    name = f"continual-learning-{options.problem}-{method}-{seed}{kind}"
    path = options.output / f"{name}.json"
    known = read_result(path, settings)
    if known is not None:
        return known
    start = perf_counter()
    net = _network(options, seed)
    data = examples.tasks(options, tasks, final=final)

    def optimiser(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=rate)

    state = options.output / "state" / name
    if method == "joint":
        found = _joint(net, data, optimiser, epochs, batch_size, seed)
    else:
        found = learn_tasks(
            net,
            data,
            scale=scale,
            tasks_per_step=options.tasks_per_step,
            epochs=epochs,
            batch_size=batch_size,
            optimiser=optimiser,
            seed=seed,
            checkpoint=state,
            **_measured(options, method),
        ).to_dict()
    found = {"settings": settings, **found, "seconds": perf_counter() - start}
    write_result(path, found)
    shutil.rmtree(state, ignore_errors=True)
    print(
        f"{name}: scale {scale:g}, accuracy {found['mean_accuracy']:.4f}, backward transfer "
        f"{found['backward_transfer']:+.4f}, {found['seconds']:.0f} s",
        flush=True,
    )
    return found


def _joint(
    net: nn.Module,
    tasks: list[Task],
    optimiser: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    epochs: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """All tasks at once: minibatches of one task each, in random order."""
    steps = optimiser(list(net.parameters()))
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of dropout
        for epoch in range(epochs):
            net.train()
            for number, chosen in _mixed(tasks, batch_size, seed, epoch):
                x, y = tasks[number].train
                outputs, targets = _head(net(x[chosen]), y[chosen], tasks[number])
                steps.zero_grad()
                functional.cross_entropy(outputs, targets).backward()
                steps.step()
    net.eval()
    accuracies = []
    with torch.no_grad():
        for task in tasks:
            outputs, targets = _head(net(task.test[0]), task.test[1], task)
            accuracies.append((outputs.argmax(1) == targets).double().mean().item())
    return {
        "names": [task.name for task in tasks],
        "final": accuracies,
        "mean_accuracy": mean(accuracies),
        "backward_transfer": 0.0,
        "num_bytes": [0 for _ in tasks],
    }


def _mixed(tasks: list[Task], batch_size: int, seed: int, epoch: int) -> list[tuple[int, Tensor]]:
    generator = stream(seed, "reproductions", "joint", epoch)
    batches = [
        (number, part.to(task.train[1].device))
        for number, task in enumerate(tasks)
        for part in torch.randperm(len(task.train[1]), generator=generator).split(batch_size)
    ]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _head(outputs: Tensor, targets: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    if task.outputs is None:
        return outputs, targets
    own = list(task.outputs)  # neighbours
    return outputs[:, own], targets - own[0]


# --- table ----------------------------------------------------------------------------------------


def _table(results: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, with standard deviations where there are several."""
    head = ("method", "scale", "seeds", "accuracy, %", "backward transfer, %", "bytes a task", "s")
    lines = [f"| {' | '.join(head)} |", "|---|---:|---:|---:|---:|---:|---:|"]
    methods = dict.fromkeys(found["settings"]["method"] for found in results)
    for method in methods:
        own = [found for found in results if found["settings"]["method"] == method]
        cells = [
            method,
            f"{own[0]['settings']['scale']:g}" if method not in _WITHOUT_SCALE else "",
            str(len(own)),
            _percent(own, "mean_accuracy"),
            _percent(own, "backward_transfer") if method != "joint" else "",
            f"{max(own[0]['num_bytes']):,}" if method not in _WITHOUT_SCALE else "",
            f"{mean(found['seconds'] for found in own):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(results: list[dict[str, Any]], name: str) -> str:
    return mean_and_spread([100 * found[name] for found in results], ".2f", ".2f")


if __name__ == "__main__":
    sys.exit(main())
