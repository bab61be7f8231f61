"""Distance of the tangent (NTK): how far the outputs move to first order in the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.function_space.answers import as_distance
from pushforward.function_space.baselines.passes import (
    displacement,
    full_precision,
    input_bytes,
    inputs_for,
    not_negative,
    open_network,
    output_numbers,
    random_examples,
)
from pushforward.function_space.metrics import (
    Metric,
    check_axes,
    check_metric,
    check_probabilities,
    output_curvature,
)
from pushforward.function_space.network import Other, ReferenceNetwork
from pushforward.networks.batches import Inputs
from pushforward.networks.data import Examples
from pushforward.networks.model import FunctionalModel
from pushforward.networks.tangent import Tangent
from pushforward.options import whole_number
from pushforward.runs.progress import track

__all__ = ["TangentDistance"]


@dataclass(frozen=True, eq=False)
class TangentDistance:
    """Mean of ``(J d)^T H (J d) / 2`` over examples, with the tangent ``J`` at the reference.

    Use `of`. Over all data it is the quadratic of the exact Gauss–Newton matrix, never formed; it
    is exact when only the last layer moved and outputs are compared by ``euclidean``. Linear in
    the displacement, it keeps no activations for the gradient.

    Parameters
    ----------
    reference
        The network that distances are measured from.
    examples
        The data, or copies of some of them.
    num_outputs
        Outputs of an example.
    stored
        Whether `examples` are copies.
    num_examples
        Of the whole data set, also where `examples` are copies of some.
    batch_size
        Examples run at a time.
    progress
        Whether to show a bar: True, False, or None for terminals.
    """

    reference: ReferenceNetwork
    examples: Examples
    num_outputs: int
    stored: bool
    num_examples: int
    batch_size: int = 512
    progress: bool | None = None

    @classmethod
    def of(
        cls,
        net: nn.Module,
        data: Any,
        *,
        num_examples: int | None = None,
        seed: int = 0,
        batch_size: int = 512,
        progress: bool | None = None,
    ) -> TangentDistance:
        """Keep a network with all its data, or with copies of some.

        Parameters
        ----------
        net
            A module.
        data
            As `ExactDistance.of` takes them.
        num_examples
            How many random ones to copy; None keeps the source of all.
        seed
            Of the draw.
        batch_size
            Examples run at a time.
        progress
            Whether to show a bar: True, False, or None for terminals.

        Returns
        -------
        TangentDistance
            Nothing is computed yet.

        Raises
        ------
        NetworkError
            For what is no network, weights that are not finite, or inputs that it cannot take.
        DataError
            For data that are empty, not finite, shuffled or augmented.
        OptionError
            If `batch_size` is not positive, or there are not so many examples.
        """
        batch_size = whole_number(batch_size, "batch_size")
        reference, examples, num_outputs = open_network(net, data)
        total, stored = len(examples), num_examples is not None
        if num_examples is not None:
            _, examples = random_examples(examples, num_examples, seed, "tangent distance")
        return cls(reference, examples, num_outputs, stored, total, batch_size, progress)

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"tangent on {len(self.examples)}" if self.stored else "tangent"

    @property
    def num_bytes(self) -> int:
        """Inputs of the examples that it keeps, or whose source it keeps."""
        return input_bytes(self.examples)

    @cached_property
    def _tangent(self) -> Tangent:
        names = self.reference.parameter_names
        return Tangent(FunctionalModel.of(self.reference.module, names))

    def distance(
        self, other: Other, *, metric: Metric = "euclidean", outputs: Any = None
    ) -> Float[Tensor, ""]:
        """Mean quadratic of the tangent.

        Parameters
        ----------
        other
            A module of the same architecture, or its tensors by name.
        metric
            Whose curvature at the reference weighs the moves of the outputs.
        outputs
            Which outputs are looked at; None for all. Probabilities are those among them.

        Returns
        -------
        Tensor
            A number from 0 in the type of the other weights, but at least float32;
            twice differentiable in them.

        Raises
        ------
        WeightsError
            For weights of another architecture, or buffers that moved.
        NetworkError
            If weights, outputs or the distance are not finite.
        ShapeError
            If `outputs` are out of range, or the only one where probabilities are compared.
        OptionError
            For an unknown metric.
        """
        check_metric(metric)
        check_axes(self.reference.output_shape, metric)
        chosen = output_numbers(self.reference, self.num_outputs, outputs)
        check_probabilities(len(chosen), metric)
        moved = displacement(self.reference, other)
        tangent, count, size = self._tangent, len(self.examples), self.batch_size
        vector = tangent.model.space.ravel(moved).to(self.reference.dtype)
        total = torch.zeros((), dtype=torch.float64, device=self.reference.device)
        with track(count, "Tangent over the data", enabled=self.progress) as advance:
            for start in range(0, count, size):
                numbers = torch.arange(start, min(start + size, count))

                def read(numbers: Tensor = numbers) -> Inputs:
                    return inputs_for(self.reference, self.examples.select(numbers).inputs)

                change: Tensor = _Push.apply(tangent, read, vector)
                change = change[:, chosen].double()
                if metric == "euclidean":
                    part = change.square().sum()
                else:
                    rows = self.reference.outputs(self.reference.tensors, read())
                    curvature = output_curvature(rows[:, chosen].double(), metric)
                    part = torch.einsum("bi,bij,bj->", change, curvature, change)
                total = total + part / 2
                advance(len(numbers))
        return as_distance(not_negative(total / count), self.reference, other)


class _Push(torch.autograd.Function):
    """``d -> J d`` on a batch; its derivative is the transpose, so nothing need be kept."""

    @staticmethod
    def forward(
        ctx: Any, tangent: Tangent, read: Callable[[], Inputs], vector: Tensor
    ) -> Float[Tensor, "B K"]:
        ctx.tangent, ctx.read = tangent, read
        with full_precision(vector.device):
            return tangent.jvp(read(), vector.detach().unsqueeze(0))[0].flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        return None, None, _Pull.apply(ctx.tangent, ctx.read, gradients[0])


class _Pull(torch.autograd.Function):
    """``u -> J^T u`` on a batch."""

    @staticmethod
    def forward(
        ctx: Any, tangent: Tangent, read: Callable[[], Inputs], cotangent: Tensor
    ) -> Float[Tensor, " P"]:
        ctx.tangent, ctx.read = tangent, read
        inputs = read()
        with full_precision(cotangent.device):
            shape = tangent.model.predict(inputs).shape
            return tangent.vjp(inputs, cotangent.detach().reshape(1, *shape))[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        return None, None, _Push.apply(ctx.tangent, ctx.read, gradients[0])
