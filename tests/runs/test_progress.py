import io
import subprocess
import sys

import pytest

from pushforward.runs import progress
from pushforward.runs.progress import track


class Terminal(io.StringIO):
    def isatty(self):
        return True


def count(enabled, steps=3):
    with track(steps, "Counting", enabled=enabled) as advance:
        for _ in range(steps):
            advance(1)


def test_bar_goes_to_standard_error(capsys):
    count(True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Counting" in captured.err
    assert "100%" in captured.err


def test_unfinished_work_is_shown_as_unfinished(capsys):
    with track(4, "Counting", enabled=True) as advance:
        advance(1)
    assert "25%" in capsys.readouterr().err


def test_unknown_total_is_allowed(capsys):
    with track(None, "Counting", enabled=True) as advance:
        advance(1)
    assert "Counting" in capsys.readouterr().err


def test_disabled_bar_is_silent_even_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    count(False)
    assert terminal.getvalue() == ""


def test_bar_is_silent_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    count(None)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_no_standard_error_at_all_is_silent(monkeypatch):
    # Windowed Python programs run without one.
    monkeypatch.setattr(sys, "stderr", None)
    count(None)


def test_terminal_sees_long_work_only(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    count(None)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    count(None)
    assert "Counting" in terminal.getvalue()


def test_bar_ends_when_the_work_fails(capsys):
    with pytest.raises(RuntimeError, match="stop"), track(2, "Counting", enabled=True):
        raise RuntimeError("stop")
    assert capsys.readouterr().err.endswith("\n")
    # A bar left running would make rich refuse a second one on the same console.
    count(True)


def test_rich_is_not_imported_until_a_bar_is_shown():
    code = (
        "import sys; from pushforward.runs.progress import track\n"
        "with track(1, 'x', enabled=False) as advance: advance(1)\n"
        "sys.exit('rich.progress' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    assert run.returncode == 0
