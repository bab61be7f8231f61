"""Traces of an estimate, as they are drawn."""

import builtins
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.degeneracy import plots
from pushforward.degeneracy.plots import plot_traces, running_means
from pushforward.errors import OptionError


@pytest.fixture(scope="module")
def found():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    line = nn.Linear(2, 1, bias=False).double().eval()
    return pf.learning_coefficient(
        line,
        (x, line(x).detach()),
        pf.Gaussian(noise_variance=1.0),
        sampler="langevin",
        num_chains=3,
        num_draws=60,
        num_warmup=20,
        localization=1.0,
        progress=False,
    )


@pytest.fixture(autouse=True)
def _closed():
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def chains_of(axes, *, warmup=False):
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    return [line for line in lines if (line.get_color() == plots._WARM_UP) == warmup]


def test_the_warm_up_is_before_the_run_and_grey(found):
    above, _ = plot_traces(found).axes
    before, after = chains_of(above, warmup=True), chains_of(above)
    assert len(before) == len(after) == 3
    for chain in range(3):
        assert np.array_equal(before[chain].get_ydata(), found.warmup_excess[chain])
        assert np.array_equal(after[chain].get_ydata(), found.excess[chain])
    assert list(before[0].get_xdata()) == list(range(-20, 0))
    assert list(after[0].get_xdata()) == list(range(1, 61))
    assert len({line.get_color() for line in after}) == 3


def test_means_end_at_the_values_of_the_chains_beside_the_band(found):
    figure = found.plot()
    _, below = figure.axes
    lines = chains_of(below)
    ends = [line.get_ydata()[-1] for line in lines]
    assert ends == pytest.approx(found.chain_values.tolist())
    assert lines[1].get_ydata()[4] == pytest.approx(float(found.excess[1, :5].mean()))
    (band,) = below.patches
    value, error = float(found), float(found.standard_error)
    assert band.get_y() == pytest.approx(value - 2 * error)
    assert band.get_height() == pytest.approx(4 * error)
    bottom, top = below.get_ylim()
    assert bottom < min(ends) < max(ends) < top
    assert bottom < value < top
    title = figure.get_suptitle()
    assert found.verdict in title
    assert f"{value:.4g}" in title


def test_running_means():
    draws = torch.tensor([[1.0, 3.0, 8.0], [0.0, 0.0, 3.0]])
    expected = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(running_means(draws), expected)


def test_the_beginning_does_not_flatten_the_rest(found):
    wild = found.warmup_excess.clone()
    wild[:, 0] = 1e9
    wild[0, 1] = torch.inf
    above, _ = plot_traces(replace(found, warmup_excess=wild)).axes
    bottom, top = above.get_ylim()
    assert bottom < found.excess.min()
    assert found.excess.max() < top < 1e3


def test_without_warm_up_or_error(found):
    """HMC learns in its warm-up and keeps no trace of it; few draws have no error."""
    unknown = torch.tensor(torch.nan, dtype=torch.float64)
    figure = plot_traces(replace(found, warmup_excess=found.excess[:, :0], standard_error=unknown))
    figure.canvas.draw()
    above, below = figure.axes
    assert not chains_of(above, warmup=True)
    assert not below.patches
    assert len(chains_of(below)) == 3


def test_chains_that_stand_still_can_be_drawn(found):
    still = torch.zeros_like(found.excess)
    zero = torch.zeros((), dtype=torch.float64)
    figure = plot_traces(
        replace(found, excess=still, warmup_excess=still[:, :0], value=zero, standard_error=zero)
    )
    figure.canvas.draw()
    assert len(chains_of(figure.axes[0])) == 3


def test_long_traces_are_thinned(found, monkeypatch):
    monkeypatch.setattr(plots, "_MOST_POINTS", 20)
    above, below = plot_traces(found).axes
    assert np.array_equal(chains_of(above)[0].get_ydata(), found.excess[0, ::3])
    assert list(chains_of(below)[0].get_xdata()[:3]) == [1, 4, 7]


def test_without_matplotlib(found, monkeypatch):
    original = builtins.__import__

    def refusing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(OptionError, match=r"pip install 'pushforward\[plot\]'"):
        plot_traces(found)
