"""The No-U-Turn sampler, many chains in step.

Trajectories double, forward or backward in time, until they turn back (Hoffman and Gelman 2014).
A point is drawn from them by its weight, with a bias towards the latest half, and the turn is
measured by the sum of the momenta (Betancourt 2017, appendix A), for every balanced subtree and
across the seams between its halves.

All chains double together; those that have finished leave the batch. A subtree is walked leaf by
leaf. The leaves at which subtrees begin are the same in all chains, so a stack of momenta, at most
one for each level, is all the memory there is.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pushforward.options import whole_number
from pushforward.sampling.dynamics import (
    LARGEST_ENERGY_ERROR,
    Point,
    kicked,
    kinetic_energy,
    moved,
    strides,
)
from pushforward.sampling.gradient_kernel import AdaptiveKernel
from pushforward.sampling.kernel import State
from pushforward.sampling.noise import Noise, NoiseSize
from pushforward.sampling.potential import Potential
from pushforward.typing import Params

__all__ = ["NUTS"]

_DEEPEST = 20
_UNIFORMS = 3  # for each doubling: direction, choice within the new half, choice between halves
_LARGEST = 1e300  # in place of infinity, from which nothing can be subtracted


@dataclass(frozen=True, eq=False)
class NUTS(AdaptiveKernel):
    """The No-U-Turn sampler.

    Chains that run side by side wait for the longest trajectory among them, but only its own
    gradients are computed then.

    Parameters
    ----------
    potential
        Minus the log density.
    step_size
        Of the leapfrog integrator, in units of the scale (see `mass`); None to learn it in the
        warm-up. Without any warm-up chains keep the guess with which they start.
    max_depth
        Doublings of a trajectory at most: it has no more than ``2^max_depth - 1`` steps.
    target_acceptance
        That the learned step size aims at: the mean over a trajectory.
    mass
        ``"diagonal"``: the standard deviations of the parameters are learned in the warm-up.
        ``"dense"``: their covariance, by windows with twice as many draws as parameters.
        ``"identity"``: the identity. A tensor: inverse variances ``(P,)``, or an inverse covariance
        ``(P, P)``.

    Raises
    ------
    OptionError
        For settings out of their range.
    """

    name = "NUTS"

    _: KW_ONLY
    max_depth: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        max_depth = whole_number(self.max_depth, "max_depth", most=_DEEPEST)
        object.__setattr__(self, "max_depth", max_depth)

    @property
    def noise_size(self) -> NoiseSize:
        """A momentum, and three choices for each doubling."""
        return NoiseSize(normals=self.space.size, uniforms=_UNIFORMS * self.max_depth)

    @property
    def _held_vectors(self) -> int:
        return 24 + 3 * self.max_depth

    def start(self, initial: Params | None, noise: Noise) -> State:
        """Chains where the potential starts them."""
        state = super().start(initial, noise)
        nothing = torch.zeros_like(state["potential"])
        return state | {"tree_depth": nothing, "leapfrog_steps": nothing.clone()}

    def statistics(self, state: State) -> dict[str, Float[Tensor, " chains"]]:
        """Those of every Metropolis kernel, depths of the trees and numbers of steps."""
        more = {name: state[name] for name in ("tree_depth", "leapfrog_steps")}
        return dict(super().statistics(state)) | more

    def step(self, state: State, noise: Noise) -> State:
        """One trajectory of every chain and a point of it."""
        here = Point(state["vectors"], noise.normals, state["gradient"], state["potential"])
        tree = _Tree.root(here, self._stride(state), noise.uniforms)
        rows = torch.arange(len(here.vectors), device=here.vectors.device)
        results = {name: tensor.clone() for name, tensor in tree.results().items()}
        for depth in range(self.max_depth):
            tree, grows = _doubled(self.potential, tree, depth)
            if depth == self.max_depth - 1:
                grows = torch.zeros_like(grows)
            going = grows.nonzero()[:, 0]
            if len(going) == len(rows):
                continue
            done = (~grows).nonzero()[:, 0]
            for name, tensor in tree.results().items():
                results[name][rows[done]] = tensor[done]
            if not len(going):
                break
            tree, rows = tree.select(going), rows[going]
        return state | results

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"max_depth": self.max_depth}


class _Tree(NamedTuple):
    """Trajectories so far: both ends, the chosen point, and sums over all points.

    All energies are relative to the one at the root.
    """

    left: Point
    right: Point
    momentum_sum: Tensor
    log_weight: Tensor
    vectors: Tensor
    gradient: Tensor
    value: Tensor
    depth: Tensor
    steps: Tensor
    acceptance_sum: Tensor
    divergent: Tensor
    energy: Tensor
    stride: Tensor
    uniforms: Tensor

    @classmethod
    def root(cls, here: Point, stride: Tensor, uniforms: Tensor) -> _Tree:
        none = torch.zeros_like(here.value)
        energy = here.energy.clamp(max=_LARGEST)
        return cls(
            left=here,
            right=here,
            momentum_sum=here.momentum,
            log_weight=none,
            vectors=here.vectors,
            gradient=here.gradient,
            value=here.value,
            depth=none,
            steps=none,
            acceptance_sum=none,
            divergent=none.bool(),
            energy=energy,
            stride=stride,
            uniforms=uniforms,
        )

    def select(self, rows: Tensor) -> _Tree:
        left, right, *rest = self
        ends = [Point(*(tensor[rows] for tensor in end)) for end in (left, right)]
        return _Tree(ends[0], ends[1], *(tensor[rows] for tensor in rest))

    def results(self) -> State:
        return {
            "vectors": self.vectors,
            "gradient": self.gradient,
            "potential": self.value,
            "acceptance": self.acceptance_sum / self.steps.clamp(min=1),
            "divergent": self.divergent.to(self.value.dtype),
            "tree_depth": self.depth,
            "leapfrog_steps": self.steps,
        }


class _Leaf(NamedTuple):
    """Where a subtree begins: its first momentum, the one before, the sum of all before."""

    momentum: Tensor
    previous: Tensor
    sum_before: Tensor


class _Subtree(NamedTuple):
    """A new half of the trajectories."""

    end: Point
    first_momentum: Tensor
    momentum_sum: Tensor
    log_weight: Tensor
    vectors: Tensor
    gradient: Tensor
    value: Tensor
    whole: Tensor
    divergent: Tensor
    steps: Tensor
    acceptance_sum: Tensor


def _doubled(
    potential: Potential, tree: _Tree, depth: int
) -> tuple[_Tree, Bool[Tensor, " chains"]]:
    """Trees with a new half where that has no turn in itself; whether they go on growing."""
    direction, within, between = tree.uniforms[:, _UNIFORMS * depth :][:, :_UNIFORMS].unbind(-1)
    forward = direction < 0.5
    wide = forward[:, None]
    near = Point(*(_where(forward, r, l) for l, r in zip(tree.left, tree.right, strict=True)))
    far_momentum = torch.where(wide, tree.left.momentum, tree.right.momentum)
    stride = strides(torch.where(forward, 1.0, -1.0), tree.stride)
    new = _subtree(potential, near, stride, tree.energy, within, 2**depth)

    taken = new.whole & (between < (new.log_weight - tree.log_weight).exp())
    grows = new.whole & _goes_on(
        far_momentum,
        near.momentum,
        new.first_momentum,
        new.end.momentum,
        tree.momentum_sum,
        new.momentum_sum,
    )
    ends = [
        Point(*(_where(side, after, before) for after, before in zip(new.end, end, strict=True)))
        for side, end in ((~forward, tree.left), (forward, tree.right))
    ]
    return tree._replace(
        left=ends[0],
        right=ends[1],
        momentum_sum=tree.momentum_sum + new.momentum_sum,
        log_weight=torch.logaddexp(tree.log_weight, new.log_weight),
        vectors=_where(taken, new.vectors, tree.vectors),
        gradient=_where(taken, new.gradient, tree.gradient),
        value=torch.where(taken, new.value, tree.value),
        depth=tree.depth + new.whole,
        steps=tree.steps + new.steps,
        acceptance_sum=tree.acceptance_sum + new.acceptance_sum,
        divergent=tree.divergent | new.divergent,
    ), grows


def _subtree(
    potential: Potential,
    start: Point,
    stride: Tensor,
    energy: Tensor,
    uniform: Tensor,
    leaves: int,
) -> _Subtree:
    """Walk `leaves` steps from `start`, choose one of them by weight, and look for turns."""
    # Chains whose subtree is lost walk on until all are: what they find is not used.
    vectors, momentum, gradient, value = start
    # Half a kick behind the positions, where the leapfrog integrator needs it.
    ahead = kicked(momentum, stride, gradient, -0.5)
    whole = torch.ones_like(energy, dtype=torch.bool)
    divergent = torch.zeros_like(whole)
    steps, acceptance_sum = torch.zeros_like(energy), torch.zeros_like(energy)
    total = torch.full_like(energy, -torch.inf)
    momentum_sum = torch.zeros_like(momentum)
    chosen, first, stack = start, momentum, list[_Leaf]()
    for leaf in range(leaves):
        before = _Leaf(momentum, momentum, momentum_sum)
        vectors = moved(vectors, stride, ahead)
        value, gradient = potential.value_and_gradient(vectors)
        momentum = kicked(ahead, stride, gradient, -0.5)
        ahead = kicked(ahead, stride, gradient, -1.0)
        momentum_sum = momentum_sum + momentum
        here = Point(vectors, momentum, gradient, value)

        gain = energy - (value + kinetic_energy(momentum))
        gain = gain.nan_to_num(nan=-torch.inf, posinf=_LARGEST, neginf=-torch.inf)
        steps = steps + whole
        acceptance_sum = acceptance_sum + whole * gain.clamp(max=0.0).exp()
        stays = gain > -LARGEST_ENERGY_ERROR
        divergent = divergent | (whole & ~stays)
        whole = whole & stays

        if leaf == 0:
            chosen, total, first = here, gain, momentum
        else:
            total = torch.logaddexp(total, gain)
            taken, uniform = _coin((gain - total).exp(), uniform)
            wide = taken[:, None]
            chosen = Point(
                torch.where(wide, vectors, chosen.vectors),
                momentum,  # of no more use
                torch.where(wide, gradient, chosen.gradient),
                torch.where(taken, value, chosen.value),
            )

        this = _Leaf(momentum, before.momentum, before.sum_before)
        if leaf % 2 == 0:
            stack.append(this)
        else:
            whole = whole & _no_turn(stack, this, momentum_sum, leaf)
        if not bool(whole.any()):
            break
    return _Subtree(
        end=Point(vectors, momentum, gradient, value),
        first_momentum=first,
        momentum_sum=momentum_sum,
        log_weight=total,
        vectors=chosen.vectors,
        gradient=chosen.gradient,
        value=chosen.value,
        whole=whole,
        divergent=divergent,
        steps=steps,
        acceptance_sum=acceptance_sum,
    )


def _coin(probability: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Toss a coin with a uniform number, and make a fresh one of what is left of it."""
    # Given the outcome, the number is uniform on an interval; stretched to [0, 1) it serves again.
    # All choices within a subtree of 512 leaves of equal weight take 37 of its 53 bits on average.
    taken = uniform < probability
    rest = torch.where(taken, uniform / probability, (uniform - probability) / (1 - probability))
    return taken, rest


def _no_turn(
    stack: list[_Leaf], last: _Leaf, momentum_sum: Tensor, leaf: int
) -> Bool[Tensor, " chains"]:
    """Whether no balanced subtree that ends at this leaf turns; the stack forgets their starts."""
    # A subtree of 2^k leaves ends at every leaf whose number ends in k binary ones. Its right half
    # begins where the subtree of half the size does.
    levels = (~leaf & (leaf + 1)).bit_length() - 1
    begin = stack[-1]
    both = begin.momentum + last.momentum
    straight = _smallest(both, begin.momentum, last.momentum) > 0
    for level in range(2, levels + 1):
        begin, middle = stack[-level], stack[-level + 1]
        straight = straight & _goes_on(
            begin.momentum,
            middle.previous,
            middle.momentum,
            last.momentum,
            middle.sum_before - begin.sum_before,
            momentum_sum - middle.sum_before,
        )
    # The largest of these subtrees is the left half of a larger one, unless all have been seen.
    del stack[len(stack) - levels + 1 :]
    return straight


def _goes_on(
    first: Tensor,
    before_seam: Tensor,
    after_seam: Tensor,
    last: Tensor,
    left_sum: Tensor,
    right_sum: Tensor,
) -> Bool[Tensor, " chains"]:
    """Whether the ends of two adjacent halves still move apart, as do those across the seam."""
    sums = torch.stack([left_sum + right_sum, left_sum + after_seam, right_sum + before_seam])
    begins = torch.stack([first, first, before_seam])
    ends = torch.stack([last, after_seam, last])
    return _smallest(sums, begins, ends).amin(0) > 0


def _smallest(sums: Tensor, begins: Tensor, ends: Tensor) -> Tensor:
    return torch.minimum((sums * begins).sum(-1), (sums * ends).sum(-1))


def _where(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(condition[:, None] if one.dim() == 2 else condition, one, other)
