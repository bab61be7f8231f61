"""``pf.summarize``: one pass over the data, after which they are not needed any more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pushforward.errors import DataError, OptionError, ShapeError, UnsupportedLayerError
from pushforward.function_space.chain import Moments
from pushforward.function_space.components import cluster_inputs, label_components
from pushforward.function_space.metrics import Metric, discrepancy
from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.probes import NUM_PROBES, probe
from pushforward.function_space.statistics import LowRankMoments, batch_statistics, walk
from pushforward.function_space.summary import FunctionSummary, InputMoments
from pushforward.function_space.token_law import TokenLaw
from pushforward.networks.batches import Inputs, Table
from pushforward.networks.data import Examples
from pushforward.runs.progress import track
from pushforward.typing import Params

__all__ = ["summarize"]

_BATCH_SIZE = 1024
_PAIRED = 4096  # units of a layer whose pairs are kept at most


def summarize(
    net: nn.Module,
    data: Any,
    *,
    classes: Literal["targets"] | Tensor | None = None,
    clusters: int | None = None,
    input_moments: InputMoments = "full",
    layer_moments: bool = False,
    batch_size: int = _BATCH_SIZE,
    seed: int = 0,
    progress: bool | None = None,
) -> FunctionSummary:
    """Summarise a network over its data: moments of the inputs and one number for each unit.

    From then on the distance of other weights from these, as functions averaged over the data, can
    be estimated without the data (Dhawan, Huang, Bae and Grosse, arXiv 2302.03519).

    Parameters
    ----------
    net
        The network; evaluation mode is assumed for dropout and BatchNorm, whatever its mode.
    data
        Inputs ``(N, ...)``, a pair of inputs and targets, or a loader, in a fixed order and without
        augmentation. Inputs that are whole numbers, or mappings with ``input_ids``, are sequences
        of tokens, of which counts of neighbours are kept.
    classes
        Keep moments for each class apart: ``"targets"``, or a label for each example. The cost of
        an estimate grows with their number, and so does its accuracy.
    clusters
        Keep so many clusters of the inputs apart, found by k-means.
    input_moments
        Covariance of the inputs: ``"full"`` (``d^2`` numbers), ``"diagonal"`` (``d``), or a rank
        ``r`` (``d r + d``). For MNIST a rank of 50 does as well as all of it; diagonals are off by
        a factor of two wherever inputs are correlated.
    layer_moments
        Whether to keep means, covariances and pairs of gates for every layer too, for the
        estimator ``"anchored"``: ``2 n^2`` numbers for a layer of ``n`` units.
    batch_size
        Examples at a time.
    seed
        Of the clusters.
    progress
        Whether to show a bar; None: on a terminal, when it takes long.

    Returns
    -------
    FunctionSummary
        On the device of the network. Summaries of parts of the data add up (``+``). It holds no
        example; but the mean of a class or cluster of very few is close to each of them, and that
        of one is the example.

    Raises
    ------
    OptionError
        For options out of range, or that exclude each other.
    DataError
        For data that are empty, shuffled, augmented or not finite, and labels that do not fit.
    ShapeError
        When the network does not take the inputs.
    NetworkError
        For weights that are not finite.
    UnsupportedLayerError
        When moments of the layers are asked of a network that is no chain of known ones.
    """
    _check_options(classes, clusters, input_moments, batch_size)
    examples = Examples.read(data, name="data", targets=False)
    first = examples.select(torch.zeros(1, dtype=torch.long)).inputs
    numbers = isinstance(first, Tensor) and first.is_floating_point()
    shape = tuple(first.shape[1:]) if isinstance(first, Tensor) else ()
    reference = ReferenceNetwork.of(net, shape)
    if layer_moments:
        _check_widths(reference)  # refuses a network that cannot be read
    chain = numbers and _is_chain(reference)
    components = _components(examples, classes, clusters, seed)
    count = int(components.max()) + 1
    probes = [probe(reference, number) for number in range(NUM_PROBES)]
    parts: list[FunctionSummary] = []
    with torch.no_grad(), track(len(examples), "Summarising", enabled=progress) as advance:
        for batch in examples.batches(batch_size):
            own = components[batch.indices]
            inputs = _moved(batch.inputs, reference)
            rows = inputs.flatten(1).double() if isinstance(inputs, Tensor) and numbers else None
            old = reference.outputs(reference.tensors, inputs)
            statistics = batch_statistics(
                own.to(reference.device),
                count,
                old.double(),
                rows=rows,
                stages=walk(reference.graph, rows) if chain and rows is not None else (),
                full=input_moments != "diagonal",
                layers=layer_moments,
            )
            part = FunctionSummary(
                reference,
                statistics,
                "diagonal" if input_moments == "diagonal" else "full",
                _probed(reference, probes, inputs, old) / len(batch),
                () if numbers else _token_laws(batch.inputs, own, count),
            )
            parts = [parts[0] + part] if parts else [part]
            advance(len(batch))
    total = parts[0]
    moments = total.statistics.inputs
    if isinstance(input_moments, int) and isinstance(moments, Moments):
        low = replace(total.statistics, inputs=LowRankMoments.of(moments, input_moments))
        total = replace(total, statistics=low, input_moments=input_moments)
    return total


def _is_chain(reference: ReferenceNetwork) -> bool:
    """Whether closed forms can read the network; its inputs can be drawn in any case."""
    try:
        _ = reference.graph
    except UnsupportedLayerError:
        return False
    return True


def _moved(inputs: Inputs, reference: ReferenceNetwork) -> Inputs:
    def move(column: Tensor) -> Tensor:
        kind = reference.dtype if column.is_floating_point() else column.dtype
        return column.to(reference.device, kind)

    return Table(inputs, None).map(move).inputs


def _token_laws(
    inputs: Inputs, components: Int64[Tensor, " B"], count: int
) -> tuple[TokenLaw, ...]:
    if count > 1:
        raise OptionError(
            "tokens are summarised in one component",
            where="classes",
            advice="Summarise each class of token sequences by itself.",
        )
    del components
    if isinstance(inputs, tuple):
        raise DataError(
            "the inputs are several tensors",
            where="data",
            advice="Give one tensor, or a mapping with input_ids and attention_mask.",
        )
    return (TokenLaw.of(inputs, order="bigram"),)


def _probed(
    reference: ReferenceNetwork, probes: list[Params], inputs: Inputs, old: Float[Tensor, "B K"]
) -> Float[Tensor, "probes metrics"]:
    """Summed discrepancies of perturbed weights over a batch."""
    rows = []
    for weights in probes:
        new = reference.outputs(weights, inputs).double()
        sums = [discrepancy(old.double(), new, m).sum() for m in get_args(Metric)]
        rows.append(torch.stack(sums))
    return torch.stack(rows).cpu()


def _components(
    examples: Examples, classes: Any, clusters: int | None, seed: int
) -> Int64[Tensor, " N"]:
    if classes is not None:
        return label_components(examples, classes)
    if clusters is not None:
        return cluster_inputs(examples, clusters, seed)
    return torch.zeros(len(examples), dtype=torch.long)


def _check_options(classes: Any, clusters: int | None, input_moments: Any, batch_size: int) -> None:
    if classes is not None and clusters is not None:
        raise OptionError(
            "both classes and clusters are given",
            where="clusters",
            advice="Choose one: components are either.",
        )
    rank = isinstance(input_moments, int) and not isinstance(input_moments, bool)
    if not (input_moments in {"full", "diagonal"} or (rank and input_moments > 0)):
        raise OptionError(
            f"{input_moments!r}",
            where="input_moments",
            advice='Choose "full", "diagonal" or a positive rank.',
        )
    if batch_size < 1:
        raise OptionError(
            f"{batch_size!r} examples", where="batch_size", advice="Give a positive number."
        )


def _check_widths(reference: ReferenceNetwork) -> None:
    widest = max((stage.affine.linear.out_features for stage in reference.graph.stages), default=0)
    if widest > _PAIRED:
        raise ShapeError(
            f"a layer has {widest:,} units, and moments of all their pairs are too many",
            where="layer_moments",
            advice="Leave layer_moments=False for this network.",
        )
