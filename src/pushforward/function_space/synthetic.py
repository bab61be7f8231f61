"""Distances on synthetic inputs, for any architecture: both networks run, nothing is linearised.

Inputs are drawn from a stored law: Gaussians for continuous inputs, a Markov chain for tokens. Both
sets of weights see the same ones, through their true nonlinearities, so every covariance between
the activations and their differences is there, including those that a propagation of moments
through expected Jacobians leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pushforward.function_space.metrics import Metric, discrepancy
from pushforward.function_space.network import ReferenceNetwork, select_outputs
from pushforward.function_space.synthetic_inputs import SyntheticInputs
from pushforward.options import whole_number
from pushforward.typing import Params

__all__ = [
    "SyntheticDistance",
    "SyntheticRun",
    "plain_attention",
]

Adjustment: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of outputs of the reference and their changes, before a metric looks at them."""

_CHUNK = 1024  # samples whose activations are held at once


@dataclass(frozen=True, eq=False)
class SyntheticDistance:
    """A distance as a mean over synthetic inputs.

    Parameters
    ----------
    value
        Scalar in the dtype of the other weights, differentiable in them.
    standard_error
        Of `value`, of the sampling alone: how far the law of the inputs is from that of the data
        it does not know.
    component_values, component_errors
        ``(c,)`` each: the same of each component of the law.
    rows
        ``(n,)``: the discrepancy of each sample.
    """

    value: Float[Tensor, ""]
    standard_error: Float64[Tensor, ""]
    component_values: Float[Tensor, " c"]
    component_errors: Float64[Tensor, " c"]
    rows: Float[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class SyntheticRun:
    """The reference network on synthetic inputs; distances of many other weights start from it.

    Parameters
    ----------
    reference
        The network.
    sample
        What it ran on.
    outputs
        ``(n, K)``: what came out, without gradient.
    chunk
        Samples run at once.
    """

    reference: ReferenceNetwork
    sample: SyntheticInputs
    outputs: Float[Tensor, "n K"]
    chunk: int

    @classmethod
    def of(
        cls,
        reference: ReferenceNetwork,
        sample: SyntheticInputs,
        *,
        chunk: int = _CHUNK,
    ) -> SyntheticRun:
        """Run the reference.

        Parameters
        ----------
        reference
            The network.
        sample
            Synthetic inputs, on its device.
        chunk
            Samples run at once.

        Returns
        -------
        SyntheticRun
            Constant in the other weights.

        Raises
        ------
        OptionError
            If `chunk` is no positive number.
        """
        chunk = whole_number(chunk, "chunk")
        bare = cls(reference, sample, torch.empty(0, 0), chunk)
        with torch.no_grad():
            return replace(bare, outputs=bare.outputs_of(reference.tensors))

    def outputs_of(self, tensors: Params) -> Float[Tensor, "n K"]:
        """Outputs with other weights.

        Parameters
        ----------
        tensors
            From ``reference.tensors_of``.

        Returns
        -------
        Tensor
            ``(n, K)`` in the dtype of the reference, differentiable in the weights any number of
            times. Of more samples than one chunk, activations are computed again on the way back
            instead of being held.
        """
        own = self.reference.tensors
        tensors = {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}
        starts = range(0, len(self.sample.component), self.chunk)
        again = (
            len(starts) > 1
            and torch.is_grad_enabled()
            and any(tensor.requires_grad for tensor in tensors.values())
        )
        parts = []
        for start in starts:
            if again:
                part = checkpoint(
                    self._part, tensors, start, use_reentrant=False, preserve_rng_state=False
                )
            else:
                part = self._part(tensors, start)
            parts.append(part)
        return torch.cat(parts)

    def distance(
        self,
        tensors: Params,
        metric: Metric = "euclidean",
        outputs: Any = None,
        *,
        adjusted: Adjustment | None = None,
    ) -> SyntheticDistance:
        """How far other weights are.

        Parameters
        ----------
        tensors
            From ``reference.tensors_of``.
        metric
            Which discrepancy.
        outputs
            Numbers of the outputs that count; see `select_outputs`.
        adjusted
            What is made of outputs and changes ``(n, K)`` before they are compared; both float64.

        Returns
        -------
        SyntheticDistance
            Exactly 0 at the weights of the reference.
        """
        old, change = self.outputs.double(), (self.outputs_of(tensors) - self.outputs).double()
        if self.reference.unchanged(tensors):
            # Matrix products of equal numbers can differ in the last digit.
            change = change - change.detach()
        if adjusted is not None:
            old, change = adjusted(old, change)
        chosen = select_outputs(old.shape[1], outputs)
        if chosen is not None:
            chosen = chosen.to(old.device)
            old, change = old[:, chosen], change[:, chosen]
        rows = discrepancy(old, old + change, metric)
        values, errors = self.sample.component_means(rows), self.sample.component_errors(rows)
        weights = self.sample.weights
        value = (weights.to(values) * values).sum().to(_floating_dtype(tensors, values.dtype))
        error = (weights.cpu() * errors).square().sum().sqrt()
        return SyntheticDistance(value, error, values, errors, rows)

    def _part(self, tensors: Params, start: int) -> Tensor:
        inputs = self.sample.part(start, start + self.chunk)
        with plain_attention():
            return self.reference.outputs(tensors, inputs)


def _floating_dtype(tensors: Params, otherwise: torch.dtype) -> torch.dtype:
    kinds = (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    return next(kinds, otherwise)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keep PyTorch from fused attention.

    Fused transformer layers are taken in evaluation without gradient only: the same weights would
    give different outputs with and without it. The fused product of queries, keys and values has no
    second derivative.

    Yields
    ------
    None
        Nothing.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
