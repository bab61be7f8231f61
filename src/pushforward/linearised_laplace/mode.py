"""The mode of the linear model: Newton's method whose systems are solved by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.linalg.conjugate_gradients import Product, advance, begin
from pushforward.linearised_laplace.linear_model import LinearModel, Portion, Slope

__all__ = ["Mode", "find_mode", "line_search"]

_STEPS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01, 1e-3)
_MAX_NEWTON = 50
_HESSIAN_EXAMPLES, _LARGEST_SHARE = 4096, 8  # a Newton step needs no better Hessian
_FORCING = 0.05  # of the gain of a Newton step that may be left undone


@dataclass(frozen=True, eq=False)
class Mode:
    """Where the posterior of the linear model is largest.

    Parameters
    ----------
    point
        ``(P,)``, in the coordinates of the prior.
    loss
        Negative log-likelihood there.
    decrement
        Newton's: twice what the objective can still fall, an upper bound of the squared distance
        to the optimum in the norm of the posterior precision.
    passes
        Over the data.
    """

    point: Float[Tensor, " P"]
    loss: float
    decrement: float
    passes: float


def find_mode(
    linear: LinearModel,
    start: Float[Tensor, " P"],
    precondition: Product,
    *,
    tolerance: float,
    max_passes: int = 2000,
) -> Mode:
    """Minimise ``-log p(y | h(w)) + w . diag(precision) w / 2``.

    The objective is convex. Every Newton system is solved only as well as the step deserves, with
    the Hessian of a part of the examples when there are many (the gradient is that of all), and a
    line search over a fixed list of steps costs a single pass.

    Parameters
    ----------
    linear
        The linear model with its prior.
    start
        ``(P,)``, where to begin: the mode for nearby precisions, say.
    precondition
        Approximate inverse of ``M' + diag(precision)``.
    tolerance
        Wanted Newton decrement, in nats: 1e-2 is far below what one draw of the posterior moves.
    max_passes
        Where to give up.

    Returns
    -------
    Mode
        Whose `decrement` says whether it got there.
    """
    precision = linear.prior.diagonal(start.dtype)
    point, passes = start, 0.0
    here = linear.slope(point)
    count = len(linear.examples)
    wanted = max(_HESSIAN_EXAMPLES, count // _LARGEST_SHARE)
    decrement = torch.inf
    for _ in range(_MAX_NEWTON):
        portion = linear.portion(here, wanted)
        direction, decrement, spent = _newton_direction(
            linear, here, precision * point, precondition, tolerance, portion
        )
        share = 1.0 if portion is None else len(portion.indices) / count
        passes += spent * share + 1
        if decrement <= tolerance or passes >= max_passes:
            break
        passes += 1
        ahead = line_search(linear, point, direction)
        if ahead is point:
            break  # rounding is all that is left
        point = ahead
        here = linear.slope(point)
    return Mode(point, float(here.loss), float(decrement), passes)


def line_search(
    linear: LinearModel, point: Float[Tensor, " P"], direction: Float[Tensor, " P"]
) -> Float[Tensor, " P"]:
    """The best of a fixed list of steps, for one pass over the data.

    Parameters
    ----------
    linear
        The linear model with its prior.
    point, direction
        ``(P,)``.

    Returns
    -------
    Tensor
        ``(P,)``; `point` itself when no step improves on it.
    """
    steps = torch.tensor((0.0, *_STEPS), dtype=torch.float64, device=point.device)
    objectives = linear.losses_along(point, direction, steps)
    weight, x, d = linear.prior.diagonal(), point.double(), direction.double()
    squares = [(weight * a * b).sum() for a, b in ((x, x), (x, d), (d, d))]
    objectives = objectives + 0.5 * squares[0] + steps * squares[1] + 0.5 * steps**2 * squares[2]
    best = int(objectives.argmin())
    return point + float(steps[best]) * direction if best else point


def _newton_direction(
    linear: LinearModel,
    here: Slope,
    pull: Tensor,
    precondition: Product,
    tolerance: float,
    portion: Portion | None,
) -> tuple[Tensor, float, int]:
    """The solution of Newton's system, to a twentieth of what it gains; `pull` is the prior's.

    Returns
    -------
    tuple
        Direction ``(P,)``, decrement, passes over the portion.
    """
    gradient = here.gradient + pull
    precision = linear.prior.diagonal(gradient.dtype)

    def product(vectors: Tensor) -> Tensor:
        return linear.product_at(here.outputs, vectors, portion) + precision * vectors

    right = -gradient[None]
    # From zero the first product is that with zero: a pass that need not be made.
    state = begin(lambda v: torch.zeros_like(v), right, torch.zeros_like(right), precondition)
    decrement = 0.0
    for _ in range(200):
        if not bool(state.directions.any()):
            break
        state = advance(state, product, precondition)
        decrement = float(-(state.solution[0].double() @ gradient.double()))
        remaining = float(state.squared_error[0])
        if remaining <= max(_FORCING * decrement, 0.1 * tolerance) and state.steps > 1:
            break
    return state.solution[0], decrement, state.steps
