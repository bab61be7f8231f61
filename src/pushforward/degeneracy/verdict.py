"""What can be wrong with an estimate, looked for in the order in which it matters."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log, sqrt

from pushforward.degeneracy.agreement import Agreement
from pushforward.degeneracy.coefficient import Measured, Verdict
from pushforward.runs.estimate import Check, Status

__all__ = [
    "alive_check",
    "equilibrium_check",
    "localization_check",
    "metropolis_check",
    "minimum_check",
    "precision_check",
    "step_check",
    "verdict_of",
]

_UNSTABLE = 3.0  # step size times curvature; 4 is the edge
_CHANGES = 0.1  # of the value, by halving the step size
_LARGEST_R_HAT = 1.1
_FEWEST_EFFECTIVE = 50
_NOTHING = 1e-6  # of the value: rounding
_UNBALANCED = 0.05  # of the number of parameters, that the virial may miss
_STUCK = 0.01  # acceptance
_SPRING = 0.5  # change of the logarithm of the value by that of the localisation
_SLOPE = 0.25  # of the value, that the gradient may account for
_MATTERS = 0.1
_BELOW = 0.05  # share of draws that may have a smaller loss than w*

_MEANS: dict[str, Verdict] = {
    "chains-alive": "DEAD_CHAINS",
    "at-a-minimum": "NOT_A_MINIMUM",
    "step-size": "STEP_TOO_LARGE",
    "equilibrated": "NOT_EQUILIBRATED",
}


def verdict_of(checks: Sequence[Check]) -> Verdict:
    """The first thing that is wrong."""
    failed = [_MEANS[check.name] for check in checks if check.status == "fail"]
    return failed[0] if failed else "OK"


def alive_check(dead: int, started: int) -> Check:
    """Whether chains were lost."""
    detail = f"{dead} of {started} chains left for NaN or infinity and are excluded"
    if not dead:
        detail = f"all {started} chains stayed finite"
    return _check("chains-alive", not dead, detail, "Take a smaller step size.")


def minimum_check(runs: Sequence[Measured], below: float, slope: float) -> Check:
    """Whether chains go up from the weights, not down, and the loss has no slope there."""
    # The runs are asked: what is extrapolated is negative also when the step is far too large.
    value = runs[-1].value
    error = runs[-1].standard_error
    slope = 0.0 if abs(slope) < _NOTHING * abs(value) else slope
    detail = (
        f"{100 * below:.2g} % of the draws have a smaller loss than the network itself; its "
        f"slope takes {0.0 - slope:.2g} from the value, if the loss is quadratic"
    )
    # A weight that is a little off its minimum has draws below it, and changes nothing.
    matters = -slope > _MATTERS * abs(value)
    if all(run.value + 2 * run.standard_error < 0 for run in runs) or (below > _BELOW and matters):
        advice = "The network is not at a minimum at this temperature: train on."
        return Check("at-a-minimum", "fail", detail, advice)
    if -slope > max(2 * error, _SLOPE * abs(value)):
        advice = "The network is not quite at a minimum at this temperature: train on."
        return Check("at-a-minimum", "warn", detail, advice)
    return Check("at-a-minimum", "pass", detail)


def metropolis_check(acceptance: float) -> Check:
    """Whether a sampler with a Metropolis test moves."""
    detail = f"a Metropolis test makes it exact; {100 * acceptance:.3g} % of proposals accepted"
    return _check("step-size", acceptance >= _STUCK, detail, "Nothing moves. Take a smaller step.")


def step_check(runs: Sequence[Measured], value: float, sharpest: float) -> Check:
    """Whether the step size can be felt."""
    change = runs[0].value - runs[1].value
    error = sqrt(runs[0].standard_error ** 2 + runs[1].standard_error ** 2)
    large = abs(change) > max(3 * error, _CHANGES * abs(value))
    good = not large and sharpest < _UNSTABLE
    detail = (
        f"half the step changes the value by {-change:.3g} ± {error:.2g}; step times largest "
        f"curvature is {sharpest:.2g}, of 4 at which nothing is stable"
    )
    return _check("step-size", good, detail, "Take a smaller step size.")


def equilibrium_check(found: Agreement, balance: Agreement, num_parameters: int) -> Check:
    """Whether chains agree, have stopped drifting, and are balanced in all directions."""
    # Flat directions, which the loss forgets, show in the virial.
    missing = abs(balance.mean - num_parameters)
    balanced = not missing > 3 * balance.standard_error + _UNBALANCED * num_parameters
    mixed = not found.r_hat > _LARGEST_R_HAT and not found.effective_draws < _FEWEST_EFFECTIVE
    detail = (
        f"second half minus first {found.drift:.3g} ± {found.drift_error:.2g}, R-hat "
        f"{found.r_hat:.3f}, {found.effective_draws:.0f} effective draws, "
        f"virial {balance.mean:.4g} ± {balance.standard_error:.2g} of {num_parameters:,}"
    )
    return _check(
        "equilibrated",
        mixed and found.settled and balanced,
        detail,
        "Take more draws or more localization.",
    )


def localization_check(value: float, effect: Measured) -> Check:
    """Whether the spring leaves it to the network what the value is."""
    sure = abs(effect.value) - 2 * effect.standard_error
    good = not sure > _SPRING * abs(value)
    detail = (
        f"twice the localization would change the value by about {effect.value * log(2):.2g} ± "
        f"{effect.standard_error * log(2):.1g}"
    )
    advice = (
        "The spring rather than the network sets the value. Give a smaller localization, with more "
        "draws, and compare networks at the same one only."
    )
    return Check("localization", "pass" if good else "warn", detail, "" if good else advice)


def precision_check(value: float, error: float) -> Check:
    """Whether the error is small beside the value."""
    relative = error / abs(value) if value else inf
    status: Status = "pass" if relative < _CHANGES else "warn"
    advice = "" if status == "pass" else "Take more draws or more chains."
    return Check("standard-error", status, f"{100 * relative:.2g} % of the value", advice)


def _check(name: str, good: bool, detail: str, advice: str) -> Check:
    return Check(name, "pass" if good else "fail", detail, "" if good else advice)
