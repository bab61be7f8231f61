"""Files that are whole or not there, and belong to what they are read for."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pushforward.errors import OptionError, WeightsError
from pushforward.runs import store
from pushforward.runs.store import Checkpoint, fingerprint, load_tensors, save_tensors

GRID = torch.arange(12, dtype=torch.float64).reshape(3, 4)
TENSORS = {
    "double": GRID / 7,
    "half": (GRID / 7).to(torch.bfloat16),
    "integer": torch.tensor(5),
    "flags": torch.tensor([True, False]),
    "transposed": GRID.T,
    "row": GRID[1],
    "tied": GRID,
    "also tied": GRID,
    "none": torch.zeros(0, 3),
    "parameter": torch.ones(2, requires_grad=True),
}
METADATA = {"third": 1 / 3, "list": [1, None, "ü"], "inner": {"a": True}, "huge": 2**80}


def write(path, schema="test.kind", version=2):
    save_tensors(path, TENSORS, METADATA, schema=schema, version=version)


def read(path, schema="test.kind", version=2):
    return load_tensors(path, schema=schema, version=version)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "made" / "on" / "the way" / "file.safetensors"
    write(path)
    tensors, metadata = read(path)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])
    assert os.listdir(path.parent) == ["file.safetensors"]
    assert load_file(path).keys() == TENSORS.keys()  # an ordinary file of its kind


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_tensors_are_free_of_the_file(tmp_path):
    write(tmp_path / "file")
    tensors, _ = read(str(tmp_path / "file"))
    assert tensors
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    replace = os.replace
    monkeypatch.setattr("os.fsync", lambda _descriptor: done.append("flush"))
    monkeypatch.setattr("os.replace", lambda *paths: (done.append("replace"), replace(*paths)))
    write(tmp_path / "file")
    assert done == ["flush", "replace", "flush"]


def test_no_tensors_and_no_metadata(tmp_path):
    save_tensors(tmp_path / "file", {}, {}, schema="a", version=1)
    assert load_tensors(tmp_path / "file", schema="a", version=1) == ({}, {})


def test_older_versions_are_read(tmp_path):
    write(tmp_path / "file", version=1)
    assert read(tmp_path / "file")[1] == METADATA


def test_newer_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "file"
    write(path, version=3)
    with pytest.raises(WeightsError, match=r"version '3' of test\.kind.*up to 2") as caught:
        read(path)
    assert "Upgrade" in caught.value.advice
    assert caught.value.where == str(path)
    write(path, schema="test.other")
    with pytest.raises(WeightsError, match=r"kind test\.other"):
        read(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match="not written by this library"):
        read(path)
    save_file({"a": torch.zeros(2)}, path, {"schema": "test.kind", "version": "x"})
    with pytest.raises(WeightsError, match="version 'x'"):
        read(path)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(WeightsError, match="no such file"):
        read(path)
    write(path)
    whole = path.read_bytes()
    for kept in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        with pytest.raises(WeightsError, match="damaged"):
            read(path)
    path.write_bytes(b"\x80\x02}q\x00." * 9)  # a pickle
    with pytest.raises(WeightsError, match="pickles"):
        read(path)
    for header in ({}, {"metadata": "{"}):
        save_file({}, path, {"schema": "test.kind", "version": "1"} | header)
        with pytest.raises(WeightsError, match="damaged"):
            read(path)
    with pytest.raises(WeightsError, match="damaged"):
        read(tmp_path)


def opened(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_any_changed_bit_is_noticed(tmp_path):
    path = tmp_path / "file"
    tensors = {"a": GRID[0].float() / 7, "b": torch.tensor([3, -1], dtype=torch.int32)}
    save_tensors(path, tensors, {"noise_variance": 0.5}, schema="test.kind", version=2)
    whole = path.read_bytes()
    for place in range(0, 8 * len(whole), 5):  # every byte, and each bit of it in turn
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(WeightsError):
            read(path)
    path.write_bytes(whole)
    assert read(path)[1] == {"noise_variance": 0.5}


def test_whole_contents_of_another_file_are_noticed(tmp_path):
    path = tmp_path / "file"
    write(path)
    header, tensors = opened(path)
    changes = [
        (header | {"version": "1"}, tensors),
        (header | {"metadata": header["metadata"].replace("true", "false")}, tensors),
        (header | {"more": ""}, tensors),
        (header, tensors | {"more": torch.zeros(1)}),
        (header, {name: tensor for name, tensor in tensors.items() if name != "none"}),
        (header, tensors | {"double": tensors["tied"], "tied": tensors["double"]}),
        (header, tensors | {"double": tensors["double"].reshape(4, 3)}),
        (header, tensors | {"double": tensors["double"].view(torch.int64)}),
    ]
    for changed in changes:
        save_file(changed[1], path, changed[0])
        with pytest.raises(WeightsError, match="damaged: its contents are not those") as caught:
            read(path)
        assert caught.value.where == str(path)
    save_file(tensors, path, header)
    assert read(path)[1] == METADATA


def test_a_file_without_checksum_is_refused(tmp_path):
    path = tmp_path / "file"
    write(path)
    header, tensors = opened(path)
    save_file(tensors, path, {key: header[key] for key in ("schema", "version", "metadata")})
    with pytest.raises(WeightsError, match="its checksum is missing"):
        read(path)


@pytest.mark.parametrize("path", [None, 3])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(OptionError, match=rf"^path: {path} is no path"):
        write(path)
    with pytest.raises(OptionError, match=rf"^path: {path} is no path"):
        read(path)


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(OptionError, match="Tensor is not JSON serializable"):
        save_tensors(tmp_path / "file", {}, {"a": torch.ones(1)}, schema="a", version=1)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match="cannot be made a folder"):
        write(tmp_path / "file" / "below")


def test_fingerprints_tell_tensors_apart():
    base = {"a": torch.zeros(2, 3), "b": torch.arange(3)}
    ours = fingerprint(base)
    assert fingerprint({"b": torch.arange(3), "a": torch.zeros(3, 2).T}) == ours
    for other in (
        {"a": torch.zeros(2, 3), "c": torch.arange(3)},
        {"a": torch.zeros(3, 2), "b": torch.arange(3)},
        {"a": torch.zeros(2, 3), "b": torch.arange(3).int()},
        {"a": torch.full((2, 3), -0.0), "b": torch.arange(3)},
        {"a": torch.zeros(2, 3)},
    ):
        assert fingerprint(other) != ours
    assert fingerprint({k: v for k, v in TENSORS.items() if k != "none"}) != fingerprint(TENSORS)


# Checkpoints

IDENTITY = {"seed": 3, "model": "f" * 40, "settings": {"draws": 8, "prior": None, "rate": 0.1}}


def test_a_checkpoint_returns_the_last_state(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run", IDENTITY)
    assert checkpoint.load() is None
    assert not checkpoint.path.exists()
    for step in range(3):
        checkpoint.save({"draws": GRID + step}, {"step": step, "error": 0.1 * step})
    tensors, state = Checkpoint(str(tmp_path / "run"), IDENTITY).load()
    assert torch.equal(tensors["draws"], GRID + 2)
    assert state == {"step": 2, "error": 0.1 * 2}


def test_a_damaged_checkpoint_is_refused(tmp_path):
    checkpoint = Checkpoint(tmp_path, IDENTITY)
    checkpoint.save({"draws": GRID}, {"step": 1})
    whole = bytearray(checkpoint.path.read_bytes())
    whole[-1] ^= 0x40  # the exponent of the last draw
    checkpoint.path.write_bytes(whole)
    with pytest.raises(WeightsError, match="damaged") as caught:
        checkpoint.load()
    assert "begins again" in caught.value.advice


def test_tuples_in_an_identity_are_lists():
    checkpoint = Checkpoint("nowhere", {"shape": (1, 2)})
    assert checkpoint.load() is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"seed": True}, "seed was 3 and is true"),
        ({"settings": IDENTITY["settings"] | {"draws": 9}}, r"settings\.draws was 8 and is 9"),
        ({"settings": IDENTITY["settings"] | {"prior": 1}}, r"settings\.prior was null and is 1"),
        ({"settings": {"draws": 8, "rate": 0.1}}, r"settings\.prior was null and is absent"),
        ({"settings": None}, r"settings was \{.*\.\.\. and is null"),
        ({"data": "0"}, 'data was absent and is "0"'),
        ({"model": "0", "seed": 4}, r'seed was 3 and is 4; model was "f+\.\.\. and is "0"'),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, changed, message):
    Checkpoint(tmp_path, IDENTITY).save({}, {})
    with pytest.raises(WeightsError, match=message) as caught:
        Checkpoint(tmp_path, IDENTITY | changed).load()
    assert "another folder" in caught.value.advice
    assert caught.value.what.count(" was ") == len(changed)


def test_the_same_identity_in_other_words_is_the_same(tmp_path):
    identity = {"shape": (1, 2), "limit": float("nan"), "bound": float("inf")}
    Checkpoint(tmp_path, identity).save({}, {"a": 1})
    same = {"bound": float("inf"), "limit": float("nan"), "shape": [1, 2]}
    assert Checkpoint(tmp_path, same).load() == ({}, {"a": 1})


@pytest.mark.parametrize("moment", ["save_file", "_flush", "os.replace"])
def test_a_failure_while_writing_keeps_the_state(tmp_path, monkeypatch, moment):
    checkpoint = Checkpoint(tmp_path, IDENTITY)
    checkpoint.save({"draws": GRID}, {"step": 1})

    def fail(*_args, **_options):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(f"{store.__name__}.{moment}", fail)
        with pytest.raises(OSError, match="full"):
            checkpoint.save({"draws": GRID + 1}, {"step": 2})
    assert os.listdir(tmp_path) == [checkpoint.path.name]
    tensors, state = checkpoint.load()
    assert state == {"step": 1}
    assert torch.equal(tensors["draws"], GRID)


KILLED = """
import os, signal, sys, torch
from pushforward.runs import store

def killed(path):
    os.kill(os.getpid(), signal.SIGKILL)

store._flush = killed
store.Checkpoint(sys.argv[1], {}).save({"draws": torch.ones(1000)}, {"step": 2})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal there")
def test_a_process_killed_while_writing_keeps_the_state(tmp_path):
    checkpoint = Checkpoint(tmp_path, {})
    checkpoint.save({"draws": GRID}, {"step": 1})
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 2  # the state and what is left of the next one
    assert checkpoint.load()[1] == {"step": 1}
    checkpoint.save({}, {"step": 2})
    assert os.listdir(tmp_path) == [checkpoint.path.name]
