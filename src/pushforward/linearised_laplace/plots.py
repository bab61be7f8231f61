"""Pictures of how well predictions are calibrated; matplotlib is imported when they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pushforward.errors import OptionError
from pushforward.runs.pictures import import_pyplot

if TYPE_CHECKING:
    from pushforward.linearised_laplace.evaluation import Evaluation

__all__ = ["plot_calibration"]

_COLOURS = {"MAP": "#d9730d", "Laplace": "#1f3a5f"}
_OTHERS = "0.55"


def plot_calibration(evaluation: Evaluation) -> Any:
    """Accuracy against confidence, or the coverage of intervals against their level.

    Parameters
    ----------
    evaluation
        Of a classification or a regression.

    Returns
    -------
    matplotlib.figure.Figure
        One panel; on the dotted diagonal predictions are as good as they say.

    Raises
    ------
    OptionError
        For counts, which have neither, or when matplotlib is not installed.
    """
    if evaluation.task == "counts":
        raise OptionError(
            "counts have neither a confidence nor intervals",
            where="Evaluation.plot",
            advice="Compare the negative log-likelihoods.",
        )
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(4.6, 4.4), layout="constrained")
    axes.plot([0, 1], [0, 1], ":", color="0.6", linewidth=1, zorder=0)
    for row in evaluation.rows:
        colour = _COLOURS.get(row.name.partition(",")[0], _OTHERS)
        style = {"color": _OTHERS if "scaled" in row.name else colour, "label": row.name}
        line = "--" if "Monte Carlo" in row.name or "scaled" in row.name else "-"
        if row.reliability is not None:
            curve = row.reliability
            x, y = curve.confidence.tolist(), curve.accuracy.tolist()
            below = (curve.accuracy - curve.accuracy_lower).clamp(min=0).tolist()
            above = (curve.accuracy_upper - curve.accuracy).clamp(min=0).tolist()
        else:
            assert row.coverage is not None
            x, y = row.coverage.levels.tolist(), row.coverage.coverage.tolist()
            below = above = row.coverage.standard_error.tolist()
        axes.errorbar(
            x, y, yerr=[below, above], fmt=f"o{line}", ms=4, lw=1.4, elinewidth=0.9, **style
        )
    classes = evaluation.task == "classification"
    axes.set_xlabel("confidence" if classes else "level of the interval")
    axes.set_ylabel("accuracy" if classes else "share of targets inside")
    axes.set_title("Reliability" if classes else "Coverage")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, loc="upper left")
    return figure
