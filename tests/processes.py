"""Several processes on this machine, joined by gloo, for tests of distributed runs."""

import importlib.util
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file, save_file

_PATIENCE = timedelta(seconds=60)  # for a process that waits for one that has failed


def run_together(count, folder, worker, *args):
    """What `worker(rank, *args)`, a function of a test file, gives on each of `count` processes.

    `folder` is empty. The worker returns a dict of tensors; arguments are picklable.
    """
    path, name = worker.__code__.co_filename, worker.__name__
    torch.multiprocessing.spawn(_enter, (count, str(folder), path, name, args), nprocs=count)
    return [load_file(_result(folder, rank)) for rank in range(count)]


def _enter(rank, count, folder, path, name, args):
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # no other interface need be there
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=count,
        timeout=_PATIENCE,
    )
    try:
        # By its path: test files are not modules that another process could import by name.
        spec = importlib.util.spec_from_file_location("worker", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        result = getattr(module, name)(rank, *args)
        save_file({key: value.contiguous() for key, value in result.items()}, _result(folder, rank))
    finally:
        dist.destroy_process_group()


def _result(folder, rank):
    return f"{folder}/result-{rank}.safetensors"
