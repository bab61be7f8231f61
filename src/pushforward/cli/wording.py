"""Refusals of the library in the words of the command line, whose users see no arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from pushforward.errors import PushforwardError

__all__ = ["in_words_of_options"]

# What messages of the library call its arguments, and what they are called here.
_OPTIONS = {
    "classes": "--classes",
    "clusters": "--clusters",
    "input_moments": "--input-moments",
    "layer_moments": "--layer-moments",
    "outputs": "--outputs",
    "metric": "--metric",
    "metrics": "--metric",
    "estimator": "--estimator",
    "seed": "--seed",
}
_ADVICE = (
    (r"Give num_classes= .*", "Number the classes that occur from 0, without gaps."),
    (r"Make it with pf\.summarize\(\.\.\., layer_moments=True\)", "Make it with --layer-moments"),
    (r"Leave layer_moments=False", "Leave out --layer-moments"),
    (r", a slice, or a mask", ""),
    (r"Give classes, or neither", "Leave it out, or give --classes targets"),
    (r"""estimator=["'](\w+)["']""", r"--estimator \1"),
)


@contextmanager
def in_words_of_options() -> Iterator[None]:
    """Let refusals of the library name options of the command line.

    Yields
    ------
    None
        While they do.
    """
    try:
        yield
    except PushforwardError as error:
        _retell(error)


def _retell(error: PushforwardError) -> NoReturn:
    """Raise an error again, in the words of the command line."""
    where, advice = _OPTIONS.get(error.where, error.where), error.advice
    for said, instead in _ADVICE:
        where, advice = re.sub(said, instead, where), re.sub(said, instead, advice)
    raise type(error)(error.what, where=where, advice=advice) from error
