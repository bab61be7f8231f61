"""Checkpoints of a classifier of digits, after two steps of training."""

import importlib

import pytest
import torch


@pytest.fixture
def study():
    return importlib.import_module("reproductions.learning_coefficient.digits")


@pytest.fixture
def main():
    return importlib.import_module("reproductions.learning_coefficient.__main__").main


def test_every_sampler_has_its_row(main, tmp_path, capsys):
    call = ["digits", "--output", str(tmp_path), "--steps", "2", "--samplers", "langevin"]
    assert main([*call, "--chains", "2", "--draws", "16", "--warmup", "16"]) == 0
    assert (tmp_path / "digits-0-langevin-2.json").exists()
    assert "| 0 | langevin |" in capsys.readouterr().out
    assert "| 0 | langevin |" in (tmp_path / "digits.md").read_text("utf-8")


def test_the_table_says_who_orders_checkpoints_like_the_first(study):
    text = study.digits_table(
        [
            {
                "settings": {"seed": 0, "sampler": sampler, "step": step},
                "localization": 1.0,
                "value": value,
                "standard_error": 0.1,
                "verdict": "OK",
                "cpu_seconds": 1.0,
            }
            for sampler, values in (("hmc", (1.0, 2.0)), ("sgld", (2.0, 1.0)))
            for step, value in enumerate(values)
        ]
    )
    assert [line.split("|")[-2].strip() for line in text.splitlines()[-2:]] == [
        "the same",
        "another",
    ]


def test_checkpoints_are_of_one_run(study):
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(40) % 10
    both = dict(study._checkpoints(x, y, 3, 0, (1, 3)))
    (alone,) = dict(study._checkpoints(x, y, 1, 0, (1,))).values()
    assert list(both) == [1, 3]
    assert torch.equal(both[1][0].weight, alone[0].weight)
    assert not torch.equal(both[1][0].weight, both[3][0].weight)
