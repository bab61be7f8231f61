"""Synthetic problems whose answer is known: a teacher from the prior makes the labels.

When targets come from the very model that a student assumes, with parameters drawn from the very
prior, then the teacher's parameters, with its latent variables where the model has them, are one
exact draw from the posterior. A chain that starts there starts in equilibrium.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap

from pushforward.errors import DataError, OptionError
from pushforward.networks.likelihoods import Bernoulli, Categorical, Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.networks.parameters import ParameterSpace
from pushforward.options import whole_number
from pushforward.runs.rng import stream
from pushforward.runs.store import fingerprint
from pushforward.sampling.intermediate_noise.network import IntermediateNoiseNetwork
from pushforward.sampling.network_potential import NetworkPotential
from pushforward.sampling.potential import Potential
from pushforward.typing import Params

__all__ = ["STARTS", "Instance", "Start", "TeacherStudent"]

Start: TypeAlias = Literal["informed", "zero", "prior"]
"""Where chains begin: at the teacher, near zero, or at a fresh draw from the prior."""

STARTS: tuple[Start, ...] = ("informed", "zero", "prior")

_NEAR_ZERO = 1e-4  # standard deviations of the prior, so that equal units part under a gradient
_CHUNK = 64  # rows of parameters evaluated at a time


@dataclass(frozen=True, eq=False)
class TeacherStudent:
    """A family of problems in which the posterior has a known draw, one problem for each seed.

    Parameters
    ----------
    network
        An `IntermediateNoiseNetwork`, whose posterior is over parameters and latent variables; or
        any network with a `likelihood`, whose classical posterior is over the parameters. Only the
        structure counts, not the present weights.
    inputs, test_inputs
        Examples ``(n, *shape)`` that all problems share, or how many standard normal ones each
        problem draws for itself.
    likelihood
        The law of targets given outputs, for the classical posterior. A `Gaussian` needs its noise.
    prior_precision
        For the classical posterior, as in `Potential.of_network`: a positive number (default 1), or
        numbers by pattern of the name.
    example_shape
        Of inputs that are drawn. Default: what the first linear layer takes.
    label_noise
        False: targets and latent variables are those of the network without any noise, which makes
        one data set for several posteriors. The teacher is then no posterior draw, only a
        favourable place to start from, and no identity is known in advance.

    Raises
    ------
    OptionError
        For options that do not go together, or out of range.
    DataError
        For inputs that are no examples.

    References
    ----------
    G. Piccioli, E. Troiani, L. Zdeborová, *Gibbs sampling the posterior of neural networks*, arXiv
    2306.02729.

    Examples
    --------
    >>> import torch, pushforward as pf
    >>> net = torch.nn.Linear(3, 1)
    >>> problem = pf.TeacherStudent(net, 20, 50, likelihood=pf.Gaussian(0.1))
    >>> instance = problem.instance(0)
    >>> instance.targets.shape, instance.start("informed", 2)["weight"].shape
    (torch.Size([20, 1]), torch.Size([2, 1, 3]))
    """

    network: IntermediateNoiseNetwork | nn.Module | FunctionalModel
    inputs: Tensor | int
    test_inputs: Tensor | int = 1000
    _: KW_ONLY
    likelihood: Likelihood | None = None
    prior_precision: float | Mapping[str, float] | None = None
    example_shape: tuple[int, ...] | None = None
    label_noise: bool = True

    def __post_init__(self) -> None:
        noisy = isinstance(self.network, IntermediateNoiseNetwork)
        if noisy and (self.likelihood is not None or self.prior_precision is not None):
            raise OptionError(
                "an IntermediateNoiseNetwork has a likelihood and a prior of its own",
                where="likelihood" if self.likelihood is not None else "prior_precision",
                advice="Leave it out, or give the plain network.",
            )
        if not noisy and self.likelihood is None:
            raise OptionError(
                "a plain network makes no targets",
                where="likelihood",
                advice="Give likelihood=pf.Gaussian(noise_variance), pf.Categorical(), ..., or an "
                "IntermediateNoiseNetwork.",
            )
        for name, value in (("inputs", self.inputs), ("test_inputs", self.test_inputs)):
            object.__setattr__(self, name, _checked_inputs(name, value))
        if isinstance(self.inputs, Tensor) and isinstance(self.test_inputs, Tensor):
            ours, theirs = _sort_of(self.inputs), _sort_of(self.test_inputs)
            if ours != theirs:
                raise DataError(
                    f"they are {theirs}, the inputs {ours}",
                    where="test_inputs",
                    advice="Give both the same shape of an example, dtype and device.",
                )

    # --- structure --------------------------------------------------------------------------------

    @cached_property
    def model(self) -> IntermediateNoiseNetwork | FunctionalModel:
        """The network that students sample."""
        if isinstance(self.network, IntermediateNoiseNetwork):
            return self.network
        return FunctionalModel.of(self.network)

    @property
    def space(self) -> ParameterSpace:
        """Names and shapes of the parameters, without latent variables."""
        return self.model.space

    @property
    def classifies(self) -> bool:
        """Whether predictions are classes: errors are then shares of test inputs."""
        if isinstance(self.model, IntermediateNoiseNetwork):
            return self.model.output == "classification"
        return isinstance(self.likelihood, Categorical | Bernoulli)

    @cached_property
    def precisions(self) -> dict[str, float]:
        """Of the prior, by parameter."""
        if isinstance(self.model, IntermediateNoiseNetwork):
            return dict(self.model.precisions)
        vector = self._template.prior_precision
        return {name: float(vector[where][0]) for name, where in self.space.slices.items()}

    @property
    def _kind(self) -> dict[str, Any]:
        """Dtype and device of everything."""
        for given in (self.inputs, self.test_inputs):
            if isinstance(given, Tensor):
                return {"dtype": given.dtype, "device": given.device}
        if isinstance(self.model, IntermediateNoiseNetwork):
            # Its net lends the structure only; small variances want the digits.
            device = next(self.model.net.parameters()).device
            return {"dtype": torch.float64, "device": device}
        return {"dtype": self.model.dtype, "device": self.model.device}

    @cached_property
    def _template(self) -> NetworkPotential:
        """A posterior with this prior, and data that do not matter."""
        assert isinstance(self.model, FunctionalModel)
        assert self.likelihood is not None
        inputs = self._examples(self.inputs, 0, "inputs")[:1]
        with torch.no_grad():
            targets = self.likelihood.sample(self.model.predict(inputs), stream(0, "template"))
        return self._posterior(inputs, targets)

    def _posterior(self, inputs: Tensor, targets: Tensor) -> NetworkPotential:
        assert self.likelihood is not None
        assert isinstance(self.model, FunctionalModel)
        precision = 1.0 if self.prior_precision is None else self.prior_precision
        return Potential.of_network(
            self.model, (inputs, targets), self.likelihood, prior_precision=precision
        )

    def _examples(self, given: Tensor | int, seed: int, purpose: str) -> Tensor:
        if isinstance(given, Tensor):
            return given
        device = self._kind["device"]
        generator = stream(seed, "teacher-student", purpose, device=device)
        return torch.randn(given, *self._example_shape, generator=generator, **self._kind)

    @cached_property
    def _example_shape(self) -> tuple[int, ...]:
        """Of one input.

        Returns
        -------
        tuple of int
            As given, or of some tensor, or what a linear first layer takes.

        Raises
        ------
        OptionError
            When it is not known.
        """
        if self.example_shape is not None:
            return tuple(self.example_shape)
        for given in (self.inputs, self.test_inputs):
            if isinstance(given, Tensor):
                return tuple(given.shape[1:])
        net = self.network
        net = net.net if isinstance(net, IntermediateNoiseNetwork) else net
        if isinstance(net, nn.Module):
            leaves = [m for m in net.modules() if not any(m.children())]
            if leaves and isinstance(leaves[0], nn.Linear):
                return (leaves[0].in_features,)
        raise OptionError(
            "the shape of an input is not known",
            where="example_shape",
            advice="Give example_shape=(channels, height, width), or the inputs themselves.",
        )

    # --- problems ---------------------------------------------------------------------------------

    @torch.no_grad()
    def instance(self, seed: int) -> Instance:
        """One problem with its answer.

        Parameters
        ----------
        seed
            Of teacher, inputs and noise.

        Returns
        -------
        Instance
            The same for the same seed.
        """
        inputs = self._examples(self.inputs, seed, "inputs")
        test_inputs = self._examples(self.test_inputs, seed, "test inputs")
        teacher = self._prior(1, seed, "teacher")
        rows, latents, targets = self._labelled(teacher, inputs, seed)
        return Instance(
            self,
            seed,
            inputs,
            targets[0],
            test_inputs,
            _first(rows),
            _first(latents),
        )

    def _prior(self, rows: int, seed: int, purpose: str) -> Params:
        """Parameters from their prior, ``(rows, *shape)``."""
        device = self._kind["device"]
        generator = stream(seed, "teacher-student", purpose, device=device)
        normals = torch.randn(rows, self.space.size, generator=generator, **self._kind)
        if isinstance(self.model, IntermediateNoiseNetwork):
            return self.model.sample_prior(normals)
        return self.space.unravel(self._template.start(None, normals))

    def _labelled(
        self, teacher: Params, inputs: Tensor, seed: int
    ) -> tuple[Params, Params, Tensor]:
        """The teacher with its latent variables and targets, all with a leading axis."""
        generator = stream(seed, "teacher-student", "noise", device=inputs.device)
        if isinstance(self.model, IntermediateNoiseNetwork):
            shape = (1, self.model.generate_size(inputs))
            noise = torch.randn(shape, generator=generator, **self._kind)
            latents, targets = self.model.generate(
                teacher, inputs, noise if self.label_noise else 0 * noise
            )
            return teacher, latents, targets
        assert self.likelihood is not None
        model = self.model
        outputs = vmap(lambda p: model(p, inputs))(teacher)
        if self.label_noise:
            return teacher, {}, self.likelihood.sample(outputs, generator)
        if isinstance(self.likelihood, Categorical):
            return teacher, {}, outputs.argmax(-1)
        if isinstance(self.likelihood, Bernoulli):
            return teacher, {}, (outputs > 0).to(outputs)
        return teacher, {}, self.likelihood.mean(outputs)

    def identity(self) -> dict[str, Any]:
        """What tells this family from others, in JSON's types.

        Returns
        -------
        dict
            Model, prior, sizes and data.
        """
        network: Any
        if isinstance(self.model, IntermediateNoiseNetwork):
            network = self.model.to_config()
        else:  # a name and shapes: the weights of the network play no part
            network = [self.model.name, self.model.space.fingerprint()]
        return {
            "network": network,
            "likelihood": None if self.likelihood is None else self.likelihood.to_config(),
            "prior": self.precisions,
            "inputs": _described(self.inputs),
            "test_inputs": _described(self.test_inputs),
            "example_shape": list(self._example_shape),
            "label_noise": self.label_noise,
        }

    def __repr__(self) -> str:
        model = self.model
        if isinstance(model, IntermediateNoiseNetwork):
            what = f"intermediate noise, {model.output}"
        else:
            what = f"{model.name}, {self.likelihood}"
        counts = [len(v) if isinstance(v, Tensor) else v for v in (self.inputs, self.test_inputs)]
        noise = "" if self.label_noise else ", labels without noise"
        return (
            f"TeacherStudent: {what}, {self.space.size:,} parameters, {counts[0]:,} inputs, "
            f"{counts[1]:,} for testing{noise}"
        )


@dataclass(frozen=True, eq=False)
class Instance:
    """One problem: data, the teacher that made them, the posterior, and places to start from.

    Parameters
    ----------
    problem
        The family that it is of.
    seed
        Of this one.
    inputs
        ``(n, *shape)``.
    targets
        ``(n, outputs)``, or labels ``(n,)``.
    test_inputs
        ``(m, *shape)``.
    teacher
        Parameters ``(*shape)`` by name.
    latents
        The teacher's latent variables ``(n, *shape)`` by name; empty for a classical posterior.
    """

    problem: TeacherStudent
    seed: int
    inputs: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    test_inputs: Tensor = field(repr=False)
    teacher: Params = field(repr=False)
    latents: Params = field(repr=False)

    @property
    def exact(self) -> bool:
        """Whether the teacher is an exact draw from the posterior."""
        return self.problem.label_noise

    @property
    def model(self) -> IntermediateNoiseNetwork | FunctionalModel:
        """The network, as `gibbs` and `Potential` take it."""
        return self.problem.model

    @cached_property
    def test_outputs(self) -> Tensor:
        """What the teacher says without noise about the test inputs, ``(m, *event)``."""
        with torch.no_grad():
            return self.predict(self.teacher, self.test_inputs)

    @cached_property
    def potential(self) -> Potential:
        """Minus the log density: of the parameters, and of the latent variables where there are."""
        model, problem = self.model, self.problem
        if isinstance(model, FunctionalModel):
            return problem._posterior(self.inputs, self.targets)
        names, inputs, targets = problem.space.names, self.inputs, self.targets

        def log_joint(values: Params) -> Tensor:
            latents = {name: value for name, value in values.items() if name not in names}
            return model.log_joint({name: values[name] for name in names}, latents, inputs, targets)

        return Potential.of_density(log_joint, {**self.teacher, **self.latents})

    def predict(self, parameters: Params, inputs: Tensor) -> Tensor:
        """The network without noise.

        Parameters
        ----------
        parameters
            ``(*shape)`` by name; latent variables among them are not used.
        inputs
            ``(m, *shape)``.

        Returns
        -------
        Tensor
            ``(m, *event)``.
        """
        own = {name: parameters[name] for name in self.problem.space.names}
        if isinstance(self.model, IntermediateNoiseNetwork):
            return self.model.outputs(own, inputs)
        return self.model(own, inputs)

    def outputs(self, parameters: Params, inputs: Tensor) -> Tensor:
        """The network without noise at many parameters.

        Parameters
        ----------
        parameters
            ``(rows, *shape)`` by name.
        inputs
            ``(m, *shape)``.

        Returns
        -------
        Tensor
            ``(rows, m, *event)``.
        """
        if isinstance(self.model, IntermediateNoiseNetwork):
            own = {name: parameters[name] for name in self.problem.space.names}
            return self.model.outputs(own, inputs)
        return vmap(lambda p: self.predict(p, inputs), chunk_size=_CHUNK)(parameters)

    def errors(self, outputs: Tensor) -> Float[Tensor, " rows"]:
        """Distance from the teacher on the test inputs.

        Parameters
        ----------
        outputs
            ``(rows, m, *event)``.

        Returns
        -------
        Tensor
            ``(rows,)`` float64: mean squared error; for classes, the share that differs.
        """
        truth = self.test_outputs
        if not self.problem.classifies:
            return (outputs - truth).double().square().flatten(1).mean(1)
        several = not isinstance(self.problem.likelihood, Bernoulli)
        chosen = outputs.argmax(-1) if several else outputs > 0
        true = truth.argmax(-1) if several else truth > 0
        return (chosen != true).double().flatten(1).mean(1)

    @torch.no_grad()
    def start(self, kind: Start, num_chains: int, seed: int = 0) -> Params:
        """Where chains begin.

        Parameters
        ----------
        kind
            ``"informed"``: at the teacher and its latent variables. ``"zero"``: latent variables 0,
            and parameters so close to it that only units that would stay equal forever notice.
            ``"prior"``: fresh parameters from the prior, with latent variables made by them.
        num_chains
            How many chains.
        seed
            Of fresh draws.

        Returns
        -------
        dict
            ``(num_chains, *shape)`` by name, latent variables included.

        Raises
        ------
        OptionError
            For another kind.
        """
        if kind == "informed":
            return {
                name: value.expand(num_chains, *value.shape).clone()
                for name, value in {**self.teacher, **self.latents}.items()
            }
        purpose = f"start {kind} of problem {self.seed}"
        if kind == "zero":
            drawn = self.problem._prior(num_chains, seed, purpose)
            zeros = {n: v.new_zeros(num_chains, *v.shape) for n, v in self.latents.items()}
            return {name: _NEAR_ZERO * value for name, value in drawn.items()} | zeros
        if kind != "prior":
            raise OptionError(
                f"there is no start {kind!r}",
                where="start",
                advice=f"Choose among {', '.join(map(repr, STARTS))}.",
            )
        drawn = self.problem._prior(num_chains, seed, purpose)
        if not isinstance(self.model, IntermediateNoiseNetwork):
            return drawn
        generator = stream(seed, "teacher-student", f"{purpose}, noise", device=self.inputs.device)
        size = self.model.generate_size(self.inputs)
        kinds: dict[str, Any] = {"dtype": self.inputs.dtype, "device": self.inputs.device}
        noise = torch.randn(num_chains, size, generator=generator, **kinds)
        latents, _ = self.model.generate(drawn, self.inputs, noise)
        if self.problem.classifies:
            last = f"latent.{self.model.maps[-1].name}"
            latents[last] = _largest_at(latents[last], self.targets)
        return drawn | latents


def _largest_at(values: Tensor, labels: Tensor) -> Tensor:
    """Values ``(rows, n, C)`` with the largest of each example swapped to where its label is."""
    index = labels.expand(values.shape[:-1]).unsqueeze(-1)
    largest, at = values.max(-1, keepdim=True)
    swapped = values.scatter(-1, at, values.gather(-1, index))
    return swapped.scatter(-1, index, largest)


def _first(rows: Params) -> Params:
    return {name: value[0] for name, value in rows.items()}


def _described(inputs: Tensor | int) -> Any:
    return fingerprint({"inputs": inputs}) if isinstance(inputs, Tensor) else inputs


def _sort_of(inputs: Tensor) -> str:
    return f"{inputs.dtype} {tuple(inputs.shape[1:])} on {inputs.device}"


def _checked_inputs(name: str, value: Tensor | int) -> Tensor | int:
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.dim() < 2 or not len(value):
            raise DataError(
                f"a tensor {value.dtype} {tuple(value.shape)}",
                where=name,
                advice="Give floating-point examples (n, features), at least one.",
            )
        if not bool(torch.isfinite(value).all()):
            raise DataError(
                "it holds NaN or infinite entries", where=name, advice="Clean the data first."
            )
        return value
    advice = "Give examples (n, *shape), or how many standard normal ones to draw."
    return whole_number(value, name, advice=advice)
