"""Affine layers as maps of a form compute what the modules compute, or say what does not fit."""

import pytest
import torch
from torch import nn

from pushforward.errors import NetworkError, ShapeError, UnsupportedLayerError
from pushforward.networks.affine_layers import batch_norm, convolution, linear
from pushforward.networks.forms import Form
from pushforward.networks.linear_maps import Dense, Identity, Structured
from scenarios import fill, normal


def value(*shape):
    """The input itself."""
    size = torch.Size(shape).numel()
    return Form({0: Identity(size)}, torch.zeros(size, dtype=torch.float64), shape, "input")


def linear_of(path, form, module):
    return linear(path, form, module.weight, module.bias)


@pytest.mark.parametrize(
    ("rule", "module", "shape", "kind"),
    [
        (linear_of, nn.Linear(3, 2), (3,), Dense),
        (linear_of, nn.Linear(3, 2, bias=False), (4, 3), Structured),
        (convolution, nn.Conv1d(2, 4, 3, groups=2), (2, 5), Structured),
        (convolution, nn.Conv2d(1, 2, 3, padding=1, bias=False), (1, 4, 4), Structured),
        (batch_norm, nn.BatchNorm1d(3), (3,), Structured),
        (batch_norm, nn.BatchNorm2d(2, affine=False), (2, 3, 3), Structured),
    ],
)
def test_the_map_of_a_layer_computes_the_layer(rule, module, shape, kind):
    fill(module, seed=1)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.running_mean.copy_(normal(2, module.num_features))
        module.running_var.copy_(normal(3, module.num_features).exp())
    x = normal(4, 5, *shape)
    expected = module(x)
    form = rule("layer", value(*shape), module)
    assert (form.name, form.shape) == ("layer", tuple(expected.shape[1:]))
    assert isinstance(form.maps[0], kind)
    found = form.maps[0].apply(x.flatten(1)) + form.bias
    torch.testing.assert_close(found, expected.flatten(1), rtol=1e-12, atol=1e-12)


def test_batchnorm_without_statistics_is_refused():
    module = nn.BatchNorm1d(4, track_running_stats=False)
    with pytest.raises(NetworkError, match=r"module 'body\.1'.*no running statistics"):
        batch_norm("body.1", value(4), module)


def test_padding_with_anything_but_zeros_is_refused():
    module = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")
    with pytest.raises(UnsupportedLayerError, match=r"Conv1d.*circular"):
        convolution("0", value(1, 4), module)


@pytest.mark.parametrize(
    ("rule", "module", "shape"),
    [
        (linear_of, nn.Linear(3, 4), (4,)),
        (linear_of, nn.Linear(3, 4), ()),
        (convolution, nn.Conv2d(1, 2, 3), (9,)),
        (convolution, nn.Conv2d(3, 2, 3), (1, 4, 4)),
        (batch_norm, nn.BatchNorm1d(5), (4,)),
    ],
)
def test_sizes_that_do_not_fit_are_located(rule, module, shape):
    with pytest.raises(ShapeError) as caught:
        rule("body.2", value(*shape), module)
    assert caught.value.where == f"module 'body.2' ({type(module).__name__})"
    assert caught.value.advice
