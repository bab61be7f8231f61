"""A law pushed through a network: of inputs into outputs, of weights into functions."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pushforward.cumulants.expectation import expect
    from pushforward.cumulants.laws import GaussianLaw
    from pushforward.cumulants.monte_carlo import SampledLaw, monte_carlo
    from pushforward.cumulants.output import OutputLaw
    from pushforward.cumulants.propagation import propagate
    from pushforward.degeneracy.checkpoints import learning_coefficient_sweep
    from pushforward.degeneracy.coefficient import LearningCoefficient
    from pushforward.degeneracy.estimate import learning_coefficient
    from pushforward.degeneracy.extrapolation import (
        ExtrapolatedCoefficient,
        extrapolated_learning_coefficient,
    )
    from pushforward.degeneracy.self_test import SelfTest, degeneracy_self_test
    from pushforward.degeneracy.sweep import CheckpointSweep
    from pushforward.degeneracy.temperature import EpsilonBetaMap, learning_coefficient_map
    from pushforward.errors import PushforwardError
    from pushforward.function_space.summarize import summarize
    from pushforward.function_space.summary import FunctionSummary
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
    from pushforward.sampling.chains import Chains
    from pushforward.sampling.hmc import HMC
    from pushforward.sampling.intermediate_noise.gibbs import gibbs
    from pushforward.sampling.intermediate_noise.network import IntermediateNoiseNetwork
    from pushforward.sampling.mala import MALA
    from pushforward.sampling.nuts import NUTS
    from pushforward.sampling.potential import Potential
    from pushforward.sampling.runner import sample
    from pushforward.sampling.sghmc import SGHMC
    from pushforward.sampling.sgld import SGLD
    from pushforward.sampling.sgnht import SGNHT
    from pushforward.sampling.thermalization.report import ThermalizationReport
    from pushforward.sampling.thermalization.teacher_student import TeacherStudent
    from pushforward.sampling.thermalization.thermalize import thermalize

__version__ = "0.1.0"

__all__ = [
    "HMC",
    "MALA",
    "NUTS",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "Bernoulli",
    "Categorical",
    "Chains",
    "Check",
    "CheckpointSweep",
    "Cost",
    "EpsilonBetaMap",
    "Estimate",
    "Evaluation",
    "ExtrapolatedCoefficient",
    "FunctionSummary",
    "FunctionalModel",
    "Gaussian",
    "GaussianLaw",
    "IntermediateNoiseNetwork",
    "LaplacePosterior",
    "LearningCoefficient",
    "OutputLaw",
    "PiecewisePolynomial",
    "Poisson",
    "Potential",
    "Prediction",
    "PushforwardError",
    "SampledLaw",
    "SelfTest",
    "SmoothActivation",
    "TeacherStudent",
    "ThermalizationReport",
    "choose_prior_precision",
    "degeneracy_self_test",
    "expect",
    "extrapolated_learning_coefficient",
    "gibbs",
    "laplace",
    "learning_coefficient",
    "learning_coefficient_map",
    "learning_coefficient_sweep",
    "monte_carlo",
    "plan_laplace",
    "propagate",
    "register_activation",
    "sample",
    "summarize",
    "thermalize",
]

_HOMES = {
    "Bernoulli": "networks.likelihoods",
    "Categorical": "networks.likelihoods",
    "Chains": "sampling.chains",
    "Check": "runs.estimate",
    "CheckpointSweep": "degeneracy.sweep",
    "Cost": "runs.estimate",
    "EpsilonBetaMap": "degeneracy.temperature",
    "Estimate": "runs.estimate",
    "Evaluation": "linearised_laplace.evaluation",
    "ExtrapolatedCoefficient": "degeneracy.extrapolation",
    "FunctionSummary": "function_space.summary",
    "FunctionalModel": "networks.model",
    "Gaussian": "networks.likelihoods",
    "GaussianLaw": "cumulants.laws",
    "HMC": "sampling.hmc",
    "IntermediateNoiseNetwork": "sampling.intermediate_noise.network",
    "LaplacePosterior": "linearised_laplace.posterior",
    "LearningCoefficient": "degeneracy.coefficient",
    "MALA": "sampling.mala",
    "NUTS": "sampling.nuts",
    "OutputLaw": "cumulants.output",
    "PiecewisePolynomial": "gaussians.activations",
    "Poisson": "networks.likelihoods",
    "Potential": "sampling.potential",
    "Prediction": "linearised_laplace.prediction",
    "PushforwardError": "errors",
    "SGHMC": "sampling.sghmc",
    "SGLD": "sampling.sgld",
    "SGNHT": "sampling.sgnht",
    "SampledLaw": "cumulants.monte_carlo",
    "SelfTest": "degeneracy.self_test",
    "SmoothActivation": "gaussians.activations",
    "TeacherStudent": "sampling.thermalization.teacher_student",
    "ThermalizationReport": "sampling.thermalization.report",
    "choose_prior_precision": "linearised_laplace.validation",
    "degeneracy_self_test": "degeneracy.self_test",
    "expect": "cumulants.expectation",
    "extrapolated_learning_coefficient": "degeneracy.extrapolation",
    "gibbs": "sampling.intermediate_noise.gibbs",
    "laplace": "linearised_laplace.fit",
    "learning_coefficient": "degeneracy.estimate",
    "learning_coefficient_map": "degeneracy.temperature",
    "learning_coefficient_sweep": "degeneracy.checkpoints",
    "monte_carlo": "cumulants.monte_carlo",
    "plan_laplace": "linearised_laplace.fit",
    "propagate": "cumulants.propagation",
    "register_activation": "networks.activations",
    "sample": "sampling.runner",
    "summarize": "function_space.summarize",
    "thermalize": "sampling.thermalization.thermalize",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pushforward' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pushforward.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
