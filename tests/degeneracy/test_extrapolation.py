"""Extrapolation to temperature zero on two weights that multiply each other."""

import json

import pytest
import torch
from torch import nn

import pushforward as pf
from degeneracy_problems import UNIT
from pushforward.degeneracy import extrapolation as module
from pushforward.degeneracy.extrapolation import extrapolated_learning_coefficient
from pushforward.degeneracy.quadrature import finite_temperature
from pushforward.degeneracy.settings import Settings
from pushforward.errors import OptionError

F64 = torch.float64
NBETAS = [10.0, 80.0, 640.0]


def crossing(dtype=F64):
    """``w1 w2 x`` at zero, with ``x^2 = 1``: the loss is ``w1^2 w2^2 / 2``."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    return net.eval(), (torch.ones(8, 1, dtype=dtype), torch.zeros(8, 1, dtype=dtype))


@pytest.fixture(scope="module")
def found():
    options = {"num_draws": 100, "num_warmup": 100, "progress": False, "localization": 1.0}
    return extrapolated_learning_coefficient(*crossing(), UNIT, nbetas=NBETAS, **options)


@pytest.mark.statistical
def test_each_temperature_is_met(found):
    assert found.fit.hottest == NBETAS[0]
    for one, nbeta in zip(found.estimates, NBETAS, strict=True):
        truth = finite_temperature(
            lambda w: 0.5 * (w[:, 0] * w[:, 1]).square(), 2, nbeta, localization=1.0, tolerance=1e-3
        )
        assert one.nbeta == nbeta
        assert abs(float(one) - truth) < 4 * float(one.standard_error)  # 1 in 16,000


@pytest.mark.statistical
def test_the_coefficient_is_met_at_temperature_zero(found):
    assert abs(float(found) - 0.5) < 3 * float(found.standard_error)
    assert float(found.standard_error) < 0.2
    assert float(found) > float(found.estimates[-1])  # which is short of it
    assert found.multiplicity_term.value > 0.2
    assert float(found) == found.fit.value.value


def test_what_it_says(found):
    text = repr(found)
    assert "at temperature zero" in text
    assert text.count("n beta") == 3
    plain = json.loads(json.dumps(found.to_dict()))
    assert [one["nbeta"] for one in plain["estimates"]] == NBETAS
    assert plain["fit"]["value"]["value"] == float(found)
    assert found.cost.evaluations == sum(one.cost.evaluations for one in found.estimates)
    names = [check.name for check in found.checks]
    assert names == ["temperatures", "curve"]


def test_pictures(found):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    figure = found.plot()
    line = figure.axes[0].lines
    assert any(abs(float(one.get_ydata()[0]) - float(found)) < 0.02 for one in line)
    pyplot.close(figure)


def test_verdicts_of_single_temperatures_are_passed_on():
    net, (inputs, targets) = crossing()
    options = {"num_chains": 2, "num_draws": 16, "num_warmup": 10, "progress": False}
    found = extrapolated_learning_coefficient(
        net, (inputs, targets), UNIT, nbetas=NBETAS, **options
    )
    bad = [one for one in found.estimates if one.verdict != "OK"]
    assert bad  # of so few draws
    assert found.status == "fail"
    assert bad[0].verdict in repr(found)


def test_the_first_temperature_chooses_the_localization_of_all():
    options = {"num_chains": 2, "num_draws": 32, "num_warmup": 10, "progress": False}
    found = extrapolated_learning_coefficient(
        *crossing(), UNIT, nbetas=NBETAS, sampler="langevin", **options
    )
    alone = pf.learning_coefficient(
        *crossing(), UNIT, nbeta=NBETAS[0], sampler="langevin", **options
    )
    assert {one.localization for one in found.estimates} == {alone.localization}
    assert found.localization == alone.localization
    assert alone.localization > 1


def test_temperatures_that_are_chosen():
    def chosen(dtype, target, sampler):
        net, _ = crossing(dtype)
        data = torch.ones(500, 1, dtype=dtype), torch.full((500, 1), target, dtype=dtype)
        settings = Settings(sampler=sampler)
        there = settings.neighbourhood(net, data, UNIT, subset=None, realisable=False, seed=0)
        return there.nbeta, module._temperatures(there, settings)

    default, found = chosen(F64, 0.0, "hmc")
    assert found == pytest.approx([default * 4**k for k in range(5)])
    default, found = chosen(F64, 0.0, "sgld")
    assert found == pytest.approx([default * 4**k for k in range(3)])
    # A large loss in single precision: its rounding is felt soon.
    default, found = chosen(torch.float32, 100.0, "hmc")
    assert found == pytest.approx([default * 4**k for k in (-2, -1, 0)])


def test_it_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    options = {
        "num_chains": 2,
        "num_draws": 16,
        "num_warmup": 10,
        "progress": False,
        "nbetas": NBETAS,
        "checkpoint": tmp_path,
    }
    walk_through, calls = module.walk_through, []

    def interrupted(walk, settings):
        calls.append(settings)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return walk_through(walk, settings)

    monkeypatch.setattr(module, "walk_through", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extrapolated_learning_coefficient(*crossing(), UNIT, **options)
    monkeypatch.setattr(module, "walk_through", walk_through)
    found = extrapolated_learning_coefficient(*crossing(), UNIT, **options)
    whole = extrapolated_learning_coefficient(*crossing(), UNIT, **options | {"checkpoint": None})
    assert float(found) == float(whole)


def test_too_few_temperatures():
    with pytest.raises(OptionError, match="three or more different numbers"):
        extrapolated_learning_coefficient(*crossing(), UNIT, nbetas=[5.0, 5.0, 10.0])
    with pytest.raises(OptionError, match="out of range"):
        extrapolated_learning_coefficient(*crossing(), UNIT, localization=-1.0)
