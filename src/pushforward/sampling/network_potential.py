"""The posterior of a network's parameters as a potential: data, batches, prior, localisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, final, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pushforward.errors import DataError, OptionError
from pushforward.networks.batches import Inputs, Table
from pushforward.networks.data import Examples
from pushforward.networks.likelihoods import Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.networks.parameters import ParameterSpace, match_names
from pushforward.networks.problem import activation_bytes, check_loss, check_problem
from pushforward.options import choice, number, whole_number
from pushforward.runs.store import fingerprint
from pushforward.sampling.potential import (
    PROBE,
    VECTORS,
    ControlVariate,
    Loss,
    Potential,
    curved,
    differentiated,
)
from pushforward.typing import Params

__all__ = ["NetworkPotential", "build_network_potential"]

_WORKSPACE = {"cpu": 2**25, "cuda": 2**30}  # bytes of activations: what caches hold
_MEASURED = ("_held", "activation_bytes", "anchor_losses", "_anchor_gradient")
_HELD_BYTES = 2**31  # data up to this size stay on the device


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
    prior_precision, localization
        ``(P,)``, in the dtype of the network.
    inverse_temperature, batch_size, control_variate, workspace
        As in `Potential.of_network`.
    """

    model: FunctionalModel
    examples: Examples
    loss: Likelihood | Loss
    prior_precision: Float[Tensor, " P"]
    inverse_temperature: float
    localization: Float[Tensor, " P"]
    batch_size: int | None = None
    control_variate: ControlVariate = "none"
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
        return VECTORS * vector + 3 * rows * self.activation_bytes

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
        value, gradient = self._regulariser(vectors), self._regulariser_gradient(vectors)
        for table in self._tables(len(vectors)):
            part, slope = differentiated(partial(self._loss_sum, table=table), vectors)
            value = value + self.inverse_temperature * part
            gradient = gradient + self.inverse_temperature * slope
        return value, gradient

    def curvature_product(
        self, points: Float[Tensor, "chains P"], vectors: Float[Tensor, "chains P"]
    ) -> Float[Tensor, "chains P"]:
        """Products with the Hessian; see `Potential.curvature_product`."""
        product = (self.prior_precision + self.localization) * vectors
        for table in self._tables(len(points)):
            part = curved(partial(self._loss_sum, table=table), points, vectors)
            product = torch.add(product, part, alpha=self.inverse_temperature)
        return product

    def stochastic_value_and_gradient(
        self, vectors: Float[Tensor, "chains P"], uniforms: Float[Tensor, "chains uniforms"]
    ) -> tuple[Float[Tensor, " chains"], Float[Tensor, "chains P"]]:
        """Estimates from minibatches; see `Potential.stochastic_value_and_gradient`."""
        if self.batch_size is None:
            return self.value_and_gradient(vectors)
        chosen = self._choose(uniforms)
        batch = self._take(chosen)
        weight = self.inverse_temperature * len(self.examples) / self.batch_size
        value, gradient = self._regulariser(vectors), self._regulariser_gradient(vectors)
        part, slope = differentiated(partial(self._batch_loss_sum, table=batch), vectors)
        if self.control_variate != "none":
            known = self.anchor_losses[chosen].sum(-1)
            part = part - known + self.batch_size * self.anchor_losses.mean()
        if self.control_variate == "gradient":
            anchors = self.model.vector.expand_as(vectors)
            _, slope_there = differentiated(partial(self._batch_loss_sum, table=batch), anchors)
            slope = slope - slope_there + self.batch_size * self._anchor_gradient
        # In place: both are fresh, and as long as all chains together.
        return value + weight * part, gradient.add_(slope, alpha=weight)

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

    def example_losses(self, parameters: Params, *, at_once: int = 1) -> Float[Tensor, " examples"]:
        """The loss of every example, for one set of parameters.

        Parameters
        ----------
        parameters
            ``(*shape)`` by name.
        at_once
            How many sets `torch.func.vmap` takes through this at a time; it bounds the memory.

        Returns
        -------
        Tensor
            ``(N,)`` in the dtype of the outputs.
        """
        tables = self._tables(at_once)
        return torch.cat([self._losses(parameters, t.inputs, t.targets) for t in tables])

    def localized(self, localization: float | Float[Tensor, " P"]) -> NetworkPotential:
        """The same with another spring; what was read and measured of the data is kept.

        Parameters
        ----------
        localization
            ``gamma``: a number, or one for each parameter, ``(P,)``.

        Returns
        -------
        NetworkPotential
            Of the same network and data.
        """
        found = replace(
            self, localization=_localizations(self.space, localization).to(self.model.vector)
        )
        found.keep(self)
        return found

    def keep(self, other: NetworkPotential) -> None:
        """Take over what another potential of the same network and data has read and measured."""
        for name in _MEASURED:
            if name in other.__dict__:
                self.__dict__[name] = other.__dict__[name]

    def on_part(self, count: int) -> NetworkPotential:
        """The same energy estimated from examples spread evenly over the data, without minibatches.

        Parameters
        ----------
        count
            How many; all if there are no more.

        Returns
        -------
        NetworkPotential
            Whose temperature makes up for the examples left out.
        """
        total = len(self.examples)
        if total <= count:
            return replace(self, batch_size=None)
        at = torch.linspace(0, total - 1, count, dtype=torch.float64).round().long()
        batch = self.examples.select(at)
        part = Examples.read((batch.inputs, batch.targets), device=self.device)
        weight = self.inverse_temperature * total / count
        return replace(self, examples=part, inverse_temperature=weight, batch_size=None)

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
        return self._take(self._choose(uniforms))

    def _choose(self, uniforms: Tensor) -> Int[Tensor, "chains batch"]:
        count = len(self.examples)
        return (uniforms * count).long().clamp(max=count - 1)

    def _take(self, indices: Int[Tensor, "chains batch"]) -> Table:
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
        if bool((self.localization > 0).all()):
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
            probes = self.model.vector[None] + torch.tensor([[0.0], [PROBE]]).to(self.model.vector)
            loss = list(map(repr, self.losses(probes).tolist()))
        return {
            "kind": "network",
            "network": self.model.fingerprint(),
            "data": self.examples.fingerprint(),
            "loss": loss,
            "prior": fingerprint({"precision": self.prior_precision}),
            "inverse_temperature": self.inverse_temperature,
            "localization": fingerprint({"precision": self.localization}),
            "batch_size": self.batch_size,
            "control_variate": self.control_variate,
        }

    @cached_property
    def anchor_losses(self) -> Float[Tensor, " examples"]:
        """The loss of every example at ``w*``, ``(N,)`` float64."""
        with torch.no_grad():
            return self.example_losses(self.model.parameters).double()

    @cached_property
    def _anchor_gradient(self) -> Float[Tensor, " P"]:
        """Gradient of the mean loss at ``w*``, over all examples."""
        here = self.model.vector[None]
        total = torch.zeros_like(here)
        for table in self._tables(1):
            total = total + differentiated(partial(self._loss_sum, table=table), here)[1]
        return total[0] / len(self.examples)

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

    def _losses(
        self, parameters: Params, inputs: Inputs, targets: Tensor | None
    ) -> Float[Tensor, " batch"]:
        assert targets is not None
        # Fused kernels of attention have no second derivative, and no way to run side by side.
        with sdpa_kernel(SDPBackend.MATH):
            outputs = self.model(parameters, inputs)
        if isinstance(self.loss, Likelihood):
            return -self.loss.log_prob(outputs, targets)
        return self.loss(outputs, targets)

    def _loss_sum(self, vectors: Tensor, table: Table) -> Tensor:
        """Of the same examples for all chains, ``(chains,)``."""
        found = vmap(self._losses, in_dims=(0, None, None))(
            self.space.unravel(vectors), table.inputs, table.targets
        )
        return found.sum(-1, dtype=torch.float64)

    def _batch_loss_sum(self, vectors: Tensor, table: Table) -> Tensor:
        """Of examples that each chain has for itself, ``(chains,)``."""
        parameters = self.space.unravel(vectors)
        if self._takes_batches_apart:
            found = vmap(self._losses)(parameters, table.inputs, table.targets)
            return found.sum(-1, dtype=torch.float64)
        parts = []
        for chain in range(len(vectors)):
            own = table.map(partial(_rows_of, chain=chain))
            each = {name: value[chain] for name, value in parameters.items()}
            parts.append(self._losses(each, own.inputs, own.targets).sum(dtype=torch.float64))
        return torch.stack(parts)

    @cached_property
    def _takes_batches_apart(self) -> bool:
        """Whether the network can run side by side on batches that differ."""
        # Some look at the values of their inputs to decide what to do, such as whether a mask masks
        # anything; their chains take turns.
        batch = self.examples.select(torch.zeros(2, dtype=torch.long))
        table = Table(batch.inputs, self._checked(batch.inputs, batch.targets))
        table = table.map(lambda column: column.unflatten(0, (2, 1)))
        parameters = {k: p.expand(2, *p.shape) for k, p in self.model.parameters.items()}
        try:
            with torch.no_grad():
                vmap(self._losses)(parameters, table.inputs, table.targets)
        except RuntimeError as error:
            return "data-dependent control flow" not in str(error)  # what else it is, a step says
        return True

    def _regulariser(self, vectors: Tensor) -> Tensor:
        away = vectors - self.model.vector
        terms = self.prior_precision * vectors.square() + self.localization * away.square()
        return 0.5 * terms.sum(-1, dtype=torch.float64)

    def _regulariser_gradient(self, vectors: Tensor) -> Tensor:
        return self.prior_precision * vectors + self.localization * (vectors - self.model.vector)


def build_network_potential(
    net: nn.Module | FunctionalModel,
    data: Any,
    loss: Likelihood | Loss,
    *,
    prior_precision: float | Mapping[str, float],
    inverse_temperature: float,
    localization: float | Tensor,
    batch_size: int | None,
    control_variate: ControlVariate,
    subset: str | Iterable[str] | None,
    workspace: int | None,
) -> NetworkPotential:
    """Check what users give; see `Potential.of_network`.

    Returns
    -------
    NetworkPotential
        Of the network, the data and the loss.

    Raises
    ------
    OptionError
        For an option out of range.
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
        check_loss(model, examples, loss)
    inverse_temperature = number(inverse_temperature, "inverse_temperature", least=0)
    choice(control_variate, "control_variate", get_args(ControlVariate))
    if batch_size is not None:
        advice = f"Give a whole number from 1 to {len(examples)}, or None for all examples."
        batch_size = whole_number(batch_size, "batch_size", most=len(examples), advice=advice)
    if workspace is not None:
        workspace = whole_number(workspace, "workspace")
    return NetworkPotential(
        model,
        examples,
        loss,
        _precisions(model.space, prior_precision).to(model.vector),
        inverse_temperature,
        _localizations(model.space, localization).to(model.vector),
        batch_size,
        control_variate,
        _WORKSPACE.get(model.device.type, 2**27) if workspace is None else workspace,
    )


def _rows_of(column: Tensor, chain: int) -> Tensor:
    return column[chain]


def _rows(column: Tensor, start: int, stop: int) -> Tensor:
    return column[start:stop]


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
    advice = "Give a number from 0 on, in inverse squared units of the weights."
    for pattern, value in entries:
        names = match_names(space.names, pattern, where="prior_precision")
        found |= dict.fromkeys(names, number(value, "prior_precision", least=0, advice=advice))
    missing = [name for name in space.names if name not in found]
    if missing:
        raise OptionError(
            f"no pattern names {', '.join(missing)}",
            where="prior_precision",
            advice="Add a pattern for them; '*' matches everything.",
        )
    values = torch.tensor([found[name] for name in space.names], dtype=torch.float64)
    return torch.repeat_interleave(values, torch.tensor(space.sizes))


def _localizations(space: ParameterSpace, given: float | Tensor) -> Float[Tensor, " P"]:
    values = torch.as_tensor(given, dtype=torch.float64)
    fits = values.dim() == 0 or tuple(values.shape) == (space.size,)
    if not fits or not bool((torch.isfinite(values) & (values >= 0)).all()):
        shown = f"{given!r}" if values.dim() == 0 else f"a tensor {tuple(values.shape)}"
        raise OptionError(
            f"{shown} is out of range",
            where="localization",
            advice=f"Give a number from 0 on, or one for each of the {space.size:,} parameters.",
        )
    return values.expand(space.size).clone()
