"""Chains come back from their file as they were."""

import dataclasses

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pushforward.errors import WeightsError
from pushforward.runs.store import load_tensors, save_tensors
from pushforward.sampling.chains import Chains
from pushforward.sampling.storage import load_chains, save_chains
from sampling_kernels import RandomWalk, assert_same, normal_potential, run


def record(parameters):
    w = parameters["layer.w"]
    return {"z": w.sum(), "a/b:c": w[None] * 2, "flag": w > 0, "half": w.half(), "n": w.long()}


def assert_equal(found, expected):
    assert_same(found, expected)
    for field in dataclasses.fields(Chains):
        if field.metadata.get("json", True):
            assert getattr(found, field.name) == getattr(expected, field.name), field.name
    assert found.moments.count == expected.moments.count
    assert found.to_dict() == expected.to_dict()
    assert repr(found) == repr(expected)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_everything_comes_back(tmp_path, keep, dtype):
    kernel = RandomWalk(normal_potential(dtype), step_size=0.1 + 0.2)
    chains = run(kernel, record=record, keep_parameters=keep, thin=2)
    path = tmp_path / "folder" / "chains.safetensors"
    save_chains(chains, path)
    found = load_chains(path)
    assert_equal(found, chains)
    assert list(found.observations) == list(chains.observations)
    types = {name: value.dtype for name, value in found.observations.items()}
    assert types["flag"] == torch.bool
    assert types["half"] == torch.float16
    assert types["n"] == torch.int64
    assert types["z"] == dtype


def test_names_keep_their_order(tmp_path):
    parameters = {"z": torch.randn(2, 9, 3), "a": torch.randn(2, 9), "m.b": torch.randn(2, 9, 1)}
    chains = dataclasses.replace(run(num_chains=2, num_draws=9), parameters=parameters)
    save_chains(chains, tmp_path / "c")
    assert list(load_chains(tmp_path / "c").parameters) == ["z", "a", "m.b"]


def test_parts_that_are_empty_and_numbers_that_are_not_finite(tmp_path):
    chains = run(num_draws=1, num_warmup=0)
    assert chains.warmup_statistics == {}
    assert chains.moments.variance["layer.w"].isnan().all()
    save_chains(chains, tmp_path / "c")
    assert_equal(load_chains(tmp_path / "c"), chains)


def test_files_are_replaced(tmp_path):
    first, second = run(), run(seed=8)
    save_chains(first, tmp_path / "c")
    save_chains(second, tmp_path / "c")
    assert_equal(load_chains(tmp_path / "c"), second)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "c"
    save_chains(run(), path)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\x80\x04pickle", whole[:-3] + b"abc"):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"damaged|safetensors"):
            load_chains(path)
    with pytest.raises(WeightsError, match="no such file"):
        load_chains(tmp_path / "absent")


@pytest.mark.parametrize("missing", ["statistics:potential", "mean:layer.w"])
def test_files_that_lack_a_part_are_refused(tmp_path, missing):
    path = tmp_path / "c"
    save_chains(run(), path)
    tensors, metadata = load_tensors(path, schema="pushforward.chains", version=1)
    del tensors[missing]
    save_tensors(path, tensors, metadata, schema="pushforward.chains", version=1)
    with pytest.raises(WeightsError, match="damaged: its contents do not belong together"):
        load_chains(path)


def test_contents_of_another_shape_are_refused(tmp_path):
    save_tensors(tmp_path / "c", {}, {"names": []}, schema="pushforward.chains", version=1)
    with pytest.raises(WeightsError, match="damaged"):
        load_chains(tmp_path / "c")


def test_other_kinds_and_newer_versions_are_refused(tmp_path):
    path = tmp_path / "c"
    save_chains(run(), path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    save_file({"x": torch.zeros(1)}, path, metadata=header | {"version": "2"})
    with pytest.raises(WeightsError, match=r"version '2' of pushforward\.chains"):
        load_chains(path)
    save_tensors(path, {}, {}, schema="pushforward.laplace", version=1)
    with pytest.raises(WeightsError, match=r"kind pushforward\.laplace"):
        load_chains(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="not written by this library"):
        load_chains(path)
