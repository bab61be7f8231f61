"""Whether a sampler reaches the posterior: a test that stuck chains do not pass.

Chains of one sampler start at a known posterior draw, the teacher of a synthetic problem, and from
places that know nothing. Where both do not meet, the sampler has not sampled the posterior in its
budget, however well its chains agree with each other. Where the first do not keep the law that they
start from, the kernel is wrong. The criterion is that of Piccioli, Troiani and Zdeborová, arXiv
2306.02729; the rule, the tests over problems and the ranks are our own.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pushforward.errors import OptionError, WeightsError
from pushforward.options import number, whole_number
from pushforward.runs.estimate import to_jsonable
from pushforward.runs.progress import track
from pushforward.sampling.thermalization.identities import Statistic, judge_identities
from pushforward.sampling.thermalization.rank_tests import judge_ranks
from pushforward.sampling.thermalization.report import (
    InstanceResult,
    ThermalizationReport,
    write_json,
)
from pushforward.sampling.thermalization.run import FEWEST_RECORDS, Plan, Sampler, run_problem
from pushforward.sampling.thermalization.teacher_student import STARTS, Start, TeacherStudent
from pushforward.sampling.thermalization.verdict import Verdict, overall_verdict, success

__all__ = ["ThermalizationReport", "thermalize"]


def thermalize(
    problem: TeacherStudent,
    sampler: Sampler,
    *,
    budget: int,
    starts: Sequence[Start] = STARTS,
    seeds: int | Sequence[int] = 20,
    num_chains: int = 4,
    num_warmup: int | None = None,
    records: int = 256,
    statistic: Statistic | None = None,
    tolerance: float = 1.25,
    required: float = 0.9,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> ThermalizationReport:
    """Test on synthetic problems whether a sampler reaches the posterior.

    Parameters
    ----------
    problem
        The family of problems, of the size, noise and architecture that matter.
    sampler
        From an instance to a kernel: ``lambda i: pf.gibbs(i.model, i.inputs, i.targets)`` or
        ``lambda i: pf.HMC(i.potential)``. Or a function ``(instance, initial, num_chains,
        num_steps, seed)`` that returns trajectories ``(chain, draw, *shape)`` by name, for samplers
        of other libraries; or ``(instance, num_draws, seed)`` that returns independent draws
        ``(draws, *shape)``, for what has no start, such as a Laplace approximation: then only the
        ranks are tested. Which one it is is told by the number of its arguments.
    budget
        Steps of each chain, warm-up included; draws of a sampler without a start.
    starts
        ``"informed"`` has to be among them, and one of ``"zero"`` and ``"prior"`` for a verdict on
        convergence.
    seeds
        Of the problems: how many, or which.
    num_chains
        From each start; at least two, and four or more for honest standard errors.
    num_warmup
        Steps in which a kernel adapts, at most a quarter of the budget. Default: none for kernels
        that do not adapt, else a quarter. What is known in advance holds to the letter when nothing
        adapts, and after a warm-up once its end is forgotten.
    records
        States of each chain that are looked at, evenly spaced.
    statistic
        From an instance and outputs ``(rows, m, *event)`` on its test inputs to ``(rows,)``
        numbers, not negative. Default: mean squared error against the noiseless teacher; for
        classes, the share of test inputs that differ from it.
    tolerance
        Largest ratio between the test errors of uninformed chains and of equilibrium.
    required
        Fraction of problems that have to thermalise from every start for a pass. Below 1 since
        chance lets a few fail.
    seed
        Of the chains.
    checkpoint
        Folder with a file for each finished problem, and the state of the one that is running; the
        same call goes on from there.
    progress
        Whether to show a bar; None: on a terminal, when it takes long.

    Returns
    -------
    ThermalizationReport
        When interrupted (Ctrl-C), of the problems until then.

    Raises
    ------
    OptionError
        For an option out of range, or a sampler with another number of arguments.
    DataError
        When a sampler returns something else than the parameters of the problem.
    WeightsError
        When the checkpoint is of another run.
    KeyboardInterrupt
        When interrupted before the first problem is finished.

    Notes
    -----
    For each problem and start, chains have thermalised if the mean of their test error over the
    last quarter is within `tolerance` of that of the informed chains over the last half, and within
    three standard errors of it. If informed chains do not move, or still drift between the last two
    octaves, nothing can be said.

    Informed chains keep, over problems, the means of
    `pushforward.sampling.thermalization.identities` at all times; fewer than one in 10,000 reports
    of a correct kernel reject any. Ranks of the teacher among informed chains test the kernel,
    among uninformed chains its convergence as well (Talts et al. 2018, arXiv 1804.06788).

    What it cannot see: errors of a kernel that move no watched mean by several standard errors over
    the problems. In a linear problem with eight parameters, noise that is 5 % too wide was found
    with 100 problems and not with 20; conditional laws want tests of their own. And it speaks of
    the chosen problems and budget only.

    Examples
    --------
    >>> import torch, pushforward as pf
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1))
    >>> model = pf.IntermediateNoiseNetwork(net, 0.5, 0.5)
    >>> report = pf.thermalize(
    ...     pf.TeacherStudent(model, inputs=20, test_inputs=50),
    ...     lambda i: pf.gibbs(i.model, i.inputs, i.targets),
    ...     budget=256,
    ...     seeds=4,
    ... )
    >>> report.verdict
    'PASS'
    """
    kind = _kind(sampler)
    chosen = _checked_seeds(seeds)
    draws = kind == "draws"
    num_chains = whole_number(num_chains, "num_chains", least=1 if draws else 2)
    budget = whole_number(budget, "budget", least=1 if draws else 2 * FEWEST_RECORDS)
    records = whole_number(records, "records", least=FEWEST_RECORDS)
    if num_warmup is not None:
        advice = "Give at most a quarter of the budget: the rule looks at the rest."
        num_warmup = whole_number(
            num_warmup, "num_warmup", least=0, most=budget // 4, advice=advice
        )
    seed = whole_number(seed, "seed", least=0)
    tolerance = number(tolerance, "tolerance", above=1, advice="Give a number such as 1.25.")
    required = number(required, "required", above=0, most=1)
    _check_starts(kind, starts)
    plan = Plan(
        problem,
        sampler,
        kind,
        budget,
        tuple(starts),
        num_chains,
        num_warmup,
        records,
        tolerance,
        seed,
        statistic,
    )
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None:
        _claim(folder, plan.identity())
    results: list[InstanceResult] = []
    interrupted = False
    with track(len(chosen), "Thermalisation", enabled=progress) as advance:
        for problem_seed in chosen:
            try:
                results.append(
                    _resumed(folder, problem_seed) or _finished(plan, problem_seed, folder)
                )
            except KeyboardInterrupt:
                if not results:
                    raise
                interrupted = True
                break
            advance(1, f"problem {problem_seed}")
    return _assembled(plan, results, required, interrupted)


def _finished(plan: Plan, number: int, folder: Path | None) -> InstanceResult:
    """Run one problem, and write down what came of it."""
    running = None if folder is None else folder / f"running-{number}"
    result = run_problem(plan, number, running)
    if folder is not None:
        write_json(folder / f"problem-{number}.json", to_jsonable(result))
        shutil.rmtree(folder / f"running-{number}", ignore_errors=True)
    return result


def _assembled(
    plan: Plan, results: Sequence[InstanceResult], required: float, interrupted: bool
) -> ThermalizationReport:
    identities = judge_identities([r.identities for r in results if r.identities])
    gathered: dict[tuple[str, str], list[float]] = {}
    for result in results:
        for start, quantities in result.ranks.items():
            for quantity, rank in quantities.items():
                gathered.setdefault((start, quantity), []).append(rank)
    ranks = judge_ranks(gathered)
    successes = {
        start: success([result.comparisons[start].outcome for result in results])
        for start in plan.uninformed
        if plan.kind != "draws"
    }
    informed_wrong = any(test.rejected for test in ranks if test.start == "informed")
    if plan.kind == "draws":
        rejected = any(test.rejected for test in ranks)
        verdict: Verdict = "NOT_CALIBRATED" if rejected else "PASS" if ranks else "INCONCLUSIVE"
    else:
        verdict = overall_verdict(
            successes,
            kernel_wrong=informed_wrong or any(found.rejected for found in identities),
            ranks_wrong=any(test.rejected for test in ranks if test.start != "informed"),
            required=required,
        )
    return ThermalizationReport(
        verdict,
        repr(plan.problem),
        results[0].kernel,
        plan.budget,
        plan.num_chains,
        required,
        plan.tolerance,
        plan.problem.label_noise,
        successes,
        identities,
        ranks,
        tuple(results),
        interrupted,
    )


# --- options --------------------------------------------------------------------------------------


def _kind(sampler: Any) -> str:
    """What a sampler is, by the number of its arguments.

    Returns
    -------
    str
        ``"kernel"``, ``"draws"`` or ``"trajectories"``.

    Raises
    ------
    OptionError
        For anything else.
    """
    try:
        parameters = inspect.signature(sampler).parameters.values()
    except (TypeError, ValueError):
        parameters = {}.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    count = sum(p.kind in positional and p.default is p.empty for p in parameters)
    kinds = {1: "kernel", 3: "draws", 5: "trajectories"}
    if count not in kinds:
        raise OptionError(
            "it is not callable" if not callable(sampler) else f"it takes {count} arguments",
            where="sampler",
            advice="Give lambda instance: kernel; or a function (instance, initial, num_chains, "
            "num_steps, seed), or (instance, num_draws, seed).",
        )
    return kinds[count]


def _checked_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    advice = "Give a number from 1 on, or different seeds."
    if not isinstance(seeds, Sequence):
        return tuple(range(whole_number(seeds, "seeds", advice=advice)))
    chosen = tuple(whole_number(seed, "seeds", least=0, advice=advice) for seed in seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise OptionError(
            f"{seeds!r} names no problems, or one of them twice", where="seeds", advice=advice
        )
    return chosen


def _check_starts(kind: str, starts: Sequence[str]) -> None:
    unknown = [start for start in starts if start not in STARTS]
    if unknown or len(set(starts)) < len(starts):
        raise OptionError(
            f"{list(starts)!r}",
            where="starts",
            advice=f"Choose among {', '.join(map(repr, STARTS))}, each once.",
        )
    if kind != "draws" and "informed" not in starts:
        raise OptionError(
            "nothing says where equilibrium is",
            where="starts",
            advice="Add 'informed'. A sampler that cannot start there is a function (instance, "
            "num_draws, seed).",
        )


# --- files ----------------------------------------------------------------------------------------


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder belong to this run.

    Raises
    ------
    WeightsError
        When it belongs to another.
    OptionError
        When there can be no such folder.
    """
    path = folder / "run.json"
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        changed = [k for k in identity if theirs.get(k) != identity[k]]
        if changed:
            raise WeightsError(
                f"this checkpoint is of another run: {', '.join(changed)} changed",
                where=str(folder),
                advice="Choose another folder, or delete this one.",
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"cannot be made a folder ({error.strerror})",
            where=str(folder),
            advice="Choose a folder that you may write to.",
        ) from error
    write_json(path, identity)


def _resumed(folder: Path | None, number: int) -> InstanceResult | None:
    path = None if folder is None else folder / f"problem-{number}.json"
    if path is None or not path.exists():
        return None
    try:
        return InstanceResult.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise WeightsError(
            f"it is damaged ({error})", where=str(path), advice="Delete it; it is run again."
        ) from error
