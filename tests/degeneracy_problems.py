"""Small networks whose learning coefficients are known, and short runs around them."""

from copy import deepcopy
from math import log

import torch
from torch import nn

import pushforward as pf
from pushforward.degeneracy.neighbourhood import Neighbourhood

F64 = torch.float64
UNIT = pf.Gaussian(1.0)
SCALES = (1.5, 0.8, 0.4, 0.1)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def network(*layers, seed=0):
    """Of layers that are made by functions, so that their weights follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(*(make() for make in layers)).to(F64).eval()


def linear(inputs, outputs, bias=True):
    return lambda: nn.Linear(inputs, outputs, bias=bias)


def regression(count=100, scales=SCALES):
    """A line without noise: the loss is exactly quadratic. Network, data, eigenvalues."""
    inputs = draws(count, len(scales)) * torch.tensor(scales, dtype=F64)
    net = network(linear(len(scales), 1, bias=False))
    with torch.no_grad():
        targets = net(inputs)
    return net, (inputs, targets), torch.linalg.eigvalsh(inputs.T @ inputs / count)


def relu_network(count=60, bias=True, seed=0):
    """Two hidden layers and targets that are the network's own outputs."""
    net = network(
        linear(3, 4, bias), nn.ReLU, linear(4, 3, bias), nn.ReLU, linear(3, 1, bias), seed=seed
    )
    inputs = draws(count, 3, seed=seed + 1)
    with torch.no_grad():
        return net, (inputs, net(inputs))


def scaled(net, factor):
    """The same function: the first layer times a number, the second divided by it."""
    other = deepcopy(net)
    with torch.no_grad():
        first, second = other[0], other[2]
        first.weight.mul_(factor)
        if first.bias is not None:
            first.bias.mul_(factor)
        second.weight.div_(factor)
    return other


def default_nbeta(count):
    return count / log(count)


def neighbourhood(net, data, loss=UNIT, **options):
    defaults = {
        "nbeta": None,
        "localization": None,
        "metric": "euclidean",
        "batch_size": None,
        "subset": None,
        "realisable": False,
        "seed": 0,
    }
    return Neighbourhood.of(net, data, loss, **(defaults | options))


def estimate(net, data, loss=UNIT, **options):
    """A short run; errors of a few per cent for a quadratic."""
    defaults = {"num_chains": 8, "num_draws": 100, "localization": 1.0, "progress": False}
    return pf.learning_coefficient(net, data, loss, **(defaults | options))


def score(found, exact):
    """Errors away from an exact value."""
    return (float(found) - exact) / float(found.standard_error)


def same(found, expected):
    """Bit for bit, all but the cost."""
    ours, theirs = ({**each.to_dict(), "cost": None} for each in (found, expected))
    traces = ("excess", "warmup_excess", "losses")
    return ours == theirs and all(
        torch.equal(getattr(found, name), getattr(expected, name)) for name in traces
    )
