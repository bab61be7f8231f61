"""The Gaussian full conditionals of a network with noise behind every map.

Each function returns one draw for each chain and is an affine function of standard normal numbers
that it is given; jointly it is *linear* in data (targets, prior means) and normals, which is all
that `over_relaxed` needs. Variances are numbers, or tensors ``(chains,)`` where they are learned.
Factorisations are made in float64, and scaled by the noise so that nothing is divided by a small
variance.

With the notation of Piccioli, Troiani and Zdeborová (arXiv 2306.02729): ``variance`` is
``Delta`` of the variable that is drawn given what came before it, ``target_variance`` that of what
comes behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.sampling.intermediate_noise.convolutions import (
    Convolution,
    block_means,
    spread_blocks,
)

__all__ = [
    "Variance",
    "convolution_inputs",
    "identity_inputs",
    "linear_inputs",
    "linear_inputs_size",
    "over_relaxed",
    "pooling_inputs",
    "ridge",
    "ridge_factor",
    "wide_ridge",
    "wide_ridge_factor",
    "with_ones",
]

Variance: TypeAlias = float | Float[Tensor, " chains"]
"""The same for all chains, or one for each."""
_Number: TypeAlias = float | Tensor

_MOST_STEPS = 500
_TOLERANCE = 1e-10
_STEPS_PER_CHECK = 5  # asking whether all have converged makes an accelerator wait


def over_relaxed(
    conditional: Callable[..., Tensor],
    data: tuple[Tensor, ...],
    normals: Tensor,
    current: Tensor,
    alpha: float,
) -> Tensor:
    """Adler's over-relaxation: ``mean + alpha (current - mean) + sqrt(1 - alpha^2) noise``.

    Parameters
    ----------
    conditional
        ``conditional(*data, normals)`` draws, linear in all its arguments together.
    data, normals
        Its arguments.
    current
        The present value, of the shape of a draw.
    alpha
        In ``(-1, 1)``; 0 draws afresh.

    Returns
    -------
    Tensor
        A value whose law is the conditional one if that of `current` is.
    """
    if alpha == 0:
        return conditional(*data, normals)
    # Scaling the data by 1 - alpha scales the mean by it: no second solve is needed.
    scaled = tuple((1 - alpha) * item for item in data)
    fresh = conditional(*scaled, math.sqrt(1 - alpha**2) * normals)
    return torch.add(fresh, current, alpha=alpha)


def with_ones(inputs: Float[Tensor, "*lead n d"]) -> Float[Tensor, "*lead n e"]:
    """Inputs with a constant column in front, for the bias.

    Returns
    -------
    Tensor
        ``(*lead, n, 1 + d)``.
    """
    return torch.cat([inputs.new_ones(*inputs.shape[:-1], 1), inputs], -1)


# --- weights and biases --------------------------------------------------------------------------


def ridge_factor(
    gram: Float[Tensor, "*lead q q"], noise: Variance, precision: Float[Tensor, "*prior q"]
) -> Float[Tensor, "*result q q"]:
    """The factor that `ridge` takes: Cholesky's of ``gram + noise * precision``.

    Parameters
    ----------
    gram
        ``X^T X`` in float64, ``(chains, q, q)`` or ``(q, q)``.
    noise
        Variance of the targets given inputs and weights.
    precision
        Of the prior of the weights, ``(q,)`` or ``(chains, q)``.

    Returns
    -------
    Tensor
        Lower triangular, ``(q, q)`` when nothing depends on the chain; NaN for a chain whose matrix
        is not positive definite.
    """
    diagonal = torch.diag_embed(_wide(noise, 2) * precision.double())
    return _cholesky(gram + diagonal)


def ridge(
    lower: Float[Tensor, "*lead q q"],
    noise: Variance,
    cross: Float[Tensor, "chains q p"],
    normals: Float[Tensor, "chains size"],
) -> Float[Tensor, "chains q p"]:
    """Weights (and biases) of a linear map given its inputs and targets, all units at once.

    The law is ``N(A^-1 X^T Z / noise, A^-1)`` with ``A = X^T X / noise + precision`` for every
    unit; one factor serves mean and noise.

    Parameters
    ----------
    lower
        From `ridge_factor`; ``(q, q)`` when all chains share it.
    noise
        As in `ridge_factor`.
    cross
        ``X^T Z``.
    normals
        ``(chains, q * p)``.

    Returns
    -------
    Tensor
        ``(chains, q, p)`` float64.
    """
    chains, size, units = cross.shape
    noises = normals.unflatten(1, (size, units)).double()
    if lower.dim() == 2:  # one system with many right-hand sides
        flat = cross.double().movedim(1, 0).reshape(size, -1)
        half = torch.linalg.solve_triangular(lower, flat, upper=False)
        half = half.view(size, chains, units)
        half = half + (_root(_wide(noise, 2)) * noises).movedim(1, 0)
        drawn = torch.linalg.solve_triangular(lower.mT, half.flatten(1), upper=True)
        return drawn.view(size, chains, units).movedim(0, 1)
    half = torch.linalg.solve_triangular(lower, cross.double(), upper=False)
    half = half + _root(_wide(noise, 3)) * noises
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)


def wide_ridge_factor(
    inputs: Float[Tensor, "*lead n q"], noise: Variance, precision: Float[Tensor, "*prior q"]
) -> Float[Tensor, "*result n n"]:
    """The factor that `wide_ridge` takes: Cholesky's of ``X precision^-1 X^T + noise``.

    Parameters
    ----------
    inputs
        ``X``, ``(chains, n, q)`` or ``(n, q)``.
    noise, precision
        As in `ridge_factor`.

    Returns
    -------
    Tensor
        Lower triangular, ``(n, n)`` when nothing depends on the chain.
    """
    wide = inputs.double()
    kernel = (wide / precision.double()[..., None, :]) @ wide.mT
    unit = torch.ones(inputs.shape[-2], dtype=torch.float64, device=inputs.device)
    return _cholesky(kernel + torch.diag_embed(_wide(noise, 2) * unit))


def wide_ridge(
    lower: Float[Tensor, "*lead n n"],
    inputs: Float[Tensor, "*batch n q"],
    noise: Variance,
    precision: Float[Tensor, "*other q"],
    targets: Float[Tensor, "chains n p"],
    normals: Float[Tensor, "chains size"],
) -> Float[Tensor, "chains q p"]:
    """The same law as `ridge` for more inputs than examples: draw from the prior, then correct it.

    Parameters
    ----------
    lower
        From `wide_ridge_factor`.
    inputs, noise, precision
        As there.
    targets
        ``Z``.
    normals
        ``(chains, (q + n) * p)``.

    Returns
    -------
    Tensor
        ``(chains, q, p)`` float64.
    """
    _, count, units = targets.shape
    size = inputs.shape[-1]
    first, second = normals.double().split([size * units, count * units], 1)
    inverse = 1 / precision.double()[..., None]
    prior = inverse.sqrt() * first.unflatten(1, (size, units))
    wide = inputs.double()
    misfit = targets.double() - wide @ prior
    misfit = misfit + _root(_wide(noise, 3)) * second.unflatten(1, (count, units))
    if lower.dim() == 2:
        flat = torch.cholesky_solve(misfit.movedim(1, 0).reshape(count, -1), lower)
        solved = flat.view(count, -1, units).movedim(0, 1)
    else:
        solved = torch.cholesky_solve(misfit, lower)
    return prior + inverse * (wide.mT @ solved)


# --- what a linear map, a convolution or a pooling takes -----------------------------------------


def linear_inputs_size(inputs: int, outputs: int) -> int:
    """Standard normals that `linear_inputs` takes for each example.

    Returns
    -------
    int
        ``inputs + outputs``, or ``inputs`` for maps to more units.
    """
    return inputs + outputs if outputs <= inputs else inputs


def linear_inputs(
    weight: Float[Tensor, "chains p d"],
    variance: Variance,
    target_variance: Variance,
    mean: Float[Tensor, "chains n d"],
    target: Float[Tensor, "#chains n p"],
    normals: Float[Tensor, "chains size"],
) -> Float[Tensor, "chains n d"]:
    """What a linear map takes, given what it gives: prior ``N(mean, variance)``.

    All examples of a chain share one covariance ``(W^T W / target_variance + 1 / variance)^-1``. It
    is factored as ``p`` by ``p`` by perturbing a draw from the prior, or as ``d`` by ``d``. Weights
    that are zero are no special case.

    Parameters
    ----------
    weight
        Of the map.
    variance
        Of the inputs about `mean`.
    target_variance
        Of the targets about ``weight @ inputs``.
    mean
        Of the inputs before the targets are known.
    target
        What the map gave, less its bias.
    normals
        ``(chains, n * linear_inputs_size(d, p))``.

    Returns
    -------
    Tensor
        ``(chains, n, d)``.
    """
    chains, count, size = mean.shape
    units = weight.shape[1]
    ratio = _wide(_ratio(target_variance, variance), 3)
    noise = _root(_cast(_wide(target_variance, 3), mean))
    if units > size:
        fine = weight.double()
        lower = _cholesky(_plus_diagonal(fine.mT @ fine, ratio))
        unit = torch.eye(size, dtype=torch.float64, device=mean.device).expand(chains, -1, -1)
        inverse = torch.linalg.solve_triangular(lower, unit, upper=False).to(mean.dtype)
        half = (target @ weight + _cast(ratio, mean) * mean) @ inverse.mT
        return (half + noise * normals.unflatten(1, (count, size))) @ inverse
    first, second = normals.split([count * size, count * units], 1)
    drawn = mean + _root(_cast(_wide(variance, 3), mean)) * first.unflatten(1, (count, size))
    misfit = target + noise * second.unflatten(1, (count, units)) - drawn @ weight.mT
    if units == 1:
        gain = weight / (weight.square().sum(2, keepdim=True) + _cast(ratio, mean))
    else:
        fine = weight.double()
        lower = _cholesky(_plus_diagonal(fine @ fine.mT, ratio))
        gain = torch.cholesky_solve(fine, lower).to(mean.dtype)
    return torch.baddbmm(drawn, misfit, gain)


def convolution_inputs(
    convolution: Convolution,
    weight: Float[Tensor, "chains out c kh kw"],
    variance: Variance,
    target_variance: Variance,
    mean: Float[Tensor, "chains n c h w"],
    target: Float[Tensor, "#chains n out i j"],
    normals: Float[Tensor, "chains size"],
    *,
    tolerance: float = _TOLERANCE,
    most_steps: int = _MOST_STEPS,
) -> tuple[Float[Tensor, "chains n c h w"], Float[Tensor, " chains"]]:
    """What a convolution takes, given what it gives: `linear_inputs` by conjugate gradients.

    Every image is a system of its own; its condition number is at most
    ``1 + variance / target_variance * |weight|^2``. An image that is solved is left alone, so that
    no chain depends on its neighbours.

    Parameters
    ----------
    convolution
        The map.
    weight
        Its filters.
    variance, target_variance, mean, target
        As in `linear_inputs`.
    normals
        ``(chains, inputs + outputs)`` of all examples.
    tolerance
        Of the residual, relative to the right-hand side.
    most_steps
        After which an image is left as it is.

    Returns
    -------
    images
        ``(chains, n, c, h, w)``.
    unsolved
        ``(chains,)`` float64: images that `most_steps` did not solve.
    """
    inputs, outputs = mean[0].numel(), math.prod(target.shape[1:])
    first, second = normals.split([inputs, outputs], 1)
    scale = _root(_cast(_wide(variance, 5), mean))
    drawn = mean + scale * first.unflatten(1, mean.shape[1:])
    noise = _root(_cast(_wide(target_variance, 5), mean))
    misfit = target + noise * second.unflatten(1, target.shape[1:])
    misfit = (misfit - convolution.apply(drawn, weight)).double()
    fine, ratio = weight.double(), _wide(_ratio(target_variance, variance), 5)

    def product(outputs: Tensor) -> Tensor:
        return convolution.apply(convolution.adjoint(outputs, fine), fine) + ratio * outputs

    solution, unsolved = _conjugate_gradients(product, misfit, tolerance, most_steps)
    correction = convolution.adjoint(solution, fine).to(mean.dtype)
    return drawn + correction, unsolved.sum(1, dtype=torch.float64)


def pooling_inputs(
    kernel: tuple[int, int],
    variance: Variance,
    target_variance: Variance,
    mean: Float[Tensor, "chains n c h w"],
    target: Float[Tensor, "chains n c i j"],
    normals: Float[Tensor, "chains size"],
) -> Float[Tensor, "chains n c h w"]:
    """What average pooling takes, given what it gives; blocks are independent.

    Parameters
    ----------
    kernel
        Height and width of a block of ``m`` pixels.
    variance, target_variance, mean
        As in `linear_inputs`.
    target
        What the pooling gave.
    normals
        One for each pixel.

    Returns
    -------
    Tensor
        ``(chains, n, c, h, w)``; pixels outside all blocks come from their prior.
    """
    pixels = math.prod(kernel)
    # share = variance / (variance + m target_variance); q = (1 - sqrt(1 - share)) / m.
    share = 1 / (1 + pixels * _wide(_ratio(target_variance, variance), 5))
    kept = _root(1 - share)
    noise = normals.unflatten(1, mean.shape[1:])
    scale = _cast(_root(_wide(variance, 5)), mean)
    shift = _cast(share, mean) * (target - block_means(mean, kernel))
    shift = shift - scale * _cast(1 - kept, mean) * block_means(noise, kernel)
    size = (mean.shape[-2], mean.shape[-1])
    return mean + scale * noise + spread_blocks(shift, kernel, size)


def identity_inputs(
    variance: Variance,
    target_variance: Variance,
    mean: Float[Tensor, "chains *shape"],
    target: Float[Tensor, "chains *shape"],
    normals: Float[Tensor, "chains size"],
) -> Float[Tensor, "chains *shape"]:
    """What an identity map takes, given what it gives.

    Parameters
    ----------
    variance, target_variance, mean, target
        As in `linear_inputs`.
    normals
        One for each number.

    Returns
    -------
    Tensor
        Of the shape of `mean`.
    """
    axes = mean.dim()
    share = 1 / (1 + _wide(_ratio(target_variance, variance), axes))
    scale = _cast(_root(_wide(variance, axes) * (1 - share)), mean)
    noise = scale * normals.unflatten(1, mean.shape[1:])
    return mean + _cast(share, mean) * (target - mean) + noise


# --- small things --------------------------------------------------------------------------------


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], target: Tensor, tolerance: float, most_steps: int
) -> tuple[Tensor, Tensor]:
    """Solutions of one system for each ``(chain, example)``, and which of them are not solved."""

    def dot(left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum((2, 3, 4), keepdim=True)

    solution, residual, direction = torch.zeros_like(target), target, target
    squared = dot(residual, residual)
    enough = tolerance**2 * squared
    open_ = squared > enough
    for step in range(most_steps):
        if step % _STEPS_PER_CHECK == 0 and not bool(open_.any()):
            break
        image = product(direction)
        curvature = dot(direction, image)
        length = torch.where(open_, squared / curvature, 0.0)
        solution = solution + length * direction
        residual = residual - length * image
        fresh = dot(residual, residual)
        direction = residual + torch.where(open_, fresh / squared, 0.0) * direction
        squared, open_ = fresh, open_ & (fresh > enough)
    return solution, open_[:, :, 0, 0, 0]


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower factors, NaN where there is none: one chain that is lost must not stop the others."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    return lower.masked_fill(info[..., None, None] != 0, torch.nan)


def _plus_diagonal(matrix: Tensor, value: _Number) -> Tensor:
    unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + value * unit


def _wide(variance: _Number, dimensions: int) -> _Number:
    """With axes of length one behind that of the chains."""
    if isinstance(variance, Tensor):
        return variance.reshape(-1, *(1,) * (dimensions - 1))
    return variance


def _root(variance: _Number) -> _Number:
    return variance.sqrt() if isinstance(variance, Tensor) else math.sqrt(variance)


def _ratio(above: _Number, below: _Number) -> _Number:
    return above / below


def _cast(variance: _Number, like: Tensor) -> _Number:
    return variance.to(like.dtype) if isinstance(variance, Tensor) else variance
