"""What a perfect sampler would return, by quadrature: finite-temperature learning coefficients.

An estimate of the learning coefficient is ``nbeta E[K]`` under the density

    exp(-nbeta K(w) - localization/2 |w - centre|^2),   K(w) = potential(w) - potential(centre).

It tends to the learning coefficient as ``nbeta`` grows, but slowly: with multiplicity ``m`` it is
``(m - 1) / log(nbeta)`` short of it. Samplers are therefore to be measured against the values of
this file. `quadratic` has them in closed form, `finite_temperature` for any potential of one to
three variables.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.errors import OptionError, ResourceError

__all__ = ["boltzmann_mean", "finite_temperature", "quadratic"]

# Beyond this many standard deviations of the localisation a Gaussian weighs less than 1e-18.
_TRUNCATION: Final = 9.0
# Gauss-Legendre nodes along each axis of a cell: the difference of the two is the error estimate.
_COARSE, _FINE = 5, 8
# First cells halve towards the centre this often, by number of dimensions: ridges along the axes
# are met at once, any other by bisection.
_GRADING: Final = {1: 40, 2: 14, 3: 4}
# Temperatures of the ladder fall by this factor, from the largest energy, and are followed loosely.
_COOLING: Final = 4.0
_HOTTEST: Final = 1e15
_WARM_TOLERANCE: Final = 1e-2
# An error of this size counts as none, where the value itself is 0.
_NEGLIGIBLE: Final = 1e-15
_POINTS_AT_ONCE: Final = 1 << 19
_MOST_CELLS: Final = {1: 20_000, 2: 200_000, 3: 60_000}


def quadratic(
    curvatures: Float[Tensor, "P"],
    nbeta: float,
    localization: float = 0.0,
    *,
    step_size: float | None = None,
) -> float:
    """The value for ``K = 1/2 sum h_i w_i^2``: half of MacKay's effective number of parameters.

    Parameters
    ----------
    curvatures
        ``h``, shape ``(P,)``: eigenvalues of the Hessian of the loss. A zero contributes nothing.
    nbeta
        Inverse temperature times the number of examples, positive.
    localization
        Strength ``gamma`` of the pull towards the minimum.
    step_size
        The value of full-batch SGLD with steps ``w' = w - eps/2 gradient + sqrt(eps) noise``
        instead of that of the exact posterior.

    Returns
    -------
    float
        ``1/2 sum nbeta h / a`` with ``a = nbeta h + gamma``; term ``i`` is divided by
        ``1 - eps a_i / 4`` for SGLD, the stationary variance of whose linear recursion is
        ``1 / (a_i (1 - eps a_i / 4))``.

    Raises
    ------
    OptionError
        For a temperature that is not positive, a direction in which the density does not decay, or
        a step at which SGLD diverges (``eps a_i >= 4``).
    """
    _check_temperature(nbeta, localization, "quadratic")
    curvatures = curvatures.detach().to(torch.float64)
    stiffness = nbeta * curvatures + localization
    unbounded = (stiffness < 0) | ((stiffness == 0) & (curvatures != 0)) | ~stiffness.isfinite()
    if bool(unbounded.any()):
        raise OptionError(
            f"the density does not decay along {int(unbounded.sum())} directions",
            where="quadratic(curvatures)",
            advice="Use a localization above -nbeta times the least curvature.",
        )
    flat = stiffness == 0
    terms = torch.where(flat, 0.0, nbeta * curvatures / torch.where(flat, 1.0, stiffness))
    if step_size is not None:
        largest = float(stiffness.max()) if len(stiffness) else 0.0
        if not 0 < step_size * max(largest, 1e-300) < 4:
            raise OptionError(
                f"step {step_size:g} with stiffness up to {largest:g}",
                where="quadratic(step_size)",
                advice="SGLD is stable for steps in (0, 4 / (nbeta * curvature + localization)).",
            )
        terms = terms / (1 - step_size * stiffness / 4)
    return float(terms.sum()) / 2


def finite_temperature(
    potential: Callable[[Float[Tensor, "N d"]], Float[Tensor, "N"]],
    dimensions: int,
    nbeta: float,
    *,
    localization: float = 0.0,
    centre: Float[Tensor, "d"] | None = None,
    box: float | Float[Tensor, "d 2"] | None = None,
    tolerance: float = 1e-6,
) -> float:
    """``nbeta E[K]``, the finite-temperature learning coefficient, by adaptive quadrature.

    Cells of a tensor-product grid, graded towards the centre, are bisected across the axis along
    which they are resolved worst, until the two Gauss rules on every cell agree.

    Parameters
    ----------
    potential
        Loss of points ``(N, d)``, in float64 on the CPU, shape ``(N,)``; a constant in it does not
        matter.
    dimensions
        ``d``, one to three.
    nbeta
        Inverse temperature times the number of examples, positive.
    localization
        ``gamma`` of the Gaussian factor ``exp(-gamma/2 |w - centre|^2)``.
    centre
        The point whose coefficient is meant, shape ``(d,)``; default the origin.
    box
        Hard walls: half the width of a cube about the centre, or lower and upper ends, shape
        ``(d, 2)``. Without it the localisation has to keep the density together.
    tolerance
        Relative error aimed at.

    Returns
    -------
    float
        ``nbeta (E[potential] - potential(centre))``.

    Raises
    ------
    OptionError
        For dimensions, temperatures, boxes or tolerances out of range, or a potential that is not
        finite.
    ResourceError
        When the tolerance is not reached with the largest number of cells.
    """
    _check_temperature(nbeta, localization, "finite_temperature")
    middle = _centre(centre, dimensions, "finite_temperature")
    if box is None:
        if localization == 0:
            raise OptionError(
                "neither a box nor a localisation",
                where="finite_temperature",
                advice="Give one of them: the density need not be integrable without.",
            )
        box = _TRUNCATION / math.sqrt(localization)
    walls = _walls(box, middle, "finite_temperature")
    origin = potential(middle[None])[0]

    def exponent(points: Tensor) -> tuple[Tensor, Tensor]:
        excess = nbeta * (potential(points) - origin)
        return excess, excess + localization / 2 * (points - middle).square().sum(1)

    return _mean(exponent, walls, middle, tolerance, "finite_temperature")


def boltzmann_mean(
    observable_and_energy: Callable[[Float[Tensor, "N d"]], tuple[Tensor, Tensor]],
    dimensions: int,
    box: float | Float[Tensor, "d 2"],
    *,
    centre: Float[Tensor, "d"] | None = None,
    tolerance: float = 1e-6,
) -> float:
    """Mean of an observable under ``exp(-energy)`` in a box, by adaptive quadrature.

    For potentials in more variables of which all but three can be integrated by hand: the output
    weights of a network, for instance, under squared error.

    Parameters
    ----------
    observable_and_energy
        From points ``(N, d)`` in float64 to two tensors ``(N,)``.
    dimensions
        ``d``, one to three.
    box
        Half the width of a cube about the centre, or lower and upper ends, shape ``(d, 2)``.
    centre
        Where the grid is finest at first, shape ``(d,)``; default the origin.
    tolerance
        Relative error aimed at.

    Returns
    -------
    float
        The mean.

    Raises
    ------
    OptionError
        For dimensions, boxes or tolerances out of range, or an energy that is not finite.
    ResourceError
        When the tolerance is not reached with the largest number of cells.
    """
    middle = _centre(centre, dimensions, "boltzmann_mean")
    walls = _walls(box, middle, "boltzmann_mean")
    return _mean(observable_and_energy, walls, middle, tolerance, "boltzmann_mean")


def _mean(
    observable_and_energy: Callable[[Tensor], tuple[Tensor, Tensor]],
    walls: Tensor,
    middle: Tensor,
    tolerance: float,
    where: str,
) -> float:
    """Bisect cells until the two rules agree, at one temperature after the other."""
    # A thin curved ridge of the density may pass between all nodes of both rules, which then agree
    # that there is nothing. Under a high temperature it is broad and cannot be missed; the cells
    # follow as it narrows.
    if not 1e-12 <= tolerance < 1:
        raise OptionError(
            f"tolerance {tolerance:g}",
            where=f"{where}(tolerance)",
            advice="Use a relative error from 1e-12 to below 1.",
        )
    dimensions = len(middle)
    rules = [_Rule(order, dimensions) for order in (_COARSE, _FINE)]
    cells = _graded_cells(walls, middle, _GRADING[dimensions])
    corners = cells.reshape(-1, dimensions * 2)[:, ::2]
    highest = observable_and_energy(corners)[1].nan_to_num(posinf=0).max().clamp(1.0, _HOTTEST)
    rungs = math.ceil(math.log(float(highest), _COOLING))
    value = math.nan
    for rung in range(rungs, -1, -1):
        heated = _heated(observable_and_energy, _COOLING**rung)
        aim = tolerance if rung == 0 else max(tolerance, _WARM_TOLERANCE)
        value, cells = _refined(heated, cells, rules, aim, where)
    return value


def _heated(
    observable_and_energy: Callable[[Tensor], tuple[Tensor, Tensor]], temperature: float
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The same with the energy divided by a temperature."""

    def divided(points: Tensor) -> tuple[Tensor, Tensor]:
        observable, energy = observable_and_energy(points)
        return observable, energy / temperature

    return divided


def _refined(
    observable_and_energy: Callable[[Tensor], tuple[Tensor, Tensor]],
    cells: Tensor,
    rules: list[_Rule],
    tolerance: float,
    where: str,
) -> tuple[float, Tensor]:
    """The mean, and the cells on which the two rules agree."""
    dimensions = cells.shape[1]
    table = _Table.empty(dimensions)
    while True:
        table = table.extended(cells, observable_and_energy, rules)
        mass, moment = table.fine.sum(0).tolist()
        if not math.isfinite(moment) or not mass > 0:
            raise OptionError(
                "the density cannot be integrated: the potential is not finite everywhere",
                where=where,
                advice="Use a box inside its domain.",
            )
        value = moment / mass
        # The error of a quotient: that of its parts, counted against each other in every cell.
        error = (table.coarse - table.fine) @ table.fine.new_tensor([-value, 1.0]) / mass
        error = error.abs()
        aim = tolerance * abs(value) + _NEGLIGIBLE
        if float(error.sum()) <= aim:
            return value, table.cells
        rough = error > aim / (2 * len(error))
        if len(error) + int(rough.sum()) > _MOST_CELLS[dimensions]:
            raise ResourceError(
                f"error {float(error.sum()):.1e} of {value:.4g} after {len(error)} cells",
                where=where,
                advice="Use a larger tolerance, a smaller box or a smaller nbeta.",
            )
        cells = table.bisected(rough)
        table = table.kept(~rough)


def _check_temperature(nbeta: float, localization: float, where: str) -> None:
    if not (math.isfinite(nbeta) and nbeta > 0):
        raise OptionError(
            f"nbeta {nbeta:g}", where=where, advice="Use a positive number, such as n / log(n)."
        )
    if not (math.isfinite(localization) and localization >= 0):
        raise OptionError(
            f"localization {localization:g}", where=where, advice="Use 0 or a positive number."
        )


def _centre(centre: Tensor | None, dimensions: int, where: str) -> Tensor:
    """The centre in float64; refuses numbers of dimensions too."""
    if dimensions not in _GRADING:
        raise OptionError(
            f"{dimensions} dimensions",
            where=f"{where}(dimensions)",
            advice=f"Quadrature is for 1 to {max(_GRADING)} dimensions; sample beyond them.",
        )
    if centre is None:
        return torch.zeros(dimensions, dtype=torch.float64)
    if centre.shape != (dimensions,) or not bool(centre.isfinite().all()):
        raise OptionError(
            f"centre {centre.tolist()} in {dimensions} dimensions",
            where=f"{where}(centre)",
            advice="Give one finite number for each dimension.",
        )
    return centre.detach().to("cpu", torch.float64)


def _walls(box: float | Tensor, centre: Tensor, where: str) -> Tensor:
    """Lower and upper ends of the domain of integration, shape ``(d, 2)``."""
    if isinstance(box, Tensor):
        walls = box.detach().to("cpu", torch.float64)
    else:
        walls = torch.stack([centre - box, centre + box], 1)
    right = walls.shape == (len(centre), 2) and bool((walls[:, 0] < walls[:, 1]).all())
    if not (right and bool(walls.isfinite().all())):
        raise OptionError(
            f"box {walls.tolist()}",
            where=f"{where}(box)",
            advice="Give a positive half-width, or a lower and a larger upper end of each axis.",
        )
    return walls


def _graded_cells(walls: Tensor, centre: Tensor, halvings: int) -> Tensor:
    """Cells ``(C, d, 2)`` whose widths halve towards the centre."""
    axes: list[list[tuple[float, float]]] = []
    for (low, high), middle in zip(walls.tolist(), centre.tolist(), strict=True):
        reach = max(abs(low - middle), abs(high - middle))
        steps = [reach * 2.0**-k for k in range(halvings + 1)]
        inner = {x for s in steps for x in (middle - s, middle + s) if low < x < high}
        ends = sorted({low, high} | inner | ({middle} if low < middle < high else set()))
        axes.append(list(itertools.pairwise(ends)))
    return torch.tensor(list(itertools.product(*axes)), dtype=torch.float64)


class _Rule:
    """Tensor-product Gauss-Legendre on ``[-1, 1]^d``, and how well it resolves each axis."""

    def __init__(self, order: int, dimensions: int) -> None:
        nodes, weights = np.polynomial.legendre.leggauss(order)
        self.order, self.dimensions = order, dimensions
        grid = itertools.product(nodes, repeat=dimensions)
        self.nodes = torch.tensor(list(grid), dtype=torch.float64)  # (Q, d)
        products = [math.prod(row) for row in itertools.product(weights / 2, repeat=dimensions)]
        self.weights = torch.tensor(products, dtype=torch.float64)  # (Q,), sum 1
        vandermonde = np.polynomial.legendre.legvander(nodes, order - 1)
        scale = np.arange(order) + 0.5
        top = (vandermonde * weights[:, None] * scale)[:, -2:]
        self.highest = torch.from_numpy(top)  # (order, 2): to the two highest coefficients

    def unresolved(self, values: Float[Tensor, "C Q"]) -> Float[Tensor, "C d"]:
        """Size of the highest Legendre coefficients along each axis."""
        block = values.reshape(-1, *[self.order] * self.dimensions)
        sizes = [
            torch.movedim(block, 1 + axis, -1).matmul(self.highest).abs().flatten(1).sum(1)
            for axis in range(self.dimensions)
        ]
        return torch.stack(sizes, 1)


class _Table:
    """Cells with their integrals of the density and of ``nbeta K`` times the density.

    Integrals are relative to ``exp(-floor)``, the largest density met so far.
    """

    def __init__(
        self, cells: Tensor, coarse: Tensor, fine: Tensor, axis: Tensor, floor: float
    ) -> None:
        self.cells, self.coarse, self.fine = cells, coarse, fine  # (C, d, 2), (C, 2), (C, 2)
        self.axis, self.floor = axis, floor  # (C,): across which to bisect

    @classmethod
    def empty(cls, dimensions: int) -> _Table:
        """A table without cells."""
        none = torch.zeros(0, 2, dtype=torch.float64)
        cells = torch.zeros(0, dimensions, 2, dtype=torch.float64)
        return cls(cells, none, none, torch.zeros(0, dtype=torch.int64), math.inf)

    def extended(
        self,
        cells: Tensor,
        exponent: Callable[[Tensor], tuple[Tensor, Tensor]],
        rules: list[_Rule],
    ) -> _Table:
        """With the integrals of further cells, the density evaluated in bounded memory."""
        table = self
        for part in cells.split(max(1, _POINTS_AT_ONCE // len(rules[-1].nodes))):
            low, width = part[:, None, :, 0], (part[..., 1] - part[..., 0])[:, None]
            found = []
            for rule in rules:
                points = low + width * (rule.nodes + 1) / 2  # (C, Q, d)
                excess, energy = exponent(points.flatten(0, 1))
                found.append((excess.reshape(len(part), -1), energy.reshape(len(part), -1)))
            floor = min(table.floor, *(float(energy.min()) for _, energy in found))
            volume = width[:, 0].prod(1)
            sums = []
            for rule, (excess, energy) in zip(rules, found, strict=True):
                density = torch.exp(floor - energy)
                # Where the energy is infinite the observable may be too, and does not count.
                weighted = torch.where(density > 0, excess * density, 0.0)
                both = torch.stack([density, weighted], 2)  # (C, Q, 2)
                sums.append(volume[:, None] * torch.einsum("q,cqk->ck", rule.weights, both))
            # The density of the finer rule is the last one computed.
            axis = rules[-1].unresolved(density).argmax(1)
            shrink = math.exp(floor - table.floor) if math.isfinite(table.floor) else 0.0
            table = _Table(
                torch.cat([table.cells, part]),
                torch.cat([table.coarse * shrink, sums[0]]),
                torch.cat([table.fine * shrink, sums[1]]),
                torch.cat([table.axis, axis]),
                floor,
            )
        return table

    def kept(self, which: Tensor) -> _Table:
        """The cells of a mask."""
        chosen = (self.cells[which], self.coarse[which], self.fine[which], self.axis[which])
        return _Table(*chosen, self.floor)

    def bisected(self, which: Tensor) -> Tensor:
        """The halves of the cells of a mask."""
        cells, axis = self.cells[which], self.axis[which]
        row = torch.arange(len(cells))
        middle = cells[row, axis].mean(1)
        left, right = cells.clone(), cells.clone()
        left[row, axis, 1], right[row, axis, 0] = middle, middle
        return torch.cat([left, right])
