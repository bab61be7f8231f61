"""`pushforward uncertainty` from end to end, and the same section on the page of `report`."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pushforward as pf
from pushforward.cli import main

FACTORY = """
    from torch import nn

    def build(hidden=8, outputs=3):
        return nn.Sequential(
            nn.Flatten(), nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, outputs)
        ).double()
"""


def build(outputs: int = 3) -> nn.Module:
    layers = (nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))
    return nn.Sequential(*layers).double().eval()


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "uncertain_factories.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "uncertain_factories", raising=False)
    generator = torch.Generator().manual_seed(0)
    net = build()
    state = {
        key: torch.randn(value.shape, generator=generator, dtype=torch.float64) / 2
        for key, value in net.state_dict().items()
    }
    net.load_state_dict(state)
    save_file(state, tmp_path / "model.safetensors")
    for name, count in (("train", 40), ("test", 50), ("validation", 30)):
        x = torch.randn(count, 2, 3, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            y = pf.Categorical().sample(net(x), generator)
        # Bytes on disk and another type: read as what the network takes.
        np.savez(tmp_path / f"{name}.npz", x=x.numpy(), y=y.numpy().astype(np.int32))
    return tmp_path


NETWORK = ["uncertain_factories:build", "--weights", "model.safetensors"]
FILES = ["--data", "train.npz", "--test", "test.npz"]
LABELS = ["--likelihood", "categorical", "--labels", "cat", "dog", "<cow>"]


def results(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def test_page_numbers_and_posterior_are_written(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("uncertainty", *NETWORK, *FILES, *LABELS, "--validation", "validation.npz"),
        *("--draws", "12", "--seed", "4", "--output", "out", "--title", "Animals"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    page = (workplace / "out" / "index.html").read_text(encoding="utf-8")
    assert "<h1>Animals</h1>" in page
    assert "&lt;cow&gt;" in page
    assert 'class="thumb"' in page  # inputs of shape (2, 3) are pictures
    saved = results(workplace / "out")
    assert saved["environment"]["Command"] == shlex.join(["pushforward", *arguments])
    assert saved["environment"]["Examples"] == "train.npz, test.npz, validation.npz"
    section = saved["sections"]["uncertainty"]
    assert section["headline"] in printed
    assert "posterior.safetensors" in printed

    net = build()
    from safetensors.torch import load_file

    net.load_state_dict(load_file(workplace / "model.safetensors"))
    posterior = pf.LaplacePosterior.load(workplace / "out" / "posterior.safetensors", net)
    assert posterior.num_examples == 40
    with np.load("train.npz") as train, np.load("test.npz") as test:
        data = torch.from_numpy(train["x"]), torch.from_numpy(train["y"]).long()
        held_out = torch.from_numpy(test["x"]), torch.from_numpy(test["y"]).long()
    again = pf.laplace(net, data, pf.Categorical(), num_draws=12, seed=4)
    assert torch.equal(again.draws, posterior.draws)
    rows = {row["name"]: row["nll"]["value"] for row in section["results"]["evaluation"]["rows"]}
    expected = {row.name: row.nll.value for row in posterior.evaluate(held_out).rows}
    assert len(rows) == 4
    for name, value in expected.items():
        assert rows[name] == pytest.approx(value, rel=1e-12)


def test_what_is_wrong_with_the_page_does_not_cost_the_posterior(workplace: Path) -> None:
    few = ["--likelihood", "categorical", "--labels", "cat", "dog"]
    assert main(["uncertainty", *NETWORK, *FILES, *few, "--draws", "5", "--output", "out"]) == 2
    assert (workplace / "out" / "posterior.safetensors").exists()


def test_options_reach_the_posterior(workplace: Path) -> None:
    options = ["--prior", "gprior", "--prior-precision", "3", "--method", "sampled"]
    more = ["--subset", "3", "--draws", "5", "--fit-temperature", "--image-shape", "3", "2"]
    files = [*FILES, "--validation", "validation.npz"]
    assert main(["uncertainty", *NETWORK, *files, *LABELS, *options, *more, "--output", "o"]) == 0
    posterior = results(workplace / "o")["sections"]["uncertainty"]["results"]["posterior"]
    assert posterior["prior"] == "gprior"
    assert posterior["prior_precision"] == pytest.approx(3)
    assert (posterior["method"], posterior["num_draws"]) == ("sampled", 5)
    assert posterior["temperature"] != 1
    assert len(posterior["layer_effective_dimension"]["value"]) == 1


@pytest.mark.parametrize(
    ("likelihood", "options", "noise"),
    [
        ("gaussian", ["--noise-variance", "0.25"], 0.25),
        ("gaussian", [], None),
        ("poisson", [], None),
        ("bernoulli", [], None),
    ],
)
def test_every_likelihood_has_its_targets(
    workplace: Path, likelihood: str, options: list[str], noise: float | None
) -> None:
    generator = torch.Generator().manual_seed(1)
    law = {"gaussian": pf.Gaussian(0.2), "poisson": pf.Poisson(), "bernoulli": pf.Bernoulli()}
    for name in ("train", "test"):
        with np.load(f"{name}.npz") as file:
            x = file["x"]
        f = torch.from_numpy(x[:, 0, :1])
        y = law[likelihood].sample(f, generator).squeeze(1).numpy()
        np.savez(f"{name}.npz", inputs=x, target=y if likelihood == "gaussian" else y.astype(int))
    network = ["uncertain_factories:build", "--factory-options", '{"outputs": 1}']
    assert main(["uncertainty", *network, *FILES, "--likelihood", likelihood, *options]) == 0
    found = results(workplace / "uncertainty")["sections"]["uncertainty"]["results"]
    assert found["posterior"]["likelihood"]["kind"] == likelihood
    if noise is not None:
        assert found["posterior"]["noise_variance"] == noise


def test_the_report_has_both_sections(workplace: Path) -> None:
    law = ["--data", "train.npz", "--samples", "300"]
    files = ["--train", "train.npz", "--test", "test.npz"]
    assert main(["report", *NETWORK, *law, *files, *LABELS, "--draws", "8", "--output", "r"]) == 0
    assert list(results(workplace / "r")["sections"]) == ["expected-output", "uncertainty"]
    assert (workplace / "r" / "posterior.safetensors").exists()
    page = (workplace / "r" / "index.html").read_text(encoding="utf-8")
    assert '<a href="#uncertainty">' in page


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["uncertainty", *NETWORK, "--data", "no.npz", *FILES[2:], *LABELS], ["no.npz"]),
        (["uncertainty", *NETWORK, *FILES, *LABELS[:2], "--labels", "a"], ["1 labels for 3"]),
        (["uncertainty", *NETWORK, *FILES, *LABELS, "--fit-temperature"], ["--fit-temperature"]),
        (["uncertainty", *NETWORK, *FILES, *LABELS, "--noise-variance", "1"], ["no noise"]),
        (["uncertainty", *NETWORK, *FILES, *LABELS, "--target-key", "z"], ["'z'", "x, y"]),
        (["uncertainty", *NETWORK, *FILES, *LABELS, "--subset", "9.*"], ["matches no parameter"]),
        (["uncertainty", *NETWORK, *FILES, *LABELS, "--prior-precision", "0"], ["no precision"]),
        (["uncertainty", *NETWORK, *FILES, *LABELS, "--draws", "0"], ["num_draws"]),
        (["uncertainty", *NETWORK, *FILES, *LABELS, "--image-shape", "4"], ["no shape of a"]),
        (["uncertainty", *NETWORK, *FILES, "--likelihood", "gaussian"], ["target"]),
        (["report", *NETWORK, "--data", "train.npz", *LABELS], ["--train and --test"]),
        (["report", *NETWORK, "--data", "train.npz", "--test", "test.npz"], ["--likelihood"]),
    ],
)
def test_bad_input_is_explained_without_traceback(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    for part in parts:
        assert part in captured.err


def test_a_likelihood_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["uncertainty", *NETWORK, *FILES]) == 2
    assert main(["uncertainty", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "likelihood" in printed
    assert "fit-temperature" in printed
