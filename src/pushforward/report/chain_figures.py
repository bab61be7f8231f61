"""Drawings of chains for the page: traces, and curves from several starts that meet or do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pushforward.report.figures import GOOD, INK, MUTED, PROPAGATED, SAMPLED, SETTINGS, themed
from pushforward.report.formatting import number

__all__ = ["Band", "Panel", "meeting_svg", "traces_svg"]

_CHAINS = (PROPAGATED, SAMPLED, GOOD, MUTED)
_STARTS = {"informed": PROPAGATED, "zero": SAMPLED, "prior": GOOD}
_MOST_POINTS = 300  # of one line: the page stays small
_CHAINS_DRAWN = 8


@dataclass(frozen=True)
class Panel:
    """One number along all chains.

    Parameters
    ----------
    title
        What it is.
    draws
        One line for each chain.
    warmup
        The lines before the first draw.
    strip
        Ends of a range to mark across the panel.
    """

    title: str
    draws: Sequence[Sequence[float]]
    warmup: Sequence[Sequence[float]] = ()
    strip: tuple[float, float] | None = None


@dataclass(frozen=True)
class Band:
    """A curve over problems, from one start.

    Parameters
    ----------
    start
        ``"informed"``, ``"zero"`` or ``"prior"``.
    steps
        At which the values are.
    middle, lower, upper
        Median and quartiles over the problems.
    """

    start: str
    steps: Sequence[int]
    middle: Sequence[float]
    lower: Sequence[float]
    upper: Sequence[float]


def traces_svg(panels: Sequence[Panel], key: str, *, thin: int = 1) -> str:
    """Traces of chains, the warm-up in grey before step 0.

    Parameters
    ----------
    panels
        From the top.
    key
        Prefix of identifiers within the drawing, unique on the page.
    thin
        Steps between two draws.

    Returns
    -------
    str
        SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(SETTINGS):
        figure = Figure(figsize=(8.2, 0.4 + 1.45 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(rows, panels, strict=True):
            seen: list[float] = []
            if panel.strip is not None:
                axes.axhspan(*panel.strip, color=MUTED, alpha=0.22, lw=0)
                seen += panel.strip
            for line in panel.warmup[:_CHAINS_DRAWN]:
                x = [(i - len(line)) * thin for i in range(len(line))]
                axes.plot(*_thinned(x, line), color=MUTED, lw=0.7, alpha=0.45)
                seen += [value for value in line[len(line) // 2 :] if math.isfinite(value)]
            for number, line in enumerate(panel.draws[:_CHAINS_DRAWN]):
                x = [(i + 1) * thin for i in range(len(line))]
                colour = _CHAINS[number % len(_CHAINS)]
                axes.plot(*_thinned(x, line), color=colour, lw=0.9, alpha=0.85)
                seen += [value for value in line if math.isfinite(value)]
            # The first steps of a warm-up may be out by orders of magnitude.
            if seen and min(seen) < max(seen):
                margin = 0.05 * (max(seen) - min(seen))
                axes.set_ylim(min(seen) - margin, max(seen) + margin)
            if panel.warmup:
                axes.axvline(0, color=MUTED, lw=1, ls=":")
            axes.set_title(panel.title, loc="left")
            axes.locator_params(axis="y", nbins=4)
        rows[-1].set_xlabel("step")
        return themed(figure, key)


def meeting_svg(
    bands: Sequence[Band],
    key: str,
    *,
    ylabel: str,
    equilibrium: tuple[float, float] | None = None,
) -> str:
    """Curves from informed and uninformed starts: they meet or they do not.

    Parameters
    ----------
    bands
        One for each start.
    key
        Prefix of identifiers within the drawing, unique on the page.
    ylabel
        What is drawn.
    equilibrium
        Ends of the strip in which a curve counts as being in equilibrium.

    Returns
    -------
    str
        SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    with rc_context(SETTINGS):
        figure = Figure(figsize=(8.2, 4.2), layout="constrained")
        axes = figure.subplots()
        if equilibrium is not None:
            axes.axhspan(*equilibrium, color=MUTED, alpha=0.16, lw=0, label="equilibrium")
        for band in bands:
            colour = _STARTS.get(band.start, INK)
            axes.fill_between(band.steps, band.lower, band.upper, color=colour, alpha=0.2, lw=0)
            label = f"{band.start} start" if band.start != "informed" else "informed (at a draw)"
            axes.plot(band.steps, band.middle, color=colour, lw=2, label=label)
        axes.set_xscale("log")
        values = [value for band in bands for value in (*band.lower, *band.upper)]
        if values and min(values) > 0:
            axes.set_yscale("log")
            # Less than a decade would have a single label, or none.
            near = max(values) < 30 * min(values)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 1)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("steps of each chain")
        axes.set_ylabel(ylabel)
        figure.legend(loc="outside upper left", ncols=4)
        return themed(figure, key)


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    every = max(1, math.ceil(len(x) / _MOST_POINTS))
    return x[::every], y[::every]
