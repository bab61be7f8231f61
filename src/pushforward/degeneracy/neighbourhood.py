"""The law that is sampled: weights near a solution, at a temperature, held there by a spring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.errors import DataError, OptionError
from pushforward.networks.batches import Table
from pushforward.networks.data import Examples
from pushforward.networks.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.networks.parameters import match_names
from pushforward.runs.rng import stream
from pushforward.sampling.curvature import curvature_traces
from pushforward.sampling.network_potential import NetworkPotential
from pushforward.sampling.potential import Loss, Potential
from pushforward.typing import Params

__all__ = ["Metric", "Neighbourhood", "default_nbeta"]

Metric: TypeAlias = Literal["euclidean", "layerwise"]

_DEFAULT_BATCH = 256
_NO_SLOPE = 1e-3  # relative to that one unit away
_PROBES = 4  # of the trace of each tensor's curvature
PROBED_EXAMPLES = 2048  # that stand for all where curvature is measured


def default_nbeta(num_examples: int) -> float:
    """``n beta = n / ln n``, the temperature at which the widely applicable criterion holds.

    Parameters
    ----------
    num_examples
        ``n``, of the whole data set, whatever the batch.

    Returns
    -------
    float
        Watanabe (2013), for ``n`` of at least 3.

    Examples
    --------
    >>> round(default_nbeta(1000), 2)
    144.76
    """
    return num_examples / log(max(num_examples, 3))


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """``exp(-n beta L(w) - gamma |(w - w*) / s|^2 / 2)``.

    Parameters
    ----------
    potential
        Minus its logarithm.
    nbeta
        ``n beta``.
    localization
        ``gamma``.
    scale
        ``s``, ``(P,)``: 1 in the Euclidean metric.
    metric
        From which it comes.
    realisable
        Whether the targets are the network's own outputs.
    """

    potential: NetworkPotential
    nbeta: float
    localization: float
    scale: Float[Tensor, " P"]
    metric: Metric
    realisable: bool = False

    @classmethod
    def of(
        cls,
        net: nn.Module | FunctionalModel,
        data: Any,
        loss: Likelihood | Loss,
        *,
        nbeta: float | None,
        localization: float | None,
        metric: Metric,
        batch_size: int | None,
        subset: str | Iterable[str] | None,
        realisable: bool,
        seed: int,
    ) -> Neighbourhood:
        """Check what users give, and measure the scale.

        Returns
        -------
        Neighbourhood
            With ``gamma = 1`` where no localisation was given.

        Raises
        ------
        OptionError
            For an option out of range.
        """
        if isinstance(loss, Gaussian) and loss.noise_variance is None:
            raise OptionError(
                "its noise variance is to be learned",
                where="loss",
                advice="Give pf.Gaussian(noise_variance=...): the loss must be a fixed function.",
            )
        model = _every_parameter(net, subset)
        examples = Examples.read(data, device=model.device)
        if realisable:
            examples, loss = _realised(model, examples, loss)
        count = len(examples)
        nbeta = default_nbeta(count) if nbeta is None else float(nbeta)
        size = min(count, _DEFAULT_BATCH) if batch_size is None else batch_size
        potential = Potential.of_network(
            model,
            examples,
            loss,
            prior_precision=0.0,
            inverse_temperature=nbeta / count,
            batch_size=size,
            control_variate="value",
        )
        if size == count:
            potential = replace(potential, batch_size=None)
        scale = torch.ones_like(model.vector)
        if metric == "layerwise":
            scale = _layerwise_scale(potential, seed)
        gamma = 1.0 if localization is None else float(localization)
        return cls(potential, nbeta, 0.0, scale, metric, realisable).localized(gamma)

    def localized(self, localization: float) -> Neighbourhood:
        """The same with another spring.

        Parameters
        ----------
        localization
            ``gamma``.

        Returns
        -------
        Neighbourhood
            Of the same network and data.
        """
        potential = self.potential.localized(localization / self.scale.square())
        return replace(self, potential=potential, localization=localization)

    def corrected(self) -> Neighbourhood:
        """The same with stochastic gradients that are corrected by those at ``w*``.

        Returns
        -------
        Neighbourhood
            Of the same law.
        """
        potential = replace(self.potential, control_variate="gradient")
        potential.keep(self.potential)
        return replace(self, potential=potential)

    @property
    def centre(self) -> Float[Tensor, " P"]:
        """``w*``."""
        return self.potential.model.vector

    @property
    def num_examples(self) -> int:
        """``n``."""
        return len(self.potential.examples)

    @property
    def num_parameters(self) -> int:
        """``P``, of those that are sampled."""
        return self.potential.space.size

    @property
    def euclidean(self) -> bool:
        """Whether all scales are 1."""
        return self.metric == "euclidean"

    @property
    def logarithms(self) -> bool:
        """Whether losses are minus logarithms of probabilities of the data."""
        return isinstance(self.potential.loss, Likelihood) and not self.realisable

    @cached_property
    def initial_loss(self) -> float:
        """``L(w*)``, a mean over all examples."""
        return float(self.potential.anchor_losses.mean())

    @cached_property
    def on_all_data(self) -> NetworkPotential:
        """The same energy without minibatches."""
        found = replace(self.potential, batch_size=None)
        found.keep(self.potential)
        return found

    @cached_property
    def probed(self) -> NetworkPotential:
        """The same energy, on part of the data where there are many, for its curvature."""
        return self.potential.on_part(PROBED_EXAMPLES)

    def squared_distances(self, parameters: Params) -> Float[Tensor, " chains"]:
        """``|(w - w*) / s|^2``.

        Parameters
        ----------
        parameters
            ``(chains, *shape)`` by name.

        Returns
        -------
        Tensor
            ``(chains,)`` float64.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.centre.device)
        for name, at in self.potential.space.slices.items():
            away = parameters[name].flatten(1) - self.centre[at]
            if not self.euclidean:
                away = away / self.scale[at]
            total = total + away.square().sum(1, dtype=torch.float64)
        return total

    def virials(self, parameters: Params) -> Float[Tensor, " chains"]:
        """``(w - w*) . grad U`` on all data, whose mean in equilibrium is the number of parameters.

        That holds for every law that vanishes far away, by integration by parts, and it is about
        all directions, where the loss forgets those that are flat.

        Parameters
        ----------
        parameters
            ``(chains, *shape)`` by name.

        Returns
        -------
        Tensor
            ``(chains,)`` float64.
        """
        vectors = self.potential.space.ravel(parameters)
        _, gradient = self.on_all_data.value_and_gradient(vectors)
        return ((vectors - self.centre) * gradient).sum(1, dtype=torch.float64)

    def excess(
        self, potential: Float[Tensor, "*draws"], squared_distance: Float[Tensor, "*draws"]
    ) -> Float[Tensor, "*draws"]:
        """``n beta (L(w) - L(w*))`` from what a run has recorded.

        Parameters
        ----------
        potential
            ``U`` of the draws, float64.
        squared_distance
            Theirs.

        Returns
        -------
        Tensor
            Of the same shape. Its mean is the learning coefficient.
        """
        return (
            potential - self.nbeta * self.initial_loss - 0.5 * self.localization * squared_distance
        )


def _every_parameter(
    net: nn.Module | FunctionalModel, subset: str | Iterable[str] | None
) -> FunctionalModel:
    """Scale and shift of normalisation layers count here: they are weights like all others."""
    if isinstance(net, FunctionalModel) or not isinstance(net, nn.Module):
        return FunctionalModel.of(net, subset)
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    names = names or [name for name, _ in net.named_parameters()]
    chosen = tuple(names) if subset is None else match_names(tuple(names), subset)
    return FunctionalModel.of(net, chosen)


def _realised(
    model: FunctionalModel, examples: Examples, loss: Likelihood | Loss
) -> tuple[Examples, Likelihood | Loss]:
    """The network's own outputs as targets: ``w*`` is then a minimum whatever the training did.

    Returns
    -------
    tuple
        Data, and the expected loss under the network's own predictions.

    Raises
    ------
    OptionError
        When the likelihood cannot take a prediction for a target.
    """
    batches = list(examples.batches(PROBED_EXAMPLES))
    outputs = torch.cat([model.predict(batch.inputs) for batch in batches])
    inputs = _joined([batch.inputs for batch in batches])
    own = Examples.read((inputs, outputs), device=model.device)
    if isinstance(loss, Categorical):
        return own, _soft_cross_entropy
    if isinstance(loss, Bernoulli):
        return own, _soft_binary_cross_entropy
    if isinstance(loss, Gaussian):
        return own, loss
    if not isinstance(loss, Likelihood):
        _check_own_targets(loss, outputs)
        return own, loss
    raise OptionError(
        f"{type(loss).__name__} has no expected loss under the network's own predictions",
        where="realisable",
        advice="Take a Gaussian, Categorical or Bernoulli likelihood, or give the outputs as "
        "targets and a loss of your own.",
    )


def _check_own_targets(loss: Loss, outputs: Tensor) -> None:
    """Refuse a loss that does not take outputs for targets, as one of logits and labels."""
    some = outputs[:64]
    moved = some.clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss(moved, some).sum(), moved)
    there = (some + 1).requires_grad_()
    with torch.enable_grad():
        (usual,) = torch.autograd.grad(loss(there, some).sum(), there)
    if float(slope.abs().max()) > _NO_SLOPE * float(usual.abs().max()):
        raise OptionError(
            "the loss is not smallest where the outputs equal the targets",
            where="realisable",
            advice="Give a likelihood such as pf.Categorical(), or a loss of outputs and outputs.",
        )


def _soft_cross_entropy(outputs: Tensor, logits: Tensor) -> Float[Tensor, " batch"]:
    terms = logits.softmax(-1) * outputs.log_softmax(-1)
    return -terms.flatten(1).sum(1)


def _soft_binary_cross_entropy(outputs: Tensor, logits: Tensor) -> Float[Tensor, " batch"]:
    terms = nn.functional.softplus(outputs) - torch.sigmoid(logits) * outputs
    return terms.flatten(1).sum(1)


def _joined(parts: list[Any]) -> Any:
    tables = [Table(inputs, None) for inputs in parts]
    columns = [list(table.columns().values()) for table in tables]
    whole = iter([torch.cat(column) for column in zip(*columns, strict=True)])
    return tables[0].map(lambda _: next(whole)).inputs


def _layerwise_scale(potential: NetworkPotential, seed: int) -> Float[Tensor, " P"]:
    """One scale for each tensor, the inverse root of its mean curvature.

    Multiplying a tensor by a number and undoing it elsewhere multiplies its scale by that number,
    so distances and steps in units of the scale do not change. The common factor makes the weights
    themselves as long as if every entry were of size 1.

    Returns
    -------
    Tensor
        ``(P,)``.

    Raises
    ------
    DataError
        When no tensor has any curvature, so that there is nothing to measure scales by.
    """
    part, space = potential.on_part(PROBED_EXAMPLES), potential.space
    where, centre = list(space.slices.values()), potential.model.vector
    generator = stream(seed, "metric")
    curvatures = torch.zeros(len(where), dtype=torch.float64)
    for index, at in enumerate(where):
        # Probes within one tensor: cross terms between tensors would spoil the invariance.
        signs = torch.randint(2, (_PROBES, at.stop - at.start), generator=generator) * 2 - 1
        probes = torch.zeros(_PROBES, space.size).to(centre)
        probes[:, at] = signs.to(centre)
        forms = curvature_traces(part, centre.expand(_PROBES, -1), probes)
        curvatures[index] = float(forms.mean()) / (at.stop - at.start)
    lengths = torch.stack([centre[at].double().square().sum().cpu() for at in where])
    total = (curvatures.clamp(min=0) * lengths).sum()
    if not bool(torch.isfinite(total)) or total <= 0:
        raise DataError(
            "the loss has no curvature in the direction of the weights",
            where="metric='layerwise'",
            advice="Scales of the tensors cannot be told here; take metric='euclidean'.",
        )
    scale = torch.ones_like(centre, dtype=torch.float64)
    for curvature, length, at in zip(curvatures.tolist(), lengths.tolist(), where, strict=True):
        size = at.stop - at.start
        relative = curvature * space.size / float(total)  # inverse square of the scale
        if relative > 0:
            scale[at] = relative**-0.5
        elif length > 0:  # dead, or negative by chance: its own size is all there is
            scale[at] = (length / size) ** 0.5
    return scale.to(centre)
