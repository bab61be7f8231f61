"""Options that are numbers or names: read once, refused everywhere in the same words.

Numbers of NumPy and tensors of one entry are as good as numbers of Python, and come back as
these, so that settings compare, hash and write themselves whoever gave them. Truth values, NaN and
infinity are no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeVar

from pushforward.errors import OptionError

__all__ = ["choice", "number", "whole_number"]

_Name = TypeVar("_Name")


def whole_number(
    value: object, where: str, *, least: int = 1, most: int | None = None, advice: str | None = None
) -> int:
    """A whole number in a range.

    Parameters
    ----------
    value
        What the caller gave. A float is refused even when it is whole.
    where
        Name of the option.
    least, most
        Ends of the range, both allowed; no upper end for None.
    advice
        Instead of the sentence that names the range.

    Returns
    -------
    int
        Plain.

    Raises
    ------
    OptionError
        For what is no whole number, or out of range.

    Examples
    --------
    >>> import numpy as np
    >>> whole_number(np.int64(5), "num_draws")
    5
    """
    plain = _plain(value)
    if advice is None:
        advice = "Give a whole number " + (
            f"from {least} on." if most is None else f"from {least} to {most}."
        )
        if least == 1 and most is None:
            advice = "Give a positive whole number."
    if isinstance(plain, bool) or not isinstance(plain, Integral):
        raise OptionError(f"{_shown(plain)} is no whole number", where=where, advice=advice)
    found = int(plain)
    if found < least or (most is not None and found > most):
        raise OptionError(f"{found} is out of range", where=where, advice=advice)
    return found


def number(
    value: object,
    where: str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    advice: str | None = None,
) -> float:
    """A finite number in a range.

    Parameters
    ----------
    value
        What the caller gave.
    where
        Name of the option.
    above, least
        Lower end of the range, without or with the end itself; one of them or neither.
    below, most
        Upper end, in the same way.
    advice
        Instead of the sentence that names the range.

    Returns
    -------
    float
        Plain.

    Raises
    ------
    OptionError
        For what is no finite number, or out of range.

    Examples
    --------
    >>> import numpy as np
    >>> number(np.float32(0.5), "temperature", above=0)
    0.5
    """
    plain = _plain(value)
    advice = _range_of_numbers(above, least, below, most) if advice is None else advice
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise OptionError(f"{_shown(plain)} is no number", where=where, advice=advice)
    found = float(plain)
    if not math.isfinite(found):
        raise OptionError(f"{found} is no finite number", where=where, advice=advice)
    inside = (
        (above is None or found > above)
        and (least is None or found >= least)
        and (below is None or found < below)
        and (most is None or found <= most)
    )
    if not inside:
        raise OptionError(f"{_shown(plain)} is out of range", where=where, advice=advice)
    return found


def choice(value: _Name, where: str, choices: Iterable[str]) -> _Name:
    """One of some names.

    Parameters
    ----------
    value
        What the caller gave.
    where
        Name of the option.
    choices
        Those that there are, such as ``get_args`` of a ``Literal``.

    Returns
    -------
    str
        `value`.

    Raises
    ------
    OptionError
        For anything else.

    Examples
    --------
    >>> choice("kl", "metric", ("euclidean", "kl"))
    'kl'
    """
    names = tuple(choices)
    if not isinstance(value, str) or value not in names:
        raise OptionError(
            f"there is no {where} {_shown(value)}",
            where=where,
            advice=f"Choose one of {', '.join(map(repr, names))}.",
        )
    return value


def _plain(value: Any) -> object:
    """A number of Python in place of one of NumPy or of a tensor without axes."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _shown(value: object) -> str:
    return f"{value!r:.80}"


def _range_of_numbers(
    above: float | None, least: float | None, below: float | None, most: float | None
) -> str:
    if above == 0 and below is None and most is None:
        return "Give a positive number."
    if above is not None and below is not None:
        return f"Give a number between {above:g} and {below:g}."
    if least is not None and most is not None:
        return f"Give a number from {least:g} to {most:g}."
    if least is not None and below is None:
        return f"Give a number from {least:g} on."
    ends = (
        (above, f"above {above}"),
        (least, f"from {least}"),
        (below, f"below {below}"),
        (most, f"up to {most}"),
    )
    said = " and ".join(words for end, words in ends if end is not None)
    return f"Give a finite number{' ' * bool(said)}{said}."
