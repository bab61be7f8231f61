"""From learning coefficients at several temperatures to that at temperature zero.

What chains measure is ``E(b) = b E_b[K] = -d ln Z / d ln b``. With ``Z(b) ~ b^-lambda (ln b + c)^(m
- 1)`` that is

    E(b) = lambda - (m - 1) / (ln b + c),

so that a multiplicity ``m > 1`` is felt at every temperature that can be reached. ``c`` absorbs the
units of the loss, which ``lambda`` and ``m`` do not depend on, and the localisation; no theory
gives it, and the line in ``1 / ln b``, which is ``c = 0``, is no better than others. With ``m = 1``
what is left is the next pole of the zeta function, or the localisation:

    E(b) = lambda - a (b / b_0)^-k.

All these curves are fitted by weighted least squares and averaged by the probability that they have
given the estimates. A logarithm and a small power can hardly be told apart over the range of a
computer's numbers, so most of the error is often that of the curve, and it is reported as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log, sqrt
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.degeneracy.coefficient import Measured
from pushforward.errors import OptionError

__all__ = ["FEWEST_TEMPERATURES", "TemperatureFit", "fit_temperatures"]

FEWEST_TEMPERATURES: Final = 3
_LARGEST_MULTIPLICITY: Final = 7
_SHIFTS: Final = 41
_LEAST_LOGARITHM: Final = 1.0  # that ln b + c may be at any temperature
_LARGEST_SHIFT: Final = 8.0
_POWERS: Final = (0.125, 0.25, 0.5, 1.0)
_CORRECTION: Final = 0.2  # of the value: how large the correction with a power is at b_0, or so


@dataclass(frozen=True)
class TemperatureFit:
    """What estimates at several temperatures say about temperature zero.

    Parameters
    ----------
    value
        ``lambda``; its standard error includes `model_error`.
    multiplicity_term
        ``m - 1``, mean and standard deviation of what is likely.
    multiplicities
        How likely each ``m`` is, from 1. Before the estimates are seen it is ``2^-m``.
    chi_squared, degrees_of_freedom
        Of the curve that fits best, for which two numbers are counted as fitted.
    p_value
        How often estimates would scatter at least so much about the right curve.
    model_error
        Standard deviation of ``lambda`` over the curves, and what scatter beyond the errors of the
        estimates adds.
    curves
        ``(curves, 5)``: probability, ``lambda``, size of the correction, and ``c`` or, where it is
        not 0, the power.
    hottest
        ``b_0``, the smallest ``b``.
    """

    value: Measured
    multiplicity_term: Measured
    multiplicities: dict[int, float]
    chi_squared: float
    degrees_of_freedom: int
    p_value: float
    model_error: float
    curves: Float[Tensor, "curves 5"] = field(repr=False, metadata={"json": False})
    hottest: float

    def at(self, nbetas: Float[Tensor, " points"]) -> Float[Tensor, " points"]:
        """The mean curve.

        Parameters
        ----------
        nbetas
            ``b``, infinity for temperature zero.

        Returns
        -------
        Tensor
            Expected coefficients.
        """
        probability, limit, size, shift, power = self.curves.unbind(1)
        return probability @ (limit - size * _decay(nbetas, shift, power, self.hottest)).T


def fit_temperatures(
    nbetas: Sequence[float], values: Sequence[float], errors: Sequence[float]
) -> TemperatureFit:
    """Weighted least squares by every curve, averaged over curves.

    Parameters
    ----------
    nbetas
        ``b``, three or more, above 1.
    values, errors
        Coefficients at them, and their standard errors, positive.

    Returns
    -------
    TemperatureFit
        For ``lambda`` anywhere; ``c`` anywhere from where the logarithm at the smallest ``b`` is 1
        (or from 0) to 8; powers 1/8, 1/4, 1/2 and 1 with corrections of some 20 % at ``b_0``.

    Raises
    ------
    OptionError
        For fewer than three different temperatures, or errors that are not positive.

    Examples
    --------
    >>> nbetas = [20.0, 80.0, 320.0, 1280.0]
    >>> found = fit_temperatures(nbetas, [2 - 1 / log(b) for b in nbetas], [0.01] * 4)
    >>> abs(found.value.value - 2) < 2 * found.value.standard_error
    True
    """
    b, y, s = (torch.tensor(list(x), dtype=torch.float64) for x in (nbetas, values, errors))
    if len(set(nbetas)) < FEWEST_TEMPERATURES or not bool((b > 1).all()):
        raise OptionError(
            f"temperatures {list(nbetas)}",
            where="nbetas",
            advice="Give three or more different numbers above 1.",
        )
    if not bool((y.isfinite() & s.isfinite() & (s > 0)).all()):
        raise OptionError(
            "estimates without an error",
            where="fit_temperatures",
            advice="Take more draws: each estimate needs a positive standard error.",
        )
    precisions = s.pow(-2)
    logarithms = _logarithms(b, y, precisions)
    powers = _powers(b, y, precisions)
    curves, variance, chi, multiplicity = (
        torch.cat(parts) for parts in zip(logarithms, powers, strict=True)
    )
    probability = torch.softmax(curves[:, 0], 0)
    curves = torch.cat([probability[:, None], curves[:, 1:]], 1)
    limits = curves[:, 1]
    mean, term = float(probability @ limits), float(probability @ (multiplicity - 1))
    within = float(probability @ variance)
    between = float(probability @ (limits - mean).square())
    freedom, best = len(b) - 2, float(chi.min())
    # Scatter beyond the errors means that they, or all curves, are wrong.
    beyond = max(best / freedom - 1, 0.0) * within
    spread = float(probability @ (multiplicity - 1 - term).square())
    return TemperatureFit(
        value=Measured(mean, sqrt(within + between + beyond)),
        multiplicity_term=Measured(term, sqrt(spread)),
        multiplicities={
            m: float(probability[multiplicity == m].sum())
            for m in range(1, _LARGEST_MULTIPLICITY + 1)
        },
        chi_squared=best,
        degrees_of_freedom=freedom,
        p_value=float(torch.special.gammaincc(b.new_tensor(freedom / 2), b.new_tensor(best / 2))),
        model_error=sqrt(between + beyond),
        curves=curves,
        hottest=float(b.min()),
    )


def _decay(
    nbetas: Float[Tensor, " points"],
    shift: Float[Tensor, " curves"],
    power: Float[Tensor, " curves"],
    hottest: float,
) -> Float[Tensor, "points curves"]:
    """``1 / (ln b + c)``, or ``(b / b_0)^-k`` where the power is not 0."""
    logs = nbetas.log()[:, None]
    falling = torch.exp(-power * (logs - log(hottest)))
    return torch.where(power > 0, falling, 1 / (logs + shift))


def _logarithms(b: Tensor, y: Tensor, precisions: Tensor) -> tuple[Tensor, ...]:
    """Curves of multiplicity 2 and more: the size of the correction is known, ``m - 1``.

    Returns
    -------
    tuple
        Curves with the logarithm of their probability, variances of ``lambda``, chi squared, and
        multiplicities.
    """
    least = min(0.0, _LEAST_LOGARITHM - log(float(b.min())))
    shifts = torch.linspace(least, _LARGEST_SHIFT, _SHIFTS, dtype=torch.float64)
    every = torch.arange(2, _LARGEST_MULTIPLICITY + 1, dtype=torch.float64)
    multiplicity, shift = torch.cartesian_prod(every, shifts).unbind(1)
    power = torch.zeros_like(shift)
    size = multiplicity - 1
    raised = y + size[:, None] * _decay(b, shift, power, float(b.min())).T  # (curves, temperatures)
    limit = raised @ precisions / precisions.sum()
    chi = (raised - limit[:, None]).square() @ precisions
    variance = torch.full_like(limit, 1 / float(precisions.sum()))
    prior = -log(2) * multiplicity - log(_SHIFTS)
    evidence = prior - chi / 2 + variance.log() / 2
    return torch.stack([evidence, limit, size, shift, power], 1), variance, chi, multiplicity


def _powers(b: Tensor, y: Tensor, precisions: Tensor) -> tuple[Tensor, ...]:
    """The same for multiplicity 1: the size of the correction is normal, of mean 0."""
    power = torch.tensor(_POWERS, dtype=torch.float64)
    none = torch.zeros_like(power)
    decay = _decay(b, none, power, float(b.min())).T
    design = torch.stack([torch.ones_like(decay), -decay], 2)  # (curves, temperatures, 2)
    typical = _CORRECTION * float(y.abs().max())
    prior = torch.diag(torch.tensor([0.0, typical**-2], dtype=torch.float64))
    covariance = torch.linalg.inv(design.mT @ (precisions[:, None] * design) + prior)
    solution = (covariance @ design.mT @ (precisions * y)[:, None])[..., 0]
    limit, size = solution.unbind(1)
    residual = y - (design @ solution[..., None])[..., 0]
    chi = residual.square() @ precisions
    evidence = (
        -log(2 * len(power))
        - (chi + (size / typical).square()) / 2
        + torch.logdet(covariance) / 2
        - log(typical)
    )
    curves = torch.stack([evidence, limit, size, none, power], 1)
    return curves, covariance[:, 0, 0], chi, torch.ones_like(power)
