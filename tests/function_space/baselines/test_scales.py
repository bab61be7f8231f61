import pytest
import torch
from torch import nn

import oracles.function_space_baselines as oracle
from baseline_networks import convolutional, filled, numbers, sentences, words
from pushforward.function_space.baselines.scales import find_scales, scale_squares
from pushforward.function_space.network import ReferenceNetwork


def images():
    return numbers(5, 2, 5, 4, seed=2)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm((2, 3), bias=False)
        self.end = nn.Linear(6, 2)

    def forward(self, x):  # (B, 2, 3)
        return self.end(torch.tanh(self.norm(x) * self.norm(x.flip(1))).flatten(1))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.end = nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.end(torch.tanh(self.norm(x)) * self.norm.weight)


@pytest.mark.parametrize(
    ("net", "x", "paths"),
    [
        (convolutional(normalised=True), images(), ["1"]),
        (words(), sentences(5), ["norm"]),
        (filled(Twice(), 0), numbers(5, 2, 3, seed=1), ["norm"]),
        (
            filled(nn.Sequential(nn.GroupNorm(1, 2), nn.Tanh(), nn.Flatten(), nn.Linear(40, 2)), 0),
            images(),
            ["0"],
        ),
        (filled(Shared(), 0), numbers(5, 3, seed=1), []),
    ],
)
def test_squares_are_those_of_dense_jacobians(net, x, paths):
    reference = ReferenceNetwork.of(net, tuple(x.shape[1:]))
    layers = find_scales(reference, x[:3])
    assert [layer.path for layer in layers] == paths
    rows, slopes = oracle.jacobians(net, x)
    directions = numbers(2, *rows.shape, seed=3)
    expected = torch.einsum("rbk,bkp->rbp", directions, slopes).square().sum((0, 1))
    parts = expected.split([p.numel() for p in net.parameters()])
    found = scale_squares(reference, layers, x, directions)
    named = zip(net.named_parameters(), parts, strict=True)
    truth = {name: part.reshape(p.shape) for (name, p), part in named}
    names = [name for layer in layers for name in (layer.weight, layer.bias) if name]
    assert sorted(found) == sorted(names)
    for name, own in found.items():
        torch.testing.assert_close(own, truth[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_reason_to_leave_a_layer_out(kind):
    net, x = convolutional(normalised=True).to(kind), images().to(kind)
    reference = ReferenceNetwork.of(net, tuple(x.shape[1:]))
    assert [layer.path for layer in find_scales(reference, x[:3])] == ["1"]
