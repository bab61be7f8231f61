"""Pictures of chains that meet or do not; matplotlib is imported when they are drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pushforward.errors import OptionError
from pushforward.runs.pictures import import_pyplot

if TYPE_CHECKING:
    from pushforward.sampling.thermalization.report import ThermalizationReport

__all__ = ["plot_thermalization"]

_COLOURS = {"informed": "#1f3a5f", "zero": "#d9730d", "prior": "#4c9a6a"}
_MOST_PANELS = 9
_COLUMNS = 3


def plot_thermalization(report: ThermalizationReport) -> Any:
    """Test error against steps from every start, one panel for each problem.

    Parameters
    ----------
    report
        Of `thermalize`.

    Returns
    -------
    matplotlib.figure.Figure
        In the grey band a curve counts as being in equilibrium.

    Raises
    ------
    OptionError
        When there are no curves, or matplotlib is not installed.
    """
    shown = [result for result in report.instances if result.curves][:_MOST_PANELS]
    if not shown:
        raise OptionError(
            "a sampler without a start has no curves",
            where="ThermalizationReport.plot",
            advice="Look at its ranks.",
        )
    pyplot = import_pyplot()
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 2.8 * rows), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, result in zip(grid.flat, shown, strict=False):
        rest = result.equilibrium
        if rest is not None and rest.settled and rest.mean > 0:
            low, high = rest.mean / report.tolerance, rest.mean * report.tolerance
            axes.axhspan(low, high, color="0.88", zorder=0)
        for start, curve in result.curves.items():
            found = result.comparisons.get(start)
            label = start if found is None else f"{start}: {found.outcome}"
            colour = _COLOURS.get(start, "0.4")
            axes.plot(result.steps, curve, color=colour, lw=1.3, label=label)
        axes.set_xscale("log")
        if all(value > 0 for curve in result.curves.values() for value in curve):
            axes.set_yscale("log")
        axes.set_title(f"problem {result.seed}", fontsize=9)
        axes.set_xlabel("step")
        axes.set_ylabel("test error")
        axes.legend(frameon=False, fontsize=7)
    figure.suptitle(f"{report.kernel}: {report.verdict}")
    return figure
