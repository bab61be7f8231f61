"""Sweeps are counted."""

import json


def test_gibbs_counts_sweeps(benchmark, tmp_path, capsys):
    script = benchmark("gibbs")
    assert script.main(["--quick", "--seconds", "0.1", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gibbs.json").read_text("utf-8"))
    (row,) = report["chain-sweeps per second"]
    assert row["ours"] > row["chains"]
    assert "n=30 d=2 K=2, 128 chains" in capsys.readouterr().out
