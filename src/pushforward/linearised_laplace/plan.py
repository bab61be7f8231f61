"""What a posterior will take, before it is begun: memory, passes over the data, time."""

from __future__ import annotations

from time import perf_counter

import torch

from pushforward.errors import OptionError
from pushforward.linearised_laplace.linear_model import LinearModel
from pushforward.runs.plan import MemoryItem, Plan

__all__ = ["Method", "choose_method", "exact_plan", "recyclable", "sampled_plan", "use_weights"]

Method = str

_EXACT_SIDE = 5_000  # a Cholesky factorisation of this size takes a second or two
_EXACT_FLOPS = 1e14
_EXACT_BYTES = 2**32
_EM_VECTORS = 4 * 9 * 6  # about four rounds: six steps with eight draws and the mode
_FINAL_STEPS = 8
_RECYCLED, _RECYCLED_BYTES = 512, 2**30
_PROBE_EXAMPLES = 64
_PROBE_VECTORS = 8


def use_weights(linear: LinearModel) -> bool:
    """Whether the exact posterior is over weights rather than over outputs.

    Returns
    -------
    bool
        True when there are no more weights than outputs.
    """
    return linear.model.space.size <= len(linear.examples) * linear.num_outputs


def choose_method(method: str, linear: LinearModel) -> Method:
    """The method, when the choice is left to us.

    Parameters
    ----------
    method
        ``"auto"``, ``"exact"`` or ``"sampled"``.
    linear
        The problem.

    Returns
    -------
    str
        ``"exact"`` or ``"sampled"``.

    Raises
    ------
    OptionError
        For any other.
    """
    if method in ("exact", "sampled"):
        return method
    if method != "auto":
        raise OptionError(
            f"there is no method {method!r}",
            where="method",
            advice="Choose 'auto', 'exact' or 'sampled'.",
        )
    weights, rows = linear.model.space.size, len(linear.examples) * linear.num_outputs
    plan = exact_plan(linear)
    small = min(weights, rows) <= _EXACT_SIDE and plan.total_bytes <= _EXACT_BYTES
    quick = weights * rows * min(weights, rows) <= _EXACT_FLOPS
    return "exact" if small and quick and linear.grid.num_processes == 1 else "sampled"


def exact_plan(linear: LinearModel) -> Plan:
    """Of a factorisation.

    Parameters
    ----------
    linear
        The problem.

    Returns
    -------
    Plan
        Without time: it is short or refused.
    """
    weights, rows = linear.model.space.size, len(linear.examples) * linear.num_outputs
    advice = "Use method='sampled'."
    items: tuple[MemoryItem, ...]
    if use_weights(linear):
        items = (MemoryItem("curvature and its factor", 3 * 8 * weights**2, advice),)
    else:
        items = (
            MemoryItem("Jacobian of all examples", 2 * 8 * rows * weights, advice),
            MemoryItem("kernel and its factor", 2 * 8 * rows**2, advice),
        )
    return Plan("an exact posterior", items, 20, len(linear.examples))


def recyclable(linear: LinearModel) -> int:
    """How many searched directions there is room to keep for the next system.

    Returns
    -------
    int
        At most 512, in at most 1 GiB.
    """
    vector = linear.model.space.size * torch.finfo(linear.model.dtype).bits // 8
    return min(_RECYCLED, _RECYCLED_BYTES // (4 * vector))


def sampled_plan(
    linear: LinearModel, num_draws: int, block: int, *, learn: bool, measure: bool = True
) -> Plan:
    """Of posterior samples.

    Parameters
    ----------
    linear
        The problem.
    num_draws
        Draws wanted.
    block
        Draws solved together.
    learn
        Whether prior or noise are learned.
    measure
        Whether to time a product with a few examples for the expected time.

    Returns
    -------
    Plan
        Passes with ``num_draws`` vectors each. The number of steps is a guess from experience.
    """
    size = linear.model.space.size
    vector = size * torch.finfo(linear.model.dtype).bits // 8
    together, grid = min(block, num_draws), linear.grid
    own = -(-num_draws // grid.draw_shards)
    advice = "Use fewer draws together (block=...) or a subset of the weights (subset=...)."
    examples, vectors = linear.batch_sizes(together)
    per_example = linear.num_outputs * torch.finfo(linear.model.dtype).bits // 8
    items: tuple[MemoryItem, ...] = (
        MemoryItem("finished draws", own * vector, "Take fewer draws (num_draws=...)."),
        # solution, residual, directions, their images, sketch, right-hand side, and temporaries
        MemoryItem("solver, seven vectors a draw", 7 * together * vector, advice),
        MemoryItem("directions kept for the next system", 4 * recyclable(linear) * vector),
        MemoryItem(
            "activations of a batch",
            3 * examples * vectors * linear.activation_bytes,
            "Use a smaller workspace (workspace=...).",
        ),
        MemoryItem(
            "outputs of a batch, for all draws",
            3 * examples * together * per_example,
            advice,
        ),
    )
    if learn:
        # Twice while they are put together.
        items += (MemoryItem("outputs at the mode, all examples", 2 * linear.remembered_bytes),)
    work = num_draws * (_FINAL_STEPS + 1) + (_EM_VECTORS if learn else 0)
    seconds = None
    if measure:
        shares = grid.draw_shards * grid.data_shards
        seconds = _seconds_per_vector(linear) * work / shares
    return Plan(
        f"{num_draws} posterior draws",
        items,
        work / num_draws,
        len(linear.examples),
        seconds,
        grid.num_processes,
        {"examples": examples, "draws": vectors},
    )


def _seconds_per_vector(linear: LinearModel) -> float:
    """Seconds for one vector in a pass over all examples."""
    count = min(_PROBE_EXAMPLES, len(linear.examples))
    batch = linear.examples.select(torch.arange(count))
    vectors = torch.zeros(_PROBE_VECTORS, linear.model.space.size).to(linear.model.vector)
    found = []
    for _ in range(2):  # the first call also warms up
        began = perf_counter()
        linear.batch_product(batch, vectors)
        if vectors.device.type == "cuda":
            torch.cuda.synchronize(vectors.device)
        found.append(perf_counter() - began)
    return min(found) / (count * _PROBE_VECTORS) * len(linear.examples)
