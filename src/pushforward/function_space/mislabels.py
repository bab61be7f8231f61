"""Training examples ranked by how likely their label is wrong, without a second training run.

A network that has fitted a wrong label has done so on its own: nothing else in the data supports
it. So the example's removal would raise its own loss more than that of others (its self-influence
is large). Its plain loss is large too, unless the network has memorised it, and is nearly as good a
ranking: every result here has both, and the length of the gradient, side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pushforward.errors import OptionError, ShapeError, WeightsError
from pushforward.function_space.baselines.curvature import check_damping
from pushforward.function_space.baselines.passes import inputs_for
from pushforward.function_space.damped_solve import SolveMethod
from pushforward.function_space.example_gradients import Loss, metric_of, open_examples
from pushforward.function_space.influence import check_search, known_size, self_influence
from pushforward.function_space.measure import DistanceMeasure
from pushforward.function_space.metrics import Metric
from pushforward.function_space.network import ReferenceNetwork
from pushforward.networks.data import Examples
from pushforward.options import choice, whole_number
from pushforward.runs.estimate import Check, Cost, Status, to_jsonable, worst_status

__all__ = ["Detection", "WrongLabels", "find_wrong_labels"]

Score: TypeAlias = Literal["self_influence", "loss", "gradient_norm"]
_SHARES = (0.1, 0.2)  # of the examples that somebody looks at


@dataclass(frozen=True)
class Detection:
    """How well a score finds examples that are known to be wrong.

    Parameters
    ----------
    score
        Its name.
    auroc
        Probability that a wrong example scores above a right one; ½ is chance.
    standard_error
        Of `auroc`, by DeLong's formula.
    recall_10, recall_20
        Share of the wrong examples among the 10 % and 20 % with the largest scores.
    """

    score: str
    auroc: float
    standard_error: float
    recall_10: float
    recall_20: float


@dataclass(frozen=True, eq=False)
class WrongLabels:
    """A ranking of examples, with the baselines beside it.

    Parameters
    ----------
    scores
        By name, ``(M,)`` each, large where a label is suspicious: ``"self_influence"`` (rise of the
        example's own loss when it is removed), ``"loss"``, ``"gradient_norm"``.
    targets
        ``(M, ...)``, as the data have them.
    predictions
        ``(M,)`` most probable classes; None when outputs are no classes.
    num_examples
        The ``N`` of which one is removed.
    damping
        That was added to the curvature.
    method
        One sentence that says how the scores were obtained.
    cost
        Time, and gradients of single examples as evaluations.
    checks
        What was verified.
    ranked_by
        The score that `order` follows.
    """

    scores: dict[str, Tensor]
    targets: Tensor
    predictions: Tensor | None
    num_examples: int
    damping: float
    method: str
    cost: Cost
    checks: tuple[Check, ...] = field(default_factory=tuple)
    ranked_by: Score = "self_influence"

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def status(self) -> Status:
        """The worst status among the checks."""
        return worst_status(self.checks)

    @property
    def order(self) -> Int[Tensor, " M"]:
        """Numbers of the examples, the most suspicious first, ``(M,)``."""
        return self.order_by(self.ranked_by)

    def order_by(self, score: Score) -> Int[Tensor, " M"]:
        """Numbers of the examples by any of the scores.

        Parameters
        ----------
        score
            A name among `scores`.

        Returns
        -------
        Tensor
            ``(M,)``, the most suspicious first; ties in the order of the data.

        Raises
        ------
        OptionError
            For another name.
        """
        choice(score, "score", self.scores)
        return self.scores[score].argsort(descending=True, stable=True)

    def table(self, k: int = 20) -> str:
        """The most suspicious examples in Markdown.

        Parameters
        ----------
        k
            How many.

        Returns
        -------
        str
            A row for each: rank, number, label, prediction, the scores.

        Raises
        ------
        OptionError
            If `k` is not positive.
        """
        k = whole_number(k, "k")
        header = [
            "rank",
            "example",
            "label",
            "predicted",
            *(n.replace("_", " ") for n in self.scores),
        ]
        lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        for rank, number in enumerate(self.order[:k].tolist(), 1):
            label = self.targets[number].flatten().tolist()
            said = "" if self.predictions is None else str(int(self.predictions[number]))
            shown = str(label[0]) if len(label) == 1 else str(label)
            cells = [str(rank), str(number), shown, said]
            cells += [f"{float(values[number]):.3g}" for values in self.scores.values()]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def evaluate(self, is_wrong: Bool[Tensor, " M"]) -> tuple[Detection, ...]:
        """How well each score would have found labels that are known to be wrong.

        Parameters
        ----------
        is_wrong
            ``(M,)``, True where the label is wrong.

        Returns
        -------
        tuple of Detection
            One for each score.

        Raises
        ------
        ShapeError
            Unless there is one truth value for each example.
        OptionError
            When no example is wrong, or all are.
        """
        from pushforward.linearised_laplace.calibration import auroc

        try:
            wrong = torch.as_tensor(is_wrong).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ShapeError(
                f"got {type(is_wrong).__name__}",
                where="is_wrong",
                advice="Give True or False for each example.",
            ) from error
        if tuple(wrong.shape) != (len(self),) or wrong.dtype != torch.bool:
            raise ShapeError(
                f"{wrong.dtype} of shape {tuple(wrong.shape)} for {len(self)} examples",
                where="is_wrong",
                advice="Give True or False for each example.",
            )
        count = int(wrong.sum())
        if count in (0, len(wrong)):
            raise OptionError(
                f"{count} of {len(wrong)} examples are wrong",
                where="is_wrong",
                advice="There have to be wrong and right ones to tell apart.",
            )
        found = []
        for name, values in self.scores.items():
            values = values.cpu()
            area = auroc(values[wrong], values[~wrong])
            flagged = wrong[values.argsort(descending=True, stable=True)]
            recalls = [float(flagged[: round(s * len(wrong))].sum()) / count for s in _SHARES]
            found.append(Detection(name, area.value, area.standard_error, *recalls))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            Tensors as lists.
        """
        return to_jsonable(self)

    def plot(self) -> Any:
        """All scores in falling order.

        Returns
        -------
        matplotlib.figure.Figure
            Needs matplotlib.
        """
        from pushforward.function_space.influence_plots import plot_wrong_labels

        return plot_wrong_labels(self)

    def __repr__(self) -> str:
        lines = [
            f"WrongLabels: {len(self):,} examples ranked by {self.ranked_by.replace('_', ' ')}",
            f"  most suspicious: {', '.join(map(str, self.order[:10].tolist()))}",
            f"  {self.method}",
            f"  cost: {self.cost}",
        ]
        lines += [f"  {check}" for check in self.checks if check.status != "pass"]
        return "\n".join(lines)


def find_wrong_labels(
    net: nn.Module,
    data: Any,
    measure: DistanceMeasure | None = None,
    *,
    loss: Loss = "cross_entropy",
    damping: float = 1e-2,
    num_examples: int | None = None,
    metric: Metric | None = None,
    subset: str | Iterable[str] | None = None,
    estimator: str | None = None,
    method: SolveMethod = "auto",
    tolerance: float = 1e-4,
    max_steps: int = 200,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> WrongLabels:
    """Rank training examples by how suspicious their labels are.

    Parameters
    ----------
    net
        A trained classifier (or regressor).
    data
        The examples that it was trained on, labels as they are: a `DataLoader` that neither
        shuffles nor augments, tensors ``(inputs, labels)``, or whatever else `Examples.read` takes.
    measure
        A distance from `net`: a summary of its data, or a baseline. Default: a summary made now.
    loss
        As in `pushforward.influence`.
    damping
        Positive; added to the curvature.
    num_examples
        Default what the measure was made from, else the number of examples in `data`.
    metric, subset, estimator, method, tolerance, max_steps, batch_size, progress
        As in `pushforward.influence`. The tolerance is looser: ranks need no more.

    Returns
    -------
    WrongLabels
        The ranking, with the plain loss and the gradient's length as baselines.

    Raises
    ------
    OptionError
        For what measures no distance, and options out of range.
    WeightsError
        When the measure is of another network than `net`.
    DataError
        For labels that the loss does not take: cross-entropy needs integers below the number of
        outputs, and two outputs or more.

    Notes
    -----
    Over all parameters this is slow: each example has a linear system of its own, and a network
    of 8,970 parameters took 442 s for 1,300 examples through a summary, on one core. Name the last
    layer as `subset`, such as ``"4.*"``, which takes seconds; or give a `KroneckerDistance` as
    measure, which solves in closed form. Up to 8,192 parameters are solved by a factorisation,
    more by conjugate gradients.

    Examples
    --------
    >>> import torch
    >>> x = torch.linspace(-2, 2, 40).unsqueeze(1)
    >>> labels = (x[:, 0] > 0).long()
    >>> labels[3] = 1  # wrong
    >>> net = torch.nn.Linear(1, 2)
    >>> with torch.no_grad():
    ...     _ = net.weight.copy_(torch.tensor([[-1.0], [1.0]])), net.bias.zero_()
    >>> found = find_wrong_labels(net, (x, labels))
    >>> int(found.order[0])
    3
    """
    begun = perf_counter()
    damping = check_damping(damping)
    metric_of(loss, metric)
    tolerance, max_steps = check_search(tolerance, max_steps)
    if measure is not None and not isinstance(
        getattr(measure, "reference", None), ReferenceNetwork
    ):
        raise OptionError(
            f"{type(measure).__name__} measures no distance from a reference",
            where="measure",
            advice="Pass what pf.summarize returned, or one of the baselines; inputs and labels "
            "are one argument, data=(inputs, labels).",
        )
    reference = ReferenceNetwork.of(net, ()) if measure is None else measure.reference
    examples = open_examples(reference, data, loss, "data")
    if measure is None:
        from pushforward.function_space.summarize import summarize

        made: DistanceMeasure = summarize(net, examples, progress=progress)
        measure = made
    elif not measure.reference.unchanged(measure.reference.tensors_of(net)):
        raise WeightsError(
            "its weights are not those of the measure's reference",
            where="net",
            advice="Measure distances from the network that was trained on these labels.",
        )
    known = known_size(measure) if num_examples is None else num_examples
    found = self_influence(
        measure,
        examples,
        loss,
        damping=damping,
        num_examples=len(examples) if known is None else known,
        metric=metric,
        subset=subset,
        estimator=estimator,
        method=method,
        tolerance=tolerance,
        max_steps=max_steps,
        batch_size=batch_size,
        progress=progress,
    )
    targets, predictions = _labels(measure, examples, loss)
    return WrongLabels(
        {
            "self_influence": found.scores,
            "loss": found.losses,
            "gradient_norm": found.gradient_norms,
        },
        targets,
        predictions,
        found.num_examples,
        found.damping,
        found.method,
        Cost(0.0, perf_counter() - begun, len(examples)),
        found.checks,
    )


@torch.no_grad()
def _labels(
    measure: DistanceMeasure, examples: Examples, loss: Loss
) -> tuple[Tensor, Tensor | None]:
    """Targets of all examples, and the most probable class of each if there are classes."""
    reference = measure.reference
    targets, predictions = [], []
    for batch in Examples.read(examples, device=reference.device).batches(1024):
        assert batch.targets is not None
        targets.append(batch.targets.cpu())
        if loss == "cross_entropy":
            inputs = inputs_for(reference, batch.inputs)
            rows: Float[Tensor, "n K"] = reference.outputs(reference.tensors, inputs)
            predictions.append(rows.argmax(1).cpu())
    return torch.cat(targets), torch.cat(predictions) if predictions else None
