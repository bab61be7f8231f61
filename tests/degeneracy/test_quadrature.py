"""Finite-temperature learning coefficients against closed forms and brute force."""

import math

import numpy as np
import pytest
import torch

from oracles.gibbs_grids import even_mean, midpoint_mean
from pushforward.degeneracy.known import cusp, normal_crossing, sum_of_powers
from pushforward.degeneracy.quadrature import (
    boltzmann_mean,
    finite_temperature,
    quadratic,
)
from pushforward.errors import OptionError, ResourceError

F64 = torch.float64
THOUSAND, MILLION = 1e3 / math.log(1e3), 1e6 / math.log(1e6)

# Exponents; values at n = 1e3 and 1e6 for y = x w1^k1 w2^k2 under inputs of variance 4, mean
# squared error and localisation 1. Others computed them on a fixed grid of 6001^2 points: the
# fourth digit is good for the first, the third for the second.
CROSSINGS = {
    (0, 1): (0.4996, 0.5000),
    (1, 1): (0.3834, 0.4321),
    (0, 2): (0.2465, 0.2498),
    (1, 2): (0.2213, 0.2436),
    (2, 2): (0.1615, 0.1922),
    (0, 3): (0.1604, 0.1659),
    (1, 3): (0.1487, 0.1629),
    (2, 3): (0.1201, 0.1428),
    (3, 3): (0.0957, 0.1161),
}


def crossing(k):
    return lambda w: 4 * w[:, 0] ** (2 * k[0]) * w[:, 1] ** (2 * k[1])


def cusped(w):
    return (w[:, 0] ** 2 - w[:, 1] ** 3) ** 2


def two_components(w):
    return (w[:, 0] - 1) ** 2 * w.square().sum(1) ** 4


@pytest.mark.parametrize(("k", "values"), CROSSINGS.items())
def test_normal_crossings(k, values):
    for nbeta, printed, digits in ((THOUSAND, values[0], 1.01e-4), (MILLION, values[1], 3e-4)):
        found = finite_temperature(crossing(k), 2, nbeta, localization=1.0)
        assert found == pytest.approx(printed, abs=digits)
        assert found == pytest.approx(even_mean(crossing(k), 2, nbeta, 1.0), rel=1e-5)


def test_crossings_approach_their_coefficient_as_slowly_as_their_multiplicity_says():
    known = normal_crossing([1, 1])
    errors = [
        finite_temperature(crossing((1, 1)), 2, nbeta, box=1.0) - known.at(nbeta)
        for nbeta in (1e4, 1e8, 1e12)
    ]
    # What is left is of second order in 1 / log(nbeta).
    scaled = [e * math.log(nbeta) ** 2 for e, nbeta in zip(errors, (1e4, 1e8, 1e12), strict=True)]
    assert min(scaled) > 0
    assert max(scaled) < 6
    assert abs(errors[2]) < abs(errors[1]) < abs(errors[0])


def test_cusps():
    # .357 is printed elsewhere for 1e2; the others were integrated with 2e8 midpoints.
    for nbeta, value in ((1e2, 0.357027), (1e4, 0.38475842), (1e5, 0.39209926)):
        found = finite_temperature(cusped, 2, nbeta, localization=1.0)
        assert found == pytest.approx(value, rel=2e-6)
    brute = midpoint_mean(cusped, 1e2, 1.0, ((-5, 5), (-2, 3)), (2000, 1000))
    assert finite_temperature(cusped, 2, 1e2, localization=1.0) == pytest.approx(brute, rel=1e-5)
    # In a box there is no localisation to fade, and the next pole is far.
    near = [finite_temperature(cusped, 2, nbeta, box=1.0) for nbeta in (1e4, 1e8)]
    assert near[0] < near[1] < float(cusp())
    assert near[1] == pytest.approx(float(cusp()), abs=0.012)


def test_two_components():
    centre = torch.tensor([1.0, 0.3], dtype=F64)
    values = {
        (144.76, True, None): (0.291, 5e-4),
        (144.76, False, None): (0.349, 5e-4),
        (1e4, True, None): (0.262, 1e-3),
        (1e4, False, None): (0.287, 3e-3),
        (144.76, True, 0.5): (0.149, 2e-3),
        (144.76, False, 0.25): (0.566, 2e-3),
        (1e4, True, 0.5): (0.258, 5e-4),
        (1e4, False, 0.5): (0.503, 5e-4),
    }
    for (nbeta, at_origin, box), (printed, digits) in values.items():
        middle = torch.zeros(2, dtype=F64) if at_origin else centre
        found = finite_temperature(
            two_components,
            2,
            nbeta,
            centre=middle,
            box=box,
            localization=1.0 if box is None else 0.0,
        )
        assert found == pytest.approx(printed, abs=digits)
        if box is not None:
            ends = [(m - box, m + box) for m in middle.tolist()]
            brute = midpoint_mean(two_components, nbeta, 0.0, ends, (1000, 1000))
            assert found == pytest.approx(brute, rel=1e-5)


def test_homogeneous_potentials_have_their_coefficient_at_every_temperature():
    def powers(w):
        return w[:, 0] ** 2 + w[:, 1] ** 4 + w[:, 2] ** 6

    for nbeta in (10.0, 1e4):
        found = finite_temperature(powers, 3, nbeta, box=6.0, tolerance=1e-5)
        assert found == pytest.approx(float(sum_of_powers([1, 2, 3])), rel=1e-5)
    assert finite_temperature(lambda w: w[:, 0] ** 6, 1, 1e3, box=1e2) == pytest.approx(1 / 6)


def test_quadratic_potentials():
    curvatures = torch.tensor([300.0, 2.0, 0.01], dtype=F64)

    def bowl(w):
        return 7 + w.square() @ curvatures / 2

    for nbeta, localization in ((1.0, 0.5), (50.0, 1.0), (1e5, 3.0)):
        expected = quadratic(curvatures, nbeta, localization)
        found = finite_temperature(bowl, 3, nbeta, localization=localization, tolerance=1e-5)
        assert found == pytest.approx(expected, rel=1e-5)
    centre = torch.tensor([0.3], dtype=F64)
    box = torch.tensor([[-50.0, 70.0]], dtype=F64)
    found = finite_temperature(
        lambda w: (w[:, 0] - 0.3) ** 2, 1, 1e8, centre=centre, box=box, tolerance=1e-10
    )
    assert found == pytest.approx(0.5, rel=1e-10)


def test_three_variables():
    def triple(w):
        return w.prod(1) ** 2

    found = finite_temperature(triple, 3, 1e3, localization=1.0, tolerance=1e-4)
    assert found == pytest.approx(even_mean(triple, 3, 1e3, 1.0), rel=2e-4)


def test_points_beyond_the_walls_do_not_count():
    def walled(w):
        return torch.where(w[:, 0] < 0.5, w[:, 0] ** 2, torch.inf)

    found = finite_temperature(walled, 1, 20.0, box=1.0, tolerance=1e-5)
    box = torch.tensor([[-1.0, 0.5]], dtype=F64)
    expected = finite_temperature(lambda w: w[:, 0] ** 2, 1, 20.0, box=box)
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_tanh_network_of_two_units_with_its_output_weights_integrated():
    """Four weights: squared error is quadratic in the two of the output."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(24))
    weights = weights / weights.sum()

    def marginal(nbeta):
        def observable_and_energy(b):
            features = torch.tanh(b[:, :, None] * nodes)
            gram = 2 * nbeta * torch.einsum("niq,njq,q->nij", features, features, weights)
            stiffness = gram + torch.eye(2, dtype=F64)
            remaining = torch.linalg.solve(stiffness, gram).diagonal(dim1=1, dim2=2).sum(1)
            return remaining / 2, stiffness.logdet() / 2 + b.square().sum(1) / 2

        return observable_and_energy

    found = [boltzmann_mean(marginal(nbeta), 2, 9.0, tolerance=1e-4) for nbeta in (1e2, 1e4)]
    # The first is printed elsewhere; the second by 4000^2 points in logarithmic coordinates.
    assert found[0] == pytest.approx(0.550, abs=5e-4)
    assert found[1] == pytest.approx(0.67855, abs=2e-4)


def test_quadratic_values_of_samplers():
    h = torch.tensor([4.0, 0.0, 1.0], dtype=F64)
    assert quadratic(h, 10.0) == 1.0
    assert quadratic(h, 10.0, 40.0) == pytest.approx((40 / 80 + 10 / 50) / 2)
    # Regression of one weight by SGLD at two steps: published as .526 and .70.
    one = torch.tensor([8.0], dtype=F64)
    exact = quadratic(one, 144.76, 1.0)
    assert exact == pytest.approx(0.4996, abs=5e-5)
    assert quadratic(one, 144.76, 1.0, step_size=1e-3) / exact == pytest.approx(1 / 0.71, rel=2e-3)
    assert quadratic(one, 144.76, 1.0, step_size=2e-4) / exact == pytest.approx(1.06, abs=5e-3)
    # The stationary variance of the linear recursion itself, iterated.
    for step in (1e-3, 2.5e-3):
        variance = 0.0
        for _ in range(5000):
            variance = (1 - step / 2 * 1159.08) ** 2 * variance + step
        value = 144.76 * 8.0 * variance / 2
        assert quadratic(one, 144.76, 1.0, step_size=step) == pytest.approx(value)
    # A direction that bends down is held by the localisation.
    assert quadratic(torch.tensor([-0.1], dtype=F64), 10.0, 2.0) == pytest.approx(-0.5)


ORIGIN = torch.zeros(2, dtype=F64)


@pytest.mark.parametrize(
    "options",
    [
        {"nbeta": 0.0},
        {"nbeta": -1.0},
        {"nbeta": math.inf},
        {"localization": -1.0},
        {"localization": 0.0},
        {"dimensions": 4},
        {"dimensions": 0},
        {"centre": torch.zeros(3, dtype=F64)},
        {"centre": torch.full((2,), torch.nan, dtype=F64)},
        {"box": -1.0},
        {"box": math.inf},
        {"box": torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=F64)},
        {"box": torch.zeros(3, 2, dtype=F64)},
        {"tolerance": 0.0},
        {"tolerance": 1.0},
        {"potential": lambda w: w[:, 0] * torch.nan},
    ],
)
def test_refusals(options):
    standard = {"potential": cusped, "dimensions": 2, "nbeta": 10.0, "localization": 1.0}
    with pytest.raises(OptionError) as caught:
        finite_temperature(**(standard | options))
    assert caught.value.advice.endswith(".")


@pytest.mark.parametrize(
    ("nbeta", "localization", "step"),
    [(0.0, 1.0, None), (1.0, -1.0, None), (1.0, 0.5, None), (1.0, 2.0, 0.9), (1.0, 2.0, 0.0)],
)
def test_refusals_of_quadratic_potentials(nbeta, localization, step):
    curvatures = torch.tensor([3.0, -1.0], dtype=F64)
    with pytest.raises(OptionError) as caught:
        quadratic(curvatures, nbeta, localization, step_size=step)
    assert caught.value.advice.endswith(".")


def test_what_cannot_be_resolved_is_said():
    def rough(w):
        return torch.sin(1e7 * w[:, 0]).abs()

    with pytest.raises(ResourceError, match="cells"):
        finite_temperature(rough, 1, 10.0, box=1.0, tolerance=1e-8)
