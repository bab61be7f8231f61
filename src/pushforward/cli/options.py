"""Settings that several commands share. Importing them costs nothing: no torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

__all__ = [
    "ExampleOptions",
    "LaplaceOptions",
    "LawOptions",
    "Likelihood",
    "NetworkOptions",
    "SamplerName",
    "SamplerOptions",
]

Likelihood = Literal["categorical", "gaussian", "bernoulli", "poisson"]
SamplerName = Literal["auto", "nuts", "hmc", "mala", "sgld", "sghmc", "sgnht", "gibbs"]


@dataclass(frozen=True)
class NetworkOptions:
    """The network.

    Parameters
    ----------
    network
        Where its factory is: package.module:function. The current folder is searched too.
    weights
        A safetensors file with the parameters and buffers of the network, exactly. Without it the
        network is taken as the factory makes it.
    factory_options
        Keyword arguments of the factory as a JSON object, such as '{"width": 64}'.
    device
        Where to compute: cpu, cuda, cuda:1, ...
    """

    network: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODULE:FACTORY")]
    weights: Path | None = None
    factory_options: str = "{}"
    device: str = "cpu"


@dataclass(frozen=True)
class LawOptions:
    """The law of the inputs: that of data, or the standard normal law.

    Parameters
    ----------
    data
        A NumPy archive (.npz) with an array of examples (N, ...), whose mean and covariance the law
        has.
    key
        Name of the array. Default: x, inputs, data or X, or the only array of examples.
    scale
        The data are multiplied by it: 0.00392157 takes bytes to [0, 1].
    covariance
        What to keep of the covariance.
    input_shape
        Shape in which the network takes one example, such as 1 28 28. Default: as the data have it.
    standard
        Instead of data: the shape of one example, whose entries are independent standard normal.
    """

    data: Path | None = None
    key: str | None = None
    scale: float = 1.0
    covariance: Literal["full", "diagonal", "isotropic"] = "full"
    input_shape: tuple[int, ...] = ()
    standard: tuple[int, ...] = ()


@dataclass(frozen=True)
class ExampleOptions:
    """How inputs and targets are named and scaled in their files.

    Parameters
    ----------
    key
        Name of the array of inputs. Default: x, inputs, data or X, or the only one of examples.
    target_key
        Name of the array of targets. Default: y, targets, target, labels, label or Y.
    scale
        The inputs are multiplied by it: 0.00392157 takes bytes to [0, 1].
    input_shape
        Shape in which the network takes one example, such as 1 28 28. Default: as the data have it.
    tokens
        The inputs are token ids, which the network looks up: their integers stay integers. Without
        it all inputs become floating-point numbers of the type of the network's weights.
    """

    key: str | None = None
    target_key: str | None = None
    scale: float = 1.0
    input_shape: tuple[int, ...] = ()
    tokens: bool = False


@dataclass(frozen=True)
class LaplaceOptions:
    """The posterior over the weights.

    Parameters
    ----------
    draws
        Posterior draws: the relative standard error of a variance is sqrt(2 / draws).
    prior
        One precision; one for each layer, for networks with normalisation layers; or one in units
        of the features.
    prior_precision
        A positive number. Default: learned from the data.
    noise_variance
        Of the targets of a regression. Default: learned from the data.
    method
        Exact for small networks, sampled for any size.
    subset
        Patterns of the parameters that are uncertain, such as 'head.*'. Default: all but those of
        normalisation layers.
    fit_temperature
        Rescale the posterior covariance so that the validation data are most likely.
    image_shape
        Shape in which to draw an input, such as 28 28 or 3 32 32, when the network takes it flat.
    """

    draws: int = 64
    prior: Literal["isotropic", "layerwise", "gprior"] = "isotropic"
    prior_precision: float | None = None
    noise_variance: float | None = None
    method: Literal["auto", "exact", "sampled"] = "auto"
    subset: tuple[str, ...] = ()
    fit_temperature: bool = False
    image_shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class SamplerOptions:
    """The sampler, and the posterior that it samples.

    Parameters
    ----------
    sampler
        nuts, hmc and mala use all data in every step and are exact; sgld, sghmc and sgnht use
        minibatches, at a bias; gibbs needs --noise. auto: gibbs with --noise, nuts for up to 10,000
        parameters and examples, else sghmc.
    noise
        For a network with Gaussian noise behind every map: the variance behind linear maps, and, if
        there is a second number, the one behind activations and pooling.
    noise_variance
        Of the targets of a regression. With --noise, that behind the last layer in any case.
    prior_precision
        Inverse variance of every parameter. Default: the fan-in of its layer.
    step_size
        Default: learned in the warm-up by nuts, hmc and mala; from the curvature for the others.
    batch_size
        Examples in a minibatch of sgld, sghmc and sgnht. Default: 128.
    max_depth
        A trajectory of nuts has at most 2^max_depth - 1 steps; `pf.NUTS` has 10.
    """

    sampler: SamplerName = "auto"
    noise: tuple[float, ...] = ()
    noise_variance: float | None = None
    prior_precision: float | None = None
    step_size: float | None = None
    batch_size: int | None = None
    max_depth: int = 7
