"""The learning coefficient beside devinterp: processor time of a step, error at equal time.

devinterp needs an environment of its own; give its interpreter:

    python -m venv rival && rival/bin/pip install devinterp==1.3.2 "torch==2.13.0" safetensors
    python benchmarks/learning_coefficient.py --rival-python rival/bin/python

The problem is a perceptron 64-32-10 with ReLU units (2,410 parameters) on 1,437 digits, at n beta =
n / ln n and gamma = 50. Every measurement is a process of its own with one thread, which reads the
same network and data from files and first runs a few steps. Time is that of the processor, so that
other jobs on the machine do not count. Three parts:

- *cost*: seconds of a step of a chain, by number of chains. devinterp moves one chain after the
  other, and reads its batches from a DataLoader; it is measured as well with batches cut from
  tensors.
- *error*: at checkpoints of the training, both get the same time; the truth is a long run of our
  HMC. devinterp has the step size 2e-4, found by hand, and half its steps as burn-in; ours finds
  its own. `exact` gives devinterp the loss of all data at the weights, else it estimates it.
- *batch*: what the batch size changes. By default devinterp takes n beta from the batch.

Without an interpreter only ours are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import log, sqrt
from pathlib import Path
from statistics import mean
from time import process_time
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

RESULTS = Path(__file__).parent / "results"
EXAMPLES, BATCH, LOCALIZATION, STEP_SIZE = 1437, 128, 50.0, 2e-4
CHECKPOINTS = (400, 1600, 6400)
FEWEST = 32  # draws of a chain, or steps of one
PARTS = ("cost", "error", "batch")
RIVALS = ("devinterp", "devinterp, cut batches", "devinterp, cut batches, exact")


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def write_problem(folder: Path, steps: Sequence[int], examples: int) -> None:
    """Digits, and the network after so many steps of Adam; files in a folder."""
    from sklearn.datasets import load_digits

    from pushforward.runs.rng import stream

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:examples] / 16, dtype=torch.float32)
    y = torch.tensor(labels[:examples])
    np.savez(folder / "data.npz", x=x.numpy(), y=y.numpy())
    net, generator = perceptron(), stream(0, "weights")
    with torch.no_grad():
        for layer in (net[0], net[2]):
            for p in layer.parameters():
                uniform = 2 * torch.rand(p.shape, generator=generator) - 1
                p.copy_(uniform / sqrt(layer.in_features))
    optimiser, generator = torch.optim.Adam(net.parameters(), 1e-3), stream(0, "batches")
    for step in range(1, max(steps) + 1):
        chosen = torch.randint(examples, (BATCH,), generator=generator)
        optimiser.zero_grad()
        functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimiser.step()
        if step in steps:
            save_file(net.state_dict(), folder / f"net-{step}.safetensors")


# --- In the process that is measured -------------------------------------------------------------


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """One measurement, after a few steps that warm up."""
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    net = perceptron()
    net.load_state_dict(load_file(folder / f"net-{job['checkpoint']}.safetensors"))
    net.eval()
    with np.load(folder / "data.npz") as arrays:
        x, y = (torch.from_numpy(arrays[name]) for name in ("x", "y"))
    run = our_run if job["side"] == "ours" else rival_run
    run(net, x, y, job | {"steps": 16, "warmup": 16, "draws": 16, "chains": 2})
    return run(net, x, y, job)


def our_run(net: nn.Module, x: Tensor, y: Tensor, job: dict[str, Any]) -> dict[str, Any]:
    return our_steps(net, x, y, job) if job["part"] == "cost" else our_estimate(net, x, y, job)


def our_steps(net: nn.Module, x: Tensor, y: Tensor, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the steps that an estimate is made of."""
    import pushforward as pf
    from pushforward.degeneracy.settings import Settings
    from pushforward.degeneracy.walk import Walk

    settings = Settings(localization=LOCALIZATION, batch_size=min(job["batch"], len(x)))
    around = settings.neighbourhood(
        net, (x, y), pf.Categorical(), subset=None, realisable=False, seed=0
    )
    walk = Walk(around, "langevin", 0, progress=False)
    began = process_time()
    walk.run("steps", steps=job["steps"], start=job["chains"], step_size=STEP_SIZE)
    return {"seconds": process_time() - began}


def our_estimate(net: nn.Module, x: Tensor, y: Tensor, job: dict[str, Any]) -> dict[str, Any]:
    import pushforward as pf

    began = process_time()
    found = pf.learning_coefficient(
        net,
        (x, y),
        pf.Categorical(),
        localization=LOCALIZATION,
        sampler=job["sampler"],
        num_chains=job["chains"],
        num_draws=job["draws"],
        num_warmup=job["warmup"],
        batch_size=min(job["batch"], len(x)),
        seed=job["seed"],
        progress=False,
    )
    return {
        "seconds": process_time() - began,
        "value": float(found),
        "error": float(found.standard_error),
        "verdict": found.verdict,
    }


def rival_run(net: nn.Module, x: Tensor, y: Tensor, job: dict[str, Any]) -> dict[str, Any]:
    """devinterp's SGLD, one chain after the other, in training mode as it wants."""
    import warnings

    from devinterp.optim.sgld import SGLD  # type: ignore[import-not-found]
    from devinterp.slt.sampler import (  # type: ignore[import-not-found]
        estimate_learning_coeff_with_summary,
    )
    from devinterp.utils import evaluate_ce  # type: ignore[import-not-found]

    warnings.simplefilter("ignore")
    torch.manual_seed(job["seed"])
    size = min(job["batch"], len(x))
    kind = CutBatches if "cut" in job["side"] else DataLoader
    loader = kind(TensorDataset(x, y), batch_size=size, shuffle=True, drop_last=True)
    kwargs: dict[str, Any] = {"lr": STEP_SIZE, "localization": LOCALIZATION}
    if not job.get("default_nbeta"):
        kwargs["nbeta"] = len(x) / log(len(x))
    half = job["steps"] // 2
    initial = None
    if "exact" in job["side"] or job["part"] == "cost":
        with torch.no_grad():
            initial = float(functional.cross_entropy(net(x), y))
    began = process_time()
    found = estimate_learning_coeff_with_summary(
        net,
        loader,
        evaluate=evaluate_ce,
        sampling_method=SGLD,
        optimizer_kwargs=kwargs,
        num_draws=half,
        num_chains=job["chains"],
        num_burnin_steps=job["steps"] - half,
        init_loss=initial,
        seed=job["seed"],
        verbose=False,
    )
    return {
        "seconds": process_time() - began,
        "value": float(found["llc/mean"]),
        "error": float(found["llc/std"]) / sqrt(job["chains"]),
    }


class CutBatches(DataLoader[Any]):
    """A loader without collation: shuffled anew in every epoch, like the other."""

    def __iter__(self) -> Any:
        x, y = self.dataset.tensors  # type: ignore[attr-defined]
        order, size = torch.randperm(len(x)), self.batch_size
        for batch in order[: len(self) * size].split(size):
            yield x[batch], y[batch]


# --- In the process that compares ----------------------------------------------------------------


def complete(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What a measurement is described by."""
    defaults = {"folder": str(folder), "batch": BATCH, "seed": 0, "sampler": "langevin"}
    return defaults | {"draws": None, "warmup": None} | job


def measure(python: str, folder: Path, **job: Any) -> dict[str, Any]:
    """Run a process.

    Raises
    ------
    SystemExit
        When it fails.
    """
    done = subprocess.run(
        [python, __file__, "--work", json.dumps(complete(folder, job))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{job}: {done.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def sides(rival: str | None) -> list[tuple[str, str]]:
    """Interpreters, and what they run."""
    ours = [(sys.executable, "ours")]
    return ours if rival is None else ours + [(rival, side) for side in RIVALS]


def cost(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds of a step of a chain; the fastest of some runs."""
    rows = []
    for chains in options.chains:
        for python, side in sides(options.rival_python):
            if "exact" in side:
                continue
            # One chain after the other there: as many chain-steps in all as are worth waiting for.
            steps = options.steps if side == "ours" else max(2, 4 * options.steps // chains)
            runs = [
                measure(
                    python,
                    folder,
                    part="cost",
                    side=side,
                    checkpoint=CHECKPOINTS[0],
                    chains=chains,
                    steps=steps,
                )
                for _ in range(options.repeats)
            ]
            seconds = min(run["seconds"] for run in runs)
            rows.append({"side": side, "chains": chains, "us": 1e6 * seconds / (chains * steps)})
            print(rows[-1], flush=True)
    return rows


def truths(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """By HMC, or as given."""
    found: dict[str, dict[str, float]] = {}
    for i, step in enumerate(CHECKPOINTS):
        if options.truth:
            value, error = options.truth[2 * i : 2 * i + 2]
            found[str(step)] = {"value": value, "error": error}
            continue
        long = {"draws": options.truth_draws, "warmup": options.truth_draws // 2}
        found[str(step)] = measure(
            sys.executable,
            folder,
            part="error",
            side="ours",
            sampler="hmc",
            checkpoint=step,
            chains=8,
            seed=1,
            **long,
        )
        print("truth", step, found[str(step)], flush=True)
    return found


def fitted(
    python: str, folder: Path, side: str, seconds: float, count: int, **job: Any
) -> dict[str, Any]:
    """An estimate that takes about so long: steps from the times of other runs."""
    chains = 8 if side == "ours" else 4
    found: dict[str, Any] = {}
    for _ in range(6):
        lengths = {"draws": count, "warmup": count // 2} if side == "ours" else {"steps": count}
        found = measure(python, folder, part="error", side=side, chains=chains, **lengths, **job)
        found["count"] = count
        if 0.85 * seconds < found["seconds"] < 1.15 * seconds:
            break
        # Ours has a fixed part, so approach from both sides, by at most ten times.
        wanted = int(count * min(10.0, max(0.2, seconds / found["seconds"])))
        if wanted < count <= FEWEST:
            break
        count = max(FEWEST, wanted)
    return found | {"chains": chains}


def error(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Distances from the truth at equal time."""
    truth, rows, counts = truths(folder, options), [], dict[tuple[str, float], int]()
    for step in CHECKPOINTS:
        known = truth[str(step)]
        for seconds in options.seconds:
            for python, side in sides(options.rival_python):
                count = counts.get((side, seconds), 200)
                first = fitted(python, folder, side, seconds, count, checkpoint=step, seed=0)
                count, chains, runs = first["count"], first["chains"], [first]
                counts[side, seconds] = count
                ours = side == "ours"
                lengths = {"draws": count, "warmup": count // 2} if ours else {"steps": count}
                for seed in range(1, options.repeats):
                    job = {"checkpoint": step, "seed": seed, "chains": chains, **lengths}
                    runs.append(measure(python, folder, part="error", side=side, **job))
                off = [run["value"] - known["value"] for run in runs]
                rows.append(
                    {
                        "side": side,
                        "checkpoint": step,
                        "budget": seconds,
                        "seconds": mean(run["seconds"] for run in runs),
                        "truth": known["value"],
                        "values": [run["value"] for run in runs],
                        "error": mean(map(abs, off)),
                        "root mean square": sqrt(mean(d * d for d in off)),
                        "stated": mean(run["error"] for run in runs),
                        "verdicts": [run.get("verdict", "") for run in runs],
                    }
                )
                print(rows[-1], flush=True)
    return {"truth": truth, "rows": rows}


def batch(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Estimates at one checkpoint from batches of several sizes."""
    jobs: list[tuple[str, str, dict[str, Any]]] = [(sys.executable, "ours", {})]
    if options.rival_python is not None:
        side = RIVALS[1]
        jobs += [
            (options.rival_python, side, {}),
            (options.rival_python, side, {"default_nbeta": True}),
        ]
    rows = []
    for size in options.batches:
        for python, side, more in jobs:
            lengths = {"steps": 1500, "chains": 4} | more
            if side == "ours":
                lengths = {"draws": options.draws, "chains": 8}
            found = measure(
                python,
                folder,
                part="batch",
                side=side,
                checkpoint=CHECKPOINTS[1],
                batch=size,
                **lengths,
            )
            name = side + (", n beta as it comes" if more else "")
            rows.append({"side": name, "batch": size, **found})
            print(rows[-1], flush=True)
    return rows


def table(found: dict[str, Any]) -> str:
    """All parts that were measured."""
    lines = ["# The learning coefficient beside devinterp 1.3.2", ""]
    if "cost" in found:
        lines += ["| | chains | us a step of a chain | times ours |", "|---|---:|---:|---:|"]
        base = {row["chains"]: row["us"] for row in found["cost"] if row["side"] == "ours"}
        for row in found["cost"]:
            ratio = row["us"] / base[row["chains"]]
            lines.append(f"| {row['side']} | {row['chains']} | {row['us']:.0f} | {ratio:.2g} |")
        lines.append("")
    if "error" in found:
        lines += [
            "| steps of training | truth (HMC) | CPU, s | | values | root mean square error "
            "| standard error it states |",
            "|---:|---:|---:|---|---|---:|---:|",
        ]
        for row in found["error"]["rows"]:
            known = found["error"]["truth"][str(row["checkpoint"])]
            values = ", ".join(f"{value:.2f}" for value in row["values"])
            lines.append(
                f"| {row['checkpoint']} | {known['value']:.2f} ± {known['error']:.2g} | "
                f"{row['seconds']:.1f} | {row['side']} | {values} | "
                f"{row['root mean square']:.2g} | {row['stated']:.2g} |"
            )
        lines.append("")
    if "batch" in found:
        names = list(dict.fromkeys(row["side"] for row in found["batch"]))
        lines += [f"| batch | {' | '.join(names)} |", "|---:|" + "---:|" * len(names)]
        for size in dict.fromkeys(row["batch"] for row in found["batch"]):
            rows = [row for row in found["batch"] if row["batch"] == size]
            cells = [f"{row['value']:.2f} ± {row['error']:.2g}" for row in rows]
            lines.append(f"| {size} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rival-python", help="interpreter that has devinterp")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--chains", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--steps", type=int, default=300, help="of each chain, where they cost")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--seconds", nargs="+", type=float, default=[5.0], help="of a processor, for errors"
    )
    parser.add_argument("--truth", nargs="+", type=float, help="value and error, by checkpoint")
    parser.add_argument("--truth-draws", type=int, default=400)
    parser.add_argument("--batches", nargs="+", type=int, default=[32, 128, 512])
    parser.add_argument("--draws", type=int, default=2000, help="of ours, where batches differ")
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work is not None:
        print(json.dumps(perform(json.loads(options.work))))
        return 0
    if options.truth and len(options.truth) != 2 * len(CHECKPOINTS):
        parser.error(f"--truth wants {2 * len(CHECKPOINTS)} numbers")
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "learning_coefficient.json"
    found: dict[str, Any] = {}
    if path.exists():  # parts may be measured on their own
        found = json.loads(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_problem(folder, CHECKPOINTS, options.examples)
        for part in options.parts:
            found[part] = {"cost": cost, "error": error, "batch": batch}[part](folder, options)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (options.output / "learning_coefficient.md").write_text(table(found), encoding="utf-8")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
