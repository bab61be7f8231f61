"""Pictures of sweeps over checkpoints and temperatures; matplotlib is imported when drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from pushforward.runs.pictures import import_pyplot

if TYPE_CHECKING:
    from pushforward.degeneracy.extrapolation import ExtrapolatedCoefficient
    from pushforward.degeneracy.sweep import CheckpointSweep
    from pushforward.degeneracy.temperature import EpsilonBetaMap

__all__ = ["plot_extrapolation", "plot_map", "plot_sweep"]

_BLUE, _ORANGE, _RED = "#1f3a5f", "#d9730d", "#b3261e"


def plot_sweep(sweep: CheckpointSweep) -> Any:
    """Coefficient and training loss against the label.

    Parameters
    ----------
    sweep
        Of `learning_coefficient_sweep`.

    Returns
    -------
    matplotlib.figure.Figure
        Bars are two standard errors; verdicts other than OK are marked and written out.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6.8, 3.8), layout="constrained")
    numeric = all(not isinstance(label, str) for label in sweep.labels)
    places = list(sweep.labels) if numeric else list(range(len(sweep)))
    values, errors = sweep.values.numpy(), 2 * sweep.standard_errors.numpy()
    axes.errorbar(places, values, errors, marker="o", color=_BLUE, capsize=2, zorder=3)
    axes.set_ylabel("learning coefficient ± 2 standard errors", color=_BLUE)
    axes.set_xlabel("checkpoint")
    if not numeric:
        axes.set_xticks(places, list(map(str, sweep.labels)), rotation=30, ha="right")
    for verdict in sorted(set(sweep.verdicts) - {"OK"}):
        at = [k for k, found in enumerate(sweep.verdicts) if found == verdict]
        marked = [places[k] for k in at]
        axes.plot(marked, values[at], "x", color=_RED, ms=10, mew=2, zorder=4)
        for k in at:
            axes.annotate(
                verdict.lower().replace("_", " "),
                (places[k], values[k]),
                textcoords="offset points",
                xytext=(6, 6),
                fontsize=8,
                color=_RED,
            )
    beside = axes.twinx()
    beside.plot(places, sweep.initial_losses.numpy(), "--", color=_ORANGE, zorder=2)
    beside.set_ylabel("loss at the checkpoint", color=_ORANGE)
    return figure


def plot_map(found: EpsilonBetaMap) -> Any:
    """Heat map of the coefficient over step size and inverse temperature.

    Parameters
    ----------
    found
        Of `learning_coefficient_map`.

    Returns
    -------
    matplotlib.figure.Figure
        Cells of the plateau are framed; where chains died the cell is grey.
    """
    from matplotlib.patches import Rectangle

    pyplot = import_pyplot()
    rows, columns = found.values.shape
    size = (2.6 + 0.85 * columns, 1.8 + 0.5 * rows)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    shown = torch.where(found.dead > 0, torch.nan, found.values)
    good = shown[found.plateau] if bool(found.plateau.any()) else shown[shown.isfinite()]
    top = 1.5 * float(good.max()) if good.numel() else 1.0
    axes.set_facecolor("0.8")
    image = axes.imshow(
        shown.numpy(), origin="lower", aspect="auto", cmap="viridis", vmin=0.0, vmax=max(top, 1e-12)
    )
    for i in range(rows):
        for j in range(columns):
            dead, value = int(found.dead[i, j]), float(found.values[i, j])
            text = f"{value:.3g}" if value == value else ""
            text = f"{dead} lost" if dead else text
            dark = not dead and value < 0.6 * top
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="w" if dark else "k")
            if bool(found.plateau[i, j]):
                frame = Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, fill=False, ec=_ORANGE, lw=2)
                axes.add_patch(frame)
    axes.set_xticks(range(columns), [f"{x:.2g}" for x in found.step_sizes], rotation=45)
    axes.set_yticks(range(rows), [f"{x:.3g}" for x in found.nbetas])
    axes.set_xlabel("step size")
    axes.set_ylabel("n beta")
    axes.set_title("plateau framed; grey: chains lost", loc="left", fontsize=9)
    figure.colorbar(image, ax=axes, label="learning coefficient")
    return figure


def plot_extrapolation(found: ExtrapolatedCoefficient) -> Any:
    """Estimates against ``1 / ln n beta`` with the fit, down to 0.

    Parameters
    ----------
    found
        Of `extrapolated_learning_coefficient`.

    Returns
    -------
    matplotlib.figure.Figure
        Bars are two standard errors, that of the extrapolated value included.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(5.6, 3.8), layout="constrained")
    places = [1 / math.log(x) for x in found.nbetas]
    values = [float(one.value) for one in found.estimates]
    errors = [2 * float(one.standard_error) for one in found.estimates]
    axes.errorbar(places, values, errors, fmt="o", color=_BLUE, capsize=2, label="estimates")
    line = torch.linspace(1e-4, max(places), 100, dtype=torch.float64)
    axes.plot(line.numpy(), found.fit.at((1 / line).exp()).numpy(), color=_BLUE, lw=1, label="fit")
    value, error = float(found.value), 2 * float(found.standard_error)
    axes.errorbar([0.0], [value], [error], fmt="s", color=_ORANGE, capsize=3, label="extrapolated")
    axes.set_xlabel("1 / ln(n beta)")
    axes.set_ylabel("learning coefficient ± 2 standard errors")
    axes.legend()
    return figure
