"""Priors: their groups, their coordinates, and what is no prior."""

import pytest
import torch

from laplace_scenarios import numbers
from pushforward.errors import OptionError
from pushforward.linearised_laplace.priors import Prior, feature_scale
from pushforward.networks.parameters import ParameterSpace

SPACE = ParameterSpace.of({"a.w": torch.ones(2, 2), "b.w": torch.ones(3), "a.b": torch.ones(1)})
CPU = torch.device("cpu")


def start(kind="isotropic", precision=1.0):
    return Prior.start(kind, SPACE, precision, CPU)


def test_one_precision_for_all():
    prior = start(precision=2.5)
    assert prior.groups == ("all",)
    assert prior.sizes.tolist() == [8]
    assert prior.diagonal().tolist() == [2.5] * 8
    assert prior.diagonal(torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    "precision",
    [
        {"b": 3.0, "a": 2.0},
        torch.tensor([2.0, 3.0]),
        (2.0, 3.0),
    ],
    ids=["by name", "tensor", "in order"],
)
@pytest.mark.wrong_types
def test_one_precision_for_each_layer(precision):
    prior = start("layerwise", precision)
    assert prior.groups == ("a", "b")
    assert prior.sizes.tolist() == [5, 3]
    assert prior.diagonal().tolist() == [2, 2, 2, 2, 3, 3, 3, 2]


def test_one_number_serves_all_layers():
    assert start("layerwise", 4.0).precision.tolist() == [4.0, 4.0]


def test_sums_over_groups():
    vectors = numbers(2, 8, seed=1)
    both = torch.stack([vectors[:, [0, 1, 2, 3, 7]].sum(1), vectors[:, 4:7].sum(1)], 1)
    torch.testing.assert_close(start("layerwise").group_sums(vectors), both)
    torch.testing.assert_close(start().group_sums(vectors), both.sum(1, keepdim=True))
    torch.testing.assert_close(start("gprior").group_sums(vectors), both.sum(1, keepdim=True))


def test_coordinates_of_a_g_prior():
    curvature = numbers(8, seed=2).square() + 0.1
    curvature[3] = 0
    prior = start("gprior", 2.0).with_scale(curvature)
    weights = numbers(3, 8, seed=3)
    weights[:, 3] = 0
    torch.testing.assert_close(prior.scaled(prior.coordinates(weights)), weights)
    alive = torch.arange(8) != 3
    torch.testing.assert_close(prior.scale[alive] ** -2, curvature[alive])
    assert prior.scale[3] == 0
    assert (prior.coordinates(weights + 1)[:, 3] == 0).all()


def test_other_priors_have_no_scale():
    for kind in ("isotropic", "layerwise"):
        prior = start(kind).with_scale(torch.ones(8))
        assert prior.scale is None
        vectors = numbers(8, seed=4)
        assert prior.scaled(vectors) is vectors
        assert prior.coordinates(vectors) is vectors


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_the_floor_of_the_curvature_is_relative(factor):
    curvature = torch.tensor([1.0, 1e-3, 1e-9, 0.0], dtype=torch.float64)
    scale = feature_scale(factor * curvature) * factor**0.5
    torch.testing.assert_close(scale, feature_scale(curvature))
    mean = (1 + 1e-3 + 1e-9) / 3
    expected = torch.tensor([1, 1e-3, 1e-6 * mean], dtype=torch.float64).rsqrt()
    torch.testing.assert_close(scale[:3], expected)
    assert scale[3] == 0


def test_no_curvature_at_all_means_no_scale():
    assert feature_scale(torch.zeros(3)).tolist() == [0.0] * 3


def test_precisions_that_run_off_are_cut():
    prior = start("layerwise").with_precision(torch.tensor([float("inf"), 0.0]).double())
    assert prior.precision[0] >= 1e10
    assert torch.isfinite(prior.precision).all()
    assert (prior.precision > 0).all()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["isotropic", "layerwise", "gprior"])
def test_a_precision_has_to_be_positive(kind, value):
    with pytest.raises(OptionError, match="is no precision") as caught:
        start(kind, value)
    assert caught.value.where == "prior_precision"


def test_one_bad_precision_among_several_is_found():
    with pytest.raises(OptionError, match="-3 is no precision"):
        start("layerwise", {"a": 1.0, "b": -3.0})


@pytest.mark.parametrize(
    ("kind", "precision", "match"),
    [
        ("isotropic", torch.ones(2), "2 precisions for 1 groups"),
        ("layerwise", torch.ones(3), "3 precisions for 2 groups"),
        ("layerwise", {"a": 1.0}, r"it names \['a'\]"),
        ("layerwise", {"a": 1.0, "b": 1.0, "c": 1.0}, "it names"),
        ("layerwise", torch.ones(0), "0 precisions"),
    ],
)
def test_the_number_of_precisions_has_to_fit(kind, precision, match):
    with pytest.raises(OptionError, match=match) as caught:
        start(kind, precision)
    assert caught.value.where == "prior_precision"


def test_an_unknown_kind_is_refused():
    with pytest.raises(OptionError, match="no prior 'laplace'") as caught:
        start("laplace")
    assert "'gprior'" in caught.value.advice


def test_config_can_be_written():
    assert start("layerwise", {"a": 1.0, "b": 2.0}).to_config() == {
        "kind": "layerwise",
        "precision": [1.0, 2.0],
    }


# --- where learning begins ----------------------------------------------------------------------


def trace_of(prior, curvature):
    return prior.group_sums(prior.scaled(prior.scaled(curvature)))


@pytest.mark.parametrize("kind", ["isotropic", "layerwise", "gprior"])
def test_weights_of_ordinary_size_say_where_to_begin(kind):
    curvature, weights = 100 * (numbers(8, seed=5).square() + 0.1), numbers(8, seed=6)
    prior = start(kind).with_scale(curvature)
    weights = prior.scaled(weights)
    found = prior.matched_to(weights, curvature)
    norms = prior.group_sums(prior.coordinates(weights).square())
    torch.testing.assert_close(found.precision, prior.sizes / norms)


@pytest.mark.parametrize("by", [0.0, 1e-9, 1e-2])
@pytest.mark.parametrize("kind", ["isotropic", "layerwise", "gprior"])
def test_small_weights_begin_where_the_data_have_a_say(kind, by):
    curvature = numbers(8, seed=5).square() + 0.1
    prior = start(kind).with_scale(curvature)
    found = prior.matched_to(prior.scaled(by * numbers(8, seed=6)), curvature)
    torch.testing.assert_close(found.precision, trace_of(prior, curvature) / prior.sizes)


def test_the_units_of_the_weights_do_not_matter_to_where_learning_begins():
    curvature, prior = numbers(8, seed=5).square() + 0.1, start("layerwise")
    for weights in (numbers(8, seed=6), 1e-3 * numbers(8, seed=6)):
        found = prior.matched_to(weights, curvature).precision
        scaled = prior.matched_to(weights / 30, 900 * curvature).precision
        torch.testing.assert_close(scaled, 900 * found)


def test_a_group_without_curvature_begins_anywhere():
    curvature = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0]).double()  # nothing for "a"
    prior = start("layerwise")
    found = prior.matched_to(torch.full((8,), 0.5).double(), curvature).precision
    assert found.tolist() == [4.0, 1.0]
    untrained = prior.matched_to(torch.zeros(8).double(), curvature).precision
    assert torch.isfinite(untrained).all()
    assert untrained[1] == 1
