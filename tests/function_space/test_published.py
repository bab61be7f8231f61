import torch
from torch import nn

from oracles.gated_network import published_distance
from pushforward.function_space.chain import Moments
from pushforward.function_space.gated import Gates
from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.published import published_values, push_published, with_jitter
from scenarios import moved, small_mlp


def test_equals_the_published_recursion():
    net = small_mlp((3, 6, 5, 2))
    other = moved(net, 0.5)
    torch.manual_seed(3)
    mean, factor = torch.randn(3).double(), torch.randn(3, 3).double()
    covariance = factor @ factor.mT
    gates = [torch.rand(6).double(), torch.rand(5).double()]
    jittered = with_jitter(Moments(mean[None], covariance[None]))
    reference = ReferenceNetwork.of(net, (3,))
    steps = published_values(reference.graph, jittered, [Gates(g[None], g[None]) for g in gates])
    change = push_published(
        reference.graph, reference.graph_of(reference.tensors_of(other)), jittered, steps
    )
    got = (change.mean.square().sum() + change.covariance.diagonal(dim1=-2, dim2=-1).sum()) / 2
    affine = [
        [(m.weight.detach(), m.bias.detach()) for m in n if isinstance(m, nn.Linear)]
        for n in (net, other)
    ]
    expected = published_distance(
        *affine, mean, covariance + 1e-4 * torch.eye(3).double(), [g.tolist() for g in gates]
    )
    assert torch.allclose(got, expected, rtol=1e-13)
