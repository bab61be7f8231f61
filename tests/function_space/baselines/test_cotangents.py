import pytest
import torch

import oracles.function_space_baselines as oracle
from baseline_networks import numbers
from pushforward.errors import DataError, OptionError
from pushforward.function_space.baselines.cotangents import (
    check_fisher,
    cotangents,
    label_targets,
)
from pushforward.runs.rng import stream

METRICS = ("euclidean", "softmax", "kl", "fisher")


@pytest.mark.parametrize("metric", METRICS)
def test_exact_ones_square_to_the_curvature(metric):
    rows = 2 * numbers(5, 4, seed=1)
    found = cotangents(rows, metric, "exact")
    assert found.shape == (4, 5, 4)
    for b, row in enumerate(rows):
        square = found[:, b].T @ found[:, b]
        torch.testing.assert_close(square, oracle.row_curvature(row, metric), rtol=0, atol=1e-14)


@pytest.mark.statistical
@pytest.mark.parametrize("metric", METRICS)
def test_sampled_ones_square_to_it_in_the_mean(metric):
    row, count = 2 * numbers(4, seed=1), 40_000
    (found,) = cotangents(
        row.expand(count, -1), metric, "sampled", generator=stream(0, "sampled", metric)
    )
    terms = found.unsqueeze(1) * found.unsqueeze(2)
    z = terms.mean(0) - oracle.row_curvature(row, metric)
    # Sixteen entries and four metrics: |z| < 4.5 fails by chance once in 2,300 seeds.
    assert float((z / (terms.std(0) / count**0.5)).abs().max()) < 4.5


@pytest.mark.parametrize("metric", ["kl", "fisher"])
def test_a_label_leaves_its_score(metric):
    rows = numbers(5, 4, seed=1).requires_grad_()
    labels = torch.tensor([0, 3, 2, 1, 1])
    (found,) = cotangents(rows.detach(), metric, "empirical", targets=labels)
    loss = torch.nn.functional.cross_entropy(rows, labels, reduction="sum")
    (slope,) = torch.autograd.grad(loss, rows)
    torch.testing.assert_close(found, slope)


def test_a_number_leaves_its_residual():
    rows, targets = numbers(5, 2, seed=1), numbers(5, 2, seed=2)
    chosen = label_targets(rows, targets, "euclidean", torch.tensor([1]))
    (found,) = cotangents(rows[:, 1:], "euclidean", "empirical", targets=chosen)
    torch.testing.assert_close(found, (rows - targets)[:, 1:])


def test_labels_are_counted_among_the_chosen_outputs():
    rows, chosen = numbers(3, 5, seed=1), torch.tensor([4, 1])
    found = label_targets(rows, torch.tensor([1, 4, 4]), "kl", chosen)
    assert found.tolist() == [1, 0, 0]
    with pytest.raises(DataError, match="label 2 is not among"):
        label_targets(rows, torch.tensor([1, 2, 4]), "kl", chosen)


def test_a_metric_that_is_no_likelihood_has_no_empirical_fisher():
    with pytest.raises(OptionError, match="no likelihood"):
        check_fisher("empirical", "softmax")
    with pytest.raises(OptionError, match="there is no fisher"):
        check_fisher("approximate", "kl")
    with pytest.raises(OptionError, match="metric"):
        check_fisher("exact", "cosine")
