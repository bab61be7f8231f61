"""How sure trained image classifiers are: MAP, MAP with a temperature, last layer, all layers.

    python -m reproductions.uncertainty --network lenet --networks networks --output results

For every seed one JSON file, and a table of their means. Started again, it skips the seeds that are
finished and resumes a posterior that was interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

import pushforward as pf
from pushforward.linearised_laplace.calibration import (
    accuracy,
    auroc,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
)
from reproductions.datasets import (
    CORRUPTIONS,
    DataName,
    corrupt,
    load_images,
    out_of_distribution,
    rotate,
    standardise,
    unit_images,
)
from reproductions.networks import NetworkName
from reproductions.results import mean_and_spread, read_result, report, write_result
from reproductions.train import DATA, load_trained, training_images

__all__ = ["Uncertainty", "main", "study"]

_ANGLES = (15, 30, 45, 60)
_BATCH = 500

Predict = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Uncertainty:
    """Compare ways to be uncertain.

    Parameters
    ----------
    network
        lenet or resnet20, as trained by `reproductions.train`.
    networks
        Folder of the trained networks.
    output
        Folder for results and posteriors.
    seeds
        Of the trained networks.
    draws
        Posterior draws of all layers.
    prior
        Of all layers and of the last one.
    prior_precision
        Of all layers; default learned, which takes most of the time.
    num_train
        Training images that the posterior over all layers sees, the first ones; default all that
        the network was trained on, which the one over the last layer always sees. With fewer there
        is one more row, in which each of them counts for several, so that they stand for all.
    num_validation
        Test images, the first ones, on which temperatures are fitted; the rest is tested on.
    num_test
        At most so many test images.
    data_dir, cache
        As for `reproductions.train`.
    """

    network: NetworkName
    networks: Path
    output: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    draws: int = 64
    prior: Literal["isotropic", "layerwise", "gprior"] = "gprior"
    prior_precision: float | None = None
    num_train: int | None = None
    num_validation: int = 2000
    num_test: int = 8000
    data_dir: Path | None = None
    cache: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study from the command line.

    Returns
    -------
    int
        0, or 2 when something was refused.
    """
    import tyro

    options = tyro.cli(Uncertainty, args=argv)
    return report(options.output / f"{options.network}.md", study(options), _table)


def study(options: Uncertainty) -> Iterator[dict[str, Any]]:
    """Results of one seed after the other.

    Yields
    ------
    dict
        Settings, scores by method, the posterior's own numbers.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    name = DATA[options.network]
    cache = options.cache or options.networks / "cache"
    shifted: _Shifted | None = None
    for seed in options.seeds:
        path = options.output / f"{options.network}-{seed}.json"
        result = read_result(path)
        if result is None:
            shifted = shifted or _shifts(options, name, cache)
            result = _one_seed(options, seed, shifted, cache)
            write_result(path, result)
            print(f"seed {seed}: {path}", flush=True)
        yield result


@dataclass(frozen=True)
class _Shifted:
    """Standardised test images, as they are, shifted, and from elsewhere."""

    labels: Tensor
    clean: Tensor
    validation: tuple[Tensor, Tensor]
    shifts: dict[str, Tensor]
    elsewhere: dict[str, Tensor]


def _shifts(options: Uncertainty, name: DataName, cache: Path) -> _Shifted:
    test = load_images(name, "test", options.data_dir, cache=cache)
    images, first = unit_images(test.pixels), options.num_validation
    kept = slice(first, first + options.num_test)
    shifts: dict[str, Tensor] = {}
    if name == "mnist":
        for angle in _ANGLES:
            shifts[f"rotation {angle}"] = rotate(images[kept], angle)
    else:
        for kind in CORRUPTIONS:
            for severity in (1, 3, 5):
                shifts[f"{kind} {severity}"] = corrupt(images[kept], kind, severity)
    elsewhere = out_of_distribution(name, options.data_dir, cache=cache)
    return _Shifted(
        test.labels[kept],
        standardise(images[kept], name),
        (standardise(images[:first], name), test.labels[:first]),
        {key: standardise(value, name) for key, value in shifts.items()},
        {key: standardise(value[kept], name) for key, value in elsewhere.items()},
    )


def _one_seed(options: Uncertainty, seed: int, shifted: _Shifted, cache: Path) -> dict[str, Any]:
    net, summary = load_trained(options.networks, options.network, seed)
    train = training_images(summary, options.data_dir, cache=cache)
    data = (train.inputs(), train.labels)
    likelihood = pf.Categorical()
    began = perf_counter()
    head = pf.laplace(net, data, likelihood, subset=_last_layer(net), prior=options.prior)
    head_seconds = perf_counter() - began
    share = 1.0
    if options.num_train is not None:
        share = options.num_train / len(train)
        train = train.slice(0, options.num_train)
        data = (train.inputs(), train.labels)
    folder = options.output / f"{options.network}-{seed}-run"
    posterior = pf.laplace(
        net,
        data,
        likelihood,
        method="sampled",
        prior=options.prior,
        prior_precision=options.prior_precision,
        num_draws=options.draws,
        seed=seed,
        checkpoint=folder,
    )
    posterior.save(options.output / f"{options.network}-{seed}-posterior.safetensors")
    with torch.no_grad():
        temperature = fit_temperature(_logits(net, shifted.validation[0]), shifted.validation[1])
    tempered = posterior.fit_temperature(shifted.validation)

    def predict(images: Tensor) -> dict[str, Tensor]:
        logits = _logits(net, images)
        moved = posterior.output_draws(images) - logits

        def average(temperature: float) -> Tensor:
            return (logits + temperature**0.5 * moved).softmax(-1).mean(0)

        found = {
            "MAP": logits.softmax(-1),
            "MAP, temperature": (logits / temperature).softmax(-1),
            "last layer, probit": head.predict(images).expected,
            "all layers, probit": likelihood.probit_mean(logits, moved.square().mean(0)),
            "all layers, Monte Carlo": average(1.0),
            "all layers, tempered": average(tempered.temperature),
        }
        if share < 1:
            # As if every image counted 1 / share times: H = M / share + A' with A' = A / share.
            found["all layers, for all images"] = average(share)
        return found

    return {
        "network": options.network,
        "seed": seed,
        "train_images": len(train),
        "draws": options.draws,
        "prior": options.prior,
        "temperature of MAP": temperature,
        "temperature of the posterior": tempered.temperature,
        "prior precision": posterior.prior_precision,
        "effective dimension": float(posterior.effective_dimension),
        "effective dimension, error": float(posterior.effective_dimension.standard_error),
        "seconds": posterior.cost.seconds,
        "seconds, last layer": head_seconds,
        "passes with one vector": posterior.cost.evaluations / len(train),
        "checks": [str(check) for check in posterior.checks],
        "scores": _scores(predict, shifted),
    }


def _last_layer(net: nn.Module) -> str:
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1]


@torch.no_grad()
def _logits(net: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([net(batch) for batch in images.split(_BATCH)])


def _scores(predict: Predict, shifted: _Shifted) -> dict[str, dict[str, float]]:
    """By method and score; every set of images goes through the networks once."""
    inside, labels = predict(shifted.clean), shifted.labels
    scores = {
        method: {
            "accuracy": float(accuracy(law, labels)),
            "NLL": float(negative_log_likelihood(law, labels)),
            "ECE": float(expected_calibration_error(law, labels)),
        }
        for method, law in inside.items()
    }
    for name, images in shifted.shifts.items():
        for method, law in predict(images).items():
            scores[method][f"NLL, {name}"] = float(negative_log_likelihood(law, labels))
    for name, images in shifted.elsewhere.items():
        for method, law in predict(images).items():
            found = auroc(_entropy(law), _entropy(inside[method]))
            scores[method][f"AUROC, {name}"] = float(found)
    return scores


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.special.xlogy(probabilities, probabilities).sum(-1)


def _table(results: Sequence[dict[str, Any]]) -> str:
    first = results[0]
    methods, columns = list(first["scores"]), list(first["scores"]["MAP"])
    lines = [
        f"# {first['network']}: {len(results)} seeds, {first['train_images']:,} training images, "
        f"{first['draws']} draws, {first['prior']} prior",
        "",
        "Means over seeds, and the standard deviation over seeds where there are several.",
        "",
        "| | " + " | ".join(methods) + " |",
        "|---|" + "---:|" * len(methods),
    ]
    for column in columns:
        cells = []
        for method in methods:
            values = [result["scores"][method][column] for result in results]
            cells.append(mean_and_spread(values))
        lines.append(f"| {column} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| seed | effective dimension | prior precision | time | passes with one vector |",
    ]
    lines.append("|---|---:|---:|---:|---:|")
    for result in results:
        precision = result["prior precision"]
        shown = f"{precision:.4g}" if isinstance(precision, float) else json.dumps(precision)
        lines.append(
            f"| {result['seed']} | {result['effective dimension']:.5g} ± "
            f"{result['effective dimension, error']:.2g} | {shown} | {result['seconds']:.0f} s | "
            f"{result['passes with one vector']:.0f} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
