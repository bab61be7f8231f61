"""Train the networks whose uncertainty is reproduced: one file of weights for each seed.

    python -m reproductions.train --network lenet --epochs 8 --folder networks
    python -m reproductions.train --network resnet20 --num-train 20000 --epochs 30 --folder networks

Started again, it skips the seeds that are finished.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pushforward.errors import DataError, OptionError, PushforwardError
from pushforward.runs.progress import track
from pushforward.runs.rng import stream
from reproductions.datasets import DataName, Images, load_images, standardise, unit_images
from reproductions.networks import NETWORKS, NetworkName, num_bayesian_parameters

__all__ = ["Training", "load_trained", "main", "train", "training_images", "weights_path"]

DATA: dict[NetworkName, DataName] = {"lenet": "mnist", "resnet20": "cifar10"}

_EVALUATION_BATCH = 1000
_WARM_UP = 0.25  # of the steps: the learning rate rises


@dataclass(frozen=True)
class Training:
    """Train one network from several seeds.

    Parameters
    ----------
    network
        lenet is trained on MNIST, resnet20 on CIFAR-10.
    folder
        Where NETWORK-SEED.safetensors and NETWORK-SEED.json are written.
    seeds
        One network each.
    epochs
        Passes over the training images.
    num_train
        Use the first so many training images, the same for every seed; default all. Images that
        are left over can serve to validate.
    batch_size
        Images for one step; an incomplete last batch is left out.
    learning_rate
        At its peak; it rises for a quarter of the steps and falls to zero.
    weight_decay
        For all parameters outside the normalisation layers.
    precision
        Of the convolutions while training. Weights are kept, and results measured, in float32.
    data_dir
        Folder of the data; default what the environment variable PUSHFORWARD_DATA names.
    cache
        Folder for decoded images; default the folder `cache` in `folder`.
    """

    network: NetworkName
    folder: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 8
    num_train: int | None = None
    batch_size: int = 256
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    precision: Literal["float32", "bfloat16"] = "float32"
    data_dir: Path | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises
        ------
        OptionError
            If one is not positive.
        """
        for name in ("epochs", "num_train", "batch_size", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(
                    f"{value} is not positive", where=name, advice="Give a positive number."
                )

    def images(self, split: Literal["train", "test"]) -> Images:
        """All images of a split; `num_train` is not looked at."""
        cache = self.cache if self.cache is not None else self.folder / "cache"
        return load_images(DATA[self.network], split, self.data_dir, cache=cache)

    def settings(self, count: int) -> dict[str, Any]:
        """Everything that the weights of one seed depend on, `count` training images included."""
        return {
            "network": self.network,
            "data": DATA[self.network],
            "train_images": {"start": 0, "stop": count},
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "precision": self.precision,
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line asks and print one line for each seed; return the exit code."""
    import tyro

    options = tyro.cli(
        Training,
        args=list(argv) if argv is not None else None,
        prog="python -m reproductions.train",
        config=(tyro.conf.HelptextFromCommentsOff,),
    )
    try:
        for summary in train(options):
            print(
                f"{summary['network']} seed {summary['seed']}: "
                f"test accuracy {summary['test']['accuracy']:.4f}, "
                f"NLL {summary['test']['nll']:.4f}; train accuracy "
                f"{summary['train']['accuracy']:.4f}; {summary['seconds']:.0f} s",
                flush=True,
            )
    except PushforwardError as error:
        print(f"error: {error.where}: {error.what}\n  {error.advice}", file=sys.stderr)
        return 2
    return 0


def train(options: Training) -> Iterator[dict[str, Any]]:
    """Train every seed that is not finished.

    Parameters
    ----------
    options
        What to train.

    Yields
    ------
    dict
        The summary of each seed, as its JSON file holds it, when it is finished.

    Raises
    ------
    OptionError
        If there are fewer images than asked for or than one batch, or if the folder holds networks
        that were trained with other settings.
    """
    images, test = options.images("train"), options.images("test")
    count = len(images) if options.num_train is None else options.num_train
    if count > len(images):
        raise OptionError(
            f"there are only {len(images)} training images, not {count}",
            where="num_train",
            advice="Ask for fewer, or leave it out to use all.",
        )
    if options.batch_size > count:
        raise OptionError(
            f"a batch of {options.batch_size} is more than the {count} training images",
            where="batch_size",
            advice="Give a smaller batch.",
        )
    images = images.slice(0, count)
    settings = options.settings(count)
    # Refused before anything is trained, and not after an hour.
    finished = {seed: _finished(options, settings, seed) for seed in options.seeds}
    for seed in options.seeds:
        yield finished[seed] or _train_one(options, settings, images, test, seed)


def weights_path(folder: Path, network: NetworkName, seed: int) -> Path:
    """Where the weights of one seed are; its summary has the suffix .json instead."""
    return folder / f"{network}-{seed}.safetensors"


def load_trained(folder: Path, network: NetworkName, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Load a trained network.

    Parameters
    ----------
    folder, network, seed
        As they were trained.

    Returns
    -------
    torch.nn.Module
        In evaluation mode.
    dict
        Its summary: settings, the training images, accuracy.

    Raises
    ------
    DataError
        If it was not trained, or not to the end.
    """
    from safetensors.torch import load_file

    path = weights_path(folder, network, seed)
    if not (path.is_file() and path.with_suffix(".json").is_file()):
        raise DataError(
            f"{network} was not trained from seed {seed} here, or not to the end",
            where=str(folder),
            advice=f"Run python -m reproductions.train --network {network} --seeds {seed} "
            f"--folder {folder}.",
        )
    net = NETWORKS[network]()
    net.load_state_dict(load_file(path))
    return net.eval(), json.loads(path.with_suffix(".json").read_text())


def training_images(
    summary: dict[str, Any], data_dir: Path | None = None, *, cache: Path | None = None
) -> Images:
    """Exactly the images that a network was trained on, in the order of the file."""
    span = summary["train_images"]
    images = load_images(summary["data"], "train", data_dir, cache=cache)
    return images.slice(span["start"], span["stop"])


def _finished(options: Training, settings: dict[str, Any], seed: int) -> dict[str, Any] | None:
    """The summary of a finished seed, or None.

    Returns
    -------
    dict or None
        As the JSON file holds it.

    Raises
    ------
    OptionError
        If it was trained with other settings.
    """
    path = weights_path(options.folder, options.network, seed).with_suffix(".json")
    if not path.exists():
        return None
    summary: dict[str, Any] = json.loads(path.read_text())
    for name, value in settings.items():
        if summary.get(name) != value:
            raise OptionError(
                f"{name} was {summary.get(name)} and is now {value}",
                where=str(path),
                advice="Name another folder, or remove the networks in this one.",
            )
    return summary


def _train_one(
    options: Training, settings: dict[str, Any], images: Images, test: Images, seed: int
) -> dict[str, Any]:
    start = perf_counter()
    net = NETWORKS[options.network](seed=seed)
    losses = _optimise(net, options, images, seed)
    seconds = perf_counter() - start
    net.eval()
    summary = {
        **settings,
        "seed": seed,
        "num_parameters": sum(p.numel() for p in net.parameters()),
        "num_bayesian_parameters": num_bayesian_parameters(net),
        "train": _quality(net, images),
        "test": _quality(net, test),
        "loss_by_epoch": losses,
        "seconds": seconds,
        "torch": torch.__version__,
    }
    _write(options, net, summary)
    return summary


def _optimise(net: nn.Module, options: Training, images: Images, seed: int) -> list[float]:
    """Run SGD with Nesterov's momentum; return the mean training loss of every epoch."""
    net.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.SGD(
        _parameter_groups(net, options.weight_decay),
        lr=options.learning_rate,
        momentum=0.9,
        nesterov=True,
    )
    steps = len(images) // options.batch_size
    total = options.epochs * steps
    losses = []
    with track(total, f"{options.network} seed {seed}") as advance:
        for epoch in range(options.epochs):
            generator = stream(seed, "reproductions", options.network, "epoch", epoch)
            order = torch.randperm(len(images), generator=generator)
            loss_sum = 0.0
            for step in range(steps):
                chosen = order[step * options.batch_size : (step + 1) * options.batch_size]
                pixels = images.pixels[chosen]
                if images.name == "cifar10":
                    pixels = _augmented(pixels, generator)
                inputs = standardise(unit_images(pixels), images.name)
                rate = options.learning_rate * _one_cycle((epoch * steps + step) / total)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                loss_sum += _step(net, optimiser, inputs, images.labels[chosen], options.precision)
                advance(1)
            losses.append(loss_sum / steps)
    net.to(memory_format=torch.contiguous_format)
    return losses


def _step(
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
    precision: str,
) -> float:
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        outputs = net(inputs)
    loss = functional.cross_entropy(outputs.float(), labels)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return loss.item()


def _parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay what has a Gaussian prior later on: everything outside the normalisation layers."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in net.modules():
        group = free if isinstance(module, nn.BatchNorm2d) else decayed
        group.extend(module.parameters(recurse=False))
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def _one_cycle(done: float) -> float:
    """The learning rate over its peak, when the fraction `done` of all steps is done."""
    if done < _WARM_UP:
        return 0.05 + 0.95 * done / _WARM_UP
    return 0.5 * (1.0 + math.cos(math.pi * (done - _WARM_UP) / (1.0 - _WARM_UP)))


def _augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shift every image by up to 4 pixels, black beyond the border, and mirror every other one.

    Returns
    -------
    Tensor
        Of the shape and type of `pixels`, ``(B, 3, 32, 32)`` uint8.
    """
    size, batch = pixels.shape[-1], len(pixels)
    shift = torch.randint(0, 9, (2, batch), generator=generator)
    mirror = torch.rand(batch, generator=generator) < 0.5
    windows = functional.pad(pixels, (4, 4, 4, 4)).unfold(2, size, 1).unfold(3, size, 1)
    cropped = windows[torch.arange(batch), :, shift[0], shift[1]]
    return torch.where(mirror.view(-1, 1, 1, 1), cropped.flip(3), cropped)


def _quality(net: nn.Module, images: Images) -> dict[str, float]:
    """Accuracy, negative log-likelihood and calibration error (15 equal bins), not augmented."""
    inputs = zip(
        images.pixels.split(_EVALUATION_BATCH), images.labels.split(_EVALUATION_BATCH), strict=True
    )
    logs, hits, losses = [], [], []
    with torch.no_grad():
        for pixels, labels in inputs:
            outputs = net(standardise(unit_images(pixels), images.name)).double()
            log_probabilities = outputs.log_softmax(dim=1)
            best = log_probabilities.max(dim=1)
            logs.append(best.values)
            hits.append((best.indices == labels).double())
            losses.append(functional.nll_loss(log_probabilities, labels, reduction="none"))
    confidence, hit = torch.cat(logs).exp(), torch.cat(hits)
    place = (confidence * 15).ceil().long().clamp(1, 15) - 1
    gaps = torch.zeros(15, dtype=torch.float64).index_add_(0, place, confidence - hit)
    return {
        "accuracy": hit.mean().item(),
        "nll": torch.cat(losses).mean().item(),
        "ece": (gaps.abs().sum() / len(hit)).item(),
    }


def _write(options: Training, net: nn.Module, summary: dict[str, Any]) -> None:
    """The summary last: where it is, the seed is finished."""
    from safetensors.torch import save_file

    options.folder.mkdir(parents=True, exist_ok=True)
    path = weights_path(options.folder, options.network, summary["seed"])
    state = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, path)
    path.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
