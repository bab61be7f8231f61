"""The order in which chains are walked: calibration, warm-up, main run, half the step size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch

from pushforward.degeneracy.agreement import agreement
from pushforward.degeneracy.calibration import (
    calibrate,
    largest_near,
    relaxation_steps,
    settling,
    sustained_step,
)
from pushforward.degeneracy.settings import Settings
from pushforward.degeneracy.walk import Walk, Walked
from pushforward.errors import SamplingError
from pushforward.typing import Params

__all__ = ["Runs", "walk_through"]

_LEARNING_STEPS = {"hmc": 300, "mala": 1000}  # of samplers that learn their step size
_SPACED_DRAWS = 64  # of each chain, at which the loss of every example is taken
_FEWEST_SPACED = 8
_MOST_LOSSES = 2**28  # numbers that may be kept for that
_MOST_WARMUPS = 8
_MOST_MAINS = 4
_LONGEST_WARMUP = 20  # in units of the draws
_SHARPER = 1.5  # than calibrated: the warm-up goes on with a smaller step
_SHRINK = 8.0  # when a chain was lost, or ran away
_MOST_ATTEMPTS = 4
_UNSTABLE = 3.0  # step size times curvature; 4 is the edge


@dataclass(frozen=True, eq=False)
class Runs:
    """All that was walked.

    Parameters
    ----------
    walk
        With the localisation that was chosen.
    started
        How many chains began.
    step_size
        Of the main run; NaN where it was learned.
    warmups
        What came before it.
    main
        The run whose mean is the answer.
    spaced
        The second run, at half the step size, with the losses of all examples; the main run itself
        where that is on all data.
    """

    walk: Walk
    started: int
    step_size: float
    warmups: tuple[Walked, ...]
    main: Walked
    spaced: Walked


def walk_through(walk: Walk, settings: Settings, start: Params | None = None) -> Runs:
    """Calibrate, warm up, run, and run again with half the step size.

    Parameters
    ----------
    walk
        Around which weights, with which sampler.
    settings
        Numbers of chains, draws and steps.
    start
        Where chains begin, ``(chains, *shape)`` by name. Default: at ``w*``.

    Returns
    -------
    Runs
        With chains that died along the way.

    Raises
    ------
    SamplingError
        When none stayed finite.
    """
    begin: Params | int = settings.num_chains if start is None else start
    return (_metropolis_runs if walk.learns else _langevin_runs)(walk, settings, begin)


def _metropolis_runs(walk: Walk, settings: Settings, start: Params | int) -> Runs:
    draws, step_size = settings.draws_of(walk.sampler), settings.fixed_step
    if settings.localization is None:
        walk = settling(walk, num_chains=settings.num_chains, num_draws=draws)
    learning = settings.num_warmup
    if learning is None:
        learning = _LEARNING_STEPS[walk.sampler]
    kept = draws * settings.num_chains * walk.around.num_examples <= _MOST_LOSSES
    main = walk.run(
        "main",
        steps=draws,
        start=start,
        step_size=step_size,
        warmup=learning,
        losses=kept,
        virials=True,
    )
    _require_survivors(main, walk)
    step = torch.nan if step_size is None else step_size
    return Runs(walk, _count(start), step, (), main, main)


def _langevin_runs(walk: Walk, settings: Settings, begin: Params | int) -> Runs:
    draws, step_size = settings.draws_of(walk.sampler), settings.fixed_step
    found = calibrate(
        walk,
        num_chains=settings.num_chains,
        num_draws=draws,
        step_size=step_size,
        localize=settings.localization is None,
    )
    walk, step = found.walk, found.step_size
    warmup_names = map("warmup-{}".format, count())
    main_names = map("main-{}".format, count())
    for attempt in range(_MOST_ATTEMPTS):
        step, warmups, start = _warmed(walk, settings, step, begin, warmup_names)
        for turn in range(_MOST_MAINS):
            main = walk.run(next(main_names), steps=draws, start=start, step_size=step)
            stable = _stable(main, walk, step)
            settled = stable and agreement(main.excess[main.alive]).settled
            if settled or not stable or settings.num_warmup is not None or turn == _MOST_MAINS - 1:
                break
            warmups = (*warmups, main)  # that is what it was
            start = main.survivors()
        if stable or step_size is not None or attempt == _MOST_ATTEMPTS - 1:
            break
        step /= _SHRINK
    _require_survivors(main, walk)
    survivors = main.survivors()
    room = _MOST_LOSSES // (walk.around.num_examples * _count(survivors))
    spaced = max(_FEWEST_SPACED, min(draws, _SPACED_DRAWS, room))
    second = walk.run(
        "spaced",
        steps=spaced,
        thin=max(1, draws // spaced),
        warmup=draws // 10,
        start=survivors,
        step_size=step / 2,
        losses=True,
        virials=True,
    )
    _require_survivors(second, walk)
    return Runs(walk, _count(begin), step, warmups, main, second)


def _warmed(
    walk: Walk, settings: Settings, step: float, begin: Params | int, names: Iterator[str]
) -> tuple[float, tuple[Walked, ...], Params | int]:
    """Warm up, with smaller steps where the chains come to narrower places.

    Returns
    -------
    tuple
        Step size, what was walked, and where the chains are now.
    """
    warmups, start = list[Walked](), begin
    for turn in range(_MOST_WARMUPS):
        steps = settings.num_warmup
        if steps is None:
            longest = _LONGEST_WARMUP * settings.draws_of(walk.sampler)
            steps = relaxation_steps(walk.around.localization, step, most=longest)
        if not steps:
            break
        final = turn == _MOST_WARMUPS - 1 or settings.fixed_step is not None
        walked = _survived(walk, next(names), steps, start, step, final=final)
        if walked is None:
            step, start, warmups = step / _SHRINK, begin, []
            continue
        warmups.append(walked)
        start = walked.survivors()
        wanted = sustained_step(walk, walked)
        if final or step <= _SHARPER * wanted:
            break
        step = wanted
    return step, tuple(warmups), start


def _stable(walked: Walked, walk: Walk, step: float) -> bool:
    """Whether no chain ran away or feels an edge of stability; those that died are told of."""
    if walk.ran_away(walked):
        return False
    return not bool(walked.alive.any()) or step * largest_near(walk, walked) < _UNSTABLE


def _require_survivors(walked: Walked, walk: Walk) -> None:
    if not bool(walked.alive.any()):
        raise SamplingError(
            "no chain stayed finite",
            where=f"learning_coefficient, {walk.sampler}",
            advice="Give a smaller step_size or a larger localization.",
        )


def _count(start: Params | int) -> int:
    return start if isinstance(start, int) else len(next(iter(start.values())))


def _survived(
    walk: Walk, name: str, steps: int, start: Params | int, step: float, *, final: bool
) -> Walked | None:
    """A warm-up; None when a chain was lost in it and there are smaller steps to try."""
    try:
        walked = walk.run(name, steps=steps, start=start, step_size=step)
    except SamplingError:
        if final:
            raise
        return None
    lost = not bool(walked.alive.all()) or walk.ran_away(walked)
    return None if lost and not final else walked
