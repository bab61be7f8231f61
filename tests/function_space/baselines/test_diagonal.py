import pytest
import torch
from torch.nn.functional import cross_entropy

import oracles.function_space_baselines as oracle
from baseline_networks import convolutional, moved, multilayer, numbers, sentences, words
from pushforward.errors import DataError, OptionError, ShapeError, WeightsError
from pushforward.function_space.baselines.diagonal import DiagonalDistance

METRICS = ("euclidean", "softmax", "kl", "fisher")


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("outputs", [None, [2, 0]])
def test_it_is_the_diagonal_of_the_dense_matrix(metric, outputs):
    net, x = multilayer(), numbers(11, 3, seed=1)
    other = moved(net)
    diagonal = DiagonalDistance.of(net, x, metric=metric, outputs=outputs, batch_size=4)
    expected = oracle.dense_curvature(net, x, metric, outputs).diagonal()
    torch.testing.assert_close(flat(diagonal.curvature), expected, rtol=1e-11, atol=1e-14)
    step = oracle.displacement(net, other)
    value = diagonal.distance(other)
    assert float(value.detach()) == pytest.approx(float((expected * step**2).sum()) / 2, rel=1e-11)
    assert value > 0
    slopes = torch.cat([g.flatten() for g in torch.autograd.grad(value, tuple(other.parameters()))])
    torch.testing.assert_close(slopes, expected * step, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (convolutional(), numbers(6, 2, 5, 4, seed=2)),
        (convolutional(normalised=True), numbers(6, 2, 5, 4, seed=2)),
        (words(), sentences(7)),
    ],
)
def test_of_other_layers(net, x):
    found = DiagonalDistance.of(net, x, metric="fisher", batch_size=4).curvature
    expected = oracle.dense_curvature(net, x, "fisher").diagonal()
    torch.testing.assert_close(flat(found), expected, rtol=1e-10, atol=1e-13)


def test_the_empirical_one_squares_the_gradient_of_each_loss():
    net, x = multilayer(), numbers(11, 3, seed=1)
    labels = torch.arange(11) % 3
    found = DiagonalDistance.of(
        net, (x, labels), metric="fisher", fisher="empirical", batch_size=4
    ).curvature
    total = 0.0
    for example, label in zip(x, labels, strict=True):
        loss = cross_entropy(net(example.unsqueeze(0)), label.unsqueeze(0))
        slopes = torch.autograd.grad(loss, tuple(net.parameters()))
        total = total + torch.cat([g.flatten() for g in slopes]).square()
    torch.testing.assert_close(flat(found), total / 11, rtol=1e-10, atol=1e-14)
    # The square of the mean gradient, a common mistake, is another thing altogether.
    mean = torch.autograd.grad(cross_entropy(net(x), labels), tuple(net.parameters()))
    wrong = torch.cat([g.flatten() for g in mean]).square()
    assert float(wrong.sum()) < float(total.sum()) / 11 / 2


@pytest.mark.statistical
@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_sampled_ones_are_unbiased(metric):
    net, x = multilayer(), numbers(3, 3, seed=1)
    count = 4000
    draws = DiagonalDistance.of(
        net, x.repeat(count, 1), metric=metric, fisher="sampled", seed=1, batch_size=6000
    )
    expected = oracle.dense_curvature(net, x, metric)
    # One number, the trace: its spread is found from shares of the draws.
    traces = torch.tensor(
        [
            float(
                flat(
                    DiagonalDistance.of(
                        net, x.repeat(200, 1), metric=metric, fisher="sampled", seed=2 + i
                    ).curvature
                ).sum()
            )
            for i in range(20)
        ]
    )
    error = float(traces.std()) * (200 / count) ** 0.5
    assert abs(float(flat(draws.curvature).sum()) - float(expected.trace())) < 5 * error
    again = DiagonalDistance.of(
        net, x.repeat(count, 1), metric=metric, fisher="sampled", seed=1, batch_size=6000
    )
    assert torch.equal(flat(again.curvature), flat(draws.curvature))


@pytest.mark.parametrize("metric", METRICS)
def test_zero_at_the_same_weights(metric):
    net = multilayer()
    same = moved(net, by=0.0)
    found = DiagonalDistance.of(net, numbers(11, 3, seed=1), metric=metric).distance(same)
    found.backward()
    assert float(found.detach()) == 0
    assert not any(p.grad.any() for p in same.parameters())


def test_it_solves():
    net, x = multilayer(), numbers(11, 3, seed=1)
    diagonal = DiagonalDistance.of(net, x)
    gradients = {n: numbers(2, *p.shape, seed=4) for n, p in net.named_parameters()}
    found = diagonal.solve(gradients, 0.3)
    dense = oracle.dense_curvature(net, x, "euclidean").diagonal() + 0.3
    for row in range(2):
        given = flat({n: g[row] for n, g in gradients.items()})
        torch.testing.assert_close(flat({n: g[row] for n, g in found.items()}), given / dense)


def test_what_it_keeps():
    net = multilayer().float()
    diagonal = DiagonalDistance.of(net, numbers(11, 3, seed=1))
    assert diagonal.num_bytes == 8 * sum(p.numel() for p in net.parameters())
    assert diagonal.distance(moved(net)).dtype == torch.float32
    assert diagonal.name == "diagonal"


def test_questions_that_it_was_not_built_for_are_refused():
    net, x = multilayer(), numbers(11, 3, seed=1)
    other = moved(net)
    diagonal = DiagonalDistance.of(net, x, metric="kl", outputs=[0, 2])
    with pytest.raises(OptionError, match="'euclidean' asked of a quadratic built for 'kl'"):
        diagonal.distance(other, metric="euclidean")
    with pytest.raises(OptionError, match=r"\[0, 1\] asked"):
        diagonal.distance(other, outputs=[0, 1])
    with pytest.raises(ShapeError, match="does not select"):
        diagonal.distance(other, outputs=[9])
    same = [diagonal.distance(other, metric=m, outputs=[2, 0]) for m in ("kl", "fisher")]
    assert float(same[0].detach()) == float(same[1].detach()) > 0


def test_other_refusals():
    net, x = multilayer(), numbers(11, 3, seed=1)
    with pytest.raises(DataError, match="targets"):
        DiagonalDistance.of(net, x, metric="kl", fisher="empirical")
    with pytest.raises(DataError, match="not among"):
        DiagonalDistance.of(
            net, (x, torch.arange(11) % 3), metric="kl", fisher="empirical", outputs=[0, 1]
        )
    diagonal = DiagonalDistance.of(net, x)
    gradients = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(OptionError, match="damping"):
            diagonal.solve(gradients, damping)
    with pytest.raises(ShapeError, match=r"0\.bias"):
        diagonal.solve({n: g for n, g in gradients.items() if n != "0.bias"}, 1.0)
    with pytest.raises(ShapeError, match="has shape"):
        diagonal.solve({**gradients, "0.bias": torch.zeros(3)}, 1.0)
    with pytest.raises(ShapeError, match="different axes"):
        diagonal.solve({**gradients, "0.bias": torch.zeros(2, 5)}, 1.0)
    norm = convolutional(normalised=True)
    other = moved(norm)
    other[1].running_var.mul_(2.0)
    with pytest.raises(WeightsError, match="running_var"):
        DiagonalDistance.of(norm, numbers(6, 2, 5, 4, seed=2)).distance(other)


def test_every_batch_draws_labels_of_its_own():
    net, x = multilayer(), numbers(1, 3, seed=1)
    once, twice = (
        DiagonalDistance.of(net, rows, metric="fisher", fisher="sampled", seed=0, batch_size=1)
        for rows in (x, x.repeat(40, 1))
    )
    # The same example: with the same labels in every batch the mean would be that of the first.
    assert not torch.allclose(flat(twice.curvature), flat(once.curvature), rtol=0.05)
