"""Rank tests: among posterior draws, the truth takes every rank equally often.

Simulation-based calibration (Talts et al. 2018, arXiv 1804.06788). If a problem's parameters come
from the prior and its data from the model, the true value of any function is exchangeable with its
values at independent posterior draws. Chains give dependent draws, so they are thinned until about
independent. Draws that are too wide put the truth in the middle too often, too narrow ones at the
ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.sampling.thermalization.verdict import window_mean

__all__ = ["RankTest", "judge_ranks", "normalised_rank", "thinned", "uniformity"]

_MOST_DRAWS = 63
_FALSE_ALARMS = 1e-4  # of all rank tests of a report together
_FEWEST_PROBLEMS = 8


@dataclass(frozen=True)
class RankTest:
    """Ranks of the truth over problems.

    Parameters
    ----------
    start
        Of the chains, or ``"draws"`` of a sampler that has no start.
    quantity
        Whose ranks they are.
    ranks
        One for each problem, in ``[0, 1)``.
    p_value
        That they are uniform.
    rejected
        Whether chance is no explanation: one in 10,000 reports of correct draws has any.
    """

    start: str
    quantity: str
    ranks: tuple[float, ...]
    p_value: float
    rejected: bool


def thinned(values: Float[Tensor, "chains draws"]) -> Float[Tensor, " kept"]:
    """Draws that are about independent.

    Parameters
    ----------
    values
        ``(chains, draws)`` of one quantity.

    Returns
    -------
    Tensor
        As many, spread evenly, as there are effective ones, 63 at most. Effective draws are counted
        by the error of the mean from batches and from chains.
    """
    _, error = window_mean(values)
    variance = float(values.var(unbiased=False))
    if not error > 0 or not variance > 0:  # nothing moves, or NaN
        return values[:1, -1]
    count = int(max(1.0, min(_MOST_DRAWS, variance / error**2, values.numel())))
    at = torch.linspace(0, values.numel() - 1, count + 2, dtype=torch.float64)[1:-1].round().long()
    return values.flatten()[at.to(values.device)]


def normalised_rank(truth: float, draws: Float[Tensor, " draws"], uniform: float) -> float:
    """A rank made continuous, which is uniform on ``[0, 1)`` when truth and draws are exchangeable.

    Parameters
    ----------
    truth
        True value.
    draws
        ``(draws,)``, independent.
    uniform
        In ``[0, 1)``: it spreads the rank over its interval, and among equal values.

    Returns
    -------
    float
        Position of the truth among the draws.
    """
    below = int((draws < truth).sum())
    equal = int((draws == truth).sum())
    return (below + uniform * (equal + 1)) / (len(draws) + 1)


def uniformity(ranks: Sequence[float]) -> float:
    """Probability that uniform ranks look so little uniform.

    Parameters
    ----------
    ranks
        In ``[0, 1)``, independent.

    Returns
    -------
    float
        Kolmogorov and Smirnov's p-value of the ranks or of their distances from the middle,
        whichever is smaller, doubled. The first sees draws that are shifted, the second those that
        are too wide or too narrow.
    """
    from scipy.stats import kstest

    values = torch.tensor(ranks, dtype=torch.float64)
    if bool(values.isnan().any()):
        return 0.0
    found = [float(kstest(v.numpy(), "uniform").pvalue) for v in (values, (2 * values - 1).abs())]
    return min(1.0, 2 * min(found))


def judge_ranks(ranks: Mapping[tuple[str, str], Sequence[float]]) -> tuple[RankTest, ...]:
    """Test the ranks of several quantities.

    Parameters
    ----------
    ranks
        Of each problem, by start and quantity.

    Returns
    -------
    tuple of RankTest
        Of those with eight problems or more.
    """
    enough = {key: tuple(v) for key, v in ranks.items() if len(v) >= _FEWEST_PROBLEMS}
    threshold = _FALSE_ALARMS / max(1, len(enough))
    tests = []
    for (start, quantity), values in enough.items():
        p_value = uniformity(values)
        tests.append(RankTest(start, quantity, values, p_value, p_value < threshold))
    return tuple(tests)
