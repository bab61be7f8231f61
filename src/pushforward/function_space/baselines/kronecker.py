"""Distance by Kronecker factors, layer by layer: KFAC, and EK-FAC with corrected eigenvalues."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.function_space.answers import as_distance, weights_dtype
from pushforward.function_space.baselines.cotangents import Fisher
from pushforward.function_space.baselines.curvature import (
    CurvaturePass,
    check_damping,
    leading_shape,
)
from pushforward.function_space.baselines.layers import LinearLayer, layer_gradients, squares
from pushforward.function_space.baselines.passes import (
    displacement,
    fixed_question,
    full_precision,
)
from pushforward.function_space.metrics import Metric
from pushforward.function_space.network import Other, ReferenceNetwork
from pushforward.runs.progress import Advance, track
from pushforward.typing import Params

__all__ = ["KroneckerDistance", "KroneckerLayer"]


@dataclass(frozen=True, eq=False)
class KroneckerLayer:
    """The curvature of one layer in the eigenvectors of its two factors.

    Parameters
    ----------
    layer
        Linear or Conv2d.
    input_basis, output_basis
        Eigenvectors ``(in, i)`` of ``A`` and ``(out, o)`` of ``B``, in columns, without those that
        no example reaches, where the curvature is zero; the constant that goes with a bias counts
        as the last input.
    input_eigenvalues, output_eigenvalues
        Of ``A`` and ``B``, not negative.
    corrected
        ``(o, i)`` curvature along each pair of eigenvectors (EK-FAC); None for KFAC, where it is
        the product of the eigenvalues.
    """

    layer: LinearLayer
    input_basis: Float[Tensor, "in i"]
    output_basis: Float[Tensor, "out o"]
    input_eigenvalues: Float[Tensor, " i"]
    output_eigenvalues: Float[Tensor, " o"]
    corrected: Float[Tensor, "o i"] | None = None

    @property
    def eigenvalues(self) -> Float[Tensor, "o i"]:
        """Curvature along each pair of eigenvectors."""
        if self.corrected is not None:
            return self.corrected
        return self.output_eigenvalues.unsqueeze(1) * self.input_eigenvalues

    @property
    def num_bytes(self) -> int:
        """Of all that it holds."""
        held = [self.input_basis, self.output_basis, self.input_eigenvalues]
        held += [self.output_eigenvalues, *([] if self.corrected is None else [self.corrected])]
        return sum(t.numel() * t.element_size() for t in held)

    def rotated(self, matrix: Float[Tensor, "*batch out in"]) -> Float[Tensor, "*batch o i"]:
        """A matrix of weights in the eigenvectors, in its own type."""
        return self.output_basis.T.to(matrix) @ matrix @ self.input_basis.to(matrix)

    def rotated_back(self, matrix: Float[Tensor, "*batch o i"]) -> Float[Tensor, "*batch out in"]:
        """The transpose of `rotated`, and its inverse where the eigenvectors reach."""
        return self.output_basis @ matrix @ self.input_basis.T


@dataclass(frozen=True, eq=False)
class KroneckerDistance:
    """``d^T G d / 2`` with a block of ``G`` for each layer that is nearly a Kronecker product.

    Use `of`. In a Linear layer with inputs ``a`` (and a one for the bias) and gradients ``g_k`` of
    ``u = H^{1/2} z`` at its outputs: ``A = E[a a^T]``, ``B = E sum_k g_k g_k^T``, and the term is
    ``tr(D^T B D A) / 2``. EK-FAC keeps the eigenvectors and puts
    ``E sum_k ((U_B^T g_k)_o (U_A^T a)_i)^2`` in the place of products of eigenvalues.

    A Conv2d layer, or a Linear one on sequences, has inputs ``a_t`` and gradients ``g_t`` at T
    positions: ``A`` is the mean over examples *and* positions of ``a_t a_t^T``, ``B`` the mean over
    examples of the *sum* over positions of ``g_t g_t^T``, which is exact when positions are alike
    and gradients at different ones unrelated (R. Grosse and J. Martens 2016, arXiv 1602.01407);
    EK-FAC uses the squares of gradients of whole examples, ``sum_t g_t a_t^T``.

    Scales and shifts of normalisation, embeddings, and weights that are shared or used outside of
    their Linear or Conv2d layer have the exact diagonal instead; `diagonal` has their names.

    Parameters
    ----------
    reference
        The network that distances are measured from.
    layers
        Those with factors.
    diagonal
        Diagonal curvature of all other parameters, by name.
    eigenvalue_corrected
        Whether it is EK-FAC.
    metric, outputs
        What it was built for.
    num_outputs
        Outputs of an example.
    num_examples
        Examples that it was made from.

    Notes
    -----
    KFAC: J. Martens and R. Grosse (2015), arXiv 1503.05671. EK-FAC: T. George et al. (2018),
    arXiv 1806.03884.
    """

    reference: ReferenceNetwork
    layers: tuple[KroneckerLayer, ...] = field(repr=False)
    diagonal: Params = field(repr=False)
    eigenvalue_corrected: bool
    metric: Metric
    outputs: tuple[int, ...]
    num_outputs: int
    num_examples: int

    @classmethod
    def of(
        cls,
        net: nn.Module,
        data: Any,
        *,
        eigenvalue_corrected: bool = True,
        metric: Metric = "euclidean",
        outputs: Any = None,
        fisher: Fisher = "exact",
        seed: int = 0,
        batch_size: int = 256,
        progress: bool | None = None,
    ) -> KroneckerDistance:
        """Run over the data, once for KFAC and twice for EK-FAC.

        Parameters
        ----------
        net
            A module.
        data
            As `ExactDistance.of` takes them; with targets for ``fisher="empirical"``. Not needed
            afterwards.
        eigenvalue_corrected
            EK-FAC, or KFAC.
        metric, outputs
            Whose curvature, and of which outputs; None for all.
        fisher
            As in `DiagonalDistance.of`.
        seed
            Of drawn targets.
        batch_size
            Examples run at a time.
        progress
            Whether to show a bar: True, False, or None for terminals.

        Returns
        -------
        KroneckerDistance
            With two bases for each layer.

        Raises
        ------
        NetworkError
            For what is no network, weights that are not finite, or inputs that it cannot take.
        DataError
            For data that are empty, not finite, shuffled or augmented, or targets that are needed
            and missing or wrong.
        OptionError
            For an unknown metric or Fisher, or a `batch_size` that is not positive.
        ShapeError
            If `outputs` are out of range, or the only one where probabilities are compared.
        """
        work = CurvaturePass.of(net, data, metric, outputs, fisher, seed, batch_size)
        total = len(work.examples) * (2 if eigenvalue_corrected else 1)
        with (
            full_precision(work.reference.device),
            track(total, "Kronecker factors", enabled=progress) as advance,
        ):
            layers, diagonal = _factors(work, advance)
            if eigenvalue_corrected:
                layers = _corrected(work, layers, advance)
        return cls(
            work.reference,
            layers,
            diagonal,
            eigenvalue_corrected,
            metric,
            work.outputs,
            work.num_outputs,
            len(work.examples),
        )

    @property
    def name(self) -> str:
        """How tables call it."""
        return "EK-FAC" if self.eigenvalue_corrected else "KFAC"

    @property
    def num_bytes(self) -> int:
        """Of all bases, eigenvalues and diagonals."""
        own = sum(t.numel() * t.element_size() for t in self.diagonal.values())
        return own + sum(layer.num_bytes for layer in self.layers)

    def distance(
        self, other: Other, *, metric: Metric | None = None, outputs: Any = None
    ) -> Float[Tensor, ""]:
        """The quadratic at the displacement of the weights.

        Parameters
        ----------
        other
            A module of the same architecture, or its tensors by name.
        metric, outputs
            None, or what it was built for.

        Returns
        -------
        Tensor
            A number from 0 in the type of the other weights, but at least float32;
            twice differentiable in them.

        Raises
        ------
        WeightsError
            For weights of another architecture, or buffers that moved.
        NetworkError
            If weights, outputs or the distance are not finite.
        OptionError
            For a metric or outputs that it was not built for.
        ShapeError
            If `outputs` are out of range.
        """
        fixed_question((self.metric, self.outputs), self.num_outputs, metric, outputs)
        moved = displacement(self.reference, other)
        terms = [(own * moved[name].square()).sum() for name, own in self.diagonal.items()]
        # Differences of weights want float64, rotations of them do not, and cost the time.
        kind = weights_dtype(self.reference, other)
        with full_precision(self.reference.device):
            for part in self.layers:
                matrix = part.rotated(part.layer.matrix(moved).to(kind)).double()
                terms.append((part.eigenvalues * matrix.square()).sum())
        return as_distance(torch.stack(terms).sum() / 2, self.reference, other)

    def solve(self, gradients: Params, damping: float) -> Params:
        """Solve with the damped curvature, ``(G + damping I)^{-1} g``, in the eigenvectors.

        Parameters
        ----------
        gradients
            For every parameter a tensor of its shape, or several behind axes that all share.
        damping
            Positive.

        Returns
        -------
        Params
            Of the same shapes and types, in the order of the parameters.

        Raises
        ------
        ShapeError
            If a parameter is missing or unknown, or shapes do not fit.
        OptionError
            If `damping` is not positive.
        """
        damping = check_damping(damping)
        leading_shape(self.reference, gradients)
        wide = {name: g.double() for name, g in gradients.items()}
        found: Params = {name: wide[name] / (own + damping) for name, own in self.diagonal.items()}
        for part in self.layers:
            matrix = part.layer.matrix(wide)
            inside = part.rotated(matrix)
            outside = matrix - part.rotated_back(inside)
            solved = part.rotated_back(inside / (part.eigenvalues + damping)) + outside / damping
            found |= part.layer.tensors(solved)
        names = self.reference.parameter_names
        return {name: found[name].to(gradients[name].dtype) for name in names}


def _factors(work: CurvaturePass, advance: Advance) -> tuple[tuple[KroneckerLayer, ...], Params]:
    """Factors of all layers, and the diagonal of the rest."""
    count = len(work.examples)
    rows: dict[str, list[Tensor]] = {}
    a_sums: Params = {}
    b_sums: Params = {}
    diagonal: Params = {}
    for size, inputs, directions in work.batches():
        for part in layer_gradients(work.reference, work.layers, inputs, directions):
            path, (_, positions, width) = part.layer.path, part.activations.shape
            if part.number == 0 and count * positions < width:
                entered = part.activations.flatten(0, 1) / (count * positions) ** 0.5
                rows.setdefault(path, []).append(entered.double())
            elif part.number == 0:
                _add(a_sums, path, _second_moment(part.activations) / positions)
            _add(b_sums, path, _second_moment(part.gradients))
        for name, entries in work.squares_of_others(inputs, directions).items():
            _add(diagonal, name, entries)
        advance(size)
    layers = []
    for layer in work.layers:
        if layer.path in rows:  # fewer than the width: A is never formed
            _, lengths, vectors = torch.linalg.svd(torch.cat(rows[layer.path]), full_matrices=False)
            a_values, a_basis = _nonzero(lengths.square(), vectors.T)
        else:
            a_values, a_basis = _nonzero(*torch.linalg.eigh(a_sums[layer.path] / count))
        b_values, b_basis = _nonzero(*torch.linalg.eigh(b_sums[layer.path] / count))
        layers.append(KroneckerLayer(layer, a_basis, b_basis, a_values, b_values))
    return tuple(layers), {name: total / count for name, total in diagonal.items()}


def _corrected(
    work: CurvaturePass, layers: tuple[KroneckerLayer, ...], advance: Advance
) -> tuple[KroneckerLayer, ...]:
    """The same with the curvature along each pair of eigenvectors."""
    totals = {part.layer.path: torch.zeros_like(part.eigenvalues) for part in layers}
    parts = {part.layer.path: part for part in layers}
    for size, inputs, directions in work.batches():
        entered: Params = {}
        for found in layer_gradients(work.reference, work.layers, inputs, directions):
            path, kind = found.layer.path, found.activations.dtype
            part = parts[path]
            if found.activations.shape[1] > len(part.output_basis):
                # With many positions the gradient of an example is smaller than what makes it.
                totals[path] += squares(found.activations, found.gradients, part.rotated)
                continue
            if found.number == 0:
                entered[path] = found.activations @ part.input_basis.to(kind)
            left = found.gradients @ part.output_basis.to(kind)
            totals[path] += squares(entered[path], left)
        advance(size)
    count = len(work.examples)
    return tuple(
        KroneckerLayer(
            part.layer,
            part.input_basis,
            part.output_basis,
            part.input_eigenvalues,
            part.output_eigenvalues,
            totals[path] / count,
        )
        for path, part in parts.items()
    )


def _nonzero(
    values: Float[Tensor, " d"], vectors: Float[Tensor, "width d"]
) -> tuple[Float[Tensor, " r"], Float[Tensor, "width r"]]:
    """Eigenvalues above rounding, and their vectors."""
    kept = values > len(values) * torch.finfo(values.dtype).eps * values.max()
    return values[kept], vectors[:, kept].contiguous()


def _second_moment(rows: Float[Tensor, "B T d"]) -> Float[Tensor, "d d"]:
    """Sum of outer products over examples and positions."""
    flat = rows.flatten(0, 1)
    return (flat.T @ flat).double()


def _add(sums: Params, name: str, part: Tensor) -> None:
    sums[name] = sums[name] + part if name in sums else part
