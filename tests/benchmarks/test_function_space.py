"""The benchmark of function-space distances, at a size that shows only that it works."""

import json

import pytest


@pytest.fixture
def script(benchmark):
    return benchmark("function_space")


def test_every_method_has_its_cost_and_error(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "STEPS", (3,))
    x, y = script.digits()
    monkeypatch.setattr(script, "digits", lambda: (x[::6], y[::6]))
    settings = ["--widths", "4", "--steps", "5", "--draws", "20", "--repeats", "1"]
    assert script.main([*settings, "--output", str(tmp_path)]) == 0
    (case,) = json.loads((tmp_path / "function_space.json").read_text())
    assert case["parameters"] == 65 * 4 + 5 * 4 + 5 * 10
    rows = case["rows"]
    assert {f"{name}{parts}" for name in script.ESTIMATORS for parts in ("", ", 10 classes")} < set(
        rows
    )
    assert rows[script.EXACT]["error"] == 0
    for name, row in rows.items():
        assert row["bytes"] > 0, name
        assert row["with gradient"] > 0, name
        assert 0 <= row["error"] < 20, name
        assert -1 <= row["cosine"] <= 1 + 1e-6, name
    text = (tmp_path / "function_space.md").read_text()
    assert text in capsys.readouterr().out
    assert all(f"| {name} | " in text for name in rows)


def test_a_method_that_refuses_says_why(script, tmp_path, monkeypatch):
    def refuse():
        raise script.PushforwardError("too wide", where="estimator", advice="Take another.")

    exact = script.methods
    monkeypatch.setattr(script, "STEPS", (2,))
    monkeypatch.setattr(
        script, "methods", lambda *a: {script.EXACT: exact(*a)[script.EXACT], "other": refuse}
    )
    script.main(["--widths", "2", "--steps", "1", "--output", str(tmp_path), "--repeats", "1"])
    assert "| other | estimator: too wide" in (tmp_path / "function_space.md").read_text()
