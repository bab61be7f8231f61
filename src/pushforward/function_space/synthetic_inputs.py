"""Synthetic inputs: drawn from Gaussians, or from a Markov chain of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from pushforward.errors import LawError, OptionError, ShapeError
from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.token_law import TokenLaw
from pushforward.networks.batches import Inputs, Table
from pushforward.runs.rng import stream

__all__ = [
    "SyntheticInputs",
    "allocate",
    "covariance_factor",
    "draw_gaussian",
    "token_inputs",
]

_INDEFINITE = 1e-6  # relative to the largest eigenvalue


@dataclass(frozen=True, eq=False)
class SyntheticInputs:
    """Inputs drawn from a mixture of laws, the components one after the other.

    Parameters
    ----------
    inputs
        ``(n, ...)``, in any form that the network takes.
    component
        ``(n,)``: which component each is from.
    weights
        ``(c,)``, float64: probabilities of the components.
    antithetic
        Whether rows ``2 k`` and ``2 k + 1`` are reflections of each other.
    """

    inputs: Inputs
    component: Int64[Tensor, " n"]
    weights: Float64[Tensor, " c"]
    antithetic: bool = False

    def __post_init__(self) -> None:
        if int(self.counts.min()) < (4 if self.antithetic else 2):
            raise OptionError(
                f"{self.counts.tolist()} samples of the components",
                where="counts",
                advice="Draw two of each at least, or four if antithetic: errors need a spread.",
            )

    @cached_property
    def counts(self) -> Int64[Tensor, " c"]:
        """Samples of each component."""
        return torch.bincount(self.component.cpu(), minlength=len(self.weights))

    @cached_property
    def row_weights(self) -> Float64[Tensor, " n"]:
        """Weight of each sample; they sum to one."""
        return (self.weights.cpu() / self.counts)[self.component.cpu()]

    def part(self, begin: int, end: int) -> Inputs:
        """Inputs of some consecutive samples.

        Parameters
        ----------
        begin, end
            The first, and the one behind the last.

        Returns
        -------
        Tensor, tuple or dict
            Views.
        """
        return Table(self.inputs, None).map(lambda column: column[begin:end]).inputs

    def component_means(self, rows: Float[Tensor, " n"]) -> Float[Tensor, " c"]:
        """Mean within each component of one number a sample.

        Parameters
        ----------
        rows
            ``(n,)``.

        Returns
        -------
        Tensor
            ``(c,)``, differentiable.
        """
        sums = rows.new_zeros(len(self.weights)).index_add(0, self.component.to(rows.device), rows)
        return sums / self.counts.to(rows)

    def component_errors(self, rows: Float[Tensor, " n"]) -> Float64[Tensor, " c"]:
        """Standard errors of these means.

        Parameters
        ----------
        rows
            ``(n,)``.

        Returns
        -------
        Tensor
            ``(c,)``, from the spread within each component, of pairs where samples are antithetic.
            Where tokens are stratified, or antithetic draws have exact second moments, they are too
            large rather than too small.
        """
        values, component = rows.detach().to("cpu", torch.float64), self.component.cpu()
        if self.antithetic:
            values, component = values.reshape(-1, 2).mean(1), component[::2]
        count = torch.bincount(component, minlength=len(self.weights)).to(torch.float64)
        mean = torch.zeros_like(count).index_add(0, component, values) / count
        squares = (values - mean[component]).square()
        spread = torch.zeros_like(count).index_add(0, component, squares) / (count - 1)
        return (spread / count).sqrt()


def allocate(
    weights: Float64[Tensor, " c"], num: int, *, antithetic: bool = False
) -> Int64[Tensor, " c"]:
    """How many samples each component gets.

    Parameters
    ----------
    weights
        ``(c,)``: probabilities.
    num
        Samples of all together.
    antithetic
        Whether numbers have to be even.

    Returns
    -------
    Tensor
        ``(c,)``: in proportion to the weights, rounded up, and enough for a standard error, so
        that their sum can exceed `num`.

    Raises
    ------
    LawError
        When weights are no probabilities.
    """
    _check_weights(weights)
    step = 2 if antithetic else 1
    # The slack keeps 0.1 * 30 at 3 whatever its last digit.
    counts = (weights.detach().cpu() * num / step - 1e-9).ceil().long() * step
    return counts.clamp(min=2 * step)


def covariance_factor(
    covariance: Float64[Tensor, "c D D"] | Float64[Tensor, "c D"],
) -> Float64[Tensor, "c D D"] | Float64[Tensor, "c D"]:
    """A factor to draw with, of singular covariances too.

    Parameters
    ----------
    covariance
        ``(c, D, D)``, or variances ``(c, D)`` of independent entries.

    Returns
    -------
    Tensor
        ``F`` with ``F F^T`` the covariance, or standard deviations.

    Raises
    ------
    LawError
        When a covariance is indefinite.
    """
    if covariance.dim() == 2:
        values, vectors = covariance, None
    else:
        values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    if bool((values < -_INDEFINITE * values.amax(-1, keepdim=True).abs()).any()):
        raise LawError(
            f"a covariance of the inputs is indefinite: it has the eigenvalue "
            f"{float(values.min()):.3g}",
            where="summary",
            advice="Summarise the data again: no data have such a covariance.",
        )
    roots = values.clamp(min=0).sqrt()
    return roots if vectors is None else vectors * roots.unsqueeze(-2)


def draw_gaussian(
    mean: Float64[Tensor, "c D"],
    factor: Float64[Tensor, "c D r"] | Float64[Tensor, "c D"],
    counts: Int64[Tensor, " c"],
    generator: torch.Generator,
    *,
    antithetic: bool = True,
) -> tuple[Float64[Tensor, "n D"], Int64[Tensor, " n"]]:
    """Draw from Gaussians.

    Parameters
    ----------
    mean
        ``(c, D)``: of each component.
    factor
        ``(c, D, r)``: factors ``F`` of the covariances ``F F^T``, of any rank; ``(c, D)``: standard
        deviations of independent entries.
    counts
        ``(c,)``: samples of each.
    generator
        On the CPU.
    antithetic
        Draw pairs that mirror each other at the mean, side by side; numbers of samples are then
        even.

    Returns
    -------
    samples : Tensor
        ``(n, D)``, the components one after the other.
    component : Tensor
        ``(n,)``: which each is from.

    Raises
    ------
    ShapeError
        When shapes do not fit, or counts are odd where pairs are wanted.
    """
    fits = factor.shape[:2] == mean.shape and counts.shape == mean.shape[:1]
    if not fits or (antithetic and bool((counts % 2 != 0).any())):
        raise ShapeError(
            f"mean {tuple(mean.shape)}, factor {tuple(factor.shape)}, counts {counts.tolist()}",
            where="draw_gaussian",
            advice="Give (c, D), (c, D, r) and c numbers, even ones for antithetic pairs.",
        )
    samples = []
    for c, count in enumerate(counts.tolist()):
        half = count // 2 if antithetic else count
        noise = torch.randn(half, factor.shape[-1], generator=generator, dtype=torch.float64)
        if antithetic and half >= factor.shape[-1]:
            # Columns of equal length at right angles: the covariance of the draws is exact.
            noise = torch.linalg.qr(noise).Q * half**0.5
        if antithetic:
            noise = torch.stack([noise, -noise], 1).flatten(0, 1)
        own = factor[c].cpu()
        samples.append(mean[c].cpu() + (noise @ own.T if factor.dim() == 3 else noise * own))
    return torch.cat(samples), torch.arange(len(counts)).repeat_interleave(counts.cpu())


def token_inputs(
    reference: ReferenceNetwork,
    laws: Sequence[TokenLaw],
    weights: Float64[Tensor, " c"],
    *,
    num: int,
    seed: int,
) -> SyntheticInputs:
    """Inputs of a network from a mixture of laws of tokens.

    Parameters
    ----------
    reference
        The network.
    laws
        Of the components; they draw inputs of one form.
    weights
        ``(c,)``: probabilities of the components.
    num
        Samples; see `allocate`.
    seed
        Of the samples.

    Returns
    -------
    SyntheticInputs
        On the device of the network.

    Raises
    ------
    ShapeError
        When there are not as many laws as weights.
    """
    if len(laws) != len(weights):
        raise ShapeError(
            f"{len(laws)} laws and {len(weights)} weights",
            where="weights",
            advice="Give one probability for each law.",
        )
    counts = allocate(weights, num)
    drawn = []
    for c, (law, count) in enumerate(zip(laws, counts.tolist(), strict=True)):
        generator = stream(seed, "function_space", "synthetic", "tokens", c)
        drawn.append(law.inputs(count, generator))
    first = drawn[0]
    if isinstance(first, dict):
        columns = [d for d in drawn if isinstance(d, dict)]
        inputs: Inputs = {key: torch.cat([d[key] for d in columns]) for key in first}
    else:
        inputs = torch.cat([d for d in drawn if isinstance(d, Tensor)])
    moved = Table(inputs, None).map(lambda column: column.to(reference.device)).inputs
    component = torch.arange(len(laws)).repeat_interleave(counts)
    return SyntheticInputs(moved, component, weights.detach().cpu())


def _check_weights(weights: Tensor) -> None:
    total = float(weights.sum())
    if weights.dim() != 1 or not bool((weights >= 0).all()) or abs(total - 1) > 1e-9:
        raise LawError(
            f"weights {weights.tolist()[:5]}",
            where="weights",
            advice="Give probabilities that sum to one.",
        )
