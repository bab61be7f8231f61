"""``pf.learning_coefficient_sweep``: many checkpoints, measured so that they can be compared."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn

from pushforward.degeneracy.calibration import calibrate, settling
from pushforward.degeneracy.checkpoint_weights import Label, Weights, check_weights, loaded
from pushforward.degeneracy.coefficient import LearningCoefficient
from pushforward.degeneracy.estimate import coefficient_of
from pushforward.degeneracy.neighbourhood import Metric, Neighbourhood
from pushforward.degeneracy.schedule import walk_through
from pushforward.degeneracy.settings import SamplerChoice, Settings
from pushforward.degeneracy.stored import coefficient_from, parts_of
from pushforward.degeneracy.sweep import CheckpointSweep
from pushforward.degeneracy.walk import Walk
from pushforward.errors import NetworkError, OptionError, PushforwardError
from pushforward.networks.likelihoods import Likelihood
from pushforward.runs.distributed import ProcessGrid
from pushforward.runs.progress import Advance, track
from pushforward.runs.rng import derived_seed
from pushforward.runs.store import Checkpoint, fingerprint
from pushforward.sampling.potential import Loss
from pushforward.typing import Params

__all__ = ["learning_coefficient_sweep"]

_AWAY = "away:"
_LEFT = frozenset({"NOT_A_MINIMUM", "DEAD_CHAINS"})  # of which chains tell nothing to the next


def learning_coefficient_sweep(
    net: nn.Module,
    checkpoints: Mapping[Label, Weights] | Sequence[tuple[Label, Weights]],
    data: Any,
    loss: Likelihood | Loss,
    *,
    nbeta: float | None = None,
    localization: float | None = None,
    metric: Metric = "euclidean",
    sampler: SamplerChoice = "auto",
    num_chains: int = 8,
    num_draws: int | None = None,
    num_warmup: int | None = None,
    batch_size: int | None = None,
    step_size: float | Literal["auto"] = "auto",
    subset: str | Iterable[str] | None = None,
    realisable: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> CheckpointSweep:
    """Estimate the local learning coefficient at every checkpoint of a training, alike.

    All checkpoints get the same ``n beta``, the same localisation and the same step size, so that
    differences between them are not those of the measurement. Chains of a checkpoint begin at its
    weights plus the displacements at which those of the checkpoint before ended.

    Parameters
    ----------
    net
        In evaluation mode; it is copied, its own weights do not matter.
    checkpoints
        Labels, such as steps of the training, and weights: state dicts, paths of safetensors
        files, or modules. In the order in which they are to be walked.
    data, loss
        As in `learning_coefficient`, the same for all.
    nbeta, metric, sampler, num_chains, num_draws, num_warmup, batch_size, subset, realisable
        As in `learning_coefficient`.
    localization
        ``gamma``. Default: the largest that any checkpoint needs.
    step_size
        ``eps``. Default: the smallest that the curvature at any checkpoint asks for. Samplers with
        a Metropolis test learn theirs at each.
    seed
        Of all noise; each checkpoint has its own.
    checkpoint
        Folder in which finished checkpoints and the state of the one at work are kept: the same
        call goes on from there, to the same result bit for bit. Checkpoints may be added at the end
        if `localization` is given, and `step_size` where the sampler does not learn it.
    progress
        Whether to show a bar; None: on a terminal, when it takes long.

    Returns
    -------
    CheckpointSweep
        When interrupted (Ctrl-C), the checkpoints until then.

    Raises
    ------
    OptionError
        For no checkpoints, two of the same label, or an option out of range.
    WeightsError
        For weights that do not belong to the network, naming checkpoint and parameter, or a folder
        that belongs to another sweep.
    NetworkError
        For what is no module, or weights that are not finite.
    SamplingError
        When no chain stays finite at a checkpoint, which the message names.
    KeyboardInterrupt
        When no checkpoint was finished.

    Examples
    --------
    >>> import torch, pushforward as pf
    >>> x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> net = torch.nn.Linear(2, 1, bias=False).double().eval()
    >>> weights = {step: {"weight": torch.full((1, 2), step / 10.0)} for step in (0, 10)}
    >>> sweep = learning_coefficient_sweep(
    ...     net, weights, (x, x.sum(1, keepdim=True)), pf.Gaussian(noise_variance=1.0),
    ...     sampler="langevin", num_draws=100, num_warmup=100, progress=False,
    ... )
    >>> sweep.not_minima
    (0,)
    """
    settings = Settings(
        nbeta=nbeta,
        localization=localization,
        metric=metric,
        sampler=sampler,
        num_chains=num_chains,
        num_draws=num_draws,
        num_warmup=num_warmup,
        batch_size=batch_size,
        step_size=step_size,
    )
    if not isinstance(net, nn.Module):
        raise NetworkError(
            f"got {type(net).__name__}",
            where="net",
            advice="Pass the torch.nn.Module into which the checkpoints are to be loaded.",
        )
    named = _named(checkpoints)
    for label, weights in named.items():
        check_weights(net, label, weights)
    sweep = _Sweep(net, named, data, loss, settings, subset, realisable, seed, checkpoint)
    done: list[tuple[Label, LearningCoefficient]] = []
    with track(len(named), "Checkpoints", enabled=progress) as advance:
        try:
            sweep = replace(sweep, settings=sweep.shared_settings())
            for entry in sweep.walked(advance):
                done.append(entry)  # noqa: PERF402 - what is done is kept when interrupted
        except KeyboardInterrupt:
            if not done:
                raise
    return CheckpointSweep(
        entries=tuple(done), missing=tuple(named)[len(done) :], step_size=sweep.shared_step
    )


@dataclass(frozen=True, eq=False)
class _Sweep:
    """The arguments of a call, and the two passes over the checkpoints."""

    net: nn.Module
    named: Mapping[Label, Weights]
    data: Any
    loss: Likelihood | Loss
    settings: Settings
    subset: str | Iterable[str] | None
    realisable: bool
    seed: int
    folder: str | os.PathLike[str] | None

    @property
    def shared_step(self) -> float:
        step = self.settings.fixed_step
        return torch.nan if step is None else step

    def around(self, label: Label) -> Neighbourhood:
        return self.settings.neighbourhood(
            loaded(self.net, label, self.named[label]),
            self.data,
            self.loss,
            subset=self.subset,
            realisable=self.realisable,
            seed=self.seed_of(label),
        )

    def seed_of(self, label: Label) -> int:
        return derived_seed(self.seed, "checkpoint", str(label))

    def walk(self, around: Neighbourhood, label: Label, folder: Path | None) -> Walk:
        sampler = self.settings.sampler_for(around)
        return Walk(around, sampler, self.seed_of(label), folder, progress=False)

    def store(self, name: str, identity: Mapping[str, Any]) -> Checkpoint | None:
        return None if self.folder is None else Checkpoint(Path(self.folder) / name, identity)

    def shared_settings(self) -> Settings:
        """With the largest localisation and the smallest step size that any checkpoint needs."""
        settings, labels = self.settings, tuple(self.named)
        with _at(labels[0]):
            first = self.around(labels[0])
            learns = self.walk(first, labels[0], None).learns
        settings = replace(settings, nbeta=first.nbeta)
        if settings.localization is not None and (learns or settings.fixed_step is not None):
            return settings
        networks = {str(label): _identity(self.net, self.named[label]) for label in labels}
        identity = {"first": first.potential.identity(), "networks": networks}
        store = self.store("calibration", self._identity() | identity)
        saved = None if store is None else store.load()
        if saved is not None:
            return replace(settings, **saved[1])
        found = self._settled(labels) if learns else self._calibrated(labels)
        if store is not None and ProcessGrid.from_environment().is_first:
            store.save({}, found)
        return replace(settings, **found)

    def _settled(self, labels: Sequence[Label]) -> dict[str, Any]:
        """What samplers that learn their own step size need: a localisation."""
        gammas = list[float]()
        for label in labels:
            with _at(label):
                walk = self.walk(self.around(label), label, None)
                held = settling(
                    walk,
                    num_chains=self.settings.num_chains,
                    num_draws=self.settings.draws_of(walk.sampler),
                )
            gammas.append(held.around.localization)
        return {"localization": max(gammas)}

    def _calibrated(self, labels: Sequence[Label]) -> dict[str, Any]:
        localize = self.settings.localization is None
        gammas, steps = dict[Label, float](), dict[Label, float]()
        for label in labels:
            gammas[label], steps[label] = self._calibrated_at(label, None, localize=localize)
        gamma = max(gammas.values())
        for label in labels:
            if gammas[label] < gamma:  # chains that are held closer may feel another curvature
                _, steps[label] = self._calibrated_at(label, gamma, localize=False)
        return {"localization": gamma, "step_size": min(steps.values())}

    def _calibrated_at(
        self, label: Label, localization: float | None, *, localize: bool
    ) -> tuple[float, float]:
        settings = self.settings
        with _at(label):
            around = self.around(label)
            around = around if localization is None else around.localized(localization)
            walk = self.walk(around, label, None)
            found = calibrate(
                walk,
                num_chains=settings.num_chains,
                num_draws=settings.draws_of(walk.sampler),
                step_size=settings.fixed_step,
                localize=localize,
            )
        return found.walk.around.localization, found.step_size

    def walked(self, advance: Advance) -> Iterator[tuple[Label, LearningCoefficient]]:
        """One checkpoint after the other.

        Yields
        ------
        tuple
            Label and estimate.
        """
        away: Params | None = None
        for number, label in enumerate(self.named):
            with _at(label):
                found, away = self._walked_one(number, label, away)
            advance(1, f"{label}: {found.value:.4g}")
            yield label, found

    def _walked_one(
        self, number: int, label: Label, away: Params | None
    ) -> tuple[LearningCoefficient, Params | None]:
        """The estimate, and where the chains ended relative to the weights."""
        began = perf_counter()
        around = self.around(label)
        identity = self._identity() | {
            "label": label,
            "target": around.potential.identity(),
            "start": None if away is None else fingerprint(away),
        }
        store = self.store(f"{number:04d}", identity)
        saved = None if store is None else store.load()
        if saved is not None:
            return _unpacked(*saved)
        running = None if store is None else Path(store.folder) / "running"
        walk = self.walk(around, label, running)
        centre = around.potential.model.parameters
        start = None if away is None else _displaced(centre, away, self.settings.num_chains)
        runs = walk_through(walk, self.settings, start)
        found = coefficient_of(runs, walk.seed, perf_counter() - began)
        ended: Params | None = None
        if found.verdict not in _LEFT:
            ended = {n: p - centre[n] for n, p in runs.spaced.survivors().items()}
        if store is not None and ProcessGrid.from_environment().is_first:
            tensors, plain = parts_of(found)
            tensors |= {f"{_AWAY}{name}": value for name, value in (ended or {}).items()}
            store.save(tensors, plain)
            shutil.rmtree(Path(store.folder) / "running", ignore_errors=True)
        return found, ended

    def _identity(self) -> dict[str, Any]:
        return {"settings": asdict(self.settings), "seed": self.seed, "realisable": self.realisable}


def _unpacked(
    tensors: Params, plain: Mapping[str, Any]
) -> tuple[LearningCoefficient, Params | None]:
    away = {n.removeprefix(_AWAY): t for n, t in tensors.items() if n.startswith(_AWAY)}
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_AWAY)}
    return coefficient_from(own, plain), away or None


def _displaced(centre: Params, away: Params, num_chains: int) -> Params:
    """Weights plus displacements; those of survivors are used again for chains that were lost."""
    return {
        name: centre[name] + value[torch.arange(num_chains) % len(value)].to(centre[name])
        for name, value in away.items()
    }


def _identity(net: nn.Module, weights: Weights) -> str:
    return fingerprint(loaded(net, "", weights).state_dict())


def _named(
    checkpoints: Mapping[Label, Weights] | Sequence[tuple[Label, Weights]],
) -> dict[Label, Weights]:
    pairs = list(checkpoints.items() if isinstance(checkpoints, Mapping) else checkpoints)
    if not pairs or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise OptionError(
            "there are none" if not pairs else "not all are pairs of a label and weights",
            where="checkpoints",
            advice="Give a mapping from labels to weights, or a list of (label, weights).",
        )
    labels = [str(label) for label, _ in pairs]
    for label in labels:
        if labels.count(label) > 1:
            raise OptionError(
                f"{label!r} is there twice",
                where="checkpoints",
                advice="Give every checkpoint a label of its own.",
            )
    return dict(pairs)


@contextmanager
def _at(label: Label) -> Iterator[None]:
    """Say at which checkpoint something went wrong."""
    try:
        yield
    except PushforwardError as error:
        if error.where.startswith("checkpoint"):
            raise
        raise type(error)(
            error.what, where=f"checkpoint {label!r}, {error.where}", advice=error.advice
        ) from error
