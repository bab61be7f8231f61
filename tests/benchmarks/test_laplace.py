"""Time and memory beside the rival, in processes."""

import json
import sys


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
