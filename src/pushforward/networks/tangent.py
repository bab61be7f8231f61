"""The tangent of a network in its parameters: products with its Jacobian, many vectors at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pushforward.networks.model import FunctionalModel, Inputs
from pushforward.typing import Params

__all__ = ["Tangent"]


@dataclass(frozen=True)
class Tangent:
    """``J = df / dparameters`` of a model at its trained parameters, never formed.

    Vectors are stacked on a leading axis and share every pass of the network: a product with ``K``
    vectors runs the network itself once.

    Parameters
    ----------
    model
        The network.
    chunk
        Most vectors taken through the network at a time; None for all. It bounds the memory,
        ``chunk`` times that of the activations of a batch, and changes nothing else.
    """

    model: FunctionalModel
    chunk: int | None = None

    def jvp(self, inputs: Inputs, vectors: Float[Tensor, "K P"]) -> Float[Tensor, "K B *event"]:
        """``J v``: how the outputs of a batch change along directions in parameter space.

        Parameters
        ----------
        inputs
            A batch.
        vectors
            Directions ``(K, P)``.

        Returns
        -------
        Tensor
            ``(K, B, *event)``.
        """
        value = self._at(inputs)
        point = self.model.parameters

        def forward(direction: Params) -> Tensor:
            return jvp(value, (point,), (direction,))[1]

        def twice_reverse(direction: Params) -> Tensor:
            # The transpose of u -> J^T u, for operations without a forward derivative.
            outputs, pull, *_ = vjp(value, point)
            _, push, *_ = vjp(lambda u: pull(u)[0], torch.zeros_like(outputs))
            return push(direction)[0]

        directions = self.model.space.unravel(vectors)
        with torch.no_grad(), warnings.catch_warnings():
            # The first forward derivative imports a part of torch that torch itself deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                return vmap(forward, chunk_size=self.chunk)(directions)
            except NotImplementedError:
                return vmap(twice_reverse, chunk_size=self.chunk)(directions)

    def vjp(self, inputs: Inputs, cotangents: Float[Tensor, "K B *event"]) -> Float[Tensor, "K P"]:
        """``J^T u``, summed over the batch.

        Parameters
        ----------
        inputs
            A batch.
        cotangents
            ``(K, B, *event)``.

        Returns
        -------
        Tensor
            ``(K, P)``.
        """
        with torch.no_grad():
            _, pull, *_ = vjp(self._at(inputs), self.model.parameters)
            gradients = vmap(lambda u: pull(u)[0], chunk_size=self.chunk)(cotangents)
        return self.model.space.ravel(gradients)

    def product(
        self,
        inputs: Inputs,
        vectors: Float[Tensor, "K P"],
        curvature: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Float[Tensor, "K P"], Float[Tensor, "K B *event"]]:
        """``J^T B J v`` summed over a batch, and ``J v`` on the way.

        Parameters
        ----------
        inputs
            A batch.
        vectors
            ``(K, P)``.
        curvature
            ``(outputs, u) -> B u`` with outputs ``(B, *event)`` and u ``(K, B, *event)``.

        Returns
        -------
        tuple
            The product ``(K, P)`` and ``J v`` of shape ``(K, B, *event)``.
        """
        moved = self.jvp(inputs, vectors)
        with torch.no_grad():
            outputs, pull, *_ = vjp(self._at(inputs), self.model.parameters)
            weighted = curvature(outputs, moved)
            gradients = vmap(lambda u: pull(u)[0], chunk_size=self.chunk)(weighted)
        return self.model.space.ravel(gradients), moved

    def jacobian(self, inputs: Inputs) -> Float[Tensor, "B C P"]:
        """The Jacobian of each example, for small problems only.

        Parameters
        ----------
        inputs
            A batch.

        Returns
        -------
        Tensor
            ``(B, C, P)``, the outputs of an example flattened.
        """
        space, parameters = self.model.space, self.model.parameters

        def one(example: Any) -> Params:
            single = _map_tensors(lambda x: x.unsqueeze(0), example)
            return jacrev(lambda p: self._at(single)(p).flatten())(parameters)

        with torch.no_grad():
            return space.ravel(vmap(one)(inputs))

    def _at(self, inputs: Inputs) -> Callable[[Params], Tensor]:
        def value(parameters: Params) -> Tensor:
            # Fused kernels of attention have neither a forward nor a second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                return self.model(parameters, inputs)

        return value


def _map_tensors(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, tuple):
        return tuple(_map_tensors(function, item) for item in inputs)
    return {key: _map_tensors(function, item) for key, item in inputs.items()}
