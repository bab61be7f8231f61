"""Estimates, checks and costs as people and JSON read them."""

import json
from dataclasses import FrozenInstanceError, dataclass, field

import pytest
import torch
from torch import Tensor

from pushforward.runs.estimate import Check, Cost, Estimate, to_jsonable, worst_status

PASS = Check("one", "pass", "all is well.")
WARN = Check("two", "warn", "the error bar may be small.", "Compare.")
FAIL = Check("three", "fail", "a variance is negative.", "Use another order.")


def estimate(size=2, checks=(PASS,)):
    value = torch.arange(1.0, size + 1)
    return Estimate(value, 0.1 * value, Cost(1.5e6, 0.25, 4096), "sampling", checks)


@pytest.mark.parametrize(
    ("checks", "expected"),
    [
        ((), "pass"),
        ((PASS,), "pass"),
        ((PASS, WARN), "warn"),
        ((FAIL, WARN, PASS), "fail"),
        ((WARN, FAIL), "fail"),
    ],
)
def test_the_worst_status_wins(checks, expected):
    assert worst_status(checks) == worst_status(iter(checks)) == expected
    assert estimate(checks=checks).status == expected


def test_checks_read_as_sentences():
    assert str(PASS) == "[pass] one: all is well."
    assert str(WARN) == "[warn] two: the error bar may be small. Compare."


def test_costs_read_as_sentences():
    assert str(Cost(1.5e6, 0.25)) == "1.5e+06 FLOPs, 0.25 s"
    assert str(Cost(1.5e6, 0.25, 4096)) == "1.5e+06 FLOPs, 0.25 s, 4,096 forward passes"


def test_an_estimate_shows_values_errors_cost_and_bad_news_only():
    text = repr(estimate(12, (PASS, WARN)))
    assert text.startswith("Estimate by sampling\n")
    assert " 1 ± 0.1" in text
    assert "... 2 more" in text
    assert "4,096 forward passes" in text
    assert "[warn] two" in text
    assert "one" not in text
    assert "more" not in repr(estimate(10))


def test_an_estimate_of_a_scalar():
    one = Estimate(torch.tensor(2.0), torch.tensor(0.5), Cost(1.0, 1.0), "hand")
    assert "2 ± 0.5" in repr(one)
    assert one.checks == ()
    assert one.status == "pass"


def test_results_are_frozen():
    with pytest.raises(FrozenInstanceError):
        estimate().value = torch.zeros(2)


def test_json_round_trip():
    plain = estimate(checks=(WARN,)).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["value"] == [1.0, 2.0]
    assert plain["cost"] == {"flops": 1.5e6, "seconds": 0.25, "evaluations": 4096}
    assert plain["checks"][0]["status"] == "warn"


@dataclass
class Record:
    shown: Tensor
    hidden: object = field(default=None, metadata={"json": False})
    _private: int = 3


def test_what_json_leaves_out():
    assert to_jsonable(Record(torch.tensor(1), object())) == {"shown": 1}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([1.5, 2.0], dtype=torch.bfloat16), [1.5, 2.0]),
        (torch.tensor([[True, False]]), [[True, False]]),
        (torch.tensor(3, dtype=torch.int32), 3),
        (torch.ones(2, requires_grad=True), [1.0, 1.0]),
        ({1: (None, "a", 2.5)}, {"1": [None, "a", 2.5]}),
    ],
)
def test_plain_objects(value, expected):
    assert to_jsonable(value) == expected
    json.dumps(to_jsonable(value))
