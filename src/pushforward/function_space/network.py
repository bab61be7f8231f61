"""The network that distances are measured from, and others of its architecture."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.func import functional_call

from pushforward.errors import NetworkError, ShapeError, WeightsError
from pushforward.networks.graph import NetworkGraph, read_network
from pushforward.networks.model import FunctionalModel, Inputs
from pushforward.networks.tracing import trace
from pushforward.typing import Params

__all__ = ["Other", "ReferenceNetwork"]

Other: TypeAlias = nn.Module | Mapping[str, Tensor]
"""Other weights of the same architecture: a module, or its tensors by name."""


@dataclass(frozen=True, eq=False)
class ReferenceNetwork:
    """A frozen copy of a network, called with its own weights or with those of others.

    The copy is always in evaluation mode: a distance between functions has no dropout, and
    BatchNorm uses the running statistics of each set of weights.

    Parameters
    ----------
    module
        A private copy; use `of`.
    event_shape
        Shape of one input example.
    output_shape
        Shape of the outputs of one example, where it has been seen.
    """

    module: nn.Module = field(repr=False)
    event_shape: tuple[int, ...]
    output_shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, net: nn.Module, event_shape: tuple[int, ...]) -> ReferenceNetwork:
        """Copy a network.

        Parameters
        ----------
        net
            A module; it stays as it is, also in training mode.
        event_shape
            Shape of one input example.

        Returns
        -------
        ReferenceNetwork
            With weights of its own.

        Raises
        ------
        NetworkError
            For what is no module, or weights that are not finite.
        """
        if not isinstance(net, nn.Module):
            raise NetworkError(
                f"got {type(net).__name__}", where="net", advice="Pass a torch.nn.Module."
            )
        module = copy.deepcopy(net).eval().requires_grad_(False)
        reference = cls(module, tuple(event_shape))
        if not reference.tensors:
            raise NetworkError("it has no weights", where="net", advice="Pass a trained network.")
        _require_finite(reference.tensors, "net")
        _ = reference._function  # refuses normalisation by the batch
        return reference

    @cached_property
    def tensors(self) -> Params:
        """Parameters and buffers by name, detached."""
        named = (*self.module.named_parameters(), *self.module.named_buffers())
        return {name: tensor.detach() for name, tensor in named}

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """Of the parameters alone."""
        return tuple(name for name, _ in self.module.named_parameters())

    @property
    def num_parameters(self) -> int:
        """Entries of all parameters."""
        return sum(self.tensors[name].numel() for name in self.parameter_names)

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(iter(self.tensors.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        kinds = [t.dtype for t in self.tensors.values() if t.is_floating_point()]
        return kinds[0] if kinds else torch.get_default_dtype()

    @cached_property
    def graph(self) -> NetworkGraph:
        """The network as a chain of affine maps and activations, at its own weights."""
        return read_network(self.module, self.event_shape, self._traced)

    @cached_property
    def _traced(self) -> fx.Graph:
        return trace(self.module)

    @cached_property
    def _function(self) -> FunctionalModel:
        return FunctionalModel.of(self.module)

    @cached_property
    def architecture(self) -> str:
        """A short hash of the modules and of names and shapes of all tensors."""
        digest = hashlib.blake2b(repr(self.module).encode(), digest_size=8)
        for name, tensor in self.tensors.items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
        return digest.hexdigest()

    def tensors_of(self, other: Other) -> Params:
        """Weights of a network of the same architecture.

        Parameters
        ----------
        other
            A module, or tensors by name; buffers that a mapping lacks are those of the reference.

        Returns
        -------
        Params
            Under the names of the reference, still part of the autograd graph, on its device.

        Raises
        ------
        WeightsError
            When names or shapes are not those of the reference, or entries are not finite.
        """
        if not isinstance(other, nn.Module | Mapping) or any(
            not isinstance(t, Tensor)
            for t in (other.values() if isinstance(other, Mapping) else ())
        ):
            raise WeightsError(
                f"got {type(other).__name__}",
                where="other",
                advice="Give a network of the same architecture, or its tensors by name.",
            )
        if isinstance(other, nn.Module):
            given: dict[str, Tensor] = {
                **dict(other.named_parameters()),
                **dict(other.named_buffers()),
            }
        else:
            buffers = {n: t for n, t in self.tensors.items() if n not in self.parameter_names}
            given = {**buffers, **self._without_aliases(other)}
        missing = [name for name in self.tensors if name not in given]
        unknown = [name for name in given if name not in self.tensors]
        if missing or unknown:
            odd = [f"no {name!r}" for name in missing[:3]] + [
                f"an unknown {name!r}" for name in unknown[:3]
            ]
            raise WeightsError(
                f"its weights are not those of {type(self.module).__name__}: {', '.join(odd)}",
                where="other",
                advice="A distance is between two sets of weights of one architecture.",
            )
        for name, own in self.tensors.items():
            if given[name].shape != own.shape:
                raise WeightsError(
                    f"{name!r} has shape {tuple(given[name].shape)}, in the reference "
                    f"{tuple(own.shape)}",
                    where="other",
                    advice="A distance is between two sets of weights of one architecture.",
                )
        _require_finite(given, "other")
        return {name: given[name].to(self.device) for name in self.tensors}

    def _without_aliases(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without the second names that a state dict has for tied weights, where they agree."""
        names = self.module.state_dict(keep_vars=True)
        first = {id(t): name for name, t in names.items() if name in self.tensors}
        kept = {}
        for name, tensor in other.items():
            own = names.get(name)
            known = None if own is None or name in self.tensors else first.get(id(own))
            if known is None or known not in other or not torch.equal(other[known], tensor):
                kept[name] = tensor
        return kept

    def graph_of(self, tensors: Params) -> NetworkGraph:
        """The same chain at other weights; differentiable in them.

        Parameters
        ----------
        tensors
            From `tensors_of`.

        Returns
        -------
        NetworkGraph
            Stage by stage like `graph`.
        """
        reader = _GraphReader(self.module)
        return functional_call(
            reader, {f"inner.{n}": t for n, t in tensors.items()}, (self.event_shape, self._traced)
        )

    def outputs(self, tensors: Params, inputs: Inputs) -> Float[Tensor, "B K"]:
        """Outputs at any weights, flattened to a row for each example.

        Parameters
        ----------
        tensors
            From `tensors_of`, or `tensors`.
        inputs
            A batch.

        Returns
        -------
        Tensor
            ``(B, K)``, differentiable in the weights.
        """
        # Mixed precision would compare numbers of two precisions and call rounding a distance.
        with torch.autocast(device_type=self.device.type, enabled=False):
            rows: Tensor = self._function(tensors, inputs)
        return rows.flatten(1)

    def seen_on(self, inputs: Inputs) -> ReferenceNetwork:
        """The same network with the shape of its outputs.

        Parameters
        ----------
        inputs
            A batch.

        Returns
        -------
        ReferenceNetwork
            Its outputs are ``(K,)``, or have several axes, which `outputs` joins into one.
        """
        with torch.no_grad():
            shape = tuple(self._function(self.tensors, inputs).shape[1:])
        return replace(self, output_shape=shape)

    def unchanged(self, tensors: Params) -> bool:
        """Whether every entry is that of the reference, bit for bit."""
        return all(bool((tensors[n].detach() == own).all()) for n, own in self.tensors.items())


class _GraphReader(nn.Module):
    """Reads a graph inside `functional_call`, where the module has the weights of another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, event_shape: tuple[int, ...], traced: fx.Graph) -> Any:
        return read_network(self.inner, event_shape, traced)


def _require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
            raise NetworkError(
                f"{name!r} holds NaN or infinite entries",
                where=where,
                advice="Load a checkpoint from before training diverged.",
            )


def select_outputs(count: int, outputs: Any) -> Tensor | None:
    """Numbers of the outputs that a metric looks at.

    Parameters
    ----------
    count
        How many outputs the network has.
    outputs
        None for all, or a slice, a range, a sequence or tensor of numbers, a boolean mask.

    Returns
    -------
    Tensor or None
        Indices ``(k,)`` in order; None for all.

    Raises
    ------
    ShapeError
        When they are out of range, repeated, or none.
    """
    if outputs is None:
        return None
    everything = torch.arange(count)
    if isinstance(outputs, slice):
        chosen = everything[outputs]
    else:
        try:
            chosen = torch.as_tensor(list(outputs) if isinstance(outputs, range) else outputs)
        except (TypeError, ValueError, RuntimeError):
            chosen = torch.empty(0)
        if chosen.dtype == torch.bool and chosen.shape == (count,):
            chosen = everything[chosen.cpu()]
    chosen = chosen.cpu()
    fits = (
        chosen.dim() == 1
        and len(chosen) > 0
        and not chosen.is_floating_point()
        and chosen.dtype != torch.bool
        and int(chosen.min()) >= 0
        and int(chosen.max()) < count
        and len(chosen.unique()) == len(chosen)
    )
    if not fits:
        raise ShapeError(
            f"{outputs!r} does not select outputs of a network that has {count}",
            where="outputs",
            advice=f"Give different numbers from 0 to {count - 1}, a slice, or a mask.",
        )
    return chosen.long()
