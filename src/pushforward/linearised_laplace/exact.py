"""The posterior of a small linear model by Cholesky factorisation, over weights or over outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import OptionError, ResourceError
from pushforward.linearised_laplace.linear_model import LinearModel
from pushforward.linearised_laplace.priors import Prior
from pushforward.runs.rng import stream

__all__ = ["DualFactor", "Factor", "Factorisation", "PrimalFactor", "dual_factor", "primal_factor"]


class Factorisation(Protocol):
    """Posterior covariance ``H^{-1}``, ``H = M' + A``, in a form that answers exactly."""

    def solve(self, vectors: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """``H^{-1} v`` for each row."""

    def variance_form(self, rows: Float[Tensor, "B C P"]) -> Float[Tensor, "B C C"]:
        """``J H^{-1} J^T`` for each example."""

    def sample(self, count: int, seed: int) -> Float[Tensor, "K P"]:
        """Draws from ``N(0, H^{-1})``."""

    @property
    def log_determinant_ratio(self) -> float:
        """``log |H| - log |A|``."""

    def effective_dimensions(self) -> Float[Tensor, " layers"]:
        """``sum (H^{-1} M')_pp`` over the parameters of each layer."""

    def group_dimensions(self) -> Float[Tensor, " groups"]:
        """The same for each group of the prior, and cheaper when there is only one."""


@dataclass(frozen=True, eq=False)
class PrimalFactor:
    """Cholesky factor over the weights, for few weights.

    Parameters
    ----------
    prior
        Its precision is in the factor.
    cholesky
        ``(P, P)`` lower triangular float64, of ``H``.
    """

    prior: Prior
    cholesky: Float[Tensor, "P P"]

    def solve(self, vectors: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """``H^{-1} v`` for each row.

        Returns
        -------
        Tensor
            ``(K, P)`` in the dtype of the vectors.
        """
        return torch.cholesky_solve(vectors.double().T, self.cholesky).T.to(vectors.dtype)

    def variance_form(self, rows: Float[Tensor, "B C P"]) -> Float[Tensor, "B C C"]:
        """``J H^{-1} J^T`` for each example.

        Returns
        -------
        Tensor
            ``(B, C, C)`` float64.
        """
        flat = rows.double().flatten(0, 1)
        half = torch.linalg.solve_triangular(self.cholesky, flat.T, upper=False).T
        half = half.reshape(rows.shape)
        return half @ half.mT

    def sample(self, count: int, seed: int) -> Float[Tensor, "K P"]:
        """Draws from ``N(0, H^{-1})``.

        Returns
        -------
        Tensor
            ``(K, P)`` float64.
        """
        noise = _noise(count, len(self.cholesky), seed, "weights", self.cholesky.device)
        return torch.linalg.solve_triangular(self.cholesky.T, noise.T, upper=True).T

    @property
    def log_determinant_ratio(self) -> float:
        """``log |H| - log |A|``."""
        log_h = 2 * self.cholesky.diagonal().log().sum()
        return float(log_h - self.prior.diagonal().log().sum())

    def effective_dimensions(self) -> Float[Tensor, " layers"]:
        """``sum 1 - A_pp (H^{-1})_pp`` over the parameters of each layer.

        Returns
        -------
        Tensor
            ``(layers,)`` float64.
        """
        inverse = torch.cholesky_inverse(self.cholesky).diagonal()
        return self.prior.space.layer_sums(1 - self.prior.diagonal() * inverse)

    def group_dimensions(self) -> Float[Tensor, " groups"]:
        """`effective_dimensions`, pooled into the groups of the prior.

        Returns
        -------
        Tensor
            ``(groups,)`` float64.
        """
        return self.prior.pool(self.effective_dimensions())


@dataclass(frozen=True, eq=False)
class DualFactor:
    """Cholesky factor over the outputs, for few examples.

    Parameters
    ----------
    prior
        Its precision is in the factor.
    rows
        ``(N C, P)`` float64: ``W = L^T J'``, so that ``M' = W^T W``.
    cholesky
        ``(N C, N C)`` lower triangular float64, of ``1 + W A^{-1} W^T``.
    """

    prior: Prior
    rows: Float[Tensor, "R P"]
    cholesky: Float[Tensor, "R R"]

    def solve(self, vectors: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """``H^{-1} v`` for each row, by Woodbury's identity.

        Returns
        -------
        Tensor
            ``(K, P)`` in the dtype of the vectors.
        """
        scaled = vectors.double() / self.prior.diagonal()
        inner = torch.cholesky_solve(self.rows @ scaled.T, self.cholesky)
        return (scaled - (inner.T @ self.rows) / self.prior.diagonal()).to(vectors.dtype)

    def variance_form(self, rows: Float[Tensor, "B C P"]) -> Float[Tensor, "B C C"]:
        """``J H^{-1} J^T = J A^{-1} J^T - ...`` for each example.

        Returns
        -------
        Tensor
            ``(B, C, C)`` float64.
        """
        rows = rows.double()
        scaled = rows / self.prior.diagonal()
        half = torch.linalg.solve_triangular(
            self.cholesky, self.rows @ scaled.flatten(0, 1).T, upper=False
        ).T.reshape(*rows.shape[:2], -1)
        return scaled @ rows.mT - half @ half.mT

    def sample(self, count: int, seed: int) -> Float[Tensor, "K P"]:
        """Draws from ``N(0, H^{-1})``: prior draws, corrected by the data (Matheron's rule).

        Returns
        -------
        Tensor
            ``(K, P)`` float64.
        """
        rows, device = self.rows, self.rows.device
        weights = _noise(count, rows.shape[1], seed, "weights", device)
        weights /= self.prior.diagonal().sqrt()
        noise = _noise(count, len(rows), seed, "outputs", device) - weights @ rows.T
        inner = torch.cholesky_solve(noise.T, self.cholesky)
        return weights + (inner.T @ rows) / self.prior.diagonal()

    @property
    def log_determinant_ratio(self) -> float:
        """``log |1 + W A^{-1} W^T|``, which is ``log |H| - log |A|``."""
        return float(2 * self.cholesky.diagonal().log().sum())

    def effective_dimensions(self) -> Float[Tensor, " layers"]:
        """``sum_p (A^{-1} W^T (1 + K)^{-1} W)_pp`` over the parameters of each layer.

        Returns
        -------
        Tensor
            ``(layers,)`` float64.
        """
        half = torch.linalg.solve_triangular(self.cholesky, self.rows, upper=False)
        return self.prior.space.layer_sums(half.square().sum(0) / self.prior.diagonal())

    def group_dimensions(self) -> Float[Tensor, " groups"]:
        """`effective_dimensions`, pooled; for a single group ``tr 1 - (1 + K)^{-1}``.

        Returns
        -------
        Tensor
            ``(groups,)`` float64.
        """
        if self.prior.kind == "layerwise":
            return self.effective_dimensions()
        inverse = torch.cholesky_inverse(self.cholesky).diagonal()
        return (1 - inverse).sum()[None]


@dataclass(frozen=True, eq=False)
class Factor:
    """What does not depend on the precisions, so that trying others is one factorisation.

    Parameters
    ----------
    curvature
        ``M'`` of shape ``(P, P)`` float64; None in the dual.
    rows
        ``W`` of shape ``(N C, P)`` float64; None in the primal.
    """

    curvature: Float[Tensor, "P P"] | None
    rows: Float[Tensor, "R P"] | None

    @cached_property
    def diagonal(self) -> Float[Tensor, " P"]:
        """Of ``M'``."""
        if self.curvature is not None:
            return self.curvature.diagonal()
        assert self.rows is not None
        return self.rows.square().sum(0)

    def rescaled(self, scale: Float[Tensor, " P"] | None) -> Factor:
        """In other coordinates.

        Parameters
        ----------
        scale
            ``(P,)``; None for one.

        Returns
        -------
        Factor
            ``diag(scale) M diag(scale)``.
        """
        if scale is None:
            return self
        if self.curvature is not None:
            return Factor(scale[:, None] * self.curvature * scale, None)
        assert self.rows is not None
        return Factor(None, self.rows * scale)

    def factorise(self, prior: Prior, weight: float = 1.0) -> PrimalFactor | DualFactor:
        """The posterior for some precisions.

        Parameters
        ----------
        prior
            In whose coordinates this factor is.
        weight
            By which the whole of ``M'`` is multiplied: the inverse noise variance, when ``M'`` is
            that of unit noise.

        Returns
        -------
        PrimalFactor or DualFactor
            Exact up to rounding.
        """
        if self.curvature is not None:
            matrix = weight * self.curvature
            matrix.diagonal().add_(prior.diagonal())
            return PrimalFactor(prior, _cholesky(matrix))
        assert self.rows is not None
        rows = self.rows if weight == 1 else self.rows * weight**0.5
        if prior.kind == "layerwise":
            matrix = (rows / prior.diagonal()) @ rows.T
        else:
            matrix = self._gram * (weight / float(prior.precision[0]))
        matrix.diagonal().add_(1)
        return DualFactor(prior, rows, _cholesky(matrix))

    @cached_property
    def _gram(self) -> Float[Tensor, "R R"]:
        """``W W^T``, which every precision of a single group shares."""
        assert self.rows is not None
        return self.rows @ self.rows.T


def primal_factor(linear: LinearModel) -> Factor:
    """``M = sum_i J_i^T B_i J_i`` in weight space.

    Parameters
    ----------
    linear
        The linear model.

    Returns
    -------
    Factor
        With `curvature`.
    """
    size = linear.model.space.size
    total = torch.zeros(size, size, dtype=torch.float64, device=linear.model.device)
    for rows in _weighted_rows(linear):
        total.addmm_(rows.T, rows)
    return Factor(linear.grid.sum_over_data(total), None)


def dual_factor(linear: LinearModel) -> Factor:
    """The rows ``L_i^T J_i`` themselves, in weight space.

    Parameters
    ----------
    linear
        The linear model.

    Returns
    -------
    Factor
        With `rows`.

    Raises
    ------
    ResourceError
        When several processes share the data: the rows are wanted in one place.
    """
    if linear.grid.data_shards > 1:
        raise ResourceError(
            "the exact posterior over outputs needs all examples in one process",
            where="method",
            advice="Run it in one process, or use method='sampled'.",
        )
    return Factor(None, torch.cat(list(_weighted_rows(linear))))


def _cholesky(matrix: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise OptionError(
            "the posterior precision is not positive definite in float64",
            where="prior_precision",
            advice="Give a larger precision: this one is lost in the rounding of the curvature.",
        )
    return factor


def _noise(count: int, size: int, seed: int, name: str, device: torch.device) -> Tensor:
    noise = torch.empty(count, size, dtype=torch.float64, device=device)
    for draw in range(count):
        noise[draw].normal_(generator=stream(seed, "exact", name, draw, device=device))
    return noise


def _weighted_rows(linear: LinearModel) -> Iterator[Tensor]:
    """Rows of ``L_i^T J_i``, examples and outputs together on the first axis."""
    for _, outputs, jacobian in linear.jacobian_blocks():
        columns = jacobian.permute(2, 0, 1).reshape(-1, *outputs.shape)
        weighted = linear.likelihood.curvature_factor_adjoint(outputs.double(), columns)
        yield weighted.reshape(len(columns), -1).T
