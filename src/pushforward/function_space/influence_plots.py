"""Pictures of influence; matplotlib is imported when they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pushforward.errors import OptionError
from pushforward.runs.pictures import import_pyplot

if TYPE_CHECKING:
    from pushforward.function_space.influence import InfluenceScores, SelfInfluence
    from pushforward.function_space.mislabels import WrongLabels

__all__ = ["plot_influence", "plot_self_influence", "plot_wrong_labels"]

_HELPFUL, _HARMFUL = "#1f3a5f", "#d9730d"


def plot_influence(found: InfluenceScores, query: int, k: int) -> Any:
    """Bars of the most helpful and the most harmful examples of one query.

    Parameters
    ----------
    found
        Scores of losses ``(Q, M)``.
    query
        Which row.
    k
        How many of each kind.

    Returns
    -------
    matplotlib.figure.Figure
        One bar an example, the number of the example beside it.

    Raises
    ------
    OptionError
        For a query that there is not, or scores of outputs.
    """
    if found.scores.dim() != 2 or not 0 <= query < len(found.scores):
        raise OptionError(
            f"query {query!r} of scores {tuple(found.scores.shape)}",
            where="query",
            advice="Plot one row of scores with effect='loss'.",
        )
    row = found.scores[query].detach().cpu()
    order = row.argsort(descending=True)
    shown = torch.cat([order[:k], order[max(k, len(row) - k) :]])
    pyplot = import_pyplot()
    height = max(2.0, 0.25 * len(shown) + 1)
    figure, axes = pyplot.subplots(figsize=(6.0, height), layout="constrained")
    values = row[shown].tolist()
    colours = [_HELPFUL if value >= 0 else _HARMFUL for value in values]
    axes.barh(range(len(shown)), values, color=colours)
    axes.set_yticks(range(len(shown)), [str(n) for n in shown.tolist()])
    axes.invert_yaxis()
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_ylabel("example")
    axes.set_xlabel(f"change of the loss on removing it, one of {found.num_examples:,}")
    axes.set_title(f"query {query}", loc="left")
    return figure


def plot_self_influence(found: SelfInfluence) -> Any:
    """Score against loss, a point for each example.

    Parameters
    ----------
    found
        Scores with losses.

    Returns
    -------
    matplotlib.figure.Figure
        On logarithmic axes where all numbers are positive.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6.0, 4.0), layout="constrained")
    losses, scores = found.losses.detach().cpu(), found.scores.detach().cpu()
    axes.scatter(losses, scores, s=8, color=_HELPFUL, alpha=0.6)
    if bool((losses > 0).all()) and bool((scores > 0).all()):
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel("loss")
    axes.set_ylabel("self-influence")
    return figure


def plot_wrong_labels(found: WrongLabels) -> Any:
    """All scores in falling order, the most suspicious examples first.

    Parameters
    ----------
    found
        A ranking.

    Returns
    -------
    matplotlib.figure.Figure
        One line a score, each divided by its largest.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6.0, 4.0), layout="constrained")
    colours = (_HELPFUL, _HARMFUL, "#3b7d4f")
    for (name, scores), colour in zip(found.scores.items(), colours, strict=False):
        falling = scores.detach().cpu().sort(descending=True).values
        largest = float(falling[0]) or 1.0
        axes.plot(falling / largest, color=colour, label=name.replace("_", " "), linewidth=1.2)
    axes.set_xlabel("rank")
    axes.set_ylabel("score / largest")
    axes.legend()
    return figure
