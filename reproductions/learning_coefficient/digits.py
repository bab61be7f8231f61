"""Whether checkpoints of a classifier of digits come in the order in which HMC has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

import pushforward as pf
from pushforward.runs.rng import stream
from reproductions.learning_coefficient.estimates import estimated, stored_estimate
from reproductions.learning_coefficient.perceptron import perceptron
from reproductions.results import settings_of

__all__ = ["Digits", "digits", "digits_table"]

Sampler = Literal["hmc", "mala", "langevin", "sgld"]


@dataclass(frozen=True)
class Digits:
    """Checkpoints of a small classifier of digits.

    Parameters
    ----------
    output
        Folder for results.
    steps
        Of Adam, after which the coefficient is estimated.
    samplers
        That are compared with the first.
    localization
        gamma.
    seeds
        Of the networks.
    chains, draws, warmup
        As in `DeepLinear`.
    """

    output: Path
    steps: tuple[int, ...] = (400, 1600, 6400)
    samplers: tuple[Sampler, ...] = ("hmc", "langevin", "sgld")
    localization: float = 50.0
    seeds: tuple[int, ...] = (0,)
    chains: int = 8
    draws: int | None = None
    warmup: int | None = None


def digits(options: Digits) -> Iterator[dict[str, Any]]:
    """Estimates by every sampler at every checkpoint.

    Yields
    ------
    dict
        The estimate.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    count = len(labels) * 4 // 5
    x = torch.tensor(images[:count] / 16, dtype=torch.float32)
    y = torch.tensor(labels[:count])
    for seed in options.seeds:
        nets: dict[int, nn.Module] | None = None
        for sampler in options.samplers:
            for step in options.steps:
                left_out = ("output", "seeds", "samplers", "steps")
                settings = settings_of(options, left_out, seed=seed, sampler=sampler, step=step)

                def estimate(step: int = step, seed: int = seed, s: str = sampler) -> Any:
                    nonlocal nets
                    nets = nets or dict(_checkpoints(x, y, max(options.steps), seed, options.steps))
                    return estimated(
                        nets[step],
                        (x, y),
                        pf.Categorical(),
                        sampler=s,
                        localization=options.localization,
                        num_chains=options.chains,
                        num_draws=options.draws,
                        num_warmup=options.warmup,
                        seed=seed,
                    )

                path = options.output / f"digits-{seed}-{sampler}-{step}.json"
                yield stored_estimate(path, settings, estimate)


def _checkpoints(
    x: Tensor, y: Tensor, most: int, seed: int, wanted: Sequence[int]
) -> Iterator[tuple[int, nn.Module]]:
    """A perceptron 64-32-10 on the way, trained by Adam on batches of 128."""
    net = perceptron((64, 32, 10), seed)
    optimiser, generator = torch.optim.Adam(net.parameters(), 1e-3), stream(seed, "batches")
    for step in range(1, most + 1):
        chosen = torch.randint(len(y), (128,), generator=generator)
        optimiser.zero_grad()
        functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimiser.step()
        if step in wanted:
            copy = perceptron((64, 32, 10), seed)
            copy.load_state_dict(net.state_dict())
            yield step, copy.eval()


def digits_table(results: Sequence[dict[str, Any]]) -> str:
    """One row for each sampler, and whether it orders the checkpoints like the first."""
    samplers = list(dict.fromkeys(found["settings"]["sampler"] for found in results))
    steps = list(dict.fromkeys(found["settings"]["step"] for found in results))
    at = {
        (f["settings"]["seed"], f["settings"]["sampler"], f["settings"]["step"]): f for f in results
    }
    lines = [
        f"# Digits, gamma {results[0]['localization']:g}",
        "",
        "| seed | sampler | " + " | ".join(f"{step} steps" for step in steps) + " | order |",
        "|---:|---|" + "---:|" * len(steps) + "---|",
    ]
    for seed in dict.fromkeys(found["settings"]["seed"] for found in results):
        orders = []
        for sampler in samplers:
            found = [at[seed, sampler, step] for step in steps]
            cells = [
                f"{f['value']:.2f} ± {f['standard_error']:.2g} {f['verdict']}, "
                f"{f['cpu_seconds']:.0f} s"
                for f in found
            ]
            orders.append(sorted(steps, key=lambda step: at[seed, sampler, step]["value"]))
            same = "the same" if orders[-1] == orders[0] else "another"
            lines.append(f"| {seed} | {sampler} | {' | '.join(cells)} | {same} |")
    return "\n".join([*lines, ""])
