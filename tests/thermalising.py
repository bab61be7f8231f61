"""Linear problems with a closed posterior, and kernels that are right, slow, stuck or wrong."""

from dataclasses import dataclass

import torch
from torch import nn

from pushforward.networks.likelihoods import Gaussian
from pushforward.sampling.kernel import Kernel
from pushforward.sampling.noise import NoiseSize
from pushforward.sampling.thermalization.teacher_student import TeacherStudent

FEATURES = 7


def linear_problem(noise=0.5, count=30, **options):
    """Eight parameters with a Gaussian posterior."""
    net = nn.Linear(FEATURES, 1).double()
    return TeacherStudent(net, count, 40, likelihood=Gaussian(noise), **options)


def linear_posterior(instance):
    """Mean and Cholesky factor of the covariance of ``(weight, bias)``, by the normal equations."""
    x, y = instance.inputs, instance.targets[:, 0]
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    variance = instance.problem.likelihood.noise_variance
    precision = design.T @ design / variance + torch.eye(FEATURES + 1, dtype=x.dtype)
    covariance = torch.linalg.inv(precision)
    return covariance @ design.T @ y / variance, torch.linalg.cholesky(covariance)


@dataclass(frozen=True, eq=False)
class Relaxation(Kernel):
    """``w' = m + r (w - m) + sqrt(1 - r^2) s L e``, exact for any ``r`` in [0, 1] when s is 1.

    With ``memory`` 1 it is stuck, near 1 slow; ``inflation`` and ``shift`` (in units of the
    posterior mean) make it wrong.
    """

    instance: object
    memory: float = 0.0
    inflation: float = 1.0
    shift: float = 0.0

    name = "relaxation"

    def __post_init__(self):
        mean, factor = linear_posterior(self.instance)
        object.__setattr__(self, "mean", mean * (1 + self.shift))
        object.__setattr__(self, "factor", factor)

    @property
    def space(self):
        return self.instance.problem.space

    @property
    def dtype(self):
        return torch.float64

    @property
    def device(self):
        return torch.device("cpu")

    @property
    def start_size(self):
        return NoiseSize(0, 0)

    @property
    def noise_size(self):
        return NoiseSize(self.space.size, 0)

    @property
    def bytes_per_chain(self):
        return 8 * self.space.size

    def start(self, initial, noise):  # noqa: ARG002
        return {"w": self.space.ravel(initial)}

    def step(self, state, noise):
        spread = (1 - self.memory**2) ** 0.5 * self.inflation
        away = self.memory * (state["w"] - self.mean)
        return {"w": self.mean + away + spread * noise.normals @ self.factor.T}

    def vectors(self, state):
        return state["w"]

    def statistics(self, state):
        return {"acceptance": torch.ones(len(state["w"]), dtype=torch.float64)}

    def identity(self):
        return {"memory": self.memory, "inflation": self.inflation, "shift": self.shift}
