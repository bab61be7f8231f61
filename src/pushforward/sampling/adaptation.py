"""What a chain learns while it warms up: the length of its steps and the scale of its parameters.

Every chain learns for itself, from its own past only, so that it goes the same way whichever chains
run beside it. With the last step of the warm-up everything is frozen: a kernel that goes on
learning has another law than the one it was built for.

- *Step size*: dual averaging of its logarithm towards a target acceptance (Nesterov 2009; Hoffman
  and Gelman 2014, section 3.2.1, with their constants).
- *Scale*: standard deviations of the parameters (the square root of a diagonal inverse mass), or a
  root of their covariance, by Welford's recursion, over windows that double in length (the schedule
  of Stan: a fast beginning, slow windows, a fast end). Standard deviations from few draws are
  pulled towards their common geometric mean; a covariance is taken only from more draws than it
  has directions, and variances from fewer. In units of that scale a kernel is indifferent to the
  units of the parameters, or to their coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "Phase",
    "average_step_size",
    "collect_moments",
    "fresh_averaging",
    "log_lengths",
    "phase",
    "scale_of_moments",
]

# Dual averaging, in the letters of Hoffman and Gelman (2014).
_GAMMA, _T0, _KAPPA = 0.05, 10.0, 0.75
_BOLDNESS = 10.0  # the first guess is shrunk towards this multiple of the current step size
_LARGEST_LOG_STEP = 80.0

# Stan's lengths, in steps.
_BEGINNING, _FIRST_WINDOW, _END = 75, 25, 50
_FEWEST_STEPS = 50  # with fewer a scale would rest on a handful of draws, and cost the step size
_PRIOR_DRAWS = 5.0  # weight of the common scale, in draws
_DRAWS_OF_DIRECTION = 2  # for each parameter, from which a covariance can be told
_RIDGE = 1e-3  # of the variances, with the weight of the prior draws, on a covariance


@dataclass(frozen=True)
class Phase:
    """Where a step of the warm-up stands.

    Parameters
    ----------
    slow
        The scale is being learned.
    collected
        Draws of this window, this one included; 0 outside windows.
    closes
        This step ends a window: the scale changes and the step size is learned afresh.
    position
        Steps since the step size began to be learned, from 0.
    last
        What is learned is frozen after this step.
    """

    slow: bool
    collected: int
    closes: bool
    position: int
    last: bool


def phase(step: int, total: int) -> Phase:
    """What a step of the warm-up is for.

    Parameters
    ----------
    step, total
        Step ``step`` of ``total``, from 0.

    Returns
    -------
    Phase
        A pure function of both.
    """
    windows = _windows(total)
    begin = end = 0
    for begin, end in windows:
        if begin <= step < end:
            break
    slow = begin <= step < end
    restart = max((stop for _, stop in windows if stop <= step), default=0)
    return Phase(
        slow=slow,
        collected=step - begin + 1 if slow else 0,
        closes=slow and step == end - 1,
        position=step - restart,
        last=step == total - 1,
    )


@lru_cache(maxsize=64)
def _windows(total: int) -> tuple[tuple[int, int], ...]:
    """Windows in which the scale is learned: first step and the one after the last."""
    if total < _FEWEST_STEPS:
        return ()
    beginning, size, end = _BEGINNING, _FIRST_WINDOW, _END
    if beginning + size + end > total:
        beginning, end = int(0.15 * total), int(0.1 * total)
        size = total - beginning - end
    windows, start = [], beginning
    while start < total - end:
        stop = start + size
        if stop + 2 * size > total - end:  # the next window would not fit
            stop = total - end
        windows.append((start, stop))
        start, size = stop, 2 * size
    return tuple(windows)


def average_step_size(
    averaging: Float[Tensor, "chains 3"],
    step_size: Float[Tensor, " chains"],
    acceptance: Float[Tensor, " chains"],
    target: float,
    now: Phase,
) -> tuple[Float[Tensor, "chains 3"], Float[Tensor, " chains"]]:
    """One step of dual averaging; the average itself where the phase is the last.

    Parameters
    ----------
    averaging
        ``(chains, 3)`` float64: averaged log step size, averaged shortfall of acceptance, and the
        log step size towards which the beginning is shrunk. `fresh_averaging` begins it.
    step_size
        ``(chains,)`` float64, of the step that was just made.
    acceptance
        ``(chains,)`` float64, of the same step.
    target
        Acceptance that is wanted.
    now
        Of the same step.

    Returns
    -------
    tuple of Tensor
        Both, for the next step.
    """
    if now.position == 0:
        averaging = fresh_averaging(step_size)
    average, shortfall, centre = averaging.unbind(-1)
    count = now.position + 1
    weight = 1 / (count + _T0)
    shortfall = (1 - weight) * shortfall + weight * (target - acceptance)
    log_step = centre - math.sqrt(count) / _GAMMA * shortfall
    log_step = log_step.clamp(-_LARGEST_LOG_STEP, _LARGEST_LOG_STEP)
    average = torch.lerp(average, log_step, count**-_KAPPA)
    following = average if now.last or now.closes else log_step
    return torch.stack([average, shortfall, centre], -1), following.exp()


def fresh_averaging(step_size: Float[Tensor, " chains"]) -> Float[Tensor, "chains 3"]:
    """The beginning of dual averaging.

    Parameters
    ----------
    step_size
        ``(chains,)`` float64: a guess.

    Returns
    -------
    Tensor
        ``(chains, 3)`` float64.
    """
    log_step = step_size.log()
    return torch.stack([log_step, torch.zeros_like(log_step), log_step + math.log(_BOLDNESS)], -1)


def collect_moments(
    mean: Float[Tensor, "chains P"],
    spread: Float[Tensor, "chains ..."],
    vectors: Float[Tensor, "chains P"],
    now: Phase,
) -> tuple[Float[Tensor, "chains P"], Float[Tensor, "chains ..."]]:
    """One step of Welford's recursion.

    Parameters
    ----------
    mean
        ``(chains, P)``: of this window so far.
    spread
        ``(chains, P)``, sums of squared deviations, or ``(chains, P, P)``, of their outer products.
        What both hold before the first draw of a window is forgotten.
    vectors
        ``(chains, P)``: the new draw.
    now
        Of this step, with ``collected > 0``.

    Returns
    -------
    tuple of Tensor
        Both, with the draw.
    """
    if now.collected == 1:
        return vectors, torch.zeros_like(spread)
    before = vectors - mean
    mean = torch.add(mean, before, alpha=1 / now.collected)
    after = vectors - mean
    if spread.dim() == 2:
        return mean, torch.addcmul(spread, before, after)
    return mean, torch.baddbmm(spread, before[..., None], after[:, None])


def scale_of_moments(
    spread: Float[Tensor, "chains ..."], scale: Float[Tensor, "chains ..."], draws: int
) -> Float[Tensor, "chains ..."]:
    """A root of the covariance in a window.

    Parameters
    ----------
    spread
        Of `collect_moments`.
    scale
        Of the same shape: kept for entries that did not move.
    draws
        In the window.

    Returns
    -------
    Tensor
        ``(chains, P)``: standard deviations, pulled towards their common geometric mean. Or
        ``(chains, P, P)``: lower triangular, diagonal if there were fewer than ``2 P`` draws.
    """
    if draws < 2:
        return scale
    if spread.dim() == 2:
        return _standard_deviations(spread, scale, draws)
    lengths = _standard_deviations(
        spread.diagonal(dim1=-2, dim2=-1), scale.diagonal(dim1=-2, dim2=-1), draws
    )
    diagonal = lengths.diag_embed()
    if draws < _DRAWS_OF_DIRECTION * spread.shape[-1]:
        return diagonal
    # In units of the standard deviations: a ridge is then indifferent to units as well.
    unit = lengths[..., None] * lengths[..., None, :]
    ridge = _RIDGE * _PRIOR_DRAWS / (draws + _PRIOR_DRAWS)
    correlations = spread / (draws - 1) / unit
    correlations.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(correlations.double())
    moved = (spread.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
    known = (failed == 0) & moved & torch.isfinite(factor).flatten(1).all(1)
    return torch.where(known[:, None, None], lengths[..., None] * factor.to(lengths), diagonal)


def log_lengths(scale: Float[Tensor, "chains ..."]) -> Float[Tensor, "chains P"]:
    """Logarithms whose sum is that of the determinant of a scale.

    Parameters
    ----------
    scale
        Of `scale_of_moments`.

    Returns
    -------
    Tensor
        ``(chains, P)``.
    """
    return (scale if scale.dim() == 2 else scale.diagonal(dim1=-2, dim2=-1)).log()


def _standard_deviations(spread: Tensor, scale: Tensor, draws: int) -> Tensor:
    moved = (spread > 0) & torch.isfinite(spread)
    variance = torch.where(moved, spread / (draws - 1), scale * scale)
    weight = _PRIOR_DRAWS / (draws + _PRIOR_DRAWS)
    log_scale = 0.5 * variance.log()
    common = log_scale.mean(-1, keepdim=True)
    return torch.where(moved, torch.lerp(log_scale, common, weight).exp(), scale)
