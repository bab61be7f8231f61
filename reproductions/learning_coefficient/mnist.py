"""Whether entropy-SGD finds solutions of a smaller coefficient than SGD (arXiv 2308.12108)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import pushforward as pf
from pushforward.errors import OptionError
from reproductions.datasets import load_images
from reproductions.learning_coefficient.estimates import count_verdicts, estimated, stored_estimate
from reproductions.learning_coefficient.optimisers import entropy_sgd, minibatch_gradients, sgd
from reproductions.learning_coefficient.perceptron import perceptron
from reproductions.results import mean_and_spread, settings_of

__all__ = ["Mnist", "mnist", "mnist_table"]

Optimiser = Literal["sgd", "entropy-sgd"]


@dataclass(frozen=True)
class Mnist:
    """SGD against entropy-SGD on MNIST.

    Parameters
    ----------
    output
        Folder for networks and results.
    hidden
        Widths of the hidden layers; published 1024 1024.
    seeds
        Of the networks, one by each optimiser.
    epochs
        Passes over the training images; published 200.
    num_train
        The first training images; published all 60,000.
    batch_size, learning_rate, momentum
        Of SGD, with Nesterov's momentum; entropy-SGD has the same.
    localizations
        gamma; published 100, with 10 and 1000 to compare.
    sampler
        That estimates the coefficient.
    realisable
        Whether the targets are the network's own predictions, of which it is a minimum.
    chains, draws, warmup
        As in `DeepLinear`.
    data_dir
        Folder of the data; default what the environment variable PUSHFORWARD_DATA names.
    """

    output: Path
    hidden: tuple[int, ...] = (1024, 1024)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 200
    num_train: int = 60_000
    batch_size: int = 512
    learning_rate: float = 0.01
    momentum: float = 0.9
    localizations: tuple[float, ...] = (10.0, 100.0, 1000.0)
    sampler: Literal["langevin", "sgld"] = "langevin"
    realisable: bool = False
    chains: int = 4
    draws: int | None = None
    warmup: int | None = None
    data_dir: Path | None = None


def mnist(options: Mnist) -> Iterator[dict[str, Any]]:
    """Networks of both optimisers and their coefficients, seed after seed.

    Yields
    ------
    dict
        Optimiser, seed, errors and loss of the network, the estimate.

    Raises
    ------
    OptionError
        When there are fewer images than asked for.
    """
    train, test = (load_images("mnist", split, options.data_dir) for split in ("train", "test"))
    if options.num_train > len(train):
        raise OptionError(
            f"there are only {len(train)} training images, not {options.num_train}",
            where="num_train",
            advice="Ask for fewer.",
        )
    train = train.slice(0, options.num_train)
    x, y = train.inputs().flatten(1), train.labels
    test_x, test_y = test.inputs().flatten(1), test.labels
    for seed in options.seeds:
        for optimiser in ("sgd", "entropy-sgd"):
            net = _trained(options, optimiser, seed, x, y)
            scores = _scores(net, x, y, "train") | _scores(net, test_x, test_y, "test")
            for gamma in options.localizations:
                left_out = ("output", "seeds", "localizations", "data_dir")
                own = {"seed": seed, "optimiser": optimiser, "gamma": gamma}
                settings = settings_of(options, left_out, **own)

                def estimate(
                    net: nn.Module = net,
                    scores: dict[str, float] = scores,
                    gamma: float = gamma,
                    seed: int = seed,
                ) -> Any:
                    return scores | estimated(
                        net,
                        (x, y),
                        pf.Categorical(),
                        sampler=options.sampler,
                        localization=gamma,
                        realisable=options.realisable,
                        num_chains=options.chains,
                        num_draws=options.draws,
                        num_warmup=options.warmup,
                        seed=seed,
                    )

                kind = "-realisable" if options.realisable else ""
                path = options.output / f"mnist-{optimiser}-{seed}-{gamma:g}{kind}.json"
                yield stored_estimate(path, settings, estimate)


def _trained(
    options: Mnist, optimiser: Optimiser, seed: int, x: Tensor, y: Tensor
) -> nn.Sequential:
    """A network from its file, or trained now."""
    from safetensors.torch import load_file, save_file

    net = perceptron((784, *options.hidden, 10), seed)
    shape = "-".join(map(str, options.hidden))
    path = options.output / (
        f"network-{shape}-{optimiser}-{options.num_train}-{options.epochs}-{options.batch_size}-"
        f"{options.learning_rate:g}-{options.momentum:g}-{seed}.safetensors"
    )
    if path.exists():
        net.load_state_dict(load_file(path))
        return net.eval()
    gradient = minibatch_gradients(net, x, y, options.batch_size, seed)
    steps = options.epochs * (-(-len(y) // options.batch_size))
    train = sgd if optimiser == "sgd" else entropy_sgd
    train(net, gradient, steps, options.learning_rate, options.momentum, seed)
    save_file(net.state_dict(), path)
    return net.eval()


@torch.no_grad()
def _scores(net: nn.Module, x: Tensor, y: Tensor, name: str) -> dict[str, float]:
    outputs = net(x)
    return {
        f"{name} error": float((outputs.argmax(-1) != y).double().mean()),
        f"{name} loss": float(functional.cross_entropy(outputs.double(), y)),
    }


def mnist_table(results: Sequence[dict[str, Any]]) -> str:
    """Errors and losses of the networks, and coefficients at each localisation."""
    first = results[0]["settings"]
    lines = [
        f"# MNIST 784-{'-'.join(map(str, first['hidden']))}-10, {first['num_train']:,} images, "
        f"{first['epochs']} epochs" + (", realisable" if first["realisable"] else ""),
        "",
        "Means over seeds ± standard deviations. Lower: seeds whose network by entropy-SGD has the "
        "smaller coefficient by more than two errors, larger, unclear.",
        "",
        "| | SGD | entropy-SGD |",
        "|---|---:|---:|",
    ]
    columns: tuple[Optimiser, Optimiser] = ("sgd", "entropy-sgd")
    gammas = list(dict.fromkeys(f["settings"]["gamma"] for f in results))

    def rows(optimiser: Optimiser, gamma: float) -> list[dict[str, Any]]:
        wanted = (optimiser, gamma)
        return [
            f for f in results if (f["settings"]["optimiser"], f["settings"]["gamma"]) == wanted
        ]

    for name in ("train error", "train loss", "test error", "test loss"):
        cells = [mean_and_spread([f[name] for f in rows(o, gammas[0])]) for o in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "| gamma | SGD | entropy-SGD | lower, larger, unclear | verdicts of SGD | of entropy-SGD |",
        "|---:|---:|---:|---|---|---|",
    ]
    for gamma in gammas:
        pair = [rows(optimiser, gamma) for optimiser in columns]
        cells = [mean_and_spread([f["value"] for f in found]) for found in pair]
        verdicts = [count_verdicts(found) for found in pair]
        signs = Counter(_comparison(a, b) for a, b in zip(*pair, strict=False))
        counts = ", ".join(str(signs[sign]) for sign in (-1, 1, 0))
        lines.append(f"| {gamma:g} | {' | '.join(cells)} | {counts} | {' | '.join(verdicts)} |")
    return "\n".join([*lines, ""])


def _comparison(sgd: dict[str, Any], entropy: dict[str, Any]) -> int:
    """-1 where entropy-SGD is lower by more than two standard errors, 1 where it is larger."""
    difference = entropy["value"] - sgd["value"]
    error = sqrt(sgd["standard_error"] ** 2 + entropy["standard_error"] ** 2)
    return 0 if abs(difference) <= 2 * error else (1 if difference > 0 else -1)
