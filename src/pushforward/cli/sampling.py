"""``pushforward sample``; what it needs is imported when it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pushforward.cli.options import ExampleOptions, Likelihood, NetworkOptions, SamplerOptions
from pushforward.cli.pages import make_folder, page_environment, size_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pushforward.networks.likelihoods import Likelihood as TargetLikelihood
    from pushforward.report.averaged_prediction import AveragedPrediction, TargetLaw
    from pushforward.sampling.chains import Chains
    from pushforward.sampling.kernel import Kernel
    from pushforward.typing import Params

__all__ = ["Sample", "spread_rows"]

_PROBES = 8  # inputs whose predictions are followed
_PROBED_NUMBERS = 100
_FOLLOWED = 256  # test examples whose loss is followed
_PACE = {"MALA": (1000, 5), "SGLD": (5000, 10), "SGHMC": (5000, 10), "SGNHT": (5000, 10)}


@dataclass(frozen=True)
class Sample:
    """Draw networks from the posterior of the weights, and say whether the chains agree.

    Parameters
    ----------
    network
        The network. Chains begin at its weights with --start weights, and by default with
        minibatches; they are scored beside the draws.
    data
        NumPy archive (.npz) of the training examples x and targets y.
    likelihood
        Of the targets.
    test_data
        Archive of held-out examples, on which the average over the draws is judged.
    examples
        How the arrays are named and scaled.
    kernel
        The sampler.
    draws
        That are kept of each chain.
    chains
        How many run side by side; four or more let R-hat see whether they agree.
    warmup
        Steps before the first draw. Default: 500; 1,000 of mala; 5,000 with minibatches.
    thin
        Steps from one draw to the next. Default: 1; 5 of mala; 10 with minibatches.
    start
        Where chains begin: at draws of the prior, so that they begin apart, or all at the weights.
        auto: from the prior, but with minibatches at weights that are given, since their small
        steps would take very long.
    subset
        Patterns of the parameters that are sampled, such as 'head.*'. Default: all but those of
        normalisation layers.
    checkpoint
        Folder for the state; the same command goes on from there.
    output
        Folder for index.html, result.json and chains.safetensors.
    seed
        Of all noise.
    title
        Heading of the page.
    """

    network: NetworkOptions
    data: Path
    likelihood: Likelihood
    test_data: Annotated[Path | None, tyro.conf.arg(aliases=["--test"])] = None
    examples: ExampleOptions = ExampleOptions()  # noqa: RUF009 - frozen
    kernel: SamplerOptions = SamplerOptions()  # noqa: RUF009 - frozen
    draws: int = 500
    chains: int = 4
    warmup: int | None = None
    thin: int | None = None
    start: Literal["auto", "prior", "weights"] = "auto"
    subset: tuple[str, ...] = ()
    checkpoint: Path | None = None
    output: Path = Path("samples")
    seed: int = 0
    title: str = ""

    def run(self, command: str) -> None:
        """Sample, print what came of it, and write draws and page.

        Parameters
        ----------
        command
            How the page can be made again, shown on it.
        """
        from pushforward.cli.loading import load_network
        from pushforward.report import page
        from pushforward.report.posterior_samples import posterior_samples_section
        from pushforward.sampling.runner import sample

        net = load_network(self.network, seed=self.seed)
        target = self._target(net)
        make_folder(self.output)
        for note in target.notes:
            print(note)
        warmup, thin = self._pace(target.kernel)
        print(self._plan(target.kernel, warmup, self.draws * thin), flush=True)
        chains = sample(
            target.kernel,
            num_draws=self.draws,
            num_chains=self.chains,
            num_warmup=warmup,
            thin=thin,
            initial=net if target.at_weights else None,
            record=target.record,
            seed=self.seed,
            checkpoint=self.checkpoint,
        )
        path = self.output / "chains.safetensors"
        chains.save(path)
        print(chains)
        section = posterior_samples_section(
            chains,
            averaged=self._averaged(net, target, chains),
            about=target.about,
            notes=target.notes,
        )
        factory = self.network.network.rpartition(":")[2]
        files = [str(file) for file in (self.data, self.test_data) if file is not None]
        written = page.write(
            page.Report(
                title=self.title or f"Posterior samples of {factory}",
                subtitle=f"{size_of(self.network, net)}, with the examples of {self.data.name}",
                sections=(section,),
                environment=page_environment(
                    self.network, net, command, self.seed, {"Examples": ", ".join(files)}
                ),
            ),
            self.output / "index.html",
        )
        print(section.verdict.headline)
        print(f"Report: {written}")
        print(f"Chains: {path}")

    def _target(self, net: nn.Module) -> _Target:
        """What is sampled, and by what."""
        import torch

        from pushforward.cli import samplers
        from pushforward.cli.loading import load_examples
        from pushforward.errors import OptionError
        from pushforward.networks.likelihoods import Gaussian
        from pushforward.networks.model import FunctionalModel
        from pushforward.report.averaged_prediction import LargestEntry
        from pushforward.sampling.intermediate_noise.gibbs import gibbs
        from pushforward.sampling.potential import Potential

        options = self.kernel
        subset = self.subset or None
        space = FunctionalModel.of(net, subset).space
        noisy = bool(options.noise)
        # Small variances of inner noise want the digits.
        dtype = torch.float64 if noisy else next(net.parameters()).dtype
        if noisy:
            net.to(dtype)
        device = self.network.device
        train = load_examples(self.data, self.examples, device=device, dtype=dtype)
        test = None
        if self.test_data is not None:
            test = load_examples(self.test_data, self.examples, device=device, dtype=dtype)
        choice = samplers.choose(options, parameters=space.size, examples=len(train[0]))
        likelihood = samplers.target_likelihood(self.likelihood, options, noise_needed=not noisy)
        notes = [choice.note] if choice.note else []
        at_weights = self.start == "weights"
        if noisy:
            if self.subset:
                raise OptionError(
                    "Gibbs sampling draws all parameters",
                    where="--subset",
                    advice="Leave it out, or leave --noise out.",
                )
            model = samplers.noisy_network(net, options, self.likelihood)
            kernel: Kernel = gibbs(model, *train)
            last = model.variances[model.affine[-1].name]
            law: TargetLaw = LargestEntry(last)
            if self.likelihood == "gaussian":
                law = likelihood = Gaussian(last)
            about = (
                "Behind every map of the network stands Gaussian noise, of variance "
                f"{', '.join(f'{v:g}' for v in dict.fromkeys(model.variances.values()))}; what it "
                "makes are latent variables, drawn together with the parameters. Predictions are "
                "those of the network without the inner noise."
            )
            predict: Callable[[Params, Any], Tensor] = model.outputs
        else:
            functional = FunctionalModel.of(net, subset)
            potential = Potential.of_network(
                functional,
                train,
                likelihood,
                prior_precision=samplers.precisions_of(functional, options),
                batch_size=choice.batch_size,
            )
            if self.start == "auto" and choice.stochastic and self.network.weights is not None:
                at_weights = True
                notes.append(
                    "All chains begin at the weights that are given, so that their agreement says "
                    "less; --start prior lets them begin apart."
                )
            step_size, note = options.step_size, ""
            if step_size is None:
                step_size, note = samplers.guessed_step_size(
                    choice, potential, seed=self.seed, near_weights=at_weights
                )
            notes += [note] if note else []
            kernel = samplers.gradient_kernel(choice, potential, options, step_size)
            law, predict = likelihood, functional
            precision = options.prior_precision
            about = (
                f"The posterior of the network's parameters under a {self.likelihood} likelihood "
                "and independent Gaussian priors, whose precision is "
                + ("the fan-in of each layer." if precision is None else f"{precision:g}.")
            )
        return _Target(
            kernel, likelihood, law, predict, train, test, at_weights, about, tuple(notes)
        )

    def _pace(self, kernel: Kernel) -> tuple[int, int]:
        """Steps of warm-up, and from draw to draw: more where each of them is short."""
        warmup, thin = _PACE.get(kernel.name, (500, 1))
        return (
            warmup if self.warmup is None else self.warmup,
            thin if self.thin is None else self.thin,
        )

    def _plan(self, kernel: Kernel, warmup: int, steps: int) -> str:
        import torch

        from pushforward.runs.plan import format_bytes

        each = torch.finfo(kernel.dtype).bits // 8
        draws = self.chains * self.draws * kernel.space.size * each
        moving = self.chains * kernel.bytes_per_chain
        return (
            f"Plan: {self.chains} chains of {kernel.space.size:,} parameters by {kernel.name}, "
            f"{warmup:,} steps of warm-up and {steps:,} more; "
            f"{format_bytes(draws)} for the draws, up to {format_bytes(moving)} while they move"
        )

    def _averaged(
        self, net: nn.Module, target: _Target, chains: Chains
    ) -> AveragedPrediction | None:
        from pushforward.report.averaged_prediction import average_prediction

        if target.test is None:
            return None
        return average_prediction(
            target.predict,
            chains.draws(),
            target.law,
            target.likelihood,
            target.test,
            alone=None if self.network.weights is None else net,
        )


@dataclass(frozen=True, eq=False)
class _Target:
    """A posterior, its sampler, and how the draws predict."""

    kernel: Kernel
    likelihood: TargetLikelihood
    law: TargetLaw
    predict: Callable[[Params, Any], Tensor]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None
    at_weights: bool
    about: str
    notes: tuple[str, ...]

    @property
    def record(self) -> Callable[[Params], dict[str, Tensor]]:
        """What is followed along the chains: some predictions, and the loss on test data."""
        probes = spread_rows(self.train[0] if self.test is None else self.test[0], _PROBES)
        law, predict, test = self.law, self.predict, self.test
        if test is None:
            return lambda p: {"prediction": _some_numbers(law.mean(predict(p, probes)))}
        inputs, targets = (spread_rows(column, _FOLLOWED) for column in test)
        like = predict(_zeros(self.kernel), inputs)
        checked = self.likelihood.check_targets(like, targets, "test data")

        def followed(parameters: Params) -> dict[str, Tensor]:
            loss = -law.log_prob(predict(parameters, inputs), checked).mean()
            seen = law.mean(predict(parameters, probes))
            return {"prediction": _some_numbers(seen), "test loss": loss}

        return followed


def spread_rows(column: Tensor, count: int) -> Tensor:
    """Some rows, spread evenly over all.

    Parameters
    ----------
    column
        ``(N, ...)``.
    count
        How many.

    Returns
    -------
    Tensor
        ``(min(N, count), ...)``.
    """
    import torch

    at = torch.linspace(0, len(column) - 1, min(len(column), count), dtype=torch.float64)
    return column[at.round().long().to(column.device)]


def _some_numbers(values: Tensor) -> Tensor:
    return values if values.numel() <= _PROBED_NUMBERS else values.flatten()[:_PROBED_NUMBERS]


def _zeros(kernel: Kernel) -> Params:
    import torch

    vector = torch.zeros(kernel.space.size, dtype=kernel.dtype, device=kernel.device)
    return kernel.space.unravel(vector)
