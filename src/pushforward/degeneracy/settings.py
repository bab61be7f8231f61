"""How a learning coefficient is estimated: all that is no network, no data and no seed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from pushforward.degeneracy.neighbourhood import Metric, Neighbourhood
from pushforward.degeneracy.walk import SamplerName
from pushforward.networks.likelihoods import Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.options import choice, number, whole_number
from pushforward.sampling.potential import Loss

__all__ = ["SamplerChoice", "Settings"]

SamplerChoice: TypeAlias = Literal["auto", "langevin", "sgld", "hmc", "mala"]

_DEFAULT_DRAWS = {"langevin": 2000, "sgld": 2000, "hmc": 300, "mala": 2000}
_HMC_PARAMETERS = 10_000
_HMC_SIZE = 10_000_000  # parameters times examples: some minutes on a core


@dataclass(frozen=True)
class Settings:
    """The options of `learning_coefficient`, where they are explained.

    Parameters
    ----------
    nbeta, localization, metric, sampler, num_chains, num_draws, num_warmup, batch_size, step_size
        As there.

    Raises
    ------
    OptionError
        For an option out of range.
    """

    _: KW_ONLY
    nbeta: float | None = None
    localization: float | None = None
    metric: Metric = "euclidean"
    sampler: SamplerChoice = "auto"
    num_chains: int = 8
    num_draws: int | None = None
    num_warmup: int | None = None
    batch_size: int | None = None
    step_size: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        choice(self.metric, "metric", get_args(Metric))
        choice(self.sampler, "sampler", get_args(SamplerChoice))
        # Plain numbers, for the settings are written with the results.
        plain: dict[str, float] = {
            "num_chains": whole_number(self.num_chains, "num_chains", least=2)
        }
        for name, count, least in (
            ("num_draws", self.num_draws, 16),
            ("num_warmup", self.num_warmup, 0),
            ("batch_size", self.batch_size, 1),
        ):
            if count is not None:
                plain[name] = whole_number(count, name, least=least)
        advice = "Give a positive number, or None for one that suits the data."
        for name, value in (("nbeta", self.nbeta), ("localization", self.localization)):
            if value is not None:
                plain[name] = number(value, name, above=0, advice=advice)
        if not isinstance(self.step_size, str) or self.step_size != "auto":
            advice = "Give a positive number, or 'auto'."
            plain["step_size"] = number(self.step_size, "step_size", above=0, advice=advice)
        for name, found in plain.items():
            object.__setattr__(self, name, found)

    def neighbourhood(
        self,
        net: nn.Module | FunctionalModel,
        data: Any,
        loss: Likelihood | Loss,
        *,
        subset: str | Iterable[str] | None,
        realisable: bool,
        seed: int,
    ) -> Neighbourhood:
        """What is sampled; see `Neighbourhood.of`."""
        return Neighbourhood.of(
            net,
            data,
            loss,
            nbeta=self.nbeta,
            localization=self.localization,
            metric=self.metric,
            batch_size=self.batch_size,
            subset=subset,
            realisable=realisable,
            seed=seed,
        )

    @property
    def fixed_step(self) -> float | None:
        """The step size that was given."""
        return None if self.step_size == "auto" else float(self.step_size)

    def sampler_for(self, around: Neighbourhood) -> SamplerName:
        """The sampler; where none was named, HMC as long as all data are cheap.

        Parameters
        ----------
        around
            What is sampled.

        Returns
        -------
        str
            Its name.
        """
        if self.sampler != "auto":
            return self.sampler
        if self.batch_size is not None or self.fixed_step is not None:  # which are its options
            return "langevin"
        size = around.num_parameters * around.num_examples
        few = around.num_parameters <= _HMC_PARAMETERS and size <= _HMC_SIZE
        return "hmc" if few else "langevin"

    def draws_of(self, sampler: SamplerName) -> int:
        """Draws of each chain.

        Parameters
        ----------
        sampler
            That makes them.

        Returns
        -------
        int
            The number given, or what suits the sampler.
        """
        return _DEFAULT_DRAWS[sampler] if self.num_draws is None else self.num_draws
