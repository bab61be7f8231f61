"""Function-space distance: time, bytes kept and error of every estimator, growing width.

    python benchmarks/function_space.py                       # widths 64 to 512, some minutes
    python benchmarks/function_space.py --widths 64 --repeats 1

Classifiers 64-width-width-10 of scikit-learn's digits, moved by training on permuted pixels and on
shifted labels. Time is that of one processor, the fastest of some repeats, with one thread: of
making what a method keeps, of a value, of a value with its gradient in all weights. Error is the
mean |log(estimate / truth)| over the moved weights; the cosine is that of the gradient with the
true one. *Exact* keeps the data.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from math import log
from pathlib import Path
from statistics import mean
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import pushforward as pf
from pushforward.errors import PushforwardError
from pushforward.function_space.baselines.diagonal import DiagonalDistance
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.baselines.kronecker import KroneckerDistance
from pushforward.function_space.baselines.subset import SubsetDistance
from pushforward.function_space.baselines.tangent import TangentDistance
from pushforward.runs.rng import stream
from pushforward.typing import Params

RESULTS = Path(__file__).parent / "results"
ESTIMATORS = ("gated", "reference", "anchored", "gaussian", "sampled", "synthetic")
DRAWS = 1000
STEPS = (50, 300)
EXACT = "exact"


def classifier(width: int) -> nn.Sequential:
    """ReLU units; weights uniform as PyTorch has them, from a stream of their own."""
    generator = stream(0, "function space", width)
    layers: list[nn.Module] = []
    for inputs, outputs in ((64, width), (width, width), (width, 10)):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) / inputs**0.5)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def digits() -> tuple[Tensor, Tensor]:
    """All images of scikit-learn's digits, in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """By Adam on batches of 64."""
    optimiser, generator = torch.optim.Adam(net.parameters(), 1e-3), stream(0, "batches")
    for _ in range(steps):
        batch = torch.randint(len(y), (64,), generator=generator)
        optimiser.zero_grad()
        functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimiser.step()


def moved(net: nn.Module, x: Tensor, y: Tensor, steps: Sequence[int]) -> list[Params]:
    """Weights after training on permuted pixels, and on shifted labels; the network stays."""
    own = {name: p.detach().clone() for name, p in net.named_parameters()}
    order = torch.randperm(x.shape[1], generator=stream(0, "pixels"))
    found = []
    for inputs, labels in ((x[:, order], y), (x, (y + 1) % 10)):
        for count in steps:
            net.load_state_dict(own)
            train(net, inputs, labels, count)
            found.append({name: p.detach().clone() for name, p in net.named_parameters()})
    net.load_state_dict(own)
    return found


def methods(net: nn.Module, x: Tensor, y: Tensor, draws: int) -> dict[str, Callable[[], Any]]:
    """Makers of what has ``num_bytes`` and ``distance(weights)``, by name; the truth first."""
    found: dict[str, Callable[[], Any]] = {EXACT: lambda: ExactDistance.of(net, x, progress=False)}
    for name in ESTIMATORS:
        found[name] = partial(_Summary, net, x, None, name, draws)
    for name in ESTIMATORS:
        found[f"{name}, 10 classes"] = partial(_Summary, net, x, y, name, draws)
    for size in (40, 200):
        found[f"subset of {size}"] = partial(SubsetDistance.of, net, x, size, seed=0)
    found["tangent"] = partial(TangentDistance.of, net, x, progress=False)
    found["tangent on 40"] = partial(TangentDistance.of, net, x, num_examples=40, progress=False)
    found["diagonal"] = partial(DiagonalDistance.of, net, x, progress=False)
    factors = partial(KroneckerDistance.of, net, x, progress=False)
    found["KFAC"] = partial(factors, eigenvalue_corrected=False)
    found["EK-FAC"] = factors
    return found


class _Summary:
    """A summary that keeps what one estimator needs."""

    def __init__(
        self, net: nn.Module, x: Tensor, classes: Tensor | None, estimator: Any, draws: int
    ) -> None:
        layers = estimator == "anchored"
        made = pf.summarize(net, x, classes=classes, layer_moments=layers, progress=False)
        self.num_bytes = made.num_bytes
        self.distance = partial(made.distance, estimator=estimator, num_samples=draws)


def measure(
    make: Callable[[], Any],
    changes: Sequence[Params],
    repeats: int,
    truth: Sequence[tuple[float, Tensor]] | None,
) -> tuple[dict[str, Any], list[tuple[float, Tensor]]]:
    """Costs and errors of one method, and its values and gradients."""
    began = process_time()
    made = make()
    row: dict[str, Any] = {"make": process_time() - began, "bytes": made.num_bytes}
    made.distance(changes[0])  # prepares what depends on the reference alone
    row["prepared"] = process_time() - began
    values, slopes, found = [], [], []
    for weights in changes:
        for _ in range(repeats):
            began = process_time()
            with torch.no_grad():
                made.distance(weights)
            values.append(process_time() - began)
            leaves = {name: p.clone().requires_grad_() for name, p in weights.items()}
            began = process_time()
            value = made.distance(leaves)
            parts = torch.autograd.grad(value, list(leaves.values()))
            slopes.append(process_time() - began)
        found.append((float(value.detach()), torch.cat([p.flatten() for p in parts]).double()))
    row |= {"value": min(values), "with gradient": min(slopes)}
    pairs = list(zip(found, truth or found, strict=True))
    row["error"] = mean(abs(log(max(own[0], 1e-12 * true[0]) / true[0])) for own, true in pairs)
    cosines = [functional.cosine_similarity(own[1], true[1], dim=0) for own, true in pairs]
    row["cosine"] = mean(map(float, cosines))
    return row, found


def compare(width: int, options: argparse.Namespace) -> dict[str, Any]:
    """All methods at one width."""
    x, y = digits()
    net = classifier(width)
    train(net, x, y, options.steps)
    changes = moved(net, x, y, STEPS)
    rows: dict[str, dict[str, Any]] = {}
    truth = None
    for name, make in methods(net, x, y, options.draws).items():
        try:
            rows[name], found = measure(make, changes, options.repeats, truth)
        except PushforwardError as error:
            rows[name] = {"failure": str(error).splitlines()[0]}
            continue
        truth = truth or found
        print(width, name, rows[name], flush=True)
    parameters = sum(p.numel() for p in net.parameters())
    return {"width": width, "parameters": parameters, "examples": len(y), "rows": rows}


def table(found: dict[str, Any]) -> str:
    """One width."""
    lines = [
        f"## Width {found['width']}: {found['parameters']:,} parameters",
        "",
        "| method | keeps, kB | made in, s | value, ms | with gradient, ms | mean \\|log ratio\\| "
        "| cosine of gradients |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in found["rows"].items():
        if "failure" in row:
            lines.append(f"| {name} | {row['failure']} | | | | | |")
            continue
        lines.append(
            f"| {name} | {row['bytes'] / 1e3:,.0f} | {row['prepared']:.2f} | "
            f"{1e3 * row['value']:.1f} | {1e3 * row['with gradient']:.1f} | {row['error']:.2f} | "
            f"{row['cosine']:.3f} |"
        )
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--draws", type=int, default=DRAWS, help="over all components")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    text = "# Function-space distance: time, bytes and error\n\n"
    cases = []
    for width in options.widths:
        cases.append(compare(width, options))
        text += table(cases[-1]) + "\n"
        (options.output / "function_space.md").write_text(text, encoding="utf-8")
        (options.output / "function_space.json").write_text(
            json.dumps(cases, indent=1) + "\n", encoding="utf-8"
        )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
