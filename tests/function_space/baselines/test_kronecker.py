import pytest
import torch
from torch import nn

import oracles.function_space_baselines as oracle
from baseline_networks import convolutional, filled, moved, multilayer, numbers, sentences, words
from pushforward.errors import OptionError, ShapeError
from pushforward.function_space.baselines.diagonal import DiagonalDistance
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.baselines.kronecker import KroneckerDistance

METRICS = ("euclidean", "softmax", "kl", "fisher")


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def formula(net, other, x, positions, metric, corrected):
    """Of the layers at these positions of a chain, from dense arrays."""
    total = 0.0
    for position in positions:
        inputs, gradients = oracle.layer_arrays(net, position, x, metric)
        a, b = oracle.kronecker_factors(inputs, gradients)
        weight = (other[position].weight - net[position].weight).detach().flatten(1)
        bias = (other[position].bias - net[position].bias).detach()
        step = torch.cat([weight, bias.unsqueeze(1)], 1)
        if corrected:
            total += oracle.corrected_quadratic(inputs, gradients, a, b, step)
        else:
            total += float(torch.trace(step.T @ b @ step @ a)) / 2
    return total


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("corrected", [False, True])
def test_it_is_the_formula_from_dense_arrays(metric, corrected):
    # More examples and outputs than units: eigenvectors of zero would be anybody's choice.
    net, x = multilayer(), numbers(17, 3, seed=1)
    other = moved(net)
    found = KroneckerDistance.of(
        net, x, eigenvalue_corrected=corrected, metric=metric, batch_size=4
    )
    value = found.distance(other)
    assert value > 0
    expected = formula(net, other, x, (0, 2, 4), metric, corrected)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("corrected", [False, True])
def test_of_fewer_examples_than_inputs_it_keeps_what_they_reach(corrected):
    net, x = multilayer(), numbers(2, 3, seed=1)
    other = moved(net)
    found = KroneckerDistance.of(net, x, eigenvalue_corrected=corrected)
    assert [part.input_basis.shape for part in found.layers] == [(4, 2), (6, 2), (5, 2)]
    expected = formula(net, other, x, (0, 2, 4), "euclidean", corrected)
    assert float(found.distance(other).detach()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("corrected", [False, True])
def test_an_input_that_is_always_zero_is_not_kept(corrected):
    net, x = multilayer(), numbers(17, 3, seed=1)
    x[:, 1] = 0
    other = moved(net)
    found = KroneckerDistance.of(net, x, eigenvalue_corrected=corrected)
    assert found.layers[0].input_basis.shape == (4, 3)
    expected = formula(net, other, x, (0, 2, 4), "euclidean", corrected)
    assert float(found.distance(other).detach()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("corrected", [False, True])
def test_of_a_convolution(corrected):
    net, x = convolutional(), numbers(17, 2, 5, 4, seed=2)
    other = moved(net)
    found = KroneckerDistance.of(net, x, eigenvalue_corrected=corrected, batch_size=4)
    expected = formula(net, other, x, (0, 4), "euclidean", corrected)
    assert float(found.distance(other).detach()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("corrected", [False, True])
def test_it_is_exact_for_one_linear_layer(corrected):
    net, x = filled(nn.Sequential(nn.Linear(4, 3)), 1), numbers(17, 4, seed=1)
    other = moved(net, by=2.0)
    found = KroneckerDistance.of(net, x, eigenvalue_corrected=corrected).distance(other)
    exact = ExactDistance.of(net, x).distance(other)
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-12)


def test_corrected_eigenvalues_keep_the_trace_of_every_layer():
    net, x = convolutional(), numbers(17, 2, 5, 4, seed=2)
    found = KroneckerDistance.of(net, x, metric="kl")
    diagonal = DiagonalDistance.of(net, x, metric="kl").curvature
    for part in found.layers:
        expected = sum(float(diagonal[name].sum()) for name in part.layer.names)
        assert float(part.eigenvalues.sum()) == pytest.approx(expected, rel=1e-11)


def test_all_other_parameters_have_the_exact_diagonal():
    for net, x, names in (
        (words(), sentences(7), {"embed.weight", "norm.weight", "norm.bias"}),
        (
            convolutional(normalised=True),
            numbers(6, 2, 5, 4, seed=2),
            {"1.weight", "1.bias"},
        ),
    ):
        found = KroneckerDistance.of(net, x, eigenvalue_corrected=False, batch_size=4)
        assert set(found.diagonal) == names
        diagonal = DiagonalDistance.of(net, x)
        for name in names:
            torch.testing.assert_close(found.diagonal[name], diagonal.curvature[name])
        other = moved(net, only=names)
        value = float(found.distance(other).detach())
        assert value == pytest.approx(float(diagonal.distance(other).detach()), rel=1e-11)
        assert value > 0


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(
    ("net", "x"),
    [(words(), sentences(17)), (multilayer(), numbers(2, 3, seed=1))],
    ids=["words", "few examples"],
)
def test_it_solves_with_its_own_matrix(net, x, corrected):
    found = KroneckerDistance.of(net, x, eigenvalue_corrected=corrected)
    point = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    first = torch.autograd.grad(found.distance(point), point.values(), create_graph=True)
    slope = torch.cat([g.flatten() for g in first])
    rows = [torch.autograd.grad(s, tuple(point.values()), retain_graph=True) for s in slope]
    dense = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert float(torch.linalg.eigvalsh(dense).min()) > -1e-12
    gradients = {n: numbers(2, *p.shape, seed=i) for i, (n, p) in enumerate(point.items())}
    solved = found.solve(gradients, 0.05)
    assert list(solved) == list(point)
    for row in range(2):
        given = flat({n: g[row] for n, g in gradients.items()})
        expected = torch.linalg.solve(
            dense + 0.05 * torch.eye(len(dense), dtype=torch.float64), given
        )
        torch.testing.assert_close(
            flat({n: g[row] for n, g in solved.items()}), expected, rtol=1e-9, atol=1e-10
        )


@pytest.mark.parametrize("corrected", [False, True])
def test_zero_at_the_same_weights(corrected):
    net = multilayer()
    same = moved(net, by=0.0)
    found = KroneckerDistance.of(net, numbers(17, 3, seed=1), eigenvalue_corrected=corrected)
    value = found.distance(same)
    value.backward()
    assert float(value.detach()) == 0
    assert not any(p.grad.any() for p in same.parameters())


def test_single_precision_and_what_it_keeps():
    net, x = multilayer().float(), numbers(17, 3, seed=1)
    other = moved(net)
    small = KroneckerDistance.of(net, x, eigenvalue_corrected=False)
    large = KroneckerDistance.of(net, x, eigenvalue_corrected=True)
    sizes = [(5, 4), (4, 6), (3, 5)]
    squares = sum(o * o + i * i + o + i for o, i in sizes)
    assert small.num_bytes == 8 * squares
    assert large.num_bytes == 8 * (squares + sum(o * i for o, i in sizes))
    assert (small.name, large.name) == ("KFAC", "EK-FAC")
    assert small.distance(other).dtype == torch.float32
    fine = KroneckerDistance.of(net.double(), x, eigenvalue_corrected=False)
    assert float(small.distance(other).detach()) == pytest.approx(
        float(fine.distance(other).detach()), rel=1e-4
    )


def test_refusals():
    net, x = multilayer(), numbers(17, 3, seed=1)
    found = KroneckerDistance.of(net, x, metric="softmax")
    with pytest.raises(OptionError, match="built for 'softmax'"):
        found.distance(net, metric="kl")
    gradients = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    with pytest.raises(OptionError, match="damping"):
        found.solve(gradients, 0.0)
    with pytest.raises(ShapeError, match="for every parameter"):
        found.solve({**gradients, "extra": torch.zeros(1)}, 1.0)
