"""The Gaussian closure: exact for one hidden layer and Gaussian inputs, close behind more."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from oracles.gated_pairs import Unit, pair_moments
from pushforward.function_space.chain import Moments
from pushforward.function_space.gaussian import gaussian_values, push_gaussian
from pushforward.function_space.network import ReferenceNetwork
from scenarios import Residual, normal


class Skip(nn.Module):
    """A hidden layer beside the input that it sees."""

    def __init__(self, width, outputs, activation=nn.ReLU):
        super().__init__()
        self.hidden, self.readout = nn.Linear(width, width), nn.Linear(width, outputs)
        self.activation = activation()

    def forward(self, x):
        return self.readout(x + self.activation(self.hidden(x)))


def pair(build, event_shape, move=0.3, seed=0):
    """A network and its weights moved at random: their graphs, and the reference."""
    torch.manual_seed(seed)
    reference = ReferenceNetwork.of(build().double(), event_shape)
    moved = {
        name: tensor + move * tensor.std() * normal(seed + 100 + i, *tensor.shape)
        for i, (name, tensor) in enumerate(reference.tensors.items())
    }
    return reference, moved


def gaussian_inputs(d, seed=1, components=1):
    root = normal(seed, components, d, d) / math.sqrt(d)
    return Moments(0.5 * normal(seed + 50, components, d), root @ root.mT)


def closure(reference, tensors, inputs):
    steps = gaussian_values(reference.graph, inputs)
    return push_gaussian(reference.graph, reference.graph_of(tensors), inputs, steps)


def mean_square(change):
    """``E |dz|^2`` of each component."""
    return change.mean.square().sum(-1) + change.covariance.diagonal(dim1=-2, dim2=-1).sum(-1)


def linearised(reference, tensors, x):
    """Outputs, and their change when every activation is replaced by its tangent."""
    old, new = reference.graph, reference.graph_of(tensors)
    a, da = x, torch.zeros_like(x)
    for mine, theirs in zip(old.stages, new.stages, strict=True):
        s = mine.affine.apply(a)
        ds = theirs.affine.apply(a + da) - s
        parts, slopes = [], []
        for group in mine.groups:
            z = s[:, group.units].clone().requires_grad_()
            value = group.activation(z)
            slopes.append(torch.autograd.grad(value.sum(), z)[0])
            parts.append(value.detach())
        a, da = torch.cat(parts, 1), torch.cat(slopes, 1) * ds
    z = old.output.apply(a)
    return z, new.output.apply(a + da) - z


def draw(inputs, count, seed):
    root = torch.linalg.cholesky(inputs.covariance[0])
    return inputs.mean[0] + normal(seed, count, len(root)) @ root.T


ONE_LAYER = [
    (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (4,)),
    (lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), (4,)),
    (lambda: Skip(4, 3), (4,)),
    (lambda: Skip(4, 3, nn.Tanh), (4,)),
    (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 3)
        ),
        (1, 3, 3),
    ),
]
KINDS = ["relu", "gelu", "residual relu", "residual tanh", "convolution"]


@pytest.mark.statistical
@pytest.mark.parametrize(("build", "event_shape"), ONE_LAYER, ids=KINDS)
def test_one_hidden_layer_is_exact(build, event_shape):
    # 27 moments of each network at four standard errors: fails by chance once in 120.
    reference, moved = pair(build, event_shape)
    d = math.prod(event_shape)
    inputs = gaussian_inputs(d)
    change = closure(reference, moved, inputs)
    total, squares, count = 0.0, 0.0, 0
    for part in range(4):
        z, dz = linearised(reference, moved, draw(inputs, 125_000, 7 + part))
        z, centred = z - z.mean(0), dz - change.mean[0]
        rows = torch.cat(
            [
                centred,
                (z[:, :, None] * centred[:, None, :]).flatten(1),
                (centred[:, :, None] * centred[:, None, :]).flatten(1),
            ],
            dim=1,
        )
        total, squares = total + rows.sum(0), squares + rows.square().sum(0)
        count += len(rows)
    mean = total / count
    error = (squares / count - mean.square()).sqrt() / math.sqrt(count)
    expected = torch.cat(
        [torch.zeros(3).double(), change.cross[0].flatten(), change.covariance[0].flatten()]
    )
    assert bool(((mean - expected).abs() < 4 * error).all())


def test_two_hidden_units_by_quadrature():
    reference, moved = pair(
        lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)), (3,)
    )
    inputs = gaussian_inputs(3)
    change = closure(reference, moved, inputs)
    old = {name: t.numpy() for name, t in reference.tensors.items()}
    new = {name: t.numpy() for name, t in moved.items()}
    e, c = inputs.mean[0].numpy(), inputs.covariance[0].numpy()
    by = new["0.weight"] - old["0.weight"]
    s = old["0.weight"] @ c @ old["0.weight"].T
    std = np.sqrt(np.diag(s))
    rho = s[0, 1] / std.prod()
    # Independent normals behind the two pre-activations, and what the change has of them.
    root = np.diag(std) @ np.array([[1, 0], [rho, math.sqrt(1 - rho**2)]])
    loadings = np.linalg.solve(root, old["0.weight"] @ c @ by.T).T
    noise = by @ c @ by.T - loadings @ loadings.T
    means = old["0.weight"] @ e + old["0.bias"]
    units = [
        Unit(lambda z: np.maximum(z, 0), lambda z: 1.0 * (z > 0), (0.0,), mean, spread)
        for mean, spread in zip(means, std, strict=True)
    ]
    moments = pair_moments(units, rho, by @ e + new["0.bias"] - old["0.bias"], loadings, noise)
    a, da, values, cross, changes = moments
    out, top = new["2.weight"], new["2.weight"] - old["2.weight"]
    mean = top @ a + out @ da + new["2.bias"] - old["2.bias"]
    mixed = top @ cross @ out.T
    covariance = top @ values @ top.T + mixed + mixed.T + out @ changes @ out.T
    with_output = old["2.weight"] @ (values @ top.T + cross @ out.T)
    for found, truth in zip(
        (change.mean, change.covariance, change.cross), (mean, covariance, with_output), strict=True
    ):
        torch.testing.assert_close(found[0], torch.from_numpy(truth), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Residual(5, 40, 3),
        lambda: Residual(5, 40, 3, nn.GELU),
        lambda: nn.Sequential(
            nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)
        ),
    ],
    ids=["residual relu", "residual gelu", "plain"],
)
@pytest.mark.statistical
def test_several_layers_are_close(build):
    # The standard error of the sample is 0.7 %; measured differences are below 2 %.
    reference, moved = pair(build, (5,))
    inputs = gaussian_inputs(5)
    _, dz = linearised(reference, moved, draw(inputs, 20_000, 9))
    truth = dz.square().sum(1).mean().item()
    found = mean_square(closure(reference, moved, inputs)).item()
    assert found == pytest.approx(truth, rel=0.05)


@pytest.mark.parametrize("build", [lambda: Residual(5, 8, 3), lambda: Residual(5, 8, 3, nn.GELU)])
def test_the_same_weights_are_no_distance_apart(build):
    reference, _ = pair(build, (5,))
    leaves = {name: t.clone().requires_grad_() for name, t in reference.tensors.items()}
    change = closure(reference, leaves, gaussian_inputs(5))
    assert not change.mean.any()
    assert not change.cross.any()
    assert not change.covariance.any()
    for gradient in torch.autograd.grad(mean_square(change).sum(), list(leaves.values())):
        assert not gradient.any()


def test_only_the_last_layer_differs():
    reference, moved = pair(lambda: Residual(5, 8, 3), (5,))
    inputs = gaussian_inputs(5)
    last = {n: moved[n] if n.startswith("readout") else t for n, t in reference.tensors.items()}
    change = closure(reference, last, inputs)
    values = gaussian_values(reference.graph, inputs)[-1].after
    zero = torch.zeros(1, dtype=torch.float64)
    old, new = (graph.output.linear for graph in (reference.graph, reference.graph_of(last)))
    by = new.dense(zero) - old.dense(zero)
    torch.testing.assert_close(
        change.mean[0],
        by @ values.mean[0] + last["readout.bias"] - reference.tensors["readout.bias"],
    )
    torch.testing.assert_close(change.covariance[0], by @ values.covariance[0] @ by.T)
    expected = old.dense(zero) @ values.covariance[0] @ by.T
    torch.testing.assert_close(change.cross[0], expected)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_gradients_by_finite_differences(activation):
    reference, moved = pair(lambda: Residual(3, 4, 2, activation), (3,))
    inputs = gaussian_inputs(3, components=2)
    steps = gaussian_values(reference.graph, inputs)

    def distance(*values):
        graph = reference.graph_of(dict(zip(moved, values, strict=True)))
        return mean_square(push_gaussian(reference.graph, graph, inputs, steps))

    leaves = tuple(t.clone().requires_grad_() for t in moved.values())
    assert torch.autograd.gradcheck(distance, leaves, fast_mode=True)


def test_everything_may_happen_inside_a_transform():
    reference, moved = pair(lambda: Residual(3, 4, 2, nn.GELU), (3,))
    inputs = gaussian_inputs(3)

    def distance(tensors):
        return mean_square(closure(reference, tensors, inputs)).sum()

    leaves = {name: t.clone().requires_grad_() for name, t in moved.items()}
    expected = torch.autograd.grad(distance(leaves), list(leaves.values()))
    for found, truth in zip(torch.func.grad(distance)(moved).values(), expected, strict=True):
        torch.testing.assert_close(found, truth)


def test_the_curvature_at_the_reference_is_positive_semidefinite():
    reference, _ = pair(lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (3,))
    inputs = gaussian_inputs(3)
    steps = gaussian_values(reference.graph, inputs)
    names = list(reference.tensors)
    sizes = [reference.tensors[name].numel() for name in names]

    def distance(flat):
        parts = flat.split(sizes)
        tensors = {
            name: reference.tensors[name] + part.reshape(reference.tensors[name].shape)
            for name, part in zip(names, parts, strict=True)
        }
        graph = reference.graph_of(tensors)
        return mean_square(push_gaussian(reference.graph, graph, inputs, steps)).sum()

    zero = torch.zeros(sum(sizes), dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(distance, zero)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert eigenvalues.min() > -1e-12 * eigenvalues.max()
    direction = normal(60, len(zero))
    small = distance(1e-4 * direction)
    torch.testing.assert_close(small * 1e8, direction @ hessian @ direction / 2, rtol=1e-3, atol=0)


def test_components_are_networks_of_their_own():
    reference, moved = pair(lambda: Residual(4, 6, 2), (4,))
    inputs = gaussian_inputs(4, components=3)
    both = closure(reference, moved, inputs)
    for i in range(3):
        one = closure(
            reference, moved, Moments(inputs.mean[i : i + 1], inputs.covariance[i : i + 1])
        )
        torch.testing.assert_close(both.mean[i], one.mean[0])
        torch.testing.assert_close(both.covariance[i], one.covariance[0])


def test_inputs_without_variance_and_dead_units():
    reference, moved = pair(
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
        ),
        (4,),
    )
    dead = {n: t.clone() for n, t in reference.tensors.items()}
    dead["0.weight"][:3], dead["0.bias"][:3] = 0.0, -1.0
    reference.module.load_state_dict(dead)
    inputs = gaussian_inputs(4)
    flat = inputs.covariance.clone()
    flat[:, 2:], flat[:, :, 2:] = 0.0, 0.0
    leaves = {name: t.clone().requires_grad_() for name, t in moved.items()}
    for moments in (Moments(inputs.mean, flat), Moments(inputs.mean, 0 * flat)):
        value = mean_square(closure(reference, leaves, moments)).sum()
        assert value.item() > 0
        gradients = torch.autograd.grad(value, list(leaves.values()))
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    # Without any variance the data are one point, and the distance that at the point.
    _, dz = linearised(reference, moved, inputs.mean)
    assert value.item() == pytest.approx(dz.square().sum().item())
