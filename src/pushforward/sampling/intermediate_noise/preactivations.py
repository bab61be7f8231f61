"""Noisy units before their activation: ``z`` given its prior mean ``m`` and its noisy image ``x``.

Elementwise, ``z ~ N(m, d_z)`` and ``x ~ N(f(z), d_x)``. Where ``f`` is linear between breaks, the
conditional law of ``z`` is a mixture of truncated Gaussians, one for each segment, and is drawn
exactly by inversion of its distribution function. On segment ``j``, ``f(z) = s_j z + c_j`` between
``l_j`` and ``u_j``,

    v_j  = 1 / (1 / d_z + s_j^2 / d_x),     mu_j = v_j (m / d_z + s_j (x - c_j) / d_x),
    w_j  = N(x; s_j m + c_j, d_x + s_j^2 d_z)
           [Phi((u_j - mu_j) / sqrt v_j) - Phi((l_j - mu_j) / sqrt v_j)]

and segment ``j``, chosen with probability proportional to ``w_j``, gives ``N(mu_j, v_j)`` on
``(l_j, u_j)``. For the rectifier that is the mixture of Piccioli, Troiani and Zdeborova, *Gibbs
sampling the posterior of neural networks* (2023).

The weights are computed as the joint density of ``z`` and ``x`` at the point ``r_j`` of the segment
that is nearest to ``mu_j``, times an integral of moderate size (`log_interval_mills`). At a kink
neighbouring segments share that point, so densities that are both far below the smallest number
cancel exactly.

For any other ``f`` the law has no closed form; `update_preactivations_smooth` leaves it invariant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import OptionError, UnsupportedLayerError
from pushforward.gaussians.activations import PiecewisePolynomial
from pushforward.gaussians.truncated import log_interval_mills, truncated_normal

__all__ = [
    "PiecewiseLinear",
    "sample_preactivations",
    "segment_log_weights",
    "update_preactivations_smooth",
]

_Number: TypeAlias = float | Tensor

_SQRT_HALF, _SQRT_TWO = math.sqrt(0.5), math.sqrt(2)
_LOG_SQRT_TWO_PI = 0.5 * math.log(2 * math.pi)
_LEAST_UNIFORM = 2.0**-54  # the middle of the first cell of the grid on which uniforms lie
_GREATEST_BELOW_ONE = 1 - 2.0**-53
# In the fast path masses must not underflow; odds of exp(640) = 1e278 are as good as infinite as
# long as they are not held against a mass below the least.
_LEAST_MASS = 1e-250
_LARGEST_GAP = 640.0
_LEAST_SHARE = 1e-3  # of the tail of which a mass is a part: less, and it has lost digits
_LEAST_TAIL = 1e-300
_LEAST_ROWS = 3  # of uniforms in a slice update: level, direction, one angle


@dataclass(frozen=True)
class PiecewiseLinear:
    """A function that is linear between breaks.

    Parameters
    ----------
    breaks
        Increasing positions where one segment ends and the next begins; may be empty.
    slopes, intercepts
        Of each segment, one more than breaks. The function may jump at a break.

    Raises
    ------
    OptionError
        When the counts disagree or the breaks do not increase.

    Examples
    --------
    >>> PiecewiseLinear((0.0,), (0.0, 1.0), (0.0, 0.0)) == PiecewiseLinear.relu()
    True
    """

    breaks: tuple[float, ...]
    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]

    def __post_init__(self) -> None:
        increasing = all(low < high for low, high in itertools.pairwise(self.breaks))
        if not increasing or not len(self.slopes) == len(self.intercepts) == len(self.breaks) + 1:
            raise OptionError(
                f"{len(self.breaks)} breaks, {len(self.slopes)} slopes and {len(self.intercepts)} "
                "intercepts",
                where="PiecewiseLinear",
                advice="Give increasing breaks, and one slope and one intercept more than those.",
            )

    @classmethod
    def of(cls, activation: PiecewisePolynomial) -> PiecewiseLinear:
        """The same function, from what the Gaussian calculus knows of it.

        Parameters
        ----------
        activation
            Of degree one at most.

        Returns
        -------
        PiecewiseLinear
            With a segment for each piece.

        Raises
        ------
        UnsupportedLayerError
            When a piece bends.
        """
        if activation.degree > 1:
            raise UnsupportedLayerError(
                f"activation {activation.name!r} is not linear between its breakpoints",
                where="PiecewiseLinear.of",
                advice="Treat it as a smooth one: update_preactivations_smooth takes any function.",
            )
        slopes = tuple(float(sum(piece[1:])) for piece in activation.pieces)
        return cls(activation.breakpoints, slopes, tuple(float(p[0]) for p in activation.pieces))

    @classmethod
    def identity(cls) -> PiecewiseLinear:
        """``f(z) = z``."""
        return cls((), (1.0,), (0.0,))

    @classmethod
    def relu(cls) -> PiecewiseLinear:
        """``f(z) = max(z, 0)``."""
        return cls.leaky_relu(0.0)

    @classmethod
    def leaky_relu(cls, slope: float = 0.01) -> PiecewiseLinear:
        """``f(z) = z`` to the right of 0, ``slope z`` to the left."""
        return cls((0.0,), (slope, 1.0), (0.0, 0.0))

    @classmethod
    def absolute(cls) -> PiecewiseLinear:
        """``f(z) = |z|``."""
        return cls.leaky_relu(-1.0)

    @classmethod
    def sign(cls) -> PiecewiseLinear:
        """``f(z) = 1`` to the right of 0, -1 to the left."""
        return cls((0.0,), (0.0, 0.0), (-1.0, 1.0))

    @classmethod
    def hardtanh(cls, low: float = -1.0, high: float = 1.0) -> PiecewiseLinear:
        """``f(z) = z``, but no less than `low` and no more than `high`."""
        return cls((low, high), (0.0, 1.0, 0.0), (low, 0.0, high))

    def __call__(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the function elementwise; at a break the segment on its right holds.

        Returns
        -------
        Tensor
            Same shape as `z`.
        """
        value = _line(self.slopes[0], self.intercepts[0], z)
        for position, slope, intercept in zip(
            self.breaks, self.slopes[1:], self.intercepts[1:], strict=True
        ):
            value = torch.where(z < position, value, _line(slope, intercept, z))
        return value


def sample_preactivations(
    activation: PiecewiseLinear,
    prior_mean: Float[Tensor, "*#shape"],
    postactivation: Float[Tensor, "*#shape"],
    preactivation_noise: float | Float[Tensor, "*#shape"],
    postactivation_noise: float | Float[Tensor, "*#shape"],
    uniforms: Float[Tensor, "*shape"],
) -> Float[Tensor, "*shape"]:
    """Exact draws of ``z`` given its prior mean and its noisy image, independent elementwise.

    Parameters
    ----------
    activation
        The function between ``z`` and its image.
    prior_mean, postactivation
        ``m`` and ``x``, of any shape.
    preactivation_noise, postactivation_noise
        Variances ``d_z`` and ``d_x``, positive: numbers, or tensors that broadcast, such as one
        variance for each chain, ``(chains, 1, 1)``.
    uniforms
        In ``[0, 1)``, float64: one for each element, of the shape of the result.

    Returns
    -------
    Tensor
        In the dtype of `prior_mean`, computed in float64. Each element is the quantile of its law
        at its uniform, and increases with it.
    """
    u = uniforms.double().clamp(min=_LEAST_UNIFORM)
    m, x = prior_mean.double().expand(u.shape), postactivation.double().expand(u.shape)
    dz, dx = _wide(preactivation_noise), _wide(postactivation_noise)
    if len(activation.slopes) == 1:
        draws = _draw_segments(activation, m, x, dz, dx, u)
    elif len(activation.slopes) == 2:
        draws = _draw_two_segments(activation, m, x, dz, dx, u)
    else:
        draws = _draw_many_segments(activation, m, x, dz, dx, u)
    return draws.to(prior_mean.dtype)


def segment_log_weights(
    activation: PiecewiseLinear,
    prior_mean: Float[Tensor, "*#shape"],
    postactivation: Float[Tensor, "*#shape"],
    preactivation_noise: float | Float[Tensor, "*#shape"],
    postactivation_noise: float | Float[Tensor, "*#shape"],
) -> Float[Tensor, "segments *shape"]:
    """``log w_j``: log density of ``x``, jointly with ``z`` being in segment ``j``, given ``m``.

    Their softmax is the probability of each segment, their logsumexp ``log p(x | m)``.

    Parameters
    ----------
    activation, prior_mean, postactivation, preactivation_noise, postactivation_noise
        As in `sample_preactivations`.

    Returns
    -------
    Tensor
        float64.
    """
    m, x = torch.broadcast_tensors(prior_mean.double(), postactivation.double())
    dz, dx = _wide(preactivation_noise), _wide(postactivation_noise)
    return torch.stack([s.log_weight for s in _segments(activation, m, x, dz, dx)])


def update_preactivations_smooth(
    function: Callable[[Tensor], Tensor],
    current: Float[Tensor, "*shape"],
    prior_mean: Float[Tensor, "*#shape"],
    postactivation: Float[Tensor, "*#shape"],
    preactivation_noise: float | Float[Tensor, "*#shape"],
    postactivation_noise: float | Float[Tensor, "*#shape"],
    uniforms: Float[Tensor, "rows *shape"],
) -> Float[Tensor, "*shape"]:
    """Move ``z`` elementwise, its law given its prior mean and its noisy image left invariant.

    Elliptical slice sampling (Murray, Adams and MacKay, 2010): an ellipse through the current point
    and a draw from the prior, on it a bracket of angles that shrinks towards the current point
    until a proposal is above a random level of the likelihood. After a fixed number of proposals
    the point stays where it is. That keeps detailed balance: a proposal is reached from the current
    point through the very brackets through which the current point is reached from it, so what
    moves through ``k`` proposals is symmetric for every ``k``, and what is left over is staying.

    Parameters
    ----------
    function
        Elementwise, of float64 tensors; it needs no derivative.
    current
        ``z`` before the move. It is not changed.
    prior_mean, postactivation, preactivation_noise, postactivation_noise
        As in `sample_preactivations`.
    uniforms
        In ``[0, 1)``, float64, ``(2 + proposals, *shape)`` with at least one proposal: the level,
        the direction, and an angle for each proposal. Each shrinks the bracket by a quarter on
        average: 16 proposals serve image noises down to a hundredth of the prior variance.

    Returns
    -------
    Tensor
        In the dtype of `current`, computed in float64.

    Raises
    ------
    OptionError
        When there are too few uniforms.
    """
    if uniforms.shape[0] < _LEAST_ROWS:
        raise OptionError(
            f"{uniforms.shape[0]} rows of uniforms",
            where="update_preactivations_smooth",
            advice="Give a row for the level, one for the direction and one for each proposal.",
        )
    m, x, z = prior_mean.double(), postactivation.double(), current.double()
    dz, dx = _wide(preactivation_noise), _wide(postactivation_noise)
    level, direction, angles = uniforms[0], uniforms[1], uniforms[2:]

    def misfit(point: Tensor) -> Tensor:  # minus the log likelihood
        return (x - function(point)).square() / (2 * dx)

    highest = misfit(z) - torch.log1p(-level)
    deviation = z - m
    other = torch.special.ndtri(direction.clamp(min=_LEAST_UNIFORM)) * dz**0.5
    angle = 2 * math.pi * angles[0]
    low, high = angle - 2 * math.pi, angle
    result, moving = z, torch.ones_like(z, dtype=torch.bool)
    for following in [*angles[1:], None]:
        proposal = m + deviation * torch.cos(angle) + other * torch.sin(angle)
        accepted = moving & (misfit(proposal) <= highest)
        result = torch.where(accepted, proposal, result)
        moving = moving & ~accepted
        if following is None:
            break
        low, high = torch.where(angle < 0, angle, low), torch.where(angle < 0, high, angle)
        angle = low + (high - low) * following
    return result.to(current.dtype)


# --- segments ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Segment:
    """One part of the mixture."""

    lower: float
    upper: float
    mean: Tensor
    std: float | Tensor
    log_weight: Tensor


def _segments(
    activation: PiecewiseLinear, m: Tensor, x: Tensor, dz: float | Tensor, dx: float | Tensor
) -> list[_Segment]:
    """The mixture, elementwise: the formulas at the head of this file."""
    ends = (-math.inf, *activation.breaks, math.inf)
    parts = []
    for (lower, upper), s, c in zip(
        itertools.pairwise(ends), activation.slopes, activation.intercepts, strict=True
    ):
        variance = 1 / (1 / dz + s * s / dx)
        std = variance**0.5
        mean = variance * (m / dz + s * (x - c) / dx)
        nearest = mean.clamp(min=lower, max=upper)
        log_weight = (
            _log_normal(nearest - m, dz)
            + _log_normal(x - (s * nearest + c), dx)
            + log_interval_mills((lower - mean) / std, (upper - mean) / std)
            + _log(std)
        )
        parts.append(_Segment(lower, upper, mean, std, log_weight))
    return parts


def _draw_segments(
    activation: PiecewiseLinear, m: Tensor, x: Tensor, dz: _Number, dx: _Number, u: Tensor
) -> Tensor:
    """Any number of segments, anywhere: slower, and the reference for the faster path."""
    parts = _segments(activation, m, x, dz, dx)
    probability = torch.softmax(torch.stack([part.log_weight for part in parts]), 0)
    cumulative = probability.cumsum(0)
    cumulative = cumulative / cumulative[-1:]  # the last segment with a weight ends at 1 exactly
    chosen = (u >= cumulative).sum(0)
    below = torch.zeros_like(u)
    share = probability[0]
    mean, std = parts[0].mean, torch.as_tensor(parts[0].std, dtype=u.dtype, device=u.device)
    lower, upper = torch.full_like(u, parts[0].lower), torch.full_like(u, parts[0].upper)
    for j, part in enumerate(parts[1:], start=1):
        here = chosen >= j
        below = torch.where(here, cumulative[j - 1], below)
        share = torch.where(here, probability[j], share)
        mean, std = torch.where(here, part.mean, mean), torch.where(here, part.std, std)
        lower, upper = torch.where(here, part.lower, lower), torch.where(here, part.upper, upper)
    remainder = ((u - below) / share).clamp(0, _GREATEST_BELOW_ONE)
    return truncated_normal(mean, std.expand(u.shape), lower, upper, remainder)


def _draw_two_segments(
    activation: PiecewiseLinear, m: Tensor, x: Tensor, dz: _Number, dx: _Number, u: Tensor
) -> Tensor:
    """Two segments: two ``erfc``, one ``exp`` and one ``ndtri`` for each element."""
    # With a_j = (b - mu_j) / sqrt v_j, b the break, the odds of right to left are e Phi(-a_1) /
    # Phi(a_0), where e = sqrt(v_1 / v_0) exp((a_1^2 - a_0^2) / 2), times the ratio of the densities
    # of x on the two sides of b should the function jump there. Below, a_j / sqrt 2 and 2 Phi.
    (b,), (s0, s1), (c0, c1) = activation.breaks, activation.slopes, activation.intercepts
    f0, f1 = s0 * b + c0, s1 * b + c1
    std0, std1 = (1 / (1 / dz + s0 * s0 / dx)) ** 0.5, (1 / (1 / dz + s1 * s1 / dx)) ** 0.5
    from_break = m - b if b else m
    a0 = _scaled_break(from_break, x, f0, s0, std0, dz, dx)
    a1 = _scaled_break(from_break, x, f1, s1, std1, dz, dx)
    gap = (a1 - a0).mul_(a1 + a0).add_(_log(std1 / std0))
    if f0 != f1:
        gap = gap + (x - 0.5 * (f0 + f1)) * ((f1 - f0) / dx)
    odds = gap.clamp_(-_LARGEST_GAP, _LARGEST_GAP).exp_()
    left = torch.special.erfc(-a0)
    total = torch.special.erfc(a1).mul_(odds).add_(left)
    reached = u * total
    goes_left = reached < left
    tail = torch.where(goes_left, reached, (1 - u).mul_(total).div_(odds))
    tail.mul_(0.5).clamp_(max=_GREATEST_BELOW_ONE)
    t = torch.special.ndtri(tail)
    # From the break in standard deviations: never across it.
    to_left = ((t - _SQRT_TWO * a0).clamp_(max=0)).mul_(std0)
    to_right = ((t + _SQRT_TWO * a1).clamp_(max=0)).mul_(std1)
    draws = torch.where(goes_left, to_left, -to_right)
    if b:
        draws += b
    underflown = total < odds.clamp_(min=1).mul_(_LEAST_MASS)
    if bool(underflown.any()):
        m, x, u = m[underflown], x[underflown], u[underflown]
        dz, dx = _at(dz, underflown), _at(dx, underflown)
        draws[underflown] = _draw_segments(activation, m, x, dz, dx, u)
    return draws


def _draw_many_segments(
    activation: PiecewiseLinear, m: Tensor, x: Tensor, dz: _Number, dx: _Number, u: Tensor
) -> Tensor:
    """Any number of segments by ``erfc`` and ``exp``; where these fail, by the other path."""
    # Ends in units of sqrt(2 v) from mu, mirrored where the middle of the segment is on the left,
    # so that erfc(near) - erfc(far) is its mass, doubled.
    ends = (-math.inf, *activation.breaks, math.inf)
    parts, peak = [], torch.full_like(u, -math.inf)
    for (lower, upper), s, c in zip(
        itertools.pairwise(ends), activation.slopes, activation.intercepts, strict=True
    ):
        std = (1 / (1 / dz + s * s / dx)) ** 0.5
        mean = (m / dz + s * (x - c) / dx) * (std * std) if s else m
        low, high = (lower - mean) * (_SQRT_HALF / std), (upper - mean) * (_SQRT_HALF / std)
        mirrored = low + high < 0
        near = torch.special.erfc(torch.where(mirrored, -high, low))
        far = torch.special.erfc(torch.where(mirrored, -low, high))
        density = _log_normal(x - c - s * m if s else x - c, dx + s * s * dz)
        peak = torch.maximum(peak, density)
        parts.append((density, mean, std, mirrored, near, far))
    scales = [torch.exp(part[0] - peak) for part in parts]
    masses = [e * (part[4] - part[5]) for e, part in zip(scales, parts, strict=True)]
    total = sum(masses[1:], start=masses[0])
    reached, left = u * total, (1 - u) * total
    doubtful, before = ~(total >= _LEAST_MASS), torch.zeros_like(u)  # NaN included
    tail, center, reach = torch.zeros_like(u), torch.zeros_like(u), torch.zeros_like(u)
    floor, ceiling = torch.zeros_like(u), torch.zeros_like(u)
    for e, mass, part, lower, upper in zip(scales, masses, parts, ends, ends[1:], strict=False):
        _, mean, std, mirrored, near, far = part
        doubtful |= total < _LEAST_SHARE * e * near  # masses are differences: these lost digits
        here = (reached >= before) & (mass > 0)
        within = torch.where(mirrored, reached - before, left - (total - before - mass))
        tail = torch.where(here, far + within / e, tail)
        center = torch.where(here, mean, center)
        wide = torch.as_tensor(std, dtype=u.dtype, device=u.device)
        reach = torch.where(here, torch.where(mirrored, wide, -wide), reach)
        floor, ceiling = torch.where(here, lower, floor), torch.where(here, upper, ceiling)
        before = before + mass
    t = torch.special.ndtri((0.5 * tail).clamp_(_LEAST_TAIL, _GREATEST_BELOW_ONE))
    draws = torch.clamp(center + reach * t, floor, ceiling)
    if bool(doubtful.any()):
        m, x, u = m[doubtful], x[doubtful], u[doubtful]
        dz, dx = _at(dz, doubtful), _at(dx, doubtful)
        draws[doubtful] = _draw_segments(activation, m, x, dz, dx, u)
    return draws


def _scaled_break(
    from_break: Tensor,
    x: Tensor,
    image: float,
    slope: float,
    std: _Number,
    dz: _Number,
    dx: _Number,
) -> Tensor:
    """``(b - mu) / sqrt(2 v)`` of a segment whose value at the break `b` is `image`."""
    scaled = from_break * (-_SQRT_HALF * std / dz)
    if slope:
        step = x - image if image else x
        scaled = scaled - step * (_SQRT_HALF * slope * std / dx)
    return scaled


# --- numbers that may be tensors -----------------------------------------------------------------


def _line(slope: float, intercept: float, z: Tensor) -> Tensor:
    if slope == 0:
        return torch.full_like(z, intercept)
    value = z if slope == 1 else slope * z
    return value if intercept == 0 else value + intercept


def _log_normal(deviation: Tensor, variance: float | Tensor) -> Tensor:
    return -0.5 * deviation.square() / variance - 0.5 * _log(variance) - _LOG_SQRT_TWO_PI


def _wide(value: float | Tensor) -> float | Tensor:
    return value.double() if isinstance(value, Tensor) else float(value)


def _log(value: float | Tensor) -> float | Tensor:
    return torch.log(value) if isinstance(value, Tensor) else math.log(value)


def _at(value: float | Tensor, marked: Tensor) -> float | Tensor:
    """The marked elements of what may be a plain number or may have to be broadcast."""
    return value.expand(marked.shape)[marked] if isinstance(value, Tensor) else value
