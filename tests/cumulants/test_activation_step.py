"""One activation layer against the dense oracle, whatever cumulants come in."""

import numpy as np
import pytest
import torch
from torch import nn

from oracles.dense_cumulants import activation_step, radial_core
from oracles.dense_towers import assert_tower, dense_fourth, dense_third
from oracles.wick import ACTIVATIONS
from pushforward.cumulants import pair_expansion
from pushforward.cumulants.activation_step import activate, hermite_tables, positive_std
from pushforward.cumulants.towers import CumulantTower, FactoredThird, RadialThird, Source
from pushforward.gaussians.activations import identity
from pushforward.networks.activations import activation_of_module
from pushforward.networks.graph import UnitGroup
from scenarios import normal

N = 6
ORACLE_ORDER = {"covariance": (2, False), "radial": (2, True), "full": (3, False)}
closures = pytest.mark.parametrize("closure", ORACLE_ORDER)


def layer(*names):
    """Groups of equal size with the named activations, and what the oracle calls them."""
    modules = {
        "relu": nn.ReLU(),
        "gelu": nn.GELU(),
        "tanh": nn.Tanh(),
        "softplus": nn.Softplus(),
        "hardtanh": nn.Hardtanh(),
        "elu": nn.ELU(),
    }
    size = N // len(names)
    groups, units = [], []
    for index, name in enumerate(names):
        activation = identity() if name == "identity" else activation_of_module(modules[name])
        place = slice(index * size, (index + 1) * size)
        groups.append(UnitGroup(name, "before", activation, place))
        units += [ACTIVATIONS[name]] * size
    return tuple(groups), units


def covariance(seed, correlation=0.3):
    root = correlation * normal(seed, N, N)
    return root @ root.T + torch.diag(0.5 + normal(seed + 1, N).abs())


def tower(closure, seed=0):
    """Small higher cumulants of the kind that the closure tracks, over a general metric."""
    fourth = torch.tensor(-0.05, dtype=torch.float64)
    metric = covariance(seed + 2)
    if closure == "covariance":
        third = fourth = metric = None
    elif closure == "radial":
        third = RadialThird(0.1 * normal(seed + 3, N))
    else:
        parts = [0.3 * normal(seed + 4 + i, N, 3) for i in range(3)]
        third = FactoredThird((Source(*parts, normal(seed + 9, 3)),))
    return CumulantTower(normal(seed + 10, N), covariance(seed), third, fourth, metric)


def dense(one, closure):
    cumulants = {1: one.mean.numpy(), 2: one.covariance.numpy()}
    if closure != "covariance":
        cumulants |= {3: dense_third(one).numpy(), 4: dense_fourth(one).numpy()}
    return cumulants


def projected(tensor, radial):
    return torch.from_numpy(np.asarray(radial_core(np.asarray(tensor), radial)))


LAYERS = [
    ("relu",),
    ("gelu",),
    ("softplus",),
    ("relu", "tanh"),
    ("hardtanh", "identity"),
    ("elu", "identity", "gelu"),
]


@closures
@pytest.mark.parametrize("names", LAYERS, ids="-".join)
@pytest.mark.parametrize("gaussian", [False, True], ids=["cumulants", "gaussian"])
def test_a_layer_is_that_of_the_oracle(closure, names, gaussian):
    groups, functions = layer(*names)
    one = tower(closure)
    if gaussian:
        one = CumulantTower(one.mean, one.covariance)
    order, augmented = ORACLE_ORDER[closure]
    expected = activation_step(dense(one, closure), functions, order, augmented)
    found, report = activate(one, groups, closure, None)
    if closure == "radial":
        core = projected(expected.pop(3), 1)
        torch.testing.assert_close(found.third.core, core, rtol=0, atol=1e-12)
    if closure != "covariance":
        core = projected(expected.pop(4), 2)
        torch.testing.assert_close(found.fourth, core, rtol=0, atol=1e-12)
    assert_tower(found, {d: expected[d] for d in expected if d <= 3})
    assert found.metric is None
    assert report.negative_variances == report.strong_pairs == 0
    assert report.pairs == N * (N - 1) // 2


@closures
def test_a_batch_is_its_members(closure):
    groups, _ = layer("relu", "tanh")
    ones = [tower(closure, seed) for seed in (0, 100, 200)]
    ones = [CumulantTower(o.mean, o.covariance, o.third, o.fourth, ones[0].metric) for o in ones]

    def stack(parts):
        return torch.stack(list(parts))

    third = fourth = None
    if closure == "radial":
        third = RadialThird(stack(o.third.core for o in ones))
    elif closure == "full":
        sources = [o.third.sources[0] for o in ones]
        names = ("leg", "edge", "rest", "gain")
        third = FactoredThird((Source(*(stack(getattr(s, n) for s in sources) for n in names)),))
    if closure != "covariance":
        fourth = stack(o.fourth for o in ones)
    batch = CumulantTower(
        stack(o.mean for o in ones),
        stack(o.covariance for o in ones),
        third,
        fourth,
        ones[0].metric,
    )
    for exact_above in (None, 0.2):
        found, report = activate(batch, groups, closure, exact_above)
        singles = [activate(one, groups, closure, exact_above) for one in ones]
        assert report.strong_pairs == sum(r.strong_pairs for _, r in singles)
        assert report.pairs == sum(r.pairs for _, r in singles)
        for index, (single, _) in enumerate(singles):
            torch.testing.assert_close(found.mean[index], single.mean)
            torch.testing.assert_close(found.covariance[index], single.covariance)
            if closure != "covariance":
                torch.testing.assert_close(found.fourth[index], single.fourth)
                torch.testing.assert_close(
                    found.marginal_third()[index], single.marginal_third(), rtol=1e-9, atol=1e-13
                )
                torch.testing.assert_close(
                    found.pair_third()[index], single.pair_third(), rtol=1e-9, atol=1e-13
                )


@closures
@pytest.mark.parametrize("names", [("relu",), ("relu", "hardtanh"), ("elu", "gelu")], ids="-".join)
def test_gaussian_units_are_treated_exactly(closure, names):
    # Whichever pairs count as strong, a Gaussian layer has exact covariances: the truncated series
    # of the weak ones is off by less than 1e-4 of the spread of the activations.
    groups, _ = layer(*names)
    one = CumulantTower(normal(1, N), covariance(2, 0.8))
    every, report = activate(one, groups, closure, 0.0)
    assert report.strong_pairs == N * (N - 1) // 2
    usual, report = activate(one, groups, closure, 0.5)
    assert 0 < report.strong_pairs < N * (N - 1) // 2
    spread = every.variance.sqrt()
    gap = (usual.covariance - every.covariance) / torch.outer(spread, spread)
    assert gap.abs().max() < 1e-4
    torch.testing.assert_close(every.covariance, every.covariance.T)
    if closure != "covariance":
        torch.testing.assert_close(usual.fourth, every.fourth, rtol=1e-2, atol=1e-5)
    # Not exact: the published first-order rule.
    published, _ = activate(one, groups, closure, None)
    gap = (published.covariance - every.covariance) / torch.outer(spread, spread)
    assert gap.abs().max() > 1e-3


@closures
def test_duplicated_units_stay_duplicates(closure):
    groups, _ = layer("relu")
    one = tower("covariance", 3)
    mean, matrix = one.mean.clone(), one.covariance.clone()
    mean[1] = mean[0]
    matrix[1], matrix[:, 1] = matrix[0], matrix[:, 0]
    matrix[1, 1] = matrix[0, 1] = matrix[1, 0] = matrix[0, 0]
    found, _ = activate(CumulantTower(mean, matrix), groups, closure, 0.5)
    torch.testing.assert_close(found.covariance[0], found.covariance[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.covariance[0, 1], found.covariance[0, 0])


def test_strong_pairs_of_perturbed_towers_add_the_cumulants_on_top(monkeypatch):
    # The exact kernel replaces the Gaussian part of a pair only; what third and fourth cumulants
    # add to it is the same as in the published expansion.
    groups, _ = layer("relu", "tanh")
    one = tower("radial", 5)
    found, report = activate(one, groups, "radial", 0.05)
    assert report.strong_pairs
    published, _ = activate(one, groups, "radial", None)
    plain = CumulantTower(one.mean, one.covariance)
    # Series of two terms for the Gaussian part, as in a layer with higher cumulants.
    monkeypatch.setattr("pushforward.cumulants.activation_step._series_degree", lambda *_: 2)
    exact, _ = activate(plain, groups, "radial", 0.05)
    series, _ = activate(plain, groups, "radial", None)
    off = ~torch.eye(N, dtype=torch.bool)
    gained = (found.covariance - published.covariance)[off]
    expected = (exact.covariance - series.covariance)[off]
    torch.testing.assert_close(gained, expected, rtol=1e-9, atol=1e-13)


# --- variances -----------------------------------------------------------------------------------


def test_positive_std():
    variance = torch.tensor([4.0, 1e-6, 0.0, -1e-14, -0.1], dtype=torch.float64)
    std, broken = positive_std(variance)
    torch.testing.assert_close(std[:2], variance[:2].sqrt())
    assert bool((std > 0).all())
    assert bool((std[2:] < 1e-8).all())
    assert broken == 1
    std, broken = positive_std(torch.zeros(3, dtype=torch.float64))
    assert bool((std > 0).all())
    assert broken == 0


@closures
def test_negative_variances_are_counted(closure):
    groups, _ = layer("relu")
    matrix = covariance(0)
    matrix[2, 2] = -0.1
    found, report = activate(CumulantTower(normal(0, N), matrix), groups, closure, 0.5)
    assert report.negative_variances == 1
    assert bool(found.covariance.isfinite().all())


@closures
@pytest.mark.parametrize("names", [("relu",), ("tanh", "relu")], ids="-".join)
def test_units_that_do_not_vary_are_constants(closure, names):
    groups, _ = layer(*names)
    one = tower(closure, 7)
    keep = torch.ones(N, dtype=torch.float64)
    keep[[1, 4]] = 0
    matrix = one.covariance * torch.outer(keep, keep)
    metric = None if one.metric is None else one.metric * torch.outer(keep, keep)
    third = one.third
    if closure == "radial":
        third = RadialThird(third.core * keep)
    if closure == "full":
        third = FactoredThird(tuple(s.scaled(keep) for s in third.sources))
    still = CumulantTower(one.mean, matrix, third, one.fourth, metric)
    found, report = activate(still, groups, closure, 0.5)
    values = torch.cat([g.activation(one.mean[g.units]) for g in groups])
    torch.testing.assert_close(found.mean[[1, 4]], values[[1, 4]], rtol=1e-7, atol=1e-9)
    assert found.covariance[[1, 4]].abs().max() < 1e-9
    assert report.negative_variances == 0
    assert bool(found.covariance.isfinite().all())


def test_tables_of_groups_are_side_by_side():
    groups, _ = layer("relu", "tanh")
    mean, std = normal(0, 2, N), normal(1, 2, N).abs() + 0.1
    center, values = hermite_tables(groups, mean, std, 2, 3)
    assert values.shape == (2, 4, 2, N)
    for group in groups:
        alone = group.activation.hermite_table(mean[:, group.units], std[:, group.units], 2, 3)
        torch.testing.assert_close(values[..., group.units], alone.values)
        torch.testing.assert_close(center[..., group.units], alone.center)


@pytest.mark.parametrize("closure", ["radial", "full"])
def test_a_linear_layer_changes_nothing(closure):
    # The identity keeps every cumulant that is carried in full; radial parts are projected.
    groups, _ = layer("identity")
    one = tower(closure, 11)
    found, _ = activate(one, groups, closure, None)
    torch.testing.assert_close(found.mean, one.mean)
    torch.testing.assert_close(found.covariance, one.covariance)
    if closure == "full":
        torch.testing.assert_close(dense_third(found), dense_third(one), rtol=1e-9, atol=1e-12)
    else:
        core = torch.from_numpy(radial_core(dense_third(one).numpy(), 1))
        torch.testing.assert_close(found.third.core, core, rtol=1e-9, atol=1e-12)
    core = projected(dense_fourth(one), 2)
    torch.testing.assert_close(found.fourth, core, rtol=1e-9, atol=1e-12)


def test_block_height_does_not_matter(monkeypatch):
    groups, _ = layer("relu", "tanh")
    one = tower("full", 13)
    expected, _ = activate(one, groups, "full", 0.3)
    monkeypatch.setattr(pair_expansion, "block_elements", lambda device: 2 * N)  # noqa: ARG005
    found, _ = activate(one, groups, "full", 0.3)
    torch.testing.assert_close(found.covariance, expected.covariance)
    torch.testing.assert_close(found.pair_third(), expected.pair_third())
    torch.testing.assert_close(found.fourth, expected.fourth)
