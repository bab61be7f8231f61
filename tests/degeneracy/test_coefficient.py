"""What a result says: numbers that fit each other, plain objects, and a summary in words."""

import json
from dataclasses import fields, replace
from math import inf, isnan, nan

import pytest
import torch

from degeneracy_problems import default_nbeta, estimate, regression
from pushforward.degeneracy.coefficient import _ADVICE, LearningCoefficient, Measured
from pushforward.runs.estimate import Check, Estimate


@pytest.fixture(scope="module")
def found():
    net, data, _ = regression()
    options = {"num_chains": 4, "num_draws": 60, "num_warmup": 30, "batch_size": 20}
    return estimate(net, data, sampler="sgld", localization=3.0, **options)


@pytest.fixture(scope="module")
def exact():
    net, data, _ = regression()
    return estimate(net, data, sampler="mala", num_chains=4, num_draws=60, num_warmup=40)


# --- numbers -------------------------------------------------------------------------------------


def test_it_is_an_estimate(found):
    assert isinstance(found, Estimate)
    assert float(found) == float(found.value)
    assert found.value.dtype == torch.float64
    assert found.standard_error > 0


def test_what_was_asked_for(found, exact):
    assert found.nbeta == pytest.approx(default_nbeta(100))
    assert (found.localization, found.metric, found.sampler) == (3.0, "euclidean", "sgld")
    assert (found.batch_size, exact.batch_size) == (20, 100)
    for each in (found, exact):
        assert (each.num_examples, each.num_parameters) == (100, 4)
        assert (each.num_chains, each.num_draws, each.dead_chains) == (4, 60, 0)
    assert (found.num_warmup, exact.num_warmup) == (30, 40)
    assert found.step_size > 0
    assert isnan(exact.step_size)


def test_numbers_fit_each_other(found, exact):
    for each in (found, exact):
        assert each.excess.shape == (4, 60)
        assert each.runs[0].value == pytest.approx(float(each.excess.mean()))
        torch.testing.assert_close(each.chain_values, each.excess.mean(1))
        half = each.excess[:, 30:].mean() - each.excess[:, :30].mean()
        assert each.drift.value == pytest.approx(float(half))
        assert each.wbic == pytest.approx(100 * float(each.losses.mean()))
        assert 0 <= each.acceptance <= 1
        assert set(each.crosschecks) == {"two temperatures", "variance"}
    assert len(found.runs) == 2
    assert (found.warmup_excess.shape, exact.warmup_excess.shape) == ((4, 30), (4, 0))
    excess = found.nbeta * (float(found.losses.mean()) - found.initial_loss)
    assert found.runs[1].value == pytest.approx(excess)
    assert float(exact) == exact.runs[0].value
    assert float(exact.standard_error) == exact.runs[0].standard_error
    torch.testing.assert_close(exact.excess, exact.nbeta * (exact.losses - exact.initial_loss))


def test_costs_are_the_examples_that_chains_looked_at(found, exact):
    # A warm-up, the main run, and as many steps again after a tenth for the second step size.
    assert found.cost.evaluations == 4 * (30 + 60 + 6 + 60) * 20
    assert exact.cost.evaluations == 4 * (40 + 60) * 100
    assert found.cost.seconds > 0


def test_values_and_checks(found):
    names = [check.name for check in found.checks]
    wrong = ["chains-alive", "at-a-minimum", "step-size", "equilibrated"]  # these have verdicts
    assert names == [*wrong, "localization", "standard-error"]


# --- what is said --------------------------------------------------------------------------------


def test_plain_objects(found, exact):
    for each in (found, exact):
        plain = json.loads(json.dumps(each.to_dict(), allow_nan=False))
        assert plain["value"] == float(each)
        assert plain["verdict"] == each.verdict
        assert plain["advice"] == each.advice
        assert plain["chain_values"] == each.chain_values.tolist()
        assert len(plain["runs"]) == len(each.runs)
        assert plain["crosschecks"]["variance"]["value"] == each.crosschecks["variance"].value
        assert not {"excess", "warmup_excess", "losses"} & set(plain)
        kept = {field.name for field in fields(each)} - {"excess", "warmup_excess", "losses"}
        assert kept <= set(plain)
    assert exact.to_dict()["step_size"] is None


def test_numbers_that_are_not_finite_become_none(found):
    broken = replace(
        found, waic=nan, wbic=inf, quadratic=None, crosschecks={"a": Measured(-inf, nan)}
    )
    plain = json.loads(json.dumps(broken.to_dict(), allow_nan=False))
    assert [plain[name] for name in ("waic", "wbic", "quadratic")] == [None, None, None]
    assert plain["crosschecks"] == {"a": {"value": None, "standard_error": None}}


def test_a_summary_in_words(found):
    text = repr(replace(found, verdict="OK"))
    assert text.startswith(f"Local learning coefficient {float(found):.4g} ± ")
    assert ": OK\n" in text
    for part in (
        "n beta 21.71, localization 3, 4 parameters (half of them: 2)",
        "effective draws of 4 x 60",
        "if the loss were quadratic",
        "by two temperatures",
        "by variance",
        "cost: ",
    ):
        assert part in text
    assert all(len(line) < 320 for line in text.splitlines())
    assert _ADVICE["OK"] not in text


@pytest.mark.parametrize("verdict", [v for v in _ADVICE if v != "OK"])
def test_every_verdict_has_its_advice(found, verdict):
    check = Check("step-size", "fail", "what was seen", "what to do")
    text = repr(replace(found, verdict=verdict, checks=(check,)))
    assert f": {verdict}\n" in text
    assert _ADVICE[verdict] in text
    assert "what was seen" in text
    assert replace(found, verdict=verdict).advice == _ADVICE[verdict]


def test_checks_that_passed_are_not_listed(found):
    text = repr(replace(found, checks=(Check("fine", "pass", "nothing to see", ""),)))
    assert "nothing to see" not in text


def test_without_a_second_derivative_nothing_is_said_of_it(found):
    assert "quadratic" not in repr(replace(found, quadratic=None))


def test_a_number_with_its_error():
    number = Measured(12.3456, 0.0789)
    assert str(number) == "12.35 ± 0.079"
    assert float(number) == 12.3456


def test_fields_are_documented():
    text = LearningCoefficient.__doc__
    for field in fields(LearningCoefficient):
        if field.name not in {each.name for each in fields(Estimate)}:
            assert field.name in text, field.name
