"""Gamma variables by inversion: one uniform number each, whatever it is."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["gamma_quantile"]

_STEPS = 10
_LEAST = 1e-300
_LARGEST_MOVE = 1.0


def gamma_quantile(
    shape: Float[Tensor, "*#k"], uniforms: Float[Tensor, "*#k"]
) -> Float[Tensor, "*k"]:
    """Quantiles of the Gamma law with rate 1.

    Parameters
    ----------
    shape
        At least 1/2.
    uniforms
        In ``[0, 1)``, float64.

    Returns
    -------
    Tensor
        Where the distribution function reaches them, float64, to about 1e-10 of itself.

    Notes
    -----
    Newton's iteration for the logarithm of the quantile, on the logarithm of the smaller of the two
    tails, from Wilson and Hilferty's approximation. The number of steps is fixed, so that a draw
    depends on nothing but its own uniform.

    Examples
    --------
    >>> import torch
    >>> half = torch.tensor(0.5, dtype=torch.float64)
    >>> round(float(gamma_quantile(torch.ones_like(half), half)), 9)  # log 2
    0.693147181
    """
    shape, uniforms = torch.broadcast_tensors(shape.double(), uniforms.double())
    uniforms = uniforms.clamp(_LEAST, 1 - 2.0**-53)
    normal = torch.special.ndtri(uniforms)
    ninth = 1 / (9 * shape)
    bulk = shape * (1 - ninth + normal * ninth.sqrt()).clamp(min=0) ** 3
    log_gamma = torch.lgamma(shape + 1)
    tail = (uniforms.log() + log_gamma) / shape  # the law near zero
    logs = torch.where(bulk > 0.1 * shape, bulk.clamp(min=_LEAST).log(), tail)
    upper = uniforms > 0.5
    goal = torch.where(upper, 1 - uniforms, uniforms)
    for _ in range(_STEPS):
        value = logs.exp()
        reached = torch.where(
            upper, torch.special.gammaincc(shape, value), torch.special.gammainc(shape, value)
        ).clamp(min=_LEAST)
        # The logarithm of either tail probability is concave in the logarithm of the value.
        slope = ((shape * logs - value - log_gamma).exp() * shape / reached).clamp(min=_LEAST)
        step = (reached / goal).log() / slope
        logs = logs - torch.where(upper, -step, step).clamp(-_LARGEST_MOVE, _LARGEST_MOVE)
    return logs.exp()
