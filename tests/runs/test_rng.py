import subprocess
import sys

import numpy as np
import pytest
import torch

from pushforward.errors import OptionError
from pushforward.runs.rng import derived_seed, stream


def draw(*path, seed=0, count=8):
    return torch.rand(count, generator=stream(seed, *path), dtype=torch.float64)


def test_same_seed_and_path_give_the_same_numbers():
    assert torch.equal(draw("a", 1, seed=3), draw("a", 1, seed=3))


def test_stream_does_not_depend_on_what_was_drawn_before():
    before = draw("a", 1)
    torch.rand(100)
    draw("b")
    assert torch.equal(draw("a", 1), before)


def test_stream_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    draw("a")
    assert torch.equal(torch.get_rng_state(), state)


def test_stream_is_the_same_in_another_process():
    # Guards against Python's salted hash().
    code = (
        "import torch; from pushforward.runs.rng import stream;"
        "print(torch.rand((), generator=stream(5, 'a', 7), dtype=torch.float64).item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert float(run.stdout) == draw("a", 7, seed=5, count=1).item()


def test_paths_that_look_alike_are_distinct():
    paths = [
        (),
        ("a",),
        ("a", 1),
        ("a1",),
        ("a", "1"),
        ("a", 1, 0),
        ("a", 10),
        (1, "a"),
        ("", "a"),
        ("a", ""),
        ("a", -1),
        ("aa", "b"),
        ("a", "ab"),
        ("aaab",),
        # What plain concatenation of kinds and values would confuse.
        ("a", "b"),
        ("asb",),
        ("ai1",),
    ]
    firsts = {draw(*path, count=1).item() for path in paths}
    assert len(firsts) == len(paths)


def test_seed_is_not_a_part_of_the_path():
    assert not torch.equal(draw(1, seed=0), draw(0, seed=1))
    assert not torch.equal(draw(seed=1), draw(1, seed=0))


def test_seeds_beyond_32_bits_are_told_apart():
    # Seeding alone would keep 32 bits of the hash; here the whole state follows from it.
    generator = stream(0, "a")
    narrow = torch.Generator().manual_seed(generator.initial_seed())
    assert narrow.initial_seed() == generator.initial_seed()
    assert not torch.equal(torch.rand(4, generator=generator), torch.rand(4, generator=narrow))
    assert not torch.equal(draw("a", seed=1), draw("a", seed=1 + 2**32))


def test_stream_is_uniform_within_and_across_paths():
    # Mean, variance and lag-one correlation of 40,000 numbers; |z| < 4 for three statistics has a
    # false-alarm rate of 2e-4.
    across = torch.cat([draw("block", index, count=4) for index in range(10_000)])
    centred = across - 0.5
    root = len(across) ** 0.5
    assert abs(centred.mean().item()) * root * 12**0.5 < 4
    assert abs((centred**2).mean().item() - 1 / 12) * root * 180**0.5 < 4
    assert abs((centred[1:] * centred[:-1]).mean().item()) * root * 12 < 4


@pytest.mark.wrong_types  # NumPy integers are no int to a type checker
def test_numpy_integers_are_seeds():
    assert torch.equal(draw("a", seed=np.int64(3)), draw("a", seed=3))


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1", None, True])
def test_bad_seed_is_refused(seed):
    with pytest.raises(
        OptionError, match=r"^seed: .*\. Give a whole number from 0 to 2\*\*63 - 1\."
    ):
        stream(seed, "a")


@pytest.mark.parametrize("part", [1.0, None, True, ("a",), b"a"])
def test_bad_path_is_refused(part):
    with pytest.raises(OptionError, match="cannot name a random stream"):
        stream(0, "a", part)


def test_parts_have_seeds_of_their_own():
    paths = [(), ("a",), ("a", 1), ("a1",), ("a", "1"), (1, "a"), ("b",)]
    found = [derived_seed(seed, *path) for seed in (0, 1, 2**40) for path in paths]
    assert len(set(found)) == len(found)
    assert all(0 <= seed < 2**63 for seed in found)
    assert found == [derived_seed(seed, *path) for seed in (0, 1, 2**40) for path in paths]
    assert len({seed >> 32 for seed in found}) == len(found)  # in the upper bits as well


def test_a_seed_that_is_derived_is_a_seed():
    own = derived_seed(3, "part")
    assert type(own) is int
    inner = {draw("a", seed=seed, count=1).item() for seed in (3, own, derived_seed(own, "part"))}
    assert len(inner) == 3
    assert draw("part", "a", seed=3, count=1).item() not in inner


def test_derived_seeds_are_the_same_in_another_process():
    code = "from pushforward.runs.rng import derived_seed; print(derived_seed(5, 'a', 7))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(run.stdout) == derived_seed(5, "a", 7)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, None, True])
def test_bad_seeds_derive_nothing(seed):
    with pytest.raises(
        OptionError, match=r"^seed: .*\. Give a whole number from 0 to 2\*\*63 - 1\."
    ):
        derived_seed(seed, "a")


@pytest.mark.parametrize("part", [1.0, None, True])
def test_bad_paths_derive_nothing(part):
    with pytest.raises(OptionError, match="cannot name a random stream"):
        derived_seed(0, part)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_stream_is_reproducible():
    first, second = (
        torch.rand(8, generator=stream(0, "a", device="cuda"), device="cuda") for _ in range(2)
    )
    assert torch.equal(first, second)
