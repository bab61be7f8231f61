"""Which inputs a network is least sure of, and what a table shows of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pushforward.linearised_laplace.evaluation import Evaluation, class_laws
from pushforward.networks.likelihoods import Likelihood
from pushforward.report.formatting import number, probability
from pushforward.report.page import Cell

__all__ = ["Ranking", "rank"]


@dataclass(frozen=True, eq=False)
class Ranking:
    """How uncertain each example is, and what a table shows of it.

    Parameters
    ----------
    uncertainty
        ``(N,)``: by which the examples are ranked, the most uncertain at the largest value.
    spread
        ``(N,)``: how far the prediction moves over the posterior.
    columns
        Heads, and for each head a function from the number of an example to its entry.
    right
        ``(N,)``: whether the network alone is right; None unless a classification with one label
        for each example.
    note
        How to read the table.
    """

    uncertainty: Float[Tensor, " N"]
    spread: Float[Tensor, " N"]
    columns: dict[str, Callable[[int], Cell]]
    right: Bool[Tensor, " N"] | None
    note: str


def rank(likelihood: Likelihood, result: Evaluation, names: Sequence[str]) -> Ranking:
    """Every example of an evaluation by its uncertainty.

    Parameters
    ----------
    likelihood
        Of the posterior.
    result
        The evaluation.
    names
        Of the outputs on the last axis.

    Returns
    -------
    Ranking
        By the probability of the predicted class, or by the spread of the most uncertain output.
    """
    if result.task == "classification":
        return _ranked_labels(likelihood, result, names)
    return _ranked_numbers(result, names)


def _ranked_labels(likelihood: Likelihood, result: Evaluation, names: Sequence[str]) -> Ranking:
    """By what Laplace leaves of the probability of the predicted class."""
    prediction, targets = result.prediction, result.targets
    alone, labels = class_laws(likelihood, prediction.map_expected.double(), targets)
    law, _ = class_laws(likelihood, prediction.expected.double(), targets)
    spread = result.spread
    if spread.shape != law.shape:
        spread = torch.stack([spread, spread], -1)
        names = ("0", "1") if prediction.mean.shape[-1] > 1 else ("no", "yes")
    confidence, guess = alone.max(-1)
    at = guess.unsqueeze(-1)
    mine, width = (values.gather(-1, at).squeeze(-1) for values in (law, spread))
    right = guess == labels
    count = len(labels)

    def mean(values: Tensor) -> Tensor:
        return values.double().reshape(count, -1).mean(1)

    columns: dict[str, Callable[[int], Cell]] = {}
    single = right[0].numel() == 1
    if single:
        label, chosen = labels.reshape(-1).tolist(), guess.reshape(-1).tolist()
        correct = right.reshape(-1).tolist()
        columns["label"] = lambda i: Cell(names[label[i]])
        columns["prediction"] = lambda i: Cell(names[chosen[i]], "" if correct[i] else "bad")
    else:
        columns["labels right"] = lambda i: Cell(f"{100 * float(mean(right)[i]):.0f} %")
    for head, values in (
        ("confidence, MAP", mean(confidence)),
        ("confidence, Laplace", mean(mine)),
        ("spread over the draws", mean(width)),
    ):
        columns[head] = _entry([_share(float(value)) for value in values])
    note = (
        "Confidence: the probability of the class that the network alone predicts; the inputs are "
        "ranked by what Laplace makes of it. Spread: its standard deviation over the draws."
        + ("" if single else " Averages over the labels of an example.")
    )
    return Ranking(
        1 - mean(mine), mean(width), columns, right.reshape(-1) if single else None, note
    )


def _ranked_numbers(result: Evaluation, names: Sequence[str]) -> Ranking:
    """By the spread of the most uncertain output."""
    prediction, count = result.prediction, result.num_examples
    spread = result.spread.double().reshape(count, -1)
    width, at = spread.max(1)

    def picked(values: Tensor) -> list[float]:
        flat = values.expand(prediction.mean.shape).double().reshape(count, -1)
        chosen: list[float] = flat.gather(1, at.unsqueeze(1)).squeeze(1).tolist()
        return chosen

    last = len(names)
    columns: dict[str, Callable[[int], Cell]] = {}
    if spread.shape[1] > 1:
        columns["output"] = lambda i: Cell(names[int(at[i]) % last])
    numbers = {"target": picked(result.targets), "prediction, MAP": picked(prediction.map_expected)}
    if prediction.noise_variance is not None:
        numbers["s.d., noise alone"] = picked(prediction.noise_variance.sqrt())
        numbers["s.d., Laplace"] = picked(prediction.variance.clamp(min=0).sqrt())
    else:
        numbers["prediction, Laplace"] = picked(prediction.expected)
    numbers["epistemic s.d."] = width.tolist()
    for head, values in numbers.items():
        columns[head] = _entry([number(value) for value in values])
    note = (
        "Epistemic s.d.: standard deviation over the posterior of the expected target, by which "
        "the inputs are ranked"
        + (", for its most uncertain output." if spread.shape[1] > 1 else ".")
    )
    return Ranking(width, width, columns, None, note)


def _entry(texts: list[str]) -> Callable[[int], Cell]:
    return lambda i: Cell(texts[i])


def _share(value: float) -> str:
    return probability(value) if value > 0.999 or 0 < value < 1e-3 else f"{value:.3f}"
