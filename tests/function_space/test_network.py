import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from pushforward.errors import DataError, NetworkError, ShapeError, WeightsError
from pushforward.function_space.network import ReferenceNetwork, select_outputs, unwrapped
from scenarios import Elementwise, Residual, moved, small_mlp


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


# --- what a module computes beside its weights ----------------------------------------------------


class _Own(nn.Module):
    """A module of one's own, which tells what it was given and counts what it has seen."""

    def __init__(self, activation=torch.tanh, power=1, drop_rate=0.0):
        super().__init__()
        self.linear, self.activation = nn.Linear(4, 3), activation
        self.power, self.drop_rate, self.calls = power, drop_rate, 0

    def extra_repr(self):
        return f"power={self.power}, drop_rate={self.drop_rate}"

    def forward(self, x):
        self.calls += 1
        return self.activation(self.linear(x)) ** self.power


def _encoder(**options):
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, **options)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(8, 2))


def _heads(count):
    net = _encoder()
    net[0].self_attn.num_heads = count
    return net


def _with_weights_of(net, other):
    other.load_state_dict(net.state_dict())
    return other


def _chain(*layers):
    return nn.Sequential(nn.Linear(4, 3), *layers, nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("net", "other", "message"),
    [
        (small_mlp(), small_mlp(activation=nn.Tanh), r"'1' is Tanh\(.*reference ReLU\("),
        (_chain(nn.LeakyReLU(0.1)), _chain(nn.LeakyReLU(0.2)), "'1' .*slope=0.2.*slope=0.1"),
        (_chain(nn.BatchNorm1d(3)), _chain(nn.BatchNorm1d(3, eps=1.0)), r"'1' .*eps=1\.0"),
        (_chain(nn.ReLU()), _chain(nn.Identity()), "'1' is missing"),
        (nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(4, 3), nn.ReLU()), "'1' is ReLU"),
        (_encoder(), _encoder(activation="gelu"), "'0' .*'gelu'"),
        (_encoder(), _encoder(norm_first=True), "'0' .*norm_first=True"),
        (_encoder(), _heads(4), "'0.self_attn' .*num_heads=4"),
        (_Own(torch.tanh), _Own(torch.sin), "it is a _Own.*'sin'.*'tanh'"),
        (_Own(lambda x: x.relu()), _Own(lambda x: x.tanh()), "lambda of tanh.*lambda of relu"),
        (_Own(power=1), _Own(power=2), "power=2.*power=1"),
        (Elementwise(functional.relu), Elementwise(torch.tanh), "'tanh'.*'relu'"),
    ],
)
def test_the_same_weights_in_other_modules_are_refused(net, other, message):
    reference = ReferenceNetwork.of(nn.Sequential(nn.Linear(2, 4), net), (2,))
    wrapped = nn.Sequential(nn.Linear(2, 4), other)
    wrapped.load_state_dict(reference.module.state_dict())
    message = message.replace("'0", r"'1\.0").replace("'1'", r"'1\.1'")
    message = message.replace("it is a", "its module '1' is")
    with pytest.raises(WeightsError, match=message) as caught:
        reference.tensors_of(wrapped)
    assert caught.value.where == "other"
    # By name they are weights like any others.
    assert reference.unchanged(reference.tensors_of(wrapped.state_dict()))


def test_another_network_as_a_whole_is_refused():
    class Other(nn.Sequential):
        pass

    net = small_mlp()
    with pytest.raises(WeightsError, match=r"it is a Other\(.*, the reference a Sequential\("):
        ReferenceNetwork.of(net, (4,)).tensors_of(Other(*net))


class _Twice(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.linear, self.first = nn.Linear(4, 4), nn.ReLU()
        self.second = self.first if shared else nn.ReLU()

    def forward(self, x):
        return self.second(self.linear(self.first(self.linear(x))))


def _seen(count):
    net = _Own()
    net.calls = count
    return net


def _marked():
    net = small_mlp()
    net[0]._made_by = "some library"
    return net


@pytest.mark.parametrize(
    ("net", "other"),
    [
        (_chain(nn.Dropout(0.1)), _chain(nn.Dropout(0.5))),
        (_chain(nn.Dropout(0.1)), _chain(nn.Identity())),
        (_chain(nn.ReLU()), _chain(nn.ReLU(inplace=True))),
        (_chain(nn.PReLU(init=0.1)), _chain(nn.PReLU(init=0.3))),
        (_chain(nn.BatchNorm1d(3)), _chain(nn.BatchNorm1d(3, momentum=0.5))),
        (_chain(nn.BatchNorm1d(3)), _chain(nn.SyncBatchNorm(3))),
        (_encoder(), _encoder(dropout=0.4)),
        (nn.LSTM(4, 3, 2), nn.LSTM(4, 3, 2, dropout=0.3)),
        (_Twice(shared=True), _Twice(shared=False)),
        (_Own(functional.relu), _Own(torch.relu)),
        (_Own(drop_rate=0.1), _Own(drop_rate=0.2)),
        (_Own(), _seen(7)),
        (small_mlp(), _marked()),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
            nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        ),
    ],
)
def test_what_counts_in_training_alone_makes_no_other_network(net, other):
    reference = ReferenceNetwork.of(net, (4,))
    _with_weights_of(net, other).train()
    assert reference.unchanged(reference.tensors_of(other))
    assert reference.unchanged(reference.tensors_of(copy.deepcopy(reference.module)))


def _compiled(net):
    return torch.compile(net, backend="eager")  # nothing is compiled before it is called


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, _compiled, lambda net: nn.DataParallel(_compiled(net))]
)
def test_wrappers_are_looked_through(wrap):
    net, x = small_mlp(), torch.randn(5, 4, dtype=torch.float64)
    other = moved(net)
    reference = ReferenceNetwork.of(wrap(net), (4,))
    assert reference.architecture == ReferenceNetwork.of(net, (4,)).architecture
    assert torch.equal(reference.predict(x), net(x))
    kept = reference.tensors_of(wrap(other))
    assert all(kept[name] is parameter for name, parameter in other.named_parameters())
    assert unwrapped(other) is unwrapped(wrap(other)) is other


def test_networks_of_several_processes_are_looked_through(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = nn.parallel.DistributedDataParallel(small_mlp())
        reference = ReferenceNetwork.of(net, (4,))
        assert list(reference.tensors) == list(dict(net.module.named_parameters()))
        assert reference.unchanged(reference.tensors_of(net))
    finally:
        dist.destroy_process_group()


def test_it_can_be_pickled_after_use():
    net, x = Residual(4, 5, 2).double(), torch.randn(6, 4, dtype=torch.float64)
    reference = ReferenceNetwork.of(net, (4,)).seen_on(x)
    other = moved(net)
    assert reference.graph.stages
    assert not reference.unchanged(reference.tensors_of(other))
    again = pickle.loads(pickle.dumps(reference))
    assert (again.event_shape, again.output_shape) == ((4,), (2,))
    assert again.architecture == reference.architecture
    assert not again.module.training
    assert torch.equal(again.predict(x), reference.predict(x))
    given = reference.tensors_of(other)
    assert torch.equal(again.outputs(again.tensors_of(other), x), reference.outputs(given, x))
    # A copy has weights of its own.
    copied = copy.deepcopy(reference)
    with torch.no_grad():
        copied.tensors["readout.bias"].add_(1.0)
    assert torch.equal(again.predict(x), reference.predict(x))
    assert torch.allclose(copied.predict(x), reference.predict(x) + 1.0)


def test_complex_weights_are_refused_by_name():
    with pytest.raises(NetworkError, match="'weight' is complex"):
        ReferenceNetwork.of(nn.Linear(4, 2, dtype=torch.complex64), (4,))
    net = small_mlp()
    tensors = dict(net.named_parameters())
    tensors["2.weight"] = tensors["2.weight"] + 1j
    with pytest.raises(NetworkError, match=r"'2\.weight' is complex"):
        ReferenceNetwork.of(net, (4,)).tensors_of(tensors)


def test_complex_buffers_are_part_of_a_real_network():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("turn", torch.polar(torch.ones(2), torch.tensor([0.3, 2.0])))

        def forward(self, x):
            pairs = torch.view_as_complex(self.linear(x).unflatten(1, (2, 2)))
            return torch.view_as_real(pairs * self.turn).flatten(1)

    net, x = Turned(), torch.randn(5, 4)
    reference = ReferenceNetwork.of(net, (4,)).seen_on(x)
    assert torch.equal(reference.outputs(reference.tensors_of(net), x), net(x))


def test_networks_without_parameters_are_refused():
    for net in (nn.ReLU(), nn.BatchNorm1d(4, affine=False)):
        with pytest.raises(NetworkError, match=r"^net: it has no weights"):
            ReferenceNetwork.of(net, (4,))


def test_normalisation_alone_is_a_network():
    net, x = nn.LayerNorm(4), torch.randn(5, 4)
    other = moved(net)
    reference = ReferenceNetwork.of(net, (4,)).seen_on(x)
    assert torch.equal(reference.outputs(reference.tensors_of(other), x), other(x))


def test_weights_may_be_of_several_types():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2).double()

        def forward(self, x):
            return self.head(self.norm(x).double())

    net, x = Mixed(), torch.randn(5, 4)
    other = moved(net)
    reference = ReferenceNetwork.of(net, (4,)).seen_on(x)
    assert torch.equal(reference.outputs(reference.tensors_of(other), x), other(x))


# --- whether it is a function of each example -----------------------------------------------------


class _Odd(nn.Module):
    """Computes as it is told."""

    def __init__(self, compute):
        super().__init__()
        self.linear, self.recurrent, self.compute = nn.Linear(4, 3), nn.LSTM(4, 3), compute

    def forward(self, x):
        return self.compute(self, x)


def _recurrent(net, x):
    return net.recurrent(x.unsqueeze(1))[0][:, 0]  # examples are taken for steps


@pytest.mark.parametrize(
    ("compute", "kind", "message"),
    [
        (lambda net, x: net.linear(x + torch.randn_like(x)), DataError, "different outputs"),
        (lambda net, x: functional.dropout(net.linear(x), 0.5), DataError, "different outputs"),
        (lambda net, x: net.linear(x.mul_(0.5)), DataError, "different outputs"),
        (lambda net, x: net.linear(x - x.mean(0)), DataError, "depend on the other examples"),
        (_recurrent, DataError, "depend on the other examples"),
        (lambda net, x: net.linear(x).T, ShapeError, "3 rows of outputs for 7 examples"),
        (lambda net, x: net.linear(x)[:-1], ShapeError, "6 rows of outputs for 7 examples"),
        (lambda net, x: net.linear(x) / 0.0, NetworkError, "its outputs are not finite"),
        (lambda net, x: net.linear(x[:, :3]), NetworkError, r"cannot take .*float64 \(7, 4\)"),
    ],
)
def test_what_is_no_function_of_each_example_is_refused(compute, kind, message):
    torch.manual_seed(0)
    reference = ReferenceNetwork.of(_Odd(compute).double(), (4,))
    with pytest.raises(kind, match=message) as caught:
        reference.seen_on(torch.randn(7, 4, dtype=torch.float64))
    assert type(caught.value) is kind


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("compute", "kind"),
    [
        (lambda net, x: net.linear(x).argmax(1), "int64"),
        (lambda net, x: net.linear(x) > 0, "bool"),
        (lambda net, x: net.linear(x) * 1j, "complex64"),
    ],
)
def test_outputs_that_are_no_real_numbers_are_refused(compute, kind):
    with pytest.raises(NetworkError, match=f"its outputs are torch.{kind}"):
        ReferenceNetwork.of(_Odd(compute), (4,)).seen_on(torch.randn(7, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_does_not_count(dtype):
    net = small_mlp((40, 300, 200, 10), dtype=dtype)
    x = torch.randn(8, 40).to(dtype)
    assert ReferenceNetwork.of(net, (40,)).seen_on(x).output_shape == (10,)
    assert ReferenceNetwork.of(net, (40,)).seen_on(x[:1]).output_shape == (10,)


def test_several_inputs_are_looked_at_together():
    class Pair(nn.Module):
        def __init__(self, mixed):
            super().__init__()
            self.linear, self.mixed = nn.Linear(4, 2), mixed

        def forward(self, x, weight):
            return self.linear(x) * (weight.sum() if self.mixed else weight.unsqueeze(1))

    torch.manual_seed(1)
    inputs = {"x": torch.randn(6, 4), "weight": torch.rand(6)}
    for given in (inputs, tuple(inputs.values())):
        assert ReferenceNetwork.of(Pair(mixed=False), ()).seen_on(given).output_shape == (2,)
        with pytest.raises(DataError, match="depend on the other examples"):
            ReferenceNetwork.of(Pair(mixed=True), ()).seen_on(given)


def test_a_row_too_few_is_refused_in_every_batch():
    reference = ReferenceNetwork.of(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), (4,))
    assert reference.predict(torch.randn(5, 4)).shape == (5, 1)
    reference = ReferenceNetwork.of(nn.Sequential(nn.Linear(4, 2), nn.Flatten(0)), (4,))
    with pytest.raises(ShapeError, match="10 rows of outputs for 5 examples"):
        reference.predict(torch.randn(5, 4))


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
