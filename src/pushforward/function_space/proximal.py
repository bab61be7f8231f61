"""Retrained responses: where the weights go when one example leaves the proximal objective.

`influence` linearises this minimum; here it is searched for. The objective is

    FSD(theta) - <r, f(x_m, theta)> / N + damping |theta - theta_s|^2 / 2,    r = dL/dz at theta_s,

with the loss of the removed example replaced by its tangent in the *outputs*. The loss itself is
unbounded above; subtracted, it is held only by an exact distance: with any estimated one the
minimisation runs away. Even the tangent is not always held: KL grows linearly only, so that for an
example that a classifier gets wrong, weak damping may not do; ``metric="fisher"``, quadratic in the
outputs, always holds it. The check ``bounded`` tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import DataError, OptionError, ShapeError
from pushforward.function_space.curvature import GaussNewton
from pushforward.function_space.damped_solve import Solver
from pushforward.function_space.example_gradients import (
    ExampleGradients,
    Loss,
    metric_of,
    open_examples,
)
from pushforward.function_space.influence import check_search, training_size
from pushforward.function_space.measure import DistanceMeasure
from pushforward.function_space.metrics import Metric
from pushforward.function_space.network import ReferenceNetwork
from pushforward.networks.batches import to_tensor
from pushforward.networks.data import Batch, Examples
from pushforward.options import choice
from pushforward.runs.estimate import Check, Cost, Status, to_jsonable, worst_status
from pushforward.runs.progress import Advance, track
from pushforward.typing import Params

__all__ = ["ProximalResponse", "Removal", "proximal_response"]

Removal = Literal["linearised", "loss"]

_FAR = 100.0  # times the linear response: what has run away
_STATIONARY = 1e-3  # share of the first gradient above which a search has not arrived
_GAIN = 1e-4  # share of the descent below which a fresh start gains nothing
_STARTS = 4


@dataclass(frozen=True, eq=False)
class ProximalResponse:
    """Weights that minimise the proximal objective without one example.

    Parameters
    ----------
    tensors
        All tensors of the network there: what `measure.distance` takes.
    displacement
        ``(P,)``: by how much the parameters that count moved.
    linear
        ``(P,)``: the linearised response, for comparison.
    gradient_ratio
        Length of the objective's last gradient over that of its first. It need not be small for
        ReLU networks, whose minima lie at kinks as often as not.
    iterations
        Of L-BFGS.
    method
        One sentence that says what was minimised.
    cost
        Time, and evaluations of the objective.
    checks
        What was verified.
    """

    tensors: Params = field(metadata={"json": False})
    displacement: Float[Tensor, " P"] = field(metadata={"json": False})
    linear: Float[Tensor, " P"] = field(metadata={"json": False})
    gradient_ratio: float
    iterations: int
    method: str
    cost: Cost
    checks: tuple[Check, ...]
    _gradients: ExampleGradients = field(repr=False)

    @property
    def status(self) -> Status:
        """The worst status among the checks."""
        return worst_status(self.checks)

    def loss_changes(self, queries: Any) -> Float[Tensor, " Q"]:
        """By how much the losses of queries differ from those at the reference.

        Parameters
        ----------
        queries
            Anything that `Examples.read` takes, with targets.

        Returns
        -------
        Tensor
            ``(Q,)``: what `influence` estimates to first order.
        """
        return self._changes(queries, self._gradients.losses_at)

    def output_changes(self, queries: Any) -> Float[Tensor, "Q K"]:
        """By how much the outputs of queries differ from those at the reference.

        Parameters
        ----------
        queries
            Anything that `Examples.read` takes, with targets.

        Returns
        -------
        Tensor
            ``(Q, K)``.
        """
        return self._changes(queries, self._gradients.outputs_at)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON, without the weights.

        Returns
        -------
        dict
            Numbers and checks.
        """
        return to_jsonable(self)

    def __repr__(self) -> str:
        lines = [
            f"ProximalResponse: the weights moved by {float(self.displacement.norm()):.3g}, "
            f"{float(self.linear.norm()):.3g} when linearised, in {self.iterations} iterations",
            f"  {self.method}",
            f"  cost: {self.cost}",
        ]
        lines += [f"  {check}" for check in self.checks if check.status != "pass"]
        return "\n".join(lines)

    @torch.no_grad()
    def _changes(self, queries: Any, values: Any) -> Tensor:
        examples = self._gradients.open(queries, "queries")
        own = self._gradients.tensors
        return torch.cat([values(self.tensors, b) - values(own, b) for b in examples.batches(1024)])


def proximal_response(
    measure: DistanceMeasure,
    example: Any,
    loss: Loss = "cross_entropy",
    *,
    damping: float,
    removal: Removal = "linearised",
    num_examples: int | None = None,
    metric: Metric | None = None,
    estimator: str | None = None,
    solver: Solver[GaussNewton] | None = None,
    tolerance: float = 1e-6,
    max_steps: int = 500,
    progress: bool | None = None,
) -> ProximalResponse:
    """Minimise the proximal objective without one example, by L-BFGS in float64.

    Parameters
    ----------
    measure
        A distance from the trained network.
    example
        ``(inputs, target)`` of a single example, tensors or NumPy arrays, with or without an axis
        of batches of length 1.
    loss
        As in `influence`.
    damping
        Positive; as in `influence`.
    removal
        ``"linearised"`` in the outputs, or ``"loss"``: the loss itself, for exact distances only.
    num_examples
        ``N``; default what the measure was made from.
    metric
        Of the distance; default ``"kl"`` for cross-entropy and ``"euclidean"`` for squared loss,
        the Bregman divergences of the two.
    estimator
        Of a summary; default its own.
    solver
        From ``GaussNewton.of(measure, ...).solver(damping)``, when several examples are removed:
        its factorisation is then made once. It also sets the parameters that move.
    tolerance
        Of the displacement, relative and positive: the search stops when gradients have fallen by
        so much, or when a step gains no more than its square.
    max_steps
        Of L-BFGS; at least 1.
    progress
        True or False to show a bar or not; None on a terminal only.

    Returns
    -------
    ProximalResponse
        Its checks say whether the search arrived.

    Raises
    ------
    OptionError
        For an unknown `removal`, loss or metric, bad damping, a tolerance or steps that are not
        positive.
    ShapeError
        For more than one example, or one of another shape than the network takes.
    DataError
        For an example that cannot be read, or whose target the loss does not take.
    """
    begun = perf_counter()
    choice(removal, "removal", get_args(Removal))
    tolerance, max_steps = check_search(tolerance, max_steps)
    # An example that does not fit the loss is refused before a curvature that says nothing of it.
    reference = getattr(measure, "reference", None)
    if isinstance(reference, ReferenceNetwork):
        metric_of(loss, metric)
        example = _single(reference, loss, example)
    if solver is None:
        local = GaussNewton.of(measure, metric=metric_of(loss, metric), estimator=estimator)
        solver = local.solver(damping)
    elif solver.damping != damping or solver.curvature.measure is not measure:
        raise OptionError(
            "it is of another measure or damping",
            where="solver",
            advice="Make it by GaussNewton.of(measure, ...).solver(damping).",
        )
    if metric is None and loss == "cross_entropy":
        metric = "kl"
    curvature = solver.curvature
    gradients = ExampleGradients(curvature.reference, curvature.space, loss)
    search = _Search(
        solver,
        gradients,
        gradients.open(example, "example").select(torch.tensor([0])),
        metric or curvature.metric,
        removal,
        training_size(measure, num_examples),
    )
    solver.prepare(progress)
    with track(None, "Proximal response", enabled=progress) as advance:
        found = search.run(tolerance, max_steps, advance)
    linear = search.linear
    return ProximalResponse(
        curvature.tensors_at(curvature.point + found.displacement),
        found.displacement,
        linear,
        found.gradient_ratio,
        found.steps,
        f"proximal response of {type(measure).__name__}, {removal} removal, damping {damping:g}",
        Cost(0.0, perf_counter() - begun, found.calls),
        (_arrival(found), _distance_check(found.displacement, linear)),
        gradients,
    )


@dataclass(frozen=True, eq=False)
class _Found:
    """Where a search ended, the share of the last start in the descent, steps, evaluations."""

    displacement: Tensor
    gradient_ratio: float
    gain: float
    steps: int
    calls: int


@dataclass(frozen=True, eq=False)
class _Search:
    """The objective in whitened coordinates, in which its Hessian at the start is the identity."""

    solver: Solver[GaussNewton]
    gradients: ExampleGradients
    batch: Batch
    metric: Metric
    removal: Removal
    total: int

    @property
    def linear(self) -> Tensor:
        """The linearised response, ``(P,)``."""
        _, rows = self.gradients.rows(self.batch)
        return self.solver.solve(rows.T).vectors[:, 0] / self.total

    @property
    def _factor(self) -> Tensor | None:
        return self.solver.factor if self.solver.method == "cholesky" else None

    def run(self, tolerance: float, max_steps: int, advance: Advance) -> _Found:
        """Minimise from the reference, and start afresh from where the search stops."""
        from scipy.optimize import minimize

        push = self.gradients.output_gradient(self.batch).detach()

        position = np.zeros(self.solver.curvature.space.size)
        _, slope = self._value(torch.from_numpy(position), push)
        # In units of the squared first gradient the descent is of order one, as thresholds expect.
        unit = max(float(slope @ slope), 1e-300)

        def objective(whitened: np.ndarray[Any, np.dtype[Any]]) -> tuple[float, Any]:
            value, slope = self._value(torch.from_numpy(whitened), push)
            return value / unit, slope.numpy() / unit

        first = unit**-0.5
        start = value = objective(position)[0]
        last, gain, steps, calls = first, 1.0, 0, 2
        made = count(1)

        def watch(xk: Any) -> None:  # SciPy asks for this name
            del xk
            advance(1, f"{next(made)} steps")

        for _ in range(_STARTS):
            found = minimize(
                objective,
                position,
                jac=True,
                method="L-BFGS-B",
                callback=watch,
                options={
                    "maxiter": max_steps - steps,
                    "maxfun": 10 * max_steps,
                    "maxcor": 30,
                    "ftol": tolerance**2,
                    "gtol": tolerance * first,
                },
            )
            position, last = found.x, float(np.linalg.norm(found.jac))
            steps, calls = steps + int(found.nit), calls + int(found.nfev)
            gain = (value - float(found.fun)) / max(start - float(found.fun), 1e-300)
            value = float(found.fun)
            # A kink of a piecewise linear network stops a line search: the memory of curvature is
            # of the other side. A fresh start either gets past it or shows that it is the minimum.
            if last <= _STATIONARY * first or gain < _GAIN or steps >= max_steps:
                break
        displacement = self._unwhitened(torch.from_numpy(position))
        return _Found(displacement, last / max(first, 1e-300), gain, steps, calls)

    def _value(self, whitened: Tensor, push: Tensor) -> tuple[float, Tensor]:
        curvature = self.solver.curvature
        moved = self._unwhitened(whitened).to(curvature.point)
        with torch.enable_grad():
            vector = (curvature.point + moved).requires_grad_()
            value = curvature.distance_at(vector, self.metric).double()
            tensors = curvature.tensors_at(vector)
            if self.removal == "loss":
                removed = self.gradients.losses_at(tensors, self.batch).sum()
            else:
                removed = (push * self.gradients.outputs_at(tensors, self.batch)).sum()
            value = value - removed / self.total
            (slope,) = torch.autograd.grad(value, vector)
        moved = moved.double()
        total = float(value.detach()) + self.solver.damping / 2 * float(moved @ moved)
        slope = slope.double() + self.solver.damping * moved
        if self._factor is not None:
            slope = torch.linalg.solve_triangular(
                self._factor.double(), slope.unsqueeze(1), upper=False
            )[:, 0]
        return total, slope.cpu()

    def _unwhitened(self, whitened: Tensor) -> Tensor:
        whitened = whitened.to(self.solver.curvature.point.device)
        if self._factor is None:
            return whitened
        factor = self._factor.double()
        return torch.linalg.solve_triangular(factor.T, whitened.unsqueeze(1), upper=True)[:, 0]


def _single(reference: ReferenceNetwork, loss: Loss, example: Any) -> Examples:
    """Open one example, whose axis of batches may be missing."""
    if not isinstance(example, tuple | list) or len(example) != 2:
        raise ShapeError(
            f"got {type(example).__name__}",
            where="example",
            advice="Give (inputs, target) of one example.",
        )
    inputs, target = example[0], _as_tensor(example[1], "target")
    if not isinstance(inputs, Mapping | tuple):
        inputs = _as_tensor(inputs, "inputs")
        if _lacks_batch_axis(inputs, reference.event_shape):
            inputs, target = inputs.unsqueeze(0), target.unsqueeze(0)
    if target.dim() == 0:
        target = target.unsqueeze(0)
    opened = open_examples(reference, (inputs, target), loss, "example")
    if len(opened) != 1:
        raise ShapeError(
            f"{len(opened)} examples",
            where="example",
            advice="Give one; loop over several and pass the same solver=.",
        )
    return opened


def _as_tensor(value: Any, what: str) -> Tensor:
    found = to_tensor(value)
    if found is not None:
        return found
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{what} of type {type(value).__name__}",
            where="example",
            advice="Give (inputs, target) of one example as tensors, arrays or numbers.",
        ) from error


def _lacks_batch_axis(inputs: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether inputs are those of an example alone.

    Returns
    -------
    bool
        False for a batch, however long.

    Raises
    ------
    ShapeError
        For inputs that are neither.
    """
    given = tuple(inputs.shape)
    if given == shape:
        return True
    # Sequences of tokens may be of any length, and of inputs in a mapping the shape is not known.
    if not shape or len(given) == len(shape) + 1:
        return False
    if len(given) == len(shape) and not inputs.is_floating_point():
        return True
    raise ShapeError(
        f"inputs of shape {given}, the network takes examples of shape {shape}",
        where="example",
        advice=f"Give inputs of shape {shape}, or {(1, *shape)} with an axis of batches.",
    )


def _arrival(found: _Found) -> Check:
    detail = f"the last gradient is {found.gradient_ratio:.2g} of the first"
    if found.gradient_ratio <= _STATIONARY:
        return Check("stationary", "pass", detail)
    detail += f", and a fresh start gained {found.gain:.2g} of the descent"
    if found.gain < _GAIN:
        return Check("stationary", "pass", f"{detail}: a kink of the network")
    status: Status = "warn" if found.gradient_ratio < 1 else "fail"
    return Check("stationary", status, detail, "Allow more steps, or use more damping.")


def _distance_check(displacement: Tensor, linear: Tensor) -> Check:
    ratio = float(displacement.norm() / linear.norm().clamp(min=1e-300))
    detail = f"the weights moved {ratio:.3g} times as far as the linearised response"
    if ratio <= _FAR:
        return Check("bounded", "pass", detail)
    return Check(
        "bounded",
        "fail",
        detail,
        "The search ran away: use removal='linearised', more damping, or an exact distance.",
    )
