"""Numbers that change when tensors do."""

import pytest
import torch

from pushforward.networks import checksums as module
from pushforward.networks.checksums import checksums

DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.int8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


def tensor(dtype, shape=(6, 4)):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (3 * values).to(dtype)


def number(value):
    return checksums({"a": value})["a"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("piece", [2**18, 7])  # numbers at a time: all of them, or a few
def test_any_bit_counts(dtype, piece, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", piece)
    base = tensor(dtype, (3, 3))
    ours = number(base)
    assert number(base.clone()) == ours
    seen = {ours}
    for index in range(base.numel() * base.element_size()):
        for bit in range(8):
            other = base.clone()
            other.view(-1).view(torch.uint8)[index] ^= 1 << bit
            seen.add(number(other))
    assert len(seen) == 1 + 8 * base.numel() * base.element_size()


@pytest.mark.parametrize(
    "change",
    [
        torch.neg,  # of an even count, whose sign bits could cancel
        lambda x: x.flip(0),
        lambda x: x.flip(1),
        lambda x: x.roll(1, 0),
        lambda x: 3 * x,
        torch.zeros_like,
    ],
    ids=["sign", "rows", "columns", "rolled", "scaled", "zero"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("piece", [2**18, 10])
def test_changes_of_many_numbers_are_seen(change, dtype, piece, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", piece)
    assert number(change(tensor(dtype))) != number(tensor(dtype))


def test_the_layout_in_memory_does_not_matter():
    base = tensor(torch.float32)
    assert number(base.T.contiguous().T) == number(base)
    assert number(torch.stack([base, base])[1]) == number(base)
    z = tensor(torch.complex64)
    assert number(z.conj()) == number(z.conj().resolve_conj()) != number(z)


def test_names_stand_for_their_tensors():
    sums = checksums(
        {"a": tensor(torch.float64), "b": torch.tensor(3.0), "empty": torch.zeros(0, 3)}
    )
    assert sums.keys() == {"a", "b", "empty"}
    assert sums["a"] == number(tensor(torch.float64))
    assert sums["b"] == number(torch.tensor(3.0)) != number(torch.tensor(-3.0))
    assert checksums({}) == {}
    assert checksums({"sparse": torch.eye(3).to_sparse()}) == {}
