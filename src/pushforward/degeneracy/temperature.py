"""``pf.learning_coefficient_map``: over step size and temperature, a short run in each cell."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pushforward.degeneracy.agreement import agreement
from pushforward.degeneracy.calibration import calibrate
from pushforward.degeneracy.neighbourhood import Metric, Neighbourhood
from pushforward.degeneracy.settings import Settings
from pushforward.degeneracy.walk import Walk
from pushforward.errors import OptionError, SamplingError
from pushforward.networks.likelihoods import Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.runs.distributed import ProcessGrid
from pushforward.runs.progress import track
from pushforward.runs.rng import derived_seed
from pushforward.runs.store import Checkpoint
from pushforward.sampling.potential import Loss

__all__ = ["EpsilonBetaMap", "learning_coefficient_map"]

_RATIO = 4.0  # of neighbours in either direction
_STEPS_BELOW, _STEPS_ABOVE = 4, 2  # the calibrated step size
_BETAS_BELOW, _BETAS_ABOVE = 2, 3  # the default temperature
_LARGEST_R_HAT, _FEWEST_EFFECTIVE = 1.2, 20  # of so short a run
_HOT = 10.0  # times the number of parameters, half of which is what heat alone gives
_AGREE = 0.1  # of the value: neighbours on a plateau


@dataclass(frozen=True, repr=False)
class EpsilonBetaMap:
    """Estimates of short runs on a grid of step sizes and inverse temperatures.

    No cell is extrapolated in the step size: the map shows what a step size does.

    Parameters
    ----------
    step_sizes
        ``eps``, ascending, the columns.
    nbetas
        ``n beta``, ascending, the rows.
    values
        ``(nbetas, step_sizes)``: of the chains that stayed finite; NaN where there were none, and
        in cells that an interruption left out.
    standard_errors
        Theirs.
    dead
        Chains that were lost: not finite, or with twenty times the loss that heat can give them.
    settled
        Whether the second half of the draws agrees with the first, and the chains with each other.
    done
        False in cells that an interruption left out.
    localization
        ``gamma``, the same in all cells.
    sampler
        That moved the chains.
    num_chains, num_draws
        Of each cell.
    """

    step_sizes: tuple[float, ...]
    nbetas: tuple[float, ...]
    values: Float[Tensor, "nbetas steps"]
    standard_errors: Float[Tensor, "nbetas steps"]
    dead: Int[Tensor, "nbetas steps"]
    settled: Bool[Tensor, "nbetas steps"]
    done: Bool[Tensor, "nbetas steps"]
    _: KW_ONLY
    localization: float
    sampler: str
    num_chains: int
    num_draws: int

    @property
    def plateau(self) -> Bool[Tensor, "nbetas steps"]:
        """Where the step size does not matter.

        No chain was lost, chains have settled, and the next smaller or larger step size that is as
        good gives the same within 10 % or two standard errors.
        """
        good = self.done & (self.dead == 0) & self.settled & (self.values > 0)
        close = torch.zeros_like(good)
        for column in range(len(self.step_sizes) - 1):
            here, there = slice(column, column + 1), slice(column + 1, column + 2)
            change = (self.values[:, here] - self.values[:, there]).abs()
            error = self.standard_errors[:, here].hypot(self.standard_errors[:, there])
            size = _AGREE * self.values[:, there].abs()
            agree = (change <= torch.maximum(2 * error, size)) & good[:, here] & good[:, there]
            close[:, here] |= agree
            close[:, there] |= agree
        return close

    def plot(self) -> Any:
        """Heat map, the plateau framed.

        Returns
        -------
        matplotlib.figure.Figure
            Where chains died cells are grey.

        Raises
        ------
        OptionError
            When matplotlib is not installed.
        """
        from pushforward.degeneracy.sweep_plots import plot_map

        return plot_map(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON; numbers that are not finite become None.

        Returns
        -------
        dict
            Axes, and what was found in every cell as nested lists.
        """
        found: dict[str, Any] = {
            "step_sizes": list(self.step_sizes),
            "nbetas": list(self.nbetas),
            "localization": self.localization,
            "sampler": self.sampler,
            "num_chains": self.num_chains,
            "num_draws": self.num_draws,
        }
        for name in ("values", "standard_errors", "dead", "settled", "done", "plateau"):
            rows = getattr(self, name).tolist()
            found[name] = [[x if isfinite(x) else None for x in row] for row in rows]
        return found

    def __repr__(self) -> str:
        lines = [
            f"Learning coefficient over step size (columns) and n beta (rows), {self.sampler}, "
            f"{self.num_chains} x {self.num_draws:,} draws, localization {self.localization:.4g}",
            " " * 10 + "".join(f"{step:>10.2g} " for step in self.step_sizes),
        ]
        plateau = self.plateau
        for i in reversed(range(len(self.nbetas))):
            cells = ""
            for j in range(len(self.step_sizes)):
                value, dead = float(self.values[i, j]), int(self.dead[i, j])
                text = f"{dead} lost" if dead else f"{value:.3g}" if isfinite(value) else "-"
                cells += f"{text:>10}" + ("*" if bool(plateau[i, j]) else " ")
            lines.append(f"{self.nbetas[i]:>10.4g}{cells}")
        lines.append("* plateau: a neighbouring step size gives the same")
        return "\n".join(lines)


def learning_coefficient_map(
    net: nn.Module | FunctionalModel,
    data: Any,
    loss: Likelihood | Loss,
    *,
    step_sizes: Sequence[float] | None = None,
    nbetas: Sequence[float] | None = None,
    localization: float | None = None,
    metric: Metric = "euclidean",
    sampler: Literal["langevin", "sgld"] = "langevin",
    num_chains: int = 4,
    num_draws: int = 200,
    num_warmup: int | None = None,
    batch_size: int | None = None,
    subset: str | Iterable[str] | None = None,
    realisable: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> EpsilonBetaMap:
    """Map the learning coefficient over step sizes and temperatures, a short run each.

    What to look for is a plateau: at too small a step size chains do not get far enough in their
    draws, at too large a one they are hot or lost.

    Parameters
    ----------
    net, data, loss, metric, batch_size, subset, realisable
        As in `learning_coefficient`.
    step_sizes
        ``eps``. Default: seven, by factors of 4, around the one that the curvature asks for at
        ``n / ln n``.
    nbetas
        ``n beta``. Default: six, by factors of 4, around ``n / ln n``.
    localization
        ``gamma``, the same in all cells. Default: what a run of so many draws needs at
        ``n / ln n``.
    sampler
        ``"langevin"``, or ``"sgld"``, which feels the step size more.
    num_chains, num_draws
        Of each cell.
    num_warmup
        Steps before the draws. Default: as many as draws.
    seed
        Of all noise.
    checkpoint
        Folder in which finished cells are kept: the same call goes on from there.
    progress
        Whether to show a bar; None: on a terminal, when it takes long.

    Returns
    -------
    EpsilonBetaMap
        When interrupted (Ctrl-C), with the cells until then.

    Raises
    ------
    OptionError
        For an option out of range, or a sampler that finds its own step size.
    SamplingError
        When no step size can be found to lay the grid around.
    KeyboardInterrupt
        When no cell was finished.

    Examples
    --------
    >>> import torch, pushforward as pf
    >>> x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> net = torch.nn.Linear(2, 1, bias=False).double().eval()
    >>> found = learning_coefficient_map(
    ...     net, (x, net(x).detach()), pf.Gaussian(noise_variance=1.0), localization=1.0,
    ...     step_sizes=[0.01, 0.04, 4.0], nbetas=[12.0], num_draws=100,
    ... )
    >>> found.dead.tolist()
    [[0, 0, 4]]
    """
    if sampler not in {"langevin", "sgld"}:
        raise OptionError(
            f"{sampler!r} finds its own step size",
            where="sampler",
            advice="Take 'langevin' or 'sgld'.",
        )
    settings = Settings(
        localization=localization,
        metric=metric,
        sampler=sampler,
        num_chains=num_chains,
        num_draws=num_draws,
        num_warmup=num_draws if num_warmup is None else num_warmup,
        batch_size=batch_size,
    )

    def around(nbeta: float | None) -> Neighbourhood:
        return replace(settings, nbeta=nbeta).neighbourhood(
            net, data, loss, subset=subset, realisable=realisable, seed=seed
        )

    middle = around(None)
    if localization is None or step_sizes is None:
        walk = Walk(middle, sampler, seed, None, progress=False)
        found = calibrate(
            walk,
            num_chains=num_chains,
            num_draws=num_draws,
            step_size=None,
            localize=localization is None,
        )
        settings = replace(settings, localization=found.walk.around.localization)
        powers = range(-_STEPS_BELOW, _STEPS_ABOVE + 1)
        if step_sizes is None:
            step_sizes = [found.step_size * _RATIO**power for power in powers]
    if nbetas is None:
        powers = range(-_BETAS_BELOW, _BETAS_ABOVE + 1)
        nbetas = [middle.nbeta * _RATIO**power for power in powers]
    gamma = settings.localization
    assert gamma is not None
    steps, betas = _axis(step_sizes, "step_sizes"), _axis(nbetas, "nbetas")
    for step in steps:
        replace(settings, step_size=step)  # refused now, not when its turn comes
    shape = len(betas), len(steps)
    cells = torch.full((4, *shape), torch.nan, dtype=torch.float64)
    with track(len(betas) * len(steps), "Map", enabled=progress) as advance:
        try:
            for i, nbeta in enumerate(betas):
                there = around(nbeta)
                for j, step in enumerate(steps):
                    cells[:, i, j] = _cell(there, settings, step, seed, checkpoint, (i, j))
                    advance(1, f"n beta {nbeta:.3g}, step size {step:.2g}")
        except KeyboardInterrupt:
            if not bool(cells[2].isfinite().any()):
                raise
    return EpsilonBetaMap(
        step_sizes=steps,
        nbetas=betas,
        values=cells[0],
        standard_errors=cells[1],
        dead=cells[2].nan_to_num(0).long(),
        settled=cells[3] == 1,
        done=cells[2].isfinite(),
        localization=gamma,
        sampler=sampler,
        num_chains=num_chains,
        num_draws=num_draws,
    )


def _cell(
    around: Neighbourhood,
    settings: Settings,
    step_size: float,
    seed: int,
    folder: str | os.PathLike[str] | None,
    place: tuple[int, int],
) -> Float[Tensor, "4"]:
    """Value, its error, lost chains, and whether it has settled, of one run."""
    own = derived_seed(seed, "cell", repr(around.nbeta), repr(step_size))
    store = None
    if folder is not None:
        identity = {
            "target": around.potential.identity(),
            "settings": asdict(settings),
            "step_size": step_size,
            "seed": seed,
        }
        name = f"nbeta-{place[0]:02d}-step-{place[1]:02d}"
        store = Checkpoint(Path(folder) / name, identity)
        saved = store.load()
        if saved is not None:
            return saved[0]["cell"]
    assert settings.sampler != "auto"
    walk = Walk(around, settings.sampler, own, None, progress=False)
    found = torch.tensor([torch.nan, torch.nan, settings.num_chains, 0.0], dtype=torch.float64)
    try:
        walked = walk.run(
            "cell",
            steps=settings.draws_of(walk.sampler),
            start=settings.num_chains,
            step_size=step_size,
            warmup=settings.num_warmup or 0,
        )
    except SamplingError:
        pass  # all chains were lost, which is what the map is to show
    else:
        # A chain that has grown for some hundred steps need not have overflowed yet.
        alive = walked.alive & (walked.excess.mean(1) < _HOT * around.num_parameters)
        if bool(alive.any()):
            seen = agreement(walked.excess[alive])
            dead = float((~alive).sum())
            mixed = seen.r_hat < _LARGEST_R_HAT and seen.effective_draws > _FEWEST_EFFECTIVE
            numbers = [seen.mean, seen.standard_error, dead, float(seen.settled and mixed)]
            found = torch.tensor(numbers, dtype=torch.float64)
    if store is not None and ProcessGrid.from_environment().is_first:
        store.save({"cell": found}, {})
    return found


def _axis(values: Iterable[float], name: str) -> tuple[float, ...]:
    found = tuple(sorted({float(value) for value in values}))
    if not found or not all(isfinite(value) and value > 0 for value in found):
        raise OptionError(
            f"{list(found)} is no axis", where=name, advice="Give one positive number or more."
        )
    return found
