"""Samplers race on targets that are one density in both forms."""

import json

import pytest
import torch


def test_samplers_are_judged_by_effective_draws(benchmark, tmp_path):
    script = benchmark("samplers")
    assert script.main(["--quick", "--chains", "2", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "samplers.json").read_text("utf-8"))["runs"]
    made = [(row["sampler"], row["mass"]) for row in rows]
    assert made == [(s, m) for m in ("diagonal", "dense") for s in ("NUTS", "HMC")]
    assert all(row["effective"] > 0 and row["largest z of a mean"] < 10 for row in rows)


@pytest.mark.parametrize("name", ["gaussian", "logistic", "network"])
def test_a_target_is_one_density_in_both_forms(benchmark, name):
    script = benchmark("samplers")
    target = script.TARGETS[name]()
    points = 0.1 * torch.randn(3, target.size, dtype=torch.float64)
    together = target.torch_log_density({"x": points})
    assert together.shape == (3,)
    alone = torch.cat([target.torch_log_density({"x": point[None]}) for point in points])
    torch.testing.assert_close(together, alone)
    if name == "gaussian":
        theirs = torch.tensor([target.jax_log_density(point.numpy()) for point in points])
        torch.testing.assert_close(together, theirs.double())
