"""What single examples did to a network: pairwise and self-influence, and retrained responses.

Removing one of ``N`` training examples moves the minimum of the proximal objective (Bae et al.,
arXiv 2209.05364)

    FSD(theta) - L(z_m, theta) / N + damping |theta - theta_s|^2 / 2,

in which the distance ``FSD`` to the trained function stands for all data. Linearised at ``theta_s``
the minimum moves by ``(G + damping I)^{-1} grad L(z_m) / N``, where ``G`` is the Hessian of the
distance; the loss of a query ``q`` then changes by

    influence(q, m) = grad L(z_q)^T (G + damping I)^{-1} grad L(z_m) / N.

No data are needed for ``G`` when the distance comes from a summary.

Sign and scale
--------------
A score is a change of the query's loss, in the units of the loss (nats for cross-entropy), when
*one* example out of ``N`` is *removed*. Positive: without the example the query's loss is higher,
so the example helps. Negative: it harms. Without the factor ``1/N`` scores would look ``N`` times
larger. The examples need not be training examples: for another one the score is what leaving it out
would have changed, had it been one of the ``N``, to first order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, get_args

import torch
from torch import Tensor

from pushforward.errors import DataError, OptionError, ResourceError
from pushforward.function_space.curvature import GaussNewton
from pushforward.function_space.damped_solve import SolveMethod, Solver
from pushforward.function_space.example_gradients import (
    ExampleGradients,
    Loss,
    metric_of,
    open_examples,
)
from pushforward.function_space.influence_scores import Effect, InfluenceScores, SelfInfluence
from pushforward.function_space.measure import DistanceMeasure
from pushforward.function_space.metrics import Metric
from pushforward.function_space.network import ReferenceNetwork
from pushforward.networks.data import Examples
from pushforward.options import choice, number, whole_number
from pushforward.runs.estimate import Check, Cost
from pushforward.runs.progress import Advance, track

__all__ = [
    "check_search",
    "influence",
    "known_size",
    "self_influence",
    "training_size",
]

_SOLVED_BYTES = 2**29  # of solved right-hand sides at once
_MEMORY = 2**33  # of scores
_ACCURATE = 1e-3  # residual of a linear system above which scores are doubtful


def influence(
    measure: DistanceMeasure | GaussNewton,
    queries: Any,
    examples: Any,
    loss: Loss = "cross_entropy",
    *,
    damping: float,
    effect: Effect = "loss",
    num_examples: int | None = None,
    metric: Metric | None = None,
    subset: str | Iterable[str] | None = None,
    estimator: str | None = None,
    method: SolveMethod = "auto",
    tolerance: float = 1e-6,
    max_steps: int = 2000,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> InfluenceScores:
    """How removing examples from the training data would change queries (see the file).

    Parameters
    ----------
    measure
        A distance from the trained network: a summary, or a baseline. Its weights are the trained
        ones. Or its `GaussNewton` matrix, which several calls then share; it has a metric, a subset
        and an estimator of its own.
    queries
        Examples whose loss is asked about: anything that `Examples.read` takes, with targets.
    examples
        Those that are removed, one at a time; likewise.
    loss
        ``"cross_entropy"``, ``"squared"`` (``|z - y|^2 / 2``, summed over outputs), or a function
        of the outputs ``(K,)`` and the target of one example.
    damping
        Positive; added to the curvature. It plays the part of weight decay, in the same units:
        the mean loss plus ``damping |theta|^2 / 2``. Small damping asks more of the distance:
        with estimated ones 1e-1 is safer than 1e-3.
    effect
        ``"outputs"``: the change of each output of the queries instead of that of their loss.
    num_examples
        ``N``, of which one is removed; default what the measure was made from.
    metric
        Default ``"fisher"`` for cross-entropy, ``"euclidean"`` for squared loss.
    subset
        Patterns of parameter names: only these move.
    estimator
        Of a summary; default its own.
    method, tolerance, max_steps
        Of the linear systems, see `GaussNewton.solver`.
    batch_size
        Examples whose gradients are taken at once; default by memory.
    progress
        True or False to show a bar or not; None on a terminal only.

    Returns
    -------
    InfluenceScores
        Positive where the example helps the query.

    Raises
    ------
    OptionError
        For an unknown loss, effect or metric, damping, a tolerance or steps that are not positive,
        or an unknown number of training examples; when the damped curvature is not positive
        definite.
    ResourceError
        If the scores would take more than 8 GiB.

    Notes
    -----
    Up to 8,192 parameters the curvature is formed and factorised: as many backward passes through
    the distance as there are parameters, once. Beyond that every step of conjugate gradients takes
    one backward pass for each query or example, whichever are fewer; there a
    `KroneckerDistance`, which solves in closed form, or a `subset` of the last layers costs far
    less.

    Examples
    --------
    >>> import torch
    >>> from pushforward.function_space.summarize import summarize
    >>> net = torch.nn.Linear(2, 1).double()
    >>> x, y = torch.randn(20, 2).double(), torch.randn(20, 1).double()
    >>> summary = summarize(net, x)
    >>> found = influence(summary, (x[:3], y[:3]), (x, y), "squared", damping=0.1)
    >>> found.scores.shape, bool(found.scores[0, 0] > 0)
    (torch.Size([3, 20]), True)
    """
    begun = perf_counter()
    choice(effect, "effect", get_args(Effect))
    tolerance, max_steps = check_search(tolerance, max_steps)
    # Data that do not fit the loss are refused before a curvature that says nothing of them is.
    queries = _opened(measure, queries, loss, metric, "queries")
    examples = _opened(measure, examples, loss, metric, "examples")
    curvature = _curvature_of(measure, loss, metric, subset, estimator)
    gradients = ExampleGradients(curvature.reference, curvature.space, loss)
    asked, removed = gradients.open(queries, "queries"), gradients.open(examples, "examples")
    total = training_size(curvature.measure, num_examples)
    solver = curvature.solver(damping, method, tolerance=tolerance, max_steps=max_steps)
    width = 1 if effect == "loss" else _num_outputs(gradients, asked)
    _require_room(len(asked) * width, len(removed))
    # The smaller side is solved for, the larger one streams by.
    by_query = len(asked) * width <= len(removed)
    left = _Side(gradients, asked, effect, gradients.batch_size(batch_size, width))
    right = _Side(gradients, removed, "loss", gradients.batch_size(batch_size))
    solved, streamed = (left, right) if by_query else (right, left)
    found, residual, steps = _products(solver, solved, streamed, progress)
    scores = (found if by_query else found.T) / total
    if effect == "outputs":
        scores = scores.reshape(len(asked), width, len(removed))
    return InfluenceScores(
        scores,
        effect,
        float(damping),
        total,
        _described(solver, loss),
        Cost(0.0, perf_counter() - begun, len(asked) + len(removed)),
        _checks(solver, residual, steps),
    )


def self_influence(
    measure: DistanceMeasure | GaussNewton,
    examples: Any,
    loss: Loss = "cross_entropy",
    *,
    damping: float,
    num_examples: int | None = None,
    metric: Metric | None = None,
    subset: str | Iterable[str] | None = None,
    estimator: str | None = None,
    method: SolveMethod = "auto",
    tolerance: float = 1e-6,
    max_steps: int = 2000,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> SelfInfluence:
    """How removing an example would raise its own loss: the diagonal of `influence`.

    Parameters
    ----------
    measure, loss, damping, num_examples, metric, subset, estimator
        As in `influence`.
    examples
        Anything that `Examples.read` takes, with targets.
    method, tolerance, max_steps, batch_size, progress
        As in `influence`.

    Returns
    -------
    SelfInfluence
        With the loss and the length of the gradient beside each score.

    Raises
    ------
    DataError
        If a score comes out negative, which only a measure's own solve can do.
    """
    begun = perf_counter()
    tolerance, max_steps = check_search(tolerance, max_steps)
    examples = _opened(measure, examples, loss, metric, "examples")
    curvature = _curvature_of(measure, loss, metric, subset, estimator)
    gradients = ExampleGradients(curvature.reference, curvature.space, loss)
    opened = gradients.open(examples, "examples")
    total = training_size(curvature.measure, num_examples)
    solver = curvature.solver(damping, method, tolerance=tolerance, max_steps=max_steps)
    residual, steps = 0.0, 0
    scores, losses, lengths = [], [], []
    size = gradients.batch_size(batch_size)
    solver.prepare(progress)
    with track(len(opened), "Self-influence", enabled=progress) as advance:
        for batch, values, rows in gradients.batches(opened, size):
            solution = solver.solve(rows.T.to(curvature.dtype), partial(_note, advance))
            residual, steps = _worse(residual, solution.residual), steps + solution.steps
            scores.append((rows * solution.vectors.T).sum(1).double())
            losses.append(values)
            lengths.append(rows.norm(dim=1))
            advance(len(batch))
    found, norms = torch.cat(scores), torch.cat(lengths)
    # What rounding may do to a positive number; g^T g / damping bounds each score from above.
    if bool((found < -1e-9 * norms.square() / damping).any()):
        raise DataError(
            f"a self-influence of {float(found.min()):.3g} came out negative",
            where="measure",
            advice="Its curvature is not positive definite: use another solve method.",
        )
    return SelfInfluence(
        found.clamp(min=0) / total,
        torch.cat(losses),
        norms,
        float(damping),
        total,
        _described(solver, loss),
        Cost(0.0, perf_counter() - begun, len(opened)),
        _checks(solver, residual, steps),
    )


@dataclass(frozen=True, eq=False)
class _Side:
    """Gradients of queries or of examples, streamed."""

    gradients: ExampleGradients
    examples: Examples
    effect: Effect
    batch_size: int

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.examples.batches(self.batch_size):
            if self.effect == "outputs":
                yield self.gradients.output_rows(batch)[1].flatten(0, 1)
            else:
                yield self.gradients.rows(batch, self.examples.name)[1]

    def __len__(self) -> int:
        return len(self.examples)


def _products(
    solver: Solver[GaussNewton], solved: _Side, streamed: _Side, progress: bool | None
) -> tuple[Tensor, float, int]:
    """Bilinear forms in the inverse, ``(solved, streamed)``, with the worst residual and steps."""
    most = max(1, _SOLVED_BYTES // (8 * solver.curvature.space.size))
    residual, steps, blocks = 0.0, 0, []
    solver.prepare(progress)
    with track(len(solved), "Influence", enabled=progress) as advance:
        for rows in _gathered(solved, most):
            solution = solver.solve(rows.T.to(solver.curvature.dtype), partial(_note, advance))
            residual, steps = _worse(residual, solution.residual), steps + solution.steps
            answers = solution.vectors.T.double()
            blocks.append(torch.cat([answers @ other.T for other in streamed], 1))
            advance(len(rows))
    return torch.cat(blocks), residual, steps


def _note(advance: Advance, products: int) -> None:
    advance(0, f"{products} products")


def _gathered(rows: Iterable[Tensor], most: int) -> Iterator[Tensor]:
    """Join small batches and split large ones, so that each block has `most` rows but the last.

    Yields
    ------
    Tensor
        ``(n, P)``.
    """
    held: list[Tensor] = []
    count = 0
    for piece in rows:
        for part in piece.split(most):
            if held and count + len(part) > most:
                yield torch.cat(held)
                held, count = [], 0
            held.append(part)
            count += len(part)
    if held:
        yield torch.cat(held)


def _opened(
    measure: DistanceMeasure | GaussNewton,
    source: Any,
    loss: Loss,
    metric: Metric | None,
    name: str,
) -> Any:
    reference = getattr(measure, "reference", None)
    if not isinstance(reference, ReferenceNetwork):
        return source  # no measure: refused as such, next
    if not isinstance(measure, GaussNewton):
        metric_of(loss, metric)  # refuses an unknown loss
    return open_examples(reference, source, loss, name)


def _curvature_of(
    measure: DistanceMeasure | GaussNewton,
    loss: Loss,
    metric: Metric | None,
    subset: str | Iterable[str] | None,
    estimator: str | None,
) -> GaussNewton:
    if not isinstance(measure, GaussNewton):
        metric = metric_of(loss, metric)
        return GaussNewton.of(measure, metric=metric, subset=subset, estimator=estimator)
    if metric is not None or subset is not None or estimator is not None:
        raise OptionError(
            "metric, subset and estimator belong to the matrix that was given",
            where="measure",
            advice="Pass them to GaussNewton.of.",
        )
    return measure


def training_size(measure: Any, given: int | None) -> int:
    """How many training examples there were, of which one is removed.

    Parameters
    ----------
    measure
        It may know, as `num_examples`.
    given
        What the caller says; it wins.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    OptionError
        If nobody knows, or the number is none.
    """
    size = known_size(measure) if given is None else given
    if size is None:
        raise OptionError(
            f"{type(measure).__name__} does not know how many training examples there were",
            where="num_examples",
            advice="Give num_examples: scores are for removing one out of so many.",
        )
    return whole_number(size, "num_examples")


def known_size(measure: Any) -> int | None:
    """How many examples a measure was made from, if it says so."""
    size = getattr(measure, "num_examples", None)
    return None if size is None else int(size)


def check_search(tolerance: float, max_steps: int) -> tuple[float, int]:
    """When a search stops, looked at before anything is computed.

    Parameters
    ----------
    tolerance
        Positive.
    max_steps
        At least 1.

    Returns
    -------
    tuple
        Both, as plain numbers.

    Raises
    ------
    OptionError
        For what is none.
    """
    return number(tolerance, "tolerance", above=0), whole_number(max_steps, "max_steps")


def _num_outputs(gradients: ExampleGradients, examples: Examples) -> int:
    batch = examples.select(torch.tensor([0]))
    return int(gradients.output_rows(batch)[0].shape[1])


def _require_room(rows: int, columns: int) -> None:
    if 8 * rows * columns > _MEMORY:
        raise ResourceError(
            f"{rows:,} x {columns:,} scores take {8 * rows * columns / 2**30:.1f} GiB",
            where="influence",
            advice="Ask about fewer queries at a time, or use self_influence.",
        )


def _worse(first: float, second: float) -> float:
    return second if second != second or second > first else first


def _described(solver: Solver[GaussNewton], loss: Loss) -> str:
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", "a function")
    ways: dict[str, str] = {
        "cholesky": "a Cholesky factor",
        "conjugate_gradients": "block conjugate gradients",
        "own": "its own damped solve",
    }
    return (
        f"linearised proximal response of {name} through the curvature of "
        f"{type(solver.curvature.measure).__name__} ({solver.curvature.metric}, damping "
        f"{solver.damping:g}), {ways[solver.method]}"
    )


def _checks(solver: Solver[GaussNewton], residual: float, steps: int) -> tuple[Check, ...]:
    curvature = solver.curvature
    found = (_system_check(solver, residual, steps), _share_check(curvature, solver))
    # A summary knows how far its estimates are off; a baseline does not.
    calibration = getattr(curvature.measure, "calibration_check", None)
    if calibration is None:
        return found
    estimator = curvature.options.get("estimator")
    return (*found, calibration(metric=curvature.metric, estimator=estimator))


def _system_check(solver: Solver[GaussNewton], residual: float, steps: int) -> Check:
    name = "linear-system"
    if solver.method == "own":
        return Check(name, "pass", "closed form of the measure")
    detail = f"largest relative residual {residual:.2g}" + (f", {steps} steps" if steps else "")
    if residual <= _ACCURATE:
        return Check(name, "pass", detail)
    return Check(
        name,
        "warn" if residual < 0.1 else "fail",
        detail,
        "Allow more steps (max_steps), or use more damping.",
    )


def _share_check(curvature: GaussNewton, solver: Solver[GaussNewton]) -> Check:
    """Whether the curvature counts beside the damping at all."""
    name = "damping"
    if solver.method != "cholesky":
        return Check(name, "pass", f"damping {solver.damping:.3g}; the curvature was not formed")
    mean = float(curvature.dense().diagonal().mean())
    top = float(curvature.dense().diagonal().max())
    detail = f"damping {solver.damping:.3g}; diagonal of the curvature: mean {mean:.3g}, largest "
    detail += f"{top:.3g}"
    if solver.damping <= 10 * top:
        return Check(name, "pass", detail)
    return Check(
        name,
        "warn",
        detail,
        "The damping outweighs the curvature: scores are little more than products of gradients.",
    )
