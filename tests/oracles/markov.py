"""Chains driven by hand, and what their draws should look like.

`drive` is the plainest loop around a kernel. `gaussian_scores` says how many standard errors the
moments of independent draws are away from those of a Gaussian: chains that start in a law and leave
it invariant are still there. `logistic_moments` integrates a posterior of two parameters on a grid.
"""

import math

import torch
from torch import nn

import pushforward as pf
from pushforward.sampling.noise import Noise
from pushforward.sampling.potential import Potential

F64 = torch.float64


def draw_noise(size, chains, generator, dtype=F64):
    return Noise(
        torch.randn(chains, size.normals, generator=generator, dtype=F64).to(dtype),
        torch.rand(chains, size.uniforms, generator=generator, dtype=F64),
    )


def begin(kernel, chains, seed=0, initial=None):
    generator = torch.Generator().manual_seed(seed)
    noise = draw_noise(kernel.start_size, chains, generator, kernel.dtype)
    return kernel.start(initial, noise), generator


def drive(kernel, chains, warmup, draws, seed=0, initial=None, keep=None):
    """Last state; draws ``(chains, draws, P)``; statistics ``(chains, draws)`` by name."""
    state, generator = begin(kernel, chains, seed, initial)

    def noise():
        return draw_noise(kernel.noise_size, chains, generator, kernel.dtype)

    for step in range(warmup):
        state = kernel.warm_up(state, noise(), step, warmup)
    vectors, statistics = [], []
    for _ in range(draws):
        state = kernel.step(state, noise())
        vectors.append(kernel.vectors(state) if keep is None else keep(state))
        statistics.append(dict(kernel.statistics(state)))
    vectors = torch.stack(vectors, 1) if vectors else torch.empty(chains, 0, 0)
    names = statistics[0] if statistics else ()
    return state, vectors, {n: torch.stack([s[n] for s in statistics], 1) for n in names}


def correlated_covariance(dimension, correlation=0.8, spread=3.0):
    """Equicorrelated, with standard deviations from 1 to `spread`."""
    scale = torch.logspace(0, math.log10(spread), dimension, dtype=F64)
    unit = torch.full((dimension, dimension), correlation, dtype=F64).fill_diagonal_(1.0)
    return scale[:, None] * unit * scale


def gaussian_potential(mean, covariance, dtype=F64):
    precision = torch.linalg.inv(covariance).to(dtype)
    centre = mean.to(dtype)

    def log_density(p):
        away = p["x"] - centre
        return -0.5 * (away * (precision @ away)).sum()

    return Potential.of_density(log_density, {"x": centre})


def isotropic_potential(dimension, curvature):
    return Potential.of_density(
        lambda p: -0.5 * curvature * (p["x"] * p["x"]).sum(),
        {"x": torch.zeros(dimension, dtype=F64)},
    )


def offset_potential(batch_size, outputs=1):
    """Offsets alone, seen through noise: a batch adds the same gradient noise wherever they are.

    Returns the potential, the curvature of an offset, and the variance of its batch gradient.
    """
    examples, noise_variance, prior_precision = 20, 0.5, 2.0
    targets = torch.linspace(-1, 1, examples, dtype=F64)
    order = torch.rand(examples, outputs, generator=torch.Generator().manual_seed(1)).argsort(0)
    net = nn.Linear(1, outputs, dtype=F64)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.zero_()
    potential = Potential.of_network(
        net.eval(),
        (torch.zeros(examples, 1, dtype=F64), targets[order]),
        pf.Gaussian(noise_variance=noise_variance),
        prior_precision=prior_precision,
        batch_size=batch_size,
        subset="bias",
    )
    curvature = examples / noise_variance + prior_precision
    spread = targets.var(correction=0).item() / noise_variance**2
    return potential, curvature, examples**2 / batch_size * spread


def gaussian_draws(mean, covariance, count, seed):
    generator = torch.Generator().manual_seed(seed)
    standard = torch.randn(count, len(mean), generator=generator, dtype=F64)
    return mean + standard @ torch.linalg.cholesky(covariance).T


def gaussian_scores(draws, mean, covariance):
    """First and second moments of independent draws, in standard errors from the true ones."""
    away = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (draws.double() - mean).T, upper=False
    )
    count, dimension = away.shape[1], len(mean)
    first = away.mean(1) * math.sqrt(count)
    second = away @ away.T / count - torch.eye(dimension, dtype=F64)
    second = second * math.sqrt(count) / (1 + torch.eye(dimension, dtype=F64)).sqrt()
    rows, columns = torch.tril_indices(dimension, dimension)
    return torch.cat([first, second[rows, columns]])


def scores_of_chains(quantities, truth):
    """Scores of means over ``(chains, draws, ...)``; independent chains give the standard error."""
    means = quantities.mean(1)
    error = means.std(0) / math.sqrt(len(means))
    return (means.mean(0) - truth) / error


LOGISTIC_INPUTS = torch.tensor(
    [[-2.1, 0.3], [-1.4, -0.8], [-0.9, 1.5], [-0.2, 0.1], [0.4, -1.2], [0.8, 0.9], [1.5, 0.2]],
    dtype=F64,
)
LOGISTIC_TARGETS = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=F64)


def logistic_log_density(weights):
    """Seven labelled points, two weights, a standard deviation of 3 a priori."""
    logits = LOGISTIC_INPUTS @ weights
    likelihood = LOGISTIC_TARGETS * logits - torch.nn.functional.softplus(logits)
    return likelihood.sum() - (weights * weights).sum() / 18


def logistic_potential(dtype=F64):
    return Potential.of_density(
        lambda p: logistic_log_density(p["w"].double()), {"w": torch.zeros(2, dtype=dtype)}
    )


def logistic_features(vectors):
    """What is compared: weights, their squares and product, and one probability."""
    a, b = vectors.double().unbind(-1)
    return torch.stack([a, b, a * a, b * b, a * b, torch.sigmoid(a - b)], -1)


def logistic_moments(half_width=24.0, points=801):
    """Their posterior means, by the trapezoidal rule."""
    axis = torch.linspace(-half_width, half_width, points, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    log_density = torch.func.vmap(logistic_log_density)(grid)
    weights = torch.softmax(log_density, 0)
    return weights @ logistic_features(grid)
