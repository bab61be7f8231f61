"""What happens where there is no matplotlib."""

import sys

import pytest

from pushforward.errors import OptionError
from pushforward.runs.pictures import import_pyplot


def test_without_matplotlib_there_is_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"pip install 'pushforward\[plot\]'"):
        import_pyplot()


def test_with_it_there_is_pyplot():
    pytest.importorskip("matplotlib")
    assert hasattr(import_pyplot(), "subplots")
