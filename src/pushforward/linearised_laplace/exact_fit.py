"""Prior and noise of a small linear model by MacKay's fixed point, with every quantity exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.linearised_laplace.exact import DualFactor, Factor, PrimalFactor
from pushforward.linearised_laplace.linear_model import LinearModel
from pushforward.linearised_laplace.mode import find_mode
from pushforward.linearised_laplace.priors import Prior
from pushforward.linearised_laplace.sampled import (
    SMALLEST_NOISE,
    Round,
    current_likelihood,
    unsettled,
)

__all__ = ["ExactFit", "fit_exactly"]

_CONVERGED = {torch.float64: 1e-8}  # change of the log precision, by the network's dtype
_MODE_TOLERANCE = {torch.float64: 1e-14}  # nats
_LOOSELY = 1e-5  # of the log precision, in lower precision,
_LOOSE_MODE = 1e-4  # and of the mode: rounding in a sum over many examples is not far below
_FARTHEST = 7.0  # step of the log precision


@dataclass(frozen=True, eq=False)
class ExactFit:
    """A posterior with the prior and noise that explain the data best, or with those given.

    Parameters
    ----------
    prior, noise_variance
        Learned or given; the noise is None when it was not to be learned.
    factor
        Of the posterior precision.
    mode
        ``(P,)`` in the coordinates of the prior.
    log_evidence
        At the mode, in nats.
    rounds
        What was tried on the way.
    settled
        Whether the fixed point was reached.
    """

    prior: Prior
    noise_variance: float | None
    factor: PrimalFactor | DualFactor
    mode: Float[Tensor, " P"]
    log_evidence: float
    rounds: tuple[Round, ...]
    settled: bool


def fit_exactly(
    linear: LinearModel,
    factor: Factor,
    *,
    noise: float | None,
    learn_prior: bool,
    max_rounds: int = 200,
    after_round: Callable[[Round], None] = lambda _round: None,
) -> ExactFit:
    """Iterate ``precision <- effective dimension / ||mode||^2`` and the noise's counterpart.

    Parameters
    ----------
    linear
        The linear model, with noise variance one when the noise is learned.
    factor
        Of its curvature.
    noise
        Noise variance to begin with when it is to be learned, else None.
    learn_prior
        Whether the precision is learned, beginning with that of the prior.
    max_rounds
        Where to give up.
    after_round
        Called with what each round found.

    Returns
    -------
    ExactFit
        At the fixed point, to 1e-8 in the logarithm.

    Notes
    -----
    D. J. C. MacKay (1992); with the mode of the *linear model* rather than the network's weights:
    arXiv 2206.08900. The evidence is ``log p(y | h) - w.Aw / 2 - log |H| / 2 + log |A| / 2``.
    """
    rounds: list[Round] = []
    prior, settled = linear.prior, False
    start = 0.0 if noise is None else noise
    dtype, before = linear.model.dtype, None
    mode = prior.coordinates(linear.model.vector)
    while True:
        here = linear.with_prior(prior).with_likelihood(
            current_likelihood(linear.likelihood, noise)
        )
        weight = 1.0 if noise is None else 1 / noise
        posterior = factor.factorise(prior, weight)
        found = find_mode(
            here, mode, posterior.solve, tolerance=_MODE_TOLERANCE.get(dtype, _LOOSE_MODE)
        )
        mode = found.point
        # Rounding makes the nothing that data say about a dead layer negative.
        gammas = posterior.group_dimensions().clamp(min=1e-300)
        norms = prior.group_sums(mode.double().square())
        evidence = -found.loss - 0.5 * float((prior.precision * norms).sum())
        evidence -= 0.5 * posterior.log_determinant_ratio
        result = ExactFit(prior, noise, posterior, mode, evidence, tuple(rounds), settled)
        if settled or len(rounds) >= max_rounds or not (learn_prior or noise is not None):
            return result
        rounds.append(
            Round(
                tuple(prior.precision.tolist()),
                noise,
                tuple(gammas.tolist()),
                (0.0,) * len(gammas),
                tuple(norms.tolist()),
                0.0,
            )
        )
        after_round(rounds[-1])
        moved = 0.0
        if learn_prior:
            change = (gammas / norms.clamp(min=1e-300)).log() - prior.precision.log()
            moved = float(unsettled(change, gammas).max())
            here_log = prior.precision.log()
            prior = prior.with_precision((here_log + _secant(here_log, change, before)).exp())
            before = (here_log, change)
        if noise is not None:
            count = len(linear.examples) * linear.num_outputs
            residual = float(here.squared_residuals(mode))
            smallest = SMALLEST_NOISE * start
            updated_noise = max(residual / max(count - float(gammas.sum()), 1e-6), smallest)
            moved = max(moved, abs(log(updated_noise / noise)))
            noise = updated_noise
        settled = moved < _CONVERGED.get(dtype, _LOOSELY)


def _secant(
    point: Float[Tensor, " groups"],
    change: Float[Tensor, " groups"],
    before: tuple[Tensor, Tensor] | None,
) -> Float[Tensor, " groups"]:
    """Where the change of the fixed-point map would vanish on the line through the last two points.

    Returns
    -------
    Tensor
        ``(groups,)`` step: the plain change where there is no line, or it leads far away.
    """
    if before is None:
        return change
    slope = (change - before[1]) / (point - before[0])
    factor = torch.where(torch.isfinite(slope) & (slope < 0), -1 / slope, 1.0)
    most = 5.0 if len(change) == 1 else 2.0
    return (change * factor.clamp(0.5, most)).clamp(-_FARTHEST, _FARTHEST)
