"""Expected outputs of random ReLU networks: cumulant propagation beside every Monte Carlo design.

For He-initialised, bias-free ReLU networks with standard Gaussian inputs this measures, width by
width and depth by depth,

- the mean squared error of the expected outputs, divided by the output variance, against a long
  Monte Carlo run (two independent halves A and B: ``mean((estimate - A)(estimate - B))`` is
  unbiased however noisy they are),
- what the error bar says it is,
- FLOPs and wall-clock time, and the error that each sampling design reaches with the same FLOPs
  and in the same time.

    python benchmarks/expectation.py               # everything: half an hour on two cores
    python benchmarks/expectation.py --quick       # a minute, small networks
    python benchmarks/expectation.py --speed-only  # the timings at width 256 alone
    python benchmarks/expectation.py --retime      # all times again, errors of the last run
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pushforward as pf

METHODS: dict[str, dict[str, Any]] = {
    "order 1": {"order": 1},
    "order 2": {"order": 2, "augmented": False},
    "order 2 augmented": {"order": 2, "augmented": True},
    "order 3": {"order": 3},
}
DESIGNS = ("plain", "antithetic", "sobol", "frames")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One method on the networks of one width and depth."""

    width: int
    depth: int
    networks: int
    method: str
    error: float
    """Mean squared error over output variance, averaged over networks."""
    predicted: float
    """The same from the method's own error bar."""
    noise: float
    """Standard error of `error` from the Monte Carlo truth."""
    flops: float
    seconds: float
    at_equal_flops: dict[str, float]
    """Error of each sampling design with the same FLOPs."""
    at_equal_time: dict[str, float]
    """Error of each sampling design in the same wall-clock time."""


def he_network(width: int, depth: int, seed: int) -> nn.Sequential:
    """Bias-free ReLU network whose pre-activations all have second moment one."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for index in range(depth + 1):
        linear = nn.Linear(width, width, bias=False)
        scale = math.sqrt((1 if index == 0 else 2) / width)
        with torch.no_grad():
            linear.weight.normal_(0, scale, generator=generator)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def best_time(function: Any, repeats: int) -> float:
    """Fastest of several runs: the machine's noise only ever adds."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def sampling_constants(net: nn.Module, law: pf.GaussianLaw, width: int) -> dict[str, Any]:
    """For each design: ``samples * MSE / variance``, FLOPs and seconds for one sample."""
    constants = {}
    samples = max(8192, 8 * width)
    for design in DESIGNS:
        run = pf.monte_carlo(
            net, law, samples, design=design, seed=1, covariance=False, progress=False
        )
        efficiency = float(run.standard_error.square().sum() / run.variance.sum()) * run.num_samples
        constants[design] = (efficiency, run.flops / run.num_samples, run.seconds / run.num_samples)
    return constants


def measure(width: int, depth: int, networks: int, truth_samples: int) -> list[Row]:
    """All methods on the networks of one width and depth."""
    law = pf.GaussianLaw.standard(width)
    sums: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for index in range(networks):
        net = he_network(width, depth, seed=1000 * width + 10 * depth + index)
        halves = [
            pf.monte_carlo(
                net, law, truth_samples // 2, seed=seed, covariance=False, progress=False
            )
            for seed in (11, 12)
        ]
        variance = float((halves[0].variance.sum() + halves[1].variance.sum()) / 2)
        constants = sampling_constants(net, law, width)
        for name, options in METHODS.items():
            with torch.no_grad():
                judged = pf.propagate(net, law, **options)
                bare = pf.propagate(net, law, standard_error=False, **options)
                seconds = best_time(
                    lambda o=options, n=net: pf.propagate(n, law, standard_error=False, **o), 5
                )
            a, b = (judged.mean.double() - half.mean.double() for half in halves)
            noise = halves[0].standard_error.double().square().sum().item() / variance
            error = float((a * b).sum()) / variance
            sums[name].append(
                {
                    "error": error,
                    "predicted": float(judged.standard_error.double().square().sum()) / variance,
                    # Var(ab) for two noisy copies of the same difference.
                    "noise": math.sqrt((2 * abs(error) * noise + noise**2) / width),
                    "flops": bare.flops,
                    "seconds": seconds,
                    "at_equal_flops": {d: c * f / bare.flops for d, (c, f, _) in constants.items()},
                    "at_equal_time": {d: c * s / seconds for d, (c, _, s) in constants.items()},
                }
            )
    rows = []
    for name, cells in sums.items():
        count = len(cells)
        mean = {
            key: sum(c[key] for c in cells) / count
            for key in ("error", "predicted", "flops", "seconds")
        }
        equal = {
            key: {d: sum(c[key][d] for c in cells) / count for d in DESIGNS}
            for key in ("at_equal_flops", "at_equal_time")
        }
        noise = math.sqrt(sum(c["noise"] ** 2 for c in cells)) / count
        rows.append(Row(width, depth, networks, name, noise=noise, **mean, **equal))
    return rows


def retime(rows: list[Row]) -> list[Row]:
    """The same rows with times measured again: errors do not depend on a busy machine."""
    result = []
    cells: dict[tuple[int, int], tuple[nn.Module, pf.GaussianLaw, dict[str, Any]]] = {}
    for row in rows:
        key = row.width, row.depth
        if key not in cells:
            net = he_network(row.width, row.depth, seed=1000 * row.width + 10 * row.depth)
            law = pf.GaussianLaw.standard(row.width)
            cells[key] = net, law, sampling_constants(net, law, row.width)
        net, law, constants = cells[key]
        options = METHODS[row.method]
        with torch.no_grad():
            run = partial(pf.propagate, net, law, standard_error=False, **options)
            seconds = best_time(run, 5)
        equal = {d: c * s / seconds for d, (c, _, s) in constants.items()}
        result.append(replace(row, seconds=seconds, at_equal_time=equal))
    return result


def speed(width: int = 256, depth: int = 4, repeats: int = 20) -> dict[str, float]:
    """Milliseconds a network, one thread, beside three matrix products for each linear map."""
    net, law = he_network(width, depth, seed=0), pf.GaussianLaw.standard(width)
    matrix = torch.randn(width, width, dtype=torch.float64)
    with torch.no_grad():
        products = best_time(lambda: [matrix @ matrix for _ in range(3 * (depth + 1))], repeats)
        result = {"three matrix products a linear map": products * 1e3}
        for name, options in METHODS.items():
            run = best_time(
                lambda o=options: pf.propagate(net, law, standard_error=False, **o), repeats
            )
            result[name] = run * 1e3
            result[f"{name}, with error bar"] = 1e3 * best_time(
                lambda o=options: pf.propagate(net, law, **o), repeats
            )
    return result


def table(rows: list[Row], timings: dict[str, float]) -> str:
    """Markdown with every figure."""
    lines = [
        "# Expected outputs of random ReLU networks",
        "",
        f"torch {torch.__version__}, Python {platform.python_version()}, one thread, float64 "
        "inside; the networks and the samples are float32. `error` is the mean squared error over "
        "the output variance; a plain Monte Carlo run of N samples has 1 / N. `predicted` is what "
        "the error bar says.",
        "",
        "## Time at width 256, 4 hidden layers",
        "",
        "| what | ms | / three matrix products a linear map |",
        "|---|---:|---:|",
    ]
    base = timings["three matrix products a linear map"]
    lines += [f"| {name} | {value:.1f} | {value / base:.2f} |" for name, value in timings.items()]
    lines += [
        "",
        "## Error at equal cost",
        "",
        "The last columns are error of the design over error of the method: above 1 the "
        "propagation wins.",
        "",
        "| width | hidden | method | error | ± | predicted / error | ms | MFLOP | "
        + " | ".join(f"{d}, FLOPs" for d in DESIGNS)
        + " | "
        + " | ".join(f"{d}, time" for d in DESIGNS)
        + " |",
        "|---:|---:|---|---:|---:|---:|---:|---:|" + "---:|" * (2 * len(DESIGNS)),
    ]
    for row in rows:
        known = row.error > 2 * row.noise

        def against(other: float, row: Row = row, known: bool = known) -> str:
            return f"{other / row.error:.3g}" if known else f"> {other / (2 * row.noise):.2g}"

        cells = [
            str(row.width),
            str(row.depth),
            row.method,
            f"{row.error:.2e}" if known else f"< {2 * row.noise:.0e}",
            f"{row.noise:.0e}",
            f"{row.predicted / row.error:.2f}" if known else "-",
            f"{row.seconds * 1e3:.2f}",
            f"{row.flops / 1e6:.3g}",
            *(against(row.at_equal_flops[d]) for d in DESIGNS),
            *(against(row.at_equal_time[d]) for d in DESIGNS),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Error against FLOPs and time at one width, a column for each depth, sampling as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    width = min(256, max(row.width for row in rows))
    depths = sorted({row.depth for row in rows})
    figure, axes = pyplot.subplots(
        2, len(depths), figsize=(3.3 * len(depths), 6.2), sharey=True, squeeze=False
    )
    lines = dict(zip(DESIGNS, ("#c4c4c4", "#9a9a9a", "#c9a227", "#2a9d8f"), strict=True))
    dots = dict(zip(METHODS, ("#8ab6d6", "#4a7fb0", "#1f3a5f", "#b5423c"), strict=True))
    for column, depth in enumerate(depths):
        chosen = [row for row in rows if (row.width, row.depth) == (width, depth)]
        for line, (key, unit) in enumerate((("flops", "FLOPs"), ("seconds", "seconds"))):
            axis = axes[line][column]
            equal = "at_equal_flops" if key == "flops" else "at_equal_time"
            low = min(getattr(row, key) for row in chosen) / 3
            high = max(getattr(row, key) for row in chosen) * 3
            for design in DESIGNS:
                constant = getattr(chosen[-1], equal)[design] * getattr(chosen[-1], key)
                axis.loglog(
                    [low, high],
                    [constant / low, constant / high],
                    color=lines[design],
                    label=design,
                )
            for row in chosen:
                known = row.error > 2 * row.noise
                axis.loglog(
                    getattr(row, key),
                    row.error if known else 2 * row.noise,
                    "o" if known else "v",
                    color=dots[row.method],
                    label=row.method,
                )
            axis.set_xlabel(unit)
            axis.xaxis.set_minor_formatter("")
            if line == 0:
                axis.set_title(f"width {width}, {depth} hidden", fontsize=9)
            if column == 0:
                axis.set_ylabel("squared error / variance")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """Run, print the table and write it with the figures and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small networks, a minute")
    parser.add_argument("--speed-only", action="store_true", help="timings at width 256 alone")
    parser.add_argument("--retime", action="store_true", help="times again, errors as they are")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    timings = speed(64 if options.quick else 256, repeats=5 if options.quick else 20)
    for name, value in timings.items():
        print(f"{name:45s} {value:9.2f} ms")
    if options.speed_only:
        return
    widths: tuple[int, ...] = (16, 32) if options.quick else (16, 32, 64, 128, 256, 512)
    depths = (1, 2) if options.quick else (1, 2, 4, 8)
    rows: list[Row] = []
    if options.retime:
        kept = json.loads((options.output / "expectation.json").read_text())
        rows, widths = retime([Row(**row) for row in kept["rows"]]), ()
    for width in widths:
        for depth in depths:
            samples = 2**14 if options.quick else int(min(2**21, 2**31 / (width * depth)))
            networks = 2 if options.quick else (3 if width <= 256 else 2)
            rows += measure(width, depth, networks, samples)
            print(f"width {width:4d}, {depth} hidden:", file=sys.stderr, end=" ")
            print(
                ", ".join(f"{r.error:.1e}" for r in rows[-len(METHODS) :]),
                file=sys.stderr,
                flush=True,
            )
    options.output.mkdir(parents=True, exist_ok=True)
    report = table(rows, timings)
    (options.output / "expectation.md").write_text(report)
    data = {"timings_ms": timings, "rows": [asdict(row) for row in rows]}
    (options.output / "expectation.json").write_text(json.dumps(data, indent=1))
    plot(rows, options.output / "expectation.png")
    print(report)


if __name__ == "__main__":
    main()
