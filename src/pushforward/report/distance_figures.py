"""Drawings of distances for the page: versions with their error bars, probes beside the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pushforward.function_space.plots import error_interval
from pushforward.report.figures import MUTED, PAPER, PROPAGATED, SAMPLED, SETTINGS, themed
from pushforward.report.formatting import number

__all__ = ["Dot", "calibration_dots_svg", "distances_svg"]


@dataclass(frozen=True)
class Dot:
    """One version in one metric.

    Parameters
    ----------
    label
        Its name.
    value, error
        Estimated distance and its standard error.
    truth
        The distance on data, if it is known.
    """

    label: str
    value: float
    error: float
    truth: float | None = None


def distances_svg(panels: Mapping[str, Sequence[Dot]], key: str) -> str:
    """Distances on logarithmic axes, one panel a metric.

    Parameters
    ----------
    panels
        By metric: the same versions from the top. Distances of 0 have no place and no point.
    key
        Prefix of identifiers within the drawing, unique on the page.

    Returns
    -------
    str
        SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    count = max(len(dots) for dots in panels.values())
    known = any(dot.truth is not None for dots in panels.values() for dot in dots)
    with rc_context(SETTINGS):
        figure = Figure(figsize=(8.2, 1.3 + 0.3 * count), layout="constrained")
        columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (metric, dots) in zip(columns, panels.items(), strict=True):
            axes.set_xscale("log")
            for row, dot in enumerate(dots):
                if dot.value > 0 and math.isfinite(dot.value):
                    ends = error_interval(dot.value, dot.error)
                    axes.plot(ends, [row] * 2, color=PROPAGATED, lw=2.4)
                    axes.plot(dot.value, row, "o", ms=5, color=PAPER, mec=PROPAGATED, mew=1.4)
                if dot.truth is not None and dot.truth > 0:
                    axes.plot(dot.truth, row, "D", ms=4.4, color=SAMPLED, zorder=3)
            axes.set_yticks(range(count), [dot.label for dot in dots])
            axes.set_ylim(count - 0.5, -0.5)
            axes.set_title(metric, loc="left")
            axes.set_xlabel("distance")
            _label_decades(axes)
        handles = [
            Line2D([], [], color=PROPAGATED, marker="o", mfc=PAPER, lw=2.4, label="estimate")
        ]
        if known:
            handles.append(
                Line2D([], [], color=SAMPLED, marker="D", ms=4.4, lw=0, label="on the data")
            )
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return themed(figure, key)


def calibration_dots_svg(panels: Mapping[str, Mapping[str, float]], key: str) -> str:
    """Estimate over truth for every probe, one panel a metric; on the line the two agree.

    Parameters
    ----------
    panels
        By metric: ``log(estimate / truth)`` by the name of the probe.
    key
        Prefix of identifiers within the drawing, unique on the page.

    Returns
    -------
    str
        SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for ratios in panels.values() for name in ratios))
    with rc_context(SETTINGS):
        figure = Figure(figsize=(8.2, 1.0 + 0.26 * len(names)), layout="constrained")
        columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (metric, ratios) in zip(columns, panels.items(), strict=True):
            axes.set_xscale("log")
            axes.axvline(1, color=MUTED, lw=1)
            for name, log in ratios.items():
                row, share = names.index(name), math.exp(log)
                axes.plot([1, share], [row] * 2, color=PROPAGATED, lw=1.4)
                axes.plot(share, row, "o", ms=5, color=PROPAGATED)
            # Agreement to a per cent should not look like a wide scatter.
            reach = 1.1 * max([abs(log) for log in ratios.values()] + [math.log(2)])
            axes.set_xlim(math.exp(-reach), math.exp(reach))
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title(metric, loc="left")
            axes.set_xlabel("estimate / truth")
            _label_decades(axes)
        return themed(figure, key)


def _label_decades(axes: object) -> None:
    """Labels at 1, 2 and 5 of each decade, or at decades alone where there are many."""
    from matplotlib.axes import Axes
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    assert isinstance(axes, Axes)
    low, high = axes.get_xlim()
    near = high < 100 * low
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 1)))
    axes.xaxis.set_minor_formatter(NullFormatter())
