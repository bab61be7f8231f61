"""The script of continual learning, on a few images in the files' formats."""

import importlib
import json

import pytest
import torch

from image_files import write_cifar10, write_mnist

TRAIN, TEST = 100, 40


@pytest.fixture
def script():
    return importlib.import_module("reproductions.continual_learning")


@pytest.fixture
def folder(tmp_path):
    write_mnist(tmp_path / "data", TRAIN, TEST)
    write_cifar10(tmp_path / "data", TRAIN, TEST)
    return tmp_path / "data"


def arguments(folder, output, problem, methods, *more):
    words = ["--output", str(output), "--data-dir", str(folder), "--problem", problem]
    words += ["--methods", *methods, "--seeds", "0", "--tasks", "2", "--epochs", "1"]
    return [*words, "--hidden", "6", "5", "--samples", "4", "--num-train", "30", *more]


def test_every_method_has_its_row(script, folder, tmp_path, capsys):
    pytest.importorskip("tyro")
    methods = [name.replace("40", "4").replace("200", "6") for name in script.METHODS]
    output, more = tmp_path / "results", ["--scale", "2", "--batch-size", "8"]
    assert script.main(arguments(folder, output, "permuted", methods, *more)) == 0
    printed = capsys.readouterr().out
    table = (output / "continual-learning-permuted.md").read_text()
    assert table in printed
    assert [line.split(" ")[1] for line in table.splitlines()[2:]] == methods
    for method in methods:
        found = json.loads((output / f"continual-learning-permuted-{method}-0.json").read_text())
        assert found["settings"]["final"] is True
        assert 0 <= found["mean_accuracy"] <= 1
        if method not in {"none", "joint"}:
            assert found["num_bytes"][0] > 0
            assert found["penalties"][0] == [0.0]
            assert found["penalties"][1][0] > 0
    assert not (output / "state").exists() or not list((output / "state").iterdir())


def test_the_scale_is_chosen_by_validation(script, folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tyro")
    output = tmp_path / "results"
    more = ["--scales", "0.5", "20", "--batch-size", "8", "--tuning-epochs", "2"]
    call = arguments(folder, output, "split", ["gated-classes"], *more)
    assert script.main(call) == 0
    trials = {}
    for path in output.glob("*-validation-*.json"):
        found = json.loads(path.read_text())
        assert found["settings"]["final"] is False
        assert found["settings"]["epochs"] == 2
        trials[found["settings"]["scale"]] = found["mean_accuracy"]
    assert set(trials) == {0.5, 20.0}
    result = output / "continual-learning-split-gated-classes-0.json"
    final = json.loads(result.read_text())
    assert trials[final["settings"]["scale"]] == max(trials.values())
    # Nothing is trained again; another setting is.
    capsys.readouterr()
    monkeypatch.setattr(script, "learn_tasks", None)
    assert script.main(call) == 0
    with pytest.raises(TypeError):
        script.main([*call, "--learning-rate", "0.01"])


def test_convolutions_and_what_has_no_closed_form_for_them(script, folder, tmp_path, capsys):
    pytest.importorskip("tyro")
    output = tmp_path / "results"
    more = ["--channels", "9", "2", "--scale", "1", "--num-train", "8"]
    more += ["--input-moments", "diagonal"]
    methods = ["subset-3", "ekfac", "gaussian"]
    assert script.main(arguments(folder, output, "cifar", methods, *more)) == 0
    printed = capsys.readouterr().out
    table = (output / "continual-learning-cifar.md").read_text()
    assert "| subset-3 | 1 | 1 |" in table
    assert "| ekfac | 1 | 1 |" in table
    assert "gaussian is left out" in printed
    assert "| gaussian |" not in table


def test_tasks_are_as_published(script, folder, tmp_path):
    options = script.ContinualLearning(tmp_path, "permuted", num_train=20, data_dir=folder)
    examples = script._Examples.load(options)
    assert [len(part[1]) for part in (examples.train, examples.validation, examples.test)] == [
        90,
        10,
        40,
    ]
    tasks = examples.tasks(options, 3, final=True)
    x = examples.train[0][:20]
    assert torch.equal(tasks[0].train[0], x)
    assert torch.equal(tasks[2].train[0].sort(1).values, x.sort(1).values)
    assert not torch.equal(tasks[1].train[0], tasks[2].train[0])
    assert torch.equal(tasks[1].test[1], examples.test[1])
    held = examples.tasks(options, 1, final=False)[0]
    assert torch.equal(held.test[0], examples.validation[0])
    pairs = script.ContinualLearning(tmp_path, "split", data_dir=folder)
    tasks = script._Examples.load(pairs).tasks(pairs, 5, final=True)
    assert [task.train[1].unique().tolist() for task in tasks] == [
        [2 * i, 2 * i + 1] for i in range(5)
    ]
    assert [task.outputs for task in tasks] == [[2 * i, 2 * i + 1] for i in range(5)]
    assert [options.plan, pairs.plan] == [(10, 15, 128, 1e-4), (5, 15, 32, 1e-3)]


@pytest.mark.parametrize(
    "words", [["--methods", "replay"], ["--tasks", "1"], ["--tasks", "11"], ["--epochs", "0"]]
)
def test_what_cannot_be_done_is_refused(script, folder, tmp_path, capsys, words):
    pytest.importorskip("tyro")
    call = arguments(folder, tmp_path / "results", "permuted", ["none"])
    assert script.main([*call, *words]) == 2
    assert "error:" in capsys.readouterr().err
