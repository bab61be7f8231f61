"""Results must not depend on how much is computed at a time."""

import pytest
import torch

from pushforward.cumulants import pair_expansion
from pushforward.cumulants.propagation import propagate
from pushforward.gaussians import activations, bivariate
from pushforward.gaussians.activations import SmoothActivation
from pushforward.gaussians.blocks import block_elements
from scenarios import correlated_law, he_network, normal


def test_blocks_are_small_on_a_cpu_and_large_elsewhere():
    on_cpu, elsewhere = block_elements(torch.device("cpu")), block_elements(torch.device("cuda"))
    assert 2**10 <= 8 * on_cpu <= 2**20  # float64 entries that fit a second-level cache
    assert elsewhere > 100 * on_cpu


@pytest.mark.parametrize("elements", [64, 1 << 30])
def test_propagation_does_not_depend_on_the_block_size(monkeypatch, elements):
    net = he_network(13, 2, inputs=6, outputs=3, bias=0.3, activation=torch.nn.GELU)
    law = correlated_law(6, spread=0.5)
    expected = [propagate(net, law, order) for order in (2, 3)]
    for module in (activations, bivariate, pair_expansion):
        monkeypatch.setattr(module, "block_elements", lambda device: elements)  # noqa: ARG005
    for order, one in zip((2, 3), expected, strict=True):
        other = propagate(net, law, order)
        torch.testing.assert_close(other.mean, one.mean, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(other.covariance, one.covariance, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(other.third, one.third, rtol=1e-10, atol=1e-13)


def test_tables_do_not_depend_on_the_block_size(monkeypatch):
    elu = SmoothActivation("elu", torch.nn.functional.elu, (0.0,))
    mean, std = normal(0, 50), normal(1, 50).abs() + 0.1
    expected = elu.hermite_table(mean, std, 3, 5)
    monkeypatch.setattr(activations, "block_elements", lambda device: 8)  # noqa: ARG005
    torch.testing.assert_close(elu.hermite_table(mean, std, 3, 5), expected, rtol=1e-12, atol=1e-15)
