"""What else the draws say: other estimates, generalisation, acceptance, the quadratic answer."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.degeneracy.coefficient import Measured
from pushforward.degeneracy.neighbourhood import Neighbourhood
from pushforward.linalg.lanczos import quadrature, tridiagonalise
from pushforward.runs.rng import stream

__all__ = [
    "acceptance",
    "crosschecks",
    "localization_effect",
    "proposal_log_ratio",
    "quadratic_answer",
    "quadratic_coefficient",
    "singular_fluctuation",
    "slope_effect",
    "waic",
]

_WARMER = 1.2  # largest ratio of the two temperatures
_PROBES = 4
_MANY_PARAMETERS = 100_000
_EXACT_PARAMETERS = 64
_BELOW = 0.999  # the spring's curvature, so that rounding leaves it below all others
_LANCZOS_STEPS = 24
_PROPOSALS = 4  # of every chain


def crosschecks(losses: Float[Tensor, "chain draw"], around: Neighbourhood) -> dict[str, Measured]:
    """Estimates of the coefficient that do not need the loss at ``w*``.

    With ``Z(b) ~ b^-lambda``, ``E_b[n L]`` is ``n L* + lambda / b``: its difference between two
    temperatures, the second by reweighting, gives ``lambda`` (Watanabe 2013), and so does its
    derivative, ``b^2 Var_b[n L]``.

    Parameters
    ----------
    losses
        ``(chain, draw)``: means over all examples.
    around
        The law that they are draws of.

    Returns
    -------
    dict
        ``"two temperatures"`` and ``"variance"``, with errors from the spread of chains; empty for
        a single chain.
    """
    if losses.shape[0] < 2 or losses.shape[1] < 2:
        return {}

    # A ratio of temperatures that leaves the weights of reweighting about equal.
    spread = float((around.nbeta * losses).std())
    more = min(_WARMER - 1, 1 / max(spread, 1e-30))

    def two_temperatures(part: Tensor) -> Tensor:
        energy = around.nbeta * part.flatten()
        weights = torch.softmax(-more * energy, 0)
        return (energy.mean() - (weights * energy).sum()) * (1 + more) / more

    def variance(part: Tensor) -> Tensor:
        return (around.nbeta * part.flatten()).var()

    return {
        "two temperatures": _jackknife(two_temperatures, losses),
        "variance": _jackknife(variance, losses),
    }


def singular_fluctuation(
    losses: Float[Tensor, "chain draw examples"], around: Neighbourhood
) -> Measured:
    """``nu = beta / 2 sum_i Var_w[loss_i]``.

    Parameters
    ----------
    losses
        Of every example at every draw.
    around
        The law that they are draws of.

    Returns
    -------
    Measured
        With an error from the spread of chains.
    """
    beta = around.nbeta / around.num_examples

    def fluctuation(part: Tensor) -> Tensor:
        return 0.5 * beta * part.flatten(0, 1).double().var(0).sum()

    if losses.shape[0] < 2:
        return Measured(float(fluctuation(losses)), torch.nan)
    return _jackknife(fluctuation, losses)


def waic(losses: Float[Tensor, "chain draw examples"], around: Neighbourhood) -> float:
    """Widely applicable information criterion per example, in nats.

    ``-mean_i log mean_w p(y_i | w) + beta / n sum_i Var_w[log p(y_i | w)]`` (Watanabe 2010, at
    inverse temperature ``beta``), of the law that was sampled.

    Parameters
    ----------
    losses
        Minus log-probabilities of every example at every draw.
    around
        The law that they are draws of.

    Returns
    -------
    float
        An estimate of the loss of the averaged prediction on new data.
    """
    flat = losses.flatten(0, 1).double()
    training = -(torch.logsumexp(-flat, 0) - log(len(flat))).mean()
    beta = around.nbeta / around.num_examples
    return float(training + beta * flat.var(0).mean())


def quadratic_coefficient(around: Neighbourhood, seed: int) -> Measured:
    """The first of `quadratic_answer`."""
    return quadratic_answer(around, seed)[0]


def quadratic_answer(around: Neighbourhood, seed: int) -> tuple[Measured, Measured]:
    """``1/2 sum_i n beta h_i / (n beta h_i + gamma)``, over the curvatures at ``w*``.

    MacKay's effective number of parameters, halved: what the coefficient is when the loss is
    quadratic. By stochastic Lanczos quadrature of the Hessian of the energy on all data (on part of
    them it would have noise that looks like curvature); exact for up to 64 parameters.

    Parameters
    ----------
    around
        The neighbourhood.
    seed
        Of the probes.

    Returns
    -------
    tuple
        It, and its derivative by the logarithm of ``gamma``, both with an error from the spread of
        probes and from what the second half of the steps has changed. Directions of negative
        curvature count as flat.
    """
    generator = stream(seed, "quadratic")
    size, gamma, whole_data = around.num_parameters, around.localization, around.on_all_data
    if size <= _EXACT_PARAMETERS:
        probes = torch.eye(size).to(around.centre)
    else:
        count = _PROBES if size < _MANY_PARAMETERS else _PROBES // 2
        probes = (torch.randint(2, (count, size), generator=generator) * 2 - 1).to(around.centre)
    points = around.centre.expand(len(probes), -1)

    def product(vectors: Tensor) -> Tensor:
        return around.scale * whole_data.curvature_product(points, around.scale * vectors)

    exact = len(probes) == size
    steps = size if exact else min(_LANCZOS_STEPS, size)
    diagonals, beside = tridiagonalise(product, probes, steps)
    half, whole = (
        _held_by_the_loss(diagonals[:, :count], beside[:, :count], gamma) * around.num_parameters
        for count in (max(1, steps // 2), steps)
    )
    error = torch.zeros(2, dtype=torch.float64)
    if not exact:
        error = (whole.var(1) / len(probes) + (whole - half).mean(1).square()).sqrt()
    value, slope = (
        Measured(float(mean), float(each)) for mean, each in zip(whole.mean(1), error, strict=True)
    )
    return value, slope


def _held_by_the_loss(
    diagonals: Float[Tensor, "probes steps"], beside: Float[Tensor, "probes steps"], gamma: float
) -> Float[Tensor, "2 probes"]:
    """``(a - gamma) / 2 a`` and its derivative by ``ln gamma``, averaged over curvatures ``a``."""
    nodes, weights = quadrature(diagonals, beside, lowest=_BELOW * gamma)
    held = nodes.clamp(min=gamma)
    share = 0.5 * (held - gamma) / held
    return torch.stack([(weights * share).sum(1), -(weights * share * gamma / held).sum(1)])


def localization_effect(
    excess: Float[Tensor, "chain draw"],
    squared_distance: Float[Tensor, "chain draw"],
    around: Neighbourhood,
) -> Measured:
    """Derivative of the coefficient by ``ln gamma``, from fluctuations: ``-Cov[excess, spring]``.

    Parameters
    ----------
    excess, squared_distance
        Of the draws.
    around
        The law that they are draws of.

    Returns
    -------
    Measured
        With an error from the spread of chains.
    """
    spring = 0.5 * around.localization * squared_distance

    def covariance(part: Tensor) -> Tensor:
        away = part.flatten(0, 1) - part.flatten(0, 1).mean(0)
        return -(away[:, 0] * away[:, 1]).mean()

    return _jackknife(covariance, torch.stack([excess, spring], -1))


def slope_effect(around: Neighbourhood) -> float:
    """What a gradient ``g`` at ``w*`` adds to the coefficient if the loss is quadratic.

    Chains then live around another point: ``-sum (n beta g)^2 / a (1 - n beta h / (2 a))`` with
    ``a = n beta h + gamma``. It is zero at a minimum, and negative elsewhere.

    Parameters
    ----------
    around
        The neighbourhood.

    Returns
    -------
    float
        In units of the coefficient.
    """
    gamma, centre, whole_data = around.localization, around.centre[None], around.on_all_data
    _, gradient = whole_data.value_and_gradient(centre)
    start = around.scale * gradient
    if not bool((start != 0).any()):
        return 0.0

    def product(vectors: Tensor) -> Tensor:
        return around.scale * whole_data.curvature_product(centre, around.scale * vectors)

    def effect(curvatures: Tensor) -> Tensor:
        held = curvatures.clamp(min=gamma)
        return -(1 - 0.5 * (held - gamma) / held) / held

    steps = min(_LANCZOS_STEPS, around.num_parameters)
    nodes, weights = quadrature(*tridiagonalise(product, start, steps), lowest=_BELOW * gamma)
    return float(start.double().square().sum() * (weights * effect(nodes)).sum())


def acceptance(
    around: Neighbourhood,
    positions: Float[Tensor, "chains P"],
    step_size: float,
    seed: int,
) -> float:
    """Mean probability with which a Metropolis test accepts Langevin steps from these positions.

    Both ends of a step are compared on the same examples, so the number is about the step size
    alone; on differing batches it would be about their noise.

    Parameters
    ----------
    around
        The neighbourhood.
    positions
        ``(chains, P)``, finite.
    step_size
        ``eps``.
    seed
        Of the proposals.

    Returns
    -------
    float
        In [0, 1].
    """
    generator = stream(seed, "acceptance")
    potential, scale = around.probed, around.scale
    value, gradient = potential.value_and_gradient(positions)
    found = []
    for _ in range(_PROPOSALS):
        noise = torch.randn(positions.shape, generator=generator, dtype=torch.float64)
        noise = noise.to(positions)
        drift = 0.5 * step_size * scale.square() * gradient
        proposal = positions - drift + step_size**0.5 * scale * noise
        there, slope = potential.value_and_gradient(proposal)
        log_ratio = proposal_log_ratio(
            positions / scale,
            scale * gradient,
            value,
            proposal / scale,
            scale * slope,
            there,
            step_size,
        )
        found.append(log_ratio.clamp(max=0).exp().nan_to_num(0.0))
    return float(torch.stack(found).mean())


def proposal_log_ratio(
    before: Float[Tensor, "chains P"],
    gradient_before: Float[Tensor, "chains P"],
    potential_before: Float[Tensor, " chains"],
    after: Float[Tensor, "chains P"],
    gradient_after: Float[Tensor, "chains P"],
    potential_after: Float[Tensor, " chains"],
    step_size: float,
) -> Float[Tensor, " chains"]:
    """Logarithm of the Metropolis ratio of Langevin proposals.

    Parameters
    ----------
    before, gradient_before, potential_before
        Positions, gradients of ``U`` and ``U``.
    after, gradient_after, potential_after
        Of the proposals.
    step_size
        ``eps``; a proposal has mean ``w - eps grad U / 2`` and variance ``eps``.

    Returns
    -------
    Tensor
        ``(chains,)`` float64.
    """
    half = 0.5 * step_size
    forth = (after - before + half * gradient_before).double().square().sum(-1)
    back = (before - after + half * gradient_after).double().square().sum(-1)
    return (forth - back) / (2 * step_size) + potential_before - potential_after


def _jackknife(statistic: Callable[[Tensor], Tensor], draws: Tensor) -> Measured:
    """A statistic of all chains, with an error from leaving out each."""
    draws = draws.double() if draws.dim() == 2 else draws
    count = len(draws)
    every = torch.arange(count, device=draws.device)
    left_out = torch.stack([statistic(draws[every != chain]) for chain in range(count)])
    spread = (left_out - left_out.mean()).square().sum() * (count - 1) / count
    return Measured(float(statistic(draws)), float(spread.sqrt()))
