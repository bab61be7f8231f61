"""Two processes that share data, or draws, give the posterior of one."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import pushforward as pf
from laplace_scenarios import PROBLEMS, counts
from processes import run_together
from pushforward.linearised_laplace import fit
from pushforward.linearised_laplace.linear_model import NOISE_BLOCK
from pushforward.runs.distributed import ProcessGrid

# Three blocks of noise: one process has more of the data than the other.
_NET, _X, _Y = counts(2 * NOISE_BLOCK + 40, seed=4)
PROBLEM = replace(PROBLEMS["poisson"], net=_NET, x=_X, y=_Y)
REGRESSION = replace(PROBLEMS["gaussian"], likelihood=pf.Gaussian())


def sampled(problem, **settings):
    defaults = {"num_draws": 7, "tolerance": 0.05, "seed": 3, "method": "sampled"}
    return pf.laplace(problem.net, problem.data, problem.likelihood, **(defaults | settings))


def summary(posterior):
    return {
        "draws": posterior.draws,
        "gamma": posterior.effective_dimension.value.reshape(1),
        "layers": posterior.layer_effective_dimension.value,
        "precision": posterior.prior.precision,
        "error": posterior.effective_dimension.standard_error.reshape(1),
        "noise": torch.tensor([posterior.noise_variance or 0.0], dtype=torch.float64),
    }


def by_data(_rank, recycled):
    with pytest.MonkeyPatch.context() as patch:
        if not recycled:
            patch.setattr(fit, "recyclable", lambda _linear: 0)
        return {
            f"{name} {key}": value
            for name, problem, settings in CASES
            for key, value in summary(sampled(problem, **settings)).items()
        }


CASES = [
    ("given", PROBLEM, {"prior_precision": 2.0}),
    ("learned", PROBLEM, {"prior": "layerwise"}),
    ("g-prior", PROBLEM, {"prior": "gprior"}),
    ("noise", REGRESSION, {}),
]


# Sums by two processes round differently. On networks as small as these the draws' block soon
# spans all weights, which multiplies rounding; directions that are recycled multiply it again.
@pytest.mark.parametrize(("recycled", "exactness"), [(False, 1e-7), (True, 1e-6)])
def test_sharing_the_data_gives_the_result_of_one_process(tmp_path, recycled, exactness):
    results = run_together(2, tmp_path, by_data, recycled)
    for key, value in by_data(0, recycled).items():
        assert torch.equal(results[0][key], results[1][key]), key
        torch.testing.assert_close(results[0][key], value, rtol=exactness, atol=exactness, msg=key)


def by_draws(_rank, recycled):
    given = {"data_shards": 1, "prior_precision": 2.0, "block": 4}
    with pytest.MonkeyPatch.context() as patch:
        if not recycled:
            patch.setattr(fit, "recyclable", lambda _linear: 0)
        found = {
            "even": sampled(PROBLEM, **given, num_draws=8),
            "uneven": sampled(PROBLEM, **given, num_draws=7),
            "many blocks": sampled(PROBLEM, **given, num_draws=11),
            "learned": sampled(PROBLEM, data_shards=1, num_draws=8, block=4),
            "g-prior": sampled(PROBLEM, **given, num_draws=7, prior="gprior"),
        }
    return {
        f"{name} {key}": value
        for name, posterior in found.items()
        for key, value in summary(posterior).items()
    }


# What one block of draws teaches about the curvature is not there for the other process's blocks:
# then draws agree as well as they are solved.
@pytest.mark.parametrize(("recycled", "exactness"), [(False, 1e-12), (True, 1e-12)])
def test_sharing_the_draws_gives_the_result_of_one_process(tmp_path, recycled, exactness):
    results = run_together(2, tmp_path, by_draws, recycled)
    alone = by_draws(0, recycled)
    for name, count in {"even": 8, "uneven": 7, "many blocks": 11}.items():
        assert len(alone[f"{name} draws"]) == count
    for key, value in alone.items():
        assert torch.equal(results[0][key], results[1][key]), key
        torch.testing.assert_close(results[0][key], value, rtol=exactness, atol=exactness, msg=key)


def resumed_worker(_rank, folder):
    first = sampled(PROBLEM, data_shards=1, num_draws=8, block=4, checkpoint=folder)
    second = sampled(PROBLEM, data_shards=1, num_draws=8, block=4, checkpoint=folder)
    assert torch.equal(first.draws, second.draws)
    third = sampled(PROBLEM, data_shards=2, num_draws=8, checkpoint=f"{folder}-data")
    fourth = sampled(PROBLEM, data_shards=2, num_draws=8, checkpoint=f"{folder}-data")
    assert torch.equal(third.draws, fourth.draws)
    return {"draws": second.draws}


def test_processes_keep_checkpoints_of_their_own(tmp_path):
    (tmp_path / "group").mkdir()
    run_together(2, tmp_path / "group", resumed_worker, str(tmp_path / "state"))
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("state.safetensors"))
    assert files == [
        "state-data/state.safetensors",
        "state/draws-0/state.safetensors",
        "state/draws-1/state.safetensors",
    ]


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_shares_are_whole_blocks_of_noise(shards):
    linears = [PROBLEM.linear(grid=ProcessGrid(1, shards, 0, i)) for i in range(shards)]
    shares = [linear._share for linear in linears]
    assert shares[0][0] == 0
    assert shares[-1][1] == len(_X)
    for (_, end), (start, _) in pairwise(shares):
        assert end == start
        assert end % NOISE_BLOCK == 0 or end == len(_X)


def test_partial_sketches_add_up(monkeypatch):
    whole = PROBLEM.linear().sketch(range(3), 5)
    monkeypatch.setattr(ProcessGrid, "sum_over_data", lambda _grid, tensor: tensor)
    parts = [PROBLEM.linear(grid=ProcessGrid(1, 2, 0, i)).sketch(range(3), 5) for i in range(2)]
    torch.testing.assert_close(sum(part.vectors for part in parts), whole.vectors)
    torch.testing.assert_close(sum(part.diagonal for part in parts), whole.diagonal)
