"""The law of the outputs: moments, error bar, cost, checks, tails and linear functionals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.cumulants.towers import CumulantTower, Radius, concatenate_towers
from pushforward.errors import OptionError, ShapeError
from pushforward.gaussians import tails
from pushforward.gaussians.tails import TailMethod
from pushforward.networks.graph import AffineMap
from pushforward.networks.linear_maps import Block, Dense, JointMap
from pushforward.runs.estimate import Check, Cost, Status, to_jsonable, worst_status

__all__ = ["ErrorBar", "Moments", "OutputLaw", "concatenate", "moments_of"]

_ROWS_SHOWN = 10


class Moments(NamedTuple):
    """Marginal cumulants of the outputs and their covariance, float64.

    Attributes
    ----------
    mean, variance
        ``(*batch, k)``.
    covariance
        ``(*batch, k, k)`` or None.
    third, fourth
        ``(*batch, k)`` or None.
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor | None = None
    third: Tensor | None = None
    fourth: Tensor | None = None

    def cast(self, dtype: torch.dtype) -> Moments:
        """The same in another dtype.

        Returns
        -------
        Moments
            Converted.
        """
        return self.map(lambda x: x.to(dtype))

    def map(self, function: Callable[[Tensor], Tensor]) -> Moments:
        """The same with a function applied to every tensor.

        Parameters
        ----------
        function
            From tensor to tensor.

        Returns
        -------
        Moments
            None stays None.
        """
        covariance, third, fourth = (
            None if x is None else function(x) for x in (self.covariance, self.third, self.fourth)
        )
        return Moments(function(self.mean), function(self.variance), covariance, third, fourth)


class ErrorBar(NamedTuple):
    """Difference between two orders of approximation, which estimates the error of the lower one.

    Attributes
    ----------
    difference
        Of the two means, ``(*batch, k)``.
    relative
        Sum of squared differences over the sum of variances, ``(*batch)``: the mean squared error
        relative to the variance, averaged over all outputs of the network.
    """

    difference: Tensor
    relative: Tensor

    @classmethod
    def between(cls, moments: Moments, other: Moments) -> ErrorBar:
        """From the moments of two orders; variances are those of the first.

        Returns
        -------
        ErrorBar
            Without gradient.
        """
        difference = (moments.mean - other.mean).detach()
        total = moments.variance.detach().clamp(min=0).sum(-1).clamp(min=1e-300)
        return cls(difference, difference.square().sum(-1) / total)

    def standard_error(self, variance: Tensor) -> Tensor:
        """Root of the mean of two squares: the output's own difference, and that of all outputs.

        The second is in units of the variance. The average keeps the mean square calibrated and an
        output whose two estimates agree by accident from getting an error bar of zero.

        Returns
        -------
        Tensor
            ``(*batch, k)``.
        """
        pooled = variance.detach().clamp(min=0) * self.relative[..., None]
        return torch.sqrt(0.5 * self.difference.square() + 0.5 * pooled)


@dataclass(frozen=True, eq=False)
class OutputLaw:
    """Law of the outputs of a network, as far as its order of approximation knows it.

    For a batch of input laws every tensor has a leading batch dimension.

    Parameters
    ----------
    mean, variance
        ``(k,)``.
    covariance
        ``(k, k)``; None at order 1.
    third, fourth
        Marginal third and fourth cumulants ``(k,)``; None where the order does not track them.
    standard_error
        Of `mean`, ``(k,)``, from the difference to another order; None when switched off.
    flops, seconds
        What was spent, the error bar included.
    order
        1, 2 or 3.
    augmented
        Whether order 2 tracked the radial third and fourth cumulants.
    checks
        What was verified, breakdown included.
    layers
        Laws before and behind each activation, by module path, when asked for.
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor | None
    third: Tensor | None
    fourth: Tensor | None
    standard_error: Tensor | None
    flops: float
    seconds: float
    order: int
    augmented: bool
    checks: tuple[Check, ...] = ()
    layers: dict[str, OutputLaw] = field(default_factory=dict)
    _exact: Moments | None = field(default=None, repr=False)
    _tower: CumulantTower | None = field(default=None, repr=False)
    _radius: Radius | None = field(default=None, repr=False)
    _offset: Tensor | None = field(default=None, repr=False)
    _error: ErrorBar | None = field(default=None, repr=False)

    @classmethod
    def from_moments(
        cls,
        moments: Moments,
        *,
        order: int,
        augmented: bool,
        dtype: torch.dtype,
        tower: CumulantTower | None = None,
        radius: Radius | None = None,
        offset: Tensor | None = None,
        error: ErrorBar | None = None,
    ) -> OutputLaw:
        """Assemble a law from float64 moments.

        Parameters
        ----------
        moments
            What the outputs are known by.
        order, augmented
            How they were obtained.
        dtype
            Of the public tensors.
        tower
            Joint cumulants behind `moments`, for linear functionals; None at order 1.
        radius
            Set when the tower was propagated on the sphere.
        offset
            What `moments` have in addition to the tower.
        error
            Difference to another order.

        Returns
        -------
        OutputLaw
            Without cost and checks, which `dataclasses.replace` adds.
        """
        public = moments.cast(dtype)
        standard_error = None if error is None else error.standard_error(moments.variance).to(dtype)
        return cls(
            *public,
            standard_error=standard_error,
            flops=0.0,
            seconds=0.0,
            order=order,
            augmented=augmented,
            _exact=moments,
            _tower=tower,
            _radius=radius,
            _offset=offset,
            _error=error,
        )

    @property
    def cost(self) -> Cost:
        """FLOPs and seconds."""
        return Cost(self.flops, self.seconds)

    @property
    def status(self) -> Status:
        """The worst status among the checks."""
        return worst_status(self.checks)

    @property
    def method(self) -> str:
        """Name of the order, for tables."""
        return f"order {self.order}" + (" augmented" if self.augmented else "")

    def tail_probability(
        self, threshold: float | Tensor, method: TailMethod = "saddlepoint"
    ) -> Float[Tensor, "*batch k"]:
        """``P(f_i > threshold)`` for each output, from its marginal cumulants.

        Parameters
        ----------
        threshold
            One number, one for each output ``(k,)``, or rows ``(T, k)`` of them, which give a
            leading dimension ``T``.
        method
            ``"saddlepoint"``, ``"edgeworth"`` or ``"gaussian"``. Without third and fourth
            cumulants (order 1, order 2 not augmented) all three are the Gaussian tail.

        Returns
        -------
        Tensor
            Probabilities, differentiable. They carry no error bar: in trained networks they are
            reliable to about two standard deviations, and rare events deserve `monte_carlo`.
        """
        moments = self._moments()
        level = self._levels(threshold, "tail_probability")
        probability = tails.tail_probability(
            level, moments.mean, moments.variance, moments.third, moments.fourth, method
        )
        return probability.to(self.mean.dtype)

    def quantile(
        self, q: float | Tensor, method: TailMethod = "saddlepoint"
    ) -> Float[Tensor, "*batch k"]:
        """The value that each output stays below with probability `q`.

        Parameters
        ----------
        q
            In (0, 1), one number or one for each output.
        method
            As in `tail_probability`.

        Returns
        -------
        Tensor
            Quantiles, without gradient.
        """
        moments = self._moments()
        level = self._levels(q, "quantile")
        value = tails.quantile(
            level, moments.mean, moments.variance, moments.third, moments.fourth, method
        )
        return value.to(self.mean.dtype)

    def project(
        self, matrix: Float[Tensor, "m k"], offset: Float[Tensor, " m"] | None = None
    ) -> OutputLaw:
        """Law of linear functionals ``matrix @ f + offset`` of the outputs, such as class margins.

        Parameters
        ----------
        matrix
            One row for each functional.
        offset
            Added to them.

        Returns
        -------
        OutputLaw
            With its own error bar, at no further propagation. At order 1 outputs count as
            independent.

        Raises
        ------
        ShapeError
            When the matrix has another number of columns than there are outputs.
        """
        k = self.mean.shape[-1]
        matrix = torch.as_tensor(matrix, device=self.mean.device)
        if matrix.dim() != 2 or matrix.shape[1] != k or not len(matrix):
            raise ShapeError(
                f"matrix of shape {tuple(matrix.shape)} for {k} outputs",
                where="OutputLaw.project",
                advice=f"Give one row of {k} numbers for each functional.",
            )
        exact = self._moments()
        matrix = matrix.to(exact.mean)
        shift = exact.mean.new_zeros(len(matrix))
        if offset is not None:
            shift = torch.as_tensor(offset).to(exact.mean)
        if shift.shape != (len(matrix),):
            raise ShapeError(
                f"offset of shape {tuple(shift.shape)} for {len(matrix)} functionals",
                where="OutputLaw.project",
                advice=f"Give {len(matrix)} numbers.",
            )
        error = self._error
        if error is not None:
            error = ErrorBar(error.difference @ matrix.mT, error.relative)
        tower, total = None, shift
        if self._tower is None:
            mean, covariance = exact.mean @ matrix.mT + shift, exact.covariance
            if covariance is None:
                moments = Moments(mean, exact.variance @ matrix.square().mT)
            else:
                covariance = matrix @ covariance @ matrix.mT
                moments = Moments(mean, covariance.diagonal(dim1=-2, dim2=-1), covariance)
        else:
            block = Block(len(matrix), ((slice(0, k), Dense(matrix)),))
            linear = AffineMap(JointMap(k, (block,)), torch.zeros_like(shift))
            tower = self._tower.affine(linear)
            total = shift if self._offset is None else shift + matrix @ self._offset
            moments = moments_of(tower, self._radius, total)
        law = OutputLaw.from_moments(
            moments,
            order=self.order,
            augmented=self.augmented,
            dtype=self.mean.dtype,
            tower=tower,
            radius=self._radius,
            offset=total,
            error=error,
        )
        return replace(law, flops=self.flops, seconds=self.seconds, checks=self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            Every public field; `layers` as nested dictionaries.
        """
        return to_jsonable(self)

    def plot(self, labels: list[str] | None = None) -> Any:
        """Means with their spread and error bars.

        Parameters
        ----------
        labels
            Names of the outputs.

        Returns
        -------
        matplotlib.figure.Figure
            Ready to save or show; needs the extra ``pushforward[plot]``.
        """
        from pushforward.cumulants.plots import plot_outputs

        return plot_outputs(self, labels)

    def _levels(self, given: float | Tensor, where: str) -> Tensor:
        """Thresholds or probabilities that broadcast against the outputs, rows of them in front."""
        levels = torch.as_tensor(given, dtype=torch.float64, device=self.mean.device)
        k = self.mean.shape[-1]
        if levels.dim() > 2 or (levels.dim() and levels.shape[-1] not in {1, k}):
            raise ShapeError(
                f"levels of shape {tuple(levels.shape)} for {k} outputs",
                where=f"OutputLaw.{where}",
                advice=f"Give one number, {k} numbers, or rows of {k} (or of 1).",
            )
        if bool(levels.isnan().any()):
            raise OptionError(
                "a level is NaN", where=f"OutputLaw.{where}", advice="Give real numbers."
            )
        return levels[:, None] if levels.dim() == 2 and self.mean.dim() == 2 else levels

    def _moments(self) -> Moments:
        if self._exact is not None:
            return self._exact
        public = (self.mean, self.variance, self.covariance, self.third, self.fourth)
        return Moments(*public).cast(torch.float64)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.mean.shape))
        cost = f" ({self.cost})" if self.flops else ""
        lines = [f"OutputLaw of {shape} outputs by {self.method}{cost}"]
        if self.mean.dim() == 1:
            errors = [""] * len(self.mean)
            heading = "mean"
            if self.standard_error is not None:
                errors = [f" ± {error:<8.2g}" for error in self.standard_error.tolist()]
                heading = "mean ± s.e.    "
            lines.append(f"  output {heading:>{12 + len(errors[0])}} {'std':>10}")
            deviations = self.variance.clamp(min=0).sqrt().tolist()
            rows = zip(self.mean.tolist(), errors, deviations, strict=True)
            for index, (mean, error, deviation) in enumerate(rows):
                if index == _ROWS_SHOWN:
                    lines.append(f"  ... {len(self.mean) - _ROWS_SHOWN} more")
                    break
                lines.append(f"  {index:>6} {mean:>12.5g}{error} {deviation:>10.4g}")
        lines += [f"  {check}" for check in self.checks if check.status != "pass"]
        return "\n".join(lines)


def concatenate(laws: Sequence[OutputLaw]) -> OutputLaw:
    """Laws of several batches as one batch.

    Parameters
    ----------
    laws
        Of the same network by the same method, each for a batch of input laws.

    Returns
    -------
    OutputLaw
        Costs added, of each check the worst.
    """
    first = laws[0]
    if len(laws) == 1:
        return first
    exact = Moments(*(_join([law._moments()[i] for law in laws]) for i in range(5)))  # type: ignore[arg-type]
    towers = [law._tower for law in laws if law._tower is not None]
    bars = [law._error for law in laws if law._error is not None]
    error = None
    if bars:
        error = ErrorBar(
            torch.cat([b.difference for b in bars]), torch.cat([b.relative for b in bars])
        )
    joined = OutputLaw.from_moments(
        exact,
        order=first.order,
        augmented=first.augmented,
        dtype=first.mean.dtype,
        tower=concatenate_towers(towers) if towers else None,
        radius=first._radius,
        offset=first._offset,
        error=error,
    )
    worst: dict[str, Check] = {}
    for check in (check for law in laws for check in law.checks):
        known = worst.get(check.name)
        if known is None or worst_status((known, check)) != known.status:
            worst[check.name] = check
    return replace(
        joined,
        flops=sum(law.flops for law in laws),
        seconds=sum(law.seconds for law in laws),
        checks=tuple(worst.values()),
        layers={name: concatenate([law.layers[name] for law in laws]) for name in first.layers},
    )


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def moments_of(
    tower: CumulantTower, radius: Radius | None, offset: Tensor | None = None
) -> Moments:
    """Moments of the outputs from their tower.

    Parameters
    ----------
    tower
        Of the outputs, or of the outputs for inputs on the sphere.
    radius
        Of the input law when the tower is the one on the sphere.
    offset
        Added to the outputs; on the sphere it must not be multiplied by the radius.

    Returns
    -------
    Moments
        Float64.
    """
    if radius is None:
        mean, covariance = tower.mean, tower.covariance
        third, fourth = tower.marginal_third(), tower.marginal_fourth()
    else:
        mean, covariance, third, fourth = radius.restore(tower)
    mean = mean if offset is None else mean + offset
    return Moments(mean, covariance.diagonal(dim1=-2, dim2=-1), covariance, third, fourth)
