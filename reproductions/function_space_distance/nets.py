"""Perceptrons, moved by noise, by permuted pixels and by shifted labels (arXiv 2302.03519)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pushforward.function_space.metrics import Metric
from pushforward.runs.rng import stream
from pushforward.typing import Params
from reproductions.function_space_distance.comparison import fill_in, is_wanted
from reproductions.function_space_distance.methods import exact_method, methods
from reproductions.function_space_distance.networks import (
    accuracy_of,
    load_digits,
    load_mnist,
    perceptron,
    train_by_adam,
)
from reproductions.function_space_distance.tables import (
    finite_mean,
    log_ratios,
    names_of,
    size_of,
    spearman,
)
from reproductions.results import settings_of

__all__ = ["NOISES", "Nets", "nets", "nets_table"]

NOISES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5)  # norm of the change of a tensor over that of the tensor


@dataclass(frozen=True)
class Nets:
    """Perceptrons of two hidden layers, moved in 24 ways.

    Parameters
    ----------
    output
        Folder for results.
    network
        digits: 64-64-64-10 on scikit-learn's digits; mnist: 784-100-100-10.
    seeds
        Of the networks.
    metrics
        That are measured.
    epochs
        Of training, with Adam; default 60 and 10.
    steps
        Of Adam, with which the networks are moved: three sets of pixels, and of labels, for each.
    num_train
        MNIST images that are used.
    draws
        Of the estimators that draw, over all components.
    methods
        Whose names begin like one of these; default all.
    without
        Names of methods that are left out.
    data_dir
        Folder of the data; default what the environment variable PUSHFORWARD_DATA names.
    """

    output: Path
    network: Literal["digits", "mnist"] = "digits"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    metrics: tuple[Metric, ...] = ("euclidean", "kl")
    epochs: int | None = None
    steps: tuple[int, ...] = (20, 100, 400)
    num_train: int = 8000
    draws: int = 1000
    methods: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    data_dir: Path | None = None


def nets(options: Nets) -> Iterator[dict[str, Any]]:
    """One network after the other.

    Yields
    ------
    dict
        Accuracy, true distances, and what each method found.
    """
    digits = options.network == "digits"
    data = load_digits() if digits else load_mnist(options.num_train, options.data_dir)
    widths = (64, 64, 64, 10) if digits else (784, 100, 100, 10)
    epochs = options.epochs or (60 if digits else 10)
    rank = 8 if digits else 50
    x, y, test_x, test_y = data
    for seed in options.seeds:
        net = perceptron(widths, seed)
        train_by_adam(net, x, y, epochs * (len(y) // 64), seed, "train")
        left_out = ("output", "seeds", "methods", "without", "data_dir")
        settings = settings_of(options, left_out, seed=seed)
        yield fill_in(
            options.output / f"{options.network}-{seed}.json",
            settings,
            partial(accuracy_of, net, test_x, test_y),
            partial(methods, net, x, y, metrics=options.metrics, draws=options.draws, rank=rank),
            partial(_moved, net, x, y, options.steps, seed),
            partial(is_wanted, begins=options.methods, without=options.without),
            exact=partial(exact_method, net, x),
            metrics=options.metrics,
            slope=True,
        )


def _moved(
    net: nn.Module, x: Tensor, y: Tensor, steps: Sequence[int], seed: int
) -> dict[str, Params]:
    """Six changes by noise, and three for each number of steps on other pixels and labels."""
    own = {name: p.detach().clone() for name, p in net.named_parameters()}
    found: dict[str, Params] = {}
    for index, size in enumerate(NOISES):
        generator = stream(seed, "noise", index)
        found[f"noise {size:g}"] = {
            name: p
            + size * p.norm() * functional.normalize(_normals(p, generator), dim=0).view_as(p)
            for name, p in own.items()
        }
    for count, number in itertools.product(steps, range(3)):
        order = torch.randperm(x.shape[1], generator=stream(seed, "pixels", number))
        tasks = {"pixels": (x[:, order], y), "labels": (x, (y + 1 + 3 * number) % 10)}
        for task, (inputs, labels) in tasks.items():
            net.load_state_dict(own)
            train_by_adam(net, inputs, labels, count, seed, f"{task} {number}")
            name = f"{task} {number}, {count} steps"
            found[name] = {n: p.detach().clone() for n, p in net.named_parameters()}
    net.load_state_dict(own)
    return found


def _normals(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.numel(), generator=generator)


def nets_table(results: Sequence[dict[str, Any]]) -> str:
    """Means over networks, for each metric, and how often the stated errors hold."""
    settings = results[0]["settings"]
    accuracy = finite_mean([found["accuracy"] for found in results], 3)
    changes = list(results[0]["truth"][settings["metrics"][0]])
    lines = [
        f"# {settings['network']}: {len(results)} networks, {len(changes)} changes each",
        "",
        f"Test accuracy {accuracy}. Means over networks ± standard deviations between them.",
    ]
    for metric in settings["metrics"]:
        ranges = [v for found in results for v in found["truth"][metric].values()]
        lines += [
            "",
            f"## {metric}",
            "",
            f"True distances from {min(ranges):.3g} to {max(ranges):.3g}.",
            "",
            "| method | keeps | mean \\|log ratio\\| | noise | pixels | labels | median ratio "
            "| Spearman | cosine of gradients | CPU, ms |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [_nets_row(name, results, metric) for name in names_of(results)]
    lines += ["", "## Errors that `estimate` states", ""]
    lines += [
        "| method | metric | within one | within two | mean \\|log ratio\\| / relative error |",
        "|---|---|---:|---:|---:|",
    ]
    for name, metric in itertools.product(names_of(results), settings["metrics"]):
        lines += _error_row(name, results, metric)
    return "\n".join([*lines, ""])


def _nets_row(name: str, results: Sequence[dict[str, Any]], metric: str) -> str:
    rows = [f["methods"][name] for f in results if name in f["methods"]]
    failure = next((row["failure"] for row in rows if "failure" in row), None)
    if failure is not None:
        return f"| {name} | {failure} | | | | | | | | |"
    by_kind: dict[str, list[float]] = {"": [], "noise": [], "pixels": [], "labels": []}
    ranks, cosines, ratios, seconds = [], [], [], []
    for found in (f for f in results if name in f["methods"]):
        row, truth = found["methods"][name][metric], found["truth"][metric]
        logs = log_ratios(row["values"], list(truth.values()))
        for kind, values in by_kind.items():
            chosen = [r for r, n in zip(logs, truth, strict=True) if n.startswith(kind)]
            values.append(mean(map(abs, chosen)))
        ranks.append(spearman(row["values"], list(truth.values())))
        cosines.append(mean(row["cosines"]))
        ratios.append(exp(median(logs)))
        seconds.append(row["seconds"])
    cells = [size_of(rows[0]["bytes"]), finite_mean(by_kind[""])]
    cells += [f"{mean(by_kind[kind]):.2f}" for kind in ("noise", "pixels", "labels")]
    cells += [f"{mean(ratios):.2f}", finite_mean(ranks, 3), finite_mean(cosines, 3)]
    return f"| {name} | {' | '.join(cells)} | {1e3 * median(seconds):.0f} |"


def _error_row(name: str, results: Sequence[dict[str, Any]], metric: str) -> list[str]:
    within, ratios = {1: [0, 0], 2: [0, 0]}, []
    for found in results:
        row = found["methods"].get(name, {}).get(metric, {})
        if not row.get("errors"):
            return []
        truth = list(found["truth"][metric].values())
        logs = log_ratios(row["values"], truth)
        for value, error, true, off in zip(row["values"], row["errors"], truth, logs, strict=True):
            for most, counts in within.items():
                counts[0] += abs(value - true) <= most * error
                counts[1] += 1
            ratios.append(abs(off) * value / max(error, 1e-300))
    shares = [f"{counts[0] / counts[1]:.0%}" for counts in within.values()]
    return [f"| {name} | {metric} | {' | '.join(shares)} | {mean(ratios):.2f} |"]
