"""Retrained proximal responses against an explicit minimisation, and their limits."""

import json

import pytest
import torch

from influence_cases import Exact, trained
from oracles import proximal_response as oracle
from pushforward.errors import DataError, NetworkError, OptionError, ShapeError
from pushforward.function_space.curvature import GaussNewton
from pushforward.function_space.proximal import proximal_response


@pytest.fixture(params=["squared", "cross_entropy"])
def case(request):
    return trained(request.param)


@pytest.mark.parametrize(("damping", "number"), [(0.1, 0), (0.01, 11)])
def test_the_minimum_is_that_of_the_explicit_objective(case, damping, number):
    found = proximal_response(
        case.measure, (case.x[number], case.y[number]), case.loss, damping=damping
    )
    expected = oracle.retrained(
        case.oracle, case.vector, case.x.numpy(), case.pairs[number], case.loss, damping
    )
    expected = torch.from_numpy(expected - case.vector)
    torch.testing.assert_close(found.displacement, expected, rtol=1e-4, atol=1e-6)
    assert found.status == "pass"
    assert found.gradient_ratio < 1e-5


def test_strong_damping_makes_it_linear(case):
    found = proximal_response(case.measure, (case.x[:1], case.y[:1]), case.loss, damping=1e3)
    torch.testing.assert_close(found.displacement, found.linear, rtol=1e-2, atol=1e-9)


def test_without_a_factorisation_it_is_the_same(case):
    matrix = GaussNewton.of(case.measure, metric=case.metric)
    example = (case.x[2], case.y[2])
    solver = matrix.solver(0.1, "conjugate_gradients")
    plain = proximal_response(case.measure, example, case.loss, damping=0.1, solver=solver)
    whitened = proximal_response(case.measure, example, case.loss, damping=0.1)
    torch.testing.assert_close(plain.displacement, whitened.displacement, rtol=1e-4, atol=1e-7)


def test_subtracting_the_loss_itself_is_held_by_an_exact_distance():
    # Squared loss: of the removed example only its tangent is left, and no proximity.
    case = trained("squared")
    number = 3
    found = proximal_response(
        case.measure, (case.x[number], case.y[number]), "squared", damping=0.1, removal="loss"
    )
    rest = torch.arange(24) != number
    others = Exact(case.net, case.x[rest])
    # (23/24) of the mean over the others, so that damping and push are scaled alike.
    expected = proximal_response(
        others,
        (case.x[number], case.y[number]),
        "squared",
        damping=0.1 * 24 / 23,
        num_examples=23,
    )
    torch.testing.assert_close(found.displacement, expected.displacement, rtol=1e-4, atol=1e-6)


def test_a_search_that_runs_away_says_so():
    class Faint(Exact):  # a distance that underestimates
        def distance(self, other, *, metric):
            return 1e-6 * super().distance(other, metric=metric)

    case = trained("squared")
    found = proximal_response(
        Faint(case.net, case.x), (case.x[0], case.y[0]), "squared", damping=1e-4, removal="loss"
    )
    assert found.status == "fail"


def test_changes_of_losses_and_outputs(case):
    data = (case.x, case.y)
    found = proximal_response(case.measure, (case.x[0], case.y[0]), case.loss, damping=0.1)
    assert found.loss_changes(data)[0] > 0
    assert found.output_changes(data).shape == (24, 2 if case.loss == "squared" else 3)
    assert json.loads(json.dumps(found.to_dict()))["iterations"] > 0


def test_refusals(case):
    example = (case.x[0], case.y[0])
    with pytest.raises(OptionError, match="there is no removal 'all'"):
        proximal_response(case.measure, example, case.loss, damping=0.1, removal="all")
    with pytest.raises(OptionError, match="Give a positive number"):
        proximal_response(case.measure, example, case.loss, damping=0.0)
    with pytest.raises(ShapeError, match="2 examples"):
        proximal_response(case.measure, (case.x[:2], case.y[:2]), case.loss, damping=0.1)
    with pytest.raises(ShapeError, match="one example"):
        proximal_response(case.measure, case.x[0], case.loss, damping=0.1)
    solver = GaussNewton.of(case.measure, metric=case.metric).solver(0.2)
    with pytest.raises(OptionError, match="another measure or damping"):
        proximal_response(case.measure, example, case.loss, damping=0.1, solver=solver)


def test_an_example_of_numpy_or_of_lists_is_one(case):
    x, y = case.x[3], case.y[3]
    expected = proximal_response(case.measure, (x, y), case.loss, damping=1.0).displacement
    for inputs, target in (
        (x.numpy(), y.numpy()),
        (x.tolist(), y.tolist()),
        (x[None], y[None]),
        (x[None].numpy(), y[None]),
    ):
        found = proximal_response(case.measure, (inputs, target), case.loss, damping=1.0)
        # Lists become single precision.
        torch.testing.assert_close(found.displacement, expected, rtol=1e-4, atol=1e-7)
    if case.loss == "cross_entropy":
        found = proximal_response(case.measure, (x[None], int(y)), case.loss, damping=1.0)
        torch.testing.assert_close(found.displacement, expected)


def test_an_example_of_another_shape_is_told_both(case):
    x, y = case.x, case.y
    width = x.shape[1]
    for inputs in (x[0, :2], x[0, :2].numpy(), x[0, 0], x[None, :1, None]):
        with pytest.raises(ShapeError, match="the network takes examples of shape") as caught:
            proximal_response(case.measure, (inputs, y[0]), case.loss, damping=1.0)
        assert caught.value.where == "example"
        assert str(tuple(inputs.shape)) in str(caught.value)
        assert f"({width},)" in str(caught.value)
    with pytest.raises(NetworkError, match="cannot take these inputs"):
        proximal_response(case.measure, (x[:1, :2], y[:1]), case.loss, damping=1.0)


@pytest.mark.parametrize(("part", "value"), [("target", "a"), ("target", None), ("inputs", "a")])
def test_an_example_that_is_no_numbers_is_refused(case, part, value):
    example = (case.x[0], value) if part == "target" else (value, case.y[0])
    with pytest.raises(DataError, match=f"{part} of type {type(value).__name__}") as caught:
        proximal_response(case.measure, example, case.loss, damping=1.0)
    assert caught.value.where == "example"


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    "options",
    [
        *({"max_steps": value} for value in (0, -1, 1.5, "many")),
        *({"tolerance": value} for value in (0.0, -1.0, float("nan"), "a")),
    ],
)
def test_when_to_stop_is_checked(case, options):
    with pytest.raises(OptionError) as caught:
        proximal_response(case.measure, (case.x[0], case.y[0]), case.loss, damping=1.0, **options)
    assert [caught.value.where] == list(options)


def test_steps_are_bounded(case):
    found = proximal_response(
        case.measure, (case.x[0], case.y[0]), case.loss, damping=1e-3, max_steps=1
    )
    assert found.iterations == 1


def test_it_is_shown_in_a_few_lines(case):
    found = proximal_response(case.measure, (case.x[0], case.y[0]), case.loss, damping=0.1)
    lines = repr(found).splitlines()
    assert lines[0].startswith(
        f"ProximalResponse: the weights moved by {found.displacement.norm():.3g}, "
    )
    assert lines[1] == f"  {found.method}"
    assert len(lines) == 3
    weak = proximal_response(
        case.measure, (case.x[0], case.y[0]), case.loss, damping=1e-3, max_steps=1
    )
    assert "stationary: the last gradient" in repr(weak)


def test_bars_show_the_curvature_and_the_steps(case, capsys):
    example = (case.x[0], case.y[0])
    measure = Exact(case.net, case.x)
    proximal_response(measure, example, case.loss, damping=0.1, progress=True)
    shown = capsys.readouterr().err
    assert "Curvature" in shown
    assert "Proximal response, " in shown
    proximal_response(measure, example, case.loss, damping=0.1, progress=False)
    assert capsys.readouterr().err == ""
