"""``pf.degeneracy_self_test``: what one's own settings recover where the answer is known.

Deep linear networks of about the wanted number of parameters are measured with the user's settings
at three points: one of full rank, where the loss is nearly quadratic; all weights zero, as
degenerate as they get; and one of lower rank, balanced over the layers. The targets are the
outputs, so that these points are minima.

What a perfect sampler would return at the same temperature and localisation is found by HMC. Under
squared error the mean loss depends on the inputs only by their second moments, so it is had from as
many examples as there are inputs: the truth costs little, however many examples there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import hypot, isfinite, sqrt
from time import perf_counter
from typing import Any, Final, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.degeneracy.coefficient import LearningCoefficient, Measured
from pushforward.degeneracy.deep_linear_points import deep_linear_local
from pushforward.degeneracy.estimate import coefficient_of
from pushforward.degeneracy.evidence import quadratic_coefficient
from pushforward.degeneracy.known import KnownCoefficient
from pushforward.degeneracy.linear_networks import (
    balanced_factors,
    realised,
    second_moments,
    square_widths,
)
from pushforward.degeneracy.neighbourhood import Metric
from pushforward.degeneracy.schedule import walk_through
from pushforward.degeneracy.settings import SamplerChoice, Settings
from pushforward.degeneracy.walk import Walk
from pushforward.errors import OptionError, SamplingError
from pushforward.networks.likelihoods import Gaussian, Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.options import whole_number
from pushforward.runs.estimate import to_jsonable
from pushforward.runs.progress import track
from pushforward.runs.rng import derived_seed, stream
from pushforward.sampling.curvature import largest_curvature
from pushforward.sampling.potential import Loss

__all__ = ["SelfTest", "SelfTestPoint", "degeneracy_self_test"]

_HMC_PARAMETERS = 10_000  # up to which the truth is sampled
_TRUTH_CHAINS = 8
_MOST_LEARNING = 300  # steps, as many as draws
_CLOSE = 0.05  # of the truth: as good as exact
_SIGMAS, _IMPRECISE = 2.0, 0.25
_UNFIT = frozenset({"DEAD_CHAINS", "STEP_TOO_LARGE"})
_PLAIN: Final[Mapping[str, Any]] = {"subset": None, "realisable": False}

PointName: TypeAlias = Literal["full rank", "zero", "reduced rank"]
TruthBy: TypeAlias = Literal["hmc", "quadratic", "none"]


@dataclass(frozen=True, repr=False)
class SelfTestPoint:
    """One network at known weights.

    Parameters
    ----------
    name
        ``"full rank"``, ``"zero"`` or ``"reduced rank"``.
    found
        With the user's settings.
    truth
        What a perfect sampler returns at that temperature and localisation.
    truth_by
        ``"hmc"``; ``"quadratic"``, from the curvatures; ``"none"``: the network is too large for
        HMC and the point too degenerate for the other.
    truth_verdict
        Of HMC; ``"OK"`` otherwise.
    known
        The learning coefficient at temperature zero with its multiplicity, exactly.
    """

    name: PointName
    found: LearningCoefficient
    truth: Measured
    truth_by: TruthBy
    truth_verdict: str
    known: KnownCoefficient

    @property
    def recovered(self) -> Measured:
        """What was found as a share of the truth."""
        share = float(self.found.value) / self.truth.value
        errors = hypot(float(self.found.standard_error), share * self.truth.standard_error)
        return Measured(share, errors / abs(self.truth.value))

    @property
    def passed(self) -> bool | None:
        """Whether the truth is met within two combined standard errors, or within 5 %.

        None where there is no truth. Never with an error above 25 %, chains lost or steps too long.
        """
        if self.truth_by == "none":
            return None
        recovered = self.recovered
        away = abs(recovered.value - 1)
        near = away <= _CLOSE or away <= _SIGMAS * recovered.standard_error
        sharp = recovered.standard_error <= _IMPRECISE
        return near and sharp and self.found.verdict not in _UNFIT

    def __repr__(self) -> str:
        found = Measured(float(self.found.value), float(self.found.standard_error))
        limit = f"at temperature zero {float(self.known.value):.4g}"
        if self.known.multiplicity > 1:
            limit += f" with multiplicity {self.known.multiplicity}"
        start = f"{self.name}: {found} ({self.found.verdict})"
        if self.passed is None:
            return f"{start}; no exact value at this size, {limit}"
        share = self.recovered
        doubt = "" if self.truth_verdict == "OK" else f", itself {self.truth_verdict}"
        return (
            f"{start}, exactly {self.truth} by {self.truth_by}{doubt}: "
            f"{100 * share.value:.0f} ± {100 * share.standard_error:.0f} % recovered, "
            f"{'pass' if self.passed else 'FAIL'}; {limit}"
        )


@dataclass(frozen=True, repr=False)
class SelfTest:
    """What settings recover of known learning coefficients.

    Parameters
    ----------
    settings
        That were tested.
    widths
        Of the layers of the networks, from inputs to outputs.
    num_examples
        Of the data.
    points
        One network each.
    seconds
        It took.
    """

    settings: Settings
    widths: tuple[int, ...]
    num_examples: int
    points: tuple[SelfTestPoint, ...]
    seconds: float

    @property
    def num_parameters(self) -> int:
        """Of each network."""
        return sum(m * n for m, n in pairwise(self.widths))

    @property
    def passed(self) -> bool:
        """Whether every point with a known truth was recovered."""
        return all(point.passed is not False for point in self.points)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            Settings, and found, truth and mark of every point.
        """
        points = [
            {
                "name": point.name,
                "found": point.found.to_dict(),
                "truth": None if point.passed is None else to_jsonable(point.truth),
                "truth_by": point.truth_by,
                "truth_verdict": point.truth_verdict,
                "coefficient": float(point.known.value),
                "multiplicity": point.known.multiplicity,
                "recovered": None if point.passed is None else to_jsonable(point.recovered),
                "passed": point.passed,
            }
            for point in self.points
        ]
        return {
            "settings": asdict(self.settings),
            "widths": list(self.widths),
            "num_parameters": self.num_parameters,
            "num_examples": self.num_examples,
            "points": points,
            "passed": self.passed,
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        first = self.points[0].found
        known = [point for point in self.points if point.passed is not None]
        good = sum(bool(point.passed) for point in known)
        lines = [
            f"These settings ({first.method}, {first.num_chains} x {first.num_draws:,} draws) "
            f"recover {good} of {len(known)} known values, on deep linear networks of "
            f"{self.num_parameters:,} parameters and {self.num_examples:,} examples",
            *(f"  {point}" for point in self.points),
        ]
        lines += [
            f"  {point.name}: {point.found.advice}"
            for point in self.points
            if point.found.verdict != "OK"
        ]
        return "\n".join(lines)


def degeneracy_self_test(
    num_parameters: int,
    num_examples: int,
    *,
    nbeta: float | None = None,
    localization: float | None = None,
    metric: Metric = "euclidean",
    sampler: SamplerChoice = "auto",
    num_chains: int = 8,
    num_draws: int | None = None,
    num_warmup: int | None = None,
    batch_size: int | None = None,
    step_size: float | Literal["auto"] = "auto",
    net: nn.Module | FunctionalModel | None = None,
    data: Any = None,
    loss: Likelihood | Loss | None = None,
    truth_draws: int = 500,
    seed: int = 0,
    progress: bool | None = None,
) -> SelfTest:
    """Run settings of `learning_coefficient` on networks whose coefficient is known.

    Parameters
    ----------
    num_parameters
        About so many weights have the networks: of two square layers for less than 12, else three.
    num_examples
        Of the data, drawn at random; the default of `nbeta` comes from it.
    nbeta, localization, metric, sampler, num_chains, num_draws, num_warmup, batch_size, step_size
        The settings, as in `learning_coefficient`. In the layerwise metric weights that are all
        zero have no scale, and that point is left out.
    net, data, loss
        Your own, together: the inputs are then scaled so that the largest curvature of the loss at
        full rank is that at the weights of `net`. Without them it is about 1.
    truth_draws
        Of each of the eight chains of HMC that find the truth, up to 10,000 parameters. Beyond,
        curvatures give it at full rank.
    seed
        Of weights, data and all noise.
    progress
        Whether to show a bar; None: on a terminal, when it takes long.

    Returns
    -------
    SelfTest
        A point passes within two combined standard errors of the truth, or within 5 %.

    Raises
    ------
    OptionError
        For an option out of range, or only some of net, data and loss.
    SamplingError
        When no chain stays finite.
    KeyboardInterrupt
        When interrupted.

    Examples
    --------
    >>> found = degeneracy_self_test(
    ...     2, 30, sampler="langevin", num_draws=60, num_warmup=20, truth_draws=20, progress=False
    ... )
    >>> [point.name for point in found.points], found.widths
    (['full rank', 'zero'], (1, 1, 1))
    """
    began = perf_counter()
    settings = Settings(
        nbeta=nbeta,
        localization=localization,
        metric=metric,
        sampler=sampler,
        num_chains=num_chains,
        num_draws=num_draws,
        num_warmup=num_warmup,
        batch_size=batch_size,
        step_size=step_size,
    )
    widths = square_widths(num_parameters)
    num_examples = whole_number(
        num_examples,
        "num_examples",
        least=max(3, widths[0]),
        advice=f"Give at least 3, and as many as there are inputs, {widths[0]}.",
    )
    Settings(sampler="hmc", num_draws=truth_draws)  # refused now, not after the first run
    curvature, like = _own_curvature(net, data, loss, seed)
    ranks: dict[PointName, int] = {
        "full rank": widths[0],
        "zero": 0,
        "reduced rank": widths[0] // 2,
    }
    if metric == "layerwise":
        del ranks["zero"]
    if not ranks["reduced rank"]:
        del ranks["reduced rank"]
    generator = stream(seed, "inputs")
    inputs = torch.randn(num_examples, widths[0], generator=generator, dtype=torch.float64).to(like)
    points = list[SelfTestPoint]()
    with track(len(ranks), "Self-test", enabled=progress) as advance:
        for name, rank in ranks.items():
            factors = balanced_factors(widths, rank, stream(seed, "weights"))
            if not points and curvature is not None:
                here = _largest(*realised(factors, inputs), Gaussian(noise_variance=1.0), seed)
                inputs = inputs * sqrt(curvature / here)
            points.append(_measured(name, factors, inputs, settings, truth_draws, seed))
            advance(1, name)
    return SelfTest(settings, widths, num_examples, tuple(points), perf_counter() - began)


def _measured(
    name: PointName,
    factors: list[Float[Tensor, "_ _"]],
    inputs: Float[Tensor, "N inputs"],
    settings: Settings,
    truth_draws: int,
    seed: int,
) -> SelfTestPoint:
    """The user's settings, and the truth, at one point."""
    began = perf_counter()
    own, loss = derived_seed(seed, "self-test", name), Gaussian(noise_variance=1.0)
    around = settings.neighbourhood(*realised(factors, inputs), loss, **_PLAIN, seed=own)
    walk = Walk(around, settings.sampler_for(around), own, None, progress=False)
    try:
        runs = walk_through(walk, settings)
    except SamplingError as error:
        where, advice = f"self-test at {name}, {error.where}", error.advice
        raise SamplingError(error.what, where=where, advice=advice) from error
    found = coefficient_of(runs, own, perf_counter() - began)
    exact = replace(
        settings,
        nbeta=found.nbeta,
        localization=found.localization,
        sampler="hmc",
        num_chains=_TRUTH_CHAINS,
        num_draws=truth_draws,
        num_warmup=min(_MOST_LEARNING, truth_draws),
        batch_size=None,
        step_size="auto",
    )
    few = second_moments(inputs.double().cpu())
    there = exact.neighbourhood(*realised(factors, few), loss, **_PLAIN, seed=own)
    truth, verdict = Measured(torch.nan, torch.nan), "OK"
    by: TruthBy = "none"
    if around.num_parameters <= _HMC_PARAMETERS:
        other = derived_seed(own, "truth")
        runs = walk_through(Walk(there, "hmc", other, None, progress=False), exact)
        sampled = coefficient_of(runs, other, 0.0)
        truth = Measured(float(sampled.value), float(sampled.standard_error))
        by, verdict = "hmc", sampled.verdict
    elif name == "full rank":
        truth, by = quadratic_coefficient(there, own), "quadratic"
    return SelfTestPoint(name, found, truth, by, verdict, deep_linear_local(factors))


def _own_curvature(
    net: nn.Module | FunctionalModel | None,
    data: Any,
    loss: Likelihood | Loss | None,
    seed: int,
) -> tuple[float | None, Tensor]:
    """Largest curvature of the user's mean loss, and a tensor of the dtype and device."""
    if net is None and data is None and loss is None:
        return None, torch.zeros((), dtype=torch.float64)
    if net is None or data is None or loss is None:
        raise OptionError(
            "they are not all there",
            where="net, data, loss",
            advice="Give all three, so that the curvature can be measured, or none.",
        )
    found = _largest(net, data, loss, seed)
    if not (isfinite(found) and found > 0):
        raise OptionError(
            f"the largest curvature at its weights is {found:g}",
            where="net",
            advice="Leave net, data and loss out: there is nothing to scale by.",
        )
    return found, FunctionalModel.of(net).vector


def _largest(
    net: nn.Module | FunctionalModel, data: Any, loss: Likelihood | Loss, seed: int
) -> float:
    """Largest curvature of the mean loss at the weights."""
    around = Settings().neighbourhood(net, data, loss, **_PLAIN, seed=seed)
    centre = around.centre[None]
    start = torch.randn(centre.shape, generator=stream(seed, "curvature"), dtype=torch.float64)
    largest = float(largest_curvature(around.probed, centre, start.to(centre)))
    return (largest - around.localization) / around.nbeta
