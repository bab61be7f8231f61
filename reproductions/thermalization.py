"""Which samplers reach the posterior of a small network, at which noise: figure 2 of the paper.

    python -m reproductions.thermalization --output results/thermalization

A teacher with one hidden layer makes the labels. Four samplers start at the teacher and from places
that know nothing; a problem counts as thermalised when both end at the same test error. Posteriors
with different likelihoods are compared at equal difficulty: by the test error in equilibrium.
Started again, it skips what is finished.

G. Piccioli, E. Troiani, L. Zdeborová, *Gibbs sampling the posterior of neural networks*, arXiv
2306.02729, has 72 problems with 2084 examples, 50 features and 10 hidden units, and millions of
sweeps; the problems here are smaller. There labels have no noise (``--no-label-noise``), so that
one data set serves all posteriors; here they have it by default, and the informed start is exact.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from torch import nn

import pushforward as pf
from pushforward.errors import PushforwardError
from pushforward.sampling.hmc import HMC
from pushforward.sampling.intermediate_noise.gibbs import gibbs
from pushforward.sampling.intermediate_noise.network import IntermediateNoiseNetwork
from pushforward.sampling.kernel import Kernel
from pushforward.sampling.mala import MALA
from pushforward.sampling.runner import sample
from pushforward.sampling.thermalization.teacher_student import Instance, TeacherStudent
from pushforward.sampling.thermalization.thermalize import ThermalizationReport, thermalize
from reproductions.results import read_result, write_result

__all__ = ["Thermalization", "main", "study"]

SamplerName = Literal["gibbs", "hmc-intermediate", "hmc-classical", "mala-classical"]

_STARTS = ("zero", "prior")
_FEWEST_STEPS = 200
_TRIAL_SECONDS = 1.0


@dataclass(frozen=True)
class Thermalization:
    """Compare samplers by the problems that they thermalise.

    Parameters
    ----------
    output
        Folder for results; a sampler at a noise is one JSON file.
    samplers
        Gibbs and HMC on the posterior with intermediate noise, HMC and MALA on the classical one.
    noises
        Variances, of all noise alike.
    seeds
        Problems of each sampler and noise.
    seconds
        Of computing for each problem, all starts and chains together: the same for all samplers.
        Turned into steps by a trial, once for each sampler.
    steps
        Steps of each chain, instead of `seconds`.
    chains
        From each start.
    examples, features, hidden, test_examples
        Sizes of a problem.
    hmc_steps
        Leapfrog steps of a trajectory.
    label_noise
        Whether labels come from the very model of the student.
    """

    output: Path
    samplers: tuple[SamplerName, ...] = (
        "gibbs",
        "hmc-intermediate",
        "hmc-classical",
        "mala-classical",
    )
    noises: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
    seeds: int = 20
    seconds: float = 20.0
    steps: int | None = None
    chains: int = 4
    examples: int = 200
    features: int = 10
    hidden: int = 4
    test_examples: int = 1000
    hmc_steps: int = 32
    label_noise: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study from the command line.

    Returns
    -------
    int
        0, or 2 when something was refused.
    """
    import tyro

    options = tyro.cli(Thermalization, args=argv)
    try:
        results = list(study(options))
    except PushforwardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = _table(options, results)
    (options.output / "thermalization.md").write_text(table, encoding="utf-8")
    (options.output / "thermalization.json").write_text(
        json.dumps(results, indent=1), encoding="utf-8"
    )
    print(table)
    return 0


def study(options: Thermalization) -> Iterator[dict[str, Any]]:
    """Results of one sampler at one noise after the other.

    Yields
    ------
    dict
        Verdict, thermalised problems by start, error in equilibrium, steps and time.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    for sampler in options.samplers:
        for noise in options.noises:
            path = options.output / f"{sampler}-{noise:g}.json"
            settings = _settings(options, sampler, noise)
            found = read_result(path, settings)
            if found is None:
                found = {"settings": settings, **_one(options, sampler, noise)}
                write_result(path, found)
                print(f"{path}: {found['verdict']}", flush=True)
            yield found


def _settings(options: Thermalization, sampler: SamplerName, noise: float) -> dict[str, Any]:
    names = ("seeds", "steps", "chains", "examples", "features", "hidden", "test_examples")
    names += ("hmc_steps", "label_noise")
    fields: dict[str, Any] = {"sampler": sampler, "noise": noise}
    fields |= {name: getattr(options, name) for name in names}
    return fields | {"seconds": options.seconds if options.steps is None else None}


def _one(options: Thermalization, sampler: SamplerName, noise: float) -> dict[str, Any]:
    problem = _problem(options, sampler, noise)
    kernel_of = _kernel(options, sampler)
    steps = options.steps or _affordable(options, sampler, problem, kernel_of)
    report = thermalize(
        problem,
        kernel_of,
        budget=steps,
        seeds=options.seeds,
        num_chains=options.chains,
        checkpoint=options.output / f"{sampler}-{noise:g}-run",
    )
    if report.interrupted:
        raise KeyboardInterrupt
    report.save(options.output / f"{sampler}-{noise:g}-report.json")
    print(report, flush=True)
    return _summary(report, steps)


def _problem(options: Thermalization, sampler: SamplerName, noise: float) -> TeacherStudent:
    net = nn.Sequential(
        nn.Linear(options.features, options.hidden), nn.ReLU(), nn.Linear(options.hidden, 1)
    ).double()
    sizes = (options.examples, options.test_examples)
    if sampler in {"gibbs", "hmc-intermediate"}:
        model = IntermediateNoiseNetwork(net, noise, noise)
        return TeacherStudent(model, *sizes, label_noise=options.label_noise)
    fan_in = {"0": float(options.features), "2": float(options.hidden)}
    return TeacherStudent(
        net,
        *sizes,
        likelihood=pf.Gaussian(noise),
        prior_precision=fan_in,
        label_noise=options.label_noise,
    )


def _kernel(options: Thermalization, sampler: SamplerName) -> Callable[[Instance], Kernel]:
    def gibbs_of(instance: Instance) -> Kernel:
        assert isinstance(instance.model, IntermediateNoiseNetwork)
        return gibbs(instance.model, instance.inputs, instance.targets)

    def hmc_of(instance: Instance) -> Kernel:
        return HMC(instance.potential, num_steps=options.hmc_steps)

    def mala_of(instance: Instance) -> Kernel:
        return MALA(instance.potential)

    return {"gibbs": gibbs_of, "mala-classical": mala_of}.get(sampler, hmc_of)


def _affordable(
    options: Thermalization,
    sampler: SamplerName,
    problem: TeacherStudent,
    kernel_of: Callable[[Instance], Kernel],
) -> int:
    """Steps that fit the time, measured once for each sampler and written down."""
    path = options.output / f"{sampler}-steps.json"
    wanted = {"seconds": options.seconds, "sizes": [options.examples, options.features]}
    wanted |= {"chains": options.chains, "hidden": options.hidden, "hmc_steps": options.hmc_steps}
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["wanted"] == wanted:
            return int(found["steps"])
    kernel = kernel_of(problem.instance(0))
    chains, steps, spent = (1 + len(_STARTS)) * options.chains, 4, 0.0
    while spent < min(_TRIAL_SECONDS, options.seconds):
        steps *= 2
        began = perf_counter()
        sample(
            kernel,
            num_draws=1,
            thin=steps,
            num_warmup=0,
            num_chains=chains,
            keep_parameters=False,
            progress=False,
        )
        spent = perf_counter() - began
    affordable = max(_FEWEST_STEPS, round(options.seconds * steps / spent))
    path.write_text(json.dumps({"wanted": wanted, "steps": affordable}), encoding="utf-8")
    return affordable


def _summary(report: ThermalizationReport, steps: int) -> dict[str, Any]:
    starts = {
        start: {
            "thermalised": found.thermalized,
            "away": found.away,
            "unclear": found.unclear,
            "interval": list(found.interval),
        }
        for start, found in report.success.items()
    }
    return {
        "verdict": report.verdict,
        "equilibrium error": report.equilibrium_error,
        "problems": len(report.instances),
        "starts": starts,
        "steps": steps,
        "seconds": report.seconds,
        "away but unnoticed by R-hat, score and residuals": list(report.quiet_failures),
    }


def _table(options: Thermalization, results: Sequence[dict[str, Any]]) -> str:
    matched = "labels with noise" if options.label_noise else "labels without noise"
    lines = [
        f"# Thermalised problems: {options.examples} examples, {options.features} features, "
        f"{options.hidden} hidden units, {matched}",
        "",
        "Fractions with 95 % Wilson intervals. Unnoticed: of the runs away from equilibrium, those "
        "in which R-hat of the test error, score and residuals raised no alarm.",
        "",
        "| sampler | noise variance | test MSE in equilibrium | from zero | from the prior | "
        "unclear | unnoticed | steps | s a problem | verdict |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for found in results:
        settings, count = found["settings"], found["problems"]
        cells = []
        for start in _STARTS:
            low, high = found["starts"][start]["interval"]
            cells.append(
                f"{found['starts'][start]['thermalised']}/{count} ({low:.2f} to {high:.2f})"
            )
        quiet, away = found["away but unnoticed by R-hat, score and residuals"]
        unclear = sum(entry["unclear"] for entry in found["starts"].values())
        lines.append(
            f"| {settings['sampler']} | {settings['noise']:g} | {found['equilibrium error']:.2e} | "
            f"{cells[0]} | {cells[1]} | {unclear} | {quiet}/{away} | {found['steps']:,} | "
            f"{found['seconds'] / count:.0f} | {found['verdict']} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
