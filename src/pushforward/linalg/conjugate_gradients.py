"""Block conjugate gradients: many right-hand sides of one positive definite system at once.

The search space of the block is shared: after ``t`` products with ``K`` vectors every right-hand
side has been minimised over ``K t`` dimensions, so that the number of products *falls* as
right-hand sides are added. Posterior draws are such a block.

References
----------
D. P. O'Leary, *The block conjugate gradient algorithm and related methods*, Linear Algebra and
its Applications 29 (1980). The error estimate is that of M. R. Hestenes and E. Stiefel (1952): the
squared error in the norm of the matrix falls in every step by a number that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.linalg.blocks import gram
from pushforward.options import number, whole_number

__all__ = ["BlockIterate", "Improvement", "Product", "advance", "begin", "orthonormalise", "solve"]

Product: TypeAlias = Callable[[Tensor], Tensor]
"""``(K, P) -> (K, P)``: a symmetric matrix times each row."""

Improvement: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Solutions and residuals ``(K, P)`` to better ones."""

_DEPENDENT = 1e-6  # directions below this share of the largest add nothing but rounding
_WINDOW = 3  # steps over which the rate of convergence is taken
_SLOWEST = 0.97
_UNSURE = 0.5  # the pace that is assumed after two steps, at best


@dataclass(frozen=True, eq=False)
class BlockIterate:
    """Where the iteration stands; all that is needed to go on.

    Parameters
    ----------
    solution
        ``(K, P)``.
    residual
        ``(K, P)``: right-hand side minus matrix times solution, by recurrence.
    directions
        ``(k, P)``: where the next step will look.
    decrements
        ``(steps, K)`` float64: by how much each step lowered the squared error of each right-hand
        side, in the norm of the matrix.
    searched, images
        ``(k, P)``: directions of the last step, orthonormal in the matrix, and the matrix times
        them; None before the first. They need not be kept to go on.
    """

    solution: Float[Tensor, "K P"]
    residual: Float[Tensor, "K P"]
    directions: Float[Tensor, "k P"]
    decrements: Float[Tensor, "steps K"]
    searched: Float[Tensor, "j P"] | None = None
    images: Float[Tensor, "j P"] | None = None

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.decrements)

    @property
    def squared_error(self) -> Float[Tensor, " K"]:
        """Estimated squared error of each solution in the norm of the matrix, ``(K,)``.

        What further steps would still gain, taking their gains to fall geometrically as the last
        few did; slowly, when there was only one. Infinite before the first.
        """
        if self.steps == 0:
            return torch.full_like(self.residual[:, 0], torch.inf, dtype=torch.float64)
        latest = _extrapolated(self.decrements)
        if self.steps == 1:
            return latest
        # A single small gain may be an accident: the estimate falls no faster than by half a step.
        return torch.maximum(latest, 0.5 * _extrapolated(self.decrements[:-1]))

    def to_tensors(self) -> dict[str, Tensor]:
        """The same as tensors by name, for a file.

        Returns
        -------
        dict
            What `from_tensors` takes.
        """
        return {
            "solution": self.solution,
            "residual": self.residual,
            "directions": self.directions,
            "decrements": self.decrements,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> BlockIterate:
        """What `to_tensors` gave.

        Returns
        -------
        BlockIterate
            It goes on as if it had never stopped.
        """
        return cls(
            *(tensors[name] for name in ("solution", "residual", "directions", "decrements"))
        )


def begin(
    product: Product,
    right_hand_sides: Float[Tensor, "K P"],
    guess: Float[Tensor, "K P"],
    precondition: Product,
    improve: Improvement | None = None,
) -> BlockIterate:
    """The state before the first step; it costs one product.

    Parameters
    ----------
    product
        The matrix, symmetric positive definite.
    right_hand_sides
        ``(K, P)``.
    guess
        ``(K, P)``, where to start.
    precondition
        An approximate inverse of the matrix, symmetric positive definite.
    improve
        From a guess and its residual to better ones, without a product: `Subspace.project`.

    Returns
    -------
    BlockIterate
        With no step done.
    """
    residual = right_hand_sides - product(guess)
    if improve is not None:
        guess, residual = improve(guess, residual)
    return BlockIterate(
        guess,
        residual,
        precondition(residual),
        torch.zeros(0, len(guess), dtype=torch.float64, device=guess.device),
    )


def advance(state: BlockIterate, product: Product, precondition: Product) -> BlockIterate:
    """One step: one product with at most K vectors.

    Directions that have become linearly dependent are dropped, which is what a block does when some
    of its right-hand sides are solved.

    Parameters
    ----------
    state
        Where the iteration stands; it is not changed.
    product, precondition
        As in `begin`.

    Returns
    -------
    BlockIterate
        One step on.
    """
    images = product(state.directions)
    combine = orthonormalise(gram(state.directions, images)).to(images.dtype)
    directions, images = combine.T @ state.directions, combine.T @ images
    weights = gram(state.residual, directions)
    decrements = torch.cat([state.decrements, weights.square().sum(1)[None]])
    weights = weights.to(images.dtype)
    solution = torch.addmm(state.solution, weights, directions)
    residual = torch.addmm(state.residual, weights, images, alpha=-1)
    fresh = precondition(residual)
    overlap = gram(fresh, images).to(images.dtype)
    ahead = torch.addmm(fresh, overlap, directions, alpha=-1)
    return BlockIterate(solution, residual, ahead, decrements, directions, images)


def solve(
    product: Product,
    right_hand_sides: Float[Tensor, "K P"],
    *,
    guess: Float[Tensor, "K P"] | None = None,
    precondition: Product | None = None,
    tolerance: float = 1e-6,
    max_steps: int = 1000,
) -> BlockIterate:
    """Solve to a relative error.

    Parameters
    ----------
    product
        The matrix, symmetric positive definite.
    right_hand_sides
        ``(K, P)``.
    guess
        Where to start; default zero.
    precondition
        Approximate inverse of the matrix; default none.
    tolerance
        Wanted error of every solution relative to its length, both in the norm of the matrix;
        positive.
    max_steps
        Most steps; at least 1.

    Returns
    -------
    BlockIterate
        Its `squared_error` says how far it came.

    Raises
    ------
    OptionError
        When the matrix turns out not to be positive definite; for a tolerance or a number of steps
        that is none.

    Examples
    --------
    >>> import torch
    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> found = solve(lambda rows: rows @ matrix, torch.eye(2, dtype=torch.float64))
    >>> torch.allclose(found.solution, torch.linalg.inv(matrix))
    True
    """
    tolerance = number(tolerance, "tolerance", above=0)
    max_steps = whole_number(max_steps, "max_steps")
    guess = torch.zeros_like(right_hand_sides) if guess is None else guess
    precondition = precondition or _unchanged
    state = begin(product, right_hand_sides, guess, precondition)
    for _ in range(max_steps):
        if not bool(state.residual.any()) or not len(state.directions):
            break
        state = advance(state, product, precondition)
        # The length of the solution in the norm of the matrix: x.Ax = x.(b - r).
        length = (state.solution.double() * (right_hand_sides - state.residual).double()).sum(1)
        if bool((state.squared_error <= tolerance**2 * length).all()):
            break
    return state


def _unchanged(rows: Tensor) -> Tensor:
    return rows


def _extrapolated(decrements: Float[Tensor, "steps K"]) -> Float[Tensor, " K"]:
    """The sum of all further gains, when they fall as those of the last few steps did.

    Returns
    -------
    Tensor
        ``(K,)``.
    """
    # The first step finds what all unimportant directions have in common; it says nothing of pace.
    gains = decrements[1:].sum(1)
    ratio = decrements.new_tensor(_SLOWEST)
    if len(gains) > 1:
        window = min(_WINDOW, len(gains) - 1)
        ratio = (gains[-1] / gains[-1 - window].clamp(min=1e-300)) ** (1 / window)
    elif len(gains) == 1:
        ratio = (gains[0] / decrements[0].sum().clamp(min=1e-300)).clamp(min=_UNSURE)
    ratio = ratio.clamp(max=_SLOWEST)
    return decrements[-1] * ratio / (1 - ratio)


def orthonormalise(energies: Float[Tensor, "K K"]) -> Float[Tensor, "K k"]:
    """Combinations of directions that are orthonormal in a matrix, from their Gram matrix in it.

    Parameters
    ----------
    energies
        ``(K, K)``: each direction times the matrix times each direction.

    Returns
    -------
    Tensor
        ``(K, k)``, as many columns as there are independent directions.

    Raises
    ------
    OptionError
        When a direction has negative energy.
    """
    diagonal = energies.diagonal()
    if not bool(torch.isfinite(energies).all()) or bool((diagonal < 0).any()):
        raise OptionError(
            "the matrix of a linear system is not positive definite, or holds NaN",
            where="block conjugate gradients",
            advice="Use float64, or a larger prior precision.",
        )
    scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
    values, vectors = torch.linalg.eigh(
        0.5 * (energies + energies.T) * scale[:, None] * scale[None]
    )
    kept = values > _DEPENDENT * values.max().clamp(min=1e-300)
    return scale[:, None] * vectors[:, kept] * values[kept].rsqrt()
