"""What is known of posterior draws in advance, and whether chains that started at one keep to it.

Over the draw of problems, parameters (and latent variables) of a chain that started at the teacher
have, after any number of steps of a correct kernel, the same joint law with the data as the
teacher's. So whatever is computed of both has equal means, averaged over problems:

- residuals of the noise behind every map are as large as the noise;
- ``d log P / d theta`` has mean 0, and ``theta d log P / d theta`` mean -1 (integration by parts);
- second moments of the parameters, training loss, log density and outputs have the means of the
  teacher's.

The first two are compared with what is known, the rest with the teacher of the same problem, which
takes most of the spread between problems away. Known for independent draws only, and thus reported
without a test: the error of a draw is twice the variance of the draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import DataError, OptionError
from pushforward.networks.likelihoods import Gaussian
from pushforward.networks.model import FunctionalModel
from pushforward.networks.parameters import ParameterSpace
from pushforward.sampling.intermediate_noise.network import IntermediateNoiseNetwork
from pushforward.sampling.kernel import Kernel, State
from pushforward.sampling.noise import Noise, NoiseSize
from pushforward.sampling.thermalization.teacher_student import Instance
from pushforward.typing import Params

__all__ = [
    "PREFIX",
    "Identity",
    "Statistic",
    "WatchedKernel",
    "identity_values",
    "judge_identities",
    "observe",
]

Statistic: TypeAlias = Callable[[Instance, Tensor], Tensor]
"""From an instance and outputs ``(rows, m, *event)`` on its test inputs to ``(rows,)`` numbers, not
negative, that tell how far from the teacher they are."""

PREFIX = "watched."
"""Of the statistics that `WatchedKernel` adds to those of its kernel."""

_FALSE_ALARMS = 1e-4  # of all identities of a report together
_FEWEST_PROBLEMS = 4  # fewer have no spread to speak of
_ROUNDING = 1e-9
_PROBES = 3  # outputs that are looked at one by one


@dataclass(frozen=True)
class Identity:
    """One mean that is known in advance, tested over problems.

    Parameters
    ----------
    name
        What it is of.
    mean, standard_error
        Of the deviation, over problems; 0 is expected.
    z
        Their ratio.
    p_value
        Of Student's t with one degree of freedom less than there are problems.
    rejected
        Whether chance is no explanation: fewer than one in 10,000 reports of a correct kernel have
        any rejected identity.
    """

    name: str
    mean: float
    standard_error: float
    z: float
    p_value: float
    rejected: bool


@dataclass(frozen=True, eq=False)
class WatchedKernel(Kernel):
    """A kernel with `observe` among its statistics; it moves as the kernel itself.

    Parameters
    ----------
    kernel
        The sampler.
    instance
        The problem that it samples.
    statistic
        As in `observe`.

    Raises
    ------
    DataError
        When the kernel does not sample the parameters of the problem.
    """

    kernel: Kernel
    instance: Instance
    statistic: Statistic | None = None

    name = "watched"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.kernel.name)
        ours = dict(zip(self.kernel.space.names, self.kernel.space.shapes, strict=True))
        space = self.instance.problem.space
        for name, shape in zip(space.names, space.shapes, strict=True):
            if ours.get(name) != shape:
                raise DataError(
                    f"{self.name} does not sample {name} {shape}",
                    where="sampler",
                    advice="Build it of the instance that it is called with: instance.potential, "
                    "or instance.model, instance.inputs and instance.targets.",
                )

    @property
    def space(self) -> ParameterSpace:
        """Of the kernel."""
        return self.kernel.space

    @property
    def dtype(self) -> torch.dtype:
        """Of the kernel."""
        return self.kernel.dtype

    @property
    def device(self) -> torch.device:
        """Of the kernel."""
        return self.kernel.device

    @property
    def start_size(self) -> NoiseSize:
        """Of the kernel."""
        return self.kernel.start_size

    @property
    def noise_size(self) -> NoiseSize:
        """Of the kernel."""
        return self.kernel.noise_size

    @property
    def bytes_per_chain(self) -> int:
        """Of the kernel."""
        return self.kernel.bytes_per_chain

    def start(self, initial: Params | None, noise: Noise) -> State:
        """Of the kernel."""
        return self.kernel.start(initial, noise)

    def step(self, state: State, noise: Noise) -> State:
        """Of the kernel."""
        return self.kernel.step(state, noise)

    def warm_up(self, state: State, noise: Noise, step: int, total: int) -> State:
        """Of the kernel."""
        return self.kernel.warm_up(state, noise, step, total)

    def vectors(self, state: State) -> Float[Tensor, "chains P"]:
        """Of the kernel."""
        return self.kernel.vectors(state)

    def statistics(self, state: State) -> Mapping[str, Float[Tensor, " chains"]]:
        """Those of the kernel, and what `observe` says of parameters and latent variables.

        Returns
        -------
        dict
            ``(chains,)`` each.
        """
        values = self.kernel.space.unravel(self.kernel.vectors(state))
        values |= {n: state[n] for n in self.instance.latents if n not in values and n in state}
        found = observe(self.instance, values, self.statistic)
        own = self.kernel.statistics(state)
        return {**own, **{f"{PREFIX}{name}": value for name, value in found.items()}}

    def identity(self) -> dict[str, Any]:
        """Of the kernel."""
        return self.kernel.identity()


@torch.no_grad()
def observe(
    instance: Instance, values: Mapping[str, Tensor], statistic: Statistic | None = None
) -> dict[str, Float[Tensor, " rows"]]:
    """All that is watched of some chains.

    Parameters
    ----------
    instance
        The problem.
    values
        Parameters ``(rows, *shape)`` by name, and latent variables if they are known.
    statistic
        Distance from the teacher, instead of `Instance.errors`.

    Returns
    -------
    dict
        ``(rows,)`` float64 each: ``"error"``, the distance from the teacher; ``"train loss"``,
        ``"mean output"``, ``"mean squared output"`` and ``"output 0"`` to 2 on the test inputs;
        ``"second moment of ..."`` of each parameter tensor. With all latent variables also ``"log
        density"``, ``"score of ..."`` and ``"virial of ..."``, and where noise is Gaussian
        ``"residual of ..."`` and ``"residuals"``, in standard deviations.
    """
    space = instance.problem.space
    parameters = {name: values[name] for name in space.names}
    outputs = instance.outputs(parameters, instance.test_inputs)
    fitted = instance.outputs(parameters, instance.inputs)
    flat = outputs.double().flatten(1)
    found = {
        "error": _distance(instance, outputs, statistic),
        "train loss": _train_loss(instance, fitted),
        "mean output": flat.mean(1),
        "mean squared output": flat.square().mean(1),
    }
    found |= {f"output {i}": flat[:, i] for i in range(min(_PROBES, flat.shape[1]))}
    for name, precision in instance.problem.precisions.items():
        squares = parameters[name].double().flatten(1).square()
        found[f"second moment of {name}"] = precision * squares.mean(1) - 1
    if all(name in values for name in instance.latents):
        found |= _of_density(instance, values) | _residuals(instance, fitted, values)
    return found


def _distance(instance: Instance, outputs: Tensor, statistic: Statistic | None) -> Tensor:
    found = (statistic or Instance.errors)(instance, outputs)
    if not isinstance(found, Tensor) or tuple(found.shape) != (len(outputs),):
        kind = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise OptionError(
            f"it returned {kind} for outputs {tuple(outputs.shape)}",
            where="statistic",
            advice=f"Return one number a draw, a tensor ({len(outputs)},): the first axis of the "
            "outputs counts draws, and is not to be averaged over.",
        )
    return found.double()


def identity_values(
    instance: Instance, found: Mapping[str, Tensor], first: int
) -> dict[str, float]:
    """By how much the identities of one problem are missed.

    Parameters
    ----------
    instance
        The problem.
    found
        ``(chains, draws)`` of what `observe` returned, of informed chains.
    first
        Draw from which on to average.

    Returns
    -------
    dict
        Deviations; 0 is expected, over problems.
    """
    teacher = observe(
        instance, {n: v[None] for n, v in {**instance.teacher, **instance.latents}.items()}
    )
    deviations = {}
    for name, value in found.items():
        if name == "error":
            continue  # the teacher is no function of parameters and data
        known = name.startswith(("residual", "score", "virial"))
        expected = 0.0 if known else float(teacher[name])
        deviations[name] = float(value[:, first:].mean()) - expected
    return deviations


def judge_identities(problems: Sequence[Mapping[str, float]]) -> tuple[Identity, ...]:
    """Whether the deviations of several problems have mean 0.

    Parameters
    ----------
    problems
        Of `identity_values`, for each problem.

    Returns
    -------
    tuple of Identity
        Nothing for fewer than four problems.
    """
    from scipy.special import stdtr

    if len(problems) < _FEWEST_PROBLEMS:
        return ()
    threshold = _FALSE_ALARMS / max(1, len(problems[0]))
    identities = []
    for name in problems[0]:
        values = torch.tensor([problem[name] for problem in problems], dtype=torch.float64)
        mean = float(values.mean())
        error = float(values.std()) / math.sqrt(len(values))
        if not math.isfinite(mean):
            identities.append(Identity(name, mean, math.nan, math.inf, 0.0, True))
            continue
        if max(abs(mean), error) < _ROUNDING:  # chains that never moved keep every identity
            z, p = 0.0, 1.0
        else:
            z = mean / error if error > 0 else math.copysign(math.inf, mean)
            p = 2 * float(stdtr(len(values) - 1, -abs(z)))
        identities.append(Identity(name, mean, error, z, p, p < threshold))
    return tuple(identities)


def _train_loss(instance: Instance, outputs: Tensor) -> Tensor:
    """Of the network without noise, a mean over examples, ``(rows,)``."""
    targets = instance.targets
    likelihood = instance.problem.likelihood
    if likelihood is not None:
        like = outputs[0]
        return (
            -likelihood.log_prob(outputs, likelihood.check_targets(like, targets)).double().mean(1)
        )
    if instance.problem.classifies:
        return (outputs.argmax(-1) != targets).double().mean(1)
    return (outputs - targets).double().square().flatten(1).mean(1)


def _of_density(instance: Instance, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Log density, and what its gradient says."""
    potential = instance.potential
    vectors = potential.space.ravel(values).to(potential.dtype)
    value, gradient = potential.value_and_gradient(vectors)
    found = {"log density": -value}
    for name in instance.problem.space.names:
        where = potential.space.slices[name]
        slope = -gradient[:, where].double()
        found[f"score of {name}"] = slope.mean(1)
        found[f"virial of {name}"] = (slope * vectors[:, where].double()).mean(1) + 1
    return found


def _residuals(
    instance: Instance, outputs: Tensor, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Squared residuals in units of their noise, centred and divided by ``sqrt(2 N)``."""
    model = instance.model
    if isinstance(model, FunctionalModel):
        likelihood = instance.problem.likelihood
        if not isinstance(likelihood, Gaussian):
            return {}
        rest = (outputs - instance.targets).double()
        squares = rest.square() / likelihood.variance(rest)
        return {"residuals": _centred(squares.flatten(1).sum(1), squares[0].numel())}
    assert isinstance(model, IntermediateNoiseNetwork)
    parameters = {name: values[name] for name in instance.problem.space.names}
    latents = {name: values[name] for name in instance.latents}
    energies = model.residual_energies(parameters, latents, instance.inputs, instance.targets)
    shapes = model.shapes(tuple(instance.inputs.shape[1:]))[1:]
    counts = [len(instance.inputs) * math.prod(shape) for shape in shapes]
    found = {
        f"residual of {name}": _centred(energy, count)
        for (name, energy), count in zip(energies.items(), counts, strict=True)
    }
    total = torch.stack(list(energies.values())).sum(0)
    return found | {"residuals": _centred(total, sum(counts))}


def _centred(energy: Tensor, count: int) -> Tensor:
    return (energy - count) / math.sqrt(2 * count)
