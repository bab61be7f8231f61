"""What is compared: every estimator of the library, and its baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

import pushforward as pf
from pushforward.function_space.baselines.diagonal import DiagonalDistance
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.baselines.kronecker import KroneckerDistance
from pushforward.function_space.baselines.subset import SubsetDistance
from pushforward.function_space.baselines.tangent import TangentDistance
from pushforward.function_space.metrics import Metric
from pushforward.typing import Params

__all__ = ["Method", "exact_method", "methods"]

CLOSED = ("gated", "reference", "anchored", "gaussian")
DRAWN = ("sampled", "synthetic")


@dataclass(frozen=True)
class Method:
    """Something that measures a distance.

    Parameters
    ----------
    distance
        ``(weights, metric)`` to a scalar, differentiable.
    num_bytes
        What it keeps besides the weights.
    error
        ``(weights, metric, distance)`` to the standard error that it states, if it does.
    """

    distance: Callable[[Params, Metric], Tensor]
    num_bytes: int
    error: Callable[[Params, Metric, float], float] | None = None


def methods(
    net: nn.Module, x: Tensor, y: Tensor, *, metrics: Sequence[Metric], draws: int, rank: int
) -> dict[str, Callable[[], Method]]:
    """All of them, by name; each is built when it is called.

    Parameters
    ----------
    net
        The reference.
    x, y
        Inputs and labels.
    metrics
        For which curvatures are computed.
    draws
        Over all components.
    rank
        Of a summary that keeps so many directions of the inputs.

    Returns
    -------
    dict
        Summaries first, then the baselines.
    """
    count = int(y.max()) + 1

    @cache
    def summary(**options: Any) -> Any:
        labels = {"classes": y} if options.pop("by_class", False) else {}
        return pf.summarize(net, x, progress=False, **labels, **options)

    def of_summary(estimator: Any, number: int, **options: Any) -> Method:
        made = summary(**options)
        settings = {"estimator": estimator, "num_samples": number}

        def error(weights: Params, metric: Metric, value: float) -> float:
            if estimator in DRAWN:
                stated = made.estimate(weights, metric=metric, **settings).standard_error
                return float(stated)
            # What `estimate` states where nothing is drawn, without the value once more.
            ratios = made.calibration(metric=metric, estimator=estimator)
            return value * float(ratios.square().mean().sqrt())

        def distance(weights: Params, metric: Metric) -> Tensor:
            return made.distance(weights, metric=metric, **settings)

        return Method(distance, made.num_bytes, error)

    found: dict[str, Callable[[], Method]] = {}
    for by_class in (False, True):
        parts = f", {count} classes" if by_class else ""
        for name in (*CLOSED, *DRAWN):
            options = {"by_class": by_class, "layer_moments": name == "anchored"}
            found[name + parts] = partial(of_summary, name, draws, **options)
    found["synthetic, ten times the draws"] = partial(of_summary, "synthetic", 10 * draws)
    found[f"synthetic, {count} classes, ten times the draws"] = partial(
        of_summary, "synthetic", 10 * draws, by_class=True, layer_moments=False
    )
    found[f"synthetic, {count} clusters"] = partial(
        of_summary, "synthetic", draws, clusters=min(count, len(x)), layer_moments=False
    )
    found[f"synthetic, {count} classes, inputs of rank {rank}"] = partial(
        of_summary, "synthetic", draws, by_class=True, input_moments=rank
    )
    for name in ("gated", "gaussian", "synthetic"):
        for kind, moments in (("diagonal inputs", "diagonal"), (f"inputs of rank {rank}", rank)):
            found[f"{name}, {kind}"] = partial(of_summary, name, draws, input_moments=moments)

    def of_baseline(made: Any) -> Method:
        return Method(lambda w, metric: made.distance(w, metric=metric), made.num_bytes)

    def of_curvature(build: Callable[..., Any]) -> Method:
        made = {metric: build(net, x, metric=metric, progress=False) for metric in metrics}
        return Method(lambda w, metric: made[metric].distance(w), made[metrics[0]].num_bytes)

    for size in (40, 200):
        found[f"subset of {size}"] = lambda size=size: of_baseline(
            SubsetDistance.of(net, x, min(size, len(x)), seed=0)
        )
    found["tangent"] = lambda: of_baseline(TangentDistance.of(net, x, progress=False))
    found["tangent on 40"] = lambda: of_baseline(
        TangentDistance.of(net, x, num_examples=min(40, len(x)), progress=False)
    )
    found["diagonal"] = lambda: of_curvature(DiagonalDistance.of)
    found["KFAC"] = lambda: of_curvature(partial(KroneckerDistance.of, eigenvalue_corrected=False))
    found["EK-FAC"] = lambda: of_curvature(KroneckerDistance.of)
    return found


def exact_method(net: nn.Module, x: Tensor) -> Method:
    """The true distance, which keeps all inputs."""
    made = ExactDistance.of(net, x, progress=False)
    return Method(lambda w, metric: made.distance(w, metric=metric), made.num_bytes)
