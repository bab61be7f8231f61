"""Errors say what, where and what to do; they survive a journey between processes."""

import copy
import inspect
import pickle

import pytest

from pushforward import errors
from pushforward.errors import PushforwardError

KINDS = [getattr(errors, name) for name in errors.__all__]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@every_kind
def test_the_message_has_three_parts(kind):
    error = kind("the weights are NaN", where="layer 'fc'", advice="Load another checkpoint.")
    assert str(error) == "layer 'fc': the weights are NaN. Load another checkpoint."
    assert (error.what, error.where) == ("the weights are NaN", "layer 'fc'")
    assert error.advice == "Load another checkpoint."


@every_kind
@pytest.mark.parametrize("travel", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_round_trip(kind, travel):
    error = kind("odd", where="here", advice="Turn back.")
    found = travel(error)
    assert type(found) is kind
    assert (found.what, found.where, found.advice) == ("odd", "here", "Turn back.")
    assert str(found) == str(error)


@every_kind
def test_parts_are_keywords(kind):
    with pytest.raises(TypeError):
        kind("odd", "here", "Turn back.")


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("LawError", ValueError),
        ("ShapeError", ValueError),
        ("OptionError", ValueError),
        ("UnsupportedLayerError", TypeError),
        ("NetworkError", ValueError),
        ("WeightsError", ValueError),
        ("DataError", ValueError),
        ("ResourceError", MemoryError),
    ],
)
def test_kinds_are_caught_as_builtins_and_as_ours(name, builtin):
    kind = getattr(errors, name)
    assert issubclass(kind, builtin)
    assert issubclass(kind, PushforwardError)


def test_every_error_is_exported():
    defined = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert defined == set(errors.__all__)
