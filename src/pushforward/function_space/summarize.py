"""``pf.summarize``: one pass over the data, after which they are not needed any more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pushforward.errors import (
    DataError,
    OptionError,
    ShapeError,
    UnsupportedLayerError,
)
from pushforward.function_space.chain import Moments
from pushforward.function_space.components import cluster_inputs, label_components
from pushforward.function_space.metrics import Metric, discrepancy
from pushforward.function_space.network import ReferenceNetwork, require_finite_outputs
from pushforward.function_space.probes import NUM_PROBES, probe
from pushforward.function_space.statistics import LowRankMoments, batch_statistics, walk
from pushforward.function_space.summary import Components, FunctionSummary, InputMoments
from pushforward.function_space.token_law import TokenLaw
from pushforward.networks.batches import Inputs, Table
from pushforward.networks.data import Examples
from pushforward.options import whole_number
from pushforward.runs.progress import track
from pushforward.runs.rng import stream
from pushforward.typing import Params

__all__ = ["summarize"]

_BATCH_SIZE = 1024
_LOOKED_AT = 8  # examples that show whether the network is a function of each
_NO_TOKENS = (torch.bool, torch.uint8)
_PAIRED = 4096  # units of a layer whose pairs are kept at most


def summarize(
    net: nn.Module,
    data: Any,
    *,
    classes: Literal["targets"] | Tensor | None = None,
    num_classes: int | None = None,
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
    num_classes
        How many classes there are. Needed for a part of the data in which some do not occur.
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
        For data that are empty, shuffled, augmented or not finite, and labels that do not fit; for
        networks whose outputs are drawn, or depend on other examples of the batch, as far as the
        first few examples show it.
    ShapeError
        When the outputs have not one row for each example.
    NetworkError
        For inputs that the network does not take, and weights or outputs that are not finite.
    UnsupportedLayerError
        When moments of the layers are asked of a network that is no chain of known ones.
    """
    _check_components(classes, num_classes, clusters)
    num_classes = None if num_classes is None else whole_number(num_classes, "num_classes")
    clusters = None if clusters is None else whole_number(clusters, "clusters")
    if input_moments not in ("full", "diagonal"):
        advice = 'Choose "full", "diagonal" or a positive rank.'
        input_moments = whole_number(input_moments, "input_moments", advice=advice)
    batch_size = whole_number(batch_size, "batch_size")
    stream(seed, "clusters")  # refuses what is no seed
    if not isinstance(layer_moments, bool):
        raise OptionError(
            f"{layer_moments!r:.80} is neither True nor False",
            where="layer_moments",
            advice="Say whether to keep moments of every layer.",
        )
    examples = Examples.read(data, name="data", targets=False)
    with torch.inference_mode(False), torch.no_grad():
        return _summarised(
            net,
            examples,
            _components(examples, classes, num_classes, clusters, seed),
            num_classes,
            kind="classes" if classes is not None else "clusters" if clusters else "all",
            input_moments=input_moments,
            layer_moments=layer_moments,
            batch_size=batch_size,
            progress=progress,
        )


def _summarised(
    net: nn.Module,
    examples: Examples,
    components: Int64[Tensor, " N"],
    num_components: int | None,
    *,
    kind: Components,
    input_moments: InputMoments,
    layer_moments: bool,
    batch_size: int,
    progress: bool | None,
) -> FunctionSummary:
    first = examples.select(torch.arange(min(len(examples), batch_size, _LOOKED_AT))).inputs
    numbers = isinstance(first, Tensor) and first.is_floating_point()
    count = num_components or int(components.max()) + 1
    law = _token_laws(first, count) if not numbers else ()
    if law and input_moments != "full":
        raise OptionError(
            f"{input_moments!r}, but the inputs are tokens, which have no moments",
            where="input_moments",
            advice='Leave input_moments="full": counts of neighbouring tokens are kept.',
        )
    reference = ReferenceNetwork.of(
        net, tuple(first.shape[1:]) if isinstance(first, Tensor) else ()
    )
    # What is no function at all is told as such, before what closed forms cannot read.
    reference = reference.seen_on(_moved(first, reference))
    if layer_moments:
        _check_widths(reference)  # refuses a network that cannot be read
    chain = numbers and _is_chain(reference)
    probes = [probe(reference, number) for number in range(NUM_PROBES)]
    total: FunctionSummary | None = None
    with track(len(examples), "Summarising", enabled=progress) as advance:
        for batch in examples.batches(batch_size):
            inputs = _moved(batch.inputs, reference)
            rows = inputs.flatten(1).double() if isinstance(inputs, Tensor) and numbers else None
            old = reference.predict(inputs).double()
            require_finite_outputs(old)
            statistics = batch_statistics(
                components[batch.indices].to(reference.device),
                count,
                old,
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
                tokens=_token_laws(batch.inputs, count) if law else (),
            )
            total = part if total is None else total + part
            advance(len(batch))
    assert total is not None
    moments = total.statistics.inputs
    if isinstance(input_moments, int) and isinstance(moments, Moments):
        low = replace(total.statistics, inputs=LowRankMoments.of(moments, input_moments))
        total = replace(total, statistics=low, input_moments=input_moments)
    return replace(total, components=kind)


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


def _token_laws(inputs: Inputs, count: int) -> tuple[TokenLaw, ...]:
    """Of one batch; refuses what are neither numbers nor sequences of tokens."""
    if isinstance(inputs, tuple):
        raise DataError(
            "the inputs are several tensors",
            where="data",
            advice="Give one tensor, or a mapping with input_ids and attention_mask.",
        )
    if isinstance(inputs, Tensor) and (inputs.dim() != 2 or inputs.dtype in _NO_TOKENS):
        raise DataError(
            f"the inputs are {inputs.dtype} of shape {tuple(inputs.shape)}: neither floating point "
            "nor sequences of tokens (N, T)",
            where="data",
            advice="Convert images and features to floating point, as the network takes them.",
        )
    law = TokenLaw.of(inputs, order="bigram")
    if count > 1:
        raise OptionError(
            "tokens are summarised in one component",
            where="classes",
            advice="Summarise each class of token sequences by itself.",
        )
    return (law,)


def _probed(
    reference: ReferenceNetwork, probes: list[Params], inputs: Inputs, old: Float[Tensor, "B K"]
) -> Float[Tensor, "probes metrics"]:
    """Summed discrepancies of perturbed weights over a batch; 0 where a metric does not apply."""
    rows = []
    for weights in probes:
        new = reference.outputs(weights, inputs).double()
        known = [m for m in get_args(Metric) if m == "euclidean" or old.shape[1] > 1]
        sums = {m: discrepancy(old, new, m).sum() for m in known}
        rows.append(torch.stack([sums.get(m, old.new_zeros(())) for m in get_args(Metric)]))
    return torch.stack(rows).cpu()


def _components(
    examples: Examples, classes: Any, num_classes: int | None, clusters: int | None, seed: int
) -> Int64[Tensor, " N"]:
    if classes is not None:
        return label_components(examples, classes, num_classes)
    if clusters is not None:
        return cluster_inputs(examples, clusters, seed)
    return torch.zeros(len(examples), dtype=torch.long)


def _check_components(classes: Any, num_classes: Any, clusters: Any) -> None:
    if classes is not None and clusters is not None:
        raise OptionError(
            "both classes and clusters are given",
            where="clusters",
            advice="Choose one: components are either.",
        )
    if num_classes is not None and classes is None:
        raise OptionError(
            "num_classes without classes", where="num_classes", advice='Add classes="targets".'
        )


def _check_widths(reference: ReferenceNetwork) -> None:
    widest = max((stage.affine.linear.out_features for stage in reference.graph.stages), default=0)
    if widest > _PAIRED:
        raise ShapeError(
            f"a layer has {widest:,} units, and moments of all their pairs are too many",
            where="layer_moments",
            advice="Leave layer_moments=False for this network.",
        )
