"""Drawings for the page: inline SVG whose colours follow the page, light or dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pushforward.report.comparison import TailCurve
from pushforward.report.formatting import MINUS, power_of_ten

__all__ = [
    "GOOD",
    "INK",
    "MUTED",
    "PROPAGATED",
    "SAMPLED",
    "SETTINGS",
    "Interval",
    "Line",
    "calibration_svg",
    "can_draw",
    "spread_svg",
    "survival_svg",
    "tail_curves_svg",
    "themed",
]

# Matplotlib knows fixed colours only: these stand for the page's variables in a finished SVG.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
PROPAGATED, SAMPLED, PAPER, GOOD = "#040404", "#050505", "#060606", "#070707"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    PROPAGATED: "--propagated",
    SAMPLED: "--sampled",
    PAPER: "--paper",
    GOOD: "--good",
}
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pushforward",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Interval:
    """One output in the figure of means and spreads, every number in the units of the output.

    Parameters
    ----------
    label
        Its name.
    mean, error, deviation
        Propagated mean, its standard error and the standard deviation of the output.
    sampled_mean, sampled_error, sampled_deviation
        The same by Monte Carlo.
    """

    label: str
    mean: float
    error: float
    deviation: float
    sampled_mean: float
    sampled_error: float
    sampled_deviation: float


@dataclass(frozen=True)
class Line:
    """One way to predict in a figure of calibration.

    Parameters
    ----------
    label
        Its name.
    role
        ``"main"``, ``"rival"`` or ``"other"``: which colour it has.
    x, y, lower, upper
        Points and the ends of their intervals.
    """

    label: str
    role: Literal["main", "rival", "other"]
    x: Sequence[float]
    y: Sequence[float]
    lower: Sequence[float]
    upper: Sequence[float]


def can_draw() -> bool:
    """Whether matplotlib is there.

    Returns
    -------
    bool
        False: install the extra ``pushforward[plot]``.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def spread_svg(intervals: Sequence[Interval], key: str) -> str:
    """Mean and spread of each output both ways, and the difference of the means with its errors.

    Parameters
    ----------
    intervals
        One for each output, from the top.
    key
        Prefix of identifiers within the drawing, unique on the page.

    Returns
    -------
    str
        SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    count = len(intervals)
    rows = list(range(count))
    with rc_context(SETTINGS):
        figure = Figure(figsize=(8.2, 1.5 + 0.3 * count), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.35, 1))
        for row, item in zip(rows, intervals, strict=True):
            for shift, colour, mean, deviation in (
                (-0.14, PROPAGATED, item.mean, item.deviation),
                (0.14, SAMPLED, item.sampled_mean, item.sampled_deviation),
            ):
                y = [row + shift] * 2
                left.plot([mean - 2 * deviation, mean + 2 * deviation], y, color=colour, lw=1.3)
                left.plot([mean - deviation, mean + deviation], y, color=colour, lw=4.2)
                left.plot(
                    mean, row + shift, "o", ms=3.6, color=PAPER, mec=colour, mew=1.1, zorder=4
                )
            scale = item.deviation if item.deviation > 0 else 1.0
            difference = (item.mean - item.sampled_mean) / scale
            for reach, colour, width in (
                (item.error / scale, PROPAGATED, 1.6),
                (item.sampled_error / scale, SAMPLED, 4.2),
            ):
                right.plot(
                    [difference - reach, difference + reach], [row] * 2, color=colour, lw=width
                )
            right.plot(difference, row, "o", ms=4.4, color=PAPER, mec=INK, mew=1.1, zorder=4)
        left.set_yticks(rows, [item.label for item in intervals])
        left.set_ylim(count - 0.4, -0.6)
        left.set_title("Mean, ± 1 and ± 2 standard deviations", loc="left")
        left.set_xlabel("output")
        right.set_title(f"Propagated mean {MINUS} sampled mean", loc="left")
        right.set_xlabel("standard deviations of the output")
        right.axvline(0, color=MUTED, lw=1)
        right.locator_params(axis="x", nbins=6)
        for axes in (left, right):
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
        from matplotlib.lines import Line2D

        figure.legend(
            handles=[
                Line2D([], [], color=PROPAGATED, lw=4, label="propagated, with its error bar"),
                Line2D([], [], color=SAMPLED, lw=4, label="Monte Carlo, with its standard error"),
            ],
            loc="outside upper left",
            ncols=2,
        )
        return themed(figure, key)


def tail_curves_svg(curves: Sequence[TailCurve], key: str) -> str:
    """Tail probabilities on a logarithmic scale: saddlepoint, Gaussian, and the sampled band.

    Parameters
    ----------
    curves
        One panel each.
    key
        Prefix of identifiers within the drawing, unique on the page.

    Returns
    -------
    str
        SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    with rc_context(SETTINGS):
        figure = Figure(figsize=(8.2, 3.7), layout="constrained")
        panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
        for axes, curve in zip(panels, curves, strict=True):
            x, floor = curve.deviations, 0.1 / curve.num_samples
            axes.fill_between(
                x,
                [max(value, floor / 10) for value in curve.lower],
                curve.upper,
                color=SAMPLED,
                alpha=0.28,
                lw=0,
                label="Monte Carlo, 95 % interval",
            )
            seen = [p if p > 0 else math.nan for p in curve.sampled]
            axes.plot(x, seen, color=SAMPLED, lw=1.8, label="Monte Carlo")
            axes.plot(x, curve.gaussian, color=MUTED, lw=1.2, ls=(0, (4, 3)), label="Gaussian tail")
            axes.plot(x, curve.saddlepoint, color=PROPAGATED, lw=2, label="propagated, saddlepoint")
            axes.axvline(curve.event, color=MUTED, lw=1, ls=":")
            axes.set_yscale("log")
            axes.set_ylim(floor, 1.0)
            axes.set_xlim(min(x), max(x))
            axes.set_title(curve.name, loc="left")
            axes.set_xlabel("threshold t, standard deviations above the mean")
            axes.yaxis.set_major_locator(LogLocator(numticks=12))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(_decade))
        panels[0].set_ylabel("probability of exceeding t")
        handles, labels = panels[0].get_legend_handles_labels()
        order = [3, 2, 1, 0]
        figure.legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            loc="outside upper left",
            ncols=4,
        )
        return themed(figure, key)


def calibration_svg(
    lines: Sequence[Line], key: str, *, xlabel: str, ylabel: str, upper: float | None = 1.0
) -> str:
    """What was promised against what was kept, beside the diagonal on which the two agree.

    Parameters
    ----------
    lines
        One for each way to predict; ``"rival"`` and ``"main"`` have the page's two colours.
    key
        Prefix of identifiers within the drawing, unique on the page.
    xlabel, ylabel
        Of the axes.
    upper
        End of both axes; None for as far as the points go.

    Returns
    -------
    str
        SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    styles = {
        "rival": (SAMPLED, "o", (0, (1, 0)), 1.6),
        "main": (PROPAGATED, "o", (0, (1, 0)), 2.0),
        "other": (MUTED, "s", (0, (4, 3)), 1.2),
    }
    end = upper
    if end is None:
        end = 1.05 * max((value for line in lines for value in (*line.x, *line.upper)), default=1)
    with rc_context(SETTINGS):
        figure = Figure(figsize=(8.2, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, end], [0, end], color=MUTED, lw=1, ls=":")
        for line in lines:
            colour, marker, dashes, width = styles[line.role]
            errors = [
                [max(y - low, 0.0) for y, low in zip(line.y, line.lower, strict=True)],
                [max(high - y, 0.0) for y, high in zip(line.y, line.upper, strict=True)],
            ]
            axes.errorbar(line.x, line.y, yerr=errors, fmt="none", ecolor=colour, elinewidth=1)
            axes.plot(
                line.x,
                line.y,
                color=colour,
                marker=marker,
                ms=4.2,
                mfc=PAPER,
                mew=1.2,
                ls=dashes,
                lw=width,
                label=line.label,
            )
        axes.set_xlim(0, 1.01 * end)
        axes.set_ylim(0, 1.02 * end)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        figure.legend(loc="outside upper left", ncols=4)
        return themed(figure, key)


def survival_svg(groups: Sequence[tuple[str, Sequence[float]]], key: str, *, xlabel: str) -> str:
    """Share of each group whose value exceeds a threshold, drawn as steps.

    Parameters
    ----------
    groups
        Name and values; the first has the page's first colour.
    key
        Prefix of identifiers within the drawing, unique on the page.
    xlabel
        What the values are.

    Returns
    -------
    str
        SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(SETTINGS):
        figure = Figure(figsize=(8.2, 3.4), layout="constrained")
        axes = figure.subplots()
        end = max((value for _, values in groups for value in values), default=0.0) or 1.0
        for (name, values), colour in zip(groups, (PROPAGATED, SAMPLED, MUTED), strict=False):
            ordered, count = sorted(values), len(values)
            x = [0.0, *ordered, 1.03 * end]
            y = [1.0, *(1 - (rank + 1) / count for rank in range(count)), 0.0]
            axes.step(x, y, where="post", color=colour, lw=2, label=f"{name} ({count:,})")
        axes.set_xlim(0, 1.03 * end)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("share of examples above it")
        figure.legend(loc="outside upper left", ncols=3)
        return themed(figure, key)


def _decade(value: float, _position: int) -> str:
    if value <= 0:
        return ""
    exponent = round(math.log10(value))
    return f"{value:g}" if exponent >= -2 else power_of_ten(exponent)


def themed(figure: Any, key: str) -> str:
    """The figure as an SVG element without fixed size, colours or foreign identifiers.

    Parameters
    ----------
    figure
        Of matplotlib, drawn under `SETTINGS` with the colours of this module.
    key
        Prefix of identifiers within the drawing, unique on the page.

    Returns
    -------
    str
        From ``<svg`` to ``</svg>``.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # Several drawings on one page would otherwise share identifiers such as "axes_1".
    svg = svg.replace(' id="', f' id="{key}-').replace("url(#", f"url(#{key}-")
    svg = svg.replace('href="#', f'href="#{key}-')
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
