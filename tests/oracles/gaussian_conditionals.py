"""Gaussian laws from their energies: second derivatives and dense inverses, no more."""

import torch


def law_of_energy(energy, like):
    """Mean and covariance of the density exp(-energy), energy a quadratic function of one tensor.

    Returns them flat: ``(size,)`` and ``(size, size)``.
    """
    origin = torch.zeros(like.numel(), dtype=torch.float64)

    def flat(values):
        return energy(values.reshape(like.shape))

    gradient = torch.func.grad(flat)
    precision = torch.func.jacrev(gradient)(origin)
    covariance = torch.linalg.inv(precision)
    return -covariance @ gradient(origin), covariance


def law_of_draws(draw, size):
    """Mean and covariance of ``draw(normals)``, an affine function of standard normals.

    `draw` maps ``(chains, size)`` to ``(chains, ...)``; the columns of the affine map are read off
    by giving every unit vector to a chain of its own.
    """
    normals = torch.cat([torch.zeros(1, size), torch.eye(size), -torch.eye(size)]).double()
    drawn = draw(normals).flatten(1).double()
    mean = drawn[0]
    columns = drawn[1 : size + 1] - mean
    assert torch.allclose(columns, mean - drawn[size + 1 :], atol=1e-9), "it is not affine"
    return mean, columns.T @ columns


def assert_same_law(draw, size, energy, like, tolerance=1e-9, present=None, alpha=0.0):
    """Fail unless ``draw`` of so many normals has the law of ``exp(-energy)``.

    Over-relaxed by ``alpha`` from a present value: mean and covariance as Adler has them.
    """
    mean, covariance = law_of_draws(draw, size)
    true_mean, true_covariance = law_of_energy(energy, like)
    if alpha:
        true_mean = true_mean + alpha * (present - true_mean)
        true_covariance = (1 - alpha**2) * true_covariance
    scale = true_covariance.diagonal().max()
    torch.testing.assert_close(
        mean, true_mean, rtol=0, atol=tolerance * float(scale.sqrt() + true_mean.abs().max())
    )
    torch.testing.assert_close(covariance, true_covariance, rtol=0, atol=tolerance * float(scale))
