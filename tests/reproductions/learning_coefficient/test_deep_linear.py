"""Deep linear networks whose coefficient is known, estimated in a moment."""

import importlib
import json

import pytest
import torch

from pushforward.degeneracy.deep_linear_points import deep_linear_local


@pytest.fixture
def study():
    return importlib.import_module("reproductions.learning_coefficient.deep_linear")


@pytest.fixture
def main():
    return importlib.import_module("reproductions.learning_coefficient.__main__").main


@pytest.mark.parametrize("points", ["generic", "reduced"])
@pytest.mark.parametrize("seed", range(4))
def test_the_truth_of_a_network_is_that_of_its_factors(study, points, seed, tmp_path):
    group = study.Group((2, 6), (2, 3), 1e5, 5e-7, 40)
    options = study.DeepLinear(tmp_path, points=points)
    generator = torch.Generator().manual_seed(seed)
    widths, ranks = study._drawn(options, group, generator)
    net = study.linear_network(widths, ranks, generator)
    factors = [layer.weight.detach() for layer in net]
    assert [int(torch.linalg.matrix_rank(factor)) for factor in factors] == ranks
    assert deep_linear_local(study.stand_ins(widths, ranks)) == deep_linear_local(factors)


def test_inputs_have_the_moments_of_the_uniform_law(study, tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = study._inputs(study.DeepLinear(tmp_path), 3, generator)
    torch.testing.assert_close(x.T @ x / 3, 100 / 3 * torch.eye(3, dtype=torch.float64))
    options = study.DeepLinear(tmp_path, inputs="uniform", examples=20_000)
    x = study._inputs(options, 2, generator)
    assert -10 <= x.min() <= -9.9
    assert 9.9 <= x.max() <= 10
    # The standard deviation of a square is 29.8: 4.7 standard errors.
    torch.testing.assert_close(
        x.T @ x / 20_000, 100 / 3 * torch.eye(2, dtype=torch.float64), atol=1.0, rtol=0
    )


@pytest.mark.parametrize("method", ["hmc", "published"])
def test_networks_are_estimated_once(study, main, method, tmp_path, capsys, monkeypatch):
    small = study.Group((2, 4), (2, 2), 1e3, 1e-6, 160)
    monkeypatch.setitem(study.GROUPS, "5-50", small)
    call = ["deep-linear", "--output", str(tmp_path), "--networks", "1", "--method", method]
    call += ["--chains", "2", "--draws", "16", "--warmup", "16"]
    assert main(call) == 0
    path = tmp_path / f"deep-linear-5-50-generic-{method}-0.json"
    found = json.loads(path.read_text("utf-8"))
    assert 0.3 * found["lambda"] < found["value"] < 2 * found["lambda"]
    assert found["num_draws"] == 16
    assert found["sampler"] == {"hmc": "hmc", "published": "sgld"}[method]
    table = (tmp_path / f"deep-linear-5-50-generic-{method}.md").read_text("utf-8")
    assert "published, all groups, from lambda: -18 %" in table
    assert table in capsys.readouterr().out
    written = path.stat().st_mtime_ns
    assert main(call) == 0
    assert path.stat().st_mtime_ns == written
    assert main([*call, "--group", "1-2"]) == 2
    assert "there is no group" in capsys.readouterr().err


def test_quartiles_of_several_errors(study):
    assert study._quartiles([0.1]) == "+10.0%"
    assert study._quartiles([0.0, 0.1, 0.2]) == "+10.0%, quartiles +5.0% and +15.0%"
