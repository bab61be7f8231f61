"""Ours beside laplace-torch: time, peak memory, and how near the variances are to the exact ones.

laplace-torch needs an environment of its own; give its interpreter:

    python -m venv rival && rival/bin/pip install laplace-torch "torch==2.13.0" safetensors
    rival/bin/pip uninstall torchvision      # beside a CPU build of torch it does not load
    python benchmarks/laplace.py --rival-python rival/bin/python

Every measurement is a process of its own, with one thread, that reads the same network and data
from files and first runs a problem of four examples, so that what is loaded on first use counts
for neither. Memory is the peak resident set above what it was then. Time is that of the fit, at a
given prior precision, and of predicting 64 inputs: seconds of the one processor, which are those of
the clock where nothing else runs. Without an interpreter only ours are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
BATCH, TEST = 64, 64
ADDRESS_SPACE = 12 * 2**30  # of a measuring process


@dataclass(frozen=True)
class Case:
    """A multilayer perceptron 64-hidden-classes with tanh, and what to run on it."""

    hidden: int
    classes: int
    ours: tuple[str, ...]
    rivals: tuple[str, ...]
    exact: bool = False
    """Whether the first of ours is exact, so that the others' variances can be judged."""
    limit: float = 300.0
    """Seconds of the processor that a process may take."""
    examples: int = 256
    alpha: float = 1.0
    dtype: str = "float32"

    @property
    def parameters(self) -> int:
        return (64 + 1) * self.hidden + (self.hidden + 1) * self.classes


CASES = (
    Case(50, 10, ("exact", "sampled"), ("full", "kron", "diag"), exact=True),
    Case(100, 10, ("exact", "sampled"), ("full", "kron", "diag"), exact=True),
    Case(128, 100, ("sampled",), ("kron", "diag")),
    Case(128, 1000, ("sampled",), ("kron", "diag"), limit=120.0),
)


def perceptron(hidden: int, classes: int, dtype: str) -> nn.Sequential:
    kind = getattr(torch, dtype)
    return nn.Sequential(
        nn.Linear(64, hidden, dtype=kind), nn.Tanh(), nn.Linear(hidden, classes, dtype=kind)
    )


def write_problem(case: Case, folder: Path) -> None:
    """Train a network on labels of a teacher; leave it and its data in a folder."""
    from pushforward.runs.rng import stream

    def initialise(net: nn.Module, name: str, gain: float) -> nn.Module:
        generator = stream(0, name)
        with torch.no_grad():
            for p in net.parameters():
                fan_in = p.shape[-1] if p.dim() > 1 else 1
                p.copy_(gain * torch.randn(p.shape, generator=generator) / fan_in**0.5)
        return net

    x = torch.randn((case.examples + TEST, 64), generator=stream(0, "inputs"))
    teacher = initialise(perceptron(32, case.classes, "float32"), "teacher", 2.0)
    net = initialise(perceptron(case.hidden, case.classes, "float32"), "student", 0.3)
    with torch.no_grad():
        y = teacher(x).argmax(-1)
    train = x[: case.examples], y[: case.examples]
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    with torch.enable_grad():
        for _ in range(100):
            optimiser.zero_grad()
            norm = sum(p.square().sum() for p in net.parameters())
            loss = nn.functional.cross_entropy(net(train[0]), train[1], reduction="sum")
            (loss + 0.5 * case.alpha * norm).backward()
            optimiser.step()
    write_files(folder, net, *train, x[case.examples :])


def write_files(folder: Path, net: nn.Module, x: Tensor, y: Tensor, test: Tensor) -> None:
    save_file(net.state_dict(), folder / "net.safetensors")
    np.savez(folder / "data.npz", x=x.numpy(), y=y.numpy(), test=test.numpy())


# --- In the process that is measured ---------------------------------------------------------


def work(job: dict[str, Any]) -> None:
    """Fit and predict; print a line of JSON, leave the variances in the folder."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (int(job["limit"]), int(job["limit"]) + 5))
    folder = Path(job["folder"])
    net = perceptron(job["hidden"], job["classes"], job["dtype"])
    net.load_state_dict(load_file(folder / "net.safetensors"))
    net.eval()
    with np.load(folder / "data.npz") as arrays:
        x, y, test = (torch.from_numpy(arrays[name]) for name in ("x", "y", "test"))
    run = run_ours if job["side"] == "ours" else run_rival
    tiny = perceptron(2, 3, job["dtype"]).eval()
    run(tiny, x[:4], y[:4] % 3, test[:2], job["method"], 1.0, job["draws"])
    before = start_of_peak()
    found = run(net, x, y, test, job["method"], job["alpha"], job["draws"])
    found["megabytes"] = (peak() - before) / 1e6
    np.save(folder / "variances.npy", found.pop("variances")().numpy())
    print(json.dumps(found))


def run_ours(
    net: nn.Module, x: Tensor, y: Tensor, test: Tensor, method: str, alpha: float, draws: int
) -> dict[str, Any]:
    import pushforward as pf

    began, clock = time.process_time(), time.perf_counter()
    posterior = pf.laplace(
        net,
        (x, y),
        pf.Categorical(),
        method=method,
        prior_precision=alpha,
        num_draws=draws,
        progress=False,
    )
    fitted = time.process_time()
    found = posterior.predict(test)
    return {
        "fit": fitted - began,
        "predict": time.process_time() - fitted,
        "wall": time.perf_counter() - clock,
        "variances": lambda: found.epistemic_variance,
    }


def run_rival(
    net: nn.Module, x: Tensor, y: Tensor, test: Tensor, method: str, alpha: float, _draws: int
) -> dict[str, Any]:
    # This script has the name of their package, and its folder comes first.
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]
    from laplace import Laplace  # type: ignore[import-not-found]
    from torch.utils.data import DataLoader, TensorDataset

    began, clock = time.process_time(), time.perf_counter()
    posterior = Laplace(
        net,
        "classification",
        subset_of_weights="all",
        hessian_structure=method,
        prior_precision=alpha,
    )
    posterior.fit(DataLoader(TensorDataset(x, y), batch_size=BATCH))
    fitted = time.process_time()
    posterior(test, pred_type="glm", link_approx="probit")
    return {
        "fit": fitted - began,
        "predict": time.process_time() - fitted,
        "wall": time.perf_counter() - clock,
        "variances": lambda: (
            posterior._glm_predictive_distribution(test)[1].detach().diagonal(dim1=1, dim2=2)
        ),
    }


def start_of_peak() -> int:
    """Forget the peak so far where the system lets us; bytes resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak()
    return _status("VmRSS")


def peak() -> int:
    """Largest resident set of this process, in bytes."""
    # Not ru_maxrss: that of a new process begins with that of the process which started it.
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


# --- In the process that compares ------------------------------------------------------------


def measure(
    python: str, case: Case, side: str, method: str, folder: Path, draws: int
) -> dict[str, Any]:
    """Run a process; what it measured, or why it did not."""
    job = {
        "side": side,
        "method": method,
        "folder": str(folder),
        "draws": draws,
        "hidden": case.hidden,
        "classes": case.classes,
        "dtype": case.dtype,
        "alpha": case.alpha,
        "limit": case.limit,
    }
    row: dict[str, Any] = {"side": side, "method": method}
    (folder / "variances.npy").unlink(missing_ok=True)
    done = subprocess.run(
        [python, __file__, "--work", json.dumps(job)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode == -signal.SIGXCPU:
        return row | {"failure": f"killed after {case.limit:g} s"}
    if done.returncode < 0:
        return row | {"failure": f"killed by {signal.Signals(-done.returncode).name}"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        short_of = "memory" in last.lower() or "alloc" in last.lower()
        limit = f"more than {ADDRESS_SPACE / 2**30:g} GiB wanted"
        return row | {"failure": limit if short_of else last[:120]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row | found | {"variances": np.load(folder / "variances.npy")}


def compare(case: Case, rival: str | None, draws: int) -> dict[str, Any]:
    """All methods on a case."""
    jobs = [(sys.executable, "ours", method) for method in case.ours]
    if rival is not None:
        jobs += [(rival, "laplace-torch", method) for method in case.rivals]
    rows, truth = [], None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_problem(case, folder)
        for python, side, method in jobs:
            row = measure(python, case, side, method, folder, draws)
            variances = row.pop("variances", None)
            if case.exact and truth is None:
                truth = variances
            if truth is not None and variances is not None:
                row["off"] = float(np.abs(variances / truth - 1).mean())
            rows.append(row)
            print(case.parameters, case.classes, row, flush=True)
    return {
        "parameters": case.parameters,
        "classes": case.classes,
        "examples": case.examples,
        "draws": draws,
        "rows": rows,
    }


def parity(rival: str) -> float:
    """Largest relative difference of exact variances, in float64, on the digits classifier."""
    from laplace_solvers import digits_network

    net, x, y = digits_network()
    case = Case(20, 10, ("exact",), ("full",), dtype="float64", examples=len(x))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder, net, x, y, x[:TEST] + 0.05)
        ours = measure(sys.executable, case, "ours", "exact", folder, 1)
        theirs = measure(rival, case, "laplace-torch", "full", folder, 1)
    for row in (ours, theirs):
        if "failure" in row:
            raise SystemExit(f"parity: {row['side']}: {row['failure']}")
    return float(np.abs(theirs["variances"] / ours["variances"] - 1).max())


def table(found: dict[str, Any]) -> str:
    """One case, and the ratios to the last of ours."""
    lines = [
        f"## P = {found['parameters']:,}, {found['classes']} classes, {found['examples']} examples",
        "",
        "| method | fit, s | predict 64, s | peak, MB | variances off by | time / ours sampled "
        "| memory / ours sampled |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = next(r for r in found["rows"] if r["side"] == "ours" and r["method"] == "sampled")
    for row in found["rows"]:
        name = f"{row['side']}, {row['method']}"
        if row["side"] == "ours" and row["method"] == "sampled":
            name += f", {found['draws']} draws"
        if "failure" in row:
            lines.append(f"| {name} | {row['failure']} | | | | | |")
            continue
        off = f"{100 * row['off']:.3g} %" if "off" in row else ""
        ratios = ["", ""]
        if "failure" not in base:
            seconds = (row["fit"] + row["predict"]) / (base["fit"] + base["predict"])
            ratios = [f"{seconds:.2g}", f"{row['megabytes'] / max(base['megabytes'], 1):.2g}"]
        lines.append(
            f"| {name} | {row['fit']:.2f} | {row['predict']:.2f} | {row['megabytes']:.0f} | {off} "
            f"| {ratios[0]} | {ratios[1]} |"
        )
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None, cases: tuple[Case, ...] = CASES) -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rival-python", help="interpreter that has laplace-torch")
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work is not None:
        work(json.loads(options.work))
        return
    torch.set_num_threads(1)
    text = (
        "# Linearised Laplace beside laplace-torch\n\nTime and memory of processes with one "
        "thread, in float32. *Variances off by*: mean relative difference from the exact "
        "variances of the outputs.\n\n"
    )
    result: dict[str, Any] = {"cases": []}
    options.output.mkdir(parents=True, exist_ok=True)
    if options.rival_python is not None:
        result["parity"] = parity(options.rival_python)
        line = (
            "Exact posterior and laplace-torch's full one on the digits classifier (P = 1,510, "
            f"float64): variances differ by at most {result['parity']:.1e} of themselves.\n\n"
        )
        print(line)
        text += line
    for case in cases:
        found = compare(case, options.rival_python, options.draws)
        result["cases"].append(found)
        print(table(found), flush=True)
        text += table(found) + "\n"
        (options.output / "laplace.md").write_text(text)
        (options.output / "laplace.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
