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
    MINUS,
    MISSING,
    duration,
    interval,
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
    Tone,
    Verdict,
)
from pushforward.runs.estimate import worst_status

__all__ = ["expected_output_section"]

_ROWS_SHOWN = 20
_TINY = 1e-300
_COMMON = 10  # occurrences that the law predicts among the examples
_EVENT_NOTE = (
    "Saddlepoint: from the propagated mean, variance, third and fourth cumulant; it has no error "
    "bar of its own. Gaussian: from mean and variance alone. Agreement: whether the saddlepoint "
    "lies in the sampled interval, or by what factor it is outside. Samples for 10 %: plain "
    "samples that would know the probability to a tenth of itself."
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
    outputs, events = result.outputs, result.events
    worst = int(outputs.difference.abs().argmax())
    mine, check = result.costs[result.chosen], result.costs[-1]
    raised = [item for _, item in result.checks if item.status != "pass"]
    names = {item.name for item in raised}
    close = sum(distance <= LARGE_TAIL_RATIO for distance in events.distance)
    return Verdict(
        status=worst_status(item for _, item in result.checks),
        headline=_headline(names, result.best.status == "fail"),
        sentences=(
            _sentence_of_equal_cost(mine, check, result.sampled.design),
            *(f"{item.detail[0].upper()}{item.detail[1:]} {item.advice}" for item in raised),
            *([result.skipped] if result.skipped else []),
        ),
        tiles=(
            Tile(
                "Largest difference of a mean",
                f"{abs(float(outputs.difference[worst])):.2f} s.e.",
                f"combined standard errors of propagation and sampling, output "
                f"{_quoted(result.labels[worst])}",
                "warn" if "means-agree" in names else "good",
            ),
            Tile(
                "Error of the propagated means",
                _measured_error(mine, check),
                "of a standard deviation of the outputs; the error bar says "
                f"{_percent(mine.stated)}",
            ),
            Tile(
                "Tail probabilities that agree",
                f"{close} of {len(events.names)}",
                f"within a factor {LARGE_TAIL_RATIO:g} of the sampled interval, "
                f"{sum(events.inside)} inside it",
                "warn" if "tails-agree" in names else "good",
            ),
            Tile(
                "Cost of the Monte Carlo check",
                ratio(check.flops / mine.flops),
                f"that of propagation: {scientific(check.flops)} FLOPs in "
                f"{duration(check.seconds)} against {scientific(mine.flops)} FLOPs in "
                f"{duration(mine.seconds)}",
            ),
        ),
    )


def _headline(raised: set[str], broken: bool) -> str:
    if broken:
        return "The propagation broke down on this network: use the sampled numbers."
    answers = {
        "means-agree": "means",
        "spreads-agree": "spreads",
        "tails-agree": "tail probabilities",
    }
    good = [name for check, name in answers.items() if check not in raised]
    bad = [name for check, name in answers.items() if check in raised]
    if not bad:
        return "The propagated means, spreads and tail probabilities agree with Monte Carlo."
    if not good:
        return "The propagated means, spreads and tail probabilities disagree with Monte Carlo."
    return (
        f"The propagated {' and '.join(good)} agree with Monte Carlo; "
        f"not all {' and '.join(bad)} do."
    )


def _sentence_of_equal_cost(mine: Accuracy, check: Accuracy, design: str) -> str:
    assert mine.measured is not None
    error = max(mine.measured, check.stated)
    rivals = {"plain sampling": mine.plain, f"the design of the check ({design})": mine.designed}
    bound = "at least " if mine.measured < check.stated else ""
    words = []
    for name, rival in rivals.items():
        if error <= 0 or rival <= 0:
            continue
        size = f"{bound}{ratio(rival / error)} smaller"
        words.append(
            f"{size if rival > error else f'{ratio(error / rival)} larger'} than by {name}"
        )
    if not words:
        return "No output varies."
    return (
        f"The FLOPs of {mine.method} buy {number(mine.passes, 3)} forward passes. For those, the "
        f"error of the means is {' and '.join(words)}."
    )


def _assumption(result: Comparison) -> Paragraph:
    text = (
        f"The inputs are taken to be Gaussian: {result.law}. The propagated and the sampled "
        "columns both answer for that law, so their agreement says nothing about how well it "
        "describes the data."
    )
    outputs = result.outputs
    if outputs.data_mean is not None and outputs.data_deviation is not None:
        gap = (outputs.mean - outputs.data_mean) / outputs.data_deviation.clamp(min=_TINY)
        worst = int(gap.abs().argmax())
        text += (
            f" To see that, the network was also run on the {result.num_examples:,} examples "
            "themselves. Its mean outputs there differ from those under the Gaussian law by up to "
            f"{number(abs(float(gap[worst])), 2)} standard deviations (output "
            f"{_quoted(result.labels[worst])}).{_worst_event(result)} Where a column “in the data” "
            "is far from the others, it is the assumption that fails."
        )
    return Paragraph(text, title="What is assumed")


def _worst_event(result: Comparison) -> str:
    """Which event the Gaussian law misjudges most, among those common enough to tell.

    Returns
    -------
    str
        A sentence, or nothing when no event is common enough.
    """
    events = result.events
    assert events.observed is not None
    expected = (events.sampled * result.num_examples).tolist()
    common = [i for i, count in enumerate(expected) if count >= _COMMON]
    if not common:
        return ""
    # Half an occurrence keeps an event that never happens in the data comparable.
    factors = {
        i: (float(events.observed[i]) * result.num_examples + 0.5) / expected[i] for i in common
    }
    worst = max(factors, key=lambda i: abs(math.log(factors[i])))
    return (
        f" Of the events below the law misjudges {events.names[worst]} most: probability "
        f"{probability(float(events.sampled[worst]))} under the law, share "
        f"{probability(float(events.observed[worst]))} of the examples."
    )


def _means_table(result: Comparison) -> Table:
    x = result.outputs
    known = result.best.standard_error is not None
    rows = []
    for i, label in enumerate(result.labels[:_ROWS_SHOWN]):
        difference = float(x.difference[i])
        row = [
            Cell(label),
            Cell(with_error(float(x.mean[i]), float(x.error[i]) if known else None)),
            Cell(with_error(float(x.sampled_mean[i]), float(x.sampled_error[i]))),
            Cell(_two_decimals(difference), "warn" if abs(difference) > LARGE_DEVIATION else ""),
            Cell(number(float(x.deviation[i]))),
            Cell(with_error(float(x.sampled_deviation[i]), float(x.sampled_deviation_error[i]))),
        ]
        if x.data_mean is not None and x.data_deviation is not None:
            row += [
                Cell(number(float(values[i])), "muted")
                for values in (x.data_mean, x.data_deviation)
            ]
        rows.append(tuple(row))
    left_out = len(result.labels) - _ROWS_SHOWN
    return Table(
        "Expected outputs and their spread",
        (
            "output",
            "mean, propagated",
            "mean, Monte Carlo",
            "difference in s.e.",
            "s.d., propagated",
            "s.d., Monte Carlo",
            *(("mean in the data", "s.d. in the data") if x.data_mean is not None else ()),
        ),
        tuple(rows),
        f"Propagated by {result.best.method}; {result.sampled.num_samples:,} forward passes of "
        f"Monte Carlo ({result.sampled.design}). ± is one standard error; the difference is in "
        "units of the root of the sum of both squared; s.d. is the standard deviation of the "
        "output." + (f" {left_out:,} more outputs are in result.json." if left_out > 0 else ""),
    )


def _spread_figure(result: Comparison) -> list[Figure | Paragraph]:
    if not can_draw():
        return [
            Paragraph(
                "matplotlib is not installed, so this page has tables only. For the figures: "
                "pip install 'pushforward[plot]'."
            )
        ]
    x = result.outputs
    columns = (
        x.mean,
        x.error,
        x.deviation,
        x.sampled_mean,
        x.sampled_error,
        x.sampled_deviation,
    )
    rows = zip(result.labels, *(column.tolist() for column in columns), strict=True)
    intervals = [Interval(*row) for row in rows][:_ROWS_SHOWN]
    return [
        Figure(
            "Propagated beside sampled",
            spread_svg(intervals, "spread"),
            "Left: the law of each output. Right: what separates the two means, with the "
            "propagated error bar (thin) and the Monte Carlo standard error (thick).",
            "Mean and standard deviation of each output, propagated and sampled, and the "
            "difference of the means. The numbers are in the table above.",
        )
    ]


def _event_tables(result: Comparison) -> list[Table]:
    events = result.events
    columns = (
        "event",
        "propagated, saddlepoint",
        "propagated, Gaussian",
        "Monte Carlo",
        "its 95 % interval",
        "agreement",
        "samples for 10 %",
        *(() if events.observed is None else ("in the data",)),
    )
    groups = list(dict.fromkeys(events.groups))
    return [
        Table(
            f"Tail probabilities: {group[0].lower()}{group[1:]}",
            columns,
            tuple(_event_row(result, i) for i, name in enumerate(events.groups) if name == group),
            _EVENT_NOTE if group == groups[-1] else "",
        )
        for group in groups
    ]


def _event_row(result: Comparison, i: int) -> tuple[Cell, ...]:
    events = result.events
    sampled, propagated = float(events.sampled[i]), float(events.saddlepoint[i])
    row = [
        Cell(events.names[i]),
        Cell(probability(propagated)),
        Cell(probability(float(events.gaussian[i])), "muted"),
        Cell(probability(sampled)),
        Cell(interval(float(events.lower[i]), float(events.upper[i]))),
        _judgement(events.inside[i], events.distance[i]),
        Cell(_samples_needed(sampled or propagated)),
    ]
    if events.observed is not None:
        row.append(Cell(probability(float(events.observed[i])), "muted"))
    return tuple(row)


def _judgement(inside: bool, distance: float) -> Cell:
    if inside:
        return Cell("inside", "good")
    tone: Tone = "warn" if distance > LARGE_TAIL_RATIO else ""
    return Cell(f"off by {ratio(distance)}", tone)


def _samples_needed(p: float) -> str:
    return number(100 * (1 - p) / p, 2) if 0 < p < 1 else MISSING


def _tail_figure(result: Comparison) -> list[Figure]:
    if not can_draw():
        return []
    samples = result.curves[0].num_samples
    return [
        Figure(
            "How the tail falls",
            tail_curves_svg(result.curves, "tails"),
            f"Probability of exceeding t. Where the {samples:,} samples see nothing, only the "
            "upper end of their interval is left. Dotted: the threshold of the event in the table.",
            "Tail probability against threshold on a logarithmic scale, by saddlepoint, Gaussian "
            "and Monte Carlo with its interval.",
        )
    ]


def _cost_table(result: Comparison) -> Table:
    check = result.costs[-1]
    return Table(
        "What it cost, and what sampling gives for the same FLOPs",
        (
            "method",
            "FLOPs",
            "time",
            "error of the means, stated",
            "error of the means, measured",
            "forward passes for these FLOPs",
            f"their error, {result.sampled.design}",
            "their error, plain sampling",
        ),
        tuple(
            (
                item.method,
                scientific(item.flops),
                duration(item.seconds),
                _percent(item.stated),
                MISSING if item.measured is None else _measured_error(item, check),
                f"{item.passes:,.0f}",
                _percent(item.designed),
                _percent(item.plain),
            )
            for item in result.costs
        ),
        "Errors are root mean squares over the outputs, in per cent of their standard deviation. "
        "Measured: against the Monte Carlo check, whose own error is subtracted. FLOPs and time "
        "of a propagation include its error bar. Those of the check are for sampling alone.",
        strong=result.chosen,
    )


def _quoted(label: str) -> str:
    return f"“{label}”"


def _two_decimals(value: float) -> str:
    return f"{value:.2f}".replace("-", MINUS)


def _percent(fraction: float) -> str:
    return MISSING if not math.isfinite(fraction) else f"{number(100 * fraction, 2)} %"


def _measured_error(item: Accuracy, check: Accuracy) -> str:
    assert item.measured is not None
    if item.measured < check.stated:  # the check cannot see errors smaller than its own
        return f"< {_percent(check.stated)}"
    return _percent(item.measured)
