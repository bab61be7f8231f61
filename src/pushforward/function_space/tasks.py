"""Tasks that are learned one after the other: data, and the outputs that they are about."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.errors import DataError, NetworkError
from pushforward.function_space.network import select_outputs
from pushforward.function_space.penalty import Outputs
from pushforward.networks.data import Batch, Examples

__all__ = ["OpenTask", "Task", "evaluating"]

_EVALUATION_BATCH = 1000


@dataclass(frozen=True, eq=False)
class Task:
    """Data to learn from, data to test on, and the outputs that the task is about.

    Parameters
    ----------
    train, test
        ``(inputs, targets)``, a loader, or whatever else `pushforward.laplace` takes. Labels are
        numbers of outputs of the whole network.
    outputs
        Which outputs of the network belong to the task, its head: loss and accuracy look at no
        others. None: all.
    name
        How tables call it.
    """

    train: Any
    test: Any
    outputs: Outputs = None
    name: str = ""


@dataclass(frozen=True, eq=False)
class OpenTask:
    """A task whose data are open.

    Parameters
    ----------
    given
        By the user.
    name
        Never empty.
    train, test
        Its data, on the device of the network.
    chosen
        Numbers of its outputs; None for all.
    places
        Place among them of each output of the network, -1 for others.
    shape
        Of what the network says about one example, before outputs are chosen.
    identity
        What tells the task from others, in JSON's types.
    """

    given: Task
    name: str
    train: Examples
    test: Examples
    chosen: Tensor | None
    places: Tensor | None
    shape: tuple[int, ...]
    identity: dict[str, Any]

    @classmethod
    def of(cls, task: Task, number: int, net: nn.Module, device: torch.device) -> OpenTask:
        """Open the data of a task.

        Parameters
        ----------
        task, number
            What is given, and its place in the sequence.
        net
            That is to learn it.
        device
            For batches.

        Returns
        -------
        OpenTask
            Checked to fit the network.

        Raises
        ------
        DataError
            For data that cannot be read, or inputs that are not one tensor or that the network does
            not take.
        NetworkError
            For a network whose outputs are no tensor.
        ShapeError
            For outputs that the network does not have.
        """
        name = task.name or f"task {number + 1}"
        train = Examples.read(task.train, name=f"training data of {name}", device=device)
        test = Examples.read(task.test, name=f"test data of {name}", device=device)
        chosen = places = None
        shape, _ = _output_shape(net, train), _output_shape(net, test)
        count = math.prod(shape)
        if task.outputs is not None:
            chosen = select_outputs(count, task.outputs)
            assert chosen is not None
            places = torch.full((count,), -1).scatter(0, chosen, torch.arange(len(chosen)))
            chosen, places = chosen.to(device), places.to(device)
        identity = {
            "name": name,
            "train": train.fingerprint(),
            "test": test.fingerprint(),
            "outputs": None if chosen is None else chosen.tolist(),
        }
        return cls(task, name, train, test, chosen, places, shape, identity)

    def outputs_and_targets(self, net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run a batch and look at the head of the task.

        Parameters
        ----------
        net
            In any mode.
        batch
            Of its data.

        Returns
        -------
        outputs
            Those of the task.
        targets
            Labels are places among these outputs.

        Raises
        ------
        DataError
            For a label that is none of the outputs chosen. Where none are chosen what targets may
            be is up to the loss.
        """
        outputs, targets = net(batch.inputs), batch.targets
        assert targets is not None  # asked for when the data were opened
        if self.chosen is None:
            return outputs, targets
        if not targets.is_floating_point() and targets.dim() == 1:
            targets = self._labels(batch, self.name)
        return outputs.index_select(1, self.chosen), targets

    def _labels(self, batch: Batch, where: str) -> Tensor:
        """Labels of a batch as places among the outputs of the task.

        Returns
        -------
        Tensor
            ``(n,)``.

        Raises
        ------
        DataError
            For one that is none of them.
        """
        targets = batch.targets
        assert targets is not None  # asked for when the data were opened
        count = self.shape[0] if self.places is None else len(self.places)
        known = (targets >= 0) & (targets < count)
        if self.places is not None:
            targets = torch.where(known, self.places[targets * known], -1)
            known = targets >= 0
        if not bool(known.all()):
            raise DataError(
                f"example {int(batch.indices[~known.cpu()][0])} has a label outside of the outputs "
                "of the task",
                where=where,
                advice="Labels are numbers of outputs of the whole network: whole numbers from 0, "
                f"below the number of outputs, {count}"
                + ("." if self.chosen is None else f"; of this task {self.chosen.tolist()}."),
            )
        return targets

    def require_classes(self) -> None:
        """Refuse a task without a share of labels that the largest output gets right.

        Raises
        ------
        DataError
            Unless each test example has one integer label, which is that of an output of the task,
            and the task two outputs or more.
        """
        advice = (
            "The default accuracy asks whether the largest of two or more outputs is that of an "
            "integer label (N,). Give evaluate=, a function of the network and the task, to score "
            "anything else."
        )
        targets = self.test.select(torch.zeros(1, dtype=torch.long)).targets
        assert targets is not None  # asked for when the data were opened
        kind, shape = targets.dtype, (len(self.test), *targets.shape[1:])
        if len(shape) != 1 or kind.is_floating_point or kind.is_complex or kind == torch.bool:
            raise DataError(
                f"targets of type {kind} and shape {shape} are no labels",
                where=self.test.name,
                advice=advice,
            )
        of_task = self.shape if self.chosen is None else (len(self.chosen), *self.shape[1:])
        if len(of_task) != 1 or of_task[0] < 2:
            raise DataError(
                f"outputs of shape {of_task} for each example are no classes",
                where=self.name,
                advice=advice,
            )
        # Another label would count as a wrong answer, whatever the network says.
        for batch in self.test.batches(_EVALUATION_BATCH):
            self._labels(batch, self.test.name)

    def labels_are_ignored(self, batch: Batch) -> bool:
        """Whether a batch has nothing but labels below 0, which cross-entropy leaves out."""
        targets = batch.targets
        assert targets is not None  # asked for when the data were opened
        return not targets.is_floating_point() and bool((targets < 0).all())

    def accuracy(self, net: nn.Module) -> float:
        """Share of the test data that is classified correctly; see `require_classes`.

        Returns
        -------
        float
            The largest of the outputs of the task decides.
        """
        hits = 0
        with torch.no_grad():
            for batch in self.test.batches(_EVALUATION_BATCH):
                outputs, targets = self.outputs_and_targets(net, batch)
                hits += int((outputs.argmax(1) == targets).sum())
        return hits / len(self.test)


def _output_shape(net: nn.Module, examples: Examples) -> tuple[int, ...]:
    """Shape of what the network says about one example; what it does not take is refused."""
    first = examples.select(torch.zeros(1, dtype=torch.long)).inputs
    if not isinstance(first, Tensor):
        raise DataError(
            f"inputs are {type(first).__name__}",
            where=examples.name,
            advice="Give tensors: the network is called with one.",
        )
    try:
        with evaluating(net), torch.no_grad():
            found = net(first)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        own = next((p.dtype for p in net.parameters() if p.is_floating_point()), None)
        raise DataError(
            f"the network does not take an input of type {first.dtype} and shape "
            f"{tuple(first.shape)}: {error}",
            where=examples.name,
            advice="Give examples as the network takes them: of the shape that its first layer "
            f"expects, and numbers of the type of its weights, {own}.",
        ) from error
    if not isinstance(found, Tensor) or found.dim() < 1:
        raise NetworkError(
            f"it returns {type(found).__name__}",
            where="net",
            advice="Give a network that returns one tensor, a row for each example.",
        )
    return tuple(found.shape[1:])


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode, module by module as it was afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
