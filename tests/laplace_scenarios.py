"""Small networks and data for linearised Laplace, for the library and for its oracle.

Targets come from a teacher, the network's weights are near the teacher's: nothing is trained, and
the mode of the linear model is not where the network's weights are.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

import pushforward as pf
from oracles import linear_gaussian as oracle
from oracles.linear_gaussian import DenseModel
from pushforward.linearised_laplace.linear_model import LinearModel
from pushforward.linearised_laplace.priors import Prior
from pushforward.networks.data import Examples
from pushforward.networks.model import FunctionalModel


def numbers(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def multilayer(*sizes, seed=0):
    layers = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(numbers(fan_out, fan_in, seed=100 * seed + i) / fan_in**0.5)
            linear.bias.copy_(0.3 * numbers(fan_out, seed=100 * seed + 50 + i))
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).eval()


def perturbed(net, seed, by=0.2):
    """What a teacher says when its weights are others."""
    twin = multilayer(*[net[0].in_features, *[layer.out_features for layer in net[::2]]])
    twin.load_state_dict(net.state_dict())
    with torch.no_grad():
        for i, p in enumerate(twin.parameters()):
            p.add_(by * numbers(*p.shape, seed=1000 * seed + i))
    return twin


def regression(num_examples=70, outputs=2, seed=1):
    net = multilayer(3, 4, outputs, seed=seed)
    x = numbers(num_examples, 3, seed=seed + 10)
    y = perturbed(net, seed)(x).detach() + 0.3 * numbers(num_examples, outputs, seed=seed + 20)
    return net, x, y


def classification(num_examples=90, classes=3, seed=2):
    net = multilayer(3, 4, classes, seed=seed)
    with torch.no_grad():
        net[2].weight.mul_(3)
    x = numbers(num_examples, 3, seed=seed + 10)
    noise = -(-torch.log(torch.sigmoid(1.7 * numbers(num_examples, classes, seed=seed + 20)))).log()
    return net, x, (perturbed(net, seed)(x).detach() + noise).argmax(-1)


def binary(num_examples=80, seed=3):
    net = multilayer(3, 4, 2, seed=seed)
    with torch.no_grad():
        net[2].weight.mul_(3)
    x = numbers(num_examples, 3, seed=seed + 10)
    noise = 1.5 * numbers(num_examples, 2, seed=seed + 20)
    return net, x, (perturbed(net, seed)(x).detach() + noise > 0).double()


def counts(num_examples=80, seed=4):
    net = multilayer(3, 4, 1, seed=seed)
    x = numbers(num_examples, 3, seed=seed + 10)
    rate = perturbed(net, seed)(x).detach().exp()
    generator = torch.Generator().manual_seed(seed)
    return net, x, torch.poisson(rate, generator=generator)


@dataclass(frozen=True)
class Problem:
    net: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    likelihood: object
    log_prob: object

    @property
    def data(self):
        return self.x, self.y

    def dense(self, *, affine=True):
        return DenseModel.of(self.net, self.x, self.y, self.log_prob, affine=affine)

    def linear(self, kind="isotropic", precision=1.0, offset="affine", **settings):
        model = FunctionalModel.of(self.net)
        prior = Prior.start(kind, model.space, precision, model.device)
        examples = Examples.read(self.data)
        return LinearModel(model, examples, self.likelihood, prior, offset, **settings)

    def with_noise(self, variance):
        return replace(self, likelihood=pf.Gaussian(variance), log_prob=oracle.gaussian(variance))

    def groups(self, kind):
        """Group of each parameter."""
        space = FunctionalModel.of(self.net).space
        index = space.layer_index()
        return index if kind == "layerwise" else torch.zeros_like(index)


PROBLEMS = {
    "gaussian": Problem(*regression(), pf.Gaussian(0.1), oracle.gaussian(0.1)),
    "gaussian, noise of each output": Problem(
        *regression(), pf.Gaussian((0.1, 0.3)), oracle.gaussian([0.1, 0.3])
    ),
    "categorical": Problem(*classification(), pf.Categorical(), oracle.categorical),
    "bernoulli": Problem(*binary(), pf.Bernoulli(), oracle.bernoulli),
    "poisson": Problem(*counts(), pf.Poisson(), oracle.poisson),
}
