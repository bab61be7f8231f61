"""Posteriors of the smallest networks with intermediate noise by quadrature over all parameters.

Latent variables are integrated in closed form (piecewise linear activations) or by Gauss-Hermite
rules, parameters on a grid: the trapezoidal rule converges faster than any power for densities
this smooth.
"""

import itertools
import math

import numpy as np
import torch

GRID = torch.linspace(-5, 5, 31, dtype=torch.float64)  # in prior standard deviations


def normal_cdf(z):
    return 0.5 * torch.special.erfc(-z / math.sqrt(2))


def piecewise_likelihood(m, a, c, y, segments, noises):
    """p(y | w, b, a, c) for m = w x + b: the pre-activation is in one segment or another."""
    dz, dx, dy = noises
    total = 0
    for low, high, slope, intercept in segments:
        # Given z: y ~ N(a (slope z + intercept) + c, a^2 dx + dy); z ~ N(m, dz).
        spread = a**2 * dx + dy
        gain = a * slope
        residual = y - a * intercept - c
        variance = spread + gain**2 * dz
        density = torch.exp(-0.5 * (residual - gain * m) ** 2 / variance) / variance.sqrt()
        precision = 1 / dz + gain**2 / spread
        center = (m / dz + gain * residual / spread) / precision
        root = precision.sqrt()
        mass = normal_cdf((high - center) * root) - normal_cdf((low - center) * root)
        total = total + density * mass / math.sqrt(2 * math.pi)
    return total


def one_unit_regression(x, y, segments, noises, precisions):
    """Log evidence, means and standard deviations of w, b, a, c of y = a f(w x + b) + c."""
    w, b, a, c = (
        (GRID / math.sqrt(precision)).reshape([-1 if k == i else 1 for k in range(4)])
        for i, precision in enumerate(precisions)
    )
    log_density = 0
    for value, precision in zip((w, b, a, c), precisions, strict=True):
        log_density = log_density - 0.5 * precision * value**2
        log_density = log_density + 0.5 * math.log(precision / (2 * math.pi))
    for xi, yi in zip(x.tolist(), y.tolist(), strict=True):
        likelihood = piecewise_likelihood(w * xi + b, a, c, yi, segments, noises)
        log_density = log_density + likelihood.clamp(min=1e-300).log()
    steps = math.prod((GRID[1] - GRID[0]).item() / math.sqrt(p) for p in precisions)
    return _moments(log_density, (w, b, a, c), steps)


def one_unit_without_bias(x, y, segments, noises, precisions, points=501):
    """Means and standard deviations of w and a of y = a f(w x)."""
    grid = torch.linspace(-6.5, 6.5, points, dtype=torch.float64)
    w = (grid / math.sqrt(precisions[0]))[:, None]
    a = (grid / math.sqrt(precisions[1]))[None, :]
    log_density = -0.5 * precisions[0] * w**2 - 0.5 * precisions[1] * a**2
    for xi, yi in zip(x.tolist(), y.tolist(), strict=True):
        likelihood = piecewise_likelihood(w * xi, a, 0.0, yi, segments, noises)
        log_density = log_density + likelihood.clamp(min=1e-300).log()
    return _moments(log_density, (w, a), 1.0)[1:]


def one_unit_smooth(x, y, function, noises, precisions, nodes=80):
    """The same for w and a of y = a f(w x): the pre-activation by a Gauss-Hermite rule."""
    dz, dx, dy = noises
    z, weights = np.polynomial.hermite_e.hermegauss(nodes)
    z, weights = torch.from_numpy(z), torch.from_numpy(weights / weights.sum())
    grid = torch.linspace(-6, 6, 121, dtype=torch.float64)
    w = (grid / math.sqrt(precisions[0]))[:, None]
    a = (grid / math.sqrt(precisions[1]))[None, :]
    log_density = -0.5 * precisions[0] * w**2 - 0.5 * precisions[1] * a**2
    for xi, yi in zip(x.tolist(), y.tolist(), strict=True):
        image = function(w[..., None] * xi + math.sqrt(dz) * z)
        variance = a[..., None] ** 2 * dx + dy
        density = torch.exp(-0.5 * (yi - a[..., None] * image) ** 2 / variance) / variance.sqrt()
        log_density = log_density + (density @ weights).log()
    return _moments(log_density, (w, a), 1.0)[1:]


def binary_probit(x, labels, noise, precisions):
    """Mean and standard deviation of differences of weights and biases of two classes."""
    u, v = (
        (GRID * math.sqrt(2 / precision)).reshape(shape)
        for precision, shape in zip(precisions, ((-1, 1), (1, -1)), strict=True)
    )
    log_density = -0.25 * precisions[0] * u**2 - 0.25 * precisions[1] * v**2
    for xi, label in zip(x.tolist(), labels.tolist(), strict=True):
        margin = (2 * label - 1) * (u * xi + v) / math.sqrt(2 * noise)
        log_density = log_density + torch.special.log_ndtr(margin)
    return _moments(log_density, (u, v), 1.0)[1:]


def three_class_probit(x, labels, noise, precision, nodes=60):
    """Means and standard deviations of the weights of three classes, scores w x."""
    z, weights = np.polynomial.hermite_e.hermegauss(nodes)
    z, weights = torch.from_numpy(z), torch.from_numpy(weights / weights.sum())
    w = [
        (GRID / math.sqrt(precision)).reshape([-1 if k == i else 1 for k in range(3)])
        for i in range(3)
    ]
    log_density = -0.5 * precision * sum(value**2 for value in w)
    for xi, label in zip(x.tolist(), labels.tolist(), strict=True):
        total = 0
        others = [c for c in range(3) if c != label]
        for node, weight in zip(z.tolist(), weights.tolist(), strict=True):
            inside = [normal_cdf(node + (w[label] - w[c]) * xi / math.sqrt(noise)) for c in others]
            total = total + weight * inside[0] * inside[1]
        log_density = log_density + total.log()
    return _moments(log_density, tuple(w), 1.0)[1:]


def segments_of(breaks, slopes, intercepts):
    ends = (-math.inf, *breaks, math.inf)
    return [
        (low, high, slope, intercept)
        for (low, high), slope, intercept in zip(
            itertools.pairwise(ends), slopes, intercepts, strict=True
        )
    ]


def _moments(log_density, variables, step):
    highest = log_density.max()
    weights = (log_density - highest).exp()
    total = weights.sum()
    means = torch.stack([(weights * v).sum() / total for v in variables])
    squares = torch.stack([(weights * v**2).sum() / total for v in variables])
    evidence = float(highest + total.log() + math.log(step))
    return evidence, means, (squares - means**2).sqrt()
