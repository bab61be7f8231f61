"""Estimates for random deep linear networks beside exact values (arXiv 2402.03698)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log, sqrt
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import torch
from torch import Tensor

from pushforward.degeneracy.deep_linear_points import deep_linear_local
from pushforward.errors import OptionError
from pushforward.runs.rng import stream
from reproductions.learning_coefficient.estimates import count_verdicts, estimated, stored_estimate
from reproductions.learning_coefficient.linear_networks import (
    INPUT_VARIANCE,
    exact_quadratic,
    linear_network,
    stand_ins,
)
from reproductions.results import settings_of

__all__ = ["GROUPS", "DeepLinear", "Group", "deep_linear", "deep_linear_table", "name_of"]


@dataclass(frozen=True)
class Group:
    """Deep linear networks of about the same size, with the published settings."""

    widths: tuple[int, int]
    layers: tuple[int, int]
    examples: float
    step_size: float
    steps: int


GROUPS: dict[str, Group] = {
    "5-50": Group((5, 50), (2, 5), 1e5, 5e-7, 10_000),
    "5-100": Group((5, 100), (2, 10), 1e5, 5e-7, 10_000),
    "50-500": Group((50, 500), (2, 10), 1e6, 1e-7, 50_000),
    "100-1000": Group((100, 1000), (2, 20), 1e6, 2e-8, 50_000),
    "500-2000": Group((500, 2000), (2, 20), 1e6, 2e-8, 50_000),
    "500-3000": Group((500, 3000), (2, 40), 1e6, 2e-8, 50_000),
}


@dataclass(frozen=True)
class DeepLinear:
    """Deep linear networks, whose coefficient is known.

    Parameters
    ----------
    output
        Folder for results.
    group
        Range of the widths; layers and number of examples belong to it.
    networks
        How many, drawn with seeds 0, 1, ...
    widths
        Of one network, from inputs to outputs, in place of random ones.
    points
        generic: all factors have full rank. reduced: as published, each has, with probability one
        half, a lower one.
    method
        A sampler with settings of its own, or published: SGLD with the step size and number of
        steps of the publication, of which the last tenth counts.
    localization
        gamma; default the library's choice, and 1 for published, as there.
    inputs
        moments: as many examples as inputs, with exactly the second moments of the uniform law on
        [-10, 10]; on nothing else does the loss of a linear network without noise depend. uniform:
        examples of this law, taken in minibatches.
    examples
        Drawn for `inputs` uniform; the temperature is always that of the group.
    chains, draws, warmup
        Of the sampler; default the library's.
    """

    output: Path
    group: str = "5-50"
    networks: int = 20
    widths: tuple[int, ...] = ()
    points: Literal["generic", "reduced"] = "generic"
    method: Literal["hmc", "mala", "langevin", "sgld", "published"] = "hmc"
    localization: float | None = None
    inputs: Literal["moments", "uniform"] = "moments"
    examples: int = 10_000
    chains: int = 8
    draws: int | None = None
    warmup: int | None = None


def deep_linear(options: DeepLinear) -> Iterator[dict[str, Any]]:
    """Estimates for one network after the other.

    Yields
    ------
    dict
        Widths, exact values, the estimate.

    Raises
    ------
    OptionError
        For a group that does not exist.
    """
    if options.group not in GROUPS:
        raise OptionError(
            f"there is no group {options.group!r}",
            where="group",
            advice=f"Choose one of {', '.join(GROUPS)}.",
        )
    for seed in range(1 if options.widths else options.networks):
        settings = settings_of(options, ("output", "networks"), seed=seed)
        path = options.output / f"{name_of(options)}-{seed}.json"
        yield stored_estimate(path, settings, lambda seed=seed: _one_network(options, seed))


def name_of(options: DeepLinear) -> str:
    """How the names of its files begin."""
    kind = "-".join(map(str, options.widths)) or options.group
    return f"deep-linear-{kind}-{options.points}-{options.method}"


def _one_network(options: DeepLinear, seed: int) -> dict[str, Any]:
    group = GROUPS[options.group]
    generator = stream(seed, "deep linear", options.group)
    widths, ranks = _drawn(options, group, generator)
    net = linear_network(widths, ranks, generator)
    nbeta = group.examples / log(group.examples)
    data = _inputs(options, widths[0], generator)
    choice: dict[str, Any] = {"sampler": options.method, "num_draws": options.draws}
    choice["num_warmup"] = options.warmup
    gamma = options.localization
    if options.method == "published":
        tenth = group.steps // 10
        choice = {"sampler": "sgld", "step_size": group.step_size, "batch_size": len(data)}
        choice |= {"num_warmup": group.steps - tenth, "num_draws": tenth}
        if options.inputs == "uniform":
            choice["batch_size"] = min(500, len(data))
        gamma = 1.0 if gamma is None else gamma
    found = estimated(
        net,
        (data, net(data).detach()),
        _mean_square,
        nbeta=nbeta,
        localization=gamma,
        num_chains=options.chains,
        seed=seed,
        **choice,
    )
    if options.method == "published":  # nothing was extrapolated there
        found |= {"value": found["runs"][0]["value"]}
        found |= {"standard_error": found["runs"][0]["standard_error"]}
    known = deep_linear_local(stand_ins(widths, ranks))
    quadratic = exact_quadratic(net, nbeta, found["localization"])
    exact: dict[str, Any] = {
        "widths": widths,
        "ranks": ranks,
        "lambda": float(known),
        "multiplicity": known.multiplicity,
        "quadratic_exact": quadratic,
    }
    return exact | found


def _drawn(
    options: DeepLinear, group: Group, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Widths, and ranks of the factors."""

    def between(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    widths = list(options.widths)
    if not widths:
        widths = [between(*group.widths) for _ in range(between(*group.layers) + 1)]
    ranks = [min(pair) for pair in itertools.pairwise(widths)]
    if options.points == "reduced":
        ranks = [between(0, rank) if between(0, 1) else rank for rank in ranks]
    return widths, ranks


def _inputs(options: DeepLinear, width: int, generator: torch.Generator) -> Tensor:
    if options.inputs == "moments":
        return torch.eye(width, dtype=torch.float64) * sqrt(width * INPUT_VARIANCE)
    drawn = torch.rand(options.examples, width, generator=generator, dtype=torch.float64)
    return 20 * drawn - 10


def _mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(-1)


def deep_linear_table(results: Sequence[dict[str, Any]]) -> str:
    """One row for each network, and medians of the errors."""
    first = results[0]["settings"]
    lines = [
        f"# Deep linear networks {first['group']}, {first['points']} points, {first['method']}, "
        f"{first['inputs']} inputs",
        "",
        "Relative errors of the estimate: beside the learning coefficient, and beside the value at "
        "this temperature and localisation (gamma) if the loss were quadratic at the weights.",
        "",
        "| widths | parameters | lambda | gamma | quadratic | estimate | from lambda "
        "| from quadratic | verdict | CPU, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    errors, others = list[float](), list[float]()
    for found in results:
        value, truth, quadratic = found["value"], found["lambda"], found["quadratic_exact"]
        errors.append(value / truth - 1)
        known = quadratic is not None
        others += [value / quadratic - 1] if known else []
        lines.append(
            f"| {' '.join(map(str, found['widths']))} | {found['num_parameters']:,} | {truth:g} | "
            f"{found['localization']:.3g} | {f'{quadratic:.1f}' if known else ''} | {value:.1f} ± "
            f"{found['standard_error']:.1g} | {errors[-1]:+.1%} | "
            f"{f'{others[-1]:+.1%}' if known else ''} | {found['verdict']} | "
            f"{found['cpu_seconds']:.0f} |"
        )
    verdicts = count_verdicts(results)
    lines += ["", f"{len(results)} networks: {verdicts}. Median error {_quartiles(errors)}"]
    if others:
        lines[-1] += f"; from the quadratic value {_quartiles(others)}"
    lines[-1] += "; published, all groups, from lambda: -18 % and 40 of 593 runs NaN."
    return "\n".join([*lines, ""])


def _quartiles(errors: Sequence[float]) -> str:
    if len(errors) == 1:
        return f"{errors[0]:+.1%}"
    low, _, high = quantiles(errors, n=4, method="inclusive")
    return f"{median(errors):+.1%}, quartiles {low:+.1%} and {high:+.1%}"
