"""What a sampler did on problems with a known answer: results, numbers, words."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from pushforward.runs.estimate import to_jsonable
from pushforward.sampling.thermalization.identities import Identity
from pushforward.sampling.thermalization.rank_tests import RankTest
from pushforward.sampling.thermalization.verdict import Comparison, Plateau, Success, Verdict

__all__ = ["InstanceResult", "LocalChecks", "ThermalizationReport", "write_json"]

_SCORE_ALARM = 3.0
_R_HAT_ALARM = 1.1
_ADVICE = {
    "PASS": "Uninformed chains reach equilibrium within this budget. That holds for problems of "
    "this size, noise and architecture, not for harder ones.",
    "NOT_CONVERGED": "Do not trust averages over such chains, whatever R-hat says. Give a larger "
    "budget, more noise, another start or another sampler.",
    "KERNEL_BUG": "Chains leave the law that they started from: the sampler does not leave the "
    "posterior invariant. Look at its acceptance or conditional laws, at the prior precision and "
    "noise it assumes, and at warm-up that goes on adapting; convergence means nothing until then.",
    "NOT_CALIBRATED": "The draws are not draws from the posterior: the truth does not rank evenly "
    "among them.",
    "INCONCLUSIVE": "Informed chains do not yet say where equilibrium is, or not precisely enough. "
    "Give a larger budget, more chains or more seeds.",
}
_ADVICE_WITHOUT_STARTS = {
    "PASS": "The truth ranks evenly among the draws, as far as so many problems can tell.",
    "INCONCLUSIVE": "There are too few problems, or no uninformed start. Give more of them.",
}


@dataclass(frozen=True)
class LocalChecks:
    """What is usually looked at, of chains from one start. Stuck chains pass all of it.

    Parameters
    ----------
    r_hat
        Split R-hat of the test error among the chains from this start, over the last half.
    score
        Largest mean of ``d log P / d theta`` of a parameter tensor, in standard errors.
    residuals
        Distance of the summed squared residuals from their number, in standard deviations; NaN
        where there are none.
    """

    r_hat: float
    score: float
    residuals: float

    @property
    def quiet(self) -> bool:
        """Whether none of them raises an alarm."""
        stuck = not self.r_hat > _R_HAT_ALARM and not self.score > _SCORE_ALARM
        return stuck and not self.residuals > _SCORE_ALARM


@dataclass(frozen=True)
class InstanceResult:
    """One problem.

    Parameters
    ----------
    seed
        Of the problem.
    kernel
        Name of the sampler.
    equilibrium
        Where informed chains ended; None without any.
    comparisons
        By uninformed start.
    steps
        Of the curves.
    curves
        Test error by start, a mean over chains.
    identities
        Deviations from what is known in advance; empty when nothing is.
    ranks
        Of the teacher among the draws, by start and quantity.
    local
        By start.
    gibbs_error, predictive_variance
        Mean squared error of a draw's outputs, and variance of the draws' outputs, both at
        equilibrium; over problems, the first is twice the second.
    acceptance
        Of proposals, by start, where the sampler proposes.
    seconds
        It took.
    """

    seed: int
    kernel: str
    equilibrium: Plateau | None = None
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    steps: tuple[int, ...] = ()
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)
    identities: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, dict[str, float]] = field(default_factory=dict)
    local: dict[str, LocalChecks] = field(default_factory=dict)
    gibbs_error: float = math.nan
    predictive_variance: float = math.nan
    acceptance: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> InstanceResult:
        """Back from JSON.

        Parameters
        ----------
        fields
            As `to_jsonable` made them.

        Returns
        -------
        InstanceResult
            An equal one.
        """
        equilibrium = fields["equilibrium"]
        return cls(
            **{
                **fields,
                "equilibrium": None if equilibrium is None else Plateau(**equilibrium),
                "comparisons": {k: Comparison(**v) for k, v in fields["comparisons"].items()},
                "steps": tuple(fields["steps"]),
                "curves": {k: tuple(v) for k, v in fields["curves"].items()},
                "local": {k: LocalChecks(**v) for k, v in fields["local"].items()},
            }
        )


@dataclass(frozen=True)
class ThermalizationReport:
    """What a sampler did on synthetic problems with a known answer.

    Parameters
    ----------
    verdict
        ``"PASS"``, ``"NOT_CONVERGED"``, ``"KERNEL_BUG"`` or ``"INCONCLUSIVE"``; of a sampler
        without a start ``"NOT_CALIBRATED"`` instead of the middle two.
    problem
        In words.
    kernel
        Name of the sampler.
    budget
        Steps of each chain, or draws.
    num_chains
        From each start.
    required
        Fraction of problems that had to thermalise for a pass.
    tolerance
        Largest ratio to equilibrium.
    exact
        Whether the teacher was a posterior draw: only then are there identities and ranks.
    success
        Counts, fraction and interval by uninformed start.
    identities
        Means that are known in advance, of informed chains.
    ranks
        Tests of ranks. Those of informed chains test the kernel, those of uninformed ones the
        kernel and its convergence.
    instances
        The problems one by one.
    interrupted
        Whether problems are missing.
    """

    verdict: Verdict
    problem: str
    kernel: str
    budget: int
    num_chains: int
    required: float
    tolerance: float
    exact: bool
    success: dict[str, Success]
    identities: tuple[Identity, ...]
    ranks: tuple[RankTest, ...]
    instances: tuple[InstanceResult, ...]
    interrupted: bool = False

    @property
    def advice(self) -> str:
        """What the verdict means."""
        if self.success or self.verdict == "NOT_CALIBRATED":
            return _ADVICE[self.verdict]
        return _ADVICE_WITHOUT_STARTS.get(self.verdict, _ADVICE[self.verdict])

    @property
    def curves(self) -> dict[int, dict[str, tuple[tuple[int, ...], tuple[float, ...]]]]:
        """Steps and test errors by seed and start."""
        return {
            result.seed: {start: (result.steps, curve) for start, curve in result.curves.items()}
            for result in self.instances
        }

    @property
    def equilibrium_error(self) -> float:
        """Mean test error of informed chains at their end, over problems."""
        return _mean([r.equilibrium.mean for r in self.instances if r.equilibrium is not None])

    @property
    def seconds(self) -> float:
        """Of all problems."""
        return sum(result.seconds for result in self.instances)

    @property
    def quiet_failures(self) -> tuple[int, int]:
        """How many runs away from equilibrium no other check noticed, and how many there were."""
        away = [
            result.local[start]
            for result in self.instances
            for start, found in result.comparisons.items()
            if found.outcome == "away"
        ]
        return sum(local.quiet for local in away), len(away)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON; numbers that are not finite become None.

        Returns
        -------
        dict
            The fields, and what is computed from them.
        """
        fields: dict[str, Any] = to_jsonable(self)
        fields["success"] = {
            start: to_jsonable(found)
            | {"fraction": found.fraction, "interval": list(found.interval)}
            for start, found in self.success.items()
        }
        fields |= {"advice": self.advice, "equilibrium_error": self.equilibrium_error}
        finite: dict[str, Any] = _finite(fields)
        return finite

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` to a JSON file.

        Parameters
        ----------
        path
            Replaced if it exists, and never half written.
        """
        write_json(Path(path), self.to_dict())

    def plot(self) -> Any:
        """Test error against steps, informed and uninformed, which meet or do not.

        Returns
        -------
        matplotlib.figure.Figure
            One panel for each of up to nine problems.

        Raises
        ------
        OptionError
            When matplotlib is not installed.
        """
        from pushforward.sampling.thermalization.plots import plot_thermalization

        return plot_thermalization(self)

    def __repr__(self) -> str:
        return "\n".join(_lines(self))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all.

    Parameters
    ----------
    path
        Replaced if it exists.
    value
        In JSON's types.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


# --- words ----------------------------------------------------------------------------------------


def _lines(report: ThermalizationReport) -> list[str]:
    lines = [
        f"{report.verdict}: {report.kernel} on {len(report.instances)} problems"
        + (" (interrupted)" if report.interrupted else ""),
        f"  {report.advice}",
        f"  {report.problem}",
        f"  {report.budget:,} steps, {report.num_chains} chains from each start, "
        f"{report.seconds:.3g} s"
        if report.success
        else f"  {report.budget:,} draws, {report.seconds:.3g} s",
    ]
    if not report.exact:
        lines.append(
            "  labels without noise: the teacher is a favourable start, not a posterior draw, so "
            "nothing else is known in advance"
        )
    if report.success:
        lines.append(f"  equilibrium test error {report.equilibrium_error:.3g}")
    for start, found in report.success.items():
        low, high = found.interval
        ratios = [r.comparisons[start].ratio for r in report.instances]
        lines.append(
            f"  {start} start: {found.thermalized} of {found.total} thermalised "
            f"({100 * found.fraction:.0f} %, 95 % interval {100 * low:.0f} to {100 * high:.0f} %), "
            f"{found.away} away, {found.unclear} unclear; ratio to equilibrium "
            f"{_median(ratios):.3g} (median), {max(ratios):.3g} (largest)"
        )
    reasons = {
        result.equilibrium.reason
        for result in report.instances
        if result.equilibrium is not None and not result.equilibrium.settled
    }
    lines += [f"  unclear: {reason}" for reason in sorted(reasons)[:3]]
    lines += _test_lines(report)
    quiet, away = report.quiet_failures
    if report.success:
        r_hats = [local.r_hat for r in report.instances for local in r.local.values()]
        lines.append(
            f"  R-hat of the test error {_median(r_hats):.3f} (median). R-hat, score and residuals "
            "look at chains locally: they pass when chains are stuck together"
            + (f" (here in {quiet} of {away} runs away from equilibrium)" if away else "")
        )
    return lines


def _test_lines(report: ThermalizationReport) -> list[str]:
    lines = []
    if report.identities:
        worst = max(report.identities, key=lambda found: abs(found.z))
        bad = [found for found in report.identities if found.rejected]
        lines.append(
            f"  {len(report.identities)} identities of informed chains: "
            + (f"{len(bad)} rejected" if bad else "all hold")
            + f"; largest |z| {abs(worst.z):.2g} ({worst.name})"
        )
        lines += [
            f"    {found.name}: off by {found.mean:.3g} ± {found.standard_error:.2g}"
            for found in bad[:6]
        ]
    elif report.exact and report.success:
        lines.append("  too few problems to test identities")
    by_start: dict[str, list[RankTest]] = {}
    for test in report.ranks:
        by_start.setdefault(test.start, []).append(test)
    for start, tests in by_start.items():
        least = min(tests, key=lambda test: test.p_value)
        rejected = sum(test.rejected for test in tests)
        lines.append(
            f"  ranks, {start}: {rejected} of {len(tests)} quantities not uniform; smallest "
            f"p-value {least.p_value:.2g} ({least.quantity})"
        )
    gibbs = _mean([r.gibbs_error for r in report.instances])
    variance = _mean([r.predictive_variance for r in report.instances])
    if report.exact and report.success and math.isfinite(gibbs + variance):
        lines.append(
            f"  error of a draw {gibbs:.3g}, twice the variance of draws {2 * variance:.3g}: equal "
            "over many problems"
        )
    return lines


def _mean(values: Sequence[float]) -> float:
    kept = [value for value in values if math.isfinite(value)]
    return sum(kept) / len(kept) if kept else math.nan


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor([v for v in values if v == v] or [math.nan]).median())
