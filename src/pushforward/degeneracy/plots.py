"""Pictures of an estimate; matplotlib is imported when they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.runs.pictures import import_pyplot

if TYPE_CHECKING:
    from pushforward.degeneracy.coefficient import LearningCoefficient

__all__ = ["plot_traces", "running_means"]

_COLOURS = ("#1f3a5f", "#d9730d", "#3b7d4f", "#9c3d54", "#6b5b95", "#2a8c99", "#a67c1b", "#7a7a7a")
_WARM_UP, _BAND = "0.75", "0.88"
_MOST_POINTS = 2000  # of one line


def plot_traces(found: LearningCoefficient) -> Any:
    """Traces of all chains, and where their means go.

    Parameters
    ----------
    found
        An estimate.

    Returns
    -------
    matplotlib.figure.Figure
        Above ``n beta (L - L(w*))`` at every step, one line a chain, the warm-up in grey before
        step 0. Below the mean of each chain so far; the grey band is the answer and two standard
        errors on either side. The means are those of the main run, and the answer is extrapolated
        to step size 0, so the band may lie a little aside.

    Raises
    ------
    OptionError
        When matplotlib is not installed.
    """
    pyplot = import_pyplot()
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(8.0, 5.2), sharex=True, layout="constrained"
    )
    draws = found.excess.detach().double().cpu()
    warmup = found.warmup_excess.detach().double().cpu()
    _draw_traces(above, warmup, draws)
    above.set_title("n beta (L(w) - L(w*))", loc="left")
    value, error = float(found.value), float(found.standard_error)
    _draw_band(below, value, error)
    means = running_means(draws)
    steps = torch.arange(1, draws.shape[1] + 1)
    for number, line in enumerate(means):
        below.plot(*_thinned(steps, line), color=_colour(number), linewidth=1.2)
    below.set_title("its mean so far", loc="left")
    below.set_xlabel("step")
    # The first means are single draws.
    _show(below, torch.cat([means[:, draws.shape[1] // 10 :].flatten(), means.new_tensor([value])]))
    figure.suptitle(f"Local learning coefficient {value:.4g} ± {error:.2g}: {found.verdict}")
    return figure


def running_means(draws: Float[Tensor, "chain draw"]) -> Float[Tensor, "chain draw"]:
    """Mean of every chain up to each of its draws.

    Parameters
    ----------
    draws
        ``(chain, draw)``.

    Returns
    -------
    Tensor
        Of the same shape, float64; the last column holds the means of the chains.
    """
    count = torch.arange(1, draws.shape[1] + 1, dtype=torch.float64, device=draws.device)
    return draws.cumsum(1, dtype=torch.float64) / count


def _draw_traces(axes: Any, warmup: Tensor, draws: Tensor) -> None:
    before = torch.arange(warmup.shape[1]) - warmup.shape[1]
    for line in warmup:
        axes.plot(*_thinned(before, line), color=_WARM_UP, linewidth=0.8, zorder=0)
    if warmup.shape[1]:
        axes.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
    steps = torch.arange(1, draws.shape[1] + 1)
    for number, line in enumerate(draws):
        axes.plot(*_thinned(steps, line), color=_colour(number), linewidth=0.7, alpha=0.8)
    # The first steps of a warm-up may be far out and would flatten the rest.
    _show(axes, torch.cat([warmup[:, warmup.shape[1] // 2 :].flatten(), draws.flatten()]))


def _draw_band(axes: Any, value: float, error: float) -> None:
    if error == error:
        axes.axhspan(value - 2 * error, value + 2 * error, color=_BAND, zorder=0)
    axes.axhline(value, color="0.5", linewidth=0.8, linestyle="--")


def _show(axes: Any, values: Tensor) -> None:
    finite = values[torch.isfinite(values)]
    if len(finite) and finite.min() < finite.max():
        margin = 0.05 * float(finite.max() - finite.min())
        axes.set_ylim(float(finite.min()) - margin, float(finite.max()) + margin)


def _thinned(x: Tensor, y: Tensor) -> tuple[Any, Any]:
    every = max(1, len(x) // _MOST_POINTS)
    return x[::every].numpy(), y[::every].numpy()


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
