"""What every baseline does first: read a network, its data, and the weights of another."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.errors import OptionError, WeightsError
from pushforward.function_space.metrics import Metric, check_metric
from pushforward.function_space.network import Other, ReferenceNetwork, select_outputs
from pushforward.networks.batches import Batch, Inputs, Table
from pushforward.networks.data import Examples
from pushforward.options import whole_number
from pushforward.runs.rng import stream
from pushforward.typing import Params

__all__ = [
    "displacement",
    "fixed_question",
    "full_precision",
    "input_bytes",
    "inputs_for",
    "not_negative",
    "open_network",
    "output_numbers",
    "random_examples",
    "weights_of",
]

_TRIED = 8  # examples


def open_network(
    net: nn.Module, data: Any, *, targets: bool = False
) -> tuple[ReferenceNetwork, Examples, int]:
    """Copy a network, open its data, and try the one on the other.

    Parameters
    ----------
    net
        A module.
    data
        Whatever `Examples.read` takes; inputs alone will do.
    targets
        Whether targets are needed.

    Returns
    -------
    tuple
        The frozen copy, the data on its device, and the number of outputs of an example.

    Raises
    ------
    NetworkError
        For what is no network, weights that are not finite, or inputs that it cannot take.
    DataError
        For data that are empty, not finite, shuffled or augmented, or lack targets.
    """
    examples = Examples.read(data, targets=targets)
    probe = examples.select(torch.tensor([0]))
    column = next(iter(Table(probe.inputs, None).columns().values()))
    reference = ReferenceNetwork.of(net, tuple(column.shape[1:]))
    examples = Examples.read(examples, device=reference.device)
    few = examples.select(torch.arange(min(len(examples), _TRIED)))
    seen = reference.seen_on(inputs_for(reference, few.inputs))
    return seen, examples, prod(seen.output_shape)


def inputs_for(reference: ReferenceNetwork, inputs: Inputs) -> Inputs:
    """Inputs with their real numbers in the type of the weights; integers stay."""
    kind = reference.dtype
    return Table(inputs, None).map(lambda x: x.to(kind) if x.is_floating_point() else x).inputs


def random_examples(
    examples: Examples, num_examples: int, seed: int, purpose: str
) -> tuple[Batch, Examples]:
    """A copy of some examples, drawn without replacement.

    Parameters
    ----------
    examples
        All of them.
    num_examples
        How many to keep.
    seed, purpose
        Of the random stream.

    Returns
    -------
    tuple
        The copies with their numbers in the data set, and the same as a data set of its own.

    Raises
    ------
    OptionError
        If there are not so many.
    """
    num_examples = whole_number(num_examples, "num_examples", most=len(examples))
    order = torch.randperm(len(examples), generator=stream(seed, purpose))
    chosen = order[:num_examples].sort().values
    batch = examples.select(chosen)
    # Chosen by number, the rows are copies already: nothing of the source is kept alive.
    batch = Batch(batch.inputs, None, chosen)
    placeholder = torch.zeros(num_examples)  # tells a tuple of inputs from inputs with targets
    kept = Examples.read((batch.inputs, placeholder), device=examples.device)
    return batch, kept


def input_bytes(examples: Examples) -> int:
    """Bytes of the inputs of all examples."""
    first = examples.select(torch.tensor([0]))
    return Table(first.inputs, None).bytes_per_example * len(examples)


def output_numbers(reference: ReferenceNetwork, count: int, outputs: Any) -> Tensor:
    """Numbers of the chosen outputs on the device of the network; of all for None."""
    chosen = select_outputs(count, outputs)
    return (torch.arange(count) if chosen is None else chosen).to(reference.device)


def weights_of(reference: ReferenceNetwork, other: Other) -> Params:
    """Weights of another network in the number types of the reference, with their history."""
    given = reference.tensors_of(other)
    return {name: given[name].to(own.dtype) for name, own in reference.tensors.items()}


def displacement(reference: ReferenceNetwork, other: Other) -> Params:
    """How far each parameter moved.

    Parameters
    ----------
    reference
        Where from.
    other
        Where to.

    Returns
    -------
    Params
        Differences by name in float64, differentiable in the other weights.

    Raises
    ------
    WeightsError
        If a buffer moved, such as a running statistic: a tangent in the parameters does not see it,
        and a distance without it could be a silent zero.
    """
    given = reference.tensors_of(other)
    moved: Params = {}
    for name, own in reference.tensors.items():
        if name in reference.parameter_names:
            moved[name] = given[name].double() - own.double()
        elif own.is_floating_point() and not bool((given[name].detach() == own).all()):
            raise WeightsError(
                f"the buffer {name!r} moved, and only parameters are followed",
                where="other",
                advice="Freeze running statistics, fold normalisation into the layer before it, "
                "or measure with the data.",
            )
    return moved


def fixed_question(
    built: tuple[Metric, tuple[int, ...]],
    count: int,
    metric: Metric | None,
    outputs: Any,
) -> None:
    """Refuse a question that a quadratic was not built for.

    Parameters
    ----------
    built
        Metric and numbers of the outputs that it was built for.
    count
        How many outputs the network has.
    metric, outputs
        What is asked; None for what it was built for.

    Raises
    ------
    OptionError
        If they differ. KL and Fisher are one and the same to second order.
    """
    own_metric, own_outputs = built
    if metric is not None:
        check_metric(metric)
        if metric != own_metric and {metric, own_metric} != {"kl", "fisher"}:
            raise OptionError(
                f"{metric!r} asked of a quadratic built for {own_metric!r}",
                where="metric",
                advice=f"Build another with metric={metric!r}.",
            )
    chosen = select_outputs(count, outputs)
    if chosen is not None and sorted(chosen.tolist()) != sorted(own_outputs):
        raise OptionError(
            f"outputs {chosen.tolist()} asked of a quadratic built for {list(own_outputs)}",
            where="outputs",
            advice="Build another with these outputs.",
        )


def full_precision(device: torch.device) -> torch.autocast:
    """Keep mixed precision out of a measure: its rounding would be called a distance."""
    return torch.autocast(device_type=device.type, enabled=False)


def not_negative(value: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Lift what rounding put below zero, with the gradient as it is."""
    return value - value.detach().clamp(max=0)
