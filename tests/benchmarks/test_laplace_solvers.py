"""The race of solvers for posterior draws."""

import json

import pytest
import torch

from laplace_scenarios import classification, numbers


@pytest.fixture
def small_problem(benchmark):
    script = benchmark("laplace_solvers")
    net, x, y = classification(num_examples=130)
    return script, script.problem("small", net, x, y, 0.5, 4, exact=True)


def test_solvers_are_measured_against_solutions(small_problem):
    _, task = small_problem
    rows = task.rows.flatten(0, 1)
    vectors = task.start
    torch.testing.assert_close(rows.T @ rows @ vectors.T, task.linear.product(vectors).T)
    error, bias = task.measure(task.truth)
    assert abs(error) < 1e-20
    assert abs(bias) < 1e-10
    inverse = torch.linalg.inv(rows.T @ rows + 0.5 * torch.eye(rows.shape[1], dtype=rows.dtype))
    off = task.truth / 3
    expected = torch.einsum("kp,pq,kq->k", off, torch.linalg.inv(inverse), off).mean() / task.gamma
    assert task.measure(task.truth + off)[0] == pytest.approx(float(expected), rel=1e-6)


def test_every_solver_comes_to_the_solution(small_problem, tmp_path):
    script, task = small_problem
    found = script.race(task, most=50)
    for row in found["solvers"]:
        errors = [error for error, _ in row["curve"].values()]
        assert errors[-1] < (1e-6 if "CG" in row["solver"] else 0.1)
    report = script.table(found)
    assert all(f"| {name} |" in report for name in script.SOLVERS)
    script.record(found, tmp_path)
    script.record({**found, "solvers": found["solvers"][:1]}, tmp_path)  # adds to what is there
    races = json.loads((tmp_path / "laplace_solvers.json").read_text())
    assert [len(race["solvers"]) for race in races] == [len(script.SOLVERS)]


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_kronecker_preconditioner_is_exact_for_one_example_and_layer(benchmark, kind):
    script = benchmark("laplace_solvers")
    if kind == "linear":
        net, x = torch.nn.Sequential(torch.nn.Linear(18, 4)), numbers(1, 18, seed=0)
    else:  # one position: the whole image
        net = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.Flatten())
        x = numbers(1, 2, 3, 3, seed=0)
    task = script.problem("one", net.double().eval(), x, torch.tensor([2]), 0.5, 6, exact=True)
    sketch = task.linear.sketch(range(6), 0).vectors
    matrix = sketch.T @ sketch / 6 + 0.5 * torch.eye(76, dtype=torch.float64)
    vectors = numbers(2, 76, seed=1)
    torch.testing.assert_close(
        script.kronecker(task)(vectors), torch.linalg.solve(matrix, vectors.T).T
    )
