"""The section of the page on whether a sampler reaches the posterior: curves meet or do not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from pushforward.report.chain_figures import Band, meeting_svg
from pushforward.report.figures import can_draw
from pushforward.report.formatting import MISSING, duration, number, with_error
from pushforward.report.page import (
    Cell,
    Figure,
    Paragraph,
    Section,
    Table,
    Tile,
    Tone,
    Verdict,
)
from pushforward.runs.estimate import Status
from pushforward.sampling.thermalization.rank_tests import RankTest
from pushforward.sampling.thermalization.report import InstanceResult, ThermalizationReport

__all__ = ["thermalization_section"]

_STATUS: dict[str, Status] = {
    "PASS": "pass",
    "NOT_CONVERGED": "fail",
    "KERNEL_BUG": "fail",
    "NOT_CALIBRATED": "fail",
    "INCONCLUSIVE": "warn",
}
_TONES: dict[Status, Tone] = {"pass": "good", "warn": "warn", "fail": "bad"}
_HEADLINES = {
    "PASS": "{kernel} reaches the posterior of these problems in {budget} steps.",
    "NOT_CONVERGED": "{kernel} does not reach the posterior of these problems in {budget} steps.",
    "KERNEL_BUG": "{kernel} leaves the posterior even from inside: it samples another law.",
    "NOT_CALIBRATED": "{kernel} does not draw from the posterior of these problems.",
    "INCONCLUSIVE": "{budget} steps do not tell whether {kernel} reaches the posterior.",
}
_OUTCOMES: dict[str, Tone] = {"thermalized": "good", "away": "bad", "unclear": "warn"}
_MOST_PROBLEMS = 40
_MOST_TESTS = 12


def thermalization_section(
    report: ThermalizationReport, *, about: str = "", notes: Sequence[str] = ()
) -> Section:
    """The section of the page on whether a sampler reaches the posterior.

    Parameters
    ----------
    report
        Of `pushforward.sampling.thermalization.thermalize`.
    about
        What was sampled, in a sentence or two.
    notes
        What was chosen on behalf of the reader.

    Returns
    -------
    Section
        For a `Report`.
    """
    blocks: list[Table | Figure | Paragraph] = [_method(report, about, notes)]
    blocks += _meeting(report)
    if report.success:
        blocks.append(_success_table(report))
    if report.identities:
        blocks.append(_identities_table(report))
    if report.ranks:
        blocks.append(_ranks_table(report.ranks))
    if report.success:
        blocks += [_local(report), _problems_table(report)]
    return Section(
        key="thermalization",
        title="Thermalization",
        question="Do chains that know nothing reach the posterior, where chains that start at one "
        "of its draws already are?",
        verdict=_verdict(report),
        blocks=tuple(blocks),
        results={**report.to_dict(), "notes": list(notes)},
    )


def _verdict(report: ThermalizationReport) -> Verdict:
    status = _STATUS[report.verdict]
    headline = _HEADLINES[report.verdict].format(kernel=report.kernel, budget=f"{report.budget:,}")
    sentences = [report.advice]
    reasons = {
        r.equilibrium.reason
        for r in report.instances
        if r.equilibrium is not None and not r.equilibrium.settled
    }
    sentences += [f"Unclear: {reason}." for reason in sorted(reasons)[:3]]
    if report.interrupted:
        sentences.append("The run was interrupted: problems are missing.")
    if not report.exact:
        sentences.append(
            "The labels have no noise, so the teacher is no posterior draw: identities and ranks "
            "are not known."
        )
    tiles = [
        Tile(
            "Verdict",
            report.verdict.replace("_", " "),
            f"{report.kernel} on {len(report.instances)} problems",
            _TONES[status],
        )
    ]
    for start, found in report.success.items():
        low, high = found.interval
        enough = found.fraction >= report.required - 1e-9
        tiles.append(
            Tile(
                f"Thermalised, {start} start",
                f"{found.thermalized} of {found.total}",
                f"95 % interval {_percent(low)} to {_percent(high)}; {_percent(report.required)} "
                "are asked for",
                "good" if enough else "bad" if found.away else "warn",
            )
        )
    if report.identities:
        bad = sum(found.rejected for found in report.identities)
        tiles.append(
            Tile(
                "Known means that are missed",
                f"{bad} of {len(report.identities)}",
                "by chains that start at a posterior draw",
                "bad" if bad else "good",
            )
        )
    if report.ranks:
        bad = sum(test.rejected for test in report.ranks)
        tiles.append(
            Tile(
                "Uneven ranks",
                f"{bad} of {len(report.ranks)}",
                "of the truth among the draws",
                "bad" if bad else "good",
            )
        )
    return Verdict(status, headline, tuple(sentences), tuple(tiles))


def _method(report: ThermalizationReport, about: str, notes: Sequence[str]) -> Paragraph:
    text = (
        f"{about} The targets of each problem are made by a teacher, a network with parameters "
        "drawn from the prior; so the teacher is one exact draw of the posterior. Informed chains "
        "start there, in equilibrium; the others know nothing. Where their test errors, against "
        "the teacher without noise, do not meet, the sampler has not reached the posterior in its "
        f"budget. {report.problem}; {report.budget:,} steps of {report.num_chains} chains from "
        f"each start, {duration(report.seconds)} in all."
    )
    return Paragraph(" ".join([text.strip(), *notes]), title="How it is tested")


def _meeting(report: ThermalizationReport) -> Iterator[Figure | Paragraph]:
    shown = [result for result in report.instances if result.curves]
    if not shown:
        return
    if not can_draw():
        yield Paragraph(
            "matplotlib is not installed, so this page has tables only. For the figures: "
            "pip install 'pushforward[plot]'."
        )
        return
    relative = all(r.equilibrium is not None and r.equilibrium.mean > 0 for r in shown)
    bands = [_band(shown, start, relative=relative) for start in shown[0].curves]
    drawn = [band for band in bands if band is not None]
    if not drawn:
        return
    strip = (1 / report.tolerance, report.tolerance) if relative else None
    yield Figure(
        "Do the curves meet?",
        meeting_svg(
            drawn,
            "meeting",
            ylabel="test error, relative to equilibrium" if relative else "test error",
            equilibrium=strip,
        ),
        f"Median over {len(shown)} problems, with the quartiles. Informed chains leave the draw "
        "that they start at within a few steps and then mark equilibrium, the grey strip; chains "
        "that have thermalised end within it.",
        "Test error against steps from each start. The numbers are in result.json.",
    )


def _band(shown: Sequence[InstanceResult], start: str, *, relative: bool) -> Band | None:
    """Median and quartiles over the problems at the steps that all have."""
    steps = shown[0].steps
    rows = []
    for result in shown:
        if result.steps != steps or start not in result.curves:
            continue
        scale = result.equilibrium.mean if relative and result.equilibrium is not None else 1.0
        rows.append([value / scale for value in result.curves[start]])
    if not rows:
        return None
    # Chains that left for infinity are not drawn; the table of problems has them.
    values = torch.tensor(rows, dtype=torch.float64).nan_to_num(torch.nan, torch.nan, torch.nan)
    kept = torch.isfinite(values).any(0)
    if not bool(kept.any()):
        return None
    at = [step for step, keep in zip(steps, kept.tolist(), strict=True) if keep]
    quartiles = torch.nanquantile(values[:, kept], values.new_tensor([0.25, 0.5, 0.75]), dim=0)
    low, middle, high = quartiles.tolist()
    return Band(start, at, middle, low, high)


def _success_table(report: ThermalizationReport) -> Table:
    rows = []
    for start, found in report.success.items():
        low, high = found.interval
        results = [r.comparisons[start] for r in report.instances]
        steps = [c.convergence_step for c in results if c.convergence_step is not None]
        rows.append(
            (
                Cell(start),
                Cell(f"{found.thermalized}", "good" if found.thermalized else ""),
                Cell(f"{found.away}", "bad" if found.away else ""),
                Cell(f"{found.unclear}", "warn" if found.unclear else ""),
                Cell(_percent(found.fraction)),
                Cell(f"{_percent(low)} to {_percent(high)}"),
                Cell(number(_median([c.ratio for c in results]), 3)),
                Cell(number(_median([float(s) for s in steps]), 3)),
            )
        )
    return Table(
        "How often chains thermalise",
        (
            "start",
            "thermalised",
            "away",
            "unclear",
            "share",
            "95 % interval",
            "error over equilibrium, median",
            "steps it took, median",
        ),
        tuple(rows),
        f"Thermalised: the mean over the last quarter is within a factor {report.tolerance:g} of "
        "equilibrium and within three standard errors. Unclear: the informed chains do not say "
        "where equilibrium is. Intervals of Wilson, over problems.",
    )


def _identities_table(report: ThermalizationReport) -> Table:
    ordered = sorted(report.identities, key=lambda found: -_size(found.z))
    rows = tuple(
        (
            Cell(found.name),
            Cell(with_error(found.mean, found.standard_error)),
            Cell(number(found.z, 2), "bad" if found.rejected else ""),
            Cell(number(found.p_value, 2)),
            Cell("missed" if found.rejected else "holds", "bad" if found.rejected else "good"),
        )
        for found in ordered[:_MOST_TESTS]
    )
    more = len(ordered) - len(rows)
    return Table(
        "What is known in advance",
        ("", "deviation", "in standard errors", "p-value", ""),
        rows,
        "Chains that start at a posterior draw keep its law if the sampler is right, so these "
        "deviations are 0 on average over problems, whatever the budget. Fewer than one in 10,000 "
        "tests of a right sampler miss any."
        + (f" {more} more, closer to 0, are in result.json." if more > 0 else ""),
    )


def _ranks_table(ranks: Sequence[RankTest]) -> Table:
    ordered = sorted(ranks, key=lambda test: test.p_value)
    rows = tuple(
        (
            Cell(test.quantity + ("" if test.start == "draws" else f", {test.start} start")),
            Cell(f"{len(test.ranks)}"),
            Cell(number(sum(test.ranks) / len(test.ranks), 2) if test.ranks else MISSING),
            Cell(number(test.p_value, 2), "bad" if test.rejected else ""),
            Cell("uneven" if test.rejected else "even", "bad" if test.rejected else "good"),
        )
        for test in ordered[:_MOST_TESTS]
    )
    more = len(ordered) - len(rows)
    return Table(
        "Ranks of the truth among the draws",
        ("", "problems", "mean rank", "p-value", ""),
        rows,
        "Among draws of the posterior the truth takes every rank equally often; mean ranks are "
        "near 0.5. From informed starts this tests the sampler, from the others also whether it "
        "converged." + (f" {more} more are in result.json." if more > 0 else ""),
    )


def _local(report: ThermalizationReport) -> Paragraph:
    quiet, away = report.quiet_failures
    r_hats = [local.r_hat for r in report.instances for local in r.local.values()]
    scores = [local.score for r in report.instances for local in r.local.values()]
    text = (
        f"R-hat of the test error is {number(_median(r_hats), 4)} (median), the mean score of a "
        f"parameter tensor {number(_median(scores), 2)} standard errors from 0. Beware: R-hat, "
        "scores and residual energies look at chains locally. They pass when chains are stuck, "
        "each alone or all together, in a place that is not the posterior."
    )
    if away:
        text += f" Here they raise no alarm in {quiet} of {away} runs that ended elsewhere."
    return Paragraph(text, title="What the usual checks would say")


def _problems_table(report: ThermalizationReport) -> Table:
    starts = tuple(report.success)
    rows = []
    for result in report.instances[:_MOST_PROBLEMS]:
        rest = result.equilibrium
        cells = [
            Cell(f"{result.seed}"),
            Cell(MISSING if rest is None else with_error(rest.mean, rest.standard_error)),
        ]
        for start in starts:
            found = result.comparisons[start]
            cells += [
                Cell(number(found.ratio, 3)),
                Cell(found.outcome.replace("thermalized", "thermalised"), _OUTCOMES[found.outcome]),
            ]
        rows.append(tuple(cells))
    heads = [head for start in starts for head in (f"{start}: over equilibrium", f"{start} start")]
    more = len(report.instances) - len(rows)
    return Table(
        "Problem by problem",
        ("seed", "error in equilibrium", *heads),
        tuple(rows),
        f"{more} more are in result.json." if more > 0 else "",
    )


def _median(values: Sequence[float]) -> float:
    kept = [value for value in values if not math.isnan(value)]
    return float(torch.tensor(kept, dtype=torch.float64).median()) if kept else math.nan


def _size(z: float) -> float:
    return math.inf if math.isnan(z) else abs(z)


def _percent(fraction: float) -> str:
    return f"{number(100 * fraction, 3)} %"
