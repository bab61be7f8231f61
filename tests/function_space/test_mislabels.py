"""Wrong labels: the ranking, its baselines, what is measured of it, and refusals."""

import json

import pytest
import torch
from torch import nn

from influence_cases import Exact, trained
from pushforward.errors import DataError, OptionError, ShapeError, WeightsError
from pushforward.function_space.influence import self_influence
from pushforward.function_space.mislabels import find_wrong_labels
from pushforward.function_space.summarize import summarize


@pytest.fixture(scope="module")
def flipped():
    """Three blobs, 12 of 90 labels wrong, a network trained until it has fitted a few of them."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(90) % 3
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    x = centres[truth] + 0.5 * torch.randn(90, 2, generator=generator)
    wrong = torch.zeros(90, dtype=torch.bool)
    wrong[torch.randperm(90, generator=generator)[:12]] = True
    labels = torch.where(wrong, (truth + 1) % 3, truth)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    optimiser = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimiser.step()
    return net, x, labels, wrong


@pytest.fixture
def found(flipped):
    net, x, labels, _ = flipped
    return find_wrong_labels(net, (x, labels), Exact(net, x))


def test_wrong_labels_come_first(flipped, found):
    wrong = flipped[3]
    detections = {d.score: d for d in found.evaluate(wrong)}
    assert set(detections) == {"self_influence", "loss", "gradient_norm"}
    assert all(d.auroc > 0.9 for d in detections.values())
    assert detections["self_influence"].recall_20 > 0.8
    first = found.order[:5]
    assert wrong[first].float().mean() > 0.7


def test_the_scores_are_self_influence_loss_and_length_of_the_gradient(flipped, found):
    net, x, labels, _ = flipped
    expected = self_influence(Exact(net, x), (x, labels), damping=found.damping)
    torch.testing.assert_close(found.scores["self_influence"], expected.scores)
    losses = nn.functional.cross_entropy(net(x), labels, reduction="none").detach()
    torch.testing.assert_close(found.scores["loss"], losses.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.scores["gradient_norm"], expected.gradient_norms)
    assert torch.equal(found.predictions, net(x).argmax(1))
    assert torch.equal(found.targets, labels)


def test_orders_fall(found):
    for name, values in found.scores.items():
        assert bool((values[found.order_by(name)].diff() <= 0).all())
    assert torch.equal(found.order, found.order_by("self_influence"))
    assert torch.equal(found.order.sort().values, torch.arange(90))


def test_a_loader_in_small_batches_gives_the_same(flipped, found):
    net, x, labels, _ = flipped
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=16)
    again = find_wrong_labels(net, loader, Exact(net, x), batch_size=7)
    torch.testing.assert_close(again.scores, found.scores)


def test_data_of_another_float_type(flipped, found):
    net, x, labels, _ = flipped
    again = find_wrong_labels(net, (x.double(), labels), Exact(net, x))
    torch.testing.assert_close(again.scores["loss"], found.scores["loss"])


def test_recalls_by_hand(found):
    order = found.order_by("loss")
    wrong = torch.zeros(90, dtype=torch.bool)
    wrong[order[8]] = wrong[order[9]] = wrong[order[17]] = wrong[order[18]] = True
    (detection,) = (d for d in found.evaluate(wrong) if d.score == "loss")
    assert (detection.recall_10, detection.recall_20) == (0.25, 0.75)  # of 9 and of 18 examples
    # Ranks 8, 9, 17, 18 leave 8, 8, 15, 15 right examples above them, of 86.
    assert detection.auroc == pytest.approx(1 - (8 + 8 + 15 + 15) / (4 * 86))


def test_regression_has_no_predictions():
    case = trained("squared")
    found = find_wrong_labels(case.net, (case.x, case.y), case.measure, loss="squared")
    assert found.predictions is None
    assert len(found.table(3).splitlines()) == 5


def test_without_a_measure_the_data_are_summarised(flipped):
    pytest.importorskip("pushforward.function_space.summarize")
    net, x, labels, wrong = flipped
    found = find_wrong_labels(net, (x, labels))
    detections = {d.score: d.auroc for d in found.evaluate(wrong)}
    assert detections["self_influence"] > 0.9
    assert "FunctionSummary" in found.method


def test_labels_are_looked_at_before_anything_is_computed(flipped):
    net, x, labels, _ = flipped
    logit = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    for measure in (None, Exact(logit, x)):
        for targets in (labels.clamp(max=1), x[:, :1]):
            with pytest.raises(DataError, match=r'1 output.*or use loss="squared"'):
                find_wrong_labels(logit, (x, targets), measure)
    assert len(find_wrong_labels(logit, (x, x[:, :1]), loss="squared")) == 90
    for measure in (None, Exact(net, x)):
        with pytest.raises(DataError, match="labels run from 0 to 2"):
            find_wrong_labels(net, (x, labels + 3), measure)
    with pytest.raises(OptionError, match="needs a metric"):
        find_wrong_labels(net, (x, labels), loss=nn.functional.cross_entropy)


def test_the_calibration_of_the_summary_is_said(flipped):
    net, x, labels, _ = flipped
    found = find_wrong_labels(net, (x, labels), subset="2.*")
    expected = summarize(net, x).calibration_check(metric="fisher")
    assert [check for check in found.checks if check.name == "calibrated"] == [expected]


def test_bars_show_the_curvature_and_the_products(flipped, capsys):
    net, x, labels, _ = flipped
    measure = Exact(net, x)
    find_wrong_labels(net, (x, labels), measure, progress=True)
    shown = capsys.readouterr().err
    assert "Curvature" in shown
    assert "Self-influence" in shown
    find_wrong_labels(net, (x, labels), measure, method="conjugate_gradients", progress=True)
    shown = capsys.readouterr().err
    assert "Curvature" not in shown
    assert "products" in shown
    find_wrong_labels(net, (x, labels), measure, progress=False)
    assert capsys.readouterr().err == ""


def test_table_and_what_is_written(flipped, found):
    lines = found.table(4).splitlines()
    assert len(lines) == 6
    number = int(found.order[0])
    assert lines[2].startswith(f"| 1 | {number} | {int(flipped[2][number])} | ")
    assert json.loads(json.dumps(found.to_dict()))["ranked_by"] == "self_influence"
    assert f"most suspicious: {number}" in repr(found)
    with pytest.raises(OptionError, match=r"^k: 0"):
        found.table(0)


def test_picture(found):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    assert len(found.plot().axes[0].lines) == 3
    pyplot.close("all")


def test_refusals(flipped, found):
    net, x, labels, wrong = flipped
    with pytest.raises(ShapeError, match="True or False for each example"):
        found.evaluate(wrong[:5])
    with pytest.raises(ShapeError, match="True or False for each example"):
        found.evaluate("abc")
    with pytest.raises(OptionError, match="0 of 90 examples are wrong"):
        found.evaluate(torch.zeros(90, dtype=torch.bool))
    with pytest.raises(OptionError, match="there is no score 'margin'"):
        found.order_by("margin")
    other = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(WeightsError, match="not those of the measure"):
        find_wrong_labels(other, (x, labels), Exact(net, x))
    with pytest.raises(OptionError, match="Give a positive number"):
        find_wrong_labels(net, (x, labels), Exact(net, x), damping=-1.0)
    with pytest.raises(OptionError, match="tuple measures no distance") as caught:
        find_wrong_labels(net, x, (x, labels))
    assert caught.value.where == "measure"


@pytest.mark.parametrize("options", [{"tolerance": float("nan")}, {"max_steps": 0}])
def test_options_are_looked_at_before_the_data_are_summarised(flipped, monkeypatch, options):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("pushforward.function_space.summarize.summarize", never)
    with pytest.raises(OptionError) as caught:
        find_wrong_labels(flipped[0], (flipped[1], flipped[2]), **options)
    assert [caught.value.where] == list(options)


def test_the_number_of_training_examples_may_be_given(flipped, found):
    net, x, labels, _ = flipped
    again = find_wrong_labels(net, (x, labels), Exact(net, x), num_examples=900)
    assert (found.num_examples, again.num_examples) == (90, 900)
    mine, other = (r.scores["self_influence"] for r in (again, found))
    torch.testing.assert_close(10 * mine, other)
