"""Chains around a solution: which sampler moves them, and how far they have come."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vmap

from pushforward.degeneracy.neighbourhood import Neighbourhood
from pushforward.errors import SamplingError
from pushforward.runs.rng import derived_seed
from pushforward.sampling.chains import Chains
from pushforward.sampling.hmc import HMC
from pushforward.sampling.kernel import Kernel
from pushforward.sampling.mala import MALA
from pushforward.sampling.runner import RecordAll, sample
from pushforward.sampling.sgld import SGLD
from pushforward.typing import Params

__all__ = ["SamplerName", "Walk", "Walked"]

SamplerName: TypeAlias = Literal["langevin", "sgld", "hmc", "mala"]
"""Langevin is SGLD with averaged noise; the last two have a Metropolis test on all data."""


_FAR = 100.0
LEAPFROG_STEPS = 16  # of a trajectory, on average


@dataclass(frozen=True, eq=False)
class Walked:
    """What some steps of all chains gave.

    Parameters
    ----------
    chains
        As the runner returns them.
    excess
        ``(chain, draw)`` float64: ``n beta (L(w) - L(w*))``, estimated from minibatches if there
        are any. NaN where a chain was lost.
    squared_distance
        ``(chain, draw)``: from ``w*``, in units of the scale.
    losses
        ``(chain, draw, N)``: of every example, where they were asked for.
    virials
        ``(chain, draw)``: ``(w - w*) . grad U`` on all data, where it was asked for.
    """

    chains: Chains
    excess: Float[Tensor, "chain draw"]
    squared_distance: Float[Tensor, "chain draw"]
    losses: Float[Tensor, "chain draw examples"] | None
    virials: Float[Tensor, "chain draw"] | None

    @property
    def alive(self) -> Tensor:
        """``(chain,)`` boolean: those that are finite to the end."""
        return torch.isfinite(self.excess).all(1) & torch.isfinite(self.positions).all(1)

    @property
    def positions(self) -> Float[Tensor, "chain P"]:
        """Where the chains are now."""
        return torch.cat([value.flatten(1) for value in self.chains.last.values()], 1)

    def survivors(self) -> Params:
        """Positions of the chains that are alive, by name.

        Returns
        -------
        dict
            ``(alive, *shape)``.
        """
        return {name: value[self.alive] for name, value in self.chains.last.items()}


@dataclass(frozen=True, eq=False)
class Walk:
    """How chains are moved.

    Parameters
    ----------
    around
        What is sampled.
    sampler
        By which kernel.
    seed
        Of all runs.
    checkpoint
        Folder in which every run has its own.
    progress
        Whether to show bars.
    """

    around: Neighbourhood
    sampler: SamplerName
    seed: int
    checkpoint: str | os.PathLike[str] | None = None
    progress: bool | None = None

    @property
    def learns(self) -> bool:
        """Whether the sampler finds its own step size."""
        return self.sampler in {"hmc", "mala"}

    @property
    def batch_size(self) -> int:
        """Examples in a gradient."""
        size = self.around.potential.batch_size
        return self.around.num_examples if size is None or self.learns else size

    @property
    def steps_per_draw(self) -> int:
        """Gradients in one step of the sampler, on average: those of a trajectory for HMC."""
        return LEAPFROG_STEPS if self.sampler == "hmc" else 1

    @property
    def passes_per_step(self) -> int:
        """Examples that one step of one chain takes through the network, on average."""
        return self.batch_size * self.steps_per_draw

    def kernel(self, step_size: float | None) -> Kernel:
        """The sampler.

        Parameters
        ----------
        step_size
            Of SGLD's convention; of HMC and MALA None to learn it.

        Returns
        -------
        Kernel
            For `sample`.
        """
        around = self.around
        if self.learns:
            whole = replace(around.potential, batch_size=None)
            mass = "diagonal" if around.euclidean else around.scale.square().reciprocal()
            if self.sampler == "hmc":
                return HMC(whole, step_size=step_size, mass=mass, num_steps=LEAPFROG_STEPS)
            return MALA(whole, step_size=step_size, mass=mass)
        assert step_size is not None
        return SGLD(
            around.potential,
            step_size=step_size,
            preconditioner=None if around.euclidean else around.scale.square(),
            averaged_noise=self.sampler == "langevin",
        )

    def run(
        self,
        name: str,
        *,
        steps: int,
        start: Params | int,
        step_size: float | None = None,
        warmup: int = 0,
        thin: int = 1,
        losses: bool = False,
        virials: bool = False,
    ) -> Walked:
        """Move chains.

        Parameters
        ----------
        name
            Of this run: it has its own noise and its own folder.
        steps
            Draws of each chain.
        start
            Where from, ``(chains, *shape)`` by name; or how many chains are to start at ``w*``.
        step_size
            Of the kernel.
        warmup
            Steps in which the sampler learns.
        thin
            Steps a draw.
        losses
            Whether to note the loss of every example at every draw.
        virials
            Whether to note the virial at every draw, which takes a gradient.

        Returns
        -------
        Walked
            Chains that died included.

        Raises
        ------
        KeyboardInterrupt
            When it was interrupted; what was walked is in the folder.
        """
        around = self.around
        known = around.initial_loss  # which reads the data: not for the first time under vmap
        if isinstance(start, int):
            centre = around.potential.model.parameters
            start = {name: p.expand(start, *p.shape) for name, p in centre.items()}
        num_chains = len(next(iter(start.values())))

        def record(parameters: Params) -> dict[str, Tensor]:
            noted = {"squared_distance": around.squared_distances(parameters)}
            if losses:
                at_once = partial(around.potential.example_losses, at_once=num_chains)
                noted["losses"] = vmap(at_once)(parameters)
            if virials:
                noted["virials"] = around.virials(parameters)
            return noted

        chains = sample(
            self.kernel(step_size),
            num_draws=steps,
            num_chains=num_chains,
            num_warmup=warmup,
            thin=thin,
            initial=start,
            record=RecordAll(record),
            keep_parameters=False,
            seed=derived_seed(self.seed, name),
            checkpoint=None if self.checkpoint is None else Path(self.checkpoint) / name,
            progress=self.progress,
        )
        if chains.num_draws < steps:  # Ctrl-C, which the runner takes as an end; here it is not
            raise KeyboardInterrupt
        found = chains.observations.get("losses")
        distance = chains.observations["squared_distance"]
        if found is None:
            excess = around.excess(chains.statistics["potential"], distance)
        else:
            mean = found.mean(-1, dtype=torch.float64)
            excess = around.nbeta * (mean - known)
        return Walked(chains, excess, distance, found, chains.observations.get("virials"))

    def attempt(
        self, name: str, *, steps: int, start: Params | int, step_size: float
    ) -> Walked | None:
        """The same as `run`; None when any chain was lost.

        Returns
        -------
        Walked or None
            With all chains alive.
        """
        try:
            walked = replace(self, checkpoint=None, progress=False).run(
                name, steps=steps, start=start, step_size=step_size
            )
        except SamplingError:
            return None
        lost = not bool(walked.alive.all()) or self.ran_away(walked)
        return None if lost else walked

    def ran_away(self, walked: Walked) -> bool:
        """Whether a chain was, for a while, where no equilibrium is.

        Parameters
        ----------
        walked
            Chains that are alive.

        Returns
        -------
        bool
            At a minimum the mean excess is at most half the number of parameters; a chain that rose
            to two hundred times that, from much lower, has felt an unstable step. It may have come
            back since, to where all units are dead.
        """
        peak, first = walked.excess.amax(1), walked.excess[:, 0].abs()
        usual = torch.maximum(first, torch.full_like(first, self.around.num_parameters + 10.0))
        return bool((peak > _FAR * usual).any())
