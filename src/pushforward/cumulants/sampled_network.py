"""A network as a function of standard normal points: what Monte Carlo evaluates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pushforward.cumulants.laws import GaussianLaw
from pushforward.errors import LawError, NetworkError, ShapeError
from pushforward.runs.rng import stream

__all__ = ["NUM_PROBES", "SampledNetwork", "forward_flops", "refuse_not_finite"]

NUM_PROBES = 8
"""Inputs on which a network is tried before it is sampled."""


def forward_flops(
    net: nn.Module | Callable[[Tensor], Tensor], example: Float[Tensor, "N ..."]
) -> float:
    """Count the floating-point operations of a forward pass, per example.

    Matrix products, convolutions and attention are counted by PyTorch's ``FlopCounterMode``, a
    multiply-add as two; every pointwise operation (activations, sums, products, comparisons) counts
    one per element that it writes, a transcendental activation no more than a ReLU. Biases fused
    into a matrix product, reductions, normalisations, pooling and data movement are not counted.

    Parameters
    ----------
    net
        The network.
    example
        A batch of one or more inputs, leading axis N.

    Returns
    -------
    float
        Operations for one of the N examples.
    """
    return _measure(net, example)[0]


@dataclass(frozen=True)
class SampledNetwork:
    """The function whose law is wanted: standard normal points in, float64 output rows out."""

    net: Callable[[Tensor], Tensor]
    law: GaussianLaw
    projection: Tensor | None
    offset: Tensor | None
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def prepare(
        cls,
        net: Callable[[Tensor], Tensor],
        law: GaussianLaw,
        projection: Tensor | None,
        offset: Tensor | None,
    ) -> SampledNetwork:
        """Check that a network can be sampled at all.

        Parameters
        ----------
        net
            A module in eval mode, or any function of a batch.
        law
            Of its inputs.
        projection, offset
            Linear functionals to sample in place of the outputs.

        Returns
        -------
        SampledNetwork
            Ready to be called.

        Raises
        ------
        LawError
            For a batch of laws.
        NetworkError
            For a network on several devices, or with dropout or BatchNorm in training mode.
        """
        if law.batch_shape:
            raise LawError(
                f"this is a batch of {prod(law.batch_shape)} laws",
                where="law",
                advice="Sample one law at a time.",
            )
        device, dtype = law.mean.device, law.mean.dtype
        if isinstance(net, nn.Module):
            _refuse_unsettled_modules(net)
            tensors = [*net.parameters(), *net.buffers()]
            devices = {tensor.device for tensor in tensors}
            if len(devices) > 1:
                raise NetworkError(
                    f"its parameters are on {', '.join(sorted(map(str, devices)))}",
                    where="net",
                    advice="Move it to one device, or pass a function that moves its inputs.",
                )
            device = next(iter(devices), device)
            dtype = next((t.dtype for t in tensors if t.is_floating_point()), dtype)
        return cls(net, law, projection, offset, device, dtype)

    @property
    def source(self) -> torch.device:
        """Where points are drawn and moments accumulated: a device that knows float64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    @property
    def point_dtype(self) -> torch.dtype:
        """Of the points: that of the network, single precision for half-precision networks."""
        return self.dtype if self.dtype in {torch.float32, torch.float64} else torch.float32

    def __call__(self, points: Float[Tensor, "N D"]) -> Float[Tensor, "N K"]:
        """Outputs, or the functionals of them, in float64.

        Parameters
        ----------
        points
            Standard normal rows.

        Returns
        -------
        Tensor
            One row for each point.

        Raises
        ------
        ShapeError
            When the network does not return one row for each input.
        """
        with torch.no_grad():
            outputs = self.forward(points)
            fits = outputs.ndim in {1, 2} and len(outputs) == len(points) and outputs.numel()
            if not fits:
                raise ShapeError(
                    f"{len(points)} inputs gave outputs of shape {tuple(outputs.shape)}",
                    where="net",
                    advice="It must return shape (N, k) or (N,); flatten its outputs.",
                )
            values = outputs.reshape(len(points), -1).to(self.source).to(torch.float64)
            if self.projection is not None:
                values = values @ self.projection.to(values).T
            if self.offset is not None:
                values = values + self.offset.to(values)
        return values

    def forward(self, points: Float[Tensor, "N D"]) -> Tensor:
        """What the network itself returns.

        Parameters
        ----------
        points
            Standard normal rows.

        Returns
        -------
        Tensor
            In the dtype of the network.
        """
        inputs = self.law.transform(points).reshape(len(points), *self.law.event_shape)
        return self.net(inputs.to(device=self.device, dtype=self.dtype))

    def measure(self, seed: int) -> tuple[float, int]:
        """Operations of one evaluation, and entries of its widest activation.

        Returns
        -------
        tuple
            Operations and entries, per example.
        """
        flops, widest = _measure(self.forward, self._probe_points(seed))
        if self.projection is not None:
            flops += 2 * self.projection.numel()
        if self.offset is not None:
            flops += self.offset.numel()
        return flops, widest

    def probe(self, seed: int) -> Float[Tensor, "P K"]:
        """Try the function on a few points, and refuse it if it is not one.

        Returns
        -------
        Tensor
            Its values at the probe points.

        Raises
        ------
        NetworkError
            If values depend on chance or on the other examples of a batch.
        """
        points = self._probe_points(seed)
        self._check_shapes(self._try(points))
        values = self(points)
        refuse_not_finite(values)
        apart = torch.cat([self(half) for half in torch.split(points, NUM_PROBES // 2)])
        scale = values.abs().max().item()
        difference = (values - apart).abs().max().item()
        if difference > scale * (1e-8 if self.dtype == torch.float64 else 2e-2):
            raise NetworkError(
                "the same inputs in batches of another size gave other outputs, "
                f"different by up to {difference:.2g} on a scale of {scale:.2g}",
                where="net",
                advice="Call net.eval(), and remove randomness and statistics over the batch.",
            )
        return values

    def _probe_points(self, seed: int) -> Float[Tensor, "P D"]:
        noise = stream(seed, "monte_carlo", "probe", device=self.source)
        shape = (NUM_PROBES, self.law.dimension)
        return torch.randn(shape, generator=noise, dtype=self.point_dtype, device=self.source)

    def _try(self, points: Float[Tensor, "P D"]) -> Tensor:
        try:
            with torch.no_grad():
                outputs = self.forward(points)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            # Only the network knows what it takes; PyTorch's message names its own numbers.
            message = str(error).strip().rstrip(".")
            about_shapes = any(word in message for word in ("shape", "size", "channel", "dim"))
            shape = (len(points), *self.law.event_shape)
            raise (ShapeError if about_shapes else NetworkError)(
                f"the network does not take inputs of shape {shape} from a law of dimension "
                f"{self.law.dimension}: {message}",
                where="net",
                advice="Match the law's dimension and event_shape to the network's inputs.",
            ) from error
        if not isinstance(outputs, Tensor):
            raise NetworkError(
                f"it returned {type(outputs).__name__}, not a tensor",
                where="net",
                advice="Pass a function that picks one tensor of its outputs.",
            )
        return outputs

    def _check_shapes(self, outputs: Tensor) -> None:
        rows = count = prod(outputs.shape[1:])
        if self.projection is not None:
            if self.projection.ndim != 2 or self.projection.shape[1] != count:
                raise ShapeError(
                    f"a matrix of shape {tuple(self.projection.shape)} cannot multiply "
                    f"{count} outputs",
                    where="projection",
                    advice=f"Give shape (m, {count}).",
                )
            rows = self.projection.shape[0]
        if self.offset is not None and self.offset.shape != (rows,):
            raise ShapeError(
                f"shape {tuple(self.offset.shape)} for {rows} values",
                where="offset",
                advice=f"Give shape ({rows},).",
            )


def _measure(net: Callable[[Tensor], Tensor], example: Tensor) -> tuple[float, int]:
    """Operations per example, and entries per example of the widest tensor met on the way.

    Returns
    -------
    tuple
        Operations and entries.
    """
    elements, products = _ElementCounter(), FlopCounterMode(display=False)
    with torch.no_grad(), elements, products:
        net(example)
    per_example = (products.get_total_flops() + elements.written) / len(example)
    return per_example, -(-elements.widest // len(example))


class _ElementCounter(TorchDispatchMode):
    """Counts the elements that pointwise operations write, and the size of the widest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.widest = 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in _tensors(result)]
        if not any(entry.alias_info for entry in func._schema.returns):  # no view of a weight
            self.widest = max(self.widest, *sizes, 1)
        if torch.Tag.pointwise in func.tags and func is not torch.ops.aten.clone.default:
            self.written += sum(sizes)
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _tensors(item)]
    return []


def _refuse_unsettled_modules(net: nn.Module) -> None:
    """Refuse modules whose outputs depend on chance or on the rest of the batch.

    Raises
    ------
    NetworkError
        If there is one, naming the first.
    """
    for name, module in net.named_modules():
        kind = type(module).__name__
        advice = "Call net.eval() first."
        if isinstance(module, nn.modules.dropout._DropoutNd):
            unsettled = module.training and module.p > 0
            what = f"{kind} with p={module.p} is active"
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            unsettled = module.training or module.running_mean is None
            what = f"{kind} uses the statistics of the batch"
            if not module.training:
                advice = "Give it running statistics (track_running_stats=True)."
        else:
            continue
        if unsettled:
            raise NetworkError(what, where=f"net.{name}" if name else "net", advice=advice)


def refuse_not_finite(values: Float[Tensor, "N K"]) -> None:
    """Stop at the first infinite or NaN output.

    Parameters
    ----------
    values
        Outputs.

    Raises
    ------
    NetworkError
        When there are any.
    """
    # One sum is cheaper than looking at every value, but may overflow when all are finite.
    bad = 0 if values.sum().isfinite() else int((~values.isfinite()).sum())
    if bad:
        raise NetworkError(
            f"{bad} of {values.numel()} output values are infinite or NaN",
            where="net",
            advice="Check its weights, and the scale of the law's inputs.",
        )
