"""Systems with a damped curvature: factorised, iterated, or by a solve of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.linalg import conjugate_gradients
from pushforward.networks.parameters import ParameterSpace
from pushforward.typing import Params

__all__ = ["Curvature", "Solution", "SolveMethod", "Solver"]

SolveMethod: TypeAlias = Literal["auto", "cholesky", "conjugate_gradients", "own"]
"""How a system is solved."""


@runtime_checkable
class Curvature(Protocol):
    """A symmetric matrix over the parameters of a network."""

    @property
    def measure(self) -> Any:
        """What it is the curvature of; it may bring a damped solve of its own."""

    @property
    def space(self) -> ParameterSpace:
        """The parameters, laid end to end."""

    @property
    def point(self) -> Tensor:
        """Where it was taken, ``(P,)``, in the type of products."""

    def product(self, vectors: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """The matrix times columns."""

    def dense(self, progress: bool | None = False) -> Float[Tensor, "P P"]:
        """The matrix itself."""


Matrix = TypeVar("Matrix", bound=Curvature)


@dataclass(frozen=True, eq=False)
class Solution:
    """Solutions of ``(G + damping I) x = v``.

    Parameters
    ----------
    vectors
        ``(P, k)``.
    residual
        Largest ``|(G + damping I) x - v| / |v|`` of all columns; NaN for the solve of a measure's
        own, whose matrix is not formed.
    method
        Which was used.
    steps
        Of conjugate gradients; 0 for a factorisation.
    """

    vectors: Float[Tensor, "P k"]
    residual: float
    method: SolveMethod
    steps: int = 0


@dataclass(frozen=True, eq=False)
class Solver(Generic[Matrix]):
    """Solves ``(G + damping I) x = v``.

    Parameters
    ----------
    curvature
        The matrix ``G``.
    damping
        Positive.
    method
        Never ``"auto"``.
    tolerance, max_steps
        Of conjugate gradients.
    """

    curvature: Matrix
    damping: float
    method: SolveMethod
    tolerance: float = 1e-8
    max_steps: int = 2000

    @cached_property
    def factor(self) -> Float[Tensor, "P P"]:
        """Lower Cholesky factor of the damped matrix.

        Raises
        ------
        OptionError
            When it is not positive definite.
        """
        damped = self.curvature.dense().clone()
        damped.diagonal().add_(self.damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            lowest = float(torch.linalg.eigvalsh(self.curvature.dense())[0])
            raise OptionError(
                f"the curvature has an eigenvalue of {lowest:.3g}: with damping "
                f"{self.damping:.3g} it is not positive definite",
                where="damping",
                advice="Use more damping, or a distance whose curvature is not indefinite.",
            )
        return factor

    def prepare(self, progress: bool | None = None) -> None:
        """Form and factor the matrix now, with a bar, where that is what will take long."""
        if self.method == "cholesky":
            self.curvature.dense(progress)
            _ = self.factor

    def solve(
        self, vectors: Float[Tensor, "P k"], watch: Callable[[int], None] | None = None
    ) -> Solution:
        """Solve for several right-hand sides.

        Parameters
        ----------
        vectors
            ``(P, k)``.
        watch
            Told how many products there have been, after each of conjugate gradients.

        Returns
        -------
        Solution
            With the residual that was found.
        """
        vectors = vectors.to(self.curvature.point)
        if self.method == "own":
            return Solution(self._own(vectors), float("nan"), "own")
        if self.method == "cholesky":
            found = torch.cholesky_solve(vectors, self.factor)
            image = self.curvature.dense() @ found + self.damping * found
            return Solution(found, _relative(image - vectors, vectors), "cholesky")
        return self._iterated(vectors, watch)

    def _own(self, vectors: Tensor) -> Tensor:
        space, measure = self.curvature.space, self.curvature.measure
        found: Params = measure.solve(space.unravel(vectors.T.contiguous()), self.damping)
        return space.ravel(found).T

    def _iterated(self, vectors: Tensor, watch: Callable[[int], None] | None) -> Solution:
        made = count(1)

        def product(rows: Tensor) -> Tensor:
            image = self.curvature.product(rows.T).T + self.damping * rows
            if watch is not None:
                watch(next(made))
            return image

        # Lengths are taken out: columns of unlike size then count alike within a block.
        lengths = vectors.norm(dim=0).clamp(min=1e-300)
        state = conjugate_gradients.solve(
            product,
            (vectors / lengths).T.contiguous(),
            tolerance=self.tolerance,
            max_steps=self.max_steps,
        )
        found = state.solution.T
        residual = _relative(product(found.T).T - vectors / lengths, vectors / lengths)
        return Solution(found * lengths, residual, "conjugate_gradients", state.steps)


def _relative(residual: Tensor, vectors: Tensor) -> float:
    if vectors.shape[1] == 0:
        return 0.0
    return float((residual.norm(dim=0) / vectors.norm(dim=0).clamp(min=1e-300)).max())
