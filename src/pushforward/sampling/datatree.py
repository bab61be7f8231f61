"""Draws in the schema of ArviZ; xarray is imported when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.runs.estimate import to_jsonable
from pushforward.sampling.chains import Chains

if TYPE_CHECKING:
    import xarray

__all__ = ["to_datatree"]

_LIBRARY = "pushforward"
_KNOWN = {"acceptance": "acceptance_rate", "divergent": "diverging", "leapfrog_steps": "n_steps"}
_TYPES = {"diverging": torch.bool, "n_steps": torch.int64, "tree_depth": torch.int64}


def to_datatree(chains: Chains) -> xarray.DataTree:
    """Draws as ArviZ knows them.

    Parameters
    ----------
    chains
        Of any sampler.

    Returns
    -------
    xarray.DataTree
        Groups ``posterior`` (the parameters), ``sample_stats``, ``warmup_sample_stats`` and
        ``posterior_predictive`` (the observations), without those that would be empty. Dimensions
        are ``chain``, ``draw`` and ``"<name>_dim_0"`` and so on; a ``/`` in a name becomes ``_``,
        because it separates groups. Statistics have ArviZ's names where it has one; ``lp`` is minus
        ``potential``, which is there as well.

    Raises
    ------
    OptionError
        When xarray is not installed.
    """
    xarray = _import_xarray()
    attributes = _attributes(chains)
    groups = {
        "posterior": chains.parameters,
        "sample_stats": _statistics(chains.statistics),
        "warmup_sample_stats": _statistics(chains.warmup_statistics),
        "posterior_predictive": chains.observations,
    }
    datasets = {
        group: xarray.Dataset(
            {_plain(name): _variable(_plain(name), value) for name, value in tensors.items()},
            coords=_coordinates(next(iter(tensors.values()))),
            attrs=attributes,
        )
        for group, tensors in groups.items()
        if tensors
    }
    tree = xarray.DataTree.from_dict(datasets)
    tree.attrs.update(attributes)
    return tree


def _statistics(statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of ArviZ, in its types."""
    found = {}
    for name, value in statistics.items():
        known = _KNOWN.get(name, name)
        if known in _TYPES and bool(torch.isfinite(value).all()):
            value = value.to(_TYPES[known])
        found[known] = value
    if "potential" in found:
        found["lp"] = -found["potential"]
    return found


def _variable(name: str, value: Tensor) -> tuple[tuple[str, ...], np.ndarray[Any, np.dtype[Any]]]:
    own = tuple(f"{name}_dim_{axis}" for axis in range(value.dim() - 2))
    plain = value.detach().cpu()
    if plain.dtype in (torch.bfloat16, torch.float16):
        plain = plain.float()  # NumPy has not the first, netCDF not the second
    return ("chain", "draw", *own), plain.numpy()


def _coordinates(value: Tensor) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    return {"chain": np.arange(value.shape[0]), "draw": np.arange(value.shape[1])}


def _attributes(chains: Chains) -> dict[str, Any]:
    """What netCDF can hold: text and numbers."""
    try:
        release = version(_LIBRARY)
    except PackageNotFoundError:  # used from its source, not installed
        release = "unknown"
    return {
        "inference_library": _LIBRARY,
        "inference_library_version": release,
        "sampling_time": chains.cost.seconds,
        "kernel": chains.kernel,
        "settings": json.dumps(to_jsonable(dict(chains.settings))),
        "seed": chains.seed,
        "num_warmup": chains.num_warmup,
        "thin": chains.thin,
    }


def _plain(name: str) -> str:
    return name.replace("/", "_")


def _import_xarray() -> Any:
    try:
        import xarray
    except ImportError as error:
        raise OptionError(
            "xarray is not installed",
            where="to_datatree",
            advice="Run: pip install 'pushforward[xarray]'.",
        ) from error
    return xarray
