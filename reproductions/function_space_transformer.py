"""How far a small transformer moved while it learnt a second task, estimated without its data.

    python -m reproductions.function_space_transformer --output results

Arithmetic modulo a prime, as sequences [a, op, b]: trained on additions, then on subtractions
without any penalty. After every epoch of the second task each estimator says how far the network is
from the one that only knew additions, on the additions that it was trained on. Correlations over
the epochs and the mean cosine of the gradients compare it with the true distance. It is the
comparison of "Approximating Function Space Distance for Continual Learning in Transformers"
(OpenReview tFo9YPiVNF), with smaller networks.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pushforward.errors import PushforwardError
from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.synthetic import SyntheticRun, plain_attention
from pushforward.function_space.synthetic_inputs import SyntheticInputs, token_inputs
from pushforward.function_space.token_law import TokenLaw
from pushforward.runs.rng import derived_seed, stream
from pushforward.typing import Params

__all__ = ["TransformerDistance", "main", "study"]

_ONE = torch.ones(1, dtype=torch.float64)

Estimator = Callable[[Params], Tensor]


@dataclass(frozen=True)
class TransformerDistance:
    """Compare estimators of the distance of a transformer.

    Parameters
    ----------
    output
        Folder for the results.
    prime
        Of the arithmetic.
    blocks
        Numbers of transformer blocks.
    seeds
        Of weights, order and split; one network each.
    width, hidden, heads
        Of a block.
    first_epochs, second_epochs
        Of training on the two tasks.
    samples
        Numbers of synthetic sequences.
    stored
        Examples that the estimators with stored examples keep.
    """

    output: Path
    prime: int = 23
    blocks: tuple[int, ...] = (1, 2)
    seeds: tuple[int, ...] = (0, 1, 2)
    width: int = 32
    hidden: int = 64
    heads: int = 2
    first_epochs: int = 300
    second_epochs: int = 25
    samples: tuple[int, ...] = (32, 256, 2048)
    stored: int = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study from the command line.

    Returns
    -------
    int
        0, or 2 when something was refused.
    """
    import tyro

    options = tyro.cli(TransformerDistance, args=argv)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        results = list(study(options))
    except PushforwardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = {key: value for key, value in asdict(options).items() if key != "output"}
    text = json.dumps({"settings": settings, "results": results}, indent=1)
    (options.output / "function_space_transformer.json").write_text(text, encoding="utf-8")
    table = _table(results)
    (options.output / "function_space_transformer.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def study(options: TransformerDistance) -> Iterator[dict[str, Any]]:
    """Agreement of every estimator with the true distance.

    Parameters
    ----------
    options
        What to compare.

    Yields
    ------
    dict
        One network and estimator: ``spearman``, ``pearson``, ``cosine``, and ``log_error``, the
        mean ``|log(estimate / truth)|``.
    """
    for blocks in options.blocks:
        for seed in options.seeds:
            values, gradients, accuracy = _trajectory(options, blocks, seed)
            truth = torch.tensor(values["true"], dtype=torch.float64)
            for name, found in values.items():
                estimate = torch.tensor(found, dtype=torch.float64)
                cosines = [
                    float(torch.cosine_similarity(ours, theirs, 0))
                    for ours, theirs in zip(gradients[name], gradients["true"], strict=True)
                ]
                yield {
                    "blocks": blocks,
                    "seed": seed,
                    "accuracy": accuracy,
                    "estimator": name,
                    "spearman": _correlation(_ranks(estimate), _ranks(truth)),
                    "pearson": _correlation(estimate, truth),
                    "cosine": sum(cosines) / len(cosines),
                    "log_error": float((estimate / truth).log().abs().mean()),
                }


def _trajectory(
    options: TransformerDistance, blocks: int, seed: int
) -> tuple[dict[str, list[float]], dict[str, list[Tensor]], float]:
    """Distances and gradients after each epoch of the second task, and accuracy on the first."""
    order = stream(seed, "reproductions", "transformer", blocks, "order")
    first, second = (_task(options.prime, sign, order) for sign in (1, -1))
    net = _network(options, blocks, seed)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98))
    for _ in range(options.first_epochs):
        _epoch(net, optimiser, first, order)
    net.eval()
    with torch.no_grad():
        accuracy = float((net(first[0]).argmax(-1) == first[1]).double().mean())
    estimators, names = _estimators(options, net, first[0], seed)
    values: dict[str, list[float]] = {name: [] for name in estimators}
    gradients: dict[str, list[Tensor]] = {name: [] for name in estimators}
    for _ in range(options.second_epochs):
        _epoch(net, optimiser, second, order)
        here = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
        chosen = [here[name].requires_grad_() for name in names]
        for name, estimator in estimators.items():
            value = estimator(here)
            values[name].append(float(value.detach()))
            slopes = torch.autograd.grad(value, chosen)
            gradients[name].append(torch.cat([slope.flatten() for slope in slopes]))
    return values, gradients, accuracy


def _estimators(
    options: TransformerDistance, net: nn.Module, tokens: Tensor, seed: int
) -> tuple[dict[str, Estimator], list[str]]:
    reference = ReferenceNetwork.of(net, tuple(tokens.shape[1:]))
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    law = TokenLaw.of(tokens, order="independent")
    samples = {"true": _whole(tokens)}
    for num in options.samples:
        samples[f"synthetic {num}"] = token_inputs(reference, [law], _ONE, num=num, seed=seed)
    generator = stream(seed, "reproductions", "transformer", "stored")
    stored = tokens[torch.randperm(len(tokens), generator=generator)[: options.stored]]
    samples[f"stored {options.stored}"] = _whole(stored)
    estimators = {name: _measure(reference, sample) for name, sample in samples.items()}
    estimators[f"tangent {options.stored}"] = _tangent(reference, names, stored)
    return estimators, names


def _measure(reference: ReferenceNetwork, sample: SyntheticInputs) -> Estimator:
    run = SyntheticRun.of(reference, sample)
    return lambda tensors: run.distance(tensors).value


def _tangent(reference: ReferenceNetwork, names: list[str], stored: Tensor) -> Estimator:
    """``|J (theta - theta_0)|^2 / 2``, the mean over stored examples."""
    own = {name: tensor.clone().requires_grad_() for name, tensor in reference.tensors.items()}
    with plain_attention():
        rows = reference.outputs(own, stored)
    cotangent = torch.zeros_like(rows, requires_grad=True)
    # Linear in the cotangent; its own derivative along a direction is the tangent there.
    slopes = torch.autograd.grad(rows, [own[n] for n in names], cotangent, create_graph=True)

    def distance(tensors: Params) -> Tensor:
        moved = [tensors[name] - own[name].detach() for name in names]
        (change,) = torch.autograd.grad(
            slopes, cotangent, moved, create_graph=True, retain_graph=True
        )
        return change.square().sum(1).mean() / 2

    return distance


def _whole(tokens: Tensor) -> SyntheticInputs:
    return SyntheticInputs(tokens, torch.zeros(len(tokens), dtype=torch.int64), _ONE)


class _Transformer(nn.Module):
    """Frozen embeddings, blocks that normalise behind each addition, a head on the last token."""

    def __init__(self, options: TransformerDistance, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(options.prime + 2, options.width).requires_grad_(False)
        self.position = nn.Parameter(torch.zeros(3, options.width), requires_grad=False)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    options.width, options.heads, options.hidden, 0.0, batch_first=True
                )
                for _ in range(blocks)
            )
        )
        self.head = nn.Linear(options.width, options.prime)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``(B, 3)`` to logits ``(B, prime)``."""
        return self.head(self.blocks(self.embedding(tokens) + self.position)[:, -1])


def _network(options: TransformerDistance, blocks: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "reproductions", "transformer", blocks))
        net = _Transformer(options, blocks)
        with torch.no_grad():
            net.position.normal_(0, 0.3)
    return net


def _task(prime: int, sign: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """70 % of all pairs, with the answers."""
    a, b = torch.cartesian_prod(torch.arange(prime), torch.arange(prime)).T
    tokens = torch.stack([a, torch.full_like(a, prime + (sign < 0)), b], 1)
    chosen = torch.randperm(len(a), generator=generator)[: math.ceil(0.7 * len(a))]
    return tokens[chosen], ((a + sign * b) % prime)[chosen]


def _epoch(
    net: nn.Module,
    optimiser: torch.optim.Optimizer,
    task: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> None:
    tokens, answers = task
    net.train()
    for chosen in torch.randperm(len(tokens), generator=generator).split(64):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(tokens[chosen]), answers[chosen]).backward()
        optimiser.step()


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().to(torch.float64)


def _correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first, second]))[0, 1])


def _table(results: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds."""
    columns = ("spearman", "pearson", "cosine", "log_error")
    lines = ["| blocks | estimator | Spearman | Pearson | cosine | mean abs log ratio |"]
    lines.append("|---|---|---|---|---|---|")
    groups = dict.fromkeys((r["blocks"], r["estimator"]) for r in results)
    for blocks, name in groups:
        rows = [r for r in results if (r["blocks"], r["estimator"]) == (blocks, name)]
        means = [sum(r[column] for r in rows) / len(rows) for column in columns]
        cells = " | ".join(f"{mean:.3f}" for mean in means)
        lines.append(f"| {blocks} | {name} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
