"""A pass over data for the Gauss–Newton or Fisher matrix of a network, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.errors import ShapeError
from pushforward.function_space.baselines.cotangents import (
    Fisher,
    check_fisher,
    cotangents,
    label_targets,
)
from pushforward.function_space.baselines.layers import LinearLayer, find_layers, other_squares
from pushforward.function_space.baselines.passes import (
    full_precision,
    inputs_for,
    open_network,
    output_numbers,
)
from pushforward.function_space.baselines.scales import (
    ScaleLayer,
    find_scales,
    scale_squares,
)
from pushforward.function_space.metrics import Metric, check_axes, check_probabilities
from pushforward.function_space.network import ReferenceNetwork
from pushforward.networks.batches import Batch, Inputs
from pushforward.networks.data import Examples
from pushforward.options import number, whole_number
from pushforward.runs.rng import stream
from pushforward.typing import Params

__all__ = ["CurvaturePass", "check_damping", "leading_shape"]

Cotangents = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class CurvaturePass:
    """A network, its data, and the directions whose squares make the matrix.

    Parameters
    ----------
    reference
        The network.
    examples
        The data.
    num_outputs
        Outputs of an example.
    metric, outputs, fisher
        What the matrix is of, and how it is found.
    seed
        Of sampled directions.
    batch_size
        Examples run at a time.
    layers
        Layers whose gradients are products of activations and gradients.
    scales
        Normalisation layers with a scale and a shift.
    others
        Names of all other parameters, which take the general and slow way.
    """

    reference: ReferenceNetwork
    examples: Examples
    num_outputs: int
    metric: Metric
    outputs: tuple[int, ...]
    fisher: Fisher
    seed: int
    batch_size: int
    layers: tuple[LinearLayer, ...]
    scales: tuple[ScaleLayer, ...]
    others: tuple[str, ...]

    @classmethod
    def of(
        cls,
        net: nn.Module,
        data: Any,
        metric: Metric,
        outputs: Any,
        fisher: Fisher,
        seed: int,
        batch_size: int,
    ) -> CurvaturePass:
        """Open all that is needed.

        Returns
        -------
        CurvaturePass
            Nothing is computed yet.

        Raises
        ------
        NetworkError
            For what is no network, weights that are not finite, or inputs that it cannot take.
        DataError
            For data that are empty, not finite, shuffled or augmented, or lack targets that are
            needed.
        OptionError
            For an unknown metric or Fisher, or a `batch_size` that is not positive.
        ShapeError
            If `outputs` are out of range, or the only one where probabilities are compared.
        """
        check_fisher(fisher, metric)
        batch_size = whole_number(batch_size, "batch_size")
        reference, examples, count = open_network(net, data, targets=fisher == "empirical")
        check_axes(reference.output_shape, metric)
        chosen = tuple(output_numbers(reference, count, outputs).tolist())
        check_probabilities(len(chosen), metric)
        last = len(examples) - 1
        probe = inputs_for(reference, examples.select(torch.tensor([0, last // 2, last])).inputs)
        with full_precision(reference.device):
            layers = find_layers(reference, probe)
            scales = find_scales(reference, probe)
        covered = {name for layer in layers for name in layer.names}
        covered |= {name for scale in scales for name in (scale.weight, scale.bias) if name}
        others = tuple(name for name in reference.parameter_names if name not in covered)
        return cls(
            reference,
            examples,
            count,
            metric,
            chosen,
            fisher,
            seed,
            batch_size,
            layers,
            scales,
            others,
        )

    def batches(self) -> Iterator[tuple[int, Inputs, Cotangents]]:
        """All examples in order.

        Yields
        ------
        tuple
            The number of examples of the batch, its inputs, and a function from outputs
            ``(B, K)`` to cotangents ``(R, B, K)``, the same ones however often it is called.
        """
        for batch in self.examples.batches(self.batch_size):
            yield len(batch), inputs_for(self.reference, batch.inputs), self._cotangents(batch)

    def squares_of_others(self, inputs: Inputs, directions: Cotangents) -> Params:
        """Sums of squared gradients of single examples for all parameters but those of layers."""
        if not self.scales and not self.others:
            return {}
        with torch.no_grad():
            rows = self.reference.outputs(self.reference.tensors, inputs)
        found = directions(rows).to(rows.dtype)
        quick = scale_squares(self.reference, self.scales, inputs, found)
        return quick | other_squares(self.reference, self.others, inputs, found)

    def _cotangents(self, batch: Batch) -> Cotangents:
        chosen = torch.tensor(self.outputs, device=self.reference.device)

        def directions(rows: Float[Tensor, "B K"]) -> Float[Tensor, "R B K"]:
            targets = generator = None
            if self.fisher == "empirical":
                assert batch.targets is not None
                targets = label_targets(rows.double(), batch.targets, self.metric, chosen)
            elif self.fisher == "sampled":
                first = int(batch.indices[0])
                generator = stream(self.seed, "fisher", first, device=self.reference.device)
            looked_at = rows[:, chosen].double()
            found = cotangents(
                looked_at, self.metric, self.fisher, targets=targets, generator=generator
            )
            wide = found.new_zeros(*found.shape[:2], self.num_outputs)
            wide[..., chosen] = found
            return wide

        return directions


def check_damping(damping: float) -> float:
    """Refuse what does not make a singular matrix invertible.

    Returns
    -------
    float
        As a plain number.

    Raises
    ------
    OptionError
        If it is not positive and finite.
    """
    advice = "Give a positive number, such as a tenth of the mean eigenvalue."
    return number(damping, "damping", above=0, advice=advice)


def leading_shape(reference: ReferenceNetwork, gradients: Params) -> tuple[int, ...]:
    """Axes in front of the shapes of the parameters, the same for all.

    Parameters
    ----------
    reference
        The network.
    gradients
        A tensor for every parameter.

    Returns
    -------
    tuple of int
        Empty for a single gradient.

    Raises
    ------
    ShapeError
        If a parameter is missing or unknown, or shapes do not fit.
    """
    shapes = {name: tuple(reference.tensors[name].shape) for name in reference.parameter_names}
    odd = sorted(set(shapes) ^ set(gradients))
    if odd:
        raise ShapeError(
            f"not a tensor for every parameter and no more: {', '.join(odd[:3])}",
            where="gradients",
            advice="Give the gradient of every parameter by name.",
        )
    leading = set()
    for name, shape in shapes.items():
        given = tuple(gradients[name].shape)
        front = given[: max(0, len(given) - len(shape))]
        if given != (*front, *shape):
            raise ShapeError(
                f"{name!r} has shape {given}, the parameter {shape}",
                where="gradients",
                advice="Give the shape of the parameter, behind axes that all share.",
            )
        leading.add(front)
    if len(leading) > 1:
        raise ShapeError(
            f"different axes in front of the parameters: {sorted(leading)}",
            where="gradients",
            advice="Stack all gradients alike.",
        )
    return next(iter(leading))
