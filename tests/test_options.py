"""Options that are numbers or names: what is read, and what is refused in which words."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from pushforward.errors import OptionError
from pushforward.options import choice, number, whole_number


@pytest.mark.parametrize(
    "value", [5, np.int64(5), np.uint8(5), np.array(5), torch.tensor(5)], ids=repr
)
def test_whole_numbers_of_any_kind_come_back_plain(value):
    found = whole_number(value, "num_draws")
    assert type(found) is int
    assert found == 5


@pytest.mark.parametrize(
    "value",
    [0.5, np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2)],
    ids=repr,
)
def test_numbers_of_any_kind_come_back_plain(value):
    found = number(value, "temperature", above=0)
    assert type(found) is float
    assert found == 0.5


@pytest.mark.parametrize("value", [2, np.int32(2)], ids=repr)
def test_whole_numbers_are_numbers(value):
    found = number(value, "temperature")
    assert type(found) is float
    assert found == 2.0


@pytest.mark.parametrize(
    "value",
    [True, np.True_, 2.0, np.float64(2), float("nan"), float("inf"), "2", None, [2], 2 + 0j],
    ids=repr,
)
def test_what_is_no_whole_number(value):
    with pytest.raises(OptionError, match=r"^bits: .* is no whole number\. Give a positive whole"):
        whole_number(value, "bits")


@pytest.mark.parametrize(
    "value", [False, np.False_, "2", None, [2.0], np.ones(2), torch.ones(1), 2 + 0j], ids=repr
)
def test_what_is_no_number(value):
    with pytest.raises(OptionError, match=r"^share: (.|\n)* is no number\. Give a number from 0"):
        number(value, "share", least=0, most=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -np.inf, np.float32("nan")])
def test_infinity_and_nan_are_no_finite_numbers(value):
    with pytest.raises(OptionError, match=r"^nbeta: -?(nan|inf) is no finite number\. "):
        number(value, "nbeta")


@pytest.mark.parametrize(
    ("value", "limits", "words"),
    [
        (0, {}, "0 is out of range. Give a positive whole number."),
        (np.int64(-1), {"least": 0}, "-1 is out of range. Give a whole number from 0 on."),
        (1, {"least": 2, "most": 16}, "1 is out of range. Give a whole number from 2 to 16."),
        (17, {"least": 2, "most": 16}, "17 is out of range. Give a whole number from 2 to 16."),
        (0, {"advice": "Give more."}, "0 is out of range. Give more."),
    ],
)
def test_whole_numbers_out_of_range(value, limits, words):
    with pytest.raises(OptionError) as caught:
        whole_number(value, "bits", **limits)
    assert str(caught.value) == f"bits: {words}"
    assert caught.value.where == "bits"


@pytest.mark.parametrize(
    ("value", "limits", "words"),
    [
        (0, {"above": 0}, "0 is out of range. Give a positive number."),
        (np.float32(-0.5), {"least": 0}, "-0.5 is out of range. Give a number from 0 on."),
        (1.0, {"above": 0, "below": 1}, "1.0 is out of range. Give a number between 0 and 1."),
        (1.5, {"least": 0, "most": 1}, "1.5 is out of range. Give a number from 0 to 1."),
        (
            1.0,
            {"least": 0, "below": 1},
            "1.0 is out of range. Give a finite number from 0 and below 1.",
        ),
        (
            0,
            {"above": 0, "most": 1},
            "0 is out of range. Give a finite number above 0 and up to 1.",
        ),
        (1.0, {"above": 1}, "1.0 is out of range. Give a finite number above 1."),
        (-3, {"above": 0, "advice": "Give 2."}, "-3 is out of range. Give 2."),
    ],
)
def test_numbers_out_of_range(value, limits, words):
    with pytest.raises(OptionError) as caught:
        number(value, "tolerance", **limits)
    assert str(caught.value) == f"tolerance: {words}"
    assert caught.value.where == "tolerance"


@pytest.mark.parametrize(
    ("value", "limits"),
    [(0, {"least": 0}), (1, {"most": 1}), (1e-9, {"above": 0}), (0.999, {"below": 1}), (-7, {})],
)
def test_ends_that_belong_to_the_range(value, limits):
    assert number(value, "x", **limits) == value


def test_ends_of_whole_numbers_belong_to_the_range():
    assert whole_number(2, "bits", least=2, most=16) == 2
    assert whole_number(16, "bits", least=2, most=16) == 16


def test_long_values_are_not_shown_in_full():
    with pytest.raises(OptionError) as caught:
        whole_number("9" * 500, "bits")
    assert len(str(caught.value)) < 200


def test_one_of_the_names_comes_back():
    assert choice("kl", "metric", ("euclidean", "kl")) == "kl"
    assert choice("kl", "metric", {"euclidean": 1, "kl": 2}) == "kl"


@pytest.mark.parametrize("value", ["l1", "", None, 3, ["kl"], np.array(["kl", "l1"])], ids=repr)
def test_names_that_there_are_not(value):
    with pytest.raises(OptionError, match=r"^metric: there is no metric ") as caught:
        choice(value, "metric", ("euclidean", "kl"))
    assert caught.value.advice == "Choose one of 'euclidean', 'kl'."
