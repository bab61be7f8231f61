"""What is kept of a data set: means and covariances, gathered batch by batch and merged exactly.

Every statistic is a mean over the examples of a component (a class, a cluster, or all), or a
covariance about such a mean. Two parts of the data are merged by Chan's update, so that a stream of
batches, shards and processes all come to the same result up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pushforward.function_space.chain import Moments
from pushforward.gaussians.activations import Activation
from pushforward.networks.graph import NetworkGraph

__all__ = [
    "LowRankMoments",
    "OutputStatistics",
    "StageStatistics",
    "Statistics",
    "batch_statistics",
    "mean_curvatures",
    "merge_moments",
    "walk",
]


@dataclass(frozen=True, eq=False)
class StageStatistics:
    """Of the units of one stage.

    Parameters
    ----------
    gate_mean, gate_square
        Mean slope ``E[phi'(s)]`` and mean squared slope of each unit, ``(c, n)``: for ReLU both are
        the probability that it is active.
    layer
        Moments of the activations themselves, if kept.
    """

    gate_mean: Tensor
    gate_square: Tensor
    layer: Moments | None = None


@dataclass(frozen=True, eq=False)
class OutputStatistics:
    """Of the outputs.

    Parameters
    ----------
    moments
        Mean ``(c, K)`` and covariance ``(c, K, K)``.
    fisher, softmax
        Mean curvature ``(c, K, K)`` of the metrics that need one.
    """

    moments: Moments
    fisher: Tensor
    softmax: Tensor


@dataclass(frozen=True, eq=False)
class LowRankMoments:
    """Means, and covariances ``F F^T + diag(rest)``.

    Parameters
    ----------
    mean
        ``(c, n)``.
    factor
        ``F``, ``(c, n, r)``.
    rest
        Variance that the factor leaves, ``(c, n)``.
    """

    mean: Tensor
    factor: Tensor
    rest: Tensor

    @classmethod
    def of(cls, moments: Moments, rank: int) -> LowRankMoments:
        """The largest directions of each covariance, and the variance that they leave.

        Parameters
        ----------
        moments
            With whole covariances.
        rank
            Directions that are kept, at most.

        Returns
        -------
        LowRankMoments
            Its diagonal is exact.
        """
        values, vectors = torch.linalg.eigh(moments.covariance)
        factor = vectors[..., -rank:] * values[..., -rank:].clamp(min=0).sqrt().unsqueeze(-2)
        variance = moments.covariance.diagonal(dim1=-2, dim2=-1)
        return cls(moments.mean, factor, (variance - factor.square().sum(-1)).clamp(min=0))

    @property
    def whole(self) -> Moments:
        """With covariances written out, ``(c, n, n)``."""
        return Moments(self.mean, self.factor @ self.factor.mT + torch.diag_embed(self.rest))


@dataclass(frozen=True, eq=False)
class Statistics:
    """All that is kept of some examples.

    Parameters
    ----------
    counts
        Examples in each component, ``(c,)``, float64.
    inputs
        Of the flattened inputs; the covariance is ``(c, d, d)``, or ``(c, d)`` where only its
        diagonal is kept, or of low rank. None for inputs that are no numbers.
    stages
        One for each stage of the network; none for a network that is no chain of stages.
    outputs
        Of the outputs.
    """

    counts: Tensor
    inputs: Moments | LowRankMoments | None
    stages: tuple[StageStatistics, ...]
    outputs: OutputStatistics

    def __add__(self, other: Statistics) -> Statistics:
        mine, theirs = self.counts, other.counts

        def mean(a: Tensor, b: Tensor) -> Tensor:
            return _weighted(a, mine, b, theirs)

        def moments(a: Moments, b: Moments) -> Moments:
            return merge_moments(a, mine, b, theirs)

        stages = []
        for one, two in zip(self.stages, other.stages, strict=True):
            layer = (
                None if one.layer is None or two.layer is None else moments(one.layer, two.layer)
            )
            stages.append(
                StageStatistics(
                    mean(one.gate_mean, two.gate_mean),
                    mean(one.gate_square, two.gate_square),
                    layer,
                )
            )
        outputs = OutputStatistics(
            moments(self.outputs.moments, other.outputs.moments),
            mean(self.outputs.fisher, other.outputs.fisher),
            mean(self.outputs.softmax, other.outputs.softmax),
        )
        a, b = self.inputs, other.inputs
        inputs: Moments | LowRankMoments | None = None
        if isinstance(a, LowRankMoments) and isinstance(b, LowRankMoments):
            inputs = LowRankMoments.of(moments(a.whole, b.whole), a.factor.shape[-1])
        elif isinstance(a, Moments) and isinstance(b, Moments):
            inputs = moments(a, b)
        return Statistics(mine + theirs, inputs, tuple(stages), outputs)


def merge_moments(
    first: Moments, first_count: Tensor, second: Moments, second_count: Tensor
) -> Moments:
    """Moments of the union of two sets of examples (Chan, Golub and LeVeque, 1979).

    Parameters
    ----------
    first, second
        Means ``(c, n)`` with covariances ``(c, n, n)``, or ``(c, n)`` for diagonals alone.
    first_count, second_count
        Examples of each component, ``(c,)``; either may be 0.

    Returns
    -------
    Moments
        Of all of them.
    """
    share = _share(first_count, second_count)
    apart = second.mean - first.mean
    between = apart.square()
    if first.covariance.dim() == 3:
        between = apart.unsqueeze(-1) * apart.unsqueeze(-2)
    spread = _weighted(first.covariance, first_count, second.covariance, second_count)
    both = (share * (1 - share)).reshape(-1, *[1] * (spread.dim() - 1))
    return Moments(first.mean + share[:, None] * apart, spread + both * between)


def batch_statistics(
    components: Int64[Tensor, " B"],
    num_components: int,
    outputs: Float[Tensor, "B K"],
    *,
    rows: Float[Tensor, "B d"] | None = None,
    stages: Iterable[tuple[Tensor, Tensor]] = (),
    full: bool = True,
    layers: bool = False,
) -> Statistics:
    """Statistics of one batch.

    Parameters
    ----------
    components
        To which component each example belongs.
    num_components
        How many there are.
    outputs
        Of the network, float64.
    rows
        Flattened inputs, float64; None where their law is kept in another way.
    stages
        From `walk`; nothing for a network that is no chain of stages.
    full
        Whether to keep the whole covariance of the inputs, or its diagonal.
    layers
        Whether to keep moments of the activations.

    Returns
    -------
    Statistics
        Components without an example in this batch have count 0.
    """
    members = torch.nn.functional.one_hot(components, num_components).to(outputs.dtype).mT
    counts = members.sum(1)
    average = members / counts.clamp(min=1)[:, None]
    groups = [torch.nonzero(components == k)[:, 0] for k in range(num_components)]

    def second(values: Tensor) -> Tensor:
        """Mean outer product in each component."""
        return torch.stack([v.mT @ v / max(len(v), 1) for v in (values[i] for i in groups)])

    def moments(values: Tensor, *, full: bool = True) -> Moments:
        mean = average @ values
        centred = values - mean[components]
        return Moments(mean, second(centred) if full else average @ centred.square())

    kept = tuple(
        StageStatistics(
            average @ slopes,
            average @ slopes.square(),
            moments(values) if layers else None,
        )
        for slopes, values in stages
    )
    probabilities = outputs.softmax(1)
    fisher, softmax = mean_curvatures([probabilities[i] for i in groups])
    inputs = None if rows is None else moments(rows, full=full)
    return Statistics(counts, inputs, kept, OutputStatistics(moments(outputs), fisher, softmax))


def mean_curvatures(
    groups: Sequence[Float[Tensor, "_ K"]],
) -> tuple[Float[Tensor, "c K K"], Float[Tensor, "c K K"]]:
    """Means of ``S = diag p - p p^T`` and of ``S^2``, as products of matrices of all rows.

    ``S^2 = diag p^2 - p (p^2)^T - (p^2) p^T + |p|^2 p p^T``: no matrix for each example is formed.

    Parameters
    ----------
    groups
        Probabilities ``p`` of the rows of each component, ``(_, K)``.

    Returns
    -------
    fisher, softmax : Tensor
        ``(c, K, K)`` each; the curvatures of the two metrics.
    """
    fisher, softmax = [], []
    for p in groups:
        count, square = max(len(p), 1), p.square()
        fisher.append(torch.diag(p.sum(0)) / count - p.mT @ p / count)
        crossed = p.mT @ square / count
        inner = (p * square.sum(1, keepdim=True)).mT @ p / count
        softmax.append(torch.diag(square.sum(0)) / count - crossed - crossed.mT + inner)
    return torch.stack(fisher), torch.stack(softmax)


def walk(
    graph: NetworkGraph, rows: Float[Tensor, "B d"]
) -> Iterator[tuple[Float[Tensor, "B n"], Float[Tensor, "B n"]]]:
    """Slopes and activations of each stage.

    Parameters
    ----------
    graph
        The network.
    rows
        Flattened inputs, float64.

    Yields
    ------
    tuple of Tensor
        ``phi'(s)`` and ``phi(s)``; 1 and ``s`` for units that are only carried along.
    """
    for stage in graph.stages:
        before = stage.affine.apply(rows)
        rows, slopes = before.clone(), torch.ones_like(before)
        for group in stage.groups:
            if not group.carried:
                rows[:, group.units] = group.activation(before[:, group.units])
                slopes[:, group.units] = slope(group.activation, before[:, group.units])
        yield slopes, rows


def slope(activation: Activation, values: Float[Tensor, "*units"]) -> Float[Tensor, "*units"]:
    """Derivative of an activation; at a breakpoint that of the piece on its right.

    Parameters
    ----------
    activation
        The function.
    values
        Where.

    Returns
    -------
    Tensor
        Of the shape of `values`.
    """
    with torch.enable_grad():
        at = values.detach().requires_grad_()
        (derivative,) = torch.autograd.grad(activation(at).sum(), at)
    return derivative


def _share(first_count: Tensor, second_count: Tensor) -> Tensor:
    """The second's share of all examples; 0 where there are none."""
    return second_count / (first_count + second_count).clamp(min=1)


def _weighted(a: Tensor, a_count: Tensor, b: Tensor, b_count: Tensor) -> Tensor:
    share = _share(a_count, b_count).reshape(-1, *[1] * (a.dim() - 1))
    return a + share * (b - a)
