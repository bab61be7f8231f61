"""What a sampler returns: draws of several chains, what was measured on the way, how they mixed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from pushforward.errors import OptionError
from pushforward.runs.estimate import Check, Cost, Status, to_jsonable, worst_status
from pushforward.sampling.diagnostics import Diagnosis, diagnose, diagnostic_checks
from pushforward.typing import Params

if TYPE_CHECKING:
    import xarray

__all__ = ["Chains", "Moments"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance of the parameters of each chain, kept without keeping the draws.

    Parameters
    ----------
    count
        Draws they are of.
    mean, variance
        ``(chain, *shape)`` float64 by name; the variance is unbiased, and NaN for a single draw.
    """

    count: int
    mean: Params
    variance: Params


@dataclass(frozen=True, eq=False)
class Chains:
    """Draws of several chains.

    Parameters
    ----------
    parameters
        ``(chain, draw, *shape)`` by name; empty when they were not kept.
    observations
        ``(chain, draw, ...)``: what `record` made of the draws.
    statistics
        ``(chain, draw)``: what the kernel said of the steps that ended in the draws, such as
        ``"potential"``, minus the log density, and ``"acceptance"``.
    warmup_statistics
        The same for the warm-up, ``(chain, step)``.
    moments
        Of the parameters.
    kernel
        Name of the sampler.
    settings
        Its target and settings, as fingerprints and numbers.
    num_warmup, thin, seed
        Of the run.
    last
        ``(chain, *shape)`` by name: where the chains are now; ``initial=chains.last`` begins
        another run there.
    run_checks
        What happened during the run.
    cost
        What it took; an evaluation is one step of one chain.
    """

    parameters: Params = field(repr=False, metadata={"json": False})
    observations: dict[str, Tensor] = field(repr=False, metadata={"json": False})
    statistics: dict[str, Float[Tensor, "chain draw"]] = field(repr=False, metadata={"json": False})
    warmup_statistics: dict[str, Float[Tensor, "chain step"]] = field(
        repr=False, metadata={"json": False}
    )
    moments: Moments = field(repr=False, metadata={"json": False})
    kernel: str
    settings: Mapping[str, Any]
    num_warmup: int
    thin: int
    seed: int
    last: Params = field(repr=False, metadata={"json": False})
    run_checks: tuple[Check, ...]
    cost: Cost

    @property
    def num_chains(self) -> int:
        """How many chains there are."""
        return len(next(iter(self.moments.mean.values())))

    @property
    def num_draws(self) -> int:
        """Draws of each chain."""
        return self.moments.count

    @cached_property
    def diagnosis(self) -> Diagnosis:
        """R-hat, effective sample sizes and Monte Carlo errors.

        Of ``"potential"``, of everything in `observations` and of the parameters. Of more than 200
        numbers under one name, 200 spread evenly.
        """
        return diagnose(self.parameters, self.observations, self.statistics)

    @cached_property
    def checks(self) -> tuple[Check, ...]:
        """What happened during the run, and whether the chains agree."""
        return (*self.run_checks, *diagnostic_checks(self.diagnosis))

    @property
    def status(self) -> Status:
        """The worst status among the checks."""
        return worst_status(self.checks)

    def draws(self) -> Params:
        """The parameters of all chains one after the other.

        Returns
        -------
        dict
            ``(chains * draws, *shape)`` by name.

        Raises
        ------
        OptionError
            When they were not kept.
        """
        if not self.parameters:
            raise OptionError(
                "the parameters were not kept",
                where="parameters",
                advice="Sample with keep_parameters=True.",
            )
        return {name: value.flatten(0, 1) for name, value in self.parameters.items()}

    def apply(self, function: Callable[[Params], Tensor], *, chunk_size: int | None = 64) -> Tensor:
        """A function of the parameters at every draw.

        Parameters
        ----------
        function
            From one draw's parameters by name to a tensor, of operations that `torch.func.vmap`
            understands: ``lambda p: model(p, x)``.
        chunk_size
            Draws taken at a time.

        Returns
        -------
        Tensor
            ``(chain, draw, ...)``.
        """
        with torch.no_grad():
            values = vmap(function, chunk_size=chunk_size)(self.draws())
        return values.unflatten(0, (self.num_chains, self.num_draws))

    def to_datatree(self) -> xarray.DataTree:
        """The draws in the schema of ArviZ.

        Returns
        -------
        xarray.DataTree
            Groups ``posterior``, ``sample_stats``, ``warmup_sample_stats`` and
            ``posterior_predictive`` (the observations), with dimensions ``chain`` and ``draw``.

        Raises
        ------
        OptionError
            When xarray is not installed.
        """
        from pushforward.sampling.datatree import to_datatree

        return to_datatree(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a safetensors file.

        Parameters
        ----------
        path
            Replaced if it exists, and never half written.
        """
        from pushforward.sampling.storage import save_chains

        save_chains(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Chains:
        """Read what `save` has written.

        Parameters
        ----------
        path
            The file.

        Returns
        -------
        Chains
            Bit for bit.

        Raises
        ------
        WeightsError
            If it is damaged, or something else.
        """
        from pushforward.sampling.storage import load_chains

        return load_chains(path)

    def plot(self) -> Any:
        """Traces of the potential and of what was recorded, one line a chain.

        Returns
        -------
        matplotlib.figure.Figure
            The warm-up in grey before the draws.

        Raises
        ------
        OptionError
            When matplotlib is not installed.
        """
        from pushforward.sampling.plots import plot_traces

        return plot_traces(self)

    def to_dict(self) -> dict[str, Any]:
        """Settings, diagnostics, checks and cost, ready for JSON; the draws go to `save`.

        Returns
        -------
        dict
            Plain Python objects.
        """
        fields: dict[str, Any] = to_jsonable(self)
        return fields | {
            "num_chains": self.num_chains,
            "num_draws": self.num_draws,
            "diagnosis": self.diagnosis.to_dict(),
            "checks": to_jsonable(self.checks),
        }

    def __repr__(self) -> str:
        size = sum(value[0].numel() for value in self.moments.mean.values())
        lines = [
            f"Chains of {self.kernel}: {self.num_chains} chains, {self.num_draws:,} draws of "
            f"{size:,} parameters (warm-up {self.num_warmup:,}, thin {self.thin})"
        ]
        lines += [f"  {line}" for line in self.diagnosis.lines()]
        cost = self.cost
        lines.append(f"  cost: {cost.seconds:.3g} s, {cost.evaluations:,} steps of single chains")
        lines += [f"  {check}" for check in self.checks if check.status != "pass"]
        return "\n".join(lines)
