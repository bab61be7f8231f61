"""The plainest kernel there is, laws to walk on, and ways for it to go wrong."""

from dataclasses import dataclass, field

import torch

from pushforward.sampling.kernel import Kernel
from pushforward.sampling.noise import NoiseSize
from pushforward.sampling.potential import Potential
from pushforward.sampling.runner import sample

MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)
STD = torch.tensor([0.5, 1.0], dtype=torch.float64)


def normal_density(parameters):
    """Two numbers: their sum rounds the same however many chains there are."""
    mean, std = MEAN.to(parameters["layer.w"]), STD.to(parameters["layer.w"])
    return -(((parameters["layer.w"] - mean) / std).square()).sum() / 2


def normal_potential(dtype=torch.float64):
    return Potential.of_density(normal_density, {"layer.w": torch.zeros(2, dtype=dtype)})


@dataclass(frozen=True, eq=False)
class RandomWalk(Kernel):
    """Random-walk Metropolis, whose step size learns an acceptance of 40 %."""

    potential: Potential = field(default_factory=normal_potential)
    step_size: float = 1.0
    name = "RandomWalk"

    @property
    def space(self):
        return self.potential.space

    @property
    def dtype(self):
        return self.potential.dtype

    @property
    def device(self):
        return self.potential.device

    @property
    def start_size(self):
        return NoiseSize(normals=self.potential.start_normals)

    @property
    def noise_size(self):
        return NoiseSize(normals=self.space.size, uniforms=1)

    @property
    def bytes_per_chain(self):
        return self.potential.bytes_per_chain

    def start(self, initial, noise):
        vectors = self.potential.start(initial, noise.normals)
        potential = self.potential.value(vectors)
        ones = torch.ones_like(potential)
        return {
            "vectors": vectors,
            "potential": potential,
            "step_size": self.step_size * ones,
            "acceptance": ones,
            "divergent": torch.zeros_like(ones, dtype=torch.bool),
        }

    def step(self, state, noise):
        here, size = state["vectors"], state["step_size"]
        there = here + size[:, None].to(here) * noise.normals
        potential = self.potential.value(there)
        acceptance = (state["potential"] - potential).exp().clamp(max=1.0)
        moves = noise.uniforms[:, 0] < acceptance
        return state | {
            "vectors": torch.where(moves[:, None], there, here),
            "potential": torch.where(moves, potential, state["potential"]),
            "acceptance": acceptance,
            "divergent": potential > 1e3,
        }

    def warm_up(self, state, noise, step, total):  # noqa: ARG002
        moved = self.step(state, noise)
        rate = (moved["acceptance"] - 0.4) / (step + 1) ** 0.6
        return moved | {"step_size": state["step_size"] * rate.exp()}

    def vectors(self, state):
        return state["vectors"]

    def statistics(self, state):
        names = ("acceptance", "potential", "step_size", "divergent")
        return {name: state[name].double() for name in names}

    def identity(self):
        return {"potential": self.potential.identity(), "step_size": self.step_size}


@dataclass(frozen=True, eq=False)
class Stopping(RandomWalk):
    """Does something, such as raising, when so many steps have been made; otherwise the same."""

    after: int = 0
    action: object = None
    made: list = field(default_factory=list)

    def step(self, state, noise):
        if len(self.made) == self.after:
            self.made.append("stopped")
            self.action()
        self.made.append("step")
        return super().step(state, noise)


@dataclass(frozen=True, eq=False)
class Dying(RandomWalk):
    """Chains that begin on the wrong side of `least` leave for infinity."""

    least: float = 0.0

    def step(self, state, noise):
        moved = super().step(state, noise)
        lost = moved["vectors"][:, 0] < self.least
        return moved | {"vectors": moved["vectors"].masked_fill(lost[:, None], torch.nan)}


def run(kernel=None, **options):
    defaults = {"num_draws": 30, "num_chains": 4, "num_warmup": 20, "seed": 7}
    return sample(RandomWalk() if kernel is None else kernel, **(defaults | options))


def tensors_of(chains):
    """Everything a run returned, by name."""
    groups = {
        "parameters": chains.parameters,
        "observations": chains.observations,
        "statistics": chains.statistics,
        "warmup": chains.warmup_statistics,
        "mean": chains.moments.mean,
        "variance": chains.moments.variance,
    }
    return {f"{group} {name}": t for group, kept in groups.items() for name, t in kept.items()}


def assert_same(found, expected):
    """Bit for bit, types included."""
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
