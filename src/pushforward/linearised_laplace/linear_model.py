"""The linear model that a network is at its trained weights, and its passes over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pushforward.errors import DataError
from pushforward.linearised_laplace.priors import Prior
from pushforward.networks.batches import Batch
from pushforward.networks.data import Examples
from pushforward.networks.likelihoods import Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.networks.problem import activation_bytes
from pushforward.networks.tangent import Tangent
from pushforward.runs.distributed import ProcessGrid
from pushforward.runs.rng import stream

__all__ = ["NOISE_BLOCK", "LinearModel", "Offset", "Portion", "Sketch", "Slope"]

Offset = Literal["affine", "linear"]

_REMEMBERED_BYTES = 2**28
_FLOOR = 0.05  # of the mean curvature
_CAPPING_ROUNDS = 8
NOISE_BLOCK = 64
"""Examples that share a stream of noise; sums over them are what a sketch squares."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """Random vectors with the covariance of the Gauss-Newton matrix, and its diagonal from them.

    Parameters
    ----------
    vectors
        ``(K, P)``: ``sum_i J_i^T L_i e_ik`` with ``L_i L_i^T`` the curvature of example i and ``e``
        standard normal.
    diagonal
        ``(P,)``: unbiased estimate of the diagonal of ``M``. The noise of different blocks of
        examples is independent, so the squares of the blocks' sums add up to it.
    """

    vectors: Float[Tensor, "K P"]
    diagonal: Float[Tensor, " P"]


class Slope(NamedTuple):
    """The negative log-likelihood of the linear model at a point, and what goes with it.

    Attributes
    ----------
    loss
        A number, float64.
    gradient
        ``(P,)``.
    outputs
        From a batch to the outputs ``(B, *event)`` of the linear model, remembered where they take
        little memory.
    curvature
        ``(n,)`` trace of the curvature of each example of this process, up to a common factor.
    """

    loss: Float[Tensor, ""]
    gradient: Float[Tensor, " P"]
    outputs: Callable[[Batch], Tensor]
    curvature: Float[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class Portion:
    """A few examples that stand for all in a sum of curvatures.

    Parameters
    ----------
    indices
        ``(m,)`` numbers of the examples.
    weights
        ``(m,)``: of how many each stands for.
    """

    indices: Int64[Tensor, " m"]
    weights: Float[Tensor, " m"]

    @classmethod
    def of(cls, curvature: Float[Tensor, " n"], count: int, first: int = 0) -> Portion:
        """Examples drawn with probabilities in proportion to their curvature, at equal distances.

        A trained classifier is sure of most examples, and the few that it is not sure of hold most
        of the curvature: on MNIST a sixth of the examples holds nine tenths of it. Those are all
        taken; the rest is thinned, and weighted so that sums are right on average (Horvitz and
        Thompson 1952).

        Parameters
        ----------
        curvature
            ``(n,)`` of all examples, not negative.
        count
            Examples wanted, about.
        first
            Number of the first example.

        Returns
        -------
        Portion
            In order.
        """
        sizes = curvature.double().clamp(min=0)
        # A floor, lest an example that matters elsewhere on the way should get a huge weight.
        sizes = sizes + _FLOOR * sizes.mean().clamp(min=1e-300)
        chances = sizes * (count / sizes.sum())
        for _ in range(_CAPPING_ROUNDS):  # what is certain to be drawn leaves its share to others
            certain = chances >= 1
            left = (count - certain.sum()).clamp(min=0)
            rest = sizes.masked_fill(certain, 0)
            chances = torch.where(certain, 1.0, rest * (left / rest.sum().clamp(min=1e-300)))
        chances = chances.clamp(max=1)
        ends = chances.cumsum(0) + 0.5
        drawn = (ends.floor() > (ends - chances).floor()).nonzero()[:, 0]
        return cls(drawn.cpu() + first, 1 / chances[drawn])


@dataclass(frozen=True, eq=False)
class LinearModel:
    """``h(w) = f(theta*) + J (scale w - theta*)`` (affine) or ``J scale w`` (linear), over data.

    All methods are passes over the data (the share of this process; sums are over all). Vectors are
    in the coordinates ``w`` of the prior; ``J' = J scale``.

    Parameters
    ----------
    model
        The network at its trained weights ``theta*``.
    examples
        Its training data.
    likelihood
        Its curvature at the outputs of the network weighs the outputs.
    prior
        Its scale defines the coordinates; its precision is not used here.
    offset
        Which of the two linear models.
    workspace
        Bytes of activations to work with at a time.
    grid
        The processes that share the data.
    advance
        Called with the number of examples after every batch.
    """

    model: FunctionalModel
    examples: Examples
    likelihood: Likelihood
    prior: Prior
    offset: Offset = "affine"
    workspace: int = 2**25
    grid: ProcessGrid = field(default_factory=ProcessGrid.serial)
    advance: Callable[[int], None] = lambda _count: None

    def with_prior(self, prior: Prior) -> LinearModel:
        """The same model in the coordinates of another prior.

        Returns
        -------
        LinearModel
            Sharing everything else.
        """
        return replace(self, prior=prior)

    def with_likelihood(self, likelihood: Likelihood) -> LinearModel:
        """The same model with another noise.

        Returns
        -------
        LinearModel
            Sharing everything else.
        """
        return replace(self, likelihood=likelihood)

    @cached_property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of the outputs of one example."""
        batch = self.examples.select(torch.tensor([0]))
        return tuple(self.model.predict(batch.inputs).shape[1:])

    @cached_property
    def num_outputs(self) -> int:
        """Scalar outputs of one example: ``C``."""
        return int(torch.Size(self.event_shape).numel())

    @property
    def most_dimensions(self) -> int:
        """What no effective dimension can exceed: the smaller side of the Jacobian."""
        return min(self.model.space.size, len(self.examples) * self.num_outputs)

    @cached_property
    def activation_bytes(self) -> int:
        """Memory that one example takes on its way through the network."""
        return activation_bytes(self.model, self.examples.select(torch.tensor([0])))

    @property
    def remembered_bytes(self) -> int:
        """Of the outputs at a point, which are kept for its products; 0 where they are too many."""
        start, stop = self._share
        size = (stop - start) * self.num_outputs * torch.finfo(self.model.dtype).bits // 8
        return size if size <= _REMEMBERED_BYTES else 0

    def batch_sizes(self, vectors: int) -> tuple[int, int]:
        """How many examples and vectors to take through the network at a time.

        Parameters
        ----------
        vectors
            How many there are.

        Returns
        -------
        tuple of int
            Examples, and vectors of a chunk, whose product of activations fits the workspace.
        """
        room = max(1, self.workspace // self.activation_bytes)
        examples = min(4096, max(room // max(vectors, 1), min(NOISE_BLOCK, room)))
        return examples, max(1, min(vectors, room // examples))

    def product(self, vectors: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """``M' v`` with ``M' = J'^T B J'`` over all examples.

        Parameters
        ----------
        vectors
            ``(K, P)``.

        Returns
        -------
        Tensor
            ``(K, P)``.
        """
        directions = self.prior.scaled(vectors)
        total = torch.zeros_like(vectors)
        for _, batch in self._pass(len(vectors)):
            total += self.batch_product(batch, directions)
        return self.prior.scaled(self.grid.sum_over_data(total))

    def batch_product(self, batch: Batch, directions: Float[Tensor, "K P"]) -> Float[Tensor, "K P"]:
        """``J^T B J v`` over one batch, in weight space.

        Parameters
        ----------
        batch
            Some examples.
        directions
            ``(K, P)``.

        Returns
        -------
        Tensor
            ``(K, P)``.
        """
        tangent, curvature = self._tangent(len(directions)), self.likelihood.curvature_product
        found, _ = tangent.product(batch.inputs, directions, curvature)
        return found

    def product_at(
        self,
        outputs: Callable[[Batch], Float[Tensor, "B *event"]],
        vectors: Float[Tensor, "K P"],
        portion: Portion | None = None,
    ) -> Float[Tensor, "K P"]:
        """``J'^T B(h) J' v``: the curvature taken at other outputs than the network's.

        Parameters
        ----------
        outputs
            Where, for a batch: `Slope.outputs`.
        vectors
            ``(K, P)``.
        portion
            Examples that stand for all.

        Returns
        -------
        Tensor
            ``(K, P)``.
        """
        directions = self.prior.scaled(vectors)
        total = torch.zeros_like(vectors)
        for tangent, batch, weights in self._portioned(len(vectors), portion):
            moved = tangent.jvp(batch.inputs, directions)
            weighted = self.likelihood.curvature_product(outputs(batch), moved)
            if weights is not None:
                weighted = weighted * weights.reshape(-1, *[1] * (weighted.dim() - 2))
            total += tangent.vjp(batch.inputs, weighted)
        return self.prior.scaled(self.grid.sum_over_data(total))

    def portion(self, slope: Slope, count: int) -> Portion | None:
        """Examples whose curvature stands for that of all.

        Parameters
        ----------
        slope
            Where.
        count
            How many, over all processes, about.

        Returns
        -------
        Portion or None
            None when there are not many more anyway.
        """
        start, stop = self._share
        wanted = count * (stop - start) // len(self.examples)
        if 2 * wanted >= stop - start:
            return None
        return Portion.of(slope.curvature, wanted, start)

    def slope(self, point: Float[Tensor, " P"]) -> Slope:
        """Negative log-likelihood of the linear model, its gradient, and the outputs it sees.

        Parameters
        ----------
        point
            ``(P,)``, the w.

        Returns
        -------
        Slope
            For one pass over the data.
        """
        weights = self._displacement(point)
        loss = torch.zeros((), dtype=torch.float64, device=point.device)
        gradient = torch.zeros_like(point)
        start, remember = self._share[0], self.remembered_bytes > 0
        seen, traces = [], [point.new_zeros(0)]
        for tangent, batch in self._pass(1):
            outputs = self._shifted(batch, tangent.jvp(batch.inputs, weights[None])[0])
            targets = self._targets(batch, outputs)
            # Sums of log-densities in float64: counts of a million leave nothing of float32 behind.
            wide = outputs.double()
            loss -= self.likelihood.log_prob(wide, self._targets(batch, wide)).sum()
            gradient -= tangent.vjp(batch.inputs, self.likelihood.score(outputs, targets)[None])[0]
            # Links are canonical: the curvature is the variance, or constant.
            traces.append(self.likelihood.variance(outputs).flatten(1).sum(1))
            if remember:
                seen.append(outputs)
        table = torch.cat(seen) if seen else None

        def outputs_of(batch: Batch) -> Tensor:
            if table is not None:
                return table[batch.indices.to(table.device) - start]
            moved = self._tangent(1).jvp(batch.inputs, weights[None])[0]
            return self._shifted(batch, moved)

        return Slope(
            self.grid.sum_over_data(loss),
            self.prior.scaled(self.grid.sum_over_data(gradient)),
            outputs_of,
            torch.cat(traces),
        )

    def losses_along(
        self,
        point: Float[Tensor, " P"],
        direction: Float[Tensor, " P"],
        steps: Float[Tensor, " S"],
    ) -> Float[Tensor, " S"]:
        """Negative log-likelihood of the linear model at several points of a line, in one pass.

        Parameters
        ----------
        point, direction
            ``(P,)``.
        steps
            ``(S,)`` multiples of the direction.

        Returns
        -------
        Tensor
            ``(S,)`` float64.
        """
        both = torch.stack([self._displacement(point), self.prior.scaled(direction)])
        losses = torch.zeros(len(steps), dtype=torch.float64, device=point.device)
        for tangent, batch in self._pass(2):
            moved, along = tangent.jvp(batch.inputs, both)
            outputs = self._shifted(batch, moved).double()
            reach = steps.double().reshape(-1, *[1] * outputs.dim())
            targets = self._targets(batch, outputs)
            losses -= self.likelihood.log_prob(outputs + reach * along, targets).sum(-1)
        return self.grid.sum_over_data(losses)

    def require_finite_outputs(self) -> None:
        """Find out before anything else whether the network has an answer to every example.

        Raises
        ------
        DataError
            With the number of the first example whose outputs are NaN or infinite.
        """
        for _, batch in self._pass(1):
            rows = torch.isfinite(self.model.predict(batch.inputs)).flatten(1).all(1)
            if not bool(rows.all()):
                number = int(batch.indices[int((~rows).nonzero()[0])])
                raise DataError(
                    f"the network's outputs for example {number} hold NaN or infinite entries",
                    where=self.examples.name,
                    advice="Check that example, and whether the network can take it.",
                )

    def squared_residuals(self, point: Float[Tensor, " P"]) -> Float[Tensor, ""]:
        """``sum (y - h(w))^2`` over examples and outputs, for regression.

        Parameters
        ----------
        point
            ``(P,)``, the w.

        Returns
        -------
        Tensor
            A number, float64.
        """
        weights = self._displacement(point)
        total = torch.zeros((), dtype=torch.float64, device=point.device)
        for tangent, batch in self._pass(1):
            outputs = self._shifted(batch, tangent.jvp(batch.inputs, weights[None])[0])
            difference = self._targets(batch, outputs) - outputs
            total += difference.double().square().sum()
        return self.grid.sum_over_data(total)

    def sketch(self, draws: range, seed: int) -> Sketch:
        """Random vectors with covariance ``M'``, one for each draw.

        Parameters
        ----------
        draws
            Numbers of the draws: draw k has the same noise whatever else is drawn.
        seed
            Of the noise.

        Returns
        -------
        Sketch
            In coordinates w.
        """
        space = self.model.space
        total = torch.zeros(
            len(draws), space.size, dtype=self.model.dtype, device=self.model.device
        )
        diagonal = torch.zeros(space.size, dtype=torch.float64, device=self.model.device)
        tangent = self._tangent(len(draws))
        examples, _ = self.batch_sizes(len(draws))
        start, stop = self._share
        for first in range(start, stop, NOISE_BLOCK):
            noise = self._noise(first // NOISE_BLOCK, draws, seed)
            block = torch.zeros_like(total)
            last = min(first + NOISE_BLOCK, stop)
            for batch in self.examples.batches(min(examples, NOISE_BLOCK), start=first, stop=last):
                outputs = self.model.predict(batch.inputs)
                begin = int(batch.indices[0]) - first
                pushed = self.likelihood.curvature_factor(
                    outputs, noise[:, begin : begin + len(batch)]
                )
                block += tangent.vjp(batch.inputs, pushed)
                self.advance(len(batch))
            total += block
            diagonal += block.double().square().mean(0)
        vectors = self.prior.scaled(self.grid.sum_over_data(total))
        scale = 1.0 if self.prior.scale is None else self.prior.scale.double().square()
        return Sketch(vectors, self.grid.sum_over_data(diagonal) * scale)

    def jacobian_blocks(self) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Jacobians in blocks, for small problems.

        Yields
        ------
        tuple
            A batch, the network's outputs ``(B, *event)``, and ``J`` of shape ``(B, C, P)``
            float64, in weight space.
        """
        size = max(1, min(1024, 2**24 // (self.num_outputs * self.model.space.size)))
        start, stop = self._share
        for batch in self.examples.batches(size, start=start, stop=stop):
            jacobian = Tangent(self.model).jacobian(batch.inputs).double()
            yield batch, self.model.predict(batch.inputs), jacobian
            self.advance(len(batch))

    def _pass(self, vectors: int) -> Iterator[tuple[Tangent, Batch]]:
        examples, _ = self.batch_sizes(vectors)
        tangent = self._tangent(vectors)
        start, stop = self._share
        for batch in self.examples.batches(examples, start=start, stop=stop):
            yield tangent, batch
            self.advance(len(batch))

    def _portioned(
        self, vectors: int, portion: Portion | None
    ) -> Iterator[tuple[Tangent, Batch, Tensor | None]]:
        if portion is None:
            for tangent, batch in self._pass(vectors):
                yield tangent, batch, None
            return
        examples, _ = self.batch_sizes(vectors)
        tangent = self._tangent(vectors)
        weights = portion.weights.to(self.model.vector)
        for first in range(0, len(portion.indices), examples):
            rows = slice(first, first + examples)
            batch = self.examples.select(portion.indices[rows])
            yield tangent, batch, weights[rows]
            self.advance(len(batch))

    def _tangent(self, vectors: int) -> Tangent:
        _, chunk = self.batch_sizes(vectors)
        return Tangent(self.model, chunk if chunk < vectors else None)

    @cached_property
    def _share(self) -> tuple[int, int]:
        """First example of this process and the one behind its last: whole blocks of noise.

        Returns
        -------
        tuple of int
            Equal when there are more processes than blocks.
        """
        count = len(self.examples)
        blocks = -(-count // NOISE_BLOCK)
        first, last = (
            min(count, NOISE_BLOCK * (blocks * i // self.grid.data_shards))
            for i in (self.grid.data_index, self.grid.data_index + 1)
        )
        return first, last

    def _noise(self, block: int, draws: range, seed: int) -> Tensor:
        shape, device = (NOISE_BLOCK, *self.event_shape), self.model.device
        return torch.stack(
            [
                torch.randn(
                    shape,
                    generator=stream(seed, "targets", draw, block, device=device),
                    dtype=self.model.dtype,
                    device=device,
                )
                for draw in draws
            ]
        )

    def _displacement(self, point: Tensor) -> Tensor:
        weights = self.prior.scaled(point)
        return weights - self.model.vector if self.offset == "affine" else weights

    def _shifted(self, batch: Batch, moved: Tensor) -> Tensor:
        return self.model.predict(batch.inputs) + moved if self.offset == "affine" else moved

    def _targets(self, batch: Batch, outputs: Tensor) -> Tensor:
        assert batch.targets is not None  # the data were read with targets
        return self.likelihood.check_targets(outputs, batch.targets, self.examples.name)
