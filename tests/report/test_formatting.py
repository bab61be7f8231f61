"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest

from pushforward.report import formatting


def plain(text: str) -> str:
    return text.replace("\u00a0", " ").replace("\u2212", "-").replace("\u00d7", "x")


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (1234.5678, 4, "1,235"),
        (-0.05, 2, "-0.050"),
        (9.9996, 4, "10.00"),
        (476548.0, 2, "480,000"),
        (1.25e-7, 2, "1.2 x 10⁻⁷"),
        (0.0, 4, "0"),
        (math.nan, 4, "\u2013"),
    ],
)
def test_number_keeps_significant_digits(value: float, digits: int, expected: str) -> None:
    assert plain(formatting.number(value, digits)) == expected


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (1.234567, 0.00213, "1.2346 ± 0.0021"),
        (-10.4807, 0.0996, "-10.48 ± 0.10"),
        (12345.6, 123.0, "12,346 ± 123"),
        (2.0, 0.0, "2.00000 ± 0"),
        (0.5, None, "0.5000"),
        (0.5, math.nan, "0.5000"),
        (1.0, 1e-12, "1.00000 ± 1.0 x 10⁻¹²"),
    ],
)
def test_value_and_error_end_at_the_same_digit(
    value: float, error: float | None, expected: str
) -> None:
    assert plain(formatting.with_error(value, error)) == expected


def test_scientific_rounds_up_to_the_next_power() -> None:
    assert plain(formatting.scientific(9.9999e6)) == "1.00 x 10⁷"
    assert plain(formatting.scientific(0.0123)) == "0.0123"
    assert plain(formatting.scientific(-2.5e-5)) == "-2.50 x 10⁻⁵"


def test_probability_near_one_shows_its_complement() -> None:
    assert plain(formatting.probability(0.30941)) == "0.309"
    assert plain(formatting.probability(4.75e-5)) == "4.75 x 10⁻⁵"
    assert plain(formatting.probability(1 - 3e-6)) == "1 - 3.0 x 10⁻⁶"
    assert plain(formatting.probability(1.0)) == "1.00"


def test_interval_shares_one_power_of_ten() -> None:
    assert plain(formatting.interval(1.38e-4, 3.19e-4)) == "(1.4 to 3.2) x 10⁻⁴"
    assert plain(formatting.interval(0.0, 3.84e-5)) == "(0.0 to 3.8) x 10⁻⁵"
    assert plain(formatting.interval(0.2101, 0.2129)) == "0.210 to 0.213"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0391, "39 ms"), (1.2, "1.20 s"), (185.2, "3 min 5 s"), (math.inf, "\u2013")],
)
def test_duration_chooses_its_unit(seconds: float, expected: str) -> None:
    assert formatting.duration(seconds) == expected


def test_ratio_has_more_digits_near_one() -> None:
    assert plain(formatting.ratio(1.0431)) == "1.04 x"
    assert plain(formatting.ratio(165.7)) == "170 x"
