"""Whether a network, data and a loss belong together, and what one example takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pushforward.errors import DataError, NetworkError, OptionError, ShapeError
from pushforward.networks.batches import Batch
from pushforward.networks.data import Examples
from pushforward.networks.likelihoods import Gaussian, Likelihood
from pushforward.networks.model import FunctionalModel

__all__ = ["activation_bytes", "check_loss", "check_problem"]


def activation_bytes(model: FunctionalModel, batch: Batch) -> int:
    """Memory that one example takes on its way through a network.

    Parameters
    ----------
    model
        The network.
    batch
        Some examples.

    Returns
    -------
    int
        Bytes of what a backward pass would keep, outputs included, parameters not.
    """
    seen: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in model.parameters.values()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own and tensor.dim() and len(tensor) == len(batch):
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        parameters = {k: p.detach().requires_grad_() for k, p in model.parameters.items()}
        outputs = model(parameters, batch.inputs)
    total = sum(seen.values()) + outputs.numel() * outputs.element_size()
    return max(1, total // len(batch))


def check_problem(
    model: FunctionalModel, examples: Examples, likelihood: Likelihood | None = None
) -> None:
    """Refuse outputs and targets that do not belong together, and networks that are not functions.

    Parameters
    ----------
    model, examples, likelihood
        The problem; without a likelihood the targets are not looked at.

    Raises
    ------
    ShapeError
        When the outputs have not one row for each example.
    DataError
        When outputs are not finite or change from call to call.
    """
    batch = examples.select(torch.arange(min(len(examples), 8)))
    outputs, again = model.predict(batch.inputs), model.predict(batch.inputs)
    if len(outputs) != len(batch):
        raise ShapeError(
            f"{len(outputs)} rows of outputs for {len(batch)} examples",
            where=model.name,
            advice="The first axis of the outputs has to be that of the examples.",
        )
    if not outputs.is_floating_point() and not outputs.is_complex():
        raise DataError(
            f"the network's outputs are {outputs.dtype}",
            where=model.name,
            advice="Return real numbers, such as logits in place of classes.",
        )
    if not bool(torch.isfinite(outputs).all()):
        raise DataError(
            "the network's outputs hold NaN or infinite entries",
            where=examples.name,
            advice="Check the preprocessing of the inputs and the weights.",
        )
    if not torch.equal(outputs, again):
        raise DataError(
            "two passes over the same inputs gave different outputs",
            where=model.name,
            advice="Remove randomness from the forward pass (dropout, noise): net.eval(); "
            "and do not write into the inputs, as x.sub_(mean) does.",
        )
    _check_independence(model, examples, outputs)
    if likelihood is not None and batch.targets is not None:
        likelihood.check_targets(outputs, batch.targets, examples.name)
    if isinstance(likelihood, Gaussian) and outputs.is_complex():
        raise DataError("outputs are complex", where=model.name, advice="Return real outputs.")


def _check_independence(model: FunctionalModel, examples: Examples, outputs: Tensor) -> None:
    """Refuse a network in which an example sees the others: there is no function to speak of.

    Raises
    ------
    DataError
        When outputs of examples depend on what else is in the batch.
    """
    half = len(outputs) // 2
    if half == 0:
        return
    # The last ones: a recurrent layer without batch_first runs through the batch from its first.
    last = torch.arange(len(outputs) - half, len(outputs))
    fewer = model.predict(examples.select(last).inputs)
    # Other sizes of batches round differently: about 2e-3 in float32, 6e-7 in float64 is allowed.
    near = torch.finfo(outputs.dtype).eps ** 0.4 * float(outputs.abs().max())
    if fewer.shape != outputs[-half:].shape or not torch.allclose(
        fewer, outputs[-half:], rtol=0, atol=near
    ):
        raise DataError(
            "the outputs of an example depend on the other examples of its batch",
            where=model.name,
            advice="Let every example be computed alone: no means over the first axis, and "
            "normalisation with fixed statistics (net.eval()).",
        )


def check_loss(
    model: FunctionalModel, examples: Examples, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Refuse networks that are not functions, and losses that are not one number an example.

    Parameters
    ----------
    model
        The network.
    examples
        Its data, with targets.
    loss
        From outputs ``(B, *event)`` and targets ``(B, ...)`` to the losses ``(B,)``.

    Raises
    ------
    NetworkError
        When the loss cannot take the outputs.
    OptionError
        When it is not one number for each example alone.
    DataError
        When it is not finite at the network's weights.
    """
    check_problem(model, examples)
    batch = examples.select(torch.arange(min(len(examples), 8)))
    assert batch.targets is not None
    outputs = model.predict(batch.inputs)
    try:
        found = loss(outputs, batch.targets)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise NetworkError(
            f"the loss cannot take outputs {tuple(outputs.shape)} and targets "
            f"{tuple(batch.targets.shape)}: {error}",
            where="loss",
            advice="It is called with the outputs and targets of a batch.",
        ) from error
    if not isinstance(found, Tensor) or tuple(found.shape) != (len(batch),):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise OptionError(
            f"the loss returned {shape} for {len(batch)} examples",
            where="loss",
            advice="Return one number an example: reduction='none', summed over outputs.",
        )
    # The classic is (B, 1) against (B,), which broadcasts every output against every target.
    alone = loss(outputs[:1], batch.targets[:1])
    if tuple(alone.shape) != (1,) or not torch.allclose(
        alone, found[:1], 1e-3, 1e-6, equal_nan=True
    ):
        raise OptionError(
            f"the loss of an example depends on the other examples: {float(found[0]):.4g} among "
            f"{len(batch)}, {float(alone.flatten()[0]):.4g} alone",
            where="loss",
            advice=f"Check that outputs {tuple(outputs.shape)} and targets "
            f"{tuple(batch.targets.shape)} do not broadcast against each other, and that nothing "
            "is averaged over the batch.",
        )
    if not bool(torch.isfinite(found).all()):
        raise DataError(
            "the loss is not finite at the network's weights",
            where="loss",
            advice="Check targets and outputs.",
        )
