"""The section of the page on how far versions of a network are from it as functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pushforward.function_space.metrics import Metric
from pushforward.function_space.plots import named_calibration
from pushforward.function_space.versions import (
    VersionDistance,
    VersionDistances,
    output_spread,
)
from pushforward.report.distance_figures import Dot, calibration_dots_svg, distances_svg
from pushforward.report.figures import can_draw
from pushforward.report.formatting import MISSING, number, ratio, with_error
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
from pushforward.runs.estimate import Status, worst_status
from pushforward.runs.plan import format_bytes

__all__ = ["function_space_section", "percent"]

_TONES: dict[Status, Tone] = {"pass": "good", "warn": "warn", "fail": "bad"}
_UNITS: dict[Metric, str] = {
    "euclidean": "half the squared difference of the outputs",
    "softmax": "half the squared difference of the probabilities",
    "kl": "the divergence KL(reference || version), in nats",
    "fisher": "the divergence to second order, in nats",
}


def function_space_section(
    found: VersionDistances, *, about: str = "", notes: Sequence[str] = ()
) -> Section:
    """The section of the page on how far versions of a network moved.

    Parameters
    ----------
    found
        Of `pushforward.function_space.versions.measure_versions`.
    about
        Which network and which data, in a sentence or two.
    notes
        What was chosen on behalf of the reader.

    Returns
    -------
    Section
        For a `Report`.
    """
    blocks: list[Table | Figure | Paragraph | CheckList] = [_method(found, about, notes)]
    if can_draw():
        blocks.append(_distances_figure(found))
    else:
        blocks.append(
            Paragraph(
                "matplotlib is not installed, so this page has tables only. For the figures: "
                "pip install 'pushforward[plot]'."
            )
        )
    blocks.append(_distances_table(found))
    calibrated = [metric for metric in found.metrics if _ratios(found, metric)]
    if calibrated and can_draw():
        blocks.append(_calibration_figure(found, calibrated))
    if calibrated:
        blocks.append(_calibration_table(found, calibrated))
    blocks += [_kept_table(found), CheckList("Checks", found.checks)]
    return Section(
        key="function-space",
        title="Distance",
        question="How far is each version from the network, as a function of the data?",
        verdict=_verdict(found),
        blocks=tuple(blocks),
        results={**found.to_dict(), "notes": list(notes)},
    )


def percent(share: float | None) -> str:
    """A share in per cent.

    Parameters
    ----------
    share
        None when it is not known.

    Returns
    -------
    str
        Such as ``"3.2 %"``.
    """
    return MISSING if share is None else f"{number(100 * share, 2)} %"


# --- the answer in short -------------------------------------------------------------------------


def _verdict(found: VersionDistances) -> Verdict:
    rows = sorted(found.of(found.metrics[0]), key=lambda row: float(row.estimate))
    nearest, farthest = rows[0], rows[-1]
    headline = f"{_sentence(farthest)}."
    if len(rows) > 1:
        headline = f"Nearest: {_sentence(nearest)}. Farthest: {_sentence(farthest)}."
    raised = [(metric, check) for metric, check in found.checks if check.status != "pass"]
    sentences = [f"For {metric}: {check.detail}. {check.advice}" for metric, check in raised]
    if found.metrics[0] == "euclidean":
        sentences.append(
            "100 % of the outputs' variance is how far the network is from its own mean output."
        )
    off = _typical(found, found.metrics[0])
    if off is not None:
        sentences.append(
            f"The error bars come from perturbed versions whose true distances are known: there "
            f"the {found.estimator} estimator is off by a factor of {number(off, 3)}, "
            "typically."
        )
    for metric in found.metrics:
        worst = _worst_factor(found.of(metric))
        if worst is not None:
            sentences.append(
                f"On the data themselves the {metric} estimates are off by a factor of "
                f"{number(worst, 3)} at most."
            )
    tiles = [_tile("Farthest", farthest)]
    if len(rows) > 1:
        tiles.append(_tile("Nearest", nearest))
    tiles += _tiles(found, off)
    return Verdict(found.status, headline, tuple(sentences), tuple(tiles))


def _sentence(row: VersionDistance) -> str:
    if float(row.estimate) == 0:
        return f"{row.name}, the same function"
    share = "" if row.share is None else f", {percent(row.share)} of the outputs' variance"
    return f"{row.name}, {_value(row)} away{share}"


def _tile(label: str, row: VersionDistance) -> Tile:
    share = f"{row.metric} distance" if row.share is None else "of the outputs' variance"
    value = _value(row) if row.share is None else percent(row.share)
    return Tile(label, value, f"{share}: {row.name}")


def _tiles(found: VersionDistances, off: float | None) -> list[Tile]:
    summary = found.summary
    tiles = []
    if off is not None:
        detail = f"of the {found.estimator} estimator where the truth is known"
        status = worst_status(c for metric, c in found.checks if metric == found.metrics[0])
        tiles.append(Tile("Typical error", ratio(off), detail, _TONES[status]))
    tiles.append(
        Tile(
            "Kept of the data",
            format_bytes(summary.num_bytes),
            f"made of {summary.num_examples:,} examples; none is kept",
        )
    )
    return tiles


# --- the answer at length ------------------------------------------------------------------------


def _method(found: VersionDistances, about: str, notes: Sequence[str]) -> Paragraph:
    units = "; ".join(f"{metric}, {_UNITS[metric]}" for metric in found.metrics)
    which = ""
    if found.outputs is not None:
        which = f" Only the outputs {', '.join(map(str, found.outputs))} count."
    text = (
        f"{about} A distance is a mean over the data of what the outputs of a version differ by "
        f"from those of the network: {units}.{which} It is not computed on examples but estimated "
        "from moments of the data and from how often each unit is active, which were gathered "
        f"once: the {found.estimator} estimator."
    )
    return Paragraph(" ".join([text.strip(), *notes]), title="What is measured")


def _distances_figure(found: VersionDistances) -> Figure:
    panels: dict[str, list[Dot]] = {
        metric: [
            Dot(r.name, float(r.estimate), float(r.estimate.standard_error), r.truth)
            for r in found.of(metric)
        ]
        for metric in found.metrics
    }
    checked = any(row.truth is not None for row in found.rows)
    more = "; diamonds are the distances on the data" if checked else ""
    same = " A distance of 0 has no place on this axis." if _some_are_zero(found) else ""
    return Figure(
        "How far each version is",
        distances_svg(panels, "function-space-distances"),
        f"Estimated distance with one standard error, on a logarithmic axis{more}.{same}",
        "Estimated distance of each version with its error bar. The numbers are in the table "
        "below.",
    )


def _distances_table(found: VersionDistances) -> Table:
    checked = any(row.truth is not None for row in found.rows)
    several = len(found.metrics) > 1
    columns = ["version", *(["metric"] if several else []), "distance", "of the outputs' variance"]
    columns += ["on the data", "estimate / data"] if checked else []
    rows = []
    for row in found.rows:
        cells = [Cell(row.name), *([Cell(row.metric)] if several else []), Cell(_value(row))]
        cells.append(Cell(percent(row.share)))
        if checked:
            cells += [Cell(MISSING if row.truth is None else number(row.truth)), Cell(_over(row))]
        rows.append(tuple(cells))
    note = (
        "The share is that of the Euclidean distance in half the total variance of the outputs, "
        f"{number(output_spread(found.summary, found.outputs))}. "
    )
    if checked:
        note += "The last columns need the data; the others do not."
    return Table("Distances", tuple(columns), tuple(rows), note.strip())


def _calibration_figure(found: VersionDistances, metrics: Sequence[Metric]) -> Figure:
    panels: dict[str, dict[str, float]] = {metric: _ratios(found, metric) for metric in metrics}
    return Figure(
        "How good the estimates are on versions whose true distance is known",
        calibration_dots_svg(panels, "function-space-calibration"),
        "Each line is one way to perturb every tensor of weights. The true distances were kept "
        "when the summary was made; their spread is the error bar above.",
        "Estimate over truth for each perturbed version, on a logarithmic axis.",
    )


def _calibration_table(found: VersionDistances, metrics: Sequence[Metric]) -> Table:
    ratios = {metric: _ratios(found, metric) for metric in metrics}
    names = list(dict.fromkeys(name for logs in ratios.values() for name in logs))
    rows = [
        (
            Cell(name),
            *(
                Cell(ratio(math.exp(logs[name])) if name in logs else MISSING)
                for logs in ratios.values()
            ),
        )
        for name in names
    ]
    typical = tuple(Cell(ratio(_typical(found, metric) or math.nan)) for metric in metrics)
    rows.append((Cell("typical factor"), *typical))
    return Table(
        "Estimate over truth",
        ("perturbed version", *metrics),
        tuple(rows),
        "The typical factor is the exponential of the root mean square logarithm.",
        strong=len(rows) - 1,
    )


def _kept_table(found: VersionDistances) -> Table:
    summary = found.summary
    rows = [(Cell(name), Cell(f"{size:,}")) for name, size in summary.sizes.items()]
    parts = summary.num_components
    apart = f" in {parts} components" if parts > 1 else ""
    return Table(
        "What is kept",
        ("", "numbers"),
        tuple(rows),
        f"Of {summary.num_examples:,} examples{apart}: {format_bytes(summary.num_bytes)} besides "
        "the weights. No example is kept.",
    )


def _ratios(found: VersionDistances, metric: Metric) -> dict[str, float]:
    return named_calibration(found.summary, metric, found.estimator)


def _typical(found: VersionDistances, metric: Metric) -> float | None:
    """By which factor the estimator is off on the probes, typically."""
    logs = list(_ratios(found, metric).values())
    if not logs:
        return None
    return math.exp(math.sqrt(math.fsum(log * log for log in logs) / len(logs)))


def _worst_factor(rows: Sequence[VersionDistance]) -> float | None:
    """The largest factor between an estimate and the data."""
    pairs = [(float(row.estimate), row.truth) for row in rows]
    factors = [max(a / b, b / a) for a, b in pairs if b is not None and a > 0 and b > 0]
    return max(factors, default=None)


def _over(row: VersionDistance) -> str:
    return ratio(float(row.estimate) / row.truth) if row.truth else MISSING


def _some_are_zero(found: VersionDistances) -> bool:
    return any(float(row.estimate) == 0 for row in found.rows)


def _value(row: VersionDistance) -> str:
    return with_error(float(row.estimate), float(row.estimate.standard_error))
