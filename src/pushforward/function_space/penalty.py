"""``FunctionSpacePenalty``: keeps a network near what it was on earlier tasks, as a function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.errors import NetworkError, OptionError, WeightsError
from pushforward.function_space.measure import DistanceMeasure
from pushforward.function_space.metrics import Metric, check_metric
from pushforward.function_space.network import ReferenceNetwork, unwrapped
from pushforward.options import number, whole_number
from pushforward.runs.rng import derived_seed, stream

__all__ = ["FunctionSpacePenalty", "Outputs", "PastTask"]

Outputs: TypeAlias = slice | Sequence[int] | Tensor | None
"""Which outputs count: None for all, or a slice, numbers, a boolean mask."""


@dataclass(frozen=True, eq=False)
class PastTask:
    """One of the functions that a penalty holds on to.

    Parameters
    ----------
    measure
        Of the distance from it.
    outputs
        Which outputs of the network belong to the task; None for all.
    weight
        In the mean over the tasks.
    """

    measure: DistanceMeasure
    outputs: Outputs
    weight: float


class FunctionSpacePenalty(nn.Module):
    """Mean distance of a network from what it was on earlier tasks, to add to a loss.

    ``scale * sum_j w_j d_j(net) / sum_j w_j``, over past tasks ``j`` with distances ``d_j`` from
    the networks as they were when those had been learned. Works in any training loop:

        loss = cross_entropy(net(x), y) + penalty(net)

    and after each task ``penalty.add(pf.summarize(net, data))``. It has no parameters. Measures
    evaluate the network in evaluation mode themselves, whatever its mode.

    Parameters
    ----------
    scale
        Factor on the mean: how much the past counts against the present.
    metric
        How outputs are compared; None for what each measure takes by itself.
    tasks_per_step
        In training mode, so many past tasks are drawn anew in each call, and their sum is scaled
        up so that the expected gradient is that of all. None: all tasks in each call.
    resample
        Whether measures that draw random numbers get another seed in each call in training mode,
        so that a training does not adapt to one set of draws.
    seed
        Of both. How far the streams have been used is in the state dict; the past tasks are not.
    **options
        Passed on to ``measure.distance``, such as ``estimator=`` for a `FunctionSummary`.

    Raises
    ------
    OptionError
        For options out of range.

    Examples
    --------
    >>> import torch
    >>> penalty = FunctionSpacePenalty(scale=10.0)
    >>> penalty(torch.nn.Linear(2, 1)).item()  # nothing has been learned before
    0.0
    """

    def __init__(
        self,
        *,
        scale: float = 1.0,
        metric: Metric | None = None,
        tasks_per_step: int | None = None,
        resample: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.scale = number(scale, "scale", least=0)
        if tasks_per_step is not None:
            advice = "Give a positive whole number, or None for all tasks."
            tasks_per_step = whole_number(tasks_per_step, "tasks_per_step", advice=advice)
        if metric is not None:
            check_metric(metric)
        stream(seed, "function-space penalty")  # refuses what is no seed
        self.metric = metric
        self.tasks_per_step = tasks_per_step
        self.resample = resample
        self.options = dict(options)
        self._seed, self._calls = seed, 0
        self._past: list[PastTask] = []

    @property
    def past(self) -> tuple[PastTask, ...]:
        """What it holds on to, in the order in which it was added."""
        return tuple(self._past)

    def __len__(self) -> int:
        return len(self._past)

    def __bool__(self) -> bool:
        return True  # a penalty without tasks is still one

    @property
    def num_bytes(self) -> int:
        """What the measures keep besides weights, as far as they say."""
        return sum(getattr(task.measure, "num_bytes", 0) for task in self._past)

    def add(
        self, measure: DistanceMeasure, *, outputs: Outputs = None, weight: float = 1.0
    ) -> None:
        """Hold on to a function from now on.

        Parameters
        ----------
        measure
            Of the distance from it: a `FunctionSummary` or a baseline. It is asked for a distance
            at once, so that what it refuses is refused here.
        outputs
            Which outputs of the network belong to the task; None for all.
        weight
            Relative to the other tasks.

        Raises
        ------
        OptionError
            For what is no measure or does not answer with a number, and a weight that is not
            positive.
        WeightsError
            For a measure of another architecture than those before.
        PushforwardError
            Whatever the measure refuses: its metric, outputs out of range, an option.
        """
        if not isinstance(measure, DistanceMeasure):
            raise OptionError(
                f"{type(measure).__name__} measures no distance",
                where="measure",
                advice="Pass the result of pushforward.summarize, or a baseline; after training, "
                "not the network itself.",
            )
        weight = number(weight, "weight", above=0)
        self._require_same_architecture(measure.reference)
        self._require_options(measure)
        task = PastTask(measure, outputs, weight)
        with torch.no_grad():
            value = self._distance(task, measure.reference.tensors, None)
        if not (isinstance(value, Tensor) and value.dim() == 0 and bool(torch.isfinite(value))):
            raise OptionError(
                f"the distance of the reference from itself is {value!r}",
                where="measure",
                advice="A measure answers with one number, zero at its own weights.",
            )
        self._past.append(task)

    def forward(self, net: nn.Module) -> Float[Tensor, ""]:
        """The penalty.

        Parameters
        ----------
        net
            The network in training; wrappers for several processes and compiled modules are
            looked through, as they are where past tasks are measured.

        Returns
        -------
        Tensor
            A number from 0 on the device of the network, differentiable in its weights; exactly
            0 as long as nothing has been added.

        Raises
        ------
        WeightsError
            For a network of another architecture.
        NetworkError
            For what is no module.
        """
        if not isinstance(net, nn.Module):
            raise NetworkError(
                f"got {type(net).__name__}",
                where="net",
                advice="Pass the torch.nn.Module in training, not its weights.",
            )
        net = unwrapped(net)
        like = next(iter(net.parameters()), torch.zeros(()))
        if not self._past:
            # A leaf, so that even the backward pass of the penalty alone is one.
            kind = torch.promote_types(like.dtype, torch.float32)  # as distances have it
            return torch.zeros((), dtype=kind, device=like.device, requires_grad=True)
        numbers, seed = list(range(len(self._past))), None
        if self.training:
            generator = stream(self._seed, "function-space penalty", "tasks", self._calls)
            count = min(self.tasks_per_step or len(numbers), len(numbers))
            if count < len(numbers):
                numbers = torch.randperm(len(numbers), generator=generator)[:count].tolist()
            if self.resample:
                seed = derived_seed(self._seed, "function-space penalty", "draws", self._calls)
            self._calls += 1
        total = sum(task.weight for task in self._past)
        terms = [
            (self._past[j].weight / total) * self._distance(self._past[j], net, seed)
            for j in numbers
        ]
        upscaled = self.scale * len(self._past) / len(numbers)
        return upscaled * torch.stack([term.to(like.device) for term in terms]).sum()

    def _distance(self, task: PastTask, other: Any, seed: int | None) -> Tensor:
        options = dict(self.options)
        if self.metric is not None:
            options["metric"] = self.metric
        if task.outputs is not None:
            options["outputs"] = task.outputs
        if seed is not None:
            options["seed"] = seed
        return task.measure.distance(other, **options)

    def _require_options(self, measure: DistanceMeasure) -> None:
        known = signature(measure.distance).parameters
        wanted = [*self.options, *(["seed"] if self.resample else [])]
        unknown = [name for name in wanted if name not in known]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
            raise OptionError(
                f"{type(measure).__name__}.distance does not take {', '.join(unknown)}",
                where="resample" if unknown == ["seed"] and self.resample else "options",
                advice=f"It takes {', '.join(known)}.",
            )

    def _require_same_architecture(self, reference: ReferenceNetwork) -> None:
        if self._past and reference.architecture != self._past[0].measure.reference.architecture:
            raise WeightsError(
                "it is of another architecture than the tasks before",
                where="measure",
                advice="A penalty is for one network; make another for another.",
            )

    def get_extra_state(self) -> Tensor:
        """How far the random streams have been used, for `state_dict`.

        Returns
        -------
        Tensor
            Seed and number of calls, int64.
        """
        return torch.tensor([self._seed, self._calls])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on where another penalty was, for `load_state_dict`."""
        self._seed, self._calls = (int(number) for number in state)

    def extra_repr(self) -> str:
        """Options and what is held on to, for ``repr``.

        Returns
        -------
        str
            One line.
        """
        options = {
            "scale": self.scale,
            "metric": self.metric,
            "tasks_per_step": self.tasks_per_step,
            "resample": self.resample or None,
            **self.options,
        }
        shown = ", ".join(f"{n}={v!r}" for n, v in options.items() if v is not None)
        return f"{shown}; {len(self)} past tasks"
