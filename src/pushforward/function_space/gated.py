"""The gated linear network: closed form of the mean distance under independent gates.

Every activation is replaced by its tangent at the reference's own pre-activation,
``da = phi'(s) ds``, and the slopes ``phi'(s)`` by independent random gates with the mean and
variance that they have over the data: one number for each unit of a ReLU network, its probability
to be active (arXiv 2302.03519). What is left is linear, so that means and covariances follow
exactly: Monte Carlo over the gates would converge to this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.function_space.chain import Change, Moments, affine_changes
from pushforward.gaussians.activations import Activation, PiecewisePolynomial
from pushforward.networks.graph import NetworkGraph, Stage

__all__ = ["GatedStep", "Gates", "gated_values", "push_gated", "through_origin"]


@dataclass(frozen=True, eq=False)
class Gates:
    """Slopes of the units of one stage over the data.

    Parameters
    ----------
    mean, square
        ``E[phi'(s)]`` and ``E[phi'(s)^2]`` of each unit, ``(c, n)``; the same where slopes are 0
        or 1, and 1 for a carried unit.
    """

    mean: Tensor
    square: Tensor

    @property
    def variance(self) -> Float[Tensor, "c n"]:
        """Of the slopes."""
        return (self.square - self.mean.square()).clamp(min=0)


@dataclass(frozen=True, eq=False)
class GatedStep:
    """What one stage does to moments: everything in it depends on the reference alone.

    Parameters
    ----------
    before
        Moments of the pre-activations ``s``.
    after
        Moments of the activations ``a``.
    slope
        What multiplies ``s`` in ``a``, on average, ``(c, n)``.
    gates
        What multiplies ``ds`` in ``da``.
    shared
        ``Cov`` of the two multipliers of a unit, ``(c, n)``: the gate's variance where
        ``a = gate * s``.
    """

    before: Moments
    after: Moments
    slope: Tensor
    gates: Gates
    shared: Tensor

    def push(self, change: Change) -> Change:
        """Moments of ``da = gate * ds``.

        Parameters
        ----------
        change
            Of ``ds``.

        Returns
        -------
        Change
            Off the diagonal the gates are independent; on it ``E[gate^2]`` is not ``E[gate]^2``.
        """
        gate = self.gates.mean
        mean = gate * change.mean
        cross = self.slope.unsqueeze(-1) * change.cross * gate.unsqueeze(-2)
        covariance = gate.unsqueeze(-1) * change.covariance * gate.unsqueeze(-2)
        product = _diagonal(change.cross) + self.before.mean * change.mean
        square = _diagonal(change.covariance) + change.mean.square()
        return Change(
            mean,
            cross + torch.diag_embed(self.shared * product),
            covariance + torch.diag_embed(self.gates.variance * square),
        )


def through_origin(activation: Activation) -> bool:
    """Whether an activation is its slope times its argument, as ReLU and its relatives are.

    Returns
    -------
    bool
        True for piecewise linear functions whose pieces pass through the origin.
    """
    return isinstance(activation, PiecewisePolynomial) and all(
        all(c == 0 for i, c in enumerate(piece) if i != 1) for piece in activation.pieces
    )


def gated_values(
    graph: NetworkGraph, inputs: Moments, gates: Sequence[Gates]
) -> tuple[GatedStep, ...]:
    """Moments of the reference network under independent gates, stage by stage.

    Parameters
    ----------
    graph
        The reference.
    inputs
        Moments of the input in each component.
    gates
        Slopes of each stage.

    Returns
    -------
    tuple of GatedStep
        One for each stage; without gradients.
    """
    steps, values = [], inputs
    with torch.no_grad():
        for stage, slopes, pair in zip(
            graph.stages, gates, affine_changes(graph, graph)[0], strict=True
        ):
            step = _step(stage, pair.push(values), slopes)
            steps.append(step)
            values = step.after
    return tuple(steps)


def push_gated(
    reference: NetworkGraph, other: NetworkGraph, inputs: Moments, steps: Sequence[GatedStep]
) -> Change:
    """Moments of the change of the outputs.

    Parameters
    ----------
    reference, other
        The two networks.
    inputs
        Moments of the input.
    steps
        From `gated_values`.

    Returns
    -------
    Change
        Of the outputs, differentiable in the weights of `other`.
    """
    stages, output = affine_changes(reference, other)
    values, change = inputs, Change.none(inputs)
    for pair, step in zip(stages, steps, strict=True):
        change = step.push(pair.push_change(values, change))
        values = step.after
    return output.push_change(values, change)


def _step(stage: Stage, before: Moments, gates: Gates) -> GatedStep:
    """How a stage acts: by its gate where it passes the origin, else by the best straight line."""
    mean, slope = torch.empty_like(before.mean), torch.empty_like(before.mean)
    own, shared = torch.empty_like(before.mean), torch.empty_like(before.mean)
    variance = _diagonal(before.covariance).clamp(min=0)
    for group in stage.groups:
        units = group.units
        e, v = before.mean[:, units], variance[:, units]
        if group.carried:
            mean[:, units], slope[:, units], own[:, units], shared[:, units] = e, 1.0, 0.0, 0.0
        elif through_origin(group.activation):
            gate, spread = gates.mean[:, units], gates.variance[:, units]
            mean[:, units], slope[:, units] = gate * e, gate
            own[:, units], shared[:, units] = spread * (v + e.square()), spread
        else:
            # phi(s) = E[phi] + E[phi'] (s - E[s]) + rest, for a Gaussian s; the rest is its own.
            std = v.sqrt().clamp(min=_SMALLEST)
            center, table = group.activation.hermite_table(e, std, 2, 1)
            line = table[0, 1] / std
            mean[:, units], slope[:, units] = center + table[0, 0], line
            spread = table[1, 0] - table[0, 0].square() - table[0, 1].square()
            own[:, units], shared[:, units] = spread.clamp(min=0), 0.0
    covariance = slope.unsqueeze(-1) * before.covariance * slope.unsqueeze(-2)
    after = Moments(mean, covariance + torch.diag_embed(own))
    return GatedStep(before, after, slope, gates, shared)


_SMALLEST = 1e-12  # a spread below which a unit is a constant to its activation


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1)
