"""The stochastic gradient Nosé-Hoover thermostat: a friction that finds the noise of minibatches.

Ding et al. (2014): ``dw = r dt``, ``dr = -grad U dt - xi r dt + sqrt(2 A) dB``, ``dxi = (|r|^2 / P
- 1) dt``. With exact gradients ``xi`` is normal around ``A`` with variance ``1 / P``; gradient
noise that is the same in all directions raises ``xi`` and leaves the law of ``w`` alone.
The splitting, symmetric and with one gradient a step, is of Leimkuhler and Shang (2016).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.options import number
from pushforward.sampling.kernel import State
from pushforward.sampling.noise import Noise
from pushforward.sampling.sghmc import MomentumKernel
from pushforward.typing import Params

__all__ = ["SGNHT"]


@dataclass(frozen=True, eq=False)
class SGNHT(MomentumKernel):
    """The stochastic gradient Nosé-Hoover thermostat.

    Its bias is of second order in the step size; gradient noise of variance ``s^2`` in every
    direction only moves the thermostat, to ``diffusion + step_size s^2 / 2`` on average.

    Parameters
    ----------
    potential
        Minus the log density, with or without minibatches.
    step_size
        Time of a step; its square compares with the step size of SGLD.
    diffusion
        ``A``: noise that is added; the friction that balances it when gradients are exact.

    Raises
    ------
    OptionError
        For settings out of their range.
    """

    name = "SGNHT"

    _: KW_ONLY
    diffusion: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "diffusion", number(self.diffusion, "diffusion", above=0))

    def start(self, initial: Params | None, noise: Noise) -> State:
        """Chains where the potential starts them, with the friction of exact gradients."""
        state = super().start(initial, noise)
        return state | {"thermostat": torch.full_like(state["potential"], self.diffusion)}

    def step(self, state: State, noise: Noise) -> State:
        """Drift, adjust, fluctuate, adjust, drift, kick."""
        size, momentum = self.step_size, state["momentum"]
        vectors = torch.add(state["vectors"], momentum, alpha=size / 2)
        friction = state["thermostat"] + size / 2 * _excess(momentum)
        # exp(-xi h) and the variance 2 A (1 - exp(-2 xi h)) / (2 xi), which is 2 A h at xi = 0.
        exponent = 2 * size * friction
        safe = torch.where(exponent == 0, torch.ones_like(exponent), exponent)
        ratio = torch.where(exponent == 0, torch.ones_like(safe), -torch.expm1(-safe) / safe)
        spread = (2 * self.diffusion * size * ratio).sqrt()
        kept = (-exponent / 2).exp()
        momentum = torch.addcmul(
            momentum * kept.to(momentum.dtype)[:, None],
            noise.normals,
            spread.to(momentum.dtype)[:, None],
        )
        friction = friction + size / 2 * _excess(momentum)
        return self._moved(state, vectors, momentum, noise) | {"thermostat": friction}

    def statistics(self, state: State) -> Mapping[str, Float[Tensor, " chains"]]:
        """Those of SGHMC, and the ``"thermostat"``: the friction in force."""
        return dict(super().statistics(state)) | {"thermostat": state["thermostat"]}

    def _settings(self) -> dict[str, Any]:
        return {"step_size": self.step_size, "diffusion": self.diffusion}


def _excess(momentum: Tensor) -> Tensor:
    """How much hotter than 1 the momenta are."""
    return momentum.square().mean(-1, dtype=torch.float64) - 1
