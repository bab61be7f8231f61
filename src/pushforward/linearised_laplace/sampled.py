"""Posterior samples by optimisation, and the prior they imply: a loop of small resumable steps.

A draw of the posterior ``N(0, H^{-1})``, ``H = M' + A``, is the minimiser of the low-variance
objective ``w.M'w / 2 + (w - w_n).A(w - w_n) / 2`` with ``A w_n = sqrt(A) e0 + sketch``: a linear
system ``H w = sqrt(A) e0 + sketch`` whose noise is drawn once (arXiv 2210.04994, section 3; arXiv
2404.19157, chapter 6). All draws are solved as one block. The prior's precision is then set to
``effective dimension / ||mode||^2`` (MacKay), and the draws follow from where they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.linalg.conjugate_gradients import BlockIterate, Product, advance, begin
from pushforward.linalg.subspace import Subspace
from pushforward.linearised_laplace.linear_model import LinearModel
from pushforward.linearised_laplace.mode import find_mode
from pushforward.linearised_laplace.priors import Prior
from pushforward.networks.likelihoods import Gaussian, Likelihood
from pushforward.runs.rng import stream

__all__ = [
    "SMALLEST_NOISE",
    "Round",
    "SampledState",
    "SampledTask",
    "current_likelihood",
    "effective_dimensions",
    "prior_draws",
    "right_hand_sides",
    "step",
    "unsettled",
]

_MODE_ERROR = 1e-3  # squared, in the norm of the posterior precision, relative to that of the mode
_EM_TOLERANCE = 0.2
_LARGEST_STEP = 2.3  # of the log precision: a factor of ten
_SETTLED = 0.05
_FIRST_RELAXATION = 0.6
_SMALLEST_SHARE = 1e-3  # of what a group's effective dimension would be without the other groups
_NOTHING, _ROUNDING = 1e-2, 1e-9  # directions
SMALLEST_NOISE = 1e-10
"""Of the first guess: below it, the linear model fits the targets exactly."""


@dataclass(frozen=True)
class Round:
    """One round of learning the prior.

    Parameters
    ----------
    precision
        Of each group, with which the round began.
    noise_variance
        Of a regression; None otherwise.
    effective_dimension
        Of each group, at that precision.
    standard_error
        Of the effective dimensions.
    squared_norm
        Of the mode, in each group.
    passes
        Over the data so far, counted in vectors: a pass with K vectors counts K.
    """

    precision: tuple[float, ...]
    noise_variance: float | None
    effective_dimension: tuple[float, ...]
    standard_error: tuple[float, ...]
    squared_norm: tuple[float, ...]
    passes: float


@dataclass(frozen=True, eq=False)
class SampledTask:
    """What is asked for; it does not change while the computation runs.

    Parameters
    ----------
    linear
        The linear model in the starting prior, without scale.
    num_draws
        Posterior draws wanted.
    seed
        Of all noise.
    learn_prior, learn_noise
        What is learned.
    tolerance
        Error of the final draws relative to their spread over the training outputs.
    block
        Draws solved together.
    em_draws
        Draws from which the prior is learned.
    max_rounds
        Of learning.
    max_steps
        Of the solver, for every block.
    recycled
        Directions that are kept from one system for the next.
    """

    linear: LinearModel
    num_draws: int
    seed: int
    learn_prior: bool
    learn_noise: bool
    tolerance: float = 0.1
    block: int = 64
    em_draws: int = 8
    max_rounds: int = 12
    max_steps: int = 200
    recycled: int = 512

    @property
    def blocks(self) -> tuple[range, ...]:
        """Draws of each block, this process's share only."""
        everything = range(self.num_draws)
        starts = everything[:: self.block]
        mine = self.linear.grid.draws(len(starts))
        return tuple(everything[s : s + self.block] for s in (starts[i] for i in mine))


@dataclass(frozen=True, eq=False)
class SampledState:
    """How far it has come.

    Parameters
    ----------
    phase
        What comes next: the first ``"sketch"``, a step towards ``"learn"`` prior and noise, a step
        of the ``"final"`` draws, or nothing (``"done"``).
    prior
        With the precision of now.
    noise_variance
        Of now, when it is learned.
    mode
        ``(P,)``; None before it was wanted.
    sketch
        Of the block that is being solved, ``(K, P)``; it does not depend on the precision.
    iterate
        Of the solver.
    draws
        ``(k, P)`` finished final draws of this process, in coordinates of the prior.
    gammas
        ``(k, layers)`` effective dimension by each finished draw.
    errors
        ``(k,)`` their squared errors relative to the effective dimension.
    subspace
        What earlier systems taught about ``M'``; it does not depend on precision or noise.
    rounds
        What was learned so far.
    settled
        Whether learning reached its fixed point.
    work
        Passes so far, counted in vectors.
    """

    phase: Literal["sketch", "learn", "final", "done"]
    prior: Prior
    noise_variance: float | None = None
    mode: Float[Tensor, " P"] | None = None
    sketch: Float[Tensor, "K P"] | None = None
    iterate: BlockIterate | None = None
    draws: Float[Tensor, "k P"] | None = None
    gammas: Float[Tensor, "k layers"] | None = None
    errors: Float[Tensor, " k"] | None = None
    subspace: Subspace | None = None
    rounds: tuple[Round, ...] = ()
    settled: bool = True
    work: float = 0.0


def step(task: SampledTask, state: SampledState) -> SampledState:
    """The next piece of work: a pass over the data or two.

    Parameters
    ----------
    task
        What is asked for.
    state
        Where it stands; it is not changed.

    Returns
    -------
    SampledState
        One piece further; a function of its arguments alone, so that a run can be interrupted
        between any two pieces and resumed to the same numbers.
    """
    if state.phase == "sketch":
        return _first_sketch(task, state)
    if state.phase == "learn":
        return _learn(task, state)
    return _final(task, state)


def effective_dimensions(
    linear: LinearModel, iterate: BlockIterate, right: Float[Tensor, "K P"]
) -> Float[Tensor, "K layers"]:
    """``sum_p w_p (M' w)_p`` over each layer, for every draw; their mean is the trace of H^{-1} M'.

    It costs nothing: ``M' w`` is the right-hand side less the residual and ``A w``.

    Parameters
    ----------
    linear
        The linear model with the prior of now.
    iterate
        Of the solver.
    right
        ``(K, P)`` right-hand sides.

    Returns
    -------
    Tensor
        ``(K, layers)`` float64.
    """
    draws = iterate.solution
    curved = right - iterate.residual - linear.prior.diagonal(draws.dtype) * draws
    return linear.prior.space.layer_sums(draws * curved)


def unsettled(
    change: Float[Tensor, " groups"], gammas: Float[Tensor, " groups"]
) -> Float[Tensor, " groups"]:
    """By how much precisions have still to change, where it matters.

    A group that the data determine nothing of runs off to ever larger precisions, to no effect. A
    precision that is to *fall* does matter: it is too large for the data to have their say.

    Parameters
    ----------
    change
        ``(groups,)``, of the log precision.
    gammas
        ``(groups,)`` effective dimensions.

    Returns
    -------
    Tensor
        ``(groups,)``, not negative.
    """
    least = torch.where(change < 0, _ROUNDING, _NOTHING)
    return change.abs() * (gammas > least)


def _resolved(task: SampledTask, state: SampledState) -> LinearModel:
    linear = task.linear.with_prior(state.prior)
    return linear.with_likelihood(current_likelihood(linear.likelihood, state.noise_variance))


def current_likelihood(likelihood: Likelihood, noise_variance: float | None) -> Likelihood:
    """The likelihood with the noise of now.

    Returns
    -------
    Likelihood
        Unchanged when its noise is not learned.
    """
    if noise_variance is None:
        return likelihood
    assert isinstance(likelihood, Gaussian)
    return likelihood.with_noise(noise_variance)


def _unit(task: SampledTask, state: SampledState) -> LinearModel:
    """With noise variance one when it is learned, so that a sketch outlives its changes."""
    linear = task.linear.with_prior(state.prior)
    if state.noise_variance is None:
        return linear
    return linear.with_likelihood(current_likelihood(linear.likelihood, 1.0))


def _first_sketch(task: SampledTask, state: SampledState) -> SampledState:
    learning = task.learn_prior or task.learn_noise
    draws = range(min(task.em_draws, task.num_draws)) if learning else task.blocks[0]
    if state.prior.kind == "gprior" and not learning:
        # The scale is part of the prior: all processes take it from the same draws.
        draws = range(min(task.block, task.num_draws))
    sketch = _unit(task, state).sketch(draws, task.seed)
    prior = state.prior.with_scale(sketch.diagonal)
    weights = task.linear.model.vector
    if task.learn_prior:
        prior = prior.matched_to(weights, _weight(state.noise_variance) * sketch.diagonal)
    wanted = learning or draws == task.blocks[0]
    return replace(
        state,
        phase="learn" if learning else "final",
        prior=prior,
        mode=prior.coordinates(weights) if learning else None,
        sketch=prior.scaled(sketch.vectors) if wanted else None,
        work=state.work + len(draws),
    )


def _learn(task: SampledTask, state: SampledState) -> SampledState:
    """One step of the solver in a round of learning; behind the last one, mode and update."""
    linear = _resolved(task, state)
    assert state.sketch is not None
    assert state.mode is not None
    draws = range(len(state.sketch))
    right = right_hand_sides(linear.prior, state.sketch, draws, task.seed, state.noise_variance)
    if state.iterate is None:
        return _begun(linear, state, right, prior_draws(linear.prior, right, draws, task.seed))
    state = _advanced(task, linear, state, state.iterate)
    assert state.iterate is not None
    assert state.mode is not None
    gammas = effective_dimensions(linear, state.iterate, right)
    if not _solved(linear, state.iterate, gammas, _EM_TOLERANCE, task.max_steps):
        return state
    gamma, error = _group_dimensions(linear, state, gammas)
    energy = float((linear.prior.diagonal() * state.mode.double().square()).sum())
    found = find_mode(
        linear,
        state.mode,
        _approximate_inverse(linear, state),
        # The two are compared, and weights that begin at zero have no energy.
        tolerance=_MODE_ERROR * max(energy, float(gamma.sum())),
    )
    state = replace(state, mode=found.point, work=state.work + found.passes)
    return _updated(task, state, linear, gamma, error)


def _group_dimensions(
    linear: LinearModel, state: SampledState, gammas: Float[Tensor, "K layers"]
) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
    """Effective dimension of each group, in the range where it can lie, and its standard error."""
    assert state.sketch is not None
    prior = linear.prior
    mean, error = _mean_and_error(prior.pool(gammas))
    # Noise can make it negative. Its bound from below falls with the precision as it does itself
    # and as the mode's energy does: a constant would be a fixed point, far from any true one.
    trace = _weight(state.noise_variance) * prior.group_sums(state.sketch.square()).mean(0)
    least = _SMALLEST_SHARE * trace / (trace + prior.precision)
    return torch.minimum(torch.maximum(mean, least), prior.sizes), error


def _updated(
    task: SampledTask, state: SampledState, linear: LinearModel, gamma: Tensor, error: Tensor
) -> SampledState:
    """MacKay's update of precision and noise, and whether that was the last."""
    assert state.mode is not None
    assert state.iterate is not None
    prior = linear.prior
    norms = prior.group_sums(state.mode.double().square()).clamp(min=1e-300)
    record = Round(
        tuple(prior.precision.tolist()),
        state.noise_variance,
        tuple(gamma.tolist()),
        tuple(error.tolist()),
        tuple(norms.tolist()),
        state.work,
    )
    change = (gamma / norms).log() - prior.precision.log()
    change = torch.where(gamma > 0, change, 0)  # of a group that no output depends on
    change = _relaxed(change, state.rounds, prior) if task.learn_prior else 0 * change
    updated = prior.with_precision(prior.precision * change.exp())
    # A layer that the data hardly determine may run off to any precision: it does not matter.
    relevance = (10 * gamma / gamma.sum().clamp(min=1e-300)).clamp(max=1)
    noise, moved = state.noise_variance, float((unsettled(change, gamma) * relevance).max())
    if task.learn_noise:
        assert noise is not None
        before = noise
        count = len(linear.examples) * linear.num_outputs
        residual = float(linear.squared_residuals(state.mode))
        first = state.rounds[0].noise_variance if state.rounds else before
        assert first is not None
        noise = max(residual / max(count - float(gamma.sum()), 1.0), SMALLEST_NOISE * first)
        moved = max(moved, abs(log(noise / before)))
    relative = float(error.square().sum().sqrt() / gamma.sum().clamp(min=1e-300))
    rounds = (*state.rounds, record)
    settled = moved < max(0.01, min(_SETTLED, 2 * relative))
    last = settled or len(rounds) >= task.max_rounds
    state = replace(
        state,
        prior=updated,
        noise_variance=noise,
        rounds=rounds,
        iterate=None,
        settled=settled,
    )
    return replace(state, phase="final", sketch=None) if last else state


def _relaxed(change: Tensor, rounds: tuple[Round, ...], prior: Prior) -> Tensor:
    """A step of the log precision: of the secant method, cautious while there is no secant.

    Returns
    -------
    Tensor
        ``(groups,)``, at most a factor of ten.
    """
    factor = torch.full_like(change, _FIRST_RELAXATION)
    if rounds:
        before = rounds[-1]
        old, gamma, norms = (
            torch.tensor(values, dtype=torch.float64, device=change.device)
            for values in (before.precision, before.effective_dimension, before.squared_norm)
        )
        moved = prior.precision.log() - old.log()
        slope = (change - ((gamma / norms).log() - old.log())) / moved
        # The map's own slope lies between -1 and about +1/2; anything else is noise.
        usable = (moved.abs() > 0.1) & torch.isfinite(slope)
        factor = torch.where(usable, (-1 / slope).clamp(0.5, 1.5).nan_to_num(1.0), 1.0)
        factor = torch.where(usable & (slope >= 0), 1.5, factor)
    return (factor * change).clamp(-_LARGEST_STEP, _LARGEST_STEP)


def _final(task: SampledTask, state: SampledState) -> SampledState:
    done = 0 if state.draws is None else len(state.draws)
    block = next((b for b in task.blocks if b.start >= task.blocks[0].start + done), None)
    if block is None:
        return replace(state, phase="done", sketch=None, iterate=None, subspace=None)
    linear = _resolved(task, state)
    if state.sketch is None:
        sketch = _unit(task, state).sketch(block, task.seed).vectors
        return replace(state, sketch=sketch, work=state.work + len(block))
    right = right_hand_sides(linear.prior, state.sketch, block, task.seed, state.noise_variance)
    if state.iterate is None:
        guess = prior_draws(linear.prior, right, block, task.seed)
        return _begun(linear, state, right, guess)
    state = _advanced(task, linear, state, state.iterate)
    iterate = state.iterate
    assert iterate is not None
    gammas = effective_dimensions(linear, iterate, right)
    if not _solved(linear, iterate, gammas, task.tolerance, task.max_steps):
        return state
    errors = iterate.squared_error / _spread(linear, gammas)
    return replace(
        state,
        draws=_joined(state.draws, iterate.solution),
        gammas=_joined(state.gammas, gammas),
        errors=_joined(state.errors, errors),
        sketch=None,
        iterate=None,
    )


def right_hand_sides(
    prior: Prior,
    sketch: Float[Tensor, "K P"],
    draws: range,
    seed: int,
    noise_variance: float | None,
) -> Float[Tensor, "K P"]:
    """``sqrt(A) e0 + sketch``: what ``H w`` is for a posterior draw ``w``.

    Parameters
    ----------
    prior
        With the precision of now.
    sketch
        ``(K, P)``, at noise variance one when the noise is learned.
    draws
        Their numbers.
    seed
        Of the noise.
    noise_variance
        Of now, when it is learned.

    Returns
    -------
    Tensor
        ``(K, P)``.
    """
    weight = _weight(noise_variance) ** 0.5
    root = prior.diagonal(sketch.dtype).sqrt()
    return root * _weight_noise(draws, sketch, seed) + weight * sketch


def prior_draws(
    prior: Prior, like: Float[Tensor, "K P"], draws: range, seed: int
) -> Float[Tensor, "K P"]:
    """``e0 / sqrt(A)``: the posterior draw if the data said nothing.

    Returns
    -------
    Tensor
        ``(K, P)``.
    """
    return _weight_noise(draws, like, seed) * prior.diagonal(like.dtype).rsqrt()


def _weight_noise(draws: range, like: Tensor, seed: int) -> Tensor:
    size, device = like.shape[1], like.device
    return torch.stack(
        [
            torch.randn(
                size,
                generator=stream(seed, "weights", draw, device=device),
                dtype=like.dtype,
                device=device,
            )
            for draw in draws
        ]
    )


def _approximate_inverse(linear: LinearModel, state: SampledState) -> Product:
    """Of the posterior precision: exact on what earlier systems searched, the prior elsewhere."""
    diagonal = linear.prior.diagonal(linear.model.dtype)
    if state.subspace is None:
        return lambda rows: rows / diagonal
    return state.subspace.preconditioner(diagonal, _weight(state.noise_variance))


def _posterior_product(linear: LinearModel) -> Product:
    return lambda rows: linear.product(rows) + linear.prior.diagonal(rows.dtype) * rows


def _begun(linear: LinearModel, state: SampledState, right: Tensor, guess: Tensor) -> SampledState:
    """The solver's start: what earlier systems taught is used before its first step."""
    subspace, diagonal = state.subspace, linear.prior.diagonal(right.dtype)

    def improve(solution: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        assert subspace is not None
        return subspace.project(solution, residual, diagonal, _weight(state.noise_variance))

    iterate = begin(
        _posterior_product(linear),
        right,
        guess,
        lambda rows: rows / diagonal,
        None if subspace is None else improve,
    )
    return replace(state, iterate=iterate, work=state.work + len(right))


def _advanced(
    task: SampledTask, linear: LinearModel, state: SampledState, iterate: BlockIterate
) -> SampledState:
    searched, diagonal = len(iterate.directions), linear.prior.diagonal(linear.model.dtype)
    iterate = advance(iterate, _posterior_product(linear), lambda rows: rows / diagonal)
    subspace = state.subspace
    # Only what every process learned alike: draws must not depend on who solved which block first.
    if task.recycled > 0 and state.phase == "learn":
        vectors, images = iterate.searched, iterate.images
        assert vectors is not None
        assert images is not None
        subspace = Subspace.empty(vectors) if subspace is None else subspace
        # The part that stays when the prior or the noise change: M' at noise variance one.
        images = (images - linear.prior.diagonal(images.dtype) * vectors) / _weight(
            state.noise_variance
        )
        subspace = subspace.extended(vectors, images, task.recycled)
    return replace(
        state,
        iterate=replace(iterate, searched=None, images=None),
        subspace=subspace,
        work=state.work + searched,
    )


def _weight(noise_variance: float | None) -> float:
    return 1.0 if noise_variance is None else 1 / noise_variance


def _solved(
    linear: LinearModel, iterate: BlockIterate, gammas: Tensor, tolerance: float, max_steps: int
) -> bool:
    if iterate.steps >= max_steps:
        return True
    return bool(iterate.squared_error.mean() <= tolerance**2 * _spread(linear, gammas))


def _spread(linear: LinearModel, gammas: Tensor) -> Tensor:
    """The effective dimension against which errors are held; unsolved draws overstate it."""
    return gammas.sum(1).mean().clamp(1e-12, linear.most_dimensions)


def _mean_and_error(gammas: Tensor) -> tuple[Tensor, Tensor]:
    count = len(gammas)
    mean = gammas.mean(0)
    if count == 1:  # the bound of the variance that holds whatever the spectrum
        return mean, (2 * mean.clamp(min=0)).sqrt()
    return mean, gammas.std(0) / count**0.5


def _joined(before: Tensor | None, after: Tensor) -> Tensor:
    return after if before is None else torch.cat([before, after])
