"""``pf.learning_coefficient``: from a network and its data to a number with a verdict."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from time import perf_counter
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from pushforward.degeneracy.agreement import Agreement, agreement, extrapolated
from pushforward.degeneracy.calibration import (
    calibrate,
    largest_near,
    relaxation_steps,
    step_bias,
    sustained_step,
)
from pushforward.degeneracy.coefficient import LearningCoefficient, Measured, Verdict
from pushforward.degeneracy.evidence import (
    acceptance,
    crosschecks,
    quadratic_coefficient,
    singular_fluctuation,
    waic,
)
from pushforward.degeneracy.neighbourhood import Metric, Neighbourhood
from pushforward.degeneracy.walk import SamplerName, Walk, Walked
from pushforward.errors import OptionError, SamplingError
from pushforward.networks.likelihoods import Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.runs.estimate import Check, Cost, Status
from pushforward.sampling.potential import Loss
from pushforward.typing import Params

__all__ = ["SamplerChoice", "learning_coefficient"]

SamplerChoice: TypeAlias = Literal["auto", "langevin", "sgld", "hmc", "mala"]

_DEFAULT_DRAWS = {"langevin": 2000, "sgld": 2000, "hmc": 300, "mala": 2000}
_LEARNING_STEPS = {"hmc": 300, "mala": 1000}  # of samplers that learn their step size
_HMC_PARAMETERS = 10_000
_HMC_EXAMPLES = 10_000
_SPACED_DRAWS = 64  # of each chain, at which the loss of every example is taken
_MOST_LOSSES = 2**28  # numbers that may be kept for that
_FEWEST_SPACED = 8
_MOST_WARMUPS = 8
_MOST_MAINS = 4
_SHRINK = 8.0  # when a chain was lost
_SMALL_BIAS = 0.005  # of the value, that is always possible
_LONGEST_WARMUP = 20  # in units of the draws
_SHARPER = 1.5  # than calibrated: the warm-up goes on with a smaller step
_UNSTABLE = 3.0  # step size times curvature; 4 is the edge
_CHANGES = 0.1  # of the value, by halving the step size
_LARGEST_R_HAT = 1.1
_FEWEST_EFFECTIVE = 50
_BELOW = 0.05  # share of draws that may have a smaller loss than w*


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
        ``"hmc"``, ``"mala"``: exact, on all data. Default: HMC for up to 10,000 parameters and as
        many examples, else Langevin.
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
    around = Neighbourhood.of(
        net,
        data,
        loss,
        nbeta=nbeta,
        localization=localization,
        metric=metric,
        batch_size=batch_size,
        subset=subset,
        realisable=realisable,
        seed=seed,
    )
    chosen = _sampler(sampler, around)
    draws = _DEFAULT_DRAWS[chosen] if num_draws is None else num_draws
    _check_numbers(num_chains, draws, num_warmup, step_size)
    walk = Walk(around, chosen, seed, checkpoint, progress)
    given = None if step_size == "auto" else float(step_size)
    if walk.learns:
        runs = _metropolis_runs(walk, num_chains, draws, num_warmup, given)
    else:
        runs = _langevin_runs(walk, num_chains, draws, num_warmup, given, localization is None)
    return _assembled(runs, loss, metric, seed, began)


@dataclass(frozen=True, eq=False)
class _Runs:
    """All that was walked.

    ``step_size`` is NaN where it was learned; ``spaced`` is the second run, at half of it, or the
    main run itself where that is on all data.
    """

    walk: Walk
    step_size: float
    warmups: tuple[Walked, ...]
    main: Walked
    spaced: Walked


def _metropolis_runs(
    walk: Walk, num_chains: int, draws: int, num_warmup: int | None, step_size: float | None
) -> _Runs:
    learning = _LEARNING_STEPS[walk.sampler] if num_warmup is None else num_warmup
    kept = draws * num_chains * walk.around.num_examples <= _MOST_LOSSES
    main = walk.run(
        "main",
        steps=draws,
        start=num_chains,
        step_size=step_size,
        warmup=learning,
        losses=kept,
    )
    return _Runs(walk, torch.nan if step_size is None else step_size, (), main, main)


def _langevin_runs(
    walk: Walk,
    num_chains: int,
    draws: int,
    num_warmup: int | None,
    step_size: float | None,
    localize: bool,
) -> _Runs:
    found = calibrate(
        walk, num_chains=num_chains, num_draws=draws, step_size=step_size, localize=localize
    )
    walk, step, warmups = found.walk, found.step_size, list[Walked]()
    start: Params | int = num_chains
    for turn in range(_MOST_WARMUPS):
        steps = num_warmup
        if steps is None:
            longest = _LONGEST_WARMUP * draws
            steps = relaxation_steps(walk.around.localization, step, most=longest)
        if not steps:
            break
        last = turn == _MOST_WARMUPS - 1
        fixed = last or step_size is not None
        walked = _survived(walk, f"warmup-{turn}", steps, start, step, final=fixed)
        if walked is None:
            step, start, warmups = step / _SHRINK, num_chains, []
            continue
        warmups.append(walked)
        start = walked.survivors()
        if fixed:
            break
        wanted = sustained_step(walk, walked)
        if step <= _SHARPER * wanted:
            break
        step = wanted  # the chains came to where it is narrower
    for turn in range(_MOST_MAINS):
        main = walk.run(f"main-{turn}", steps=draws, start=start, step_size=step)
        settled = agreement(main.excess[main.alive]).settled
        if settled or num_warmup is not None or turn == _MOST_MAINS - 1:
            break
        warmups.append(main)  # that is what it was
        start = main.survivors()
    survivors = main.survivors()
    room = _MOST_LOSSES // (walk.around.num_examples * len(next(iter(survivors.values()))))
    spaced = max(_FEWEST_SPACED, min(draws, _SPACED_DRAWS, room))
    second = walk.run(
        "spaced",
        steps=spaced,
        thin=max(1, draws // spaced),
        warmup=draws // 10,
        start=survivors,
        step_size=step / 2,
        losses=True,
    )
    return _Runs(walk, step, tuple(warmups), main, second)


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
    return walked if final or bool(walked.alive.all()) else None


def _assembled(
    runs: _Runs, loss: Likelihood | Loss, metric: Metric, seed: int, began: float
) -> LearningCoefficient:
    walk, around, main, spaced = runs.walk, runs.walk.around, runs.main, runs.spaced
    alive = main.alive
    if not bool(alive.any()) or not bool(spaced.alive.any()):
        raise SamplingError(
            "no chain stayed finite",
            where=f"learning_coefficient, {walk.sampler}",
            advice="Give a smaller step_size or a larger localization.",
        )
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
    outcomes = (
        _alive_check(main.alive),
        _minimum_check(value, error, below),
        _step_check(measured, value, sharpest, walk),
        _equilibrium_check(coarse),
    )
    wrong: list[Verdict] = [name for name, check in outcomes if check.status == "fail"]
    verdict: Verdict = wrong[0] if wrong else "OK"
    logarithms = losses if isinstance(loss, Likelihood) else None
    cost_steps = sum(w.chains.cost.evaluations for w in (*runs.warmups, main))
    if spaced is not main:
        cost_steps += spaced.chains.cost.evaluations
    anchor = around.potential.anchor_losses
    scatter = float(anchor.std()) / sqrt(len(anchor)) if len(anchor) > 1 else torch.nan
    warmup = [walked.excess for walked in runs.warmups if len(walked.excess) == len(main.excess)]
    size = around.potential.batch_size
    step = runs.step_size
    return LearningCoefficient(
        value=torch.tensor(value, dtype=torch.float64),
        standard_error=torch.tensor(error, dtype=torch.float64),
        cost=Cost(0.0, perf_counter() - began, cost_steps),
        method=f"{walk.sampler} at n beta {around.nbeta:.4g}, gamma {around.localization:.4g}",
        checks=(*(check for _, check in outcomes), _precision_check(value, error)),
        verdict=verdict,
        nbeta=around.nbeta,
        localization=around.localization,
        metric=metric,
        sampler=walk.sampler,
        step_size=step,
        batch_size=around.num_examples if size is None or walk.learns else size,
        num_examples=around.num_examples,
        num_parameters=around.num_parameters,
        num_chains=len(main.alive),
        num_draws=main.chains.num_draws,
        num_warmup=sum(w.chains.num_draws for w in runs.warmups) + main.chains.num_warmup,
        dead_chains=int((~main.alive).sum()),
        initial_loss=around.initial_loss,
        initial_loss_error=scatter,
        r_hat=coarse.r_hat,
        effective_draws=coarse.effective_draws,
        drift=Measured(coarse.drift, coarse.drift_error),
        runs=tuple(measured),
        expected_bias=bias,
        acceptance=_acceptance(runs, seed),
        quadratic=_quadratic(around, seed),
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
    """Richardson's extrapolation where there is, or may be, something to extrapolate."""
    change = coarse.value - fine.value
    error = sqrt(coarse.standard_error**2 + fine.standard_error**2)
    expected = max(bias / 2, _SMALL_BIAS * abs(fine.value))
    if abs(change) > 2 * error:
        expected = max(expected, abs(change))
    value, spread, _ = extrapolated(
        (coarse.value, coarse.standard_error), (fine.value, fine.standard_error), expected
    )
    return value, spread


def _acceptance(runs: _Runs, seed: int) -> float:
    if runs.walk.learns:
        return float(runs.main.chains.statistics["acceptance"].nanmean())
    positions = runs.main.positions[runs.main.alive]
    return acceptance(runs.walk.around, positions, runs.step_size, seed)


def _quadratic(around: Neighbourhood, seed: int) -> Measured | None:
    """None where the network cannot be differentiated twice."""
    try:
        return quadratic_coefficient(around, seed)
    except (RuntimeError, NotImplementedError):
        return None


def _alive_check(alive: Tensor) -> tuple[Verdict, Check]:
    dead = int((~alive).sum())
    detail = f"{dead} of {len(alive)} chains left for NaN or infinity and are excluded"
    if not dead:
        detail = f"all {len(alive)} chains stayed finite"
    return "DEAD_CHAINS", _check("chains-alive", not dead, detail, "Take a smaller step size.")


def _minimum_check(value: float, error: float, below: float) -> tuple[Verdict, Check]:
    good = value + 2 * error > 0 and below <= _BELOW
    detail = f"{100 * below:.2g} % of the draws have a smaller loss than the network itself"
    return "NOT_A_MINIMUM", _check(
        "at-a-minimum", good, detail, "The network is not at a minimum at this temperature."
    )


def _step_check(
    runs: Sequence[Measured], value: float, sharpest: float, walk: Walk
) -> tuple[Verdict, Check]:
    if walk.learns:
        return "STEP_TOO_LARGE", _check("step-size", True, "a Metropolis test makes it exact", "")
    change = runs[0].value - runs[1].value
    error = sqrt(runs[0].standard_error ** 2 + runs[1].standard_error ** 2)
    large = abs(change) > max(3 * error, _CHANGES * abs(value))
    good = not large and sharpest < _UNSTABLE
    detail = (
        f"half the step changes the value by {-change:.3g} ± {error:.2g}; step times largest "
        f"curvature is {sharpest:.2g}, of 4 at which nothing is stable"
    )
    return "STEP_TOO_LARGE", _check("step-size", good, detail, "Take a smaller step size.")


def _equilibrium_check(found: Agreement) -> tuple[Verdict, Check]:
    mixed = not found.r_hat > _LARGEST_R_HAT and not found.effective_draws < _FEWEST_EFFECTIVE
    detail = (
        f"second half minus first {found.drift:.3g} ± {found.drift_error:.2g}, R-hat "
        f"{found.r_hat:.3f}, {found.effective_draws:.0f} effective draws"
    )
    return "NOT_EQUILIBRATED", _check(
        "equilibrated", mixed and found.settled, detail, "Take more draws or more localization."
    )


def _precision_check(value: float, error: float) -> Check:
    relative = error / abs(value) if value else torch.inf
    status: Status = "pass" if relative < _CHANGES else "warn"
    advice = "" if status == "pass" else "Take more draws or more chains."
    return Check("standard-error", status, f"{100 * relative:.2g} % of the value", advice)


def _check(name: str, good: bool, detail: str, advice: str) -> Check:
    return Check(name, "pass" if good else "fail", detail, "" if good else advice)


def _sampler(sampler: SamplerChoice, around: Neighbourhood) -> SamplerName:
    if sampler not in get_args(SamplerChoice):
        raise OptionError(
            f"there is no sampler {sampler!r}",
            where="sampler",
            advice=f"Choose one of {', '.join(get_args(SamplerChoice))}.",
        )
    if sampler != "auto":
        return sampler
    small = around.num_parameters <= _HMC_PARAMETERS and around.num_examples <= _HMC_EXAMPLES
    return "hmc" if small else "langevin"


def _check_numbers(
    num_chains: int, num_draws: int, num_warmup: int | None, step_size: float | str
) -> None:
    for name, value, least in (
        ("num_chains", num_chains, 2),
        ("num_draws", num_draws, 16),
        ("num_warmup", 0 if num_warmup is None else num_warmup, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OptionError(
                f"{value!r} is out of range", where=name, advice=f"Give an integer from {least} on."
            )
    if step_size == "auto":
        return
    number = isinstance(step_size, int | float) and not isinstance(step_size, bool)
    if not number or not 0 < float(step_size) < inf:
        raise OptionError(
            f"{step_size!r} is no step size",
            where="step_size",
            advice="Give a positive number, or 'auto'.",
        )
