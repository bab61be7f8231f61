"""The commands as frozen settings; what they need is imported when they run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pushforward.cli.options import (
    ExampleOptions,
    LaplaceOptions,
    LawOptions,
    Likelihood,
    NetworkOptions,
)
from pushforward.cli.pages import page_environment, size_of

if TYPE_CHECKING:
    from torch import nn

    from pushforward.cli.degeneracy import WalkerName
    from pushforward.cli.loading import LoadedLaw
    from pushforward.cli.posterior import ExampleFiles
    from pushforward.report.page import Section
    from pushforward.runs.estimate import Estimate

__all__ = ["Demo", "Expect", "Report", "Uncertainty"]

_DIGITS = tuple("0123456789")
_VERDICTS = (0, 3, 4, 5)  # that thermalize ends with


@dataclass(frozen=True)
class Report:
    """Write one HTML page: expected outputs, spread and tails, each beside a Monte Carlo check.

    With --likelihood, --train and --test the page also says how sure the network is, with
    --degeneracy how degenerate it is, and with --prune and --quantise how far that moves it.

    Parameters
    ----------
    network
        The network.
    law
        The law of its inputs.
    output
        Folder for index.html and result.json.
    labels
        Names of the outputs, in order.
    events
        Events whose probability is wanted, such as 'f[cat] > f[dog]' or 'f[3] - 2*f[1] > 0.5', with
        labels or indices in the brackets. Default: outputs far above their mean, likely confusions.
    samples
        Forward passes of the Monte Carlo check.
    order
        Highest order of the propagation.
    seed
        Of the Monte Carlo check and of all other noise.
    title
        Heading of the page.
    likelihood
        Of the targets, for a section on the uncertainty of the predictions.
    train
        NumPy archive of the training examples x and targets y, for that section.
    test
        Archive of held-out examples, on which the predictions are judged.
    validation
        Archive of more held-out examples, on which temperatures are fitted.
    target_key
        Name of the array of targets. Default: y, targets, target, labels, label or Y.
    laplace
        The posterior over the weights.
    degeneracy
        Sampler for a section on the learning coefficient at the weights, on the training examples;
        of the parameters in --subset alone when that is given.
    degeneracy_draws
        Steps of each of its chains. Default: 2,000; 300 of hmc.
    localization
        Strength of the spring that holds them near the weights. Default: as weak as they can bear.
    prune
        Shares of the weights to set to 0, smallest first, for a section on how far that moves the
        network as a function, over the training examples or else those of the law.
    quantise
        Numbers of bits to round the weights to, for the same section.
    """

    network: NetworkOptions
    law: LawOptions
    output: Path = Path("report")
    labels: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    samples: int = 100_000
    order: Literal[1, 2, 3] = 3
    seed: int = 0
    title: str = ""
    likelihood: Likelihood | None = None
    train: Path | None = None
    test: Path | None = None
    validation: Path | None = None
    target_key: str | None = None
    laplace: LaplaceOptions = LaplaceOptions()  # noqa: RUF009 - frozen
    degeneracy: Literal["none", "auto", "langevin", "sgld", "hmc", "mala"] = "none"
    degeneracy_draws: int | None = None
    localization: float | None = None
    prune: tuple[float, ...] = ()
    quantise: tuple[int, ...] = ()

    def run(self, command: str) -> None:
        """Write the page and print where it is.

        Parameters
        ----------
        command
            How the page can be made again, shown on it.
        """
        files = self._files()
        from pushforward.cli.loading import load_law, load_network
        from pushforward.networks.graph import read_network
        from pushforward.report import page
        from pushforward.report.events import output_labels, parse_event
        from pushforward.report.expected_output import expected_output_section

        net = load_network(self.network, seed=self.seed)
        loaded = load_law(self.law, device=self.network.device)
        outputs = read_network(net, loaded.law.event_shape).output.linear.out_features
        labels = output_labels(self.labels or None, outputs)
        section = expected_output_section(
            net,
            loaded.law,
            labels=labels,
            events=[parse_event(text, labels) for text in self.events] or None,
            data=loaded.examples,
            num_samples=self.samples,
            seed=self.seed,
            highest_order=self.order,
        )
        sections = [section]
        if files is not None and self.likelihood is not None:
            from pushforward.cli.posterior import write_posterior

            sections.append(
                write_posterior(
                    net,
                    self.likelihood,
                    files,
                    self.laplace,
                    labels=labels,
                    seed=self.seed,
                    path=self.output / "posterior.safetensors",
                )
            )
            if self.degeneracy != "none":
                sections.append(self._degeneracy(net, self.degeneracy, self.likelihood, files))
        if self.prune or self.quantise:
            sections.append(self._distances(net, loaded, files))
        factory = self.network.network.rpartition(":")[2]
        written = page.write(
            page.Report(
                title=self.title or f"What {factory} does on average and in its tails",
                subtitle=_subtitle(self, net, loaded),
                sections=tuple(sections),
                environment=page_environment(
                    self.network, net, command, self.seed, {"Law": repr(loaded.law)}
                ),
            ),
            self.output / "index.html",
        )
        for item in sections:
            print(item.verdict.headline)
        print(f"Report: {written}")

    def _degeneracy(
        self, net: nn.Module, sampler: WalkerName, likelihood: Likelihood, files: ExampleFiles
    ) -> Section:
        from pushforward.cli.degeneracy import Measurement
        from pushforward.degeneracy.settings import Settings

        _, section = Measurement(
            net=net,
            device=files.device,
            data=files.train,
            examples=files.names,
            likelihood=likelihood,
            noise_variance=self.laplace.noise_variance,
            settings=Settings(
                sampler=sampler,
                num_draws=self.degeneracy_draws,
                localization=self.localization,
            ),
            subset=self.laplace.subset,
            seed=self.seed,
        ).run()
        return section

    def _distances(self, net: nn.Module, loaded: LoadedLaw, files: ExampleFiles | None) -> Section:
        """The section on pruned and quantised versions.

        Returns
        -------
        Section
            Of the page.

        Raises
        ------
        OptionError
            When there are no examples.
        """
        from pushforward.cli.distance import compressed_versions
        from pushforward.errors import OptionError
        from pushforward.function_space.summarize import summarize
        from pushforward.function_space.versions import measure_versions
        from pushforward.report.function_space import function_space_section

        examples, name = loaded.examples, self.law.data
        if files is not None:
            parameter = next(net.parameters(), None)
            dtype = None if parameter is None else parameter.dtype
            examples, name = files.load(files.train, dtype)[0], files.train
        if examples is None or name is None:
            raise OptionError(
                "there are no examples to measure distances over",
                where="--prune and --quantise",
                advice="Give --data FILE.npz instead of --standard, or --train FILE.npz.",
            )
        versions = compressed_versions(net, self.prune, self.quantise)
        summary = summarize(net, examples)
        found = measure_versions(summary, versions, data=examples, seed=self.seed)
        about = f"The network was summarised over the {len(examples):,} examples of {name.name}."
        return function_space_section(found, about=about)

    def _files(self) -> ExampleFiles | None:
        """What the sections on uncertainty and degeneracy are made from.

        Returns
        -------
        ExampleFiles or None
            None without that section.

        Raises
        ------
        OptionError
            When only some of it is given.
        """
        from pushforward.errors import OptionError

        given = {"--likelihood": self.likelihood, "--train": self.train, "--test": self.test}
        if not any((*given.values(), self.validation)) and self.degeneracy == "none":
            return None
        missing = [name for name, value in given.items() if value is None]
        if missing or self.train is None or self.test is None:
            raise OptionError(
                f"the section on uncertainty lacks {' and '.join(missing)}",
                where="pushforward report",
                advice="Give --likelihood, --train and --test together, or none of them.",
            )
        from pushforward.cli.posterior import ExampleFiles

        law = self.law
        names = ExampleOptions(law.key, self.target_key, law.scale, law.input_shape)
        return ExampleFiles(self.train, self.test, self.validation, names, self.network.device)


@dataclass(frozen=True)
class Expect:
    """Print the expected output of a network with its error bar.

    Parameters
    ----------
    network
        The network.
    law
        The law of its inputs.
    tolerance
        Wanted standard error, in standard deviations of each output.
    max_samples
        Most forward passes to spend when propagation alone is not accurate enough.
    labels
        Names of the outputs, in order.
    seed
        Of the samples, if any are drawn.
    json
        Write the result to this file too.
    """

    network: NetworkOptions
    law: LawOptions
    tolerance: float = 1e-3
    max_samples: int = 1_000_000
    labels: tuple[str, ...] = ()
    seed: int = 0
    json: Path | None = None

    def run(self, command: str) -> None:
        """Print the table, and write the JSON file.

        Parameters
        ----------
        command
            How the result can be made again, kept in the JSON file.
        """
        from pushforward.cli.loading import load_law, load_network
        from pushforward.cli.pages import refuse_overwriting
        from pushforward.cumulants.expectation import expect
        from pushforward.report.events import output_labels

        read = [("--data", self.law.data), ("--weights", self.network.weights)]
        refuse_overwriting(read, [("--json", self.json)])
        net = load_network(self.network, seed=self.seed)
        loaded = load_law(self.law, device=self.network.device)
        estimate = expect(
            net,
            loaded.law,
            tolerance=self.tolerance,
            max_samples=self.max_samples,
            seed=self.seed,
        )
        labels = output_labels(self.labels or None, estimate.value.numel())
        _print_estimate(estimate, labels, self.network.network)
        if self.json is not None:
            from pushforward.report.page import write_json

            write_json({"command": command, "labels": labels, **estimate.to_dict()}, self.json)


@dataclass(frozen=True)
class Uncertainty:
    """Say how sure a network is of its predictions, beside the network alone: one HTML page.

    Parameters
    ----------
    network
        The network.
    data
        NumPy archive (.npz) of its training examples x and targets y.
    test
        Archive of held-out examples, on which the predictions are judged.
    likelihood
        Of the targets.
    validation
        Archive of more held-out examples, on which temperatures are fitted.
    examples
        How the arrays are named and scaled.
    laplace
        The posterior over the weights.
    output
        Folder for index.html, result.json and posterior.safetensors.
    labels
        Names of the outputs, in order.
    seed
        Of the posterior draws.
    title
        Heading of the page.
    """

    network: NetworkOptions
    data: Path
    test: Path
    likelihood: Likelihood
    validation: Path | None = None
    examples: ExampleOptions = ExampleOptions()  # noqa: RUF009 - frozen
    laplace: LaplaceOptions = LaplaceOptions()  # noqa: RUF009 - frozen
    output: Path = Path("uncertainty")
    labels: tuple[str, ...] = ()
    seed: int = 0
    title: str = ""

    def run(self, command: str) -> None:
        """Write the page and the posterior, and print where they are.

        Parameters
        ----------
        command
            How the page can be made again, shown on it.
        """
        from pushforward.cli.loading import load_network
        from pushforward.cli.posterior import ExampleFiles, write_posterior
        from pushforward.report import page

        net = load_network(self.network, seed=self.seed)
        path = self.output / "posterior.safetensors"
        section = write_posterior(
            net,
            self.likelihood,
            ExampleFiles(self.data, self.test, self.validation, self.examples, self.network.device),
            self.laplace,
            labels=self.labels or None,
            seed=self.seed,
            path=path,
        )
        factory = self.network.network.rpartition(":")[2]
        files = [str(file) for file in (self.data, self.test, self.validation) if file is not None]
        written = page.write(
            page.Report(
                title=self.title or f"How sure {factory} is",
                subtitle=f"{size_of(self.network, net)}, trained on the examples of "
                f"{self.data.name}, judged on those of {self.test.name}",
                sections=(section,),
                environment=page_environment(
                    self.network, net, command, self.seed, {"Examples": ", ".join(files)}
                ),
            ),
            self.output / "index.html",
        )
        print(section.verdict.headline)
        print(f"Report: {written}")
        print(f"Posterior: {path}")


@dataclass(frozen=True)
class Demo:
    """Train a small classifier of handwritten digits, and report on it.

    The page says what it outputs, how sure it is, how degenerate a solution training found, and how
    far pruning and quantisation move it. Then test on a smaller network whether Gibbs sampling
    reaches the posterior.

    Parameters
    ----------
    output
        Folder for the page, the weights and the data.
    samples
        Forward passes of the Monte Carlo check.
    draws
        Posterior draws of the section on uncertainty.
    epochs
        Passes over the training data.
    steps
        Of each chain that measures how degenerate the classifier is; 0 for none.
    problems
        On which the sampler is tested; 0 for none.
    seed
        Of the training, of the Monte Carlo check, of the draws and of the chains.
    """

    output: Path = Path("demo")
    samples: int = 100_000
    draws: int = 64
    epochs: int = 30
    steps: int = 300
    problems: int = 8
    seed: int = 0

    def run(self, command: str) -> None:  # noqa: ARG002 - one form for all
        """Train, run ``pushforward report`` on what was saved, and ``pushforward thermalize``.

        Parameters
        ----------
        command
            Not used: the page shows the command that makes the report.

        Raises
        ------
        SystemExit
            With the code of a command when it fails.
        """
        from pushforward.cli import main
        from pushforward.cli.demo import COMPRESSION, DEGENERACY, THERMALIZATION, prepare_digits

        print("Training a classifier of handwritten digits ...")
        trained = prepare_digits(self.output, seed=self.seed, epochs=self.epochs)
        print(f"{100 * trained.accuracy:.1f} % of {trained.num_test} held-out digits are correct.")
        arguments = [
            "report",
            "pushforward.cli.demo:digits_classifier",
            *("--weights", str(trained.weights)),
            *("--data", str(trained.data)),
            *("--labels", *_DIGITS),
            *("--samples", str(self.samples)),
            *("--seed", str(self.seed)),
            *("--title", "A classifier of handwritten digits"),
            *("--likelihood", "categorical"),
            *("--train", str(trained.train)),
            *("--test", str(trained.test)),
            *("--validation", str(trained.validation)),
            *("--draws", str(self.draws)),
            *("--image-shape", "8", "8"),
            *COMPRESSION,
            *("--output", str(self.output)),
        ]
        if self.steps:
            arguments += [*DEGENERACY, "--degeneracy-draws", str(self.steps)]
        code = main(arguments)
        if code:
            raise SystemExit(code)
        print(f"Make it again: {shlex.join(['pushforward', *arguments])}")
        if not self.problems:
            return
        print("\nTesting whether Gibbs sampling reaches the posterior of a small network ...")
        arguments = [
            *THERMALIZATION,
            *("--seeds", str(self.problems), "--seed", str(self.seed)),
            *("--output", str(self.output / "thermalization")),
        ]
        code = main(arguments)
        if code not in _VERDICTS:
            raise SystemExit(code)
        print(f"Make it again: {shlex.join(['pushforward', *arguments])}")


def _subtitle(settings: Report, net: nn.Module, loaded: LoadedLaw) -> str:
    from pushforward.report.formatting import TIMES

    network = size_of(settings.network, net)
    shape = f" {TIMES} ".join(map(str, loaded.law.event_shape))
    if loaded.examples is None or settings.law.data is None:
        return f"{network}, inputs of shape {shape} from N(0, I)"
    count, name = len(loaded.examples), settings.law.data.name
    return (
        f"{network}, inputs of shape {shape} from the Gaussian law of {count:,} examples in {name}"
    )


def _print_estimate(estimate: Estimate, labels: tuple[str, ...], name: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pushforward.report.formatting import with_error

    table = Table("output")
    table.add_column("mean ± standard error", justify="right")
    values, errors = estimate.value.flatten().tolist(), estimate.standard_error.flatten().tolist()
    for label, value, error in zip(labels, values, errors, strict=True):
        table.add_row(escape(label), with_error(value, error))
    console = Console()
    console.print(f"Expected output of {name}", markup=False, highlight=False)
    console.print(table)
    console.print(f"By {estimate.method}. Cost: {estimate.cost}.", markup=False, highlight=False)
    for check in estimate.checks:
        if check.status != "pass":
            console.print(str(check), markup=False, highlight=False)
