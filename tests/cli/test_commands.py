"""The commands from end to end, and their errors without traceback."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pushforward import __version__
from pushforward.cli import main

FACTORY = """
    from torch import nn

    def build(hidden=16):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3)
        ).double()

    def softmaxed():
        return nn.Sequential(nn.Linear(6, 16), nn.Softmax(dim=1))
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "command_factories.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "command_factories", raising=False)
    generator = torch.Generator().manual_seed(0)
    state = {
        "1.weight": torch.randn(16, 6, generator=generator, dtype=torch.float64) / 2,
        "1.bias": torch.randn(16, generator=generator, dtype=torch.float64) / 4,
        "3.weight": torch.randn(3, 16, generator=generator, dtype=torch.float64) / 4,
        "3.bias": torch.zeros(3, dtype=torch.float64),
    }
    save_file(state, tmp_path / "model.safetensors")
    x = torch.randn(60, 2, 3, generator=generator, dtype=torch.float64) + 1
    np.savez(tmp_path / "data.npz", x=x.numpy(), y=np.zeros(60))
    return tmp_path


NETWORK = ["command_factories:build", "--weights", "model.safetensors"]
LAW = ["--data", "data.npz"]


def test_report_writes_page_and_numbers(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("report", *NETWORK, *LAW),
        *("--labels", "cat", "dog", "<cow>"),
        *("--events", "f[cat] > f[dog]", "f[2] < 0.25"),
        *("--samples", "600", "--seed", "4", "--output", "out", "--title", "Animals"),
    ]
    assert main(arguments) == 0
    page = (workplace / "out" / "index.html").read_text(encoding="utf-8")
    assert "<h1>Animals</h1>" in page
    assert "f[cat] &gt; f[dog]" in page
    assert "60 examples in data.npz" in page
    assert __version__ in page
    result = json.loads((workplace / "out" / "result.json").read_text(encoding="utf-8"))
    assert result["environment"]["Command"] == shlex.join(["pushforward", *arguments])
    numbers = result["sections"]["expected-output"]["results"]
    assert numbers["labels"] == ["cat", "dog", "<cow>"]
    assert numbers["events"]["names"] == ["f[cat] > f[dog]", "f[2] < 0.25"]
    assert numbers["sampled"]["num_samples"] >= 600
    assert numbers["num_examples"] == 60
    assert "index.html" in capsys.readouterr().out


def test_report_is_reproducible(workplace: Path) -> None:
    for name in ("first", "second"):
        arguments = ["report", *NETWORK, "--standard", "2", "3", "--samples", "300"]
        assert main([*arguments, "--output", name]) == 0
    first, second = (
        json.loads((workplace / name / "result.json").read_text())["sections"]["expected-output"]
        for name in ("first", "second")
    )
    assert first["results"]["outputs"] == second["results"]["outputs"]
    assert first["results"]["events"] == second["results"]["events"]


def test_expect_prints_the_table_and_writes_json(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["expect", *NETWORK, *LAW, "--tolerance", "0.05", "--labels", "a", "b", "[red]c"]
    assert main([*arguments, "--json", "out/expected.json"]) == 0
    printed = capsys.readouterr().out
    assert "[red]c" in printed
    result = json.loads((workplace / "out" / "expected.json").read_text(encoding="utf-8"))
    assert result["labels"] == ["a", "b", "[red]c"]
    assert len(result["value"]) == 3
    assert all(error >= 0 for error in result["standard_error"])
    # Both ends of the value's first digits are in the table, with a typographic minus.
    assert f"{result['value'][0]:.1f}".replace("-", "\u2212") in printed


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["report", "nowhere:build", *LAW], ["nowhere:build", "cannot be imported"]),
        (["report", *NETWORK, "--data", "absent.npz"], ["absent.npz", "no such file"]),
        (["report", *NETWORK, "--data", "model.safetensors"], ["model.safetensors"]),
        (
            ["expect", "command_factories:build", "--weights", "data.npz", *LAW],
            ["data.npz", "not a complete safetensors file"],
        ),
        (
            ["expect", *NETWORK, "--factory-options", '{"hidden": 8}', *LAW],
            ["1.weight (16, 6) instead of (8, 6)"],
        ),
        (["report", *NETWORK], ["--data and --standard"]),
        (["report", *NETWORK, "--standard", "5"], ["5"]),
        (["report", *NETWORK, *LAW, "--labels", "a"], ["labels"]),
        (["report", *NETWORK, *LAW, "--events", "f[9] > 0"], ["no output '9'"]),
        (["report", *NETWORK, *LAW, "--samples", "0"], ["num_samples"]),
        (["report", "command_factories:softmaxed", "--standard", "6"], ["Softmax"]),
        (["expect", *NETWORK, *LAW, "--tolerance", "-1"], ["tolerance"]),
        (["expect", *NETWORK, *LAW, "--tolerance", "1", "--json", "data.npz/x"], ["data.npz/x"]),
        (["expect", *NETWORK, *LAW, "--json", "data.npz"], ["also --data", "overwritten"]),
        (["expect", *NETWORK, *LAW, "--json", "./model.safetensors"], ["also --weights"]),
    ],
)
def test_bad_input_is_explained_without_traceback(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    for part in parts:
        assert part in captured.err
    what, advice = captured.err.strip().split("\n  ", 1)
    assert what
    assert advice


def test_arguments_that_are_none_exit_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert main(["nonsense"]) == 2
    assert main(["report", *NETWORK, *LAW, "--order", "4"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("report", "expect", "uncertainty", "demo"))
    assert main(["report", "--help"]) == 0
    assert "safetensors" in capsys.readouterr().out


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pushforward {__version__}\n"


def test_module_runs_and_help_needs_no_torch() -> None:
    code = (
        "import sys, pushforward.cli\n"
        "assert pushforward.cli.main(['expect', '--help']) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-m", "pushforward", "--version"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().endswith(__version__)
