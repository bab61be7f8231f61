"""matplotlib, which is optional: imported when a picture is drawn, or refused with a remedy."""

from __future__ import annotations

from typing import Any

from pushforward.errors import OptionError

__all__ = ["import_pyplot"]


def import_pyplot() -> Any:
    """`matplotlib.pyplot`.

    Returns
    -------
    module
        Imported now.

    Raises
    ------
    OptionError
        When matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise OptionError(
            "matplotlib is not installed",
            where="plots",
            advice="Run: pip install 'pushforward[plot]'.",
        ) from error
    return pyplot
