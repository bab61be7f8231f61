"""Small parts of the tables."""

import importlib
from math import isnan, log

import pytest


@pytest.fixture
def tables():
    return importlib.import_module("reproductions.function_space_distance.tables")


def test_an_estimate_of_nothing_counts_as_little(tables):
    assert tables.log_ratios([2.0, 0.0], [1.0, 3.0]) == pytest.approx([log(2), log(1e-12)])


def test_a_constant_has_no_rank_correlation(tables):
    assert tables.spearman([1.0, 2.0, 3.0], [1.0, 4.0, 9.0]) == 1
    assert isnan(tables.spearman([1.0, 1.0], [1.0, 2.0]))


def test_means_are_over_what_is_finite(tables):
    assert tables.finite_mean([1.0, float("nan"), 3.0]) == "2.00 ± 1.41"
    assert tables.finite_mean([float("nan")]) == ""
