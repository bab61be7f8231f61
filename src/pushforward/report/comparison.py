"""Every order of propagation beside one Monte Carlo check: the numbers, not their presentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.monte_carlo import SampledLaw, monte_carlo
from pushforward.cumulants.output import OutputLaw
from pushforward.cumulants.propagation import propagate
from pushforward.errors import LawError, OptionError, ResourceError, ShapeError
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
    "OutputColumns",
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
_CURVE_REACH, _CURVE_POINTS = 5.0, 41
_TINY = 1e-300
_MOMENTS = ("mean", "variance", "third", "fourth")


@dataclass(frozen=True, eq=False)
class OutputColumns:
    """Mean and spread of each output both ways; float64 tensors of shape ``(k,)`` on the CPU.

    Parameters
    ----------
    mean, error, deviation
        Propagated mean, its standard error (0 where none is known) and standard deviation.
    sampled_mean, sampled_error, sampled_deviation, sampled_deviation_error
        The same by Monte Carlo.
    difference
        Propagated minus sampled mean over ``sqrt(error^2 + sampled_error^2 + rounding^2)``; the
        rounding of the network is all that designs leave which are exact for it.
    spread_difference
        Propagated over sampled standard deviation, minus 1.
    data_mean, data_deviation
        Over the examples themselves; None without data.
    """

    mean: Float[Tensor, " K"]
    error: Float[Tensor, " K"]
    deviation: Float[Tensor, " K"]
    sampled_mean: Float[Tensor, " K"]
    sampled_error: Float[Tensor, " K"]
    sampled_deviation: Float[Tensor, " K"]
    sampled_deviation_error: Float[Tensor, " K"]
    difference: Float[Tensor, " K"]
    spread_difference: Float[Tensor, " K"]
    data_mean: Float[Tensor, " K"] | None
    data_deviation: Float[Tensor, " K"] | None


@dataclass(frozen=True, eq=False)
class EventProbabilities:
    """Probabilities of the events, one entry each; float64 tensors of shape ``(m,)`` on the CPU.

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
        """Whether each propagated probability lies in the sampled interval."""
        inside: list[bool] = (
            (self.saddlepoint >= self.lower) & (self.saddlepoint <= self.upper)
        ).tolist()
        return inside

    @property
    def distance(self) -> list[float]:
        """Factor between each propagated probability and the nearest end of the interval, >= 1."""
        above = self.saddlepoint / self.upper.clamp(min=_TINY)
        below = self.lower / self.saddlepoint.clamp(min=_TINY)
        factor: list[float] = torch.maximum(above, below).clamp(min=1.0).tolist()
        return factor


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


@dataclass(frozen=True)
class Accuracy:
    """What a method cost and how accurate its means are.

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
        Error according to the method itself; NaN when it gives none.
    measured
        Difference to the Monte Carlo check, whose own error is subtracted; None for the check.
    designed, plain
        Error of Monte Carlo with as many passes, by the design of the check and by plain sampling.
    """

    method: str
    flops: float
    seconds: float
    passes: float
    stated: float
    measured: float | None
    designed: float
    plain: float


@dataclass(frozen=True, eq=False)
class Comparison:
    """Propagation beside Monte Carlo.

    Parameters
    ----------
    labels
        Names of the outputs.
    law
        Law of the inputs in words.
    outputs
        Their means and spreads by the order that is reported.
    events
        Their probabilities.
    curves
        Tail curves of at most two events.
    costs
        Cost and accuracy of each order, then of the check.
    propagated
        The law of the outputs from each order, lowest first.
    chosen
        Index of the order that is reported.
    skipped
        Why an order is missing; empty when none is.
    sampled
        The Monte Carlo check of the outputs.
    num_examples
        Examples on which the network was run too.
    checks
        Pairs of what was checked and the check.
    """

    labels: tuple[str, ...]
    law: str
    outputs: OutputColumns
    events: EventProbabilities
    curves: tuple[TailCurve, ...]
    costs: tuple[Accuracy, ...]
    propagated: tuple[OutputLaw, ...]
    chosen: int
    skipped: str
    sampled: SampledLaw
    num_examples: int
    checks: tuple[tuple[str, Check], ...]

    @property
    def best(self) -> OutputLaw:
        """The law that is reported."""
        return self.propagated[self.chosen]


@torch.no_grad()
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
        Examples ``(N, *law.event_shape)`` on which the network is run too, to show how far the
        Gaussian law is from them.
    num_samples
        Forward passes of the Monte Carlo check. The tail curves take as many again: counting at
        many thresholds must not slow down the check that is timed.
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
    LawError
        For a batch of laws.
    OptionError
        For an order other than 1, 2 or 3, labels that do not fit, or an empty list of events.
    ShapeError
        For events with another number of outputs, or data of another shape than the law.
    """
    if highest_order not in {1, 2, 3}:
        raise OptionError(
            f"highest_order={highest_order!r}", where="compare", advice="Use 1, 2 or 3."
        )
    if law.batch_shape:
        raise LawError(
            f"a batch of {law.batch_shape[0]} laws", where="compare", advice="Report on one law."
        )
    propagated, skipped = _propagate_all(net, law, highest_order)
    chosen = _choose(propagated)
    best = propagated[chosen]
    names = output_labels(labels, best.mean.shape[-1])
    wanted = default_events(best, names) if events is None else tuple(events)
    functionals = _functionals(wanted, best)
    tails = best.project(functionals)

    check, exceeded = _check(net, law, best, wanted, functionals, num_samples, seed, progress)
    over_data = None if data is None else _evaluate(net, data, law)
    outputs = _columns(best, check, over_data, _resolution(net))
    probabilities = _probabilities(wanted, functionals, tails, exceeded, over_data)
    picked = _least_gaussian(probabilities)
    curves = _curves(
        net, law, tails, functionals, picked, wanted, names, num_samples, seed, progress
    )
    return Comparison(
        labels=names,
        law=_in_words(law),
        outputs=outputs,
        events=probabilities,
        curves=curves,
        costs=(*(_accuracy(result, check) for result in propagated), _accuracy_of_check(check)),
        propagated=propagated,
        chosen=chosen,
        skipped=skipped,
        sampled=check,
        num_examples=0 if over_data is None else len(over_data),
        checks=(
            *((best.method, item) for item in best.checks),
            *(("Monte Carlo", item) for item in check.checks),
            *(("comparison", item) for item in _agreement(outputs, probabilities, names)),
        ),
    )


# --- propagation ---------------------------------------------------------------------------------


def _propagate_all(
    net: nn.Module, law: GaussianLaw, highest: int
) -> tuple[tuple[OutputLaw, ...], str]:
    """The orders up to the highest that fits into memory, and why one does not.

    Returns
    -------
    tuple
        Laws, and a sentence or nothing.
    """
    results: list[OutputLaw] = []
    for order in range(1, highest + 1):
        try:
            results.append(propagate(net, law, order))
        except ResourceError as error:
            if not results:  # order 1 itself fits: only its error bar needs a covariance
                results.append(propagate(net, law, 1, standard_error=False))
                order = 2
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


def _functionals(events: Sequence[Event], law: OutputLaw) -> Float[Tensor, "M K"]:
    """One row for each event.

    Returns
    -------
    Tensor
        Float64, on the device of the law.

    Raises
    ------
    ShapeError
        For events with another number of outputs.
    OptionError
        When there are none.
    """
    outputs = law.mean.shape[-1]
    for event in events:
        if event.functional.shape != (outputs,):
            raise ShapeError(
                f"a functional of shape {tuple(event.functional.shape)} for {outputs} outputs",
                where=f"event {event.name}",
                advice=f"Give {outputs} coefficients, one for each output.",
            )
    if not events:
        raise OptionError("no events", where="events", advice="Give at least one, or None.")
    return torch.stack([event.functional.to(law.mean.device, torch.float64) for event in events])


# --- Monte Carlo ---------------------------------------------------------------------------------


def _check(
    net: nn.Module,
    law: GaussianLaw,
    best: OutputLaw,
    events: Sequence[Event],
    functionals: Float[Tensor, "M K"],
    num_samples: int,
    seed: int,
    progress: bool | None,
) -> tuple[SampledLaw, tuple[Tensor, Tensor, Tensor]]:
    """Outputs and events from the same samples.

    Returns
    -------
    tuple
        Law of the outputs, then frequency, lower and upper end for each event.
    """
    outputs = best.mean.shape[-1]
    projection = torch.cat([torch.eye(outputs).to(functionals), functionals])
    limits = functionals.new_tensor([event.threshold for event in events])
    joint = monte_carlo(
        net,
        law,
        num_samples,
        projection=projection,
        thresholds=torch.cat([best.mean.to(limits), limits]),  # those of the outputs are not used
        covariance=False,
        seed=seed,
        progress=progress,
    )
    assert joint.exceedance is not None
    seen = joint.exceedance
    frequency, lower, upper = (
        x[outputs:].cpu() for x in (seen.probability, seen.lower, seen.upper)
    )
    names = [kind + end for kind in _MOMENTS[1:] for end in ("", "_standard_error")]
    of_outputs = {
        name: getattr(joint, name)[:outputs].cpu() for name in ("mean", "standard_error", *names)
    }
    check = replace(
        joint,
        **of_outputs,
        exceedance=None,
        # Reading off functionals is no part of sampling: the rival is charged for its passes only.
        flops=joint.flops - joint.num_samples * 2 * projection.numel(),
        checks=(
            *(item for item in joint.checks if item.name != "exceedances-seen"),
            _check_seen(frequency),
        ),
    )
    return check, (frequency, lower, upper)


def _check_seen(frequency: Float[Tensor, " M"]) -> Check:
    unseen = int((frequency == 0).sum())
    detail = f"{len(frequency) - unseen} of {len(frequency)} events occurred among the samples"
    end = "; of the others only the upper end of the interval is informative." if unseen else "."
    return Check("events-seen", "pass", detail + end)


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
    like = next((x for x in net.parameters() if x.is_floating_point()), law.mean)
    rows = [net(batch.to(like)).reshape(len(batch), -1) for batch in data.split(_BATCH)]
    return torch.cat(rows).to(torch.float64).cpu()


def _curves(
    net: nn.Module,
    law: GaussianLaw,
    tails: OutputLaw,
    functionals: Float[Tensor, "M K"],
    picked: list[int],
    events: Sequence[Event],
    labels: Sequence[str],
    num_samples: int,
    seed: int,
    progress: bool | None,
) -> tuple[TailCurve, ...]:
    """The tails of some events over all thresholds.

    Returns
    -------
    tuple of TailCurve
        One for each index in `picked`.
    """
    law_of_picked = tails.project(torch.eye(len(functionals)).to(functionals)[picked])
    steps = torch.linspace(0, _CURVE_REACH, _CURVE_POINTS).to(functionals)
    means = law_of_picked.mean.to(functionals)
    deviations = law_of_picked.variance.clamp(min=0).sqrt().to(functionals)
    levels = means + steps[:, None] * deviations
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
    saddlepoint = law_of_picked.tail_probability(levels)
    gaussian = law_of_picked.tail_probability(levels, method="gaussian")
    return tuple(
        TailCurve(
            name=functional_name(functionals[index], labels),
            event=(events[index].threshold - float(means[j])) / max(float(deviations[j]), _TINY),
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


# --- both side by side ---------------------------------------------------------------------------


def _columns(
    best: OutputLaw,
    check: SampledLaw,
    over_data: Float[Tensor, "N K"] | None,
    resolution: float,
) -> OutputColumns:
    mean, deviation = _plain(best.mean), _plain(best.variance).clamp(min=0).sqrt()
    error = torch.zeros_like(mean) if best.standard_error is None else _plain(best.standard_error)
    sampled_deviation = check.variance.clamp(min=0).sqrt()
    rounding = resolution * (mean.abs() + deviation)
    combined = (error.square() + check.standard_error.square() + rounding.square()).sqrt()
    return OutputColumns(
        mean=mean,
        error=error,
        deviation=deviation,
        sampled_mean=check.mean,
        sampled_error=check.standard_error,
        sampled_deviation=sampled_deviation,
        sampled_deviation_error=_quotient(check.variance_standard_error, 2 * sampled_deviation),
        difference=_quotient(mean - check.mean, combined),
        spread_difference=_quotient(deviation - sampled_deviation, sampled_deviation),
        data_mean=None if over_data is None else over_data.mean(0),
        data_deviation=None if over_data is None else over_data.std(0, correction=0),
    )


def _resolution(net: nn.Module) -> float:
    """A few units in the last place of the network's numbers.

    Returns
    -------
    float
        Relative to the numbers.
    """
    kinds = [x.dtype for x in net.parameters() if x.is_floating_point()]
    return 4 * torch.finfo(kinds[0] if kinds else torch.get_default_dtype()).eps


def _probabilities(
    events: Sequence[Event],
    functionals: Float[Tensor, "M K"],
    tails: OutputLaw,
    exceeded: tuple[Tensor, Tensor, Tensor],
    over_data: Float[Tensor, "N K"] | None,
) -> EventProbabilities:
    limits = functionals.new_tensor([event.threshold for event in events])
    occurs = None
    if over_data is not None:
        occurs = (over_data @ functionals.cpu().mT > limits.cpu()).to(torch.float64).mean(0)
    return EventProbabilities(
        names=tuple(event.name for event in events),
        groups=tuple(event.group for event in events),
        thresholds=tuple(event.threshold for event in events),
        saddlepoint=_plain(tails.tail_probability(limits)),
        gaussian=_plain(tails.tail_probability(limits, method="gaussian")),
        sampled=exceeded[0],
        lower=exceeded[1],
        upper=exceeded[2],
        observed=occurs,
    )


def _least_gaussian(events: EventProbabilities) -> list[int]:
    """Events whose propagated probability is furthest from the Gaussian one, from each group.

    Returns
    -------
    list of int
        Indices of at most two events: first the best of the last groups, then the next best.
    """
    apart = (events.saddlepoint / events.gaussian).log().abs().nan_to_num(posinf=0.0).tolist()
    groups = dict.fromkeys(reversed(events.groups))
    ranked = [
        sorted((i for i, g in enumerate(events.groups) if g == group), key=lambda i: -apart[i])
        for group in groups
    ]
    longest = max(map(len, ranked))
    turns = [rank[turn] for turn in range(longest) for rank in ranked if turn < len(rank)]
    return sorted(turns[:_CURVES])


def _accuracy(result: OutputLaw, check: SampledLaw) -> Accuracy:
    passes = result.flops * check.num_samples / check.flops
    own = _relative(check.standard_error, check)
    error = result.standard_error
    difference = _relative(_plain(result.mean) - check.mean, check)
    return Accuracy(
        method=result.method,
        flops=result.flops,
        seconds=result.seconds,
        passes=passes,
        stated=math.nan if error is None else _relative(_plain(error), check),
        measured=math.sqrt(max(0.0, difference**2 - own**2)),
        designed=own * math.sqrt(check.num_samples / passes),
        plain=1 / math.sqrt(passes),
    )


def _accuracy_of_check(check: SampledLaw) -> Accuracy:
    own = _relative(check.standard_error, check)
    return Accuracy(
        method=f"Monte Carlo, {check.design}",
        flops=check.flops,
        seconds=check.seconds,
        passes=float(check.num_samples),
        stated=own,
        measured=None,
        designed=own,
        plain=1 / math.sqrt(check.num_samples),
    )


def _relative(errors: Float[Tensor, " K"], check: SampledLaw) -> float:
    """Root mean square over the outputs in units of their standard deviation.

    Returns
    -------
    float
        0 where there is no error, whatever the deviation.
    """
    square = _quotient(errors.square().sum(), check.variance.sum())
    return math.sqrt(float(square))


def _agreement(
    outputs: OutputColumns, events: EventProbabilities, labels: Sequence[str]
) -> tuple[Check, ...]:
    worst = int(outputs.difference.abs().argmax())
    size = abs(float(outputs.difference[worst]))
    far = size > LARGE_DEVIATION
    means = Check(
        "means-agree",
        "warn" if far else "pass",
        f"the means differ by up to {number(size, 2)} combined standard errors (output "
        f"{labels[worst]}).",
        f"More than {LARGE_DEVIATION:g}: the error bar is too small here; believe the sampled mean."
        if far
        else "",
    )
    worst = int(outputs.spread_difference.abs().argmax())
    size = float(outputs.spread_difference[worst])
    far = abs(size) > _LARGE_SPREAD_ERROR
    spreads = Check(
        "spreads-agree",
        "warn" if far else "pass",
        f"the standard deviations differ by up to {number(100 * abs(size), 2)} % (output "
        f"{labels[worst]}).",
        f"More than {100 * _LARGE_SPREAD_ERROR:g} %: use a higher order, or the sampled spread."
        if far
        else "",
    )
    off = sum(distance > LARGE_TAIL_RATIO for distance in events.distance)
    tails = Check(
        "tails-agree",
        "warn" if off else "pass",
        f"{off} of {len(events.names)} tail probabilities are off by more than a factor "
        f"{LARGE_TAIL_RATIO:g}, the worst by {number(max(events.distance), 2)}.",
        "The propagated cumulants do not determine these tails: believe the sampled probability."
        if off
        else "",
    )
    return means, spreads, tails


def _in_words(law: GaussianLaw) -> str:
    if law.is_isotropic_centred:
        return f"N(0, {number(float(law.covariance))} I) in {law.dimension:,} dimensions"
    kind = {0: "an isotropic", 1: "a diagonal"}.get(law.covariance.dim(), "a full")
    return f"{law.dimension:,} features with {kind} covariance"


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0 where `a` is 0, as it is for outputs that are constant.

    Returns
    -------
    Tensor
        Of the shape of `a`.
    """
    return torch.where(a == 0, torch.zeros_like(a), a / b.clamp(min=_TINY))


def _plain(values: Tensor) -> Float[Tensor, " K"]:
    return values.to(torch.float64).cpu()
