"""Two processes that share chains give the result of one."""

import torch

from degeneracy_problems import estimate, regression
from processes import run_together


def shared(_rank):
    net, data, _ = regression()
    options = {"num_chains": 4, "num_draws": 20, "num_warmup": 30, "batch_size": 9}
    found = estimate(net, data, sampler="langevin", localization=5.0, **options)
    names = ("value", "standard_error", "excess", "warmup_excess", "losses")
    return {name: getattr(found, name) for name in names}


def test_two_processes_give_the_value_of_one(tmp_path):
    together, alone = run_together(2, tmp_path, shared), shared(0)
    for key, value in alone.items():
        assert torch.equal(together[0][key], together[1][key]), key
        torch.testing.assert_close(together[0][key], value, rtol=1e-9, atol=1e-9, msg=key)
