"""The published deterministic estimator, as its authors' code computes it.

It differs from the closed form of `pushforward.function_space.gated` in two ways, both of which
lose variance: the squared gate counts as ``E[gate]^2`` also on the diagonal, and the covariance of
a value with its change is left out (arXiv 2302.03519, the ``determ`` mode of the published code).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from pushforward.function_space.chain import Change, Moments, affine_changes
from pushforward.function_space.gated import GatedStep, Gates, gated_values
from pushforward.networks.graph import NetworkGraph

__all__ = ["published_values", "push_published", "with_jitter"]

_JITTER = 1e-4  # added to every variance of the inputs by the published code


def with_jitter(inputs: Moments) -> Moments:
    """The input moments that the published code uses.

    Parameters
    ----------
    inputs
        Of the data.

    Returns
    -------
    Moments
        With ``1e-4`` on the diagonal of the covariance.
    """
    eye = torch.eye(inputs.mean.shape[-1]).to(inputs.covariance)
    return Moments(inputs.mean, inputs.covariance + _JITTER * eye)


def published_values(
    graph: NetworkGraph, inputs: Moments, gates: Sequence[Gates]
) -> tuple[GatedStep, ...]:
    """Moments of the reference when gates are replaced by their means.

    Parameters
    ----------
    graph
        The reference.
    inputs
        From `with_jitter`.
    gates
        Slopes of each stage.

    Returns
    -------
    tuple of GatedStep
        One for each stage.
    """
    certain = [Gates(gate.mean, gate.mean.square()) for gate in gates]
    return gated_values(graph, inputs, certain)


def push_published(
    reference: NetworkGraph, other: NetworkGraph, inputs: Moments, steps: Sequence[GatedStep]
) -> Change:
    """Moments of the change of the outputs.

    Parameters
    ----------
    reference, other
        The two networks.
    inputs
        From `with_jitter`.
    steps
        From `published_values`.

    Returns
    -------
    Change
        Differentiable in the weights of `other`; its cross covariance is 0.
    """
    stages, output = affine_changes(reference, other)
    values, change = inputs, Change.none(inputs)
    for pair, step in zip(stages, steps, strict=True):
        pushed = step.push(pair.push_change(values, change))
        change = replace(pushed, cross=torch.zeros_like(pushed.cross))
        values = step.after
    last = output.push_change(values, change)
    return replace(last, cross=torch.zeros_like(last.cross))
