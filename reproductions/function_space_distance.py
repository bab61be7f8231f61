"""How far did the function move? Every estimator beside the true distance, on trained networks.

    python -m reproductions.function_space_distance nets --network digits --output results
    python -m reproductions.function_space_distance nets --network mnist --output results
    python -m reproductions.function_space_distance compression --output results

`nets` moves perceptrons in 24 ways (random noise, training on permuted pixels, training on shifted
labels) and compares estimates and their gradients with those over all data (Dhawan, Huang, Bae and
Grosse, arXiv 2302.03519). `compression` prunes and quantises a convolutional network. One JSON file
for each network, and tables. Started again, it skips the methods that are finished.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from math import exp, isfinite, log, prod, sqrt
from pathlib import Path
from statistics import mean, median, stdev
from time import process_time
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import pushforward as pf
from pushforward.errors import PushforwardError
from pushforward.function_space.baselines.diagonal import DiagonalDistance
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.baselines.kronecker import KroneckerDistance
from pushforward.function_space.baselines.subset import SubsetDistance
from pushforward.function_space.baselines.tangent import TangentDistance
from pushforward.function_space.metrics import Metric
from pushforward.runs.rng import stream
from pushforward.typing import Params
from reproductions.datasets import load_images

__all__ = ["Compression", "Method", "Nets", "compression", "main", "methods", "nets"]

CLOSED = ("gated", "reference", "anchored", "gaussian")
DRAWN = ("sampled", "synthetic")
NOISES = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5)  # norm of the change of a tensor over that of the tensor
PRUNED = (0.3, 0.5, 0.7, 0.8, 0.9)
BITS = (8, 4)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the experiments from the command line.

    Returns
    -------
    int
        0, or 2 when something was refused.
    """
    import tyro

    chosen: Nets | Compression = tyro.extras.subcommand_cli_from_dict(
        {"nets": Nets, "compression": Compression}, args=argv
    )
    chosen.output.mkdir(parents=True, exist_ok=True)
    try:
        if isinstance(chosen, Nets):
            name, table = chosen.network, _nets_table(list(nets(chosen)))
        else:
            name = f"compression-{chosen.pooling}"
            table = _compression_table(list(compression(chosen)))
    except PushforwardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (chosen.output / f"{name}.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


# --- what is compared ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """Something that measures a distance.

    Parameters
    ----------
    distance
        ``(weights, metric)`` to a scalar, differentiable.
    num_bytes
        What it keeps besides the weights.
    error
        ``(weights, metric, distance)`` to the standard error that it states, if it does.
    """

    distance: Callable[[Params, Metric], Tensor]
    num_bytes: int
    error: Callable[[Params, Metric, float], float] | None = None


def methods(
    net: nn.Module, x: Tensor, y: Tensor, *, metrics: Sequence[Metric], draws: int, rank: int
) -> dict[str, Callable[[], Method]]:
    """All of them, by name; each is built when it is called.

    Parameters
    ----------
    net
        The reference.
    x, y
        Inputs and labels.
    metrics
        For which curvatures are computed.
    draws
        Over all components.
    rank
        Of a summary that keeps so many directions of the inputs.

    Returns
    -------
    dict
        Summaries first, then the baselines.
    """
    count = int(y.max()) + 1

    @cache
    def summary(**options: Any) -> Any:
        labels = {"classes": y} if options.pop("by_class", False) else {}
        return pf.summarize(net, x, progress=False, **labels, **options)

    def of_summary(estimator: Any, number: int, **options: Any) -> Method:
        made = summary(**options)
        settings = {"estimator": estimator, "num_samples": number}

        def error(weights: Params, metric: Metric, value: float) -> float:
            if estimator in DRAWN:
                stated = made.estimate(weights, metric=metric, **settings).standard_error
                return float(stated)
            # What `estimate` states where nothing is drawn, without the value once more.
            ratios = made.calibration(metric=metric, estimator=estimator)
            return value * float(ratios.square().mean().sqrt())

        def distance(weights: Params, metric: Metric) -> Tensor:
            return made.distance(weights, metric=metric, **settings)

        return Method(distance, made.num_bytes, error)

    found: dict[str, Callable[[], Method]] = {}
    for by_class in (False, True):
        parts = f", {count} classes" if by_class else ""
        for name in (*CLOSED, *DRAWN):
            options = {"by_class": by_class, "layer_moments": name == "anchored"}
            found[name + parts] = partial(of_summary, name, draws, **options)
    found["synthetic, ten times the draws"] = partial(of_summary, "synthetic", 10 * draws)
    found[f"synthetic, {count} classes, ten times the draws"] = partial(
        of_summary, "synthetic", 10 * draws, by_class=True, layer_moments=False
    )
    found[f"synthetic, {count} clusters"] = partial(
        of_summary, "synthetic", draws, clusters=min(count, len(x)), layer_moments=False
    )
    found[f"synthetic, {count} classes, inputs of rank {rank}"] = partial(
        of_summary, "synthetic", draws, by_class=True, input_moments=rank
    )
    for name in ("gated", "gaussian", "synthetic"):
        for kind, moments in (("diagonal inputs", "diagonal"), (f"inputs of rank {rank}", rank)):
            found[f"{name}, {kind}"] = partial(of_summary, name, draws, input_moments=moments)

    def of_baseline(made: Any) -> Method:
        return Method(lambda w, metric: made.distance(w, metric=metric), made.num_bytes)

    def of_curvature(build: Callable[..., Any]) -> Method:
        made = {metric: build(net, x, metric=metric, progress=False) for metric in metrics}
        return Method(lambda w, metric: made[metric].distance(w), made[metrics[0]].num_bytes)

    for size in (40, 200):
        found[f"subset of {size}"] = lambda size=size: of_baseline(
            SubsetDistance.of(net, x, min(size, len(x)), seed=0)
        )
    found["tangent"] = lambda: of_baseline(TangentDistance.of(net, x, progress=False))
    found["tangent on 40"] = lambda: of_baseline(
        TangentDistance.of(net, x, num_examples=min(40, len(x)), progress=False)
    )
    found["diagonal"] = lambda: of_curvature(DiagonalDistance.of)
    found["KFAC"] = lambda: of_curvature(partial(KroneckerDistance.of, eigenvalue_corrected=False))
    found["EK-FAC"] = lambda: of_curvature(KroneckerDistance.of)
    return found


def _wanted(name: str, options: Nets | Compression) -> bool:
    begins = not options.methods or any(name.startswith(start) for start in options.methods)
    return begins and name not in options.without


def _measured(
    measure: Callable[[Params, Metric], Tensor], weights: Params, metric: Metric, *, slope: bool
) -> tuple[float, Tensor, float]:
    """Value, gradient in all weights, and seconds of the processor."""
    leaves = {n: t.detach().clone().requires_grad_(slope) for n, t in weights.items()}
    began = process_time()
    if not slope:
        with torch.no_grad():
            value = float(measure(leaves, metric))
        return value, torch.zeros(0), process_time() - began
    value = measure(leaves, metric)
    parts = torch.autograd.grad(value, list(leaves.values()))
    seconds = process_time() - began
    return float(value.detach()), torch.cat([p.flatten() for p in parts]).double(), seconds


def _compared(
    method: Method,
    changes: dict[str, Params],
    metrics: Sequence[Metric],
    slopes: dict[str, dict[str, Tensor]] | None,
) -> dict[str, Any]:
    """Values, errors, cosines and seconds of one method at all changes; or why there are none."""
    found: dict[str, Any] = {"bytes": method.num_bytes}
    for metric in metrics:
        columns: dict[str, list[float]] = {"values": [], "errors": [], "cosines": []}
        seconds = []
        for name, weights in changes.items():
            value, slope, spent = _measured(
                method.distance, weights, metric, slope=slopes is not None
            )
            columns["values"].append(value)
            seconds.append(spent)
            if slopes is not None:
                true = slopes[metric][name]
                columns["cosines"].append(float(functional.cosine_similarity(slope, true, dim=0)))
            if method.error is not None:
                columns["errors"].append(method.error(weights, metric, value))
        # The first prepares what depends on the reference alone.
        found[metric] = columns | {"seconds": median(seconds), "first seconds": seconds[0]}
    return found


def _fill(
    path: Path,
    settings: dict[str, Any],
    known: Callable[[], dict[str, Any]],
    builders: Callable[[], dict[str, Callable[[], Method]]],
    changes: Callable[[], dict[str, Params]],
    wants: Callable[[str], bool],
    *,
    exact: Callable[[], Method],
    metrics: Sequence[Metric],
    slope: bool,
) -> dict[str, Any]:
    """What a file holds, with all methods that are wanted and missing."""
    settings = json.loads(json.dumps(settings, default=str))
    found: dict[str, Any] = {}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("settings") != settings:
        found = {"settings": settings, **known(), "methods": {}}
    wanted = builders()
    missing = [n for n in wanted if wants(n) and n not in found["methods"]]
    if not missing:
        return found
    moved, truth, slopes = changes(), exact(), {}
    found["truth"] = {}
    for metric in metrics:
        rows = {n: _measured(truth.distance, w, metric, slope=slope) for n, w in moved.items()}
        found["truth"][metric] = {name: row[0] for name, row in rows.items()}
        slopes[metric] = {name: row[1] for name, row in rows.items()}
        found["truth"]["seconds"] = median(row[2] for row in rows.values())
    found["truth"]["bytes"] = truth.num_bytes
    for name in missing:
        began = process_time()
        try:
            method = wanted[name]()
            row = _compared(method, moved, metrics, slopes if slope else None)
        except (PushforwardError, ImportError, RuntimeError) as error:
            row = {"failure": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        found["methods"][name] = row
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{path.name}: {name}, {process_time() - began:.0f} s", flush=True)
    return found


# --- networks and their changes ------------------------------------------------------------------


def nets(options: Nets) -> Iterator[dict[str, Any]]:
    """One network after the other.

    Yields
    ------
    dict
        Accuracy, true distances, and what each method found.
    """
    data = _digits() if options.network == "digits" else _mnist(options)
    widths = (64, 64, 64, 10) if options.network == "digits" else (784, 100, 100, 10)
    epochs = options.epochs or (60 if options.network == "digits" else 10)
    rank = 8 if options.network == "digits" else 50
    x, y, test_x, test_y = data
    for seed in options.seeds:
        net = _perceptron(widths, seed)
        _adam(net, x, y, epochs * (len(y) // 64), seed, "train")
        settings = asdict(options) | {"seed": seed}
        for name in ("output", "seeds", "methods", "without", "data_dir"):
            del settings[name]
        yield _fill(
            options.output / f"{options.network}-{seed}.json",
            settings,
            partial(_accuracy, net, test_x, test_y),
            partial(methods, net, x, y, metrics=options.metrics, draws=options.draws, rank=rank),
            partial(_moved, net, x, y, options.steps, seed),
            partial(_wanted, options=options),
            exact=partial(_exact, net, x),
            metrics=options.metrics,
            slope=True,
        )


def compression(options: Compression) -> Iterator[dict[str, Any]]:
    """One network after the other.

    Yields
    ------
    dict
        Accuracies, true distances, and what each method found.
    """
    x, y, test_x, test_y = _mnist(options, flat=False)
    for seed in options.seeds:
        net = _convolutional(options, seed)
        _adam(net, x, y, options.epochs * (len(y) // 64), seed, "train")
        settings = asdict(options) | {"seed": seed}
        for name in ("output", "seeds", "methods", "without", "data_dir"):
            del settings[name]
        changes = _compressed(net)

        def scores(net: nn.Module = net, changes: dict[str, Params] = changes) -> dict[str, Any]:
            own = _accuracy(net, test_x, test_y)["accuracy"]
            accuracies = {n: _accuracy(net, test_x, test_y, w) for n, w in changes.items()}
            lost = {n: own - found["accuracy"] for n, found in accuracies.items()}
            return {"accuracy": own, "accuracy lost": lost}

        yield _fill(
            options.output / f"compression-{options.pooling}-{seed}.json",
            settings,
            scores,
            partial(methods, net, x, y, metrics=options.metrics, draws=options.draws, rank=50),
            lambda changes=changes: changes,
            partial(_wanted, options=options),
            exact=partial(_exact, net, x),
            metrics=options.metrics,
            slope=False,
        )


def _exact(net: nn.Module, x: Tensor) -> Method:
    made = ExactDistance.of(net, x, progress=False)
    return Method(lambda w, metric: made.distance(w, metric=metric), made.num_bytes)


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=stream(0, "digits", "split"))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]
    count = len(y) * 4 // 5
    return x[:count], y[:count], x[count:], y[count:]


def _mnist(
    options: Nets | Compression, *, flat: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, test = (load_images("mnist", split, options.data_dir) for split in ("train", "test"))
    train = train.slice(0, options.num_train)
    rows = [part.inputs() for part in (train, test)]
    x, test_x = (part.flatten(1) for part in rows) if flat else rows
    return x, train.labels, test_x, test.labels


def _initialised(net: nn.Module, seed: int) -> nn.Module:
    """Weights uniform as PyTorch has them, from a stream of their own."""
    generator = stream(seed, "weights")
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                bound = 1 / sqrt(prod(layer.weight.shape[1:]))
                for p in layer.parameters():
                    p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) * bound)
    return net


def _perceptron(widths: Sequence[int], seed: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return _initialised(nn.Sequential(*layers[:-1]), seed)


def _convolutional(options: Compression, seed: int) -> nn.Module:
    """Inputs 28 x 28, 12 x 12 behind the first convolution, 4 x 4 behind the second."""
    first, second = options.channels
    pool = nn.MaxPool2d if options.pooling == "max" else nn.AvgPool2d
    net = nn.Sequential(
        nn.Conv2d(1, first, 5, stride=2),
        nn.ReLU(),
        pool(2),
        nn.Conv2d(first, second, 3),
        nn.ReLU(),
        pool(2),
        nn.Flatten(),
        nn.Linear(4 * second, 10),
    )
    return _initialised(net, seed)


def _adam(net: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int, purpose: str) -> None:
    """Train on batches of 64, drawn anew in every epoch."""
    optimiser = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    generator = stream(seed, purpose)
    batches: Iterator[Tensor] = iter(())
    for _ in range(steps):
        batch = next(batches, None)
        if batch is None or len(batch) < min(64, len(y)):
            batches = iter(torch.randperm(len(y), generator=generator).split(64))
            batch = next(batches)
        optimiser.zero_grad()
        functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimiser.step()


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
            _adam(net, inputs, labels, count, seed, f"{task} {number}")
            name = f"{task} {number}, {count} steps"
            found[name] = {n: p.detach().clone() for n, p in net.named_parameters()}
    net.load_state_dict(own)
    return found


def _normals(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.numel(), generator=generator)


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


@torch.no_grad()
def _accuracy(
    net: nn.Module, x: Tensor, y: Tensor, weights: Params | None = None
) -> dict[str, float]:
    rows = net(x) if weights is None else torch.func.functional_call(net, weights, (x,))
    return {"accuracy": float((rows.argmax(-1) == y).double().mean())}


# --- tables --------------------------------------------------------------------------------------


def _log_ratios(values: Sequence[float], truth: Sequence[float]) -> list[float]:
    """``log(estimate / truth)``, an estimate of nothing counted as very little."""
    return [log(max(v, 1e-12 * t) / t) for v, t in zip(values, truth, strict=True)]


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    if len(set(first)) == 1 or len(set(second)) == 1:
        return float("nan")
    return float(spearmanr(first, second).statistic)


def _spread(values: Sequence[float], digits: int = 2) -> str:
    finite = [v for v in values if isfinite(v)]
    if not finite:
        return ""
    spread = f" ± {stdev(finite):.{digits}f}" if len(finite) > 1 else ""
    return f"{mean(finite):.{digits}f}{spread}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count > 1e5 else f"{count / 1e3:.1f} kB"


def _names(results: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for found in results for name in found["methods"]))


def _nets_table(results: Sequence[dict[str, Any]]) -> str:
    settings = results[0]["settings"]
    accuracy = _spread([found["accuracy"] for found in results], 3)
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
        lines += [_nets_row(name, results, metric) for name in _names(results)]
    lines += ["", "## Errors that `estimate` states", ""]
    lines += [
        "| method | metric | within one | within two | mean \\|log ratio\\| / relative error |",
        "|---|---|---:|---:|---:|",
    ]
    for name, metric in itertools.product(_names(results), settings["metrics"]):
        lines += _error_row(name, results, metric)
    return "\n".join([*lines, ""])


def _nets_row(name: str, results: Sequence[dict[str, Any]], metric: str) -> str:
    rows = [f["methods"][name] for f in results if name in f["methods"]]
    if any("failure" in row for row in rows):
        failure = next(row["failure"] for row in rows if "failure" in row)
        return f"| {name} | {failure} | | | | | | | | |"
    by_kind: dict[str, list[float]] = {"": [], "noise": [], "pixels": [], "labels": []}
    ranks, cosines, ratios, seconds = [], [], [], []
    for found in (f for f in results if name in f["methods"]):
        row, truth = found["methods"][name][metric], found["truth"][metric]
        logs = _log_ratios(row["values"], list(truth.values()))
        for kind, values in by_kind.items():
            chosen = [r for r, n in zip(logs, truth, strict=True) if n.startswith(kind)]
            values.append(mean(map(abs, chosen)))
        ranks.append(_spearman(row["values"], list(truth.values())))
        cosines.append(mean(row["cosines"]))
        ratios.append(exp(median(logs)))
        seconds.append(row["seconds"])
    cells = [_size(rows[0]["bytes"]), _spread(by_kind[""])]
    cells += [f"{mean(by_kind[kind]):.2f}" for kind in ("noise", "pixels", "labels")]
    cells += [f"{mean(ratios):.2f}", _spread(ranks, 3), _spread(cosines, 3)]
    return f"| {name} | {' | '.join(cells)} | {1e3 * median(seconds):.0f} |"


def _error_row(name: str, results: Sequence[dict[str, Any]], metric: str) -> list[str]:
    within, ratios = {1: [0, 0], 2: [0, 0]}, []
    for found in results:
        row = found["methods"].get(name, {}).get(metric, {})
        if not row.get("errors"):
            return []
        truth = list(found["truth"][metric].values())
        logs = _log_ratios(row["values"], truth)
        for value, error, true, off in zip(row["values"], row["errors"], truth, logs, strict=True):
            for most, counts in within.items():
                counts[0] += abs(value - true) <= most * error
                counts[1] += 1
            ratios.append(abs(off) * value / max(error, 1e-300))
    shares = [f"{counts[0] / counts[1]:.0%}" for counts in within.values()]
    return [f"| {name} | {metric} | {' | '.join(shares)} | {mean(ratios):.2f} |"]


def _compression_table(results: Sequence[dict[str, Any]]) -> str:
    settings, first = results[0]["settings"], results[0]
    metrics = settings["metrics"]
    accuracy = _spread([found["accuracy"] for found in results], 4)
    lines = [
        f"# Compression: {len(results)} networks with {settings['pooling']} pooling",
        "",
        f"Test accuracy {accuracy}. Means over networks ± standard deviations between them.",
        "",
        "| change | accuracy lost | " + " | ".join(f"true {m}" for m in metrics) + " |",
        "|---|---:|" + "---:|" * len(metrics),
    ]
    for change in first["accuracy lost"]:
        lost = _spread([found["accuracy lost"][change] for found in results], 4)
        cells = [_spread([f["truth"][m][change] for f in results], 3) for m in metrics]
        lines.append(f"| {change} | {lost} | {' | '.join(cells)} |")
    for metric in metrics:
        ceiling = [
            _spearman(list(f["truth"][metric].values()), list(f["accuracy lost"].values()))
            for f in results
        ]
        lines += [
            "",
            f"## {metric}",
            "",
            f"Spearman of the true distance with the accuracy lost: {_spread(ceiling)}.",
            "",
            "| method | keeps | mean \\|log ratio\\| | median ratio | Spearman with the truth "
            "| with the accuracy lost | within two errors | CPU, ms |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [_compression_row(name, results, metric) for name in _names(results)]
    return "\n".join([*lines, ""])


def _compression_row(name: str, results: Sequence[dict[str, Any]], metric: str) -> str:
    rows = [f["methods"][name] for f in results if name in f["methods"]]
    if any("failure" in row for row in rows):
        failure = next(row["failure"] for row in rows if "failure" in row)
        return f"| {name} | {failure} | | | | | | |"
    offs, ratios, ranks, losses, within, seconds = [], [], [], [], [], []
    for found in (f for f in results if name in f["methods"]):
        row, truth = found["methods"][name][metric], list(found["truth"][metric].values())
        logs = _log_ratios(row["values"], truth)
        offs.append(mean(map(abs, logs)))
        ratios.append(exp(median(logs)))
        ranks.append(_spearman(row["values"], truth))
        losses.append(_spearman(row["values"], list(found["accuracy lost"].values())))
        seconds.append(row["seconds"])
        if row["errors"]:
            columns = zip(row["values"], truth, row["errors"], strict=True)
            within += [abs(v - t) <= 2 * e for v, t, e in columns]
    shares = f"{mean(within):.0%}" if within else ""
    cells = [_size(rows[0]["bytes"]), _spread(offs), f"{mean(ratios):.2f}"]
    cells += [_spread(ranks), _spread(losses), shares]
    return f"| {name} | {' | '.join(cells)} | {1e3 * median(seconds):.0f} |"


if __name__ == "__main__":
    sys.exit(main())
