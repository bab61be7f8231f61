"""Which sampler, of which posterior, from options that may say little."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pushforward.cli.options import Likelihood, SamplerName, SamplerOptions
from pushforward.errors import NetworkError, OptionError
from pushforward.networks.likelihoods import Likelihood as TargetLikelihood
from pushforward.networks.likelihoods import likelihood_from_config
from pushforward.networks.model import FunctionalModel
from pushforward.report.formatting import number
from pushforward.runs.rng import stream
from pushforward.sampling.curvature import largest_curvature
from pushforward.sampling.hmc import HMC
from pushforward.sampling.intermediate_noise.network import IntermediateNoiseNetwork
from pushforward.sampling.kernel import Kernel
from pushforward.sampling.mala import MALA
from pushforward.sampling.network_potential import NetworkPotential
from pushforward.sampling.nuts import NUTS
from pushforward.sampling.potential import Potential
from pushforward.sampling.sghmc import SGHMC
from pushforward.sampling.sgld import SGLD
from pushforward.sampling.sgnht import SGNHT

__all__ = [
    "Choice",
    "choose",
    "fan_in_precisions",
    "gradient_kernel",
    "guessed_step_size",
    "noisy_network",
    "precisions_of",
    "target_likelihood",
]

_FULL_BATCH = 10_000  # parameters, and examples, up to which every step may look at all data
_BATCH = 128
_MINIBATCHES = ("sgld", "sghmc", "sgnht")
_ROUNDS = 15  # of the power iteration
_PROBED = 2048  # examples from which the curvature is measured
_POINTS = 3
_FORGET = 0.1  # of the momentum, in each step
_HEAT = 0.5  # that minibatches may add, relative, where the posterior is narrowest
_SMALL = 0.25  # step size over the largest stable one, up to a factor of two


@dataclass(frozen=True)
class Choice:
    """A sampler by name.

    Parameters
    ----------
    name
        Not ``"auto"``.
    batch_size
        Of its minibatches; None for all data.
    note
        Why, when it was not asked for; empty otherwise.
    """

    name: SamplerName
    batch_size: int | None
    note: str = ""

    @property
    def stochastic(self) -> bool:
        """Whether it is a sampler for minibatches, whose steps are small."""
        return self.name in _MINIBATCHES


def choose(
    options: SamplerOptions, *, parameters: int, examples: int, joint: bool = False
) -> Choice:
    """The sampler that the options name, or that suits the sizes.

    Parameters
    ----------
    options
        What was asked for.
    parameters, examples
        How many there are.
    joint
        Whether other exact samplers may move noisy parameters and latent variables together.

    Returns
    -------
    Choice
        With the reason for a choice of our own.

    Raises
    ------
    OptionError
        When options contradict each other.
    """
    name, note = options.sampler, ""
    if name == "auto":
        name, note = _suited(options, parameters, examples)
    if name == "gibbs" and not options.noise:
        raise OptionError(
            "it samples networks with noise behind every map, whose variances are not given",
            where="--sampler gibbs",
            advice="Give --noise 0.1 (or two numbers: behind linear maps, behind activations).",
        )
    if name == "gibbs" and options.step_size is not None:
        raise OptionError(
            "Gibbs sampling has no step size", where="--step-size", advice="Leave it out."
        )
    if options.noise and (name in _MINIBATCHES or (name != "gibbs" and not joint)):
        raise OptionError(
            f"{name} does not sample a network with noise behind every map",
            where="--noise",
            advice="Leave --noise out, or choose --sampler gibbs.",
        )
    batch = options.batch_size
    if batch is not None and name not in _MINIBATCHES:
        raise OptionError(
            f"{name} looks at all data in every step",
            where="--batch-size",
            advice=f"Leave it out, or choose --sampler {', '.join(_MINIBATCHES)}.",
        )
    if name in _MINIBATCHES:
        batch = min(_BATCH, examples) if batch is None else batch
        batch = None if batch == examples else batch
    return Choice(name, batch, note)


def target_likelihood(
    name: Likelihood, options: SamplerOptions, *, noise_needed: bool
) -> TargetLikelihood:
    """The likelihood by its name.

    Parameters
    ----------
    name
        Of the likelihood.
    options
        With the variance of the targets.
    noise_needed
        Whether a Gaussian one has to have its variance.

    Returns
    -------
    Likelihood
        Of the targets.

    Raises
    ------
    OptionError
        When a variance is missing or has no meaning.
    """
    variance = options.noise_variance
    if name != "gaussian":
        if variance is not None and not options.noise:
            raise OptionError(
                f"a {name} likelihood has no noise variance",
                where="--noise-variance",
                advice="Leave it out, or use --likelihood gaussian.",
            )
        return likelihood_from_config({"kind": name})
    if variance is None and noise_needed:
        raise OptionError(
            "a regression has a noise variance, which samplers do not learn",
            where="--likelihood gaussian",
            advice="Give --noise-variance, in squared units of the targets; that of the residuals "
            "of the trained network is a start.",
        )
    return likelihood_from_config({"kind": name, "noise_variance": variance})


def noisy_network(
    net: nn.Module, options: SamplerOptions, likelihood: Likelihood
) -> IntermediateNoiseNetwork:
    """The network with noise behind every map.

    Parameters
    ----------
    net
        Its structure.
    options
        Variances and prior.
    likelihood
        Says whether it is a regression.

    Returns
    -------
    IntermediateNoiseNetwork
        For `gibbs`.

    Raises
    ------
    OptionError
        For another likelihood, or three numbers.
    NetworkError
        When the network is no `nn.Sequential`, or a layer is not supported.
    """
    if likelihood not in {"categorical", "gaussian"}:
        raise OptionError(
            f"there is no {likelihood} network with noise behind every map",
            where="--noise",
            advice="Use --likelihood categorical or gaussian, or leave --noise out.",
        )
    if len(options.noise) > 2:
        raise OptionError(
            f"{len(options.noise)} numbers",
            where="--noise",
            advice="Give one variance, or two: behind linear maps, behind activations.",
        )
    if not isinstance(net, nn.Sequential):
        raise NetworkError(
            f"it is {type(net).__name__}, not an nn.Sequential",
            where="--noise",
            advice="Write the network as an nn.Sequential, or leave --noise out: other samplers "
            "take any network.",
        )
    return IntermediateNoiseNetwork(
        net,
        options.noise[0],
        options.noise[-1],
        "classification" if likelihood == "categorical" else "regression",
        options.noise_variance,
        options.prior_precision,
    )


def fan_in_precisions(model: FunctionalModel) -> dict[str, float]:
    """Of every parameter the number of inputs of its layer, the prior of `gibbs` too.

    Parameters
    ----------
    model
        Of a module.

    Returns
    -------
    dict
        Precision by name of the parameter; 1 where a layer has no matrix of weights.
    """
    module = model.module
    every = {} if module is None else dict(module.named_parameters())
    found: dict[str, float] = {}
    for name in model.space.names:
        own = every.get(name)
        weight = every.get(f"{name.rpartition('.')[0]}.weight".lstrip("."))
        for tensor in (own, weight):
            if tensor is not None and tensor.dim() >= 2:
                found[name] = float(math.prod(tensor.shape[1:]))
                break
        else:
            found[name] = 1.0
    return found


def gradient_kernel(
    choice: Choice, potential: Potential, options: SamplerOptions, step_size: float | None
) -> Kernel:
    """The kernel by its name.

    Parameters
    ----------
    choice
        Which; not ``"gibbs"``.
    potential
        Minus the log density.
    options
        Depth of trees.
    step_size
        None to learn it, for those that can.

    Returns
    -------
    Kernel
        For `sample`.
    """
    if choice.name == "nuts":
        return NUTS(potential, step_size=step_size, max_depth=options.max_depth)
    if choice.name == "hmc":
        return HMC(potential, step_size=step_size)
    if choice.name == "mala":
        return MALA(potential, step_size=step_size)
    assert step_size is not None
    if choice.name == "sgld":
        return SGLD(potential, step_size=step_size)
    if choice.name == "sghmc":
        return SGHMC(potential, step_size=step_size, friction=_FORGET / step_size)
    return SGNHT(potential, step_size=step_size, diffusion=_FORGET / step_size)


def guessed_step_size(
    choice: Choice, potential: NetworkPotential, *, seed: int, near_weights: bool = False
) -> tuple[float | None, str]:
    """A step size for samplers that do not learn theirs.

    A quarter of the largest stable one, or less where minibatches would heat the narrowest
    direction by more than a half. Their gradient noise has at most the variance ``curvature * N /
    B`` there, as for a model that fits the data.

    Parameters
    ----------
    choice
        Which sampler, with its batch.
    potential
        Its curvature is measured by power iteration, at the network's weights and at draws of the
        prior.
    seed
        Of the directions.
    near_weights
        At the weights alone, where chains begin.

    Returns
    -------
    tuple
        The step size, None if it is learned, and a sentence about it.
    """
    if not choice.stochastic:
        return None, ""
    curvature = _largest_curvature(potential, seed, near_weights=near_weights)
    noise = 0.0 if choice.batch_size is None else len(potential.examples) / choice.batch_size
    if choice.name == "sgld":  # w <- w - eps grad / 2: stable below 4 / curvature
        least = 4 * _HEAT / noise if noise else math.inf
        step = min(_SMALL, least) / curvature
    else:  # heated by h^2 s^2 / (2 forget): stable below 2 / sqrt(curvature)
        least = 2 * _FORGET * _HEAT / noise if noise else math.inf
        step = math.sqrt(min(_SMALL**2, least) / curvature)
    return step, (
        f"The step size, {number(step, 3)}, comes from the largest curvature that was found, "
        f"{number(curvature, 3)}; --step-size chooses another."
    )


# --- parts ----------------------------------------------------------------------------------------


def _suited(options: SamplerOptions, parameters: int, examples: int) -> tuple[SamplerName, str]:
    if options.noise:
        return "gibbs", "Gibbs sampling: no step size, nothing is rejected."
    if options.batch_size is None and max(parameters, examples) <= _FULL_BATCH:
        return "nuts", "NUTS on all data: exact, and it finds its own step size."
    return "sghmc", (
        f"SGHMC with minibatches: trajectories over all data would be slow with {parameters:,} "
        f"parameters and {examples:,} examples. Its draws are biased, the less the smaller the "
        "step size; to be exact, choose --sampler hmc, on part of the data if need be."
    )


def _largest_curvature(potential: NetworkPotential, seed: int, *, near_weights: bool) -> float:
    """At several points side by side."""
    potential = potential.on_part(_PROBED)
    generator = stream(seed, "curvature")
    size, like = potential.space.size, potential.model.vector
    normals = torch.randn(2 * _POINTS, size, generator=generator, dtype=torch.float64)
    normals = normals.to(like)
    points = potential.prior_precision.clamp(min=1e-12).rsqrt() * normals[:_POINTS]
    points[: _POINTS if near_weights else 1] = like
    largest = largest_curvature(potential, points, normals[_POINTS:])
    finite = largest[torch.isfinite(largest)]
    return max(float(finite.max()) if len(finite) else 1.0, 1e-12)


def precisions_of(model: FunctionalModel, options: SamplerOptions) -> float | Mapping[str, float]:
    """What was asked for, or the fan-in."""
    given = options.prior_precision
    return fan_in_precisions(model) if given is None else given
