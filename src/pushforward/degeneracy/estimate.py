"""``pf.learning_coefficient``: from a network and its data to a number with a verdict."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict
from math import sqrt
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn

from pushforward.degeneracy.agreement import agreement, extrapolated
from pushforward.degeneracy.calibration import largest_near, step_bias
from pushforward.degeneracy.coefficient import LearningCoefficient, Measured
from pushforward.degeneracy.evidence import (
    acceptance,
    crosschecks,
    localization_effect,
    quadratic_answer,
    singular_fluctuation,
    slope_effect,
    waic,
)
from pushforward.degeneracy.neighbourhood import Metric, Neighbourhood
from pushforward.degeneracy.schedule import Runs, walk_through
from pushforward.degeneracy.settings import SamplerChoice, Settings
from pushforward.degeneracy.verdict import (
    alive_check,
    equilibrium_check,
    localization_check,
    metropolis_check,
    minimum_check,
    precision_check,
    step_check,
    verdict_of,
)
from pushforward.degeneracy.walk import Walk
from pushforward.networks.likelihoods import Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.runs.estimate import Cost
from pushforward.runs.store import Checkpoint, fingerprint
from pushforward.sampling.potential import Loss

__all__ = ["coefficient_of", "learning_coefficient"]

# The expected bias is one from above: the minibatches' part assumes that the loss holds all
# directions in which they are noisy.
_LIKELY, _SPREAD = 0.75, 0.5
_VAGUE = 0.1  # error of the effect of localisation, relative to the value
_SMALL_BIAS = 0.005  # of the value, that is always possible


def learning_coefficient(
    net: nn.Module | FunctionalModel,
    data: Any,
    loss: Likelihood | Loss,
    *,
    nbeta: float | None = None,
    localization: float | None = None,
    metric: Metric = "euclidean",
    sampler: SamplerChoice = "auto",
    num_chains: int = 8,
    num_draws: int | None = None,
    num_warmup: int | None = None,
    batch_size: int | None = None,
    step_size: float | Literal["auto"] = "auto",
    subset: str | Iterable[str] | None = None,
    realisable: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> LearningCoefficient:
    """Estimate the local learning coefficient at the weights of a network.

    ``lambda = n beta (E[L(w)] - L(w*))``, the mean under ``exp(-n beta L(w) - gamma |w - w*|^2 /
    2)`` (Lau, Furman, Wang, Murfet and Wei, arXiv 2308.12108). It is half the number of parameters
    of a regular model, and less the more degenerate the solution is.

    Parameters
    ----------
    net
        In evaluation mode; its weights are ``w*``.
    data
        A pair of tensors, or a loader of ``(inputs, targets)`` or of mappings, in a fixed order.
        Other data than those of training restrict the coefficient to them.
    loss
        A likelihood such as ``pf.Categorical()``, or a function from outputs and targets to one
        loss an example.
    nbeta
        ``n beta``. Default ``n / ln n``, with ``n`` the size of the data set whatever the batch.
    localization
        ``gamma``, of the spring that holds chains near ``w*``. Directions whose curvature is below
        ``gamma / (n beta)`` do not count. Default: the weakest, from 1 on, for which even flat
        directions relax ten times in a run. Give one number to compare networks.
    metric
        ``"euclidean"``, or ``"layerwise"``: distances and steps are taken in units of one scale for
        each tensor, the inverse root of its curvature. Multiplying a layer by a number and dividing
        the next by it then changes nothing, and `localization` is relative to the weights.
    sampler
        ``"langevin"``: minibatches, SGLD with averaged noise. ``"sgld"``: plain SGLD, as published.
        ``"hmc"``, ``"mala"``: exact, on all data. Default: HMC for up to 10,000 parameters if
        parameters times examples are at most ten million and neither `batch_size` nor `step_size`
        is given; else Langevin.
    num_chains
        Chains, side by side.
    num_draws
        Steps of each chain in the main run. Default 2000, for HMC 300.
    num_warmup
        Steps before it. Default: the relaxation time ``2 / (eps gamma)`` of a flat direction, then
        more until the chains stop drifting. For HMC and MALA, in which they learn: 300, 1000.
    batch_size
        Examples in a minibatch. Default 256, or all if there are fewer.
    step_size
        ``eps`` of a step ``-eps / 2 grad U + sqrt(eps) N``. Default: from the curvature where
        chains are. For HMC and MALA a number fixes theirs.
    subset
        Patterns of the parameters that are sampled, all others being held; default: all that
        require a gradient, normalisation layers included.
    realisable
        Whether the network's own outputs take the place of the targets.
    seed
        Of all noise.
    checkpoint
        Folder for the state: the same call goes on from there, to the same result.
    progress
        Whether to show bars; None: on a terminal, when it takes long.

    Returns
    -------
    LearningCoefficient
        An estimate with error, verdict and advice.

    Raises
    ------
    OptionError
        For an option out of range.
    NetworkError
        For a network in training mode or with weights that are not finite.
    DataError
        For data that are empty, shuffled, or not finite.
    ShapeError
        When targets do not fit the outputs.
    SamplingError
        When no chain stays finite.
    WeightsError
        When the checkpoint is of another computation.

    Notes
    -----
    SGLD and Langevin run twice, at ``eps`` and from there at ``eps / 2``; the value is extrapolated
    to 0. The second run notes the loss of every example at spaced draws. Minibatch losses are taken
    relative to those of the same examples at ``w*``. The method, section 6.

    Examples
    --------
    >>> import torch, pushforward as pf
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(100, 3, dtype=torch.float64)
    >>> line = torch.nn.Linear(3, 1, bias=False).double().eval()
    >>> found = pf.learning_coefficient(
    ...     line, (x, line(x).detach()), pf.Gaussian(noise_variance=1.0), num_draws=200
    ... )
    >>> abs(float(found) - 1.5) < 0.3, found.verdict
    (True, 'OK')
    """
    began = perf_counter()
    settings = Settings(
        nbeta=nbeta,
        localization=localization,
        metric=metric,
        sampler=sampler,
        num_chains=num_chains,
        num_draws=num_draws,
        num_warmup=num_warmup,
        batch_size=batch_size,
        step_size=step_size,
    )
    around = settings.neighbourhood(
        net, data, loss, subset=subset, realisable=realisable, seed=seed
    )
    if checkpoint is not None:
        _claim(checkpoint, around, settings, seed)
    walk = Walk(around, settings.sampler_for(around), seed, checkpoint, progress)
    return coefficient_of(walk_through(walk, settings), seed, perf_counter() - began)


def _claim(
    folder: str | os.PathLike[str], around: Neighbourhood, settings: Settings, seed: int
) -> None:
    """Refuse the folder of another computation before any of its runs is touched.

    Raises
    ------
    WeightsError
        When it is of another network, data or settings.
    """
    identity = {
        "settings": asdict(settings),
        "seed": seed,
        "metric": fingerprint({"scale": around.scale}),
        "law": around.potential.identity(),
    }
    store = Checkpoint(folder, identity)
    if store.load() is None:
        store.save({"initial_loss": torch.tensor(around.initial_loss)}, {})


def coefficient_of(runs: Runs, seed: int, seconds: float) -> LearningCoefficient:
    """Turn what was walked into an answer.

    Parameters
    ----------
    runs
        Of `walk_through`.
    seed
        Of probes and proposals.
    seconds
        It took so far.

    Returns
    -------
    LearningCoefficient
        With verdict.
    """
    began = perf_counter()
    walk, around, main, spaced = runs.walk, runs.walk.around, runs.main, runs.spaced
    alive = main.alive
    dead = runs.started - int(spaced.alive.sum())
    excess = main.excess[alive]
    coarse = agreement(excess)
    measured = [Measured(coarse.mean, coarse.standard_error)]
    value, error, bias, sharpest = coarse.mean, coarse.standard_error, 0.0, 0.0
    if not walk.learns:
        fine = agreement(spaced.excess[spaced.alive])
        measured.append(Measured(fine.mean, fine.standard_error))
        bias = step_bias(walk, main, runs.step_size)
        sharpest = runs.step_size * largest_near(walk, main)
        value, error = _at_step_zero(measured[0], measured[1], bias)
    losses = spaced.losses if spaced.losses is None else spaced.losses[spaced.alive]
    means = excess.new_empty(len(excess), 0)
    if losses is not None:
        means = losses.mean(-1, dtype=torch.float64)
    elif walk.learns:  # on all data the excess is exact
        means = excess / around.nbeta + around.initial_loss
    below = float((means < around.initial_loss).double().mean()) if means.numel() else 0.0
    quadratic, quadratic_effect, slope = _quadratic(around, seed)
    effect = localization_effect(excess, main.squared_distance[alive], around)
    if quadratic_effect is not None and effect.standard_error > _VAGUE * abs(value):
        effect = quadratic_effect
    accepted = _acceptance(runs, seed)
    assert spaced.virials is not None
    balance = agreement(spaced.virials[spaced.alive])
    checks = (
        alive_check(dead, runs.started),
        minimum_check(measured, below, slope),
        metropolis_check(accepted) if walk.learns else step_check(measured, value, sharpest),
        equilibrium_check(coarse, balance, around.num_parameters),
    )
    logarithms = losses if around.logarithms else None
    walked = (*runs.warmups, main) if spaced is main else (*runs.warmups, main, spaced)
    passes = sum(w.chains.cost.evaluations for w in walked) * walk.passes_per_step
    anchor = around.potential.anchor_losses
    scatter = float(anchor.std()) / sqrt(len(anchor)) if len(anchor) > 1 else torch.nan
    warmup = [walked.excess for walked in runs.warmups if len(walked.excess) == runs.started]
    step = runs.step_size
    return LearningCoefficient(
        value=torch.tensor(value, dtype=torch.float64),
        standard_error=torch.tensor(error, dtype=torch.float64),
        cost=Cost(0.0, seconds + perf_counter() - began, passes),
        method=f"{walk.sampler} at n beta {around.nbeta:.4g}, gamma {around.localization:.4g}",
        checks=(*checks, localization_check(value, effect), precision_check(value, error)),
        verdict=verdict_of(checks),
        nbeta=around.nbeta,
        localization=around.localization,
        metric=around.metric,
        sampler=walk.sampler,
        step_size=step,
        batch_size=walk.batch_size,
        num_examples=around.num_examples,
        num_parameters=around.num_parameters,
        num_chains=runs.started,
        num_draws=main.chains.num_draws,
        num_warmup=sum(w.chains.num_draws for w in runs.warmups) + main.chains.num_warmup,
        dead_chains=dead,
        initial_loss=around.initial_loss,
        initial_loss_error=scatter,
        r_hat=coarse.r_hat,
        effective_draws=coarse.effective_draws,
        drift=Measured(coarse.drift, coarse.drift_error),
        virial=Measured(balance.mean, balance.standard_error),
        runs=tuple(measured),
        expected_bias=bias,
        acceptance=accepted,
        quadratic=quadratic,
        slope=slope,
        localization_effect=effect,
        crosschecks=crosschecks(means, around),
        singular_fluctuation=None
        if logarithms is None
        else singular_fluctuation(logarithms, around),
        waic=torch.nan if logarithms is None else waic(logarithms, around),
        wbic=around.num_examples * float(means.mean()) if means.numel() else torch.nan,
        excess=excess,
        warmup_excess=torch.cat(warmup, 1) if warmup else excess[:, :0],
        losses=means,
    )


def _at_step_zero(coarse: Measured, fine: Measured, bias: float) -> tuple[float, float]:
    """Richardson's extrapolation as far as there is, or may be, something to extrapolate."""
    change = coarse.value - fine.value
    error = sqrt(coarse.standard_error**2 + fine.standard_error**2)
    likely = _LIKELY * bias / 2
    spread = max(_SPREAD * bias / 2, _SMALL_BIAS * abs(fine.value))
    if abs(change) > 2 * error:
        spread = max(spread, abs(change))
    return extrapolated(
        (coarse.value, coarse.standard_error),
        (fine.value, fine.standard_error),
        (likely, spread),
    )


def _acceptance(runs: Runs, seed: int) -> float:
    if runs.walk.learns:
        return float(runs.main.chains.statistics["acceptance"].nanmean())
    positions = runs.main.positions[runs.main.alive]
    return acceptance(runs.walk.around, positions, runs.step_size, seed)


def _quadratic(around: Neighbourhood, seed: int) -> tuple[Measured | None, Measured | None, float]:
    """None and NaN where the network cannot be differentiated twice."""
    try:
        return (*quadratic_answer(around, seed), slope_effect(around))
    except (RuntimeError, NotImplementedError):
        return None, None, torch.nan
