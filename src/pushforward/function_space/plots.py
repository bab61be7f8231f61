"""Pictures of distances; matplotlib is imported when they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from pushforward.function_space.estimators import DEFAULT, Estimator
from pushforward.function_space.metrics import Metric
from pushforward.function_space.probes import PROBE_NAMES
from pushforward.runs.pictures import import_pyplot

if TYPE_CHECKING:
    from pushforward.function_space.summary import FunctionSummary
    from pushforward.function_space.versions import VersionDistances

__all__ = ["error_interval", "named_calibration", "plot_calibration", "plot_versions"]

_ESTIMATE, _TRUTH, _LINE = "#1f3a5f", "#d9730d", "0.6"


def plot_calibration(
    summary: FunctionSummary, metric: Metric = "euclidean", estimator: Estimator | None = None
) -> Any:
    """Estimate over truth on the weights for which the truth was kept.

    Parameters
    ----------
    summary
        Of any network.
    metric, estimator
        As in `FunctionSummary.calibration`.

    Returns
    -------
    matplotlib.figure.Figure
        One point a probe on a logarithmic axis; on the line the estimate is right.

    Raises
    ------
    OptionError
        When matplotlib is not installed, or for an unknown metric or estimator.
    """
    from math import exp

    pyplot = import_pyplot()
    ratios = named_calibration(summary, metric, estimator)
    figure, axes = pyplot.subplots(figsize=(7.0, 1.2 + 0.3 * len(ratios)), layout="constrained")
    axes.axvline(1, color=_LINE, linewidth=0.8)
    axes.plot([exp(log) for log in ratios.values()], list(ratios), "o", color=_ESTIMATE)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("estimate / truth")
    axes.set_title(f"{estimator or DEFAULT}, {metric}", loc="left")
    return figure


def plot_versions(found: VersionDistances) -> Any:
    """Distance of each version with its error, and on the data where it is known.

    Parameters
    ----------
    found
        Of `measure_versions`.

    Returns
    -------
    matplotlib.figure.Figure
        A panel for each metric; distances of 0 are not on a logarithmic axis.

    Raises
    ------
    OptionError
        When matplotlib is not installed.
    """
    pyplot = import_pyplot()
    metrics, names = found.metrics, found.names
    figure, panels = pyplot.subplots(
        1,
        len(metrics),
        figsize=(3.2 + 3.2 * len(metrics), 1.4 + 0.3 * len(names)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, metric in zip(panels[0], metrics, strict=True):
        for place, row in enumerate(found.of(metric)):
            value, error = float(row.estimate), float(row.estimate.standard_error)
            if value > 0:
                axes.plot(error_interval(value, error), [place] * 2, color=_ESTIMATE, linewidth=2)
                axes.plot(value, place, "o", color=_ESTIMATE)
            if row.truth is not None and row.truth > 0:
                axes.plot(row.truth, place, "D", color="none", markeredgecolor=_TRUTH)
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(metric, loc="left")
        axes.set_xlabel("distance")
    return figure


def error_interval(value: float, error: float) -> tuple[float, float]:
    """Ends of an error bar on a logarithmic axis: the same factor up and down.

    Parameters
    ----------
    value
        Positive.
    error
        Its standard error.

    Returns
    -------
    tuple
        ``value / f`` and ``value f`` with ``f = 1 + error / value``.
    """
    factor = 1 + error / value
    return value / factor, value * factor


def named_calibration(
    summary: FunctionSummary, metric: Metric = "euclidean", estimator: Estimator | None = None
) -> dict[str, float]:
    """The calibration of a summary with the names of its probes.

    Parameters
    ----------
    summary
        Of any network.
    metric, estimator
        As in `FunctionSummary.calibration`.

    Returns
    -------
    dict
        ``log(estimate / truth)`` by name, for each probe that has a distance at all.
    """
    logs = summary.calibration(metric=metric, estimator=estimator).tolist()
    truths = summary.probe_distances[:, get_args(Metric).index(metric)].tolist()
    names = [name for name, truth in zip(PROBE_NAMES, truths, strict=True) if truth > 0]
    return dict(zip(names, logs, strict=True))
