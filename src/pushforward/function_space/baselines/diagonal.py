"""Distance by a diagonal (EWC): one number of curvature for every weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.function_space.answers import as_distance
from pushforward.function_space.baselines.cotangents import Fisher
from pushforward.function_space.baselines.curvature import (
    CurvaturePass,
    check_damping,
    leading_shape,
)
from pushforward.function_space.baselines.layers import layer_gradients, squares
from pushforward.function_space.baselines.passes import (
    displacement,
    fixed_question,
    full_precision,
)
from pushforward.function_space.metrics import Metric
from pushforward.function_space.network import Other, ReferenceNetwork
from pushforward.runs.progress import track
from pushforward.typing import Params

__all__ = ["DiagonalDistance"]


@dataclass(frozen=True, eq=False)
class DiagonalDistance:
    """``sum_i G_ii d_i^2 / 2`` with the diagonal of the Gauss–Newton or Fisher matrix.

    Use `of`. ``G_ii = E_x sum_k (du_k / dtheta_i)^2`` with ``u = H^{1/2} z``, gradients squared
    example by example: squares of the mean gradient of a batch, as in some implementations of
    elastic weight consolidation, would depend on the size of the batch. Mind the half, which is not
    in the penalty of J. Kirkpatrick et al. (2017), arXiv 1612.00796.

    Parameters
    ----------
    reference
        The network that distances are measured from.
    curvature
        ``G_ii`` by name of the parameter, float64.
    metric, outputs
        What it was built for.
    num_outputs
        Outputs of an example.
    num_examples
        Examples that it was made from.
    """

    reference: ReferenceNetwork
    curvature: Params = field(repr=False)
    metric: Metric
    outputs: tuple[int, ...]
    num_outputs: int
    num_examples: int

    @classmethod
    def of(
        cls,
        net: nn.Module,
        data: Any,
        *,
        metric: Metric = "euclidean",
        outputs: Any = None,
        fisher: Fisher = "exact",
        seed: int = 0,
        batch_size: int = 256,
        progress: bool | None = None,
    ) -> DiagonalDistance:
        """Run once over the data.

        Parameters
        ----------
        net
            A module.
        data
            As `ExactDistance.of` takes them; with targets for ``fisher="empirical"``. Not needed
            afterwards.
        metric, outputs
            Whose curvature, and of which outputs; None for all.
        fisher
            ``exact``: one backward pass for every output. ``sampled``: a single one, for a drawn
            target. ``empirical``: a single one, for the actual target (labels, or numbers for
            ``euclidean``), which is no curvature but is what is often used for it.
        seed
            Of drawn targets.
        batch_size
            Examples run at a time.
        progress
            Whether to show a bar: True, False, or None for terminals.

        Returns
        -------
        DiagonalDistance
            With one number for each entry of all parameters.

        Raises
        ------
        NetworkError
            For what is no network, weights that are not finite, or inputs that it cannot take.
        DataError
            For data that are empty, not finite, shuffled or augmented, or targets that are needed
            and missing or wrong.
        OptionError
            For an unknown metric or Fisher, or a `batch_size` that is not positive.
        ShapeError
            If `outputs` are out of range, or the only one where probabilities are compared.
        """
        work = CurvaturePass.of(net, data, metric, outputs, fisher, seed, batch_size)
        reference = work.reference
        totals: Params = {
            name: torch.zeros_like(reference.tensors[name], dtype=torch.float64)
            for name in reference.parameter_names
        }
        count = len(work.examples)
        with (
            full_precision(reference.device),
            track(count, "Diagonal of the curvature", enabled=progress) as advance,
        ):
            for size, inputs, directions in work.batches():
                for part in layer_gradients(reference, work.layers, inputs, directions):
                    found = squares(part.activations, part.gradients)
                    for name, entries in part.layer.tensors(found).items():
                        totals[name] += entries
                for name, entries in work.squares_of_others(inputs, directions).items():
                    totals[name] += entries
                advance(size)
        curvature = {name: total / count for name, total in totals.items()}
        return cls(reference, curvature, metric, work.outputs, work.num_outputs, count)

    @property
    def name(self) -> str:
        """How tables call it."""
        return "diagonal"

    @property
    def num_bytes(self) -> int:
        """Of the diagonal."""
        return sum(t.numel() * t.element_size() for t in self.curvature.values())

    def distance(
        self, other: Other, *, metric: Metric | None = None, outputs: Any = None
    ) -> Float[Tensor, ""]:
        """The quadratic at the displacement of the weights.

        Parameters
        ----------
        other
            A module of the same architecture, or its tensors by name.
        metric, outputs
            None, or what it was built for.

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
        OptionError
            For a metric or outputs that it was not built for.
        ShapeError
            If `outputs` are out of range.
        """
        fixed_question((self.metric, self.outputs), self.num_outputs, metric, outputs)
        moved = displacement(self.reference, other)
        terms = [(self.curvature[name] * d.square()).sum() for name, d in moved.items()]
        return as_distance(torch.stack(terms).sum() / 2, self.reference, other)

    def solve(self, gradients: Params, damping: float) -> Params:
        """Divide by the damped curvature: ``(G + damping I)^{-1} g``.

        Parameters
        ----------
        gradients
            For every parameter a tensor of its shape, or several behind axes that all share.
        damping
            Positive.

        Returns
        -------
        Params
            Of the same shapes and types.

        Raises
        ------
        ShapeError
            If a parameter is missing or unknown, or shapes do not fit.
        OptionError
            If `damping` is not positive.
        """
        damping = check_damping(damping)
        leading_shape(self.reference, gradients)
        return {
            name: (gradients[name].double() / (own + damping)).to(gradients[name].dtype)
            for name, own in self.curvature.items()
        }
