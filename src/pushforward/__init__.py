"""A law pushed through a network: expected outputs, tails and error bars without sampling."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pushforward.cumulants.expectation import expect
    from pushforward.cumulants.laws import GaussianLaw
    from pushforward.cumulants.monte_carlo import SampledLaw, monte_carlo
    from pushforward.cumulants.output import OutputLaw
    from pushforward.cumulants.propagation import propagate
    from pushforward.errors import PushforwardError
    from pushforward.gaussians.activations import PiecewisePolynomial, SmoothActivation
    from pushforward.linearised_laplace.evaluation import Evaluation
    from pushforward.linearised_laplace.fit import laplace, plan_laplace
    from pushforward.linearised_laplace.posterior import LaplacePosterior
    from pushforward.linearised_laplace.prediction import Prediction
    from pushforward.linearised_laplace.validation import choose_prior_precision
    from pushforward.networks.activations import register_activation
    from pushforward.networks.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
    from pushforward.networks.model import FunctionalModel
    from pushforward.runs.estimate import Check, Cost, Estimate

__version__ = "0.1.0"

__all__ = [
    "Bernoulli",
    "Categorical",
    "Check",
    "Cost",
    "Estimate",
    "Evaluation",
    "FunctionalModel",
    "Gaussian",
    "GaussianLaw",
    "LaplacePosterior",
    "OutputLaw",
    "PiecewisePolynomial",
    "Poisson",
    "Prediction",
    "PushforwardError",
    "SampledLaw",
    "SmoothActivation",
    "choose_prior_precision",
    "expect",
    "laplace",
    "monte_carlo",
    "plan_laplace",
    "propagate",
    "register_activation",
]

_HOMES = {
    "Bernoulli": "networks.likelihoods",
    "Categorical": "networks.likelihoods",
    "Check": "runs.estimate",
    "Cost": "runs.estimate",
    "Estimate": "runs.estimate",
    "Evaluation": "linearised_laplace.evaluation",
    "FunctionalModel": "networks.model",
    "Gaussian": "networks.likelihoods",
    "GaussianLaw": "cumulants.laws",
    "LaplacePosterior": "linearised_laplace.posterior",
    "OutputLaw": "cumulants.output",
    "PiecewisePolynomial": "gaussians.activations",
    "Poisson": "networks.likelihoods",
    "Prediction": "linearised_laplace.prediction",
    "PushforwardError": "errors",
    "SampledLaw": "cumulants.monte_carlo",
    "SmoothActivation": "gaussians.activations",
    "choose_prior_precision": "linearised_laplace.validation",
    "expect": "cumulants.expectation",
    "laplace": "linearised_laplace.fit",
    "monte_carlo": "cumulants.monte_carlo",
    "plan_laplace": "linearised_laplace.fit",
    "propagate": "cumulants.propagation",
    "register_activation": "networks.activations",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pushforward' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pushforward.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
