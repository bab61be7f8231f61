"""How good the average over posterior draws predicts, beside one network alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.func import vmap

from pushforward.errors import OptionError
from pushforward.linearised_laplace.calibration import (
    Metric,
    expected_calibration_error,
    mean_with_error,
    reliability_curve,
)
from pushforward.linearised_laplace.evaluation import Scores, class_laws
from pushforward.networks.batches import Inputs
from pushforward.networks.data import Examples
from pushforward.networks.likelihoods import Bernoulli, Categorical, Likelihood
from pushforward.runs.estimate import to_jsonable
from pushforward.typing import Params

__all__ = ["AveragedPrediction", "LargestEntry", "TargetLaw", "average_prediction"]

_ROWS = 256  # test inputs at a time
_DRAWS_AT_ONCE = 32
_NODES = 16


@runtime_checkable
class TargetLaw(Protocol):
    """The law of targets given outputs: a likelihood, or what a sampler assumes instead."""

    def mean(self, outputs: Tensor, /) -> Tensor:
        """Expected targets, or probabilities of the classes."""

    def log_prob(self, outputs: Tensor, targets: Tensor, /) -> Tensor:
        """Log density of the targets of each example."""


@dataclass(frozen=True)
class LargestEntry:
    """The label is the position of the largest output once Gaussian noise is added to each.

    Parameters
    ----------
    variance
        Of the noise.

    Examples
    --------
    >>> import torch
    >>> LargestEntry(1.0).mean(torch.zeros(1, 2))
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """

    variance: float

    def mean(self, outputs: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows C"]:
        """Probabilities of the classes.

        ``P(c) = E prod_{j != c} Phi((f_c - f_j) / s + z)`` over a standard normal ``z``, by
        Gauss-Hermite quadrature.

        Parameters
        ----------
        outputs
            ``(..., C)``.

        Returns
        -------
        Tensor
            ``(..., C)`` float64.
        """
        scaled = outputs.double() / self.variance**0.5
        gaps = scaled.unsqueeze(-1) - scaled.unsqueeze(-2)
        itself = torch.eye(scaled.shape[-1], dtype=torch.bool, device=scaled.device)
        nodes, weights = np.polynomial.hermite_e.hermegauss(_NODES)
        total = torch.zeros_like(scaled)
        for node, weight in zip(nodes.tolist(), (weights / weights.sum()).tolist(), strict=True):
            below = torch.special.ndtr(gaps + node).masked_fill(itself, 1.0)
            total = total + weight * below.prod(-1)
        return total / total.sum(-1, keepdim=True)

    def log_prob(
        self, outputs: Float[Tensor, "*rows C"], targets: Shaped[Tensor, "*labels"]
    ) -> Float[Tensor, "*labels2"]:
        """Log-probability of labels.

        Parameters
        ----------
        outputs
            ``(..., B, C)``.
        targets
            ``(B,)``.

        Returns
        -------
        Tensor
            ``(..., B)`` float64.
        """
        law = self.mean(outputs)
        index = targets.expand(law.shape[:-1]).unsqueeze(-1)
        return law.gather(-1, index).squeeze(-1).clamp(min=torch.finfo(law.dtype).tiny).log()


@dataclass(frozen=True, eq=False)
class AveragedPrediction:
    """Scores on held-out data.

    Parameters
    ----------
    rows
        The network alone if its weights are known, a single draw on average over the draws, and
        the average over the draws. Differences are to the first row.
    num_examples, num_draws
        That were used.
    expected
        ``(N, *event)``: expected targets, averaged over the draws.
    """

    rows: tuple[Scores, ...]
    num_examples: int
    num_draws: int
    expected: Float[Tensor, " N *event"]

    @property
    def average(self) -> Scores:
        """Of the average over the draws."""
        return self.rows[-1]

    def columns(self) -> dict[str, list[Metric | None]]:
        """Scores by their names, for tables; without those that nothing has.

        Returns
        -------
        dict
            One entry for each row.
        """
        found: dict[str, list[Metric | None]] = {
            "NLL": [row.nll for row in self.rows],
            f"difference to {self.rows[0].name}": [row.difference for row in self.rows],
            "accuracy": [row.accuracy for row in self.rows],
            "ECE": [row.ece for row in self.rows],
            "RMSE": [row.rmse for row in self.rows],
        }
        return {name: column for name, column in found.items() if any(column)}

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            Without the predictions themselves.
        """
        fields: dict[str, Any] = to_jsonable(
            {"rows": self.rows, "num_examples": self.num_examples, "num_draws": self.num_draws}
        )
        return fields


def average_prediction(
    predict: Callable[[Params, Inputs], Tensor],
    draws: Params,
    law: TargetLaw,
    likelihood: Likelihood,
    data: Any,
    *,
    alone: Callable[[Inputs], Tensor] | None = None,
    num_draws: int = 400,
    bins: int = 15,
) -> AveragedPrediction:
    """Average predictions over draws, and score them.

    Parameters
    ----------
    predict
        ``predict(parameters, inputs)``: outputs ``(B, *event)`` of one draw.
    draws
        ``(D, *shape)`` by name.
    law
        Of targets given outputs, as the sampler assumes.
    likelihood
        Which kind of targets there are, and their law given the outputs of the network alone.
    data
        Held-out examples.
    alone
        The trained network, when there is one.
    num_draws
        At most, spread evenly over the draws.
    bins
        Of the calibration error.

    Returns
    -------
    AveragedPrediction
        With the scores of the network alone, of single draws and of the average.

    Raises
    ------
    OptionError
        When there are no draws.
    """
    total = len(next(iter(draws.values()), torch.empty(0)))
    if not total:
        raise OptionError("there are none", where="draws", advice="Keep the parameters.")
    spread = torch.linspace(0, total - 1, min(total, num_draws), dtype=torch.float64)
    at = spread.round().long()
    kept = {name: value[at.to(value.device)] for name, value in draws.items()}
    examples = Examples.read(data, device=next(iter(draws.values())).device)
    with torch.no_grad():
        parts = [
            _batch(predict, kept, law, likelihood, batch, alone)
            for batch in examples.batches(_ROWS)
        ]
    expected, mixed, single, right, trained, known, targets = (
        torch.cat(column) for column in zip(*parts, strict=True)
    )
    classes = isinstance(likelihood, Categorical | Bernoulli)
    rows: list[Scores] = []
    first: Tensor | None = None
    if alone is not None:
        first = -known
        rows.append(_scores("trained network", first, None, likelihood, trained, targets, bins))
    rows.append(
        Scores(
            "a single draw",
            mean_with_error(-single),
            None if first is None else mean_with_error(-single - first),
            accuracy=mean_with_error(right) if classes else None,
        )
    )
    first = -single if first is None else first
    rows.append(
        _scores("average over the draws", -mixed, first, likelihood, expected, targets, bins)
    )
    return AveragedPrediction(tuple(rows), len(examples), len(at), expected)


def _batch(
    predict: Callable[[Params, Inputs], Tensor],
    draws: Params,
    law: TargetLaw,
    likelihood: Likelihood,
    batch: Any,
    alone: Callable[[Inputs], Tensor] | None,
) -> tuple[Tensor, ...]:
    """Everything about some test inputs, by example."""
    inputs = batch.inputs
    count = len(next(iter(draws.values())))
    one = predict({name: value[0] for name, value in draws.items()}, inputs)
    targets = likelihood.check_targets(one, batch.targets, "test data")
    expected, logs, right = torch.zeros((), device=one.device), [], one.new_zeros(len(one)).double()
    for first in range(0, count, _DRAWS_AT_ONCE):
        some = {name: value[first : first + _DRAWS_AT_ONCE] for name, value in draws.items()}
        outputs = vmap(lambda p: predict(p, inputs))(some)
        means = law.mean(outputs).double()
        expected = expected + means.sum(0) / count
        logs.append(law.log_prob(outputs, targets).double())
        if isinstance(likelihood, Categorical | Bernoulli):
            laws, labels = class_laws(likelihood, means, targets)
            hits = (laws.argmax(-1) == labels).double()
            right = right + hits.reshape(*hits.shape[:2], -1).mean(-1).sum(0) / count
    stacked = torch.cat(logs)
    mixed = stacked.logsumexp(0) - float(np.log(count))
    outputs = alone(inputs) if alone is not None else one
    return (
        expected,
        mixed,
        stacked.mean(0),
        right,
        likelihood.mean(outputs).double(),
        likelihood.log_prob(outputs, targets).double(),
        targets,
    )


def _scores(
    name: str,
    losses: Tensor,
    first: Tensor | None,
    likelihood: Likelihood,
    expected: Tensor,
    targets: Tensor,
    bins: int,
) -> Scores:
    nll = mean_with_error(losses)
    difference = None if first is None else mean_with_error(losses - first)
    if not isinstance(likelihood, Categorical | Bernoulli):
        squared = (targets.double() - expected).square().flatten(1).mean(1)
        mean = mean_with_error(squared)
        root = mean.value**0.5
        error = mean.standard_error / max(2 * root, 1e-300)
        return Scores(name, nll, difference, rmse=Metric(root, error, mean.count))
    law, labels = class_laws(likelihood, expected, targets)
    right = (law.argmax(-1) == labels).double().reshape(len(labels), -1).mean(1)
    return Scores(
        name,
        nll,
        difference,
        accuracy=mean_with_error(right),
        ece=expected_calibration_error(law, labels, bins),
        reliability=reliability_curve(law, labels, bins),
    )
