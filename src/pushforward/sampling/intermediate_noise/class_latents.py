"""Noisy scores of classes of which the label's is the largest: the latent scores of a classifier.

With ``Z_c ~ N(F_c, d)`` independent and the label ``y = argmax_c Z_c`` known (multinomial probit),
the scores are a Gaussian restricted to the cone where ``Z_y`` exceeds all others. Two blocks of it
are drawn exactly, one given the other: ``Z_y`` beyond the largest of the others, and then all the
others, which are independent given ``Z_y``, below it. Piccioli, Troiani and Zdeborova, *Gibbs
sampling the posterior of neural networks* (2023).

The cone does not change when all scores move by the same amount, so the mean of the residuals
``Z_c - F_c`` is not restricted at all: it is ``N(0, d / C)``, independent of the differences. The
residual of a single score has another law, and a mean that is not zero. Two blocks in turn move the
mean of the residuals only slowly where the label is unlikely; a draw of its own costs next to
nothing.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pushforward.gaussians.truncated import truncated_normal

__all__ = ["sample_class_latents"]

_LEAST_UNIFORM = 2.0**-54  # the middle of the first cell of the grid on which uniforms lie


def sample_class_latents(
    means: Float[Tensor, "chains n classes"],
    noise: float | Float[Tensor, "#chains #n 1"],
    labels: Int[Tensor, " n"] | Int[Tensor, "#chains n"],
    uniforms: Float[Tensor, "chains n classes"],
    current: Float[Tensor, "chains n classes"],
    shift_uniforms: Float[Tensor, "chains n"] | None = None,
) -> Float[Tensor, "chains n classes"]:
    """Move the scores, their law given the labels left invariant.

    Parameters
    ----------
    means
        ``F``, the scores without noise.
    noise
        Variance ``d``, positive: a number, or one for each chain, ``(chains, 1, 1)``.
    labels
        From 0 to ``classes - 1``; the same for all chains, or one row for each.
    uniforms
        In ``[0, 1)``, float64, one for each score.
    current
        Scores before the move; not changed. Of each example only those of the other classes
        matter, and any will do to start with, such as zeros.
    shift_uniforms
        One more for each example, with which the mean of its residuals is drawn anew. Without them
        it is left as it comes, which is valid too but mixes more slowly.

    Returns
    -------
    Tensor
        In the dtype of `means`, computed in float64; no score exceeds that of the label.
    """
    center = means.double()
    std = (noise.double() if isinstance(noise, Tensor) else noise) ** 0.5
    at_label = labels.long()[..., None].expand(*means.shape[:2], 1)
    rival = current.double().scatter(-1, at_label, -math.inf).amax(-1, keepdim=True)
    largest = truncated_normal(
        center.gather(-1, at_label), std, rival, math.inf, uniforms.gather(-1, at_label)
    )
    scores = truncated_normal(center, std, -math.inf, largest, uniforms)
    scores = scores.scatter(-1, at_label, largest)
    if shift_uniforms is not None:
        u = shift_uniforms.double().clamp(min=_LEAST_UNIFORM)[..., None]
        fresh = torch.special.ndtri(u) * std / means.shape[-1] ** 0.5
        scores = scores + (fresh - (scores - center).mean(-1, keepdim=True))
    return scores.to(means.dtype)
