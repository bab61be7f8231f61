"""`pushforward sample` and `pushforward thermalize` from end to end, and what they refuse."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pushforward as pf
from pushforward.cli import main
from pushforward.cli.options import SamplerOptions
from pushforward.cli.samplers import (
    choose,
    fan_in_precisions,
    gradient_kernel,
    guessed_step_size,
    noisy_network,
    target_likelihood,
)
from pushforward.errors import NetworkError, OptionError
from pushforward.networks.model import FunctionalModel
from pushforward.sampling.thermalization.verdict import overall_verdict

FACTORY = """
    from torch import nn

    def build(hidden=3, outputs=3):
        return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, outputs)).double()

    def smooth():
        return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3)).double()

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.line(x)
"""


def build(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, outputs)).double().eval()


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sampled_factories.py").write_text(textwrap.dedent(FACTORY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "sampled_factories", raising=False)
    generator = torch.Generator().manual_seed(0)
    net = build()
    state = {
        key: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for key, value in net.state_dict().items()
    }
    net.load_state_dict(state)
    save_file(state, tmp_path / "model.safetensors")
    for name, count in (("train", 40), ("test", 30)):
        x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            y = pf.Categorical().sample(net(x), generator)
        np.savez(tmp_path / f"{name}.npz", x=x.numpy(), y=y.numpy().astype(np.int32))
        np.savez(tmp_path / f"{name}-real.npz", x=x.numpy(), y=x[:, 0].numpy())
    np.savez(tmp_path / "labels.npz", x=x.numpy(), y=y.numpy() + 1)
    return tmp_path


NETWORK = ["sampled_factories:build"]
SCALAR = [*NETWORK, "--factory-options", '{"outputs": 1}']
FILES = ["--data", "train.npz", "--test-data", "test.npz", "--likelihood", "categorical"]
STANDARD = ["--likelihood", "categorical", "--standard", "4"]
SHORT = ["--draws", "12", "--warmup", "6", "--chains", "2"]


def results(folder: Path, key: str) -> dict:
    saved = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return saved["sections"][key]


def test_sample_writes_draws_page_and_numbers(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("sample", *NETWORK, "--weights", "model.safetensors", *FILES, "--sampler", "hmc"),
        *("--draws", "12", "--warmup", "20", "--thin", "2", "--chains", "3", "--seed", "5"),
        *("--prior-precision", "2", "--output", "out", "--title", "<Draws>"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Plan: 3 chains of 27 parameters by HMC, 20 steps of warm-up and 24 more" in printed
    assert "KiB" in printed
    assert "R-hat" in printed
    assert "Take more draws" in printed  # advice, not only numbers
    page = (workplace / "out" / "index.html").read_text(encoding="utf-8")
    assert "<h1>&lt;Draws&gt;</h1>" in page
    section = results(workplace / "out", "posterior-samples")
    assert section["headline"] in printed
    assert section["headline"] in page
    rows = {row["name"]: row for row in section["results"]["prediction"]["rows"]}
    assert list(rows) == ["trained network", "a single draw", "average over the draws"]
    saved = json.loads((workplace / "out" / "result.json").read_text(encoding="utf-8"))
    assert saved["environment"]["Command"] == shlex.join(["pushforward", *arguments])

    # The same by hand: the command is a thin layer.
    chains = pf.Chains.load(workplace / "out" / "chains.safetensors")
    with np.load("train.npz") as train:
        data = torch.from_numpy(train["x"]), torch.from_numpy(train["y"]).long()
    net = build()
    net.load_state_dict(load_file("model.safetensors"))
    potential = pf.Potential.of_network(net, data, pf.Categorical(), prior_precision=2.0)
    again = pf.sample(pf.HMC(potential), num_draws=12, num_warmup=20, thin=2, num_chains=3, seed=5)
    assert torch.equal(again.parameters["0.weight"], chains.parameters["0.weight"])
    assert chains.observations["prediction"].shape == (3, 12, 8, 3)
    assert chains.observations["test loss"].shape == (3, 12)
    with np.load("test.npz") as test, torch.no_grad():
        loss = -pf.Categorical().log_prob(
            net(torch.from_numpy(test["x"])), torch.from_numpy(test["y"]).long()
        )
    assert rows["trained network"]["nll"]["value"] == pytest.approx(float(loss.mean()))


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        (["--sampler", "nuts", "--max-depth", "2"], "NUTS"),
        (["--sampler", "mala", "--start", "weights", "--subset", "2"], "MALA"),
        (["--sampler", "sgld", "--batch-size", "10"], "SGLD"),
        (["--sampler", "sghmc", "--batch-size", "10", "--step-size", "1e-3"], "SGHMC"),
        (["--sampler", "sgnht"], "SGNHT"),
        (["--noise", "0.5"], "Gibbs"),
    ],
)
def test_every_sampler_has_its_name(workplace: Path, options: list[str], kernel: str) -> None:
    assert main(["sample", *NETWORK, *FILES, *SHORT, *options]) == 0
    chains = pf.Chains.load(workplace / "samples" / "chains.safetensors")
    assert chains.kernel == kernel
    assert (chains.num_chains, chains.num_draws, chains.num_warmup) == (2, 12, 6)
    found = results(workplace / "samples", "posterior-samples")["results"]["chains"]
    assert found["kernel"] == kernel
    potential = found["settings"].get("potential", {})
    if "--batch-size" in options:
        assert potential["batch_size"] == 10
    if "--subset" in options:
        assert list(chains.parameters) == ["2.weight", "2.bias"]
    if "--step-size" in options:
        assert found["settings"]["settings"]["step_size"] == 1e-3


@pytest.mark.parametrize(
    ("noise", "variance", "last"),
    [(["0.5"], None, 0.5), (["0.5", "0.1"], "0.2", 0.2)],
)
def test_a_regression_with_noise_behind_every_map(
    workplace: Path, noise: list[str], variance: str | None, last: float
) -> None:
    more = [] if variance is None else ["--noise-variance", variance]
    files = ["--data", "train-real.npz", "--test", "test-real.npz", "--likelihood", "gaussian"]
    assert main(["sample", *SCALAR, *files, *SHORT, "--noise", *noise, *more]) == 0
    found = results(workplace / "samples", "posterior-samples")["results"]
    variances = found["chains"]["settings"]["model"]["variances"]
    assert variances == {"0": 0.5, "1": float(noise[-1]), "2": last}
    assert [row["name"] for row in found["prediction"]["rows"]][-1] == "average over the draws"
    assert found["prediction"]["rows"][-1]["rmse"]["value"] > 0


def test_a_run_goes_on_from_its_checkpoint(workplace: Path) -> None:
    command = ["sample", *NETWORK, *FILES, *SHORT, "--sampler", "hmc", "--checkpoint", "state"]
    assert main([*command, "--output", "a"]) == 0
    assert any((workplace / "state").iterdir())
    assert main([*command, "--output", "b"]) == 0
    first, second = (
        pf.Chains.load(workplace / name / "chains.safetensors").parameters["0.bias"]
        for name in "ab"
    )
    assert torch.equal(first, second)
    assert main([*command, "--prior-precision", "7"]) == 2  # another posterior


def test_minibatches_begin_at_weights_that_are_given(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", *NETWORK, "--weights", "model.safetensors", *FILES, "--chains", "2"]
    still = ["--sampler", "sghmc", "--step-size", "1e-9", "--draws", "2", "--warmup", "0"]

    def distance(*options: str) -> float:
        assert main([*command, *still, *options]) == 0
        chains = pf.Chains.load(workplace / "samples" / "chains.safetensors")
        weights = load_file("model.safetensors")["0.weight"]
        return float((chains.parameters["0.weight"] - weights).abs().max())

    assert distance() < 1e-6
    assert "begin at the weights" in capsys.readouterr().out
    assert distance("--start", "prior") > 0.1


def test_without_test_data_predictions_on_the_training_data_are_followed(workplace: Path) -> None:
    files = ["--data", "train.npz", "--likelihood", "categorical"]
    assert main(["sample", *NETWORK, *files, *SHORT, "--sampler", "mala"]) == 0
    chains = pf.Chains.load(workplace / "samples" / "chains.safetensors")
    assert list(chains.observations) == ["prediction"]
    found = results(workplace / "samples", "posterior-samples")["results"]
    assert found["prediction"] is None


def test_a_step_size_that_rejects_everything_gets_advice(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--sampler", "hmc", "--step-size", "1e3"]
    assert main(["sample", *NETWORK, *FILES, *SHORT, *options]) == 0
    printed = capsys.readouterr().out
    assert "did not move" in printed
    assert "smaller step size" in printed
    section = results(workplace / "samples", "posterior-samples")
    assert section["status"] == "fail"
    page = (workplace / "samples" / "index.html").read_text(encoding="utf-8")
    assert "Take a smaller step size" in page


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["sample", *NETWORK, "--data", "no.npz", *FILES[2:]], ["no.npz"]),
        (["sample", "sampled_factories:smooth", *FILES, "--noise", "1"], ["LayerNorm"]),
        (["sample", "sampled_factories:Own", *FILES, "--noise", "1"], ["nn.Sequential"]),
        (
            ["sample", *NETWORK, *FILES, "--noise", "0"],
            ["preactivation_noise: 0.0 is out of range", "positive"],
        ),
        (
            ["sample", *NETWORK, *FILES, "--noise", "1", "-1"],
            ["postactivation_noise: -1.0 is out of range"],
        ),
        (["sample", *NETWORK, *FILES, "--noise", "1", "1", "1"], ["3 numbers"]),
        (["sample", *NETWORK, *FILES, "--noise", "1", "--subset", "2"], ["--subset"]),
        (["sample", *NETWORK, *FILES, "--noise", "1", "--step-size", "1"], ["--step-size"]),
        (["sample", *NETWORK, *FILES, "--noise", "1", "--sampler", "hmc"], ["--sampler gibbs"]),
        (["sample", *NETWORK, *FILES, "--sampler", "gibbs"], ["--noise 0.1"]),
        (["sample", *NETWORK, *FILES, "--sampler", "nuts", "--batch-size", "9"], ["sghmc"]),
        (["sample", *NETWORK, *FILES, "--sampler", "hmc", "--step-size", "-1"], ["step_size"]),
        (["sample", *NETWORK, *FILES, "--noise-variance", "1"], ["no noise variance"]),
        (["sample", *NETWORK, *FILES, "--prior-precision", "-1"], ["precision"]),
        (["sample", *NETWORK, *FILES, "--draws", "0"], ["num_draws"]),
        (["sample", *NETWORK, "--data", "labels.npz", *FILES[4:]], ["classes 0 to 2"]),
        (["sample", *NETWORK, "--data", "labels.npz", *FILES[4:], "--noise", "1"], ["1 to 3"]),
        (["sample", *NETWORK, *FILES[:2], "--test", "labels.npz", *FILES[4:]], ["test data"]),
        (["sample", *SCALAR, "--data", "train-real.npz", "--likelihood", "gaussian"], ["learn"]),
        (
            ["sample", *SCALAR, "--data", "train.npz", "--likelihood", "poisson", "--noise", "1"],
            ["no poisson network"],
        ),
        (
            ["sample", *NETWORK, *FILES, *SHORT, "--sampler", "sgld", "--step-size", "1e9"],
            ["chains left", "smaller step size"],
        ),
        (["sample", *NETWORK, *FILES, "--output", "train.npz/x"], ["cannot be written"]),
        (["thermalize", *NETWORK, "--likelihood", "categorical"], ["--data and --standard"]),
        (
            ["thermalize", *NETWORK, *STANDARD, "--count", "0"],
            ["--count"],
        ),
        (
            [
                "thermalize",
                *NETWORK,
                "--likelihood",
                "categorical",
                "--data",
                "train.npz",
                "--count",
                "33",
            ],
            ["32 examples are left"],
        ),
        (["thermalize", *SCALAR, "--likelihood", "gaussian", "--standard", "4"], ["learn"]),
        (
            ["thermalize", *NETWORK, *STANDARD, "--budget", "3"],
            ["budget"],
        ),
        (
            ["thermalize", *NETWORK, *STANDARD, "--noise", "1", "--sampler", "sgld"],
            ["--noise"],
        ),
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


# --- thermalize -----------------------------------------------------------------------------------

LINE = ["sampled_factories:build", "--factory-options", '{"hidden": 1, "outputs": 1}']
GAUSSIAN = ["--likelihood", "gaussian", "--standard", "4"]


def test_thermalize_passes_where_chains_meet(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--count", "15", "--noise", "1", "--seeds", "4", "--budget", "300"]
    assert main(["thermalize", *LINE, *GAUSSIAN, *options, "--chains", "8", "--output", "t"]) == 0
    printed = capsys.readouterr().out
    assert "Plan: 4 problems, each with 24 chains of 300 steps by Gibbs" in printed
    assert "PASS" in printed
    section = results(workplace / "t", "thermalization")
    assert section["status"] == "pass"
    assert section["results"]["verdict"] == "PASS"
    assert section["results"]["success"]["zero"]["fraction"] >= 0.9
    page = (workplace / "t" / "index.html").read_text(encoding="utf-8")
    assert "Do the curves meet?" in page
    assert "PASS" in page


def test_thermalize_tells_stuck_chains_by_its_status(workplace: Path) -> None:
    """Steps this small go nowhere in the budget: informed chains stay near, prior ones far."""
    options = ["--noise-variance", "0.01", "--sampler", "mala", "--step-size", "1e-6"]
    more = ["--count", "40", "--seeds", "3", "--budget", "64"]
    code = main(["thermalize", *LINE, *GAUSSIAN, *options, *more])
    verdict = results(workplace / "thermalization", "thermalization")["results"]["verdict"]
    assert (code, verdict) == (3, "NOT_CONVERGED")
    assert results(workplace / "thermalization", "thermalization")["status"] == "fail"


def test_every_verdict_has_a_status() -> None:
    from pushforward.cli import thermalization

    codes = thermalization._CODES
    assert codes["PASS"] == 0
    assert codes[overall_verdict({}, kernel_wrong=True, ranks_wrong=False, required=0.9)] == 4
    assert codes[overall_verdict({}, kernel_wrong=False, ranks_wrong=True, required=0.9)] == 3
    assert codes[overall_verdict({}, kernel_wrong=False, ranks_wrong=False, required=0.9)] == 5
    assert len(set(codes.values())) == len(codes)


def test_inputs_of_data_are_shared_out_between_problems_and_test(workplace: Path) -> None:
    options = ["--data", "train.npz", "--likelihood", "categorical", "--sampler", "hmc"]
    more = ["--seeds", "2", "--budget", "40", "--chains", "2", "--output"]
    assert main(["thermalize", *NETWORK, *options, *more, "a"]) in {0, 3, 5}
    assert (
        "32 inputs, 8 for testing"
        in results(workplace / "a", "thermalization")["results"]["problem"]
    )
    few = ["--count", "10", "--test-data", "test.npz"]
    assert main(["thermalize", *NETWORK, *options, *few, *more, "b"]) in {0, 3, 5}
    assert (
        "10 inputs, 30 for testing"
        in results(workplace / "b", "thermalization")["results"]["problem"]
    )


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        (["--noise", "1", "--sampler", "hmc"], "HMC"),  # parameters and latent variables together
        (["--noise-variance", "1", "--sampler", "sghmc", "--batch-size", "5"], "SGHMC"),
        (["--noise-variance", "1"], "NUTS"),
    ],
)
def test_samplers_that_thermalize_can_test(
    workplace: Path, options: list[str], kernel: str
) -> None:
    more = ["--count", "10", "--seeds", "1", "--budget", "32", "--chains", "2"]
    assert main(["thermalize", *LINE, *GAUSSIAN, *options, *more]) in {0, 3, 4, 5}
    found = results(workplace / "thermalization", "thermalization")["results"]
    assert found["kernel"] == kernel


# --- choices --------------------------------------------------------------------------------------


def test_a_sampler_is_chosen_by_the_sizes() -> None:
    plain = SamplerOptions()
    assert choose(plain, parameters=500, examples=9000).name == "nuts"
    large = choose(plain, parameters=85_000, examples=60_000)
    assert (large.name, large.batch_size) == ("sghmc", 128)
    assert "biased" in large.note
    assert choose(plain, parameters=85_000, examples=100).batch_size is None  # all of them
    assert choose(SamplerOptions(noise=(0.1,)), parameters=5, examples=10**6).name == "gibbs"
    assert choose(SamplerOptions(batch_size=7), parameters=5, examples=10).name == "sghmc"


def test_the_default_prior_is_that_of_the_fan_in() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))
    found = fan_in_precisions(FunctionalModel.of(net))
    assert found == {"0.weight": 18.0, "0.bias": 18.0, "3.weight": 12.0, "3.bias": 12.0}
    assert fan_in_precisions(FunctionalModel.of(nn.Linear(7, 2))) == {"weight": 7.0, "bias": 7.0}
    model = noisy_network(net, SamplerOptions(noise=(1.0,)), "categorical")
    assert model.precisions == found  # the same prior whatever the sampler


@pytest.mark.parametrize(("name", "power"), [("sgld", 1.0), ("sghmc", 0.5), ("sgnht", 0.5)])
def test_the_guessed_step_size_follows_the_largest_curvature(name: str, power: float) -> None:
    """Of a linear regression the curvature is known: the largest eigenvalue of X'X / s^2 + a."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64) * torch.tensor([9, 2, 1, 1])
    net = nn.Linear(4, 1, bias=False).double()
    options = SamplerOptions(sampler=name, batch_size=50)
    choice = choose(options, parameters=4, examples=50)
    potential = pf.Potential.of_network(net, (x, x[:, 0]), pf.Gaussian(0.5), prior_precision=2.0)
    largest = float(torch.linalg.eigvalsh(x.T @ x / 0.5).max()) + 2
    step, note = guessed_step_size(choice, potential, seed=1)
    assert step == pytest.approx(0.25 / largest**power, rel=1e-3)
    assert "curvature" in note
    kernel = gradient_kernel(choice, potential, options, step)
    assert kernel.name.lower() == name
    # Minibatches ask for smaller steps: their noise heats.
    few = choose(SamplerOptions(sampler=name, batch_size=2), parameters=4, examples=50)
    assert guessed_step_size(few, potential, seed=1)[0] < 0.7 * step


def test_curvature_from_some_of_many_examples_is_that_of_all() -> None:
    """2,048 of 6,000 examples; their largest eigenvalue varies by about sqrt(2 / 2048) = 3 %."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6000, 3, generator=generator, dtype=torch.float64)
    net = nn.Linear(3, 1, bias=False).double()
    choice = choose(SamplerOptions(sampler="sgld", batch_size=6000), parameters=3, examples=6000)
    potential = pf.Potential.of_network(net, (x, x[:, 0]), pf.Gaussian(1.0))
    largest = float(torch.linalg.eigvalsh(x.T @ x).max()) + 1
    for near in (False, True):
        step, _ = guessed_step_size(choice, potential, seed=1, near_weights=near)
        assert step == pytest.approx(0.25 / largest, rel=0.12)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "poisson"])
def test_other_likelihoods(workplace: Path, likelihood: str) -> None:
    if likelihood != "gaussian":
        with np.load("train.npz") as file:
            x, y = file["x"], (file["y"] > 0).astype(np.int64)
        np.savez("train-real.npz", x=x, y=y)
    more = ["--noise-variance", "0.3"] if likelihood == "gaussian" else []
    files = ["--data", "train-real.npz", "--test", "train-real.npz", "--likelihood", likelihood]
    assert main(["sample", *SCALAR, *files, *SHORT, "--sampler", "hmc", *more]) == 0
    rows = results(workplace / "samples", "posterior-samples")["results"]["prediction"]["rows"]
    assert (rows[-1]["accuracy"] is None) == (likelihood != "bernoulli")
    assert (rows[-1]["rmse"] is None) == (likelihood == "bernoulli")


def test_samplers_that_learn_their_step_size_get_none() -> None:
    net = nn.Linear(2, 1)
    potential = pf.Potential.of_network(net, (torch.ones(3, 2), torch.ones(3)), pf.Gaussian(1.0))
    choice = choose(SamplerOptions(sampler="hmc"), parameters=2, examples=1)
    assert guessed_step_size(choice, potential, seed=0) == (None, "")


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(OptionError, match="no noise variance"):
        target_likelihood("poisson", SamplerOptions(noise_variance=1.0), noise_needed=True)
    with pytest.raises(NetworkError, match=r"nn\.Sequential"):
        noisy_network(nn.Linear(2, 2), SamplerOptions(noise=(1.0,)), "gaussian")
    assert target_likelihood("gaussian", SamplerOptions(), noise_needed=False) is not None
