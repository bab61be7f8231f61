"""Two networks of one architecture, stage by stage, and moments of what differs between them.

A network is a chain of affine maps ``s = A a + b`` and activations ``a = phi(s)``. Beside a
reference with maps ``A0`` runs another with maps ``A1 = A0 + D``; the change of a value is its
value in the other network minus that in the reference:

    ds = D a + db + A1 da                                                (exact)

What is tracked are means and covariances of ``a`` and ``da``, one set for each component of a
mixture (classes, clusters), on a leading axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.networks.graph import AffineMap, NetworkGraph
from pushforward.networks.linear_maps import (
    Block,
    Dense,
    Identity,
    JointMap,
    LinearMap,
    Structured,
)

__all__ = ["AffineChange", "Change", "Moments", "affine_changes"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of the values of the reference network at one place.

    Parameters
    ----------
    mean
        ``(c, n)``.
    covariance
        ``(c, n, n)``.
    """

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, eq=False)
class Change:
    """Moments of the change at one place, and with the value that changes.

    Parameters
    ----------
    mean
        ``E[da]``, ``(c, n)``.
    cross
        ``Cov(a, da)``, ``(c, n, n)``.
    covariance
        ``Cov(da)``, ``(c, n, n)``.
    """

    mean: Tensor
    cross: Tensor
    covariance: Tensor

    @classmethod
    def none(cls, values: Moments) -> Change:
        """No change: what two networks have in common at their input.

        Parameters
        ----------
        values
            Of the input.

        Returns
        -------
        Change
            Zeros of its shapes.
        """
        zero = torch.zeros_like(values.covariance)
        return cls(torch.zeros_like(values.mean), zero, zero)


@dataclass(frozen=True, eq=False)
class AffineChange:
    """The affine map of one stage in both networks.

    Parameters
    ----------
    reference, other
        The maps ``A0, b0`` and ``A1, b1``.
    difference
        The linear part ``A1 - A0``, from differences of matrices where there are any, so that
        nothing cancels when the two are close.
    """

    reference: AffineMap
    other: AffineMap
    difference: LinearMap

    @classmethod
    def between(cls, reference: AffineMap, other: AffineMap) -> AffineChange:
        """Pair the maps of two networks.

        Parameters
        ----------
        reference, other
            Of the same stage.

        Returns
        -------
        AffineChange
            Differentiable in the weights of `other`.
        """
        return cls(reference, other, _difference(other.linear, reference.linear))

    @property
    def change_bias(self) -> Float[Tensor, " n_out"]:
        """``b1 - b0``."""
        return self.other.bias - self.reference.bias

    def push(self, values: Moments) -> Moments:
        """Moments of ``s = A0 a + b0``.

        Parameters
        ----------
        values
            Of ``a``.

        Returns
        -------
        Moments
            Of the reference alone: nothing of the other network enters.
        """
        linear = self.reference.linear
        return Moments(self.reference.apply(values.mean), _sandwich(linear, values.covariance))

    def push_change(self, values: Moments, change: Change) -> Change:
        """Moments of ``ds = D a + db + A1 da``, and with ``s``.

        Parameters
        ----------
        values
            Of ``a``.
        change
            Of ``da``.

        Returns
        -------
        Change
            Exact for any law of ``(a, da)``; the covariance is symmetric.
        """
        old, new, by = self.reference.linear, self.other.linear, self.difference
        mean = by.apply(values.mean) + self.change_bias + new.apply(change.mean)
        # Rows (a, da) mapped on the right by what makes ds of them: Cov(a, ds) and Cov(da, ds).
        with_values = by.apply(values.covariance) + new.apply(change.cross)
        with_change = by.apply(change.cross.mT) + new.apply(change.covariance)
        covariance = by.apply(with_values.mT) + new.apply(with_change.mT)
        cross = old.apply(with_values.mT).mT
        return Change(mean, cross, (covariance + covariance.mT) / 2)


def affine_changes(
    reference: NetworkGraph, other: NetworkGraph
) -> tuple[tuple[AffineChange, ...], AffineChange]:
    """Pair the maps of two networks.

    Parameters
    ----------
    reference, other
        Of one architecture.

    Returns
    -------
    stages
        One for each stage.
    output
        Of the last map.
    """
    stages = tuple(
        AffineChange.between(mine.affine, theirs.affine)
        for mine, theirs in zip(reference.stages, other.stages, strict=True)
    )
    return stages, AffineChange.between(reference.output, other.output)


def _sandwich(linear: LinearMap, covariance: Tensor) -> Tensor:
    product = linear.apply(linear.apply(covariance).mT)
    return (product + product.mT) / 2


def _difference(new: LinearMap, old: LinearMap) -> LinearMap:
    """The map ``new - old``."""
    if isinstance(new, Dense) and isinstance(old, Dense):
        return Dense(new.matrix - old.matrix)
    if isinstance(new, JointMap) and isinstance(old, JointMap):
        blocks = []
        for mine, theirs in zip(new.blocks, old.blocks, strict=True):
            terms = [
                (columns, _difference(first, second))
                for (columns, first), (_, second) in zip(mine.terms, theirs.terms, strict=True)
                if not isinstance(first, Identity)
            ]
            blocks.append(Block(mine.out_features, tuple(terms)))
        return JointMap(new.in_features, tuple(blocks))
    shapes = (new.in_features,), (new.out_features,)
    return Structured(lambda x: new.apply(x) - old.apply(x), *shapes, new.flops + old.flops)
