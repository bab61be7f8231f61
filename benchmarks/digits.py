"""The demonstration's network against ten million samples: how far is each figure from the truth?

Trains the digits classifier of `pushforward demo`, pushes the Gaussian law of its data through it
at every order, and compares means, variances and tail probabilities with one long Monte Carlo run.

    python benchmarks/digits.py                 # 10^7 samples, a few minutes
    python benchmarks/digits.py --samples 20000 --output results
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from expectation import METHODS, RESULTS
from safetensors.torch import load_file

import pushforward as pf
from pushforward.cli.demo import digits_classifier, prepare_digits


def trained_network() -> tuple[torch.nn.Module, pf.GaussianLaw, float]:
    """The network and the law of its data, as the demonstration makes them."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare_digits(Path(folder))
        net = digits_classifier()
        net.load_state_dict(load_file(run.weights))
        with np.load(run.data) as arrays:
            data = torch.from_numpy(arrays["x"])
    return net.eval(), pf.GaussianLaw.from_data(data), run.accuracy


def main(argv: list[str] | None = None) -> None:
    """Compare, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10**7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    net, law, accuracy = trained_network()
    with torch.no_grad():
        laws = {name: pf.propagate(net, law, **settings) for name, settings in METHODS.items()}
    best = laws["order 3"]
    deviations = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.float64)
    thresholds = best.mean + deviations * best.variance.sqrt()
    truth = pf.monte_carlo(net, law, options.samples, thresholds=thresholds)
    assert truth.exceedance is not None
    lines = [
        "# The digits classifier against Monte Carlo",
        "",
        f"{truth.num_samples:,} samples in orthogonal frames; test accuracy {accuracy:.3f}. "
        "z is the difference in combined standard errors.",
        "",
        "| output | Monte Carlo ± s.e. | "
        + " | ".join(f"{name} ± s.e. | z" for name in laws)
        + " |",
        "|---:|---:|" + "---:|---:|" * len(laws),
    ]
    for i in range(len(best.mean)):
        cells = [str(i), f"{truth.mean[i]:.4f} ± {truth.standard_error[i]:.4f}"]
        for item in laws.values():
            z = (item.mean[i] - truth.mean[i]) / torch.hypot(
                item.standard_error[i], truth.standard_error[i]
            )
            cells += [f"{item.mean[i]:.3f} ± {item.standard_error[i]:.3f}", f"{z:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "| method | error / variance | predicted / true | standard deviation, worst ratio | ms | "
        "MFLOP | samples for the same error |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    summary: dict[str, Any] = {}
    spread = truth.variance.sum()
    per_sample = float(truth.standard_error.square().sum() / spread) * truth.num_samples
    for name, item in laws.items():
        squared = (item.mean - truth.mean).square() - truth.standard_error.square()
        error = float(squared.sum() / spread)
        predicted = float(item.standard_error.square().sum() / spread)
        ratios = (item.variance / truth.variance).sqrt()
        worst = float(ratios[(ratios.log().abs()).argmax()])
        with torch.no_grad():
            bare = pf.propagate(net, law, standard_error=False, **METHODS[name])
        summary[name] = {"error": error, "predicted": predicted, "worst_std_ratio": worst}
        lines.append(
            f"| {name} | {error:.2e} | {predicted / error:.2f} | {worst:.3f} "
            f"| {bare.seconds * 1e3:.1f} | {bare.flops / 1e6:.3g} | {per_sample / error:,.0f} |"
        )
    lines += [
        "",
        "Tail probabilities, geometric mean over the outputs of estimate / truth, and the worst:",
        "",
        "| standard deviations above the mean | truth, median | saddlepoint, order 3 | Gaussian, "
        "order 3 | saddlepoint, order 2 augmented |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row, deviation in enumerate(deviations.flatten().tolist()):
        observed = truth.exceedance.probability[row]
        seen = observed > 50 / truth.num_samples
        cells = [f"{deviation:g}", f"{observed.median():.2g}"]
        for item, method in (
            (best, "saddlepoint"),
            (best, "gaussian"),
            (laws["order 2 augmented"], "saddlepoint"),
        ):
            ratio = (item.tail_probability(thresholds[row], method)[seen] / observed[seen]).log()
            if not len(ratio):
                cells.append("too few seen")
                continue
            worst = ratio[ratio.abs().argmax()]
            cells.append(f"{ratio.mean().exp():.2f} (worst {worst.exp():.2g})")
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "digits.md").write_text(text)
    (options.output / "digits.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
