"""Pruning and quantisation: which entries change, to what, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from pushforward.errors import OptionError, WeightsError
from pushforward.function_space.compression import (
    prune_tensor,
    pruned,
    quantise_tensor,
    quantised,
)


def normals(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)
    ).double()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.29, 0.5, 1.0])
def test_the_smallest_share_is_gone_and_the_rest_untouched(share):
    tensor = normals(10, 10)
    result = prune_tensor(tensor, share)
    gone = result == 0
    assert int(gone.sum()) == round(share * 100)
    assert torch.equal(result[~gone], tensor[~gone])
    if 0 < share < 1:
        assert tensor[gone].abs().max() < tensor[~gone].abs().min()


def test_equal_entries_are_not_all_pruned():
    result = prune_tensor(torch.ones(4, 4), 0.25)
    assert int((result == 0).sum()) == 4


def test_pruning_is_by_tensor_and_leaves_vectors_and_buffers():
    net = network()
    weights = pruned(net, 0.5)
    assert set(weights) == {*dict(net.named_parameters()), *dict(net.named_buffers())}
    assert float((weights["0.weight"] == 0).double().mean()) == pytest.approx(0.5, abs=0.02)
    assert float((weights["4.weight"] == 0).double().mean()) == 0.5
    for name in ("0.bias", "1.weight", "1.running_mean", "4.bias", "1.num_batches_tracked"):
        assert torch.equal(weights[name], net.state_dict()[name])
    assert not any(tensor.requires_grad for tensor in weights.values())
    assert not bool((net[4].weight == 0).any())  # the network itself is as it was


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_quantised_entries_are_the_nearest_points_of_the_grid(bits):
    tensor = normals(6, 7)
    result = quantise_tensor(tensor, bits)
    most = 2 ** (bits - 1) - 1
    step = float(tensor.abs().max()) / most
    grid = step * torch.arange(-most, most + 1, dtype=torch.float64)
    nearest = grid[(tensor.unsqueeze(-1) - grid).abs().argmin(-1)]
    torch.testing.assert_close(result, nearest)
    assert len(result.unique()) <= 2**bits - 1
    assert result.abs().max() == pytest.approx(float(tensor.abs().max()))


def test_vectors_zeros_and_buffers_are_not_quantised():
    net = network()
    with torch.no_grad():
        net[4].weight.zero_()
    weights = quantised(net, 4)
    for name in ("0.bias", "1.weight", "1.running_var", "4.weight", "4.bias"):
        assert torch.equal(weights[name], net.state_dict()[name])
    assert not torch.equal(weights["0.weight"], net[0].weight)


def test_buffers_with_several_axes_are_no_weights():
    net = network()
    net.register_buffer("mask", normals(3, 3))
    assert torch.equal(pruned(net, 0.5)["mask"], net.mask)
    assert torch.equal(quantised(net, 3)["mask"], net.mask)


def test_tensors_by_name_do_as_well():
    net = network()
    tensors = dict(net.named_parameters())
    for name, tensor in pruned(tensors, 0.3).items():
        assert torch.equal(tensor, pruned(net, 0.3)[name])
    whole = {"steps": torch.tensor([[3, 1]]), "none": torch.zeros(0, 3)}
    assert torch.equal(quantised(whole, 4)["steps"], whole["steps"])
    assert quantised(whole, 4)["none"].shape == (0, 3)


@pytest.mark.wrong_types
def test_numbers_of_numpy_are_as_good():
    net = network()
    for one, two in (
        (quantised(net, np.int64(4)), quantised(net, 4)),
        (pruned(net, np.float32(0.5)), pruned(net, 0.5)),
    ):
        assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(OptionError, match="from 0 to 1"):
        pruned(network(), share)


@pytest.mark.parametrize("bits", [1, 17, 0])
def test_a_number_of_bits_that_is_none_is_refused(bits):
    with pytest.raises(OptionError, match="from 2 to 16"):
        quantised(network(), bits)


@pytest.mark.parametrize("bits", [2, 8, 12, 16])
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_grid_does_not_depend_on_the_type_of_the_tensor(dtype, scale, bits):
    tensor = (scale * normals(20, 30).clamp(-2, 2)).to(dtype)
    expected = quantise_tensor(tensor.double(), bits)
    assert torch.equal(quantise_tensor(tensor, bits), expected.to(dtype))
    # Half a step from the entry, and as far again at most when that is rounded to the type.
    step = tensor.double().abs().max() / (2 ** (bits - 1) - 1)
    error = (quantise_tensor(tensor, bits).double() - tensor.double()).abs()
    assert error.max() <= 1.0001 * step


def test_entries_at_the_end_of_the_type_stay_numbers():
    smallest = torch.tensor([[5e-324, -5e-324, 0.0]], dtype=torch.float64)
    assert torch.equal(quantise_tensor(smallest, 8), smallest)
    largest = torch.tensor([[1.7e308, -1.7e308, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(quantise_tensor(largest, 8), largest)


@pytest.mark.parametrize("weights", [None, {"a": "b"}, [torch.ones(2, 2)]])
@pytest.mark.parametrize("change", [lambda w: pruned(w, 0.3), lambda w: quantised(w, 4)])
def test_what_are_no_weights_is_refused(change, weights):
    with pytest.raises(WeightsError, match="Give a network, or its tensors by name") as caught:
        change(weights)
    assert caught.value.where == "weights"


def test_wrappers_are_looked_through():
    net = network()
    for wrapped in (nn.DataParallel(net), torch.compile(net, backend="eager")):
        weights = pruned(wrapped, 0.3)
        assert list(weights) == list(pruned(net, 0.3))
