"""What else the draws say, against formulas for a Gaussian and against dense Hessians."""

from math import exp, log, pi

import pytest
import torch

from degeneracy_problems import (
    F64,
    UNIT,
    draws,
    linear,
    neighbourhood,
    network,
    regression,
    relu_network,
)
from pushforward.degeneracy.evidence import (
    acceptance,
    crosschecks,
    localization_effect,
    proposal_log_ratio,
    quadratic_answer,
    quadratic_coefficient,
    singular_fluctuation,
    slope_effect,
    waic,
)
from pushforward.degeneracy.quadrature import quadratic

CHAINS, COUNT = 16, 500


@pytest.fixture(scope="module")
def posterior():
    """A line with noise in its targets, least squares at ``w*``, and independent exact draws."""
    net, (x, y), _ = regression(count=50)
    offset = draws(50, 1, seed=4)
    best = torch.linalg.lstsq(x, y + offset).solution
    with torch.no_grad():
        net[0].weight.copy_(best.T)
    data = (x, y + offset)
    around = neighbourhood(net, data, nbeta=40.0, localization=2.0)
    precision = 40.0 * x.T @ x / 50 + 2.0 * torch.eye(4, dtype=F64)
    covariance = torch.linalg.inv(precision)
    root = torch.linalg.cholesky(covariance)
    away = draws(CHAINS, COUNT, 4, seed=5) @ root.T
    residuals = (data[1] - x @ best).flatten()
    losses = 0.5 * (away @ x.T - residuals).square() + 0.5 * log(2 * pi)
    return around, losses, (x @ covariance * x).sum(1), residuals, away


def hessian_of(around):
    """Of ``n beta L``, by differentiating the definition twice."""
    table = around.potential._held

    def energy(vector):
        parameters = around.potential.space.unravel(vector)
        outputs = around.potential.model(parameters, table.inputs)
        return -around.nbeta * UNIT.log_prob(outputs, table.targets).mean()

    return torch.autograd.functional.hessian(energy, around.centre)


# --- estimates that do without the loss at the weights -------------------------------------------


@pytest.mark.statistical
def test_crosschecks_of_a_gaussian(posterior):
    around, losses, _, _, _ = posterior
    x = around.potential._held.inputs
    curvatures = torch.linalg.eigvalsh(x.T @ x / 50)
    found = crosschecks(losses.mean(-1), around)
    assert set(found) == {"two temperatures", "variance"}
    share = 40.0 * curvatures / (40.0 * curvatures + 2.0)
    variance = 0.5 * share.square().sum()
    warmer = 0.5 * (40.0 * curvatures / (1.2 * 40.0 * curvatures + 2.0)).sum()
    two = (0.5 * share.sum() - warmer) / (1 - 1 / 1.2)
    for name, exact in (("variance", variance), ("two temperatures", two)):
        each = found[name]
        assert abs(each.value - exact) < 4 * each.standard_error, name
        assert each.standard_error < 0.06 * exact
    # Without a spring both are half the number of parameters; here they are not.
    assert two < 0.97 * 2


def test_crosschecks_do_not_see_a_constant(posterior):
    around, losses, _, _, _ = posterior
    means = losses.mean(-1)
    here, there = crosschecks(means, around), crosschecks(means + 1e4, around)
    for name, found in here.items():
        assert there[name].value == pytest.approx(found.value, rel=1e-6)


def test_crosschecks_by_hand():
    net, data, _ = regression()
    around = neighbourhood(net, data, nbeta=10.0)
    means = torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.1, 0.4]], dtype=F64)
    found = crosschecks(means, around)
    energies = [10 * float(m) for m in means.flatten()]
    mean = sum(energies) / 6
    variance = sum((e - mean) ** 2 for e in energies) / 5
    assert found["variance"].value == pytest.approx(variance)
    weights = [exp(-0.2 * e) for e in energies]
    other = sum(w * e for w, e in zip(weights, energies, strict=True)) / sum(weights)
    assert found["two temperatures"].value == pytest.approx((mean - other) / (1 - 1 / 1.2))
    # The jackknife over two chains: half their difference.
    parts = (10 * means).var(1)
    assert found["variance"].standard_error == pytest.approx(abs(float(parts[0] - parts[1])) / 2)


@pytest.mark.parametrize("shape", [(1, 50), (4, 1), (0, 0)])
def test_too_few_draws_have_no_crosschecks(shape):
    net, data, _ = regression()
    assert crosschecks(torch.zeros(shape, dtype=F64), neighbourhood(net, data)) == {}


# --- fluctuation and the information criterion ---------------------------------------------------


@pytest.mark.statistical
def test_fluctuation_of_a_gaussian(posterior):
    around, losses, variance, residuals, _ = posterior
    exact = 0.5 * 40.0 / 50 * (0.5 * variance**2 + residuals**2 * variance).sum()
    found = singular_fluctuation(losses, around)
    assert abs(found.value - exact) < 4 * found.standard_error
    assert found.standard_error < 0.03 * exact


@pytest.mark.statistical
def test_the_criterion_of_a_gaussian(posterior):
    around, losses, variance, residuals, _ = posterior
    beta = 40.0 / 50
    predictive = 0.5 * (residuals**2 / (1 + variance) + (2 * pi * (1 + variance)).log())
    fluctuation = beta * (0.5 * variance**2 + residuals**2 * variance).mean()
    exact = float(predictive.mean() + fluctuation)
    found = waic(losses, around)
    spread = torch.tensor([waic(chain[None], around) for chain in losses]).std() / CHAINS**0.5
    assert abs(found - exact) < 4.5 * spread  # 16 chains: a t-distribution
    assert spread < 0.01


def test_both_by_hand():
    net, data, _ = regression()
    around = neighbourhood(net, data, nbeta=25.0)
    losses = draws(2, 3, 100).abs()
    flat = losses.flatten(0, 1)
    variances = [float(((c - c.mean()) ** 2).sum() / 5) for c in flat.unbind(1)]
    found = singular_fluctuation(losses, around)
    assert found.value == pytest.approx(0.5 * 0.25 * sum(variances))
    training = sum(-log(sum(exp(-float(v)) for v in c) / 6) for c in flat.unbind(1)) / 100
    assert waic(losses, around) == pytest.approx(training + 0.25 * sum(variances) / 100)
    alone = singular_fluctuation(losses[:1], around)
    assert alone.standard_error != alone.standard_error  # one chain has no spread


def test_losses_in_single_precision_are_summed_in_double(posterior):
    around, losses, _, _, _ = posterior
    single = losses.float()
    expected = singular_fluctuation(single.double(), around)
    found = singular_fluctuation(single, around)
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    assert waic(single, around) == pytest.approx(waic(single.double(), around), rel=1e-12)


# --- what the spring does ------------------------------------------------------------------------


@pytest.mark.statistical
def test_fluctuations_tell_what_the_spring_does(posterior):
    around, losses, _, _, away = posterior
    x = around.potential._held.inputs
    h = torch.linalg.eigvalsh(x.T @ x / 50)
    exact = -0.5 * float((2.0 * 40.0 * h / (40.0 * h + 2.0).square()).sum())
    excess = 40.0 * (losses.mean(-1) - around.initial_loss)
    found = localization_effect(excess, away.square().sum(-1), around)
    assert abs(found.value - exact) < 4.5 * found.standard_error
    assert found.standard_error < 0.15 * abs(exact)


# --- the quadratic answer ------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "layerwise"])
@pytest.mark.parametrize("localization", [0.1, 30.0])
def test_the_quadratic_coefficient_is_that_of_the_dense_hessian(monkeypatch, metric, localization):
    net, data = relu_network()
    around = neighbourhood(net, data, metric=metric, localization=localization)
    scaled = around.scale[:, None] * hessian_of(around) * around.scale
    curvatures = torch.linalg.eigvalsh(scaled)
    curvatures = curvatures.clamp(min=0)
    exact = quadratic(curvatures, 1.0, localization)
    share = 0.5 * localization * curvatures / (curvatures + localization).square()
    value, effect = quadratic_answer(around, 0)
    assert value.value == pytest.approx(exact, rel=1e-6)
    assert effect.value == pytest.approx(-float(share.sum()), rel=1e-6)
    assert value.standard_error == effect.standard_error == 0
    monkeypatch.setattr("pushforward.degeneracy.evidence._EXACT_PARAMETERS", 0)
    found = [quadratic_answer(around, seed) for seed in range(30)]
    assert quadratic_coefficient(around, 0) == found[0][0]
    for which, expected in ((0, exact), (1, -float(share.sum()))):
        values = torch.tensor([each[which].value for each in found])
        errors = torch.tensor([each[which].standard_error for each in found])
        # 30 sets of 4 probes: 4.5 standard errors of their mean.
        assert abs(values.mean() - expected) < 4.5 * values.std() / 30**0.5
        assert 0.5 < errors.mean() / values.std() < 2


def test_orthogonal_inputs_need_no_luck():
    net = network(linear(4, 1, bias=False))
    x = 2 * torch.eye(4, dtype=F64) * torch.tensor([1.0, 0.5, 0.1, 0.0], dtype=F64)
    around = neighbourhood(net, (x, torch.zeros(4, 1, dtype=F64)), nbeta=12.0, localization=0.7)
    curvatures = (x**2).sum(0) / 4
    found, effect = quadratic_answer(around, 0)
    assert found.value == pytest.approx(quadratic(curvatures, 12.0, 0.7), rel=1e-10)
    assert found.standard_error == pytest.approx(0, abs=1e-10)
    by_hand = (
        quadratic(curvatures, 12.0, 0.7 + 1e-5) - quadratic(curvatures, 12.0, 0.7 - 1e-5)
    ) / (2e-5 / 0.7)
    assert effect.value == pytest.approx(by_hand, rel=1e-6)


def test_negative_curvature_counts_as_flat():
    def hill(outputs, targets):  # noqa: ARG001
        return -outputs.square().sum(1)

    net = network(linear(3, 1, bias=False))
    around = neighbourhood(net, (draws(20, 3), draws(20, 1)), hill, localization=1.0)
    assert quadratic_coefficient(around, 0).value == pytest.approx(0, abs=1e-9)


def test_a_slope_moves_the_mean():
    """Against the exact mean over the Gaussian that a line with a slope has."""
    net, (x, y), h = regression()
    around = neighbourhood(net, (x, y + draws(100, 1, seed=3)), localization=3.0)
    _, gradient = around.potential.value_and_gradient(around.centre[None])
    hessian = hessian_of(around)
    precision = hessian + 3.0 * torch.eye(4, dtype=F64)
    mean = -torch.linalg.solve(precision, gradient[0])
    second = torch.linalg.inv(precision) + mean[:, None] * mean
    exact = gradient[0] @ mean + 0.5 * (hessian * second).sum()
    found = quadratic(h, around.nbeta, 3.0) + slope_effect(around)
    assert found == pytest.approx(float(exact), rel=1e-8)
    assert slope_effect(around) < -0.01


def test_a_minimum_has_no_slope():
    net, data, _ = regression()
    assert slope_effect(neighbourhood(net, data)) == pytest.approx(0, abs=1e-12)


# --- acceptance ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "value", "after", "other", "size", "expected"),
    [
        ((0.0, 0.0), 0.0, (1.5, 5.5), 16.25, 0.1, 0.6661436),
        ((1.0, 1.0), 1.0, (1.5, 0.5), 1.25, 0.5, 0.9692332),
        ((0.0, 0.0), 0.0, (10.5, 5.5), 70.25, 0.1, 0.17268492),
        ((0.0, 0.0), 0.0, (10.5, 5.5), 70.25, 0.5, 0.00015359),
        ((1.0, 2.0), 2.5, (1.5, 2.5), 4.25, 0.1, 0.95719343),
    ],
)
def test_metropolis_ratios_at_published_values(before, value, after, other, size, expected):
    """Of ``|w|^2 / 2``, whose gradient is ``w``."""
    here, there = torch.tensor([before], dtype=F64), torch.tensor([after], dtype=F64)
    ends = [torch.tensor([each], dtype=F64) for each in (value, other)]
    found = proposal_log_ratio(here, here, ends[0], there, there, ends[1], size)
    assert float(found.clamp(max=0).exp()) == pytest.approx(
        expected, rel=5e-5
    )  # in single precision
    back = proposal_log_ratio(there, there, ends[1], here, here, ends[0], size)
    assert float(back) == pytest.approx(-float(found))


@pytest.mark.statistical
@pytest.mark.parametrize("metric", ["euclidean", "layerwise"])
def test_acceptance_of_a_gaussian(metric):
    """Against proposals made one at a time from the stationary law."""
    net, data, _ = regression()
    around = neighbourhood(net, data, metric=metric, localization=2.0)
    unit = around.scale.square()
    precision = hessian_of(around) + torch.diag(2.0 / unit)
    root = torch.linalg.cholesky(torch.linalg.inv(precision))
    size = 1.2 / float(torch.linalg.eigvalsh(unit.sqrt()[:, None] * precision * unit.sqrt()).max())

    def positions(seed, count=600):
        return draws(count, 4, seed=seed) @ root.T

    here = positions(1, 3000)
    there = here - 0.5 * size * unit * (here @ precision)
    there = there + (size * unit).sqrt() * draws(3000, 4, seed=2)

    def proposes(start, end):  # log of the density of a proposal
        mean = start - 0.5 * size * unit * (start @ precision)
        return -0.5 * ((end - mean).square() / (size * unit)).sum(1)

    def energy(w):
        return 0.5 * (w @ precision * w).sum(1)

    log_ratio = energy(here) - energy(there) + proposes(there, here) - proposes(here, there)
    expected = log_ratio.exp().clamp(max=1)
    found = acceptance(around, around.centre + positions(3), size, 0)
    # 2400 proposals from 600 places beside 3000: 4.5 standard errors.
    error = float(expected.std()) * (1 / 3000 + 1 / 600) ** 0.5
    assert abs(found - float(expected.mean())) < 4.5 * error
    assert 0.3 < found < 0.95


def test_acceptance_falls_with_the_step():
    net, data = relu_network()
    around = neighbourhood(net, data)
    positions = around.centre.expand(8, -1) + 0.1 * draws(8, around.num_parameters)
    rates = [acceptance(around, positions, size, 0) for size in (1e-9, 0.01, 0.1, 1e6)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.999
    assert rates[-1] < 1e-6


def test_a_proposal_into_nowhere_is_rejected():
    def walled(outputs, targets):
        away = (outputs - targets).square().sum(1)
        return torch.where(away < 1.0, away, torch.nan)

    net, data, _ = regression()
    around = neighbourhood(net, data, walled)
    found = acceptance(around, around.centre.expand(4, -1), 100.0, 0)
    assert found == 0.0
