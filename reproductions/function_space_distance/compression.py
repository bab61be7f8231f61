"""A convolutional network, pruned and quantised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import torch
from torch import nn

from pushforward.function_space.metrics import Metric
from pushforward.typing import Params
from reproductions.function_space_distance.comparison import fill_in, is_wanted
from reproductions.function_space_distance.methods import exact_method, methods
from reproductions.function_space_distance.networks import (
    accuracy_of,
    convolutional,
    load_mnist,
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

__all__ = ["Compression", "compression", "compression_table"]

PRUNED = (0.3, 0.5, 0.7, 0.8, 0.9)
BITS = (8, 4)


@dataclass(frozen=True)
class Compression:
    """A convolutional network on MNIST, pruned at five levels and quantised to 8 and 4 bits.

    Parameters
    ----------
    output
        Folder for results.
    seeds
        Of the networks.
    metrics
        That are measured.
    channels
        Of the two convolutions.
    pooling
        Behind each of them.
    epochs
        Of training, with Adam.
    num_train
        Images that are trained on and summarised.
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
    seeds: tuple[int, ...] = (0, 1, 2)
    metrics: tuple[Metric, ...] = ("euclidean", "kl")
    channels: tuple[int, int] = (8, 16)
    pooling: Literal["max", "avg"] = "max"
    epochs: int = 5
    num_train: int = 8000
    draws: int = 1000
    methods: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    data_dir: Path | None = None


def compression(options: Compression) -> Iterator[dict[str, Any]]:
    """One network after the other.

    Yields
    ------
    dict
        Accuracies, true distances, and what each method found.
    """
    x, y, test_x, test_y = load_mnist(options.num_train, options.data_dir, flat=False)
    for seed in options.seeds:
        net = convolutional(options.channels, options.pooling, seed)
        train_by_adam(net, x, y, options.epochs * (len(y) // 64), seed, "train")
        left_out = ("output", "seeds", "methods", "without", "data_dir")
        settings = settings_of(options, left_out, seed=seed)
        changes = _compressed(net)

        def scores(net: nn.Module = net, changes: dict[str, Params] = changes) -> dict[str, Any]:
            own = accuracy_of(net, test_x, test_y)["accuracy"]
            accuracies = {n: accuracy_of(net, test_x, test_y, w) for n, w in changes.items()}
            lost = {n: own - found["accuracy"] for n, found in accuracies.items()}
            return {"accuracy": own, "accuracy lost": lost}

        yield fill_in(
            options.output / f"compression-{options.pooling}-{seed}.json",
            settings,
            scores,
            partial(methods, net, x, y, metrics=options.metrics, draws=options.draws, rank=50),
            lambda changes=changes: changes,
            partial(is_wanted, begins=options.methods, without=options.without),
            exact=partial(exact_method, net, x),
            metrics=options.metrics,
            slope=False,
        )


def _compressed(net: nn.Module) -> dict[str, Params]:
    """Smallest weights of all layers set to zero, or all rounded to multiples of a step."""
    own = {name: p.detach().clone() for name, p in net.named_parameters()}
    matrices = {name for name, p in own.items() if p.dim() > 1}
    sizes = torch.cat([own[name].abs().flatten() for name in matrices])
    found: dict[str, Params] = {}
    for share in PRUNED:
        least = sizes.kthvalue(max(1, int(share * len(sizes)))).values
        found[f"{share:.0%} pruned"] = {
            n: torch.where(p.abs() <= least, 0.0, p) if n in matrices else p for n, p in own.items()
        }
    for bits in BITS:
        most = 2 ** (bits - 1) - 1
        steps = {name: own[name].abs().max() / most for name in matrices}
        found[f"{bits} bits"] = {
            n: (p / steps[n]).round() * steps[n] if n in matrices else p for n, p in own.items()
        }
    return found


def compression_table(results: Sequence[dict[str, Any]]) -> str:
    """What each change loses, and means over networks for each metric."""
    settings, first = results[0]["settings"], results[0]
    metrics = settings["metrics"]
    accuracy = finite_mean([found["accuracy"] for found in results], 4)
    lines = [
        f"# Compression: {len(results)} networks with {settings['pooling']} pooling",
        "",
        f"Test accuracy {accuracy}. Means over networks ± standard deviations between them.",
        "",
        "| change | accuracy lost | " + " | ".join(f"true {m}" for m in metrics) + " |",
        "|---|---:|" + "---:|" * len(metrics),
    ]
    for change in first["accuracy lost"]:
        lost = finite_mean([found["accuracy lost"][change] for found in results], 4)
        cells = [finite_mean([f["truth"][m][change] for f in results], 3) for m in metrics]
        lines.append(f"| {change} | {lost} | {' | '.join(cells)} |")
    for metric in metrics:
        ceiling = [
            spearman(list(f["truth"][metric].values()), list(f["accuracy lost"].values()))
            for f in results
        ]
        lines += [
            "",
            f"## {metric}",
            "",
            f"Spearman of the true distance with the accuracy lost: {finite_mean(ceiling)}.",
            "",
            "| method | keeps | mean \\|log ratio\\| | median ratio | Spearman with the truth "
            "| with the accuracy lost | within two errors | CPU, ms |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [_compression_row(name, results, metric) for name in names_of(results)]
    return "\n".join([*lines, ""])


def _compression_row(name: str, results: Sequence[dict[str, Any]], metric: str) -> str:
    rows = [f["methods"][name] for f in results if name in f["methods"]]
    failure = next((row["failure"] for row in rows if "failure" in row), None)
    if failure is not None:
        return f"| {name} | {failure} | | | | | | |"
    offs, ratios, ranks, losses, within, seconds = [], [], [], [], [], []
    for found in (f for f in results if name in f["methods"]):
        row, truth = found["methods"][name][metric], list(found["truth"][metric].values())
        logs = log_ratios(row["values"], truth)
        offs.append(mean(map(abs, logs)))
        ratios.append(exp(median(logs)))
        ranks.append(spearman(row["values"], truth))
        losses.append(spearman(row["values"], list(found["accuracy lost"].values())))
        seconds.append(row["seconds"])
        if row["errors"]:
            columns = zip(row["values"], truth, row["errors"], strict=True)
            within += [abs(v - t) <= 2 * e for v, t, e in columns]
    shares = f"{mean(within):.0%}" if within else ""
    cells = [size_of(rows[0]["bytes"]), finite_mean(offs), f"{mean(ratios):.2f}"]
    cells += [finite_mean(ranks), finite_mean(losses), shares]
    return f"| {name} | {' | '.join(cells)} | {1e3 * median(seconds):.0f} |"
