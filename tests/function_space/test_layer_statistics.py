"""Moments of layers: against plain hooks and formulas, in parts, and what they refuse."""

import pytest
import torch
from torch import nn

from pushforward.errors import DataError, LawError, UnsupportedLayerError
from pushforward.function_space.layer_statistics import (
    LayerStatistics,
    collect_layer_statistics,
    same_arithmetic,
    weighted_leaves,
    with_leaf_outputs,
)
from pushforward.function_space.network import ReferenceNetwork
from scenarios import normal
from token_networks import MaskedTransformer, TinyTransformer, pairs, randomised


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)

    def forward(self, x):
        return self.norm(self.layer(torch.tanh(self.layer(x))))


def reference_of(net, shape=(3,), seed=0):
    return ReferenceNetwork.of(randomised(net, seed), shape)


def test_a_module_called_twice_has_two_statistics():
    reference = reference_of(Twice())
    x = normal(1, 50, 3)
    statistics = LayerStatistics.of(reference, x)
    weight, bias = reference.tensors["layer.weight"], reference.tensors["layer.bias"]
    first = x @ weight.T + bias
    second = first.tanh() @ weight.T + bias
    assert set(statistics.means) == {"layer#0", "layer#1", "norm#0"}
    for name, values in (("layer#0", first), ("layer#1", second)):
        torch.testing.assert_close(statistics.means[name], values.mean(0))
        torch.testing.assert_close(statistics.variances[name], values.var(0, correction=0))


def test_batches_add_up_to_the_whole():
    reference = reference_of(Twice())
    x = normal(2, 41, 3) + 100  # a mean far from zero, where sums of squares would cancel
    whole = LayerStatistics.of(reference, x)
    parts = collect_layer_statistics(reference, x.split([5, 1, 20, 15]))
    assert parts.num_examples == whole.num_examples == 41
    for name, mean in whole.means.items():
        torch.testing.assert_close(parts.means[name], mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(parts.variances[name], whole.variances[name])


def test_sums_are_in_double_precision():
    net = nn.Sequential(nn.Linear(2, 2))
    reference = ReferenceNetwork.of(net, (2,))
    statistics = LayerStatistics.of(reference, torch.randn(8, 2))
    assert statistics.means["0#0"].dtype == torch.float64


def test_leaves_of_a_transformer():
    assert weighted_leaves(TinyTransformer()) == (
        *(
            f"blocks.{i}.{part}"
            for i in range(2)
            for part in ("self_attn", "linear1", "linear2", "norm1", "norm2")
        ),
        "head",
    )
    assert weighted_leaves(nn.Linear(2, 2)) == ("",)


def test_every_layer_of_a_transformer_in_evaluation_is_seen():
    # Without gradient PyTorch would take fused layers that call no hooks.
    net = randomised(TinyTransformer(), 0)
    reference = ReferenceNetwork.of(net, (3,))
    statistics = LayerStatistics.of(reference, pairs())
    assert set(statistics.means) == {f"{path}#0" for path in weighted_leaves(net)}
    hidden = (net.embedding(pairs()) + net.position).detach()
    attended, _ = net.blocks[0].self_attn(hidden, hidden, hidden)
    torch.testing.assert_close(statistics.means["blocks.0.self_attn#0"], attended.detach().mean(0))
    assert statistics.means["blocks.1.norm2#0"].shape == (3, 8)


def test_a_mapping_with_a_mask():
    reference = reference_of(MaskedTransformer())
    inputs = {
        "input_ids": torch.tensor([[1, 2, 0], [3, 4, 5]]),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
    }
    statistics = LayerStatistics.of(reference, inputs)
    rows = reference.outputs(reference.tensors, inputs)
    torch.testing.assert_close(statistics.means["head#0"], rows.mean(0))


def test_outputs_can_be_replaced_and_hooks_go_away():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    x = torch.randn(3, 2)
    before = net(x)
    with with_leaf_outputs(net, ["0"], lambda _name, output: torch.ones_like(output)):
        assert bool((net(x) == 1).all())
    assert torch.equal(net(x), before)
    with pytest.raises(ZeroDivisionError), with_leaf_outputs(net, ["0"], lambda _n, _o: 1 // 0):
        net(x)
    assert torch.equal(net(x), before)


def test_fused_attention_is_back_afterwards():
    assert torch.backends.mha.get_fastpath_enabled()
    with same_arithmetic():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError), same_arithmetic():
        _ = 1 // 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_outputs_are_the_same_with_and_without_gradient():
    net = randomised(TinyTransformer(), 0).float()
    with same_arithmetic():
        with_gradient = net(pairs())
        with torch.no_grad():
            without = net(pairs())
    assert torch.equal(with_gradient.detach(), without)


def test_tensors_bring_everything_back():
    statistics = LayerStatistics.of(reference_of(Twice()), normal(3, 9, 3))
    back = LayerStatistics.from_tensors(statistics.to_tensors())
    assert back.num_examples == 9
    assert back.means.keys() == statistics.means.keys()
    for name in back.means:
        assert torch.equal(back.means[name], statistics.means[name])
        assert torch.equal(back.variances[name], statistics.variances[name])
    assert back.num_bytes == 3 * 2 * 3 * 8


def test_damaged_tensors_are_refused():
    tensors = LayerStatistics.of(reference_of(Twice()), normal(3, 9, 3)).to_tensors()
    name = "variance:layer#0"
    for damaged in (
        {**tensors, name: -1 - tensors[name]},
        {**tensors, name: tensors[name] * torch.nan},
        {**tensors, "mean:layer#0": tensors["mean:layer#0"][:1]},
        {key: value for key, value in tensors.items() if key != name},
        {key: value for key, value in tensors.items() if key != "num_examples"},
    ):
        with pytest.raises(LawError, match="layer statistics"):
            LayerStatistics.from_tensors(damaged)


def test_statistics_of_different_layers_do_not_add_up():
    reference = reference_of(Twice())
    x = normal(4, 5, 3)
    with pytest.raises(DataError, match="different layers"):
        LayerStatistics.of(reference, x) + LayerStatistics.of(reference, x, ["norm"])
    with pytest.raises(DataError, match="no examples"):
        collect_layer_statistics(reference, [])


def test_sequences_along_the_first_axis_are_refused():
    net = nn.TransformerEncoderLayer(4, 2, 8, batch_first=False).eval()
    reference = ReferenceNetwork.of(net, (3, 4))
    with pytest.raises(UnsupportedLayerError, match="batch_first"):
        LayerStatistics.of(reference, torch.zeros(2, 3, 4))


def test_rows_that_are_no_examples_are_refused():
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x.flatten(0, 1)).reshape(x.shape)

    reference = ReferenceNetwork.of(Merged(), (3, 2))
    with pytest.raises(UnsupportedLayerError, match="12 rows for 4 examples"):
        LayerStatistics.of(reference, torch.zeros(4, 3, 2))
