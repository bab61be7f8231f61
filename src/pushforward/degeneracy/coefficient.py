"""What an estimate of the learning coefficient says: value, error, verdict, and the evidence."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor

from pushforward.runs.estimate import Estimate, to_jsonable

__all__ = ["LearningCoefficient", "Measured", "Verdict"]

Verdict: TypeAlias = Literal[
    "OK", "NOT_EQUILIBRATED", "STEP_TOO_LARGE", "NOT_A_MINIMUM", "DEAD_CHAINS"
]

_ADVICE: dict[Verdict, str] = {
    "OK": "The chains agree, have stopped drifting, and do not feel the step size.",
    "NOT_EQUILIBRATED": "The chains are still on their way. Give more draws, or a larger "
    "localization, which looks at a smaller neighbourhood that is reached sooner.",
    "STEP_TOO_LARGE": "The step size changes the answer. Give a smaller one with more draws, or a "
    "larger localization; of a network of up to some 10,000 parameters take sampler='hmc'.",
    "NOT_A_MINIMUM": "The chains find lower losses than that of the network: training had not "
    "ended. Train on, give a larger localization, or take realisable=True, for which every network "
    "is a minimum.",
    "DEAD_CHAINS": "Some chains left for NaN or infinity and are excluded. The others may be the "
    "ones that had not met what killed them: give a smaller step_size.",
}


@dataclass(frozen=True)
class Measured:
    """A number with its standard error.

    Parameters
    ----------
    value
        The number.
    standard_error
        Its error; NaN when it is not known.
    """

    value: float
    standard_error: float

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


@dataclass(frozen=True, repr=False)
class LearningCoefficient(Estimate):
    """The local learning coefficient at a network's weights, at a finite temperature.

    ``value = n beta (E[L(w)] - L(w*))`` under ``exp(-n beta L(w) - gamma |w - w*|^2 / 2)``.

    Parameters
    ----------
    verdict
        ``"OK"``, or the first thing that is wrong.
    nbeta, localization
        ``n beta`` and ``gamma``.
    metric
        In which distances from the weights are measured.
    sampler
        That moved the chains.
    step_size
        ``eps`` of the main run; half of it in the second. NaN for samplers that learn theirs.
    batch_size
        Examples in a minibatch; all of them for samplers with a Metropolis test.
    num_examples, num_parameters
        Of the data, and those that were sampled.
    num_chains, num_draws, num_warmup
        Chains that began, steps of the main run, and steps before it.
    dead_chains
        Chains that were lost along the way, and are excluded from there on.
    initial_loss
        ``L(w*)``, exactly: a mean over all examples.
    initial_loss_error
        Standard error of `initial_loss` as an estimate of the loss on new data. It is common to
        all chains and no part of `standard_error`: the coefficient is about these data.
    r_hat, effective_draws
        Of the excess loss.
    drift
        Second half of the main run minus the first.
    virial
        Mean of ``(w - w*) . grad U``: the number of parameters in equilibrium.
    runs
        The coefficient at step sizes ``eps`` and ``eps / 2``, before extrapolation.
    expected_bias
        What theory expects of step size and minibatches at ``eps``, in units of the coefficient.
    acceptance
        With which a Metropolis test on the same examples would have accepted steps like these.
    quadratic
        ``1/2 sum n beta h / (n beta h + gamma)`` over the eigenvalues of the Hessian at
        ``w*``: what the coefficient would be if the loss were quadratic.
    slope
        What the gradient at ``w*`` takes from that: 0 at a minimum.
    localization_effect
        Derivative of the coefficient by ``ln gamma``: from fluctuations of the draws, or as if the
        loss were quadratic where that is more precise.
    crosschecks
        Estimates of the coefficient from other relations, by name: ``"two temperatures"`` and
        ``"variance"`` do without ``L(w*)``.
    singular_fluctuation
        ``nu = beta / 2 sum_i Var[log p(y_i)]``.
    waic, wbic
        Per example, and of all, in nats, at this temperature and localisation.
    excess
        ``(alive, draw)``: ``n beta (L - L(w*))`` along the main run, estimated from minibatches.
    warmup_excess
        The same before it, of the chains that began.
    losses
        ``(survivor, spaced)``: mean loss over all examples at spaced draws of the second run.
    """

    _: KW_ONLY
    verdict: Verdict
    nbeta: float
    localization: float
    metric: str
    sampler: str
    step_size: float
    batch_size: int
    num_examples: int
    num_parameters: int
    num_chains: int
    num_draws: int
    num_warmup: int
    dead_chains: int
    initial_loss: float
    initial_loss_error: float
    r_hat: float
    effective_draws: float
    drift: Measured
    virial: Measured
    runs: tuple[Measured, ...]
    expected_bias: float
    acceptance: float
    quadratic: Measured | None
    slope: float
    localization_effect: Measured
    crosschecks: dict[str, Measured]
    singular_fluctuation: Measured | None
    waic: float
    wbic: float
    excess: Float[Tensor, "alive draw"] = field(metadata={"json": False})
    warmup_excess: Float[Tensor, "started step"] = field(metadata={"json": False})
    losses: Float[Tensor, "survivor spaced"] = field(metadata={"json": False})

    @property
    def advice(self) -> str:
        """What the verdict means."""
        return _ADVICE[self.verdict]

    @property
    def chain_values(self) -> Float[Tensor, " alive"]:
        """The coefficient from each chain of the main run, before extrapolation."""
        return self.excess.mean(1)

    def plot(self) -> Any:
        """Traces of all chains with their running means.

        Returns
        -------
        matplotlib.figure.Figure
            Warm-up in grey, then the main run.

        Raises
        ------
        OptionError
            When matplotlib is not installed.
        """
        from pushforward.degeneracy.plots import plot_traces

        return plot_traces(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON; numbers that are not finite become None.

        Returns
        -------
        dict
            The fields without traces, `advice`, and the value of every chain.
        """
        fields: dict[str, Any] = to_jsonable(self)
        more = {"advice": self.advice, "chain_values": self.chain_values.tolist()}
        finite: dict[str, Any] = _finite(fields | more)
        return finite

    def __repr__(self) -> str:
        known = (
            f"  r_hat {self.r_hat:.3f}, {self.effective_draws:.0f} effective draws of "
            f"{self.num_chains} x {self.num_draws:,}"
        )
        lines = [
            f"Local learning coefficient {float(self):.4g} ± {float(self.standard_error):.2g}: "
            f"{self.verdict}",
            f"  n beta {self.nbeta:.4g}, localization {self.localization:.4g}, "
            f"{self.num_parameters:,} parameters (half of them: {self.num_parameters / 2:,.0f})",
            known,
        ]
        if self.quadratic is not None:
            lines.append(
                f"  {self.quadratic} if the loss were quadratic, {self.slope:+.3g} for the slope"
            )
        lines += [f"  {found} by {name}" for name, found in self.crosschecks.items()]
        lines.append(f"  cost: {self.cost}")
        lines += [f"  {check}" for check in self.checks if check.status != "pass"]
        if self.verdict != "OK":
            lines.append(f"  {self.advice}")
        return "\n".join(lines)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
