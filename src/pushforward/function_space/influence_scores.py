"""What influence comes to: scores of pairs, and of each example on itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

from pushforward.options import whole_number
from pushforward.runs.estimate import Check, Cost, Status, to_jsonable, worst_status

__all__ = ["Effect", "InfluenceScores", "SelfInfluence"]

Effect: TypeAlias = Literal["loss", "outputs"]
"""What an influence is on: the loss of a query, or each of its outputs."""


@dataclass(frozen=True, eq=False)
class InfluenceScores:
    """Effects of removing each of several examples, see the file for sign and scale.

    Parameters
    ----------
    scores
        ``(Q, M)``: change of the loss of query ``q`` on removing example ``m``; for
        ``effect="outputs"`` ``(Q, K, M)``, the change of each output.
    effect
        Of which the scores are changes.
    damping
        That was added to the curvature.
    num_examples
        The ``N`` of which one is removed.
    method
        One sentence that says how the scores were obtained.
    cost
        Time, and gradients of single examples as evaluations.
    checks
        What was verified.
    """

    scores: Float[Tensor, "Q *K M"]
    effect: Effect
    damping: float
    num_examples: int
    method: str
    cost: Cost
    checks: tuple[Check, ...] = field(default_factory=tuple)

    @property
    def status(self) -> Status:
        """The worst status among the checks."""
        return worst_status(self.checks)

    def top(
        self, k: int, *, harmful: bool = False
    ) -> tuple[Int[Tensor, "Q *K k"], Float[Tensor, "Q *K k"]]:
        """The most influential examples of each query.

        Parameters
        ----------
        k
            How many.
        harmful
            The most negative scores instead of the most positive: examples whose removal would
            lower the loss.

        Returns
        -------
        numbers
            ``(Q, k)`` positions among the examples, the strongest first.
        scores
            ``(Q, k)``, theirs.

        Raises
        ------
        OptionError
            If there are not so many.
        """
        count = self.scores.shape[-1]
        k = whole_number(k, "k", most=count)
        found = self.scores.topk(k, -1, largest=not harmful)
        return found.indices, found.values

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            Tensors as nested lists.
        """
        return to_jsonable(self)

    def plot(self, query: int = 0, k: int = 10, *, output: int | None = None) -> Any:
        """The most helpful and the most harmful examples of a query as bars.

        Parameters
        ----------
        query
            Its number.
        k
            How many of each kind.
        output
            Which output, for ``effect="outputs"``; its largest rises and falls are shown.

        Returns
        -------
        matplotlib.figure.Figure
            Needs matplotlib.
        """
        from pushforward.function_space.influence_plots import plot_influence

        return plot_influence(self, query, k, output)

    def __repr__(self) -> str:
        lines = [
            f"InfluenceScores of shape {tuple(self.scores.shape)}: change of the {self.effect} on "
            f"removing one of {self.num_examples:,} examples",
            f"  {self.method}",
            f"  cost: {self.cost}",
        ]
        lines += [f"  {check}" for check in self.checks if check.status != "pass"]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class SelfInfluence:
    """Effect of removing each example on its own loss.

    Parameters
    ----------
    scores
        ``(M,)``, never negative: by how much the example's own loss would rise without it.
    losses
        ``(M,)``, the loss of each example.
    gradient_norms
        ``(M,)``, the length of its gradient.
    damping, num_examples, method, cost, checks
        As in `InfluenceScores`.
    """

    scores: Float[Tensor, " M"]
    losses: Float[Tensor, " M"]
    gradient_norms: Float[Tensor, " M"]
    damping: float
    num_examples: int
    method: str
    cost: Cost
    checks: tuple[Check, ...] = field(default_factory=tuple)

    @property
    def status(self) -> Status:
        """The worst status among the checks."""
        return worst_status(self.checks)

    def top(self, k: int) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
        """The examples with the largest scores.

        Parameters
        ----------
        k
            How many.

        Returns
        -------
        numbers
            ``(k,)`` positions among the examples.
        scores
            ``(k,)``, falling.

        Raises
        ------
        OptionError
            If there are not so many.
        """
        found = self.scores.topk(whole_number(k, "k", most=len(self.scores)))
        return found.indices, found.values

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            Tensors as nested lists.
        """
        return to_jsonable(self)

    def plot(self) -> Any:
        """Score against loss, a point for each example.

        Returns
        -------
        matplotlib.figure.Figure
            Needs matplotlib.
        """
        from pushforward.function_space.influence_plots import plot_self_influence

        return plot_self_influence(self)

    def __repr__(self) -> str:
        lines = [
            f"SelfInfluence of {len(self.scores):,} examples out of {self.num_examples:,}",
            f"  {self.method}",
            f"  cost: {self.cost}",
        ]
        lines += [f"  {check}" for check in self.checks if check.status != "pass"]
        return "\n".join(lines)
