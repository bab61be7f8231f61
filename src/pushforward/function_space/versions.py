"""Several versions of one network beside each other: how far each is from the reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import OptionError, PushforwardError
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.estimators import DEFAULT, Estimator
from pushforward.function_space.metrics import Metric, check_metric
from pushforward.function_space.network import Other, select_outputs
from pushforward.function_space.plots import named_calibration, plot_versions
from pushforward.function_space.summary import FunctionSummary
from pushforward.runs.estimate import Check, Estimate, Status, to_jsonable, worst_status
from pushforward.runs.progress import track

__all__ = ["VersionDistance", "VersionDistances", "measure_versions", "output_spread"]

_FEW = 8  # units of the last place by which rounding moves an output


@dataclass(frozen=True, eq=False)
class VersionDistance:
    """How far one version is in one metric.

    Parameters
    ----------
    name
        Of the version.
    metric
        How outputs were compared.
    estimate
        The distance with its error.
    share
        The distance over `output_spread`; None for other metrics than the Euclidean.
    truth
        Mean discrepancy over data, if there were any to check with.
    """

    name: str
    metric: Metric
    estimate: Estimate
    share: float | None = None
    truth: float | None = None


@dataclass(frozen=True, eq=False)
class VersionDistances:
    """Distances of several versions from one reference.

    Parameters
    ----------
    summary
        Of the reference.
    rows
        One for each version and metric, the metrics of a version together.
    estimator
        By which.
    outputs
        Numbers of the outputs that count; None for all.
    """

    summary: FunctionSummary
    rows: tuple[VersionDistance, ...]
    estimator: Estimator
    outputs: tuple[int, ...] | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that were asked for, in order."""
        return tuple(dict.fromkeys(row.metric for row in self.rows))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the versions, in order."""
        return tuple(dict.fromkeys(row.name for row in self.rows))

    @property
    def checks(self) -> tuple[tuple[str, Check], ...]:
        """Checks with the metric they are about; they are the same for all versions."""
        firsts = [self.of(metric)[0] for metric in self.metrics]
        return tuple((row.metric, check) for row in firsts for check in row.estimate.checks)

    @property
    def status(self) -> Status:
        """The worst status among the checks."""
        return worst_status(check for _, check in self.checks)

    def of(self, metric: Metric) -> tuple[VersionDistance, ...]:
        """The rows of one metric."""
        return tuple(row for row in self.rows if row.metric == metric)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            With ``log(estimate / truth)`` of every probe.
        """
        return {
            "summary": self.summary.to_dict(),
            "estimator": self.estimator,
            "outputs": None if self.outputs is None else list(self.outputs),
            "versions": [
                {
                    "name": row.name,
                    "metric": row.metric,
                    "distance": float(row.estimate),
                    "standard_error": float(row.estimate.standard_error),
                    "share_of_output_variance": row.share,
                    "distance_on_data": row.truth,
                }
                for row in self.rows
            ],
            "calibration": {
                metric: named_calibration(self.summary, metric, self.estimator)
                for metric in self.metrics
            },
            "checks": [{"metric": metric, **to_jsonable(check)} for metric, check in self.checks],
        }

    def plot(self) -> Any:
        """Distances with their error bars on a logarithmic axis.

        Returns
        -------
        matplotlib.figure.Figure
            Needs matplotlib.
        """
        return plot_versions(self)

    def __repr__(self) -> str:
        lines = [f"Distances of {len(self.names)} versions by the {self.estimator} estimator"]
        width = max(len(name) for name in self.names)
        for row in self.rows:
            value, error = float(row.estimate), float(row.estimate.standard_error)
            truth = "" if row.truth is None else f", {row.truth:.4g} on the data"
            lines.append(f"  {row.name:<{width}}  {row.metric}: {value:.4g} ± {error:.2g}{truth}")
        lines += [f"  {metric}: {check}" for metric, check in self.checks if check.status != "pass"]
        return "\n".join(lines)


def measure_versions(
    summary: FunctionSummary,
    versions: Mapping[str, Other],
    *,
    metrics: Metric | Sequence[Metric] = ("euclidean",),
    estimator: Estimator | None = None,
    outputs: slice | Sequence[int] | Tensor | None = None,
    data: Any = None,
    seed: int = 0,
    progress: bool | None = None,
) -> VersionDistances:
    """How far each of several versions of a network is from the one that was summarised.

    Parameters
    ----------
    summary
        Of the reference.
    versions
        Networks of the same architecture, or their tensors, by name.
    metrics
        How outputs are compared, one or several.
    estimator, outputs, seed
        As in `FunctionSummary.distance`.
    data
        Inputs on which the distances are computed beside the estimates, to check them; None: there
        are none any more.
    progress
        Whether to show a bar; None: on a terminal, when it takes long.

    Returns
    -------
    VersionDistances
        In the order of `versions`.

    Raises
    ------
    OptionError
        For what is no summary or gives versions no names, without a version or metric, for a
        metric twice, and for unknown ones.
    PushforwardError
        Whatever is wrong with a version, under its name.
    """
    _check_summary(summary)
    _check_versions(versions)
    metrics = _metrics(metrics)
    chosen = select_outputs(summary.statistics.outputs.fisher.shape[-1], outputs)
    numbers = None if chosen is None else tuple(int(k) for k in chosen)
    exact = None if data is None else ExactDistance.of(summary.reference.module, data)
    spread = output_spread(summary, numbers)
    rows = []
    with track(len(versions) * len(metrics), "Measuring", enabled=progress) as advance:
        for name, other in versions.items():
            for metric in metrics:
                try:
                    estimate = summary.estimate(
                        other, metric=metric, estimator=estimator, outputs=numbers, seed=seed
                    )
                except PushforwardError as error:
                    if error.where != "other":
                        raise
                    raise type(error)(error.what, where=name, advice=error.advice) from error
                truth = None
                if exact is not None:
                    with torch.no_grad():
                        truth = float(exact.distance(other, metric=metric, outputs=numbers))
                euclidean = metric == "euclidean" and spread > 0
                share = float(estimate) / spread if euclidean else None
                rows.append(VersionDistance(name, metric, estimate, share, truth))
                advance(1)
    return VersionDistances(summary, tuple(rows), estimator or DEFAULT, numbers)


def _check_summary(summary: object) -> None:
    if not isinstance(summary, FunctionSummary):
        raise OptionError(
            f"{type(summary).__name__} is no summary",
            where="summary",
            advice="Pass what pf.summarize returned. A baseline has no estimate with an error: ask "
            "its distance for each version.",
        )


def _check_versions(versions: object) -> None:
    if not isinstance(versions, Mapping) or not all(isinstance(name, str) for name in versions):
        raise OptionError(
            f"{type(versions).__name__} does not give every version a name",
            where="versions",
            advice='Give networks by name, such as {"pruned": net}.',
        )
    if not versions:
        raise OptionError("no version", where="versions", advice="Give at least one.")


def _metrics(given: object) -> tuple[Metric, ...]:
    """One or several, each known and named once."""
    several = isinstance(given, Iterable) and not isinstance(given, str)
    metrics: tuple[Any, ...] = tuple(given) if several else (given,)  # type: ignore[arg-type]
    if not metrics:
        raise OptionError("no metric", where="metrics", advice="Give at least one.")
    for metric in metrics:
        check_metric(metric)
    if len(set(metrics)) < len(metrics):
        raise OptionError(f"{list(metrics)}", where="metrics", advice="Name each once.")
    return metrics


def output_spread(summary: FunctionSummary, outputs: Sequence[int] | None = None) -> float:
    """Half the total variance of the reference's outputs over its data.

    It is the Euclidean distance of the reference from the best constant function, and so the unit
    in which a Euclidean distance is large or small.

    Parameters
    ----------
    summary
        Of the reference.
    outputs
        Numbers of the outputs that count; None for all.

    Returns
    -------
    float
        ``sum_k Var z_k / 2``; 0 where it is no more than the rounding of the outputs.
    """
    moments, weights = summary.statistics.outputs.moments, summary.weights
    within = moments.covariance.diagonal(dim1=-2, dim2=-1)
    mean = weights @ moments.mean
    variance = weights @ (within + (moments.mean - mean).square())
    square = variance + mean.square()
    if outputs is not None:
        chosen = torch.as_tensor(outputs, device=variance.device)
        variance, square = variance[chosen], square[chosen]
    spread, size = float(variance.sum()) / 2, float(square.sum()) / 2
    # Equal inputs in different places of a batch get outputs that are a few units of the last place
    # apart; moments are sums in float64.
    last_place = torch.finfo(summary.reference.dtype).eps
    rounding = max(torch.finfo(torch.float64).eps, (_FEW * last_place) ** 2)
    return spread if spread > rounding * size else 0.0
