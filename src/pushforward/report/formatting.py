"""Numbers as people read them: as many digits as their error allows, powers of ten, durations."""

from __future__ import annotations

import math

__all__ = [
    "MINUS",
    "MISSING",
    "TIMES",
    "duration",
    "interval",
    "number",
    "power_of_ten",
    "probability",
    "ratio",
    "scientific",
    "with_error",
]

MINUS, TIMES, MISSING = "\u2212", "\u00d7", "\u2013"
_TIMES = f"\u00a0{TIMES}\u00a0"  # numbers do not break over lines
_SUPERSCRIPTS = str.maketrans("-0123456789", "\u207b⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 4) -> str:
    """A number with a few significant digits, as a power of ten when it is very large or small.

    Parameters
    ----------
    value
        Any float; what is not finite becomes a dash.
    digits
        Significant digits.

    Returns
    -------
    str
        With a typographic minus sign.

    Examples
    --------
    >>> number(1234.5678), number(476548, 2), number(0.00012, 2)
    ('1,235', '480,000', '0.00012')
    """
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return scientific(value, digits)
    decimals = digits - 1 - _exponent(value, digits)
    return _signed(f"{round(value, decimals):,.{max(0, decimals)}f}")


def scientific(value: float, digits: int = 3) -> str:
    """A number as a power of ten, from a thousand upwards and below a hundredth.

    Parameters
    ----------
    value
        Any float; what is not finite becomes a dash.
    digits
        Significant digits.

    Returns
    -------
    str
        Such as ``"2.81 × 10⁷"``.
    """
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    exponent = _exponent(value, digits)
    if -2 <= exponent < 3:
        return _signed(f"{value:.{max(0, digits - 1 - exponent)}f}")
    mantissa = _signed(f"{value / 10.0**exponent:.{digits - 1}f}")
    return f"{mantissa}{_TIMES}{power_of_ten(exponent)}"


def power_of_ten(exponent: int) -> str:
    """``10`` with a superscript.

    Parameters
    ----------
    exponent
        Any integer.

    Returns
    -------
    str
        Such as ``"10⁻³"``.
    """
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def with_error(value: float, error: float | None) -> str:
    """A value with its standard error, both to the second digit of the error.

    Parameters
    ----------
    value, error
        The error may be None or not finite when it is not known.

    Returns
    -------
    str
        Such as ``"1.2345 ± 0.0021"``.

    Examples
    --------
    >>> with_error(1.234567, 0.00213)
    '1.2346 ± 0.0021'
    """
    if error is None or not math.isfinite(error):
        return number(value)
    if not math.isfinite(value):
        return MISSING
    if error <= 0:
        return f"{number(value, 6)} ± 0"
    decimals = 1 - _exponent(error, 2)
    if decimals > 9 or abs(value) >= 1e9:
        return f"{scientific(value, 6)} ± {scientific(error, 2)}"
    decimals = max(0, decimals)
    return _signed(f"{value:,.{decimals}f} ± {error:,.{decimals}f}")


def probability(value: float) -> str:
    """A probability to three digits, as a power of ten below a hundredth.

    Parameters
    ----------
    value
        In [0, 1].

    Returns
    -------
    str
        Such as ``"0.309"`` or ``"4.75 × 10⁻⁵"``.
    """
    if value > 0.999 and value != 1:
        return f"1 {MINUS} {scientific(1 - value, 2)}"
    return scientific(value, 3)


def interval(lower: float, upper: float) -> str:
    """An interval of probabilities, both ends with the same power of ten.

    Parameters
    ----------
    lower, upper
        In [0, 1].

    Returns
    -------
    str
        Such as ``"0.210 to 0.213"`` or ``"(1.4 to 3.2) × 10⁻⁴"``.
    """
    if not (math.isfinite(lower) and 0 < upper < 1e-2):
        return f"{probability(lower)} to {probability(upper)}"
    exponent = _exponent(upper, 2)
    scale = 10.0**exponent
    return f"({lower / scale:.1f} to {upper / scale:.1f}){_TIMES}{power_of_ten(exponent)}"


def ratio(value: float) -> str:
    """How many times, with fewer digits the larger it is.

    Parameters
    ----------
    value
        Positive.

    Returns
    -------
    str
        Such as ``"1.04 ×"`` or ``"110 ×"``.
    """
    if not math.isfinite(value):
        return MISSING
    return f"{number(value, 3 if value < 2 else 2)}\u00a0{TIMES}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    Parameters
    ----------
    seconds
        Not negative.

    Returns
    -------
    str
        Such as ``"39 ms"``, ``"1.20 s"`` or ``"3 min 5 s"``.
    """
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 1:
        return f"{number(1e3 * seconds, 2)} ms"
    if seconds < 60:
        return f"{number(seconds, 3)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest} s"


def _exponent(value: float, digits: int) -> int:
    """The power of ten that `value` has once it is rounded to `digits` digits.

    Returns
    -------
    int
        0 for numbers from 1 to 9.99.
    """
    return int(f"{value:.{digits - 1}e}".partition("e")[2])


def _signed(text: str) -> str:
    return text.replace("-", MINUS)
