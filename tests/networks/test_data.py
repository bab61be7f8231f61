"""Batches of inputs from whatever a user has."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pushforward.errors import DataError
from pushforward.networks.data import DataStream
from scenarios import normal

X = normal(0, 7, 3)
Y = torch.arange(7)


def loader(**options):
    return DataLoader(TensorDataset(X, Y), batch_size=3, **options)


@pytest.mark.parametrize(
    "source",
    [
        X,
        X.numpy(),
        list(X.split(2)),
        tuple(X.split([1, 6])),
        loader(),
        [(X[:4], Y[:4]), [X[4:], Y[4:]]],
        [{"labels": Y, "x": X}],
        [{"pixel_values": X[:2]}, {"pixel_values": X[2:].numpy()}],
        [torch.zeros(0, 3, dtype=torch.float64), X],
    ],
    ids=["tensor", "array", "list", "tuple", "loader", "pairs", "dict", "hf", "empty batch"],
)
def test_sources(source):
    batches = list(DataStream(source).inputs())
    torch.testing.assert_close(torch.cat(batches), X)
    assert all(len(batch) for batch in batches)


def test_a_stream_can_be_read_again():
    stream = DataStream(loader())
    assert len(list(stream.inputs())) == len(list(stream.inputs())) == 3


def test_large_tensors_come_in_pieces():
    batches = list(DataStream(torch.zeros(2500, 2)).inputs())
    assert [len(batch) for batch in batches] == [1024, 1024, 452]


def test_integers_become_floats_and_gradients_stop():
    (batch,) = DataStream(torch.arange(6).reshape(2, 3)).inputs()
    assert batch.dtype == torch.get_default_dtype()
    (batch,) = DataStream(X.clone().requires_grad_()).inputs()
    assert not batch.requires_grad


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no examples"),
        (torch.zeros(0, 3), "no examples"),
        (torch.zeros(3), r"shape \(3,\)"),
        ([X, normal(1, 2, 4)], r"examples of shape \(4,\) follow examples of shape \(3,\)"),
        ([{"tokens": X}], r"a mapping with keys \['tokens'\]"),
        ([("text",)], "inputs are str"),
        ([()], "inputs are tuple"),
        (7, "got int"),
    ],
)
def test_unusable_sources_are_refused(source, message):
    with pytest.raises(DataError, match=message) as caught:
        list(DataStream(source, "the training set").inputs())
    assert "the training set" in caught.value.where


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_damaged_example_is_named(value):
    damaged = normal(2, 6, 3)
    damaged[4, 1] = value
    with pytest.raises(DataError, match="example 4 holds NaN or infinite entries") as caught:
        list(DataStream(damaged.split(3)).inputs())
    assert caught.value.where == "batch 1 of data"
