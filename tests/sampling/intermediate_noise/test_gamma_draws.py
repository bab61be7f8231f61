"""Gamma variables by inversion, against SciPy."""

import pytest
import torch
from scipy.special import gammaincinv

from pushforward.sampling.intermediate_noise.gamma_draws import gamma_quantile


@pytest.mark.parametrize("shape", [0.5, 0.7, 1.0, 1.5, 3.0, 10.0, 100.0, 1e3, 1e4, 1e6])
def test_quantiles(shape):
    levels = [1e-200, 1e-12, 1e-5, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.99999, 1 - 1e-12]
    uniforms = torch.tensor([*levels, 1 - 2.0**-53], dtype=torch.float64)
    expected = torch.from_numpy(gammaincinv(shape, uniforms.numpy()))
    found = gamma_quantile(torch.tensor(shape, dtype=torch.float64), uniforms)
    assert torch.allclose(found, expected, rtol=1e-9, atol=0)


def test_zero_is_a_number_like_others():
    shape = torch.tensor([0.5, 1.0, 50.0], dtype=torch.float64)
    found = gamma_quantile(shape, torch.zeros(3, dtype=torch.float64))
    assert torch.isfinite(found).all()
    assert (found >= 0).all()


def test_shapes_broadcast():
    shape = torch.tensor([1.0, 2.0], dtype=torch.float64)
    uniforms = torch.full((3, 1), 0.4, dtype=torch.float64)
    found = gamma_quantile(shape, uniforms)
    assert found.shape == (3, 2)
    assert torch.equal(found[0], found[2])
