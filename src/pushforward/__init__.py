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
    from pushforward.function_space.baselines.diagonal import DiagonalDistance
    from pushforward.function_space.baselines.exact import ExactDistance
    from pushforward.function_space.baselines.kronecker import KroneckerDistance
    from pushforward.function_space.baselines.subset import SubsetDistance
    from pushforward.function_space.baselines.tangent import TangentDistance
    from pushforward.function_space.compression import pruned, quantised
    from pushforward.function_space.continual import learn_tasks
    from pushforward.function_space.influence import influence, self_influence
    from pushforward.function_space.influence_scores import InfluenceScores, SelfInfluence
    from pushforward.function_space.mislabels import WrongLabels, find_wrong_labels
    from pushforward.function_space.penalty import FunctionSpacePenalty
    from pushforward.function_space.proximal import ProximalResponse, proximal_response
    from pushforward.function_space.summarize import summarize
    from pushforward.function_space.summary import FunctionSummary
    from pushforward.function_space.task_sequence import TaskSequence
    from pushforward.function_space.tasks import Task
    from pushforward.function_space.versions import VersionDistances, measure_versions
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
    "DiagonalDistance",
    "EpsilonBetaMap",
    "Estimate",
    "Evaluation",
    "ExactDistance",
    "ExtrapolatedCoefficient",
    "FunctionSpacePenalty",
    "FunctionSummary",
    "FunctionalModel",
    "Gaussian",
    "GaussianLaw",
    "InfluenceScores",
    "IntermediateNoiseNetwork",
    "KroneckerDistance",
    "LaplacePosterior",
    "LearningCoefficient",
    "OutputLaw",
    "PiecewisePolynomial",
    "Poisson",
    "Potential",
    "Prediction",
    "ProximalResponse",
    "PushforwardError",
    "SampledLaw",
    "SelfInfluence",
    "SelfTest",
    "SmoothActivation",
    "SubsetDistance",
    "TangentDistance",
    "Task",
    "TaskSequence",
    "TeacherStudent",
    "ThermalizationReport",
    "VersionDistances",
    "WrongLabels",
    "choose_prior_precision",
    "degeneracy_self_test",
    "expect",
    "extrapolated_learning_coefficient",
    "find_wrong_labels",
    "gibbs",
    "influence",
    "laplace",
    "learn_tasks",
    "learning_coefficient",
    "learning_coefficient_map",
    "learning_coefficient_sweep",
    "measure_versions",
    "monte_carlo",
    "plan_laplace",
    "propagate",
    "proximal_response",
    "pruned",
    "quantised",
    "register_activation",
    "sample",
    "self_influence",
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
    "DiagonalDistance": "function_space.baselines.diagonal",
    "EpsilonBetaMap": "degeneracy.temperature",
    "Estimate": "runs.estimate",
    "Evaluation": "linearised_laplace.evaluation",
    "ExactDistance": "function_space.baselines.exact",
    "ExtrapolatedCoefficient": "degeneracy.extrapolation",
    "FunctionSpacePenalty": "function_space.penalty",
    "FunctionSummary": "function_space.summary",
    "FunctionalModel": "networks.model",
    "Gaussian": "networks.likelihoods",
    "GaussianLaw": "cumulants.laws",
    "HMC": "sampling.hmc",
    "InfluenceScores": "function_space.influence_scores",
    "IntermediateNoiseNetwork": "sampling.intermediate_noise.network",
    "KroneckerDistance": "function_space.baselines.kronecker",
    "LaplacePosterior": "linearised_laplace.posterior",
    "LearningCoefficient": "degeneracy.coefficient",
    "MALA": "sampling.mala",
    "NUTS": "sampling.nuts",
    "OutputLaw": "cumulants.output",
    "PiecewisePolynomial": "gaussians.activations",
    "Poisson": "networks.likelihoods",
    "Potential": "sampling.potential",
    "Prediction": "linearised_laplace.prediction",
    "ProximalResponse": "function_space.proximal",
    "PushforwardError": "errors",
    "SGHMC": "sampling.sghmc",
    "SGLD": "sampling.sgld",
    "SGNHT": "sampling.sgnht",
    "SampledLaw": "cumulants.monte_carlo",
    "SelfInfluence": "function_space.influence_scores",
    "SelfTest": "degeneracy.self_test",
    "SmoothActivation": "gaussians.activations",
    "SubsetDistance": "function_space.baselines.subset",
    "TangentDistance": "function_space.baselines.tangent",
    "Task": "function_space.tasks",
    "TaskSequence": "function_space.task_sequence",
    "TeacherStudent": "sampling.thermalization.teacher_student",
    "ThermalizationReport": "sampling.thermalization.report",
    "VersionDistances": "function_space.versions",
    "WrongLabels": "function_space.mislabels",
    "choose_prior_precision": "linearised_laplace.validation",
    "degeneracy_self_test": "degeneracy.self_test",
    "expect": "cumulants.expectation",
    "extrapolated_learning_coefficient": "degeneracy.extrapolation",
    "find_wrong_labels": "function_space.mislabels",
    "gibbs": "sampling.intermediate_noise.gibbs",
    "influence": "function_space.influence",
    "laplace": "linearised_laplace.fit",
    "learn_tasks": "function_space.continual",
    "learning_coefficient": "degeneracy.estimate",
    "learning_coefficient_map": "degeneracy.temperature",
    "learning_coefficient_sweep": "degeneracy.checkpoints",
    "measure_versions": "function_space.versions",
    "monte_carlo": "cumulants.monte_carlo",
    "plan_laplace": "linearised_laplace.fit",
    "propagate": "cumulants.propagation",
    "proximal_response": "function_space.proximal",
    "pruned": "function_space.compression",
    "quantised": "function_space.compression",
    "register_activation": "networks.activations",
    "sample": "sampling.runner",
    "self_influence": "function_space.influence",
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
