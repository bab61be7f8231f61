"""Two processes that share chains give the draws of one."""

import pytest
import torch

from processes import run_together
from pushforward.errors import OptionError, SamplingError, WeightsError
from sampling_kernels import Dying, Stopping, run, tensors_of

# Chains on the left leave at their first step.
HERE, LOST = (5.0, 0.0), (-5.0, 0.0)


def both(parameters):
    return {"double": 2 * parameters["layer.w"], "positive": parameters["layer.w"][0] > 0}


def shared(_rank, folder):
    found = {
        "even": run(record=both),
        "uneven": run(num_chains=5, thin=2, chunk_size=2),
        "moments": run(num_chains=3, keep_parameters=False, record=both),
        "begun": run(initial={"layer.w": torch.arange(8, dtype=torch.float64).reshape(4, 2)}),
    }
    if folder is not None:
        found |= {"saved": run(checkpoint=folder), "read": run(checkpoint=folder)}
    return {f"{name} {key}": t for name, c in found.items() for key, t in tensors_of(c).items()}


class Crash(RuntimeError):
    pass


def crash():
    raise Crash


def failing(rank, folder):
    found = {}
    with pytest.raises(OptionError, match="num_chains"):
        run(num_chains=1)
    # All chains of one process are lost: the other does not wait for it in vain.
    starts = torch.tensor([LOST, LOST, HERE, HERE], dtype=torch.float64)
    dying = Dying(step_size=0.01)
    some = run(dying, initial={"layer.w": starts}, num_warmup=0)
    assert {check.name: check.status for check in some.run_checks}["chains-alive"] == "fail"
    found["alive"] = some.moments.mean["layer.w"][:, 0].isfinite()
    with pytest.raises(SamplingError, match="all 4 chains"):
        run(dying, initial={"layer.w": starts[:2].repeat(2, 1)}, num_warmup=0)
    # Killed at different steps, both go on from where they were.
    with pytest.raises(Crash):
        run(Stopping(after=10 + 25 * rank, action=crash), checkpoint=folder)
    with pytest.raises(WeightsError, match="num_chains was 4 and is 5"):
        run(num_chains=5, checkpoint=folder)
    found["draws"] = run(checkpoint=folder).parameters["layer.w"]
    return found


def work(rank, folder):
    return shared(rank, f"{folder}/finished") | failing(rank, f"{folder}/killed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """Of both processes; made once, because starting them takes longer than all they do."""
    return run_together(2, tmp_path_factory.mktemp("group"), work, str(folder))


def test_sharing_the_chains_gives_the_draws_of_one_process(results):
    alone = shared(0, None)
    alone |= {f"{n} {key}": t for n in ("saved", "read") for key, t in tensors_of(run()).items()}
    assert len(alone) > 40
    for key, value in alone.items():
        assert torch.equal(results[0][key], results[1][key]), key
        if key.startswith("moments ") and key.endswith("layer.w"):  # rounds as segments have it
            torch.testing.assert_close(results[0][key], value, rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(results[0][key], value), key


def test_processes_keep_checkpoints_of_their_own(results, folder):
    assert len(results) == 2
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("state.safetensors"))
    assert files == [
        f"{run}/chains-{rank}/state.safetensors"
        for run in ("finished", "killed")
        for rank in (0, 1)
    ]


def test_what_goes_wrong_goes_wrong_for_all(results):
    """What is not here is in `failing`, which would not have come to its end."""
    for result in results:
        assert result["alive"].tolist() == [False, False, True, True]
        assert torch.equal(result["draws"], run().parameters["layer.w"])
