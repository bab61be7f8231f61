"""The cost of a large network, on small images."""

import importlib
import json


def test_a_large_network_in_small(tmp_path, capsys):
    module = importlib.import_module("reproductions.large_network")
    output = tmp_path / "result.json"
    arguments = ["--images", "1", "--draws", "1", "--size", "32", "--output", str(output)]
    assert module.main(arguments) == 0
    result = json.loads(output.read_text("utf-8"))
    assert result["parameters"] == 25_503_912
    assert result["peak bytes"] > 5 * 4 * result["parameters"]
    assert result["seconds a pass"] > 0
    assert "a round over 1,281,167 images, extrapolated" in capsys.readouterr().out
