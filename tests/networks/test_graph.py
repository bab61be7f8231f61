"""Networks read as stages compute what they compute when called; damaged ones are refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from pushforward.errors import NetworkError, UnsupportedLayerError
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


def test_not_a_module():
    with pytest.raises(UnsupportedLayerError, match=r"got function, not a torch\.nn\.Module"):
        read_network(lambda x: x, (3,))


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
