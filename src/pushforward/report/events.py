"""Events whose probability is asked for: a linear functional of the outputs above a threshold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.cumulants.output import OutputLaw
from pushforward.errors import OptionError
from pushforward.report.formatting import MINUS

__all__ = ["Event", "default_events", "functional_name", "output_labels", "parse_event"]

_FAR = (2.0, 3.0)  # standard deviations: often enough to be checked, and rare
_MOST_OUTPUTS = 10
_MOST_MARGINS = 9
_FORM = "Write it like 'f[3] > 2.5', 'f[cat] > f[dog]' or 'f[0] - 2*f[1] < 0.5'"
_TERM = re.compile(
    r"\s*(?P<sign>[+-])?\s*"
    r"(?P<factor>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)?\s*\*?\s*"
    r"(?:f\[(?P<name>[^\]]+)\])?\s*"
)


@dataclass(frozen=True, eq=False)
class Event:
    """``functional @ f > threshold`` for the outputs ``f``.

    Parameters
    ----------
    name
        How tables call it.
    functional
        Coefficients ``(k,)``, one for each output.
    threshold
        What the functional has to exceed.
    group
        Events of one group share a table.
    """

    name: str
    functional: Float[Tensor, " K"]
    threshold: float
    group: str = "Chosen events"


def output_labels(labels: Sequence[str] | None, outputs: int) -> tuple[str, ...]:
    """Names of the outputs, checked or made up.

    Parameters
    ----------
    labels
        One for each output, all different; None for ``0``, ``1``, ...
    outputs
        Number of outputs.

    Returns
    -------
    tuple of str
        One name for each output.

    Raises
    ------
    OptionError
        When their number is wrong or two are the same.
    """
    if labels is None:
        return tuple(map(str, range(outputs)))
    if len(labels) != outputs or len(set(labels)) != outputs:
        raise OptionError(
            f"{len(labels)} labels ({len(set(labels))} different) for {outputs} outputs",
            where="labels",
            advice=f"Give {outputs} different names, or none.",
        )
    return tuple(labels)


def default_events(law: OutputLaw, labels: Sequence[str]) -> tuple[Event, ...]:
    """Events worth asking for when none are given.

    Each output two and three standard deviations above its mean, and, for several outputs, those
    most likely to exceed the one with the largest mean: the likely confusions of a classifier.

    Parameters
    ----------
    law
        Of the outputs, not batched.
    labels
        Names of the outputs.

    Returns
    -------
    tuple of Event
        At most 10 outputs and 9 of the second kind.
    """
    identity = torch.eye(len(labels), dtype=torch.float64, device=law.mean.device)
    deviations = law.variance.clamp(min=0).sqrt()
    events = []
    for far in _FAR:
        group = f"An output above its mean + {far:g} standard deviations"
        thresholds = (law.mean + far * deviations).tolist()
        rows = list(zip(labels, identity, thresholds, strict=True))[:_MOST_OUTPUTS]
        events += [
            Event(f"f[{label}] > {level:.4g}", row, level, group) for label, row, level in rows
        ]
    if len(labels) > 1:
        top = int(law.mean.argmax())
        others = [index for index in range(len(labels)) if index != top]
        margins = identity[others] - identity[top]
        likely = law.project(margins).tail_probability(0.0).argsort(descending=True)
        group = f"Another output above “{labels[top]}”, the one with the largest mean"
        events += [
            Event(f"f[{labels[others[i]]}] > f[{labels[top]}]", margins[i], 0.0, group)
            for i in likely[:_MOST_MARGINS].tolist()
        ]
    return tuple(events)


def parse_event(text: str, labels: Sequence[str]) -> Event:
    """Read an event from text.

    Parameters
    ----------
    text
        A linear inequality between outputs, such as ``"f[cat] - f[dog] > 0.5"``. What stands in
        the brackets is a label or, where no label has that name, the index of an output.
    labels
        Names of the outputs.

    Returns
    -------
    Event
        Named by the text.

    Raises
    ------
    OptionError
        When the text is no such inequality, or names no output.

    Examples
    --------
    >>> event = parse_event("f[a] > 2*f[b] + 1", ["a", "b"])
    >>> event.functional.tolist(), event.threshold
    ([1.0, -2.0], 1.0)
    """
    relation = ">" if ">" in text else "<"
    left, found, right = text.partition(relation)
    if not found:
        _refuse(text, "it has no '>' or '<'")
    larger, smaller = (left, right) if relation == ">" else (right, left)
    a, b = _linear_form(larger, labels, text), _linear_form(smaller, labels, text)
    functional = torch.tensor(a[0], dtype=torch.float64) - torch.tensor(b[0], dtype=torch.float64)
    if not bool(functional.any()):
        _refuse(text, "it does not depend on the outputs")
    return Event(" ".join(text.split()), functional, b[1] - a[1])


def functional_name(functional: Float[Tensor, " K"], labels: Sequence[str]) -> str:
    """A linear functional as a formula.

    Parameters
    ----------
    functional
        Coefficients ``(k,)``.
    labels
        Names of the outputs.

    Returns
    -------
    str
        Such as ``"f[cat] − 2 f[dog]"``; shortened after four terms.
    """
    terms = [
        (value, label) for value, label in zip(functional.tolist(), labels, strict=True) if value
    ]
    text = ""
    for value, label in terms[:4]:
        sign = MINUS if value < 0 else "+" if text else ""
        factor = "" if abs(value) == 1 else f"{abs(value):.3g} "
        text += f" {sign} {factor}f[{label}]" if text else f"{sign}{factor}f[{label}]"
    return text + (" + …" if len(terms) > 4 else "")


def _linear_form(text: str, labels: Sequence[str], whole: str) -> tuple[list[float], float]:
    """Coefficients of the outputs and the constant.

    Returns
    -------
    tuple
        ``(k)`` coefficients, and a number.

    Raises
    ------
    OptionError
        When it is no sum of multiples of outputs and numbers.
    """
    coefficients, constant, position = [0.0] * len(labels), 0.0, 0
    while position < len(text) or position == 0:
        term = _TERM.match(text, position)
        assert term is not None  # every part is optional
        sign, factor, name = term.group("sign", "factor", "name")
        if (factor is None and name is None) or (position > 0 and sign is None):
            _refuse(whole, f"{text[position:].strip()!r} is no term of a sum")
        value = (-1.0 if sign == "-" else 1.0) * float(factor or 1)
        if name is None:
            constant += value
        else:
            coefficients[_index_of(name.strip(), labels)] += value
        position = term.end()
    return coefficients, constant


def _index_of(name: str, labels: Sequence[str]) -> int:
    if name in labels:
        return list(labels).index(name)
    if name.isdecimal() and int(name) < len(labels):
        return int(name)
    shown = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
    raise OptionError(
        f"there is no output {name!r}", where="event", advice=f"The outputs are {shown}."
    )


def _refuse(text: str, reason: str) -> NoReturn:
    """Say why a text is no event.

    Raises
    ------
    OptionError
        Always.
    """
    raise OptionError(f"cannot read {text!r}: {reason}", where="event", advice=f"{_FORM}.")
