"""Chains in a file, and back bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from pushforward.errors import WeightsError
from pushforward.runs.estimate import Check, Cost
from pushforward.runs.store import load_tensors, save_tensors
from pushforward.sampling.chains import Chains, Moments

__all__ = ["load_chains", "save_chains"]

_SCHEMA = "pushforward.chains"
_VERSION = 1


def save_chains(chains: Chains, path: str | os.PathLike[str]) -> None:
    """Write chains to a file.

    Parameters
    ----------
    chains
        Of any sampler.
    path
        A safetensors file, replaced if it exists, and never half written.
    """
    groups = _groups(chains)
    tensors = {
        f"{group}:{name}": tensor for group, kept in groups.items() for name, tensor in kept.items()
    }
    metadata = {
        "names": {group: list(kept) for group, kept in groups.items()},  # in their order
        "count": chains.moments.count,
        "kernel": chains.kernel,
        "settings": dict(chains.settings),
        "num_warmup": chains.num_warmup,
        "thin": chains.thin,
        "seed": chains.seed,
        "run_checks": [asdict(check) for check in chains.run_checks],
        "cost": asdict(chains.cost),
    }
    save_tensors(path, tensors, metadata, schema=_SCHEMA, version=_VERSION)


def load_chains(path: str | os.PathLike[str]) -> Chains:
    """Read what `save_chains` has written.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    Chains
        On the CPU.

    Raises
    ------
    WeightsError
        If there is no such file, it is damaged, of another kind or newer than this release.
    """
    tensors, metadata = load_tensors(path, schema=_SCHEMA, version=_VERSION)
    try:
        return _assembled(tensors, metadata)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"damaged: its contents do not belong together ({type(error).__name__}: {error})",
            where=str(path),
            advice="Write it anew with chains.save(path).",
        ) from error


def _groups(chains: Chains) -> dict[str, Mapping[str, Tensor]]:
    return {
        "parameters": chains.parameters,
        "observations": chains.observations,
        "statistics": chains.statistics,
        "warmup_statistics": chains.warmup_statistics,
        "mean": chains.moments.mean,
        "variance": chains.moments.variance,
        "last": chains.last,
    }


def _assembled(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Chains:
    groups = {
        group: {name: tensors[f"{group}:{name}"] for name in names}
        for group, names in metadata["names"].items()
    }
    return Chains(
        parameters=groups["parameters"],
        observations=groups["observations"],
        statistics=groups["statistics"],
        warmup_statistics=groups["warmup_statistics"],
        moments=Moments(metadata["count"], groups["mean"], groups["variance"]),
        kernel=metadata["kernel"],
        settings=metadata["settings"],
        num_warmup=metadata["num_warmup"],
        thin=metadata["thin"],
        seed=metadata["seed"],
        last=groups["last"],
        run_checks=tuple(Check(**entry) for entry in metadata["run_checks"]),
        cost=Cost(**metadata["cost"]),
    )
