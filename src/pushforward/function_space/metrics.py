"""How two rows of outputs are compared: the discrepancies that a distance averages."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from pushforward.errors import ShapeError
from pushforward.options import choice

__all__ = [
    "Metric",
    "check_axes",
    "check_metric",
    "check_probabilities",
    "discrepancy",
    "output_curvature",
]

Metric: TypeAlias = Literal["euclidean", "softmax", "kl", "fisher"]


def check_metric(metric: str) -> None:
    """Refuse a metric that is none.

    Raises
    ------
    OptionError
        If its name is unknown.
    """
    choice(metric, "metric", get_args(Metric))


def check_probabilities(count: int, metric: str) -> None:
    """Refuse probabilities of a single output: they are always 1, and every distance would be 0.

    Raises
    ------
    ShapeError
        When there are fewer than two outputs, unless the metric is euclidean.
    """
    if metric != "euclidean" and count < 2:
        raise ShapeError(
            f"the metric {metric!r} compares probabilities of several outputs, and there is "
            f"{count or 'none'}",
            where="metric",
            advice='Use "euclidean"; a single logit becomes two with a second one that is 0.',
        )


def check_axes(shape: tuple[int, ...], metric: str) -> None:
    """Refuse probabilities of outputs that are no row: over which axis they are is not known.

    Parameters
    ----------
    shape
        Of the outputs of one example.
    metric
        Which.

    Raises
    ------
    ShapeError
        When there are several axes, unless the metric is euclidean.
    """
    if metric != "euclidean" and len(shape) > 1:
        raise ShapeError(
            f"one example has outputs of shape {shape}, and probabilities would be taken over all "
            "of them together",
            where="metric",
            advice='Use "euclidean", or wrap the network so that it returns one row of logits for '
            "each example.",
        )


def discrepancy(
    old: Float[Tensor, "*B K"], new: Float[Tensor, "*B K"], metric: Metric
) -> Float[Tensor, "*B"]:
    """Discrepancy of each row (the functions rho of arXiv 2302.03519).

    With ``p = softmax z``, old outputs ``z0`` and new ones ``z1``:

    - ``euclidean``: ``|z1 - z0|^2 / 2``;
    - ``softmax``: ``|p1 - p0|^2 / 2``;
    - ``kl``: ``KL(p0 || p1)``, in nats;
    - ``fisher``: ``(z1 - z0)^T (diag p0 - p0 p0^T) (z1 - z0) / 2``, to which KL tends for small
      differences.

    Parameters
    ----------
    old, new
        Outputs; logits for all but the first.
    metric
        Which.

    Returns
    -------
    Tensor
        One number a row, 0 where the rows agree, differentiable in `new`.

    Raises
    ------
    ShapeError
        When a metric of probabilities gets a single output.
    """
    check_metric(metric)
    if metric == "euclidean":
        return (new - old).square().sum(-1) / 2
    check_probabilities(old.shape[-1], metric)
    if metric == "softmax":
        return (new.softmax(-1) - old.softmax(-1)).square().sum(-1) / 2
    if metric == "fisher":
        p, change = old.softmax(-1), new - old
        centred = change - (p * change).sum(-1, keepdim=True)
        return (p * centred.square()).sum(-1) / 2
    return kl_div(
        log_softmax(new, -1), log_softmax(old, -1), reduction="none", log_target=True
    ).sum(-1)


def output_curvature(rows: Float[Tensor, "*B K"], metric: Metric) -> Float[Tensor, "*B K K"]:
    """Curvature of the discrepancy in the new outputs where they equal the old ones.

    Parameters
    ----------
    rows
        Outputs.
    metric
        Which.

    Returns
    -------
    Tensor
        A positive semidefinite matrix for each row: the identity, ``S^T S`` with the Jacobian
        ``S = diag p - p p^T`` of softmax, or ``S`` itself for both ``kl`` and ``fisher``.
    """
    check_metric(metric)
    if metric == "euclidean":
        eye = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
        return eye.expand(*rows.shape, rows.shape[-1])
    p = rows.softmax(-1)
    jacobian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    return jacobian @ jacobian if metric == "softmax" else jacobian
