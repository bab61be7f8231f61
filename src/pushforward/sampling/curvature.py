"""How narrow a potential is: largest curvature and trace, from products with its Hessian."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.sampling.potential import Potential

__all__ = ["curvature_traces", "largest_curvature"]

_ROUNDS = 12


def largest_curvature(
    potential: Potential,
    points: Float[Tensor, "chains P"],
    directions: Float[Tensor, "chains P"],
    *,
    scale: Float[Tensor, " P"] | None = None,
    rounds: int = _ROUNDS,
) -> Float[Tensor, " chains"]:
    """Largest eigenvalue in size of the Hessian of ``U`` at each point, by power iteration.

    Parameters
    ----------
    potential
        ``U``, over all of its examples.
    points
        ``(chains, P)``.
    directions
        ``(chains, P)``: where the iteration begins, not zero.
    scale
        ``(P,)``, positive: in the units ``w / scale``. Default: in those of the parameters.
    rounds
        Products to spend at each point.

    Returns
    -------
    Tensor
        ``(chains,)`` float64, from below; NaN where a product is not finite.
    """
    unit = torch.ones_like(points[0]) if scale is None else scale
    heading = _unit(directions)
    largest = torch.zeros(len(points), dtype=torch.float64, device=points.device)
    for _ in range(rounds):
        image = unit * potential.curvature_product(points, unit * heading)
        largest = image.norm(dim=1).double()
        heading = _unit(image)
    return largest


def curvature_traces(
    potential: Potential,
    points: Float[Tensor, "chains P"],
    probes: Float[Tensor, "chains P"],
    *,
    scale: Float[Tensor, " P"] | None = None,
) -> Float[Tensor, " chains"]:
    """``z . H z`` of each row, whose mean over random signs ``z`` is the trace (Hutchinson).

    Parameters
    ----------
    potential
        ``U``, over all of its examples.
    points
        ``(chains, P)``.
    probes
        ``(chains, P)``: independent entries of mean zero and variance one.
    scale
        As in `largest_curvature`.

    Returns
    -------
    Tensor
        ``(chains,)`` float64.
    """
    unit = torch.ones_like(points[0]) if scale is None else scale
    image = potential.curvature_product(points, unit * probes)
    return (unit * probes * image).sum(1, dtype=torch.float64)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-30)
