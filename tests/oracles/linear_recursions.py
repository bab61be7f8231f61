"""Stationary covariances of linear recursions ``x <- A x + noise``, by a dense solve."""

import math

import torch

F64 = torch.float64


def stationary_covariance(matrix, noise_covariance):
    """``S = A S A^T + Q``."""
    size = len(matrix)
    kron = torch.kron(matrix, matrix)
    solution = torch.linalg.solve(
        torch.eye(size * size, dtype=F64) - kron, noise_covariance.reshape(-1)
    )
    return solution.reshape(size, size)


def langevin_position_variance(curvature, step_size, friction, gradient_noise_variance=0.0):
    """Of drift, fluctuation, drift and a noisy kick on ``a w^2 / 2``, in that order."""
    half_drift = torch.tensor([[1.0, step_size / 2], [0.0, 1.0]], dtype=F64)
    kept = math.exp(-friction * step_size)
    fluctuate = torch.tensor([[1.0, 0.0], [0.0, kept]], dtype=F64)
    kick = torch.tensor([[1.0, 0.0], [-step_size * curvature, 1.0]], dtype=F64)
    fluctuation = torch.tensor([[0.0, 0.0], [0.0, 1 - kept**2]], dtype=F64)
    shaken = torch.tensor([[0.0, 0.0], [0.0, step_size**2 * gradient_noise_variance]], dtype=F64)
    after = kick @ half_drift
    covariance = stationary_covariance(
        after @ fluctuate @ half_drift, after @ fluctuation @ after.T + shaken
    )
    return float(covariance[0, 0])
