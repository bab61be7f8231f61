"""The Gaussian closure: values and changes as jointly Gaussian in front of every activation.

Activations are replaced by their tangents at the reference's own pre-activations, as in the gated
closed form, but slopes are those that the pre-activations have: correlated between units, with the
values and with the change. What a stage makes of means and covariances is then exact (see
`pushforward.gaussians.gated`); that sums of many units are Gaussian is what is approximate. One
hidden layer and Gaussian inputs leave nothing to approximate but the tangents. Nothing is needed of
the data except moments of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pushforward.function_space.chain import Change, Moments, affine_changes
from pushforward.gaussians.gated import GatedPairs
from pushforward.networks.graph import NetworkGraph, Stage

__all__ = ["GaussianStep", "gaussian_values", "push_gaussian"]


@dataclass(frozen=True, eq=False)
class GaussianStep:
    """What one stage does to moments; of the reference alone.

    Parameters
    ----------
    before
        Moments of the pre-activations.
    pairs
        How the activations act on them and on changes.
    """

    before: Moments
    pairs: GatedPairs

    @property
    def after(self) -> Moments:
        """Moments of the activations."""
        return Moments(self.pairs.mean, self.pairs.covariance)

    def push(self, change: Change) -> Change:
        """Moments of ``da = phi'(s) ds``.

        Parameters
        ----------
        change
            Of ``ds``.

        Returns
        -------
        Change
            Exact when ``s`` and ``ds`` are jointly Gaussian.
        """
        return Change(*self.pairs.push(change.mean, change.cross, change.covariance))


def gaussian_values(graph: NetworkGraph, inputs: Moments) -> tuple[GaussianStep, ...]:
    """Moments of the reference network and the coefficients of all pairs, stage by stage.

    Parameters
    ----------
    graph
        The reference.
    inputs
        Moments of the input in each component.

    Returns
    -------
    tuple of GaussianStep
        One for each stage, ``6 n^2`` numbers for ``n`` units; without gradients.
    """
    steps, values = [], inputs
    with torch.no_grad():
        for stage, pair in zip(graph.stages, affine_changes(graph, graph)[0], strict=True):
            step = _step(stage, pair.push(values))
            steps.append(step)
            values = step.after
    return tuple(steps)


def push_gaussian(
    reference: NetworkGraph, other: NetworkGraph, inputs: Moments, steps: Sequence[GaussianStep]
) -> Change:
    """Moments of the change of the outputs.

    Parameters
    ----------
    reference, other
        The two networks.
    inputs
        Moments of the input.
    steps
        From `gaussian_values`.

    Returns
    -------
    Change
        Of the outputs, differentiable in the weights of `other`, zero at those of `reference`.
        ``cross`` is the covariance of the outputs with their change.
    """
    stages, output = affine_changes(reference, other)
    values, change = inputs, Change.none(inputs)
    for pair, step in zip(stages, steps, strict=True):
        change = step.push(pair.push_change(values, change))
        values = step.after
    return output.push_change(values, change)


def _step(stage: Stage, before: Moments) -> GaussianStep:
    activations = [(group.units, group.activation) for group in stage.groups]
    return GaussianStep(before, GatedPairs.of(activations, before.mean, before.covariance))
