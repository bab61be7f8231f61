import pytest
import torch

import oracles.function_space_baselines as oracle
from baseline_networks import convolutional, moved, multilayer, numbers, sentences, words
from pushforward.errors import OptionError, ShapeError, WeightsError
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.baselines.tangent import TangentDistance

METRICS = ("euclidean", "softmax", "kl", "fisher")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("outputs", [None, [2, 0]])
def test_over_all_data_it_is_the_dense_quadratic_with_all_its_derivatives(metric, outputs):
    net, x = multilayer(), numbers(11, 3, seed=1)
    other = moved(net)
    parameters = tuple(other.parameters())
    dense = oracle.dense_curvature(net, x, metric, outputs)
    step = oracle.displacement(net, other)
    tangent = TangentDistance.of(net, x, batch_size=4)
    value = tangent.distance(other, metric=metric, outputs=outputs)
    assert float(value.detach()) == pytest.approx(float(step @ dense @ step) / 2, rel=1e-12)
    assert value > 0
    slopes = torch.autograd.grad(value, parameters, create_graph=True)
    flat = torch.cat([g.flatten() for g in slopes])
    torch.testing.assert_close(flat, dense @ step, rtol=1e-11, atol=1e-13)
    direction = numbers(len(step), seed=5)
    second = torch.autograd.grad(flat @ direction, parameters)
    product = torch.cat([h.flatten() for h in second])
    torch.testing.assert_close(product, dense @ direction, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (convolutional(normalised=True), numbers(6, 2, 5, 4, seed=2)),
        (words(), sentences(7)),
    ],
)
def test_other_layers(net, x):
    other = moved(net)
    step = oracle.displacement(net, other)
    found = TangentDistance.of(net, (x, torch.zeros(len(x)))).distance(other)
    expected = float(step @ oracle.dense_curvature(net, x, "euclidean") @ step) / 2
    assert float(found.detach()) == pytest.approx(expected, rel=1e-11)


def test_it_is_exact_when_only_the_last_layer_moved():
    net, x = multilayer(), numbers(11, 3, seed=1)
    other = moved(net, by=3.0, only=("4.weight", "4.bias"))
    found = TangentDistance.of(net, x).distance(other)
    exact = ExactDistance.of(net, x).distance(other)
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-12)


def test_copies_of_some_examples():
    net, x = multilayer(), numbers(30, 3, seed=1)
    other = moved(net)
    some = TangentDistance.of(net, x.clone(), num_examples=8, seed=2)
    found = float(some.distance(other).detach())
    step = oracle.displacement(net, other)
    kept = some.examples.select(torch.arange(8)).inputs
    assert found == pytest.approx(
        float(step @ oracle.dense_curvature(net, kept, "euclidean") @ step) / 2, rel=1e-12
    )
    assert all(bool((x == row).all(1).any()) for row in kept)
    again = TangentDistance.of(net, x, num_examples=8, seed=3).distance(other)
    assert float(again.detach()) != found
    assert some.num_bytes == 8 * 3 * 8
    assert some.num_examples == 30  # whose distance it estimates
    assert some.name == "tangent on 8"
    assert TangentDistance.of(net, x).name == "tangent"


@pytest.mark.parametrize("metric", METRICS)
def test_at_the_same_weights_value_and_gradient_are_exact_zeros(metric):
    net = multilayer()
    same = moved(net, by=0.0)
    found = TangentDistance.of(net, numbers(11, 3, seed=1)).distance(same, metric=metric)
    found.backward()
    assert float(found.detach()) == 0
    assert not any(p.grad.any() for p in same.parameters())


def test_single_precision():
    net, x = multilayer().float(), numbers(11, 3, seed=1)
    other = moved(net)
    found = TangentDistance.of(net, x).distance(other)
    step = oracle.displacement(net.double(), other.double())
    dense = oracle.dense_curvature(net, x, "euclidean")
    assert float(found.detach()) == pytest.approx(float(step @ dense @ step) / 2, rel=1e-4)


def test_a_buffer_that_moved_is_refused_instead_of_passed_over():
    net = convolutional(normalised=True)
    other = moved(net)
    other[1].running_mean.add_(1.0)
    with pytest.raises(WeightsError, match="running_mean"):
        TangentDistance.of(net, numbers(6, 2, 5, 4, seed=2)).distance(other)


def test_refusals():
    net, x = multilayer(), numbers(11, 3, seed=1)
    tangent = TangentDistance.of(net, x)
    with pytest.raises(ShapeError, match="does not select"):
        tangent.distance(net, outputs=[7])
    with pytest.raises(WeightsError, match="shape"):
        tangent.distance({n: p[:1] for n, p in net.named_parameters()})
    with pytest.raises(OptionError, match=r"^num_examples: .* from 1 to 11"):
        TangentDistance.of(net, x, num_examples=12)
