"""``pf.learning_coefficient``: what its options do, what it leaves alone, and what it refuses."""

import json
from copy import deepcopy
from math import isnan, log
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import pushforward as pf
from degeneracy_problems import (
    UNIT,
    default_nbeta,
    draws,
    estimate,
    linear,
    network,
    regression,
    same,
    score,
)
from pushforward.degeneracy.estimate import _at_step_zero
from pushforward.degeneracy.quadrature import quadratic
from pushforward.errors import DataError, NetworkError, OptionError

# --- options -------------------------------------------------------------------------------------


def quick(net, data, loss=UNIT, **options):
    defaults = {"num_chains": 4, "num_draws": 16, "num_warmup": 10, "sampler": "sgld"}
    return estimate(net, data, loss, **(defaults | options))


def test_seeds_repeat_and_differ():
    net, data, _ = regression()
    assert same(quick(net, data), quick(net, data))
    assert float(quick(net, data, seed=1)) != float(quick(net, data))


@pytest.mark.wrong_types
def test_numbers_of_numpy_are_as_good():
    net, data, _ = regression()
    plain = quick(net, data, nbeta=4.0, localization=0.5, step_size=0.25, num_draws=20)
    theirs = quick(
        net,
        data,
        nbeta=np.float32(4),
        localization=np.float64(0.5),
        step_size=np.float32(0.25),
        num_draws=np.int64(20),
    )
    assert same(theirs, plain)
    assert json.loads(json.dumps(theirs.to_dict()))["value"] == float(plain)


def test_the_network_is_left_as_it_was():
    net, data, _ = regression()
    before, state = deepcopy(net.state_dict()), torch.get_rng_state()
    quick(net, data)
    quick(net, data, sampler="mala", metric="layerwise")
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
        assert not value.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_subset_is_a_network_of_its_own():
    """Of two columns of inputs, one held: the coefficient of a line through the other."""
    net, (x, y), _ = regression()

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = nn.Linear(2, 1, bias=False)
            self.free = nn.Linear(2, 1, bias=False)

        def forward(self, inputs):
            return self.held(inputs[:, 2:]) + self.free(inputs[:, :2])

    two = network(Two)[0]
    with torch.no_grad():
        two.free.weight.copy_(net[0].weight[:, :2])
        two.held.weight.copy_(net[0].weight[:, 2:])
    options = {"sampler": "langevin", "num_chains": 32, "num_draws": 100}
    found = estimate(two, (x, y), subset="free.*", **options)
    assert found.num_parameters == 2
    h = torch.linalg.eigvalsh(x[:, :2].T @ x[:, :2] / 100)
    assert abs(score(found, quadratic(h, default_nbeta(100), 1.0))) < 4


def test_normalisation_counts():
    net = network(linear(3, 4), lambda: nn.LayerNorm(4), nn.Tanh, linear(4, 1))
    data = (draws(30, 3), draws(30, 1))
    found = quick(net, data, realisable=True)
    assert found.num_parameters == 16 + 8 + 5
    assert quick(net, data, subset="1.*", realisable=True).num_parameters == 8


@pytest.mark.parametrize(
    ("loss", "outputs"), [(pf.Categorical(), 3), (pf.Bernoulli(), 1), (pf.Gaussian(0.5), 2)]
)
def test_a_realisable_network_is_at_a_minimum(loss, outputs):
    net = network(linear(2, outputs))
    x = draws(40, 2)
    targets = loss.sample(-4 * net(x).detach(), torch.Generator().manual_seed(0))
    found = estimate(net, (x, targets), loss, sampler="mala", realisable=True, num_draws=100)
    assert found.verdict == "OK"
    assert float(found) > 0
    assert found.slope == pytest.approx(0, abs=1e-9)
    # The losses of a realisable network are no logarithms of probabilities of data.
    assert found.losses.min() >= found.initial_loss - 1e-12


def test_a_loss_of_ones_own_has_no_information_criterion():
    def loss(outputs, targets):
        return (outputs - targets).square().sum(1)

    net, data, _ = regression()
    found = quick(net, data, loss)
    assert found.singular_fluctuation is None
    assert isnan(found.waic)
    assert found.to_dict()["waic"] is None
    known = quick(net, data)
    assert known.singular_fluctuation.value > 0
    assert known.waic > 0.5 * log(2 * torch.pi)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError])
def test_a_network_that_cannot_be_differentiated_twice(error, monkeypatch):
    def refused(*_):
        raise error("derivative not implemented")

    monkeypatch.setattr("pushforward.degeneracy.estimate.quadratic_answer", refused)
    net, data, _ = regression()
    found = quick(net, data)
    assert found.quadratic is None
    assert isnan(found.slope)
    assert "quadratic" not in repr(found)
    assert found.to_dict()["quadratic"] is None


def test_left_alone_it_is_exact_and_chooses_its_spring():
    net, data, _ = regression()
    found = pf.learning_coefficient(
        net, data, UNIT, num_chains=4, num_draws=16, num_warmup=10, progress=False
    )
    assert (found.sampler, found.metric) == ("hmc", "euclidean")
    assert found.localization == 1.0
    assert found.nbeta == pytest.approx(default_nbeta(100))


def test_other_data_restrict_it():
    net, (x, y), _ = regression()
    part = (x[:30], y[:30])
    options = {"sampler": "mala", "num_chains": 32, "num_draws": 100, "num_warmup": 100}
    found = estimate(net, part, **options)
    h = torch.linalg.eigvalsh(x[:30].T @ x[:30] / 30)
    assert found.num_examples == 30
    assert abs(score(found, quadratic(h, default_nbeta(30), 1.0))) < 4


def test_progress_is_shown_when_asked_for(capsys):
    net, data, _ = regression()
    quick(net, data, progress=False)
    assert capsys.readouterr() == ("", "")


# --- refused before anything is sampled ----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nbeta": 0.0}, "nbeta: 0"),
        ({"localization": -1.0}, "localization: -1"),
        ({"step_size": float("nan")}, "step_size: nan"),
        ({"num_chains": 1}, "num_chains: 1"),
        ({"num_draws": 3}, "num_draws: 3"),
        ({"num_warmup": -1}, "num_warmup: -1"),
        ({"sampler": "nuts"}, "sampler 'nuts'"),
        ({"metric": "fisher"}, "metric 'fisher'"),
        ({"subset": "conv*"}, r"subset: 'conv\*'"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_options_out_of_range(options, message):
    net, data, _ = regression()
    with pytest.raises(OptionError, match=message):
        quick(net, data, **options)


def test_problems_that_are_none():
    net, (x, y), _ = regression()
    with pytest.raises(NetworkError, match="Dropout is in training mode"):
        quick(nn.Sequential(net, nn.Dropout(0.5)).train(), (x, y))
    with pytest.raises(DataError, match="no examples"):
        quick(net, (x[:0], y[:0]))
    with pytest.raises(OptionError, match="noise variance"):
        quick(net, (x, y), pf.Gaussian())
    with pytest.raises(OptionError, match="realisable"):
        quick(net, (x, y.abs().round()), pf.Poisson(), realisable=True)
    with pytest.raises(OptionError, match="reduction='none'"):
        quick(net, (x, y), nn.functional.mse_loss)


@pytest.mark.wrong_types
def test_the_bias_that_is_expected_is_taken_off():
    """Discretisation raises the value: at step zero it is below what the smaller step gave."""
    coarse = SimpleNamespace(value=10.0, standard_error=0.5)
    fine = SimpleNamespace(value=10.0, standard_error=0.5)
    value, _ = _at_step_zero(coarse, fine, bias=1.0)
    assert value < 10.0
    unbiased, _ = _at_step_zero(coarse, fine, bias=0.0)
    assert value < unbiased
