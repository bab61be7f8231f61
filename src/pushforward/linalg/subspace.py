"""What one linear system taught about a matrix, kept for the next: the directions it searched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.linalg.blocks import gram
from pushforward.linalg.conjugate_gradients import Product, orthonormalise

__all__ = ["Subspace"]


@dataclass(frozen=True, eq=False)
class Subspace:
    """Directions and what a symmetric matrix ``M`` makes of them.

    With them every system in ``weight M + diag(d)`` is solved on their span at once, whatever the
    weight and the diagonal. Starting from that solution leaves conjugate gradients the directions
    that are new, so that a sequence of similar systems costs little more than one.

    Parameters
    ----------
    vectors
        ``(m, P)``.
    images
        ``(m, P)``: M times each.

    References
    ----------
    Recycling of Krylov subspaces: M. L. Parks, E. de Sturler, G. Mackey, D. D. Johnson, S. Maiti,
    SIAM J. Sci. Comput. 28 (2006).
    """

    vectors: Float[Tensor, "m P"]
    images: Float[Tensor, "m P"]

    @classmethod
    def empty(cls, like: Float[Tensor, "K P"]) -> Subspace:
        """No directions.

        Returns
        -------
        Subspace
            For vectors of the size, type and device of some others.
        """
        return cls(like[:0], like[:0])

    def __len__(self) -> int:
        return len(self.vectors)

    def extended(
        self, vectors: Float[Tensor, "k P"], images: Float[Tensor, "k P"], most: int
    ) -> Subspace:
        """With more directions, up to a number.

        Parameters
        ----------
        vectors, images
            ``(k, P)``.
        most
            Directions to hold. When there are twice as many, the half is kept on which the matrix
            is largest (Ritz vectors).

        Returns
        -------
        Subspace
            Spanning both, unless it had to be reduced.
        """
        both = Subspace(torch.cat([self.vectors, vectors]), torch.cat([self.images, images]))
        return both if len(both) < 2 * most else both._reduced(most)

    def _reduced(self, most: int) -> Subspace:
        basis = orthonormalise(gram(self.vectors, self.vectors))
        energies = basis.T @ gram(self.vectors, self.images) @ basis
        _, rotation = torch.linalg.eigh(0.5 * (energies + energies.T))
        combine = (basis @ rotation[:, -most:]).T.to(self.vectors.dtype)
        return Subspace(combine @ self.vectors, combine @ self.images)

    def project(
        self,
        solution: Float[Tensor, "K P"],
        residual: Float[Tensor, "K P"],
        diagonal: Float[Tensor, " P"],
        weight: float = 1.0,
    ) -> tuple[Float[Tensor, "K P"], Float[Tensor, "K P"]]:
        """Solve on the span: the error in the norm of the matrix becomes the smallest it can be.

        Parameters
        ----------
        solution, residual
            ``(K, P)``, of a system in ``weight M + diag(diagonal)``.
        diagonal
            ``(P,)``.
        weight
            Of ``M``.

        Returns
        -------
        tuple
            Both improved, ``(K, P)``; the residual is orthogonal to the directions.
        """
        if len(self) == 0:
            return solution, residual
        images = weight * self.images + diagonal * self.vectors
        combine = orthonormalise(gram(self.vectors, images))
        weights = ((gram(residual, self.vectors) @ combine) @ combine.T).to(solution.dtype)
        better = torch.addmm(solution, weights, self.vectors)
        return better, torch.addmm(residual, weights, images, alpha=-1)

    def preconditioner(self, diagonal: Float[Tensor, " P"], weight: float = 1.0) -> Product:
        """An approximate inverse of ``weight M + diag(diagonal)``, exact on the span.

        Parameters
        ----------
        diagonal
            ``(P,)``, what is inverted off the span.
        weight
            Of ``M``.

        Returns
        -------
        callable
            ``(K, P) -> (K, P)``, symmetric positive definite.

        Notes
        -----
        The balancing form ``Q + (1 - Q H) D^{-1} (1 - H Q)`` with ``Q`` the inverse on the span: J.
        Mandel, Comm. Numer. Methods Engrg. 9 (1993).
        """
        if len(self) == 0:
            return lambda rows: rows / diagonal
        images = weight * self.images + diagonal * self.vectors
        combine = orthonormalise(gram(self.vectors, images)).to(images.dtype)
        vectors, images = combine.T @ self.vectors, combine.T @ images

        def apply(rows: Tensor) -> Tensor:
            coarse = rows @ vectors.T
            fine = (rows - coarse @ images) / diagonal
            return fine - (fine @ images.T) @ vectors + coarse @ vectors

        return apply
