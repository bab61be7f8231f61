"""Tiny networks and their moved copies, for the baselines of function-space distance."""

import copy

import torch
from torch import nn


def numbers(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def filled(net, seed):
    net = net.double().eval()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(0.6 * numbers(*p.shape, seed=100 * seed + i))
    return net


def multilayer(seed=0):
    return filled(
        nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), seed
    )


def convolutional(seed=0, *, normalised=False):
    """On images (2, 5, 4): strides and paddings that differ between the axes."""
    norm = nn.BatchNorm2d(3) if normalised else nn.Identity()
    net = filled(
        nn.Sequential(
            nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)),
            norm,
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(27, 3),
        ),
        seed,
    )
    if normalised:
        norm.running_mean.copy_(0.2 * numbers(3, seed=seed + 1))
        norm.running_var.copy_(1 + 0.3 * numbers(3, seed=seed + 2).square())
    return net


class Words(nn.Module):
    """An embedding, a map of each position, normalisation, and a head that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.each = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, words):
        x = torch.relu(self.each(self.embed(words)))
        x = self.norm(x)
        return torch.tanh(self.head(x[:, 0])) + self.head(x.mean(1))


def words(seed=0):
    return filled(Words(), seed)


def sentences(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(6, (count, 3), generator=generator)


def moved(net, by=0.2, seed=7, only=None):
    """A copy with other parameters; `only` names what moves."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for i, (name, p) in enumerate(other.named_parameters()):
            if only is None or name in only:
                p.add_(by * numbers(*p.shape, seed=1000 * seed + i).to(p.dtype))
    return other
