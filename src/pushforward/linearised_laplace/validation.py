"""Held-out data decide how much uncertainty there is, where the evidence decides badly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import exp, isfinite, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.errors import OptionError
from pushforward.linearised_laplace.calibration import Metric, mean_with_error
from pushforward.linearised_laplace.evaluation import log_likelihoods
from pushforward.linearised_laplace.exact import DualFactor, Factor
from pushforward.linearised_laplace.fit import laplace
from pushforward.linearised_laplace.posterior import (
    LaplacePosterior,
    Link,
    check_link,
    require_memory,
)
from pushforward.networks.data import Examples
from pushforward.networks.likelihoods import Gaussian, Likelihood, Poisson
from pushforward.networks.model import FunctionalModel
from pushforward.options import whole_number
from pushforward.runs.estimate import Check

__all__ = ["choose_prior_precision", "fit_temperature"]

_COLDEST, _HOTTEST = 1e-4, 1e4
_COARSE = 25  # temperatures before the search between the neighbours of the best
_DECADES = range(-2, 5)  # exponents
_SEARCH_DRAWS = 16


def fit_temperature(
    posterior: LaplacePosterior, validation: Any, link: Link = "probit"
) -> LaplacePosterior:
    """The temperature of the posterior covariance under which validation data are most likely.

    Parameters
    ----------
    posterior
        Its present temperature does not matter.
    validation
        Inputs and targets that neither network nor posterior was made from.
    link
        With which it will predict; Poisson likelihoods take ``"monte_carlo"`` only.

    Returns
    -------
    LaplacePosterior
        Sharing factor and draws, with the check ``temperature-fitted``. The temperature lies
        between 1e-4, where only the network is left, and 1e4.

    Notes
    -----
    What the draws add to the outputs is computed once; another temperature only rescales it. The
    likelihood need not have a single maximum: the best of 25 temperatures is refined between its
    neighbours.
    """
    from scipy.optimize import minimize_scalar

    _check_link(link, posterior.likelihood)
    score = _scorer(posterior.with_temperature(1.0), validation, link)

    def mean_loss(log_temperature: float) -> float:
        return -float(score(exp(log_temperature)).mean())

    low, high = log(_COLDEST), log(_HOTTEST)
    coarse = torch.linspace(low, high, _COARSE, dtype=torch.float64).tolist()
    best = min(range(_COARSE), key=lambda i: mean_loss(coarse[i]))
    bounds = coarse[max(best - 1, 0)], coarse[min(best + 1, _COARSE - 1)]
    found = minimize_scalar(mean_loss, bounds=bounds, method="bounded", options={"xatol": 1e-3})
    chosen = min((float(found.x), coarse[best]), key=mean_loss)
    gain = mean_with_error(score(exp(chosen)) - score(1.0))
    cold, hot = chosen <= low + 0.01, chosen >= high - 0.01
    check = Check(
        "temperature-fitted",
        "warn" if cold or hot else "pass",
        f"temperature {exp(chosen):.3g}: {gain.value:+.3g} ± {gain.standard_error:.1g} nats for "
        f"each of {gain.count:,} validation examples against temperature 1",
        ("They want no epistemic uncertainty at all" if cold else "They want more than this allows")
        + ": look for what is wrong with the network or the prior."
        if cold or hot
        else "",
    )
    kept = tuple(item for item in posterior.checks if item.name != check.name)
    return replace(posterior.with_temperature(exp(chosen)), checks=(*kept, check))


def choose_prior_precision(
    net: nn.Module | FunctionalModel,
    data: Any,
    likelihood: Likelihood,
    validation: Any,
    *,
    grid: Sequence[float] | None = None,
    link: Link = "probit",
    **options: Any,
) -> LaplacePosterior:
    """A posterior whose prior precision makes held-out data most likely, not the evidence largest.

    Parameters
    ----------
    net, data, likelihood
        As in `laplace`.
    validation
        Inputs and targets that the network was not trained on.
    grid
        Precisions to try. Default: decades around the precision at which the trained weights would
        be ordinary draws of the prior (around one for a g-prior), then the half decades beside the
        best.
    link
        With which it will predict; Poisson likelihoods take ``"monte_carlo"`` only.
    **options
        Of `laplace`, without `prior_precision`.

    Returns
    -------
    LaplacePosterior
        At the best precision, with all its draws, and with the check ``precision-validated`` that
        lists what was tried.

    Raises
    ------
    OptionError
        For a layerwise prior, which has too many precisions for a grid; for precisions that are not
        positive; for a link that there is not.

    Notes
    -----
    An exact posterior is factorised anew for each precision, from Jacobians computed once. A
    sampled one is drawn anew with at most 16 draws from the same noise, so that the precisions are
    compared on equal terms.

    Examples
    --------
    >>> import torch, pushforward as pf
    >>> x = torch.linspace(-1, 1, 30).double().unsqueeze(1)
    >>> net = torch.nn.Linear(1, 1).double()
    >>> train, held_out = (x[::2], 2 * x[::2]), (x[1::2], 2 * x[1::2])
    >>> posterior = pf.choose_prior_precision(
    ...     net, train, pf.Gaussian(0.1), held_out, grid=[0.1, 1.0, 10.0]
    ... )
    >>> posterior.prior_precision in (0.1, 1.0, 10.0)
    True
    """
    _check_link(link, likelihood)
    _check_options(options)
    given = None if grid is None else _checked(grid)
    model = FunctionalModel.of(net, options.pop("subset", None))
    examples = Examples.read(data, device=model.device)
    held_out = Examples.read(validation, name="validation", device=model.device)
    centre = 1.0
    if options.get("prior") != "gprior":
        centre = model.space.size / max(float(model.vector.double().square().sum()), 1e-12)
    precisions = given or [centre * 10.0**exponent for exponent in _DECADES]
    fit = _Fit(model, examples, likelihood, options, precisions[0])
    scores: dict[float, Metric] = {}

    def try_out(precisions: Iterable[float]) -> float:
        for precision in precisions:
            values = _scorer(fit.cheaply(precision), held_out, link)(1.0)
            scores[precision] = mean_with_error(values)
        return max(scores, key=lambda precision: scores[precision].value)

    best = try_out(precisions)
    if given is None:
        best = try_out((best / 10**0.5, best * 10**0.5))
    posterior = fit.fully(best)
    return replace(posterior, checks=(*posterior.checks, _validated(scores, best)))


@dataclass(frozen=True, eq=False)
class _Fit:
    """Posteriors of one problem at several precisions, of which the smallest comes first."""

    model: FunctionalModel
    examples: Examples
    likelihood: Likelihood
    options: dict[str, Any]
    smallest: float

    def fully(self, precision: float) -> LaplacePosterior:
        """With every draw."""
        return self._at(precision, self.options)

    def cheaply(self, precision: float) -> LaplacePosterior:
        """With few draws, only good for predictions."""
        if precision == self.smallest:
            return self._reference
        if self._curvature is None:
            return self._at(precision, self._few)
        old = self._reference.prior
        prior = old.with_precision(torch.full_like(old.precision, precision))
        return replace(self._reference, prior=prior, _factor=self._curvature.factorise(prior))

    @property
    def _few(self) -> dict[str, Any]:
        draws = min(whole_number(self.options.get("num_draws", 64), "num_draws"), _SEARCH_DRAWS)
        return self.options | {"num_draws": draws, "evidence": False}

    @cached_property
    def _reference(self) -> LaplacePosterior:
        return self._at(self.smallest, self._few)

    @cached_property
    def _curvature(self) -> Factor | None:
        """What no precision is in; None when it has to be computed anew for each.

        Returns
        -------
        Factor or None
            None of a sampled posterior, and with learned noise, which depends on the precision.
        """
        learned = isinstance(self.likelihood, Gaussian) and self.likelihood.noise_variance is None
        factor = self._reference._factor
        if factor is None or learned:
            return None
        if isinstance(factor, DualFactor):
            return Factor(None, factor.rows)
        # The smallest precision is taken off again: little is lost where the curvature matters.
        whole = factor.cholesky @ factor.cholesky.T
        return Factor(whole - torch.diag(factor.prior.diagonal()), None)

    def _at(self, precision: float, options: dict[str, Any]) -> LaplacePosterior:
        if options.get("checkpoint") is not None:
            folder = f"precision-{precision:.6g}-draws-{options.get('num_draws', 64)}"
            options = options | {"checkpoint": Path(options["checkpoint"]) / folder}
        return laplace(
            self.model, self.examples, self.likelihood, prior_precision=precision, **options
        )


def _scorer(posterior: LaplacePosterior, validation: Any, link: Link) -> Callable[[float], Tensor]:
    """One pass over the validation data, which serves all temperatures.

    Returns
    -------
    callable
        From a factor on the posterior covariance to the log-likelihood of each example, ``(N,)``.
    """
    likelihood = posterior.likelihood
    examples = Examples.read(validation, name="validation", device=posterior.model.device)
    sampled = link == "monte_carlo"
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in posterior._batches(examples):
        assert batch.targets is not None
        outputs, spread, _, moved = posterior._moments(batch, draws=sampled)
        if sampled:
            assert moved is not None
            spread = moved.transpose(0, 1)
            if not parts:
                # Kept, and worked on in float64.
                work, otherwise = 3 * 8, ", or use link='probit'"
                require_memory(moved, len(examples), examples.name, work, otherwise)
        targets = likelihood.check_targets(outputs, batch.targets, examples.name)
        parts.append((outputs, spread, targets))
    outputs, spread, targets = (torch.cat(column) for column in zip(*parts, strict=True))
    if not sampled:
        return lambda factor: log_likelihoods(likelihood, outputs, factor * spread, targets)
    moved = spread.transpose(0, 1)

    def by_draws(factor: float) -> Tensor:
        drawn = outputs.double() + factor**0.5 * moved
        return likelihood.log_prob(drawn, targets).logsumexp(0) - log(len(moved))

    return by_draws


def _check_link(link: Link, likelihood: Likelihood) -> None:
    check_link(link)
    if link == "probit" and isinstance(likelihood, Poisson):
        raise OptionError(
            "the law of a count has no closed form when its rate is uncertain",
            where="link",
            advice="Use link='monte_carlo'.",
        )


def _check_options(options: dict[str, Any]) -> None:
    if "prior_precision" in options:
        raise OptionError(
            "it is what is to be chosen",
            where="prior_precision",
            advice="Leave it out, or call pf.laplace.",
        )
    if options.get("prior") == "layerwise":
        raise OptionError(
            "a layerwise prior has too many precisions for a grid",
            where="prior",
            advice="Use 'isotropic' or 'gprior', or pf.laplace and posterior.fit_temperature.",
        )


def _checked(grid: Sequence[float]) -> list[float]:
    try:
        values = sorted({float(value) for value in grid})
    except (TypeError, ValueError):
        values = []
    if not values or not all(isfinite(value) and value > 0 for value in values):
        raise OptionError(
            f"{grid!r} are not precisions",
            where="grid",
            advice="Give positive numbers, such as [0.1, 1, 10, 100].",
        )
    return values


def _validated(scores: dict[float, Metric], best: float) -> Check:
    """What was tried, and whether the best lies inside of it."""
    tried = ", ".join(f"{p:.3g}: {scores[p].value:.4g}" for p in sorted(scores))
    first, last = min(scores), max(scores)
    advice = ""
    if len(scores) > 1 and best == last:
        advice = (
            "The largest wins: the network alone may predict best, or give a grid that goes on."
        )
    elif len(scores) > 1 and best == first:
        advice = "The smallest wins: give a grid that begins lower."
    return Check(
        "precision-validated",
        "warn" if advice else "pass",
        f"validation log-likelihood of an example by precision: {tried}; the best is {best:.3g} "
        f"(± {scores[best].standard_error:.1g}).",
        advice,
    )
