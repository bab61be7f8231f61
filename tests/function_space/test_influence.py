"""Influence against dense formulas, its sign and scale, and what is refused."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from influence_cases import Exact, trained
from oracles import proximal_response as oracle
from pushforward.errors import DataError, NetworkError, OptionError, ShapeError
from pushforward.function_space import influence as module
from pushforward.function_space.curvature import GaussNewton
from pushforward.function_space.influence import influence, self_influence
from pushforward.function_space.proximal import proximal_response
from pushforward.function_space.summarize import summarize
from pushforward.runs.estimate import Check

DAMPING = 0.01


@pytest.fixture(params=["squared", "cross_entropy"])
def case(request):
    return trained(request.param)


def _scores(case, queries, examples, **options):
    options = {"damping": DAMPING, **options}
    return influence(case.measure, queries, examples, case.loss, **options)


@pytest.mark.parametrize(("asked", "removed"), [(3, 24), (24, 3)])
def test_scores_are_those_of_the_dense_formula(case, asked, removed):
    # Whichever side is smaller is solved for.
    found = _scores(case, (case.x[:asked], case.y[:asked]), (case.x[:removed], case.y[:removed]))
    expected = oracle.influence(
        case.oracle,
        case.vector,
        case.x.numpy(),
        case.pairs[:asked],
        case.pairs[:removed],
        case.loss,
        DAMPING,
    )
    torch.testing.assert_close(found.scores, torch.from_numpy(expected), rtol=1e-8, atol=1e-10)
    assert found.num_examples == 24
    assert found.status == "pass"


def test_conjugate_gradients_give_the_same(case):
    data = (case.x, case.y)
    dense = _scores(case, data, data)
    iterated = _scores(case, data, data, method="conjugate_gradients", tolerance=1e-9, batch_size=5)
    torch.testing.assert_close(iterated.scores, dense.scores, rtol=1e-6, atol=1e-9)
    assert "conjugate gradients" in iterated.method


def test_blocks_of_right_hand_sides_do_not_matter(case, monkeypatch):
    data = (case.x, case.y)
    whole = _scores(case, data, data).scores
    size = GaussNewton.of(case.measure, metric=case.metric).space.size
    monkeypatch.setattr(module, "_SOLVED_BYTES", 8 * size * 7)
    torch.testing.assert_close(_scores(case, data, data, batch_size=5).scores, whole)


def test_effects_on_outputs_give_those_on_the_loss(case):
    data = (case.x[:5], case.y[:5])
    outputs = _scores(case, data, (case.x, case.y), effect="outputs").scores
    loss = _scores(case, data, (case.x, case.y)).scores
    assert outputs.shape == (5, 2 if case.loss == "squared" else 3, 24)
    z = case.net(case.x[:5]).detach()
    slope = (
        z - case.y[:5]
        if case.loss == "squared"
        else z.softmax(1) - nn.functional.one_hot(case.y[:5], 3)
    )
    torch.testing.assert_close((slope.unsqueeze(2) * outputs).sum(1), loss)


def test_removing_an_example_raises_its_own_loss_and_that_of_its_copy(case):
    data = (torch.cat([case.x, case.x[:1]]), torch.cat([case.y, case.y[:1]]))
    scores = _scores(case, data, data).scores
    assert bool((scores.diagonal() > 0).all())
    torch.testing.assert_close(scores[0, -1], scores[0, 0])


def test_the_sign_is_that_of_retraining():
    case = trained("squared")
    data = (case.x, case.y)
    predicted = _scores(case, data, data, damping=0.1).scores
    for number in (0, 7):
        response = proximal_response(
            case.measure, (case.x[number], case.y[number]), "squared", damping=0.1
        )
        changes = response.loss_changes(data)
        assert changes[number] > 0
        assert np.corrcoef(changes, predicted[:, number])[0, 1] > 0.98


def test_scale_is_that_of_one_example_out_of_n(case):
    data = (case.x, case.y)
    once, tenfold = (_scores(case, data, data, num_examples=n).scores for n in (24, 240))
    torch.testing.assert_close(once, 10 * tenfold)


def test_a_loss_function_may_be_given():
    case = trained("squared")
    data = (case.x, case.y)

    def squared(outputs, target):
        return (outputs - target).square().sum() / 2

    found = influence(case.measure, data, data, squared, damping=DAMPING, metric="euclidean").scores
    torch.testing.assert_close(found, _scores(case, data, data).scores)


def test_self_influence_is_the_diagonal_and_never_negative(case):
    data = (case.x, case.y)
    found = self_influence(case.measure, data, case.loss, damping=DAMPING, batch_size=7)
    torch.testing.assert_close(found.scores, _scores(case, data, data).scores.diagonal())
    assert bool((found.scores >= 0).all())
    if case.loss == "cross_entropy":
        expected = nn.functional.cross_entropy(case.net(case.x), case.y, reduction="none")
        torch.testing.assert_close(found.losses, expected.detach())
    numbers, values = found.top(3)
    assert values[0] == found.scores.max() == found.scores[numbers[0]]


def test_lengths_are_those_of_the_gradients_of_each_example():
    case = trained("cross_entropy")
    found = self_influence(case.measure, (case.x, case.y), case.loss, damping=DAMPING)
    weights = tuple(case.net.parameters())
    for x, y, length in zip(case.x, case.y, found.gradient_norms, strict=True):
        loss = nn.functional.cross_entropy(case.net(x), y)
        parts = [g.norm() for g in torch.autograd.grad(loss, weights)]
        torch.testing.assert_close(length, torch.stack(parts).norm())


def test_a_matrix_serves_several_calls(case):
    data = (case.x, case.y)
    matrix = GaussNewton.of(case.measure, metric=case.metric)
    found = influence(matrix, data, data, case.loss, damping=DAMPING)
    torch.testing.assert_close(found.scores, _scores(case, data, data).scores)
    with pytest.raises(OptionError, match="belong to the matrix"):
        influence(matrix, data, data, case.loss, damping=DAMPING, metric=case.metric)


def test_subset_of_the_parameters(case):
    data = (case.x, case.y)
    part = self_influence(case.measure, data, case.loss, damping=DAMPING, subset="2")
    whole = self_influence(case.measure, data, case.loss, damping=DAMPING)
    assert bool((part.gradient_norms < whole.gradient_norms).all())


def test_data_from_a_loader(case):
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(case.x, case.y), batch_size=10
    )
    whole = _scores(case, (case.x, case.y), (case.x, case.y)).scores
    torch.testing.assert_close(_scores(case, loader, loader).scores, whole)


def test_an_image_network_in_single_precision():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(32, 3),
    )
    x, y = torch.randn(10, 1, 6, 6), torch.arange(10) % 3
    found = self_influence(Exact(net, x), (x, y), damping=0.1)
    assert bool((found.scores > 0).all())


def test_top_and_what_is_written(case):
    data = (case.x, case.y)
    found = _scores(case, (case.x[:2], case.y[:2]), data)
    numbers, values = found.top(4)
    assert numbers.shape == (2, 4)
    assert bool((values.diff(dim=1) <= 0).all())
    _, harmful = found.top(1, harmful=True)
    torch.testing.assert_close(harmful[:, 0], found.scores.min(1).values)
    assert json.loads(json.dumps(found.to_dict()))["num_examples"] == 24
    assert "one of 24 examples" in repr(found)
    with pytest.raises(OptionError, match="from 1 to 24"):
        found.top(25)


def test_pictures(case):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    data = (case.x, case.y)
    found = _scores(case, data, data)
    bars = found.plot(query=1, k=3)
    assert [t.get_text() for t in bars.axes[0].get_yticklabels()][:3] == [
        str(n) for n in found.top(3)[0][1].tolist()
    ]
    assert self_influence(case.measure, data, case.loss, damping=DAMPING).plot().axes
    pyplot.close("all")
    with pytest.raises(OptionError, match="query 24"):
        found.plot(query=24)


def test_pictures_of_outputs(case):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    data = (case.x, case.y)
    found = _scores(case, (case.x[:3], case.y[:3]), data, effect="outputs")
    axes = found.plot(query=2, k=3, output=1).axes[0]
    shown = [t.get_text() for t in axes.get_yticklabels()][:3]
    assert shown == [str(n) for n in found.top(3)[0][2, 1].tolist()]
    assert axes.get_xlabel().startswith("change of output 1 on removing it")
    pyplot.close("all")
    count = found.scores.shape[1]
    for output in (None, count, -1):
        with pytest.raises(OptionError, match=f"the scores are of {count} outputs") as caught:
            found.plot(output=output)
        assert caught.value.where == "output"
        assert "plot(query, output=...)" in caught.value.advice
    with pytest.raises(OptionError, match=r"^k: 0"):
        found.plot(k=0, output=0)
    with pytest.raises(OptionError, match="output 0 of scores of the loss"):
        _scores(case, data, data).plot(output=0)


# --- checks -----------------------------------------------------------------------------------


class Calibrated(Exact):
    """Says for what its calibration was asked."""

    def calibration_check(self, *, metric, estimator):
        return Check("calibrated", "warn", f"{metric} {estimator}", "Keep classes.")


def test_the_calibration_of_a_measure_is_among_the_checks(case):
    data = (case.x, case.y)
    measure = Calibrated(case.net, case.x)
    expected = Check("calibrated", "warn", f"{case.metric} None", "Keep classes.")
    for found in (
        influence(measure, data, data, case.loss, damping=DAMPING),
        self_influence(measure, data, case.loss, damping=DAMPING),
        self_influence(
            GaussNewton.of(measure, metric=case.metric), data, case.loss, damping=DAMPING
        ),
    ):
        assert found.checks[-1] == expected
        assert found.status == "warn"
        assert "Keep classes" in repr(found)
    assert "calibrated" not in [check.name for check in _scores(case, data, data).checks]


def test_a_summary_says_how_well_the_estimator_in_use_is_calibrated(case):
    summary = summarize(case.net, case.x)
    data = (case.x, case.y)
    details = []
    for estimator in (None, "gaussian"):
        found = self_influence(summary, data, case.loss, damping=0.1, estimator=estimator)
        check = summary.calibration_check(metric=case.metric, estimator=estimator)
        assert found.checks[-1] == check
        details.append(check.detail)
    assert details[0] != details[1]


def test_damping_that_drowns_the_curvature_is_warned_of(case):
    data = (case.x, case.y)
    assert _scores(case, data, data, damping=1e4).status == "warn"


def test_an_unconverged_system_is_reported(case):
    data = (case.x, case.y)
    found = self_influence(
        case.measure,
        data,
        case.loss,
        damping=1e-6,
        method="conjugate_gradients",
        max_steps=1,
        batch_size=2,
    )
    assert found.status in ("warn", "fail")
    assert "max_steps" in str(found.checks[0])


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, -1e-3, float("nan")])
def test_damping_has_to_be_positive(case, damping):
    data = (case.x, case.y)
    with pytest.raises(OptionError, match="Give a positive number"):
        _scores(case, data, data, damping=damping)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effect": "weights"}, "there is no effect 'weights'"),
        ({"num_examples": 0}, "positive whole number"),
        ({"metric": "l1"}, "there is no metric 'l1'"),
        ({"subset": "9"}, "9"),
        ({"batch_size": 0}, "^batch_size: 0"),
    ],
)
def test_options_are_checked(case, options, message):
    data = (case.x, case.y)
    with pytest.raises(OptionError, match=message):
        _scores(case, data, data, **options)


@pytest.mark.wrong_types
@pytest.mark.parametrize("method", ["auto", "conjugate_gradients"])
@pytest.mark.parametrize(
    "options",
    [
        *({"max_steps": value} for value in (1.5, -5, 0, "many", True)),
        *({"tolerance": value} for value in ("a", float("nan"), -1e-3, 0.0)),
    ],
)
def test_when_to_stop_is_checked_before_the_curvature_is_taken(case, options, method):
    def never(*_, **__):
        raise AssertionError

    data = (case.x, case.y)
    measure = Exact(case.net, case.x)
    measure.distance = never
    calls = (
        lambda: influence(measure, data, data, case.loss, damping=1.0, method=method, **options),
        lambda: self_influence(measure, data, case.loss, damping=1.0, method=method, **options),
    )
    for call in calls:
        with pytest.raises(OptionError) as caught:
            call()
        assert [caught.value.where] == list(options)


def test_losses_are_checked():
    case = trained("squared")
    data = (case.x, case.y)
    with pytest.raises(OptionError, match="unknown loss"):
        influence(case.measure, data, data, "hinge", damping=1.0)
    with pytest.raises(OptionError, match="needs a metric"):
        influence(case.measure, data, data, nn.functional.mse_loss, damping=1.0)
    with pytest.raises(OptionError, match="Return a scalar"):
        influence(case.measure, data, data, lambda z, y: z - y, damping=1.0, metric="euclidean")
    with pytest.raises(DataError, match="not finite"):
        influence(
            case.measure,
            data,
            data,
            lambda z, y: (z - y).sum() / 0,
            damping=1.0,
            metric="euclidean",
        )


def test_data_are_checked(case):
    data = (case.x, case.y)
    with pytest.raises(DataError, match="NaN"):
        _scores(case, data, (case.x * float("nan"), case.y))
    with pytest.raises(NetworkError, match="inputs"):
        _scores(case, data, (case.x[:, :2], case.y))
    with pytest.raises(DataError, match="targets"):
        _scores(case, data, case.x)


def test_targets_are_checked():
    case = trained("cross_entropy")
    with pytest.raises(DataError, match="run from 0 to 2"):
        _scores(case, (case.x, case.y + 1), (case.x, case.y))
    with pytest.raises(ShapeError, match="integer label"):
        _scores(case, (case.x, case.y.double()), (case.x, case.y))
    with pytest.raises(ShapeError, match='or use loss="squared"'):
        _scores(case, (case.x, case.y), (case.x, case.x))
    case = trained("squared")
    with pytest.raises(ShapeError, match="1 targets for 2 outputs"):
        _scores(case, (case.x, case.y[:, :1]), (case.x, case.y))


def test_the_number_of_training_examples_has_to_be_known(case):
    data = (case.x, case.y)
    del case.measure.num_examples
    with pytest.raises(OptionError, match="Give num_examples"):
        _scores(case, data, data)


@pytest.mark.parametrize("regression", [False, True])
def test_one_output_and_cross_entropy_do_not_go_together(regression):
    x = trained("squared").x
    net = nn.Linear(3, 1).double()
    data = (x, x[:, :1] if regression else (x[:, 0] > 0).long())
    message = r'cross-entropy of a network with 1 output.*two logits, or use loss="squared"'
    for call in (
        lambda measure: self_influence(measure, data, damping=1.0),
        lambda measure: influence(measure, data, data, damping=1.0),
        lambda measure: proximal_response(measure, (x[0], data[1][0]), damping=1.0),
    ):
        with pytest.raises(DataError, match=message):
            call(Exact(net, x))


def test_a_single_logit_goes_by_a_loss_of_its_own_and_the_euclidean_metric():
    x = trained("squared").x
    net = nn.Linear(3, 1).double()

    def loss(outputs, target):
        return nn.functional.softplus(outputs).sum() - (outputs * target).sum()

    data = (x, (x[:, :1] > 0).double())
    with pytest.raises(ShapeError, match="several outputs"):
        self_influence(Exact(net, x), data, loss, damping=1.0, metric="fisher")
    found = self_influence(Exact(net, x), data, loss, damping=1.0, metric="euclidean")
    assert bool((found.scores > 0).all())
