"""Gauss-Newton matrix of a distance at its reference: products, and the matrix itself.

A distance between functions is zero at the reference weights and least there, so that its Hessian
``G`` at that point is a Gauss-Newton matrix: the generalised one of the data when the distance is
exact, an estimate of it when the distance is estimated from a summary. Nothing but the distance is
needed for products with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import NetworkError, OptionError, ResourceError, ShapeError
from pushforward.function_space.answers import check_options
from pushforward.function_space.baselines.curvature import check_damping
from pushforward.function_space.baselines.passes import full_precision
from pushforward.function_space.damped_solve import SolveMethod, Solver
from pushforward.function_space.measure import DistanceMeasure
from pushforward.function_space.metrics import Metric, check_metric
from pushforward.function_space.network import Other, ReferenceNetwork
from pushforward.networks.parameters import ParameterSpace, match_names
from pushforward.options import choice
from pushforward.runs.progress import track
from pushforward.runs.rng import stream
from pushforward.typing import Params

__all__ = ["GaussNewton"]

_DENSE_LIMIT = 8192  # parameters; the matrix and its factor then take 1 GiB
_BACKWARD_BYTES = 2**29  # what a batch of backward passes may take
_LARGEST_BLOCK = 256
_UNKNOWN_BLOCK = 16
_COLUMNS = 1024  # of a dense matrix between two looks at the bar
_STEP = 6e-6  # cube root of the rounding error: where a central difference is best


@dataclass(frozen=True, eq=False)
class GaussNewton:
    """Hessian of a distance at its reference weights.

    Made by `of`.

    Parameters
    ----------
    measure
        What measures the distance.
    space
        The parameters that count, laid end to end.
    metric
        By which outputs are compared.
    dtype
        Of products.
    options
        Further arguments of `measure.distance`.
    differences
        Whether products are central differences of gradients, for measures whose graph ends at
        the reference.

    Examples
    --------
    >>> import torch
    >>> from pushforward.function_space.network import ReferenceNetwork
    >>> class Halved:  # distance |D|^2 / 2 of one weight and one bias
    ...     reference = ReferenceNetwork.of(torch.nn.Linear(1, 1), (1,))
    ...     def distance(self, other, *, metric):
    ...         own = self.reference.tensors
    ...         return sum((other[n] - own[n]).square().sum() for n in own) / 2
    >>> GaussNewton.of(Halved(), metric="euclidean").dense().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    measure: Any = field(repr=False)
    space: ParameterSpace
    metric: Metric
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    differences: bool = False

    @classmethod
    def of(
        cls,
        measure: DistanceMeasure,
        *,
        metric: Metric,
        subset: str | Iterable[str] | None = None,
        outputs: Any = None,
        estimator: str | None = None,
    ) -> GaussNewton:
        """The matrix of a measure.

        Parameters
        ----------
        measure
            A summary, or any baseline.
        metric
            By which outputs are compared: ``"euclidean"`` belongs to squared loss, ``"fisher"`` and
            ``"kl"``, whose Hessians at the reference agree, to cross-entropy.
        subset
            Patterns of parameter names; only these move. Default: all parameters.
        outputs
            Outputs to look at; default all.
        estimator
            Of a summary; default its own. Baselines have none.

        Returns
        -------
        GaussNewton
            Products are tried once.

        Raises
        ------
        OptionError
            For what measures no distance, an unknown metric, an option that its distance does not
            take, or a subset that matches nothing.
        NetworkError
            When the distance does not change with the weights at all, or its Hessian is not finite.
        """
        check_metric(metric)
        if not isinstance(getattr(measure, "reference", None), ReferenceNetwork):
            raise OptionError(
                f"{type(measure).__name__} measures no distance from a reference",
                where="measure",
                advice="Pass what pf.summarize returned, or one of the baselines.",
            )
        reference = measure.reference
        names = reference.parameter_names
        chosen = names if subset is None else match_names(names, subset)
        space = ParameterSpace.of({name: reference.tensors[name] for name in chosen})
        options: dict[str, Any] = {}
        if outputs is not None:
            options["outputs"] = outputs
        if estimator is not None:
            options["estimator"] = estimator
        check_options(measure, ("metric", *options))
        probe = torch.randn(
            space.size, 1, generator=stream(0, "function_space", "curvature"), dtype=torch.float64
        ).to(reference.device)
        return _first_that_moves(measure, space, metric, options, probe)

    @property
    def reference(self) -> ReferenceNetwork:
        """The network at whose weights it is taken."""
        found: ReferenceNetwork = self.measure.reference
        return found

    @cached_property
    def point(self) -> Float[Tensor, " P"]:
        """The reference weights that count, ``(P,)``."""
        return self.space.ravel(self.reference.tensors).to(self.dtype)

    @property
    def solves_itself(self) -> bool:
        """Whether the measure has a damped solve of its own that applies here."""
        whole = self.space.names == self.reference.parameter_names
        return whole and not self.options and callable(getattr(self.measure, "solve", None))

    def tensors_at(self, vector: Float[Tensor, " P"]) -> Params:
        """All tensors of the network, those that count from a vector.

        Parameters
        ----------
        vector
            ``(P,)``.

        Returns
        -------
        Params
            By name; differentiable in the vector.
        """
        fixed = {
            name: t.to(self.dtype) if t.is_floating_point() else t
            for name, t in self.reference.tensors.items()
        }
        return {**fixed, **self.space.unravel(vector)}

    def distance_at(
        self, vector: Float[Tensor, " P"], metric: Metric | None = None
    ) -> Float[Tensor, ""]:
        """Distance of the weights that a vector holds.

        Parameters
        ----------
        vector
            ``(P,)``.
        metric
            Default that of the matrix.

        Returns
        -------
        Tensor
            A scalar, differentiable in the vector.
        """
        other: Other = self.tensors_at(vector)
        value: Tensor = self.measure.distance(other, metric=metric or self.metric, **self.options)
        return value

    def product(self, vectors: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """The matrix times vectors.

        One evaluation of the distance and its gradient, and a backward pass for each vector, many
        at once as far as memory goes.

        Parameters
        ----------
        vectors
            ``(P, k)``.

        Returns
        -------
        Tensor
            ``(P, k)``.

        Raises
        ------
        ShapeError
            When the vectors do not have an entry for each parameter.
        """
        if vectors.dim() != 2 or len(vectors) != self.space.size:
            raise ShapeError(
                f"vectors of shape {tuple(vectors.shape)} for {self.space.size} parameters",
                where="vectors",
                advice=f"Pass them as columns: ({self.space.size}, k).",
            )
        rows = vectors.T.to(self.point)
        # A measure guards its own way forward; the way back is here.
        with full_precision(self.reference.device):
            found = self._differenced(rows) if self.differences else self._differentiated(rows)
        return found.T

    def dense(self, progress: bool | None = False) -> Float[Tensor, "P P"]:
        """The matrix itself.

        Parameters
        ----------
        progress
            True or False to show a bar or not; None on a terminal only.

        Returns
        -------
        Tensor
            ``(P, P)``, symmetric; computed once.

        Raises
        ------
        ResourceError
            For more than 8,192 parameters.
        """
        if self.space.size > _DENSE_LIMIT:
            raise ResourceError(
                f"a matrix of {self.space.size:,} x {self.space.size:,} takes "
                f"{self.space.size**2 * 8 / 2**30:.1f} GiB",
                where="dense curvature",
                advice="Use conjugate gradients, or name fewer parameters by subset=.",
            )
        if not self._formed:
            eye = torch.eye(self.space.size, dtype=self.dtype, device=self.point.device)
            columns = []
            with track(self.space.size, "Curvature", enabled=progress) as advance:
                for block in eye.split(_COLUMNS, dim=1):
                    columns.append(self.product(block))
                    advance(block.shape[1])
            matrix = torch.cat(columns, 1)
            self._formed.append((matrix + matrix.T) / 2)
        return self._formed[0]

    @cached_property
    def _formed(self) -> list[Tensor]:
        return []  # the matrix, once it has been asked for

    def solver(
        self,
        damping: float,
        method: SolveMethod = "auto",
        *,
        tolerance: float = 1e-8,
        max_steps: int = 2000,
    ) -> Solver[GaussNewton]:
        """What solves systems with ``G + damping I``.

        Parameters
        ----------
        damping
            Positive, in the units of the curvature.
        method
            ``"cholesky"`` of the dense matrix, ``"conjugate_gradients"``, ``"own"`` for the solve
            that a measure brings (Kronecker and diagonal ones do); ``"auto"`` takes the own one
            where there is one, and a factorisation up to 8,192 parameters.
        tolerance
            Wanted relative error of conjugate gradients, in the norm of the matrix.
        max_steps
            Most steps of conjugate gradients.

        Returns
        -------
        Solver
            A factorisation is made at its first use and kept.

        Raises
        ------
        OptionError
            For damping that is not positive, an unknown method, or ``"own"`` where there is none.
        """
        damping = check_damping(damping)
        choice(method, "method", get_args(SolveMethod))
        if method == "auto":
            small = self.space.size <= _DENSE_LIMIT
            dense_or_not: SolveMethod = "cholesky" if small else "conjugate_gradients"
            method = "own" if self.solves_itself else dense_or_not
        if method == "own" and not self.solves_itself:
            raise OptionError(
                f"{type(self.measure).__name__} has no solve for these parameters",
                where="method",
                advice="Choose cholesky or conjugate_gradients.",
            )
        return Solver(self, damping, method, tolerance, max_steps)

    def solve(
        self, vectors: Float[Tensor, "P k"], damping: float, method: SolveMethod = "auto"
    ) -> Float[Tensor, "P k"]:
        """Solve ``(G + damping I) x = v``; see `solver` for more control.

        Parameters
        ----------
        vectors
            ``(P, k)``.
        damping, method
            As in `solver`.

        Returns
        -------
        Tensor
            ``(P, k)``.
        """
        return self.solver(damping, method).solve(vectors).vectors

    def _differentiated(self, rows: Tensor) -> Tensor:
        gradient, point = self._open_gradient()
        if not gradient.requires_grad:
            return torch.zeros_like(rows)
        pieces = rows.split(self._block if len(rows) > 1 else 1)
        return torch.cat([_pulled_back(gradient, point, piece) for piece in pieces])

    def _open_gradient(self) -> tuple[Tensor, Tensor]:
        """The gradient at the reference, still to be differentiated, and where it was taken."""
        point = self.point.clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(
                self.distance_at(point), point, create_graph=True, materialize_grads=True
            )
        return gradient, point

    @cached_property
    def _block(self) -> int:
        """Vectors in one backward pass, each of which takes about what the graph holds."""
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        try:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
                self._open_gradient()
        except (RuntimeError, NetworkError):  # function transforms hide their tensors
            return _UNKNOWN_BLOCK
        return max(1, min(_LARGEST_BLOCK, _BACKWARD_BYTES // max(1, sum(saved.values()))))

    def _differenced(self, rows: Tensor) -> Tensor:
        found = torch.zeros_like(rows)
        scale = _STEP * max(1.0, float(self.point.norm()))
        for row, image in zip(rows, found, strict=True):
            length = float(row.norm())
            if length == 0:
                continue
            step = scale / length
            ahead, behind = (self._gradient(self.point + s * step * row) for s in (1, -1))
            image.copy_((ahead - behind) / (2 * step))
        return found

    def _gradient(self, vector: Tensor) -> Tensor:
        vector = vector.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(
                self.distance_at(vector), vector, materialize_grads=True
            )
        return gradient


def _first_that_moves(
    measure: Any,
    space: ParameterSpace,
    metric: Metric,
    options: dict[str, Any],
    probe: Tensor,
) -> GaussNewton:
    """Differentiate twice in float64, else in the network's type; difference gradients else.

    A measure may return a plain zero at the reference, where no graph is left to differentiate;
    the Hessian of such a graph would be a silent zero.

    Returns
    -------
    GaussNewton
        One whose product with the probe is neither zero nor NaN.

    Raises
    ------
    NetworkError
        When there is none.
    RuntimeError
        What else the distance raises.
    """
    image = torch.zeros_like(probe)
    for differences in (False, True):
        found = GaussNewton(measure, space, metric, torch.float64, options, differences)
        try:
            image = found.product(probe)
        except RuntimeError:
            # The distance may run the network on data of the network's own type.
            if measure.reference.dtype == torch.float64:
                raise
            found = replace(found, dtype=measure.reference.dtype)
            image = found.product(probe)
        if bool(image.any()):
            break
    if bool(image.any()) and bool(torch.isfinite(image).all()):
        return found
    what = "not finite" if bool(image.any()) else "zero"
    raise NetworkError(
        f"the curvature of the distance at the reference is {what}",
        where="measure",
        advice="Check that its distance depends on the weights, and that their outputs do.",
    )


def _pulled_back(gradient: Tensor, point: Tensor, rows: Tensor) -> Tensor:
    """Vector-Hessian products of several vectors, in one backward pass where that works."""
    if len(rows) > 1:
        try:
            with warnings.catch_warnings():
                # Operations without a batched form run in a loop, which is all they could do.
                warnings.simplefilter("ignore", UserWarning)
                (found,) = torch.autograd.grad(
                    gradient,
                    point,
                    rows,
                    is_grads_batched=True,
                    retain_graph=True,
                    materialize_grads=True,
                )
            return found
        except RuntimeError:
            pass
    return torch.stack(
        [
            torch.autograd.grad(gradient, point, row, retain_graph=True, materialize_grads=True)[0]
            for row in rows
        ]
    )
