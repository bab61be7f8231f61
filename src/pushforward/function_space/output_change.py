"""From moments of the change of the outputs to the mean discrepancy in a metric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pushforward.function_space.chain import Change, Moments
from pushforward.function_space.metrics import Metric, discrepancy
from pushforward.function_space.statistics import OutputStatistics, mean_curvatures
from pushforward.runs.rng import stream

__all__ = ["OutputAnchor", "mean_discrepancy"]

_NEGLIGIBLE = 1e-6  # of the largest eigenvalue: probabilities sum to one, so that one is 0
_RIDGE = 1e-7  # of the largest variance: rounding may leave a covariance a little indefinite


def mean_discrepancy(
    change: Change,
    closure: Moments,
    outputs: OutputStatistics,
    metric: Metric,
    *,
    chosen: Int64[Tensor, " k"] | None,
    moved: bool,
    num_samples: int,
    seed: int,
) -> Float[Tensor, " c"]:
    """Mean discrepancy of each component.

    ``euclidean`` needs second moments only: ``tr E[dz dz^T] / 2``. So does ``fisher``, with the
    mean curvature that the reference has over the data: ``tr(E[H] E[dz dz^T]) / 2``. For
    ``softmax`` and ``kl`` outputs and changes are drawn as jointly Gaussian, outputs with the
    moments that they have over the data; at the reference itself their second-order form, which
    needs no draws, has the same value, gradient and curvature.

    Parameters
    ----------
    change
        Of the outputs, from a closed form.
    closure
        What the closed form takes for the moments of the outputs, with which the change varies.
    outputs
        What they are.
    metric
        Which.
    chosen
        Numbers of the outputs that count; None for all.
    moved
        Whether the weights differ from those of the reference.
    num_samples
        Draws in each component.
    seed
        Of the draws.

    Returns
    -------
    Tensor
        ``(c,)``, differentiable in `change`.
    """
    if chosen is not None:
        change = Change(
            change.mean[:, chosen], _pick(change.cross, chosen), _pick(change.covariance, chosen)
        )
        closure = _chosen_moments(closure, chosen)
    known = outputs.moments if chosen is None else _chosen_moments(outputs.moments, chosen)
    square = change.covariance + change.mean.unsqueeze(-1) * change.mean.unsqueeze(-2)
    if metric == "euclidean":
        return square.diagonal(dim1=-2, dim2=-1).sum(-1) / 2
    generator = stream(seed, "function-space distance", "outputs", device=change.mean.device)
    if metric == "fisher" or not moved:
        curvature = outputs.softmax if metric == "softmax" else outputs.fisher
        if chosen is not None:
            rows = _gaussian_rows(known, num_samples, generator)
            fisher, softmax = mean_curvatures(list(rows.softmax(-1)))
            curvature = softmax if metric == "softmax" else fisher
        return (curvature * square).sum((-2, -1)) / 2
    rows = _gaussian_rows(known, num_samples, generator)
    return discrepancy(rows, rows + _changes(rows, change, closure, generator), metric).mean(1)


@dataclass(frozen=True, eq=False)
class OutputAnchor:
    """An affine map for each component that gives drawn outputs the moments that were kept.

    Parameters
    ----------
    drawn, kept
        Means ``(c, K)`` of outputs on drawn inputs, and over the data.
    stretch
        ``(c, K, K)``: from the spread of the first to that of the second.
    curvature
        ``T``, ``(c, K, K)``: with ``S`` the curvature of the divergence, ``T E[S] T`` is its mean
        over the data, the expectation being over the outputs that are drawn and anchored.
    """

    drawn: Tensor
    kept: Tensor
    stretch: Tensor
    curvature: Tensor

    @classmethod
    def of(
        cls,
        rows: Float[Tensor, "n K"],
        component: Int64[Tensor, " n"],
        outputs: OutputStatistics,
    ) -> OutputAnchor:
        """Compare outputs on drawn inputs with those over the data.

        Parameters
        ----------
        rows
            Outputs of the reference on many drawn inputs, more of each component than outputs.
        component
            Which each is from.
        outputs
            Of the outputs over the data.

        Returns
        -------
        OutputAnchor
            Without gradient.
        """
        means, stretches, curvatures = [], [], []
        with torch.no_grad():
            for number, covariance in enumerate(outputs.moments.covariance):
                part = rows[component == number]
                means.append(part.mean(0))
                centred = part - means[-1]
                own = _factor((centred.mT @ centred / len(part)).unsqueeze(0))[0]
                wanted = _factor(covariance.unsqueeze(0))[0]
                stretch = torch.linalg.solve_triangular(own, wanted, upper=False, left=False)
                stretches.append(stretch)
                anchored = outputs.moments.mean[number] + centred @ stretch.mT
                drawn, _ = mean_curvatures([anchored.softmax(1)])
                curvatures.append(_transport(drawn[0], outputs.fisher[number]))
        return cls(
            torch.stack(means),
            outputs.moments.mean,
            torch.stack(stretches),
            torch.stack(curvatures),
        )

    def apply(
        self, rows: Float[Tensor, "n K"], component: Int64[Tensor, " n"]
    ) -> Float[Tensor, "n K"]:
        """Shift and stretch each row as its component asks.

        Parameters
        ----------
        rows
            Outputs on drawn inputs.
        component
            Which each is from.

        Returns
        -------
        Tensor
            Like `rows`.
        """
        centred = (rows - self.drawn[component]).unsqueeze(-1)
        return self.kept[component] + (self.stretch[component] @ centred).squeeze(-1)


def _transport(source: Float[Tensor, "K K"], target: Float[Tensor, "K K"]) -> Tensor:
    """The symmetric ``T`` with ``T source T = target``, the nearest to the identity."""
    root, inverse = _root(source), _root(source, power=-0.5)
    return inverse @ _root(root @ target @ root) @ inverse


def _root(matrix: Float[Tensor, "K K"], power: float = 0.5) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > _NEGLIGIBLE * values[-1].clamp(min=1e-300)
    powers = torch.where(kept, torch.where(kept, values, 1.0) ** power, 0.0)
    return (vectors * powers) @ vectors.mT


def _changes(
    rows: Float[Tensor, "c s k"], change: Change, closure: Moments, generator: torch.Generator
) -> Float[Tensor, "c s k"]:
    """Changes given the outputs: a regression on them and an independent rest."""
    inverse = torch.linalg.inv(_with_ridge(closure.covariance))
    by = inverse @ change.cross
    rest = change.covariance - change.cross.mT @ by
    explained = (rows - closure.mean.unsqueeze(1)) @ by
    noise = _normals(rows.shape, generator).to(rows)
    size = change.covariance.diagonal(dim1=-2, dim2=-1).amax(-1)  # of what rounding is relative to
    return change.mean.unsqueeze(1) + explained + noise @ _factor(rest, size).mT


def _gaussian_rows(
    moments: Moments, num_samples: int, generator: torch.Generator
) -> Float[Tensor, "c s k"]:
    components, width = moments.mean.shape
    normals = _normals(torch.Size((components, num_samples, width)), generator)
    factor = _factor(moments.covariance)
    return moments.mean.unsqueeze(1) + normals.to(factor) @ factor.mT


def _normals(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Antithetic pairs."""
    half = (shape[0], -(-shape[1] // 2), shape[2])
    draws = torch.randn(half, generator=generator, dtype=torch.float64, device=generator.device)
    return torch.cat([draws, -draws], dim=1)[:, : shape[1]]


def _factor(covariance: Tensor, size: Tensor | None = None) -> Tensor:
    """A matrix ``L`` with ``L L^T`` the covariance; scaled, so that a tiny one works too."""
    if size is None:
        size = covariance.diagonal(dim1=-2, dim2=-1).amax(-1)
    scale = size.detach().clamp(min=1e-300)[:, None, None]
    eye = torch.eye(covariance.shape[-1]).to(covariance)
    return torch.linalg.cholesky(covariance / scale + _RIDGE * eye) * scale.sqrt()


def _with_ridge(covariance: Tensor) -> Tensor:
    size = covariance.detach().diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-300)
    eye = torch.eye(covariance.shape[-1]).to(covariance)
    return covariance + _RIDGE * size[:, None, None] * eye


def _pick(matrices: Tensor, chosen: Tensor) -> Tensor:
    return matrices[:, chosen][:, :, chosen]


def _chosen_moments(moments: Moments, chosen: Tensor) -> Moments:
    return Moments(moments.mean[:, chosen], _pick(moments.covariance, chosen))
