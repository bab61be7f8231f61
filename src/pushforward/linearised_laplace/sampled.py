"""Posterior samples by optimisation, and the prior they imply: a loop of small resumable steps.

A draw of the posterior ``N(0, H^{-1})``, ``H = M' + A``, is the minimiser of the low-variance
objective ``w.M'w / 2 + (w - w_n).A(w - w_n) / 2`` with ``A w_n = sqrt(A) e0 + sketch``: a linear
system ``H w = sqrt(A) e0 + sketch`` whose noise is drawn once (arXiv 2210.04994, section 3; arXiv
2404.19157, chapter 6). All draws are solved as one block. The prior's precision is then set to
``effective dimension / ||mode||^2`` (MacKay), and the draws follow from where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.linalg.conjugate_gradients import BlockIterate, advance, begin
from pushforward.linearised_laplace.linear_model import LinearModel
from pushforward.linearised_laplace.mode import find_mode
from pushforward.linearised_laplace.priors import Prior
from pushforward.networks.likelihoods import Gaussian, Likelihood
from pushforward.runs.rng import stream

__all__ = [
    "Round",
    "SampledState",
    "SampledTask",
    "current_likelihood",
    "effective_dimensions",
    "prior_draws",
    "right_hand_sides",
    "step",
]

_MODE_TOLERANCE = 1e-2  # nats
_EM_TOLERANCE = 0.2
_LARGEST_STEP = 2.3  # of the log precision: a factor of ten
_SETTLED = 0.05


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
        What comes next: a ``"sketch"``, the ``"mode"``, a step of the ``"rounds"`` of learning, a
        step of the ``"final"`` draws, or nothing (``"done"``).
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
    start
        ``(em_draws, P)`` solutions of the last round: where the first final block begins.
    rounds
        What was learned so far.
    work
        Passes so far, counted in vectors.
    """

    phase: Literal["sketch", "mode", "rounds", "final", "done"]
    prior: Prior
    noise_variance: float | None = None
    mode: Float[Tensor, " P"] | None = None
    sketch: Float[Tensor, "K P"] | None = None
    iterate: BlockIterate | None = None
    draws: Float[Tensor, "k P"] | None = None
    gammas: Float[Tensor, "k layers"] | None = None
    errors: Float[Tensor, " k"] | None = None
    start: Float[Tensor, "e P"] | None = None
    rounds: tuple[Round, ...] = ()
    work: float = 0.0
    notes: Mapping[str, Any] = field(default_factory=dict)


def step(task: SampledTask, state: SampledState) -> SampledState:
    """The next piece of work: a pass over the data or a few.

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
    if state.phase == "mode":
        return _mode(task, state)
    if state.phase == "rounds":
        return _round(task, state)
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
    sketch = _unit(task, state).sketch(draws, task.seed)
    prior = state.prior.with_scale(sketch.diagonal)
    mode = prior.coordinates(task.linear.model.vector)
    if learning and task.learn_prior:
        # Where the weights would be an ordinary draw of the prior: too small rather than too large
        # a precision, since unimportant weights are small because they were regularised.
        norms = prior.group_sums(mode.double().square()).clamp(min=1e-12)
        prior = prior.with_precision(prior.sizes / norms)
    return replace(
        state,
        phase="mode" if learning else "final",
        prior=prior,
        mode=mode if learning else None,
        sketch=prior.scaled(sketch.vectors),
        work=state.work + len(draws),
    )


def _mode(task: SampledTask, state: SampledState) -> SampledState:
    linear = _resolved(task, state)
    assert state.mode is not None
    found = find_mode(linear, state.mode, _prior_inverse(linear.prior), tolerance=_MODE_TOLERANCE)
    return replace(state, phase="rounds", mode=found.point, work=state.work + found.passes)


def _round(task: SampledTask, state: SampledState) -> SampledState:
    linear = _resolved(task, state)
    assert state.sketch is not None
    assert state.mode is not None
    draws = range(len(state.sketch))
    right = right_hand_sides(linear.prior, state.sketch, draws, task.seed, state.noise_variance)
    if state.iterate is None:
        guess = state.start
        if guess is None:
            guess = prior_draws(linear.prior, right, draws, task.seed)
        return _begun(linear, state, right, guess)
    iterate = _advanced(linear, state.iterate)
    state = replace(state, iterate=iterate, work=state.work + len(draws))
    gammas = effective_dimensions(linear, iterate, right)
    if not _solved(iterate, gammas, _EM_TOLERANCE, task.max_steps):
        return state
    return _updated(task, state, linear, gammas)


def _updated(
    task: SampledTask, state: SampledState, linear: LinearModel, gammas: Tensor
) -> SampledState:
    """MacKay's update of precision and noise, and whether that was the last."""
    assert state.mode is not None
    assert state.iterate is not None
    prior = linear.prior
    mean, error = _mean_and_error(prior.pool(gammas))
    # A group's effective dimension lies between nothing and its number of parameters.
    gamma = torch.minimum(mean.clamp(min=1e-3), prior.sizes)
    norms = prior.group_sums(state.mode.double().square()).clamp(min=1e-12)
    record = Round(
        tuple(prior.precision.tolist()),
        state.noise_variance,
        tuple(gamma.tolist()),
        tuple(error.tolist()),
        tuple(norms.tolist()),
        state.work,
    )
    change = (gamma / norms).log() - prior.precision.log()
    change = change.clamp(-_LARGEST_STEP, _LARGEST_STEP) if task.learn_prior else 0 * change
    updated = prior.with_precision(prior.precision * change.exp())
    noise, moved = state.noise_variance, float(change.abs().max())
    if task.learn_noise:
        assert noise is not None
        before = noise
        count = len(linear.examples) * linear.num_outputs
        residual = float(linear.squared_residuals(state.mode))
        noise = max(residual / max(count - float(gamma.sum()), 1.0), 1e-12)
        moved = max(moved, abs(float(torch.tensor(noise / before).log())))
    relative = float((error / gamma).max())
    rounds = (*state.rounds, record)
    settled = moved < max(0.01, min(_SETTLED, 2 * relative))
    last = settled or len(rounds) >= task.max_rounds
    state = replace(
        state,
        prior=updated,
        noise_variance=noise,
        rounds=rounds,
        start=state.iterate.solution,
        iterate=None,
        notes={**state.notes, "settled": settled},
    )
    if not last:
        return replace(state, phase="mode")
    return replace(state, phase="final", sketch=None)


def _final(task: SampledTask, state: SampledState) -> SampledState:
    done = 0 if state.draws is None else len(state.draws)
    block = next((b for b in task.blocks if b.start >= task.blocks[0].start + done), None)
    if block is None:
        return replace(state, phase="done", sketch=None, iterate=None, start=None)
    linear = _resolved(task, state)
    if state.sketch is None:
        sketch = _unit(task, state).sketch(block, task.seed).vectors
        return replace(state, sketch=sketch, work=state.work + len(block))
    right = right_hand_sides(linear.prior, state.sketch, block, task.seed, state.noise_variance)
    if state.iterate is None:
        guess = prior_draws(linear.prior, right, block, task.seed)
        if state.start is not None and block.start == 0:
            count = min(len(state.start), len(block))
            guess[:count] = state.start[:count]
        return _begun(linear, state, right, guess)
    iterate = _advanced(linear, state.iterate)
    state = replace(state, iterate=iterate, work=state.work + len(block))
    gammas = effective_dimensions(linear, iterate, right)
    if not _solved(iterate, gammas, task.tolerance, task.max_steps):
        return state
    errors = iterate.squared_error / gammas.sum(1).mean()
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
    weight = 1.0 if noise_variance is None else noise_variance**-0.5
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


def _prior_inverse(prior: Prior) -> Any:
    return lambda rows: rows / prior.diagonal(rows.dtype)


def _posterior_product(linear: LinearModel) -> Any:
    return lambda rows: linear.product(rows) + linear.prior.diagonal(rows.dtype) * rows


def _begun(linear: LinearModel, state: SampledState, right: Tensor, guess: Tensor) -> SampledState:
    iterate = begin(_posterior_product(linear), right, guess, _prior_inverse(linear.prior))
    return replace(state, iterate=iterate, work=state.work + len(right))


def _advanced(linear: LinearModel, iterate: BlockIterate) -> BlockIterate:
    return advance(iterate, _posterior_product(linear), _prior_inverse(linear.prior))


def _solved(iterate: BlockIterate, gammas: Tensor, tolerance: float, max_steps: int) -> bool:
    if iterate.steps >= max_steps:
        return True
    wanted = tolerance**2 * gammas.sum(1).mean().clamp(min=1e-12)
    return bool(iterate.squared_error.mean() <= wanted)


def _mean_and_error(gammas: Tensor) -> tuple[Tensor, Tensor]:
    count = len(gammas)
    mean = gammas.mean(0)
    if count == 1:  # the bound of the variance that holds whatever the spectrum
        return mean, (2 * mean.clamp(min=0)).sqrt()
    return mean, gammas.std(0) / count**0.5


def _joined(before: Tensor | None, after: Tensor) -> Tensor:
    return after if before is None else torch.cat([before, after])
