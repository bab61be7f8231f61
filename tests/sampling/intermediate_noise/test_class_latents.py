"""Latent scores of classes: each block against its own law, both against the law of the label."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_ndtr, ndtr

from oracles.elementwise_conditionals import ks_pvalue, largest_score, log_integral
from pushforward.sampling.intermediate_noise.class_latents import sample_class_latents

NOISE = 0.5


def problem(chains, n, classes, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    normals = torch.randn(2, chains, n, classes, generator=g, dtype=torch.float64)
    uniforms = torch.rand(chains, n, classes, generator=g, dtype=torch.float64)
    labels = torch.randint(classes, (n,), generator=g)
    return scale * normals[0], normals[1], labels, uniforms


def swept(means, labels, count, sweeps, seed, *, shifted=True):
    """Independent copies of one example, from zeros."""
    g = torch.Generator().manual_seed(seed)
    means = torch.tensor(means, dtype=torch.float64).expand(count, 1, -1)
    scores, labels = torch.zeros_like(means), torch.tensor([labels])
    for _ in range(sweeps):
        uniforms = torch.rand(means.shape, generator=g, dtype=torch.float64)
        shift = torch.rand(count, 1, generator=g, dtype=torch.float64) if shifted else None
        scores = sample_class_latents(means, NOISE, labels, uniforms, scores, shift)
    return scores[:, 0].numpy()


def law(log_density, low, high):
    """The distribution function, by integration from `low`, at any points."""
    whole = log_integral(log_density, low, high)
    grid = np.linspace(low, high, 401)[1:]
    steps = [math.exp(log_integral(log_density, low, z) - whole) for z in grid]
    return lambda z: np.interp(z, grid, steps)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_score_of_the_label_is_a_quantile_beyond_its_rivals(scale):
    means, current, labels, uniforms = problem(3, 50, 4, 0, scale)
    scores = sample_class_latents(means, NOISE, labels, uniforms, current)
    for chain in range(3):
        for i, label in enumerate(labels.tolist()):
            rival = max(current[chain, i, c].item() for c in range(4) if c != label)
            mean, z = means[chain, i, label].item(), scores[chain, i, label].item()
            # Q(z) / Q(rival) = 1 - u, compared by their logarithms.
            kept = log_ndtr((mean - z) / NOISE**0.5) - log_ndtr((mean - rival) / NOISE**0.5)
            assert kept == pytest.approx(math.log1p(-uniforms[chain, i, label]), abs=1e-8, rel=1e-8)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_other_scores_are_quantiles_below_it(scale):
    means, current, labels, uniforms = problem(3, 50, 4, 1, scale)
    scores = sample_class_latents(means, NOISE, labels, uniforms, current)
    largest = scores.gather(-1, labels[None, :, None].expand(3, -1, 1))
    reached = log_ndtr(((scores - means) / NOISE**0.5).numpy())
    reached -= log_ndtr(((largest - means) / NOISE**0.5).numpy())
    other = torch.nn.functional.one_hot(labels, 4).expand(3, -1, -1).numpy() == 0
    assert reached[other] == pytest.approx(uniforms.log().numpy()[other], abs=1e-8, rel=1e-8)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_label_has_the_largest_score(dtype, shifted):
    means, current, labels, uniforms = problem(2, 400, 10, 2, 20.0)
    shift = uniforms[..., 0].flip(0) if shifted else None
    scores = sample_class_latents(
        means.to(dtype), NOISE, labels, uniforms, current.to(dtype), shift
    )
    assert scores.dtype == dtype
    label = scores.gather(-1, labels[None, :, None].expand(2, -1, 1))
    assert bool((scores <= label).all())
    assert bool(scores.isfinite().all())


def test_a_shift_draws_the_mean_residual_and_nothing_else():
    means, current, labels, uniforms = problem(2, 50, 5, 3)
    shift = torch.rand(2, 50, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    still = sample_class_latents(means, NOISE, labels, uniforms, current)
    moved = sample_class_latents(means, NOISE, labels, uniforms, current, shift)
    step = moved - still
    assert torch.allclose(step, step[..., :1].expand_as(step), atol=1e-12)
    residual = (moved - means).mean(-1)
    assert torch.allclose(residual, torch.special.ndtri(shift) * (NOISE / 5) ** 0.5, atol=1e-12)


@pytest.mark.statistical
@pytest.mark.parametrize("gap", [-2.0, 0.0, 1.5])
def test_two_classes_are_a_probit(gap):
    # The difference of the scores is Gaussian with variance 2 d, positive where the label is 0.
    scores = swept([gap, 0.0], 0, 20_000, 3, seed=5)
    std = (2 * NOISE) ** 0.5
    least = ndtr(-gap / std)
    distribution = lambda t: (ndtr((t - gap) / std) - least) / (1 - least)  # noqa: E731
    assert ks_pvalue(scores[:, 0] - scores[:, 1], distribution) > 1e-4
    mean = scores.mean(1) - gap / 2
    assert ks_pvalue(mean, lambda t: ndtr(t / (NOISE / 2) ** 0.5)) > 1e-4


@pytest.mark.statistical
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("means", "label"), [((0.4, -0.3, 0.1), 1), ((0.0, 1.5, -2.0), 0)])
def test_the_label_score_has_its_marginal_law(means, label, shifted):
    sweeps = 8 if shifted else 30
    scores = swept(means, label, 20_000, sweeps, seed=6, shifted=shifted)
    distribution = law(largest_score(means, label, NOISE), -6.0, 8.0)
    assert ks_pvalue(scores[:, label], distribution) > 1e-4


def test_labels_and_noises_may_differ_between_chains():
    means, current, labels, uniforms = problem(2, 30, 3, 7)
    other = (labels + 1) % 3
    noises = torch.tensor([0.2, 3.0], dtype=torch.float64)
    together = sample_class_latents(
        means, noises[:, None, None], torch.stack([labels, other]), uniforms, current
    )
    for chain, own in enumerate((labels, other)):
        rows = slice(chain, chain + 1)
        alone = sample_class_latents(
            means[rows], noises[chain].item(), own, uniforms[rows], current[rows]
        )
        assert torch.allclose(together[rows], alone, rtol=1e-12, atol=1e-12)


def test_arguments_are_left_alone():
    arguments = problem(2, 30, 3, 8)
    kept = [t.clone() for t in arguments]
    means, current, labels, uniforms = arguments
    sample_class_latents(means, NOISE, labels, uniforms, current, uniforms[..., 0])
    assert all(torch.equal(t, k) for t, k in zip(arguments, kept, strict=True))


def test_scores_of_other_classes_alone_matter_for_a_start():
    means, current, labels, uniforms = problem(2, 30, 3, 9)
    at_label = labels[None, :, None].expand(2, -1, 1)
    changed = current.scatter(-1, at_label, 1e3)
    scores = sample_class_latents(means, NOISE, labels, uniforms, current)
    assert torch.equal(scores, sample_class_latents(means, NOISE, labels, uniforms, changed))
