"""What is known of a deep linear network, beside its loss."""

import importlib

import pytest
import torch


@pytest.fixture
def networks():
    return importlib.import_module("reproductions.learning_coefficient.linear_networks")


def test_the_quadratic_value_is_that_of_the_curvatures_of_the_loss(networks):
    generator = torch.Generator().manual_seed(0)
    net = networks.linear_network((3, 2, 4, 3), (2, 2, 3), generator)
    x = torch.eye(3, dtype=torch.float64) * (3 * networks.INPUT_VARIANCE) ** 0.5
    targets = net(x).detach()
    vector = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    names, shapes = zip(*((n, p.shape) for n, p in net.named_parameters()), strict=True)

    def loss(weights):
        parts = weights.split([shape.numel() for shape in shapes])
        named = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return (torch.func.functional_call(net, named, (x,)) - targets).square().mean()

    hessian = torch.func.jacrev(torch.func.grad(loss))(vector)
    curvatures = torch.linalg.eigvalsh(hessian).clamp(min=0)
    expected = 0.5 * (7 * curvatures / (7 * curvatures + 2)).sum()
    assert networks.exact_quadratic(net, 7.0, 2.0) == pytest.approx(float(expected))


def test_no_quadratic_value_where_the_matrix_is_too_large(networks):
    net = networks.linear_network((60, 2, 60), (2, 2), torch.Generator().manual_seed(0))
    assert networks.exact_quadratic(net, 7.0, 2.0) is None
