import pytest
import torch

from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.probes import NUM_PROBES, probe
from scenarios import small_mlp


@pytest.mark.parametrize("number", range(NUM_PROBES))
def test_probes_move_the_weights_and_are_always_the_same(number):
    reference = ReferenceNetwork.of(small_mlp(), (4,))
    first, second = probe(reference, number), probe(reference, number)
    assert not reference.unchanged(first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert torch.isfinite(tensor).all()


def test_probes_differ():
    reference = ReferenceNetwork.of(small_mlp(), (4,))
    values = {float(probe(reference, n)["0.weight"].sum()) for n in range(NUM_PROBES)}
    assert len(values) == NUM_PROBES
