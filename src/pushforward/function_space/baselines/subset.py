"""Distance by some of the data, kept as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.baselines.passes import open_network, random_examples
from pushforward.function_space.metrics import Metric
from pushforward.function_space.network import Other, ReferenceNetwork
from pushforward.options import whole_number

__all__ = ["SubsetDistance"]


@dataclass(frozen=True, eq=False)
class SubsetDistance:
    """Mean discrepancy over a few examples, which it keeps.

    Use `of`. What a method without data has to beat, or what it has to come near.

    Parameters
    ----------
    stored
        The exact distance over the copies.
    indices
        ``(n,)``, their numbers in the data set, ascending.
    num_examples
        Examples of the data set that they were drawn from, whose mean theirs stands for.
    """

    stored: ExactDistance
    indices: Int[Tensor, " n"]
    num_examples: int

    @classmethod
    def of(
        cls, net: nn.Module, data: Any, num_examples: int, *, seed: int, batch_size: int = 512
    ) -> SubsetDistance:
        """Copy random examples, drawn without replacement.

        Parameters
        ----------
        net
            A module.
        data
            As `ExactDistance.of` takes them; not needed afterwards.
        num_examples
            How many to keep.
        seed
            Of the draw.
        batch_size
            Examples run at a time.

        Returns
        -------
        SubsetDistance
            With copies of the inputs; targets are not kept.

        Raises
        ------
        NetworkError
            For what is no network, weights that are not finite, or inputs that it cannot take.
        DataError
            For data that are empty, not finite, shuffled or augmented.
        OptionError
            If there are not so many examples, or `batch_size` is not positive.
        """
        batch_size = whole_number(batch_size, "batch_size")
        reference, examples, num_outputs = open_network(net, data)
        batch, kept = random_examples(examples, num_examples, seed, "subset distance")
        exact = ExactDistance(reference, kept, num_outputs, batch_size, False)
        return cls(exact, batch.indices, len(examples))

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"subset of {len(self.indices)}"

    @property
    def reference(self) -> ReferenceNetwork:
        """The network that distances are measured from."""
        return self.stored.reference

    @property
    def num_bytes(self) -> int:
        """Inputs of the stored examples."""
        return self.stored.num_bytes

    def distance(
        self, other: Other, *, metric: Metric = "euclidean", outputs: Any = None
    ) -> Float[Tensor, ""]:
        """Mean discrepancy over the stored examples.

        Parameters
        ----------
        other
            A module of the same architecture, or its tensors by name.
        metric
            How two rows of outputs are compared.
        outputs
            Which outputs are looked at; None for all.

        Returns
        -------
        Tensor
            A number from 0 in the type of the other weights, but at least float32;
            differentiable in them.

        Raises
        ------
        WeightsError
            For weights of another architecture.
        NetworkError
            If weights, outputs or the distance are not finite.
        ShapeError
            If `outputs` are out of range, or the only one where probabilities are compared.
        OptionError
            For an unknown metric.
        """
        return self.stored.distance(other, metric=metric, outputs=outputs)
