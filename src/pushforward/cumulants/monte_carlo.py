"""Monte Carlo moments of a network's outputs: the yardstick and safety net of propagation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from operator import index
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pushforward.cumulants.designs import Design, DesignName, Layout, resolve_design
from pushforward.cumulants.laws import GaussianLaw
from pushforward.errors import LawError, NetworkError, OptionError, ShapeError
from pushforward.runs.estimate import Check, Cost, to_jsonable
from pushforward.runs.progress import track
from pushforward.runs.rng import stream

__all__ = ["Exceedance", "SampledLaw", "forward_flops", "monte_carlo"]

# Entries of the widest tensor worked on at once, on a CPU and on an accelerator: small enough for
# the caches of the one, large enough to keep the other busy.
_BLOCK_ENTRIES = (2**20, 2**23)  # points generated together
_PORTION_ENTRIES = (2**16, 2**23)  # outputs accumulated together
_BATCH_ENTRIES = 2**22  # activations of one evaluation
_WIDEST_COVARIANCE = 4096  # outputs; the matrix takes 128 MiB there
_MOST_GROUPS = 4096  # their variance is then known to 1.6 %, its root to 0.8 %
_FEW_UNITS = 10
_PROBES = 8
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Exceedance:
    """How often the outputs exceeded a threshold.

    Parameters
    ----------
    threshold
        The thresholds ``t``, shape (k,) or (T, k).
    probability
        Observed frequency of ``f_i > t``, same shape.
    standard_error
        Its standard error from the variance between units; 0 where no unit differed, so use the
        interval.
    lower, upper
        Wilson score interval at the sample size that plain sampling would need for the same
        standard error (the nominal one where no unit differed), with the quantile of Student's t
        for the degrees of freedom.
    confidence
        Nominal coverage of each interval.
    """

    threshold: Float[Tensor, "*T K"]
    probability: Float[Tensor, "*T K"]
    standard_error: Float[Tensor, "*T K"]
    lower: Float[Tensor, "*T K"]
    upper: Float[Tensor, "*T K"]
    confidence: float = _CONFIDENCE


@dataclass(frozen=True, repr=False)
class SampledLaw:
    """Moments of a network's outputs, estimated by forward passes.

    Every standard error is that of the design, from the variance between its independent units.

    Parameters
    ----------
    mean, standard_error
        Mean of each output and its standard error, shape (k,), float64.
    variance, variance_standard_error
        Variance of each output and its standard error, shape (k,).
    covariance
        Covariance of the outputs, shape (k, k); None if not wanted or for more than 4,096 outputs.
    third, third_standard_error
        Third cumulant of each output and its standard error, shape (k,).
    fourth, fourth_standard_error
        Fourth cumulant of each output and its standard error, shape (k,).
    exceedance
        How often thresholds were exceeded, if any were given.
    num_samples
        Forward passes made; at least as many as were asked for.
    num_units
        Independent units among them.
    design
        Name of the design.
    flops
        Floating-point operations of points and forward passes, see :func:`forward_flops`.
    seconds
        Wall-clock time of points, forward passes and moments, without the checks before them.
    checks
        What was verified, with advice.
    """

    mean: Float[Tensor, " K"]
    standard_error: Float[Tensor, " K"]
    variance: Float[Tensor, " K"]
    variance_standard_error: Float[Tensor, " K"]
    covariance: Float[Tensor, "K K"] | None
    third: Float[Tensor, " K"]
    third_standard_error: Float[Tensor, " K"]
    fourth: Float[Tensor, " K"]
    fourth_standard_error: Float[Tensor, " K"]
    exceedance: Exceedance | None
    num_samples: int
    num_units: int
    design: str
    flops: float
    seconds: float
    checks: tuple[Check, ...] = field(default_factory=tuple)

    @property
    def cost(self) -> Cost:
        """What the estimate cost."""
        return Cost(flops=self.flops, seconds=self.seconds, evaluations=self.num_samples)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            Tensors as nested lists, dataclasses as dictionaries.
        """
        plain: dict[str, Any] = to_jsonable(self)
        return plain

    def __repr__(self) -> str:
        lines = [
            f"SampledLaw of {len(self.mean)} outputs from {self.num_samples:,} samples "
            f"({self.design}, {self.num_units:,} independent units)",
            "  mean ± standard error      variance ± standard error",
        ]
        columns = (self.mean, self.standard_error, self.variance, self.variance_standard_error)
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        for mean, error, variance, variance_error in rows[:10]:
            left = f"{mean: .6g} ± {error:.2g}"
            lines.append(f"  {left:<26} {variance:.6g} ± {variance_error:.2g}")
        if len(rows) > 10:
            lines.append(f"  ... {len(rows) - 10} more")
        lines.append(f"  cost: {self.cost}")
        lines += [f"  {check}" for check in self.checks if check.status != "pass"]
        return "\n".join(lines)


def monte_carlo(
    net: nn.Module | Callable[[Tensor], Tensor],
    law: GaussianLaw,
    num_samples: int,
    *,
    design: DesignName | Design = "frames",
    seed: int = 0,
    thresholds: float | Float[Tensor, "*T"] | None = None,
    projection: Float[Tensor, "M K"] | None = None,
    offset: Float[Tensor, " M"] | None = None,
    covariance: bool = True,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> SampledLaw:
    """Estimate the law of a network's outputs by forward passes on designed random inputs.

    Unbiased for the mean, variance and covariance of any network; the small biases of third and
    fourth cumulants are removed to second order. Random points depend on `seed`, `design`,
    `num_samples`, the input dimension and the number of outputs alone; `batch_size` changes
    results by rounding only.

    Parameters
    ----------
    net
        A module or function that takes ``(N, *law.event_shape)`` to ``(N, k)`` or ``(N,)``. It runs
        without gradients, on the device and in the precision of its parameters (of the law if it
        has none), each example independently of the others.
    law
        The law of the inputs, not batched.
    num_samples
        Forward passes wanted; rounded up to whole units of the design.
    design
        ``"frames"``, ``"antithetic"``, ``"sobol"``, ``"plain"``, or a design with settings such as
        ``Sobol(replicates=32)``.
    seed
        Seed of all noise.
    thresholds
        Report how often ``f_i > t``: one number for all outputs, (k,) one for each, or (T, k).
    projection
        Matrix (m, k): estimate the law of ``projection @ f`` instead of ``f``.
    offset
        Vector (m,) added to the outputs, after the projection if there is one.
    covariance
        Whether to estimate the covariances between outputs, which takes ``2 k^2`` operations a
        sample.
    batch_size
        Inputs evaluated together; by default few enough that no activation exceeds 2^22 entries.
    progress
        Show a progress bar: True, False, or None for "on a terminal, if it takes long".

    Returns
    -------
    SampledLaw
        Moments with standard errors, cost and checks.

    Raises
    ------
    LawError
        If the law is a batch of laws.
    NetworkError
        If the network has active dropout or batch statistics, is random, lets examples influence
        each other, spreads over several devices, or returns values that are not finite.
    ShapeError
        If the network does not take the law's inputs, its outputs are no vectors, or thresholds,
        projection or offset do not fit them.
    OptionError
        If an option is out of range or the samples do not fill two units of the design.

    Notes
    -----
    Outputs are accumulated in float64 after subtracting a pilot mean. The first four raw moments
    ``p`` of each unit have covariance ``V`` between units; a cumulant ``g(p)`` has the standard
    error ``sqrt(g' V g')`` and the bias ``tr(g'' V) / 2``, which is subtracted.

    Examples
    --------
    >>> import torch
    >>> from pushforward.cumulants.laws import GaussianLaw
    >>> relu = monte_carlo(torch.relu, GaussianLaw.standard(3), 6000)
    >>> bool((relu.mean - 0.39894).abs().max() < 5 * relu.standard_error.max())
    True
    """
    chosen = resolve_design(design)
    target = _Target.prepare(net, law, projection, offset)
    probes = target.probe(seed)
    outputs = probes.shape[1]
    bounds, bounds_shape = _threshold_rows(thresholds, outputs, probes.device)
    wanted = _validated_count(num_samples, "num_samples")
    entries = _entries(_BLOCK_ENTRIES, target.source)
    max_block = max(1, entries // max(law.dimension, outputs))
    layout = chosen.layout(law.dimension, wanted, max_block)
    flops_each, widest = target.measure(seed)
    if batch_size is None:
        batch_size = max(1, _BATCH_ENTRIES // widest)
    batch_size = _validated_count(batch_size, "batch_size")

    start = perf_counter()
    accumulator = None
    blocks = chosen.blocks(layout, seed, dtype=target.point_dtype, device=target.source)
    with track(layout.num_samples, f"Monte Carlo ({chosen.name})", enabled=progress) as advance:
        for points in blocks:
            values = []
            for batch in torch.split(points, batch_size):
                values.append(target(batch))
                advance(len(batch))
            rows = torch.cat(values)
            _refuse_not_finite(rows)
            if accumulator is None:
                wide = outputs > _WIDEST_COVARIANCE
                accumulator = _Accumulator(
                    layout, rows.mean(0), bounds, covariance=covariance and not wide
                )
            accumulator.add(rows)
    assert accumulator is not None  # a layout has at least one block

    moments = accumulator.cumulants()
    exceedance = accumulator.exceedance(bounds_shape)
    return SampledLaw(
        **moments,
        covariance=accumulator.covariance(moments["variance"]),
        exceedance=exceedance,
        num_samples=layout.num_samples,
        num_units=layout.num_units,
        design=chosen.name,
        flops=chosen.flops(layout) + layout.num_samples * flops_each,
        seconds=perf_counter() - start,
        checks=tuple(_checks(layout, wanted, chosen, target, moments, exceedance)),
    )


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


class _ElementCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the elements that pointwise operations write, and the size of the widest tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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


@dataclass(frozen=True)
class _Target:
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
    ) -> _Target:
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
        return self.dtype if self.dtype in {torch.float32, torch.float64} else torch.float32

    def __call__(self, points: Float[Tensor, "N D"]) -> Float[Tensor, "N K"]:
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
        _refuse_not_finite(values)
        apart = torch.cat([self(half) for half in torch.split(points, _PROBES // 2)])
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
        shape = (_PROBES, self.law.dimension)
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


def _refuse_not_finite(values: Float[Tensor, "N K"]) -> None:
    # One sum is cheaper than looking at every value, but may overflow when all are finite.
    bad = 0 if values.sum().isfinite() else int((~values.isfinite()).sum())
    if bad:
        raise NetworkError(
            f"{bad} of {values.numel()} output values are infinite or NaN",
            where="net",
            advice="Check its weights, and the scale of the law's inputs.",
        )


def _entries(choice: tuple[int, int], device: torch.device) -> int:
    return choice[0] if device.type == "cpu" else choice[1]


def _validated_count(value: int, where: str) -> int:
    try:
        count = 0 if isinstance(value, bool) else index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise OptionError(
            f"{value!r} is not a number of examples", where=where, advice="Give a positive integer."
        )
    return count


def _threshold_rows(
    thresholds: float | Tensor | None, outputs: int, device: torch.device
) -> tuple[Float[Tensor, "T K"] | None, tuple[int, ...]]:
    if thresholds is None:
        return None, ()
    given = torch.as_tensor(thresholds, dtype=torch.float64, device=device)
    if given.isnan().any():
        raise OptionError("a threshold is NaN", where="thresholds", advice="Give real numbers.")
    if given.ndim == 0:
        given = given.expand(outputs)
    if given.ndim > 2 or given.shape[-1] != outputs:
        raise ShapeError(
            f"shape {tuple(given.shape)} for {outputs} outputs",
            where="thresholds",
            advice=f"Give one number, shape ({outputs},) or shape (T, {outputs}); "
            "thresholds[:, None].expand(-1, k) repeats a list for all outputs.",
        )
    return given.reshape(-1, outputs), tuple(given.shape)


class _Scatter:
    """Weighted mean and scatter of independent vectors, updated without cancellation.

    The pairwise update of T. F. Chan, G. H. Golub and R. J. LeVeque (1979), of "p" coordinates
    jointly, for each of "k" columns. A vector that averages "size" points has that weight.
    """

    def __init__(self) -> None:
        self.count = 0
        self.weight = 0
        self.mean: Tensor = torch.zeros(())
        self.scatter: Tensor = torch.zeros(())

    def add(self, vectors: Float[Tensor, "G p k"], size: int) -> None:
        weight = len(vectors) * size
        mean = vectors.mean(0)
        apart = vectors - mean
        scatter = size * torch.einsum("gpk,gqk->pqk", apart, apart)
        if self.count:
            total = self.weight + weight
            step = mean - self.mean
            outer = step.unsqueeze(0) * step.unsqueeze(1)
            scatter = self.scatter + scatter + outer * (self.weight * weight / total)
            mean = self.mean + step * (weight / total)
        self.count += len(vectors)
        self.weight += weight
        self.mean, self.scatter = mean, scatter

    def covariance_of_mean(self) -> Float[Tensor, "p p k"]:
        return self.scatter / ((self.count - 1) * self.weight)


class _Accumulator:
    """Streams output rows into moments, with the variance between groups of whole units.

    A group is one unit, or several consecutive ones when there are very many: that costs a little
    of the standard error's own precision and saves most of the work.
    """

    def __init__(
        self, layout: Layout, pilot: Float[Tensor, " k"], bounds: Tensor | None, *, covariance: bool
    ) -> None:
        units = max(1, min(layout.num_units // _MOST_GROUPS, layout.block_size // layout.unit_size))
        self.group_size = layout.unit_size << (units.bit_length() - 1)
        self.pilot = pilot
        self.bounds = bounds
        self.portion = _entries(_PORTION_ENTRIES, pilot.device)
        self.moments = _Scatter()
        self.exceedances = _Scatter()
        outputs = len(pilot)
        products = pilot.new_zeros((2, outputs, outputs)) if covariance else None
        self.products: Tensor | None = products
        self._open_sums: Tensor | None = None
        self._open_count = 0

    def add(self, values: Float[Tensor, "N k"]) -> None:
        for piece in self._pieces(values):
            self._add_piece(piece)

    def _pieces(self, values: Float[Tensor, "N k"]) -> Iterator[Float[Tensor, "n k"]]:
        """Cut rows into portions that stay in the processor's cache.

        Yields
        ------
        Tensor
            Several whole groups, or a part of one.
        """
        rows = max(1, self.portion // values.shape[1])
        whole = max(1, rows // self.group_size) * self.group_size
        for groups in torch.split(values, whole):
            yield from torch.split(groups, rows if whole > rows else whole)

    def _add_piece(self, values: Float[Tensor, "n k"]) -> None:
        first = values - self.pilot
        second = first * first
        columns = [first, second, second * first, second * second]
        if self.bounds is not None:
            columns += [(values > bound).to(values) for bound in self.bounds]
        if self.products is not None:
            self.products[0].addmm_(first.T, first)
        count = len(values)
        whole = count // self.group_size * self.group_size
        if whole:
            shape = (-1, self.group_size, values.shape[1])
            groups = [column[:whole].reshape(shape).mean(1) for column in columns]
            self._add_groups(torch.stack(groups, dim=1), self.group_size)
        if whole < count:
            # A part of a unit that is larger than a piece, or of the last, shorter group.
            sums = torch.stack([c[whole:].sum(0) for c in columns]).unsqueeze(0)
            self._open_sums = sums if self._open_sums is None else self._open_sums + sums
            self._open_count += count - whole
            if self._open_count == self.group_size:
                self._close()

    def _close(self) -> None:
        if self._open_sums is not None:
            self._add_groups(self._open_sums / self._open_count, self._open_count)
            self._open_sums, self._open_count = None, 0

    def _add_groups(self, means: Float[Tensor, "G p k"], size: int) -> None:
        self.moments.add(means[:, :4], size)
        if self.bounds is not None:
            self.exceedances.add(means[:, 4:].flatten(1).unsqueeze(1), size)
        if self.products is not None:
            self.products[1].addmm_(means[:, 0].T, means[:, 0], alpha=size)

    def cumulants(self) -> dict[str, Tensor]:
        """Give the first four cumulants with standard errors, biases removed to second order.

        Returns
        -------
        dict
            Fields of :class:`SampledLaw`.
        """
        self._close()
        m1, m2, m3, m4 = self.moments.mean
        spread = self.moments.covariance_of_mean()
        one, zero = torch.ones_like(m1), torch.zeros_like(m1)

        def error(*gradient: Tensor) -> Tensor:
            slope = torch.stack((*gradient, *[zero] * (4 - len(gradient))))
            return torch.einsum("pk,pqk,qk->k", slope, spread, slope).clamp(min=0).sqrt()

        return {
            "mean": self.pilot + m1,
            "standard_error": error(one),
            "variance": m2 - m1**2 + spread[0, 0],
            "variance_standard_error": error(-2 * m1, one),
            "third": m3 - 3 * m1 * m2 + 2 * m1**3 - (6 * m1 * spread[0, 0] - 3 * spread[0, 1]),
            "third_standard_error": error(6 * m1**2 - 3 * m2, -3 * m1, one),
            "fourth": m4
            - 4 * m1 * m3
            - 3 * m2**2
            + 12 * m1**2 * m2
            - 6 * m1**4
            - ((12 * m2 - 36 * m1**2) * spread[0, 0] + 24 * m1 * spread[0, 1])
            + (4 * spread[0, 2] + 3 * spread[1, 1]),
            "fourth_standard_error": error(
                24 * m1 * m2 - 4 * m3 - 24 * m1**3, 12 * m1**2 - 6 * m2, -4 * m1, one
            ),
        }

    def covariance(self, variance: Float[Tensor, " k"]) -> Float[Tensor, "k k"] | None:
        """Unbiased covariance of the outputs; its diagonal is the variance given.

        Returns
        -------
        Tensor or None
            None when it was not wanted.
        """
        if self.products is None:
            return None
        total, groups = self.moments.weight, self.moments.count
        product_of_means = torch.outer(self.moments.mean[0], self.moments.mean[0])
        within, between = self.products / total - product_of_means
        result: Tensor = within + between / (groups - 1)
        result.diagonal().copy_(variance)
        return result

    def exceedance(self, shape: tuple[int, ...]) -> Exceedance | None:
        if self.bounds is None:
            return None
        frequency = self.exceedances.mean.flatten()
        error = self.exceedances.covariance_of_mean().flatten().clamp(min=0).sqrt()
        binomial = frequency * (1 - frequency)
        informative = (binomial > 0) & (error > 0)
        shrink = torch.where(informative, error**2 / binomial, 1 / self.exceedances.weight)
        level = (1 + _CONFIDENCE) / 2
        student = float(special.stdtrit(self.exceedances.count - 1, level))
        quantile = torch.full_like(frequency, float(special.ndtri(level)))
        quantile = quantile.masked_fill(informative, student)
        lower, upper = _wilson(frequency, shrink, quantile)
        return Exceedance(
            threshold=self.bounds.reshape(shape),
            probability=frequency.reshape(shape),
            standard_error=error.reshape(shape),
            lower=lower.reshape(shape),
            upper=upper.reshape(shape),
        )


def _wilson(
    frequency: Float[Tensor, " n"], inverse_size: Float[Tensor, " n"], quantile: Float[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Score interval of a proportion (E. B. Wilson, JASA 22, 1927).

    Returns
    -------
    tuple
        Lower and upper ends.
    """
    weight = quantile**2 * inverse_size
    centre = frequency + weight / 2
    reach = (frequency * (1 - frequency) * weight + weight**2 / 4).sqrt()
    lower, upper = (centre - reach) / (1 + weight), (centre + reach) / (1 + weight)
    return lower.clamp(min=0), upper.clamp(max=1)


def _checks(
    layout: Layout,
    wanted: int,
    design: Design,
    target: _Target,
    moments: dict[str, Tensor],
    exceedance: Exceedance | None,
) -> list[Check]:
    checks = [
        Check(
            "sample-count",
            "pass",
            f"{layout.num_samples:,} samples for {wanted:,} wanted: {layout.num_units:,} units of "
            f"{layout.unit_size:,} ({design.name}).",
        ),
        Check(
            "independent-examples",
            "pass",
            f"{_PROBES} probe inputs gave the same outputs in batches of two sizes.",
        ),
    ]
    few = layout.num_units < _FEW_UNITS
    checks.append(
        Check(
            "independent-units",
            "warn" if few else "pass",
            f"standard errors rest on {layout.num_units:,} independent units.",
            "They may be far off; take more samples or design='antithetic'." if few else "",
        )
    )
    resolution = torch.finfo(target.dtype).eps
    rounding = resolution * moments["mean"].abs()
    coarse = target.dtype != torch.float64 and bool((moments["standard_error"] < rounding).any())
    checks.append(
        Check(
            "precision",
            "warn" if coarse else "pass",
            f"the network computes to a relative precision of {resolution:.1g}.",
            "Its rounding may exceed the standard error; use net.double()." if coarse else "",
        )
    )
    if exceedance is not None:
        unseen = int((exceedance.probability == 0).sum())
        checks.append(
            Check(
                "exceedances-seen",
                "warn" if unseen else "pass",
                f"{unseen} of {exceedance.probability.numel()} thresholds were never exceeded.",
                "Only the upper bound is informative there; propagate(...).tail_probability "
                "reaches further."
                if unseen
                else "",
            )
        )
    return checks
