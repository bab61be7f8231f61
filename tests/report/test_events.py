"""Events: read from text, chosen by default, named as formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.output import OutputLaw
from pushforward.cumulants.propagation import propagate
from pushforward.errors import OptionError
from pushforward.report.events import (
    default_events,
    functional_name,
    output_labels,
    parse_event,
)

LABELS = ("cat", "dog", "1")


@pytest.mark.parametrize(
    ("text", "functional", "threshold"),
    [
        ("f[cat] > 2.5", [1, 0, 0], 2.5),
        ("f[cat]>f[dog]", [1, -1, 0], 0.0),
        ("f[0] - 2*f[dog] + 0.5 f[2] > 1", [1, -2, 0.5], 1.0),
        ("f[cat] + 1 < 3e-1", [-1, 0, 0], 0.7),
        ("-1.5 > f[dog] - f[dog] + f[cat]", [-1, 0, 0], 1.5),
        ("f[ dog ] > -.5", [0, 1, 0], -0.5),
        ("f[1] > 0", [0, 0, 1], 0.0),  # a label wins over an index
    ],
)
def test_text_becomes_a_functional(text: str, functional: list[float], threshold: float) -> None:
    event = parse_event(text, LABELS)
    assert event.functional.tolist() == functional
    assert event.threshold == pytest.approx(threshold, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "f[cat]",
        "f[cat] >",
        "> 2",
        "f[cat] f[dog] > 2",
        "f[cat] > f[dog] > 1",
        "f[cow] > 0",
        "f[7] > 0",
        "f[cat] > f[cat]",
        "2 > 1",
        "__import__('os') > 1",
        "f[cat] * f[dog] > 1",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_event(text, LABELS)
    assert caught.value.where == "event"


def test_functional_is_written_as_a_formula() -> None:
    row = torch.tensor([-2.0, 1.0, 0.0], dtype=torch.float64)
    assert functional_name(row, LABELS) == "\u22122 f[cat] + f[dog]"


def linear_law(weight: list[list[float]], bias: list[float]) -> OutputLaw:
    net = nn.Linear(len(weight[0]), len(weight)).double().eval()
    with torch.no_grad():
        net.weight.copy_(torch.tensor(weight))
        net.bias.copy_(torch.tensor(bias))
        return propagate(net, GaussianLaw.standard(len(weight[0]), dtype=torch.float64))


def test_default_events_ask_for_far_outputs_and_likely_confusions() -> None:
    law = linear_law([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]], [5.0, 0.0, 0.0])
    events = default_events(law, ("a", "b", "c"))
    far = [event.threshold for event in events if "standard deviations" in event.group]
    # Deviations 1, 2 and 3 around means 5, 0 and 0.
    assert far == pytest.approx([7, 4, 6, 8, 6, 9], rel=1e-12)
    margins = [event for event in events if "largest mean" in event.group]
    # P(N(-5, (3 - 1)^2) > 0) > P(N(-5, 5) > 0) is false: 5 / 2 against 5 / sqrt(5).
    assert [event.name for event in margins] == ["f[b] > f[a]", "f[c] > f[a]"]
    assert margins[0].functional.tolist() == [-1, 1, 0]


def test_a_single_output_has_no_confusions() -> None:
    law = linear_law([[1.0]], [0.0])
    assert len(default_events(law, ("y",))) == 2


def test_labels_must_be_one_for_each_output() -> None:
    assert output_labels(None, 2) == ("0", "1")
    assert output_labels(["a", "b"], 2) == ("a", "b")
    for labels in (["a"], ["a", "a"]):
        with pytest.raises(OptionError):
            output_labels(labels, 2)
