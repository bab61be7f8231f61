"""What a run will need, and whether there is as much."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pushforward.errors import ResourceError
from pushforward.runs.plan import (
    MemoryItem,
    Plan,
    _system_memory,
    available_memory,
    format_bytes,
    format_seconds,
    largest_fitting,
)

ITEMS = (
    MemoryItem("posterior draws", 3 * 2**20, "Take fewer draws."),
    MemoryItem("activations", 5 * 2**20, "Lower the batch size."),
    MemoryItem("parameters", 2**10),
    MemoryItem("noise", 2**19, "Take fewer draws."),
)
PLAN = Plan(
    "a posterior",
    ITEMS,
    passes=12.5,
    examples=60_000,
    seconds=200,
    processes=2,
    chunks={"examples": 128, "draws": 8},
)


def test_a_plan_can_be_read():
    assert repr(PLAN).splitlines() == [
        "Plan of a posterior",
        "  memory     8.5 MiB",
        "             3.0 MiB  posterior draws",
        "             5.0 MiB  activations",
        "             1.0 KiB  parameters",
        "             512 KiB  noise",
        "  work       12.5 passes over 60,000 examples",
        "  time       about 3 min 20 s",
        "  processes  2; memory is that of each",
        "  pieces     128 examples, 8 draws",
    ]
    assert "time       not known" in repr(Plan("x", (), passes=20_000, examples=1))
    assert "20,000 passes" in repr(Plan("x", (), passes=20_000, examples=1))


def test_a_plan_becomes_json():
    plain = json.loads(json.dumps(PLAN.to_dict()))
    assert plain["total_bytes"] == PLAN.total_bytes == 17 * 2**19 + 2**10
    assert plain["items"][0]["bytes"] == 3 * 2**20
    assert plain["chunks"] == {"examples": 128, "draws": 8}
    assert plain["seconds"] == 200


def test_what_fits_is_let_through():
    PLAN.require(PLAN.total_bytes)


def test_what_does_not_fit_is_refused_with_advice():
    with pytest.raises(ResourceError) as caught:
        PLAN.require(PLAN.total_bytes - 1)
    error = caught.value
    assert error.where == "a posterior"
    assert "activations 5.0 MiB, posterior draws 3.0 MiB, noise 512 KiB" in error.what
    assert "parameters" not in error.what
    assert error.advice == "Lower the batch size. Take fewer draws."
    with pytest.raises(ResourceError, match="more memory"):
        Plan("x", (MemoryItem("y", 2),), passes=1, examples=1).require(1)


@given(
    st.integers(0, 10**12),
    st.integers(0, 10**12),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)
def test_the_largest_number_that_fits(limit, fixed, per_item, most):
    count = largest_fitting(limit, fixed, per_item, most)
    assert 0 <= count <= most
    if count:
        assert fixed + count * per_item <= limit
    if count < most:
        assert fixed + (count + 1) * per_item > limit


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1024, "1.0 KiB"),
        (99.94 * 1024, "99.9 KiB"),
        (99.96 * 1024, "100 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (5000 * 2**40, "5,000 TiB"),
    ],
)
def test_bytes_for_readers(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0312, "0.031 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3599.6, "1 h"),
        (7500, "2 h 5 min"),
        (86_399, "1 d"),
        (273_600, "3 d 4 h"),
    ],
)
def test_seconds_for_readers(seconds, text):
    assert format_seconds(seconds) == text


# Available memory, on machines made of files


def machine(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 1 kB\nMemAvailable:    4000 kB\n"}
UNIFIED = MEMINFO | {"proc/self/cgroup": "0::/jobs/one\n"}
OLD = MEMINFO | {"proc/self/cgroup": "5:cpu:/\n4:memory:/jobs\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MEMINFO, 4000 * 1024),
        (UNIFIED, 4000 * 1024),
        (
            UNIFIED
            | {
                "sys/fs/cgroup/jobs/one/memory.max": "max\n",
                "sys/fs/cgroup/jobs/one/memory.current": "100000\n",
                "sys/fs/cgroup/jobs/memory.max": "1000000\n",
                "sys/fs/cgroup/jobs/memory.current": "300000\n",
                "sys/fs/cgroup/jobs/memory.stat": "anon 5\ninactive_file 200000\nslab 3\n",
            },
            900_000,
        ),
        (
            UNIFIED
            | {
                "sys/fs/cgroup/memory.max": "500000\n",
                "sys/fs/cgroup/memory.current": "100000\n",
            },
            400_000,
        ),
        (
            UNIFIED
            | {
                "sys/fs/cgroup/memory.max": "99000000\n",
                "sys/fs/cgroup/memory.current": "100000\n",
            },
            4000 * 1024,
        ),
        (
            UNIFIED
            | {
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "2000\n",
            },
            0,
        ),
        (
            OLD
            | {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
                "sys/fs/cgroup/memory/jobs/memory.limit_in_bytes": "1000000\n",
                "sys/fs/cgroup/memory/jobs/memory.usage_in_bytes": "400000\n",
                "sys/fs/cgroup/memory/jobs/memory.stat": "inactive_file 1\ntotal_inactive_file 50",
            },
            600_050,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "200\n",
            },
            800,
        ),
    ],
    ids=["free", "no group", "parent", "container", "loose", "spent", "version 1", "no meminfo"],
)
def test_the_tightest_limit_counts(tmp_path, files, expected):
    assert _system_memory(machine(tmp_path, files)) == expected


def test_a_machine_that_says_nothing(tmp_path, monkeypatch):
    def sysconf(name):
        return {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name]

    monkeypatch.setattr("os.sysconf", sysconf)
    assert _system_memory(tmp_path) == 2_048_000
    monkeypatch.delattr("os.sysconf")
    assert _system_memory(tmp_path) == 4 * 2**30


def test_this_machine_has_memory():
    assert 2**20 < available_memory() < 2**50
    assert available_memory(torch.device("meta")) > 2**20


def test_the_reserve_of_a_gpu_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 20)
    assert available_memory("cuda:0") == 130
