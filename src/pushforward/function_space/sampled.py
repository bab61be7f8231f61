"""The gated linear network by sampling: inputs from their moments, gates example by example.

Unbiased for the closed form of `pushforward.function_space.gated` in the euclidean metric, and
usable with every metric and where the covariance of a layer would be too large. The published
sampler shares one draw of the gates among all inputs of a batch, which triples the noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.function_space.chain import affine_changes
from pushforward.function_space.gated import Gates, through_origin
from pushforward.gaussians.activations import Activation, PiecewisePolynomial
from pushforward.networks.graph import NetworkGraph

__all__ = ["sampled_outputs"]


def sampled_outputs(
    reference: NetworkGraph,
    other: NetworkGraph,
    rows: Float[Tensor, "c s d"],
    gates: Sequence[Gates],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "c s K"], Float[Tensor, "c s K"]]:
    """Outputs of the reference and their changes under random gates.

    Parameters
    ----------
    reference, other
        The two networks.
    rows
        Inputs for each component.
    gates
        Slopes of each stage.
    generator
        Of the gates.

    Returns
    -------
    outputs : Tensor
        ``(c, s, K)``.
    changes : Tensor
        ``(c, s, K)``, differentiable in the weights of `other`.
    """
    stages, output = affine_changes(reference, other)
    values, changes = rows, torch.zeros_like(rows)
    for stage, pair, slopes in zip(reference.stages, stages, gates, strict=True):
        changes = (
            pair.difference.apply(values) + pair.change_bias + pair.other.linear.apply(changes)
        )
        before = pair.reference.apply(values)
        uniforms = torch.rand(
            before.shape, generator=generator, dtype=before.dtype, device=before.device
        )
        multiplier, values = torch.ones_like(before), before.clone()
        for group in stage.groups:
            if group.carried:
                continue
            units = group.units
            mean, square = slopes.mean[:, units], slopes.square[:, units]
            drawn = _draw(group.activation, mean, square, uniforms[..., units])
            multiplier[..., units] = drawn
            inside = before[..., units]
            values[..., units] = (
                drawn * inside if through_origin(group.activation) else group.activation(inside)
            )
        changes = multiplier * changes
    last = output.difference.apply(values) + output.change_bias + output.other.linear.apply(changes)
    return output.reference.apply(values), last


def _draw(
    activation: Activation,
    mean: Float[Tensor, "c n"],
    square: Float[Tensor, "c n"],
    uniforms: Float[Tensor, "c s n"],
) -> Float[Tensor, "c s n"]:
    """Slopes with the mean and mean square of the data: two values, those there are if two.

    Returns
    -------
    Tensor
        Of the shape of `uniforms`.
    """
    mean, square = mean.unsqueeze(1), square.unsqueeze(1)
    values = _two_slopes(activation)
    if values is not None:
        low, high = values
        return torch.where(uniforms < (mean - low) / (high - low), high, low).to(uniforms)
    spread = (square - mean.square()).clamp(min=0).sqrt()
    return mean + torch.where(uniforms < 0.5, spread, -spread)


def _two_slopes(activation: Activation) -> tuple[float, float] | None:
    if not isinstance(activation, PiecewisePolynomial) or activation.degree > 1:
        return None
    slopes = sorted({piece[1] if len(piece) > 1 else 0.0 for piece in activation.pieces})
    return (slopes[0], slopes[1]) if len(slopes) == 2 else None
