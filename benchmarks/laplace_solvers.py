"""Which solver gives posterior draws in the fewest passes over the data?

A draw of the posterior of a linearised network solves ``H w = sqrt(A) e0 + sketch`` with
``H = M + A``. Every solver here gets the same systems (the same noise) and the same start, and is
asked after given numbers of passes for

- the error of its draws, ``||w - w*||_H^2 / gamma``, averaged over the draws (``w*`` by Cholesky or
  by a long run in float64; gamma is the effective dimension ``tr(H^{-1} M)``), and
- how far the effective dimension estimated from them is off, ``mean(w.M w) / mean(w*.M w*) - 1``.

A pass takes one vector per draw through all the data; an epoch of stochastic gradients is one. The
sketch, which all share, is not counted; nor is what stochastic gradients need to choose their step,
and of their last iterate and the average over the second half of the run the better is reported.
Since passes are what counts, the Jacobians are formed once here, and a pass is two matrix products.

    python benchmarks/laplace_solvers.py                                   # digits, minutes
    python benchmarks/laplace_solvers.py --weights lenet-0.safetensors     # and LeNet on MNIST

MNIST is read from the folder in the environment variable PUSHFORWARD_DATA, or `--data-dir`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import pushforward as pf
from pushforward.linalg.conjugate_gradients import advance, begin, solve
from pushforward.linearised_laplace.exact import primal_factor
from pushforward.linearised_laplace.linear_model import NOISE_BLOCK, LinearModel
from pushforward.linearised_laplace.priors import Prior
from pushforward.linearised_laplace.sampled import prior_draws, right_hand_sides
from pushforward.networks.data import Examples
from pushforward.networks.model import FunctionalModel
from pushforward.networks.tangent import Tangent
from pushforward.runs.rng import stream

RESULTS = Path(__file__).parent / "results"
BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 32, 40, 50, 64, 80, 100, 125, 150)
COLUMNS = (2, 4, 8, 16, 32, 50, 150)
TARGETS = (1e-1, 1e-2, 1e-3)
MOMENTUM, BATCH, STEP = 0.9, 100, 0.5
SOLVED = 1e-6  # error at which a solver need not go on
DIVERGED = 1e6

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """Linear systems whose solutions are known."""

    name: str
    net: nn.Module
    linear: LinearModel
    seed: int
    rows: Tensor
    """``(N, C, P)``: root of the curvature times the Jacobian of each example; M = rows^T rows."""
    diagonal: Tensor
    """``(P,)``: of ``M``, estimated from the sketch."""
    right: Tensor
    """``(K, P)`` right-hand sides."""
    start: Tensor
    """``(K, P)``: draws of the prior."""
    truth: Tensor
    """``(K, P)`` float64."""
    curved: Tensor
    """``(K, P)`` float64: M times the truth."""
    gamma: float

    @property
    def alpha(self) -> float:
        return float(self.linear.prior.precision)

    @property
    def draws(self) -> int:
        return len(self.right)

    def product(self, vectors: Tensor) -> Tensor:
        """``H v`` for each vector."""
        return curved(self.rows, vectors) + self.alpha * vectors

    def measure(self, draws: Tensor) -> tuple[float, float]:
        """Error and bias of the effective dimension."""
        found = draws.double()
        image, off = curved(self.rows, found), found - self.truth
        error = (off * (image - self.curved + self.alpha * off)).sum(1).mean() / self.gamma
        bias = (found * image).sum() / (self.truth * self.curved).sum() - 1
        return float(error), float(bias)


def curved(rows: Tensor, vectors: Tensor) -> Tensor:
    """``M v`` for each vector, in the precision of the vectors."""
    total = torch.zeros_like(vectors)
    for part in rows.split(max(1, 2**24 // (rows.shape[1] * rows.shape[2]))):
        matrix = part.flatten(0, 1).to(vectors.dtype)
        total += (vectors @ matrix.T) @ matrix
    return total


def weighted_rows(linear: LinearModel) -> Tensor:
    """``L_i^T J_i`` with ``L_i L_i^T`` the curvature of example i, ``(N, C, P)``."""
    size = len(linear.examples), linear.num_outputs, linear.model.space.size
    rows = torch.empty(size, dtype=linear.model.dtype)
    for batch, outputs, jacobian in linear.jacobian_blocks():
        columns = linear.likelihood.curvature_factor_adjoint(
            outputs.double(), jacobian.permute(2, 0, 1)
        )
        rows[batch.indices] = columns.permute(1, 2, 0).to(rows.dtype)
    return rows


def problem(
    name: str,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    alpha: float,
    draws: int,
    *,
    exact: bool,
    seed: int = 0,
) -> Problem:
    """Draw the noise and find the solutions, in float64."""
    model = FunctionalModel.of(net)
    prior = Prior.start("isotropic", model.space, alpha, model.device)
    linear = LinearModel(model, Examples.read((x, y)), pf.Categorical(), prior)
    sketch, rows = linear.sketch(range(draws), seed), weighted_rows(linear)
    right = right_hand_sides(linear.prior, sketch.vectors, range(draws), seed, None)
    start = prior_draws(linear.prior, right, range(draws), seed)
    if exact:
        factor = primal_factor(linear).factorise(linear.prior)
        truth = factor.solve(right.double())
        gamma = float(factor.effective_dimensions().sum())
        image = curved(rows, truth)
    else:
        truth = solve(
            lambda vectors: curved(rows, vectors) + alpha * vectors,
            right.double(),
            guess=start.double(),
            precondition=lambda vectors: vectors / alpha,
            tolerance=1e-5,
        ).solution
        image = curved(rows, truth)
        gamma = float((truth * image).sum(1).mean())
    return Problem(
        name, net, linear, seed, rows, sketch.diagonal, right, start, truth, image, gamma
    )


# --- Solvers: generators of what there is to measure after each pass -------------------------


def block_gradients(
    task: Problem, precondition: Rows | None = None, *, from_zero: bool = False
) -> Iterator[tuple[Tensor, ...]]:
    """Block conjugate gradients; the residual at the start takes a pass, unless that is zero."""
    inverse = precondition or (lambda rows: rows / task.alpha)
    if from_zero:
        zero = torch.zeros_like(task.right)
        state = begin(lambda rows: 0 * rows, task.right, zero, inverse)
    else:
        state = begin(task.product, task.right, task.start, inverse)
        yield (state.solution,)
    while True:
        state = advance(state, task.product, inverse)
        yield (state.solution,)


def single_gradients(task: Problem) -> Iterator[tuple[Tensor, ...]]:
    """Conjugate gradients for each draw on its own; all take their step in the same pass."""
    solution, residual = task.start, task.right - task.product(task.start)
    direction, length = residual, residual.square().sum(1, keepdim=True)
    yield (solution,)
    while True:
        image = task.product(direction)
        step = length / (direction * image).sum(1, keepdim=True)
        solution, residual = solution + step * direction, residual - step * image
        before, length = length, residual.square().sum(1, keepdim=True)
        direction = residual + length / before * direction
        yield (solution,)


def stochastic(
    task: Problem, *, low_variance: bool = True, jacobi: bool = False, epochs: bool = True
) -> Iterator[tuple[Tensor, ...]]:
    """Nesterov's stochastic gradients, on the objective L' or L, clipped draw by draw.

    Batches are the parts of a shuffled epoch, or each drawn anew.
    """
    linear, count, alpha = task.linear, len(task.linear.examples), task.alpha
    damped = (task.diagonal + alpha if jacobi else torch.ones_like(task.diagonal)).to(
        task.right.dtype
    )
    step = STEP / _largest_eigenvalue(task, damped)
    blocks = range(-(-count // NOISE_BLOCK))
    noise = torch.cat([linear._noise(b, range(task.draws), task.seed) for b in blocks], 1)
    prior_part = alpha * task.start
    point, velocity, total = task.start, torch.zeros_like(task.start), torch.zeros_like(task.start)
    most = torch.linalg.vector_norm(  # of the full gradient where it is largest: at the start
        (task.product(point) - task.right) * damped.rsqrt(), dim=1, keepdim=True
    )
    totals, steps = [total], 0
    order = stream(task.seed, "batches")
    while True:
        for number in range(-(-count // BATCH)):
            if number == 0 or not epochs:
                shuffled = torch.randperm(count, generator=order)
            chosen = shuffled[BATCH * number :][:BATCH] if epochs else shuffled[:BATCH]
            ahead, rows = point + MOMENTUM * velocity, task.rows[chosen].flatten(0, 1)
            moved = ahead @ rows.T
            if not low_variance:
                moved -= noise[:, chosen].flatten(1)
            constant = task.right if low_variance else prior_part
            gradient = (count / len(chosen)) * moved @ rows + alpha * ahead - constant
            size = torch.linalg.vector_norm(gradient * damped.rsqrt(), dim=1, keepdim=True)
            gradient = gradient * (most / size).clamp(max=1)
            velocity = MOMENTUM * velocity - step * gradient / damped
            point = point + velocity
            total = total + point
            steps += 1
        totals.append(total)
        now = len(totals) - 1
        half = now // 2
        yield point, (total - totals[half]) / ((now - half) * (steps / now))


def _largest_eigenvalue(task: Problem, damped: Tensor) -> float:
    """Of ``D^{-1/2} H D^{-1/2}``, by power iteration with a few vectors."""
    root = damped.rsqrt()
    vectors = torch.randn((4, len(root)), generator=stream(task.seed, "power"), dtype=root.dtype)
    value = 0.0
    for _ in range(15):
        image = root * task.product(root * vectors)
        norms = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        value = float(norms.max())
        vectors = image / norms
    return value


# --- The KFAC preconditioner -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KroneckerLayer:
    """``M`` of a layer in the bases in which its Kronecker approximation is diagonal."""

    weight: str
    bias: str | None
    inputs: Tensor
    """``(I, I)`` eigenvectors of the second moments of what comes in."""
    outputs: Tensor
    """``(O, O)`` the same of the gradients that come back."""
    values: Tensor
    """``(O, I)`` eigenvalues."""

    def rotate(self, rows: dict[str, Tensor]) -> Tensor:
        matrix = rows[self.weight].flatten(2)
        if self.bias is not None:
            matrix = torch.cat([matrix, rows[self.bias].unsqueeze(2)], 2)
        return self.outputs.T @ matrix @ self.inputs

    def restore(self, matrix: Tensor, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        matrix = self.outputs @ matrix @ self.inputs.T
        if self.bias is None:
            return {self.weight: matrix.reshape(rows[self.weight].shape)}
        weight = matrix[..., :-1].reshape(rows[self.weight].shape)
        return {self.weight: weight, self.bias: matrix[..., -1]}


def kronecker(task: Problem, *, corrected: bool = False) -> Rows:
    """Inverse of the prior's precision plus a Kronecker product for each layer.

    With `corrected` the eigenvalues are second moments of the gradients in the eigenbasis (George
    et al., arXiv 1806.03884), which takes another pass.
    """
    linear, net = task.linear, task.net
    space, kept = linear.model.space, {}
    layers = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and f"{name}.weight" in space.names
    }
    covered = {f"{name}.{p}" for name, m in layers.items() for p, _ in m.named_parameters()}
    assert covered == set(space.names)
    hooks = [
        module.register_forward_hook(
            lambda _module, given, out, name=name: kept.__setitem__(name, (given[0], out))
        )
        for name, module in layers.items()
    ]
    moments: dict[str, list[Tensor]] = {}
    positions = dict.fromkeys(layers, 1)
    count = len(linear.examples)
    for first in range(0, count, NOISE_BLOCK):
        chosen = torch.arange(first, min(first + NOISE_BLOCK, count))
        with torch.enable_grad():
            found = net(linear.examples.select(chosen).inputs)
        noise = linear._noise(first // NOISE_BLOCK, range(task.draws), task.seed)
        pushed = linear.likelihood.curvature_factor(found.detach(), noise[:, : len(chosen)])
        gradients = torch.autograd.grad(
            found, [kept[name][1] for name in layers], pushed, is_grads_batched=True
        )
        for (name, module), gradient in zip(layers.items(), gradients, strict=True):
            rows = _incoming(module, kept[name][0].detach())
            back = gradient.flatten(3).movedim(2, -1) if gradient.dim() > 3 else gradient
            positions[name] = back[0, 0].numel() // module.weight.shape[0]
            back = back.reshape(-1, module.weight.shape[0])
            new = [rows.T @ rows, back.T @ back / task.draws]
            old = moments.get(name)
            moments[name] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
    for hook in hooks:
        hook.remove()
    factors = []
    for name, (incoming, back) in moments.items():
        (left, u), (right, v) = (torch.linalg.eigh(m.double()) for m in (incoming, back))
        values = right[:, None].clamp(min=0) * left.clamp(min=0) / (count * positions[name])
        bias = f"{name}.bias" if layers[name].bias is not None else None
        u, v = u.to(task.right.dtype), v.to(task.right.dtype)
        factors.append(KroneckerLayer(f"{name}.weight", bias, u, v, values))
    if corrected:
        factors = _with_second_moments(task, factors)

    def inverse(rows: Tensor) -> Tensor:
        given, found = space.unravel(rows), {}
        for layer in factors:
            damped = (layer.values + task.alpha).to(rows.dtype)
            found |= layer.restore(layer.rotate(given) / damped, given)
        return space.ravel({name: found[name] for name in space.names})

    return inverse


def _with_second_moments(task: Problem, factors: list[KroneckerLayer]) -> list[KroneckerLayer]:
    linear, count = task.linear, len(task.linear.examples)
    values = [torch.zeros_like(layer.values) for layer in factors]
    for first in range(0, count, NOISE_BLOCK):
        chosen = torch.arange(first, min(first + NOISE_BLOCK, count))
        inputs = linear.examples.select(chosen).inputs
        noise = linear._noise(first // NOISE_BLOCK, range(task.draws), task.seed)
        pushed = linear.likelihood.curvature_factor(
            linear.model.predict(inputs), noise[:, : len(chosen)]
        )
        rows = linear.model.space.unravel(Tangent(linear.model).vjp(inputs, pushed))
        for total, layer in zip(values, factors, strict=True):
            total += layer.rotate(rows).double().square().mean(0)
    return [replace(layer, values=v) for layer, v in zip(factors, values, strict=True)]


def _incoming(module: nn.Module, inputs: Tensor) -> Tensor:
    """What meets the weights of a layer, position by position, with a one for the bias."""
    if isinstance(module, nn.Conv2d):
        assert module.groups == 1
        patches = functional.unfold(
            inputs, module.kernel_size, module.dilation, module.padding, module.stride
        )
        inputs = patches.mT
    rows = inputs.reshape(-1, inputs.shape[-1])
    return rows if module.bias is None else torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


# --- Running and reporting -------------------------------------------------------------------

Solver = Callable[[Problem], Iterator[tuple[Tensor, ...]]]

SOLVERS: dict[str, Solver] = {
    "block CG, prior": block_gradients,
    "block CG, prior, from zero": lambda task: block_gradients(task, from_zero=True),
    "CG, one draw at a time": single_gradients,
    "block CG, Jacobi": lambda task: block_gradients(
        task, lambda rows: rows / (task.diagonal + task.alpha).to(rows.dtype)
    ),
    "block CG, KFAC": lambda task: block_gradients(task, kronecker(task)),
    "block CG, EKFAC (+1 pass)": lambda task: _delayed(
        block_gradients(task, kronecker(task, corrected=True)), task.start
    ),
    "SGD on L'": stochastic,
    "SGD on L": lambda task: stochastic(task, low_variance=False),
    "SGD on L', Jacobi": lambda task: stochastic(task, jacobi=True),
    "SGD on L', no epochs": lambda task: stochastic(task, epochs=False),
    "SGD on L, no epochs": lambda task: stochastic(task, low_variance=False, epochs=False),
}


def _delayed(solver: Iterator[tuple[Tensor, ...]], start: Tensor) -> Iterator[tuple[Tensor, ...]]:
    yield (start,)
    yield from solver


def measure(task: Problem, name: str, budgets: tuple[int, ...] = BUDGETS) -> dict[str, Any]:
    """Run a solver and note error and bias at every budget."""
    began = time.perf_counter()
    curve: dict[int, tuple[float, float]] = {}
    for passes, found in enumerate(SOLVERS[name](task), start=1):
        if passes in budgets:
            curve[passes] = min((task.measure(w) for w in found), key=_or_infinite)
        error = curve.get(passes, (1.0,))[0]
        if passes >= budgets[-1] or error < SOLVED or not error < DIVERGED:
            break
    return {
        "solver": name,
        "curve": {str(passes): pair for passes, pair in curve.items()},
        "seconds": time.perf_counter() - began,
    }


def _or_infinite(pair: tuple[float, float]) -> float:
    return pair[0] if math.isfinite(pair[0]) else math.inf


def passes_to(curve: dict[str, tuple[float, float]], target: float) -> int | None:
    """The first budget at which the error was that small."""
    return next((int(p) for p, (error, _) in curve.items() if error <= target), None)


def race(
    task: Problem, most: int = BUDGETS[-1], solvers: Iterable[str] = tuple(SOLVERS)
) -> dict[str, Any]:
    """Solvers on a problem; what goes into the result file."""
    budgets, found = tuple(p for p in BUDGETS if p <= most), []
    for name in solvers:
        found.append(measure(task, name, budgets))
        errors = ", ".join(f"{p}: {e:.2g}" for p, (e, _) in found[-1]["curve"].items())
        print(f"{name} ({found[-1]['seconds']:.0f} s): {errors}", flush=True)
    return {
        "problem": task.name,
        "alpha": task.alpha,
        "draws": task.draws,
        "parameters": task.right.shape[1],
        "examples": len(task.linear.examples),
        "effective_dimension": task.gamma,
        "most": budgets[-1],
        "solvers": found,
    }


def table(race: dict[str, Any]) -> str:
    """Errors, biases, and the passes that each solver took."""
    columns = [p for p in COLUMNS if p <= race["most"]]
    lines = [
        f"## {race['problem']}: alpha = {race['alpha']:g}, {race['draws']} draws",
        "",
        f"P = {race['parameters']:,}, N = {race['examples']:,}, effective dimension "
        f"{race['effective_dimension']:.1f}. Error after so many passes, and in brackets the bias "
        "of the effective dimension; then the first number of passes measured with that error.",
        "",
        "| solver | "
        + " | ".join(map(str, columns))
        + " | "
        + " | ".join(f"passes to {t:g}" for t in TARGETS)
        + " |",
        "|---|" + "---:|" * (len(columns) + len(TARGETS)),
    ]
    for row in race["solvers"]:
        curve, cells = row["curve"], []
        for passes in map(str, columns):
            if passes in curve:
                error, bias = curve[passes]
                cells.append(f"{error:.2g} ({100 * bias:+.3g} %)")
            else:
                cells.append("solved" if list(curve.values())[-1][0] < SOLVED else "diverged")
        found = [passes_to(curve, t) for t in TARGETS]
        cells += ["-" if p is None else str(p) for p in found]
        lines.append(f"| {row['solver']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", verdict(race["solvers"]), ""])


def verdict(rows: list[dict[str, Any]]) -> str:
    """Who needs the fewest passes for each target."""
    found = []
    for target in TARGETS:
        needed = {row["solver"]: passes_to(row["curve"], target) for row in rows}
        reached = {name: p for name, p in needed.items() if p is not None}
        if reached:
            least = min(reached.values())
            names = ", ".join(name for name, p in reached.items() if p == least)
            found.append(f"error {target:g} first by {names} ({least})")
    return "Fewest passes: " + "; ".join(found) + "." if found else "No solver reached a target."


def digits_network() -> tuple[nn.Module, Tensor, Tensor]:
    """The digits classifier 64-20-10, tanh, at the optimum of its loss with precision 1."""
    from sklearn.datasets import load_digits

    digits, order = load_digits(), torch.randperm(1797, generator=stream(0, "digits"))[:1000]
    x, y = torch.from_numpy(digits.data)[order] / 16, torch.from_numpy(digits.target)[order].long()
    net = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10)).double()
    generator = stream(0, "weights")
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    optimiser = torch.optim.LBFGS(
        net.parameters(),
        max_iter=3000,
        history_size=50,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        norm = sum(p.square().sum() for p in net.parameters())
        value = functional.cross_entropy(net(x), y, reduction="sum") + 0.5 * norm
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return net.eval(), x, y


def lenet(weights: Path, data_dir: Path | None, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A trained LeNet and the first of its training images."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from safetensors.torch import load_file

    from reproductions.datasets import load_mnist
    from reproductions.networks import lenet_small

    net = lenet_small()
    net.load_state_dict(load_file(weights))
    images = load_mnist("train", data_dir).slice(0, count)
    return net.eval(), images.inputs(), images.labels


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="safetensors of a trained LeNet")
    parser.add_argument("--data-dir", type=Path, help="folder that holds mnist.npz")
    parser.add_argument("--passes", type=int, default=BUDGETS[-1])
    parser.add_argument("--lenet-passes", type=int, default=50)
    parser.add_argument("--lenet-examples", type=int, default=2000)
    parser.add_argument("--draws", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--alphas", type=float, nargs="*", default=[1.0, 10.0])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    net, x, y = digits_network()
    for alpha in options.alphas:
        for draws in options.draws:
            task = problem("Digits, 64-20-10 tanh", net, x, y, alpha, draws, exact=True)
            record(race(task, options.passes, options.solvers), options.output)
    if options.weights is not None:
        net, x, y = lenet(options.weights, options.data_dir, options.lenet_examples)
        task = problem("LeNet, MNIST", net, x, y, 25.0, 8, exact=False)
        record(race(task, options.lenet_passes, options.solvers), options.output)


def record(found: dict[str, Any], folder: Path) -> None:
    """Put a race into the result files; it replaces what the same solvers did there before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "laplace_solvers.json"
    races = json.loads(path.read_text()) if path.exists() else []

    def key(race: dict[str, Any]) -> tuple[str, float, int]:
        return race["problem"], race["alpha"], race["draws"]

    solvers = {
        s["solver"]: s for r in [*races, found] if key(r) == key(found) for s in r["solvers"]
    }
    found = {**found, "solvers": [solvers[name] for name in SOLVERS if name in solvers]}
    print(table(found), flush=True)
    races = sorted([r for r in races if key(r) != key(found)] + [found], key=key)
    path.write_text(json.dumps(races, indent=1))
    text = "# Posterior draws: error by passes over the data\n\n" + "\n".join(map(table, races))
    (folder / "laplace_solvers.md").write_text(text)


if __name__ == "__main__":
    main()
