"""Networks and laws that several test files share; every draw comes from an explicit seed."""

import copy
import itertools

import torch
from torch import nn

from pushforward.cumulants.laws import GaussianLaw

# 1 / E[phi(G)^2] for standard normal G: the weight variance that keeps second moments at one.
GAINS = {nn.ReLU: 2.0, nn.GELU: 2.3517156, nn.Tanh: 2.5361754, nn.Sigmoid: 3.4085598}


class Elementwise(nn.Module):
    """A function of a tensor as a module, traced through."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Residual(nn.Module):
    """Two residual blocks between an embedding and a readout."""

    def __init__(self, inputs, width, outputs, activation=nn.ReLU):
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.readout = nn.Linear(width, outputs)
        self.act0, self.act1, self.act2 = activation(), activation(), nn.Tanh()

    def forward(self, x):
        h = self.act0(self.embed(x))
        h = h + self.act1(self.first(h))
        h = h + 0.5 * self.act2(self.second(h))
        return self.readout(h)


class Concatenated(nn.Module):
    """A readout that sees the input beside two hidden layers."""

    def __init__(self, inputs, width, outputs):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.second = nn.Linear(width, width - 1)
        self.readout = nn.Linear(inputs + 2 * width - 1, outputs)

    def forward(self, x):
        first = torch.relu(self.first(x))
        second = torch.tanh(self.second(first))
        return self.readout(torch.cat([x, second, first], dim=1))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def fill(net, seed, weight=1.0, bias=0.3):
    """Float64 parameters: weights N(0, weight / fan_in), biases N(0, bias^2)."""
    net = net.double()
    noise = generator(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            draw = torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
            is_bias = parameter.dim() < 2 or name.endswith("bias")
            scale = bias if is_bias else (weight / parameter[0].numel()) ** 0.5
            parameter.copy_(draw * scale)
    return net.eval()


def he_network(width, depth, *, inputs=None, outputs=None, activation=nn.ReLU, bias=0.0, seed=0):
    """`depth` hidden layers whose pre-activations have second moment one over random weights."""
    inputs, outputs = inputs or width, outputs or width
    sizes = [inputs, *[width] * depth, outputs]
    layers = []
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        gain = GAINS.get(activation, 2.0) if index else 1.0
        linear = nn.Linear(fan_in, fan_out, bias=bias > 0)
        layers += [fill(linear, 1000 * seed + index, gain, bias), activation()]
    return nn.Sequential(*layers[:-1]).double().eval()


def trained_like_network(width, depth, *, outputs=4, seed=0):
    """He weights plus one coherent direction in each layer, as training leaves them; biases."""
    net = he_network(width, depth, outputs=outputs, bias=0.2, seed=seed)
    with torch.no_grad():
        for index, layer in enumerate(net[::2]):
            left = normal(7000 + 10 * seed + index, layer.out_features)
            right = normal(8000 + 10 * seed + index, layer.in_features)
            layer.weight += torch.outer(left / left.norm(), right / right.norm())
    return net


def conv_network(channels=3, *, seed=0, bias=True):
    """Convolution, BatchNorm, pooling and a dense head on single-channel images of 6 x 6."""
    net = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=bias),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(channels, 2 * channels, 2, groups=channels, bias=bias),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(8 * channels, 4, bias=bias),
    )
    net = fill(net, seed, 2.0, 0.2)
    with torch.no_grad():
        norm = net[1]
        norm.weight.copy_(1 + 0.2 * normal(seed + 1, channels))
        norm.running_mean.copy_(0.2 * normal(seed + 2, channels))
        norm.running_var.copy_(1 + normal(seed + 3, channels).square())
    return net


def correlated_law(dimension, *, seed=0, spread=0.2, mean=0.3):
    """A mildly correlated law away from the origin."""
    root = spread * normal(seed, dimension, dimension)
    covariance = torch.eye(dimension, dtype=torch.float64) + root @ root.T
    return GaussianLaw(mean * normal(seed + 500, dimension), covariance)


def standard_law(dimension, **options):
    return GaussianLaw.standard(dimension, dtype=torch.float64, **options)


def small_mlp(sizes=(4, 6, 5, 3), activation=nn.ReLU, *, seed=0, dtype=torch.float64):
    """A network of Linear layers with torch's initial weights."""
    torch.manual_seed(seed)
    layers = []
    for number, (n, m) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(n, m, dtype=dtype))
        if number < len(sizes) - 2:
            layers.append(activation())
    return nn.Sequential(*layers)


def moved(net, size=0.3, *, seed=1, only=""):
    """A copy with noise on the parameters whose names start with `only`."""
    torch.manual_seed(seed)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.startswith(only):
                parameter.add_(size * torch.randn_like(parameter))
    return other
