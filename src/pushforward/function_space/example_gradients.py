"""Losses of single examples and their gradients at the reference weights, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad_and_value, jacrev, vmap
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

from pushforward.errors import DataError, NetworkError, OptionError, ShapeError
from pushforward.function_space.metrics import Metric
from pushforward.function_space.network import ReferenceNetwork
from pushforward.networks.data import Batch, Examples
from pushforward.networks.parameters import ParameterSpace
from pushforward.options import whole_number

__all__ = ["ExampleGradients", "Loss", "metric_of", "open_examples"]

Loss: TypeAlias = Literal["cross_entropy", "squared"] | Callable[[Tensor, Tensor], Tensor]
"""By name, or from the outputs ``(K,)`` and the target of one example to a scalar."""

_BATCH_BYTES = 2**28  # of gradients at once
_LARGEST_BATCH = 512


@dataclass(frozen=True, eq=False)
class ExampleGradients:
    """Gradients of a loss, one row for each example, in float64.

    Parameters
    ----------
    reference
        The network.
    space
        The parameters that count.
    loss
        ``"cross_entropy"`` takes integer labels; ``"squared"`` is ``|z - y|^2 / 2`` summed over the
        outputs; or a function of one example's outputs and target.

    Examples
    --------
    >>> import torch
    >>> reference = ReferenceNetwork.of(torch.nn.Linear(2, 1).double(), (2,))
    >>> found = ExampleGradients(reference, ParameterSpace.of(reference.tensors), "squared")
    >>> examples = Examples.read((torch.ones(5, 2).double(), torch.zeros(5, 1).double()))
    >>> [tuple(rows.shape) for _, _, rows in found.batches(examples, 3)]
    [(3, 3), (2, 3)]
    """

    reference: ReferenceNetwork
    space: ParameterSpace
    loss: Loss

    def __post_init__(self) -> None:
        if self.loss not in ("cross_entropy", "squared") and not callable(self.loss):
            raise OptionError(
                f"unknown loss {self.loss!r}",
                where="loss",
                advice="Choose cross_entropy or squared, or give a function of the outputs and the "
                "target of one example.",
            )

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the network at the reference, float64."""
        return {
            name: t.double() if t.is_floating_point() else t
            for name, t in self.reference.tensors.items()
        }

    def open(self, source: Any, name: str) -> Examples:
        """Read examples and try the loss on a few.

        Parameters
        ----------
        source
            Whatever `Examples.read` takes.
        name
            How messages call them.

        Returns
        -------
        opened : Examples
            With targets.

        Raises
        ------
        DataError
            If the data cannot be read, or the loss is not finite on the first of them.
        """
        examples = open_examples(self.reference, source, self.loss, name)
        self.rows(examples.select(torch.arange(min(len(examples), 2))), name)
        return examples

    def batch_size(self, given: int | None, rows: int = 1) -> int:
        """Examples whose gradients are held at once.

        Parameters
        ----------
        given
            What the caller wants; None for as many as 256 MiB hold, 512 at most.
        rows
            Gradients of one example.

        Returns
        -------
        int
            At least 1.

        Raises
        ------
        OptionError
            If `given` is not positive.
        """
        if given is not None:
            return whole_number(given, "batch_size")
        return max(1, min(_LARGEST_BATCH, _BATCH_BYTES // (8 * rows * self.space.size)))

    def batches(
        self, examples: Examples, batch_size: int
    ) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Batches with their losses and gradients.

        Parameters
        ----------
        examples
            From `open`.
        batch_size
            Examples at once.

        Yields
        ------
        tuple
            A batch of ``n``, its losses ``(n,)`` and its gradients ``(n, P)``.
        """
        for batch in examples.batches(batch_size):
            losses, rows = self.rows(batch, examples.name)
            yield batch, losses, rows

    def rows(
        self, batch: Batch, name: str = "data"
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, "n P"]]:
        """Losses of a batch and their gradients.

        Parameters
        ----------
        batch
            ``n`` examples.
        name
            How messages call the data.

        Returns
        -------
        losses
            ``(n,)``.
        gradients
            ``(n, P)``.

        Raises
        ------
        DataError
            When the loss or its gradient is not finite.
        """
        assert batch.targets is not None
        targets = self._targets(batch, name)
        losses, rows = self._mapped(grad_and_value(self._loss_of_one), batch, targets)
        if not bool(torch.isfinite(losses).all() and torch.isfinite(rows).all()):
            bad = ~(torch.isfinite(losses) & torch.isfinite(rows).all(1))
            number = int(batch.indices[bad.cpu().nonzero()[0, 0]])
            raise DataError(
                f"the loss of example {number} or its gradient is not finite",
                where=name,
                advice="Check the loss function, and inputs and targets of this example.",
            )
        return losses, rows

    def output_rows(self, batch: Batch) -> tuple[Float[Tensor, "n K"], Float[Tensor, "n K P"]]:
        """Outputs of a batch and their Jacobians.

        Parameters
        ----------
        batch
            ``n`` examples; targets are not looked at.

        Returns
        -------
        outputs
            ``(n, K)``.
        jacobians
            ``(n, K, P)``.
        """

        def twice(vector: Tensor, inputs: Any, _target: Tensor) -> tuple[Tensor, Tensor]:
            outputs = self._outputs_of_one(vector, inputs)
            return outputs, outputs

        none = torch.zeros(len(batch), device=self.reference.device)
        return self._mapped(jacrev(twice, has_aux=True), batch, none)

    def output_gradient(self, batch: Batch, name: str = "data") -> Float[Tensor, "n K"]:
        """Gradient of the loss in the outputs, at the reference.

        Parameters
        ----------
        batch
            ``n`` examples.
        name
            How messages call the data.

        Returns
        -------
        Tensor
            ``(n, K)``.
        """
        assert batch.targets is not None
        targets = self._targets(batch, name)
        with torch.no_grad():
            outputs = self.reference.outputs(self.tensors, _to_double(batch.inputs))
        with torch.enable_grad():
            outputs = outputs.detach().requires_grad_()
            total = torch.stack(
                [self._loss(z, y) for z, y in zip(outputs, targets, strict=True)]
            ).sum()
            (found,) = torch.autograd.grad(total, outputs)
        return found

    def losses_at(self, tensors: dict[str, Tensor], batch: Batch) -> Float[Tensor, " n"]:
        """Losses of a batch at other weights.

        Parameters
        ----------
        tensors
            All tensors of the network, float64.
        batch
            ``n`` examples.

        Returns
        -------
        Tensor
            ``(n,)``, differentiable in the tensors.
        """
        targets = self._targets(batch, "data")
        outputs = self.outputs_at(tensors, batch)
        return torch.stack([self._loss(z, y) for z, y in zip(outputs, targets, strict=True)])

    def outputs_at(self, tensors: dict[str, Tensor], batch: Batch) -> Float[Tensor, "n K"]:
        """Outputs of a batch at other weights.

        Parameters
        ----------
        tensors
            All tensors of the network.
        batch
            ``n`` examples.

        Returns
        -------
        Tensor
            ``(n, K)`` float64, differentiable in the tensors.
        """
        double = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
        return self.reference.outputs(double, _to_double(batch.inputs))

    def _mapped(
        self, function: Callable[..., Any], batch: Batch, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        vector = self.space.ravel(self.tensors)
        try:
            first, second = vmap(function, in_dims=(None, 0, 0))(
                vector, _to_double(batch.inputs), targets
            )
        except (RuntimeError, TypeError, IndexError) as error:
            raise NetworkError(
                f"gradients of single examples failed: {error}",
                where="net",
                advice="Inputs and targets have to be what the network and the loss expect, and "
                "the network one that torch.func.vmap can run.",
            ) from error
        return second.detach(), first.detach()

    def _outputs_of_one(self, vector: Tensor, inputs: Any) -> Tensor:
        tensors = {**self.tensors, **self.space.unravel(vector)}
        return self.reference.outputs(tensors, tree_map(lambda x: x.unsqueeze(0), inputs))[0]

    def _loss_of_one(self, vector: Tensor, inputs: Any, target: Tensor) -> Tensor:
        return self._loss(self._outputs_of_one(vector, inputs), target)

    def _loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        if self.loss == "cross_entropy":
            return cross_entropy(outputs, target)
        if self.loss == "squared":
            return (outputs - target).square().sum() / 2
        assert callable(self.loss)
        found = self.loss(outputs, target)
        if not isinstance(found, Tensor) or found.numel() != 1:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise OptionError(
                f"the loss returned {shape}",
                where="loss",
                advice="Return a scalar: it gets the outputs (K,) and the target of one example.",
            )
        return found.reshape(())

    def _targets(self, batch: Batch, name: str) -> Tensor:
        targets = batch.targets
        assert targets is not None
        if callable(self.loss):
            return _to_double(targets)
        count = self._num_outputs(batch)
        if self.loss == "squared":
            if targets[0].numel() != count:
                raise ShapeError(
                    f"{targets[0].numel()} targets for {count} outputs of an example",
                    where=name,
                    advice="Squared loss needs a number for each output.",
                )
            return targets.reshape(len(batch), count).double()
        needs = (
            "Cross-entropy needs one integer label for each example, below the number of outputs, "
            'and two outputs or more: give the network two logits, or use loss="squared".'
        )
        if count < 2:
            raise DataError(
                f"cross-entropy of a network with {count} output", where=name, advice=needs
            )
        labels = targets.reshape(len(batch), -1)
        if labels.shape[1] != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
            raise ShapeError(
                f"targets of type {targets.dtype} and shape {tuple(targets.shape)}",
                where=name,
                advice=needs,
            )
        labels = labels[:, 0].long()
        if int(labels.min()) < 0 or int(labels.max()) >= count:
            raise DataError(
                f"labels from {int(labels.min())} to {int(labels.max())}",
                where=name,
                advice=f"The network has {count} outputs: labels run from 0 to {count - 1}.",
            )
        return labels

    def _num_outputs(self, batch: Batch) -> int:
        first = tree_map(lambda x: x[:1], _to_double(batch.inputs))
        try:
            with torch.no_grad():
                return self.reference.outputs(self.tensors, first).shape[1]
        except (RuntimeError, TypeError, ValueError) as error:
            raise NetworkError(
                f"it cannot take these inputs: {error}",
                where="net",
                advice="Give inputs of the shape that the network was trained on.",
            ) from error


def open_examples(reference: ReferenceNetwork, source: Any, loss: Loss, name: str) -> Examples:
    """Read examples and see whether their targets are what the loss takes, without a gradient.

    Parameters
    ----------
    reference
        The network.
    source
        Whatever `Examples.read` takes.
    loss
        Of single examples.
    name
        How messages call them.

    Returns
    -------
    opened : Examples
        With targets, on the device of the network.

    Raises
    ------
    DataError
        If the data cannot be read, have no targets, or labels beyond the outputs of the network.
    """
    examples = Examples.read(source, name=name, device=reference.device)
    batch = examples.select(torch.arange(min(len(examples), 2)))
    if batch.targets is None:
        raise DataError("they have no targets", where=name, advice="Give (inputs, targets).")
    names = reference.parameter_names
    space = ParameterSpace.of({name: reference.tensors[name] for name in names})
    ExampleGradients(reference, space, loss)._targets(batch, name)
    return examples


def metric_of(loss: Loss, metric: Metric | None) -> Metric:
    """The metric whose curvature is the Gauss-Newton matrix of a loss.

    Parameters
    ----------
    loss
        Of single examples.
    metric
        What the caller wants; None for the one that belongs to the loss.

    Returns
    -------
    str
        ``"fisher"`` for cross-entropy, ``"euclidean"`` for squared loss.

    Raises
    ------
    OptionError
        When a loss function comes without a metric.
    """
    if metric is not None:
        return metric
    if loss == "cross_entropy":
        return "fisher"
    if loss == "squared":
        return "euclidean"
    raise OptionError(
        "it has to be named when the loss is a function"
        if callable(loss)
        else f"unknown loss {loss!r}",
        where="metric" if callable(loss) else "loss",
        advice="Choose cross_entropy or squared. A function of the outputs and the target of one "
        "example needs a metric: fisher for outputs that are logits, euclidean for values.",
    )


def _to_double(tree: Any) -> Any:
    return tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree
    )
