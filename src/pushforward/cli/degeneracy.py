"""``pushforward degeneracy``; what it needs is imported when it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pushforward.cli.options import ExampleOptions, Likelihood, NetworkOptions, SamplerOptions
from pushforward.cli.pages import make_folder, page_environment, size_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pushforward.degeneracy.coefficient import LearningCoefficient
    from pushforward.degeneracy.settings import Settings
    from pushforward.networks.likelihoods import Likelihood as TargetLikelihood
    from pushforward.report.page import Section

__all__ = ["CODES", "Degeneracy", "Measurement", "WalkerName"]

WalkerName = Literal["auto", "langevin", "sgld", "hmc", "mala"]
CODES = {
    "OK": 0,
    "NOT_EQUILIBRATED": 3,
    "STEP_TOO_LARGE": 4,
    "NOT_A_MINIMUM": 5,
    "DEAD_CHAINS": 6,
}
"""Status with which the command ends, by verdict."""

_CHOSEN = {
    "hmc": "HMC on all data: exact, and it finds its own step size.",
    "langevin": "Langevin with minibatches: trajectories over all data would be slow with "
    "{parameters} parameters and {examples} examples.",
}


@dataclass(frozen=True)
class Degeneracy:
    """Say how degenerate a trained network is: its local learning coefficient, with error bar.

    It is half the number of parameters of a regular model, and less the more degenerate the
    solution is. Ends with status 0 when it can be relied on (OK), 3 when chains are still on their
    way (NOT_EQUILIBRATED), 4 when the step size changes the answer (STEP_TOO_LARGE), 5 when the
    network is not at a minimum (NOT_A_MINIMUM), and 6 when chains were lost (DEAD_CHAINS).

    Parameters
    ----------
    network
        The network, with the weights at which it is measured.
    data
        NumPy archive (.npz) of its training examples x and targets y; other data restrict the
        coefficient to them.
    likelihood
        Of the targets.
    examples
        How the arrays are named and scaled.
    noise_variance
        Of the targets of a regression.
    nbeta
        Inverse temperature times the number of examples n. Default: n / ln n.
    localization
        Strength of the spring that holds chains near the weights. Give one number to compare
        networks. Default: the weakest for which flat directions relax ten times in a run.
    metric
        In which distances are measured. layerwise: in units of a scale for each tensor, so that
        multiplying one layer and dividing the next by a number changes nothing.
    sampler
        langevin and sgld use minibatches; hmc and mala all data in every step. auto: hmc for up to
        10,000 parameters, and ten million parameters times examples, else langevin.
    chains
        How many run side by side, from the weights.
    draws
        Steps of each chain in the main run. Default: 2,000; 300 of hmc.
    warmup
        Steps before them. Default: as many as it takes.
    batch_size
        Examples in a minibatch. Default: 256.
    step_size
        Default: from the curvature where chains are; learned by hmc and mala.
    subset
        Patterns of the parameters that are sampled, such as 'head.*'. Default: all.
    realisable
        The network's own outputs take the place of the targets, so that it is at a minimum whatever
        the training did.
    checkpoint
        Folder for the state; the same command goes on from there.
    output
        Folder for index.html and result.json.
    seed
        Of all noise.
    title
        Heading of the page.
    """

    network: NetworkOptions
    data: Path
    likelihood: Likelihood
    examples: ExampleOptions = ExampleOptions()  # noqa: RUF009 - frozen
    noise_variance: float | None = None
    nbeta: float | None = None
    localization: float | None = None
    metric: Literal["euclidean", "layerwise"] = "euclidean"
    sampler: WalkerName = "auto"
    chains: int = 8
    draws: int | None = None
    warmup: int | None = None
    batch_size: int | None = None
    step_size: float | None = None
    subset: tuple[str, ...] = ()
    realisable: bool = False
    checkpoint: Path | None = None
    output: Path = Path("degeneracy")
    seed: int = 0
    title: str = ""

    def run(self, command: str) -> None:
        """Estimate, print what came of it, and write the page.

        Parameters
        ----------
        command
            How the page can be made again, shown on it.

        Raises
        ------
        SystemExit
            With the code of a verdict other than OK.
        """
        from pushforward.cli.loading import load_network
        from pushforward.degeneracy.settings import Settings
        from pushforward.report import page

        settings = Settings(
            nbeta=self.nbeta,
            localization=self.localization,
            metric=self.metric,
            sampler=self.sampler,
            num_chains=self.chains,
            num_draws=self.draws,
            num_warmup=self.warmup,
            batch_size=self.batch_size,
            step_size="auto" if self.step_size is None else self.step_size,
        )
        net = load_network(self.network, seed=self.seed)
        measurement = Measurement(
            net=net,
            device=self.network.device,
            data=self.data,
            examples=self.examples,
            likelihood=self.likelihood,
            noise_variance=self.noise_variance,
            settings=settings,
            subset=self.subset,
            realisable=self.realisable,
            checkpoint=self.checkpoint,
            seed=self.seed,
        )
        make_folder(self.output)
        found, section = measurement.run()
        factory = self.network.network.rpartition(":")[2]
        written = page.write(
            page.Report(
                title=self.title or f"How degenerate {factory} is",
                subtitle=f"{size_of(self.network, net)}, on the examples of {self.data.name}",
                sections=(section,),
                environment=page_environment(
                    self.network, net, command, self.seed, {"Examples": str(self.data)}
                ),
            ),
            self.output / "index.html",
        )
        print(section.verdict.headline)
        print(f"Report: {written}")
        code = CODES[found.verdict]
        if code:
            raise SystemExit(code)


@dataclass(frozen=True, eq=False, kw_only=True)
class Measurement:
    """An estimate that is to be made from files.

    Parameters
    ----------
    net, device
        The network, and where it is.
    data, examples
        Archive of the examples, and how its arrays are named.
    likelihood, noise_variance
        Of the targets.
    settings
        Of the estimate.
    subset
        Patterns of the parameters that are sampled; none for all.
    realisable
        Whether the network's own outputs take the place of the targets.
    checkpoint
        Folder for the state, or None.
    seed
        Of all noise.
    """

    net: nn.Module
    device: str
    data: Path
    examples: ExampleOptions
    likelihood: Likelihood
    noise_variance: float | None
    settings: Settings
    subset: tuple[str, ...] = ()
    realisable: bool = False
    checkpoint: Path | None = None
    seed: int = 0

    def run(self) -> tuple[LearningCoefficient, Section]:
        """Print the plan, estimate, print the result.

        Returns
        -------
        tuple
            The estimate, and its section of the page.
        """
        from pushforward.cli.loading import load_examples
        from pushforward.cli.samplers import target_likelihood
        from pushforward.degeneracy.estimate import learning_coefficient
        from pushforward.report.degeneracy import degeneracy_section

        options = SamplerOptions(noise_variance=self.noise_variance)
        likelihood = target_likelihood(self.likelihood, options, noise_needed=True)
        parameter = next(self.net.parameters(), None)
        dtype = None if parameter is None else parameter.dtype
        train = load_examples(self.data, self.examples, device=self.device, dtype=dtype)
        plan, notes = self._plan(train, likelihood)
        for note in notes:
            print(note)
        print(plan, flush=True)
        found = learning_coefficient(
            self.net,
            train,
            likelihood,
            **asdict(self.settings),
            subset=self.subset or None,
            realisable=self.realisable,
            seed=self.seed,
            checkpoint=self.checkpoint,
        )
        print(found)
        if self.settings.localization is None:
            notes.append(
                f"The localisation, {found.localization:.4g}, was chosen for this network; to "
                "compare others with it, give them the same --localization."
            )
        return found, degeneracy_section(found, about=self._about(), notes=notes)

    def _plan(
        self, train: tuple[Tensor, Tensor], likelihood: TargetLikelihood
    ) -> tuple[str, list[str]]:
        """What will be done, and what was chosen on behalf of the user."""
        from pushforward.degeneracy.walk import Walk
        from pushforward.runs.plan import format_bytes

        # Scales of tensors cost time and no memory to speak of.
        settings = replace(self.settings, metric="euclidean")
        around = settings.neighbourhood(
            self.net,
            train,
            likelihood,
            subset=self.subset or None,
            realisable=self.realisable,
            seed=self.seed,
        )
        sampler = settings.sampler_for(around)
        walk = Walk(around, sampler, self.seed)
        moving = settings.num_chains * walk.kernel(settings.fixed_step or 1.0).bytes_per_chain
        parameters, examples = f"{around.num_parameters:,}", f"{around.num_examples:,}"
        draws, warmup = f"{settings.draws_of(sampler):,}", settings.num_warmup
        notes = []
        if settings.sampler == "auto":
            notes.append(_CHOSEN[sampler].format(parameters=parameters, examples=examples))
        plan = (
            f"Plan: {settings.num_chains} chains of {parameters} parameters by {sampler} on "
            f"{examples} examples, at n beta {around.nbeta:.4g}; "
            f"{'a' if warmup is None else f'{warmup:,} steps of'} warm-up and {draws} draws"
            f"{'' if walk.learns else ', then as many with half the step size'}; up to "
            f"{format_bytes(moving)} while they move"
        )
        return plan, notes

    def _about(self) -> str:
        targets = "its own outputs as targets" if self.realisable else "their targets"
        which = f"the parameters {', '.join(self.subset)}" if self.subset else "all parameters"
        return (
            f"Measured are {which} of the network on the inputs of {self.data.name} with "
            f"{targets}, under a {self.likelihood} likelihood."
        )
