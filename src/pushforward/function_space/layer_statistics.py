"""Mean and variance of every unit of the layers of any network, over its data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pushforward.errors import DataError, LawError, UnsupportedLayerError
from pushforward.function_space.network import ReferenceNetwork
from pushforward.networks.model import Inputs

__all__ = [
    "LayerStatistics",
    "collect_layer_statistics",
    "same_arithmetic",
    "weighted_leaves",
    "with_leaf_outputs",
]

_MEAN, _VARIANCE, _COUNT = "mean", "variance", "num_examples"


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """Mean and variance of the outputs of layers, entry by entry of one example's output.

    Those of parts of the data add up (``+``) to those of all of it, up to rounding.

    Parameters
    ----------
    num_examples
        How many examples were seen.
    means, variances
        By ``path#call``, as a module may be called several times: ``(*event,)``, float64; the
        variance with ``1 / num_examples``.
    """

    num_examples: int
    means: Mapping[str, Float64[Tensor, "*event"]]
    variances: Mapping[str, Float64[Tensor, "*event"]]

    @classmethod
    def of(
        cls, reference: ReferenceNetwork, inputs: Inputs, layers: Iterable[str] | None = None
    ) -> LayerStatistics:
        """Of one batch.

        Parameters
        ----------
        reference
            The network, at its own weights.
        inputs
            A batch.
        layers
            Paths of the modules; default all of `weighted_leaves`.

        Returns
        -------
        LayerStatistics
            On the device of the network.

        Raises
        ------
        UnsupportedLayerError
            When the outputs of one do not have the examples along their first axis.
        """
        chosen = weighted_leaves(reference.module) if layers is None else tuple(layers)
        means: dict[str, Tensor] = {}
        variances: dict[str, Tensor] = {}

        def record(name: str, output: Tensor) -> Tensor:
            wide = output.to(torch.float64)
            means[name] = wide.mean(0)
            variances[name] = (wide - means[name]).square().mean(0)
            shapes[name] = len(output)
            return output

        shapes: dict[str, int] = {}
        with torch.no_grad(), with_leaf_outputs(reference.module, chosen, record):
            count = len(reference.outputs(reference.tensors, inputs))
        for name, rows in shapes.items():
            if rows != count:
                raise UnsupportedLayerError(
                    f"its outputs have {rows} rows for {count} examples",
                    where=name,
                    advice="Layers whose first axis is not that of the examples have no "
                    "statistics; name others.",
                )
        return cls(count, means, variances)

    @property
    def num_bytes(self) -> int:
        """What they take in memory."""
        return sum(2 * mean.numel() * mean.element_size() for mean in self.means.values())

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        """Of both sets of examples.

        Returns
        -------
        LayerStatistics
            Neither is changed.

        Raises
        ------
        DataError
            When they are of different layers or shapes.
        """
        same = self.means.keys() == other.means.keys() and all(
            mean.shape == other.means[name].shape for name, mean in self.means.items()
        )
        if not same:
            raise DataError(
                "statistics of different layers do not add up",
                where="layer statistics",
                advice="Collect all of them from one network, with inputs of one shape.",
            )
        total = self.num_examples + other.num_examples
        share = other.num_examples / total
        means, variances = {}, {}
        for name, mean in self.means.items():
            difference = other.means[name] - mean
            means[name] = mean + share * difference
            within = torch.lerp(self.variances[name], other.variances[name], share)
            variances[name] = within + share * (1 - share) * difference.square()
        return LayerStatistics(total, means, variances)

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it as tensors by name, for a file.

        Returns
        -------
        dict[str, Tensor]
            For `from_tensors`.
        """
        return {
            _COUNT: torch.tensor(self.num_examples),
            **{f"{_MEAN}:{name}": mean for name, mean in self.means.items()},
            **{f"{_VARIANCE}:{name}": variance for name, variance in self.variances.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LayerStatistics:
        """What `to_tensors` took apart.

        Parameters
        ----------
        tensors
            By name.

        Returns
        -------
        LayerStatistics
            With the same numbers.

        Raises
        ------
        LawError
            When something is missing, or a variance is negative.
        """
        parts: dict[str, dict[str, Tensor]] = {_MEAN: {}, _VARIANCE: {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            if kind in parts:
                parts[kind][name] = tensor
        means, variances = parts[_MEAN], parts[_VARIANCE]
        sound = (
            _COUNT in tensors
            and means.keys() == variances.keys()
            and all(mean.shape == variances[name].shape for name, mean in means.items())
            and all(bool((v >= 0).all() and torch.isfinite(v).all()) for v in variances.values())
            and all(bool(torch.isfinite(mean).all()) for mean in means.values())
        )
        if not sound:
            raise LawError(
                "they are incomplete, or no moments",
                where="layer statistics",
                advice="Summarise the data anew.",
            )
        return cls(int(tensors[_COUNT]), means, variances)


def collect_layer_statistics(
    reference: ReferenceNetwork, batches: Iterable[Inputs], layers: Iterable[str] | None = None
) -> LayerStatistics:
    """Of all batches, in one pass.

    Parameters
    ----------
    reference
        The network, at its own weights.
    batches
        Inputs.
    layers
        Paths of the modules; default all of `weighted_leaves`.

    Returns
    -------
    LayerStatistics
        Independent of how the examples are batched, up to rounding.

    Raises
    ------
    DataError
        If there are no batches.
    """
    chosen = None if layers is None else tuple(layers)
    total: LayerStatistics | None = None
    for inputs in batches:
        part = LayerStatistics.of(reference, inputs, chosen)
        total = part if total is None else total + part
    if total is None:
        raise DataError("no examples", where="data", advice="Give at least one batch.")
    return total


def weighted_leaves(module: nn.Module) -> tuple[str, ...]:
    """Paths of the layers with weights: what has no weighted part of its own, and attentions.

    Parameters
    ----------
    module
        A network.

    Returns
    -------
    tuple of str
        Without embeddings, whose outputs the law of the tokens determines.
    """
    chosen: list[str] = []
    for path, part in module.named_modules():
        inside = any(path.startswith(f"{parent}.") for parent in chosen)
        children = any(True for child in part.children() for _ in child.parameters())
        # Attention computes with the tensors of its projections and never calls them.
        leaf = isinstance(part, nn.MultiheadAttention) or not children
        weighted = any(True for _ in part.parameters()) and not isinstance(part, nn.Embedding)
        if leaf and weighted and not inside:
            chosen.append(path)
    return tuple(chosen)


@contextmanager
def with_leaf_outputs(
    module: nn.Module, layers: Iterable[str], act: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Let a function see, and replace, the outputs of layers while the context is open.

    Parameters
    ----------
    module
        A network.
    layers
        Paths of its modules.
    act
        Called with ``path#call``, calls counted from 0 since the context was opened, and the output
        (the first one of several); returns what the network goes on with.

    Yields
    ------
    None
        Nothing.

    Raises
    ------
    UnsupportedLayerError
        For a module with attention over sequences that come along the first axis.
    """
    calls: Counter[str] = Counter()

    def hook_of(path: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> Any:
            name = f"{path}#{calls[path]}"
            calls[path] += 1
            several = isinstance(output, tuple)
            first = output[0] if several else output
            if not isinstance(first, Tensor) or not first.is_floating_point():
                return output
            first = act(name, first)
            return (first, *output[1:]) if several else first

        return hook

    for path, part in module.named_modules():
        if getattr(part, "batch_first", True) is False:
            raise UnsupportedLayerError(
                "it takes sequences along the first axis",
                where=path or type(module).__name__,
                advice="Build it with batch_first=True.",
            )
    handles = []
    try:
        for path in layers:
            part = module.get_submodule(path)
            handles.append(part.register_forward_hook(hook_of(path)))
        with same_arithmetic():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def same_arithmetic() -> Iterator[None]:
    """Keep PyTorch from fused attention.

    Fused transformer layers call no hooks, and are taken in evaluation without gradient only: the
    same weights would give different outputs with and without it. The fused product of queries,
    keys and values has no second derivative.

    Yields
    ------
    None
        Nothing.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
