"""`propagate` against the dense oracle, against exact results, and against Monte Carlo."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import pushforward as pf
from oracles.dense_cumulants import expand_core, propagate_dense
from oracles.dense_towers import assert_tower
from oracles.wick import ACTIVATIONS, leaky_relu
from pushforward.cumulants import propagation
from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.monte_carlo import monte_carlo
from pushforward.cumulants.output import ErrorBar, Moments, OutputLaw
from pushforward.cumulants.propagation import depth_over_width, propagate
from pushforward.errors import OptionError, ResourceError, ShapeError, UnsupportedLayerError
from pushforward.networks.graph import read_network
from scenarios import (
    Concatenated,
    Elementwise,
    Residual,
    conv_network,
    correlated_law,
    fill,
    he_network,
    normal,
    standard_law,
    trained_like_network,
)

ORDERS = {"2": (2, False), "2+": (2, True), "3": (3, None)}
every_order = pytest.mark.parametrize("order", ORDERS)
metrics = pytest.mark.parametrize("metric", ["exact", "average"])

MODULES = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.3),
    "abs": lambda: Elementwise(torch.abs),
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "hardtanh": nn.Hardtanh,
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
}
FUNCTIONS = {**ACTIVATIONS, "leaky": leaky_relu(0.3)}


def run(net, law, order, **options):
    degree, augmented = ORDERS.get(order, (order, None))
    return propagate(net, law, degree, augmented=augmented, **options)


def published(net, law, order, **options):
    """Exactly the published expansion, with the laws of all layers."""
    return run(
        net,
        law,
        order,
        exact_above=None,
        angular=False,
        standard_error=False,
        layers=True,
        **options,
    )


def mlp(seed, sizes, names, weight=1.2):
    layers = [fill(nn.Linear(sizes[0], sizes[1]), seed, weight)]
    for index, name in enumerate(names):
        layers += [
            MODULES[name](),
            fill(nn.Linear(sizes[index + 1], sizes[index + 2]), seed + index + 1, weight),
        ]
    return nn.Sequential(*layers).double().eval()


def oracle(weights, biases, functions, law, order, metric="exact"):
    degree, augmented = ORDERS[order]
    outputs = propagate_dense(
        [w.detach().numpy() for w in weights],
        [b.detach().numpy() for b in biases],
        functions,
        law.mean.numpy(),
        law.dense_covariance().numpy(),
        order=degree,
        augmented=bool(augmented),
        metric=metric,
    )
    # After a negative variance nothing is reproducible; these networks are mild enough.
    assert all(cumulants[2].diagonal().min() > 0.01 for cumulants in outputs)
    return outputs


def assert_law(law, cumulants):
    """Public moments and the tower behind them."""
    assert_tower(law._tower, cumulants)
    torch.testing.assert_close(law.mean, torch.from_numpy(cumulants[1]), rtol=0, atol=1e-12)
    covariance = torch.from_numpy(cumulants[2])
    torch.testing.assert_close(law.covariance, covariance, rtol=0, atol=1e-12)
    torch.testing.assert_close(law.variance, covariance.diagonal(), rtol=0, atol=1e-12)
    units = torch.arange(len(law.mean))
    for name, degree in (("third", 3), ("fourth", 4)):
        if degree in cumulants and getattr(law, name) is not None:
            expected = torch.from_numpy(cumulants[degree])[tuple([units] * degree)]
            torch.testing.assert_close(getattr(law, name), expected, rtol=0, atol=1e-12)


# --- the oracle ----------------------------------------------------------------------------------

NETWORKS = [
    (20, (4, 6, 5, 3), ("relu", "tanh")),
    (20, (5, 5, 7, 6, 4), ("gelu", "relu", "softplus")),
    (20, (3, 8, 8, 2), ("leaky", "leaky")),
    (20, (6, 5, 5, 5), ("hardtanh", "silu")),
    (20, (4, 7, 6, 1), ("elu", "sigmoid")),
    (60, (5, 6, 6, 3), ("abs", "gelu")),
]


@every_order
@metrics
@pytest.mark.parametrize(("seed", "sizes", "names"), NETWORKS)
def test_the_published_expansion_is_that_of_the_oracle(order, metric, seed, sizes, names):
    net, law = mlp(seed, sizes, names), correlated_law(sizes[0], seed=1)
    functions = [FUNCTIONS[name] for name in names]
    linear = list(net[::2])
    weights, biases = [x.weight for x in linear], [x.bias for x in linear]
    expected = oracle(weights, biases, functions, law, order, metric)
    found = published(net, law, order, metric=metric)
    assert_law(found, expected[-1])
    for index, cumulants in enumerate(expected[:-1]):
        assert_law(found.layers[str(2 * index)], cumulants)


@every_order
@pytest.mark.parametrize("kind", ["isotropic", "diagonal"])
def test_structured_covariances_are_the_dense_ones(order, kind):
    net = mlp(5, (4, 6, 5, 3), ("relu", "gelu"))
    covariance = torch.tensor(0.8) if kind == "isotropic" else normal(6, 4).abs() + 0.5
    law = GaussianLaw(normal(7, 4), covariance.double())
    dense = GaussianLaw(law.mean, law.dense_covariance())
    for one, other in ((published, published), (run, run)):
        first, second = one(net, law, order), other(net, dense, order)
        torch.testing.assert_close(first.mean, second.mean, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(first.covariance, second.covariance, rtol=1e-11, atol=1e-13)


@every_order
@metrics
def test_residual_connections_carry_units_with_the_identity(order, metric):
    net = fill(Residual(3, 4, 2, activation=nn.Softplus), 9, 1.0)
    law = correlated_law(3, seed=2)
    n, eye = 4, torch.eye(4).double()
    zero = torch.zeros(n).double()
    relu, tanh, same = (FUNCTIONS[name] for name in ("softplus", "tanh", "identity"))
    stack = torch.cat
    # State behind stage 2: act1 units, then carried act0; behind stage 3: act2, act0, act1.
    second = net.second.weight
    weights = [
        net.embed.weight,
        stack([net.first.weight, eye]),
        stack([stack([second, second], 1), torch.eye(2 * n).double()]),
        stack([0.5 * net.readout.weight, net.readout.weight, net.readout.weight], 1),
    ]
    biases = [
        net.embed.bias,
        stack([net.first.bias, zero]),
        stack([net.second.bias, zero, zero]),
        net.readout.bias,
    ]
    functions = [[relu] * n, [relu] * n + [same] * n, [tanh] * n + [same] * 2 * n]
    expected = oracle(weights, biases, functions, law, order, metric)
    found = published(net, law, order, metric=metric)
    assert_law(found, expected[-1])
    assert set(found.layers) == {"embed", "act0", "first", "act1", "second", "act2"}
    assert_law(
        found.layers["first"],
        {d: x[(slice(0, n),) * d] for d, x in expected[1].items()},
    )


@every_order
def test_concatenations_carry_the_input(order):
    net = fill(Concatenated(3, 4, 2), 9, 1.0)
    law = correlated_law(3, seed=3)
    relu, tanh, same = (FUNCTIONS[name] for name in ("relu", "tanh", "identity"))

    def zeros(*shape):
        return torch.zeros(*shape).double()

    eye = torch.eye(7).double()
    w = net.readout.weight
    weights = [
        torch.cat([net.first.weight, torch.eye(3).double()]),
        # Stage 2: tanh(second(first)), then carried in the order of creation: input, first.
        torch.cat([torch.cat([net.second.weight, zeros(3, 3)], 1), eye[4:], eye[:4]]),
        # The readout concatenates x, second, first.
        torch.cat([w[:, 3:6], w[:, :3], w[:, 6:]], 1),
    ]
    biases = [
        torch.cat([net.first.bias, zeros(3)]),
        torch.cat([net.second.bias, zeros(7)]),
        net.readout.bias,
    ]
    functions = [[relu] * 4 + [same] * 3, [tanh] * 3 + [same] * 7]
    expected = oracle(weights, biases, functions, law, order)
    assert_law(published(net, law, order), expected[-1])


@every_order
def test_the_sphere_is_that_of_the_oracle(order):
    d = 6
    net = he_network(d, 3, outputs=3, seed=4)
    law = GaussianLaw(torch.zeros(d).double(), 0.7)
    found = run(net, law, order, exact_above=None, standard_error=False, angular=True)
    if order == "2":
        mean, covariance = torch.zeros(d).double(), 0.7 * torch.eye(d).double()
        radius = propagation.Radius(d)
        tower = None
        for layer in net[::2]:
            if tower is not None:
                slope = torch.special.ndtr(mean / covariance.diagonal().sqrt())
                m1, m2 = _relu_moments(mean, covariance.diagonal())
                new = covariance * torch.outer(slope, slope)
                mean, covariance = m1, torch.diagonal_scatter(new, m2 - m1**2)
                if layer is net[2]:
                    a1 = radius.moment(1)
                    mean = mean / a1
                    covariance = covariance - (1 - a1**2) * torch.outer(mean, mean)
            tower = True
            mean, covariance = layer.weight @ mean, layer.weight @ covariance @ layer.weight.T
        torch.testing.assert_close(found.mean, a1 * mean)
        expected = covariance + (1 - a1**2) * torch.outer(mean, mean)
        torch.testing.assert_close(found.covariance, expected)
        return
    core = torch.tensor(0.49 * -6 / (d + 2), dtype=torch.float64)
    fourth = expand_core(core.numpy(), torch.eye(d).numpy(), 4)
    degree, augmented = ORDERS[order]
    expected = propagate_dense(
        [layer.weight.detach().numpy() for layer in net[::2]],
        [None] * 4,
        [FUNCTIONS["relu"]] * 3,
        torch.zeros(d).double().numpy(),
        (0.7 * torch.eye(d).double()).numpy(),
        order=degree,
        augmented=bool(augmented),
        input_cumulants={4: fourth},
    )[-1]
    assert_tower(found._tower, expected)


def _relu_moments(mean, variance):
    std = variance.sqrt()
    alpha = mean / std
    density = torch.exp(-alpha.square() / 2) / (2 * torch.pi) ** 0.5
    tail = torch.special.ndtr(alpha)
    first = mean * tail + std * density
    return first, (mean**2 + variance) * tail + mean * std * density


@pytest.mark.parametrize("order", [1, *ORDERS])
@pytest.mark.parametrize("own", [False, True], ids=["shared covariance", "own covariance"])
def test_a_batch_of_laws_is_its_members(order, own):
    net = mlp(10, (4, 6, 5, 3), ("relu", "gelu"))
    means, one = normal(11, 3, 4), correlated_law(4, seed=4).covariance
    covariance = torch.stack([one, 1.5 * one, torch.eye(4).double()]) if own else one
    batch = run(net, GaussianLaw(means, covariance), order, layers=True)
    assert batch.mean.shape == (3, 3)
    for index in range(3):
        law = GaussianLaw(means[index], covariance[index] if own else covariance)
        single = run(net, law, order, layers=True)
        for name in ("mean", "variance", "covariance", "third", "fourth", "standard_error"):
            mine, alone = getattr(batch, name), getattr(single, name)
            assert (mine is None) == (alone is None)
            if alone is not None:
                torch.testing.assert_close(mine[index], alone, rtol=1e-9, atol=1e-12)
        for name, hidden in single.layers.items():
            torch.testing.assert_close(batch.layers[name].mean[index], hidden.mean)
            torch.testing.assert_close(batch.layers[name].variance[index], hidden.variance)


@pytest.mark.parametrize("order", [1, *ORDERS])
def test_large_batches_are_propagated_in_portions(monkeypatch, order):
    net = mlp(10, (4, 6, 5, 3), ("relu", "gelu"))
    law = GaussianLaw(normal(11, 7, 4), correlated_law(4).covariance)
    whole = run(net, law, order)
    monkeypatch.setattr(propagation, "_BATCH_BYTES", 1)
    parts = run(net, law, order)
    for name in ("mean", "variance", "covariance", "third", "fourth", "standard_error"):
        if getattr(whole, name) is not None:
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    # Per portion the cost of the strong pairs is the same; nothing is counted twice.
    assert parts.flops == pytest.approx(whole.flops, rel=0.01)
    assert [c.name for c in parts.checks] == [c.name for c in whole.checks]


# --- gradients -----------------------------------------------------------------------------------


class Propagated(nn.Module):
    """The law of the outputs as a function of weights, mean and a root of the covariance."""

    def __init__(self, net, order, **options):
        super().__init__()
        self.net, self.order, self.options = net, order, options

    def forward(self, mean, root):
        covariance = root @ root.T + 0.3 * torch.eye(len(mean)).double()
        law = GaussianLaw(mean, covariance)
        found = run(self.net, law, self.order, standard_error=False, **self.options)
        parts = [found.mean, found.variance]
        if found.covariance is not None:
            parts.append(found.covariance.reshape(-1))
        if found.third is not None:
            parts += [found.third, found.fourth, found.tail_probability(0.3)]
        return torch.cat(parts)


@pytest.mark.parametrize("exact_above", [None, 0.25])
@pytest.mark.parametrize("order", [1, *ORDERS])
def test_gradients_in_weights_and_law(order, exact_above):
    net = mlp(12, (3, 4, 3, 2), ("relu", "tanh"))
    module = Propagated(net, order, exact_above=exact_above)
    names = [name for name, _ in module.named_parameters()]

    def function(mean, root, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, parameters, (mean, root))

    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    mean, root = normal(13, 3).requires_grad_(), (0.7 * normal(14, 3, 3)).requires_grad_()
    # One pair's coefficients come from quadrature to 1e-11, which finite differences amplify.
    assert torch.autograd.gradcheck(
        function, (mean, root, *values), rtol=1e-4, atol=1e-6, fast_mode=order != 1
    )


@every_order
def test_gradients_on_the_sphere(order):
    net = he_network(4, 2, outputs=2, seed=3)
    weights = [p.detach().clone().requires_grad_() for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    class Angular(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, scale):
            law = GaussianLaw(torch.zeros(4).double(), scale)
            found = run(self.net, law, order, standard_error=False, angular=True)
            return torch.cat([found.mean, found.covariance.reshape(-1)])

    def function(scale, *values):
        parameters = dict(zip([f"net.{name}" for name in names], values, strict=True))
        return torch.func.functional_call(Angular(), parameters, (scale,))

    assert torch.autograd.gradcheck(function, (scale, *weights), rtol=1e-4, atol=1e-6)


@every_order
def test_gradients_with_duplicated_units_are_finite(order):
    net = mlp(15, (3, 6, 2), ("relu",))
    with torch.no_grad():
        for target, sign in ((1, 1.0), (2, -1.0)):
            net[0].weight[target] = sign * net[0].weight[0]
            net[0].bias[target] = sign * net[0].bias[0]
    found = run(net, correlated_law(3), order, standard_error=False)
    (found.mean.sum() + found.variance.sum()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())


def test_convolutions_are_differentiable():
    net = conv_network()
    law = GaussianLaw(0.1 * normal(0, 36), 0.5, event_shape=(1, 6, 6))
    found = propagate(net, law, standard_error=False)
    found.mean.sum().backward()
    gradient = net[0].weight.grad.clone()
    step = 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            net[0].weight[1, 0, 2, 1] += sign * step
            values.append(propagate(net, law, standard_error=False).mean.sum())
            net[0].weight[1, 0, 2, 1] -= sign * step
    numeric = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(gradient[1, 0, 2, 1], numeric, rtol=1e-5, atol=1e-8)


# --- exact results and Monte Carlo ---------------------------------------------------------------


def z_scores(found, sampled):
    # Antithetic pairs integrate linear outputs exactly: what is left there is rounding.
    error = sampled.standard_error + 1e-12
    mean = (found.mean - sampled.mean) / error
    variance = (found.variance - sampled.variance) / (sampled.variance_standard_error + 1e-12)
    return mean.abs().max().item(), variance.abs().max().item()


ONE_LAYER = {
    "relu": (lambda: mlp(20, (5, 24, 4), ("relu",)), correlated_law(5, seed=5, spread=0.6)),
    "gelu": (lambda: mlp(21, (5, 24, 4), ("gelu",)), correlated_law(5, seed=6, spread=0.6)),
    "trained": (lambda: trained_like_network(16, 1), standard_law(16)),
    "hardtanh": (lambda: mlp(22, (3, 30, 4), ("hardtanh",)), correlated_law(3, seed=7)),
    "abs": (lambda: mlp(23, (2, 20, 3), ("abs",)), correlated_law(2, seed=8)),
    "unnormalised": (
        lambda: mlp(27, (3, 20, 3), ("gelu",)),
        GaussianLaw(100 + 50 * normal(28, 3), 2000.0),
    ),
    "saturated": (lambda: mlp(29, (3, 20, 3), ("tanh",), 400.0), correlated_law(3, seed=14)),
    "many": (lambda: mlp(24, (200, 16, 4), ("tanh",)), standard_law(200)),
    "conv": (
        lambda: nn.Sequential(*conv_network(seed=2)[:4], nn.Flatten(), nn.Linear(27, 3)).double(),
        GaussianLaw(0.3 * normal(25, 36), 0.8, event_shape=(1, 6, 6)),
    ),
    "residual": (
        lambda: fill(Elementwise(lambda x: torch.cat([x, x.relu(), (2 * x - 1).tanh()], 1)), 0),
        correlated_law(4, seed=9, spread=0.5),
    ),
}


@pytest.mark.statistical
@every_order
@pytest.mark.parametrize("name", ONE_LAYER)
def test_one_hidden_layer_is_exact(order, name):
    build, law = ONE_LAYER[name]
    net = build().eval()
    found = run(net, law, order)
    sampled = monte_carlo(net, law, 2**17, design="antithetic", seed=3)
    mean, variance = z_scores(found, sampled)
    # |z| < 4.5 for at most 12 outputs: a false alarm in 8e-5 of all seeds; the seed is fixed.
    assert mean < 4.5
    assert variance < 4.5
    spread = sampled.variance.sqrt()
    gap = (found.covariance - sampled.covariance) / torch.outer(spread, spread)
    # A correlation is known to 1 / sqrt(N) or better, up to the kurtosis of the outputs.
    assert gap.abs().max() < 4.5 * 2 / (2**17) ** 0.5


@pytest.mark.parametrize("order", [1, *ORDERS])
def test_one_hidden_layer_has_the_exact_mean_at_any_order(order):
    net, law = mlp(26, (4, 9, 3), ("relu",)), correlated_law(4, seed=10)
    hidden = net[0]
    mean = hidden(law.mean)
    variance = (hidden.weight @ law.covariance @ hidden.weight.T).diagonal()
    expected = net[2](_relu_moments(mean, variance)[0])
    found = run(net, law, order)
    torch.testing.assert_close(found.mean, expected, rtol=1e-13, atol=1e-13)
    assert found.standard_error.max() < 1e-10


@pytest.mark.parametrize("order", [1, *ORDERS])
@pytest.mark.parametrize("net", [nn.Linear(5, 3), nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))])
def test_affine_networks_are_exact(order, net):
    net, law = fill(net, 30), correlated_law(5, seed=11)
    found = run(net, law, order)
    matrix = net(torch.eye(5).double()) - net(torch.zeros(5).double())
    torch.testing.assert_close(found.mean, net(law.mean))
    exact = matrix.T @ law.covariance @ matrix
    torch.testing.assert_close(found.variance, exact.diagonal())
    if order != 1:
        torch.testing.assert_close(found.covariance, exact)
    assert not found.standard_error.any()
    assert found.status == "pass"


def test_quadratic_forms_have_exact_moments():
    # x^2 in one layer: mean, covariance and marginal cumulants of w . (A x)^2, by traces.
    net = nn.Sequential(nn.Linear(4, 5, bias=False), Elementwise(torch.square), nn.Linear(5, 1))
    net, law = fill(net, 31), correlated_law(4, seed=12)
    a, w, c = net[0].weight, net[2].weight[0], law.covariance
    q = a.T @ torch.diag(w) @ a
    m = law.mean
    found = run(net, law, "2+")
    mean = torch.trace(q @ c) + m @ q @ m + net[2].bias[0]
    variance = 2 * torch.trace(q @ c @ q @ c) + 4 * m @ q @ c @ q @ m
    torch.testing.assert_close(found.mean, mean[None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.variance, variance[None], rtol=1e-10, atol=1e-12)


def test_the_last_activation_is_propagated():
    net = nn.Sequential(fill(nn.Linear(4, 3), 32), nn.Sigmoid())
    law = correlated_law(4, seed=13, spread=0.7)
    found = propagate(net, law)
    sampled = monte_carlo(net, law, 2**15, design="frames")
    mean, variance = z_scores(found, sampled)
    assert mean < 4.5
    assert variance < 4.5


@pytest.mark.parametrize("order", [1, *ORDERS])
def test_dead_inputs_are_constants(order):
    # Features without variance, and a unit that sees nothing else.
    net = mlp(33, (5, 8, 8, 3), ("relu", "gelu"))
    variance = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0]).double()
    with torch.no_grad():
        net[0].weight[2] = 0.0
        net[0].weight[2, [1, 3]] = 1.0
    law = GaussianLaw(normal(34, 5), variance)
    found = run(net, law, order)
    assert found.checks[0].status == "pass"
    # Folding the constants into the bias gives the same network of three inputs.
    alive = variance > 0
    folded = mlp(33, (5, 8, 8, 3), ("relu", "gelu"))
    with torch.no_grad():
        folded[0] = nn.Linear(3, 8).double()
        folded[0].weight.copy_(net[0].weight[:, alive])
        folded[0].bias.copy_(net[0].bias + net[0].weight[:, ~alive] @ law.mean[~alive])
    other = run(folded, GaussianLaw(law.mean[alive], variance[alive]), order)
    torch.testing.assert_close(found.mean, other.mean, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.variance, other.variance, rtol=1e-7, atol=1e-9)
    assert bool(found.standard_error.isfinite().all())


def test_a_law_without_any_variance_is_a_forward_pass():
    net = mlp(35, (4, 6, 5, 2), ("relu", "tanh"))
    x = normal(36, 4)
    for order in ORDERS:
        found = run(net, GaussianLaw(x, torch.zeros(4, 4).double()), order)
        torch.testing.assert_close(found.mean, net(x), rtol=1e-8, atol=1e-9)
        assert found.variance.abs().max() < 1e-12
        assert bool(found.tail_probability(0.0).isfinite().all())


@pytest.mark.statistical
def test_a_deep_convolutional_network_agrees_within_its_error_bar():
    net = conv_network(4, seed=6)
    law = GaussianLaw(0.2 * normal(37, 36), 0.6, event_shape=(1, 6, 6))
    sampled = monte_carlo(net, law, 2**17, seed=1)
    for order in ORDERS:
        found = run(net, law, order)
        error = (found.standard_error.square() + sampled.standard_error.square()).sqrt()
        # The error bar is an estimate itself: four outputs within five of it.
        assert ((found.mean - sampled.mean) / error).abs().max() < 5
        assert (found.variance / sampled.variance - 1).abs().max() < 0.2


@pytest.mark.statistical
def test_accuracy_rises_with_the_order():
    errors = {order: 0.0 for order in (1, *ORDERS)}
    for seed in range(4):
        net, law = he_network(48, 2, bias=0.2, seed=seed), standard_law(48)
        sampled = monte_carlo(net, law, 2**18, seed=seed)
        for order in errors:
            found = run(net, law, order, standard_error=False)
            gap = (found.mean - sampled.mean).square() - sampled.standard_error.square()
            errors[order] += (gap / sampled.variance).mean().item() / 4
    # Measured 1.0e-3, 7e-5, 3.5e-5 and 3e-6.
    assert errors["3"] < 0.5 * errors["2+"]
    assert errors["2+"] < errors["2"] < 0.2 * errors[1]
    assert errors["3"] < 2e-5


@pytest.mark.statistical
def test_the_angular_gauge_improves_the_means():
    ratios = {order: [] for order in ORDERS}
    for seed in range(8):
        width = (32, 48)[seed % 2]
        net, law = he_network(width, 3, seed=10 + seed), standard_law(width)
        sampled = monte_carlo(net, law, 2**18, seed=seed)
        for order in ORDERS:
            found = [
                run(net, law, order, angular=flag, standard_error=False).mean
                for flag in (True, False)
            ]
            noise = sampled.standard_error.square().mean()
            size = [((x - sampled.mean).square().mean() - noise).item() for x in found]
            ratios[order].append(size[0] / size[1])
    median = {order: torch.tensor(values).median().item() for order, values in ratios.items()}
    # Published: 0.48-0.86 at order 2 and 0.22-0.87 at order 3; order 2 augmented gains 0-23 %.
    assert median["2"] < 0.9
    assert median["2+"] < 1.02
    assert median["3"] < 0.9


@pytest.mark.parametrize("order", ORDERS)
def test_the_gauge_is_used_where_it_is_exact_and_only_there(order):
    def gauge(net, law, **options):
        found = run(net, law, order, **options)
        return any(check.name == "angular-gauge" for check in found.checks)

    net, law = he_network(8, 2), standard_law(8)
    assert gauge(net, law)
    assert gauge(net, GaussianLaw(torch.zeros(8).double(), 3.0))
    assert not gauge(net, law, angular=False)
    assert not gauge(he_network(8, 1), law)
    assert gauge(he_network(8, 1), law, angular=True)
    for odd_net, odd_law in (
        (he_network(8, 2, bias=0.1), law),
        (he_network(8, 2, activation=nn.GELU), law),
        (net, correlated_law(8)),
        (net, GaussianLaw(torch.full((8,), 0.1).double(), 1.0)),
    ):
        assert not gauge(odd_net, odd_law)
        with pytest.raises(OptionError, match="angular=True"):
            run(odd_net, odd_law, order, angular=True)


def test_the_gauge_changes_one_hidden_layer_by_rounding_only():
    net, law = he_network(8, 1), standard_law(8)
    one = run(net, law, "2", angular=True)
    other = run(net, law, "2", angular=False)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(one.covariance, other.covariance, rtol=1e-12, atol=1e-14)


# --- error bars ----------------------------------------------------------------------------------

CALIBRATION = [
    (32, 2, nn.ReLU, 0.0),
    (24, 3, nn.ReLU, 0.0),
    (40, 3, nn.ReLU, 0.3),
    (32, 2, nn.GELU, 0.2),
    (24, 2, nn.Tanh, 0.2),
    (48, 2, nn.SiLU, 0.1),
]


@pytest.mark.statistical
def test_error_bars_are_calibrated():
    """Median over 36 random networks of estimated over true mean squared error.

    Measured 0.97, 0.96, 0.71 and 3.9 for orders 1, 2, 2 augmented and 3.
    """
    orders = (1, *ORDERS)
    ratios = {order: [] for order in orders}
    for index in range(36):
        width, depth, activation, bias = CALIBRATION[index % len(CALIBRATION)]
        net = he_network(width, depth, activation=activation, bias=bias, seed=100 + index)
        law = standard_law(width)
        sampled = monte_carlo(net, law, 2**16, seed=index, covariance=False)
        noise = sampled.standard_error.square().mean()
        for order in orders:
            found = run(net, law, order)
            true = (found.mean - sampled.mean).square().mean() - noise
            ratios[order].append((found.standard_error.square().mean() / true).item())
    median = {order: torch.tensor(values).median().item() for order, values in ratios.items()}
    print("\nestimated / true MSE:", {order: round(value, 3) for order, value in median.items()})
    for order in (1, "2", "2+"):
        assert 0.5 < median[order] < 2.0, (order, median[order])
    # Order 3 is compared with a less accurate order: a bound, not an estimate.
    assert median["3"] > 1.0


def test_the_mean_of_an_odd_network_is_known_exactly():
    net, law = he_network(16, 2, activation=nn.Tanh), standard_law(16)
    for order in ORDERS:
        found = run(net, law, order)
        assert found.mean.abs().max() < 1e-13
        assert found.standard_error.max() < 1e-13


def test_the_error_bar_is_a_difference_between_orders():
    net, law = he_network(24, 2, bias=0.2), standard_law(24)
    one, two = propagate(net, law, 1), propagate(net, law, 2, augmented=False)
    gap = (one.mean - two.mean).square()
    pooled = gap.sum() / two.variance.sum() * one.variance
    torch.testing.assert_close(one.standard_error.square(), (gap + pooled) / 2, rtol=0.5, atol=1e-9)
    assert propagate(net, law, standard_error=False).standard_error is None


def check_of(found, name):
    (check,) = [check for check in found.checks if check.name == name]
    return check


@pytest.mark.parametrize(
    ("second", "status"), [(-0.2, "pass"), (-0.4, "warn"), (0.25, "pass"), (3.0, "pass")]
)
def test_variances_of_dependent_units_are_flagged_at_order_one(second, status):
    # Two copies of a unit with weights 1 and w: variance 1 + w^2 taken as independent, (1 + w)^2
    # in truth. The ratio is 1.6, 3.2, 0.68 and 0.63; it is flagged outside 1/2 ... 2.
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        net[0].weight[1] = net[0].weight[0]
        net[0].bias[1] = net[0].bias[0]
        # The second output varies 1e10 times less, whatever its ratio, and does not decide.
        net[2].weight.copy_(torch.tensor([[1.0, second], [1e-5, -0.9e-5]]))
    found = propagate(net, standard_law(3), 1)
    assert check_of(found, "variances-agree").status == status
    assert check_of(propagate(net, standard_law(3), 2), "variances-agree").status == "pass"


@pytest.mark.parametrize(("size", "status"), [(0.19, "pass"), (0.21, "warn"), (1.01, "fail")])
def test_disagreeing_orders_are_flagged(size, status):
    spread = torch.tensor([[1.0, 4.0], [2.0, 2.0]]).double()
    bar = ErrorBar(size * spread.sqrt() * torch.tensor([[1.0], [0.1]]).double(), spread[0])
    check = propagation._check_agreement(bar, spread, "order 7", 2)
    assert check.status == status
    assert f"differ from order 7 by {size:.2g} standard deviations" in check.detail
    broken = ErrorBar(torch.full((1, 2), torch.nan), spread[0])
    assert propagation._check_agreement(broken, spread, "order 7", 2).status == "fail"


def test_indefinite_output_covariances_are_flagged(monkeypatch):
    def check(matrix):
        moments = Moments(torch.zeros(1, 3), matrix.diagonal()[None], matrix[None])
        monkeypatch.setattr(propagation._Pass, "moments", moments)
        return propagation._check_covariance(object.__new__(propagation._Pass))

    root = normal(41, 3, 2)
    assert check(root @ root.T).status == "pass"  # singular, as for redundant outputs
    assert check(root @ root.T - 1e-3 * torch.eye(3).double()).status == "warn"


def test_redundant_outputs_have_a_singular_covariance():
    net = mlp(42, (4, 6, 2, 5), ("relu", "relu"))
    assert check_of(propagate(net, standard_law(4)), "covariance-psd").status == "pass"


def test_the_error_bar_takes_a_cheaper_order_when_memory_is_short(monkeypatch):
    net, law = he_network(16, 2, bias=0.1), standard_law(16)

    def compared_with(**options):
        return check_of(propagate(net, law, **options), "orders-agree").detail

    assert "order 3" in compared_with()
    # Three float64 factors for each of the two layers behind, 16 x 16 numbers each.
    monkeypatch.setattr(propagation, "_THIRD_ORDER_BYTES", 3 * 8 * 2 * 16 * 16 + 1)
    assert "order 3" in compared_with()
    monkeypatch.setattr(propagation, "_THIRD_ORDER_BYTES", 3 * 8 * 2 * 16 * 16)
    assert "from order 2 by" in compared_with(augmented=True)
    assert "order 2 augmented" in compared_with(augmented=False)


@pytest.mark.parametrize("budget", [1e5, 1e6, 1e7])
def test_portions_of_a_batch_fit_the_memory(monkeypatch, budget):
    net, law = he_network(16, 2, bias=0.1), GaussianLaw(normal(40, 300, 16), 1.0)
    monkeypatch.setattr(propagation, "_BATCH_BYTES", budget)
    seen = []
    activate = propagation.activate

    def spy(tower, *arguments):
        seen.append(len(tower.mean))
        return activate(tower, *arguments)

    monkeypatch.setattr(propagation, "activate", spy)
    propagate(net, law, standard_error=False)
    assert sum(seen) == 600  # two layers
    covariance = 8 * 16**2
    # Ten matrices of a law are held at once; the budget is used to a tenth at least.
    assert max(seen) * 10 * covariance <= 1.1 * budget
    assert max(seen) >= min(300, 0.1 * budget / (10 * covariance))


def test_breakdown_is_flagged():
    # Width 8, depth 8: higher orders no longer improve on lower ones and say so.
    flagged = 0
    for seed in range(5):
        net, law = he_network(8, 8, seed=seed), standard_law(8)
        for order in ORDERS:
            found = run(net, law, order)
            checks = {check.name: check for check in found.checks}
            assert checks["depth-over-width"].status == "warn"
            assert "monte_carlo" in checks["depth-over-width"].advice
            assert found.status != "pass"
            assert "depth-over-width" in repr(found)
            flagged += found.status == "fail" or checks["orders-agree"].status != "pass"
    assert flagged >= 3


def test_augmentation_is_chosen_by_depth_over_width():
    assert propagate(he_network(32, 2), standard_law(32)).augmented
    assert not propagate(he_network(8, 2), standard_law(8)).augmented
    assert not propagate(he_network(32, 2), standard_law(32), 1).augmented
    assert not propagate(he_network(32, 2), standard_law(32), 3).augmented
    assert depth_over_width(read_network(he_network(8, 3), (8,))) == pytest.approx(3 / 8)
    assert depth_over_width(read_network(nn.Linear(2, 2), (2,))) == 0.0
    residual = read_network(fill(Residual(3, 10, 2), 0), (3,))
    assert depth_over_width(residual) == pytest.approx(0.3)  # carried units do not count


def test_strongly_correlated_units_are_counted_and_treated():
    net, law = trained_like_network(24, 3), standard_law(24)
    sampled = monte_carlo(net, law, 2**16)
    exact, published_rule = run(net, law, "2"), run(net, law, "2", exact_above=None)
    names = {check.name for check in exact.checks}
    assert "correlated-units" in names
    assert "correlated-units" not in {check.name for check in published_rule.checks}

    def error(found):
        return ((found.variance / sampled.variance - 1) ** 2).mean()

    assert error(exact) < error(published_rule)


# --- options, shapes, results --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "^order: 4 is out of range"),
        ({"order": 0}, "^order: 0 is out of range"),
        ({"order": "2"}, "^order: '2' is no whole number"),
        ({"metric": "none"}, "^metric: there is no metric 'none'"),
        ({"variance": "full", "order": 1}, "^variance: there is no variance 'full'"),
        ({"exact_above": 1.5}, r"^exact_above: 1\.5 is out of range"),
        ({"exact_above": -0.1}, r"^exact_above: -0\.1 is out of range"),
        ({"augmented": True, "order": 3}, "^propagate: augmented=True with order=3"),
        ({"augmented": True, "order": 1}, "^propagate: augmented=True with order=1"),
        ({"angular": True}, "^propagate: angular=True"),
    ],
)
def test_unusable_options_are_refused(options, message):
    net, law = he_network(6, 2, bias=0.1), standard_law(6)
    with pytest.raises(OptionError, match=message):
        propagate(net, law, **options)


def test_laws_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="expects 6 features but gets 5"):
        propagate(he_network(6, 2), standard_law(5))
    graph = read_network(he_network(6, 2), (6,))
    with pytest.raises(ShapeError, match="the law has 5 features, the network takes 6"):
        propagate(graph, standard_law(5))
    with pytest.raises(ShapeError, match="event_shape"):
        propagate(conv_network(), standard_law(36))
    with pytest.raises(UnsupportedLayerError):
        propagate(nn.LayerNorm(4), standard_law(4))


def test_running_out_of_memory_is_explained(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(propagation, "activate", fail)
    with pytest.raises(ResourceError, match="covariance of 64 units for 1 law"):
        propagate(he_network(64, 2), standard_law(64))
    monkeypatch.setattr(propagation, "activate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        propagate(he_network(64, 2), standard_law(64))


def test_other_runtime_errors_pass_through(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(propagation, "activate", fail)
    with pytest.raises(RuntimeError, match="something else"):
        propagate(he_network(6, 2), standard_law(6))


@pytest.mark.parametrize(
    ("net_dtype", "law_dtype", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_result_has_the_wider_dtype(order, net_dtype, law_dtype, expected):
    net = he_network(6, 2, outputs=2, bias=0.1).to(net_dtype)
    law = GaussianLaw.standard(6, dtype=law_dtype)
    found = propagate(net, law, order)
    assert found.mean.dtype == found.variance.dtype == found.standard_error.dtype == expected
    reference = propagate(net.double(), standard_law(6), order)
    torch.testing.assert_close(found.mean, reference.mean.to(expected), rtol=1e-2, atol=1e-3)
    # Rounding happens at the end only: the result is the float64 one, rounded.
    assert bool((found.mean == reference.mean.to(expected)).all())


@pytest.mark.parametrize("order", ORDERS)
def test_layers_are_named_by_module_path(order):
    net = nn.Sequential(he_network(6, 1, bias=0.1), nn.Tanh(), nn.Linear(6, 2).double())
    law = correlated_law(6)
    found = run(net, law, order, layers=True)
    assert list(found.layers) == ["0.0", "0.1", "0.2", "1"]
    assert all(isinstance(hidden, OutputLaw) for hidden in found.layers.values())
    first = found.layers["0.0"]
    torch.testing.assert_close(first.mean, net[0][0](law.mean))
    weight = net[0][0].weight
    torch.testing.assert_close(first.covariance, weight @ law.covariance @ weight.T)
    truncated = run(net[0][:2], law, order)
    torch.testing.assert_close(found.layers["0.1"].mean, truncated.mean)
    torch.testing.assert_close(found.layers["0.1"].covariance, truncated.covariance)
    assert first.standard_error is None
    assert run(net, law, order).layers == {}


@pytest.mark.parametrize("order", ORDERS)
def test_layers_on_the_sphere_are_restored(order):
    net, law = he_network(8, 3, seed=2), standard_law(8)
    found = run(net, law, order, layers=True)
    for index in (1, 3, 5):
        truncated = run(net[: index + 1], law, order, angular=True)
        hidden = found.layers[str(index)]
        torch.testing.assert_close(hidden.mean, truncated.mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(hidden.covariance, truncated.covariance, rtol=1e-9, atol=1e-12)


def test_reused_modules_keep_all_their_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.act = nn.Linear(3, 4), nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return self.act(self.b(self.act(self.b(self.act(self.a(x))))))

    found = propagate(fill(Twice(), 0), correlated_law(3), layers=True)
    assert len(found.layers) == 6


def test_a_graph_is_accepted_in_place_of_a_module():
    net, law = he_network(6, 2), standard_law(6)
    one, other = propagate(net, law), propagate(read_network(net, (6,)), law)
    torch.testing.assert_close(one.mean, other.mean, rtol=0, atol=0)


@pytest.mark.parametrize("order", [1, *ORDERS])
def test_results_are_complete_and_frozen(order):
    found = run(he_network(6, 2, outputs=3, bias=0.1), correlated_law(6), order, layers=True)
    assert (found.order, found.augmented) == (ORDERS.get(order, (1,))[0], order == "2+")
    assert found.flops > 0
    assert 0 < found.seconds < 60
    assert (found.covariance is None) == (order == 1)
    assert (found.third is None) == (order in {1, "2"})
    names = [check.name for check in found.checks]
    assert len(names) == len(set(names))
    assert {"positive-variance", "depth-over-width", "orders-agree"} <= set(names)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.mean = None
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert not any(key.startswith("_") for key in plain)


def test_propagation_is_deterministic_and_leaves_no_trace():
    net, law = he_network(8, 2, bias=0.1), correlated_law(8)
    state = torch.get_rng_state()
    one, other = propagate(net, law), propagate(net, law)
    torch.testing.assert_close(one.mean, other.mean, rtol=0, atol=0)
    assert bool((torch.get_rng_state() == state).all())
    assert all(p.grad is None for p in net.parameters())
    assert one.mean.requires_grad
    assert not one.standard_error.requires_grad
    with torch.no_grad():
        assert not propagate(net, law).mean.requires_grad


def test_the_public_function_is_this_one():
    assert pf.propagate is propagate


def test_hidden_layers_at_order_1_have_means_and_variances():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    law = GaussianLaw(torch.zeros(4).double(), torch.ones(()).double())
    found = propagate(net, law, 1, layers=True).layers
    exact = propagate(
        net, law, 2, layers=True
    ).layers  # exact in front of and behind the first ReLU
    assert set(found) == {"0", "1"}
    for name, hidden in found.items():
        torch.testing.assert_close(hidden.mean, exact[name].mean)
        torch.testing.assert_close(hidden.variance, exact[name].variance)
        assert hidden.covariance is None
