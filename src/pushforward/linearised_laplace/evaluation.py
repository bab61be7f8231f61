"""How good a posterior's predictions are on held-out data, beside those of the network alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import log
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pushforward.linearised_laplace.calibration import (
    IntervalCoverage,
    Metric,
    ReliabilityCurve,
    auroc,
    expected_calibration_error,
    fit_temperature,
    interval_coverage,
    mean_with_error,
    reliability_curve,
)
from pushforward.linearised_laplace.posterior import LaplacePosterior
from pushforward.linearised_laplace.prediction import Prediction
from pushforward.networks.data import Examples
from pushforward.networks.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from pushforward.runs.estimate import Check, Cost, Status, to_jsonable, worst_status
from pushforward.runs.progress import track

__all__ = ["Evaluation", "Scores", "Task", "class_laws", "evaluate", "log_likelihoods"]

Task = Literal["classification", "regression", "counts"]

_SIGNIFICANT = 2.0  # standard errors of the paired difference
_MATERIAL = 1e-3  # nats that somebody could mind
_LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
_SHOWN_LEVEL = 0.95
_HIDDEN: dict[str, Any] = {"json": False}


@dataclass(frozen=True, eq=False)
class Scores:
    """How good one way to predict is.

    Parameters
    ----------
    name
        Of the way: ``"MAP"`` is the network alone.
    nll
        Negative log-likelihood of an example, in nats: summed over the outputs of a regression,
        averaged over the labels of a classification when an example has several.
    difference
        The same minus that of MAP, example by example, so that its standard error is that of a
        paired comparison; None for MAP itself.
    accuracy
        Share of right labels; None unless a classification.
    ece
        Expected calibration error; None unless a classification.
    error_auroc
        Probability that a wrong answer has less confidence than a right one; None unless a
        classification with both.
    rmse
        Root mean squared error of the expected target; None for a classification.
    coverage
        Of central intervals; None unless a regression.
    reliability
        Accuracy against confidence; None unless a classification.
    """

    name: str
    nll: Metric
    difference: Metric | None
    accuracy: Metric | None = None
    ece: Metric | None = None
    error_auroc: Metric | None = None
    rmse: Metric | None = None
    coverage: IntervalCoverage | None = None
    reliability: ReliabilityCurve | None = None

    @property
    def is_worse(self) -> bool:
        """Whether its NLL is above MAP's by more than two standard errors and 0.001 nats."""
        gap = self.difference
        return gap is not None and gap.value > max(_SIGNIFICANT * gap.standard_error, _MATERIAL)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of every way to predict, the network alone first.

    Parameters
    ----------
    task
        What is predicted: ``"classification"``, ``"regression"`` or ``"counts"``.
    rows
        MAP; MAP with its temperature fitted (when validation data were given; of a regression, with
        its noise variance rescaled); Laplace in closed form (probit), and by the average over draws
        unless the closed form is exact.
    num_examples
        Held out.
    map_temperature
        By which the logits of MAP are divided in its second row, or its noise variance multiplied;
        None without validation data, and for counts.
    checks
        Whether Laplace helps, and on data that can tell.
    cost
        What it took.
    prediction
        For every example, by the probit link.
    spread
        ``(N, *event)``: standard deviation over the posterior of each expected target: of a
        probability, a rate, or an output.
    targets
        As the likelihood takes them.
    """

    task: Task
    rows: tuple[Scores, ...]
    num_examples: int
    map_temperature: float | None
    checks: tuple[Check, ...]
    cost: Cost
    prediction: Prediction = field(metadata=_HIDDEN)
    spread: Float[Tensor, " N *event"] = field(metadata=_HIDDEN)
    targets: Shaped[Tensor, "*targets"] = field(metadata=_HIDDEN)

    @property
    def baseline(self) -> Scores:
        """Of the network alone."""
        return self.rows[0]

    @property
    def laplace(self) -> Scores:
        """Of the posterior in closed form, or by its draws where there is none."""
        return next(row for row in self.rows if row.name.startswith("Laplace"))

    @property
    def status(self) -> Status:
        """The worst status among the checks."""
        return worst_status(self.checks)

    def plot(self) -> Any:
        """Reliability diagram of a classification, coverage of a regression's intervals.

        Returns
        -------
        matplotlib.figure.Figure
            One panel.
        """
        from pushforward.linearised_laplace.plots import plot_calibration

        return plot_calibration(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            Without what belongs to single examples.
        """
        fields: dict[str, Any] = to_jsonable(self)
        return fields | {"status": self.status}

    def columns(self) -> dict[str, list[Metric | None]]:
        """The scores as columns, with their heads.

        Returns
        -------
        dict
            An entry for each row; None where there is none.
        """
        everything: dict[str, list[Metric | None]] = {
            "accuracy": [row.accuracy for row in self.rows],
            "RMSE": [row.rmse for row in self.rows],
            "NLL": [row.nll for row in self.rows],
            "ECE": [row.ece for row in self.rows],
            "AUROC of errors": [row.error_auroc for row in self.rows],
            f"coverage of {100 * _SHOWN_LEVEL:.0f} %": [
                _shown_coverage(row.coverage) for row in self.rows
            ],
            "NLL, difference to MAP": [row.difference for row in self.rows],
        }
        return {head: column for head, column in everything.items() if any(column)}

    def __repr__(self) -> str:
        table = [["", *(row.name for row in self.rows)]]
        for head, column in self.columns().items():
            table.append([head, *("" if entry is None else str(entry) for entry in column)])
        widths = [max(map(len, column)) for column in table]
        lines = [f"Evaluation on {self.num_examples:,} examples"]
        for line in zip(*table, strict=True):
            first, *rest = (entry.ljust(width) for entry, width in zip(line, widths, strict=True))
            lines.append("  ".join(["", first, *rest]).rstrip())
        if self.map_temperature is not None:
            lines.append(f"  temperature of MAP: {self.map_temperature:.4g}")
        lines += [f"  {check}" for check in self.checks if check.status != "pass"]
        return "\n".join(lines)


def evaluate(
    posterior: LaplacePosterior,
    data: Any,
    *,
    validation: Any = None,
    bins: int = 15,
    progress: bool | None = None,
) -> Evaluation:
    """Score a posterior and the network alone on held-out data.

    Parameters
    ----------
    posterior
        What predicts.
    data
        Inputs and targets that the network was not trained on.
    validation
        More such data, not those in `data`, on which the temperature of the second row is fitted.
    bins
        Of the expected calibration error.
    progress
        Whether to show a bar; None: on a terminal, when it takes long.

    Returns
    -------
    Evaluation
        One row for each way to predict. All are scored in one pass over `data`.
    """
    began = perf_counter()
    device = posterior.model.device
    examples = Examples.read(data, device=device)
    held_out = (
        None if validation is None else Examples.read(validation, name="validation", device=device)
    )
    with track(len(examples), "Evaluating", enabled=progress) as advance:
        seen = _collect(posterior, examples, advance)
    likelihood = posterior.likelihood
    temperature = None if held_out is None else _map_temperature(posterior, held_out)
    if isinstance(likelihood, Gaussian):
        task: Task = "regression"
        rows = _regression(likelihood, seen, temperature)
    elif isinstance(likelihood, Poisson):
        task, rows = "counts", _counts(likelihood, seen)
    else:
        task, rows = "classification", _classification(likelihood, seen, temperature, bins)
    checks = [_usefulness(rows)]
    if held_out is not None:
        checks.append(_separateness(examples, held_out))
    prediction = Prediction(
        seen.outputs,
        seen.variance,
        likelihood.variance(seen.outputs) if task == "regression" else None,
        likelihood.probit_mean(seen.outputs, seen.variance),
        likelihood.mean(seen.outputs),
        seen.error,
        task == "classification",
    )
    return Evaluation(
        task=task,
        rows=rows,
        num_examples=len(examples),
        map_temperature=temperature,
        checks=tuple(checks),
        cost=Cost(0.0, perf_counter() - began, len(examples) * (1 + posterior.num_draws)),
        prediction=prediction,
        spread=seen.spread,
        targets=seen.targets,
    )


def log_likelihoods(
    likelihood: Likelihood,
    outputs: Float[Tensor, " B *event"],
    variance: Float[Tensor, " B *event"],
    targets: Shaped[Tensor, "*targets"],
) -> Float[Tensor, " B"]:
    """Log-probability of the targets when the outputs are Gaussian, by the probit link.

    Parameters
    ----------
    likelihood
        `Gaussian` (exact), `Categorical` or `Bernoulli`.
    outputs, variance
        ``(B, *event)``: means and epistemic variances.
    targets
        As the likelihood takes them.

    Returns
    -------
    Tensor
        ``(B,)`` float64: summed over the outputs of a regression, averaged over the labels of an
        example.
    """
    outputs, variance = outputs.double(), variance.double()
    if isinstance(likelihood, Gaussian):
        total = variance + likelihood.variance(outputs)
        density = -0.5 * ((targets - outputs).square() / total + (2 * torch.pi * total).log())
        return density.flatten(1).sum(1)
    return -_losses(*class_laws(likelihood, likelihood.probit_mean(outputs, variance), targets))


def class_laws(
    likelihood: Likelihood,
    expected: Float[Tensor, " N *event"],
    targets: Shaped[Tensor, "*targets"],
) -> tuple[Float[Tensor, "*rows classes"], Shaped[Tensor, "*labels"]]:
    """Expected targets of a classification as laws of labels; a binary target has two classes.

    Parameters
    ----------
    likelihood
        `Categorical` or `Bernoulli`.
    expected
        ``(N, *event)`` probabilities.
    targets
        As the likelihood takes them.

    Returns
    -------
    tuple
        ``(N, ..., classes)``, and labels ``(N, ...)``.
    """
    if isinstance(likelihood, Categorical):
        return expected, targets
    return torch.stack([1 - expected, expected], -1), targets.long()


class _Seen(NamedTuple):
    """What one pass over the data leaves: everything by example, ``(N, ...)``."""

    outputs: Tensor
    variance: Tensor
    error: Tensor
    expected: Tensor  # over the draws
    spread: Tensor
    log_probability: Tensor  # of all targets of an example, over the draws
    targets: Tensor


def _collect(
    posterior: LaplacePosterior, examples: Examples, advance: Callable[[int], None]
) -> _Seen:
    parts = []
    likelihood = posterior.likelihood
    for batch in posterior._batches(examples):
        assert batch.targets is not None
        outputs, variance, error, moved = posterior._moments(batch, draws=True)
        assert moved is not None
        targets = likelihood.check_targets(outputs, batch.targets, examples.name)
        drawn = outputs.double() + moved
        means = likelihood.mean(drawn)
        scores = likelihood.log_prob(drawn, targets).logsumexp(0) - log(len(drawn))
        spread = means.std(0) if len(means) > 1 else torch.zeros_like(means[0])
        if isinstance(likelihood, Gaussian):
            spread = variance.double().clamp(min=0).sqrt()
        parts.append((outputs, variance, error, means.mean(0), spread, scores, targets))
        advance(len(batch))
    return _Seen(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _map_temperature(posterior: LaplacePosterior, held_out: Examples) -> float | None:
    """Of the network alone, from the other held-out data; None for counts."""
    likelihood = posterior.likelihood
    outputs, targets = [], []
    for batch in posterior._batches(held_out):
        assert batch.targets is not None
        outputs.append(posterior.model.predict(batch.inputs).double())
        targets.append(likelihood.check_targets(outputs[-1], batch.targets, held_out.name))
    f, y = torch.cat(outputs), torch.cat(targets)
    if isinstance(likelihood, Gaussian):
        return float(((y - f).square() / likelihood.variance(f)).mean())
    if isinstance(likelihood, Poisson):
        return None
    if isinstance(likelihood, Bernoulli):
        return fit_temperature(torch.stack([torch.zeros_like(f), f], -1), y.long())
    return fit_temperature(f, y)


def _classification(
    likelihood: Likelihood, seen: _Seen, temperature: float | None, bins: int
) -> tuple[Scores, ...]:
    outputs = seen.outputs.double()
    laws = {"MAP": likelihood.mean(outputs)}
    if temperature is not None:
        laws["MAP, temperature-scaled"] = likelihood.mean(outputs / temperature)
    laws["Laplace, probit"] = likelihood.probit_mean(outputs, seen.variance.double())
    laws["Laplace, Monte Carlo"] = seen.expected
    rows: list[Scores] = []
    first: Tensor | None = None
    for name, expected in laws.items():
        law, labels = class_laws(likelihood, expected, seen.targets)
        losses = _losses(law, labels)
        first = losses if first is None else first
        confidence, guess = law.max(-1)
        right = guess == labels
        both = bool(right.any()) and not bool(right.all())
        rows.append(
            Scores(
                name,
                mean_with_error(losses),
                mean_with_error(losses - first) if rows else None,
                accuracy=mean_with_error(right.double().reshape(len(labels), -1).mean(1)),
                ece=expected_calibration_error(law, labels, bins),
                error_auroc=auroc(-confidence[~right], -confidence[right]) if both else None,
                reliability=reliability_curve(law, labels, bins),
            )
        )
    return tuple(rows)


def _regression(likelihood: Gaussian, seen: _Seen, temperature: float | None) -> tuple[Scores, ...]:
    outputs, targets = seen.outputs.double(), seen.targets.double()
    noise = likelihood.variance(outputs)
    variances = {"MAP": noise}
    if temperature is not None:
        variances["MAP, noise rescaled"] = noise * temperature
    variances["Laplace"] = noise + seen.variance.double()
    squared = (targets - outputs).square()
    rows: list[Scores] = []
    first: Tensor | None = None
    for name, variance in variances.items():
        losses = 0.5 * (squared / variance + (2 * torch.pi * variance).log()).flatten(1).sum(1)
        first = losses if first is None else first
        rows.append(
            Scores(
                name,
                mean_with_error(losses),
                mean_with_error(losses - first) if rows else None,
                rmse=_root_mean(squared),
                coverage=interval_coverage(outputs, variance, targets, _LEVELS),
            )
        )
    return tuple(rows)


def _counts(likelihood: Poisson, seen: _Seen) -> tuple[Scores, ...]:
    outputs, targets = seen.outputs.double(), seen.targets.double()
    first = -likelihood.log_prob(outputs, targets)
    losses = -seen.log_probability
    return (
        Scores(
            "MAP",
            mean_with_error(first),
            None,
            rmse=_root_mean((targets - likelihood.mean(outputs)).square()),
        ),
        Scores(
            "Laplace, Monte Carlo",
            mean_with_error(losses),
            mean_with_error(losses - first),
            rmse=_root_mean((targets - seen.expected).square()),
        ),
    )


def _losses(law: Tensor, labels: Tensor) -> Tensor:
    """Negative log-probability of the labels, averaged within each example, ``(N,)``."""
    chosen = law.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    losses = -chosen.clamp(min=torch.finfo(law.dtype).tiny).log()
    return losses.reshape(len(losses), -1).mean(1)


def _root_mean(squared: Tensor) -> Metric:
    """Root of the mean over examples and outputs; its error by the delta method."""
    mean = mean_with_error(squared.flatten(1).mean(1))
    root = mean.value**0.5
    return Metric(root, mean.standard_error / max(2 * root, 1e-300), mean.count)


def _shown_coverage(coverage: IntervalCoverage | None) -> Metric | None:
    if coverage is None:
        return None
    at = int((coverage.levels - _SHOWN_LEVEL).abs().argmin())
    return Metric(float(coverage.coverage[at]), float(coverage.standard_error[at]), coverage.count)


def _usefulness(rows: Iterable[Scores]) -> Check:
    """Whether the posterior predicts worse than the network alone, which it can."""
    ways = [row for row in rows if row.name.startswith("Laplace")]
    gaps = ", ".join(
        f"{_signed(row.difference)} nats{_link(row)}" for row in ways if row.difference is not None
    )
    detail = f"its NLL minus MAP's is {gaps}"
    if not any(row.is_worse for row in ways):
        return Check("not-worse-than-map", "pass", detail)
    remedy = (
        "The prior that the evidence prefers can leave too much uncertainty: use "
        "posterior.fit_temperature(validation) or pf.choose_prior_precision with held-out data, or "
        "predict with the network alone."
    )
    better = [row for row in ways if not row.is_worse]
    if better:
        remedy = f"Predict by the other link{_link(better[0])}, which is not worse. {remedy}"
    return Check(
        "not-worse-than-map",
        "warn",
        f"Laplace predicts these data worse than the network alone: {detail}.",
        remedy,
    )


def _link(row: Scores) -> str:
    _, _, name = row.name.partition(", ")
    return f" ({name})" if name else ""


def _separateness(examples: Examples, held_out: Examples) -> Check:
    same = examples.fingerprint() == held_out.fingerprint()
    return Check(
        "validation-separate",
        "warn" if same else "pass",
        "the validation data are the test data"
        if same
        else "the validation data are not the test data",
        "The temperature-scaled row is too good. Fit it on other held-out data." if same else "",
    )


def _signed(gap: Metric) -> str:
    return f"{gap.value:+.3g} ± {gap.standard_error:.1g}"
