"""Block conjugate gradients against a dense solve, and their error estimate against the error."""

from itertools import pairwise

import pytest
import torch

from laplace_scenarios import numbers
from pushforward.errors import OptionError
from pushforward.linalg.conjugate_gradients import BlockIterate, advance, begin, solve

SIZE = 60


def matrix(condition=1e3, size=SIZE, seed=0):
    """Symmetric, eigenvalues geometrically from 1 to `condition`."""
    basis, _ = torch.linalg.qr(numbers(size, size, seed=seed))
    values = torch.logspace(0, torch.tensor(condition).log10().item(), size, dtype=torch.float64)
    return (basis * values) @ basis.T


def times(a):
    return lambda rows: rows @ a.to(rows.dtype)


def squared_errors(a, found, right):
    difference = found.solution.double() - torch.linalg.solve(a, right.double().T).T
    return ((difference @ a) * difference).sum(1)


def squared_lengths(a, right):
    exact = torch.linalg.solve(a, right.double().T).T
    return (exact * right.double()).sum(1)


@pytest.mark.parametrize("count", [1, 2, 7, SIZE, SIZE + 5])
def test_solutions_are_those_of_a_dense_solve(count):
    a, right = matrix(), numbers(count, SIZE, seed=1)
    found = solve(times(a), right, tolerance=1e-10)
    torch.testing.assert_close(
        found.solution, torch.linalg.solve(a, right.T).T, rtol=1e-7, atol=1e-9
    )
    torch.testing.assert_close(found.residual, right - found.solution @ a, rtol=0, atol=1e-9)


def test_the_wanted_error_is_reached():
    a, right = matrix(1e4), numbers(4, SIZE, seed=2)
    for tolerance in (0.3, 1e-2, 1e-4):
        found = solve(times(a), right, tolerance=tolerance)
        reached = (squared_errors(a, found, right) / squared_lengths(a, right)).sqrt()
        assert reached.max() < 4 * tolerance  # the error is an estimate
        assert found.steps < 200


def test_more_steps_for_smaller_errors():
    a, right = matrix(1e4), numbers(4, SIZE, seed=2)
    steps = [solve(times(a), right, tolerance=t).steps for t in (0.3, 1e-2, 1e-4)]
    assert steps == sorted(set(steps))


def test_decrements_are_what_the_error_fell_by():
    a, right = matrix(), numbers(3, SIZE, seed=3)
    state = begin(times(a), right, torch.zeros_like(right), lambda rows: rows)
    before = squared_errors(a, state, right)
    for _ in range(6):
        state = advance(state, times(a), lambda rows: rows)
        after = squared_errors(a, state, right)
        torch.testing.assert_close(state.decrements[-1], before - after, rtol=1e-9, atol=1e-10)
        before = after
    assert state.steps == 6


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e4])
@pytest.mark.parametrize("count", [1, 8])
def test_the_error_estimate_is_the_error_up_to_a_factor(condition, count):
    a, right = matrix(condition, 200, seed=4), numbers(count, 200, seed=5)
    state = begin(times(a), right, torch.zeros_like(right), lambda rows: rows)
    assert torch.isinf(state.squared_error).all()
    ratios = []
    for _ in range(12):
        state = advance(state, times(a), lambda rows: rows)
        true = squared_errors(a, state, right).mean()
        if state.steps >= 4 and true > 1e-18:
            ratios.append(float(state.squared_error.mean() / true))
    assert ratios
    # Of squares: at most three times too small; early on it is cautious, and may be larger.
    assert all(1 / 9 < ratio < 25 for ratio in ratios)
    assert ratios[-1] < 9


def test_a_step_leaves_the_state_before_it_alone():
    a, right = matrix(), numbers(3, SIZE, seed=6)
    state = advance(
        begin(times(a), right, torch.zeros_like(right), lambda r: r), times(a), lambda r: r
    )
    copies = {name: tensor.clone() for name, tensor in state.to_tensors().items()}
    first = advance(state, times(a), lambda r: r)
    second = advance(BlockIterate.from_tensors(copies), times(a), lambda r: r)
    for name, tensor in state.to_tensors().items():
        assert torch.equal(tensor, copies[name])
        assert torch.equal(first.to_tensors()[name], second.to_tensors()[name])


def test_right_hand_sides_may_depend_on_each_other():
    a, right = matrix(), numbers(2, SIZE, seed=7)
    dependent = torch.cat([right, right[:1], 2 * right[:1] - right[1:], torch.zeros(1, SIZE)])
    found = solve(times(a), dependent, tolerance=1e-9)
    torch.testing.assert_close(
        found.solution, torch.linalg.solve(a, dependent.T).T, rtol=1e-6, atol=1e-8
    )
    assert found.directions.shape[0] <= len(dependent)


def test_a_solved_system_costs_no_step():
    a = matrix()
    assert solve(times(a), torch.zeros(2, SIZE, dtype=torch.float64)).steps == 0
    exact = numbers(2, SIZE, seed=8)
    right = exact @ a
    assert solve(times(a), right, guess=exact, tolerance=1e-6).steps <= 2


def test_one_right_hand_side_of_length_zero_beside_others():
    a, right = matrix(), numbers(3, SIZE, seed=9)
    right[1] = 0
    found = solve(times(a), right, tolerance=1e-8)
    assert torch.isfinite(found.solution).all()
    torch.testing.assert_close(
        found.solution, torch.linalg.solve(a, right.T).T, rtol=1e-6, atol=1e-8
    )


def test_a_good_guess_saves_products():
    a, right = matrix(1e4), numbers(4, SIZE, seed=10)
    exact = torch.linalg.solve(a, right.T).T
    cold = solve(times(a), right, tolerance=1e-4)
    warm = solve(times(a), right, guess=exact + 1e-3 * numbers(4, SIZE, seed=11), tolerance=1e-4)
    assert warm.steps < cold.steps


def test_a_preconditioner_saves_products():
    scales = torch.logspace(-3, 3, SIZE, dtype=torch.float64)
    a = scales[:, None] * matrix(10) * scales
    right = numbers(4, SIZE, seed=12)
    plain = solve(times(a), right, tolerance=1e-3, max_steps=400)
    helped = solve(times(a), right, precondition=lambda rows: rows / a.diagonal(), tolerance=1e-3)
    assert helped.steps < plain.steps / 2
    reached = squared_errors(a, helped, right) / squared_lengths(a, right)
    assert reached.max() < 4e-6


def test_more_right_hand_sides_need_fewer_products_each():
    a = matrix(1e4, 300)
    steps = [
        solve(times(a), numbers(count, 300, seed=13), tolerance=1e-3).steps
        for count in (1, 4, 16, 64)
    ]
    assert all(more <= fewer for fewer, more in pairwise(steps))
    assert steps[-1] < steps[0] / 10


def test_the_number_of_steps_is_bounded():
    a, right = matrix(1e8), numbers(1, SIZE, seed=14)
    assert solve(times(a), right, tolerance=1e-14, max_steps=5).steps == 5


@pytest.mark.parametrize(
    "flipped", [-torch.eye(SIZE), torch.diag(torch.tensor([-5.0] + [1.0] * 59))]
)
def test_a_matrix_that_is_not_positive_definite_is_refused(flipped):
    with pytest.raises(OptionError, match="not positive definite"):
        solve(times(flipped.double()), numbers(3, SIZE, seed=15))


def test_nan_is_refused():
    with pytest.raises(OptionError, match="NaN"):
        solve(lambda rows: rows * float("nan"), numbers(3, SIZE, seed=16))


def test_single_precision_reaches_single_precision():
    a, right = matrix(1e3, 200), numbers(5, 200, seed=17)
    found = solve(times(a), right.float(), tolerance=1e-4)
    assert found.solution.dtype == torch.float32
    reached = (squared_errors(a, found, right) / squared_lengths(a, right)).sqrt()
    assert reached.max() < 5e-4


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    "options",
    [
        *({"max_steps": value} for value in (0, -5, 1.5)),
        *({"tolerance": value} for value in (0.0, -1.0, float("nan"), "a")),
    ],
)
def test_when_to_stop_is_checked(options):
    with pytest.raises(OptionError) as caught:
        solve(times(matrix()), numbers(1, SIZE, seed=1), **options)
    assert [caught.value.where] == list(options)
