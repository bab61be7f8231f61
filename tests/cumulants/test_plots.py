import pytest
import torch
from torch import nn

from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.propagation import propagate
from pushforward.errors import ShapeError


@pytest.fixture
def law(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    return propagate(net, GaussianLaw.standard(4))


def test_a_plot_shows_each_mean_and_its_range(law):
    from matplotlib import pyplot

    figure = law.plot(["a", "b", "c"])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    drawn = torch.tensor([float(y) for y in axes.containers[0].lines[0].get_ydata()])
    torch.testing.assert_close(drawn, law.mean.detach())
    pyplot.close(figure)


def test_labels_must_fit(law):
    with pytest.raises(ShapeError, match="2 labels for 3 outputs"):
        law.plot(["a", "b"])
