"""Noise is a function of seed, chain and step."""

import pytest
import torch

from pushforward.sampling.noise import ChainNoise, NoiseSize

CPU = torch.device("cpu")
SIZE = NoiseSize(normals=3, uniforms=2)


def noise(chains=range(4), size=SIZE, *, seed=1, purpose="step", dtype=torch.float64):
    return ChainNoise(seed, chains, size, purpose=purpose, dtype=dtype, device=CPU)


def joined(numbers):
    return torch.cat([numbers.normals.double(), numbers.uniforms], 1)


def test_shapes_and_types():
    numbers = noise(dtype=torch.float32).at(0)
    assert numbers.normals.shape == (4, 3)
    assert numbers.normals.dtype == torch.float32
    assert numbers.uniforms.shape == (4, 2)
    assert numbers.uniforms.dtype == torch.float64
    assert SIZE.total == 5


@pytest.mark.parametrize("size", [SIZE, NoiseSize(17, 1), NoiseSize(300, 20), NoiseSize(20_000, 1)])
def test_order_of_asking_does_not_matter(size):
    steps = [0, 1, 63, 64, 65, 130]
    forward, backward = noise(size=size), noise(size=size)
    expected = {step: joined(forward.at(step)) for step in steps}
    for step in reversed(steps):
        assert torch.equal(joined(backward.at(step)), expected[step])
        assert torch.equal(joined(noise(size=size).at(step)), expected[step])


@pytest.mark.parametrize("chains", [range(2, 3), range(1, 4), range(2, 9)])
def test_chains_have_their_own_whoever_else_is_there(chains):
    whole, part = noise(range(9)), noise(chains)
    for step in (0, 5, 64):
        expected = joined(whole.at(step))[chains.start : chains.stop]
        assert torch.equal(joined(part.at(step)), expected)


def test_nothing_is_used_twice():
    steps = [joined(noise().at(step)) for step in range(200)]
    others = [noise(seed=2), noise(purpose="start"), noise(purpose="steps")]
    steps += [joined(other.at(step)) for other in others for step in range(70)]
    everything = torch.cat(steps).flatten()
    assert len(everything.unique()) == len(everything)


def test_kinds_that_are_not_needed_are_empty():
    none = noise(size=NoiseSize()).at(70)
    assert none.normals.shape == none.uniforms.shape == (4, 0)
    assert noise(size=NoiseSize(uniforms=2)).at(0).uniforms.shape == (4, 2)


@pytest.mark.statistical
def test_laws():
    source = noise(range(50), NoiseSize(40, 40))
    numbers = [source.at(step) for step in range(50)]
    normals = torch.stack([n.normals for n in numbers])
    uniforms = torch.stack([n.uniforms for n in numbers])
    count = normals.numel()  # 100,000 each; thresholds at 4.5 standard errors
    assert normals.mean().abs() < 4.5 / count**0.5
    assert (normals.square().mean() - 1).abs() < 4.5 * (2 / count) ** 0.5
    assert (normals.pow(4).mean() - 3).abs() < 4.5 * (96 / count) ** 0.5
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert (uniforms.mean() - 0.5).abs() < 4.5 * (1 / 12 / count) ** 0.5
    assert (uniforms.square().mean() - 1 / 3).abs() < 4.5 * (4 / 45 / count) ** 0.5
    # Neighbouring steps and neighbouring chains are uncorrelated.
    for axis in (0, 1):
        shifted = normals.roll(1, axis) * normals
        assert shifted.mean().abs() < 4.5 / count**0.5
