"""Closed form that is brought back to the data's own moments behind every layer.

A closure drifts: what it takes for the moments of a layer is less and less what they are. Where
the true ones were kept, the change is split into what a linear regression on the activations
explains and a rest, ``da = K a + r``; the activations then get their true moments and the rest
keeps its own. Covariances stay positive semidefinite, which overwriting blocks of them would not.
The gates are those of `pushforward.function_space.gated`, but with the pairs that they form over
the data, ``E[m_i m_j]``, instead of independent ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.function_space.chain import Change, Moments, affine_changes
from pushforward.function_space.gated import through_origin
from pushforward.function_space.statistics import StageStatistics
from pushforward.networks.graph import NetworkGraph, Stage

__all__ = ["AnchoredStep", "anchored_values", "push_anchored"]

_RIDGE = 1e-9  # of the largest variance: dead units and copies of others explain nothing


@dataclass(frozen=True, eq=False)
class AnchoredStep:
    """What one stage does to moments; of the reference alone.

    Parameters
    ----------
    before
        Moments of the pre-activations: exact, since the stage in front was anchored.
    after
        True moments of the activations.
    slope, gate
        What multiplies ``s`` in ``a``, and ``ds`` in ``da``, on average, ``(c, n)``.
    cross_pairs, change_pairs
        Mean products of the multipliers of two units, ``(c, n, n)``: value with change, and change
        with change.
    to_values
        ``A C^{-1}``, ``(c, n, n)``: the true covariance over the closure's.
    surplus
        ``C^{-1} (A - C) C^{-1}``, ``(c, n, n)``.
    shift
        ``C^{-1} (true mean - the closure's)``, ``(c, n)``.
    """

    before: Moments
    after: Moments
    slope: Tensor
    gate: Tensor
    cross_pairs: Tensor
    change_pairs: Tensor
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
        e, d = self.before.mean.unsqueeze(-1), change.mean.unsqueeze(-2)
        mean = self.gate * change.mean
        value = (self.slope * self.before.mean).unsqueeze(-1)
        cross = self.cross_pairs * (change.cross + e * d) - value * mean.unsqueeze(-2)
        square = change.covariance + d.mT * d
        covariance = self.change_pairs * square - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        return Change(
            mean + (cross.mT @ self.shift.unsqueeze(-1)).squeeze(-1),
            self.to_values @ cross,
            covariance + cross.mT @ (self.surplus @ cross),
        )


def anchored_values(
    graph: NetworkGraph, inputs: Moments, stages: Sequence[StageStatistics]
) -> tuple[AnchoredStep, ...]:
    """How each stage acts and what it is brought back to.

    Parameters
    ----------
    graph
        The reference.
    inputs
        Moments of the input.
    stages
        With moments of the layers.

    Returns
    -------
    tuple of AnchoredStep
        One for each stage; without gradients.
    """
    steps, values = [], inputs
    with torch.no_grad():
        for stage, kept, pair in zip(
            graph.stages, stages, affine_changes(graph, graph)[0], strict=True
        ):
            step = _step(stage, pair.push(values), kept)
            steps.append(step)
            values = step.after
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


def _step(stage: Stage, before: Moments, kept: StageStatistics) -> AnchoredStep:
    assert kept.layer is not None
    assert kept.coactivation is not None
    gate, pairs = kept.gate_mean, kept.coactivation
    slope, rest, by_gate = gate.clone(), torch.zeros_like(gate), torch.ones_like(gate[0])
    variance = before.covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    for group in stage.groups:
        if group.carried or through_origin(group.activation):
            continue
        units = group.units
        std = variance[:, units].sqrt().clamp(min=_SMALLEST)
        _, table = group.activation.hermite_table(before.mean[:, units], std, 2, 1)
        slope[:, units], by_gate[units] = table[0, 1] / std, 0.0
        explained = table[0, 0].square() + table[0, 1].square()
        rest[:, units] = (table[1, 0] - explained).clamp(min=0)
    # Only where a = m s do the multipliers of values come in pairs over the data.
    certain = slope.unsqueeze(-1) * gate.unsqueeze(-2)
    cross_pairs = torch.where(by_gate[:, None] > 0, pairs, certain)
    both = by_gate[:, None] * by_gate[None, :] > 0
    value_pairs = torch.where(both, pairs, slope.unsqueeze(-1) * slope.unsqueeze(-2))
    e = before.mean.unsqueeze(-1)
    mean = (slope * before.mean).unsqueeze(-1)
    own = value_pairs * (before.covariance + e * e.mT) - mean * mean.mT + torch.diag_embed(rest)
    inverse = _regularised_inverse(own)
    true = kept.layer
    drift = true.mean - _closure_mean(stage, before, slope)
    return AnchoredStep(
        before,
        true,
        slope,
        gate,
        cross_pairs,
        pairs,
        true.covariance @ inverse,
        inverse @ (true.covariance - own) @ inverse,
        (inverse @ drift.unsqueeze(-1)).squeeze(-1),
    )


def _closure_mean(stage: Stage, before: Moments, slope: Tensor) -> Tensor:
    """What the closure takes for the mean of the activations."""
    mean = slope * before.mean
    variance = before.covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    for group in stage.groups:
        if not group.carried and not through_origin(group.activation):
            std = variance[:, group.units].sqrt().clamp(min=_SMALLEST)
            center, table = group.activation.hermite_table(before.mean[:, group.units], std, 1, 0)
            mean[:, group.units] = center + table[0, 0]
    return mean


def _regularised_inverse(covariance: Tensor) -> Tensor:
    size = covariance.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=_SMALLEST)
    eye = torch.eye(covariance.shape[-1]).to(covariance)
    values, vectors = torch.linalg.eigh(covariance / size[:, None, None] + _RIDGE * eye)
    inverse = (vectors / values.clamp(min=_RIDGE).unsqueeze(-2)) @ vectors.mT
    return inverse / size[:, None, None]


_SMALLEST = 1e-12  # a spread below which a unit is a constant to its activation
