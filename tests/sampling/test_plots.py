"""Traces and ranks, as they are drawn."""

import builtins
from dataclasses import replace

import numpy as np
import pytest
import torch

from pushforward.errors import OptionError
from pushforward.sampling import plots
from pushforward.sampling.diagnostics import looked_at
from pushforward.sampling.plots import plot_traces
from sampling_kernels import run


@pytest.fixture(autouse=True)
def _closed():
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def rows_of(figure):
    axes = figure.axes
    return list(zip(axes[::2], axes[1::2], strict=True))


def titles(figure):
    return [left.get_title(loc="left") for left, _ in rows_of(figure)]


def lines_of(axes, *, warmup):
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    return [line for line in lines if (line.get_color() == plots._WARM_UP) == warmup]


def test_the_potential_has_its_warm_up_before_it():
    chains = run(thin=2, num_warmup=20)
    figure = plot_traces(chains)
    worst = int(chains.diagnosis["layer.w"].r_hat.argmax())
    assert titles(figure) == ["potential", f"layer.w[{worst}]", f"layer.w[{1 - worst}]"]
    (left, _), *others = rows_of(figure)
    before, after = lines_of(left, warmup=True), lines_of(left, warmup=False)
    assert len(before) == len(after) == 4
    for chain in range(4):
        assert np.array_equal(after[chain].get_ydata(), chains.statistics["potential"][chain])
        expected = chains.warmup_statistics["potential"][chain]
        assert np.array_equal(before[chain].get_ydata(), expected)
    assert list(before[0].get_xdata()) == list(range(-20, 0, 2))
    assert list(after[0].get_xdata()) == list(range(2, 61, 2))
    assert len({line.get_color() for line in after}) == 4
    assert all(not lines_of(axes, warmup=True) for axes, _ in others)


def test_the_beginning_does_not_flatten_the_rest():
    chains = run()
    wild = chains.warmup_statistics["potential"].clone()
    wild[:, 0] = 1e9
    wild[0, 1] = torch.inf
    chains = replace(chains, warmup_statistics={"potential": wild})
    (left, _), *_ = rows_of(plot_traces(chains))
    bottom, top = left.get_ylim()
    draws = chains.statistics["potential"]
    assert bottom < draws.min()
    assert draws.max() < top < 1e3


def test_observations_come_before_parameters():
    chains = run(record=lambda p: {"f": p["layer.w"].sum(), "g": p["layer.w"]})
    assert sorted(titles(plot_traces(chains))) == ["f", "g[0]", "g[1]", "potential"]


def test_components_with_the_largest_r_hat_are_shown():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 200, 30, 20, generator=generator, dtype=torch.float64)
    components = looked_at(600)
    shifts = dict(zip((20, 150, 77, 5, 120), (5.0, 4.0, 3.0, 2.0, 1.0), strict=True))
    for place, shift in shifts.items():
        values.flatten(2)[0, :, components[place]] += shift
    chains = replace(run(num_draws=200), observations={"f": values})
    names = []
    for place in (20, 150, 77, 5):
        row, column = divmod(int(components[place]), 20)
        names.append(f"f[{row}, {column}]")
    figure = plot_traces(chains)
    assert titles(figure) == ["potential", *names]
    left, _ = rows_of(figure)[1]
    expected = values.flatten(2)[2, :, components[20]]
    assert np.array_equal(left.lines[2].get_ydata(), expected)


def test_ranks():
    even = torch.arange(400, dtype=torch.float64).reshape(100, 4).T
    assert torch.equal(plots._rank_shares(even), torch.ones(4, 20, dtype=torch.float64))
    apart = torch.arange(400, dtype=torch.float64).reshape(4, 100)
    shares = plots._rank_shares(apart)
    for chain in range(4):
        assert (shares[chain, 5 * chain : 5 * chain + 5] == 4).all()
    assert torch.equal(shares.sum(1), torch.full((4,), 20.0, dtype=torch.float64))
    # A single chain: its halves, of an odd number of draws without the first.
    drifting = plots._rank_shares(torch.arange(201, dtype=torch.float64)[None])
    assert (drifting[0, :10] == 2).all()
    assert (drifting[1, 10:] == 2).all()
    # Chains that never moved cannot be told apart.
    still = plots._rank_shares(torch.ones(4, 100, dtype=torch.float64))
    assert (still[:, 10] == 20).all()


@pytest.mark.parametrize(
    "options",
    [
        {"num_draws": 1},
        {"num_draws": 3, "num_warmup": 0},
        {"num_chains": 1},
        {"num_chains": 11},
        {"keep_parameters": False},
    ],
)
def test_every_run_can_be_drawn(options):
    figure = plot_traces(run(**options))
    figure.canvas.draw()
    (left, right), *_ = rows_of(figure)
    assert len(right.patches) == max(2, options.get("num_chains", 4))
    assert left.lines


def test_long_traces_are_thinned(monkeypatch):
    monkeypatch.setattr(plots, "_MOST_POINTS", 10)
    chains = run(num_draws=35)
    (left, _), *_ = rows_of(plot_traces(chains))
    for line, values in zip(
        lines_of(left, warmup=False), chains.statistics["potential"], strict=True
    ):
        assert np.array_equal(line.get_ydata(), values[::3])
        assert list(line.get_xdata()[:3]) == [1, 4, 7]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_lost_chains_can_be_drawn(value):
    chains = run()
    lost = chains.statistics["potential"].clone()
    lost[1, 10:] = value
    figure = plot_traces(replace(chains, statistics={"potential": lost}))
    figure.canvas.draw()
    bottom, top = rows_of(figure)[0][0].get_ylim()
    kept = lost[torch.isfinite(lost)]
    assert bottom < kept.min() < kept.max() < top


def test_nothing_to_draw():
    bare = replace(run(keep_parameters=False), statistics={})
    with pytest.raises(OptionError, match="keep_parameters"):
        plot_traces(bare)


def test_without_matplotlib(monkeypatch):
    chains, original = run(), builtins.__import__

    def refusing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(OptionError, match=r"pip install 'pushforward\[plot\]'"):
        plot_traces(chains)
