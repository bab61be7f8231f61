"""Curvatures of potentials against dense Hessians."""

import pytest
import torch

import pushforward as pf
from pushforward.sampling.curvature import curvature_traces, largest_curvature
from pushforward.sampling.potential import Potential

F64 = torch.float64


def network_potential():
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    ).double()
    x = torch.randn(17, 3, dtype=F64, generator=generator)
    y = torch.randint(3, (17,), generator=generator)
    return Potential.of_network(
        net.eval(), (x, y), pf.Categorical(), prior_precision=0.5, localization=0.25, workspace=4000
    )


def density_potential():
    def density(p):
        return -(p["x"] ** 4).sum() - p["x"].prod() - p["x"][:2].square().sum()

    return Potential.of_density(density, {"x": torch.full((3,), 0.7, dtype=F64)})


def dense_hessians(potential, points):
    columns = [
        torch.autograd.functional.hessian(lambda v: differentiable(potential, v), p) for p in points
    ]
    return torch.stack(columns)


def differentiable(potential, vector):
    """U by its definition, for one vector."""
    if hasattr(potential, "log_density"):
        return -potential.log_density(potential.space.unravel(vector))
    outputs = potential.model(potential.space.unravel(vector), potential._held.inputs)
    loss = -potential.loss.log_prob(outputs, potential._held.targets).sum()
    away = vector - potential.model.vector
    return loss + 0.25 * vector.square().sum() + 0.125 * away.square().sum()


@pytest.mark.parametrize("make", [network_potential, density_potential])
def test_products_traces_and_the_largest_eigenvalue(make):
    potential = make()
    generator = torch.Generator().manual_seed(0)
    size = potential.space.size
    points = 0.5 * torch.randn(3, size, dtype=F64, generator=generator)
    vectors = torch.randn(3, size, dtype=F64, generator=generator)
    hessians = dense_hessians(potential, points)
    exact = (hessians @ vectors[..., None]).squeeze(-1)
    found = potential.curvature_product(points, vectors)
    tolerance = 1e-10 if make is network_potential else 1e-6  # differences of gradients
    assert torch.allclose(found, exact, rtol=tolerance, atol=tolerance)
    scale = torch.linspace(0.5, 2.0, size, dtype=F64)
    scaled = scale[:, None] * hessians * scale
    largest = torch.linalg.eigvalsh(scaled).abs().amax(1)
    estimate = largest_curvature(potential, points, vectors, scale=scale, rounds=400)
    assert torch.allclose(estimate, largest, rtol=1e-4)
    forms = curvature_traces(potential, points, vectors, scale=scale)
    assert torch.allclose(forms, torch.einsum("ci,cij,cj->c", vectors, scaled, vectors), rtol=1e-5)
    without = curvature_traces(potential, points, vectors)
    assert torch.allclose(without, (vectors * exact).sum(1), rtol=1e-5)


def test_a_point_that_is_not_finite_is_seen():
    potential = network_potential()
    points = torch.zeros(2, potential.space.size, dtype=F64)
    points[1] = torch.nan
    found = largest_curvature(potential, points, torch.ones_like(points))
    assert torch.isfinite(found).tolist() == [True, False]
