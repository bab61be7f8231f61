"""Influence beside retrained proximal responses, and wrong labels beside the plain loss.

    python -m reproductions.influence --study concrete --output results
    python -m reproductions.influence --study mnist --output results
    python -m reproductions.influence --study mislabels --output results

``concrete``: a small regression network on UCI Concrete; ``mnist``: a small classifier on some
images. In both, some training examples are removed one at a time, the proximal objective with the
exact distance is minimised anew, and the linearised responses of all distances are compared with
that. ``mislabels``: a tenth of the labels of MNIST images is made wrong, and every score ranks the
examples. Each writes one JSON file a seed and prints a table. Images are averaged to 14 x 14, so
that the exact Gauss-Newton matrix can be formed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pushforward.errors import DataError
from pushforward.function_space.baselines.diagonal import DiagonalDistance
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.baselines.kronecker import KroneckerDistance
from pushforward.function_space.curvature import GaussNewton
from pushforward.function_space.damped_solve import Solver
from pushforward.function_space.example_gradients import ExampleGradients
from pushforward.function_space.mislabels import find_wrong_labels
from pushforward.function_space.proximal import proximal_response
from pushforward.function_space.summarize import summarize
from pushforward.networks.data import Examples
from pushforward.runs.rng import stream
from reproductions.datasets import data_folder, load_mnist, standardise, unit_images
from reproductions.results import read_result, report, write_result

__all__ = ["Study", "main", "study"]

Name = Literal["concrete", "mnist", "mislabels"]
_LOSSES = {"concrete": "squared", "mnist": "cross_entropy", "mislabels": "cross_entropy"}
_METRICS = {"squared": "euclidean", "cross_entropy": "fisher"}


@dataclass(frozen=True)
class Study:
    """Compare ways to estimate influence.

    Parameters
    ----------
    study
        concrete, mnist or mislabels.
    output
        Folder for results.
    seeds
        Of networks, removed examples and flipped labels.
    dampings
        Added to the curvature.
    clusters
        How many clusters summaries keep apart.
    hidden
        Units of the hidden layers; default 32, 32 for concrete, 16 for mnist, 24, 24 for mislabels.
    epochs
        Of training, one network each; default 40 for concrete, 30 for mnist, 10 and 200 for
        mislabels.
    num_train
        Training images: the first ones; default 1,000 for mnist, 4,000 for mislabels.
    num_test
        Test images whose losses are looked at.
    removed
        How many examples are removed, one at a time.
    wrong
        Share of labels that are made wrong.
    data_dir
        As for `reproductions.train`; ``uci/concrete`` or ``mnist.npz`` in it.
    """

    study: Name
    output: Path
    seeds: tuple[int, ...] = (0,)
    dampings: tuple[float, ...] = (1e-3, 1e-1)
    clusters: tuple[int, ...] = (1, 8, 40)
    hidden: tuple[int, ...] | None = None
    epochs: tuple[int, ...] | None = None
    num_train: int | None = None
    num_test: int = 200
    removed: int = 20
    wrong: float = 0.1
    data_dir: Path | None = None


@dataclass(frozen=True)
class _Data:
    """Standardised inputs and targets, float64."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study from the command line.

    Returns
    -------
    int
        0, or 2 when something was refused.
    """
    import tyro

    options = tyro.cli(Study, args=argv)
    return report(options.output / f"influence-{options.study}.md", study(options), _table)


def study(options: Study) -> Iterator[dict[str, Any]]:
    """Results of one seed after the other; finished ones are read from their files.

    Yields
    ------
    dict
        Settings, how well the network does, and rows by method.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        path = options.output / f"influence-{options.study}-{seed}.json"
        result = read_result(path)
        if result is None:
            one = _wrong_labels if options.study == "mislabels" else _responses
            result = {"study": options.study, "seed": seed, **one(options, seed)}
            write_result(path, result)
            print(f"seed {seed}: {path}", flush=True)
        yield result


# --- influence ------------------------------------------------------------------------------------


def _responses(options: Study, seed: int) -> dict[str, Any]:
    """Retrained responses to removals, and how the linearised ones correlate with them."""
    loss = _LOSSES[options.study]
    data = _concrete(options) if options.study == "concrete" else _digits(options, 1000)
    default = ((32, 32), 40) if options.study == "concrete" else ((16,), 30)
    (epochs,) = options.epochs or (default[1],)
    net = _trained(data, options.hidden or default[0], loss, epochs, seed)
    order = torch.randperm(len(data.x), generator=stream(seed, "influence", "removed"))
    removed = order[: options.removed]
    exact = ExactDistance.of(net, data.x, batch_size=len(data.x))
    curvature = GaussNewton.of(exact, metric=_METRICS[loss])
    gradients = ExampleGradients(curvature.reference, curvature.space, loss)
    asked = _Asked.of(gradients, data, removed)
    truths = {}
    for damping in options.dampings:
        truths[damping] = _retrained(exact, curvature.solver(damping), data, removed, loss)
        print(f"damping {damping:g}: retrained", flush=True)
    rows = []
    for name, measure, estimator in _measures(net, data, loss, options.clusters, seed):
        begun = perf_counter()
        own = GaussNewton.of(measure, metric=_METRICS[loss], estimator=estimator)
        for damping in options.dampings:
            found = asked.predicted(own.solver(damping), len(data.x))
            row = {"method": name, "damping": damping, **_agreement(found, truths[damping])}
            row["cosine"] = _cosine(own.dense(), curvature.dense())
            row["seconds"] = perf_counter() - begun
            row["bytes"] = measure.num_bytes
            rows.append(row)
            print(_line(row, options.study), flush=True)
    arrived = {str(d): float(t.arrived.mean()) for d, t in truths.items()}
    return {**_scores_of(net, data, loss), "arrived": arrived, "rows": rows}


@dataclass(frozen=True)
class _Changes:
    """Of ``M`` removals: own losses ``(M,)``, test losses ``(M, Q)`` and outputs ``(M, Q K)``.

    And whether each search for a retrained response arrived, ``(M,)``.
    """

    own: Tensor
    losses: Tensor
    outputs: Tensor
    arrived: Tensor


@dataclass(frozen=True)
class _Asked:
    """Gradients of removed examples, test losses and test outputs."""

    removed: Tensor
    losses: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, gradients: ExampleGradients, data: _Data, removed: Tensor) -> _Asked:
        """Compute them all."""
        everything = torch.arange(len(data.test_x))
        train = Examples.read((data.x, data.y)).select(removed)
        test = Examples.read((data.test_x, data.test_y)).select(everything)
        jacobians = gradients.output_rows(test)[1].flatten(0, 1)
        return cls(gradients.rows(train)[1], gradients.rows(test)[1], jacobians)

    def predicted(self, solver: Solver[GaussNewton], total: int) -> _Changes:
        """Linearised responses."""
        moved = solver.solve(self.removed.T).vectors / total
        own = (self.removed.T * moved).sum(0)
        always = torch.ones(len(own))
        return _Changes(own, (self.losses @ moved).T, (self.outputs @ moved).T, always)


def _retrained(
    exact: ExactDistance, solver: Solver[GaussNewton], data: _Data, removed: Tensor, loss: str
) -> _Changes:
    # Cross-entropy is unbounded above, with an exact distance too: there its tangent is removed.
    removal = "loss" if loss == "squared" else "linearised"
    own, losses, outputs, arrived = [], [], [], []
    for number in removed.tolist():
        found = proximal_response(
            exact,
            (data.x[number], data.y[number]),
            loss,
            damping=solver.damping,
            removal=removal,
            num_examples=len(data.x),
            solver=solver,
            tolerance=1e-4,
        )
        itself = (data.x[number : number + 1], data.y[number : number + 1])
        own.append(found.loss_changes(itself)[0])
        losses.append(found.loss_changes((data.test_x, data.test_y)))
        outputs.append(found.output_changes((data.test_x, data.test_y)).flatten())
        arrived.append(float(found.status == "pass"))
    return _Changes(
        torch.stack(own), torch.stack(losses), torch.stack(outputs), torch.tensor(arrived)
    )


def _agreement(found: _Changes, truth: _Changes) -> dict[str, float]:
    """Correlations over the removals whose retrained response was found.

    The objective of a classifier need not have a minimum: for an example that the network gets
    wrong the removed term can outgrow KL and weak damping.
    """
    kept = truth.arrived > 0
    own, own_truth = found.own[kept], truth.own[kept]
    return {
        "self_pearson": _pearson(own, own_truth),
        "self_spearman": _pearson(_ranks(own), _ranks(own_truth)),
        "per_removed": mean(map(_pearson, found.losses[kept], truth.losses[kept])),
        "outputs": mean(map(_pearson, found.outputs[kept], truth.outputs[kept])),
    }


def _pearson(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def _cosine(first: Tensor, second: Tensor) -> float:
    return float((first * second).sum() / (first.norm() * second.norm()))


# --- wrong labels ---------------------------------------------------------------------------------


def _wrong_labels(options: Study, seed: int) -> dict[str, Any]:
    clean = _digits(options, 4000)
    generator = stream(seed, "influence", "wrong labels")
    wrong = torch.zeros(len(clean.y), dtype=torch.bool)
    order = torch.randperm(len(wrong), generator=generator)
    wrong[order[: round(options.wrong * len(wrong))]] = True
    shift = torch.randint(1, 10, wrong.shape, generator=generator)
    labels = torch.where(wrong, (clean.y + shift) % 10, clean.y)
    data = _Data(clean.x, labels, clean.test_x, clean.test_y)
    damping = options.dampings[-1]
    networks = []
    for epochs in options.epochs or (10, 200):
        net = _trained(data, options.hidden or (24, 24), "cross_entropy", epochs, seed)
        rows: list[dict[str, Any]] = []
        for name, measure, estimator in _measures(
            net, data, "cross_entropy", options.clusters, seed
        ):
            found = find_wrong_labels(
                net, (data.x, data.y), measure, damping=damping, estimator=estimator
            )
            for detection in found.evaluate(wrong):
                method = f"self-influence, {name}"
                if detection.score != "self_influence":
                    method = detection.score.replace("_", " ")
                if all(row["method"] != method for row in rows):
                    scores = {
                        key: getattr(detection, key)
                        for key in ("auroc", "standard_error", "recall_10", "recall_20")
                    }
                    row = {"method": method, "epochs": epochs, **scores}
                    rows.append({**row, "seconds": found.cost.seconds})
                    print(_line(row, options.study), flush=True)
        networks.append({"epochs": epochs, **_scores_of(net, data, "cross_entropy"), "rows": rows})
    return {"damping": damping, "networks": networks}


# --- networks, data, distances --------------------------------------------------------------------


def _measures(
    net: nn.Module, data: _Data, loss: str, clusters: Sequence[int], seed: int
) -> Iterator[tuple[str, Any, str | None]]:
    """Every distance by its name, with the estimator of a summary.

    Yields
    ------
    tuple
        Name, measure, estimator.
    """
    metric = _METRICS[loss]
    pair = (data.x, data.y)
    yield "exact Gauss-Newton", ExactDistance.of(net, data.x, batch_size=len(data.x)), None
    yield "EK-FAC", KroneckerDistance.of(net, pair, metric=metric), None
    yield "diagonal", DiagonalDistance.of(net, pair, metric=metric), None
    for count in clusters:
        summary = summarize(
            net, data.x, clusters=count if count > 1 else None, layer_moments=True, seed=seed
        )
        for estimator in ("gated", "gaussian", "anchored"):
            label = f"{count} clusters" if count > 1 else "1 cluster"
            yield f"{estimator}, {label}", summary, estimator


def _trained(data: _Data, hidden: Sequence[int], loss: str, epochs: int, seed: int) -> nn.Module:
    """An MLP trained by Adam in batches of 32, float64."""
    outputs = data.y.shape[1] if loss == "squared" else 10
    sizes = [data.x.shape[1], *hidden, outputs]
    generator = stream(seed, "influence", "network")
    layers: list[nn.Module] = []
    for before, behind in pairwise(sizes):
        linear = nn.Linear(before, behind, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(
                torch.randn(linear.weight.shape, generator=generator) * (2 / before) ** 0.5
            )
            linear.bias.zero_()
        layers += [linear, nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(data.x), generator=generator).split(32):
            optimiser.zero_grad()
            _mean_loss(net, data.x[part], data.y[part], loss).backward()
            optimiser.step()
    return net.eval()


def _mean_loss(net: nn.Module, x: Tensor, y: Tensor, loss: str) -> Tensor:
    if loss == "squared":
        return (net(x) - y).square().sum(1).mean() / 2
    return functional.cross_entropy(net(x), y)


@torch.no_grad()
def _scores_of(net: nn.Module, data: _Data, loss: str) -> dict[str, float]:
    found = {
        "train_loss": float(_mean_loss(net, data.x, data.y, loss)),
        "test_loss": float(_mean_loss(net, data.test_x, data.test_y, loss)),
    }
    if loss == "cross_entropy":
        found["train_accuracy"] = float((net(data.x).argmax(1) == data.y).double().mean())
        found["test_accuracy"] = float((net(data.test_x).argmax(1) == data.test_y).double().mean())
    return found


def _concrete(options: Study) -> _Data:
    """UCI Concrete, first split: 927 to train, 103 to test."""
    folder = data_folder(options.data_dir) / "uci" / "concrete"
    try:
        values = np.loadtxt(folder / "data.csv.gz", delimiter=",")
        mask = np.loadtxt(folder / "test_mask.csv.gz", delimiter=",", ndmin=2)[:, 0] > 0
    except (OSError, ValueError) as error:
        raise DataError(
            str(error),
            where=str(folder),
            advice="reproductions/README.md says what the folder holds.",
        ) from error
    scaled = (values - values[~mask].mean(0)) / values[~mask].std(0)
    table, test = torch.from_numpy(scaled), torch.from_numpy(mask)
    train, held_out = table[~test], table[test]
    return _Data(train[:, :-1], train[:, -1:], held_out[:, :-1], held_out[:, -1:])


def _digits(options: Study, default: int) -> _Data:
    parts = []
    for split, count in (("train", options.num_train or default), ("test", options.num_test)):
        images = load_mnist(split, options.data_dir).slice(0, count)
        small = functional.avg_pool2d(standardise(unit_images(images.pixels), "mnist"), 2)
        parts += [small.flatten(1).double(), images.labels]
    return _Data(*parts)


# --- tables ---------------------------------------------------------------------------------------

_COLUMNS = {
    "concrete": ("self_pearson", "self_spearman", "per_removed", "outputs", "cosine"),
    "mnist": ("self_pearson", "self_spearman", "per_removed", "outputs", "cosine"),
    "mislabels": ("auroc", "recall_10", "recall_20"),
}

_SETTINGS = {"concrete": "damping", "mnist": "damping", "mislabels": "epochs"}


def _table(results: Sequence[dict[str, Any]]) -> str:
    """Means over seeds in Markdown, one row a method and setting."""
    name = results[0]["study"]
    setting, columns = _SETTINGS[name], _COLUMNS[name]
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for result in results:
        for part in result.get("networks", [result]):
            for row in part["rows"]:
                groups.setdefault((row[setting], row["method"]), []).append(row)
    header = [setting, "method", *(column.replace("_", " ") for column in columns)]
    lines = [f"| {' | '.join(header)} |", "|---|---|" + "---:|" * len(columns)]
    for group in groups.values():
        means = {column: mean(row[column] for row in group) for column in columns}
        lines.append(_line({**group[0], **means}, name))
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any], name: str) -> str:
    cells = [f"{row[column]:.3f}" for column in _COLUMNS[name]]
    return f"| {row[_SETTINGS[name]]:g} | {row['method']} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
