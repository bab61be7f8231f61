"""The section of the page on expected outputs, their spread and tails, each beside Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from pushforward.cumulants.laws import GaussianLaw
from pushforward.report.comparison import (
    LARGE_DEVIATION,
    LARGE_TAIL_RATIO,
    Accuracy,
    Comparison,
    Order,
    compare,
)
from pushforward.report.events import Event
from pushforward.report.figures import Interval, can_draw, spread_svg, tail_curves_svg
from pushforward.report.formatting import (
    duration,
    number,
    probability,
    ratio,
    scientific,
    with_error,
)
from pushforward.report.page import (
    Cell,
    CheckList,
    Figure,
    Paragraph,
    Section,
    Table,
    Tile,
    Verdict,
)
from pushforward.runs.estimate import worst_status

__all__ = ["expected_output_section"]

_ROWS_SHOWN = 20
_TINY = 1e-300
_EVENT_NOTE = (
    "Saddlepoint: from the propagated mean, variance, third and fourth cumulant, without an error bar of "
    "its own. Gaussian: from mean and variance alone. Agreement: where the saddlepoint lies relative to the "
    "sampled interval. Samples for 10 %: plain samples that would know the probability to a tenth of itself."
)


def expected_output_section(
    net: nn.Module,
    law: GaussianLaw,
    *,
    labels: Sequence[str] | None = None,
    events: Sequence[Event] | None = None,
    data: Tensor | None = None,
    num_samples: int = 100_000,
    seed: int = 0,
    highest_order: Order = 3,
    progress: bool | None = None,
) -> Section:
    """The section of the page on expected outputs, spread and tails.

    Parameters
    ----------
    net, law, labels, events, data, num_samples, seed, highest_order, progress
        As in `pushforward.report.comparison.compare`.

    Returns
    -------
    Section
        For a `Report`.
    """
    result = compare(
        net,
        law,
        labels=labels,
        events=events,
        data=data,
        num_samples=num_samples,
        seed=seed,
        highest_order=highest_order,
        progress=progress,
    )
    return Section(
        key="expected-output",
        title="Expected output",
        question="What does the network answer on average, how far do its answers spread, and how "
        "likely are the rare ones?",
        verdict=_verdict(result),
        blocks=(
            _assumption(result),
            _means_table(result),
            *_spread_figure(result),
            *_event_tables(result),
            *_tail_figure(result),
            _cost_table(result),
            CheckList("Checks", result.checks),
        ),
        results=result,
    )


def _verdict(result: Comparison) -> Verdict:
    status = worst_status(check for _, check in result.checks)
    deviations, events = result.deviations.abs(), result.events
    worst = int(deviations.argmax())
    mine, check = result.costs[result.chosen], result.costs[-1]
    assert mine.measured is not None
    inside, largest = sum(events.inside), max(events.distance)
    raised = {item.name for _, item in result.checks if item.status != "pass"}
    cheaper = check.flops / mine.flops
    return Verdict(
        status=status,
        headline=_headline(raised, result),
        sentences=(
            f"{_sentence_of_equal_cost(mine, check)}",
            *(
                [
                    f"{item.detail[0].upper()}{item.detail[1:]} {item.advice}".strip()
                    for _, item in result.checks
                    if item.status != "pass"
                ]
            ),
            *([result.skipped] if result.skipped else []),
        ),
        tiles=(
            Tile(
                "Largest difference of a mean",
                f"{number(float(deviations[worst]), 2)} s.e.",
                f"combined standard errors, output {result.labels[worst]}",
                "warn" if "means-agree" in raised else "good",
            ),
            Tile(
                "Error of the means",
                _measured_error(mine, check),
                f"of a standard deviation, root mean square; stated: {_percent(mine.stated)}",
            ),
            Tile(
                "Tail probabilities",
                f"{inside} of {len(events.names)}",
                "in the sampled 95 % interval"
                + (
                    f"; the worst is outside by a factor {number(largest, 2)}"
                    if largest > 1
                    else ""
                ),
                "warn" if "tails-agree" in raised else "good",
            ),
            Tile(
                "Cost, Monte Carlo ÷ propagation",
                ratio(cheaper),
                f"{scientific(mine.flops)} against {scientific(check.flops)} FLOPs; "
                f"{duration(mine.seconds)} against {duration(check.seconds)}",
            ),
        ),
    )


def _headline(raised: set[str], result: Comparison) -> str:
    names = {
        "means-agree": "means",
        "spreads-agree": "spreads",
        "tails-agree": "tail probabilities",
    }
    good = [name for key, name in names.items() if key not in raised]
    bad = [name for key, name in names.items() if key in raised]
    if result.best.status == "fail":
        return "The propagation broke down on this network: use the sampled numbers."
    if not bad:
        return "Propagated means, spreads and tail probabilities agree with Monte Carlo."
    agree = f"Propagated {_and(good)} agree with Monte Carlo; " if good else "Propagated "
    return f"{agree}{_and(bad)} do not all agree{'' if good else ' with Monte Carlo'}."


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _sentence_of_equal_cost(mine: Accuracy, check: Accuracy) -> str:
    assert mine.measured is not None
    error = max(mine.measured, check.stated)
    bound = "at least " if mine.measured < check.stated else ""
    words = [
        f"{bound}{ratio(rival / error)} smaller"
        if rival > error
        else f"{ratio(error / rival)} larger"
        for rival in (mine.plain, mine.frames)
    ]
    return (
        f"For the FLOPs of {mine.method}, Monte Carlo affords {number(mine.passes, 3)} forward "
        f"passes: the error of the propagated means is {words[0]} than that of plain sampling and "
        f"{words[1]} than that of {check.method.split(', ')[1]}."
    )


def _assumption(result: Comparison) -> Paragraph:
    text = (
        f"The inputs are taken to follow {result.law}. Both columns below, propagated and sampled, "
        "answer for that law; their agreement says nothing about how well it describes the data."
    )
    if result.data_mean is not None and result.data_deviation is not None:
        scale = result.data_deviation.clamp(min=_TINY)
        gap = ((_column(result.best.mean) - result.data_mean) / scale).abs()
        worst = int(gap.argmax())
        text += (
            f" For comparison the network was also run on the {result.num_examples:,} examples "
            f"themselves: its mean outputs there differ from those under the Gaussian law by up to "
            f"{number(float(gap[worst]), 2)} standard deviations (output {result.labels[worst]}). "
            "Where the column “in the data” is far from the other two, the assumption is what fails."
        )
    return Paragraph(text, title="What is assumed")


def _means_table(result: Comparison) -> Table:
    best, check = result.best, result.sampled
    with_data = result.data_mean is not None
    mean, variance = _column(best.mean).tolist(), _column(best.variance).clamp(min=0)
    error = (
        [None] * len(mean) if best.standard_error is None else _column(best.standard_error).tolist()
    )
    deviation = variance.sqrt().tolist()
    sampled_deviation = check.variance.clamp(min=0).sqrt()
    sampled_error = check.variance_standard_error / (2 * sampled_deviation.clamp(min=_TINY))
    rows = []
    for i, label in enumerate(result.labels[:_ROWS_SHOWN]):
        z = float(result.deviations[i])
        row: list[str | Cell] = [
            label,
            with_error(mean[i], error[i]),
            with_error(float(check.mean[i]), float(check.standard_error[i])),
            Cell(number(z, 2), "warn" if abs(z) > LARGE_DEVIATION else ""),
            number(deviation[i]),
            with_error(float(sampled_deviation[i]), float(sampled_error[i])),
        ]
        if with_data:
            assert result.data_mean is not None
            row.append(Cell(number(float(result.data_mean[i])), "muted"))
            spread = math.nan if result.data_deviation is None else float(result.data_deviation[i])
            row.append(Cell(number(spread), "muted"))
        rows.append(tuple(row))
    note = (
        f"Propagated by {best.method}. Δ is the difference of the means in combined standard errors, "
        "the root of the sum of both squared."
    )
    return Table(
        "Expected outputs and their spread",
        (
            "output",
            "mean, propagated",
            "mean, Monte Carlo",
            "Δ",
            "s.d., propagated",
            "s.d., Monte Carlo",
            *(("mean in the data", "s.d. in the data") if with_data else ()),
        ),
        tuple(rows),
        note + _left_out(len(result.labels)),
    )


def _left_out(outputs: int) -> str:
    if outputs <= _ROWS_SHOWN:
        return ""
    return f" Shown: the first {_ROWS_SHOWN} of {outputs:,} outputs; result.json has all."


def _spread_figure(result: Comparison) -> list[Figure | Paragraph]:
    if not can_draw():
        return [
            Paragraph(
                "matplotlib is not installed, so this page has tables only. For the figures: "
                "pip install 'pushforward[plot]'."
            )
        ]
    best, check = result.best, result.sampled
    error = _column(best.standard_error).expand(len(result.labels))
    columns = zip(
        result.labels,
        _column(best.mean).tolist(),
        error.tolist(),
        _column(best.variance).clamp(min=0).sqrt().tolist(),
        check.mean.tolist(),
        check.standard_error.tolist(),
        check.variance.clamp(min=0).sqrt().tolist(),
        strict=True,
    )
    intervals = [Interval(*row) for row in columns][:_ROWS_SHOWN]
    return [
        Figure(
            "Propagated beside sampled",
            spread_svg(intervals, "spread"),
            "Left: the law of each output. Right: what separates the two means, with the propagated "
            "error bar (thin) and the Monte Carlo standard error (thick).",
            "Mean and standard deviation of each output, propagated and sampled, and the difference "
            "of the means. The numbers are in the table above.",
        )
    ]


def _event_tables(result: Comparison) -> list[Table]:
    events = result.events
    tables = []
    for group in dict.fromkeys(events.groups):
        rows = []
        for i in [index for index, name in enumerate(events.groups) if name == group]:
            sampled, propagated = float(events.sampled[i]), float(events.saddlepoint[i])
            row: list[str | Cell] = [
                events.names[i],
                probability(propagated),
                probability(float(events.gaussian[i])),
                probability(sampled),
                _interval(float(events.lower[i]), float(events.upper[i])),
                _judgement(events.inside[i], events.distance[i]),
                _samples_needed(sampled or propagated),
            ]
            if events.observed is not None:
                row.append(Cell(probability(float(events.observed[i])), "muted"))
            rows.append(tuple(row))
        tables.append(
            Table(
                f"Tail probabilities: {group[0].lower()}{group[1:]}",
                (
                    "event",
                    "saddlepoint",
                    "Gaussian",
                    "Monte Carlo",
                    "95 % interval",
                    "agreement",
                    "samples for 10 %",
                    *(() if events.observed is None else ("in the data",)),
                ),
                tuple(rows),
                _EVENT_NOTE,
            )
        )
    return tables


def _interval(lower: float, upper: float) -> str:
    return f"{probability(lower)} – {probability(upper)}"


def _judgement(inside: bool, distance: float) -> Cell:
    if inside:
        return Cell("inside", "good")
    tone = "warn" if distance > LARGE_TAIL_RATIO else ""
    return Cell(f"off by {ratio(distance)}" if distance >= 1.005 else "at the edge", tone)  # type: ignore[arg-type]


def _samples_needed(p: float) -> str:
    """Plain samples for a relative standard error of 10 %."""
    return number(100 * (1 - p) / p, 2) if 0 < p < 1 else "–"


def _tail_figure(result: Comparison) -> list[Figure]:
    if not can_draw() or not result.curves:
        return []
    return [
        Figure(
            "How the tail falls",
            tail_curves_svg(result.curves, "tails"),
            f"Probability of exceeding t. Where the {result.curves[0].num_samples:,} samples see "
            "nothing, only the upper end of their interval is left. Dotted: the threshold of the event in the table.",
            "Tail probability against threshold on a logarithmic scale, by saddlepoint, Gaussian and "
            "Monte Carlo with its interval.",
        )
    ]


def _cost_table(result: Comparison) -> Table:
    check = result.costs[-1]
    rows = []
    for item in result.costs:
        rows.append(
            (
                item.method,
                scientific(item.flops),
                duration(item.seconds),
                number(item.passes, 3) if item.passes < 1e4 else f"{item.passes:,.0f}",
                _percent(item.stated),
                "–" if item.measured is None else _measured_error(item, check),
                _percent(item.frames),
                _percent(item.plain),
            )
        )
    return Table(
        "What it cost, and what sampling gives for the same FLOPs",
        (
            "method",
            "FLOPs",
            "time",
            "forward passes for the FLOPs",
            "error of the means, stated",
            "error of the means, measured",
            f"{result.sampled.design} at these FLOPs",
            "plain sampling at these FLOPs",
        ),
        tuple(rows),
        "Errors are root mean squares over the outputs, in per cent of their standard deviation. "
        "Measured: against the Monte Carlo check, whose own error is subtracted. FLOPs and time of a "
        "propagation include its error bar. The last two columns are the errors that Monte Carlo "
        "would have if it spent as much.",
        strong=result.chosen,
    )


def _percent(fraction: float) -> str:
    return "–" if not math.isfinite(fraction) else f"{number(100 * fraction, 2)} %"


def _measured_error(item: Accuracy, check: Accuracy) -> str:
    assert item.measured is not None
    if item.measured < check.stated:
        return f"< {_percent(check.stated)}"
    return _percent(item.measured)
