"""The posterior over a network's weights from files, and its section of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.cli.loading import load_examples
from pushforward.cli.options import ExampleOptions, LaplaceOptions, Likelihood
from pushforward.errors import OptionError
from pushforward.linearised_laplace.fit import laplace
from pushforward.linearised_laplace.posterior import LaplacePosterior
from pushforward.networks.likelihoods import likelihood_from_config
from pushforward.report.page import Section
from pushforward.report.uncertainty import uncertainty_section

__all__ = ["ExampleFiles", "write_posterior"]


@dataclass(frozen=True)
class ExampleFiles:
    """Where the examples are.

    Parameters
    ----------
    train, test, validation
        NumPy archives; the last may be None.
    names
        Of the arrays in them.
    device
        Where they go.
    """

    train: Path
    test: Path
    validation: Path | None
    names: ExampleOptions
    device: str

    def load(self, path: Path, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one file.

        Parameters
        ----------
        path
            One of the three.
        dtype
            Of the network.

        Returns
        -------
        tuple
            On the device.
        """
        return load_examples(path, self.names, device=self.device, dtype=dtype)


def write_posterior(
    net: nn.Module,
    likelihood: Likelihood,
    files: ExampleFiles,
    options: LaplaceOptions,
    *,
    labels: Sequence[str] | None,
    seed: int,
    path: Path,
) -> Section:
    """Make the posterior, judge it on held-out data, and keep it.

    Parameters
    ----------
    net
        In evaluation mode.
    likelihood
        Its name.
    files
        Of the examples.
    options
        Of the posterior.
    labels
        Names of the outputs; None for their numbers.
    seed
        Of the draws.
    path
        Safetensors file for the posterior.

    Returns
    -------
    Section
        Of the page.

    Raises
    ------
    OptionError
        When options contradict each other.
    """
    if options.fit_temperature and files.validation is None:
        raise OptionError(
            "there are no validation data to fit it on",
            where="--fit-temperature",
            advice="Give --validation FILE.npz with held-out examples.",
        )
    if options.noise_variance is not None and likelihood != "gaussian":
        raise OptionError(
            f"a {likelihood} likelihood has no noise variance",
            where="--noise-variance",
            advice="Leave it out, or use --likelihood gaussian.",
        )
    settings: dict[str, Any] = {"kind": likelihood}
    if likelihood == "gaussian":
        settings["noise_variance"] = options.noise_variance
    law = likelihood_from_config(settings)
    parameter = next(net.parameters(), None)
    dtype = None if parameter is None else parameter.dtype
    train, test = files.load(files.train, dtype), files.load(files.test, dtype)
    validation = None if files.validation is None else files.load(files.validation, dtype)
    posterior: LaplacePosterior = laplace(
        net,
        train,
        law,
        method=options.method,
        subset=options.subset or None,
        prior=options.prior,
        prior_precision=options.prior_precision,
        num_draws=options.draws,
        seed=seed,
    )
    if options.fit_temperature:
        posterior = posterior.fit_temperature(
            validation, "monte_carlo" if likelihood == "poisson" else "probit"
        )
    posterior.save(path)  # before anything else can go wrong
    return uncertainty_section(
        posterior,
        test,
        validation=validation,
        labels=labels,
        image_shape=options.image_shape,
    )
