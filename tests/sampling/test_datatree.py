"""Draws in the schema of ArviZ, which survive a file."""

import builtins
import json
import sys
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch

from pushforward.errors import OptionError
from pushforward.sampling.datatree import to_datatree
from sampling_kernels import run

xarray = pytest.importorskip("xarray")


@pytest.fixture(scope="module")
def chains():
    found = run(record=lambda p: {"out": p["layer.w"].expand(3, 2), "a/b": p["layer.w"].sum()})
    more = {
        "tree_depth": torch.full((4, 30), 3.0, dtype=torch.float64),
        "leapfrog_steps": torch.full((4, 30), 7.0, dtype=torch.float64),
        "thermostat": torch.randn(4, 30, dtype=torch.float64),
    }
    return replace(found, statistics=found.statistics | more)


def test_groups_and_dimensions(chains):
    tree = to_datatree(chains)
    assert set(tree.children) == {
        "posterior", "sample_stats", "warmup_sample_stats", "posterior_predictive",
    }  # fmt: skip
    assert tree["posterior"]["layer.w"].dims == ("chain", "draw", "layer.w_dim_0")
    assert tree["posterior_predictive"]["out"].dims == ("chain", "draw", "out_dim_0", "out_dim_1")
    assert tree["posterior_predictive"]["a_b"].dims == ("chain", "draw")
    for group, draws in (("posterior", 30), ("sample_stats", 30), ("warmup_sample_stats", 20)):
        dataset = tree[group]
        assert dataset["chain"].values.tolist() == list(range(4))
        assert dataset["draw"].values.tolist() == list(range(draws))


def test_values(chains):
    tree = to_datatree(chains)
    for group, kept in (
        ("posterior", chains.parameters),
        ("posterior_predictive", chains.observations),
    ):
        for name, value in kept.items():
            assert np.array_equal(tree[group][name.replace("/", "_")].values, value.numpy())


def test_statistics_have_the_names_of_arviz(chains):
    found = to_datatree(chains)["sample_stats"]
    ours = chains.statistics
    assert set(found.data_vars) == {
        "acceptance_rate", "potential", "lp", "step_size", "diverging", "tree_depth", "n_steps",
        "thermostat",
    }  # fmt: skip
    assert np.array_equal(found["lp"].values, -ours["potential"].numpy())
    assert np.array_equal(found["potential"].values, ours["potential"].numpy())
    assert np.array_equal(found["acceptance_rate"].values, ours["acceptance"].numpy())
    assert found["diverging"].dtype == bool
    assert found["n_steps"].dtype == found["tree_depth"].dtype == np.int64
    assert (found["n_steps"] == 7).all()
    warmup = to_datatree(chains)["warmup_sample_stats"]
    assert set(warmup.data_vars) == {"acceptance_rate", "potential", "lp", "step_size", "diverging"}


def test_counts_that_are_not_finite_stay_numbers(chains):
    lost = chains.statistics["leapfrog_steps"].clone()
    lost[1, 3] = torch.nan
    tree = to_datatree(replace(chains, statistics=chains.statistics | {"leapfrog_steps": lost}))
    assert np.isnan(tree["sample_stats"]["n_steps"].values).sum() == 1


def test_what_is_empty_is_not_there():
    tree = to_datatree(run(num_warmup=0, keep_parameters=False))
    assert set(tree.children) == {"sample_stats"}


def test_attributes(chains):
    tree = to_datatree(chains)
    for attributes in (tree.attrs, tree["posterior"].attrs):
        assert attributes["inference_library"] == "pushforward"
        assert attributes["inference_library_version"] == version("pushforward")
        assert (attributes["kernel"], attributes["seed"]) == ("RandomWalk", 7)
        assert (attributes["num_warmup"], attributes["thin"]) == (20, 1)
        assert attributes["sampling_time"] == chains.cost.seconds
        assert json.loads(attributes["settings"]) == chains.settings


def test_a_file_and_back(chains, tmp_path):
    single = {name: value.float() for name, value in chains.parameters.items()}
    rough = {"half": torch.randn(4, 30, 2).half(), "brain": torch.randn(4, 30).bfloat16()}
    tree = to_datatree(replace(chains, parameters=single, observations=chains.observations | rough))
    tree.to_netcdf(tmp_path / "chains.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "chains.nc", engine="h5netcdf") as found:
        assert found.load().identical(tree)
    assert tree["posterior"]["layer.w"].dtype == np.float32
    assert tree["posterior_predictive"]["brain"].dtype == np.float32


def test_arviz_sees_what_we_see(chains):
    """The same numbers as `Chains.diagnosis`, from the array that ArviZ would look at."""
    from arviz_stats.base.array import array_stats

    values = to_datatree(chains)["posterior"]["layer.w"].values
    r_hat = array_stats.rhat(values, chain_axis=0, draw_axis=1, method="rank")
    assert np.array_equal(r_hat, chains.diagnosis["layer.w"].r_hat.numpy())


def test_arviz_summarises(chains):
    arviz_stats = pytest.importorskip("arviz_stats")
    if not hasattr(arviz_stats, "summary"):
        pytest.skip("arviz-base is not installed")
    table = arviz_stats.summary(to_datatree(chains), round_to="none")
    assert list(table.index) == ["layer.w[0]", "layer.w[1]"]
    mean = chains.parameters["layer.w"].mean((0, 1))
    assert table["mean"].astype(float).to_numpy() == pytest.approx(mean.numpy())
    r_hat = chains.diagnosis["layer.w"].r_hat
    assert table["r_hat"].astype(float).to_numpy() == pytest.approx(r_hat.numpy())


def test_without_xarray(chains, monkeypatch):
    original = builtins.__import__

    def refusing(name, *args, **kwargs):
        if name == "xarray":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "xarray")
    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(OptionError, match=r"pip install 'pushforward\[xarray\]'"):
        to_datatree(chains)
