"""A computation shared by processes gives what one process gives."""

import pytest
import torch

from processes import run_together
from pushforward.errors import OptionError
from pushforward.networks.data import Examples
from pushforward.runs.distributed import ProcessGrid, _carrier, _rows_and_columns

DRAWS = torch.arange(10, dtype=torch.float64).reshape(5, 2) / 7
DATA = torch.arange(12, dtype=torch.float64).reshape(6, 2) / 3


def shared(grid):
    """A table of draws against data, summed over the data."""
    own = grid.draws(len(DRAWS))
    examples = Examples.read((DATA, torch.arange(6))).shard(grid.data_index, grid.data_shards)
    table = sum(DRAWS[own] @ batch.inputs.T @ batch.inputs for batch in examples.batches(2))
    before = table.clone()
    total = grid.sum_over_data(table)
    assert torch.equal(table, before)
    return grid.gather_draws(total)


def place(grid):
    return torch.tensor([grid.draw_shards, grid.data_shards, grid.draw_index, grid.data_index])


def worker(rank):
    by_draws, by_data = ProcessGrid.from_environment(), ProcessGrid.from_environment(2)
    assert by_draws.num_processes == by_data.num_processes == 2
    assert by_draws.is_first == by_data.is_first == (rank == 0)
    with pytest.raises(OptionError, match="2 processes cannot share the data by 3"):
        ProcessGrid.from_environment(3)
    by_data.barrier()
    mine = torch.tensor([rank + 1, 7])
    told = by_data.broadcast(mine)
    assert mine.tolist() == [rank + 1, 7]
    own = by_draws.draws(3)
    strided = torch.arange(6.0).reshape(2, 3).T[own.start : own.stop]
    return {
        "by draws": shared(by_draws),
        "by data": shared(by_data),
        "places": torch.stack([place(by_draws), place(by_data)]),
        "told": told,
        "strided": by_draws.gather_draws(strided),
    }


def test_two_processes_do_the_work_of_one(tmp_path):
    results = run_together(2, tmp_path, worker)
    expected = shared(ProcessGrid.serial())
    torch.testing.assert_close(expected, DRAWS @ DATA.T @ DATA)
    for rank, result in enumerate(results):
        assert result["places"].tolist() == [[2, 1, rank, 0], [1, 2, 0, rank]]
        for way in ("by draws", "by data"):
            torch.testing.assert_close(result[way], expected, rtol=1e-14, atol=0)
            assert torch.equal(result[way], results[0][way])
        assert result["told"].tolist() == [1, 7]
        assert result["strided"].tolist() == [[0, 3], [1, 4], [2, 5]]


def grid_worker(rank):
    grid = ProcessGrid.from_environment(2)
    own = grid.draws(5)
    return {
        "place": place(grid),
        "sum": grid.sum_over_data(torch.tensor([10.0**rank])),
        "draws": grid.gather_draws(torch.arange(own.start, own.stop)),
    }


@pytest.mark.slow
def test_four_processes_form_a_grid(tmp_path):
    results = run_together(4, tmp_path, grid_worker)
    places = [result["place"].tolist() for result in results]
    assert places == [[2, 2, 0, 0], [2, 2, 0, 1], [2, 2, 1, 0], [2, 2, 1, 1]]
    assert [result["sum"].item() for result in results] == [11, 11, 1100, 1100]
    assert all(result["draws"].tolist() == [0, 1, 2, 3, 4] for result in results)


def test_rows_share_draws_and_columns_share_data():
    rows, columns = _rows_and_columns(6, 2)
    assert rows == [[0, 1], [2, 3], [4, 5]]
    assert columns == [[0, 2, 4], [1, 3, 5]]


def test_one_process_needs_no_group():
    grid = ProcessGrid.from_environment()
    assert grid == ProcessGrid.serial()
    assert grid.is_first
    assert grid.num_processes == 1
    assert grid.draws(5) == range(5)
    tensor = torch.ones(3)
    assert grid.sum_over_data(tensor) is tensor
    assert grid.gather_draws(tensor) is tensor
    assert grid.broadcast(tensor) is tensor
    grid.barrier()


@pytest.mark.parametrize(("shards", "draws"), [(1, 4), (3, 3), (3, 10), (4, 7)])
def test_draws_are_divided_evenly(shards, draws):
    shares = [ProcessGrid(shards, 1, i, 0).draws(draws) for i in range(shards)]
    assert [k for share in shares for k in share] == list(range(draws))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_fewer_draws_than_processes_are_refused():
    with pytest.raises(OptionError, match="2 draws for 3 processes"):
        ProcessGrid(3, 2, 0, 0).draws(2)


@pytest.mark.parametrize(
    ("data_shards", "message"), [(0, "data_shards: 0"), (2, "1 processes cannot share")]
)
def test_data_shares_that_do_not_divide_the_processes_are_refused(data_shards, message):
    with pytest.raises(OptionError, match=message):
        ProcessGrid.from_environment(data_shards)


def test_processes_that_nothing_joins_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ProcessGrid.from_environment() == ProcessGrid.serial()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="torchrun started 2 processes") as caught:
        ProcessGrid.from_environment()
    assert "init_process_group" in caught.value.advice
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert ProcessGrid.from_environment() == ProcessGrid.serial()


@pytest.mark.parametrize(
    ("device", "config", "expected"),
    [
        ("cpu", "cpu:gloo,cuda:gloo", "cpu"),
        ("cuda:1", "cpu:gloo,cuda:gloo", "cpu"),
        ("cuda:1", "cpu:gloo,cuda:nccl", "cuda:1"),
        ("cpu", "cpu:gloo,cuda:nccl", "cpu"),
        ("mps", "cpu:gloo,cuda:gloo", "cpu"),
        ("cpu", "xpu:xccl", "xpu"),
    ],
)
def test_tensors_travel_by_a_device_that_the_backend_knows(device, config, expected):
    assert _carrier(torch.device(device), config) == torch.device(expected)


def test_nccl_alone_carries_by_the_current_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert _carrier(torch.device("cpu"), "cuda:nccl") == torch.device("cuda:3")
