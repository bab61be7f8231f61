"""Sweeps a second: many chains at once beside one chain of the published code.

Both sample the same posterior (one hidden layer of ReLU units, noise behind every map), on one
thread, in turns in one process. What is counted is sweeps of a chain per second: of all chains
together for ours.

    python benchmarks/gibbs.py                         # ours alone
    python benchmarks/gibbs.py --rival path/to/clone   # beside gibbs_mcmc_nn.py of that repository

The published code is github.com/SPOC-group/gibbs-sampler-neural-networks (arXiv 2306.02729).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import pushforward as pf
from pushforward.sampling.noise import ChainNoise

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Setting:
    """A teacher-student problem and how many chains share a call."""

    examples: int
    features: int
    units: int
    chains: int
    noise: float = 0.1
    goal: float | None = None
    """Chain-sweeps a second that we set ourselves."""

    @property
    def title(self) -> str:
        return f"n={self.examples} d={self.features} K={self.units}, {self.chains} chains"


SETTINGS = (
    Setting(30, 2, 2, 128, goal=48_000),
    Setting(200, 10, 4, 1),
    Setting(200, 10, 4, 64, goal=6_000),
    Setting(2084, 50, 10, 1, goal=306),
    Setting(2084, 50, 10, 4),
)


def problem(setting: Setting) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a teacher from the prior."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.examples, setting.features, generator=generator, dtype=torch.float64)
    y = torch.randn(setting.examples, generator=generator, dtype=torch.float64)
    return x, 0.3 * y


def ours(setting: Setting, x: Tensor, y: Tensor) -> Callable[[int], None]:
    """Our kernel; its noise is drawn as in a run."""
    net = nn.Sequential(
        nn.Linear(setting.features, setting.units), nn.ReLU(), nn.Linear(setting.units, 1)
    ).double()
    kernel = pf.gibbs(pf.IntermediateNoiseNetwork(net, setting.noise, setting.noise), x, y)

    def source(size: Any, purpose: str) -> ChainNoise:
        return ChainNoise(
            0,
            range(setting.chains),
            size,
            purpose=purpose,
            dtype=torch.float64,
            device=torch.device("cpu"),
        )

    noise = source(kernel.noise_size, "step")
    state = kernel.start(None, source(kernel.start_size, "start").at(0))
    done = 0

    def sweep(count: int) -> None:
        nonlocal state, done
        for _ in range(count):
            state = kernel.step(state, noise.at(done))
            kernel.vectors(state)
            done += 1

    return sweep


def published(setting: Setting, x: Tensor, y: Tensor, code: ModuleType) -> Callable[[int], None]:
    """One chain of the published functions, in the order of their notebooks."""
    torch.set_default_dtype(torch.float64)
    count, features, units = setting.examples, setting.features, setting.units
    delta = torch.tensor(setting.noise)
    prior_1, prior_2 = torch.tensor(float(features)), torch.tensor(float(units))
    ones = torch.cat((torch.ones(count, 1), x), 1)
    penalty = delta * torch.diag(prior_1.expand(features + 1))
    covariance = torch.linalg.inv(ones.T @ ones + penalty)
    factor, gain = torch.linalg.cholesky(covariance), covariance @ ones.T
    w1, b1 = torch.randn(units, features), torch.zeros(units)
    z, hidden = torch.zeros(count, units), torch.zeros(count, units)
    w2, b2 = torch.ones(1, units), torch.zeros(1)
    target = y[:, None]

    def sweep(times: int) -> None:
        nonlocal w1, b1, z, hidden, w2, b2
        for _ in range(times):
            w2 = code.sample_W_l_fcl(hidden, b2, target, prior_2, delta)
            b2 = code.sample_b_l_fcl(w2, target, hidden, delta, prior_2)
            hidden = code.sample_X_L_fcl(code.ReLU(z), w2, b2, target, delta, delta)
            z = code.sample_Z_lp1_relu(x @ w1.T + b1[None], hidden, delta, delta)
            w1, b1 = code.sample_W_b_1_fcl(factor, gain, z, delta)

    return sweep


def speed(sweep: Callable[[int], None], seconds: float) -> float:
    """Calls a second: the best of several stretches, which other jobs disturb least."""
    sweep(3)
    began = perf_counter()
    sweep(3)
    each = max((perf_counter() - began) / 3, 1e-6)
    count = max(1, round(seconds / 5 / each))
    rates = []
    for _ in range(5):
        began = perf_counter()
        sweep(count)
        rates.append(count / (perf_counter() - began))
    return max(rates)


def measure(setting: Setting, seconds: float, code: ModuleType | None) -> dict[str, Any]:
    x, y = problem(setting)
    row: dict[str, Any] = asdict(setting) | {"title": setting.title}
    row["ours"] = speed(ours(setting, x, y), seconds) * setting.chains
    if code is not None:
        row["published"] = speed(published(setting, x, y, code), seconds)
        row["ratio"] = row["ours"] / row["published"]
    return row


def load_rival(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("rival", folder / "gibbs_mcmc_nn.py")
    if spec is None or spec.loader is None or not Path(spec.origin or "").exists():
        raise SystemExit(f"error: no gibbs_mcmc_nn.py in {folder}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Gibbs sweeps a second")
    parser.add_argument("--rival", type=Path, help="clone of the published code")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each measurement")
    parser.add_argument("--quick", action="store_true", help="the smallest problem, one second")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for gibbs.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    code = None if options.rival is None else load_rival(options.rival)
    settings = SETTINGS[:1] if options.quick else SETTINGS
    seconds = 1.0 if options.quick else options.seconds
    rows = []
    print(f"{'problem':34}{'ours':>12}{'published':>12}{'ratio':>8}{'goal':>10}")
    for setting in settings:
        row = measure(setting, seconds, code)
        rows.append(row)
        theirs = f"{row['published']:12,.0f}{row['ratio']:8.1f}" if code else f"{'':20}"
        goal = "" if setting.goal is None else f"{setting.goal:10,.0f}"
        print(f"{setting.title:34}{row['ours']:12,.0f}{theirs}{goal}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    report = {"chain-sweeps per second": rows, "torch": torch.__version__, "threads": 1}
    path = options.output / "gibbs.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
