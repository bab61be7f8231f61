"""Towers of the library written out as dense symmetric tensors."""

import itertools

import numpy as np
import torch

from oracles.dense_cumulants import expand_core
from pushforward.cumulants.towers import FactoredThird, RadialThird

__all__ = ["assert_tower", "dense_fourth", "dense_third", "symmetric"]


def symmetric(tensor):
    """Average over all orders of the axes."""
    orders = list(itertools.permutations(range(tensor.dim())))
    return sum(tensor.permute(order) for order in orders) / len(orders)


def dense_third(tower):
    """``(n, n, n)`` third cumulant of an unbatched tower; zero where none is tracked."""
    n = tower.mean.shape[-1]
    if isinstance(tower.third, RadialThird):
        core, metric = tower.third.core.detach(), tower.resolved_metric().detach()
        return torch.from_numpy(expand_core(core.numpy(), metric.numpy(), 3))
    total = torch.zeros(n, n, n, dtype=torch.float64)
    if isinstance(tower.third, FactoredThird):
        for source in tower.third.sources:
            paths = torch.einsum(
                "r,ir,jr,kr->ijk", 3 * source.gain, source.edge, source.edge, source.leg
            )
            slices = torch.einsum("ir,jr,kr->ijk", source.rest, source.leg, source.leg)
            total = total + symmetric(paths + slices)
    return total.detach()


def dense_fourth(tower):
    """``(n, n, n, n)`` fourth cumulant of an unbatched tower."""
    core = np.zeros(()) if tower.fourth is None else tower.fourth.detach().numpy()
    metric = tower.resolved_metric().detach().numpy()
    return torch.from_numpy(expand_core(np.asarray(core), metric, 4))


def assert_tower(tower, cumulants, *, rtol=0.0, atol=1e-12):
    """Every tracked cumulant, and the slices that the library computes without the tensor."""
    found = {1: tower.mean, 2: tower.covariance}
    n = tower.mean.shape[-1]
    diagonal = torch.arange(n)
    if 3 in cumulants:
        found[3] = dense_third(tower)
        expected = torch.from_numpy(cumulants[3])
        pairs, single = tower.pair_third(), tower.marginal_third()
        i, j = torch.meshgrid(diagonal, diagonal, indexing="ij")
        zero = torch.zeros(n, dtype=torch.float64)
        single = zero if single is None else single
        torch.testing.assert_close(
            single, expected[diagonal, diagonal, diagonal], rtol=rtol, atol=atol
        )
        if pairs is not None:
            torch.testing.assert_close(pairs, expected[i, i, j], rtol=rtol, atol=atol)
    if 4 in cumulants:
        found[4] = dense_fourth(tower)
        expected = torch.from_numpy(cumulants[4])
        i, j = torch.meshgrid(diagonal, diagonal, indexing="ij")
        if tower.fourth is not None:
            torch.testing.assert_close(
                tower.pair_fourth(), expected[i, i, j, j], rtol=rtol, atol=atol
            )
            torch.testing.assert_close(
                tower.marginal_fourth(), expected[tuple([diagonal] * 4)], rtol=rtol, atol=atol
            )
    for degree, tensor in found.items():
        if degree in cumulants:
            torch.testing.assert_close(
                tensor.detach(), torch.from_numpy(cumulants[degree]), rtol=rtol, atol=atol
            )
