"""Step sizes and springs from curvature, on problems whose curvature is known."""

from math import inf, nan

import pytest
import torch

import pushforward as pf
from degeneracy_problems import F64, draws, linear, neighbourhood, network, regression
from pushforward.degeneracy import calibration as module
from pushforward.degeneracy.calibration import (
    calibrate,
    largest_near,
    relaxation_steps,
    settling,
    step_bias,
    sustained_step,
)
from pushforward.degeneracy.walk import Walk
from pushforward.errors import SamplingError

AIMS = {"langevin": 1.0, "sgld": 0.2}


def walk_of(net, data, sampler="sgld", loss=None, **options):
    loss = pf.Gaussian(1.0) if loss is None else loss
    return Walk(neighbourhood(net, data, loss, **options), sampler, 0, None, False)


def calibrated(walk, **options):
    defaults = {"num_chains": 4, "num_draws": 200, "step_size": None, "localize": False}
    return calibrate(walk, **(defaults | options))


@pytest.mark.parametrize("sampler", ["langevin", "sgld"])
@pytest.mark.parametrize("localization", [0.5, 200.0])
def test_the_step_of_a_quadratic_is_its_aim_over_the_largest_curvature(sampler, localization):
    net, data, h = regression()
    walk = walk_of(net, data, sampler, localization=localization)
    found = calibrated(walk)
    largest = walk.around.nbeta * float(h.max()) + localization
    # Power iteration comes from below.
    assert AIMS[sampler] / largest <= found.step_size * (1 + 1e-9)
    assert found.step_size < 1.1 * AIMS[sampler] / largest
    assert 0.9 * largest < found.curvature <= largest * (1 + 1e-9)
    assert found.walk.around.localization == localization


def test_calibration_repeats_and_leaves_no_state(tmp_path):
    net, data, _ = regression()
    walk = Walk(neighbourhood(net, data), "sgld", 0, tmp_path, False)
    assert calibrated(walk).step_size == calibrated(walk).step_size
    assert not list(tmp_path.iterdir())


def quartic(outputs, targets):
    return (outputs - targets).pow(4).sum(1)


@pytest.mark.parametrize("sampler", ["langevin", "sgld"])
def test_curvature_counts_where_the_chains_are(sampler):
    """At the weights themselves it is that of the spring alone."""
    net, (x, y), _ = regression()
    walk = walk_of(net, (x, y), sampler, quartic, nbeta=100.0)
    found = calibrated(walk)
    assert found.curvature > 20
    assert found.step_size < 0.1 * AIMS[sampler]
    # The chains of a run with that step are no narrower than what it was made for.
    run = found.walk.run("test", steps=200, start=4, step_size=found.step_size)
    assert bool(run.alive.all())
    assert found.step_size * largest_near(found.walk, run) < 3


def test_a_step_that_is_given_stays():
    net, data, _ = regression()
    found = calibrated(walk_of(net, data), step_size=1e-3)
    assert found.step_size == 1e-3


@pytest.mark.parametrize("num_draws", [300, 1000])
@pytest.mark.parametrize("step_size", [None, 0.01])
@pytest.mark.parametrize("sampler", ["langevin", "sgld"])
def test_the_spring_is_the_weakest_whose_directions_relax_ten_times(sampler, step_size, num_draws):
    net, data, _ = regression()
    found = calibrated(
        walk_of(net, data, sampler), localize=True, num_draws=num_draws, step_size=step_size
    )
    gamma = found.walk.around.localization
    times = found.step_size * gamma * num_draws / 2
    assert gamma == 1.0 or times == pytest.approx(10, rel=0.15)
    assert times > 9


def test_no_spring_is_weaker_than_one():
    net, data, _ = regression(scales=(0.1, 0.1))
    found = calibrated(walk_of(net, data, "langevin"), localize=True, num_draws=5000)
    assert found.walk.around.localization == 1.0


def steep(outputs, targets):
    away = (outputs - targets).square().sum(1)
    return away * torch.where(away.detach() < 0.5, 1.0, torch.nan)


def test_steps_shrink_until_chains_live():
    net, data, h = regression()
    walk = walk_of(net, data, loss=steep)
    found = calibrated(walk)
    largest = 2 * walk.around.nbeta * float(h.max()) + 1.0
    assert found.step_size < 0.5 * 0.2 / largest


def test_a_given_step_that_kills_is_refused():
    net, data, _ = regression()
    with pytest.raises(SamplingError, match=r"with step size 0\.7.*\n?.*smaller step_size"):
        calibrated(walk_of(net, data, loss=steep), step_size=0.7)


def test_chains_that_never_live_are_refused():
    def lost(outputs, targets):
        away = (outputs - targets).square().sum(1)
        return away * torch.where(away.detach() < 1e-25, 1.0, torch.nan)

    net, data, _ = regression()
    with pytest.raises(SamplingError, match=r"do not stay finite.*\n?.*bounded from below"):
        calibrated(walk_of(net, data, loss=lost))


def test_a_loss_without_curvature_at_the_weights_is_named():
    """Distances, instead of their squares, have a kink where the network fits exactly."""

    def distance(outputs, targets):
        return (outputs - targets).norm(dim=1)

    net, data, _ = regression()
    with pytest.raises(SamplingError, match="loss"):
        calibrated(walk_of(net, data, loss=distance))


@pytest.mark.parametrize(("sampler", "leaps"), [("hmc", 16), ("mala", 1)])
def test_a_trajectory_counts_as_the_square_of_its_steps(sampler, leaps):
    net, data, h = regression(scales=(30.0, 1.0))
    walk = walk_of(net, data, sampler)
    held = settling(walk, num_chains=4, num_draws=40)
    # Ten relaxation times 2 / (eps gamma), at steps eps = 1 / largest curvature.
    relative = 20 / (40 * leaps**2)
    expected = relative * walk.around.nbeta * float(h.max()) / (1 - relative)
    assert expected > 1
    assert held.around.localization == pytest.approx(expected, rel=0.1)
    assert held.sampler == sampler
    assert held.around.potential.batch_size == walk.around.potential.batch_size


@pytest.mark.statistical
def test_a_flat_direction_settles_under_the_spring_that_was_chosen():
    """As many relaxation times as the rule promises: its variance is that of the spring alone."""
    torch.manual_seed(0)
    x = torch.randn(60, 2, dtype=F64) * torch.tensor([30.0, 0.0], dtype=F64)
    line = torch.nn.Linear(2, 1, bias=False).double().eval()
    found = pf.learning_coefficient(line, (x, line(x).detach()), pf.Gaussian(1.0), sampler="hmc")
    assert found.localization > 1
    assert found.verdict == "OK"
    assert abs(found.virial.value - 2) < 4 * found.virial.standard_error


def test_a_loss_without_curvature_leaves_the_spring_of_an_exact_sampler_alone():
    net, data, _ = regression()
    walk = walk_of(net, data, "hmc", loss=lambda z, y: (z - y).norm(dim=1))
    assert settling(walk, num_chains=4, num_draws=200) is walk


@pytest.mark.parametrize(
    ("localization", "step_size", "most", "expected"),
    [
        (1.0, 1e-3, 10**6, 2000),
        (4.0, 1e-3, 10**6, 500),
        (3.0, 1e-3, 10**6, 667),
        (1.0, 1e-3, 700, 700),
        (1.0, 1e-3, 7, 100),
        (50.0, 0.1, 10**6, 100),
    ],
)
def test_relaxation_is_two_over_step_and_spring(localization, step_size, most, expected):
    assert relaxation_steps(localization, step_size, most=most) == expected


# --- where chains are now ------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "layerwise"])
def test_the_largest_curvature_is_in_units_of_the_scale(metric):
    net, (x, y), _ = regression()
    walk = walk_of(net, (x, y), metric=metric, localization=3.0)
    found = walk.run("test", steps=2, start=3, step_size=1e-3)
    around = walk.around
    hessian = around.nbeta * x.T @ x / len(x)
    scaled = around.scale[:, None] * hessian * around.scale + 3.0 * torch.eye(4, dtype=F64)
    exact = float(torch.linalg.eigvalsh(scaled).max())
    assert 0.9 * exact < largest_near(walk, found) <= exact * (1 + 1e-9)
    assert sustained_step(walk, found) == pytest.approx(0.2 / largest_near(walk, found))


def test_no_curvature_bears_any_step():
    def flat(outputs, targets):
        return 0 * (outputs + targets).sum(1)

    net, data, _ = regression()
    walk = walk_of(net, data, loss=flat)
    found = walk.run("test", steps=2, start=3, step_size=1e-3)
    assert largest_near(walk, found) == pytest.approx(1.0)
    loose = Walk(walk.around.localized(0.0), "sgld", 0)
    assert sustained_step(loose, found) == inf


# --- what a step adds ----------------------------------------------------------------------------


@pytest.mark.statistical
def test_the_bias_of_the_plain_scheme_is_an_eighth_of_step_and_trace():
    net, data, h = regression()
    walk = walk_of(net, data, localization=5.0)
    found = walk.run("test", steps=2, start=400, step_size=1e-4)
    exact = 1e-3 * walk.around.nbeta * float(h.sum()) / 8
    assert step_bias(walk, found, 1e-3) == pytest.approx(exact, rel=0.1)
    assert step_bias(walk, found, 2e-3) == pytest.approx(2 * step_bias(walk, found, 1e-3))


def test_averaged_noise_on_all_data_has_none():
    net, data, _ = regression()
    walk = walk_of(net, data, "langevin")
    found = walk.run("test", steps=2, start=8, step_size=1e-4)
    assert step_bias(walk, found, 1e-3) == 0


@pytest.mark.statistical
def test_the_bias_of_minibatches_is_from_step_and_noise():
    """Offsets at ``w*``: the variance of a gradient from examples drawn with replacement."""
    net = network(linear(3, 1, bias=False))
    x, offset = draws(50, 3), 2 * draws(50, 1, seed=8)
    with torch.no_grad():
        data = (x, net(x) + offset)
    walk = walk_of(net, data, "langevin", batch_size=5, nbeta=50.0)
    found = walk.run("test", steps=1, start=3000, step_size=1e-12)
    gradients = -offset * x
    noise = float(gradients.var(0, correction=0).sum()) * 50.0**2 / 5
    # 3000 pairs of batches; the squares vary by some 100 %.
    # The last factor is that of the longest step of averaged noise.
    expected = 1e-3 * noise / 8 / (1 - 1 / 4)
    assert step_bias(walk, found, 1e-3) == pytest.approx(expected, rel=0.1)
    exact = Walk(walk.around, "hmc", 0)
    assert step_bias(exact, found, 1e-3) == 0


def test_the_dead_do_not_count():
    net, data, _ = regression()
    walk = walk_of(net, data, loss=steep)
    start = net[0].weight.detach().expand(4, 1, 4).clone()
    start[2:] += 100.0
    found = walk.run("test", steps=2, start={"0.weight": start}, step_size=1e-6)
    assert found.alive.tolist() == [True, True, False, False]
    numbers = largest_near(walk, found), step_bias(walk, found, 1e-3)
    assert nan not in numbers
    assert all(number > 0 for number in numbers)


def test_curvature_on_part_of_the_data(monkeypatch):
    """Not exact, but of the size of the whole: no factor of the examples left out."""
    net, data, h = regression()
    monkeypatch.setattr("pushforward.degeneracy.neighbourhood.PROBED_EXAMPLES", 50)
    found = calibrated(walk_of(net, data))
    largest = found.walk.around.nbeta * float(h.max()) + 1.0
    assert 0.5 < found.curvature / largest < 2


def test_aims_are_stable():
    assert module._AIMS == AIMS
    assert max(AIMS.values()) < 4


@pytest.mark.statistical
@pytest.mark.parametrize(("noise", "corrected"), [(0.0, "value"), (1.0, "gradient")])
def test_noisy_gradients_are_corrected(noise, corrected):
    """Residuals that stay at the minimum are noise that no step size is short enough for."""
    x = draws(2000, 3)
    net = network(linear(3, 1, bias=False))
    with torch.no_grad():
        y = net(x) + noise * draws(2000, 1, seed=5)
        net[0].weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    walk = walk_of(net, (x, y), "langevin", batch_size=256, localization=1.0)
    found = calibrate(walk, num_chains=4, num_draws=1000, step_size=None, localize=False)
    assert found.walk.around.potential.control_variate == corrected


@pytest.mark.statistical
def test_what_correction_leaves_is_made_up_for_by_smaller_steps(monkeypatch):
    """In proportion to how much too loud it is, at most 64-fold, and never a step that is given."""
    x = draws(500, 3).pow(3)  # examples differ in their curvature
    net = network(linear(3, 1, bias=False))
    with torch.no_grad():
        y = net(x) + draws(500, 1, seed=5)
    walk = walk_of(net, (x, y), "langevin", batch_size=2, localization=1.0)

    def found(loud, **options):
        monkeypatch.setattr(module, "_TOO_LOUD", loud)
        return calibrated(walk, **options)

    longest = found(inf).step_size
    loud = found(1e-2).step_size
    assert longest / 64 < loud < 0.9 * longest
    assert found(2e-2).step_size == pytest.approx(2 * loud)
    assert found(0.0).step_size == pytest.approx(longest / 64)
    assert found(0.0, step_size=longest).step_size == longest
    local = found(0.0, localize=True)
    assert local.walk.around.localization == pytest.approx(2 * 10 / (local.step_size * 200))
