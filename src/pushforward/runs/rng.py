"""Random streams addressed by name, so that noise never depends on chunking or resumption."""

from __future__ import annotations

import hashlib

import torch

from pushforward.errors import OptionError
from pushforward.options import whole_number

__all__ = ["derived_seed", "stream"]

_SEED_LIMIT = 2**63

# The Mersenne twister's state inside the byte string of a CPU generator: 24 bytes of bookkeeping,
# then 624 words of 32 bits, each stored in 64.
_CPU_STATE_BYTES = 5056
_WORDS = slice(24, 24 + 8 * 624)


def stream(
    seed: int, *path: str | int, device: torch.device | str | int = "cpu"
) -> torch.Generator:
    """Open the random stream that belongs to a seed and a path of names.

    The generator's state is a pure function of ``(seed, path)`` and the kind of device: a
    computation that draws block ``i`` from ``stream(seed, "purpose", i)`` gets the same numbers in
    any order, in any number of sittings, and whatever else was drawn before. Streams of different
    paths are unrelated: ``("a", 1)``, ``("a1",)``, ``("a", "1")`` and ``("a", 1, 0)`` all differ.

    CPU and CUDA run different generators (Mersenne twister and Philox), so the *same* path gives
    *different* numbers on the two; all CUDA devices agree with each other. PyTorch does not promise
    equal numbers across its releases either.

    Parameters
    ----------
    seed
        The user's seed, an integer in ``[0, 2**63)``.
    *path
        Names and counters that say what the noise is for.
    device
        Where the generator lives; it must be the device of the tensors that it fills.

    Returns
    -------
    torch.Generator
        A fresh generator at the beginning of its stream.

    Raises
    ------
    OptionError
        If `seed` is no integer in range, or a part of the path is neither a string nor an integer.

    Notes
    -----
    The path is hashed with BLAKE2b. On CPU the hash is stretched (SHAKE-256) over the whole
    generator state, because seeding PyTorch's CPU generator keeps only 32 bits of a seed: two among
    65,000 such streams would coincide more often than not.
    """
    key = _encode(_validated_seed(seed), path)
    number = _number(key)
    generator = torch.Generator(device=device)
    generator.manual_seed(number)
    if generator.device.type == "cpu":
        _widen(generator, number, key)
    return generator


def derived_seed(seed: int, *path: str | int) -> int:
    """The seed of a part of a computation that has streams of its own.

    Parameters
    ----------
    seed
        The user's.
    *path
        What the part is, as in `stream`.

    Returns
    -------
    int
        In ``[0, 2**63)``.
    """
    return _number(_encode(_validated_seed(seed), path))


def _number(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def _validated_seed(seed: int) -> int:
    advice = "Give a whole number from 0 to 2**63 - 1."
    return whole_number(seed, "seed", least=0, most=_SEED_LIMIT - 1, advice=advice)


def _encode(seed: int, path: tuple[str | int, ...]) -> bytes:
    """Each part with its kind and length, so that no two paths share an encoding.

    Returns
    -------
    bytes
        The canonical form that is hashed.

    Raises
    ------
    OptionError
        If a part is neither a string nor an integer.
    """
    parts = []
    for part in (seed, *path):
        if isinstance(part, str):
            kind, payload = b"s", part.encode()
        elif isinstance(part, int) and not isinstance(part, bool):
            kind, payload = b"i", str(part).encode()
        else:
            raise OptionError(
                f"{part!r} cannot name a random stream",
                where="path",
                advice="Use strings and integers.",
            )
        parts.append(kind + len(payload).to_bytes(8, "little") + payload)
    return b"".join(parts)


def _widen(generator: torch.Generator, number: int, key: bytes) -> None:
    """Fill the twister's 19,968 bits from the key instead of stretching 32 bits over them."""
    state = generator.get_state()
    words = state[_WORDS].view(torch.int64) if state.numel() == _CPU_STATE_BYTES else None
    if words is None or words[0].item() != number & 0xFFFFFFFF:
        # Another layout in a future PyTorch: the 32-bit seeding is still a valid stream.
        return
    noise = bytearray(hashlib.shake_256(key).digest(4 * words.numel()))
    words.copy_(torch.frombuffer(noise, dtype=torch.int32).to(torch.int64) & 0xFFFFFFFF)
    generator.set_state(state)
