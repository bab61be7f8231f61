"""The dense oracle against closed forms written out by hand, and against exact results."""

from itertools import islice, permutations, product
from math import factorial, prod

import numpy as np
import pytest
from numpy.polynomial import Polynomial
from scipy.integrate import quad
from scipy.special import ndtr

from oracles.dense_cumulants import cumulant_slice, expand_core, propagate_dense, radial_core
from oracles.partitions import (
    block_cost,
    count_isomorphism_classes,
    cumulant_from_powers,
    diagram_budget,
    diagrams,
    diagrams_by_definition,
    integer_partitions,
    set_partitions,
    slice_types,
    tracked_degrees,
    vector_partitions,
)
from oracles.wick import (
    ACTIVATIONS,
    leaky_relu,
    wick_coefficients,
    wick_rounding,
    wick_table,
)
from pushforward.errors import OptionError, ShapeError

VARIANTS = [(order, augmented) for order in (1, 2, 3, 4) for augmented in (False, True)]
METRICS = ["exact", "average"]


# ---- partitions ---------------------------------------------------------------------------------


def test_partition_numbers():
    assert [len(integer_partitions(d)) for d in range(1, 7)] == [1, 2, 3, 5, 7, 11]
    assert [len(set_partitions(d)) for d in range(1, 7)] == [1, 2, 5, 15, 52, 203]
    assert [len(vector_partitions((1,) * d)) for d in range(1, 6)] == [1, 2, 5, 15, 52]
    assert [len(vector_partitions((d,))) for d in range(1, 7)] == [1, 2, 3, 5, 7, 11]
    assert len(vector_partitions((2, 2))) == 9


def test_costs_of_blocks():
    costs = {
        1: [(1, 1)],
        2: [(2, 2), (3,), (4,), (1, 1, 1), (2, 1)],
        3: [(3, 1), (1, 1, 1, 1), (2, 1, 1)],
        4: [(2, 2, 2), (5,), (6,), (4, 2)],
    }
    for cost, blocks in costs.items():
        assert [block_cost(v) for v in blocks] == [cost] * len(blocks)


@pytest.mark.parametrize(
    ("order", "augmented", "expected", "grouped"),
    [
        (1, False, 2, 2),
        (1, True, 2, 2),
        (2, False, 3, 3),
        (2, True, 27, 25),
        (3, False, 40, 35),
        (3, True, 142, 91),
        (4, False, 171, 95),
        (4, True, 2950, 1355),
    ],
)
def test_number_of_diagrams(order, augmented, expected, grouped):
    max_degree = max(tracked_degrees(order, augmented))
    budget = diagram_budget(order, augmented)
    found = {p: diagrams(len(p), budget, max_degree) for p in slice_types(order, max_degree)}
    assert sum(map(len, found.values())) == expected
    assert sum(count_isomorphism_classes(p, nus) for p, nus in found.items()) == grouped


@pytest.mark.parametrize(
    ("num_neurons", "budget", "max_degree"), [(1, 4, 6), (2, 2, 4), (2, 3, 6), (3, 3, 4)]
)
def test_enumeration_agrees_with_the_definition(num_neurons, budget, max_degree):
    found = diagrams(num_neurons, budget, max_degree)
    assert len(set(found)) == len(found)
    assert set(found) == set(diagrams_by_definition(num_neurons, budget, max_degree))


def _joint_cumulant(columns):
    """Joint cumulant of an empirical law, by Moebius inversion over all set partitions."""
    return sum(
        (-1) ** (len(tau) - 1)
        * factorial(len(tau) - 1)
        * prod(np.mean(np.prod([columns[i] for i in block], axis=0)) for block in tau)
        for tau in set_partitions(len(columns))
    )


@pytest.mark.parametrize("p", [p for d in range(1, 7) for p in integer_partitions(d)])
def test_cumulants_from_power_cumulants_of_an_empirical_law(p):
    sample = np.random.default_rng(0).exponential(size=(len(p), 11))
    direct = _joint_cumulant([sample[a] for a, times in enumerate(p) for _ in range(times)])
    from_powers = sum(
        coefficient
        * prod(
            _joint_cumulant([sample[a] ** times for a, times in enumerate(v) if times]) for v in rho
        )
        for coefficient, rho in cumulant_from_powers(p)
    )
    assert from_powers == pytest.approx(direct, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("p", slice_types(4, 6))
def test_slices_of_an_empirical_law(p):
    size = 4
    sample = np.random.default_rng(1).exponential(size=(size, 9))
    powers = {
        q: np.array(
            [
                _joint_cumulant([sample[i] ** times for i, times in zip(where, q, strict=True)])
                for where in product(range(size), repeat=len(q))
            ]
        ).reshape((size,) * len(q))
        for q in slice_types(4, sum(p))
    }
    found = cumulant_slice(powers, p, size)
    for where in islice(permutations(range(size), len(p)), 0, None, 5):
        copies = [sample[i] for i, times in zip(where, p, strict=True) for _ in range(times)]
        assert found[where] == pytest.approx(_joint_cumulant(copies), rel=1e-8, abs=1e-8)
    for where in product(range(size), repeat=len(p)):
        if len(set(where)) < len(where):
            assert found[where] == 0.0


# ---- Wick coefficients --------------------------------------------------------------------------

MEANS = np.array([-1.3, 0.0, 0.4, 2.0, 0.5])
VARIANCES = np.array([0.3, 1.0, 2.5, 0.05, 30.0])


def _hermite(k, x):
    return np.polynomial.hermite_e.hermeval(x, [0] * k + [1])


def _density(x):
    return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)


def _relu_coefficients(mean, variance, max_order, max_power):
    """From J_q = E[G^q 1(G > 0)] by recursion, and its derivatives."""
    sigma = np.sqrt(variance)
    alpha = mean / sigma
    moments = [ndtr(alpha), mean * ndtr(alpha) + sigma * _density(alpha)]
    for q in range(2, max_power + 1):
        moments.append(mean * moments[q - 1] + (q - 1) * variance * moments[q - 2])
    table = np.empty((max_power + 1, max_order + 1, len(mean)))
    table[0] = np.eye(max_order + 1)[0][:, None]
    for p in range(1, max_power + 1):
        for k in range(max_order + 1):
            if k <= p:
                table[p, k] = factorial(p) / factorial(p - k) * moments[p - k]
            else:
                j = k - p + 1
                tail = (-1) ** j * sigma ** (1 - j) * _hermite(j - 2, alpha) * _density(alpha)
                table[p, k] = factorial(p) * tail
    return table


def _assert_coefficients(activation, expected):
    max_power, max_order = expected.shape[0] - 1, expected.shape[1] - 1
    found = wick_coefficients(activation, MEANS, VARIANCES, max_order, max_power)
    rounding = wick_rounding(activation, MEANS, VARIANCES, max_order, max_power)
    # The closed forms round too: the recursion for J_q cancels when the mean is negative.
    allowed = 1e-13 * np.abs(expected) + 1e-14 + 8 * rounding
    np.testing.assert_array_less(np.abs(found - expected), allowed)


@pytest.mark.parametrize(
    ("activation", "slope"),
    [
        (ACTIVATIONS["relu"], 0.0),
        (ACTIVATIONS["leaky_relu"], 0.01),
        (leaky_relu(0.3), 0.3),
        (ACTIVATIONS["abs"], -1.0),
    ],
)
def test_piecewise_linear_coefficients(activation, slope):
    mirrored = (-1.0) ** np.arange(9)[:, None] * _relu_coefficients(-MEANS, VARIANCES, 8, 6)
    expected = _relu_coefficients(MEANS, VARIANCES, 8, 6)
    expected[1:] += (-slope) ** np.arange(1, 7)[:, None, None] * mirrored[1:]
    _assert_coefficients(activation, expected)


def test_coefficients_of_jumps():
    step = _relu_coefficients(MEANS, VARIANCES, 9, 1)[1, 1:]
    constant = np.eye(9)[0][:, None] * np.ones(5)
    sign = 2 * step - constant
    _assert_coefficients(ACTIVATIONS["heaviside"], np.stack([constant, step, step, step]))
    _assert_coefficients(ACTIVATIONS["sign"], np.stack([constant, sign, constant, sign]))


def test_coefficients_with_two_breakpoints():
    constant = np.eye(9)[0][:, None] * np.ones(5)
    left = _relu_coefficients(MEANS + 1, VARIANCES, 8, 1)[1]
    right = _relu_coefficients(MEANS - 1, VARIANCES, 8, 1)[1]
    _assert_coefficients(ACTIVATIONS["hardtanh"], np.stack([constant, left - right - constant]))


@pytest.mark.parametrize("name", ["identity", "square", "cube"])
def test_polynomial_coefficients(name):
    degree = {"identity": 1, "square": 2, "cube": 3}[name]
    moments = [np.ones(5), MEANS]
    for q in range(2, 13):
        moments.append(MEANS * moments[q - 1] + (q - 1) * VARIANCES * moments[q - 2])
    expected = np.zeros((5, 9, 5))
    for p in range(5):
        for k in range(min(8, degree * p) + 1):
            derivative = Polynomial([0.0] * (degree * p) + [1.0]).deriv(k)
            expected[p, k] = sum(c * moments[q] for q, c in enumerate(derivative.coef))
    _assert_coefficients(ACTIVATIONS[name], expected)


def test_gelu_coefficients():
    spread = np.sqrt(1 + VARIANCES)
    c = MEANS / spread
    expected = np.empty((2, 9, 5))
    expected[0] = np.eye(9)[0][:, None]
    expected[1, 0] = MEANS * ndtr(c) + VARIANCES / spread * _density(c)
    expected[1, 1] = ndtr(c) + c * _density(c) / spread**2
    for k in range(2, 9):
        inner = _hermite(k - 2, c) / spread ** (k - 1) - _hermite(k, c) / spread ** (k + 1)
        expected[1, k] = (-1) ** k * _density(c) * inner
    _assert_coefficients(ACTIVATIONS["gelu"], expected)


def test_elu_coefficients():
    sigma = np.sqrt(VARIANCES)
    tail = np.exp(MEANS + VARIANCES / 2) * ndtr(-(MEANS + VARIANCES) / sigma)
    expected = np.empty((2, 2, 5))
    expected[0] = np.eye(2)[0][:, None]
    expected[1] = _relu_coefficients(MEANS, VARIANCES, 1, 1)[1]
    expected[1, 0] += tail - ndtr(-MEANS / sigma)
    expected[1, 1] += tail
    _assert_coefficients(ACTIVATIONS["elu"], expected)


@pytest.mark.parametrize("name", ["gelu_tanh", "silu", "tanh", "sigmoid", "softplus"])
@pytest.mark.parametrize(("mean", "variance"), [(0.3, 0.8), (-1.0, 1e4)])
def test_smooth_coefficients_against_adaptive_quadrature(name, mean, variance):
    activation = ACTIVATIONS[name]
    sigma = np.sqrt(variance)
    found = wick_coefficients(activation, mean, variance, 4, 2)
    for p, k in [(1, 0), (1, 3), (2, 0), (2, 2), (2, 4)]:
        expected, error = quad(
            lambda z, p=p, k=k: float(
                activation.function(np.array(z)) ** p
                * _hermite(k, (z - mean) / sigma)
                * _density((z - mean) / sigma)
                / sigma
            ),
            mean - 14 * sigma,
            mean + 14 * sigma,
            points=[-30.0, -5.0, 0.0, 5.0, 30.0],
            limit=400,
            epsabs=1e-12,
            epsrel=1e-12,
        )
        assert found[p, k, 0] * sigma**k == pytest.approx(expected, abs=4 * error + 1e-12)


def test_each_unit_may_have_its_own_activation():
    names = ["relu", "identity", "tanh"]
    mean, variance = np.array([0.1, -0.4, 1.0]), np.array([0.5, 1.5, 2.0])
    table = wick_table([ACTIVATIONS[name] for name in names], mean, variance, 3, 2)
    for i, name in enumerate(names):
        alone = wick_coefficients(ACTIVATIONS[name], mean[i], variance[i], 3, 2)
        np.testing.assert_array_equal(table[:, :, i], alone[:, :, 0])


# ---- radial parts -------------------------------------------------------------------------------


def _symmetric(rng, size, degree):
    tensor = rng.normal(size=(size,) * degree)
    axes = list(permutations(range(degree)))
    return sum(tensor.transpose(a) for a in axes) / len(axes)


def _traces(tensor, times):
    for _ in range(times):
        tensor = np.trace(tensor)
    return np.asarray(tensor)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("degree", "radial"), [(2, 1), (3, 1), (4, 1), (4, 2), (5, 1), (5, 2), (6, 1), (6, 2), (6, 3)]
)
def test_radial_core_is_an_orthogonal_projection(size, degree, radial):
    tensor = _symmetric(np.random.default_rng(degree), size, degree)
    core = radial_core(tensor, radial)
    kept = expand_core(core, np.eye(size), degree)
    # <tensor - kept, Sym(core' (x) I^radial)> vanishes for every core'.
    np.testing.assert_allclose(_traces(tensor - kept, radial), 0.0, atol=1e-12)
    np.testing.assert_allclose(radial_core(kept, radial), core, atol=1e-12)


@pytest.mark.parametrize("n", [2, 4])
def test_radial_core_closed_forms(n):
    rng = np.random.default_rng(n)
    eye = np.eye(n)
    second, third, fourth = (_symmetric(rng, n, d) for d in (2, 3, 4))
    fifth, sixth = (_symmetric(rng, n, d) for d in (5, 6))
    np.testing.assert_allclose(radial_core(second, 1), np.trace(second) / n)
    np.testing.assert_allclose(radial_core(third, 1), 3 / (n + 2) * np.einsum("iik->k", third))
    s = 3 / (n * (n + 2)) * np.einsum("iijj->", fourth)
    np.testing.assert_allclose(radial_core(fourth, 2), s)
    t = np.einsum("iikl->kl", fourth)
    g = 6 / (n + 4) * t - 3 / ((n + 2) * (n + 4)) * np.trace(t) * eye
    np.testing.assert_allclose(radial_core(fourth, 1), g, atol=1e-14)
    t = np.einsum("iijkl->jkl", fifth)
    u = np.einsum("iik->k", t)
    placed = [np.einsum(f"i,jk->{axes}", u, eye) for axes in ("ijk", "jik", "jki")]
    g = 10 / (n + 6) * t - 15 / ((n + 4) * (n + 6)) * sum(placed) / 3
    np.testing.assert_allclose(radial_core(fifth, 1), g, atol=1e-14)
    s = 15 / (n * (n + 2) * (n + 4)) * np.einsum("iijjkk->", sixth)
    np.testing.assert_allclose(radial_core(sixth, 3), s)


def test_expanded_slices():
    rng = np.random.default_rng(0)
    n = 3
    u, g, m = rng.normal(size=n), _symmetric(rng, n, 2), _symmetric(rng, n, 2)
    third = expand_core(u, m, 3)
    scalar = expand_core(np.array(1.7), m, 4)
    fourth = expand_core(g, m, 4)
    for i, j, k in permutations(range(n)):
        assert third[i, i, j] == pytest.approx((2 * u[i] * m[i, j] + u[j] * m[i, i]) / 3)
        cross = m[i, i] * m[j, k] + 2 * m[i, j] * m[i, k]
        assert scalar[i, i, j, k] == pytest.approx(1.7 / 3 * cross)
        cross = g[i, i] * m[j, k] + m[i, i] * g[j, k] + 2 * g[i, j] * m[i, k]
        assert fourth[i, i, j, k] == pytest.approx((cross + 2 * g[i, k] * m[i, j]) / 6)


# ---- propagation against the closed forms of orders one to three --------------------------------


def _network(seed, sizes, names):
    """Weights, biases, activations and a correlated input, mild enough for positive variances."""
    rng = np.random.default_rng(seed)
    pairs = list(zip(sizes[1:], sizes[:-1], strict=True))
    weights = [1.2 * rng.normal(size=pair) / np.sqrt(pair[1]) for pair in pairs]
    biases = [0.3 * rng.normal(size=out) for out, _ in pairs]
    root = 0.2 * rng.normal(size=(sizes[0], sizes[0]))
    return (
        weights,
        biases,
        [ACTIVATIONS[name] for name in names],
        0.3 * rng.normal(size=sizes[0]),
        np.eye(sizes[0]) + root @ root.T,
    )


def _metric(matrix, metric):
    out = len(matrix)
    if metric == "exact":
        return matrix @ matrix.T
    return sum(matrix[i] @ matrix[i] for i in range(out)) / out * np.eye(out)


def _close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_order_one_is_mean_propagation(metric, augmented):
    net = weights, biases, activations, mean, covariance = _network(
        0, [4, 6, 5, 3], ["relu", "tanh"]
    )
    outputs = propagate_dense(*net, order=1, augmented=augmented, metric=metric)
    mu, tau = mean, np.trace(covariance) / 4
    for layer, (matrix, bias) in enumerate(zip(weights, biases, strict=True)):
        mu = matrix @ mu + bias
        variance = np.array([tau * m for m in np.diag(_metric(matrix, metric))])
        _close(outputs[layer][1], mu)
        _close(np.diag(outputs[layer][2]), variance)
        if layer < 2:
            w = wick_table(activations[layer], mu, variance, 0, 2)
            mu = w[1, 0]
            tau = np.mean(w[2, 0] - w[1, 0] ** 2)


@pytest.mark.parametrize("metric", METRICS)
def test_order_two_is_covariance_propagation(metric):
    net = weights, biases, activations, mu, covariance = _network(1, [4, 6, 5, 3], ["gelu", "relu"])
    outputs = propagate_dense(*net, order=2, metric=metric)
    for layer, (matrix, bias) in enumerate(zip(weights, biases, strict=True)):
        mu = matrix @ mu + bias
        covariance = matrix @ covariance @ matrix.T
        _close(outputs[layer][1], mu)
        _close(outputs[layer][2], covariance)
        assert set(outputs[layer]) == {1, 2}
        if layer < 2:
            n = len(mu)
            w = wick_table(activations[layer], mu, np.diag(covariance), 1, 2)
            new = np.empty((n, n))
            for i in range(n):
                for j in range(n):
                    new[i, j] = w[1, 1, i] * w[1, 1, j] * covariance[i, j]
                new[i, i] = w[2, 0, i] - w[1, 0, i] ** 2
            mu, covariance = w[1, 0], new


def _one_neuron_power(w, p, i, third, fourth):
    """P_p, from kappa_iii and kappa_iiii."""
    return w[p, 0, i] + third * w[p, 3, i] / 6 + fourth * w[p, 4, i] / 24


def _two_neuron_power(w, p, q, i, j, c, t, f, budget):
    """P_pq at i != j, from the covariance c and the dense third and fourth cumulants t, f."""

    def ww(a, b):
        return w[p, a, i] * w[q, b, j]

    total = (
        ww(1, 1) * c[i, j]
        + ww(2, 1) * t[i, i, j] / 2
        + ww(1, 2) * t[i, j, j] / 2
        + ww(2, 2) * (f[i, i, j, j] / 4 + c[i, j] ** 2 / 2)
    )
    if budget == 3:
        total += (
            ww(1, 3) * f[i, j, j, j] / 6
            + ww(3, 1) * f[i, i, i, j] / 6
            + ww(1, 4) * t[j, j, j] * c[i, j] / 6
            + ww(4, 1) * t[i, i, i] * c[i, j] / 6
            + ww(1, 5) * f[j, j, j, j] * c[i, j] / 24
            + ww(5, 1) * f[i, i, i, i] * c[i, j] / 24
            + ww(2, 3) * c[i, j] * t[i, j, j] / 2
            + ww(3, 2) * c[i, j] * t[i, i, j] / 2
            + ww(3, 3) * (c[i, j] * f[i, i, j, j] / 4 + c[i, j] ** 3 / 6)
        )
    return total


def _three_neuron_power(w, powers, neurons, c, t, f, budget):
    """P_pqr at distinct neurons, summed over all placements."""

    def ww(orders):
        return prod(w[powers[s], orders[s], neurons[s]] for s in range(3))

    def at(*slots):
        return tuple(neurons[s] for s in slots)

    total = ww((1, 1, 1)) * t[at(0, 1, 2)]
    for centre in range(3):
        a, b = (s for s in range(3) if s != centre)
        twice_centre = [2 if s == centre else 1 for s in range(3)]
        total += ww(twice_centre) * c[at(a, centre)] * c[at(centre, b)]
        if budget == 3:
            total += ww(twice_centre) * f[at(centre, centre, a, b)] / 2
            total += ww([3 - k for k in twice_centre]) * c[at(a, b)] * t[at(0, 1, 2)]
    if budget == 3:
        total += ww((2, 2, 2)) * c[at(0, 1)] * c[at(1, 2)] * c[at(0, 2)]
        for a, centre, b in permutations(range(3)):
            heavy = [
                (2, 1, t[at(centre, centre, b)] / 2),
                (1, 2, t[at(centre, b, b)] / 2),
                (2, 2, f[at(centre, centre, b, b)] / 4),
                (2, 2, c[at(centre, b)] ** 2 / 2),
            ]
            for near, far, value in heavy:
                orders = [0, 0, 0]
                orders[a], orders[centre], orders[b] = 1, 1 + near, far
                total += ww(orders) * c[at(a, centre)] * value
    return total


def _closed_form_cumulants(activation, mu, c, t, f, order, augmented):
    """Mean, covariance, third and fourth slices after an activation, written out by hand.

    For K = 2 augmented the third cumulant at distinct neurons stays zero; so do the slices of the
    fourth that the variant's radial core does not need.
    """
    n = len(mu)
    budget = 3 if (order, augmented) == (3, True) else 2
    w = wick_table(activation, mu, np.diag(c), 6, 4)
    one = {
        p: [_one_neuron_power(w, p, i, t[i, i, i], f[i, i, i, i]) for i in range(n)]
        for p in (1, 2, 3, 4)
    }
    two = {
        (p, q): np.array(
            [
                [
                    0.0 if i == j else _two_neuron_power(w, p, q, i, j, c, t, f, budget)
                    for j in range(n)
                ]
                for i in range(n)
            ]
        )
        for p, q in [(1, 1), (2, 1), (2, 2), (3, 1)]
    }
    mean = np.array(one[1])
    covariance, third, fourth = two[1, 1].copy(), np.zeros((n,) * 3), np.zeros((n,) * 4)
    for i in range(n):
        m1, m2, m3, m4 = (one[p][i] for p in (1, 2, 3, 4))
        covariance[i, i] = m2 - m1**2
        third[i, i, i] = m3 - 3 * m1 * m2 + 2 * m1**3
        fourth[i, i, i, i] = m4 - 4 * m1 * m3 - 3 * m2**2 + 12 * m1**2 * m2 - 6 * m1**4
    for i, j in permutations(range(n), 2):
        p11 = two[1, 1][i, j]
        k21 = two[2, 1][i, j] - 2 * mean[i] * p11
        k22 = (
            two[2, 2][i, j]
            - 2 * mean[j] * two[2, 1][i, j]
            - 2 * mean[i] * two[2, 1][j, i]
            + 4 * mean[i] * mean[j] * p11
            - 2 * p11**2
        )
        k31 = (
            two[3, 1][i, j]
            - 3 * mean[i] * two[2, 1][i, j]
            - 3 * one[2][i] * p11
            + 6 * mean[i] ** 2 * p11
        )
        for place in set(permutations((i, i, j))):
            third[place] = k21
        for place in set(permutations((i, i, j, j))):
            fourth[place] = k22
        for place in set(permutations((i, i, i, j))):
            fourth[place] = k31 if budget == 3 else 0.0
    for i, j, k in permutations(range(n), 3):
        if order < 3:
            break
        p111 = _three_neuron_power(w, (1, 1, 1), (i, j, k), c, t, f, budget)
        third[i, j, k] = p111
        p211 = _three_neuron_power(w, (2, 1, 1), (i, j, k), c, t, f, budget)
        k211 = p211 - 2 * mean[i] * p111 - 2 * two[1, 1][i, j] * two[1, 1][i, k]
        for place in set(permutations((i, i, j, k))):
            fourth[place] = k211 if budget == 3 else 0.0
    return mean, covariance, third, fourth


def _all_pairings(g, m):
    """Sym(g (x) m) for matrices, as the mean over the six ways to place g."""
    return (
        np.einsum("ij,kl->ijkl", g, m)
        + np.einsum("ik,jl->ijkl", g, m)
        + np.einsum("il,jk->ijkl", g, m)
        + np.einsum("jk,il->ijkl", g, m)
        + np.einsum("jl,ik->ijkl", g, m)
        + np.einsum("kl,ij->ijkl", g, m)
    ) / 6


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("order", "augmented"), [(2, True), (3, False), (3, True)])
def test_closed_forms_with_third_and_fourth_cumulants(order, augmented, metric):
    net = weights, biases, activations, mean, c = _network(2, [4, 5, 4, 3], ["relu", "gelu"])
    skew = 0.2 * np.random.default_rng(3).normal(size=4)
    third = np.einsum("i,j,k->ijk", skew, skew, skew)
    outputs = propagate_dense(
        *net, order=order, augmented=augmented, metric=metric, input_cumulants={3: third}
    )
    fourth = np.zeros((4,) * 4)
    for layer, (matrix, bias) in enumerate(zip(weights, biases, strict=True)):
        n = len(mean)
        gram = _metric(matrix, metric)
        mean = matrix @ mean + bias
        c = matrix @ c @ matrix.T
        if order == 2:
            u = matrix @ (3 / (n + 2) * np.einsum("iik->k", third))
            t = sum(np.einsum(f"i,jk->{axes}", u, gram) for axes in ("ijk", "jik", "jki")) / 3
        else:
            t = np.einsum("abc,ia,jb,kc->ijk", third, matrix, matrix, matrix)
        if (order, augmented) == (3, True):
            trace = np.einsum("iikl->kl", fourth)
            g = 6 / (n + 4) * trace - 3 / ((n + 2) * (n + 4)) * np.trace(trace) * np.eye(n)
            f = _all_pairings(matrix @ g @ matrix.T, gram)
        else:
            f = 3 / (n * (n + 2)) * np.einsum("iijj->", fourth) * _all_pairings(gram, gram)
        for degree, expected in {1: mean, 2: c, 3: t, 4: f}.items():
            _close(outputs[layer][degree], expected)
        assert np.diag(c).min() > 0.01
        if layer < 2:
            mean, c, third, fourth = _closed_form_cumulants(
                activations[layer], mean, c, t, f, order, augmented
            )


# ---- exact results ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "augmented", "expected"),
    [
        (1, False, 7.0),  # the third cumulant, 8, is missing
        (2, False, 7.0),
        (2, True, 15.0),
        (3, False, 15.0),
        (3, True, 15.0),
        (4, False, 15.0),
        (4, True, 15.0),
    ],
)
def test_one_neuron_polynomial_network(order, augmented, expected):
    one = np.ones((1, 1))
    outputs = propagate_dense(
        [one] * 3,
        [None] * 3,
        [ACTIVATIONS["square"], ACTIVATIONS["cube"]],
        np.zeros(1),
        one,
        order,
        augmented,
    )
    assert outputs[-1][1][0] == pytest.approx(expected, rel=1e-12)
    # The square of a standard normal has cumulants 2^(d-1) (d-1)!.
    for degree in range(1, order + 1):
        exact = 2 ** (degree - 1) * factorial(degree - 1)
        assert outputs[1][degree].item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("order", "augmented"), VARIANTS)
@pytest.mark.parametrize("metric", METRICS)
def test_permuting_the_neurons_changes_nothing(order, augmented, metric):
    weights, biases, _, mean, covariance = _network(4, [3, 4, 4, 3], ["relu", "relu"])
    activations = [
        [ACTIVATIONS[name] for name in ("relu", "identity", "tanh", "gelu")],
        [ACTIVATIONS[name] for name in ("sigmoid", "relu", "abs", "silu")],
    ]
    orders = [np.array(p) for p in ([2, 0, 1], [1, 3, 0, 2], [3, 2, 0, 1], [1, 2, 0])]
    plain = propagate_dense(
        weights, biases, activations, mean, covariance, order, augmented, metric
    )
    permuted = propagate_dense(
        [w[orders[i + 1]][:, orders[i]] for i, w in enumerate(weights)],
        [b[orders[i + 1]] for i, b in enumerate(biases)],
        [[layer[a] for a in orders[i + 1]] for i, layer in enumerate(activations)],
        mean[orders[0]],
        covariance[np.ix_(orders[0], orders[0])],
        order,
        augmented,
        metric,
    )
    for i, (before, after) in enumerate(zip(plain, permuted, strict=True)):
        assert np.diag(before[2]).min() > 0.01
        for degree, tensor in before.items():
            rearranged = tensor[np.ix_(*[orders[i + 1]] * degree)]
            np.testing.assert_allclose(after[degree], rearranged, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("order", "augmented"), VARIANTS)
def test_one_hidden_layer_has_the_exact_mean(order, augmented):
    weights, biases, _, mean, covariance = _network(5, [4, 5, 3], ["relu"])
    if order == 1:  # one number for all variances: exact for isotropic inputs
        covariance = 1.3 * np.eye(4)
    names = ["relu", "relu", "identity", "square", "heaviside"]
    outputs = propagate_dense(
        weights,
        biases,
        [[ACTIVATIONS[name] for name in names]],
        mean,
        covariance,
        order,
        augmented,
    )
    mu = weights[0] @ mean + biases[0]
    sigma = np.sqrt(np.diag(weights[0] @ covariance @ weights[0].T))
    alpha = mu / sigma
    exact = {
        "relu": mu * ndtr(alpha) + sigma * _density(alpha),
        "identity": mu,
        "square": mu**2 + sigma**2,
        "heaviside": ndtr(alpha),
    }
    hidden = np.array([exact[name][i] for i, name in enumerate(names)])
    _close(outputs[1][1], weights[1] @ hidden + biases[1])


def _quadratic_form_cumulant(matrix, mean, covariance, degree):
    """Cumulant of x^T A x for x ~ N(mean, covariance): a textbook formula."""
    product = matrix @ covariance
    power = np.linalg.matrix_power(product, degree - 1)
    trace = np.trace(power @ product)
    shift = mean @ power @ matrix @ mean
    return 2 ** (degree - 1) * factorial(degree - 1) * (trace + degree * shift)


@pytest.mark.parametrize(
    ("order", "augmented", "exact_degree"),
    [(2, True, 2), (3, False, 2), (3, True, 3), (4, False, 3), (4, True, 4)],
)
def test_sums_of_squares_are_exact_once_all_their_diagrams_are_kept(order, augmented, exact_degree):
    """A cumulant of degree d of squares has cycles of d covariances, of cost d."""
    weights, biases, activations, mean, covariance = _network(6, [4, 4, 2, 2], ["square", "square"])
    outputs = propagate_dense(
        weights, biases, activations, mean, covariance, order, augmented, metric="exact"
    )
    mu = weights[0] @ mean + biases[0]
    sigma = weights[0] @ covariance @ weights[0].T
    exact = np.array(
        [
            [_quadratic_form_cumulant(np.diag(row), mu, sigma, d) for d in range(1, 5)]
            for row in weights[1]
        ]
    )
    exact[:, 0] += biases[1]
    for degree in range(1, exact_degree + 1):
        diagonal = [outputs[1][degree][(i,) * degree] for i in range(2)]
        np.testing.assert_allclose(diagonal, exact[:, degree - 1], rtol=1e-10)
    for degree in range(exact_degree + 1, order + 1):
        diagonal = [outputs[1][degree][(i,) * degree] for i in range(2)]
        assert not np.allclose(diagonal, exact[:, degree - 1], rtol=1e-3)
    second = weights[2] @ (exact[:, 0] ** 2 + exact[:, 1]) + biases[2]
    np.testing.assert_allclose(outputs[2][1], second, rtol=1e-10)


@pytest.mark.parametrize(("order", "augmented"), VARIANTS)
def test_identity_units_make_a_linear_map(order, augmented):
    weights, biases, activations, mean, covariance = _network(7, [3, 4, 3], ["identity"])
    rng = np.random.default_rng(8)
    given = {3: _symmetric(rng, 3, 3), 4: _symmetric(rng, 3, 4)}
    outputs = propagate_dense(
        weights,
        biases,
        activations,
        mean,
        covariance,
        order,
        augmented,
        input_cumulants=given,
    )
    matrix = weights[1] @ weights[0]
    expected = {
        1: matrix @ mean + weights[1] @ biases[0] + biases[1],
        2: matrix @ covariance @ matrix.T,
        3: np.einsum("abc,ia,jb,kc->ijk", given[3], *[matrix] * 3),
        4: np.einsum("abcd,ia,jb,kc,ld->ijkl", given[4], *[matrix] * 4),
    }
    for degree in range(1, order + 1):
        np.testing.assert_allclose(outputs[1][degree], expected[degree], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("order", "augmented"), VARIANTS)
def test_outputs_are_symmetric_and_of_the_tracked_degrees(order, augmented):
    net = _network(9, [3, 4, 2], ["tanh"])
    for output, size in zip(
        propagate_dense(*net, order=order, augmented=augmented), (4, 2), strict=True
    ):
        assert set(output) == set(tracked_degrees(order, augmented))
        for degree, tensor in output.items():
            assert tensor.shape == (size,) * degree
            for axis in range(1, degree):
                np.testing.assert_allclose(tensor, tensor.swapaxes(0, axis), atol=1e-10)


def test_a_missing_bias_is_a_zero_bias():
    weights, _, activations, mean, covariance = _network(10, [3, 4, 2], ["relu"])
    law = (mean, covariance, 3)
    without = propagate_dense(weights, [None, None], activations, *law)
    zeros = propagate_dense(weights, [np.zeros(4), np.zeros(2)], activations, *law)
    for first, second in zip(without, zeros, strict=True):
        for degree, tensor in first.items():
            np.testing.assert_array_equal(tensor, second[degree])


def test_wrong_arguments_are_refused():
    weights, biases, activations, mean, covariance = _network(11, [2, 2, 2], ["relu"])
    law = (mean, covariance)
    with pytest.raises(OptionError, match="order"):
        propagate_dense(weights, biases, activations, *law, order=5)
    with pytest.raises(OptionError, match="metric"):
        propagate_dense(weights, biases, activations, *law, order=2, metric="mean")
    with pytest.raises(ShapeError, match="activations"):
        propagate_dense(weights, biases, activations * 2, *law, order=2)
