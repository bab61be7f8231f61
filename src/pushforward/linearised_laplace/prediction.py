"""What a posterior predicts: outputs with their variances, and expected targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pushforward.runs.estimate import to_jsonable

__all__ = ["Prediction"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a posterior says about the targets of some inputs.

    Parameters
    ----------
    mean
        ``(B, *event)``: outputs of the network itself, which are the mean of the linear model's.
    epistemic_variance
        ``(B, *event)``: variance of the outputs over the posterior, in their squared units.
    noise_variance
        Variance of a target around its output, broadcastable to `mean`; None unless the likelihood
        is Gaussian.
    expected
        ``(B, *event)``: expected targets (probabilities, rates, or `mean` itself), with the
        uncertainty of the weights in them.
    map_expected
        ``(B, *event)``: the same by the network alone.
    standard_error
        ``(B, *event)``: of `epistemic_variance`, from the number of draws; zero when it is exact.
    are_probabilities
        Whether `expected` holds probabilities.
    """

    mean: Float[Tensor, "B *event"]
    epistemic_variance: Float[Tensor, "B *event"]
    noise_variance: Tensor | None
    expected: Float[Tensor, "B *event"]
    map_expected: Float[Tensor, "B *event"]
    standard_error: Float[Tensor, "B *event"]
    are_probabilities: bool = False

    @property
    def probabilities(self) -> Tensor | None:
        """`expected` of a classification, ``(B, *event)``; None otherwise."""
        return self.expected if self.are_probabilities else None

    @property
    def variance(self) -> Tensor:
        """Epistemic and noise variance together, ``(B, *event)``: that of a regression's target."""
        return self.epistemic_variance + (
            0.0 if self.noise_variance is None else self.noise_variance
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            Tensors as nested lists.
        """
        fields: dict[str, Any] = to_jsonable(self)
        return fields

    def __repr__(self) -> str:
        spread = self.epistemic_variance.double().clamp(min=0).sqrt()
        error = self.standard_error.double() / self.epistemic_variance.double().clamp(min=1e-300)
        lines = [
            f"Prediction for outputs of shape {tuple(self.mean.shape)}",
            f"  epistemic standard deviation of an output: median {float(spread.median()):.3g}, "
            f"largest {float(spread.max()):.3g}",
            f"  relative standard error of the epistemic variances: {float(error.mean()):.2g}",
        ]
        if self.noise_variance is not None:
            noise = float(self.noise_variance.double().mean().sqrt())
            lines.append(f"  noise standard deviation of a target: {noise:.3g}")
        return "\n".join(lines)
