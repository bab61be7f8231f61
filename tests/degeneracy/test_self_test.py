"""Settings that work pass the test, settings that do not fail it."""

import json
from dataclasses import replace
from math import nan

import pytest
import torch
from torch import nn

from degeneracy_problems import UNIT, draws
from pushforward.degeneracy import self_test as module
from pushforward.degeneracy.coefficient import Measured
from pushforward.degeneracy.quadrature import finite_temperature
from pushforward.degeneracy.self_test import degeneracy_self_test
from pushforward.errors import OptionError, SamplingError

QUICK = {"truth_draws": 60, "progress": False, "num_draws": 100}


@pytest.fixture(scope="module")
def found():
    """Good settings on two weights."""
    options = {"sampler": "langevin", "localization": 1.0, "step_size": 0.02, "num_warmup": 150}
    return degeneracy_self_test(2, 40, truth_draws=100, num_draws=600, progress=False, **options)


def test_good_settings_pass(found):
    assert found.passed
    assert found.num_parameters == 2
    assert [point.name for point in found.points] == ["full rank", "zero"]
    full, zero = found.points
    assert (float(full.known.value), full.known.multiplicity) == (0.5, 1)
    assert (float(zero.known.value), zero.known.multiplicity) == (0.5, 2)
    assert {point.truth_by for point in found.points} == {"hmc"}


@pytest.mark.statistical
def test_the_truth_is_that_of_quadrature(found):
    for point, at in zip(found.points, (1.0, 0.0), strict=True):
        inputs = torch.randn(
            40, 1, generator=module.stream(0, "inputs"), dtype=torch.float64
        ).square()
        moment = float(inputs.mean())
        exact = finite_temperature(
            lambda w, at=at, moment=moment: 0.5 * moment * (w[:, 0] * w[:, 1] - at).square(),
            2,
            point.found.nbeta,
            localization=point.found.localization,
            centre=torch.full((2,), at),
            tolerance=1e-4,
        )
        assert abs(point.truth.value - exact) < 4 * point.truth.standard_error  # 1 in 16,000
        assert abs(float(point.found.value) - exact) < 4 * float(point.found.standard_error)


def test_it_says_so_in_words(found):
    text = repr(found)
    assert "recover 2 of 2 known values" in text
    assert "of 2 parameters and 40 examples" in text
    assert "with multiplicity 2" in text
    assert text.count("pass") == 2
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["passed"] is True
    assert plain["widths"] == [1, 1, 1]
    assert plain["settings"]["num_draws"] == 600
    assert plain["points"][1]["coefficient"] == 0.5


def test_the_mark(found):
    point = found.points[0]
    exact = float(point.found.value)
    error = float(point.found.standard_error)

    def marked(truth, spread=0.0, **more):
        return replace(point, truth=Measured(truth, spread), **more).passed

    assert marked(exact)
    assert marked(exact + 1.9 * error)
    assert not marked(exact + 2.5 * error + 0.06 * exact)
    assert marked(exact + 2.5 * error + 0.06 * exact, spread=2 * error)
    assert not marked(exact, spread=0.3 * exact)  # anything would do
    sharp = replace(point.found, standard_error=torch.tensor(1e-6, dtype=torch.float64))
    assert marked(exact / 1.04, found=sharp)
    assert not marked(exact / 1.06, found=sharp)
    assert marked(nan, truth_by="none") is None
    for verdict in ("DEAD_CHAINS", "STEP_TOO_LARGE"):
        assert not marked(exact, found=replace(point.found, verdict=verdict))
    large = replace(found, points=(replace(point, truth_by="none", truth=Measured(nan, nan)),))
    assert large.passed
    assert "no exact value at this size" in repr(large)
    assert json.loads(json.dumps(large.to_dict(), allow_nan=False))["points"][0]["truth"] is None


def test_too_large_a_step_fails(monkeypatch):
    """Half of what is stable: plain SGLD is hot."""
    monkeypatch.setattr(module, "_HMC_PARAMETERS", 4)
    options = {"sampler": "sgld", "localization": 1.0, "num_warmup": 50, "step_size": 0.03}
    found = degeneracy_self_test(8, 100, **QUICK | options | {"num_draws": 300, "truth_draws": 100})
    full = found.points[0]
    assert full.name == "full rank"
    assert full.passed is False
    assert full.found.verdict == "STEP_TOO_LARGE"
    assert not found.passed
    assert "FAIL" in repr(found)


def test_settings_that_lose_all_chains():
    with pytest.raises(SamplingError, match="self-test at full rank, learning_coefficient"):
        degeneracy_self_test(8, 30, sampler="sgld", step_size=1e6, **QUICK)


@pytest.mark.wrong_types  # a function that notes what it is given takes the place of the runs
def test_the_curvature_is_that_of_your_own_network(monkeypatch):
    given = []

    def watched(_, factors, inputs, *more):
        given.append(module._largest(*module.realised(factors, inputs), UNIT, more[-1]))
        assert inputs.dtype == torch.float32

    monkeypatch.setattr(module, "_measured", watched)
    inputs = 7 * draws(30, 2).float()
    net = nn.Linear(2, 1, bias=False).eval()
    degeneracy_self_test(8, 50, net=net, data=(inputs, inputs[:, :1]), loss=UNIT, progress=False)
    exact = float(torch.linalg.eigvalsh((inputs.T @ inputs / 30).double()).max())
    assert given[0] == pytest.approx(exact, rel=0.05)  # power iteration, from below


def test_beyond_what_hmc_can_do(monkeypatch):
    monkeypatch.setattr(module, "_HMC_PARAMETERS", 4)
    options = QUICK | {"sampler": "langevin", "localization": 1.0, "num_warmup": 30}
    found = degeneracy_self_test(8, 40, **options)
    full, zero, reduced = found.points
    assert full.truth_by == "quadratic"
    assert full.passed is not None
    assert zero.truth_by == reduced.truth_by == "none"
    assert reduced.passed is None
    inputs = torch.randn(40, 2, generator=module.stream(0, "inputs"), dtype=torch.float64)
    factors = module.balanced_factors((2, 2, 2), 2, module.stream(0, "weights"))
    rows = []
    for position in range(8):  # the Jacobian of the outputs, by differences
        outputs = []
        for sign in (1, -1):
            moved = [factor.clone() for factor in factors]
            moved[position // 4].view(-1)[position % 4] += sign * 1e-5
            outputs.append((inputs @ moved[0].T @ moved[1].T).flatten())
        rows.append((outputs[0] - outputs[1]) / 2e-5)
    jacobian = torch.stack(rows)
    h = torch.linalg.eigvalsh(jacobian @ jacobian.T / 40).clamp(min=0)
    exact = 0.5 * float((full.found.nbeta * h / (full.found.nbeta * h + 1)).sum())
    assert abs(full.truth.value - exact) < 5 * full.truth.standard_error + 0.01 * exact


@pytest.mark.wrong_types  # a function that notes what it is given takes the place of the runs
def test_zero_weights_have_no_scale_in_the_layerwise_metric(monkeypatch):
    names = []
    monkeypatch.setattr(module, "_measured", lambda name, *_: names.append(name))
    degeneracy_self_test(27, 30, metric="layerwise", progress=False)
    assert names == ["full rank", "reduced rank"]


def test_options_out_of_range():
    with pytest.raises(OptionError, match=r"^num_examples: 2 is out of range.* inputs, 3"):
        degeneracy_self_test(27, 2)
    with pytest.raises(OptionError, match="not all there"):
        degeneracy_self_test(2, 10, net=nn.Linear(1, 1).eval())
    with pytest.raises(OptionError, match="num_draws"):
        degeneracy_self_test(2, 10, truth_draws=1)
    with pytest.raises(OptionError, match="num_chains"):
        degeneracy_self_test(2, 10, num_chains=1)
