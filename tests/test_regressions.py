"""Networks and arguments that were once answered wrongly without a word."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import pushforward as pf
from pushforward.errors import (
    LawError,
    OptionError,
    ShapeError,
    UnsupportedLayerError,
)

LAW = pf.GaussianLaw.standard(6, dtype=torch.float64)


def small(*, bias=True):
    torch.manual_seed(0)
    layers = nn.Linear(6, 16, bias=bias), nn.ReLU(), nn.Linear(16, 16, bias=bias), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(16, 3, bias=bias)).double()


class Net(nn.Module):
    """Two layers around a function of the hidden pre-activations."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.middle = middle

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_are_refused(register):
    net = small()
    getattr(net[0], register)(lambda *_: None)
    with pytest.raises(UnsupportedLayerError, match="hook"):
        pf.propagate(net, LAW)


@pytest.mark.parametrize(
    "middle",
    [
        lambda h: functional.relu(h.view(-1, 8), inplace=True) + h,
        lambda h: functional.relu(torch.flatten(h, 1), inplace=True) + h,
        lambda h: h + (h[:, :4].relu_() * 0).sum(1, keepdim=True),
    ],
)
def test_a_write_through_a_view_is_refused(middle):
    with pytest.raises(UnsupportedLayerError, match="in place"):
        pf.propagate(Net(middle).double(), LAW)


def test_an_in_place_chain_is_fine():
    net = Net(lambda h: functional.relu(h, inplace=True) * 2).double()
    plain = Net(lambda h: functional.relu(h) * 2).double()
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(pf.propagate(net, LAW).mean, pf.propagate(plain, LAW).mean)


def test_zero_biases_have_their_true_gradient():
    net = small()
    for layer in net[::2]:
        nn.init.zeros_(layer.bias)
    pf.propagate(net, LAW, standard_error=False).mean.sum().backward()
    torch.testing.assert_close(net[4].bias.grad, torch.ones(3, dtype=torch.float64))


def test_the_gauge_stays_on_without_biases():
    names = {check.name for check in pf.propagate(small(bias=False), LAW).checks}
    assert "angular-gauge" in names


def test_one_member_of_a_batch_decides_the_gauge_for_all(monkeypatch):
    net = small(bias=False)
    means = torch.zeros(4, 6, dtype=torch.float64)
    means[3, 0] = 1.0
    law = pf.GaussianLaw(means, 1.0)
    whole = pf.propagate(net, law)
    monkeypatch.setattr("pushforward.cumulants.propagation._BATCH_BYTES", 1)
    torch.testing.assert_close(pf.propagate(net, law).mean, whole.mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("threshold", [0.5, 2.0])
def test_softplus_keeps_its_threshold(threshold):
    net = nn.Sequential(nn.Linear(6, 32), nn.Softplus(2.0, threshold), nn.Linear(32, 2)).double()
    sampled = pf.monte_carlo(net, LAW, 2**16)
    found = pf.propagate(net, LAW)
    # One hidden layer is exact: |z| < 5 fails by chance less than once in 10^6.
    assert ((found.mean - sampled.mean) / sampled.standard_error).abs().max() < 5


def test_rescaling_a_homogeneous_unit_changes_nothing():
    net = small()
    before = pf.propagate(net, LAW).mean
    with torch.no_grad():
        for tensor in (net[0].weight, net[0].bias):
            tensor[:8] *= 1e-12
        net[2].weight[:, :8] *= 1e12
    torch.testing.assert_close(pf.propagate(net, LAW).mean, before, rtol=1e-6, atol=1e-9)


def test_stacked_activations_are_told():
    net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Tanh(), nn.Linear(64, 2)).double()
    checks = {check.name: check for check in pf.propagate(net, LAW).checks}
    assert checks["stacked-activations"].status == "warn"
    assert "2" in checks["stacked-activations"].detail
    assert "stacked-activations" not in {c.name for c in pf.propagate(small(), LAW).checks}


def test_concatenating_unequal_shapes_is_refused():
    class Bad(nn.Module):
        def forward(self, x):
            return torch.cat([x.unsqueeze(1), x.unsqueeze(2)], 1)

    with pytest.raises(ShapeError, match="cat"):
        pf.propagate(Bad(), LAW)


def test_a_learned_activation_parameter_is_refused():
    net = Net(None).double()
    net.bound = nn.Parameter(torch.zeros(()))
    net.middle = lambda h: torch.clamp(h, min=net.bound)
    with pytest.raises(UnsupportedLayerError, match="learned"):
        pf.propagate(net, LAW)


def test_a_bad_member_of_a_batch_of_covariances_is_found():
    eye = torch.eye(2, dtype=torch.float64)
    with pytest.raises(LawError, match="semi-definite"):
        pf.GaussianLaw(torch.zeros(2, 2), torch.stack([1e8 * eye, -eye]))


def test_rows_of_thresholds_over_a_batch_of_laws():
    net, means = small(), torch.randn(4, 6, dtype=torch.float64)
    batch = pf.propagate(net, pf.GaussianLaw(means, 0.5))
    rows = torch.tensor([[0.0], [0.1], [0.2], [0.3]], dtype=torch.float64)
    found = batch.tail_probability(rows)
    assert found.shape == (4, 4, 3)
    one = pf.propagate(net, pf.GaussianLaw(means[2], 0.5)).tail_probability(0.1)
    torch.testing.assert_close(found[1, 2], one, rtol=1e-6, atol=1e-9)


def test_arguments_of_results_are_checked():
    law = pf.propagate(small(), LAW)
    with pytest.raises(ShapeError, match="levels"):
        law.tail_probability(torch.ones(4))
    with pytest.raises(ShapeError, match="offset"):
        law.project(torch.ones(2, 3), torch.ones(2, 1))
    with pytest.raises(OptionError, match="NaN"):
        law.tail_probability(float("nan"))
    with pytest.raises(OptionError, match=r"^order: True is no whole number"):
        pf.propagate(small(), LAW, True)


def test_expect_samples_wide_inputs_with_few_samples():
    net = nn.Sequential(nn.Linear(600, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    found = pf.expect(net, pf.GaussianLaw.standard(600), 1e-4, max_samples=4096)
    assert "antithetic" in found.method
    assert found.cost.evaluations >= 4096
