"""Summaries on disk: weights, moments and what recognises the network, in one file."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.errors import NetworkError, WeightsError
from pushforward.function_space.chain import Moments
from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.statistics import (
    LowRankMoments,
    OutputStatistics,
    StageStatistics,
    Statistics,
)
from pushforward.function_space.summary import FunctionSummary
from pushforward.function_space.token_law import TokenLaw
from pushforward.runs.store import load_tensors, save_tensors

__all__ = ["load_summary", "save_summary"]

_SCHEMA = "pushforward.function_summary"
_VERSION = 1


def save_summary(summary: FunctionSummary, path: str | os.PathLike[str]) -> None:
    """Write a summary to a file.

    Parameters
    ----------
    summary
        Of any network.
    path
        A safetensors file, replaced if it exists, and never half written.
    """
    statistics, outputs = summary.statistics, summary.statistics.outputs
    tensors: dict[str, Tensor] = {
        "counts": statistics.counts,
        "probe_distances": summary.probe_distances,
        "outputs.fisher": outputs.fisher,
        "outputs.softmax": outputs.softmax,
        **_named("outputs", outputs.moments),
    }
    inputs = statistics.inputs
    if isinstance(inputs, LowRankMoments):
        tensors |= {"inputs.mean": inputs.mean, "inputs.factor": inputs.factor}
        tensors |= {"inputs.rest": inputs.rest}
    elif inputs is not None:
        tensors |= _named("inputs", inputs)
    for number, law in enumerate(summary.tokens):
        tensors |= {f"tokens.{number}.{n}": t for n, t in law.to_tensors().items()}
    for number, stage in enumerate(statistics.stages):
        tensors[f"stages.{number}.gate_mean"] = stage.gate_mean
        if not torch.equal(stage.gate_mean, stage.gate_square):
            tensors[f"stages.{number}.gate_square"] = stage.gate_square
        if stage.layer is not None:
            tensors |= _named(f"stages.{number}.layer", stage.layer)
    tensors |= {f"weights.{name}": t for name, t in summary.reference.tensors.items()}
    metadata = {
        "network": type(summary.reference.module).__name__,
        "architecture": summary.reference.architecture,
        "event_shape": list(summary.reference.event_shape),
        "input_moments": summary.input_moments,
        "components": summary.components,
        "output_shape": list(summary.reference.output_shape),
        "num_stages": len(statistics.stages),
        "num_token_laws": len(summary.tokens),
    }
    save_tensors(path, tensors, metadata, schema=_SCHEMA, version=_VERSION)


def load_summary(path: str | os.PathLike[str], net: nn.Module) -> FunctionSummary:
    """Read a summary that `save_summary` has written.

    Parameters
    ----------
    path
        The file.
    net
        A network of the same architecture.

    Returns
    -------
    FunctionSummary
        On the device of `net`.

    Raises
    ------
    WeightsError
        If the file is damaged, of another kind, newer than this release, or of another network.
    NetworkError
        When `net` is no module.
    """
    if not isinstance(net, nn.Module):
        raise NetworkError(
            f"got {type(net).__name__}",
            where="net",
            advice="Pass a network of the same architecture, with any weights.",
        )
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    tensors, metadata = load_tensors(path, schema=_SCHEMA, version=_VERSION, device=device)
    where = str(path)
    try:
        architecture = metadata["architecture"]
        event_shape = tuple(int(n) for n in metadata["event_shape"])
        weights = _under("weights.", tensors)
        statistics = _Reader(tensors).statistics(int(metadata["num_stages"]))
        components = metadata["components"]
        output_shape = tuple(int(n) for n in metadata["output_shape"])
        kept, distances = metadata["input_moments"], tensors["probe_distances"].cpu()
        laws = tuple(
            TokenLaw.from_tensors(_under(f"tokens.{number}.", tensors))
            for number in range(int(metadata["num_token_laws"]))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"it is no whole summary ({error})", where=where, advice="Make the summary again."
        ) from error
    own = ReferenceNetwork.of(net, event_shape)
    if own.architecture != architecture:
        raise WeightsError(
            f"it is of another network (a {metadata['network']!r})",
            where=where,
            advice="Build the network with the same modules and sizes as the one summarised.",
        )
    with torch.no_grad():
        for name, tensor in own.tensors.items():  # buffers that are not persistent included
            tensor.copy_(weights[name])
    reference = replace(ReferenceNetwork.of(own.module, event_shape), output_shape=output_shape)
    return FunctionSummary(reference, statistics, kept, distances, components, laws)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@dataclass(frozen=True)
class _Reader:
    tensors: dict[str, Tensor]

    def moments(self, name: str) -> Moments:
        return Moments(self.tensors[f"{name}.mean"], self.tensors[f"{name}.covariance"])

    def stage(self, number: int) -> StageStatistics:
        name = f"stages.{number}"
        mean = self.tensors[f"{name}.gate_mean"]
        return StageStatistics(
            mean,
            self.tensors.get(f"{name}.gate_square", mean),
            self.moments(f"{name}.layer") if f"{name}.layer.mean" in self.tensors else None,
        )

    def statistics(self, num_stages: int) -> Statistics:
        outputs = OutputStatistics(
            self.moments("outputs"), self.tensors["outputs.fisher"], self.tensors["outputs.softmax"]
        )
        stages = tuple(self.stage(number) for number in range(num_stages))
        inputs: Moments | LowRankMoments | None = None
        if "inputs.factor" in self.tensors:
            inputs = LowRankMoments(
                *[self.tensors[f"inputs.{n}"] for n in ("mean", "factor", "rest")]
            )
        elif "inputs.mean" in self.tensors:
            inputs = self.moments("inputs")
        return Statistics(self.tensors["counts"], inputs, stages, outputs)


def _named(name: str, moments: Moments) -> dict[str, Any]:
    return {f"{name}.mean": moments.mean, f"{name}.covariance": moments.covariance}
