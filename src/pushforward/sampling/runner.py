"""The one loop that all samplers run in: warm-up, thinning, memory, processes, interruption."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from time import monotonic, perf_counter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import vmap

from pushforward.errors import DataError, OptionError, PushforwardError, SamplingError, ShapeError
from pushforward.options import whole_number
from pushforward.runs.distributed import ProcessGrid
from pushforward.runs.estimate import Check, Cost
from pushforward.runs.plan import MemoryItem, Plan, available_memory
from pushforward.runs.progress import Advance, track
from pushforward.runs.store import Checkpoint, fingerprint
from pushforward.sampling.chains import Chains, Moments
from pushforward.sampling.kernel import Kernel, State
from pushforward.sampling.noise import ChainNoise
from pushforward.typing import Params

__all__ = ["Initial", "Record", "RecordAll", "sample"]

Initial: TypeAlias = nn.Module | Mapping[str, Tensor]
"""Where chains begin: a network, or tensors by name, with or without a leading axis of chains."""


@dataclass(frozen=True)
class RecordAll:
    """What to note of the draws of all chains at once, which saves what `torch.func.vmap` costs.

    Parameters
    ----------
    function
        From parameters ``(chains, *shape)`` by name to tensors ``(chains, ...)`` by name, each row
        of its own chain alone.
    """

    function: Callable[[Params], Mapping[str, Tensor]]


Record: TypeAlias = Callable[[Params], Tensor | Mapping[str, Tensor]] | RecordAll
"""What to note of every draw: from one draw's parameters to a tensor, or to several by name."""

_SAVE_EVERY = 30.0  # seconds
_SEGMENT_SECONDS = 0.5  # between looks at progress, at the clock and for dead chains
_CHUNK_BYTES = {"cpu": 2**30, "cuda": 2**33}
_REJECTED = 0.01  # acceptance below which nothing moves
_LOW_ACCEPTANCE = 0.2
_ENOUGH_WARMUP = 150  # shorter ones leave few steps to find the step size again in a new scale


def sample(
    kernel: Kernel,
    *,
    num_draws: int = 1000,
    num_chains: int = 4,
    num_warmup: int = 1000,
    thin: int = 1,
    initial: Initial | None = None,
    record: Record | None = None,
    keep_parameters: bool = True,
    chunk_size: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Chains:
    """Draw from the law that a kernel leaves invariant, with several chains at once.

    Parameters
    ----------
    kernel
        The sampler and what it samples: ``pf.HMC(potential)``, ``pf.NUTS(potential)``,
        ``pf.gibbs(model, x, y)``.
    num_draws
        Draws that are kept of each chain.
    num_chains
        Chains; four or more let R-hat see whether they agree.
    num_warmup
        Steps before the first draw. Step sizes and the like are adapted in them, then frozen.
    thin
        Steps from one draw to the next.
    initial
        Where chains begin: a network, or tensors by name ``(*shape)`` for all chains or
        ``(num_chains, *shape)``. Default: what the kernel chooses, draws from the prior where there
        is one, so that chains begin apart.
    record
        A function of one draw's parameters, such as ``lambda p: model(p, x_test)``, evaluated at
        every draw and returned as `Chains.observations`. It may return a mapping of tensors; a
        `RecordAll` takes all chains at once.
    keep_parameters
        False keeps their means and variances, and what `record` returned, but not the draws.
    chunk_size
        Chains moved at a time; default as many as fit 1 GiB on a CPU, 8 GiB on a GPU. It has no
        influence on the draws but rounding.
    seed
        Of all noise.
    checkpoint
        Folder for the state, saved about twice a minute; the same call goes on from there, to the
        same draws bit for bit. A finished run is extended by asking for more draws.
    progress
        Whether to show a bar; None: on a terminal, when it takes long.

    Returns
    -------
    Chains
        When interrupted (Ctrl-C), the draws until then.

    Raises
    ------
    OptionError
        For an option out of range.
    ShapeError
        When `initial` does not fit.
    DataError
        When it is not finite.
    SamplingError
        When no chain is finite any more.
    ResourceError
        When the draws do not fit into memory.
    WeightsError
        When the checkpoint is of another run.

    Notes
    -----
    Under ``torchrun`` the processes share the chains, and all get all draws. The noise of a chain
    depends on seed, chain and step alone. The method, section 5.1.

    Examples
    --------
    >>> import torch, pushforward as pf
    >>> normal = pf.Potential.of_density(lambda p: -(p["x"] ** 2).sum() / 2, {"x": torch.zeros(2)})
    >>> chains = pf.sample(pf.MALA(normal), num_draws=50, num_warmup=50, seed=1)
    >>> chains.parameters["x"].shape
    torch.Size([4, 50, 2])
    """
    began = perf_counter()
    if not isinstance(kernel, Kernel):
        raise OptionError(
            f"{kernel!r:.80} is no sampler",
            where="kernel",
            advice="Pass a kernel: pf.NUTS(potential), pf.HMC(potential), pf.gibbs(model, x, y).",
        )
    num_draws = whole_number(num_draws, "num_draws")
    num_chains = whole_number(num_chains, "num_chains")
    num_warmup = whole_number(num_warmup, "num_warmup", least=0)
    thin = whole_number(thin, "thin")
    seed = whole_number(seed, "seed", least=0)
    chunk_size = None if chunk_size is None else whole_number(chunk_size, "chunk_size")
    grid = ProcessGrid.from_environment()
    if num_chains < grid.draw_shards:
        raise OptionError(
            f"{num_chains} chains for {grid.draw_shards} processes",
            where="num_chains",
            advice="Take more chains or fewer processes.",
        )
    run = _Run(
        kernel,
        num_draws,
        num_warmup,
        thin,
        record,
        keep_parameters,
        seed,
        grid.draws(num_chains),
        chunk_size,
    )
    _plan(run).require(available_memory(kernel.device))
    store = None
    if checkpoint is not None:
        folder = os.fspath(checkpoint)
        if grid.draw_shards > 1:
            folder = os.path.join(folder, f"chains-{grid.draw_index}")
        store = Checkpoint(folder, run.identity(num_chains, initial))
    shown = progress if grid.is_first else False
    with torch.no_grad(), track(run.total_steps, kernel.name, enabled=shown) as advance:
        progressed = run.resumed(store) or run.started(_expanded(kernel, initial, num_chains))
        progressed = _finish(run, progressed, store, advance, alone=grid.num_processes == 1)
    return _assembled(run, progressed, num_chains, grid, perf_counter() - began)


@dataclass(frozen=True, eq=False)
class _Progress:
    """How far a run has come: everything that goes into its checkpoint.

    It never changes, so that an interruption at any moment leaves one that is whole.
    """

    step: int
    state: State
    traces: tuple[dict[str, Tensor], ...] = ()  # of each segment, (chains, draws, ...)
    mean: Tensor | None = None  # of the draws so far, if they are not kept
    squares: Tensor | None = None  # sums of squared deviations from it

    def joined(self) -> _Progress:
        """The same with the traces of all segments in one.

        Returns
        -------
        _Progress
            With one entry of `traces` at most.
        """
        if len(self.traces) < 2:
            return self
        names = dict.fromkeys(name for part in self.traces for name in part)
        whole = {
            name: torch.cat([part[name] for part in self.traces if name in part], 1)
            for name in names
        }
        return replace(self, traces=(whole,))

    def trace(self) -> dict[str, Tensor]:
        """What was noted so far, ``(chains, draws, ...)`` by name."""
        parts = self.joined().traces
        return parts[0] if parts else {}


@dataclass(frozen=True, eq=False)
class _Run:
    """The arguments of a call, and the loop over steps of some chains."""

    kernel: Kernel
    num_draws: int
    num_warmup: int
    thin: int
    record: Record | None
    keep_parameters: bool
    seed: int
    chains: range
    chunk_size: int | None

    @property
    def total_steps(self) -> int:
        return self.num_warmup + self.num_draws * self.thin

    @cached_property
    def chunks(self) -> tuple[slice, ...]:
        """Rows of the chains that move together."""
        size = self.chunk_size
        if size is None:
            room = _CHUNK_BYTES.get(self.kernel.device.type, 2**30)
            size = max(1, room // max(1, self.kernel.bytes_per_chain))
        return tuple(
            slice(i, min(i + size, len(self.chains))) for i in range(0, len(self.chains), size)
        )

    @cached_property
    def most_steps(self) -> int:
        """After which draws that are not kept have to make room."""
        if self.keep_parameters:
            return self.total_steps
        room = _CHUNK_BYTES.get(self.kernel.device.type, 2**30) // 4
        return self.thin * max(1, room // self.bytes_per_draw)

    @property
    def bytes_per_draw(self) -> int:
        """Of the parameters, all chains of this process together."""
        return len(self.chains) * self.kernel.space.size * torch.finfo(self.kernel.dtype).bits // 8

    @cached_property
    def noises(self) -> tuple[ChainNoise, ...]:
        """Of the steps, for each chunk."""
        return tuple(self._noise(chunk, "step") for chunk in self.chunks)

    def identity(self, num_chains: int, initial: Initial | None) -> dict[str, Any]:
        """What a checkpoint of this run belongs to."""
        begin = None if initial is None else fingerprint(_tensors_of(initial))
        probe = torch.zeros(1, self.kernel.space.size, dtype=self.kernel.dtype)
        probe = probe.to(self.kernel.device)
        return {
            "kernel": self.kernel.name,
            "target": self.kernel.identity(),
            "num_chains": num_chains,
            "chains": [self.chains.start, self.chains.stop],
            "num_warmup": self.num_warmup,
            "thin": self.thin,
            "keep_parameters": self.keep_parameters,
            "recorded": str({n: tuple(v.shape[1:]) for n, v in self._recorded(probe).items()}),
            "initial": begin,
            "seed": self.seed,
        }

    def started(self, initial: Params | None) -> _Progress:
        states = []
        for chunk in self.chunks:
            rows = None
            if initial is not None:
                chains = self.chains[chunk]
                rows = {k: v[chains.start : chains.stop] for k, v in initial.items()}
            noise = self._noise(chunk, "start").at(0)
            states.append(self.kernel.start(rows, noise))
        self._recorded(self.kernel.vectors(states[0])[:1])  # fail now, not after the warm-up
        return _Progress(0, _joined(states))

    def resumed(self, store: Checkpoint | None) -> _Progress | None:
        saved = None if store is None else store.load(self.kernel.device)
        if saved is None:
            return None
        tensors, plain = saved
        if plain["step"] > self.total_steps:
            raise OptionError(
                f"the checkpoint already holds {self.draws_after(plain['step']):,} draws",
                where="num_draws",
                advice="Ask for as many or more, or choose another folder.",
            )
        groups: dict[str, dict[str, Tensor]] = {"state": {}, "trace": {}, "moments": {}}
        for name, tensor in tensors.items():
            group, _, rest = name.partition(":")
            groups[group][rest] = tensor
        traces = (groups["trace"],) if groups["trace"] else ()
        moments = groups["moments"]
        return _Progress(
            plain["step"], groups["state"], traces, moments.get("mean"), moments.get("squares")
        )

    def save(self, store: Checkpoint, progress: _Progress) -> None:
        tensors = {f"state:{name}": tensor for name, tensor in progress.state.items()}
        tensors |= {f"trace:{name}": tensor for name, tensor in progress.trace().items()}
        if progress.mean is not None and progress.squares is not None:
            tensors |= {"moments:mean": progress.mean, "moments:squares": progress.squares}
        store.save(tensors, {"step": progress.step})

    def segment(self, progress: _Progress, steps: int) -> _Progress:
        """Move all chains by some steps.

        Returns
        -------
        _Progress
            When all of them have moved.
        """
        first = progress.step
        found = [
            self._advance(_rows(progress.state, chunk), noise, first, steps)
            for chunk, noise in zip(self.chunks, self.noises, strict=True)
        ]
        state = _joined([state for state, _ in found])
        traces = _joined([traces for _, traces in found])
        mean, squares = progress.mean, progress.squares
        if not self.keep_parameters and "draw" in traces:
            mean, squares = self._accumulated(progress, traces.pop("draw"))
        noted = (*progress.traces, traces) if traces else progress.traces
        return _Progress(first + steps, state, noted, mean, squares)

    def _advance(
        self, state: State, noise: ChainNoise, first: int, steps: int
    ) -> tuple[State, dict[str, Tensor]]:
        kernel, traces = self.kernel, dict[str, list[Tensor]]()

        def note(name: str, value: Tensor) -> None:
            traces.setdefault(name, []).append(value)

        for step in range(first, first + steps):
            numbers = noise.at(step)
            if step < self.num_warmup:
                state = kernel.warm_up(state, numbers, step, self.num_warmup)
                if step % self.thin == self.thin - 1:
                    for name, value in kernel.statistics(state).items():
                        note(f"warmup.{name}", value)
                continue
            state = kernel.step(state, numbers)
            if (step - self.num_warmup) % self.thin == self.thin - 1:
                vectors = kernel.vectors(state)
                note("draw", vectors)
                for name, value in kernel.statistics(state).items():
                    note(f"statistic.{name}", value)
                for name, value in self._recorded(vectors).items():
                    note(f"observation.{name}", value)
        return state, {name: torch.stack(values, 1) for name, values in traces.items()}

    def _recorded(self, vectors: Tensor) -> Mapping[str, Tensor]:
        if self.record is None:
            return {}
        if isinstance(self.record, RecordAll):
            return self.record.function(self.kernel.space.unravel(vectors))
        try:
            found = vmap(self.record)(self.kernel.space.unravel(vectors))
        except PushforwardError:
            raise
        except (ValueError, TypeError, RuntimeError) as error:
            raise OptionError(
                f"it cannot be evaluated: {error}",
                where="record",
                advice="Return tensors, by operations that torch.func.vmap understands: no .item(),"
                " no float().",
            ) from error
        named = found if isinstance(found, Mapping) else {"recorded": found}
        if not all(isinstance(value, Tensor) for value in named.values()):
            raise OptionError(
                "it returned neither a tensor nor a mapping of tensors",
                where="record",
                advice="Return a tensor, or several by name: {'outputs': ...}.",
            )
        return named

    def _accumulated(self, progress: _Progress, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Welford's update, draw by draw: blocks would round by where the clock cut them.

        Returns
        -------
        tuple
            Mean, and sum of squared deviations from it, of all draws so far.
        """
        count = self.draws_after(progress.step)
        mean, squares = progress.mean, progress.squares
        for draw in draws.double().unbind(1):
            count += 1
            if mean is None or squares is None:
                mean, squares = draw, torch.zeros_like(draw)
                continue
            away = draw - mean
            mean = mean + away / count
            squares = squares + away * (draw - mean)
        assert mean is not None
        assert squares is not None
        return mean, squares

    def draws_after(self, step: int) -> int:
        """Draws that a run has which came so far."""
        return max(0, step - self.num_warmup) // self.thin

    def _noise(self, chunk: slice, purpose: str) -> ChainNoise:
        kernel = self.kernel
        return ChainNoise(
            self.seed,
            self.chains[chunk],
            kernel.start_size if purpose == "start" else kernel.noise_size,
            purpose=purpose,
            dtype=kernel.dtype,
            device=kernel.device,
        )


def _finish(
    run: _Run,
    progress: _Progress,
    store: Checkpoint | None,
    advance: Advance,
    *,
    alone: bool,
) -> _Progress:
    """Move until the run is complete, or Ctrl-C.

    Returns
    -------
    _Progress
        Further on, with joined traces.

    Raises
    ------
    SamplingError
        When no chain is finite; not if others would wait, `_assembled` says so then.
    KeyboardInterrupt
        When there is nothing to return yet, or other processes would wait.
    """
    advance(progress.step)
    if store is not None:
        run.save(store, progress)  # a folder that cannot be written to is told of now
    saved_at, steps = monotonic(), 1
    try:
        while progress.step < run.total_steps:
            began = monotonic()
            count = min(steps, run.most_steps, run.total_steps - progress.step)
            progress = run.segment(progress, count)
            advance(count, _note(run.kernel, progress.state))
            if alone:
                alive = torch.isfinite(run.kernel.vectors(progress.state)).all(1)
                _require_life(run, alive, progress.step)
            spent = monotonic() - began
            steps = max(1, min(2 * steps, round(count * _SEGMENT_SECONDS / max(spent, 1e-6))))
            if store is not None and monotonic() - saved_at > _SAVE_EVERY:
                progress = progress.joined()
                run.save(store, progress)
                saved_at = monotonic()
    except KeyboardInterrupt:
        if not alone or not run.draws_after(progress.step):
            raise
    finally:
        progress = progress.joined()
        if store is not None:
            run.save(store, progress)
    return progress


def _note(kernel: Kernel, state: State) -> str:
    acceptance = kernel.statistics(state).get("acceptance")
    return "" if acceptance is None else f"acceptance {float(acceptance.mean()):.2f}"


def _require_life(run: _Run, alive: Tensor, step: int) -> None:
    if not bool(alive.any()):
        raise SamplingError(
            f"all {len(alive)} chains left for NaN or infinity by step {step:,}",
            where=run.kernel.name,
            advice="Take a smaller step size, or start elsewhere (initial=...); in float32 try "
            "float64.",
        )


def _assembled(
    run: _Run, progress: _Progress, num_chains: int, grid: ProcessGrid, seconds: float
) -> Chains:
    kernel, count = run.kernel, run.draws_after(progress.step)
    traces = progress.trace()
    gathered = {name: grid.gather_draws(traces[name]) for name in sorted(traces)}
    space = kernel.space
    if run.keep_parameters:
        draws = gathered.pop("draw")
        mean = draws.mean(1, dtype=torch.float64)
        variance = draws.double().var(1) if count > 1 else torch.full_like(mean, torch.nan)
        parameters = space.unravel(draws)
    else:
        assert progress.mean is not None
        assert progress.squares is not None
        mean = grid.gather_draws(progress.mean)
        variance = grid.gather_draws(progress.squares) / (count - 1 if count > 1 else torch.nan)
        parameters = {}
    parts: dict[str, dict[str, Tensor]] = {"statistic": {}, "observation": {}, "warmup": {}}
    for name, value in gathered.items():
        group, _, rest = name.partition(".")
        parts[group][rest] = value
    alive = torch.isfinite(mean).all(1)
    _require_life(run, alive, progress.step)
    return Chains(
        parameters=parameters,
        observations=parts["observation"],
        statistics=parts["statistic"],
        warmup_statistics=parts["warmup"],
        moments=Moments(count, space.unravel(mean), space.unravel(variance)),
        kernel=kernel.name,
        settings=kernel.identity(),
        num_warmup=run.num_warmup,
        thin=run.thin,
        seed=run.seed,
        last=space.unravel(grid.gather_draws(kernel.vectors(progress.state))),
        run_checks=_run_checks(run, count, alive, parts["statistic"]),
        cost=Cost(0.0, seconds, progress.step * num_chains),
    )


def _run_checks(
    run: _Run, count: int, alive: Tensor, statistics: Mapping[str, Tensor]
) -> tuple[Check, ...]:
    dead = len(alive) - int(alive.sum())
    checks = [
        Check(
            "chains-alive",
            "fail" if dead else "pass",
            f"{dead} of {len(alive)} chains left for NaN or infinity"
            if dead
            else f"all {len(alive)} chains stayed finite",
            "Take a smaller step size; do not average over the rest." if dead else "",
        )
    ]
    if count < run.num_draws:
        checks.append(
            Check(
                "complete",
                "warn",
                f"interrupted after {count:,} of {run.num_draws:,} draws",
                "Call again with the same checkpoint to go on.",
            )
        )
    if "acceptance" in statistics:
        mean = float(statistics["acceptance"].nanmean())
        status, advice = _acceptance_advice(mean, run.num_warmup)
        checks.append(
            Check("acceptance", status, f"{100 * mean:.3g} % of proposals accepted", advice)
        )
    if "divergent" in statistics:
        share = float(statistics["divergent"].double().mean())
        checks.append(
            Check(
                "no-divergences",
                "warn" if share else "pass",
                f"{100 * share:.3g} % of trajectories diverged" if share else "none diverged",
                "A region is not reached. Take smaller steps (a larger target_acceptance, where "
                "there is one), or reparametrise."
                if share
                else "",
            )
        )
    return tuple(checks)


def _acceptance_advice(mean: float, num_warmup: int) -> tuple[Any, str]:
    remedy = "Take a smaller step size" + (
        "."
        if num_warmup >= _ENOUGH_WARMUP
        else ", or a warm-up long enough to find one (num_warmup=1000)."
    )
    if mean < _REJECTED:
        return "fail", f"Nothing moves. {remedy}"
    if mean < _LOW_ACCEPTANCE:
        return "warn", remedy
    return "pass", ""


def _plan(run: _Run) -> Plan:
    kernel = run.kernel
    kept = run.num_draws if run.keep_parameters else 2
    most = max(chunk.stop - chunk.start for chunk in run.chunks)
    items = (
        MemoryItem(
            "draws of the parameters",
            2 * kept * run.bytes_per_draw,  # twice, while they are joined
            "Thin more, take fewer draws, or keep_parameters=False.",
        ),
        MemoryItem(
            "chains that move together",
            most * kernel.bytes_per_chain,
            "Move fewer chains at a time (chunk_size=...).",
        ),
    )
    return Plan(f"{kernel.name}, {len(run.chains)} chains", items, 0, 0)


def _tensors_of(initial: Initial) -> dict[str, Tensor]:
    if isinstance(initial, nn.Module):
        return {name: p.detach() for name, p in initial.named_parameters()}
    return {name: torch.as_tensor(value).detach() for name, value in initial.items()}


def _expanded(kernel: Kernel, initial: Initial | None, num_chains: int) -> Params | None:
    """Initial tensors with a leading axis of chains.

    Returns
    -------
    dict or None
        ``(num_chains, *shape)`` each.

    Raises
    ------
    ShapeError
        When a parameter is missing or does not fit.
    DataError
        When one is not finite.
    """
    if initial is None:
        return None
    given, space = _tensors_of(initial), kernel.space
    shapes = dict(zip(space.names, space.shapes, strict=True))
    alone = all(name in given and tuple(given[name].shape) == shapes[name] for name in shapes)
    if alone:
        given = {
            name: value[None].expand(num_chains, *value.shape) for name, value in given.items()
        }
    for name, shape in sorted(shapes.items(), key=lambda item: item[0] in given):  # missing first
        found = tuple(given[name].shape) if name in given else None
        if found != (num_chains, *shape):
            raise ShapeError(
                "it is missing" if found is None else f"it has shape {found}",
                where=f"initial, parameter {name}",
                advice=f"Give a tensor of shape {shape}, or {(num_chains, *shape)} for all chains.",
            )
    for name, value in given.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DataError(
                "it holds NaN or infinite entries",
                where=f"initial, parameter {name}",
                advice="Start all chains from finite values.",
            )
    return {name: value.to(kernel.device) for name, value in given.items()}


def _rows(state: State, rows: slice) -> State:
    return {name: tensor[rows] for name, tensor in state.items()}


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
