"""Gaussian priors over the weights: one precision, one a layer, or one in units of the features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.networks.parameters import ParameterSpace
from pushforward.options import choice

__all__ = ["Prior", "PriorKind", "feature_scale"]

PriorKind = Literal["isotropic", "layerwise", "gprior"]

_KINDS: dict[str, PriorKind] = {kind: kind for kind in get_args(PriorKind)}
_SMALLEST_CURVATURE = 1e-6  # relative to the mean: absolute, it would break the invariance
_LARGEST_PRECISION = 1e10  # relative to the mean curvature: the layer is as good as pruned


@dataclass(frozen=True, eq=False)
class Prior:
    """``theta = scale * w`` with ``w ~ N(0, 1 / precision)``, centred at zero.

    Parameters
    ----------
    kind
        ``"isotropic"``: one precision. ``"layerwise"``: one for the parameters of each module.
        ``"gprior"``: one, with `scale` the inverse root of the curvature of each parameter, which
        makes it independent of the units in which the network is written.
    space
        Of the parameters.
    precision
        ``(1,)`` or ``(layers,)`` float64.
    scale
        ``(P,)`` of a g-prior; zero for a parameter that no output depends on.
    """

    kind: PriorKind
    space: ParameterSpace
    precision: Float[Tensor, " groups"]
    scale: Float[Tensor, " P"] | None = None

    @classmethod
    def start(
        cls,
        kind: str,
        space: ParameterSpace,
        precision: float | Mapping[str, float] | Sequence[float] | Tensor,
        device: torch.device,
    ) -> Prior:
        """A prior with given precisions.

        Parameters
        ----------
        kind
            One of `PriorKind`.
        space
            Of the parameters.
        precision
            A positive number; of a layerwise prior also one for each layer, in order or by name.
        device
            Of the parameters.

        Returns
        -------
        Prior
            Without scale; a g-prior gets it by `with_scale`.

        Raises
        ------
        OptionError
            For an unknown kind, a precision that is not positive, or a wrong number of them.
        """
        choice(kind, "prior", _KINDS)
        layers = space.layers if kind == "layerwise" else ("all",)
        if isinstance(precision, Mapping):
            if set(precision) != set(layers):
                raise OptionError(
                    f"it names {sorted(precision)}",
                    where="prior_precision",
                    advice=f"Give one number for each of {', '.join(layers)}.",
                )
            precision = [precision[name] for name in layers]
        try:
            values = torch.as_tensor(precision, dtype=torch.float64, device=device).reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"{precision!r} is no precision",
                where="prior_precision",
                advice="Give a positive number, one for each layer, or None to have it learned.",
            ) from error
        if len(values) not in (1, len(layers)):
            raise OptionError(
                f"{len(values)} precisions for {len(layers)} groups of parameters",
                where="prior_precision",
                advice=f"Give one number, or one for each of {', '.join(layers)}.",
            )
        if not bool(((values > 0) & torch.isfinite(values)).all()):
            raise OptionError(
                f"{values[~((values > 0) & torch.isfinite(values))][0]:g} is no precision",
                where="prior_precision",
                advice="Give a positive number, or None to have it learned.",
            )
        return cls(_KINDS[kind], space, values.expand(len(layers)).clone())

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that share a precision."""
        return self.space.layers if self.kind == "layerwise" else ("all",)

    @property
    def sizes(self) -> Float[Tensor, " groups"]:
        """Parameters in each group."""
        counts = self.space.layer_sizes if self.kind == "layerwise" else (self.space.size,)
        return torch.tensor(counts, dtype=torch.float64, device=self.precision.device)

    def diagonal(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, " P"]:
        """Precision of each coordinate of ``w``.

        Parameters
        ----------
        dtype
            Of the result.

        Returns
        -------
        Tensor
            ``(P,)``.
        """
        if self.kind != "layerwise":
            return self.precision.to(dtype).expand(self.space.size)
        return self.precision.to(dtype)[self.space.layer_index(self.precision.device)]

    def pool(self, layers: Float[Tensor, "*batch layers"]) -> Float[Tensor, "*batch groups"]:
        """From one number for each layer to one for each group.

        Parameters
        ----------
        layers
            ``(..., layers)``, to be added up.

        Returns
        -------
        Tensor
            ``(..., groups)``.
        """
        return layers if self.kind == "layerwise" else layers.sum(-1, keepdim=True)

    def group_sums(self, vectors: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch groups"]:
        """Sums over the parameters of each group, in float64.

        Parameters
        ----------
        vectors
            ``(..., P)``.

        Returns
        -------
        Tensor
            ``(..., groups)``.
        """
        return self.pool(self.space.layer_sums(vectors))

    def scaled(self, vectors: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch P"]:
        """From coordinates ``w`` to weights ``theta``.

        Parameters
        ----------
        vectors
            ``(..., P)``.

        Returns
        -------
        Tensor
            Times the scale.
        """
        return vectors if self.scale is None else vectors * self.scale.to(vectors.dtype)

    def coordinates(self, weights: Float[Tensor, "*batch P"]) -> Float[Tensor, "*batch P"]:
        """From weights ``theta`` to coordinates ``w``; zero where the scale is.

        Parameters
        ----------
        weights
            ``(..., P)``.

        Returns
        -------
        Tensor
            Divided by the scale.
        """
        if self.scale is None:
            return weights
        scale = self.scale.to(weights.dtype)
        return torch.where(scale > 0, weights / torch.where(scale > 0, scale, 1), 0)

    def with_scale(self, curvature: Float[Tensor, " P"]) -> Prior:
        """A g-prior with the scale that belongs to a curvature; other priors unchanged.

        Parameters
        ----------
        curvature
            ``(P,)``: diagonal of the Gauss-Newton matrix.

        Returns
        -------
        Prior
            With scale.
        """
        if self.kind != "gprior":
            return self
        return replace(self, scale=feature_scale(curvature))

    def with_precision(self, precision: Float[Tensor, " groups"]) -> Prior:
        """The same prior with other precisions.

        Parameters
        ----------
        precision
            ``(groups,)``.

        Returns
        -------
        Prior
            Precisions that are out of range are cut.
        """
        kept = precision.to(torch.float64).clamp(1 / _LARGEST_PRECISION, _LARGEST_PRECISION)
        return replace(self, precision=kept)

    def matched_to(self, weights: Float[Tensor, " P"], curvature: Float[Tensor, " P"]) -> Prior:
        """With the precisions at which some weights would be an ordinary draw: where to begin.

        Too small rather than too large ones, since unimportant weights are small only because they
        were regularised. Weights may also be small because they were never trained: a head, or a
        low-rank change, that begins at zero. A precision above the trace t of a group's curvature
        leaves the data less than one direction (eigenvalues that add up to t have an effective
        dimension between ``t / (t + precision)`` and ``t / precision``), and there learning cannot
        tell a precision that is too large from one that has to be. Then the group begins at its
        mean curvature, where n weights have between ``n / (n + 1)`` and ``n / 2``.

        Parameters
        ----------
        weights
            ``(P,)``, the trained ones.
        curvature
            ``(P,)``, diagonal of the Gauss-Newton matrix in the weights, with the noise of now.

        Returns
        -------
        Prior
            In the same coordinates.
        """
        ordinary = self.sizes / self.group_sums(self.coordinates(weights).double().square())
        trace = self.group_sums(self.scaled(self.scaled(curvature.double())))
        # No output depends on a group without curvature: any precision will do.
        small = (ordinary > trace) & (trace > 0)
        return self.with_precision(torch.where(small, trace / self.sizes, ordinary))

    def to_config(self) -> dict[str, Any]:
        """For a file.

        Returns
        -------
        dict
            Kind and precisions.
        """
        return {"kind": self.kind, "precision": self.precision.tolist()}


def feature_scale(curvature: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Inverse roots of a diagonal curvature: the g-prior's unit of each parameter.

    Parameters
    ----------
    curvature
        ``(P,)``, not negative.

    Returns
    -------
    Tensor
        ``(P,)``; zero where the curvature is exactly zero, which is where no output depends on the
        parameter. Small curvatures count as 1e-6 of the mean.
    """
    alive = curvature > 0
    mean = curvature[alive].mean() if bool(alive.any()) else curvature.new_ones(())
    floor = curvature.clamp(min=_SMALLEST_CURVATURE * float(mean))
    return torch.where(alive, floor.rsqrt(), 0)
