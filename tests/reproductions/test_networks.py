"""Architectures of the reproductions."""

import importlib

import pytest
import torch


@pytest.fixture
def networks():
    return importlib.import_module("reproductions.networks")


def test_networks_have_the_published_sizes(networks):
    lenet = networks.lenet_small()
    assert networks.num_bayesian_parameters(lenet) == 14_554
    assert sum(p.numel() for p in lenet.parameters()) == 14_554 + 160
    assert [type(layer).__name__ for layer in lenet[:3]] == ["Conv2d", "ReLU", "BatchNorm2d"]
    resnet = networks.resnet20()
    assert sum(p.numel() for p in resnet.parameters()) == 272_474
    convolutions = [m for m in resnet.modules() if getattr(m, "kernel_size", None) == (3, 3)]
    assert len(convolutions) == 19  # and one linear layer
    assert resnet(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert resnet[:-3](torch.zeros(2, 3, 32, 32)).shape == (2, 64, 8, 8)


def test_resnet50_has_the_published_size_and_sensible_statistics(networks):
    images = torch.randn(3, 8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    net = networks.resnet50(images=images[:2])
    assert sum(p.numel() for p in net.parameters()) == 25_557_032
    assert not net.training
    with torch.no_grad():
        outputs = net(images[2])
        first = net[0](images[:2].flatten(0, 1))
    assert outputs.shape == (8, 1000)
    assert 0.1 < outputs.std() < 3.0  # 8 with the initial statistics
    assert torch.allclose(net[1].running_mean, first.mean(dim=(0, 2, 3)), atol=1e-5)
    assert net[1].momentum == 0.1


def test_weights_depend_on_the_seed_alone(networks):
    state = torch.random.get_rng_state()
    first, again, other = (networks.lenet_small(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first[0].weight, again[0].weight)
    assert torch.equal(first[-1].bias, again[-1].bias)
    assert not torch.equal(first[0].weight, other[0].weight)
