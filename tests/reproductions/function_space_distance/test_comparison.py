"""Methods beside the truth, in a file that is filled by and by."""

import importlib

import pytest
import torch
from torch import nn

from pushforward.errors import OptionError


@pytest.fixture
def comparison():
    return importlib.import_module("reproductions.function_space_distance.comparison")


@pytest.fixture
def exact(comparison):
    """Build a method whose distance is ``|w|^2``."""

    def square(weights, metric):  # noqa: ARG001
        return sum(p.square().sum() for p in weights.values())

    return lambda: comparison.Method(square, 7)


@pytest.fixture
def fill_in(comparison, exact, tmp_path):
    """Fill the file of a linear map that was changed once."""
    weights = {name: 1.1 * p.detach() for name, p in nn.Linear(3, 2).named_parameters()}

    def fill(builders, wants=lambda _: True):
        return comparison.fill_in(
            tmp_path / "file.json",
            {"seed": 0},
            lambda: {"accuracy": 0.5},
            lambda: builders,
            lambda: {"noise": weights},
            wants,
            exact=exact,
            metrics=["kl"],
            slope=True,
        )

    return fill


def test_a_method_that_refuses_says_why(fill_in):
    def refuse():
        raise OptionError("too wide", where="estimator", advice="Take another.")

    found = fill_in({"other": refuse, "unwanted": refuse}, lambda name: name != "unwanted")
    assert list(found["methods"]) == ["other"]
    assert "too wide" in found["methods"]["other"]["failure"]
    assert found["accuracy"] == 0.5


def test_a_second_run_adds_what_is_missing(fill_in, exact):
    def once_only():
        raise AssertionError

    first = fill_in({"truth": exact})
    row = first["methods"]["truth"]
    assert row["bytes"] == 7
    assert row["kl"]["values"] == list(first["truth"]["kl"].values())
    assert row["kl"]["cosines"] == pytest.approx([1.0])
    second = fill_in({"truth": once_only, "again": exact})
    assert list(second["methods"]) == ["truth", "again"]
    assert second["methods"]["truth"] == row


def test_methods_are_chosen_by_how_their_names_begin(comparison):
    names = ["gated", "gated, 10 classes", "subset of 40"]

    def chosen(begins, without=()):
        return [n for n in names if comparison.is_wanted(n, begins=begins, without=without)]

    assert chosen(()) == names
    assert chosen(("gated",)) == names[:2]
    assert chosen(("gated", "sub"), ("gated",)) == names[1:]


def test_without_a_slope_nothing_is_differentiated(comparison):
    weights = {"w": torch.ones(2)}
    value, slope, _ = comparison._measured(
        lambda w, _: w["w"].sum().detach(), weights, "kl", slope=False
    )
    assert value == 2
    assert slope.numel() == 0
