import pytest
import torch

from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.probes import NUM_PROBES, PROBE_NAMES, probe
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


def _changes(number):
    reference = ReferenceNetwork.of(small_mlp(), (4,))
    new = probe(reference, number)
    return {name: (tensor, new[name]) for name, tensor in reference.tensors.items()}


def _number(name):
    return PROBE_NAMES.index(name)


@pytest.mark.parametrize(
    ("name", "percent"),
    [
        ("noise of 5 %", 5),
        ("noise of 20 %", 20),
        ("mixed inputs, 10 %", 10),
        ("mixed inputs, 70 %", 70),
    ],
)
def test_changes_are_as_long_as_their_names_say(name, percent):
    for old, new in _changes(_number(name)).values():
        assert float((new - old).norm() / old.norm()) == pytest.approx(percent / 100)


def test_mixed_inputs_change_a_layer_along_one_direction_that_it_passed_before():
    for name, (old, new) in _changes(_number("mixed inputs, 70 %")).items():
        if old.dim() < 2:
            continue
        left, values, right = torch.linalg.svd(new - old)
        assert values[1] < 1e-12 * values[0], name
        # What the layer made of the direction, and no other: W + c (W v) v^T.
        through = old @ right[0]
        assert float((left[:, 0] @ through).abs() / through.norm()) == pytest.approx(1.0)


@pytest.mark.parametrize("percent", [30, 60])
def test_a_share_of_every_matrix_is_gone(percent):
    for old, new in _changes(_number(f"{percent} % pruned")).values():
        gone = int((new == 0).sum())
        assert gone == (round(old.numel() * percent / 100) if old.dim() > 1 else 0)


@pytest.mark.parametrize("bits", [4, 6])
def test_matrices_take_few_values(bits):
    for old, new in _changes(_number(f"{bits} bits")).values():
        if old.dim() > 1:
            assert len(new.unique()) <= 2**bits - 1
            assert (new - old).abs().max() <= old.abs().max() / (2**bits - 2) * (1 + 1e-9)
        else:
            assert torch.equal(old, new)
