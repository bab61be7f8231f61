"""The benchmarks run: each at a size that shows nothing but that it works."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from laplace_scenarios import classification, numbers

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script by its name, as if it were started in its own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def load(name):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_expectation_measures_every_method_against_every_design(benchmark, tmp_path):
    script = benchmark("expectation")
    rows = script.measure(width=8, depth=2, networks=1, truth_samples=8192)
    assert [row.method for row in rows] == list(script.METHODS)
    for row in rows:
        assert set(row.at_equal_flops) == set(row.at_equal_time) == set(script.DESIGNS)
        assert row.seconds > 0
        assert row.flops > 0
    assert rows[0].error > rows[1].error  # order 1 is worse than order 2
    timings = script.speed(width=8, depth=1, repeats=1)
    report = script.table(rows, timings)
    assert report.count("| 8 | 2 |") == len(rows)
    script.plot(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    again = script.retime(rows)
    assert [row.error for row in again] == [row.error for row in rows]


def test_digits_compares_every_order_with_sampling(benchmark, tmp_path):
    benchmark("expectation")
    benchmark("digits").main(["--samples", "20000", "--output", str(tmp_path)])
    errors = json.loads((tmp_path / "digits.json").read_text())
    assert errors["order 3"]["error"] < errors["order 2"]["error"] < errors["order 1"]["error"]
    assert "standard deviations above the mean" in (tmp_path / "digits.md").read_text()


def test_published_code_asks_for_its_clone(benchmark, capsys):
    benchmark("expectation")
    with pytest.raises(SystemExit):
        benchmark("published_code").main([])
    assert "--rival" in capsys.readouterr().err


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


def test_laplace_measures_time_and_memory_in_a_process(benchmark, tmp_path):
    script = benchmark("laplace")
    case = script.Case(3, 4, ("sampled",), (), examples=40)
    script.main(["--draws", "16", "--output", str(tmp_path)], cases=(case,))
    (row,) = json.loads((tmp_path / "laplace.json").read_text())["cases"][0]["rows"]
    # Processor time has a coarse clock: the parts of a tiny run may both be zero.
    assert row["wall"] > 0
    assert 0 <= row["predict"] <= 60
    assert row["megabytes"] < 500
    assert "ours, sampled, 16 draws" in (tmp_path / "laplace.md").read_text()


def test_laplace_reports_a_rival_that_fails(benchmark, tmp_path):
    script = benchmark("laplace")
    case = script.Case(3, 4, (), ("full",), examples=8)
    script.write_problem(case, tmp_path)
    row = script.measure(sys.executable, case, "laplace-torch", "full", tmp_path, 1)
    assert "laplace" in row["failure"]


def test_gibbs_counts_sweeps(benchmark, tmp_path, capsys):
    script = benchmark("gibbs")
    assert script.main(["--quick", "--seconds", "0.1", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gibbs.json").read_text("utf-8"))
    (row,) = report["chain-sweeps per second"]
    assert row["ours"] > row["chains"]
    assert "n=30 d=2 K=2, 128 chains" in capsys.readouterr().out


def test_samplers_are_judged_by_effective_draws(benchmark, tmp_path):
    script = benchmark("samplers")
    assert script.main(["--quick", "--chains", "2", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "samplers.json").read_text("utf-8"))["runs"]
    made = [(row["sampler"], row["mass"]) for row in rows]
    assert made == [(s, m) for m in ("diagonal", "dense") for s in ("NUTS", "HMC")]
    assert all(row["effective"] > 0 and row["largest z of a mean"] < 10 for row in rows)


@pytest.mark.parametrize("name", ["gaussian", "logistic", "network"])
def test_a_target_is_one_density_in_both_forms(benchmark, name):
    script = benchmark("samplers")
    target = script.TARGETS[name]()
    points = 0.1 * torch.randn(3, target.size, dtype=torch.float64)
    together = target.torch_log_density({"x": points})
    assert together.shape == (3,)
    alone = torch.cat([target.torch_log_density({"x": point[None]}) for point in points])
    torch.testing.assert_close(together, alone)
    if name == "gaussian":
        theirs = torch.tensor([target.jax_log_density(point.numpy()) for point in points])
        torch.testing.assert_close(together, theirs.double())


@pytest.fixture
def coefficients(benchmark, monkeypatch):
    """The benchmark of learning coefficients, without its processes."""
    script = benchmark("learning_coefficient")
    monkeypatch.setattr(script, "CHECKPOINTS", (2, 3))
    monkeypatch.setattr(
        script, "measure", lambda _, folder, **job: script.perform(script.complete(folder, job))
    )
    return script


def test_learning_coefficients_are_compared_at_equal_time(coefficients, tmp_path):
    options = ["--examples", "40", "--chains", "2", "--steps", "16", "--repeats", "1"]
    options += ["--seconds", "0.1", "--truth", "1", "0.1", "2", "0.1"]
    options += ["--batches", "8", "--draws", "16", "--output", str(tmp_path)]
    assert coefficients.main([*options, "--parts", "cost", "batch"]) == 0
    assert coefficients.main([*options, "--parts", "error"]) == 0  # adds to what is there
    found = json.loads((tmp_path / "learning_coefficient.json").read_text("utf-8"))
    (row,) = found["cost"]
    assert row["us"] > 0
    assert [row["batch"] for row in found["batch"]] == [8]
    for row, truth in zip(found["error"]["rows"], (1, 2), strict=True):
        assert row["truth"] == truth
        assert row["error"] == pytest.approx(abs(row["values"][0] - truth))
    report = (tmp_path / "learning_coefficient.md").read_text("utf-8")
    assert report.count("| ours |") == 4


def test_learning_coefficients_ask_for_a_rival_that_works(benchmark, tmp_path):
    script = benchmark("learning_coefficient")
    script.write_problem(tmp_path, (1,), 40)
    job = {"part": "cost", "side": script.RIVALS[0], "checkpoint": 1, "chains": 2, "steps": 2}
    with pytest.raises(SystemExit, match="devinterp"):
        script.measure(sys.executable, tmp_path, **job)


def test_cut_batches_hold_every_digit_once(benchmark):
    script = benchmark("learning_coefficient")
    x = torch.arange(10)
    data = torch.utils.data.TensorDataset(x, -x)
    loader = script.CutBatches(data, batch_size=5, shuffle=True, drop_last=True)
    inputs, targets = (torch.cat(part) for part in zip(*loader, strict=True))
    assert inputs.sort().values.tolist() == x.tolist()
    assert torch.equal(targets, -inputs)
