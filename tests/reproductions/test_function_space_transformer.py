"""The reproduction on a small transformer, made tiny."""

import importlib
import json

import pytest


@pytest.fixture
def script():
    return importlib.import_module("reproductions.function_space_transformer")


def arguments(folder):
    settings = {
        "prime": "5",
        "blocks": "1",
        "seeds": "0",
        "width": "8",
        "hidden": "8",
        "first-epochs": "2",
        "second-epochs": "3",
        "samples": "60",
        "stored": "6",
    }
    given = [part for key, value in settings.items() for part in (f"--{key}", value)]
    return ["--output", str(folder), *given]


def test_it_compares_estimators(script, tmp_path, capsys):
    assert script.main(arguments(tmp_path)) == 0
    found = json.loads((tmp_path / "function_space_transformer.json").read_text(encoding="utf-8"))
    rows = {row["estimator"]: row for row in found["results"]}
    assert list(rows) == ["true", "synthetic 60", "stored 6", "tangent 6"]
    assert rows["true"]["log_error"] == 0
    assert rows["true"]["cosine"] == pytest.approx(1)
    assert rows["synthetic 60"]["log_error"] < 1
    assert rows["tangent 6"]["cosine"] > 0
    table = (tmp_path / "function_space_transformer.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert len(table.splitlines()) == 2 + 4


def test_the_seed_decides(script, tmp_path):
    texts = []
    for name in ("first", "second"):
        assert script.main(arguments(tmp_path / name)) == 0
        texts.append((tmp_path / name / "function_space_transformer.json").read_text())
    assert texts[0] == texts[1]
