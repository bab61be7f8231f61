"""A posterior in a file, which predicts the same bit for bit once it is read back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pushforward.errors import WeightsError
from pushforward.linearised_laplace.exact import DualFactor, PrimalFactor
from pushforward.linearised_laplace.posterior import LaplacePosterior
from pushforward.linearised_laplace.priors import Prior
from pushforward.linearised_laplace.sampled import Round
from pushforward.networks.likelihoods import likelihood_from_config
from pushforward.networks.model import FunctionalModel, check_weights
from pushforward.runs.estimate import Check, Cost, Estimate
from pushforward.runs.store import fingerprint, load_tensors, save_tensors

__all__ = ["load_posterior", "save_posterior"]

_SCHEMA = "pushforward.laplace"
_VERSION = 1
_NAMES_SHOWN = 4
_ESTIMATES = ("effective_dimension", "layer_effective_dimension", "log_evidence")


def save_posterior(posterior: LaplacePosterior, path: str | os.PathLike[str]) -> None:
    """Write a posterior to a file; the network is not in it, only what recognises it.

    Parameters
    ----------
    posterior
        Exact or sampled.
    path
        A safetensors file, replaced if it exists, and never half written. An exact posterior takes
        eight bytes for every pair of weights (or of training outputs, and the Jacobian), a sampled
        one ``num_draws`` times the size of the network.
    """
    prior, factor = posterior.prior, posterior._factor
    tensors: dict[str, Tensor | None] = {
        "prior.precision": prior.precision,
        "prior.scale": prior.scale,
        "mode": posterior.mode,
        "draws": posterior._draws,
        "factor.cholesky": None if factor is None else factor.cholesky,
        "factor.rows": factor.rows if isinstance(factor, DualFactor) else None,
    }
    estimates = {}
    for name in _ESTIMATES:
        estimate: Estimate | None = getattr(posterior, name)
        if estimate is not None:
            tensors[f"{name}.value"] = estimate.value
            tensors[f"{name}.standard_error"] = estimate.standard_error
            estimates[name] = {
                "method": estimate.method,
                "cost": asdict(estimate.cost),
                "checks": [asdict(check) for check in estimate.checks],
            }
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    turned = [name for name, tensor in present.items() if _by_columns(tensor)]
    present |= {name: present[name].mT for name in turned}
    model = posterior.model
    metadata = {
        "by_columns": turned,
        "network": {
            "name": model.name,
            "shapes": {name: list(p.shape) for name, p in model.parameters.items()},
            "dtype": str(model.dtype),
            "left_out": dict(model.left_out),
            "values": _values(model),
            "fingerprint": model.fingerprint(),
        },
        "likelihood": posterior.likelihood.to_config(),
        "method": posterior.method,
        "offset": posterior.offset,
        "prior": prior.kind,
        "estimates": estimates,
        "rounds": [asdict(entry) for entry in posterior.rounds],
        "num_examples": posterior.num_examples,
        "checks": [asdict(check) for check in posterior.checks],
        "cost": asdict(posterior.cost),
        "num_draws": posterior.num_draws,
        "seed": posterior.seed,
        "temperature": posterior.temperature,
    }
    save_tensors(path, present, metadata, schema=_SCHEMA, version=_VERSION)


def load_posterior(
    path: str | os.PathLike[str], net: nn.Module | FunctionalModel
) -> LaplacePosterior:
    """Read a posterior that `save_posterior` has written.

    Parameters
    ----------
    path
        The file.
    net
        The network with which the posterior was made, with the same weights, in evaluation mode.
        Which of its parameters are uncertain is in the file.

    Returns
    -------
    LaplacePosterior
        On the device of the network; its plan is None.

    Raises
    ------
    WeightsError
        If there is no such file, it is damaged, of another kind or newer than this release, or
        belongs to another network: the message says whether the parameters are others or only
        their values.
    NetworkError
        For what is no network, in training mode, or without weights yet.
    OptionError
        If `path` is none.
    """
    if isinstance(net, nn.Module):
        check_weights({**dict(net.named_parameters()), **dict(net.named_buffers())})
    else:
        net = FunctionalModel.of(net)  # itself, or told what is wrong with it
    ours = list(_parameters(net).values())
    device = ours[0].device if ours else "cpu"
    tensors, metadata = load_tensors(path, schema=_SCHEMA, version=_VERSION, device=device)
    where = str(path)
    with _consistent(where):
        saved = _SavedNetwork(**metadata["network"])
    model = _recognised(net, saved, where)
    with _consistent(where):
        tensors |= {name: tensors[name].mT for name in metadata["by_columns"]}
        return _assembled(model, tensors, metadata)


class _SavedNetwork(NamedTuple):
    """What recognises a network: its uncertain parameters, and which others there are."""

    name: str
    shapes: dict[str, list[int]]
    dtype: str
    left_out: dict[str, str]
    values: dict[str, str]
    fingerprint: str


@contextmanager
def _consistent(where: str) -> Iterator[None]:
    """Tell of contents that do not belong together as of a damaged file.

    Yields
    ------
    None
        While the contents are looked at.

    Raises
    ------
    WeightsError
        In place of what a missing or impossible entry raises.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"damaged: its contents do not belong together ({type(error).__name__}: {error})",
            where=where,
            advice="Write it anew with posterior.save(path).",
        ) from error


def _recognised(
    net: nn.Module | FunctionalModel, saved: _SavedNetwork, where: str
) -> FunctionalModel:
    """The network with the parameters that the posterior is about, if it is the right one.

    Returns
    -------
    FunctionalModel
        Whose uncertain parameters are those of the file, bit for bit.

    Raises
    ------
    WeightsError
        When names, shapes, types or values differ.
    """
    shapes = {name: tuple(shape) for name, shape in saved.shapes.items()}
    ours = _parameters(net)
    known = {*shapes, *saved.left_out}
    left_out = net.left_out if isinstance(net, FunctionalModel) else {}
    reshaped = [
        f"{name} {tuple(ours[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in ours and tuple(ours[name].shape) != shape
    ]
    problems = [
        f"{len(names)} {kind} ({_listed(names)})"
        for kind, names in (
            ("missing", [name for name in shapes if name not in ours]),
            ("extra", [name for name in (*ours, *left_out) if name not in known]),
            ("of another shape", reshaped),
        )
        if names
    ]
    if problems:
        raise WeightsError(
            f"the posterior of another network ({saved.name}): its parameters are others, "
            f"{'; '.join(problems)}",
            where=where,
            advice="Build the network with which the posterior was made.",
        )
    model = FunctionalModel.of(net, tuple(shapes))
    if tuple(model.parameters) != tuple(shapes) or str(model.dtype) != saved.dtype:
        kind = "their order differs"
        if str(model.dtype) != saved.dtype:
            kind = f"they are {_plain(model.dtype)} instead of {_plain(saved.dtype)}"
        raise WeightsError(
            f"the posterior of a network with the same parameters, but {kind}",
            where=where,
            advice="Build the network with which the posterior was made, in the same precision.",
        )
    if model.fingerprint() != saved.fingerprint:
        values = _values(model)
        changed = [name for name in saved.values if values.get(name) != saved.values[name]]
        raise WeightsError(
            f"the posterior of the same architecture with other weights: only the values differ, "
            f"in {len(changed)} of {len(values)} tensors ({_listed(changed)})",
            where=where,
            advice="Load the weights with which the posterior was made; after further training, "
            "make a new posterior.",
        )
    return model


def _assembled(
    model: FunctionalModel, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> LaplacePosterior:
    """The posterior from the parts in a file.

    Returns
    -------
    LaplacePosterior
        Without plan.

    Raises
    ------
    ValueError
        When a tensor has a shape that does not belong to the network, or what draws come from is
        missing.
    """
    space = model.space
    prior = Prior(metadata["prior"], space, tensors["prior.precision"], tensors.get("prior.scale"))
    size = space.size
    wanted: dict[str, tuple[int | None, ...]] = {
        "prior.precision": (len(prior.groups),),
        "prior.scale": (size,),
        "mode": (size,),
        "draws": (None, size),
        "factor.rows": (None, size),
    }
    for name, shape in wanted.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found is None:
            continue
        if len(found) != len(shape) or found[-1] != shape[-1]:
            raise ValueError(f"{name} has shape {found}")
    factor: PrimalFactor | DualFactor | None = None
    if "factor.cholesky" in tensors:
        rows, cholesky = tensors.get("factor.rows"), tensors["factor.cholesky"]
        side = size if rows is None else len(rows)
        if tuple(cholesky.shape) != (side, side):
            raise ValueError(f"factor.cholesky has shape {tuple(cholesky.shape)}")
        factor = (
            PrimalFactor(prior, cholesky) if rows is None else DualFactor(prior, rows, cholesky)
        )
    if factor is None and "draws" not in tensors:
        raise ValueError("neither draws nor factor")
    estimates = {
        name: Estimate(
            tensors[f"{name}.value"],
            tensors[f"{name}.standard_error"],
            Cost(**entry["cost"]),
            entry["method"],
            _checks(entry["checks"]),
        )
        for name, entry in metadata["estimates"].items()
    }
    return LaplacePosterior(
        likelihood=likelihood_from_config(metadata["likelihood"]),
        method=metadata["method"],
        offset=metadata["offset"],
        effective_dimension=estimates["effective_dimension"],
        layer_effective_dimension=estimates["layer_effective_dimension"],
        log_evidence=estimates.get("log_evidence"),
        rounds=tuple(_round(entry) for entry in metadata["rounds"]),
        num_examples=metadata["num_examples"],
        checks=_checks(metadata["checks"]),
        cost=Cost(**metadata["cost"]),
        plan=None,
        num_draws=metadata["num_draws"],
        seed=metadata["seed"],
        model=model,
        prior=prior,
        mode=tensors.get("mode"),
        temperature=metadata["temperature"],
        _factor=factor,
        _draws=tensors.get("draws"),
    )


def _by_columns(tensor: Tensor) -> bool:
    """Whether a matrix lies in memory column by column, as LAPACK leaves its factors.

    Returns
    -------
    bool
        True: it has to come back like that, or products with it are rounded in another order.
    """
    return tensor.dim() == 2 and not tensor.is_contiguous() and tensor.mT.is_contiguous()


def _parameters(net: nn.Module | FunctionalModel) -> dict[str, Tensor]:
    return dict(net.parameters if isinstance(net, FunctionalModel) else net.named_parameters())


def _values(model: FunctionalModel) -> dict[str, str]:
    """A fingerprint of each tensor, so that a message can name those that changed."""
    tensors = {**model.parameters, **model.frozen}
    return {name: fingerprint({name: tensor}) for name, tensor in tensors.items()}


def _checks(entries: Iterable[Mapping[str, Any]]) -> tuple[Check, ...]:
    return tuple(Check(**entry) for entry in entries)


def _round(entry: Mapping[str, Any]) -> Round:
    """JSON has lists where a round has tuples."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return Round(**fields)


def _listed(names: list[str]) -> str:
    left = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f", ... {left} more" if left > 0 else "")


def _plain(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
