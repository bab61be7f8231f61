"""Whether chains agree with each other: R-hat, effective sample size, Monte Carlo error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pushforward.runs.estimate import Check, to_jsonable

__all__ = ["Diagnosis", "Quantity", "diagnose", "diagnostic_checks", "looked_at"]

_MOST_COMPONENTS = 200  # of one name
_FEWEST_DRAWS = 8  # R-hat splits chains into halves, and needs a variance in each
_LARGEST_R_HAT = 1.01  # Vehtari et al. 2021, arXiv 1903.08008
_WORRYING_R_HAT = 1.1
_FEWEST_EFFECTIVE = 400  # the same: below it the diagnostics themselves are unreliable
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class Quantity:
    """How well chains know one quantity, whose components were looked at one by one.

    Parameters
    ----------
    name
        Of the statistic, observation or parameter.
    kind
        ``"potential"``, ``"observation"`` or ``"parameter"``.
    mean, std
        ``(components,)`` over all draws.
    standard_error
        ``(components,)`` Monte Carlo standard error of the mean.
    r_hat
        ``(components,)`` rank-normalised split R-hat: 1 when chains cannot be told apart.
    ess_bulk, ess_tail
        ``(components,)`` effective draws for the centre and for the 5 % and 95 % quantiles.
    """

    name: str
    kind: str
    mean: Float[Tensor, " components"]
    std: Float[Tensor, " components"]
    standard_error: Float[Tensor, " components"]
    r_hat: Float[Tensor, " components"]
    ess_bulk: Float[Tensor, " components"]
    ess_tail: Float[Tensor, " components"]

    @property
    def worst_r_hat(self) -> float:
        """The largest R-hat; NaN when no component varies."""
        return _extreme(self.r_hat, largest=True)

    @property
    def fewest_effective(self) -> float:
        """The smallest effective number of draws, bulk or tail."""
        return _extreme(torch.cat([self.ess_bulk, self.ess_tail]), largest=False)


@dataclass(frozen=True)
class Diagnosis:
    """How well chains know everything that was looked at.

    Parameters
    ----------
    quantities
        Those of the potential first, then observations, then parameters.
    num_chains, num_draws
        Of the run.
    """

    quantities: tuple[Quantity, ...] = field(repr=False)
    num_chains: int
    num_draws: int

    @property
    def enough_draws(self) -> bool:
        """Whether R-hat and effective sample sizes could be computed."""
        return self.num_draws >= _FEWEST_DRAWS

    def worst(self, kind: str | None = None) -> Quantity | None:
        """The quantity with the largest R-hat.

        Parameters
        ----------
        kind
            Of this kind only.

        Returns
        -------
        Quantity or None
            None when none varies.
        """
        found = [q for q in self.quantities if kind in (None, q.kind)]
        found = [q for q in found if q.worst_r_hat == q.worst_r_hat]
        return max(found, key=lambda q: q.worst_r_hat, default=None)

    def __getitem__(self, name: str) -> Quantity:
        for quantity in self.quantities:
            if quantity.name == name:
                return quantity
        raise KeyError(name)

    def lines(self) -> Iterator[str]:
        """A table for readers, the worst component of each quantity.

        Yields
        ------
        str
            One line.
        """
        if not self.enough_draws:
            yield "too few draws for R-hat"
            return
        yield f"{'':24}{'R-hat':>8}{'ESS':>9}{'components':>12}"
        for q in self.quantities[:_SHOWN]:
            yield f"{q.name[:23]:24}{q.worst_r_hat:8.3f}{q.fewest_effective:9.0f}{len(q.mean):12,}"
        if len(self.quantities) > _SHOWN:
            yield f"... {len(self.quantities) - _SHOWN} more"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            The fields.
        """
        fields: dict[str, Any] = to_jsonable(self)
        return fields


def diagnose(
    parameters: Mapping[str, Tensor],
    observations: Mapping[str, Tensor],
    statistics: Mapping[str, Tensor],
) -> Diagnosis:
    """Compare chains with each other, by the rank-normalised diagnostics of arviz-stats.

    Parameters
    ----------
    parameters, observations
        ``(chain, draw, ...)`` by name.
    statistics
        ``(chain, draw)`` by name; only ``"potential"`` is looked at.

    Returns
    -------
    Diagnosis
        Empty of numbers with fewer than eight draws.
    """
    named = (
        [("potential", "potential", statistics["potential"])] if "potential" in statistics else []
    )
    named += [("observation", name, value) for name, value in observations.items()]
    named += [("parameter", name, value) for name, value in parameters.items()]
    anything = [*parameters.values(), *observations.values(), *statistics.values()]
    chains, draws = anything[0].shape[:2] if anything else (0, 0)
    quantities: tuple[Quantity, ...] = ()
    if draws >= _FEWEST_DRAWS:
        quantities = tuple(_quantity(kind, name, value) for kind, name, value in named)
    return Diagnosis(quantities, chains, draws)


def diagnostic_checks(diagnosis: Diagnosis) -> tuple[Check, ...]:
    """What the numbers mean.

    Parameters
    ----------
    diagnosis
        Of a run.

    Returns
    -------
    tuple of Check
        ``"enough-draws-to-compare"``, ``"chains-agree"``, ``"effective-draws"``.
    """
    if not diagnosis.enough_draws:
        return (
            Check(
                "enough-draws-to-compare",
                "warn",
                f"{diagnosis.num_draws} draws a chain are too few for R-hat",
                f"Take {_FEWEST_DRAWS} draws or more of each chain.",
            ),
        )
    # What a network computes can agree where its weights cannot: hidden units may be permuted.
    told = diagnosis.worst("observation") or diagnosis.worst("potential")
    worst = told or diagnosis.worst()
    if worst is None:
        lost = any(not bool(torch.isfinite(q.mean).any()) for q in diagnosis.quantities)
        seen = "a chain is not finite" if lost else "nothing moved"
        return (Check("chains-agree", "fail", seen, "Look at acceptance and step size."),)
    r_hat, effective = (
        worst.worst_r_hat,
        min(q.fewest_effective for q in diagnosis.quantities if q.kind == worst.kind),
    )
    agree = r_hat <= _LARGEST_R_HAT
    alone = diagnosis.num_chains == 1
    return (
        Check(
            "chains-agree",
            "pass" if agree else "warn" if r_hat <= _WORRYING_R_HAT else "fail",
            f"R-hat is {r_hat:.3f} at most, of {worst.name}"
            + (" (one chain, its two halves)" if alone else ""),
            ""
            if agree
            else "Take more draws, a longer warm-up, or another sampler. Agreement is necessary, "
            "not sufficient: pf.thermalize tests whether the posterior was reached.",
        ),
        Check(
            "effective-draws",
            "pass" if effective >= _FEWEST_EFFECTIVE else "warn",
            f"{effective:.0f} effective draws at least",
            "" if effective >= _FEWEST_EFFECTIVE else "Take more draws.",
        ),
    )


def looked_at(size: int) -> Int64[Tensor, " components"]:
    """Which components of a quantity are diagnosed: all, or 200 spread evenly over more.

    Parameters
    ----------
    size
        Components that there are.

    Returns
    -------
    Tensor
        Their numbers, in the flattened tensor.
    """
    spread = torch.linspace(0, size - 1, min(size, _MOST_COMPONENTS), dtype=torch.float64)
    return spread.round().long()


def _quantity(kind: str, name: str, values: Tensor) -> Quantity:
    from arviz_stats.base.array import array_stats

    chains, draws = values.shape[:2]
    flat = values.reshape(chains, draws, -1)
    if flat.shape[-1] > _MOST_COMPONENTS:
        flat = flat[..., looked_at(flat.shape[-1]).to(flat.device)]
    if chains == 1:  # R-hat compares chains: let it compare halves
        flat = flat[:, draws % 2 :].reshape(2, draws // 2, -1)
    plain = flat.detach().double().cpu().numpy()
    axes: dict[str, Any] = {"chain_axis": 0, "draw_axis": 1}
    with np.errstate(all="ignore"):  # components that never move have no R-hat
        found = {
            "standard_error": array_stats.mcse(plain, method="mean", **axes),
            "r_hat": array_stats.rhat(plain, method="rank", **axes),
            "ess_bulk": array_stats.ess(plain, method="bulk", **axes),
            "ess_tail": array_stats.ess(plain, method="tail", prob=(0.05, 0.95), **axes),
        }
    tensors = {key: torch.from_numpy(np.atleast_1d(value)).double() for key, value in found.items()}
    every = torch.from_numpy(plain).flatten(0, 1)
    return Quantity(name, kind, every.mean(0), every.std(0), **tensors)


def _extreme(values: Tensor, *, largest: bool) -> float:
    seen = values[~values.isnan()]
    if not len(seen):
        return float("nan")
    return float(seen.max() if largest else seen.min())
