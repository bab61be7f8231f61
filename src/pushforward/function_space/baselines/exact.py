"""Distance by all data: both networks on every example, each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pushforward.function_space.answers import as_distance, check_finite
from pushforward.function_space.baselines.passes import (
    input_bytes,
    inputs_for,
    not_negative,
    open_network,
    output_numbers,
    weights_of,
)
from pushforward.function_space.metrics import Metric, check_axes, check_metric, discrepancy
from pushforward.function_space.network import Other, ReferenceNetwork
from pushforward.networks.data import Examples
from pushforward.options import whole_number
from pushforward.runs.progress import track
from pushforward.typing import Params

__all__ = ["ExactDistance"]


@dataclass(frozen=True, eq=False)
class ExactDistance:
    """Mean discrepancy over the data themselves; it keeps their source.

    Use `of`. A gradient runs each batch once more instead of keeping its activations, so memory
    does not grow with the data; second derivatives by `torch.autograd.grad` work too.

    Parameters
    ----------
    reference
        The network that distances are measured from.
    examples
        The data.
    num_outputs
        Outputs of an example.
    batch_size
        Examples run at a time.
    progress
        Whether to show a bar: True, False, or None for terminals.
    """

    reference: ReferenceNetwork
    examples: Examples
    num_outputs: int
    batch_size: int = 512
    progress: bool | None = None

    @classmethod
    def of(
        cls, net: nn.Module, data: Any, *, batch_size: int = 512, progress: bool | None = None
    ) -> ExactDistance:
        """Keep a network and where its data are.

        Parameters
        ----------
        net
            A module.
        data
            Inputs, ``(inputs, targets)``, a `DataLoader`, or whatever else `Examples.read` takes;
            targets are not used.
        batch_size
            Examples run at a time.
        progress
            Whether to show a bar: True, False, or None for terminals.

        Returns
        -------
        ExactDistance
            Nothing is computed yet.

        Raises
        ------
        NetworkError
            For what is no network, weights that are not finite, or inputs that it cannot take.
        DataError
            For data that are empty, not finite, shuffled or augmented.
        OptionError
            If `batch_size` is not positive.
        """
        batch_size = whole_number(batch_size, "batch_size")
        reference, examples, num_outputs = open_network(net, data)
        return cls(reference, examples, num_outputs, batch_size, progress)

    @property
    def name(self) -> str:
        """How tables call it."""
        return "exact"

    @property
    def num_examples(self) -> int:
        """Examples of the data."""
        return len(self.examples)

    @property
    def num_bytes(self) -> int:
        """Inputs of all examples."""
        return input_bytes(self.examples)

    def distance(
        self, other: Other, *, metric: Metric = "euclidean", outputs: Any = None
    ) -> Float[Tensor, ""]:
        """Mean discrepancy over all data.

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
        check_metric(metric)
        check_axes(self.reference.output_shape, metric)
        chosen = output_numbers(self.reference, self.num_outputs, outputs)
        tensors = weights_of(self.reference, other)
        unmoved = self.reference.unchanged(tensors)
        if unmoved and metric == "kl":
            # The same value and curvature, and a gradient of exact zeros instead of rounding.
            metric = "fisher"
        names = tuple(tensors)

        def batch_sum(start: int, *values: Tensor) -> Tensor:
            given = dict(zip(names, values, strict=True))
            return self._rows(given, start, metric, chosen, unmoved).sum()

        count, size = len(self.examples), self.batch_size
        learning = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
        total = torch.zeros((), dtype=torch.float64, device=self.reference.device)
        with track(count, "Distance over the data", enabled=self.progress) as advance:
            for start in range(0, count, size):
                if learning and count > size:
                    part = checkpoint(
                        batch_sum,
                        start,
                        *tensors.values(),
                        use_reentrant=False,
                        preserve_rng_state=False,  # evaluation mode: nothing is drawn
                    )
                else:
                    part = batch_sum(start, *tensors.values())
                total = total + part
                advance(min(size, count - start))
        return as_distance(not_negative(total / count), self.reference, other)

    @torch.no_grad()
    def per_example(
        self, other: Other, *, metric: Metric = "euclidean", outputs: Any = None
    ) -> Float[Tensor, " N"]:
        """Discrepancy of each example.

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
            ``(N,)`` float64 in the order of the data, without history.

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
        check_metric(metric)
        check_axes(self.reference.output_shape, metric)
        chosen = output_numbers(self.reference, self.num_outputs, outputs)
        tensors = weights_of(self.reference, other)
        unmoved = self.reference.unchanged(tensors)
        parts = []
        with track(len(self.examples), "Distance by example", enabled=self.progress) as advance:
            for start in range(0, len(self.examples), self.batch_size):
                parts.append(self._rows(tensors, start, metric, chosen, unmoved))
                advance(len(parts[-1]))
        found = torch.cat(parts).clamp(min=0)
        check_finite(found)
        return found

    def _rows(
        self, tensors: Params, start: int, metric: Metric, chosen: Tensor, unmoved: bool
    ) -> Float[Tensor, " B"]:
        stop = min(start + self.batch_size, len(self.examples))
        batch = self.examples.select(torch.arange(start, stop))
        inputs = inputs_for(self.reference, batch.inputs)
        new = self.reference.outputs(tensors, inputs)[:, chosen].double()
        if unmoved:
            # Not computed a second time: kernels without gradient may round otherwise.
            old = new.detach()
        else:
            with torch.no_grad():
                old = self.reference.outputs(self.reference.tensors, inputs)[:, chosen].double()
        return discrepancy(old, new, metric)
