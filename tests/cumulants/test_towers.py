"""Towers of cumulants against dense tensors, and the moments of the radius."""

import math

import numpy as np
import pytest
import torch

from oracles.dense_cumulants import expand_core, linear_step
from oracles.dense_towers import assert_tower, dense_fourth, dense_third, symmetric
from pushforward.cumulants.towers import (
    CumulantTower,
    FactoredThird,
    RadialThird,
    Radius,
    Source,
    concatenate_towers,
    gram,
)
from pushforward.networks.graph import AffineMap, read_network
from pushforward.networks.linear_maps import Block, Dense, JointMap
from scenarios import fill, normal, standard_law

N = 5


def symmetric_matrix(seed, n=N):
    root = normal(seed, n, n)
    return root @ root.T / n


def source(seed, n=N, rank=4):
    return Source(*(normal(seed + i, n, rank) for i in range(3)), normal(seed + 3, rank))


def tower(third, *, metric=True, seed=0):
    return CumulantTower(
        normal(seed, N),
        symmetric_matrix(seed + 1),
        third,
        torch.tensor(-0.3, dtype=torch.float64),
        symmetric_matrix(seed + 2) if metric else None,
    )


TOWERS = {
    "radial": tower(RadialThird(normal(20, N))),
    "radial, identity metric": tower(RadialThird(normal(20, N)), metric=False),
    "factored": tower(FactoredThird((source(30), source(40, rank=7)))),
    "gaussian": CumulantTower(normal(0, N), symmetric_matrix(1)),
}
every_tower = pytest.mark.parametrize("one", TOWERS.values(), ids=TOWERS.keys())


def cumulants_of(one):
    return {
        1: one.mean.numpy(),
        2: one.covariance.numpy(),
        3: dense_third(one).numpy(),
        4: dense_fourth(one).numpy(),
    }


def affine_map(seed, rows, columns=N):
    matrix, bias = normal(seed, rows, columns), normal(seed + 1, rows)
    block = Block(rows, ((slice(0, columns), Dense(matrix)),))
    return AffineMap(JointMap(columns, (block,)), bias)


@every_tower
def test_slices_are_those_of_the_tensors(one):
    assert_tower(one, cumulants_of(one))


def test_a_source_is_a_symmetric_tensor():
    # Written out: Sym of 3 g e e l + r l l has iii = 3 g e^2 l + r l^2 summed over the rank.
    one = source(50)
    tensor = dense_third(tower(FactoredThird((one,))))
    torch.testing.assert_close(tensor, symmetric(tensor))
    expected = (3 * one.gain * one.edge**2 * one.leg + one.rest * one.leg**2).sum(1)
    torch.testing.assert_close(tensor[[0, 1], [0, 1], [0, 1]], expected[:2])


@every_tower
@pytest.mark.parametrize("rows", [3, N, 8])
def test_affine_maps_are_multilinear(one, rows):
    affine = affine_map(60, rows)
    matrix, bias = affine.linear.dense(one.mean).numpy(), affine.bias.numpy()
    dense = cumulants_of(one)
    for degree in dense:
        for axis in range(degree):
            moved = np.tensordot(matrix, dense[degree], axes=(1, axis))
            dense[degree] = np.moveaxis(moved, 0, axis)
    dense[1] = dense[1] + bias
    assert_tower(one.affine(affine), dense, rtol=1e-11, atol=1e-11)
    part = one.gaussian_part(affine)
    assert part.gaussian
    torch.testing.assert_close(part.covariance, torch.from_numpy(dense[2]))


@pytest.mark.parametrize("name", ["radial, identity metric", "factored"])
def test_average_metric_is_that_of_the_oracle(name):
    one = (
        TOWERS[name]
        if name == "radial, identity metric"
        else tower(FactoredThird((source(30),)), metric=False)
    )
    affine = affine_map(70, 4)
    cores = {1: one.mean.numpy(), 2: one.covariance.numpy(), 4: one.fourth.numpy()}
    cores[3] = one.third.core.numpy() if name.startswith("radial") else dense_third(one).numpy()
    matrix = affine.linear.dense(one.mean).numpy()
    expected = linear_step(cores, matrix, affine.bias.numpy(), "average")
    assert_tower(one.affine(affine, "average"), expected, rtol=1e-12)


def test_average_metric_of_a_second_linear_map():
    one = TOWERS["radial"]
    found = one.affine(affine_map(80, 3), "average").metric
    matrix = affine_map(80, 3).linear.dense(one.mean)
    expected = (matrix @ one.metric @ matrix.T).trace() / 3 * torch.eye(3).double()
    torch.testing.assert_close(found, expected)


def test_a_metric_is_kept_only_where_it_is_needed():
    assert TOWERS["gaussian"].affine(affine_map(90, 3)).metric is None
    third_only = CumulantTower(normal(0, N), symmetric_matrix(1), FactoredThird((source(1),)))
    assert third_only.affine(affine_map(90, 3)).metric is None


@every_tower
def test_selected_units_keep_their_joint_cumulants(one):
    units = slice(1, 4)
    dense = cumulants_of(one)
    expected = {d: dense[d][(units,) * d] for d in (1, 2, 3)}
    part = one.select(units)
    assert_tower(part, expected)
    if one.metric is not None:
        assert_tower(part, {4: dense[4][(units,) * 4]})


@every_tower
def test_batches(one):
    batched = CumulantTower(
        one.mean[None], one.covariance[None], _batched(one.third), one.fourth, one.metric
    ).expanded(1)
    assert_tower(batched.squeezed(), cumulants_of(one))
    both = concatenate_towers([batched, batched])
    assert both.mean.shape == (2, N)
    assert both.covariance.shape == (2, N, N)
    if one.third is not None:
        torch.testing.assert_close(both.marginal_third()[1], one.marginal_third())
        torch.testing.assert_close(both.pair_third()[1], one.pair_third())
    if one.fourth is not None:
        torch.testing.assert_close(both.marginal_fourth()[1], one.marginal_fourth())
        torch.testing.assert_close(both.pair_fourth()[1], one.pair_fourth())


def _batched(third):
    if isinstance(third, RadialThird):
        return RadialThird(third.core[None])
    if isinstance(third, FactoredThird):
        return FactoredThird(
            tuple(
                Source(s.leg[None], s.edge[None], s.rest[None], s.gain[None]) for s in third.sources
            )
        )
    return None


def test_shared_covariances_are_expanded():
    one = CumulantTower(normal(0, 3, N), symmetric_matrix(1), None, torch.tensor(0.1).double())
    wide = one.expanded(3)
    assert wide.covariance.shape == (3, N, N)
    assert wide.fourth.shape == (3,)


def test_scaled_sources():
    one, factor = source(100), normal(101, N)
    found = dense_third(tower(FactoredThird((one.scaled(factor),))))
    expected = torch.einsum(
        "i,j,k,ijk->ijk", *[factor] * 3, dense_third(tower(FactoredThird((one,))))
    )
    torch.testing.assert_close(found, expected)


def test_gram_of_dense_and_structured_maps():
    net = fill(torch.nn.Conv1d(2, 3, 2), 0)
    graph = read_network(torch.nn.Sequential(net, torch.nn.Flatten()), (2, 4))
    matrix = graph.output.linear.dense(normal(0, 1))
    torch.testing.assert_close(gram(graph.output.linear, normal(0, 1)), matrix @ matrix.T)


# --- the radius ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [1, 2, 7, 1000])
def test_moments_of_the_radius(dimension):
    # E R^2 = d, E R^4 = d (d + 2), E R = sqrt(2) Gamma((d + 1) / 2) / Gamma(d / 2).
    radius = Radius(dimension)
    assert radius.moment(2) == pytest.approx(1.0)
    assert radius.moment(4) == pytest.approx((dimension + 2) / dimension)
    assert radius.moment(6) == pytest.approx((dimension + 2) * (dimension + 4) / dimension**2)
    step = math.sqrt(2 / dimension)
    ratio = math.exp(math.lgamma((dimension + 1) / 2) - math.lgamma(dimension / 2))
    assert radius.moment(1) == pytest.approx(step * ratio)
    assert radius.moment(3) == pytest.approx(radius.moment(1) * (dimension + 1) / dimension)


def test_fourth_cumulant_of_the_sphere():
    # E y_i^4 = 3 d / (d + 2) on the sphere of radius sqrt(d), E y_i^2 y_j^2 = d / (d + 2).
    d = 6
    tensor = expand_core(np.asarray(Radius(d).fourth_core), np.eye(d), 4)
    assert tensor[0, 0, 0, 0] == pytest.approx(3 * d / (d + 2) - 3)
    assert tensor[0, 0, 1, 1] == pytest.approx(d / (d + 2) - 1)


def test_removing_and_restoring_the_radius_are_inverse():
    radius = Radius(9)
    one = TOWERS["gaussian"]
    mean, covariance, third, fourth = radius.restore(radius.remove(one))
    torch.testing.assert_close(mean, one.mean)
    torch.testing.assert_close(covariance, one.covariance)
    assert third is None
    assert fourth is None


@pytest.mark.parametrize("name", ["radial", "factored"])
def test_restored_cumulants_are_those_of_the_product(name):
    # f(X) = (R / sqrt d) f(Y): raw moments multiply, cumulants follow from them.
    radius, one = Radius(7), TOWERS[name]
    m, v = one.mean, one.variance
    k3, k4 = one.marginal_third(), one.marginal_fourth()
    raw = [
        m,
        v + m**2,
        k3 + 3 * v * m + m**3,
        k4 + 4 * k3 * m + 3 * v**2 + 6 * v * m**2 + m**4,
    ]
    raw = [radius.moment(p) * moment for p, moment in enumerate(raw, start=1)]
    expected = [
        raw[0],
        raw[1] - raw[0] ** 2,
        raw[2] - 3 * raw[0] * raw[1] + 2 * raw[0] ** 3,
        raw[3]
        - 4 * raw[0] * raw[2]
        - 3 * raw[1] ** 2
        + 12 * raw[0] ** 2 * raw[1]
        - 6 * raw[0] ** 4,
    ]
    mean, covariance, third, fourth = radius.restore(one)
    torch.testing.assert_close(mean, expected[0])
    torch.testing.assert_close(covariance.diagonal(), expected[1])
    torch.testing.assert_close(third, expected[2])
    torch.testing.assert_close(fourth, expected[3])
    # Off the diagonal: E f_i f_j is unchanged, because E (R / sqrt d)^2 = 1.
    second = one.covariance + torch.outer(m, m)
    torch.testing.assert_close(covariance + torch.outer(mean, mean), second)


def test_the_gauge_is_exact_for_the_norm():
    # |x| has mean E R and, on the sphere, no variance at all.
    d = 5
    radius = Radius(d)
    on_sphere = CumulantTower(torch.tensor([math.sqrt(d)]).double(), torch.zeros(1, 1).double())
    mean, covariance, _, _ = radius.restore(on_sphere)
    x = standard_law(d).transform(normal(0, 200_000, d)).norm(dim=1)
    assert abs(mean.item() - x.mean().item()) < 4.5 * x.std().item() / math.sqrt(200_000)
    assert covariance.item() == pytest.approx(d - mean.item() ** 2)
