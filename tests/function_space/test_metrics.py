import pytest
import torch

from pushforward.errors import OptionError
from pushforward.function_space.metrics import discrepancy, output_curvature

METRICS = ("euclidean", "softmax", "kl", "fisher")


def _rows(seed=0):
    torch.manual_seed(seed)
    return torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)


def test_values_by_hand():
    old, new = torch.log(torch.tensor([[1.0, 3.0]])).double(), torch.zeros(1, 2).double()
    p, q = torch.tensor([0.25, 0.75]).double(), torch.tensor([0.5, 0.5]).double()
    assert discrepancy(old, new, "softmax").item() == pytest.approx(0.0625)
    assert discrepancy(old, new, "kl").item() == pytest.approx(float((p * (p / q).log()).sum()))
    change = float(torch.log(torch.tensor(3.0)))  # z1 - z0 = (0, -log 3); variance under p
    assert discrepancy(old, new, "fisher").item() == pytest.approx(0.25 * 0.75 * change**2 / 2)
    assert discrepancy(old, new, "euclidean").item() == pytest.approx(change**2 / 2)


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_moved_is_nothing(metric):
    old, _ = _rows()
    new = old.clone().requires_grad_()
    value = discrepancy(old, new, metric)
    value.sum().backward()
    assert value.abs().max() == 0
    assert new.grad.abs().max() < 1e-15


@pytest.mark.parametrize("metric", METRICS)
def test_curvature_is_the_second_derivative_at_the_old_outputs(metric):
    old, _ = _rows()
    curvature = output_curvature(old, metric)
    for row, expected in zip(old, curvature, strict=True):
        hessian = torch.autograd.functional.hessian(
            lambda new, row=row: discrepancy(row, new, metric), row
        )
        assert torch.allclose(hessian, expected, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_discrepancies_are_positive(metric):
    assert (discrepancy(*_rows(), metric) > 0).all()


@pytest.mark.wrong_types
def test_unknown_metrics_are_refused():
    with pytest.raises(OptionError, match="there is no metric 'l2'"):
        discrepancy(*_rows(), "l2")
