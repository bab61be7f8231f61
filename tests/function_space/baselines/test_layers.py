import pytest
import torch
from torch import nn
from torch.nn import functional

import oracles.function_space_baselines as oracle
from baseline_networks import convolutional, filled, multilayer, numbers, sentences, words
from pushforward.function_space.baselines.layers import (
    find_layers,
    layer_gradients,
    other_squares,
    squares,
)
from pushforward.function_space.network import ReferenceNetwork


def reference_of(net, x):
    return ReferenceNetwork.of(net, tuple(x.shape[1:]))


def paths_of(net, x):
    return [layer.path for layer in find_layers(reference_of(net, x), x[:3])]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


class UsedOutside(nn.Module):
    def __init__(self):
        super().__init__()
        self.map, self.unused, self.end = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.end(functional.linear(torch.relu(self.map(x)), self.map.weight))


class OnTheSecondAxis(nn.Module):
    def __init__(self):
        super().__init__()
        self.each, self.end = nn.Linear(3, 3), nn.Linear(9, 2)

    def forward(self, x):  # (B, 3, 3)
        return self.end(self.each(x.transpose(0, 1)).transpose(0, 1).flatten(1))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3, 2)

    def forward(self, x):
        return self.map(input=x)


def test_layers_that_are_plain_products_are_found():
    assert paths_of(multilayer(), numbers(4, 3, seed=1)) == ["0", "2", "4"]
    images = numbers(4, 2, 5, 4, seed=1)
    assert paths_of(convolutional(normalised=True), images) == ["0", "4"]
    assert paths_of(words(), sentences(4)) == ["each", "head"]
    assert paths_of(filled(Named(), 0), numbers(4, 3, seed=1)) == ["map"]


def test_layers_that_are_not_are_left_out():
    x = numbers(4, 3, seed=1)
    assert paths_of(filled(Tied(), 0), x) == []
    assert paths_of(filled(UsedOutside(), 0), x) == ["end"]
    assert paths_of(filled(OnTheSecondAxis(), 0), numbers(4, 3, 3, seed=1)) == ["end"]
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(24, 2))
    assert paths_of(filled(grouped, 0), numbers(4, 2, 5, 4, seed=1)) == ["2"]
    wrapped = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Flatten())
    assert paths_of(filled(wrapped, 0), numbers(4, 2, 5, 4, seed=1)) == []


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("net", "x"),
    [
        (multilayer(), numbers(5, 3, seed=1)),
        (convolutional(), numbers(5, 2, 5, 4, seed=1)),
        (
            filled(
                nn.Sequential(
                    nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2), bias=False),
                    nn.Tanh(),
                    nn.Conv2d(3, 2, 3, padding="valid"),
                    nn.Flatten(),
                ),
                0,
            ),
            numbers(5, 2, 5, 4, seed=1),
        ),
        (words(), sentences(5)),
    ],
)
def test_products_and_plain_autograd_have_the_same_squares(net, x):
    reference = reference_of(net, x)
    layers = find_layers(reference, x[:3])
    assert layers
    rows, slopes = oracle.jacobians(net, x)
    directions = numbers(2, *rows.shape, seed=3)
    expected = torch.einsum("rbk,bkp->rbp", directions, slopes).square().sum((0, 1))
    names = list(dict(net.named_parameters()))
    shapes = [p.shape for p in net.parameters()]
    parts = expected.split([shape.numel() for shape in shapes])
    truth = {n: p.reshape(s) for n, p, s in zip(names, parts, shapes, strict=True)}
    found = {}
    for part in layer_gradients(reference, layers, x, lambda _rows: directions):
        for name, own in part.layer.tensors(squares(part.activations, part.gradients)).items():
            found[name] = found.get(name, 0) + own
    for name, own in found.items():
        torch.testing.assert_close(own, truth[name], rtol=1e-11, atol=1e-13)
    general = other_squares(reference, tuple(names), x, directions)
    for name, own in general.items():
        torch.testing.assert_close(own, truth[name], rtol=1e-11, atol=1e-13)


def test_no_hook_is_left_behind():
    net, x = multilayer(), numbers(5, 3, seed=1)
    reference = reference_of(net, x)
    find_layers(reference, x[:3])
    assert not any(module._forward_hooks for module in reference.module.modules())


def test_weight_and_bias_share_a_matrix():
    (layer,) = find_layers(
        reference_of(filled(nn.Sequential(nn.Linear(3, 2)), 0), numbers(3, 3, seed=1)),
        numbers(3, 3, seed=1),
    )
    tensors = {"0.weight": numbers(5, 2, 3, seed=1), "0.bias": numbers(5, 2, seed=2)}
    matrix = layer.matrix(tensors)
    assert matrix.shape == (5, 2, 4)
    for name, tensor in layer.tensors(matrix).items():
        torch.testing.assert_close(tensor, tensors[name])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_reason_to_leave_a_layer_out(kind):
    net, x = convolutional(normalised=True).to(kind), numbers(6, 2, 5, 4, seed=2).to(kind)
    assert paths_of(net, x) == ["0", "4"]
    assert paths_of(words().to(kind), sentences(7)) == ["each", "head"]


def test_squares_of_half_precision_gradients_stay_in_range():
    """1e-4 squared is 0 in float16, and 400 squared is infinite."""
    net, x = convolutional().half(), numbers(6, 2, 5, 4, seed=2).half()
    reference = reference_of(net, x)
    layers = find_layers(reference, x[:3])
    wide = reference_of(net.float(), x.float())
    for size in (1e-4, 400.0):
        rows = torch.full((1, 6, 3), size)
        found, expected = (
            {
                name: entries
                for part in layer_gradients(one, layers, inputs, lambda _, rows=rows: rows)
                for name, entries in part.layer.tensors(
                    squares(part.activations, part.gradients)
                ).items()
            }
            for one, inputs in ((reference, x), (wide, x.float()))
        )
        names = tuple(found)
        other = other_squares(reference, names, x, rows.half())
        for name in names:
            near = 0.02 * float(expected[name].max())
            assert torch.allclose(found[name], expected[name], rtol=0, atol=near), (size, name)
            assert torch.allclose(other[name], expected[name], rtol=0, atol=near), (size, name)
