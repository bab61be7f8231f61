"""Step size, localisation and length of the warm-up, from curvature where the chains really are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.degeneracy.walk import Walk, Walked
from pushforward.errors import SamplingError
from pushforward.runs.rng import stream
from pushforward.sampling.curvature import curvature_traces, largest_curvature

__all__ = [
    "Calibration",
    "calibrate",
    "largest_near",
    "relaxation_steps",
    "settling",
    "step_bias",
    "sustained_step",
]

# Step size times largest curvature. Both schemes are stable up to 4; the plain one is biased there
# by 1 / (1 - 0.2 / 4), 5 %, and the one with averaged noise not at all.
_AIMS = {"langevin": 1.0, "sgld": 0.2}
_PILOT_STEPS = 60
_MOST_PILOTS = 24
_AGREE = 1.25  # curvatures closer than this are the same
_SHRINK = 8.0  # when a chain was lost
_RESOLVED = 10  # relaxation times of the slowest direction in the draws of a chain
_CHAINS_PROBED = 4
_FEWEST_WARMUP = 100
# Expected bias by minibatches, relative to the coefficient, from which gradients are corrected, and
# from which, corrected, steps are made smaller.
_LOUD, _TOO_LOUD = 0.05, 0.1
_MOST_SHRINKING = 1 / 64


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a run is made with.

    Parameters
    ----------
    walk
        With the localisation that was chosen.
    step_size
        ``eps``.
    curvature
        Largest of ``U``, in units of the scale, where the pilots ended.
    """

    walk: Walk
    step_size: float
    curvature: float


def calibrate(
    walk: Walk, *, num_chains: int, num_draws: int, step_size: float | None, localize: bool
) -> Calibration:
    """Choose what was left open, by short runs from ``w*``.

    The curvature at ``w*`` is where to begin, not where to end: at a degenerate point it is zero
    and all there is to feel lies further out. So pilots walk, and the curvature where they come to
    is what the next ones are made with, until they agree.

    Parameters
    ----------
    walk
        Its localisation is the weakest one that is considered.
    num_chains, num_draws
        Of the run to come.
    step_size
        None to choose it.
    localize
        Whether to choose the localisation too: the weakest for which even directions without any
        curvature relax ten times within the draws of a chain.

    Returns
    -------
    Calibration
        For the run.

    Raises
    ------
    SamplingError
        When no step size keeps the chains alive.
    """
    around, aim = walk.around, _AIMS[walk.sampler]
    generator = stream(walk.seed, "calibration")
    pilots = min(num_chains, _CHAINS_PROBED)
    weakest = around.localization
    relative = 2 * _RESOLVED / (aim * num_draws)  # of a step size that is aim / curvature
    largest = _largest(walk, around.centre.expand(pilots, -1), generator) - weakest
    if not isfinite(largest):
        raise SamplingError(
            "the loss has no finite curvature at the weights",
            where=f"learning_coefficient, {walk.sampler}",
            advice="Give the step_size and the localization, or a loss that can be differentiated "
            "twice, such as squares instead of distances.",
        )
    found: Walked | None = None
    for turn in range(_MOST_PILOTS):
        if localize:
            needed = relative * max(largest, 0.0) / (1 - min(relative, 0.5))
            if step_size is not None:
                needed = 2 * _RESOLVED / (step_size * num_draws)
            walk = replace(walk, around=around.localized(max(weakest, needed)))
        gamma = walk.around.localization
        step = step_size or aim / (max(largest, 0.0) + gamma)
        start = pilots if found is None else found.survivors()
        found = walk.attempt(f"pilot-{turn}", steps=_PILOT_STEPS, start=start, step_size=step)
        there = torch.nan if found is None else _largest(walk, found.positions, generator) - gamma
        if found is None or not isfinite(there):
            if step_size is not None:
                break
            largest, found = _SHRINK * max(largest, gamma), None
        elif step_size is not None or there <= _AGREE * largest + gamma:
            found_here = Calibration(walk, step, max(there, largest) + gamma)
            return _quieted(found_here, found, step_size is None, num_draws if localize else None)
        else:
            largest = there
    raise SamplingError(
        "the chains do not stay finite near the weights"
        + ("" if step_size is None else f" with step size {step_size:g}"),
        where=f"learning_coefficient, {walk.sampler}",
        advice="Give a smaller step_size or a larger localization, and look at the loss: it has to "
        "be bounded from below.",
    )


def settling(walk: Walk, *, num_chains: int, num_draws: int) -> Walk:
    """A Metropolis sampler with the weakest localisation for which flat directions settle.

    Its steps end where the curvature is largest, like those of `calibrate`, whose rule holds with
    other numbers: a trajectory of ``L`` leapfrog steps goes as far as ``L^2`` steps that are made
    one by one.

    Parameters
    ----------
    walk
        Its localisation is the weakest one that is considered.
    num_chains, num_draws
        Of the run to come.

    Returns
    -------
    Walk
        The same where the loss has no curvature that could be measured.
    """
    steps = walk.steps_per_draw**2 * num_draws
    whole = replace(walk.around, potential=walk.around.on_all_data)
    pilot = replace(walk, around=whole, sampler="langevin")
    try:
        found = calibrate(
            pilot, num_chains=num_chains, num_draws=steps, step_size=None, localize=True
        )
    except SamplingError:
        return walk
    return replace(walk, around=walk.around.localized(found.walk.around.localization))


def _quieted(
    found: Calibration, pilot: Walked, may_shrink: bool, num_draws: int | None
) -> Calibration:
    """Less gradient noise where minibatches would heat the chains by much.

    First by correcting gradients by those of the same examples at ``w*``, which doubles the price
    of a step; then by smaller steps, with a stronger spring if that was ours to choose.

    Returns
    -------
    Calibration
        The same where there is nothing to do.
    """
    walk, step = found.walk, found.step_size
    level = max(float(pilot.excess[:, -1].mean()), 1.0)
    if not walk.around.potential.batch_uniforms or step_bias(walk, pilot, step) < _LOUD * level:
        return found
    walk = replace(walk, around=walk.around.corrected())
    bias = step_bias(walk, pilot, step)
    if may_shrink and bias > _TOO_LOUD * level:
        step *= max(_TOO_LOUD * level / bias, _MOST_SHRINKING)
        if num_draws is not None:
            gamma = max(walk.around.localization, 2 * _RESOLVED / (step * num_draws))
            walk = replace(walk, around=walk.around.localized(gamma))
    return Calibration(walk, step, found.curvature)


def relaxation_steps(localization: float, step_size: float, *, most: int) -> int:
    """Steps in which a direction without curvature forgets: ``2 / (eps gamma)``.

    Parameters
    ----------
    localization
        ``gamma``.
    step_size
        ``eps``.
    most
        No more than these.

    Returns
    -------
    int
        At least 100.
    """
    return max(_FEWEST_WARMUP, min(most, ceil(2 / (step_size * localization))))


def largest_near(walk: Walk, found: Walked) -> float:
    """Largest curvature of ``U`` where chains are now, in units of the scale.

    Parameters
    ----------
    walk
        How they are moved.
    found
        Chains, of which those alive count.

    Returns
    -------
    float
        From below; NaN when it cannot be told.
    """
    return _largest(walk, found.positions[found.alive], stream(walk.seed, "curvature"))


def sustained_step(walk: Walk, found: Walked) -> float:
    """The step size that suits where chains are now.

    Parameters
    ----------
    walk
        How they are moved.
    found
        Chains, of which those alive count.

    Returns
    -------
    float
        ``eps``; infinite where no curvature was found.
    """
    largest = largest_near(walk, found)
    return _AIMS[walk.sampler] / largest if largest > 0 else torch.inf


def step_bias(walk: Walk, found: Walked, step_size: float) -> float:
    """What a step size is expected to add to the learning coefficient, to first order.

    On directions of curvature ``a = n beta h + gamma`` the plain scheme multiplies a variance by
    ``1 / (1 - eps a / 4)``, which adds ``eps n beta tr(H) / 8``; minibatches whose gradient noise
    has variance ``s^2`` multiply it by ``1 + eps s^2 / 4`` besides, which adds at most
    ``eps sum s^2 / 8`` where ``eps a`` is small, up to ``1 / (1 - eps a / 4)`` times that else.

    Parameters
    ----------
    walk
        How chains are moved.
    found
        Chains, of which those alive count.
    step_size
        ``eps``.

    Returns
    -------
    float
        In units of the learning coefficient.
    """
    around = walk.around
    positions = found.positions[found.alive]
    generator = stream(walk.seed, "bias", device=positions.device)
    bias = 0.0
    if walk.sampler == "sgld":
        signs = torch.randint(2, positions.shape, generator=generator, device=positions.device).to(
            positions
        )
        forms = curvature_traces(around.probed, positions, 2 * signs - 1, scale=around.scale)
        trace = float(forms.mean()) - around.localization * around.num_parameters
        bias += step_size * max(trace, 0.0) / 8
    count = around.potential.batch_uniforms
    if count and not walk.learns:
        uniforms = torch.rand(
            2,
            len(positions),
            count,
            dtype=torch.float64,
            generator=generator,
            device=positions.device,
        )
        first, second = (around.potential.stochastic_gradient(positions, u) for u in uniforms)
        noise = (around.scale * (first - second)).square().sum(1, dtype=torch.float64) / 2
        # Noise is amplified like everything else where the step is not short.
        bias += step_size * float(noise.mean()) / 8 / (1 - _AIMS[walk.sampler] / 4)
    return bias


def _largest(walk: Walk, positions: Float[Tensor, "chains P"], generator: torch.Generator) -> float:
    shown = positions[:_CHAINS_PROBED]
    directions = torch.randn(shown.shape, generator=generator, dtype=torch.float64).to(shown)
    scale = walk.around.scale
    return float(largest_curvature(walk.around.probed, shown, directions, scale=scale).max())
