"""``pf.extrapolated_learning_coefficient``: from several temperatures to ``lambda`` itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from math import exp
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn

from pushforward.degeneracy.coefficient import LearningCoefficient, Measured
from pushforward.degeneracy.estimate import coefficient_of
from pushforward.degeneracy.neighbourhood import Metric, Neighbourhood
from pushforward.degeneracy.schedule import walk_through
from pushforward.degeneracy.settings import SamplerChoice, Settings
from pushforward.degeneracy.temperature_fit import (
    FEWEST_TEMPERATURES,
    TemperatureFit,
    fit_temperatures,
)
from pushforward.degeneracy.walk import Walk
from pushforward.errors import OptionError
from pushforward.networks.likelihoods import Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.runs.estimate import Check, Cost, Estimate, to_jsonable
from pushforward.runs.progress import track
from pushforward.sampling.potential import Loss

__all__ = ["ExtrapolatedCoefficient", "extrapolated_learning_coefficient"]

_RATIO = 4.0  # of neighbouring temperatures
_TEMPERATURES = {"hmc": 5, "mala": 5, "langevin": 3, "sgld": 3}
_ROUNDING = 0.1  # of the coefficient, that rounding of the losses may add
_UNLIKELY = 0.01  # p-value of a fit that is bad


@dataclass(frozen=True, repr=False)
class ExtrapolatedCoefficient(Estimate):
    """The learning coefficient at temperature zero, from several temperatures.

    Parameters
    ----------
    multiplicity_term
        ``m - 1``: 0 at smooth points.
    fit
        The curves behind the value, and how likely each multiplicity is.
    estimates
        One for each temperature.
    localization
        ``gamma``, the same at all.
    """

    _: KW_ONLY
    multiplicity_term: Measured
    fit: TemperatureFit
    localization: float
    estimates: tuple[LearningCoefficient, ...] = field(metadata={"json": False})

    @property
    def nbetas(self) -> tuple[float, ...]:
        """``n beta``, ascending."""
        return tuple(found.nbeta for found in self.estimates)

    def plot(self) -> Any:
        """Estimates against ``1 / ln(n beta)`` with the fit.

        Returns
        -------
        matplotlib.figure.Figure
            Down to temperature zero.

        Raises
        ------
        OptionError
            When matplotlib is not installed.
        """
        from pushforward.degeneracy.sweep_plots import plot_extrapolation

        return plot_extrapolation(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            The fields, and those of every estimate without traces.
        """
        fields: dict[str, Any] = to_jsonable(self)
        return fields | {"estimates": [found.to_dict() for found in self.estimates]}

    def __repr__(self) -> str:
        fit = self.fit
        lines = [
            f"Learning coefficient {float(self.value):.4g} ± {float(self.standard_error):.2g} at "
            f"temperature zero, multiplicity less 1: {self.multiplicity_term}",
            f"  chi^2 {fit.chi_squared:.3g} on {fit.degrees_of_freedom} degrees of freedom; "
            f"{fit.model_error:.2g} of the error is that of the curve",
        ]
        for found in self.estimates:
            value = Measured(float(found.value), float(found.standard_error))
            lines.append(f"  n beta {found.nbeta:>10.4g}: {value}  {found.verdict}")
        lines.append(f"  cost: {self.cost}")
        lines += [f"  {check}" for check in self.checks if check.status != "pass"]
        return "\n".join(lines)


def extrapolated_learning_coefficient(
    net: nn.Module | FunctionalModel,
    data: Any,
    loss: Likelihood | Loss,
    *,
    nbetas: Sequence[float] | None = None,
    localization: float | None = None,
    metric: Metric = "euclidean",
    sampler: SamplerChoice = "auto",
    num_chains: int = 8,
    num_draws: int | None = None,
    num_warmup: int | None = None,
    batch_size: int | None = None,
    step_size: float | Literal["auto"] = "auto",
    subset: str | Iterable[str] | None = None,
    realisable: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> ExtrapolatedCoefficient:
    """Estimate the learning coefficient at temperature zero, and its multiplicity.

    At the temperature of one run the estimate is ``(m - 1) / ln(n beta)`` short of ``lambda``,
    which is a quarter of it for two weights that multiply each other and a thousand examples.

    Parameters
    ----------
    net, data, loss, metric, sampler, num_chains, num_draws, num_warmup, batch_size, step_size
        As in `learning_coefficient`.
    nbetas
        ``n beta``, three or more. Default: from ``n / ln n`` upward by factors of 4, five for HMC
        and MALA and three for the others, fewer where rounding of the losses would be felt.
    localization
        ``gamma``, the same at all temperatures. Default: what the first of them needs.
    subset, realisable
        As in `learning_coefficient`.
    seed
        Of all noise.
    checkpoint
        Folder for the state: the same call goes on from there, to the same result.
    progress
        Whether to show a bar; None: on a terminal, when it takes long.

    Returns
    -------
    ExtrapolatedCoefficient
        An estimate whose standard error includes that of the curve.

    Raises
    ------
    OptionError
        For an option out of range.
    SamplingError
        When no chain stays finite.
    KeyboardInterrupt
        When interrupted; with a checkpoint what was done is kept.

    Notes
    -----
    The curves are those of ``temperature_fit.py``. Values of ``n beta`` far above ``n`` look at the
    minimum of the loss on these data, which training has to have reached: give ``realisable=True``
    or data without noise.
    """
    began = perf_counter()
    settings = {
        "metric": metric,
        "sampler": sampler,
        "num_chains": num_chains,
        "num_draws": num_draws,
        "num_warmup": num_warmup,
        "batch_size": batch_size,
        "step_size": step_size,
    }

    def around(nbeta: float | None, gamma: float | None) -> tuple[Settings, Neighbourhood]:
        options = Settings(nbeta=nbeta, localization=gamma, **settings)  # type: ignore[arg-type]
        there = options.neighbourhood(
            net, data, loss, subset=subset, realisable=realisable, seed=seed
        )
        return options, there

    options, first = around(None, localization)
    chosen = _temperatures(first, options) if nbetas is None else sorted(set(map(float, nbetas)))
    if len(chosen) < FEWEST_TEMPERATURES or chosen[0] <= 1:
        raise OptionError(
            f"temperatures {chosen}",
            where="nbetas",
            advice="Give three or more different numbers above 1.",
        )
    gamma, estimates = localization, list[LearningCoefficient]()
    with track(len(chosen), "Temperatures", enabled=progress) as advance:
        for number, nbeta in enumerate(chosen):
            started = perf_counter()
            options, there = around(nbeta, gamma)
            folder = None if checkpoint is None else Path(checkpoint) / f"nbeta-{number:02d}"
            walk = Walk(there, options.sampler_for(there), seed, folder, progress=False)
            runs = walk_through(walk, options)
            found = coefficient_of(runs, seed, perf_counter() - started)
            gamma = found.localization  # of the first, for all that follow
            estimates.append(found)
            advance(1, f"n beta {nbeta:.3g}: {float(found.value):.4g}")
    return _assembled(tuple(estimates), perf_counter() - began)


def _temperatures(first: Neighbourhood, options: Settings) -> list[float]:
    """Upward from the default, as long as rounding of the losses is not felt."""
    count = _TEMPERATURES[options.sampler_for(first)]
    rounding = torch.finfo(first.potential.dtype).eps * max(abs(first.initial_loss), exp(-9))
    highest = max(_ROUNDING / rounding, first.nbeta)
    # Downward where that leaves too few; ln b has to stay away from 0.
    up = [first.nbeta * _RATIO**k for k in range(count) if first.nbeta * _RATIO**k <= highest]
    while len(up) < FEWEST_TEMPERATURES and up[0] / _RATIO > exp(1):
        up.insert(0, up[0] / _RATIO)
    return up


def _assembled(
    estimates: tuple[LearningCoefficient, ...], seconds: float
) -> ExtrapolatedCoefficient:
    fit = fit_temperatures(
        [found.nbeta for found in estimates],
        [float(found.value) for found in estimates],
        [float(found.standard_error) for found in estimates],
    )
    wrong = [
        f"{found.verdict} at {found.nbeta:.4g}" for found in estimates if found.verdict != "OK"
    ]
    good = fit.p_value > _UNLIKELY
    checks = (
        Check(
            "temperatures",
            "fail" if wrong else "pass",
            ", ".join(wrong) if wrong else f"all {len(estimates)} estimates are OK",
            "Look at these estimates: the fit is as good as they are." if wrong else "",
        ),
        Check(
            "curve",
            "pass" if good else "fail",
            f"chi^2 {fit.chi_squared:.3g} on {fit.degrees_of_freedom} degrees of freedom",
            ""
            if good
            else "They tend to no limit yet: leave out the lowest n beta, or go further.",
        ),
    )
    return ExtrapolatedCoefficient(
        value=torch.tensor(fit.value.value, dtype=torch.float64),
        standard_error=torch.tensor(fit.value.standard_error, dtype=torch.float64),
        cost=Cost(0.0, seconds, sum(found.cost.evaluations for found in estimates)),
        method=f"{len(estimates)} temperatures by {estimates[0].sampler}",
        checks=checks,
        multiplicity_term=fit.multiplicity_term,
        fit=fit,
        localization=estimates[0].localization,
        estimates=estimates,
    )
