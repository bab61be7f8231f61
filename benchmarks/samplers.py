"""Effective draws a second: our NUTS and HMC beside those of BlackJAX on the same posteriors.

Both run the same number of chains side by side on one thread, in float64, warm up by their own
adaptation and are judged by the smallest bulk effective sample size over all parameters. Time is
that of warm-up and draws together. BlackJAX compiles; it is timed in its second run, and its first
is reported as well.

    python benchmarks/samplers.py             # ours alone
    python benchmarks/samplers.py --rival     # with BlackJAX, if it is installed here

A second environment keeps it apart from this one:

    python -m venv rival && rival/bin/pip install ".[data]" blackjax
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pushforward as pf

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, eq=False)
class Target:
    """A posterior in both languages."""

    name: str
    size: int
    torch_log_density: Callable[[dict[str, Tensor]], Tensor]
    jax_log_density: Callable[[Any], Any]
    mean: np.ndarray | None = None
    std: np.ndarray | None = None


def gaussian(size: int = 100) -> Target:
    """Correlated, scales from 0.1 to 10."""
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.normal(size=(size, size)))
    scales = np.geomspace(0.1, 10, size)
    precision = (rotation / scales**2) @ rotation.T
    matrix = torch.from_numpy(precision)
    std = np.sqrt(np.diag(np.linalg.inv(precision)))
    return Target(
        f"Gaussian, {size} parameters",
        size,
        lambda p: -0.5 * ((p["x"] @ matrix) * p["x"]).sum(-1),
        lambda x: -0.5 * x @ precision @ x,
        np.zeros(size),
        std,
    )


def logistic() -> Target:
    """Logistic regression on 569 tumours with 30 features, standardised; prior precision one."""
    from sklearn.datasets import load_breast_cancer

    features, labels = load_breast_cancer(return_X_y=True)
    features = (features - features.mean(0)) / features.std(0)
    design = np.concatenate([np.ones((len(features), 1)), features], 1)
    signs = np.where(labels > 0, 1.0, -1.0)
    signed = design * signs[:, None]
    matrix = torch.from_numpy(signed)

    def jax_log_density(x: Any) -> Any:
        import jax

        return jax.nn.log_sigmoid(signed @ x).sum() - 0.5 * (x @ x)

    return Target(
        "logistic regression, 31 parameters",
        design.shape[1],
        lambda p: (
            torch.nn.functional.logsigmoid(p["x"] @ matrix.T).sum(-1)
            - 0.5 * p["x"].square().sum(-1)
        ),
        jax_log_density,
    )


def network() -> Target:
    """A digits classifier 64-16-10 with tanh units on 500 images, standard normal prior."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = images[:500] / 16.0, labels[:500]
    shapes = [(16, 64), (16,), (10, 16), (10,)]
    sizes = [int(np.prod(shape)) for shape in shapes]
    ends = np.cumsum(sizes)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)

    def parts(vector: Any) -> list[Any]:
        starts = [0, *ends[:-1]]
        return [
            vector[..., start:end].reshape(*vector.shape[:-1], *shape)
            for start, end, shape in zip(starts, ends, shapes, strict=True)
        ]

    def torch_log_density(p: dict[str, Tensor]) -> Tensor:
        w1, b1, w2, b2 = parts(p["x"])
        hidden = torch.tanh(x @ w1.mT + b1[:, None])
        scores = torch.log_softmax(hidden @ w2.mT + b2[:, None], -1)
        chosen = scores[:, torch.arange(len(y)), y].sum(-1)
        return chosen - 0.5 * p["x"].square().sum(-1)

    def jax_log_density(vector: Any) -> Any:
        import jax
        import jax.numpy as jnp

        w1, b1, w2, b2 = parts(vector)
        scores = jnp.tanh(images @ w1.T + b1) @ w2.T + b2
        chosen = jax.nn.log_softmax(scores)[jnp.arange(len(labels)), labels]
        return chosen.sum() - 0.5 * (vector @ vector)

    return Target(
        "digits network, 1,210 parameters", sum(sizes), torch_log_density, jax_log_density
    )


TARGETS: dict[str, Callable[[], Target]] = {
    "gaussian": gaussian,
    "logistic": logistic,
    "network": network,
}


def ours(
    target: Target, sampler: str, mass: str, chains: int, warmup: int, draws: int
) -> dict[str, Any]:
    start = {"x": torch.zeros(target.size, dtype=torch.float64)}
    potential = pf.Potential.of_density(target.torch_log_density, start, batched=True)
    kernel = {"NUTS": pf.NUTS, "HMC": pf.HMC}[sampler](potential, mass=mass)
    began = perf_counter()
    run = pf.sample(
        kernel, num_draws=draws, num_chains=chains, num_warmup=warmup, seed=1, progress=False
    )
    return _judged(run.parameters["x"].numpy(), perf_counter() - began, target)


def blackjax_nuts(
    target: Target, mass: str, chains: int, warmup: int, draws: int
) -> dict[str, Any]:
    import blackjax
    import jax
    import jax.numpy as jnp

    def one(key: Any) -> Any:
        first, second, third = jax.random.split(key, 3)
        position = jax.random.normal(first, (target.size,))
        adaptation = blackjax.window_adaptation(
            blackjax.nuts, target.jax_log_density, is_mass_matrix_diagonal=mass == "diagonal"
        )
        (state, settings), _ = adaptation.run(second, position, num_steps=warmup)
        kernel = blackjax.nuts(target.jax_log_density, **settings).step

        def step(state: Any, key: Any) -> Any:
            state, _ = kernel(key, state)
            return state, state.position

        _, found = jax.lax.scan(step, state, jax.random.split(third, draws))
        return found

    program = jax.jit(jax.vmap(one))
    keys = jax.random.split(jax.random.key(1), chains)
    began = perf_counter()
    program(keys).block_until_ready()
    first = perf_counter() - began
    began = perf_counter()
    found = program(jnp.roll(keys, 1)).block_until_ready()
    return _judged(np.asarray(found), perf_counter() - began, target) | {"first run": first}


def _judged(draws: np.ndarray, seconds: float, target: Target) -> dict[str, Any]:
    from arviz_stats.base.array import array_stats

    axes: dict[str, Any] = {"chain_axis": 0, "draw_axis": 1}
    effective = float(np.min(array_stats.ess(draws, method="bulk", **axes)))
    row: dict[str, Any] = {
        "seconds": seconds,
        "effective": effective,
        "a second": effective / seconds,
        "r_hat": float(np.max(array_stats.rhat(draws, **axes))),
    }
    if target.mean is not None and target.std is not None:
        error = np.sqrt(target.std**2 / array_stats.ess(draws, method="mean", **axes))
        row["largest z of a mean"] = float(np.max(np.abs(draws.mean((0, 1)) - target.mean) / error))
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="effective draws a second")
    parser.add_argument("--rival", action="store_true", help="BlackJAX too")
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--masses", nargs="+", choices=("diagonal", "dense"), default=["diagonal", "dense"]
    )
    parser.add_argument("--quick", action="store_true", help="the Gaussian, few draws")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for samplers.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.rival:
        os.environ.setdefault(
            "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        )
        import jax

        jax.config.update("jax_enable_x64", True)
    warmup, draws = (50, 50) if options.quick else (options.warmup, options.draws)
    targets = [gaussian(20)] if options.quick else [TARGETS[name]() for name in options.targets]
    numbers = (options.chains, warmup, draws)
    rows = []
    print(f"{'target':36}{'sampler':24}{'seconds':>9}{'ESS':>8}{'ESS/s':>9}{'R-hat':>8}")
    for target in targets:
        runs: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
            (name, mass): lambda t=target, s=name, m=mass: ours(t, s, m, *numbers)
            for mass in options.masses
            for name in ("NUTS", "HMC")
        }
        if options.rival:
            runs |= {
                ("BlackJAX NUTS", mass): lambda t=target, m=mass: blackjax_nuts(t, m, *numbers)
                for mass in options.masses
            }
        for (sampler, mass), run in runs.items():
            name = f"{sampler}, {mass}"
            row = {"target": target.name, "sampler": sampler, "mass": mass} | run()
            rows.append(row)
            print(
                f"{target.name:36}{name:24}{row['seconds']:9.1f}{row['effective']:8.0f}"
                f"{row['a second']:9.1f}{row['r_hat']:8.3f}",
                flush=True,
            )
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {"chains": options.chains, "warmup": warmup, "draws": draws, "threads": 1}
    report = {"settings": settings, "runs": rows, "torch": torch.__version__}
    path = options.output / "samplers.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
