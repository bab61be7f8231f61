"""Tail probabilities of a scalar from its first four cumulants.

Standardise ``X = k1 + sqrt(k2) Z`` and write ``c3 = k3 / k2^{3/2}``, ``c4 = k4 / k2^2``.

- *Gaussian*: ``P(Z > z) = Phi(-z)``.
- *Edgeworth*: adds ``density(z) (c3/6 He_2 + c4/24 He_3 + c3^2/72 He_5)``; accurate near the mean,
  can leave [0, 1] in the tail, where it is clipped.
- *Saddlepoint*: Lugannani and Rice (1980) in the form of Barndorff-Nielsen (1991), always inside
  (0, 1). With ``K(t) = t^2/2 + c3 t^3/6 + c4 t^4/24``, ``K'(t) = z``, ``r = sign(t) sqrt(2 (t z -
  K))`` and ``u = t sqrt(K''(t))``, ``P(Z > z) = Phi(-r - log(u / r) / r)``. The argument is
  replaced by its running maximum away from the mean, which changes nothing unless it fails to
  increase: the result is monotone (to 2e-3 where the cumulants are too large for any expansion,
  |c3| > 1 or c4 < -0.5). Beyond |c3| = 5 and -5 <= c4 <= 100 the cumulants are cut off.

Four cumulants need not belong to a convex ``K``. On the side of the mean where the quartic bends
the wrong way, its cubic and quartic terms are multiplied by ``exp(-b t^2 / 2)`` with the smallest
``b`` that keeps ``K`` convex there (after Wang, 1992). That changes cumulants of order five and
more only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.gaussians.hermite import hermite_polynomials, normal_cdf, normal_density
from pushforward.options import choice

__all__ = ["TailMethod", "quantile", "tail_probability"]

TailMethod = Literal["saddlepoint", "edgeworth", "gaussian"]

# K'' is kept above this fraction of the variance: a solution t of K'(t) = z is then at most z /
# fraction.
_LEAST_CURVATURE = 0.1
_LARGEST_TILT = 40.0
# What a propagation gives beyond these has broken down; the bisections below need some bound.
_LARGEST_SKEW = 5.0
_LEAST_KURTOSIS, _LARGEST_KURTOSIS = -5.0, 100.0
_BISECTIONS = 60
_ENVELOPE_NODES = 48


def tail_probability(
    threshold: Float[Tensor, "*#k"],
    mean: Float[Tensor, "*#k"],
    variance: Float[Tensor, "*#k"],
    third: Float[Tensor, "*#k"] | None = None,
    fourth: Float[Tensor, "*#k"] | None = None,
    method: TailMethod = "saddlepoint",
) -> Float[Tensor, "*k"]:
    """``P(X > threshold)`` of a scalar with the given cumulants.

    Parameters
    ----------
    threshold
        Broadcasts against the cumulants.
    mean, variance, third, fourth
        The first four cumulants. A missing one counts as 0, as it is for a Gaussian; a variance
        that is not positive makes ``X`` a constant.
    method
        ``"saddlepoint"``, ``"edgeworth"`` or ``"gaussian"``.

    Returns
    -------
    Tensor
        Probabilities in [0, 1], differentiable in every argument.

    Raises
    ------
    OptionError
        For an unknown method.
    """
    choice(method, "method", get_args(TailMethod))
    shape = torch.broadcast_shapes(threshold.shape, mean.shape)
    positive = variance > 0
    scale = torch.sqrt(torch.where(positive, variance, torch.ones_like(variance)))
    z = ((threshold - mean) / scale).expand(shape)
    c3 = torch.zeros_like(z) if third is None else (third / scale**3).expand(shape)
    c4 = torch.zeros_like(z) if fourth is None else (fourth / scale**4).expand(shape)
    probability = _METHODS[method](z, c3, c4)
    return torch.where(positive, probability, (z < 0).to(probability.dtype))


def quantile(
    probability: Float[Tensor, "*#k"],
    mean: Float[Tensor, "*#k"],
    variance: Float[Tensor, "*#k"],
    third: Float[Tensor, "*#k"] | None = None,
    fourth: Float[Tensor, "*#k"] | None = None,
    method: TailMethod = "saddlepoint",
) -> Float[Tensor, "*k"]:
    """The value that ``X`` does not exceed with the given probability, by bisection.

    Parameters
    ----------
    probability
        In (0, 1), broadcasts against the cumulants.
    mean, variance, third, fourth
        The first four cumulants, as in `tail_probability`.
    method
        As in `tail_probability`.

    Returns
    -------
    Tensor
        Quantiles within 1e-12 standard deviations, without gradient.

    Raises
    ------
    OptionError
        For probabilities outside (0, 1).
    """
    if not bool(((probability > 0) & (probability < 1)).all()):
        raise OptionError(
            f"probability {probability.flatten().tolist()[:4]}",
            where="quantile",
            advice="Give probabilities strictly between 0 and 1.",
        )
    with torch.no_grad():
        scale = variance.clamp(min=0).sqrt()
        low = torch.full_like(mean + probability, -_LARGEST_TILT)
        high = -low
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            tail = tail_probability(mean + scale * middle, mean, variance, third, fourth, method)
            above = tail > 1 - probability
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return mean + scale * (low + high) / 2


def _gaussian(z: Tensor, c3: Tensor, c4: Tensor) -> Tensor:  # noqa: ARG001 - one signature for all
    return normal_cdf(-z)


def _edgeworth(z: Tensor, c3: Tensor, c4: Tensor) -> Tensor:
    z = z.clamp(-_LARGEST_TILT, _LARGEST_TILT)
    he = hermite_polynomials(z, 5)
    correction = c3 / 6 * he[2] + c4 / 24 * he[3] + c3**2 / 72 * he[5]
    return (normal_cdf(-z) + normal_density(z) * correction).clamp(0, 1)


def _saddlepoint(z: Tensor, c3: Tensor, c4: Tensor) -> Tensor:
    # Reflect so that z >= 0 and only t >= 0 is needed: P(Z > z) = 1 - P(-Z > -z).
    side = torch.where(z < 0, -torch.ones_like(z), torch.ones_like(z))
    z, c3 = (side * z).clamp(max=_LARGEST_TILT), (side * c3).clamp(-_LARGEST_SKEW, _LARGEST_SKEW)
    c4 = c4.clamp(_LEAST_KURTOSIS, _LARGEST_KURTOSIS)
    damping = _convex_damping(c3, c4)
    tilt = _solve_tilt(z, c3, c4, damping)
    fraction = torch.linspace(0, 1, _ENVELOPE_NODES, dtype=z.dtype, device=z.device)
    path = tilt[..., None] * fraction
    roots = _modified_root(path, c3[..., None], c4[..., None], damping[..., None])
    root, highest = roots[..., -1], roots.amax(-1)
    # The comparison, rather than the maximum itself, keeps the gradient whole where all roots tie
    # (z = 0).
    return normal_cdf(-side * torch.where(highest > root, highest, root))


_METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gaussian": _gaussian,
    "edgeworth": _edgeworth,
    "saddlepoint": _saddlepoint,
}


def _tilted(t: Tensor, c3: Tensor, c4: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``K'``, ``(K'' - 1) / t`` and ``(2 (t K' - K) / t^2 - 1) / t``, free of cancellation."""
    envelope = torch.exp(-0.5 * damping * t * t)
    q = c3 / 6 + c4 * t / 24  # K(t) = t^2 / 2 + t^3 q exp(-b t^2 / 2)
    dq = c3 / 2 + c4 * t / 6
    ddq = c3 + c4 * t / 2
    bt2 = damping * t * t
    slope = t + envelope * t * t * (dq - bt2 * q)
    curvature = envelope * (ddq - 2 * bt2 * dq + (bt2 * bt2 - bt2) * q)
    radius = 2 * envelope * (dq - q - bt2 * q)
    return slope, curvature, radius


def _modified_root(t: Tensor, c3: Tensor, c4: Tensor, damping: Tensor) -> Tensor:
    """``r + log(u / r) / r`` at the tilt `t`, with its limit ``c3 / 6`` at 0."""
    _, a, b = _tilted(t, c3, c4, damping)  # K'' = 1 + t a,  r^2 = t^2 (1 + t b)
    stretch = 1 + t * b
    difference = (a - b) / stretch
    x = t * difference
    small = x.abs() < 1e-4
    safe = torch.where(small, torch.ones_like(x), x)
    series = 1 - x / 2 + x * x / 3 - x**3 / 4
    log_ratio = torch.where(small, series, torch.log1p(safe) / safe) * difference / 2
    return t * torch.sqrt(stretch) + log_ratio / torch.sqrt(stretch)


@torch.no_grad()
def _convex_damping(c3: Tensor, c4: Tensor) -> Tensor:
    """Smallest damping on a geometric grid for which ``K''`` stays positive for ``t > 0``."""
    # As far as `_solve_tilt` looks: a slight negative c4 bends K only at large t.
    farthest = math.sqrt(_LARGEST_TILT / _LEAST_CURVATURE)
    t = torch.linspace(0, farthest, 256, dtype=c3.dtype, device=c3.device) ** 2
    damping = torch.zeros_like(c3)
    for step in range(80):
        curvature = _tilted(t, c3[..., None], c4[..., None], damping[..., None])[1]
        bent = (1 + t * curvature).amin(-1) < _LEAST_CURVATURE
        if not bool(bent.any()):
            break
        damping = torch.where(bent, torch.full_like(damping, 1e-3 * 1.25**step), damping)
    return damping


def _solve_tilt(z: Tensor, c3: Tensor, c4: Tensor, damping: Tensor) -> Tensor:
    """The ``t >= 0`` with ``K'(t) = z``, differentiable."""
    with torch.no_grad():
        low, high = torch.zeros_like(z), z / _LEAST_CURVATURE
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            short = _tilted(middle, c3, c4, damping)[0] < z
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        t = (low + high) / 2
    # One Newton step from the solution carries the gradient of the implicit function.
    slope, curvature, _ = _tilted(t, c3, c4, damping)
    return t - (slope - z) / (1 + t * curvature).detach()
