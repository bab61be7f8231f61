"""Every verdict, from numbers that call for it and from runs that deserve it."""

from dataclasses import replace
from itertools import product
from math import inf, nan

import pytest
import torch

from degeneracy_problems import default_nbeta, draws, estimate, linear, network, regression
from pushforward.degeneracy.agreement import Agreement
from pushforward.degeneracy.coefficient import Measured
from pushforward.degeneracy.verdict import (
    alive_check,
    equilibrium_check,
    localization_check,
    metropolis_check,
    minimum_check,
    precision_check,
    step_check,
    verdict_of,
)
from pushforward.errors import SamplingError

ORDER = ("DEAD_CHAINS", "NOT_A_MINIMUM", "STEP_TOO_LARGE", "NOT_EQUILIBRATED")
GOOD = Agreement(2.0, 0.1, 200.0, 1.01, 0.05, 0.1)


def virial(mean, error=1.0):
    return replace(GOOD, mean=mean, standard_error=error)


def agreed(balance=None, **changed):
    return equilibrium_check(Agreement(**(vars(GOOD) | changed)), balance or virial(100.0), 100)


def two(coarse, fine, error=0.1):
    return Measured(coarse, error), Measured(fine, error)


# --- from numbers --------------------------------------------------------------------------------


def test_the_first_thing_that_is_wrong_is_the_verdict():
    checks = {
        "DEAD_CHAINS": (alive_check(0, 4), alive_check(1, 4)),
        "NOT_A_MINIMUM": (minimum_check(two(2, 2), 0.0, 0.0), minimum_check(two(-2, -2), 0.0, 0.0)),
        "STEP_TOO_LARGE": (step_check(two(2, 2), 2.0, 1.0), step_check(two(4, 2), 2.0, 1.0)),
        "NOT_EQUILIBRATED": (agreed(), agreed(r_hat=1.5)),
    }
    assert tuple(checks) == ORDER
    for wrong in product((False, True), repeat=4):
        chosen = [pair[bad] for pair, bad in zip(checks.values(), wrong, strict=True)]
        assert [check.status for check in chosen] == ["fail" if bad else "pass" for bad in wrong]
        expected = next((n for n, bad in zip(ORDER, wrong, strict=True) if bad), "OK")
        assert verdict_of(chosen) == expected


def test_a_warning_is_no_verdict():
    warned = minimum_check(two(2, 2), 0.0, -1.0)
    assert warned.status == "warn"
    assert verdict_of((warned,)) == "OK"
    assert verdict_of(()) == "OK"


def test_chains_that_were_lost_are_counted():
    check = alive_check(3, 5)
    assert check.status == "fail"
    assert "3 of 5 chains" in check.detail
    assert "excluded" in check.detail
    assert check.advice
    good = alive_check(0, 5)
    assert (good.status, good.advice) == ("pass", "")
    assert "all 5" in good.detail


@pytest.mark.parametrize(
    ("value", "error", "below", "slope", "status"),
    [
        (2.0, 0.1, 0.0, 0.0, "pass"),
        (2.0, 0.1, 0.05, 0.0, "pass"),
        (2.0, 0.1, 0.06, -0.3, "fail"),
        (-1.0, 0.6, 0.0, 0.0, "pass"),  # within two errors of what is allowed
        (-1.0, 0.4, 0.0, 0.0, "fail"),
        (-80.0, 0.4, 1.0, -90.0, "fail"),
        (2.0, 0.1, 0.9, -0.1, "pass"),  # draws below, where that changes nothing
        (2.0, 0.1, 0.0, -0.49, "pass"),
        (2.0, 0.1, 0.0, -0.51, "warn"),
        (2.0, 0.3, 0.0, -0.59, "pass"),
        (2.0, 0.3, 0.0, -0.61, "warn"),
        (2.0, 0.1, 0.0, nan, "pass"),  # not known
    ],
)
def test_chains_go_up_from_a_minimum(value, error, below, slope, status):
    check = minimum_check([Measured(value, error)], below, slope)
    assert (check.name, check.status) == ("at-a-minimum", status)
    assert f"{100 * below:.2g} %" in check.detail
    assert bool(check.advice) == (status != "pass")


def test_one_step_size_below_zero_is_no_proof():
    """Where the coarse run is far too high, or the fine one still below."""
    for pair in (two(5.0, -1.0), two(-1.0, 5.0)):
        assert minimum_check(pair, 0.0, 0.0).status == "pass"
    assert minimum_check(two(-1.0, -1.0), 0.0, 0.0).status == "fail"


def test_rounding_is_no_slope():
    check = minimum_check([Measured(1e4, 0.1)], 0.0, -1e-3)
    assert "slope takes 0 from" in check.detail


@pytest.mark.parametrize(
    ("coarse", "fine", "value", "sharpest", "status"),
    [
        (2.0, 2.0, 2.0, 1.0, "pass"),
        (2.4, 2.0, 2.0, 1.0, "pass"),  # three errors of 0.14
        (2.5, 2.0, 2.0, 1.0, "fail"),
        (1.5, 2.0, 2.0, 1.0, "fail"),
        (109.0, 100.0, 100.0, 1.0, "pass"),  # a tenth of the value
        (111.0, 100.0, 100.0, 1.0, "fail"),
        (2.0, 2.0, 2.0, 2.9, "pass"),
        (2.0, 2.0, 2.0, 3.1, "fail"),
        (2.0, 2.0, 2.0, inf, "fail"),
        (2.0, 2.0, 2.0, nan, "fail"),
    ],
)
def test_steps_that_are_felt(coarse, fine, value, sharpest, status):
    assert step_check(two(coarse, fine), value, sharpest).status == status


def test_the_change_has_its_sign():
    assert "changes the value by -0.4 ±" in step_check(two(2.4, 2.0), 2.0, 1.0).detail


@pytest.mark.parametrize(("acceptance", "status"), [(0.8, "pass"), (0.001, "fail")])
def test_a_metropolis_test_needs_no_second_run_but_has_to_move(acceptance, status):
    assert metropolis_check(acceptance).status == status


@pytest.mark.parametrize(
    ("changed", "status"),
    [
        ({}, "pass"),
        ({"r_hat": 1.09}, "pass"),
        ({"r_hat": 1.11}, "fail"),
        ({"effective_draws": 51.0}, "pass"),
        ({"effective_draws": 49.0}, "fail"),
        ({"drift": 0.29}, "pass"),
        ({"drift": -0.31}, "fail"),
        ({"drift": nan, "drift_error": nan}, "fail"),
        ({"balance": virial(107.0)}, "pass"),
        ({"balance": virial(109.0)}, "fail"),
        ({"balance": virial(91.0)}, "fail"),
        ({"balance": virial(91.0, 2.0)}, "pass"),
    ],
)
def test_chains_that_are_still_on_their_way(changed, status):
    check = agreed(**changed)
    assert (check.name, check.status) == ("equilibrated", status)
    assert "R-hat" in check.detail


@pytest.mark.parametrize(
    ("value", "error", "status"),
    [(2.0, 0.19, "pass"), (2.0, 0.21, "warn"), (-2.0, 0.19, "pass"), (2.0, nan, "warn")],
)
def test_errors_beside_values(value, error, status):
    assert precision_check(value, error).status == status


@pytest.mark.parametrize(
    ("effect", "error", "status"),
    [(-0.9, 0.0, "pass"), (-1.1, 0.0, "warn"), (-1.3, 0.1, "warn"), (-1.3, 0.2, "pass")],
)
def test_a_spring_that_sets_the_value(effect, error, status):
    check = localization_check(2.0, Measured(effect, error))
    assert (check.name, check.status) == ("localization", status)
    assert bool(check.advice) == (status == "warn")


def test_an_effect_that_is_not_known_is_no_warning():
    assert localization_check(2.0, Measured(nan, nan)).status == "pass"


def test_an_error_beside_nothing():
    assert precision_check(0.0, 0.1).status == "warn"


# --- from runs -----------------------------------------------------------------------------------


def edge(net, data, factor):
    """A step size by its product with the largest curvature, which is stable up to 4."""
    _, _, h = regression()
    assert len(net) == 1
    return factor / (default_nbeta(len(data[0])) * float(h.max()) + 1.0)


def status_of(found):
    return {check.name: check.status for check in found.checks}


def test_a_quadratic_is_fine():
    net, data, _ = regression()
    found = estimate(net, data, sampler="langevin", num_draws=1000, num_chains=16)
    assert found.verdict == "OK"
    assert found.status in {"pass", "warn"}


@pytest.mark.parametrize("sampler", ["sgld", "hmc"])
def test_a_few_draws_are_not_in_equilibrium(sampler):
    net, data, _ = regression()
    found = estimate(net, data, sampler=sampler, num_draws=16, num_warmup=20, num_chains=2)
    assert found.verdict == "NOT_EQUILIBRATED"
    assert "more draws" in found.advice


@pytest.mark.parametrize(("sampler", "factor"), [("sgld", 3.2), ("langevin", 3.5)])
def test_a_large_step_is_told(sampler, factor):
    net, data, _ = regression()
    size = edge(net, data, factor)
    found = estimate(net, data, sampler=sampler, step_size=size, num_draws=200, num_warmup=50)
    assert found.verdict == "STEP_TOO_LARGE"
    assert found.step_size == size
    assert "smaller" in found.advice


def test_a_step_at_the_edge_is_not_blamed_on_the_network():
    net, data, _ = regression()
    size = edge(net, data, 3.8)
    found = estimate(net, data, sampler="sgld", step_size=size, num_draws=200)
    assert found.runs[0].value > found.runs[1].value > 0
    assert found.verdict == "STEP_TOO_LARGE"


@pytest.mark.parametrize(
    "length",
    [
        200,
        2000,
    ],
)
def test_a_step_beyond_the_edge(length):
    """With few draws chains are still finite at the end; with many their losses are not."""
    net, data, _ = regression()
    size = edge(net, data, 4.5)
    try:
        found = estimate(net, data, sampler="sgld", step_size=size, num_draws=length).verdict
    except SamplingError as refused:
        found = str(refused)
    assert found in {"STEP_TOO_LARGE", "DEAD_CHAINS"} or "smaller step_size" in found


@pytest.mark.parametrize("sampler", ["sgld", "hmc"])
def test_an_untrained_network_is_not_at_a_minimum(sampler):
    _, (x, y), _ = regression()
    net = network(linear(4, 1, bias=False), seed=3)
    found = estimate(
        net, (x, y + 3 * x[:, :1]), sampler=sampler, num_draws=20, num_warmup=30, num_chains=4
    )
    assert found.verdict == "NOT_A_MINIMUM"
    assert float(found) < -10
    assert "training had not ended" in found.advice
    own = estimate(
        net, (x, y), sampler=sampler, num_draws=20, num_warmup=30, num_chains=4, realisable=True
    )
    assert own.verdict != "NOT_A_MINIMUM"
    assert float(own) > 0


def walled(radius):
    """Losses that are NaN beyond a distance from the targets."""

    def loss(outputs, targets):
        away = (outputs - targets).square().sum(1)
        return torch.where(away < radius, away, torch.nan)

    return loss


@pytest.fixture(scope="module")
def bereaved():
    net, data, _ = regression()
    options = {"num_draws": 100, "num_chains": 16, "num_warmup": 0}
    return estimate(net, data, walled(2.5), sampler="sgld", **options)


def test_chains_that_died_are_told_and_left_out(bereaved):
    assert bereaved.verdict == "DEAD_CHAINS"
    assert 0 < bereaved.dead_chains < 16
    assert f"{bereaved.dead_chains} of 16 chains" in repr(bereaved)
    assert bereaved.num_chains == 16
    # Some of them in the main run, the others in the second one.
    assert len(bereaved.losses) == 16 - bereaved.dead_chains
    assert len(bereaved.losses) <= len(bereaved.excess) < 16
    assert bool(bereaved.excess.isfinite().all())
    assert bereaved.runs[0].value == pytest.approx(float(bereaved.excess.mean()))
    assert bool(bereaved.losses.isfinite().all())
    for number in (float(bereaved), bereaved.acceptance, bereaved.wbic, bereaved.r_hat):
        assert number == number


def test_dead_chains_are_nowhere_in_the_dictionary(bereaved):
    found = bereaved.to_dict()
    assert found["verdict"] == "DEAD_CHAINS"
    assert found["dead_chains"] == bereaved.dead_chains
    assert len(found["chain_values"]) == len(bereaved.excess)
    assert None not in found["chain_values"]


def test_chains_that_die_while_warming_up_count(monkeypatch):
    """The last warm-up is taken as it is; those it lost do not come back."""
    net, data, _ = regression()
    monkeypatch.setattr("pushforward.degeneracy.schedule._MOST_WARMUPS", 1)
    options = {"num_draws": 30, "num_chains": 16, "num_warmup": 200}
    found = estimate(net, data, walled(2.5), sampler="sgld", **options)
    assert found.verdict == "DEAD_CHAINS"
    assert found.num_chains == 16
    assert found.dead_chains == 16 - len(found.losses)
    assert len(found.excess) < 16


def test_a_metropolis_test_does_not_let_chains_die():
    net, data, _ = regression()
    found = estimate(net, data, walled(3.0), sampler="mala", num_draws=50, num_warmup=50)
    assert found.dead_chains == 0
    assert status_of(found)["chains-alive"] == "pass"
    assert float(found) > 0


def test_nothing_is_left_of_chains_that_all_die():
    net, data, _ = regression()
    with pytest.raises(SamplingError, match=r"finite.*\n?.*step_size"):
        estimate(net, data, walled(2.5), sampler="sgld", step_size=0.5, num_warmup=0)


# --- parameters that do nothing ------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["sgld", "mala"])
def test_parameters_that_do_nothing_have_a_coefficient_of_zero(sampler):
    net = network(linear(3, 4), torch.nn.ReLU, linear(4, 1))
    with torch.no_grad():
        net[0].bias.fill_(-100.0)
    x = draws(30, 3)
    found = estimate(net, (x, net(x).detach()), sampler=sampler, subset="0.weight", num_warmup=30)
    assert float(found) == 0
    assert found.verdict == "OK"


def test_chains_that_never_move_are_not_fine():
    net, data, _ = regression()
    found = estimate(net, data, sampler="mala", step_size=50.0, num_draws=50, num_warmup=0)
    assert found.verdict in {"STEP_TOO_LARGE", "NOT_EQUILIBRATED"}
