"""Closed form that is brought back to the data's own moments behind every layer.

A closure drifts: what it takes for the moments of a layer is less and less what they are. Where
the true ones were kept, the change is split into what a linear regression on the activations
explains and a rest, ``da = K a + r``; the activations then get their true moments and the rest
keeps its own. Covariances stay positive semidefinite, which overwriting blocks of them would not.
Between the anchors it is the Gaussian closure of `pushforward.function_space.gaussian`, from
pre-activations whose moments are now those of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.function_space.chain import Change, Moments, affine_changes
from pushforward.gaussians.gated import GatedPairs
from pushforward.networks.graph import NetworkGraph, Stage

__all__ = ["AnchoredStep", "anchored_values", "push_anchored"]

_RIDGE = 1e-9  # of the largest variance: dead units and copies of others explain nothing
_SMALLEST = 1e-12  # a variance that is none


@dataclass(frozen=True, eq=False)
class AnchoredStep:
    """What one stage does to moments; of the reference alone.

    Parameters
    ----------
    pairs
        How the activations act on changes.
    after
        True moments of the activations.
    to_values
        ``A C^{-1}``, ``(c, n, n)``: the true covariance over the closure's.
    surplus
        ``C^{-1} (A - C) C^{-1}``, ``(c, n, n)``.
    shift
        ``C^{-1} (true mean - the closure's)``, ``(c, n)``.
    """

    pairs: GatedPairs
    after: Moments
    to_values: Tensor
    surplus: Tensor
    shift: Tensor

    def push(self, change: Change) -> Change:
        """Moments of ``da``, anchored.

        Parameters
        ----------
        change
            Of ``ds``.

        Returns
        -------
        Change
            ``K = Cov(da, a) C^{-1}`` carries the true mean and covariance of ``a``.
        """
        mean, cross, covariance = self.pairs.push(change.mean, change.cross, change.covariance)
        return Change(
            mean + (cross.mT @ self.shift.unsqueeze(-1)).squeeze(-1),
            self.to_values @ cross,
            covariance + cross.mT @ (self.surplus @ cross),
        )


def anchored_values(
    graph: NetworkGraph, inputs: Moments, layers: Sequence[Moments]
) -> tuple[AnchoredStep, ...]:
    """How each stage acts and what it is brought back to.

    Parameters
    ----------
    graph
        The reference.
    inputs
        Moments of the input.
    layers
        True moments of the activations of each stage.

    Returns
    -------
    tuple of AnchoredStep
        One for each stage; without gradients.
    """
    steps, values = [], inputs
    with torch.no_grad():
        pairs = affine_changes(graph, graph)[0]
        for stage, layer, pair in zip(graph.stages, layers, pairs, strict=True):
            steps.append(_step(stage, pair.push(values), layer))
            values = layer
    return tuple(steps)


def push_anchored(
    reference: NetworkGraph, other: NetworkGraph, inputs: Moments, steps: Sequence[AnchoredStep]
) -> Change:
    """Moments of the change of the outputs.

    Parameters
    ----------
    reference, other
        The two networks.
    inputs
        Moments of the input.
    steps
        From `anchored_values`.

    Returns
    -------
    Change
        Of the outputs, differentiable in the weights of `other`. Exact when only the last map
        changes.
    """
    stages, output = affine_changes(reference, other)
    values, change = inputs, Change.none(inputs)
    for pair, step in zip(stages, steps, strict=True):
        change = step.push(pair.push_change(values, change))
        values = step.after
    return output.push_change(values, change)


def _step(stage: Stage, before: Moments, true: Moments) -> AnchoredStep:
    activations = [(group.units, group.activation) for group in stage.groups]
    pairs = GatedPairs.of(activations, before.mean, before.covariance)
    inverse = _regularised_inverse(pairs.covariance)
    return AnchoredStep(
        pairs,
        true,
        true.covariance @ inverse,
        inverse @ (true.covariance - pairs.covariance) @ inverse,
        (inverse @ (true.mean - pairs.mean).unsqueeze(-1)).squeeze(-1),
    )


def _regularised_inverse(covariance: Float[Tensor, "c n n"]) -> Float[Tensor, "c n n"]:
    size = covariance.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=_SMALLEST)
    eye = torch.eye(covariance.shape[-1]).to(covariance)
    values, vectors = torch.linalg.eigh(covariance / size[:, None, None] + _RIDGE * eye)
    inverse = (vectors / values.clamp(min=_RIDGE).unsqueeze(-2)) @ vectors.mT
    return inverse / size[:, None, None]
