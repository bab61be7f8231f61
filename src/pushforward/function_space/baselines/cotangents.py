"""Directions in the outputs whose squares make a metric's curvature, or a Fisher matrix."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pushforward.errors import DataError, OptionError
from pushforward.function_space.metrics import Metric, check_metric
from pushforward.networks.likelihoods import Categorical, Gaussian
from pushforward.options import choice

__all__ = ["Fisher", "check_fisher", "cotangents", "label_targets"]

Fisher: TypeAlias = Literal["exact", "sampled", "empirical"]


def check_fisher(fisher: str, metric: str) -> None:
    """Refuse an unknown way, or one that a metric does not have.

    Raises
    ------
    OptionError
        For an unknown way or metric, or an empirical Fisher of a metric that is no likelihood's.
    """
    check_metric(metric)
    choice(fisher, "fisher", get_args(Fisher))
    if fisher == "empirical" and metric == "softmax":
        raise OptionError(
            "the metric 'softmax' belongs to no likelihood of targets",
            where="fisher",
            advice="Choose metric='fisher' for labels, 'euclidean' for regression, or "
            "fisher='exact'.",
        )


def label_targets(
    rows: Float[Tensor, "B K"],
    targets: Shaped[Tensor, "B *event"],
    metric: Metric,
    chosen: Shaped[Tensor, " k"],
) -> Tensor:
    """Targets as the chosen outputs see them.

    Parameters
    ----------
    rows
        All outputs.
    targets
        Labels, or for ``euclidean`` a number for every output.
    metric
        Tells which.
    chosen
        Numbers of the outputs that are looked at.

    Returns
    -------
    Tensor
        Positions ``(B,)`` of the labels among the chosen outputs, or ``(B, k)`` numbers.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    DataError
        For targets that are no labels, out of range, or not among the chosen outputs.
    """
    if metric == "euclidean":
        return Gaussian(1.0).check_targets(rows, targets)[:, chosen]
    labels = Categorical().check_targets(rows, targets)
    among = labels.unsqueeze(1) == chosen
    if not bool(among.any(1).all()):
        odd = int(labels[~among.any(1)][0])
        raise DataError(
            f"label {odd} is not among outputs {chosen.tolist()}",
            where="targets",
            advice="Give examples of these outputs only.",
        )
    return among.long().argmax(1)


def cotangents(
    rows: Float[Tensor, "B k"],
    metric: Metric,
    fisher: Fisher,
    *,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "R B k"]:
    """Rows ``u`` with ``sum_r u_r u_r^T`` equal to the curvature of each example.

    Parameters
    ----------
    rows
        Outputs that are looked at.
    metric
        Whose curvature ``H``.
    fisher
        ``exact``: the columns of a factor of ``H``, one for each output. ``sampled``: one row whose
        outer product has the mean ``H``: the score of a drawn label, or for ``euclidean`` and
        ``softmax`` the factor times Gaussian noise. ``empirical``: the score of the actual target.
    targets
        From `label_targets`, for ``empirical``.
    generator
        For ``sampled``.

    Returns
    -------
    Tensor
        ``(R, B, k)``, with R the number of outputs or one.
    """
    p = rows.softmax(-1)
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    if fisher == "empirical":
        assert targets is not None
        score = rows - targets if metric == "euclidean" else p - eye[targets]
        return score.unsqueeze(0)
    if fisher == "sampled":
        assert generator is not None
        if metric in ("kl", "fisher"):
            drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
            return (p - eye[drawn]).unsqueeze(0)
        noise = torch.empty_like(rows).normal_(generator=generator)
        if metric == "softmax":
            noise = torch.einsum("bi,bij->bj", noise, _symmetric_factor(p))
        return noise.unsqueeze(0)
    if metric == "euclidean":
        return eye.unsqueeze(1).expand(-1, len(rows), -1)
    if metric == "softmax":
        return _symmetric_factor(p).transpose(0, 1)
    # diag p - p p^T = F F^T with F = (I - p 1^T) diag sqrt p.
    return ((eye - p.unsqueeze(1)) * p.sqrt().unsqueeze(2)).transpose(0, 1)


def _symmetric_factor(p: Float[Tensor, "B k"]) -> Float[Tensor, "B k k"]:
    """The Jacobian of softmax, whose square is the curvature of ``softmax``."""
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
