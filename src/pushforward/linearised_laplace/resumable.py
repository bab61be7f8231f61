"""The sampled posterior as a run that can be interrupted and resumed to the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from time import monotonic
from typing import Any

from torch import Tensor

from pushforward.linalg.conjugate_gradients import BlockIterate
from pushforward.linalg.subspace import Subspace
from pushforward.linearised_laplace.priors import Prior
from pushforward.linearised_laplace.sampled import Round, SampledState, SampledTask, step
from pushforward.runs.store import Checkpoint

__all__ = ["run"]

_SAVE_EVERY = 30.0  # seconds
_TENSORS = ("mode", "sketch", "draws", "gammas", "errors")


def run(
    task: SampledTask, prior: Prior, noise: float | None, checkpoint: Checkpoint | None
) -> SampledState:
    """Work until the draws are finished, from the last saved state if there is one.

    Parameters
    ----------
    task
        What is asked for.
    prior
        To begin with.
    noise
        Noise variance to begin with, when it is learned.
    checkpoint
        Where to save, about twice a minute, when interrupted, and at the end; None for nowhere.

    Returns
    -------
    SampledState
        Whose phase is ``"done"``.
    """
    state = SampledState("sketch", prior, noise)
    if checkpoint is not None:
        saved = checkpoint.load(task.linear.model.device)
        if saved is None:
            _save(task, checkpoint, state)  # a folder that cannot be written to is told of now
        else:
            state = _from_file(prior, *saved)
    saved_at = monotonic()
    try:
        while state.phase != "done":
            state = step(task, state)
            if checkpoint is not None and monotonic() - saved_at > _SAVE_EVERY:
                _save(task, checkpoint, state)
                saved_at = monotonic()
    finally:
        if checkpoint is not None:
            _save(task, checkpoint, state)
    return state


def _save(task: SampledTask, checkpoint: Checkpoint, state: SampledState) -> None:
    # With several processes each draws shard has a state of its own; data shards hold the same.
    if task.linear.grid.data_index == 0:
        checkpoint.save(*_to_file(state))


def _to_file(state: SampledState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {name: getattr(state, name) for name in _TENSORS}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    tensors["precision"] = state.prior.precision
    if state.prior.scale is not None:
        tensors["scale"] = state.prior.scale
    if state.iterate is not None:
        tensors |= {f"iterate.{k}": v for k, v in state.iterate.to_tensors().items()}
    if state.subspace is not None:
        tensors |= {"subspace": state.subspace.vectors, "subspace.images": state.subspace.images}
    plain = {
        "phase": state.phase,
        "noise_variance": state.noise_variance,
        "rounds": [asdict(entry) for entry in state.rounds],
        "work": state.work,
        "settled": state.settled,
    }
    return tensors, plain


def _from_file(
    prior: Prior, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]
) -> SampledState:
    iterate = {k.removeprefix("iterate."): v for k, v in tensors.items() if "iterate." in k}
    rounds = tuple(_round_from(entry) for entry in plain["rounds"])
    subspace = None
    if "subspace" in tensors:
        subspace = Subspace(tensors["subspace"], tensors["subspace.images"])
    return SampledState(
        phase=plain["phase"],
        prior=replace(prior, precision=tensors["precision"], scale=tensors.get("scale")),
        noise_variance=plain["noise_variance"],
        iterate=BlockIterate.from_tensors(iterate) if iterate else None,
        subspace=subspace,
        rounds=rounds,
        work=plain["work"],
        settled=plain["settled"],
        **{name: tensors.get(name) for name in _TENSORS},
    )


def _round_from(entry: Mapping[str, Any]) -> Round:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return Round(**fields)
