"""Networks read as stages compute what they compute when called, or are refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from pushforward.errors import NetworkError, ShapeError, UnsupportedLayerError
from pushforward.networks.graph import read_network
from scenarios import Concatenated, Elementwise, Residual, conv_network, fill, he_network, normal


def evaluate(graph, x):
    """The chain of stages applied to a batch."""
    state = x.flatten(1)
    for stage in graph.stages:
        before = stage.affine.apply(state)
        assert [g.units.start for g in stage.groups[1:]] == [
            g.units.stop for g in stage.groups[:-1]
        ]
        state = torch.cat([g.activation(before[:, g.units]) for g in stage.groups], dim=1)
    return graph.output.apply(state)


def assert_same(net, shape, *, tolerance=1e-12):
    net = net.eval()
    graph = read_network(net, shape)
    x = normal(77, 5, *shape)
    expected = net(x.clone()).reshape(5, -1)
    found = evaluate(graph, x)
    assert graph.output_features == expected.shape[1]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return graph


def double(net, seed=0):
    return fill(net, seed, 2.0, 0.3)


class Functional(nn.Module):
    """A forward written with functions, constants, buffers and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.weight = nn.Parameter(torch.zeros(3, 6))
        self.gain = nn.Parameter(torch.zeros(6))
        self.register_buffer("shift", torch.linspace(-1, 1, 6, dtype=torch.float64))
        self.register_buffer("order", torch.tensor([3, 1, 0, 2]))

    def forward(self, x):
        x = (x[:, self.order] - 0.2) / 2.0
        h = functional.leaky_relu(self.first(x), negative_slope=0.1)
        h = 1 - (h * self.gain + self.shift) * 0.7
        unused = torch.tanh(h).sum()  # noqa: F841 - dead code
        h = functional.softplus(-h)
        h += 0.1
        return functional.linear(functional.dropout(h, 0.5, self.training), self.weight)


class Reused(nn.Module):
    """One activation module and one linear module, each used twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Linear(3, 4), nn.Linear(4, 4)
        self.relu = nn.ReLU()

    def forward(self, x):
        h = self.relu(self.embed(x))
        h = self.relu(self.mix(h))
        return self.mix(self.relu(self.mix(h)))


class DeepSkip(nn.Module):
    """The first activation is needed three stages later, the input at the very end."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x):
        first = torch.relu(self.a(x))
        second = torch.tanh(self.b(first))
        third = torch.sigmoid(self.c(second))
        return torch.cat([third - first, x], dim=1)


def each(*functions):
    """A parameter list of elementwise or reshaping functions with their example shapes."""
    return [pytest.param(Elementwise(f), shape, id=name) for name, f, shape in functions]


NETWORKS = [
    pytest.param(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (3,), id="mlp"),
    pytest.param(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (3,), id="no activation"),
    pytest.param(nn.Linear(3, 2), (3,), id="one linear layer"),
    pytest.param(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), (3,), id="ends in an activation"),
    pytest.param(nn.Sequential(nn.GELU(), nn.Linear(3, 2)), (3,), id="starts with an activation"),
    pytest.param(nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 1)), (3,), id="one output"),
    pytest.param(nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Hardtanh()), (3,), id="activations only"),
    pytest.param(nn.Identity(), (3,), id="identity"),
    pytest.param(Residual(3, 5, 2), (3,), id="residual"),
    pytest.param(Concatenated(3, 5, 2), (3,), id="concatenated"),
    pytest.param(DeepSkip(), (3,), id="deep skip"),
    pytest.param(Functional(), (4,), id="functional"),
    pytest.param(Reused(), (3,), id="reused modules"),
    pytest.param(
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2)), (2, 4), id="rows"
    ),
    pytest.param(
        nn.Sequential(
            nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.SiLU(), nn.AvgPool1d(2), nn.Flatten()
        ),
        (2, 8),
        id="conv1d",
    ),
    pytest.param(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, dilation=2, groups=2, padding="same"),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(1),
            nn.BatchNorm1d(16),
            nn.Dropout(0.3),
            nn.Linear(16, 3),
        ),
        (2, 5, 5),
        id="conv2d",
    ),
    pytest.param(
        nn.Sequential(nn.Conv3d(1, 2, 2), nn.ELU(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(2, 2)),
        (1, 3, 3, 3),
        id="conv3d",
    ),
    pytest.param(
        nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 3), nn.Flatten(2)),
        (16,),
        id="unflatten",
    ),
    pytest.param(
        nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2)), (3,), id="plain batchnorm"
    ),
    *each(
        ("view of x.size(0)", lambda x: x.relu().view(x.size(0), -1), (2, 3)),
        ("view of -1", lambda x: x.view(-1, 6).tanh(), (2, 3)),
        ("view of x.shape", lambda x: x.reshape(x.shape[0], 3, 2).relu(), (2, 3)),
        ("sizes in arithmetic", lambda x: x.view(x.size(0), x.size(1) * x.size(2)), (2, 3)),
        ("flatten", lambda x: torch.flatten(x.relu(), 1), (2, 3)),
        ("flatten by name", lambda x: x.flatten(start_dim=1), (2, 3)),
        ("unflatten", lambda x: x.unflatten(1, (2, 3)).relu(), (6,)),
        ("squeeze", lambda x: x.unsqueeze(1).relu().squeeze(1), (3,)),
        ("permute", lambda x: x.permute(0, 2, 1).relu().flatten(1), (2, 3)),
        ("transpose", lambda x: torch.transpose(x, 1, 2).reshape(x.size(0), -1), (2, 3)),
        ("contiguous", lambda x: x.transpose(1, 2).contiguous().view(x.shape[0], 6), (2, 3)),
        ("mean over space", lambda x: x.mean((2, 3)).relu(), (2, 3, 3)),
        ("sum to a scalar", lambda x: x.relu().sum(1), (3,)),
        ("torch.mean", lambda x: torch.mean(x.abs(), dim=1, keepdim=True), (3,)),
        ("slices", lambda x: x[:, 1:3].relu() + x[:, :2], (4,)),
        ("index", lambda x: x[:, 0] - 2 * x[:, -1], (3,)),
        ("ellipsis", lambda x: x[..., 1].relu(), (2, 3)),
        ("pad", lambda x: functional.pad(x, (1, 2)).tanh(), (3,)),
        ("pad with a value", lambda x: functional.pad(x.relu(), (1, 2), value=1.5).tanh(), (3,)),
        ("pooling function", lambda x: functional.avg_pool2d(x.relu(), 2).flatten(1), (1, 4, 4)),
        ("adaptive pooling", lambda x: functional.adaptive_avg_pool1d(x, 2).flatten(1), (2, 4)),
        ("negation", lambda x: -(x.relu()) - torch.neg(x), (3,)),
        ("constants on either side", lambda x: 2 * (3 - x) / 4 + 1 - 0.5 * x, (3,)),
        ("constant tensor", lambda x: x * torch.tensor([1.0, 2.0, 3.0]) + torch.ones(1, 3), (3,)),
        ("torch functions", lambda x: torch.sub(torch.mul(x, 3), torch.add(x, 1)), (3,)),
        ("methods", lambda x: x.mul(2).add(1).sub(x).div(4).neg(), (3,)),
        ("sum of a list", lambda x: sum([x, x.relu(), 2 * x]), (3,)),
        ("concatenate itself", lambda x: torch.cat((x, x.tanh(), x), -1).relu(), (3,)),
        ("concatenate channels", lambda x: torch.cat([x, x.relu()], 1).mean((2, 3)), (2, 3, 3)),
        ("square", lambda x: (x**2 + x.pow(3)).relu(), (3,)),
        ("in place", lambda x: x.add(1).relu_().mul_(2), (3,)),
        ("unused size", lambda x: x.reshape(torch.relu(x).size(0), -1), (2, 2)),
        ("two dimensions", lambda x: x.permute(0, 2, 1)[:, 0] + x.mean(1), (2, 2)),
    ),
]


@pytest.mark.parametrize(("net", "shape"), NETWORKS)
def test_stages_compute_the_network(net, shape):
    assert_same(double(copy.deepcopy(net)), shape)


def test_batchnorm_uses_its_statistics_and_convolutions_their_structure():
    net = conv_network(seed=3)
    graph = assert_same(net, (1, 6, 6))
    assert graph.depth == 2
    assert [stage.width for stage in graph.stages] == [3 * 36, 6 * 4]
    # A convolution, BatchNorm and pooling never become a matrix of all pixels.
    assert graph.stages[0].affine.linear.flops < 2 * 36 * 108


def test_carried_atoms_are_units_with_the_identity():
    net = double(DeepSkip())
    graph = assert_same(net, (3,))
    names = [[group.name for group in stage.groups] for stage in graph.stages]
    assert names == [["relu", ""], ["tanh", "", ""], ["sigmoid", "", ""]]
    widths = [stage.width for stage in graph.stages]
    assert widths == [4, 5, 4]
    for stage in graph.stages:
        for group in stage.groups:
            assert group.carried == (group.activation.name == "identity")


def test_names_are_module_paths():
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 2))
    graph = read_network(double(net), (3,))
    (group,) = graph.stages[0].groups
    assert (group.input_name, group.name, graph.output_name) == ("0.0", "0.1", "1")


def test_modules_used_twice_have_distinct_names():
    graph = read_network(double(Reused()), (3,))
    groups = [group for stage in graph.stages for group in stage.groups]
    names = [group.name for group in groups] + [group.input_name for group in groups]
    assert len(set(names)) == 6
    assert {"relu", "embed", "mix"} <= set(names)


def test_dead_code_costs_nothing():
    graph = read_network(double(Functional()), (4,))
    assert [group.name for stage in graph.stages for group in stage.groups] == [
        "leaky_relu",
        "softplus",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_precision_are_read_exactly(dtype):
    net = he_network(6, 2, inputs=3, outputs=2, bias=0.2).to(dtype)
    graph = read_network(net, (3,))
    assert graph.dtype == dtype
    x = normal(5, 4, 3)
    torch.testing.assert_close(evaluate(graph, x), copy.deepcopy(net).double()(x))


def test_mixed_precision_is_the_wider_one():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2).double())
    assert read_network(net, (3,)).dtype == torch.float64
    assert read_network(nn.ReLU(), (3,)).dtype == torch.get_default_dtype()


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (he_network(4, 2), True),
        (he_network(4, 2, bias=0.1), False),
        (he_network(4, 2, activation=nn.GELU), False),
        (he_network(4, 2, activation=lambda: nn.LeakyReLU(0.2)), True),
        (nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Hardtanh()).double(), False),
        (Elementwise(lambda x: torch.cat([x.relu() + x, x.abs()], 1)), True),
        (Elementwise(lambda x: x.relu() + 1), False),
        (nn.Linear(4, 2, bias=False), True),
    ],
)
def test_positive_homogeneity(net, expected):
    graph = read_network(net, (4,))
    assert graph.positively_homogeneous is expected
    x = normal(6, 3, 4)
    net = copy.deepcopy(net).double()
    assert torch.allclose(net(2.5 * x), 2.5 * net(x)) is expected


def test_gradients_reach_every_parameter():
    net = conv_network(seed=4)
    x = normal(7, 3, 1, 6, 6)
    evaluate(read_network(net, (1, 6, 6)), x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    net(x).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_reading_leaves_the_network_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.ReLU()).eval()
    before = copy.deepcopy(net.state_dict())
    read_network(net, (3,))
    assert not net.training
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


# --- refusals ------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class ControlFlow(nn.Module):
    def forward(self, x):
        return x.relu() if x.sum() > 0 else x


class InPlaceResidual(nn.Module):
    """The classical mistake: relu_ changes `h`, which is then added as it no longer was."""

    def __init__(self):
        super().__init__()
        self.linear, self.relu = nn.Linear(3, 3), nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.linear(x)
        return self.relu(h) + h


def overwrite(x):
    """A statement whose result nobody takes is not dead code."""
    x = 2 * x
    x.relu_()
    return x


class Nested(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2))

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm(4),
        nn.Softmax(1),
        nn.PReLU(),
        nn.RReLU(),
        nn.GLU(),
        nn.MaxPool1d(2, return_indices=True),
        nn.LPPool1d(2, 2),
        nn.GroupNorm(2, 4),
        nn.Bilinear(4, 4, 4),
        nn.Upsample(scale_factor=2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_unknown_layers_are_named_with_their_path(layer):
    kind = type(layer).__name__
    with pytest.raises(UnsupportedLayerError, match=kind) as caught:
        read_network(Nested(layer).eval(), (4,))
    assert caught.value.where == "module 'body.1'"
    assert "register_activation" in caught.value.advice


@pytest.mark.parametrize(
    ("function", "shape", "label"),
    [
        (lambda x: torch.softmax(x, 1), (3,), "softmax"),
        (lambda x: x.max(1)[0], (3,), "max"),
        (lambda x: x * x.relu(), (3,), "mul"),
        (lambda x: 1 / x, (3,), "truediv"),
        (lambda x: 2**x, (3,), "pow"),
        (lambda x: torch.add(x, x, alpha=2), (3,), "add"),
        (lambda x: x + x[:, :1], (3,), "broadcasts"),
        (lambda x: x @ x.T, (3,), "T"),
        (lambda x: x.T + x.T, (3,), "T"),
        (lambda x: x + x.mT, (3, 3), "mT"),
        (lambda x: x.sum(), (3,), "batch"),
        (lambda x: x.mean(0), (3,), "batch"),
        (lambda x: x[0], (3,), "batch"),
        (lambda x: x.permute(1, 0), (3,), "batch"),
        (lambda x: x.reshape(-1), (3,), "batch"),
        (lambda x: torch.cat([x, x], 0), (3,), "dimension 0"),
        (lambda x: torch.cat([x, torch.ones(2, 3)], 1), (3,), "constants"),
        (lambda x: (x, x), (3,), "tuple"),
        (lambda x: {"logits": x}, (3,), "dict"),
        (lambda _: torch.ones(3), (3,), "Tensor"),
    ],
)
def test_unknown_functions_are_refused(function, shape, label):
    with pytest.raises(UnsupportedLayerError, match=label):
        read_network(Elementwise(function), shape)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x.mean(0), (2, 3)),
        (lambda x: x.mean(0), (3, 3)),
        (lambda x: x[0], (2, 3)),
        (lambda x: x[:2], (3,)),
        (lambda x: x.permute(1, 0), (2,)),
        (lambda x: x.transpose(0, 1), (2, 2)),
        (lambda x: x.reshape(2, -1), (4,)),
        (lambda x: x.view(-1, 2), (2, 3)),
    ],
)
def test_mixing_examples_is_refused_whatever_the_sizes(function, shape):
    # A probe with one batch size would take a feature dimension of that size for the batch.
    with pytest.raises(UnsupportedLayerError, match="batch"):
        read_network(Elementwise(function), shape)


@pytest.mark.parametrize("kind", [TwoInputs, ControlFlow])
def test_forwards_that_cannot_be_read(kind):
    with pytest.raises(UnsupportedLayerError, match=f"network {kind.__name__}"):
        read_network(kind(), (3,))


def test_changing_a_tensor_that_is_used_again_is_refused():
    with pytest.raises(UnsupportedLayerError, match=r"'relu'.*in place"):
        read_network(double(InPlaceResidual()), (3,))
    for function in (overwrite, lambda x: x.relu_() + x, lambda x: torch.relu_(x) + x):
        with pytest.raises(UnsupportedLayerError, match="in place"):
            read_network(Elementwise(function), (3,))


def test_not_a_module():
    with pytest.raises(UnsupportedLayerError, match=r"got function, not a torch\.nn\.Module"):
        read_network(lambda x: x, (3,))


@pytest.mark.parametrize("layer", [nn.Dropout(0.2), nn.BatchNorm1d(4), nn.AlphaDropout(0.1)])
def test_training_mode_is_refused(layer):
    with pytest.raises(NetworkError, match="training mode") as caught:
        read_network(Nested(layer).train(), (4,))
    assert caught.value.where == "module 'body.1'"
    assert "net.eval()" in caught.value.advice


def test_dropout_of_nothing_may_train():
    read_network(Nested(nn.Dropout(0.0)).train(), (4,))


def test_functional_dropout_in_training_is_refused():
    with pytest.raises(NetworkError, match="dropout is active"):
        read_network(Functional().train(), (4,))


def test_batchnorm_without_statistics_is_refused():
    net = Nested(nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(NetworkError, match=r"module 'body\.1'.*no running statistics"):
        read_network(net, (4,))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(value):
    net = conv_network()
    with torch.no_grad():
        net[4].weight[0, 0, 0, 0] = value
    with pytest.raises(NetworkError, match=r"parameter '4\.weight': 1 of 24 entries"):
        read_network(net, (1, 6, 6))
    net = conv_network()
    net[1].running_mean[1] = value
    with pytest.raises(NetworkError, match=r"parameter '1\.running_mean'"):
        read_network(net, (1, 6, 6))


@pytest.mark.parametrize(
    ("net", "shape", "where"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 2)), (3,), "module '2' (Linear)"),
        (nn.Sequential(nn.Linear(3, 4)), (4,), "module '0' (Linear)"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), (9,), "module '0' (Conv2d)"),
        (nn.Sequential(nn.Conv2d(3, 2, 3)), (1, 4, 4), "module '0' (Conv2d)"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5)), (3,), "module '1' (BatchNorm1d)"),
        (Elementwise(lambda x: x.view(x.size(0), 5)), (3,), "view"),
        (Elementwise(lambda x: x[:, 7]), (3,), "getitem"),
        (Elementwise(lambda x: x + torch.ones(5)), (3,), "add"),
        (nn.Sequential(Elementwise(lambda x: x.sum(1)), nn.Linear(3, 1)), (3,), "Linear"),
    ],
)
def test_sizes_that_do_not_fit_are_located(net, shape, where):
    with pytest.raises(ShapeError) as caught:
        read_network(net.eval(), shape)
    assert where in caught.value.where
    assert caught.value.advice
