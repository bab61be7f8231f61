"""Moves of a Gibbs sweep that change scales: of learned variances, and of units.

They read and write values as the moves of `gibbs_moves` do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.sampling.intermediate_noise.gamma_draws import gamma_quantile
from pushforward.sampling.intermediate_noise.maps import AffineMap
from pushforward.sampling.intermediate_noise.moves import LinkedMap, Move, Values, per_chain
from pushforward.sampling.intermediate_noise.network import sum_squares
from pushforward.sampling.noise import NoiseSize

__all__ = ["Hyperprior", "PrecisionMove", "ScaleMove"]


@dataclass(frozen=True)
class Hyperprior:
    """Of learned inverse variances: Gamma laws about the values that the model has.

    Parameters
    ----------
    shape
        Of the Gamma law; its mean is the inverse of the model's variance (or the precision of its
        prior). It counts as much as twice as many observations.
    """

    shape: float


class PrecisionMove(Move):
    """Inverse variances, of noise and of the prior, which have Gamma laws.

    Parameters
    ----------
    links
        Maps whose noise is learned.
    precisions
        Of the prior, by parameter name, where they are learned.
    counts
        Numbers behind each inverse variance: first those of `links`, then those of `precisions`.
    hyperprior
        Of all.
    device
        Of the chains.
    """

    def __init__(
        self,
        links: tuple[LinkedMap, ...],
        precisions: dict[str, float],
        counts: list[int],
        hyperprior: Hyperprior,
        device: torch.device,
    ) -> None:
        self._links, self._precisions = links, precisions
        centres = [link.variance for link in links] + [1 / value for value in precisions.values()]
        halves = torch.tensor(counts, dtype=torch.float64, device=device) / 2
        self._shape = hyperprior.shape + halves
        self._rate = hyperprior.shape * torch.tensor(centres, dtype=torch.float64, device=device)
        self.size = NoiseSize(uniforms=len(counts))

    def apply(self, values: Values, normals: Tensor, uniforms: Tensor) -> None:  # noqa: ARG002
        """Redraw them."""
        squares = [
            sum_squares(values[link.target] - link.mean(values), 1 + len(link.output_shape))
            for link in self._links
        ]
        squares += [sum_squares(values[name].flatten(1), 1) for name in self._precisions]
        rate = self._rate + torch.stack(squares, 1) / 2
        inverse = gamma_quantile(self._shape, uniforms) / rate
        for k, link in enumerate(self._links):
            values[f"noise.{link.item.name}"] = 1 / inverse[:, k]
        for k, name in enumerate(self._precisions, start=len(self._links)):
            values[f"precision.{name}"] = inverse[:, k]


# --- the scale of a unit -------------------------------------------------------------------------


class ScaleMove(Move):
    """Everything that enters a unit times ``s``, everything that leaves it over ``s``.

    Where all maps between two linear ones are positively homogeneous, only the noises inside the
    unit and the priors notice. The law of ``u = s^2`` along this orbit, with the Jacobian of the
    group, is a generalised inverse Gaussian: ``u^(p - 1) exp(-(A u + B / u) / 2)`` with ``2 p`` the
    number of variables times ``s`` less that over ``s``. A draw from ``Gamma(p, A / 2)`` is
    accepted with probability ``exp(-B (1 / u - 1) / 2)``, the present value being ``u = 1``.

    Parameters
    ----------
    group
        Maps from one with parameters to the next one, both included.
    count
        Examples.
    precisions
        Of the prior, by parameter name.

    Raises
    ------
    OptionError
        When a unit has more outgoing weights than anything else.
    """

    def __init__(
        self, group: tuple[LinkedMap, ...], count: int, precisions: dict[str, float]
    ) -> None:
        first, last = group[0].item, group[-1].item
        assert isinstance(first, AffineMap)  # for the type checker
        assert isinstance(last, AffineMap)
        self._group, self._first, self._last = group[:-1], first, last
        self._precisions = precisions
        inside = sum(count * link.outputs // first.units for link in self._group)
        # Columns of the outgoing weights that belong to one unit.
        outgoing = last.units * last.fan_in // first.units
        twice = first.fan_in + (first.bias is not None) + inside - outgoing
        if twice <= 0:
            raise OptionError(
                f"a unit of layer {first.name} has {outgoing} outgoing weights, more than there "
                "are examples and incoming weights together",
                where="scale_move",
                advice="Use more examples, or leave the scale move out.",
            )
        self._shape = torch.tensor(twice / 2, dtype=torch.float64)
        self.size = NoiseSize(uniforms=2 * first.units)

    def apply(self, values: Values, normals: Tensor, uniforms: Tensor) -> None:  # noqa: ARG002
        """Propose a scale for every unit of the layer."""
        first, last = self._first, self._last
        weight, outgoing = values[first.weight], values[last.weight]
        grouped = self._by_unit(outgoing)
        growing = _per_unit(weight, 1) * self._precision(first.weight, values)
        if first.bias is not None:
            bias = self._precision(first.bias, values)
            growing = growing + values[first.bias].double().square() * bias
        for link in self._group:
            rest = values[link.target] - link.mean(values)
            growing = growing + _per_unit(rest, 2) / per_chain(link.noise(values), 2)
        shrinking = _per_unit(grouped, 2) * self._precision(last.weight, values)
        draws, levels = uniforms.chunk(2, 1)
        proposed = gamma_quantile(self._shape.to(draws.device), draws) * 2 / growing
        rise = -0.5 * shrinking * (1 / proposed - 1)
        accepted = torch.log1p(-levels) <= rise
        scale = torch.where(accepted, proposed, 1.0).sqrt().to(weight.dtype)
        values[first.weight] = weight * _unit_axis(scale, weight, 1)
        if first.bias is not None:
            values[first.bias] = values[first.bias] * scale
        for link in self._group:
            value = values[link.target]
            values[link.target] = value * _unit_axis(scale, value, 2)
        shrunk = grouped / _unit_axis(scale, grouped, 2)
        values[last.weight] = shrunk.reshape(outgoing.shape)
        values["scale_acceptance"] = values["scale_acceptance"] + accepted.double().mean(1)

    def _by_unit(self, outgoing: Tensor) -> Tensor:
        """``(chains, out, units, ...)``: a unit's features are adjacent behind a `Flatten`."""
        if outgoing.dim() > 3:
            return outgoing
        return outgoing.unflatten(2, (self._first.units, -1))

    def _precision(self, name: str, values: Values) -> float | Tensor:
        learned = values.get(f"precision.{name}")
        return self._precisions[name] if learned is None else learned[:, None]


# --- small things --------------------------------------------------------------------------------


def _per_unit(values: Tensor, axis: int) -> Tensor:
    """Sums of squares ``(chains, units)`` over all axes but the first and `axis`."""
    others = tuple(k for k in range(1, values.dim()) if k != axis)
    squares = values.double().square()
    return squares.sum(others) if others else squares


def _unit_axis(scale: Tensor, values: Tensor, axis: int) -> Tensor:
    shape = [len(scale)] + [1] * (values.dim() - 1)
    shape[axis] = scale.shape[1]
    return scale.view(shape)
