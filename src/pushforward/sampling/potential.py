"""The energy that samplers walk on: data, their number, temperature, prior and localisation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vmap

from pushforward.errors import OptionError
from pushforward.networks.likelihoods import Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.networks.parameters import ParameterSpace
from pushforward.typing import Params

if TYPE_CHECKING:
    from pushforward.sampling.network_potential import NetworkPotential

__all__ = ["ControlVariate", "DensityPotential", "Loss", "Potential", "curved", "differentiated"]

ControlVariate: TypeAlias = Literal["none", "value", "gradient"]

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Loss of each example: outputs ``(B, *event)`` and targets ``(B, ...)`` to ``(B,)``."""

VECTORS = 12  # of the size of the parameters that a step of one chain works with
PROBE = 0.125  # displacement at which a potential is told from others


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
        localization: float | Tensor = 0.0,
        batch_size: int | None = None,
        control_variate: ControlVariate = "none",
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
            ``gamma``: a number, or one for each parameter, ``(P,)``.
        batch_size
            Examples in the minibatch of a stochastic gradient, drawn anew with replacement for each
            chain and step; None for all.
        control_variate
            What estimates from a minibatch are corrected by. ``"value"``: the value by the losses
            of the same examples at ``w*``, which takes one pass over the data in advance.
            ``"gradient"``: the gradient by theirs too, which lowers its noise near ``w*`` and
            doubles the cost of a step.
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
        from pushforward.sampling.network_potential import build_network_potential

        return build_network_potential(
            net,
            data,
            loss,
            prior_precision=prior_precision,
            inverse_temperature=inverse_temperature,
            localization=localization,
            batch_size=batch_size,
            control_variate=control_variate,
            subset=subset,
            workspace=workspace,
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

    def curvature_product(
        self, points: Float[Tensor, "chains P"], vectors: Float[Tensor, "chains P"]
    ) -> Float[Tensor, "chains P"]:
        """The Hessian of ``U`` at each point times a vector.

        Parameters
        ----------
        points, vectors
            ``(chains, P)``.

        Returns
        -------
        Tensor
            ``(chains, P)``.
        """
        return _difference_quotient(self, points, vectors)

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
        return 4 * VECTORS * self.space.size * torch.finfo(self.dtype).bits // 8

    def value(self, vectors: Float[Tensor, "chains P"]) -> Float[Tensor, " chains"]:
        """``U``; see `Potential.value`."""
        with torch.no_grad():
            return self._energies(vectors)

    def value_and_gradient(
        self, vectors: Float[Tensor, "chains P"]
    ) -> tuple[Float[Tensor, " chains"], Float[Tensor, "chains P"]]:
        """``U`` and its gradient; see `Potential.value_and_gradient`."""
        return differentiated(self._energies, vectors)

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
        values = self.value(torch.cat([here, here + PROBE])).tolist()
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


def differentiated(
    function: Callable[[Tensor], Tensor], vectors: Tensor
) -> tuple[Float[Tensor, " chains"], Float[Tensor, "chains P"]]:
    """Values and gradients, by one backward pass for all chains: no chain sees another.

    Parameters
    ----------
    function
        From ``(chains, P)`` to ``(chains,)``, row by row.
    vectors
        ``(chains, P)``.

    Returns
    -------
    tuple
        ``(chains,)`` and ``(chains, P)``, detached.
    """
    with torch.enable_grad():
        point = vectors.detach().requires_grad_()
        values = function(point)
        (gradient,) = torch.autograd.grad(values.sum(), point)
    return values.detach(), gradient


def curved(
    function: Callable[[Tensor], Tensor], points: Tensor, vectors: Tensor
) -> Float[Tensor, "chains P"]:
    """Products with Hessians by differentiating twice; no chain sees another.

    Parameters
    ----------
    function
        From ``(chains, P)`` to ``(chains,)``, row by row.
    points, vectors
        ``(chains, P)``.

    Returns
    -------
    Tensor
        ``(chains, P)``.
    """
    with torch.enable_grad():
        here = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(here).sum(), here, create_graph=True)
        if not gradient.requires_grad:  # linear: nothing depends on the point any more
            return torch.zeros_like(points)
        (found,) = torch.autograd.grad((gradient * vectors).sum(), here, allow_unused=True)
    return torch.zeros_like(points) if found is None else found


def _difference_quotient(potential: Potential, points: Tensor, vectors: Tensor) -> Tensor:
    """The same from gradients as far apart as rounding asks for."""
    length = vectors.norm(dim=1, keepdim=True).clamp(min=1e-30)
    reach = torch.finfo(points.dtype).eps ** 0.5 * (1 + points.norm(dim=1, keepdim=True))
    _, here = potential.value_and_gradient(points)
    _, there = potential.value_and_gradient(points + reach * vectors / length)
    return (there - here) * (length / reach)
