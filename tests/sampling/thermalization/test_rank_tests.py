"""Ranks of the truth: uniform for exchangeable draws, and only for those."""

import pytest
import torch

from pushforward.sampling.thermalization.rank_tests import (
    judge_ranks,
    normalised_rank,
    thinned,
    uniformity,
)

PROBLEMS = 300


def _ranks(width, draws=20, shift=0.0):
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(PROBLEMS):
        truth = torch.randn((), generator=generator, dtype=torch.float64)
        values = shift + width * torch.randn(draws, generator=generator, dtype=torch.float64)
        uniform = float(torch.rand((), generator=generator))
        found.append(normalised_rank(float(truth), values, uniform))
    return found


@pytest.mark.statistical
def test_ranks_of_exchangeable_draws_are_uniform():
    assert uniformity(_ranks(1.0)) > 1e-3
    assert uniformity(_ranks(1.0, draws=1)) > 1e-3


@pytest.mark.statistical
@pytest.mark.parametrize(("width", "shift"), [(0.5, 0.0), (2.0, 0.0), (1.0, 0.7)])
def test_draws_that_are_narrow_wide_or_shifted_are_found_out(width, shift):
    assert uniformity(_ranks(width, shift=shift)) < 1e-6


def test_a_rank_counts_what_is_below():
    draws = torch.tensor([1.0, 2.0, 3.0])
    assert normalised_rank(2.5, draws, 0.0) == 0.5
    assert normalised_rank(0.0, draws, 0.5) == 0.125
    # among equal values the place is drawn: three draws like the truth leave four places
    assert normalised_rank(1.0, torch.ones(3), 0.5) == 0.5


def test_dependent_draws_are_thinned():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4, 2000, generator=generator, dtype=torch.float64)
    assert len(thinned(noise)) == 63
    walk = noise[:, :1].expand(4, 2000) + 0.01 * noise  # four values, and little else
    assert len(thinned(walk)) <= 6
    assert len(thinned(torch.ones(4, 50))) == 1


def test_few_problems_are_not_tested_and_nan_is_rejected():
    assert judge_ranks({("informed", "x"): [0.5] * 7}) == ()
    (test,) = judge_ranks({("informed", "x"): [float("nan")] * 9})
    assert test.rejected


def test_the_threshold_is_shared():
    tests = judge_ranks({("zero", str(i)): _ranks(1.0) for i in range(3)})
    assert [test.quantity for test in tests] == ["0", "1", "2"]
    assert not any(test.rejected for test in tests)
