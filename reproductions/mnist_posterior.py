"""Posterior samples on MNIST: test error against sweeps for Gibbs, HMC and MALA.

    python -m reproductions.mnist_posterior --network mlp --sampler gibbs --steps 1000

The networks of arXiv 2306.02729, figure 3: an MLP 784-12-10 and a small convolutional network, ReLU
throughout, each weight with prior precision equal to its fan-in. Gibbs samples the posterior with
noise of variance ``noise`` behind every map and labels by argmax; HMC and MALA the one whose log
likelihood is minus the cross-entropy over twice the noise. Equal noise is not an equal model.
Chains start at (almost) zero. Started again, a run goes on where it was.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

import pushforward as pf
from pushforward.errors import PushforwardError
from reproductions.datasets import load_images, unit_images

__all__ = ["MnistPosterior", "main", "run"]

_NOISE = {("mlp", "gibbs"): 2.0, ("cnn", "gibbs"): 100.0}
_CLASSICAL_NOISE = {"mlp": 2.0, "cnn": 10.0}
_STEP = {"mlp": 1e-3, "cnn": 1e-3}
_MALA_STEP = {"mlp": 4e-6, "cnn": 1e-5}
_TEST_IMAGES = 5000


@dataclass(frozen=True)
class MnistPosterior:
    """Sample a posterior on MNIST and follow the test error.

    Parameters
    ----------
    network
        mlp or cnn.
    sampler
        gibbs, hmc or mala.
    output
        Folder for the trace and the state.
    steps
        Sweeps, trajectories or steps.
    every
        Steps from one record to the next.
    noise
        Variance; default as published.
    step_size
        Of HMC and MALA; default as published.
    leapfrogs
        Of a trajectory of HMC.
    chains
        That run side by side.
    num_train
        Training images, the first ones.
    double
        float64 throughout instead of float32.
    seed
        Of the chain.
    data_dir, cache
        As for `reproductions.train`.
    """

    network: Literal["mlp", "cnn"] = "mlp"
    sampler: Literal["gibbs", "hmc", "mala"] = "gibbs"
    output: Path = Path("results")
    steps: int = 1000
    every: int = 10
    noise: float | None = None
    step_size: float | None = None
    leapfrogs: int = 200
    chains: int = 1
    num_train: int = 60000
    double: bool = False
    seed: int = 0
    data_dir: Path | None = None
    cache: Path | None = None


def build(network: str) -> nn.Sequential:
    """The network of the paper; its weights are all zero.

    Returns
    -------
    torch.nn.Sequential
        From ``(B, 1, 28, 28)`` to ``(B, 10)``.
    """
    if network == "mlp":
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10))
    else:
        net = nn.Sequential(
            nn.Conv2d(1, 2, 4, stride=2),
            nn.AvgPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 10),
        )
    for parameter in net.parameters():  # a checkpoint knows the network it belongs to
        nn.init.zeros_(parameter)
    return net


def run(options: MnistPosterior) -> dict[str, Any]:
    """One chain or several, and the test error on the way.

    Returns
    -------
    dict
        Settings and traces.
    """
    dtype = torch.float64 if options.double else torch.float32
    cache = options.cache or options.output / "cache"
    x, y = _images("train", options, cache, dtype)
    x, y = x[: options.num_train], y[: options.num_train]
    test_x, test_y = _images("test", options, cache, dtype)
    test_x, test_y = test_x[:_TEST_IMAGES], test_y[:_TEST_IMAGES]
    net = build(options.network).to(dtype)
    noise = options.noise or _NOISE.get(
        (options.network, options.sampler), _CLASSICAL_NOISE[options.network]
    )
    kernel, initial = _kernel(options, net, x, y, noise)

    def record(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        scores = functional_call(net, parameters, (test_x,))
        wrong = (scores.argmax(-1) != test_y).to(scores.dtype).mean()
        return {"test error": wrong, "class votes": nn.functional.one_hot(scores.argmax(-1), 10)}

    name = f"{options.network}-{options.sampler}-{noise:g}-{options.seed}"
    began = perf_counter()
    chains = pf.sample(
        kernel,
        num_draws=max(1, options.steps // options.every),
        num_chains=options.chains,
        num_warmup=0,
        thin=options.every,
        initial=initial,
        record=record,
        keep_parameters=False,
        seed=options.seed,
        checkpoint=options.output / f"{name}-run",
    )
    errors = chains.observations["test error"]
    votes = chains.observations["class votes"][:, errors.shape[1] // 2 :].double().mean((0, 1))
    steps = [(i + 1) * options.every for i in range(errors.shape[1])]
    late = errors[:, errors.shape[1] // 2 :].double()
    result = {
        "network": options.network,
        "sampler": options.sampler,
        "noise": noise,
        "chains": options.chains,
        "training images": len(x),
        "seconds": perf_counter() - began,
        "seconds a step": chains.cost.seconds / max(1, chains.cost.evaluations // options.chains),
        "steps": steps,
        "test error": errors.mean(0).tolist(),
        "test error, second half": float(late.mean()),
        "its spread": float(late.std()) if late.numel() > 1 else 0.0,
        "test error of the vote": float((votes.argmax(-1) != test_y).double().mean()),
        "acceptance": float(chains.statistics["acceptance"].mean())
        if "acceptance" in chains.statistics
        else None,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{name}.json"
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Returns
    -------
    int
        0, or 2 when something was refused.
    """
    import tyro

    options = tyro.cli(MnistPosterior, args=argv)
    try:
        result = run(options)
    except PushforwardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = [i for i, step in enumerate(result["steps"]) if _is_shown(step, options.every)]
    for i in sorted({*shown, len(result["steps"]) - 1}):
        print(f"{result['steps'][i]:8,} steps  test error {100 * result['test error'][i]:.2f} %")
    print(
        f"second half {100 * result['test error, second half']:.2f} % (spread "
        f"{100 * result['its spread']:.2f}), vote {100 * result['test error of the vote']:.2f} %, "
        f"{result['seconds a step']:.3g} s a step"
    )
    return 0


def _is_shown(step: int, every: int) -> bool:
    """Powers of two in the number of records."""
    count = step // every
    return count & (count - 1) == 0


def _images(
    split: Literal["train", "test"], options: MnistPosterior, cache: Path, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    train = load_images("mnist", "train", options.data_dir, cache=cache)
    found = (
        train if split == "train" else load_images("mnist", split, options.data_dir, cache=cache)
    )
    reference = unit_images(train.pixels)
    mean, std = reference.mean(), reference.std()
    return ((unit_images(found.pixels) - mean) / std).to(dtype), found.labels


def _kernel(
    options: MnistPosterior, net: nn.Sequential, x: Tensor, y: Tensor, noise: float
) -> tuple[Any, dict[str, Tensor]]:
    shapes = {name: p.shape for name, p in net.named_parameters()}
    fan_in = {
        name: float(prod(net.get_submodule(name.partition(".")[0]).weight.shape[1:]))
        for name in shapes
    }
    if options.sampler == "gibbs":
        model = pf.IntermediateNoiseNetwork(net, noise, noise, "classification")
        kernel = pf.gibbs(model, x, y)
        return kernel, kernel.zero_start(options.chains)
    potential = pf.Potential.of_network(
        net,
        (x, y),
        pf.Categorical(),
        prior_precision=fan_in,
        inverse_temperature=1 / (2 * noise),
    )
    generator = torch.Generator().manual_seed(options.seed)
    scale = 0.1 if options.sampler == "hmc" else 1e-4
    initial = {
        name: scale * torch.randn(options.chains, *shape, generator=generator).to(x.dtype)
        for name, shape in shapes.items()
    }
    if options.sampler == "hmc":
        step = options.step_size or _STEP[options.network]
        return pf.HMC(
            potential, step_size=step, num_steps=options.leapfrogs, jitter=0.0, mass="identity"
        ), initial
    step = options.step_size or _MALA_STEP[options.network]
    return pf.MALA(potential, step_size=step, mass="identity"), initial


if __name__ == "__main__":
    sys.exit(main())
