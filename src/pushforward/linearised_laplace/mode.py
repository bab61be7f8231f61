"""The mode of the linear model: Newton's method whose systems are solved by conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.linalg.conjugate_gradients import Product, advance, begin
from pushforward.linearised_laplace.linear_model import LinearModel

__all__ = ["Mode", "find_mode"]

_STEPS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01, 1e-3)
_MAX_NEWTON = 50


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
    passes: int


def find_mode(
    linear: LinearModel,
    start: Float[Tensor, " P"],
    precondition: Product,
    *,
    tolerance: float,
    max_passes: int = 2000,
) -> Mode:
    """Minimise ``-log p(y | h(w)) + w . diag(precision) w / 2``.

    The objective is convex. Every Newton system is solved only as well as the step deserves, and a
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
    point, passes = start, 0
    steps = torch.tensor(_STEPS, dtype=torch.float64, device=start.device)
    loss, gradient = linear.loss_and_gradient(point)
    decrement = torch.inf
    for _ in range(_MAX_NEWTON):
        gradient = gradient + precision * point
        direction, decrement, spent = _newton_direction(
            linear, point, gradient, precondition, tolerance
        )
        passes += spent + 1
        if decrement <= tolerance or passes >= max_passes:
            break
        losses = linear.losses_along(point, direction, steps)
        quadratic = 0.5 * _energies(precision, point, direction, steps)
        objectives = losses + quadratic
        before = float(loss) + 0.5 * float((precision * point.double().square()).sum())
        best = int(objectives.argmin())
        passes += 1
        if not float(objectives[best]) < before:
            break  # rounding is all that is left
        point = point + float(steps[best]) * direction
        loss, gradient = linear.loss_and_gradient(point)
    return Mode(point, float(loss), float(decrement), passes)


def _newton_direction(
    linear: LinearModel,
    point: Tensor,
    gradient: Tensor,
    precondition: Product,
    tolerance: float,
) -> tuple[Tensor, float, int]:
    """The solution of Newton's system, to a tenth of what it gains.

    Returns
    -------
    tuple
        Direction ``(P,)``, decrement, passes.
    """
    precision = linear.prior.diagonal(point.dtype)

    def product(vectors: Tensor) -> Tensor:
        return linear.product_at(point, vectors) + precision * vectors

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
        if remaining <= max(0.01 * decrement, 0.1 * tolerance) and state.steps > 1:
            break
    return state.solution[0], decrement, state.steps


def _energies(precision: Tensor, point: Tensor, direction: Tensor, steps: Tensor) -> Tensor:
    weight, x, d = precision.double(), point.double(), direction.double()
    squares = torch.stack([(weight * a * b).sum() for a, b in ((x, x), (x, d), (d, d))])
    return squares[0] + 2 * steps * squares[1] + steps.square() * squares[2]
