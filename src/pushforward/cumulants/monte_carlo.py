"""Monte Carlo moments of a network's outputs: the yardstick and safety net of propagation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.cumulants.designs import Design, DesignName, Layout, resolve_design
from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.sample_moments import Exceedance, MomentAccumulator
from pushforward.cumulants.sampled_network import (
    NUM_PROBES,
    SampledNetwork,
    forward_flops,
    refuse_not_finite,
)
from pushforward.errors import OptionError, ShapeError
from pushforward.options import whole_number
from pushforward.runs.estimate import Check, Cost, Status, to_jsonable, worst_status
from pushforward.runs.progress import track

__all__ = ["Exceedance", "SampledLaw", "forward_flops", "monte_carlo"]

# Entries of the widest tensor worked on at once, on a CPU and on an accelerator: small enough for
# the caches of the one, large enough to keep the other busy.
_BLOCK_ENTRIES = (2**20, 2**23)  # points generated together
_BATCH_ENTRIES = 2**22  # activations of one evaluation
_WIDEST_COVARIANCE = 4096  # outputs; the matrix takes 128 MiB there
_FEW_UNITS = 10


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

    @property
    def status(self) -> Status:
        """The worst status among the checks."""
        return worst_status(self.checks)

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
        ``pushforward.cumulants.designs.Sobol(replicates=32)``.
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
    target = SampledNetwork.prepare(net, law, projection, offset)
    probes = target.probe(seed)
    outputs = probes.shape[1]
    bounds, bounds_shape = _threshold_rows(thresholds, outputs, probes.device)
    wanted = whole_number(num_samples, "num_samples")
    entries = _BLOCK_ENTRIES[target.source.type != "cpu"]
    max_block = max(1, entries // max(law.dimension, outputs))
    layout = chosen.layout(law.dimension, wanted, max_block)
    flops_each, widest = target.measure(seed)
    if batch_size is None:
        batch_size = max(1, _BATCH_ENTRIES // widest)
    batch_size = whole_number(batch_size, "batch_size")

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
            refuse_not_finite(rows)
            if accumulator is None:
                wide = outputs > _WIDEST_COVARIANCE
                accumulator = MomentAccumulator(
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


def _checks(
    layout: Layout,
    wanted: int,
    design: Design,
    target: SampledNetwork,
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
            f"{NUM_PROBES} probe inputs gave the same outputs in batches of two sizes.",
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
