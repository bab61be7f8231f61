"""The benchmarks of propagation, at sizes that show only that they work."""

import json

import pytest


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
