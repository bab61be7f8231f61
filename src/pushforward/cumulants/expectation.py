"""`expect`: the expected output to a tolerance, by the cheapest way that reaches it."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn

from pushforward.cumulants.designs import DesignName
from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.monte_carlo import monte_carlo
from pushforward.cumulants.output import OutputLaw
from pushforward.cumulants.propagation import propagate
from pushforward.errors import ShapeError
from pushforward.networks.graph import read_network
from pushforward.options import number, whole_number
from pushforward.runs.estimate import Check, Cost, Estimate

__all__ = ["expect"]

_PILOT_SAMPLES = 4096
_LEAST_SAMPLES = 64


def expect(
    net: nn.Module,
    law: GaussianLaw,
    tolerance: float = 1e-3,
    *,
    max_samples: int = 1_000_000,
    seed: int = 0,
    progress: bool | None = None,
) -> Estimate:
    """Expected output of a network, with a standard error of at most `tolerance`.

    Orders 2 and 3 of cumulant propagation are computed first. Order 3 answers when its error bar
    is small enough; it is an upper estimate, being the difference to the order below. Otherwise
    samples are added, in orthogonal frames where there are enough for them, and both are averaged
    with the inverse of their squared errors as weights: the samples are unbiased, the propagation
    has the smaller error at first, and the average is never worse than either by their own error
    bars.

    Parameters
    ----------
    net
        A module, as for `propagate`.
    law
        Of the inputs; one law, not a batch.
    tolerance
        Largest acceptable standard error, in standard deviations of each output.
    max_samples
        Most samples to draw, up to rounding to whole units of the design; fewer than 64 are none.
    seed
        Of the samples.
    progress
        Whether to show a bar while sampling; None shows it on a terminal.

    Returns
    -------
    Estimate
        `method` says what was done; a check warns when the tolerance was not reached.

    Raises
    ------
    OptionError
        For a tolerance or a number of samples that is not positive.
    ShapeError
        For a batch of laws.

    Examples
    --------
    >>> import torch, pushforward as pf
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> estimate = pf.expect(net, pf.GaussianLaw.standard(8), tolerance=0.01)
    >>> bool((estimate.standard_error >= 0).all())
    True
    """
    start = time.perf_counter()
    tolerance = number(tolerance, "tolerance", above=0)
    max_samples = whole_number(max_samples, "max_samples", least=0)
    if law.batch_shape:
        raise ShapeError(
            f"a batch of {law.batch_shape[0]} laws",
            where="expect",
            advice="Call it for one law at a time, or propagate the batch at a fixed order.",
        )
    with torch.no_grad():
        graph = read_network(net, law.event_shape)
        propagated = propagate(graph, law, 3)
        if propagated.status == "fail":
            # Where the expansion breaks down, fewer terms break down later.
            fallback = propagate(graph, law, 2, augmented=False)
            propagated = propagated if fallback.status == "fail" else fallback
    assert propagated.standard_error is not None
    value, error = propagated.mean, propagated.standard_error
    goal = tolerance * propagated.variance.clamp(min=0).sqrt()
    method, flops, evaluations = f"cumulant propagation, {propagated.method}", propagated.flops, 0
    reached = bool((error <= goal).all())
    if not reached and max_samples >= _LEAST_SAMPLES:
        num_samples = min(max_samples, _samples_needed(propagated, error, goal))
        # A frame takes two points a dimension, and an error bar a few frames.
        design: DesignName = "frames" if num_samples >= 8 * law.dimension else "antithetic"
        sampled = monte_carlo(
            net, law, num_samples, design=design, seed=seed, covariance=False, progress=progress
        )
        trusted = propagated.status != "fail"
        value, error = sampled.mean.to(value), sampled.standard_error.to(error)
        if trusted:
            value, error = _precision_weighted(
                (propagated.mean, propagated.standard_error), (value, error)
            )
        goal = tolerance * sampled.variance.clamp(min=0).sqrt().to(error)
        part = f"{method}, averaged with" if trusted else "propagation broke down:"
        method = f"{part} {sampled.num_samples:,} samples ({design})"
        flops, evaluations = flops + sampled.flops, sampled.num_samples
        reached = bool((error <= goal).all())
    checks = (*propagated.checks, _check_tolerance(reached, error, goal, tolerance))
    cost = Cost(flops, time.perf_counter() - start, evaluations)
    return Estimate(value, error, cost, method, checks)


def _samples_needed(law: OutputLaw, error: Tensor, goal: Tensor) -> int:
    """Samples until the weighted average meets the goal, if frames halve the variance."""
    # 1 / goal^2 = 1 / error^2 + N / (variance / 2); a propagation that broke down counts for
    # nothing.
    precision = 1 / goal.square()
    if law.status != "fail":
        precision = precision - 1 / error.square().clamp(min=1e-300)
    needed = 0.5 * law.variance.clamp(min=0) * precision.clamp(min=0)
    largest = float(torch.nan_to_num(needed, nan=0.0, posinf=1e15).max())
    return max(_PILOT_SAMPLES, math.ceil(1.2 * largest))


def _precision_weighted(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Average of two values with the inverse of their squared errors as weights."""
    (a, error_a), (b, error_b) = first, second
    square_a, square_b = error_a.square(), error_b.square()
    total = (square_a + square_b).clamp(min=1e-300)
    weight = square_b / total
    return weight * a + (1 - weight) * b, torch.sqrt(square_a * square_b / total)


def _check_tolerance(reached: bool, error: Tensor, goal: Tensor, tolerance: float) -> Check:
    ratio = float((error / goal.clamp(min=1e-300)).max()) * tolerance
    detail = f"largest standard error is {ratio:.2g} standard deviations (asked: {tolerance:g})"
    if reached:
        return Check("tolerance", "pass", f"{detail}.")
    return Check("tolerance", "warn", f"{detail}.", "Raise max_samples or the tolerance.")
