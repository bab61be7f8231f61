import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import oracles.function_space_baselines as oracle
from baseline_networks import moved, multilayer, numbers, sentences, words
from pushforward.errors import PushforwardError, ShapeError
from pushforward.function_space.baselines.diagonal import DiagonalDistance
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.baselines.kronecker import KroneckerDistance
from pushforward.function_space.baselines.tangent import TangentDistance

METRICS = ("euclidean", "softmax", "kl", "fisher")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("outputs", [None, [2, 0]])
def test_it_is_the_mean_over_examples_taken_one_at_a_time(metric, outputs):
    net, x = multilayer(), numbers(11, 3, seed=1)
    other = moved(net)
    exact = ExactDistance.of(net, x, batch_size=4)
    found = exact.distance(other, metric=metric, outputs=outputs)
    assert float(found.detach()) == pytest.approx(
        oracle.exact_distance(net, other, x, metric, outputs), rel=1e-12
    )
    rows = exact.per_example(other, metric=metric, outputs=outputs)
    assert rows.shape == (11,)
    assert float(rows.mean()) == pytest.approx(float(found.detach()), rel=1e-12)
    assert found > 0


def test_data_come_in_any_common_form():
    net, x = multilayer(), numbers(11, 3, seed=1)
    labels = torch.arange(11) % 3
    other = dict(moved(net).named_parameters())
    forms = [x, (x, labels), DataLoader(TensorDataset(x, labels), batch_size=3), [x[:6], x[6:]]]
    found = [float(ExactDistance.of(net, form).distance(other).detach()) for form in forms]
    assert found == pytest.approx([found[0]] * 4, rel=1e-13)


def test_integer_inputs_stay_integers():
    net, x = words(), sentences(9)
    other = moved(net)
    found = ExactDistance.of(net, x, batch_size=2).distance(other)
    assert float(found.detach()) == pytest.approx(oracle.exact_distance(net, other, x, "euclidean"))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("batch_size", [4, 100])
def test_at_the_same_weights_value_and_gradient_are_exact_zeros(metric, batch_size):
    net, x = multilayer(), numbers(11, 3, seed=1)
    same = moved(net, by=0.0)
    exact = ExactDistance.of(net, x, batch_size=batch_size)
    found = exact.distance(same, metric=metric)
    found.backward()
    assert float(found.detach()) == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in same.parameters())
    assert not exact.per_example(same, metric=metric).any()


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_in_batches_are_those_at_once_and_of_finite_differences(metric):
    net, x = multilayer(), numbers(11, 3, seed=1)
    other = moved(net)
    parameters = tuple(other.parameters())
    pieces = ExactDistance.of(net, x, batch_size=4)
    found = torch.autograd.grad(pieces.distance(other, metric=metric), parameters)
    whole = ExactDistance.of(net, x).distance(other, metric=metric)
    for a, b in zip(found, torch.autograd.grad(whole, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    step, weight = 1e-6, parameters[2]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[1, 2] += sign * step
            values.append(float(pieces.distance(other, metric=metric)))
            weight[1, 2] -= sign * step
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(found[2][1, 2]), rel=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("batch_size", [4, 100])
def test_second_derivatives_at_the_reference_are_the_gauss_newton_matrix(metric, batch_size):
    net, x = multilayer(), numbers(11, 3, seed=1)
    same = moved(net, by=0.0)
    parameters = tuple(same.parameters())
    value = ExactDistance.of(net, x, batch_size=batch_size).distance(same, metric=metric)
    first = torch.autograd.grad(value, parameters, create_graph=True)
    direction = [numbers(*p.shape, seed=i) for i, p in enumerate(parameters)]
    slope = sum((g * v).sum() for g, v in zip(first, direction, strict=True))
    product = torch.cat([h.flatten() for h in torch.autograd.grad(slope, parameters)])
    flat = torch.cat([v.flatten() for v in direction])
    torch.testing.assert_close(
        product, oracle.dense_curvature(net, x, metric) @ flat, rtol=1e-10, atol=1e-12
    )


def test_a_gradient_keeps_no_activations_of_earlier_batches():
    net, x = multilayer(), numbers(1024, 3, seed=1)
    other = moved(net)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    def held(batch_size):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            ExactDistance.of(net, x, batch_size=batch_size).distance(other)
        return sum(kept)

    assert held(128) < held(1024) / 8


def test_the_answer_has_the_type_of_the_other_weights_and_inputs_are_converted():
    net, x = multilayer().float(), numbers(11, 3, seed=1)
    exact = ExactDistance.of(net, x)
    coarse = exact.distance(moved(net))
    fine = exact.distance(moved(net).double())
    assert coarse.dtype == torch.float32
    assert fine.dtype == torch.float64
    assert float(coarse.detach()) == pytest.approx(float(fine.detach()), rel=1e-6)


def test_the_network_that_was_given_may_change_afterwards():
    net, x = multilayer(), numbers(11, 3, seed=1)
    exact, same = ExactDistance.of(net, x), moved(net, by=0.0)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    assert float(exact.distance(same).detach()) == 0
    assert exact.distance(net) > 0


def test_it_says_what_it_keeps():
    exact = ExactDistance.of(multilayer(), (numbers(11, 3, seed=1), torch.zeros(11)))
    assert exact.name == "exact"
    assert exact.num_bytes == 11 * 3 * 8


def damaged():
    net = multilayer()
    with torch.no_grad():
        net[2].bias[1] = float("nan")
    return net


@pytest.mark.parametrize(
    ("net", "data", "message"),
    [
        (multilayer(), torch.zeros(0, 3, dtype=torch.float64), "example"),
        (multilayer(), torch.full((4, 3), float("nan"), dtype=torch.float64), "NaN"),
        (multilayer(), torch.zeros(4, 2, dtype=torch.float64), "cannot take"),
        (damaged(), torch.zeros(4, 3, dtype=torch.float64), "NaN"),
        (
            multilayer(),
            DataLoader(TensorDataset(numbers(8, 3, seed=1)), batch_size=2, shuffle=True),
            "shuffle",
        ),
    ],
)
def test_bad_networks_and_data_are_refused(net, data, message):
    with pytest.raises(PushforwardError, match=message):
        ExactDistance.of(net, data)


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        (damaged(), {}, "NaN"),
        (nn.Linear(3, 3).double(), {}, "weights are not those"),
        (multilayer(), {"outputs": [3]}, "does not select"),
        (multilayer(), {"outputs": []}, "does not select"),
        (multilayer(), {"metric": "cosine"}, "unknown metric|cosine"),
    ],
)
def test_bad_questions_are_refused(other, options, message):
    exact = ExactDistance.of(multilayer(), numbers(4, 3, seed=1))
    with pytest.raises(Exception, match=message):
        exact.distance(other, **options)


def test_a_batch_has_examples():
    with pytest.raises(PushforwardError, match="batch"):
        ExactDistance.of(multilayer(), numbers(4, 3, seed=1), batch_size=0)


@pytest.mark.parametrize(
    "kind", [ExactDistance, TangentDistance, DiagonalDistance, KroneckerDistance]
)
def test_outputs_with_several_axes_have_no_probabilities_of_their_own(kind):
    net, x = nn.Linear(4, 3).double(), numbers(7, 5, 4, seed=2)

    def divergence():
        if kind in {ExactDistance, TangentDistance}:
            return kind.of(net, x).distance(net, metric="kl")
        return kind.of(net, x, metric="kl").distance(net)

    with pytest.raises(ShapeError, match=r"outputs of shape \(5, 3\)"):
        divergence()
    assert kind.of(net, x).distance(net).item() == 0.0
