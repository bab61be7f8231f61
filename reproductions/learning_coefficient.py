"""Published experiments with the local learning coefficient, by a sampler that says when it failed.

    python -m reproductions.learning_coefficient deep-linear --output results --group 5-50
    python -m reproductions.learning_coefficient digits --output results
    python -m reproductions.learning_coefficient mnist --output results --hidden 64 64

`deep-linear` compares estimates for random deep linear networks with exact values (Furman and Lau,
arXiv 2402.03698); `mnist` asks whether entropy-SGD finds solutions of a smaller coefficient than
SGD (Lau, Murfet and Wei, arXiv 2308.12108); `digits` whether checkpoints of a classifier come in
the order in which HMC has them. One JSON file for each estimate, and a table. Started again, it
skips what is finished.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import log, sqrt
from pathlib import Path
from statistics import mean, median, quantiles, stdev
from time import process_time
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import pushforward as pf
from pushforward.degeneracy.deep_linear_points import deep_linear_local
from pushforward.errors import OptionError, PushforwardError
from pushforward.runs.rng import stream
from reproductions.datasets import load_images

__all__ = ["DeepLinear", "Digits", "Mnist", "deep_linear", "digits", "main", "mnist"]

Sampler = Literal["hmc", "mala", "langevin", "sgld"]
Optimiser = Literal["sgd", "entropy-sgd"]

_INPUT_VARIANCE = 100 / 3  # of the uniform law on [-10, 10]
_DENSE_OUTPUTS = 2500  # up to which all curvatures are computed


@dataclass(frozen=True)
class Group:
    """Deep linear networks of about the same size, with the published settings."""

    widths: tuple[int, int]
    layers: tuple[int, int]
    examples: float
    step_size: float
    steps: int


GROUPS: dict[str, Group] = {
    "5-50": Group((5, 50), (2, 5), 1e5, 5e-7, 10_000),
    "5-100": Group((5, 100), (2, 10), 1e5, 5e-7, 10_000),
    "50-500": Group((50, 500), (2, 10), 1e6, 1e-7, 50_000),
    "100-1000": Group((100, 1000), (2, 20), 1e6, 2e-8, 50_000),
    "500-2000": Group((500, 2000), (2, 20), 1e6, 2e-8, 50_000),
    "500-3000": Group((500, 3000), (2, 40), 1e6, 2e-8, 50_000),
}


@dataclass(frozen=True)
class DeepLinear:
    """Deep linear networks, whose coefficient is known.

    Parameters
    ----------
    output
        Folder for results.
    group
        Range of the widths; layers and number of examples belong to it.
    networks
        How many, drawn with seeds 0, 1, ...
    widths
        Of one network, from inputs to outputs, in place of random ones.
    points
        generic: all factors have full rank. reduced: as published, each has, with probability one
        half, a lower one.
    method
        A sampler with settings of its own, or published: SGLD with the step size and number of
        steps of the publication, of which the last tenth counts.
    localization
        gamma; None for the library's choice.
    inputs
        moments: as many examples as inputs, with exactly the second moments of the uniform law on
        [-10, 10]; on nothing else does the loss of a linear network without noise depend. uniform:
        examples of this law, taken in minibatches.
    examples
        Drawn for `inputs` uniform; the temperature is always that of the group.
    chains, draws, warmup
        Of the sampler; default the library's.
    """

    output: Path
    group: str = "5-50"
    networks: int = 20
    widths: tuple[int, ...] = ()
    points: Literal["generic", "reduced"] = "generic"
    method: Literal["hmc", "mala", "langevin", "sgld", "published"] = "hmc"
    localization: float | None = None
    inputs: Literal["moments", "uniform"] = "moments"
    examples: int = 10_000
    chains: int = 8
    draws: int | None = None
    warmup: int | None = None


@dataclass(frozen=True)
class Digits:
    """Checkpoints of a small classifier of digits.

    Parameters
    ----------
    output
        Folder for results.
    steps
        Of Adam, after which the coefficient is estimated.
    samplers
        That are compared with the first.
    localization
        gamma.
    seeds
        Of the networks.
    chains, draws, warmup
        As in `DeepLinear`.
    """

    output: Path
    steps: tuple[int, ...] = (400, 1600, 6400)
    samplers: tuple[Sampler, ...] = ("hmc", "langevin", "sgld")
    localization: float = 50.0
    seeds: tuple[int, ...] = (0,)
    chains: int = 8
    draws: int | None = None
    warmup: int | None = None


@dataclass(frozen=True)
class Mnist:
    """SGD against entropy-SGD on MNIST.

    Parameters
    ----------
    output
        Folder for networks and results.
    hidden
        Widths of the hidden layers; published 1024 1024.
    seeds
        Of the networks, one by each optimiser.
    epochs
        Passes over the training images; published 200.
    num_train
        The first training images; published all 60,000.
    batch_size, learning_rate, momentum
        Of SGD, with Nesterov's momentum; entropy-SGD has the same.
    localizations
        gamma; published 100, with 10 and 1000 to compare.
    sampler
        That estimates the coefficient.
    realisable
        Whether the targets are the network's own predictions, of which it is a minimum.
    chains, draws, warmup
        As in `DeepLinear`.
    data_dir
        Folder of the data; default what the environment variable PUSHFORWARD_DATA names.
    """

    output: Path
    hidden: tuple[int, ...] = (1024, 1024)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int = 200
    num_train: int = 60_000
    batch_size: int = 512
    learning_rate: float = 0.01
    momentum: float = 0.9
    localizations: tuple[float, ...] = (10.0, 100.0, 1000.0)
    sampler: Literal["langevin", "sgld"] = "langevin"
    realisable: bool = False
    chains: int = 4
    draws: int | None = None
    warmup: int | None = None
    data_dir: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the experiments from the command line.

    Returns
    -------
    int
        0, or 2 when something was refused.
    """
    import tyro

    chosen: DeepLinear | Digits | Mnist = tyro.extras.subcommand_cli_from_dict(
        {"deep-linear": DeepLinear, "digits": Digits, "mnist": Mnist}, args=argv
    )
    chosen.output.mkdir(parents=True, exist_ok=True)
    try:
        match chosen:
            case DeepLinear():
                name, table = _name_of(chosen), _deep_linear_table(list(deep_linear(chosen)))
            case Digits():
                name, table = "digits", _digits_table(list(digits(chosen)))
            case Mnist():
                name, table = "mnist", _mnist_table(list(mnist(chosen)))
    except PushforwardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (chosen.output / f"{name}.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def _stored(
    path: Path, settings: dict[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What a file holds, if it was made with these settings; otherwise make it."""
    settings = json.loads(json.dumps(settings, default=str))
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] == settings:
            return found
    found = {"settings": settings, **compute()}
    path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    shown = f"{found['value']:.5g} ± {found['standard_error']:.2g} {found['verdict']}"
    print(f"{path.name}: {shown}, {found['cpu_seconds']:.0f} s of a processor", flush=True)
    return found


def _estimate(net: nn.Module, data: Any, loss: Any, **options: Any) -> dict[str, Any]:
    """The coefficient as plain numbers, and what it cost."""
    began = process_time()
    found = pf.learning_coefficient(net.eval(), data, loss, progress=False, **options)
    return found.to_dict() | {"cpu_seconds": process_time() - began}


# --- deep linear networks ------------------------------------------------------------------------


def deep_linear(options: DeepLinear) -> Iterator[dict[str, Any]]:
    """Estimates for one network after the other.

    Yields
    ------
    dict
        Widths, exact values, the estimate.

    Raises
    ------
    OptionError
        For a group that does not exist.
    """
    if options.group not in GROUPS:
        raise OptionError(
            f"there is no group {options.group!r}",
            where="group",
            advice=f"Choose one of {', '.join(GROUPS)}.",
        )
    for seed in range(1 if options.widths else options.networks):
        settings = asdict(options) | {"seed": seed}
        for name in ("output", "networks"):
            del settings[name]
        path = options.output / f"{_name_of(options)}-{seed}.json"
        yield _stored(path, settings, lambda seed=seed: _one_network(options, seed))


def _name_of(options: DeepLinear) -> str:
    kind = "-".join(map(str, options.widths)) or options.group
    return f"deep-linear-{kind}-{options.points}-{options.method}"


def _one_network(options: DeepLinear, seed: int) -> dict[str, Any]:
    group = GROUPS[options.group]
    generator = stream(seed, "deep linear", options.group)
    widths, ranks = _drawn(options, group, generator)
    net = _linear_network(widths, ranks, generator)
    nbeta = group.examples / log(group.examples)
    data = _inputs(options, widths[0], generator)
    choice: dict[str, Any] = {"sampler": options.method, "num_draws": options.draws}
    choice["num_warmup"] = options.warmup
    if options.method == "published":
        tenth = group.steps // 10
        choice = {"sampler": "sgld", "step_size": group.step_size, "batch_size": len(data)}
        choice |= {"num_warmup": group.steps - tenth, "num_draws": tenth}
        if options.inputs == "uniform":
            choice["batch_size"] = min(500, len(data))
    found = _estimate(
        net,
        (data, net(data).detach()),
        _mean_square,
        nbeta=nbeta,
        localization=options.localization,
        num_chains=options.chains,
        seed=seed,
        **choice,
    )
    if options.method == "published":  # nothing was extrapolated there
        found |= {"value": found["runs"][0]["value"]}
        found |= {"standard_error": found["runs"][0]["standard_error"]}
    known = deep_linear_local(_stand_ins(widths, ranks))
    quadratic = _exact_quadratic(net, nbeta, found["localization"])
    exact: dict[str, Any] = {
        "widths": widths,
        "ranks": ranks,
        "lambda": float(known),
        "multiplicity": known.multiplicity,
        "quadratic_exact": quadratic,
    }
    return exact | found


def _drawn(
    options: DeepLinear, group: Group, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Widths, and ranks of the factors."""

    def between(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    widths = list(options.widths)
    if not widths:
        widths = [between(*group.widths) for _ in range(between(*group.layers) + 1)]
    ranks = [min(pair) for pair in itertools.pairwise(widths)]
    if options.points == "reduced":
        ranks = [between(0, rank) if between(0, 1) else rank for rank in ranks]
    return widths, ranks


def _stand_ins(widths: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Factors whose partial products have the ranks that generic factors of these ranks have.

    Those are the least on the way; the products of many Gaussian factors are too ill-conditioned
    to be told so.

    Returns
    -------
    list of Tensor
        Parts of identities.
    """
    pairs = zip(itertools.pairwise(widths), ranks, strict=True)
    return [_of_rank(torch.eye(o, i), rank) for (i, o), rank in pairs]


def _linear_network(
    widths: Sequence[int], ranks: Sequence[int], generator: torch.Generator
) -> nn.Sequential:
    """Gaussian factors that keep the size of what passes, cut to their ranks."""
    layers = [
        nn.Linear(i, o, bias=False, dtype=torch.float64) for i, o in itertools.pairwise(widths)
    ]
    with torch.no_grad():
        for layer, rank in zip(layers, ranks, strict=True):
            weight = layer.weight
            drawn = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.copy_(_of_rank(drawn / sqrt(weight.shape[1]), rank))
    return nn.Sequential(*layers)


def _of_rank(matrix: Tensor, rank: int) -> Tensor:
    if rank == min(matrix.shape):
        return matrix
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def _inputs(options: DeepLinear, width: int, generator: torch.Generator) -> Tensor:
    if options.inputs == "moments":
        return torch.eye(width, dtype=torch.float64) * sqrt(width * _INPUT_VARIANCE)
    drawn = torch.rand(options.examples, width, generator=generator, dtype=torch.float64)
    return 20 * drawn - 10


def _mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(-1)


def _exact_quadratic(net: nn.Sequential, nbeta: float, localization: float) -> float | None:
    """``1/2 sum n beta h / (n beta h + gamma)`` from all curvatures of the loss at the weights.

    Without noise the Hessian is ``2 v / outputs J'J``, ``J`` the Jacobian of the product of the
    factors and ``v`` the variance of the inputs; ``JJ'`` is a sum of Kronecker products.

    Returns
    -------
    float or None
        None where the matrix is too large.
    """
    factors = [layer.weight.detach() for layer in net if isinstance(layer, nn.Linear)]
    outputs, inputs = factors[-1].shape[0], factors[0].shape[1]
    if outputs * inputs > _DENSE_OUTPUTS:
        return None
    # Products of what comes before and after each factor.
    before = [torch.eye(inputs, dtype=torch.float64)]
    after = [torch.eye(outputs, dtype=torch.float64)]
    for factor, last in zip(factors[:-1], reversed(factors[1:]), strict=True):
        before.append(factor @ before[-1])
        after.append(after[-1] @ last)
    gram = torch.zeros(outputs * inputs, outputs * inputs, dtype=torch.float64)
    for first, second in zip(before, reversed(after), strict=True):
        gram += torch.kron(second @ second.mT, first.mT @ first)
    curvatures = torch.linalg.eigvalsh(gram).clamp(min=0) * 2 * _INPUT_VARIANCE / outputs
    return float(0.5 * (nbeta * curvatures / (nbeta * curvatures + localization)).sum())


def _deep_linear_table(results: Sequence[dict[str, Any]]) -> str:
    first = results[0]["settings"]
    lines = [
        f"# Deep linear networks {first['group']}, {first['points']} points, {first['method']}, "
        f"{first['inputs']} inputs",
        "",
        "Relative errors of the estimate: beside the learning coefficient, and beside the value at "
        "this temperature and localisation (gamma) if the loss were quadratic at the weights.",
        "",
        "| widths | parameters | lambda | gamma | quadratic | estimate | from lambda "
        "| from quadratic | verdict | CPU, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    errors, others = list[float](), list[float]()
    for found in results:
        value, truth, quadratic = found["value"], found["lambda"], found["quadratic_exact"]
        errors.append(value / truth - 1)
        known = quadratic is not None
        others += [value / quadratic - 1] if known else []
        lines.append(
            f"| {' '.join(map(str, found['widths']))} | {found['num_parameters']:,} | {truth:g} | "
            f"{found['localization']:.3g} | {f'{quadratic:.1f}' if known else ''} | {value:.1f} ± "
            f"{found['standard_error']:.1g} | {errors[-1]:+.1%} | "
            f"{f'{others[-1]:+.1%}' if known else ''} | {found['verdict']} | "
            f"{found['cpu_seconds']:.0f} |"
        )
    verdicts = ", ".join(f"{n} {v}" for v, n in Counter(f["verdict"] for f in results).items())
    lines += ["", f"{len(results)} networks: {verdicts}. Median error {_quartiles(errors)}"]
    if others:
        lines[-1] += f"; from the quadratic value {_quartiles(others)}"
    lines[-1] += "; published, all groups, from lambda: -18 % and 40 of 593 runs NaN."
    return "\n".join([*lines, ""])


def _quartiles(errors: Sequence[float]) -> str:
    if len(errors) == 1:
        return f"{errors[0]:+.1%}"
    low, _, high = quantiles(errors, n=4, method="inclusive")
    return f"{median(errors):+.1%}, quartiles {low:+.1%} and {high:+.1%}"


# --- checkpoints of a classifier of digits -------------------------------------------------------


def digits(options: Digits) -> Iterator[dict[str, Any]]:
    """Estimates by every sampler at every checkpoint.

    Yields
    ------
    dict
        The estimate.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    count = len(labels) * 4 // 5
    x = torch.tensor(images[:count] / 16, dtype=torch.float32)
    y = torch.tensor(labels[:count])
    for seed in options.seeds:
        nets: dict[int, nn.Module] | None = None
        for sampler in options.samplers:
            for step in options.steps:
                settings = asdict(options) | {"seed": seed, "sampler": sampler, "step": step}
                for name in ("output", "seeds", "samplers", "steps"):
                    del settings[name]

                def estimate(step: int = step, seed: int = seed, s: str = sampler) -> Any:
                    nonlocal nets
                    nets = nets or dict(_checkpoints(x, y, max(options.steps), seed, options.steps))
                    return _estimate(
                        nets[step],
                        (x, y),
                        pf.Categorical(),
                        sampler=s,
                        localization=options.localization,
                        num_chains=options.chains,
                        num_draws=options.draws,
                        num_warmup=options.warmup,
                        seed=seed,
                    )

                path = options.output / f"digits-{seed}-{sampler}-{step}.json"
                yield _stored(path, settings, estimate)


def _checkpoints(
    x: Tensor, y: Tensor, most: int, seed: int, wanted: Sequence[int]
) -> Iterator[tuple[int, nn.Module]]:
    """A perceptron 64-32-10 on the way, trained by Adam on batches of 128."""
    net = _perceptron((64, 32, 10), seed)
    optimiser, generator = torch.optim.Adam(net.parameters(), 1e-3), stream(seed, "batches")
    for step in range(1, most + 1):
        chosen = torch.randint(len(y), (128,), generator=generator)
        optimiser.zero_grad()
        functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimiser.step()
        if step in wanted:
            copy = _perceptron((64, 32, 10), seed)
            copy.load_state_dict(net.state_dict())
            yield step, copy.eval()


def _perceptron(widths: Sequence[int], seed: int) -> nn.Sequential:
    """ReLU units, weights uniform as PyTorch has them, from a stream of its own."""
    generator = stream(seed, "weights")
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layer = nn.Linear(inputs, outputs)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) / sqrt(inputs))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _digits_table(results: Sequence[dict[str, Any]]) -> str:
    samplers = list(dict.fromkeys(found["settings"]["sampler"] for found in results))
    steps = list(dict.fromkeys(found["settings"]["step"] for found in results))
    at = {
        (f["settings"]["seed"], f["settings"]["sampler"], f["settings"]["step"]): f for f in results
    }
    lines = [
        f"# Digits, gamma {results[0]['localization']:g}",
        "",
        "| seed | sampler | " + " | ".join(f"{step} steps" for step in steps) + " | order |",
        "|---:|---|" + "---:|" * len(steps) + "---|",
    ]
    for seed in dict.fromkeys(found["settings"]["seed"] for found in results):
        orders = []
        for sampler in samplers:
            found = [at[seed, sampler, step] for step in steps]
            cells = [
                f"{f['value']:.2f} ± {f['standard_error']:.2g} {f['verdict']}, "
                f"{f['cpu_seconds']:.0f} s"
                for f in found
            ]
            orders.append(sorted(steps, key=lambda step: at[seed, sampler, step]["value"]))
            same = "the same" if orders[-1] == orders[0] else "another"
            lines.append(f"| {seed} | {sampler} | {' | '.join(cells)} | {same} |")
    return "\n".join([*lines, ""])


# --- SGD against entropy-SGD ---------------------------------------------------------------------


def mnist(options: Mnist) -> Iterator[dict[str, Any]]:
    """Networks of both optimisers and their coefficients, seed after seed.

    Yields
    ------
    dict
        Optimiser, seed, errors and loss of the network, the estimate.

    Raises
    ------
    OptionError
        When there are fewer images than asked for.
    """
    train, test = (load_images("mnist", split, options.data_dir) for split in ("train", "test"))
    if options.num_train > len(train):
        raise OptionError(
            f"there are only {len(train)} training images, not {options.num_train}",
            where="num_train",
            advice="Ask for fewer.",
        )
    train = train.slice(0, options.num_train)
    x, y = train.inputs().flatten(1), train.labels
    test_x, test_y = test.inputs().flatten(1), test.labels
    for seed in options.seeds:
        for optimiser in ("sgd", "entropy-sgd"):
            net = _trained(options, optimiser, seed, x, y)
            scores = _scores(net, x, y, "train") | _scores(net, test_x, test_y, "test")
            for gamma in options.localizations:
                settings = asdict(options) | {"seed": seed, "optimiser": optimiser, "gamma": gamma}
                for name in ("output", "seeds", "localizations", "data_dir"):
                    del settings[name]

                def estimate(
                    net: nn.Module = net,
                    scores: dict[str, float] = scores,
                    gamma: float = gamma,
                    seed: int = seed,
                ) -> Any:
                    return scores | _estimate(
                        net,
                        (x, y),
                        pf.Categorical(),
                        sampler=options.sampler,
                        localization=gamma,
                        realisable=options.realisable,
                        num_chains=options.chains,
                        num_draws=options.draws,
                        num_warmup=options.warmup,
                        seed=seed,
                    )

                own = "-realisable" if options.realisable else ""
                path = options.output / f"mnist-{optimiser}-{seed}-{gamma:g}{own}.json"
                yield _stored(path, settings, estimate)


def _trained(
    options: Mnist, optimiser: Optimiser, seed: int, x: Tensor, y: Tensor
) -> nn.Sequential:
    """A network from its file, or trained now."""
    from safetensors.torch import load_file, save_file

    net = _perceptron((784, *options.hidden, 10), seed)
    shape = "-".join(map(str, options.hidden))
    path = options.output / (
        f"network-{shape}-{optimiser}-{options.num_train}-{options.epochs}-{options.batch_size}-"
        f"{options.learning_rate:g}-{options.momentum:g}-{seed}.safetensors"
    )
    if path.exists():
        net.load_state_dict(load_file(path))
        return net.eval()
    gradient = _minibatches(net, x, y, options.batch_size, seed)
    steps = options.epochs * (-(-len(y) // options.batch_size))
    train = _sgd if optimiser == "sgd" else _entropy_sgd
    train(net, gradient, steps, options.learning_rate, options.momentum, seed)
    save_file(net.state_dict(), path)
    return net.eval()


def _minibatches(
    net: nn.Module, x: Tensor, y: Tensor, size: int, seed: int
) -> Callable[[], Tensor]:
    """Gradients from one minibatch after the other, epoch after epoch."""
    generator = stream(seed, "batches")

    def chosen() -> Iterator[Tensor]:
        while True:
            yield from torch.randperm(len(y), generator=generator).split(size)

    batches = chosen()

    def gradient() -> Tensor:
        batch = next(batches)
        loss = functional.cross_entropy(net(x[batch]), y[batch])
        return parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))

    return gradient


def _sgd(
    net: nn.Module,
    gradient: Callable[[], Tensor],
    steps: int,
    rate: float,
    momentum: float,
    seed: int,  # noqa: ARG001
) -> None:
    """Stochastic gradient descent with Nesterov's momentum."""
    place = parameters_to_vector(net.parameters()).detach()
    velocity = torch.zeros_like(place)
    for _ in range(steps):
        slope = gradient()
        velocity = momentum * velocity + slope
        place = place - rate * (slope + momentum * velocity)
        vector_to_parameters(place, net.parameters())


def _entropy_sgd(
    net: nn.Module,
    gradient: Callable[[], Tensor],
    steps: int,
    rate: float,
    momentum: float,
    seed: int,
    *,
    inner: int = 5,
    inner_rate: float = 0.1,
    scope: float = 1e-4,
    growth: float = 1e-3,
    noise: float = 1e-4,
    memory: float = 0.75,
) -> None:
    """Descent on the local entropy (Chaudhari et al., arXiv 1611.01838).

    Every step is towards ``mu``, a running mean of `inner` steps of Langevin dynamics that a spring
    of strength ``scope (1 + growth)^t`` holds. Constants are those of Lau, Murfet and Wei, and so
    is the momentum, in both loops: the inner one begins anew at every step, without Nesterov's
    correction. The number of gradients is that of SGD.
    """
    place = parameters_to_vector(net.parameters()).detach()
    velocity, generator = torch.zeros_like(place), stream(seed, "entropy-SGD")
    for step in range(steps // inner):
        away, centre, inner_velocity = place, place, torch.zeros_like(place)
        for _ in range(inner):
            vector_to_parameters(away, net.parameters())
            inner_velocity = momentum * inner_velocity + gradient()
            spring = scope * (1 + growth) ** step * (place - away)
            shake = torch.randn(place.shape, generator=generator)
            away = away - inner_rate * (inner_velocity - spring)
            away = away + sqrt(inner_rate) * noise * shake
            centre = (1 - memory) * centre + memory * away
        velocity = momentum * velocity + (place - centre)
        place = place - rate * velocity
        vector_to_parameters(place, net.parameters())


@torch.no_grad()
def _scores(net: nn.Module, x: Tensor, y: Tensor, name: str) -> dict[str, float]:
    outputs = net(x)
    return {
        f"{name} error": float((outputs.argmax(-1) != y).double().mean()),
        f"{name} loss": float(functional.cross_entropy(outputs.double(), y)),
    }


def _mnist_table(results: Sequence[dict[str, Any]]) -> str:
    first = results[0]["settings"]
    lines = [
        f"# MNIST 784-{'-'.join(map(str, first['hidden']))}-10, {first['num_train']:,} images, "
        f"{first['epochs']} epochs" + (", realisable" if first["realisable"] else ""),
        "",
        "Means over seeds ± standard deviations. Lower: seeds whose network by entropy-SGD has the "
        "smaller coefficient by more than two errors, larger, unclear.",
        "",
        "| | SGD | entropy-SGD |",
        "|---|---:|---:|",
    ]
    columns: tuple[Optimiser, Optimiser] = ("sgd", "entropy-sgd")
    gammas = list(dict.fromkeys(f["settings"]["gamma"] for f in results))

    def rows(optimiser: Optimiser, gamma: float) -> list[dict[str, Any]]:
        wanted = (optimiser, gamma)
        return [
            f for f in results if (f["settings"]["optimiser"], f["settings"]["gamma"]) == wanted
        ]

    for name in ("train error", "train loss", "test error", "test loss"):
        cells = [_spread([f[name] for f in rows(o, gammas[0])]) for o in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "| gamma | SGD | entropy-SGD | lower, larger, unclear | verdicts of SGD | of entropy-SGD |",
        "|---:|---:|---:|---|---|---|",
    ]
    for gamma in gammas:
        pair = [rows(optimiser, gamma) for optimiser in columns]
        cells = [_spread([f["value"] for f in found]) for found in pair]
        verdicts = [
            ", ".join(f"{n} {v}" for v, n in Counter(f["verdict"] for f in found).items())
            for found in pair
        ]
        signs = Counter(_comparison(a, b) for a, b in zip(*pair, strict=False))
        counts = ", ".join(str(signs[sign]) for sign in (-1, 1, 0))
        lines.append(f"| {gamma:g} | {' | '.join(cells)} | {counts} | {' | '.join(verdicts)} |")
    return "\n".join([*lines, ""])


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):.4g}{spread}"


def _comparison(sgd: dict[str, Any], entropy: dict[str, Any]) -> int:
    """-1 where entropy-SGD is lower by more than two standard errors, 1 where it is larger."""
    difference = entropy["value"] - sgd["value"]
    error = sqrt(sgd["standard_error"] ** 2 + entropy["standard_error"] ** 2)
    return 0 if abs(difference) <= 2 * error else (1 if difference > 0 else -1)


if __name__ == "__main__":
    sys.exit(main())
