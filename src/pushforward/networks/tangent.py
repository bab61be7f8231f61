"""The tangent of a network in its parameters: products with its Jacobian, many vectors at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from pushforward.errors import NetworkError, PushforwardError
from pushforward.networks.model import FunctionalModel, Inputs
from pushforward.typing import Params

__all__ = ["Tangent"]

_RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})
_BLOCK = 16  # examples pulled back together where they cannot be vectorised
_FINAL = (PushforwardError, Warning, torch.OutOfMemoryError, MemoryError)  # no way around these


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

    Notes
    -----
    All methods raise a `NetworkError` when the network cannot take the inputs, was brought into
    training mode, or has operations that torch cannot differentiate in this way.
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
        with self._differentiated(inputs), warnings.catch_warnings():
            # The first forward derivative imports a part of torch that torch itself deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                return vmap(forward, chunk_size=self.chunk)(directions)
            except _FINAL:
                raise
            except Exception:
                # Not only for want of a forward derivative: here the network itself sees one set
                # of parameters, so that it may branch on values or write into buffers.
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
        with self._differentiated(inputs):
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
        with self._differentiated(inputs):
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

        with self._differentiated(inputs):
            try:
                return space.ravel(vmap(one)(inputs))
            except _FINAL:
                raise
            except Exception as error:
                if _is_random(error):  # one after the other, chance would pass unnoticed
                    raise
                # Recurrent layers and writes into buffers cannot be vectorised over examples. What
                # fails for another reason fails again. The attempt is repeated with every batch:
                # it ends within the first pass, and costs little beside what follows.
                return torch.cat([self._jacobian_of(block) for block in _blocks(inputs)])

    def _jacobian_of(self, inputs: Inputs) -> Float[Tensor, "B C P"]:
        """Of a few examples: every output of all of them is pulled back through the whole batch.

        Returns
        -------
        Tensor
            ``(B, C, P)``, for B times the arithmetic, and one pass.
        """
        outputs, pull, *_ = vjp(self._at(inputs), self.model.parameters)
        units = torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device)
        rows = vmap(lambda u: pull(u)[0])(units.reshape(-1, *outputs.shape))
        return self.model.space.ravel(rows).reshape(len(outputs), -1, self.model.space.size)

    def _at(self, inputs: Inputs) -> Callable[[Params], Tensor]:
        def value(parameters: Params) -> Tensor:
            # Fused kernels of attention have neither a forward nor a second derivative.
            with sdpa_kernel(SDPBackend.MATH), _PlainRecurrence():
                return self.model(parameters, inputs)

        return value

    @contextmanager
    def _differentiated(self, inputs: Inputs) -> Iterator[None]:
        """Without a graph of autograd's own, and with errors that say what is wrong.

        Yields
        ------
        None
            While derivatives are taken.

        Raises
        ------
        NetworkError
            For whatever torch or the network raises, except for want of memory.
        """
        self.model.check_mode()
        try:
            with torch.no_grad():
                yield
        except _FINAL:
            raise
        except Exception as error:  # a network may raise anything
            self.model.predict(inputs)  # names what is no matter of derivatives
            raise NetworkError(
                f"its derivative cannot be taken: {type(error).__name__}: {error}",
                where=self.model.name,
                advice=_advice(error),
            ) from error


class _PlainRecurrence(TorchFunctionMode):
    """Recurrent layers by operations of torch's own, which have all derivatives.

    Those of the libraries (oneDNN on CPUs, cuDNN) have some of them, in training mode only. The
    rest of the network keeps its libraries.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in _RECURRENT:
            return func(*args, **(kwargs or {}))
        # Not by the context managers of torch, which also set, and warn of, flags for TF32.
        backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
        before = [backend.enabled for backend in backends]
        try:
            for backend in backends:
                backend.enabled = False
            return func(*args, **(kwargs or {}))
        finally:
            for backend, enabled in zip(backends, before, strict=True):
                backend.enabled = enabled


def _is_random(error: Exception) -> bool:
    return "randomness" in str(error)


def _advice(error: Exception) -> str:
    if _is_random(error):
        return "Remove chance from the forward pass (dropout, noise): net.eval()."
    if "setup_context" in str(error):
        return (
            "Give the torch.autograd.Function a static method setup_context, as torch's notes on "
            "extending torch.func describe."
        )
    return (
        "Every operation on the uncertain parameters needs a derivative that torch.func can take."
    )


def _blocks(inputs: Inputs) -> Iterator[Any]:
    """A batch in parts.

    Yields
    ------
    Tensor, tuple or dict
        Of few examples each.
    """
    for first in range(0, _length(inputs), _BLOCK):
        rows = slice(first, first + _BLOCK)
        yield _map_tensors(itemgetter(rows), inputs)


def _length(inputs: Any) -> int:
    """How many examples."""
    while not isinstance(inputs, Tensor):
        inputs = inputs[0] if isinstance(inputs, tuple) else next(iter(inputs.values()))
    return len(inputs)


def _map_tensors(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, tuple):
        return tuple(_map_tensors(function, item) for item in inputs)
    return {key: _map_tensors(function, item) for key, item in inputs.items()}
