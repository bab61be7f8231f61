import pytest
import torch
from torch import nn

from pushforward.errors import NetworkError, ShapeError, WeightsError
from pushforward.function_space.network import ReferenceNetwork, select_outputs
from scenarios import moved, small_mlp


def test_the_reference_is_a_copy_in_evaluation_mode():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    reference = ReferenceNetwork.of(net, (3,))
    before = reference.tensors["0.weight"].clone()
    with torch.no_grad():
        net[0].weight.add_(1.0)
    assert net.training
    assert not reference.module.training
    assert torch.equal(reference.tensors["0.weight"], before)
    assert not reference.unchanged(reference.tensors_of(net))
    assert reference.unchanged(reference.tensors)


def test_outputs_and_graph_are_those_of_the_other_weights():
    net = small_mlp()
    other = moved(net)
    reference = ReferenceNetwork.of(net, (4,))
    x = torch.randn(7, 4, dtype=torch.float64)
    tensors = reference.tensors_of(other)
    rows = reference.outputs(tensors, x)
    graph = reference.graph_of(tensors)
    assert torch.allclose(rows, other(x))
    state = x
    for stage in graph.stages:
        state = torch.relu(stage.affine.apply(state))
    assert torch.allclose(graph.output.apply(state), other(x))
    rows.sum().backward()
    assert other[0].weight.grad.abs().max() > 0


def test_outputs_are_not_of_mixed_precision():
    net = small_mlp(dtype=torch.float32)
    reference = ReferenceNetwork.of(net, (4,))
    x = torch.randn(7, 4)
    expected = net(x)
    assert torch.equal(reference.outputs(reference.tensors, x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(net(x).float(), expected)
        assert torch.equal(reference.outputs(reference.tensors, x), expected)


def test_normalisation_is_folded_for_each_set_of_weights():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    other = moved(net).eval()
    with torch.no_grad():
        other[1].running_mean += 0.7
        other[1].running_var *= 3.0
    reference = ReferenceNetwork.of(net, (3,))
    x = torch.randn(5, 3, dtype=torch.float64)
    graph = reference.graph_of(reference.tensors_of(other))
    hidden = torch.relu(graph.stages[0].affine.apply(x))
    assert torch.allclose(graph.output.apply(hidden), other(x))


def test_a_mapping_may_leave_out_buffers():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    reference = ReferenceNetwork.of(net, (3,))
    tensors = reference.tensors_of(dict(net.named_parameters()))
    assert torch.equal(tensors["1.running_var"], net[1].running_var)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("0.weight"), "no '0.weight'"),
        (lambda t: t.update(extra=torch.zeros(1)), "an unknown 'extra'"),
        (lambda t: t.update({"0.bias": torch.zeros(9)}), r"'0.bias' has shape \(9,\)"),
    ],
)
def test_other_architectures_are_refused_by_name(change, message):
    reference = ReferenceNetwork.of(small_mlp(), (4,))
    tensors = dict(reference.tensors)
    change(tensors)
    with pytest.raises(WeightsError, match=message):
        reference.tensors_of(tensors)


def test_weights_that_are_not_finite_are_refused():
    net = small_mlp()
    reference = ReferenceNetwork.of(net, (4,))
    with torch.no_grad():
        net[2].bias[0] = torch.nan
    with pytest.raises(NetworkError, match=r"'2\.bias' holds NaN"):
        reference.tensors_of(net)
    with pytest.raises(NetworkError, match=r"'2\.bias' holds NaN"):
        ReferenceNetwork.of(net, (4,))


@pytest.mark.wrong_types
def test_what_is_no_module_is_refused():
    with pytest.raises(NetworkError, match="got function"):
        ReferenceNetwork.of(lambda x: x, (4,))


def test_architectures_differ_by_modules_and_sizes():
    first = ReferenceNetwork.of(small_mlp(), (4,)).architecture
    assert first == ReferenceNetwork.of(small_mlp(seed=5), (4,)).architecture
    assert first != ReferenceNetwork.of(small_mlp(activation=nn.Tanh), (4,)).architecture
    assert first != ReferenceNetwork.of(small_mlp((4, 7, 5, 3)), (4,)).architecture


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (slice(1, 3), [1, 2]),
        (range(2), [0, 1]),
        ([3, 0], [3, 0]),
        (torch.tensor([True, False, False, True]), [0, 3]),
    ],
)
def test_outputs_are_selected_by_number_slice_or_mask(outputs, expected):
    assert select_outputs(4, outputs).tolist() == expected
    assert select_outputs(4, None) is None


@pytest.mark.parametrize("outputs", [[4], [-1], [], [1, 1], [0.5], slice(4, 9), [[0]]])
def test_outputs_out_of_range_are_refused(outputs):
    with pytest.raises(ShapeError, match="does not select outputs of a network that has 4"):
        select_outputs(4, outputs)
