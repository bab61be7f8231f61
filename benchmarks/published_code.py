"""Ours beside the published code of cumulant propagation, in one process: time and agreement.

The published code (arXiv 2605.05179) is alignment-research-center/mlp_cumulant_propagation on
GitHub; it needs Python 3.12 and its own dependencies. Give the path of a clone:

    python benchmarks/published_code.py --rival PATH

Both get the same He-initialised ReLU networks with 4 hidden layers and a standard Gaussian input,
one thread, float64; theirs returns the expected outputs only. Ours runs its published form (no
exact kernel, no propagation on the sphere) for the agreement and its defaults for the time.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from expectation import RESULTS, best_time, he_network

import pushforward as pf

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "order 1": ({"order": 1, "variance": "scalar"}, {"k_max": 1}),
    "order 2": ({"order": 2, "augmented": False}, {"k_max": 2}),
    "order 2 augmented": ({"order": 2, "augmented": True}, {"k_max": 2, "augment": True}),
    "order 3": ({"order": 3}, {"k_max": 3, "factor": True}),
}


def main(argv: list[str] | None = None) -> None:
    """Time both, compare their means, print and write the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rival", type=Path, required=True, help="clone of the published code")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    sys.path.insert(0, str(options.rival / "src"))
    from mlp_kprop.kprop_harmonic import AUGMENT, SIMPLE, mlp_kprop
    from mlp_kprop.mlp import MLP

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    lines = [
        "| width | variant | ours, ms | ours, published form | published, ms | published / ours "
        "in the same form | largest difference of means |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    rows = []
    for width in options.widths:
        net = he_network(width, 4, seed=width).double()
        theirs = MLP(input_dim=width, hidden_dim=width, output_dim=width, num_layers=5)
        for parameter, weight in zip(theirs.parameters(), net.parameters(), strict=True):
            parameter.copy_(weight)
        law = pf.GaussianLaw.standard(width, dtype=torch.float64)
        tower = {1: torch.zeros(width), 2: torch.eye(width)}
        for name, (ours_options, rival_options) in VARIANTS.items():
            rival_options = dict(rival_options)
            kind = AUGMENT if rival_options.pop("augment", False) else SIMPLE

            published = partial(
                mlp_kprop,
                theirs,
                tower,
                kind=kind,
                use_avg_metric=False,
                output_d_max=1,
                **rival_options,
            )

            plain = dict(ours_options, standard_error=False, exact_above=None, angular=False)
            mean = pf.propagate(net, law, **plain).mean
            difference = float((mean - published()[1].to_tensor()).abs().max())
            ours = partial(pf.propagate, net, law, standard_error=False, **ours_options)
            mine = best_time(ours, 10)
            same = best_time(partial(pf.propagate, net, law, **plain), 10)
            other = best_time(published, 3)
            row = {
                "width": width,
                "variant": name,
                "ours_ms": mine * 1e3,
                "ours_published_form_ms": same * 1e3,
                "published_ms": other * 1e3,
                "ratio_same_form": other / same,
                "difference": difference,
            }
            rows.append(row)
            lines.append(
                f"| {width} | {name} | {mine * 1e3:.1f} | {same * 1e3:.1f} | {other * 1e3:.1f} "
                f"| {other / same:.1f} | {difference:.0e} |"
            )
            print(lines[-1], flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    text = "# Ours beside the published code\n\n" + "\n".join(lines) + "\n"
    (options.output / "published_code.md").write_text(text)
    (options.output / "published_code.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
