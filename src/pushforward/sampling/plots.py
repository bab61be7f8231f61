"""Pictures of chains; matplotlib is imported when they are drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.runs.pictures import import_pyplot
from pushforward.sampling.chains import Chains
from pushforward.sampling.diagnostics import Diagnosis, looked_at

__all__ = ["plot_traces"]

_COLOURS = ("#1f3a5f", "#d9730d", "#3b7d4f", "#9c3d54", "#6b5b95", "#2a8c99", "#a67c1b", "#7a7a7a")
_WARM_UP = "0.75"
_MOST_TRACES = 4  # besides the potential
_MOST_POINTS = 2000  # of one line
_BINS = 20


@dataclass(frozen=True, eq=False)
class _Trace:
    """One number along all chains."""

    title: str
    draws: Float[Tensor, "chain draw"]
    warmup: Float[Tensor, "chain step"] | None = None


def plot_traces(chains: Chains) -> Any:
    """Traces of chains, and how their ranks are spread.

    Parameters
    ----------
    chains
        Of any sampler.

    Returns
    -------
    matplotlib.figure.Figure
        A row for the potential and for each of up to four components of what was recorded (of the
        parameters, when nothing was): those with the largest R-hat. Left the trace against the
        step, the warm-up in grey before step 0, one line a chain. Right how often each part of the
        ranks among all draws is met by each chain, over what is expected: all near 1 when chains
        agree (Vehtari et al. 2021, arXiv 1903.08008, section 4.3). A single chain is compared with
        itself, the first half with the second.

    Raises
    ------
    OptionError
        When nothing was kept, or matplotlib is not installed.
    """
    traces = list(_traces(chains))
    if not traces:
        raise OptionError(
            "there are neither draws nor statistics",
            where="Chains.plot",
            advice="Sample with keep_parameters=True, or record something.",
        )
    pyplot = import_pyplot()
    figure, grid = pyplot.subplots(
        len(traces),
        2,
        figsize=(9.0, 0.6 + 1.7 * len(traces)),
        width_ratios=(3, 1),
        squeeze=False,
        layout="constrained",
    )
    for (left, right), trace in zip(grid, traces, strict=True):
        _draw_trace(left, trace, chains.thin)
        _draw_ranks(right, trace.draws)
        left.set_title(trace.title, loc="left")
    grid[0, 1].set_title("ranks", loc="left")
    grid[-1, 0].set_xlabel("step")
    grid[-1, 1].set_xlabel("rank among all draws")
    return figure


def _traces(chains: Chains) -> Iterator[_Trace]:
    if "potential" in chains.statistics:
        warmup = chains.warmup_statistics.get("potential")
        yield _Trace("potential", chains.statistics["potential"], warmup)
    shown = chains.observations or chains.parameters
    kind = "observation" if chains.observations else "parameter"
    found = [
        (score, name, component)
        for name, value in shown.items()
        for component, score in _scores(chains.diagnosis, kind, name, value)
    ]
    found.sort(key=lambda entry: -entry[0])  # stable: the first come first among equals
    for _, name, component in found[:_MOST_TRACES]:
        value = shown[name]
        position = torch.unravel_index(torch.tensor(component), value.shape[2:] or (1,))
        where = ", ".join(str(int(i)) for i in position) if value.dim() > 2 else ""
        title = f"{name}[{where}]" if where else name
        yield _Trace(title, value.flatten(2)[..., component] if where else value)


def _scores(
    diagnosis: Diagnosis, kind: str, name: str, value: Tensor
) -> Iterator[tuple[int, float]]:
    """Components with their R-hat; 0 where it is not known.

    Yields
    ------
    tuple
        Number of the component in the flattened tensor, and how much it is worth a look.
    """
    components = looked_at(value.shape[2:].numel()).tolist()
    known = [q for q in diagnosis.quantities if (q.kind, q.name) == (kind, name)]
    scores = known[0].r_hat.nan_to_num(0.0).tolist() if known else [0.0] * len(components)
    yield from zip(components, scores, strict=True)


def _draw_trace(axes: Any, trace: _Trace, thin: int) -> None:
    draws = trace.draws.detach().double().cpu()
    steps = torch.arange(1, draws.shape[1] + 1) * thin
    seen = draws
    if trace.warmup is not None and trace.warmup.shape[1]:
        warmup = trace.warmup.detach().double().cpu()
        before = (torch.arange(warmup.shape[1]) - warmup.shape[1]) * thin
        for line in warmup:
            axes.plot(*_thinned(before, line), color=_WARM_UP, linewidth=0.8, zorder=0)
        axes.axvline(0, color="0.6", linewidth=0.8, linestyle=":")
        seen = torch.cat([warmup[:, warmup.shape[1] // 2 :], draws], 1)
    for number, line in enumerate(draws):
        axes.plot(*_thinned(steps, line), color=_colour(number), linewidth=0.8, alpha=0.85)
    # The first steps of a warm-up may be out by orders of magnitude and would flatten the rest.
    finite = seen[torch.isfinite(seen)]
    if len(finite) and finite.min() < finite.max():
        margin = 0.05 * float(finite.max() - finite.min())
        axes.set_ylim(float(finite.min()) - margin, float(finite.max()) + margin)


def _draw_ranks(axes: Any, draws: Tensor) -> None:
    shares = _rank_shares(draws)
    edges = torch.linspace(0, 1, shares.shape[1] + 1)
    axes.axhline(1, color="0.6", linewidth=0.8, linestyle=":")
    for number, line in enumerate(shares):
        axes.stairs(line.numpy(), edges.numpy(), color=_colour(number), linewidth=1.0)
    axes.set_ylim(0, max(2.0, 1.05 * float(shares.max())))
    axes.set_xlim(0, 1)


def _rank_shares(draws: Float[Tensor, "chain draw"]) -> Float[Tensor, "rows bins"]:
    """Histogram of each chain's ranks among all draws, over its expectation.

    Returns
    -------
    Tensor
        ``(chains, bins)``; of a single chain, of its halves.
    """
    if len(draws) == 1 and draws.shape[1] > 1:
        half = draws.shape[1] // 2
        draws = draws[:, draws.shape[1] % 2 :].reshape(2, half)
    count = draws.shape[1]
    bins = max(1, min(_BINS, count // 4))
    values = draws.detach().double().cpu().contiguous()
    ordered = values.flatten().sort().values
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    # Equal values share the middle of their ranks: none of them comes first.
    places = ((below + up_to) * bins // (2 * len(ordered))).clamp(max=bins - 1)
    return torch.nn.functional.one_hot(places, bins).sum(1).double() * bins / count


def _thinned(x: Tensor, y: Tensor) -> tuple[Any, Any]:
    every = max(1, len(x) // _MOST_POINTS)
    return x[::every].numpy(), y[::every].numpy()


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
