"""One synthetic problem: chains from all starts, and what is to be said of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from pushforward.errors import DataError
from pushforward.runs.rng import stream
from pushforward.sampling.kernel import Kernel
from pushforward.sampling.runner import sample
from pushforward.sampling.thermalization.identities import (
    PREFIX,
    Statistic,
    WatchedKernel,
    identity_values,
    observe,
)
from pushforward.sampling.thermalization.rank_tests import normalised_rank, thinned
from pushforward.sampling.thermalization.report import InstanceResult, LocalChecks
from pushforward.sampling.thermalization.teacher_student import Instance, Start, TeacherStudent
from pushforward.sampling.thermalization.verdict import compare, plateau, window_mean
from pushforward.typing import Params

__all__ = [
    "FEWEST_RECORDS",
    "DrawSampler",
    "KernelOf",
    "Plan",
    "Sampler",
    "TrajectorySampler",
    "run_problem",
]

FEWEST_RECORDS = 16
_CHECKPOINT_VERSION = 1
_CURVE_POINTS = 64
_PROBES = 64  # test outputs of which the predictive variance is computed
_ROUNDING = 1e-12
_DRAWS = 63  # of a sampler without a start, when the budget does not say less


KernelOf: TypeAlias = Callable[[Instance], Kernel]
"""The kernel that samples an instance: ``lambda i: pf.HMC(i.potential)``."""

TrajectorySampler: TypeAlias = Callable[[Instance, Params, int, int, int], Mapping[str, Tensor]]
"""A sampler of another library: from instance, initial values, chains, steps and seed to parameters
``(chain, draw, *shape)`` by name, evenly spaced over the steps; latent variables as well if there
are any to show."""

DrawSampler: TypeAlias = Callable[[Instance, int, int], Mapping[str, Tensor]]
"""A sampler that cannot be told where to start, such as a Laplace approximation: from instance,
number of draws and seed to parameters ``(draw, *shape)`` by name, independent draws."""

Sampler: TypeAlias = KernelOf | TrajectorySampler | DrawSampler


@dataclass(frozen=True, eq=False)
class Plan:
    """The arguments of `thermalize`.

    Parameters
    ----------
    problem, sampler, budget, starts, num_chains, num_warmup, records, tolerance, seed, statistic
        As there.
    kind
        What the sampler is: ``"kernel"``, ``"trajectories"`` or ``"draws"``.
    """

    problem: TeacherStudent
    sampler: Sampler
    kind: str
    budget: int
    starts: tuple[Start, ...]
    num_chains: int
    num_warmup: int | None
    records: int
    tolerance: float
    seed: int
    statistic: Statistic | None = None

    @property
    def uninformed(self) -> tuple[str, ...]:
        """Starts that know nothing."""
        return tuple(start for start in self.starts if start != "informed")

    @property
    def floor(self) -> float:
        """What the statistic can resolve: half a test input, where they are counted."""
        if not self.problem.classifies or self.statistic is not None:
            return 0.0
        given = self.problem.test_inputs
        return 0.5 / (len(given) if isinstance(given, Tensor) else given)

    def chain_seed(self, number: int, purpose: str) -> int:
        """Seed of something random about one problem."""
        generator = stream(self.seed, "thermalization", purpose, number)
        return int(torch.randint(2**62, (), generator=generator))

    def kernel(self, instance: Instance) -> Kernel:
        """What the sampler makes of an instance.

        Returns
        -------
        Kernel
            Its target is up to the sampler.

        Raises
        ------
        DataError
            When it is no kernel.
        """
        kernel = cast(KernelOf, self.sampler)(instance)
        if not isinstance(kernel, Kernel):
            raise DataError(
                f"it returned {type(kernel).__name__}",
                where="sampler",
                advice="With one argument, an instance, it has to return a kernel: pf.HMC(...), "
                "pf.gibbs(...).",
            )
        return kernel

    def identity(self) -> dict[str, Any]:
        """What a checkpoint belongs to.

        Returns
        -------
        dict
            In JSON's types.
        """
        kernel = self.kernel(self.problem.instance(0)) if self.kind == "kernel" else None
        plain = json.dumps(None if kernel is None else kernel.identity(), sort_keys=True)
        fields = {
            "version": _CHECKPOINT_VERSION,
            "problem": self.problem.identity(),
            "sampler": self.kind if kernel is None else kernel.name,
            "settings": hashlib.blake2b(plain.encode(), digest_size=8).hexdigest(),
            "budget": self.budget,
            "starts": list(self.starts),
            "num_chains": self.num_chains,
            "num_warmup": self.num_warmup,
            "records": self.records,
            "tolerance": self.tolerance,
            "seed": self.seed,
            "statistic": None if self.statistic is None else _name_of(self.statistic),
        }
        return cast(dict[str, Any], json.loads(json.dumps(fields)))


@dataclass(frozen=True, eq=False)
class _Trace:
    """What was watched of the chains from one start."""

    found: dict[str, Tensor]  # (chains, draws) by name
    outputs: Tensor  # (chains, draws, probes)
    acceptance: float | None


def run_problem(plan: Plan, number: int, checkpoint: Path | None = None) -> InstanceResult:
    """Sample one problem from all starts, and judge it.

    Parameters
    ----------
    plan
        The arguments of `thermalize`.
    number
        Seed of the problem.
    checkpoint
        Folder for the state of the chains.

    Returns
    -------
    InstanceResult
        Of this problem.

    Raises
    ------
    KeyboardInterrupt
        When the chains were interrupted.
    DataError
        When the sampler returns something else than the parameters of the problem.
    """
    began = perf_counter()
    instance = plan.problem.instance(number)
    if plan.kind == "draws":
        return _ranked_draws(plan, instance, began)
    run = _kernel_traces if plan.kind == "kernel" else _foreign_traces
    name, steps, traces = run(plan, instance, checkpoint)
    return _judged(plan, instance, name, steps, traces, began)


def _kernel_traces(
    plan: Plan, instance: Instance, running: Path | None
) -> tuple[str, tuple[int, ...], dict[str, _Trace]]:
    kernel = plan.kernel(instance)
    warmup = plan.num_warmup
    if warmup is None:
        adapts = type(kernel).warm_up is not Kernel.warm_up
        warmup = plan.budget // 4 if adapts else 0
    thin = max(1, (plan.budget - warmup) // plan.records)
    draws = (plan.budget - warmup) // thin
    probes = instance.test_inputs[:_PROBES]
    chains = sample(
        WatchedKernel(kernel, instance, plan.statistic),
        num_draws=draws,
        num_chains=plan.num_chains * len(plan.starts),
        num_warmup=warmup,
        thin=thin,
        initial=_initial(plan, instance),
        record=lambda p: {"outputs": instance.predict(p, probes).flatten()[:_PROBES]},
        keep_parameters=False,
        seed=plan.chain_seed(instance.seed, "chains"),
        checkpoint=running,
        progress=False,
    )
    if chains.num_draws < draws:
        raise KeyboardInterrupt
    watched = {
        name.removeprefix(PREFIX): value
        for name, value in chains.statistics.items()
        if name.startswith(PREFIX)
    }
    steps = tuple(warmup + thin * (i + 1) for i in range(draws))
    accepted = chains.statistics.get("acceptance")
    traces = {}
    for start, rows in _rows(plan).items():
        traces[start] = _Trace(
            {name: value[rows] for name, value in watched.items()},
            chains.observations["outputs"][rows],
            None if accepted is None else float(accepted[rows].nanmean()),
        )
    return kernel.name, steps, traces


def _foreign_traces(
    plan: Plan, instance: Instance, _running: Path | None
) -> tuple[str, tuple[int, ...], dict[str, _Trace]]:
    run = cast(TrajectorySampler, plan.sampler)
    total = plan.num_chains * len(plan.starts)
    seed = plan.chain_seed(instance.seed, "chains")
    values = _returned(run(instance, _initial(plan, instance), total, plan.budget, seed))
    draws = _check_draws(instance, values, (total,), 2)
    kept = torch.linspace(0, draws - 1, min(draws, plan.records), dtype=torch.float64)
    at = kept.round().long()
    flat = {
        name: value[:, at.to(value.device)].detach().flatten(0, 1) for name, value in values.items()
    }
    found = {
        n: v.unflatten(0, (total, len(at))) for n, v in _observed(plan, instance, flat).items()
    }
    parameters = {name: flat[name] for name in plan.problem.space.names}
    with torch.no_grad():
        outputs = instance.outputs(parameters, instance.test_inputs[:_PROBES]).flatten(1)
    outputs = outputs[:, :_PROBES].unflatten(0, (total, len(at)))
    steps = tuple(round(plan.budget * (i + 1) / draws) for i in at.tolist())
    traces = {
        start: _Trace({n: v[rows] for n, v in found.items()}, outputs[rows], None)
        for start, rows in _rows(plan).items()
    }
    return _name_of(plan.sampler), steps, traces


def _ranked_draws(plan: Plan, instance: Instance, began: float) -> InstanceResult:
    draw = cast(DrawSampler, plan.sampler)
    count = min(plan.budget, _DRAWS)
    values = _returned(draw(instance, count, plan.chain_seed(instance.seed, "draws")))
    _check_draws(instance, values, (), 1)
    found = _observed(plan, instance, {name: value.detach() for name, value in values.items()})
    trace = _Trace({n: v[None] for n, v in found.items()}, torch.empty(0), None)
    ranks = _ranks(plan, instance, "draws", trace, first=0) if instance.exact else {}
    return InstanceResult(
        instance.seed,
        _name_of(draw),
        ranks={"draws": ranks} if ranks else {},
        seconds=perf_counter() - began,
    )


def _judged(
    plan: Plan,
    instance: Instance,
    name: str,
    steps: tuple[int, ...],
    traces: Mapping[str, _Trace],
    began: float,
) -> InstanceResult:
    """Everything that is said of one problem."""
    rule: dict[str, Any] = {"floor": plan.floor, "tolerance": plan.tolerance}
    informed = traces["informed"]
    first = sum(step <= steps[-1] / 2 for step in steps)
    rest = plateau(informed.found["error"], steps, **rule)
    comparisons = {
        start: compare(traces[start].found["error"], rest, steps, **rule)
        for start in plan.uninformed
    }
    identities: dict[str, float] = {}
    ranks: dict[str, dict[str, float]] = {}
    if instance.exact:
        identities = identity_values(instance, informed.found, first)
        for start, trace in traces.items():
            # Chains that have not left the teacher are no independent draws to rank it among.
            if rest.settled or start != "informed":
                ranks[start] = _ranks(plan, instance, start, trace, first)
    gibbs, variance = _errors_of_draws(instance, informed.outputs[:, first:])
    shown = _log_spaced(steps)
    return InstanceResult(
        instance.seed,
        name,
        rest,
        comparisons,
        tuple(steps[i] for i in shown),
        {
            start: tuple(trace.found["error"].mean(0)[shown].tolist())
            for start, trace in traces.items()
        },
        identities,
        ranks,
        {start: _local_checks(trace, first) for start, trace in traces.items()},
        gibbs,
        variance,
        {s: t.acceptance for s, t in traces.items() if t.acceptance is not None},
        perf_counter() - began,
    )


# --- what is computed of traces -------------------------------------------------------------------


def _observed(plan: Plan, instance: Instance, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`observe` for many rows, some at a time."""
    rows, size = len(next(iter(flat.values()))), 256
    parts = [
        observe(
            instance,
            {name: value[i : i + size] for name, value in flat.items()},
            plan.statistic,
        )
        for i in range(0, rows, size)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _ranks(
    plan: Plan, instance: Instance, start: str, trace: _Trace, first: int
) -> dict[str, float]:
    """Of the teacher among the draws, by quantity."""
    values = {n: v[None] for n, v in {**instance.teacher, **instance.latents}.items()}
    teacher = observe(instance, values)
    generator = stream(plan.seed, "thermalization", f"ranks {start}", instance.seed)
    ranks = {}
    for name, value in trace.found.items():
        uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
        # Scores vary around 0 whatever happens: they say nothing that the others do not.
        if name == "error" or name.startswith(("score", "virial", "residual ")):
            continue
        draws = value[0, first:] if start == "draws" else thinned(value[:, first:])
        if bool(torch.isfinite(value[:, first:]).all()):
            ranks[name] = normalised_rank(float(teacher[name]), draws, uniform)
        else:
            ranks[name] = math.nan
    return ranks


def _local_checks(trace: _Trace, first: int) -> LocalChecks:
    errors = trace.found["error"][:, first:]
    scores = [0.0]
    for name, value in trace.found.items():
        if name.startswith("score"):
            mean, error = window_mean(value[:, first:])
            # Frozen chains have no spread but rounding: nothing to be alarmed by.
            scores.append(abs(mean) / error if error > _ROUNDING * abs(mean) else 0.0)
    residuals = trace.found.get("residuals")
    return LocalChecks(
        _split_r_hat(errors),
        max(scores),
        math.nan if residuals is None else float(residuals[:, first:].mean(1).abs().max()),
    )


def _split_r_hat(values: Tensor) -> float:
    """Split R-hat (Gelman et al. 2013, section 11.4) of ``(chains, draws)``; 1 if nothing moves."""
    half = values.shape[1] // 2
    if half < 2:
        return math.nan
    parts = values[:, : 2 * half].reshape(-1, half)
    within = float(parts.var(1).mean())
    between = half * float(parts.mean(1).var())
    if within <= _ROUNDING * float(parts.square().mean()):
        return 1.0 if between <= half * within else math.inf
    return math.sqrt((half - 1) / half + between / (half * within))


def _errors_of_draws(instance: Instance, outputs: Tensor) -> tuple[float, float]:
    """Mean squared error of single draws, and the variance of draws, without bias.

    Returns
    -------
    tuple of float
        The variance is half the mean squared difference between draws of different chains.
    """
    truth = instance.test_outputs[:_PROBES].flatten()[: outputs.shape[-1]]
    values = outputs.double()
    gibbs = float((values - truth).square().mean())
    chains = len(values)
    if chains < 2:
        return gibbs, math.nan
    means = values.mean(1)
    cross = (means.sum(0).square() - means.square().sum(0)) / (chains * (chains - 1))
    return gibbs, float((values.square().mean((0, 1)) - cross).mean())


def _log_spaced(steps: Sequence[int]) -> list[int]:
    """Positions of some steps, evenly spread on a logarithmic scale."""
    wanted = torch.logspace(
        math.log10(steps[0]), math.log10(steps[-1]), _CURVE_POINTS, dtype=torch.float64
    )
    at = torch.tensor(steps, dtype=torch.float64)
    nearest = (at[None] - wanted[:, None]).abs().argmin(1)
    return sorted(set(nearest.tolist()))


# --- chains ---------------------------------------------------------------------------------------


def _initial(plan: Plan, instance: Instance) -> Params:
    """All starts one after the other, ``(starts * chains, *shape)``."""
    seed = plan.chain_seed(instance.seed, "starts")
    parts = [instance.start(start, plan.num_chains, seed) for start in plan.starts]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _rows(plan: Plan) -> dict[str, slice]:
    size = plan.num_chains
    return {start: slice(i * size, (i + 1) * size) for i, start in enumerate(plan.starts)}


def _returned(values: Any) -> Params:
    """What a foreign sampler returned, arrays of NumPy as tensors.

    Returns
    -------
    dict
        By name.

    Raises
    ------
    DataError
        For anything but arrays by name.
    """
    try:
        return {str(name): torch.as_tensor(value) for name, value in values.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"got {type(values).__name__}: {error}",
            where="what the sampler returned",
            advice="Return the parameters by name, tensors or arrays: {'0.weight': ...}.",
        ) from error


def _check_draws(
    instance: Instance, values: Mapping[str, Tensor], leading: tuple[int, ...], axes: int
) -> int:
    """Refuse what is not the parameters of all draws.

    Returns
    -------
    int
        The number of draws.

    Raises
    ------
    DataError
        With the parameter that does not fit.
    """
    shapes = dict(zip(instance.problem.space.names, instance.problem.space.shapes, strict=True))
    shown = "chain, draw" if axes == 2 else "draw"
    counts = set()
    for name, shape in shapes.items():
        value = values.get(name)
        found = None if value is None else tuple(value.shape)
        if found is None or found[axes:] != shape or found[: axes - 1] != leading:
            raise DataError(
                "it is missing" if found is None else f"it has shape {found}",
                where=f"what the sampler returned, parameter {name}",
                advice=f"Return tensors ({shown}, {', '.join(map(str, shape))}).",
            )
        counts.add(found[axes - 1])
    if len(counts) > 1 or min(counts) < (FEWEST_RECORDS if axes == 2 else 1):
        raise DataError(
            f"there are {' or '.join(map(str, sorted(counts)))} draws",
            where="what the sampler returned",
            advice=f"Return equally many of all parameters, {FEWEST_RECORDS} at least of chains.",
        )
    return int(counts.pop())


def _name_of(sampler: Any) -> str:
    name = getattr(sampler, "__name__", type(sampler).__name__)
    return "sampler" if name == "<lambda>" else str(name)
