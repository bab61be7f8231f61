"""``pushforward thermalize``; what it needs is imported when it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from pushforward.cli.options import ExampleOptions, Likelihood, NetworkOptions, SamplerOptions
from pushforward.cli.pages import make_folder, page_environment, size_of
from pushforward.cli.sampling import spread_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pushforward.sampling.kernel import Kernel
    from pushforward.sampling.thermalization.teacher_student import Instance, TeacherStudent

__all__ = ["Thermalize"]

_HELD_OUT = 5  # one example in so many
_MOST_HELD_OUT = 1000
_CODES = {"PASS": 0, "NOT_CONVERGED": 3, "KERNEL_BUG": 4, "INCONCLUSIVE": 5}


@dataclass(frozen=True)
class Thermalize:
    """Test whether a sampler reaches the posterior, on problems of which a draw of it is known.

    Ends with status 0 when it does (PASS), 3 when it does not (NOT_CONVERGED), 4 when it samples
    another law (KERNEL_BUG), and 5 when that cannot be told (INCONCLUSIVE).

    Parameters
    ----------
    network
        The network. Its weights are not used.
    likelihood
        Of the targets that teachers make.
    data
        NumPy archive (.npz) of examples, whose inputs all problems share. Targets are not used.
    standard
        Instead of data: the shape of one input, whose entries are independent standard normal.
    count
        Examples of a problem. Default: all that there are in the data, but for those held out; 100
        of the standard law.
    test_data
        Archive of inputs for the test error. Default: a fifth of the data, at most 1,000; or 1,000
        of the standard law.
    examples
        How the arrays are named and scaled.
    kernel
        The sampler.
    budget
        Steps of each chain, warm-up included.
    seeds
        Number of problems.
    chains
        From each start.
    checkpoint
        Folder for finished problems; the same command goes on from there.
    output
        Folder for index.html and result.json.
    seed
        Of the chains.
    title
        Heading of the page.
    """

    network: NetworkOptions
    likelihood: Likelihood
    data: Path | None = None
    standard: tuple[int, ...] = ()
    count: int | None = None
    test_data: Annotated[Path | None, tyro.conf.arg(aliases=["--test"])] = None
    examples: ExampleOptions = ExampleOptions()  # noqa: RUF009 - frozen
    kernel: SamplerOptions = SamplerOptions()  # noqa: RUF009 - frozen
    budget: int = 1000
    seeds: int = 20
    chains: int = 4
    checkpoint: Path | None = None
    output: Path = Path("thermalization")
    seed: int = 0
    title: str = ""

    def run(self, command: str) -> None:
        """Run the problems, print the verdict, and write the page.

        Parameters
        ----------
        command
            How the page can be made again, shown on it.

        Raises
        ------
        SystemExit
            With the code of a verdict other than PASS.
        """
        from pushforward.cli.loading import load_network
        from pushforward.report import page
        from pushforward.report.thermalization import thermalization_section
        from pushforward.sampling.thermalization.thermalize import thermalize

        net = load_network(self.network, seed=self.seed).double()
        problem = self._problem(net)
        sampler, notes = self._sampler(problem)
        make_folder(self.output)
        for note in notes:
            print(note)
        print(self._plan(problem, sampler), flush=True)
        report = thermalize(
            problem,
            sampler,
            budget=self.budget,
            seeds=self.seeds,
            num_chains=self.chains,
            records=min(256, max(16, self.budget // 2)),
            seed=self.seed,
            checkpoint=self.checkpoint,
        )
        print(report)
        source = "standard normal inputs" if self.data is None else f"inputs of {self.data.name}"
        section = thermalization_section(report, notes=notes)
        written = page.write(
            page.Report(
                title=self.title or f"Does {report.kernel} reach the posterior?",
                subtitle=f"{size_of(self.network, net)}, {source}",
                sections=(section,),
                environment=page_environment(
                    self.network, net, command, self.seed, {"Problems": repr(problem)}
                ),
            ),
            self.output / "index.html",
        )
        print(f"Report: {written}")
        code = _CODES.get(report.verdict, 1)
        if code:
            raise SystemExit(code)

    def _problem(self, net: nn.Module) -> TeacherStudent:
        """The family of problems."""
        from pushforward.cli import samplers
        from pushforward.networks.model import FunctionalModel
        from pushforward.sampling.thermalization.teacher_student import TeacherStudent

        inputs, test = self._inputs()
        options = self.kernel
        noisy = bool(options.noise)
        likelihood = samplers.target_likelihood(self.likelihood, options, noise_needed=not noisy)
        shape = self.standard or None
        if noisy:
            model = samplers.noisy_network(net, options, self.likelihood)
            return TeacherStudent(model, inputs, test, example_shape=shape)
        functional = FunctionalModel.of(net)
        return TeacherStudent(
            functional,
            inputs,
            test,
            likelihood=likelihood,
            prior_precision=samplers.precisions_of(functional, options),
            example_shape=shape,
        )

    def _inputs(self) -> tuple[Tensor | int, Tensor | int]:
        """Inputs of a problem and test inputs, or how many standard normal ones."""
        import torch

        from pushforward.cli.loading import load_inputs
        from pushforward.errors import DataError, OptionError

        count = self.count
        if count is not None and count < 1:
            raise OptionError(f"{count}", where="--count", advice="Give a number from 1 on.")
        if (self.data is None) == (not self.standard):
            raise OptionError(
                "neither is given" if self.data is None else "both are given",
                where="--data and --standard",
                advice="Give --data FILE.npz for your own inputs, or --standard DIM for N(0, I).",
            )
        device, test = self.network.device, None
        if self.test_data is not None:
            test = load_inputs(self.test_data, self.examples, device=device, dtype=torch.float64)
        if self.data is None:
            return count or 100, _MOST_HELD_OUT if test is None else test
        inputs = load_inputs(self.data, self.examples, device=device, dtype=torch.float64)
        if test is None:
            held = torch.arange(0, len(inputs), _HELD_OUT)[:_MOST_HELD_OUT]
            rest = torch.ones(len(inputs), dtype=torch.bool)
            rest[held] = False
            test, inputs = inputs[held.to(inputs.device)], inputs[rest.to(inputs.device)]
        if len(inputs) < (count or 1):
            raise DataError(
                f"{len(inputs):,} examples are left for the problems",
                where=str(self.data),
                advice="Give more data, a smaller --count, or --test-data.",
            )
        return inputs if count is None else spread_rows(inputs, count), test

    def _sampler(
        self, problem: TeacherStudent
    ) -> tuple[Callable[[Instance], Kernel], tuple[str, ...]]:
        """From an instance to its kernel, and what was chosen on behalf of the user."""
        from dataclasses import replace

        from pushforward.cli import samplers
        from pushforward.sampling.intermediate_noise.gibbs import gibbs
        from pushforward.sampling.network_potential import NetworkPotential

        options = self.kernel
        first = problem.instance(0)
        choice = samplers.choose(
            options, parameters=problem.space.size, examples=len(first.inputs), joint=True
        )
        notes = [choice.note] if choice.note else []
        if choice.name == "gibbs":
            return lambda instance: gibbs(instance.model, instance.inputs, instance.targets), tuple(
                notes
            )
        step_size = options.step_size
        if step_size is None and isinstance(first.potential, NetworkPotential):
            step_size, note = samplers.guessed_step_size(choice, first.potential, seed=self.seed)
            notes += [note] if note else []

        def kernel_of(instance: Instance) -> Kernel:
            potential = instance.potential
            if isinstance(potential, NetworkPotential):
                potential = replace(potential, batch_size=choice.batch_size)
            return samplers.gradient_kernel(choice, potential, options, step_size)

        return kernel_of, tuple(notes)

    def _plan(self, problem: TeacherStudent, sampler: Callable[[Instance], Kernel]) -> str:
        from pushforward.runs.plan import format_bytes
        from pushforward.sampling.thermalization.teacher_student import STARTS

        kernel = sampler(problem.instance(0))
        count = self.chains * len(STARTS)
        return (
            f"Plan: {self.seeds} problems, each with {count} chains of {self.budget:,} steps by "
            f"{kernel.name}, from {len(STARTS)} starts; up to "
            f"{format_bytes(count * kernel.bytes_per_chain)} while they move"
        )
