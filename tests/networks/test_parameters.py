"""Named tensors as one vector: there and back, layer by layer, chosen by name."""

import pytest
import torch

from laplace_scenarios import numbers
from pushforward.errors import NetworkError, OptionError, ShapeError
from pushforward.networks.parameters import ParameterSpace, as_patterns, match_names

TENSORS = {
    "body.0.weight": numbers(3, 2, seed=1),
    "body.0.bias": numbers(3, seed=2),
    "head.weight": numbers(1, 3, seed=3),
    "temperature": numbers(seed=4),
}
SPACE = ParameterSpace.of(TENSORS)
NAMES = SPACE.names


def test_tensors_lie_end_to_end_in_their_order():
    vector = SPACE.ravel(TENSORS)
    assert SPACE.size == 13
    assert SPACE.sizes == (6, 3, 3, 1)
    assert torch.equal(vector, torch.cat([t.flatten() for t in TENSORS.values()]))
    for name, where in SPACE.slices.items():
        assert torch.equal(vector[where], TENSORS[name].flatten())


def test_unravel_undoes_ravel_with_leading_axes():
    vectors = numbers(2, 5, 13, seed=5)
    tensors = SPACE.unravel(vectors)
    assert tensors["body.0.weight"].shape == (2, 5, 3, 2)
    assert tensors["temperature"].shape == (2, 5)
    assert torch.equal(SPACE.ravel(tensors), vectors)


def test_unravel_gives_views():
    vector = torch.zeros(13)
    SPACE.unravel(vector)["head.weight"].fill_(1.0)
    assert vector.tolist() == [0.0] * 9 + [1.0] * 3 + [0.0]


def test_weight_and_bias_of_a_module_are_one_layer():
    assert SPACE.layers == ("body.0", "head", "temperature")
    assert SPACE.layer_sizes == (9, 3, 1)
    assert SPACE.layer_index().tolist() == [0] * 9 + [1] * 3 + [2]


def test_layers_that_are_interleaved_are_put_together():
    space = ParameterSpace.of({"a.w": torch.ones(2), "b.w": torch.ones(1), "a.b": torch.ones(3)})
    assert space.layers == ("a", "b")
    assert space.layer_sizes == (5, 1)
    assert space.layer_index().tolist() == [0, 0, 1, 0, 0, 0]
    vectors = numbers(4, 6, seed=1)
    sums = torch.stack([vectors[:, [0, 1, 3, 4, 5]].sum(1), vectors[:, 2]], 1)
    torch.testing.assert_close(space.layer_sums(vectors), sums)


def test_layer_sums_are_float64():
    vectors = torch.full((13,), 0.1, dtype=torch.float32)
    sums = SPACE.layer_sums(vectors)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, torch.tensor([0.9, 0.3, 0.1], dtype=torch.float64))


def test_no_parameters_are_refused():
    with pytest.raises(NetworkError, match="no parameters"):
        ParameterSpace.of({})


def test_a_missing_or_misshapen_tensor_is_named():
    with pytest.raises(ShapeError, match=r"head\.weight") as missing:
        SPACE.ravel({name: t for name, t in TENSORS.items() if name != "head.weight"})
    assert "missing" in str(missing.value)
    with pytest.raises(ShapeError, match=r"body\.0\.bias"):
        SPACE.ravel(TENSORS | {"body.0.bias": torch.zeros(2)})


def test_fingerprint_knows_names_and_shapes():
    others = [
        {**TENSORS, "body.0.weight": torch.zeros(2, 3)},
        {name.replace("head", "tail"): t for name, t in TENSORS.items()},
        dict(reversed(TENSORS.items())),
    ]
    found = [SPACE.fingerprint(), *(ParameterSpace.of(other).fingerprint() for other in others)]
    assert len(set(found)) == 4
    assert (
        SPACE.fingerprint()
        == ParameterSpace.of({k: 2 * t for k, t in TENSORS.items()}).fingerprint()
    )


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("body", ("body.0.weight", "body.0.bias")),
        ("*.weight", ("body.0.weight", "head.weight")),
        (["head.*", "body.0.bias"], ("body.0.bias", "head.weight")),
        ("temperature", ("temperature",)),
        ("body.?.bias", ("body.0.bias",)),
        (iter(["head"]), ("head.weight",)),
    ],
)
def test_patterns_choose_in_the_order_of_the_network(patterns, expected):
    assert match_names(NAMES, patterns) == expected


@pytest.mark.parametrize("patterns", ["nothing", "bod", ["head", "nothing"], "", []])
def test_a_pattern_that_matches_nothing_is_refused(patterns):
    with pytest.raises(OptionError, match="matches no parameter") as caught:
        match_names(NAMES, patterns)
    assert "body.0.weight" in caught.value.advice


def test_names_are_case_sensitive():
    with pytest.raises(OptionError):
        match_names(NAMES, "Head")


@pytest.mark.wrong_types
@pytest.mark.parametrize("patterns", [5, ["head", 3], [None]])
def test_what_is_no_pattern_is_refused(patterns):
    with pytest.raises(OptionError, match="is no pattern") as caught:
        match_names(NAMES, patterns, where="layers")
    assert caught.value.where == "layers"


def test_patterns_are_read_once():
    assert as_patterns("head") == ("head",)
    assert as_patterns(iter(["head", "body"])) == ("head", "body")
    assert as_patterns([]) == ()
