"""Every order of propagation beside one Monte Carlo check: the numbers, without their presentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.monte_carlo import SampledLaw, monte_carlo
from pushforward.cumulants.output import OutputLaw
from pushforward.cumulants.propagation import propagate
from pushforward.errors import OptionError, ResourceError, ShapeError
from pushforward.report.events import Event, default_events, functional_name, output_labels
from pushforward.report.formatting import number
from pushforward.runs.estimate import Check

__all__ = [
    "LARGE_DEVIATION",
    "LARGE_TAIL_RATIO",
    "Accuracy",
    "Comparison",
    "EventProbabilities",
    "Order",
    "TailCurve",
    "compare",
]

Order = Literal[1, 2, 3]

LARGE_DEVIATION = 3.0
"""Combined standard errors beyond which two means are said to differ."""

LARGE_TAIL_RATIO = 2.0
"""Factor outside the sampled interval beyond which two probabilities are said to differ."""

_LARGE_SPREAD_ERROR = 0.1  # of the standard deviation
_BATCH = 1024
_CURVES = 2
_CURVE_REACH, _CURVE_POINTS = 5.0, 26
_TINY = 1e-300


@dataclass(frozen=True)
class TailCurve:
    """Probability of exceeding a growing threshold.

    Parameters
    ----------
    name
        What is exceeded.
    event
        Threshold of the event in the table, in standard deviations above the mean.
    deviations
        Thresholds in standard deviations above the mean, ascending.
    saddlepoint, gaussian
        From the propagated cumulants.
    sampled, lower, upper
        Observed frequency and its interval.
    num_samples
        How many samples there were.
    """

    name: str
    event: float
    deviations: Sequence[float]
    saddlepoint: Sequence[float]
    gaussian: Sequence[float]
    sampled: Sequence[float]
    lower: Sequence[float]
    upper: Sequence[float]
    num_samples: int


@dataclass(frozen=True, eq=False)
class EventProbabilities:
    """Probabilities of the events, one entry each.

    Parameters
    ----------
    names, groups, thresholds
        Of the events.
    saddlepoint, gaussian
        From the propagated cumulants; the Gaussian one uses the mean and variance alone.
    sampled, lower, upper
        Observed by Monte Carlo, with the Wilson interval.
    observed
        Share of the examples in which the event occurs; None without data.
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    thresholds: tuple[float, ...]
    saddlepoint: Float[Tensor, " M"]
    gaussian: Float[Tensor, " M"]
    sampled: Float[Tensor, " M"]
    lower: Float[Tensor, " M"]
    upper: Float[Tensor, " M"]
    observed: Float[Tensor, " M"] | None

    @property
    def inside(self) -> list[bool]:
        """Whether the propagated probability lies in the sampled interval."""
        return ((self.saddlepoint >= self.lower) & (self.saddlepoint <= self.upper)).tolist()

    @property
    def distance(self) -> list[float]:
        """Factor that the propagated probability is away from the nearest end of the interval, at least 1."""
        above = self.saddlepoint / self.upper.clamp(min=_TINY)
        below = self.lower / self.saddlepoint.clamp(min=_TINY)
        return torch.maximum(above, below).clamp(min=1.0).tolist()


@dataclass(frozen=True)
class Accuracy:
    """What a method cost and how far its means are from the sampled ones.

    Every error is the root mean square over the outputs, in units of their standard deviation.

    Parameters
    ----------
    method
        Name.
    flops, seconds
        Cost, error bar included.
    passes
        Forward passes that cost as many FLOPs.
    stated
        Error according to the method itself.
    measured
        Error found by comparison with the Monte Carlo check, whose own error is subtracted; None for the
        check itself.
    frames, plain
        Error of Monte Carlo with as many passes, by the design of the check and by plain sampling.
    """

    method: str
    flops: float
    seconds: float
    passes: float
    stated: float
    measured: float | None
    frames: float
    plain: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """The numbers of the section.

    Parameters
    ----------
    labels
        Names of the outputs.
    law
        Law of the inputs in words.
    propagated
        The law of the outputs from each order, lowest first.
    chosen
        Index of the order that is reported.
    skipped
        Why an order is missing; empty when none is.
    sampled
        The Monte Carlo check of the outputs.
    deviations
        Propagated minus sampled mean in combined standard errors, ``(k,)``.
    spread_errors
        Propagated over sampled standard deviation minus 1, ``(k,)``.
    events
        Their probabilities.
    curves
        Tail curves of a few events.
    costs
        Cost and accuracy of each order, then of the check.
    data_mean, data_deviation
        Mean and standard deviation of the outputs over the examples, ``(k,)``; None without data.
    num_examples
        How many examples there were.
    checks
        Pairs of what was checked and the check.
    """

    labels: tuple[str, ...]
    law: str
    propagated: tuple[OutputLaw, ...]
    chosen: int
    skipped: str
    sampled: SampledLaw
    deviations: Float[Tensor, " K"]
    spread_errors: Float[Tensor, " K"]
    events: EventProbabilities
    curves: tuple[TailCurve, ...]
    costs: tuple[Accuracy, ...]
    data_mean: Float[Tensor, " K"] | None
    data_deviation: Float[Tensor, " K"] | None
    num_examples: int
    checks: tuple[tuple[str, Check], ...]

    @property
    def best(self) -> OutputLaw:
        """The law that is reported."""
        return self.propagated[self.chosen]


def compare(
    net: nn.Module,
    law: GaussianLaw,
    *,
    labels: Sequence[str] | None = None,
    events: Sequence[Event] | None = None,
    data: Tensor | None = None,
    num_samples: int = 100_000,
    seed: int = 0,
    highest_order: Order = 3,
    progress: bool | None = None,
) -> Comparison:
    """Propagate a law at orders 1, 2 and 3 and check the highest by Monte Carlo.

    Parameters
    ----------
    net
        As for `pushforward.propagate`.
    law
        Of the inputs, not batched.
    labels
        Names of the outputs; default their indices.
    events
        Events whose probability is wanted; default `default_events`.
    data
        Examples ``(N, *law.event_shape)`` on which the network is run too, to show how far the Gaussian law is
        from them.
    num_samples
        Forward passes of the Monte Carlo check. The tail curves take as many again, so that counting at many
        thresholds does not slow down the check that is timed.
    seed
        Of the Monte Carlo noise.
    highest_order
        1, 2 or 3; an order that does not fit into memory is left out.
    progress
        Show progress bars: True, False, or None for "on a terminal, if it takes long".

    Returns
    -------
    Comparison
        All numbers.

    Raises
    ------
    OptionError
        For an order other than 1, 2 or 3, or labels that do not fit.
    ShapeError
        For events with another number of outputs.
    """
    if highest_order not in {1, 2, 3}:
        raise OptionError(
            f"highest_order={highest_order!r}", where="compare", advice="Use 1, 2 or 3."
        )
    with torch.no_grad():
        propagated, skipped = _propagate_all(net, law, highest_order)
        chosen = _choose(propagated)
        best = propagated[chosen]
        names = output_labels(labels, best.mean.shape[-1])
        wanted = default_events(best, names) if events is None else tuple(events)
        identity = torch.eye(len(names), dtype=torch.float64, device=best.mean.device)
        functionals = _stack(wanted, identity)
        limits = identity.new_tensor([event.threshold for event in wanted])

        projection = torch.cat([identity, functionals])
        check = monte_carlo(
            net,
            law,
            num_samples,
            projection=projection,
            thresholds=torch.cat([best.mean.to(limits), limits]),
            covariance=False,
            seed=seed,
            progress=progress,
        )
        check, exceedances = _split(check, len(names), projection)
        data_values = None if data is None else _evaluate(net, data, law)
        tails = best.project(functionals)
        probabilities = EventProbabilities(
            names=tuple(event.name for event in wanted),
            groups=tuple(event.group for event in wanted),
            thresholds=tuple(limits.tolist()),
            saddlepoint=tails.tail_probability(limits).to(torch.float64).cpu(),
            gaussian=tails.tail_probability(limits, method="gaussian").to(torch.float64).cpu(),
            sampled=exceedances[0],
            lower=exceedances[1],
            upper=exceedances[2],
            observed=None
            if data_values is None
            else (data_values @ functionals.cpu().mT > limits.cpu()).to(torch.float64).mean(0),
        )
        curves = _curves(
            net, law, tails, probabilities, functionals, names, num_samples, seed, progress
        )

    mean, error, variance = _column(best.mean), _column(best.standard_error), _column(best.variance)
    combined = (error.square() + check.standard_error.square()).sqrt()
    deviations = (mean - check.mean) / combined.clamp(min=_TINY)
    spread_errors = variance.clamp(min=0).sqrt() / check.variance.clamp(min=_TINY).sqrt() - 1
    return Comparison(
        labels=names,
        law=repr(law),
        propagated=propagated,
        chosen=chosen,
        skipped=skipped,
        sampled=check,
        deviations=deviations,
        spread_errors=spread_errors,
        events=probabilities,
        curves=curves,
        costs=tuple([_accuracy(result, check) for result in propagated] + [_accuracy_of(check)]),
        data_mean=None if data_values is None else data_values.mean(0),
        data_deviation=None if data_values is None or len(data_values) < 2 else data_values.std(0),
        num_examples=0 if data_values is None else len(data_values),
        checks=tuple(
            [(best.method, item) for item in best.checks]
            + [("Monte Carlo", item) for item in check.checks]
            + [
                ("Comparison", item)
                for item in _agreement(deviations, spread_errors, probabilities, names)
            ]
        ),
    )


def _propagate_all(
    net: nn.Module, law: GaussianLaw, highest: int
) -> tuple[tuple[OutputLaw, ...], str]:
    """The orders up to the highest that fits into memory, and why one does not.

    Returns
    -------
    tuple
        Laws, and a sentence or nothing.

    Raises
    ------
    PushforwardError
        When not even order 1 can be computed.
    """
    results: list[OutputLaw] = []
    for order in range(1, highest + 1):
        try:
            results.append(propagate(net, law, order))
        except ResourceError as error:
            if not results:
                # The means alone need no covariance; only their error bar does.
                results.append(propagate(net, law, 1, standard_error=False))
            return tuple(results), f"Order {order} was left out: {error.what}."
    return tuple(results), ""


def _choose(results: Sequence[OutputLaw]) -> int:
    """The highest order that did not break down, or the lowest when all did.

    Returns
    -------
    int
        Its index.
    """
    sound = [index for index, result in enumerate(results) if result.status != "fail"]
    return max(sound, default=0)


def _stack(events: Sequence[Event], identity: Float[Tensor, "K K"]) -> Float[Tensor, "M K"]:
    outputs = len(identity)
    for event in events:
        if event.functional.shape != (outputs,):
            raise ShapeError(
                f"a functional of shape {tuple(event.functional.shape)} for {outputs} outputs",
                where=f"event {event.name}",
                advice=f"Give {outputs} coefficients, one for each output.",
            )
    if not events:
        raise OptionError("no events", where="events", advice="Give at least one, or None.")
    return torch.stack([event.functional.to(identity) for event in events])


def _split(
    check: SampledLaw, outputs: int, projection: Tensor
) -> tuple[SampledLaw, tuple[Tensor, Tensor, Tensor]]:
    """The law of the outputs alone, and the exceedances of the functionals behind them.

    Returns
    -------
    tuple
        The law, then frequency, lower and upper ends.
    """
    seen = check.exceedance
    assert seen is not None
    events = tuple(x[outputs:].cpu() for x in (seen.probability, seen.lower, seen.upper))
    names = (
        "mean",
        "standard_error",
        "variance",
        "variance_standard_error",
        "third",
        "third_standard_error",
        "fourth",
        "fourth_standard_error",
    )
    unseen = int((events[0] == 0).sum())
    checks = [item for item in check.checks if item.name != "exceedances-seen"]
    checks.append(
        Check(
            "exceedances-seen",
            "warn" if unseen else "pass",
            f"{unseen} of {len(events[0])} events never occurred.",
            "Only the upper end of their interval is informative; take more samples."
            if unseen
            else "",
        )
    )
    law = SampledLaw(
        **{name: getattr(check, name)[:outputs].cpu() for name in names},
        covariance=None,
        exceedance=None,
        num_samples=check.num_samples,
        num_units=check.num_units,
        design=check.design,
        # Reading off functionals is no part of sampling the outputs: the rival is charged for passes only.
        flops=check.flops - check.num_samples * 2 * projection.numel(),
        seconds=check.seconds,
        checks=tuple(checks),
    )
    return law, (events[0], events[1], events[2])


def _evaluate(net: nn.Module, data: Tensor, law: GaussianLaw) -> Float[Tensor, "N K"]:
    """Outputs of the network on the examples, float64 on the CPU.

    Returns
    -------
    Tensor
        One row for each example.

    Raises
    ------
    ShapeError
        When an example has another shape than the law.
    """
    if tuple(data.shape[1:]) != law.event_shape:
        raise ShapeError(
            f"examples of shape {tuple(data.shape[1:])} with a law of shape {law.event_shape}",
            where="data",
            advice="Give the examples that the law was made from.",
        )
    example = next((x for x in net.parameters() if x.is_floating_point()), law.mean)
    rows = [net(batch.to(example)).reshape(len(batch), -1) for batch in data.split(_BATCH)]
    return torch.cat(rows).to(torch.float64).cpu()


def _curves(
    net: nn.Module,
    law: GaussianLaw,
    tails: OutputLaw,
    events: EventProbabilities,
    functionals: Float[Tensor, "M K"],
    labels: Sequence[str],
    num_samples: int,
    seed: int,
    progress: bool | None,
) -> tuple[TailCurve, ...]:
    """The event of each group whose propagated tail is the least Gaussian, over all thresholds.

    Returns
    -------
    tuple of TailCurve
        At most two.
    """
    apart = (events.saddlepoint / events.gaussian).log().abs().nan_to_num()
    groups = list(dict.fromkeys(events.groups))
    members = [[i for i, g in enumerate(events.groups) if g == group] for group in groups]
    ranked = [sorted(indices, key=lambda i: -float(apart[i])) for indices in members]
    rounds = [rank[depth] for depth in range(_CURVES) for rank in ranked if depth < len(rank)]
    picked = rounds[:_CURVES]

    steps = torch.linspace(0, _CURVE_REACH, _CURVE_POINTS, dtype=torch.float64)
    means = tails.mean[picked].to(functionals)
    deviations = tails.variance.clamp(min=0).sqrt()[picked].to(functionals)
    levels = means + steps.to(functionals)[:, None] * deviations
    sampled = monte_carlo(
        net,
        law,
        num_samples,
        projection=functionals[picked],
        thresholds=levels,
        covariance=False,
        seed=seed,
        progress=progress,
    )
    seen = sampled.exceedance
    assert seen is not None
    law_of_picked = tails.project(torch.eye(len(functionals), dtype=torch.float64)[picked])
    saddlepoint = law_of_picked.tail_probability(levels).to(torch.float64)
    gaussian = law_of_picked.tail_probability(levels, method="gaussian").to(torch.float64)
    return tuple(
        TailCurve(
            name=functional_name(functionals[index], labels),
            event=(events.thresholds[index] - float(means[j])) / max(float(deviations[j]), _TINY),
            deviations=steps.tolist(),
            saddlepoint=saddlepoint[:, j].tolist(),
            gaussian=gaussian[:, j].tolist(),
            sampled=seen.probability[:, j].tolist(),
            lower=seen.lower[:, j].tolist(),
            upper=seen.upper[:, j].tolist(),
            num_samples=sampled.num_samples,
        )
        for j, index in enumerate(picked)
    )


def _accuracy(result: OutputLaw, check: SampledLaw) -> Accuracy:
    passes = result.flops * check.num_samples / check.flops
    total = check.variance.sum().clamp(min=_TINY)
    own = float(check.standard_error.square().sum() / total)
    square = float((_column(result.mean) - check.mean).square().sum() / total)
    error = result.standard_error
    return Accuracy(
        method=result.method,
        flops=result.flops,
        seconds=result.seconds,
        passes=passes,
        stated=math.nan
        if error is None
        else math.sqrt(float(_column(error).square().sum() / total)),
        measured=math.sqrt(max(0.0, square - own)),
        frames=math.sqrt(own * check.num_samples / passes),
        plain=1 / math.sqrt(passes),
    )


def _accuracy_of(check: SampledLaw) -> Accuracy:
    total = check.variance.sum().clamp(min=_TINY)
    own = math.sqrt(float(check.standard_error.square().sum() / total))
    return Accuracy(
        method=f"Monte Carlo, {check.design}",
        flops=check.flops,
        seconds=check.seconds,
        passes=float(check.num_samples),
        stated=own,
        measured=None,
        frames=own,
        plain=1 / math.sqrt(check.num_samples),
    )


def _agreement(
    deviations: Tensor, spread_errors: Tensor, events: EventProbabilities, labels: Sequence[str]
) -> list[Check]:
    """Whether propagation agrees with the Monte Carlo check.

    Returns
    -------
    list of Check
        For means, spreads and tails.
    """
    worst = int(deviations.abs().argmax())
    size = abs(float(deviations[worst]))
    far = size > LARGE_DEVIATION
    checks = [
        Check(
            "means-agree",
            "warn" if far else "pass",
            f"the means differ by up to {number(size, 2)} combined standard errors (output "
            f"{labels[worst]}).",
            f"More than {LARGE_DEVIATION:g}: the error bar is too small here; believe the sampled "
            "mean."
            if far
            else "",
        )
    ]
    worst = int(spread_errors.abs().argmax())
    size = float(spread_errors[worst])
    far = abs(size) > _LARGE_SPREAD_ERROR
    checks.append(
        Check(
            "spreads-agree",
            "warn" if far else "pass",
            f"the standard deviations differ by up to {number(100 * size, 2)} % (output "
            f"{labels[worst]}).",
            f"More than {100 * _LARGE_SPREAD_ERROR:g} %: use a higher order, or the sampled spread."
            if far
            else "",
        )
    )
    wrong = sum(distance > LARGE_TAIL_RATIO for distance in events.distance)
    largest = max(events.distance)
    checks.append(
        Check(
            "tails-agree",
            "warn" if wrong else "pass",
            f"{sum(events.inside)} of {len(events.names)} tail probabilities lie in the sampled "
            f"interval; {wrong} are outside by more than a factor {LARGE_TAIL_RATIO:g}, the worst "
            f"by {number(largest, 2)}.",
            "The propagated cumulants do not determine these tails: believe the sampled "
            "probability."
            if wrong
            else "",
        )
    )
    return checks


def _column(values: Tensor | None) -> Float[Tensor, " K"]:
    return torch.zeros(1, dtype=torch.float64) if values is None else values.double().cpu()
