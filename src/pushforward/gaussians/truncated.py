"""Gaussians restricted to an interval: its probability, and draws by inversion, exact in the tails.

Everything is a function of the interval's ends in standard deviations, ``l < u``. Three forms cover
all of them, none subtracting two nearly equal numbers:

- *body*: probabilities by ``erfc`` on the side where they are small, inverted by
  `torch.special.ndtri`;
- *far tail*, where those underflow: with ``Q`` the upper tail, ``log Q(a) - log Q(a + s)`` is
  convex and increasing in the excess ``s``, so Newton's iteration for it converges from every
  start; the scaled function ``erfcx`` keeps it free of ``a^2``;
- *narrow interval*: the density hardly varies, and a Gauss-Legendre rule is exact to rounding.

`torch.special.ndtr` is avoided on purpose: computed as ``(1 + erf) / 2`` it loses all digits below
-8.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.gaussians.hermite import gauss_legendre

__all__ = ["log_interval_mills", "log_interval_probability", "truncated_normal"]

_SQRT_HALF = math.sqrt(0.5)
_SQRT_HALF_PI = math.sqrt(0.5 * math.pi)
_LOG_SQRT_TWO_PI = 0.5 * math.log(2 * math.pi)
# Q(30) = 5e-198 leaves room for the smallest uniform; erfc itself is good to 37 deviations.
_FAR = 30.0
_TAIL_STEPS = 5
# An interval is narrow when the logarithm of the density varies over it by less than this.
_NARROW = 0.5
_NARROW_NODES = 10
_NARROW_STEPS = 5
# Uniforms lie on a grid of step 2^-53: zero stands for the middle of its first cell.
_LEAST_UNIFORM = 2.0**-54
_GREATEST_BELOW_ONE = 1 - 2.0**-53


def log_interval_probability(
    lower: Float[Tensor, "*#k"], upper: Float[Tensor, "*#k"]
) -> Float[Tensor, "*k"]:
    """``log[Phi(upper) - Phi(lower)]``, ``Phi`` the standard normal distribution function.

    Parameters
    ----------
    lower, upper
        Ends of the interval, ``lower <= upper``, any of them infinite. They broadcast.

    Returns
    -------
    Tensor
        In the dtype of the arguments, computed in float64; minus infinity for an empty interval.
    """
    low, high = torch.broadcast_tensors(lower.double(), upper.double())
    nearest = torch.clamp(torch.zeros_like(low), low, high)
    result = log_interval_mills(low, high) - 0.5 * nearest.square() - _LOG_SQRT_TWO_PI
    return result.to(torch.promote_types(lower.dtype, upper.dtype))


def log_interval_mills(
    lower: Float[Tensor, "*#k"], upper: Float[Tensor, "*#k"]
) -> Float[Tensor, "*k"]:
    """Logarithm of an interval's probability over the normal density at its point nearest to 0.

    For ``(a, inf)`` with ``a > 0`` this is Mills' ratio. It stays of moderate size where
    probability and density both underflow, so weights that multiply a probability by the inverse of
    such a density keep their digits.

    Parameters
    ----------
    lower, upper
        As in `log_interval_probability`.

    Returns
    -------
    Tensor
        In the dtype of the arguments, computed in float64.
    """
    low, high = torch.broadcast_tensors(lower.double(), upper.double())
    near, width, flipped = _to_the_right(low, high, high - low)
    far = torch.where(flipped, -low, high)
    below, above = -near * _SQRT_HALF, far * _SQRT_HALF
    missing = 0.5 * (torch.special.erfc(below) + torch.special.erfc(above))
    result = torch.log1p(-missing)
    half = missing > 0.5  # or more is missing: what is there has more digits
    inside = 0.5 * (torch.special.erf(below[half]) + torch.special.erf(above[half]))
    result[half] = torch.log(inside)
    result += _LOG_SQRT_TWO_PI
    beside = near > 0
    result[beside] = torch.log(_mills(near[beside], width[beside]))
    return result.to(torch.promote_types(lower.dtype, upper.dtype))


def truncated_normal(
    mean: Float[Tensor, "*#k"],
    std: float | Float[Tensor, "*#k"],
    lower: float | Float[Tensor, "*#k"],
    upper: float | Float[Tensor, "*#k"],
    uniforms: Float[Tensor, "*k"],
) -> Float[Tensor, "*k"]:
    """Draws from ``N(mean, std^2)`` restricted to ``(lower, upper)``, by inversion.

    The draw increases with its uniform: it is the quantile of the restricted law. There is no
    rejection, so draws with common uniforms can be compared. An end that is a plain infinite number
    rather than a tensor costs nothing.

    Parameters
    ----------
    mean, std
        Of the Gaussian before it is restricted; ``std > 0``.
    lower, upper
        Ends of the interval, ``lower < upper``, any of them infinite.
    uniforms
        In ``[0, 1)``, one for each draw, float64 for the sake of the tails.

    Returns
    -------
    Tensor
        Within the closed interval, in the dtype of `mean`; computed in float64, the quantiles
        correct to about 1e-13 standard deviations or 1e-10 relative to the distance from the
        nearest end, whichever is more.
    """
    u = uniforms.double().clamp(min=_LEAST_UNIFORM)
    center = mean.double()
    scale, low, high = _wide(std), _wide(lower), _wide(upper)
    if _is_infinite(low) and _is_infinite(high):
        draws = center + scale * torch.special.ndtri(u)
    elif _is_infinite(high):
        draws = _beyond(center, scale, low, u, 1.0)
    elif _is_infinite(low):
        draws = _beyond(center, scale, high, u, -1.0)
    else:
        draws = _between(center, scale, low, high, u)
    return draws.to(mean.dtype)


def _wide(value: float | Tensor) -> float | Tensor:
    return value.double() if isinstance(value, Tensor) else float(value)


def _is_infinite(bound: float | Tensor) -> bool:
    return isinstance(bound, float) and math.isinf(bound)


def _pick(value: Tensor, marked: Tensor) -> Tensor:
    """The marked elements of a tensor that may have to be broadcast."""
    return value.expand(marked.shape)[marked]


def _at(value: float | Tensor, marked: Tensor) -> float | Tensor:
    return _pick(value, marked) if isinstance(value, Tensor) else value


def _beyond(
    mean: Tensor, std: float | Tensor, bound: float | Tensor, u: Tensor, side: float
) -> Tensor:
    """One-sided: beyond `bound` to the right (`side` 1) or to the left (-1)."""
    a = (bound - mean) * (side / std)  # to the right of a, in a picture that `side` mirrors
    # Share of the mass from the bound to the draw, and from the draw to infinity.
    near, beyond = (u, 1 - u) if side > 0 else (1 - u, u)
    small = 0.5 * torch.special.erfc(a.abs() * _SQRT_HALF)
    left = a < 0
    tail = beyond * torch.where(left, 1 - small, small)
    head = torch.where(left, small, 1.0) + near * (1 - small)  # of use on the left only
    use_head = head < 0.5
    t = torch.special.ndtri(torch.where(use_head, head, tail))
    t = torch.maximum(torch.where(use_head, t, -t), a)
    draws = mean + (side * std) * t
    far = a > _FAR
    if bool(far.any()):
        far = far.expand(draws.shape)
        excess = _tail_excess(_pick(a, far), -torch.log(beyond[far]))
        draws[far] = _at(bound, far) + side * _at(std, far) * excess
    if side > 0:
        return draws.clamp(min=bound)
    return draws.clamp(max=bound)


def _between(
    mean: Tensor, std: float | Tensor, lower: float | Tensor, upper: float | Tensor, u: Tensor
) -> Tensor:
    """Two-sided: the ends are any numbers, infinite elements included."""
    low, high, width = (lower - mean) / std, (upper - mean) / std, (upper - lower) / std
    below = 0.5 * torch.special.erfc(low.abs() * _SQRT_HALF)
    above = 0.5 * torch.special.erfc(high.abs() * _SQRT_HALF)
    on_right, on_left = low > 0, high < 0
    mass = torch.where(on_right, below - above, 1 - below - above)
    mass = torch.where(on_left, above - below, mass)
    head = below + u * mass  # from minus infinity, wrong on the right
    tail = above + (1 - u) * mass  # to infinity, wrong on the left
    use_head = on_left | (~on_right & (head < 0.5))
    t = torch.special.ndtri(torch.where(use_head, head, tail))
    draws = mean + std * torch.where(use_head, t, -t)

    distance = torch.maximum(low, -high).clamp(min=0)
    hard = (distance > _FAR) | (width * (distance + width) < _NARROW)
    if bool(hard.any()):
        hard = hard.expand(draws.shape)
        near, span, flipped = _to_the_right(_pick(low, hard), _pick(high, hard), _at(width, hard))
        v = u[hard]
        shares = torch.where(flipped, 1 - v, v), torch.where(flipped, v, 1 - v)
        excess = _interval_excess(near, span, *shares) * _at(std, hard)
        draws[hard] = torch.where(flipped, _at(upper, hard) - excess, _at(lower, hard) + excess)
    return torch.clamp(draws, *_both(lower, upper, draws))


def _both(lower: float | Tensor, upper: float | Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    low, high = (like.new_tensor(b) if isinstance(b, float) else b for b in (lower, upper))
    return low, high


def _to_the_right(
    low: Tensor, high: Tensor, width: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """The nearer end, the width, and whether the interval was mirrored to have its middle right."""
    # The width is an argument of its own: a narrow interval far out loses it by subtraction.
    flipped = low + high < 0
    near = torch.where(flipped, -high, low)
    return near, torch.as_tensor(width).expand(near.shape), flipped


def _mills(near: Tensor, width: Tensor) -> Tensor:
    """Integral of ``exp(-near t - t^2 / 2)`` over ``0 < t < width``, for ``near >= 0``."""
    value = _endless_mills(near) - _behind(near, width)
    narrow = width * (near + width) < _NARROW
    if bool(narrow.any()):
        value[narrow] = _narrow_integral(near[narrow], width[narrow])
    return value


def _endless_mills(near: Tensor) -> Tensor:
    """Mills' ratio: the integral of `_mills` to infinity."""
    return _SQRT_HALF_PI * torch.special.erfcx(near * _SQRT_HALF)


def _behind(near: Tensor, width: Tensor) -> Tensor:
    """The integral of `_mills` from `width` to infinity."""
    rest = torch.exp(-width * (near + 0.5 * width)) * _endless_mills(near + width)
    return torch.where(torch.isinf(width), 0.0, rest)  # 0 * inf is no number


def _narrow_integral(near: Tensor, width: Tensor) -> Tensor:
    """The integral of `_mills` over a narrow interval; `near` may be slightly negative."""
    nodes, weights = gauss_legendre(_NARROW_NODES, like=width)
    t = 0.5 * width[..., None] * (1 + nodes)
    return 0.5 * width * (torch.exp(-t * (near[..., None] + 0.5 * t)) @ weights)


def _tail_excess(a: Tensor, y: Tensor) -> Tensor:
    """The ``s`` with ``log Q(a) - log Q(a + s) = y``, for ``a > 0`` and ``y >= 0``."""
    s = 2 * y / (torch.sqrt(a * a + 2 * y) + a)  # exact for Q(t) ~ exp(-t^2 / 2)
    at_bound = torch.special.erfcx(a * _SQRT_HALF)
    for _ in range(_TAIL_STEPS):
        scaled = torch.special.erfcx((a + s) * _SQRT_HALF)
        miss = torch.log(at_bound / scaled) + s * (a + 0.5 * s) - y
        s = (s - miss * _SQRT_HALF_PI * scaled).clamp(min=0)  # Q over the density is the slope
    return s


def _interval_excess(near: Tensor, width: Tensor, share: Tensor, rest: Tensor) -> Tensor:
    """How far the first `share` of the mass of an interval, far out or narrow, reaches."""
    # `rest` is one minus `share`, to all digits.
    narrow = width * (near.abs() + width) < _NARROW
    ahead = near.clamp(min=1.0)
    whole = _endless_mills(ahead)
    inside, behind = _mills(ahead, width) / whole, _behind(ahead, width) / whole
    gone = share * inside
    y = torch.where(gone < 0.5, -torch.log1p(-gone), -torch.log(rest + share * behind))
    excess = _tail_excess(ahead, y)
    if bool(narrow.any()):
        start, target = near[narrow], share[narrow]
        s = target * width[narrow]
        target = target * _narrow_integral(start, width[narrow])
        for _ in range(_NARROW_STEPS):
            miss = _narrow_integral(start, s) - target
            s = s - miss * torch.exp(s * (start + 0.5 * s))
        excess[narrow] = s
    return torch.minimum(excess, width)
