from dataclasses import replace

import pytest
import torch

from pushforward.function_space.chain import Change, Moments
from pushforward.function_space.metrics import discrepancy, output_curvature
from pushforward.function_space.output_change import OutputAnchor, mean_discrepancy
from pushforward.function_space.statistics import OutputStatistics


def _gaussian_pair(scale, seed=0):
    """Joint moments of outputs (3) and their change (3)."""
    torch.manual_seed(seed)
    factor = torch.randn(6, 6, dtype=torch.float64)
    factor[3:] *= scale
    covariance = factor @ factor.mT
    mean = torch.randn(6, dtype=torch.float64)
    mean[3:] *= scale
    return mean, covariance


def _pieces(mean, covariance):
    outputs = Moments(mean[None, :3], covariance[None, :3, :3])
    change = Change(mean[None, 3:], covariance[None, :3, 3:], covariance[None, 3:, 3:])
    return outputs, change


@pytest.mark.statistical
@pytest.mark.parametrize("metric", ["euclidean", "softmax", "kl", "fisher"])
@pytest.mark.parametrize("chosen", [None, [2, 0]])
def test_jointly_gaussian_outputs_are_integrated(metric, chosen):
    mean, covariance = _gaussian_pair(0.3)
    torch.manual_seed(1)
    draws = (
        mean + torch.randn(400_000, 6, dtype=torch.float64) @ torch.linalg.cholesky(covariance).mT
    )
    old, change = draws[:, :3], draws[:, 3:]
    outputs, moments = _pieces(mean, covariance)
    fisher, softmax = (output_curvature(old, m).mean(0)[None] for m in ("fisher", "softmax"))
    picked = (old, old + change) if chosen is None else (old[:, chosen], (old + change)[:, chosen])
    if metric == "fisher":
        # Curvature and change are taken as uncorrelated.
        curvature = output_curvature(picked[0], metric).mean(0)
        dz = picked[1] - picked[0]
        truth = float((curvature * (dz.mT @ dz / len(dz))).sum() / 2)
    else:
        truth = float(discrepancy(*picked, metric).mean())
    got = mean_discrepancy(
        moments,
        outputs,
        OutputStatistics(outputs, fisher, softmax),
        metric,
        chosen=None if chosen is None else torch.tensor(chosen),
        moved=True,
        num_samples=40_000,
        seed=0,
    )
    assert float(got) == pytest.approx(truth, rel=0.03)


def test_anchored_outputs_have_the_moments_of_the_data():
    torch.manual_seed(2)
    rows, component = (
        torch.randn(200, 3, dtype=torch.float64) ** 3,
        torch.arange(2).repeat_interleave(100),
    )
    mean = torch.randn(2, 3, dtype=torch.float64)
    factor = torch.randn(2, 3, 3, dtype=torch.float64)
    kept = OutputStatistics(Moments(mean, factor @ factor.mT), *[torch.eye(3).double()[None]] * 2)
    anchor = OutputAnchor.of(rows, component, replace(kept, fisher=kept.fisher.expand(2, 3, 3)))
    got = anchor.apply(rows, component)
    assert torch.allclose(anchor.apply(rows[150:151], component[150:151]), got[150:151])
    for c in (0, 1):
        part = got[component == c]
        assert torch.allclose(part.mean(0), mean[c])
        expected = factor[c] @ factor[c].mT
        assert torch.allclose(torch.cov(part.mT, correction=0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("metric", "kept"), [("softmax", "softmax"), ("kl", "fisher")])
def test_at_the_reference_the_kept_curvature_counts(metric, kept):
    """Nothing is drawn there: second derivatives are those of the outputs of the data."""
    torch.manual_seed(3)
    outputs, change = _pieces(*_gaussian_pair(1e-3))
    rows = 3 * torch.randn(20, 3, dtype=torch.float64)  # of another law than the closure's
    curvature = {m: output_curvature(rows, m).mean(0)[None] for m in ("fisher", "softmax")}
    got = mean_discrepancy(
        change,
        outputs,
        OutputStatistics(outputs, curvature["fisher"], curvature["softmax"]),
        metric,
        chosen=None,
        moved=False,
        num_samples=10,
        seed=0,
    )
    square = change.covariance[0] + torch.outer(change.mean[0], change.mean[0])
    assert float(got) == pytest.approx(float((curvature[kept][0] * square).sum() / 2), rel=1e-12)
