"""Products with the Jacobian against autograd row by row, finite differences and adjointness."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from laplace_scenarios import multilayer, numbers
from oracles.linear_gaussian import dense_jacobian
from pushforward.errors import NetworkError
from pushforward.networks.model import FunctionalModel
from pushforward.networks.tangent import Tangent


class Cubed(torch.autograd.Function):
    """Has a backward and no forward derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, _output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class BackwardOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return Cubed.apply(self.layer(x))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x, z):
        return torch.tanh(self.a(x)) * self.b(z)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 4, bias=False)

    def forward(self, x):
        return torch.tanh(self.encoder(x)) @ self.encoder.weight


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.head = kind(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


class WritesIntoBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        found = torch.zeros(len(x), 2, dtype=x.dtype)  # not x.new_zeros, which vmap vectorises
        hidden = torch.tanh(self.layer(x))
        found[:, 0] = hidden[:, 0]
        found[:, 1] = hidden[:, 1] * hidden[:, 2]
        return found


class BranchesOnValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        hidden = self.layer(x)
        return torch.tanh(hidden) if hidden.square().sum() < 1e6 else hidden


class Sequence(nn.Module):
    """Outputs (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, x):
        h = self.embedding(x)
        return self.head(h + self.attention(h, h, h, need_weights=False)[0])


def convolutional():
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, stride=2), nn.BatchNorm2d(3), nn.GELU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    with torch.no_grad():
        net[1].running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
        net[1].running_var.copy_(torch.tensor([0.5, 1.5, 2.0]))
    return net


X = numbers(5, 3, seed=1)
CASES = {
    "multilayer": (multilayer(3, 4, 2), X),
    "convolutional": (convolutional(), numbers(4, 1, 6, 6, seed=2)),
    "tuple": (TwoInputs(), (X, numbers(5, 2, seed=3))),
    "dict": (TwoInputs(), {"z": numbers(5, 2, seed=3), "x": X}),
    "tied": (Tied(), X),
    "sequence": (Sequence(), torch.tensor([[0, 1, 4], [2, 2, 3]])),
    "backward only": (BackwardOnly(), X),
    "LSTM": (Recurrent(nn.LSTM), numbers(18, 4, 2, seed=4)),  # more than one block of examples
    "GRU": (Recurrent(nn.GRU), numbers(3, 4, 2, seed=4)),
    "RNN": (Recurrent(nn.RNN), numbers(3, 4, 2, seed=4)),
    "buffer": (WritesIntoBuffer(), X),
    "branch": (BranchesOnValues(), X),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    net, inputs = CASES[request.param]
    generator = torch.Generator().manual_seed(0)
    net = net.double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 2)
    return FunctionalModel.of(net), inputs


def called(net, inputs):
    if isinstance(inputs, dict):
        return net(**inputs)
    return net(*inputs) if isinstance(inputs, tuple) else net(inputs)


def dense(model, inputs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = nn.ParameterList(p.clone() for p in model.parameters.values())

        def forward(self, given):
            return model(dict(zip(model.parameters, self.own, strict=True)), given)

    return dense_jacobian(Net(), inputs)


def test_products_are_those_of_the_dense_jacobian(case):
    model, inputs = case
    outputs, jacobian, _ = dense(model, inputs)
    directions = numbers(3, model.space.size, seed=4)
    cotangents = numbers(3, *outputs.shape, seed=5)
    moved = Tangent(model).jvp(inputs, directions)
    assert moved.shape == cotangents.shape
    expected = torch.einsum("bcp,kp->kbc", jacobian, directions).reshape(moved.shape)
    torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12)
    pulled = Tangent(model).vjp(inputs, cotangents)
    flat = cotangents.flatten(2)
    torch.testing.assert_close(
        pulled, torch.einsum("bcp,kbc->kp", jacobian, flat), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(Tangent(model).jacobian(inputs), jacobian, rtol=1e-12, atol=1e-12)


def test_the_two_products_are_adjoint(case):
    model, inputs = case
    directions = numbers(4, model.space.size, seed=6)
    moved = Tangent(model).jvp(inputs, directions)
    cotangents = numbers(*moved.shape, seed=7)
    pulled = Tangent(model).vjp(inputs, cotangents)
    left = (moved * cotangents).flatten(1).sum(1)
    right = (directions * pulled).sum(1)
    assert (left - right).abs().max() <= 1e-12 * (1 + left.abs().max())


def test_products_are_finite_differences(case):
    model, inputs = case
    direction, step = numbers(1, model.space.size, seed=8), 1e-5
    ahead, behind = (
        model(model.space.unravel(model.vector + sign * step * direction[0]), inputs)
        for sign in (1, -1)
    )
    slope = (ahead - behind) / (2 * step)
    torch.testing.assert_close(
        Tangent(model).jvp(inputs, direction)[0], slope, rtol=1e-7, atol=1e-8
    )


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_chunks_change_nothing(case, chunk):
    model, inputs = case
    directions = numbers(5, model.space.size, seed=9)
    whole, parts = Tangent(model), Tangent(model, chunk)
    moved = whole.jvp(inputs, directions)
    torch.testing.assert_close(parts.jvp(inputs, directions), moved, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        parts.vjp(inputs, moved), whole.vjp(inputs, moved), rtol=1e-13, atol=1e-13
    )
    for mine, theirs in zip(
        parts.product(inputs, directions, lambda f, v: f.square() * v),
        whole.product(inputs, directions, lambda f, v: f.square() * v),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_the_product_has_the_curvature_in_between(case):
    model, inputs = case
    outputs, jacobian, _ = dense(model, inputs)
    directions = numbers(3, model.space.size, seed=10)
    found, moved = Tangent(model).product(inputs, directions, lambda f, v: (1 + f.square()) * v)
    weights = (1 + outputs.square()).flatten(1)
    matrix = torch.einsum("bcp,bc,bcq->pq", jacobian, weights, jacobian)
    torch.testing.assert_close(found, directions @ matrix, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(moved, Tangent(model).jvp(inputs, directions))


def test_an_operation_without_forward_derivative_takes_the_other_way():
    net = BackwardOnly().double()
    with pytest.raises(NotImplementedError):
        torch.func.jvp(Cubed.apply, (X,), (X,))
    model = FunctionalModel.of(net)
    moved = Tangent(model).jvp(X, model.vector[None])
    _, jacobian, weights = dense(model, X)
    torch.testing.assert_close(moved[0], jacobian @ weights)


def test_nothing_is_left_behind():
    net = multilayer(3, 4, 2)
    model = FunctionalModel.of(net)
    moved = Tangent(model).jvp(X, model.vector[None])
    pulled = Tangent(model).vjp(X, moved)
    assert not moved.requires_grad
    assert not pulled.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_normalisation_layers_carry_no_tangent():
    net = convolutional().double().eval()
    model = FunctionalModel.of(net)
    inputs = numbers(4, 1, 6, 6, seed=2)
    assert model.space.size == sum(p.numel() for p in net.parameters()) - 6
    names = list(model.parameters)
    _, jacobian, weights = dense_jacobian(net, inputs, names)
    torch.testing.assert_close(Tangent(model).jacobian(inputs), jacobian)
    assert torch.equal(weights, model.vector)


def test_weights_in_front_of_a_normalisation_have_no_radial_derivative():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.GroupNorm(2, 4, eps=1e-12), nn.Tanh(), nn.Flatten(),
        nn.Linear(64, 2),
    ).double().eval()  # fmt: skip
    model, x = FunctionalModel.of(net), numbers(3, 1, 6, 6, seed=1)
    radial = model.vector.clone()
    radial[model.space.slices["4.weight"]] = 0
    radial[model.space.slices["4.bias"]] = 0
    assert Tangent(model).jvp(x, radial[None]).abs().max() < 1e-7
    assert Tangent(model).jvp(x, model.vector[None]).abs().max() > 0.1


def test_a_recurrent_network_in_single_precision_leaves_its_library():
    # In float32 on CPUs torch gives an LSTM to oneDNN, whose derivatives do not go with functions.
    net = Recurrent(nn.LSTM).eval()
    model, twin = FunctionalModel.of(net), FunctionalModel.of(Recurrent(nn.LSTM).double().eval())
    twin = FunctionalModel(twin.function, {k: p.double() for k, p in model.parameters.items()})
    x, u = numbers(5, 4, 2, seed=1), numbers(3, 5, 2, seed=2)
    v = numbers(3, model.space.size, seed=3)
    for found, expected in (
        (Tangent(model).jvp(x.float(), v.float()), Tangent(twin).jvp(x, v)),
        (Tangent(model).vjp(x.float(), u.float()), Tangent(twin).vjp(x, u)),
        (Tangent(model).jacobian(x.float()), Tangent(twin).jacobian(x)),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.backends.mkldnn.enabled


PRODUCTS = {
    "jvp": lambda t, x: t.jvp(x, t.model.vector[None]),
    "vjp": lambda t, x: t.vjp(x, torch.ones(1, *t.model(t.model.parameters, x).shape)),
    "product": lambda t, x: t.product(x, t.model.vector[None], lambda _f, u: u),
    "jacobian": lambda t, x: t.jacobian(x),
}


@pytest.fixture(params=PRODUCTS, ids=str)
def product(request):
    return PRODUCTS[request.param]


def test_training_mode_after_the_network_was_read_is_refused(product):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    tangent = Tangent(FunctionalModel.of(net))
    product(tangent, X.float())
    before = net[1].running_mean.clone()
    net.train()
    with pytest.raises(NetworkError, match="BatchNorm1d is in training mode"):
        tangent.jvp(X.float(), tangent.model.vector[None])
    with pytest.raises(NetworkError, match="BatchNorm1d is in training mode"):
        tangent.vjp(X.float(), torch.ones(1, 5, 2))
    with pytest.raises(NetworkError, match="BatchNorm1d is in training mode"):
        tangent.jacobian(X.float())
    assert torch.equal(net[1].running_mean, before)


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


def test_a_function_without_setup_context_is_named(product):
    model = FunctionalModel(lambda p, x: OldStyle.apply(x * p["a"]), {"a": torch.tensor([2.0])})
    with pytest.raises(NetworkError, match="its derivative cannot be taken") as caught:
        product(Tangent(model), torch.ones(3, 1))
    assert "setup_context" in caught.value.advice


@pytest.mark.parametrize("name", ["jvp", "jacobian"])
def test_chance_is_not_taken_example_by_example(name):
    # No module is in training mode here, so that only the derivative can notice.
    model = FunctionalModel(lambda p, x: functional.dropout(x * p["a"]), {"a": torch.tensor([2.0])})
    with pytest.raises(NetworkError, match="its derivative cannot be taken") as caught:
        PRODUCTS[name](Tangent(model), torch.ones(3, 1))
    assert "net.eval()" in caught.value.advice


@pytest.mark.parametrize("name", ["jvp", "jacobian"])
def test_inputs_that_the_network_cannot_take_are_named_as_such(name):
    net = nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(6, 1)).eval()
    with pytest.raises(NetworkError, match="it cannot take inputs") as caught:
        PRODUCTS[name](Tangent(FunctionalModel.of(net)), torch.tensor([[0, 1, 9]]))
    assert "token ids" in caught.value.advice


def test_want_of_memory_is_not_tried_again():
    calls = []

    def function(_parameters, x):
        calls.append(x)
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = FunctionalModel(function, {"a": torch.tensor([2.0])})
    with pytest.raises(torch.OutOfMemoryError):
        Tangent(model).jacobian(torch.ones(3, 1))
    assert len(calls) == 1
