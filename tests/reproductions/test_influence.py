"""The influence studies on a few synthetic rows and images in the files' formats."""

import importlib
import json

import numpy as np
import pytest
import torch

from image_files import write_mnist


@pytest.fixture
def script():
    return importlib.import_module("reproductions.influence")


@pytest.fixture
def folder(tmp_path):
    """A plane with noise for concrete; for MNIST a bright square in the place of its class."""
    rng = np.random.default_rng(0)
    concrete = tmp_path / "data" / "uci" / "concrete"
    concrete.mkdir(parents=True)
    x = rng.normal(size=(40, 3))
    table = np.column_stack([x, x.sum(1) + 0.1 * rng.normal(size=40)])
    np.savetxt(concrete / "data.csv.gz", table, delimiter=",")
    mask = np.zeros((40, 2), int)
    mask[:8, 0] = mask[8:16, 1] = 1
    np.savetxt(concrete / "test_mask.csv.gz", mask, fmt="%d", delimiter=",")
    write_mnist(tmp_path / "data", 60, 20)
    return tmp_path / "data"


def _options(script, folder, output, name, **settings):
    few = {"hidden": (3,), "clusters": (1, 2), "dampings": (0.1,), "removed": 3, "num_test": 10}
    return script.Study(name, output, data_dir=folder, **{**few, **settings})


def test_concrete(script, folder, tmp_path):
    options = _options(script, folder, tmp_path / "out", "concrete", epochs=(20,))
    (found,) = script.study(options)
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == {
        "exact Gauss-Newton",
        "EK-FAC",
        "diagonal",
        *(
            f"{e}, {c}"
            for e in ("gated", "gaussian", "anchored")
            for c in ("1 cluster", "2 clusters")
        ),
    }
    # Nearly a linear problem: the linearised response with the exact matrix is all but the truth.
    assert rows["exact Gauss-Newton"]["per_removed"] > 0.95
    assert rows["exact Gauss-Newton"]["cosine"] == pytest.approx(1.0)
    assert found["arrived"]["0.1"] == 1
    # A finished seed is read from its file.
    (again,) = script.study(options)
    assert again == json.loads(json.dumps(found))
    assert "| 0.1 | EK-FAC |" in script._table([found])


def test_mnist(script, folder, tmp_path):
    options = _options(script, folder, tmp_path, "mnist", epochs=(5,), num_train=30, clusters=(1,))
    (found,) = script.study(options)
    assert len(found["rows"]) == 6
    assert all(torch.isfinite(torch.tensor(row["per_removed"])) for row in found["rows"])


def test_mislabels(script, folder, tmp_path):
    options = _options(
        script, folder, tmp_path, "mislabels", epochs=(20,), num_train=60, clusters=(1,)
    )
    (found,) = script.study(options)
    rows = {row["method"]: row for row in found["networks"][0]["rows"]}
    assert {"loss", "gradient norm", "self-influence, EK-FAC"} < set(rows)
    assert len(rows) == 8
    assert all(0 <= row["recall_10"] <= row["recall_20"] <= 1 for row in rows.values())


def test_a_missing_folder_is_refused(script, tmp_path, capsys):
    arguments = ["--study", "concrete", "--output", str(tmp_path), "--data-dir", str(tmp_path)]
    assert script.main(arguments) == 2
    assert "error" in capsys.readouterr().err
