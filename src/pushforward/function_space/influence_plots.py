"""Pictures of influence; matplotlib is imported when they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.options import whole_number
from pushforward.runs.pictures import import_pyplot

if TYPE_CHECKING:
    from pushforward.function_space.influence_scores import InfluenceScores, SelfInfluence
    from pushforward.function_space.mislabels import WrongLabels

__all__ = ["plot_influence", "plot_self_influence", "plot_wrong_labels"]

_HELPFUL, _HARMFUL = "#1f3a5f", "#d9730d"


def plot_influence(found: InfluenceScores, query: int, k: int, output: int | None = None) -> Any:
    """Bars of the most helpful and the most harmful examples of one query.

    Parameters
    ----------
    found
        Scores of losses ``(Q, M)`` or of outputs ``(Q, K, M)``.
    query
        Which row.
    k
        How many of each kind.
    output
        Which output, for scores of outputs.

    Returns
    -------
    matplotlib.figure.Figure
        One bar an example, the number of the example beside it.

    Raises
    ------
    OptionError
        For a query, output or number of bars that there is not, scores of outputs without a
        choice of one, or a choice of an output for scores of losses.
    """
    row = _row(found, query, output).detach().cpu()
    k = whole_number(k, "k")
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
    changed = "the loss" if output is None else f"output {output}"
    axes.set_xlabel(f"change of {changed} on removing it, one of {found.num_examples:,}")
    axes.set_title(f"query {query}", loc="left")
    return figure


def _row(found: InfluenceScores, query: int, output: int | None) -> Tensor:
    scores = found.scores
    if not 0 <= query < len(scores):
        raise OptionError(
            f"query {query!r} of {len(scores)}",
            where="query",
            advice=f"Choose 0 to {len(scores) - 1}.",
        )
    if scores.dim() == 2:
        if output is None:
            return scores[query]
        raise OptionError(
            f"output {output!r} of scores of the loss",
            where="output",
            advice='Leave output away, or ask influence for effect="outputs".',
        )
    count = scores.shape[1]
    if output is None or not 0 <= output < count:
        raise OptionError(
            f"the scores are of {count} outputs, and "
            + ("none is chosen" if output is None else f"{output!r} is none of them"),
            where="output",
            advice=f"Choose one: plot(query, output=...) with 0 to {count - 1}.",
        )
    return scores[query, output]


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
