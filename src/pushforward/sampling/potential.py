"""The energy that samplers walk on: data, their number, temperature, prior and localisation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isfinite
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap

from pushforward.errors import DataError, NetworkError, OptionError
from pushforward.networks.batches import Inputs, Table
from pushforward.networks.data import Examples
from pushforward.networks.likelihoods import Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.networks.parameters import ParameterSpace, match_names
from pushforward.networks.problem import activation_bytes, check_problem
from pushforward.runs.store import fingerprint
from pushforward.typing import Params

__all__ = ["DensityPotential", "Loss", "NetworkPotential", "Potential"]

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Loss of each example: outputs ``(B, *event)`` and targets ``(B, ...)`` to ``(B,)``."""

_WORKSPACE = {"cpu": 2**25, "cuda": 2**30}  # bytes of activations: what caches hold
_HELD_BYTES = 2**31  # data up to this size stay on the device
_VECTORS = 12  # of the size of the parameters that a step of one chain works with
_PROBE = 0.125  # displacement at which a potential is told from others


class Potential(ABC):
    """``U(w)``: minus the log density of a law of parameters, up to a constant.

    Parameters of several chains are rows of ``(chains, P)``; every method treats them alike and
    apart.
    """

    @staticmethod
    def of_density(
        log_density: Callable[[Params], Tensor],
        parameters: Mapping[str, Tensor],
        *,
        batched: bool = False,
    ) -> DensityPotential:
        """The potential of any density.

        Parameters
        ----------
        log_density
            From parameters by name to a number, in nats, up to a constant; differentiable, of
            operations that `torch.func.vmap` understands.
        parameters
            Values with the names, shapes, dtype and device of its argument. Chains start around
            them when nobody says where.
        batched
            Whether the function takes the parameters of all chains, ``(chains, *shape)`` each, and
            returns ``(chains,)``. It saves what `torch.func.vmap` costs in every call, which for
            small densities is most of the time.

        Returns
        -------
        DensityPotential
            Minus that function.

        Examples
        --------
        >>> import torch
        >>> normal = Potential.of_density(lambda p: -(p["x"] ** 2).sum() / 2, {"x": torch.zeros(3)})
        >>> normal.value(torch.ones(2, 3))
        tensor([1.5000, 1.5000], dtype=torch.float64)
        """
        values = {name: value.detach() for name, value in parameters.items()}
        return DensityPotential(log_density, values, batched)

    @staticmethod
    def of_network(
        net: nn.Module | FunctionalModel,
        data: Any,
        loss: Likelihood | Loss,
        *,
        prior_precision: float | Mapping[str, float] = 1.0,
        inverse_temperature: float = 1.0,
        localization: float = 0.0,
        batch_size: int | None = None,
        control_variate: bool = False,
        subset: str | Iterable[str] | None = None,
        workspace: int | None = None,
    ) -> NetworkPotential:
        """The posterior of a network's parameters.

        ``U(w) = beta sum_i loss_i(w) + sum_p a_p w_p^2 / 2 + gamma |w - w*|^2 / 2``.

        Parameters
        ----------
        net
            In evaluation mode; its present weights are ``w*``.
        data
            A pair of tensors, or a loader of ``(inputs, targets)`` or of mappings.
        loss
            A likelihood, whose loss is minus the log-probability; or a function from outputs
            ``(B, *event)`` and targets ``(B, ...)`` to the losses ``(B,)`` of the examples.
        prior_precision
            ``a``: a number for all parameters (0: a flat prior), or numbers by pattern of the name.
        inverse_temperature
            ``beta``, of the loss alone.
        localization
            ``gamma``.
        batch_size
            Examples in the minibatch of a stochastic gradient, drawn anew with replacement for each
            chain and step; None for all.
        control_variate
            Whether a stochastic gradient is corrected by the same batch's gradient at ``w*``, which
            lowers its noise near ``w*`` and doubles its cost.
        subset
            Patterns of the parameters that are sampled. Default: all that require a gradient,
            without scale and shift of normalisation layers.
        workspace
            Bytes of activations to hold at a time. Default 32 MiB on a CPU, 1 GiB on a GPU.

        Returns
        -------
        NetworkPotential
            Reading the data where they are.

        Raises
        ------
        OptionError
            For an option out of range, or names that match nothing.
        NetworkError
            For a network in training mode or with weights that are not finite.
        DataError
            For data that are empty, shuffled, not finite, or with targets out of range.
        ShapeError
            When targets do not fit the outputs.
        """
        model = FunctionalModel.of(net, subset)
        examples = Examples.read(data, device=model.device)
        if isinstance(loss, Likelihood):
            check_problem(model, examples, loss)
        elif not callable(loss):
            raise OptionError(
                f"{loss!r} is no loss",
                where="loss",
                advice="Pass a likelihood such as pf.Categorical(), or a function from outputs and "
                "targets to one loss an example.",
            )
        else:
            _check_loss(model, examples, loss)
        for name, value in (
            ("inverse_temperature", inverse_temperature),
            ("localization", localization),
        ):
            if not isfinite(value) or value < 0:
                raise OptionError(
                    f"{value!r} is out of range", where=name, advice="Give a number from 0 on."
                )
        if batch_size is not None and (
            not isinstance(batch_size, int) or not 1 <= batch_size <= len(examples)
        ):
            raise OptionError(
                f"{batch_size!r} of {len(examples):,} examples",
                where="batch_size",
                advice="Give a number from 1 to the number of examples, or None for all.",
            )
        return NetworkPotential(
            model,
            examples,
            loss,
            _precisions(model.space, prior_precision).to(model.vector),
            float(inverse_temperature),
            float(localization),
            batch_size,
            control_variate,
            _WORKSPACE.get(model.device.type, 2**27) if workspace is None else workspace,
        )

    @property
    @abstractmethod
    def space(self) -> ParameterSpace:
        """Names and shapes of the parameters."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the parameters."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Of the parameters."""

    @property
    def batch_uniforms(self) -> int:
        """Random numbers that choose a minibatch; 0 when the gradient is of all examples."""
        return 0

    @property
    def start_normals(self) -> int:
        """Standard normal numbers that a chain's beginning may take."""
        return self.space.size

    @property
    @abstractmethod
    def bytes_per_chain(self) -> int:
        """Memory that a step of one chain works with."""

    @abstractmethod
    def value(self, vectors: Float[Tensor, "chains P"]) -> Float[Tensor, " chains"]:
        """``U``.

        Parameters
        ----------
        vectors
            ``(chains, P)``.

        Returns
        -------
        Tensor
            ``(chains,)`` float64.
        """

    @abstractmethod
    def value_and_gradient(
        self, vectors: Float[Tensor, "chains P"]
    ) -> tuple[Float[Tensor, " chains"], Float[Tensor, "chains P"]]:
        """``U`` and its gradient.

        Parameters
        ----------
        vectors
            ``(chains, P)``.

        Returns
        -------
        tuple
            ``(chains,)`` float64 and ``(chains, P)``.
        """

    def stochastic_value_and_gradient(
        self,
        vectors: Float[Tensor, "chains P"],
        uniforms: Float[Tensor, "chains uniforms"],  # noqa: ARG002
    ) -> tuple[Float[Tensor, " chains"], Float[Tensor, "chains P"]]:
        """Unbiased estimates of both from minibatches.

        Parameters
        ----------
        vectors
            ``(chains, P)``.
        uniforms
            ``(chains, batch_uniforms)`` in ``[0, 1)``: they choose the examples of each chain.

        Returns
        -------
        tuple
            ``(chains,)`` float64 and ``(chains, P)``; exact without minibatches.
        """
        return self.value_and_gradient(vectors)

    def stochastic_gradient(
        self, vectors: Float[Tensor, "chains P"], uniforms: Float[Tensor, "chains uniforms"]
    ) -> Float[Tensor, "chains P"]:
        """The gradient of `stochastic_value_and_gradient`.

        Returns
        -------
        Tensor
            ``(chains, P)``.
        """
        return self.stochastic_value_and_gradient(vectors, uniforms)[1]

    @abstractmethod
    def start(
        self, initial: Mapping[str, Tensor] | None, normals: Float[Tensor, "chains P"]
    ) -> Float[Tensor, "chains P"]:
        """Where chains begin.

        Parameters
        ----------
        initial
            Tensors ``(chains, *shape)`` by name; None for a choice of our own.
        normals
            ``(chains, P)``, with which to choose.

        Returns
        -------
        Tensor
            ``(chains, P)``.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells this potential from others, in JSON's types.

        Returns
        -------
        dict
            Fingerprints and settings.
        """


@final
@dataclass(frozen=True, eq=False)
class DensityPotential(Potential):
    """Minus a log density that is given as a function; see `Potential.of_density`.

    Parameters
    ----------
    log_density
        From parameters by name to a number.
    parameters
        Around which chains start.
    batched
        Whether it is a function of all chains at once.
    """

    log_density: Callable[[Params], Tensor]
    parameters: Params
    batched: bool = False

    @cached_property
    def space(self) -> ParameterSpace:
        """Of the parameters."""
        return ParameterSpace.of(self.parameters)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(iter(self.parameters.values())).dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(iter(self.parameters.values())).device

    @property
    def bytes_per_chain(self) -> int:
        """A guess: what happens inside the density is not known."""
        return 4 * _VECTORS * self.space.size * torch.finfo(self.dtype).bits // 8

    def value(self, vectors: Float[Tensor, "chains P"]) -> Float[Tensor, " chains"]:
        """``U``; see `Potential.value`."""
        with torch.no_grad():
            return self._energies(vectors)

    def value_and_gradient(
        self, vectors: Float[Tensor, "chains P"]
    ) -> tuple[Float[Tensor, " chains"], Float[Tensor, "chains P"]]:
        """``U`` and its gradient; see `Potential.value_and_gradient`."""
        return _differentiated(self._energies, vectors)

    def start(
        self, initial: Mapping[str, Tensor] | None, normals: Float[Tensor, "chains P"]
    ) -> Float[Tensor, "chains P"]:
        """Without `initial`: a standard normal step away from the parameters."""
        if initial is not None:
            return self.space.ravel(initial).to(self.dtype)
        return self.space.ravel(self.parameters) + normals

    def identity(self) -> dict[str, Any]:
        """Names, shapes, and the density at two points."""
        here = self.space.ravel(self.parameters)[None]
        values = self.value(torch.cat([here, here + _PROBE])).tolist()
        return {
            "kind": "density",
            "parameters": self.space.fingerprint(),
            "values": list(map(repr, values)),
        }

    def _energies(self, vectors: Tensor) -> Tensor:
        function = self.log_density if self.batched else vmap(self.log_density)
        values = function(self.space.unravel(vectors))
        if values.shape != vectors.shape[:1]:
            shape = tuple(values.shape if self.batched else values.shape[1:])
            raise OptionError(
                f"the log density has shape {shape}",
                where="log_density",
                advice=f"Return one number a chain, {tuple(vectors.shape[:1])}."
                if self.batched
                else "Return a number, a tensor of shape ().",
            )
        return -values.double()


@final
@dataclass(frozen=True, eq=False)
class NetworkPotential(Potential):
    """The posterior of a network's parameters; see `Potential.of_network`.

    Parameters
    ----------
    model
        The network at ``w*``.
    examples
        Its data.
    loss
        Likelihood, or loss of each example.
    prior_precision
        ``(P,)``, in the dtype of the network.
    inverse_temperature, localization, batch_size, control_variate, workspace
        As in `Potential.of_network`.
    """

    model: FunctionalModel
    examples: Examples
    loss: Likelihood | Loss
    prior_precision: Float[Tensor, " P"]
    inverse_temperature: float = 1.0
    localization: float = 0.0
    batch_size: int | None = None
    control_variate: bool = False
    workspace: int = field(default=2**25, repr=False)

    @property
    def space(self) -> ParameterSpace:
        """Of the sampled parameters."""
        return self.model.space

    @property
    def dtype(self) -> torch.dtype:
        """Of the sampled parameters."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Of the sampled parameters."""
        return self.model.device

    @property
    def num_examples(self) -> int:
        """Examples of the whole data set, whatever the batch."""
        return len(self.examples)

    @property
    def batch_uniforms(self) -> int:
        """One for each example of a minibatch."""
        return self.batch_size or 0

    @property
    def bytes_per_chain(self) -> int:
        """Some vectors, and the activations of the smallest batch that is still efficient."""
        rows = self.batch_size or min(len(self.examples), 256)
        vector = self.space.size * torch.finfo(self.dtype).bits // 8
        return _VECTORS * vector + 3 * rows * self.activation_bytes

    @cached_property
    def activation_bytes(self) -> int:
        """Memory that one example takes on its way through the network."""
        return activation_bytes(self.model, self.examples.select(torch.tensor([0])))

    def value(self, vectors: Float[Tensor, "chains P"]) -> Float[Tensor, " chains"]:
        """``U``; see `Potential.value`."""
        with torch.no_grad():
            total = self._regulariser(vectors)
            for table in self._tables(len(vectors)):
                total = total + self.inverse_temperature * self._loss_sum(vectors, table)
        return total

    def value_and_gradient(
        self, vectors: Float[Tensor, "chains P"]
    ) -> tuple[Float[Tensor, " chains"], Float[Tensor, "chains P"]]:
        """``U`` and its gradient; see `Potential.value_and_gradient`."""
        value, gradient = _differentiated(self._regulariser, vectors)
        for table in self._tables(len(vectors)):
            part, slope = _differentiated(partial(self._loss_sum, table=table), vectors)
            value = value + self.inverse_temperature * part
            gradient = gradient + self.inverse_temperature * slope
        return value, gradient

    def stochastic_value_and_gradient(
        self, vectors: Float[Tensor, "chains P"], uniforms: Float[Tensor, "chains uniforms"]
    ) -> tuple[Float[Tensor, " chains"], Float[Tensor, "chains P"]]:
        """Estimates from minibatches; see `Potential.stochastic_value_and_gradient`."""
        if self.batch_size is None:
            return self.value_and_gradient(vectors)
        batch = self.minibatch(uniforms)
        weight = self.inverse_temperature * len(self.examples) / self.batch_size
        value, gradient = _differentiated(self._regulariser, vectors)
        part, slope = _differentiated(partial(self._batch_loss_sum, table=batch), vectors)
        if self.control_variate:
            anchors = self.model.vector.expand_as(vectors)
            known, slope_there = _differentiated(
                partial(self._batch_loss_sum, table=batch), anchors
            )
            whole, whole_slope = self._at_anchor
            value = value + self.inverse_temperature * whole + weight * (part - known)
            slopes = self.inverse_temperature * whole_slope + weight * (slope - slope_there)
            return value, gradient + slopes
        return value + weight * part, gradient + weight * slope

    def losses(self, vectors: Float[Tensor, "chains P"]) -> Float[Tensor, " chains"]:
        """Mean loss over all examples, without prior, temperature and localisation.

        Parameters
        ----------
        vectors
            ``(chains, P)``.

        Returns
        -------
        Tensor
            ``(chains,)`` float64.
        """
        with torch.no_grad():
            parts = [self._loss_sum(vectors, table) for table in self._tables(len(vectors))]
        return torch.stack(parts).sum(0) / len(self.examples)

    def minibatch(self, uniforms: Float[Tensor, "chains uniforms"]) -> Table:
        """The examples that random numbers choose, with replacement.

        Parameters
        ----------
        uniforms
            ``(chains, batch_size)`` in ``[0, 1)``.

        Returns
        -------
        Table
            Columns ``(chains, batch_size, ...)``.
        """
        count = len(self.examples)
        indices = (uniforms * count).long().clamp(max=count - 1)
        held = self._held
        if held is not None:
            return held.map(lambda column: column[indices])
        read = self.examples.select(indices.flatten())
        table = Table(read.inputs, self._checked(read.inputs, read.targets))
        return table.map(lambda column: column.unflatten(0, tuple(indices.shape)))

    def start(
        self, initial: Mapping[str, Tensor] | None, normals: Float[Tensor, "chains P"]
    ) -> Float[Tensor, "chains P"]:
        """Without `initial`: at the network's weights if it is localised, else from the prior."""
        if initial is not None:
            return self.space.ravel(initial).to(self.dtype)
        if self.localization > 0:
            return self.model.vector.expand_as(normals).clone()
        if not bool((self.prior_precision > 0).all()):
            raise OptionError(
                "a flat prior has no draws to start from",
                where="initial",
                advice="Give initial=..., a positive prior_precision, or a localization.",
            )
        return normals * self.prior_precision.rsqrt()

    def identity(self) -> dict[str, Any]:
        """Fingerprints of network, data and loss, and the settings."""
        loss: Any
        if isinstance(self.loss, Likelihood):
            loss = self.loss.to_config()
        else:
            probes = self.model.vector[None] + torch.tensor([[0.0], [_PROBE]]).to(self.model.vector)
            loss = list(map(repr, self.losses(probes).tolist()))
        return {
            "kind": "network",
            "network": self.model.fingerprint(),
            "data": self.examples.fingerprint(),
            "loss": loss,
            "prior": fingerprint({"precision": self.prior_precision}),
            "inverse_temperature": self.inverse_temperature,
            "localization": self.localization,
            "batch_size": self.batch_size,
            "control_variate": self.control_variate,
        }

    @cached_property
    def _at_anchor(self) -> tuple[Tensor, Tensor]:
        """Sum of the losses at ``w*`` and its gradient, over all examples."""
        here = self.model.vector[None]
        value, slope = torch.zeros(1, dtype=torch.float64, device=self.device), here * 0
        for table in self._tables(1):
            part, gradient = _differentiated(partial(self._loss_sum, table=table), here)
            value, slope = value + part, slope + gradient
        return value, slope

    @cached_property
    def _held(self) -> Table | None:
        """All data, when they are small enough to keep on the device."""
        first = self.examples.select(torch.tensor([0]))
        bytes_each = Table(first.inputs, first.targets).bytes_per_example
        if bytes_each * len(self.examples) > _HELD_BYTES:
            return None
        (batch,) = self.examples.batches(len(self.examples))
        return Table(batch.inputs, self._checked(batch.inputs, batch.targets))

    def _tables(self, chains: int) -> Iterator[Table]:
        """All data in pieces whose activations for all chains fit the workspace."""
        count = len(self.examples)
        rows = max(1, min(count, self.workspace // (self.activation_bytes * max(chains, 1))))
        if self._held is not None:
            held = self._held
            for first in range(0, count, rows):
                yield held.map(partial(_rows, start=first, stop=first + rows))
            return
        for batch in self.examples.batches(rows):
            yield Table(batch.inputs, self._checked(batch.inputs, batch.targets))

    def _checked(self, inputs: Inputs, targets: Tensor | None) -> Tensor:
        if targets is None:
            raise DataError(
                "the data have no targets", where="data", advice="Give (inputs, targets)."
            )
        if not isinstance(self.loss, Likelihood):
            return targets
        # Shapes come from a single example: the outputs of all may not fit into memory.
        one = Table(inputs, None).map(lambda column: column[:1]).inputs
        shape = self.model.predict(one).shape[1:]
        like = torch.empty((), dtype=self.dtype, device=self.device).expand(len(targets), *shape)
        return self.loss.check_targets(like, targets, self.examples.name)

    def _loss_sum(self, vectors: Tensor, table: Table) -> Tensor:
        """Of the same examples for all chains, ``(chains,)``."""
        assert table.targets is not None
        parameters = self.space.unravel(vectors)
        outputs = vmap(lambda p: self.model(p, table.inputs))(parameters)
        if isinstance(self.loss, Likelihood):
            found = -self.loss.log_prob(outputs, table.targets)
        else:
            found = vmap(self.loss, in_dims=(0, None))(outputs, table.targets)
        return found.sum(-1, dtype=torch.float64)

    def _batch_loss_sum(self, vectors: Tensor, table: Table) -> Tensor:
        """Of examples that each chain has for itself, ``(chains,)``."""
        assert table.targets is not None
        outputs = vmap(self.model)(self.space.unravel(vectors), table.inputs)
        if isinstance(self.loss, Likelihood):
            found = -vmap(self.loss.log_prob)(outputs, table.targets)
        else:
            found = vmap(self.loss)(outputs, table.targets)
        return found.sum(-1, dtype=torch.float64)

    def _regulariser(self, vectors: Tensor) -> Tensor:
        squares = (self.prior_precision * vectors.square()).sum(-1, dtype=torch.float64)
        if self.localization:
            away = (vectors - self.model.vector).square().sum(-1, dtype=torch.float64)
            squares = squares + self.localization * away
        return 0.5 * squares


def _rows(column: Tensor, start: int, stop: int) -> Tensor:
    return column[start:stop]


def _differentiated(
    function: Callable[[Tensor], Tensor], vectors: Tensor
) -> tuple[Float[Tensor, " chains"], Float[Tensor, "chains P"]]:
    """Values and gradients, by one backward pass for all chains: no chain sees another."""
    with torch.enable_grad():
        point = vectors.detach().requires_grad_()
        values = function(point)
        (gradient,) = torch.autograd.grad(values.sum(), point)
    return values.detach(), gradient


def _precisions(space: ParameterSpace, given: float | Mapping[str, float]) -> Float[Tensor, " P"]:
    """One number for each entry of the parameters.

    Returns
    -------
    Tensor
        ``(P,)`` float64.

    Raises
    ------
    OptionError
        For a number out of range, or a parameter that no pattern names.
    """
    entries = given.items() if isinstance(given, Mapping) else [("*", given)]
    found: dict[str, float] = {}
    for pattern, value in entries:
        if not isinstance(value, float | int) or not isfinite(value) or value < 0:
            raise OptionError(
                f"{value!r} is no precision",
                where="prior_precision",
                advice="Give a number from 0 on, in inverse squared units of the weights.",
            )
        found |= dict.fromkeys(
            match_names(space.names, pattern, where="prior_precision"), float(value)
        )
    missing = [name for name in space.names if name not in found]
    if missing:
        raise OptionError(
            f"no pattern names {', '.join(missing)}",
            where="prior_precision",
            advice="Add a pattern for them; '*' matches everything.",
        )
    values = torch.tensor([found[name] for name in space.names], dtype=torch.float64)
    return torch.repeat_interleave(values, torch.tensor(space.sizes))


def _check_loss(model: FunctionalModel, examples: Examples, loss: Loss) -> None:
    """Refuse networks that are not functions, and losses that are not one number an example."""
    check_problem(model, examples)
    batch = examples.select(torch.arange(min(len(examples), 8)))
    assert batch.targets is not None
    outputs = model.predict(batch.inputs)
    try:
        found = loss(outputs, batch.targets)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise NetworkError(
            f"the loss cannot take outputs {tuple(outputs.shape)} and targets "
            f"{tuple(batch.targets.shape)}: {error}",
            where="loss",
            advice="It is called with the outputs and targets of a batch.",
        ) from error
    if not isinstance(found, Tensor) or tuple(found.shape) != (len(batch),):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise OptionError(
            f"the loss returned {shape} for {len(batch)} examples",
            where="loss",
            advice="Return one number an example: reduction='none', summed over outputs.",
        )
    # The classic is (B, 1) against (B,), which broadcasts every output against every target.
    alone = loss(outputs[:1], batch.targets[:1])
    if tuple(alone.shape) != (1,) or not torch.allclose(
        alone, found[:1], 1e-3, 1e-6, equal_nan=True
    ):
        raise OptionError(
            f"the loss of an example depends on the other examples: {float(found[0]):.4g} among "
            f"{len(batch)}, {float(alone.flatten()[0]):.4g} alone",
            where="loss",
            advice=f"Check that outputs {tuple(outputs.shape)} and targets "
            f"{tuple(batch.targets.shape)} do not broadcast against each other, and that nothing "
            "is averaged over the batch.",
        )
    if not bool(torch.isfinite(found).all()):
        raise DataError(
            "the loss is not finite at the network's weights",
            where="loss",
            advice="Check targets and outputs.",
        )
