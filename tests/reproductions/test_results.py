"""Results that are made once, and the table at the end."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from pushforward.errors import OptionError


@pytest.fixture
def results():
    return importlib.import_module("reproductions.results")


@dataclass(frozen=True)
class Options:
    output: Path
    seeds: tuple[int, ...] = (0, 1)
    widths: tuple[int, ...] = (3, 4)
    cache: Path | None = Path("cache")


def test_settings_are_found_again_in_their_file(results, tmp_path):
    settings = results.settings_of(Options(tmp_path), ("output", "seeds"), seed=1, widths=(5, 6))
    assert settings == {"widths": [5, 6], "cache": "cache", "seed": 1}
    path = tmp_path / "result.json"
    assert results.read_result(path, settings) is None
    results.write_result(path, {"settings": settings, "value": 0.5})
    assert results.read_result(path, settings) == {"settings": settings, "value": 0.5}
    assert results.read_result(path, settings | {"seed": 2}) is None
    assert results.read_result(path)["value"] == 0.5


def test_a_file_without_settings_has_no_given_ones(results, tmp_path):
    path = tmp_path / "result.json"
    results.write_result(path, {"value": 1})
    assert results.read_result(path, {"seed": 0}) is None
    assert results.read_result(path) == {"value": 1}


def test_a_study_ends_in_a_table(results, tmp_path, capsys):
    path = tmp_path / "new" / "table.md"
    assert results.report(path, ({"n": n} for n in range(2)), json.dumps) == 0
    assert path.read_text("utf-8") == '[{"n": 0}, {"n": 1}]'
    assert capsys.readouterr().out == path.read_text("utf-8") + "\n"


def test_a_study_that_is_refused_leaves_no_table(results, tmp_path, capsys):
    def refused():
        yield {"n": 0}
        raise OptionError("too many", where="networks", advice="Ask for fewer.")

    assert results.report(tmp_path / "table.md", refused(), json.dumps) == 2
    assert "error: networks: too many" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_single_value_has_no_spread(results):
    assert results.mean_and_spread([2.0]) == "2"
    assert results.mean_and_spread([1.0, 3.0]) == "2 ± 1.4"
    assert results.mean_and_spread([1.0, 3.0], ".2f", ".3f") == "2.00 ± 1.414"
