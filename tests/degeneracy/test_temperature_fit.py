"""The fit over temperatures, against exact values at each of them."""

from math import log

import pytest
import torch

from pushforward.degeneracy.quadrature import finite_temperature, quadratic
from pushforward.degeneracy.temperature_fit import fit_temperatures
from pushforward.errors import OptionError

F64 = torch.float64
NBETAS = [100 / log(100) * 4**k for k in range(5)]


def crossing(first, second):
    """``E`` of ``(w1^a w2^b)^2 / 2`` at all temperatures."""
    return [
        finite_temperature(
            lambda w: 0.5 * (w[:, 0] ** first * w[:, 1] ** second).square(),
            2,
            nbeta,
            localization=1.0,
            tolerance=1e-3,
        )
        for nbeta in NBETAS
    ]


def scattered(values, relative, seed):
    noise = torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=F64).tolist()
    errors = [relative * value for value in values]
    return [v + e * z for v, e, z in zip(values, errors, noise, strict=True)], errors


def coverage(values, truth, relative):
    scores = []
    for seed in range(200):
        found = fit_temperatures(NBETAS, *scattered(values, relative, seed)).value
        scores.append((found.value - truth) / found.standard_error)
    return torch.tensor(scores).square().mean().sqrt()


@pytest.mark.statistical
def test_the_error_covers_the_truth_of_a_crossing():
    values = crossing(1, 1)
    assert values[-1] < 0.42  # a quarter short of 1/2 at first, a fifth at last
    # The curve is not exact: its error is what is tested, and it must not be many times too large.
    for relative in (0.01, 0.05):
        assert 0.4 < coverage(values, 0.5, relative) < 1.3
    exact = fit_temperatures(NBETAS, values, [0.002] * 5)
    assert abs(exact.value.value - 0.5) < 0.05
    assert max(exact.multiplicities, key=exact.multiplicities.get) == 2
    assert exact.multiplicity_term.value == pytest.approx(1, abs=0.5)


@pytest.mark.statistical
def test_the_error_covers_the_truth_where_there_is_no_multiplicity():
    regular = [quadratic(torch.tensor([1.0, 0.2]), nbeta, 1.0) for nbeta in NBETAS]
    assert 0.4 < coverage(regular, 1.0, 0.02) < 1.3
    exact = fit_temperatures(NBETAS, regular, [0.005] * 5)
    assert exact.value.value == pytest.approx(1.0, abs=0.02)
    assert exact.multiplicities[1] > 0.95


def test_curves_of_the_family_are_met():
    for m, shift in ((2, 0.0), (3, 2.0)):
        values = [1.5 - (m - 1) / (log(nbeta) + shift) for nbeta in NBETAS]
        found = fit_temperatures(NBETAS, values, [1e-5] * 5)
        assert found.value.value == pytest.approx(1.5, abs=3e-3)
        assert found.multiplicities[m] > 0.99
        at = found.at(torch.tensor([*NBETAS, torch.inf], dtype=F64))
        assert at.tolist() == pytest.approx([*values, found.value.value], abs=6e-3)
    values = [1.5 - 0.2 * (nbeta / NBETAS[0]) ** -0.5 for nbeta in NBETAS]
    found = fit_temperatures(NBETAS, values, [1e-4] * 5)
    assert found.value.value == pytest.approx(1.5, abs=3e-3)
    assert found.at(torch.tensor(NBETAS, dtype=F64)).tolist() == pytest.approx(values, abs=1e-3)


def test_the_units_of_the_loss_do_not_matter():
    """A loss in other units is the same at another temperature, of which the shift makes up."""
    values = crossing(1, 1)
    for factor in (0.3, 3.0):
        found = fit_temperatures([factor * nbeta for nbeta in NBETAS], values, [0.004] * 5)
        assert abs(found.value.value - 0.5) < 2 * found.value.standard_error


def test_a_curve_that_no_member_explains():
    values = [1.0, 1.4, 0.8, 1.5, 0.9]
    found = fit_temperatures(NBETAS, values, [0.02] * 5)
    assert found.p_value < 1e-6
    assert found.value.standard_error > 0.1  # not 0.02: the scatter is what counts
    good = fit_temperatures(NBETAS, [1.0, 1.001, 0.999, 1.0, 1.0], [0.02] * 5)
    assert good.p_value > 0.9
    assert good.degrees_of_freedom == 3


def test_the_weights_of_the_estimates_count():
    values = [1.0, 1.0, 1.0, 1.0, 3.0]
    found = fit_temperatures(NBETAS, values, [0.01, 0.01, 0.01, 0.01, 10.0])
    assert found.value.value == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("nbetas", "errors", "message"),
    [
        ([10.0, 20.0], [0.1] * 2, "three or more"),
        ([10.0, 20.0, 20.0], [0.1] * 3, "three or more"),
        ([0.5, 20.0, 40.0], [0.1] * 3, "above 1"),
        ([10.0, 20.0, 40.0], [0.1, 0.0, 0.1], "without an error"),
        ([10.0, 20.0, 40.0], [0.1, float("nan"), 0.1], "without an error"),
    ],
)
def test_what_cannot_be_fitted(nbetas, errors, message):
    with pytest.raises(OptionError, match=message):
        fit_temperatures(nbetas, [1.0] * len(nbetas), errors)
