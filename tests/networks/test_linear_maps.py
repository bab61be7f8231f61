"""Every kind of linear map behaves as its matrix does."""

import pytest
import torch
from torch.nn import functional

from pushforward.networks.linear_maps import (
    Block,
    Dense,
    Identity,
    JointMap,
    Structured,
    add,
    compose,
)
from scenarios import normal

KERNEL = normal(0, 2, 3, 2, 2)  # two output and three input channels
LIKE = torch.zeros((), dtype=torch.float64)

DENSE = Dense(normal(1, 4, 5))
CONV = Structured(lambda x: functional.conv2d(x, KERNEL), (3, 3, 3), (2, 2, 2), flops=192.0)
POOL = Structured(lambda x: functional.avg_pool1d(x, 2), (1, 6), (1, 3), flops=6.0)
JOINT = JointMap(
    7,
    (
        Block(4, ((slice(0, 5), DENSE), (slice(3, 7), Identity(4)))),
        Block(2, ()),
        Block(3, ((slice(2, 7), Dense(normal(2, 3, 5))),)),
    ),
)
MAPS = {"identity": Identity(5), "dense": DENSE, "conv": CONV, "pool": POOL, "joint": JOINT}
every_map = pytest.mark.parametrize("linear", MAPS.values(), ids=MAPS.keys())


@every_map
def test_a_map_is_its_matrix(linear):
    matrix = linear.dense(LIKE)
    assert matrix.shape == (linear.out_features, linear.in_features)
    assert matrix.dtype == torch.float64
    rows = normal(3, 2, 3, linear.in_features)
    torch.testing.assert_close(linear.apply(rows), rows @ matrix.T)
    torch.testing.assert_close(linear.apply(rows[0, 0]), matrix @ rows[0, 0])


@every_map
def test_independent_variances_go_through_squared_entries(linear):
    matrix = linear.dense(LIKE)
    rows = normal(4, 3, linear.in_features).abs()
    if linear is JOINT:
        # Terms that share a column would need the square of their sum; the reader never makes them.
        linear = JointMap(7, (Block(4, JOINT.blocks[0].terms[:1]), *JOINT.blocks[1:]))
        matrix = linear.dense(LIKE)
    torch.testing.assert_close(linear.apply_squared(rows), rows @ matrix.square().T)


def test_composed_structured_maps_cost_both():
    twice = Structured(lambda x: 2 * x, (8,), (8,), flops=8.0)
    assert compose(twice, CONV).flops == 200.0
    assert compose(DENSE, Identity(5)).flops == DENSE.flops


@every_map
def test_costs(linear):
    expected = {"identity": 0.0, "dense": 40.0, "conv": 192.0, "pool": 6.0, "joint": 40.0 + 30.0}
    assert linear.flops == next(expected[name] for name, kind in MAPS.items() if kind is linear)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (Identity(4), DENSE),
        (DENSE, Identity(5)),
        (Dense(normal(5, 2, 4)), DENSE),
        (Dense(normal(6, 2, 8)), CONV),
        (Structured(lambda x: x.flip(-1), (4,), (4,), 0.0), DENSE),
        (Structured(lambda x: 2 * x, (8,), (8,), 8.0), CONV),
    ],
)
def test_composition_is_the_product(outer, inner):
    product = compose(outer, inner)
    expected = outer.dense(LIKE) @ inner.dense(LIKE)
    torch.testing.assert_close(product.dense(LIKE), expected)
    rows = normal(7, 3, inner.in_features)
    torch.testing.assert_close(product.apply(rows), outer.apply(inner.apply(rows)))
    assert (product.in_features, product.out_features) == expected.shape[::-1]


def test_sums():
    other = Structured(lambda x: x[..., :4], (5,), (4,), 0.0)
    expected = DENSE.matrix + torch.eye(5, dtype=torch.float64)[:4]
    torch.testing.assert_close(add(DENSE, other, LIKE).dense(LIKE), expected)


def test_a_block_without_terms_is_zero():
    rows = JOINT.apply(normal(8, 2, 7))
    assert not rows[:, 4:6].any()
    assert not JOINT.apply_squared(normal(9, 2, 7).abs())[:, 4:6].any()


def test_gradients_reach_the_weights():
    weight = normal(10, 2, 3, 2, 2).requires_grad_()
    conv = Structured(lambda x: functional.conv2d(x, weight), (3, 3, 3), (2, 2, 2))
    conv.dense(LIKE).square().sum().backward()
    # Each weight appears once for each of the four output pixels.
    torch.testing.assert_close(weight.grad, 8 * weight.detach())
