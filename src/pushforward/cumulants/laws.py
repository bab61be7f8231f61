"""Gaussian laws of inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import LawError, ShapeError
from pushforward.networks.data import DataStream
from pushforward.options import choice
from pushforward.typing import DataSource

__all__ = ["CovarianceKind", "GaussianLaw"]

CovarianceKind = Literal["full", "diagonal", "isotropic"]
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False, init=False)
class GaussianLaw:
    """A Gaussian law of the inputs of a network, or a batch of them.

    Parameters
    ----------
    mean
        ``(d,)``, or ``(B, d)`` for a batch of laws that are propagated together.
    covariance
        ``()`` isotropic, ``(d,)`` diagonal or ``(d, d)`` full, shared by the batch; ``(B, d, d)``
        one for each law. A plain number is isotropic.
    event_shape
        Shape in which the network takes one example, with ``d`` entries: ``(1, 28, 28)`` for an
        image. Default ``(d,)``.

    Raises
    ------
    ShapeError
        When the shapes do not fit together.
    LawError
        For NaN or infinite entries, a covariance that is not symmetric, or one that is indefinite.

    Examples
    --------
    >>> import torch
    >>> law = GaussianLaw(torch.zeros(3), torch.tensor([1.0, 2.0, 0.5]))
    >>> law.dimension
    3
    """

    mean: Tensor
    covariance: Tensor
    event_shape: tuple[int, ...]

    def __init__(
        self,
        mean: Tensor | Array,
        covariance: Tensor | Array | float,
        event_shape: tuple[int, ...] = (),
    ) -> None:
        mean = torch.as_tensor(mean)
        mean = mean if mean.is_floating_point() else mean.to(torch.get_default_dtype())
        number = isinstance(covariance, int | float)  # the default dtype would round it
        kind = mean.dtype if number else None
        covariance = torch.as_tensor(covariance, dtype=kind, device=mean.device)
        if not covariance.is_floating_point():
            covariance = covariance.to(mean.dtype)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)
        if mean.dim() not in {1, 2} or mean.shape[-1] == 0:
            raise ShapeError(
                f"mean has shape {tuple(mean.shape)}",
                where="GaussianLaw",
                advice="Flatten it to (d,), or (B, d) for a batch; event_shape restores the image.",
            )
        d = mean.shape[-1]
        allowed = [(), (d,), (d, d)] + ([(mean.shape[0], d, d)] if mean.dim() == 2 else [])
        if tuple(covariance.shape) not in allowed:
            raise ShapeError(
                f"covariance has shape {tuple(covariance.shape)} with a mean of shape "
                f"{tuple(mean.shape)}",
                where="GaussianLaw",
                advice=f"Use one of {', '.join(map(str, allowed))}.",
            )
        shape = tuple(event_shape) or (d,)
        object.__setattr__(self, "event_shape", shape)
        if math.prod(shape) != d:
            raise ShapeError(
                f"event_shape {shape} has {math.prod(shape)} entries, the mean {d}",
                where="GaussianLaw",
                advice="Their products must agree.",
            )
        _check_finite(mean, "mean")
        _check_finite(covariance, "covariance")
        _check_covariance(covariance.detach())

    @classmethod
    def standard(
        cls,
        dimension: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        event_shape: tuple[int, ...] = (),
    ) -> GaussianLaw:
        """``N(0, I)``.

        Parameters
        ----------
        dimension
            Number of features.
        dtype, device
            Of the tensors; torch's defaults.
        event_shape
            As in the constructor.

        Returns
        -------
        GaussianLaw
            Isotropic.
        """
        mean = torch.zeros(dimension, dtype=dtype, device=device)
        return cls(mean, mean.new_ones(()), event_shape)

    @classmethod
    def from_data(
        cls,
        source: DataSource | Array,
        *,
        covariance: CovarianceKind = "full",
        device: torch.device | str | None = None,
    ) -> GaussianLaw:
        """The Gaussian law with the mean and covariance of a data set, in one streaming pass.

        Parameters
        ----------
        source
            Tensor or array ``(N, ...)``, or an iterable of batches such as a DataLoader; targets
            are ignored.
        covariance
            What to keep: ``"full"`` (``d^2`` numbers), ``"diagonal"`` or ``"isotropic"``.
        device
            Where to accumulate; default the device of the data.

        Returns
        -------
        GaussianLaw
            Float64 moments, covariance divided by ``N - 1``, `event_shape` that of one example.

        Raises
        ------
        OptionError
            For an unknown kind of covariance.
        LawError
            For fewer than two examples.
        """
        choice(covariance, "covariance", get_args(CovarianceKind))
        count = 0
        shape: tuple[int, ...] = ()
        mean = scatter = torch.zeros(())
        for batch in DataStream(source).inputs():
            x = batch.to(torch.float64) if device is None else batch.to(device, torch.float64)
            shape, x = tuple(x.shape[1:]), x.flatten(1)
            centre = x.mean(0)
            x = x - centre
            part = x.T @ x if covariance == "full" else (x * x).sum(0)
            if count == 0:
                count, mean, scatter = len(x), centre, part
                continue
            # Chan, Golub and LeVeque (1979): merge two centred sums of squares.
            total = count + len(x)
            delta = centre - mean
            outer = torch.outer(delta, delta) if covariance == "full" else delta * delta
            scatter = scatter + part + outer * (count * len(x) / total)
            mean = mean + delta * (len(x) / total)
            count = total
        if count < 2:
            raise LawError(
                f"{count} example has no covariance",
                where="GaussianLaw.from_data",
                advice="Give at least two examples.",
            )
        estimate = scatter / (count - 1)
        if covariance == "isotropic":
            estimate = estimate.mean()
        return cls(mean, estimate, shape)

    @property
    def dimension(self) -> int:
        """Number of features ``d``."""
        return int(self.mean.shape[-1])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """``()`` for one law, ``(B,)`` for a batch."""
        return tuple(self.mean.shape[:-1])

    @property
    def is_isotropic_centred(self) -> bool:
        """Whether the law is ``N(0, c I)``: invariant under rotations."""
        return self.covariance.dim() == 0 and not bool(self.mean.detach().any())

    def select(self, rows: slice) -> GaussianLaw:
        """Some laws of a batch.

        Parameters
        ----------
        rows
            Which.

        Returns
        -------
        GaussianLaw
            A batch of those.
        """
        covariance = self.covariance[rows] if self.covariance.dim() == 3 else self.covariance
        return GaussianLaw(self.mean[rows], covariance, self.event_shape)

    def diagonal(self) -> Float[Tensor, "*batch d"]:
        """Variance of each feature.

        Returns
        -------
        Tensor
            ``(d,)`` or ``(B, d)``.
        """
        if self.covariance.dim() < 2:
            return self.covariance.expand(self.mean.shape)
        return self.covariance.diagonal(dim1=-2, dim2=-1).expand(self.mean.shape)

    def dense_covariance(self) -> Float[Tensor, "*batch d d"]:
        """The covariance as a matrix.

        Returns
        -------
        Tensor
            ``(d, d)``, or ``(B, d, d)`` when each law has its own.
        """
        if self.covariance.dim() >= 2:
            return self.covariance
        return torch.diag(self.covariance.expand(self.dimension))

    def root(self) -> Float[Tensor, "*batch d d"]:
        """A matrix ``L`` with ``L L^T`` equal to the covariance; singular covariances included.

        Returns
        -------
        Tensor
            Float64, symmetric positive semi-definite.
        """
        return self._root

    @cached_property
    def _root(self) -> Tensor:
        values, vectors = torch.linalg.eigh(self.dense_covariance().to(torch.float64))
        return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT

    def transform(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Turn standard normal rows into draws of the law.

        Parameters
        ----------
        z
            ``(n, d)``, standard normal.

        Returns
        -------
        Tensor
            ``mean + L z`` in the dtype and on the device of `z`.

        Raises
        ------
        ShapeError
            For a batch of laws, or another number of columns.
        """
        if self.batch_shape or z.shape[-1] != self.dimension:
            raise ShapeError(
                f"{tuple(z.shape)} normals for a law of shape {tuple(self.mean.shape)}",
                where="GaussianLaw.transform",
                advice="Draw from one law at a time, with one column for each feature.",
            )
        mean = self.mean.to(z)
        if self.covariance.dim() < 2:
            return mean + self.covariance.to(z).sqrt() * z
        return mean + z @ self._root.to(z).mT

    def __repr__(self) -> str:
        kind = {0: "isotropic", 1: "diagonal"}.get(self.covariance.dim(), "full")
        batch = f", batch of {self.batch_shape[0]}" if self.batch_shape else ""
        shape = f", examples of shape {self.event_shape}" if len(self.event_shape) > 1 else ""
        return f"GaussianLaw(d={self.dimension}, {kind} covariance{batch}{shape})"


def _check_finite(tensor: Tensor, name: str) -> None:
    bad = ~torch.isfinite(tensor.detach())
    if bool(bad.any()):
        raise LawError(
            f"{int(bad.sum())} of {tensor.numel()} entries are NaN or infinite",
            where=f"GaussianLaw {name}",
            advice="Remove or impute them; a law needs finite moments.",
        )


def _check_covariance(covariance: Tensor) -> None:
    where = "GaussianLaw covariance"
    if covariance.dim() < 2:
        if bool((covariance < 0).any()):
            raise LawError(
                f"a variance is negative ({covariance.min().item():.3g})",
                where=where,
                advice="Variances must be at least zero.",
            )
        return
    scale = covariance.abs().amax((-2, -1), keepdim=True)  # of each law of a batch
    rounding = 16 * covariance.shape[-1] * torch.finfo(covariance.dtype).eps * scale
    difference = (covariance - covariance.mT).abs()
    asymmetry = difference.amax().item()
    if bool((difference > rounding).any()):
        raise LawError(
            f"not symmetric: entries differ by up to {asymmetry:.3g}",
            where=where,
            advice="Use (C + C.T) / 2 if this is rounding; otherwise it is no covariance.",
        )
    matrix = covariance.to(torch.float64)
    shift = rounding.to(torch.float64).clamp(min=1e-300)
    shifted = matrix + shift * torch.eye(matrix.shape[-1]).to(matrix)
    if bool(torch.linalg.cholesky_ex(shifted).info.any()):
        values = torch.linalg.eigvalsh(matrix)
        smallest = values.amin().item()
        if bool((values < -shift[..., 0]).any()):
            raise LawError(
                f"not positive semi-definite: smallest eigenvalue {smallest:.3g}",
                where=where,
                advice="Estimate it from more examples than features, use "
                "covariance='diagonal', or clip its negative eigenvalues.",
            )
