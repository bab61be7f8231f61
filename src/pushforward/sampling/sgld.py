"""Stochastic gradient Langevin dynamics: unadjusted, so it works with minibatches, at a bias.

Welling and Teh (2011), at a constant step size, in the convention ``w <- w - (eps / 2) G grad U(w)
+ sqrt(eps G) N``. On a direction of curvature ``a`` its stationary variance is exactly
`sgld_stationary_variance`, so the bias is of order ``eps a / 4`` and is largest where the posterior
is narrowest.

Noise that is averaged over two steps, ``(N_k + N_{k+1}) / 2``, takes that bias away at no cost: the
variance on a quadratic is then exactly ``1 / a`` at every stable step size. Leimkuhler and Matthews
(2013) derive it as the limit of large friction of an integrator with a momentum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.options import number
from pushforward.runs.store import fingerprint
from pushforward.sampling.gradient_kernel import GradientKernel
from pushforward.sampling.kernel import State
from pushforward.sampling.noise import Noise, NoiseSize
from pushforward.typing import Params

__all__ = ["SGLD", "sgld_stationary_variance"]

# Root mean squares of gradients are averaged over this many steps; the damping, relative to their
# mean over the parameters, bounds the preconditioner by its inverse.
_MEMORY = 100
_DAMPING = 0.1


@dataclass(frozen=True, eq=False)
class SGLD(GradientKernel):
    """Stochastic gradient Langevin dynamics at a constant step size.

    Parameters
    ----------
    potential
        Minus the log density, with or without minibatches.
    step_size
        ``eps``: the variance of the noise of a step.
    preconditioner
        ``G``: None, a tensor ``(P,)`` of positive numbers, or ``"rmsprop"``: parameters with small
        gradients make larger steps. It is then the mean root mean square gradient over that of each
        parameter, damped and hence at most 11; it is 1 where all gradients are alike, so the step
        size keeps its meaning. It is learned in the warm-up and then frozen: one that went on
        learning would need a correction that is usually left out, and biases even a Gaussian.
    averaged_noise
        Whether the noise of a step is the mean of two, each shared with a neighbouring step, so
        that draws are exact on quadratics.

    Raises
    ------
    OptionError
        For settings out of their range.
    """

    name = "SGLD"

    _: KW_ONLY
    step_size: float
    preconditioner: str | Float[Tensor, " P"] | None = None
    averaged_noise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "step_size", number(self.step_size, "step_size", above=0))
        given = self.preconditioner
        if isinstance(given, Tensor):
            good = given.shape == (self.space.size,) and given.is_floating_point()
            if not (good and bool((torch.isfinite(given) & (given > 0)).all())):
                raise OptionError(
                    f"a tensor {tuple(given.shape)} that is no diagonal preconditioner",
                    where="preconditioner",
                    advice=f"Give {self.space.size:,} positive numbers.",
                )
        elif given not in {None, "rmsprop"}:
            raise OptionError(
                f"there is no preconditioner {self.preconditioner!r}",
                where="preconditioner",
                advice="Choose 'rmsprop', give a tensor, or None.",
            )

    @property
    def start_size(self) -> NoiseSize:
        """A start of the potential, a first batch, and the noise that the first step shares."""
        shared = self.space.size if self.averaged_noise else 0
        return NoiseSize(self.potential.start_normals + shared, self.potential.batch_uniforms)

    @property
    def noise_size(self) -> NoiseSize:
        """A direction and a batch."""
        return NoiseSize(self.space.size, self.potential.batch_uniforms)

    @property
    def _held_vectors(self) -> int:
        return 5 + 3 * self._learns + self.averaged_noise

    @property
    def _learns(self) -> bool:
        return isinstance(self.preconditioner, str)

    def start(self, initial: Params | None, noise: Noise) -> State:
        """Chains where the potential starts them, with the gradient of a first batch."""
        own = self.potential.start_normals
        vectors = self.potential.start(initial, noise.normals[:, :own])
        value, gradient = self.potential.stochastic_value_and_gradient(vectors, noise.uniforms)
        state = {"vectors": vectors, "gradient": gradient, "potential": value}
        if self.averaged_noise:
            state["noise"] = noise.normals[:, own:]
        if self._learns:
            state["squares"] = torch.zeros_like(vectors)
            state["preconditioner"] = torch.ones_like(vectors)
        return state

    def step(self, state: State, noise: Noise) -> State:
        """One step of every chain, and the gradient of a fresh batch where it leads."""
        vectors, gradient = state["vectors"], state["gradient"]
        size, drift, diffusion = self.step_size, gradient, noise.normals
        moved = {}
        if self.averaged_noise:
            diffusion = 0.5 * (state["noise"] + noise.normals)
            moved["noise"] = noise.normals
        factor = state["preconditioner"] if self._learns else self.preconditioner
        if isinstance(factor, Tensor):
            drift, diffusion = drift * factor, diffusion * factor.sqrt()
        vectors = torch.add(vectors, drift, alpha=-0.5 * size)
        vectors = torch.add(vectors, diffusion, alpha=size**0.5)
        value, gradient = self.potential.stochastic_value_and_gradient(vectors, noise.uniforms)
        return state | moved | {"vectors": vectors, "gradient": gradient, "potential": value}

    def warm_up(self, state: State, noise: Noise, step: int, total: int) -> State:  # noqa: ARG002
        """Move every chain once, and learn the preconditioner."""
        state = self.step(state, noise)
        if not self._learns:
            return state
        # A running mean that weighs its first steps equally, then forgets.
        weight = 1 / min(step + 1, _MEMORY)
        squares = torch.lerp(state["squares"], state["gradient"].square(), weight)
        size = squares.sqrt()
        typical = size.mean(-1, keepdim=True)
        factor = (1 + _DAMPING) * typical / torch.add(size, typical, alpha=_DAMPING)
        factor = torch.where(torch.isfinite(factor), factor, torch.ones_like(factor))
        return state | {"squares": squares, "preconditioner": factor}

    def statistics(self, state: State) -> Mapping[str, Float[Tensor, " chains"]]:
        """Potential and gradient norm, estimated from the batch; divergence and step size."""
        return gradient_statistics(state, self.step_size)

    def _settings(self) -> dict[str, Any]:
        given = self.preconditioner
        return {
            "step_size": self.step_size,
            "preconditioner": fingerprint({"G": given}) if isinstance(given, Tensor) else given,
            "averaged_noise": self.averaged_noise,
        }


def gradient_statistics(state: State, step_size: float) -> dict[str, Float[Tensor, " chains"]]:
    """What samplers without a Metropolis test report.

    Parameters
    ----------
    state
        With ``"gradient"`` and ``"potential"``.
    step_size
        Of all chains.

    Returns
    -------
    dict
        ``(chains,)`` float64 each; a chain is divergent when its gradient is not finite.
    """
    value, gradient = state["potential"], state["gradient"]
    norm = gradient.square().sum(-1, dtype=torch.float64).sqrt()
    return {
        "potential": value,
        "gradient_norm": norm,
        "divergent": (~torch.isfinite(norm)).to(value.dtype),
        "step_size": torch.full_like(value, step_size),
    }


@overload
def sgld_stationary_variance(
    curvature: float, step_size: float, gradient_noise_variance: float = 0.0
) -> float: ...
@overload
def sgld_stationary_variance(
    curvature: Tensor, step_size: float, gradient_noise_variance: float | Tensor = 0.0
) -> Tensor: ...
def sgld_stationary_variance(
    curvature: float | Tensor,
    step_size: float,
    gradient_noise_variance: float | Tensor = 0.0,
) -> float | Tensor:
    """Variance of SGLD on a quadratic ``U(w) = a w^2 / 2``, where the exact one is ``1 / a``.

    ``w <- (1 - eps a / 2) w + sqrt(eps) N - (eps / 2) s M`` with independent standard normal ``N``
    and ``M`` has the stationary variance ``(1 + eps s^2 / 4) / (a (1 - eps a / 4))``.

    Parameters
    ----------
    curvature
        ``a``, positive.
    step_size
        ``eps``.
    gradient_noise_variance
        ``s^2``, that a minibatch adds to a gradient.

    Returns
    -------
    float or Tensor
        Infinite where ``eps a >= 4``: the recursion is not stable.

    Raises
    ------
    OptionError
        For a step size that is not positive.

    Examples
    --------
    >>> round(10 * sgld_stationary_variance(10.0, 0.1), 4)
    1.3333
    """
    step_size = number(step_size, "step_size", above=0)
    stable = 1 - step_size * curvature / 4
    noise = 1 + step_size * gradient_noise_variance / 4
    if isinstance(stable, Tensor):
        assert isinstance(curvature, Tensor)
        variance = noise / (curvature * stable)
        return torch.where(stable > 0, variance, torch.full_like(variance, torch.inf))
    return noise / (curvature * stable) if stable > 0 else float("inf")
