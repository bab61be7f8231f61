"""Cumulant propagation with dense tensors: the reference for every fast path.

A law is carried through alternating linear maps and elementwise activations as its joint
cumulants, each a dense symmetric tensor (Wu, Lecomte, Winer, Robinson, Hilton and Christiano,
arXiv 2605.05179). Nothing is factored, no term is written by hand: the diagrams come from
:mod:`oracles.partitions` and the one-dimensional integrals from :mod:`oracles.wick`. The three
steps are repeated for every layer:

1. *projection* (`radial_core`): degrees above the order keep only Sym(core (x) I^r);
2. *linear map* (`linear_step`): exact; the identity I becomes the metric M = W W^T;
3. *activation* (`activation_step`): expand about independent Gaussians with the right marginal
   means and variances, which gives the cumulants of powers of the activations at distinct
   neurons, then recover the cumulants with repeated neurons from them.

The cost is n^d with d the highest degree (up to order + 2), times the number of diagrams: meant
for n = 3 to 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import factorial, prod
from typing import Literal

import numpy as np
import numpy.typing as npt

from oracles.partitions import (
    Block,
    cumulant_from_powers,
    diagram_budget,
    diagrams,
    positions_of_type,
    slice_types,
    total_vector,
    tracked_degrees,
    weight,
)
from oracles.wick import ScalarActivation, wick_table
from pushforward.errors import OptionError, ShapeError

__all__ = [
    "Cumulants",
    "activation_step",
    "cumulant_slice",
    "expand_core",
    "linear_step",
    "power_cumulants",
    "propagate_dense",
    "radial_core",
]

FloatArray = npt.NDArray[np.float64]
Cumulants = dict[int, FloatArray]  # degree -> tensor of that order
Metric = Literal["exact", "average"]


def propagate_dense(
    weights: Sequence[FloatArray],
    biases: Sequence[FloatArray | None],
    activations: Sequence[ScalarActivation | Sequence[ScalarActivation]],
    mean: FloatArray,
    covariance: FloatArray,
    order: int,
    augmented: bool = False,
    metric: Metric = "exact",
    input_cumulants: Mapping[int, FloatArray] | None = None,
) -> list[Cumulants]:
    """Cumulants of every linear map's output.

    Parameters
    ----------
    weights
        One matrix of shape (out, in) for each linear map; the sizes may change from map to map.
    biases
        One vector of shape (out,), or None, for each linear map.
    activations
        One fewer than the weights: a function for the whole layer, or a list with one function
        for each unit (a residual connection is a unit with the identity).
    mean, covariance
        Of the input, shapes (d,) and (d, d).
    order
        K = 1 (means), 2 (covariances), 3 or 4.
    augmented
        Whether to keep every diagram of squared size n^-K, one more power than needed to have an
        error of that size.
    metric
        "exact" uses W W^T for the radial parts, "average" its mean diagonal times the identity, at
        every linear map including the last.
    input_cumulants
        Cumulants of the input of degree 3 and more, for inputs that are not Gaussian. Degrees that
        are missing are zero; degrees that are not tracked are ignored.

    Returns
    -------
    One dictionary for each linear map ("pre0", ..., "preL"): degree -> dense symmetric tensor,
    for every tracked degree. Degrees above the order are the projections that are carried, not
    estimates of the cumulant itself (for K = 1 this includes the covariance).

    Raises
    ------
    OptionError
        If order or metric is not one of those listed.
    ShapeError
        If the numbers of weights, biases and activations do not fit together.
    """
    if order not in {1, 2, 3, 4}:
        raise OptionError(f"no such order: {order}", where="order", advice="Choose 1, 2, 3 or 4.")
    if metric not in {"exact", "average"}:
        raise OptionError(
            f"no such metric: {metric!r}", where="metric", advice='Choose "exact" or "average".'
        )
    if not len(weights) == len(biases) == len(activations) + 1:
        raise ShapeError(
            f"{len(weights)} weights, {len(biases)} biases and {len(activations)} activations",
            where="weights",
            advice="Give as many biases as weights and one activation fewer.",
        )
    tracked = tracked_degrees(order, augmented)
    given = {1: np.asarray(mean), 2: np.asarray(covariance), **(input_cumulants or {})}
    size = given[1].size
    cumulants = {
        degree: np.asarray(given.get(degree, np.zeros((size,) * degree)), dtype=np.float64)
        for degree in tracked
    }
    outputs = []
    for layer, (matrix, bias) in enumerate(zip(weights, biases, strict=True)):
        if layer > 0:
            cumulants = activation_step(cumulants, activations[layer - 1], order, augmented)
        cores = {degree: radial_core(cumulants[degree], r) for degree, r in tracked.items()}
        cumulants = linear_step(cores, matrix, bias, metric)
        outputs.append(cumulants)
    return outputs


# ---- linear maps and radial parts ---------------------------------------------------------------


def linear_step(
    cores: Mapping[int, FloatArray],
    matrix: FloatArray,
    bias: FloatArray | None,
    metric: Metric = "exact",
) -> Cumulants:
    """Dense cumulants after x -> matrix @ x + bias, of cumulants Sym(core (x) I^r).

    Parameters
    ----------
    cores
        degree -> core; r is half of what the core's order lacks to the degree.
    matrix, bias
        Shapes (out, in) and (out,).
    metric
        What becomes of the identity, see :func:`propagate_dense`.

    Returns
    -------
    degree -> tensor with all legs of length out.
    """
    gram = matrix @ matrix.T
    if metric == "average":
        gram = np.trace(gram) / len(gram) * np.eye(len(gram))
    moved = {
        degree: expand_core(_transform_legs(core, matrix), gram, degree)
        for degree, core in cores.items()
    }
    if bias is not None:
        moved[1] = moved[1] + bias
    return moved


def _transform_legs(tensor: FloatArray, matrix: FloatArray) -> FloatArray:
    for axis in range(tensor.ndim):
        tensor = np.moveaxis(np.tensordot(matrix, tensor, axes=(1, axis)), 0, axis)
    return tensor


def expand_core(core: FloatArray, metric: FloatArray, degree: int) -> FloatArray:
    """Sym(core (x) metric^r), of order ``degree``, for a symmetric core of order degree - 2r.

    The average over all ways to attach the legs, of which those that differ by exchanging legs
    of the core, ends of a metric or whole metrics are the same.
    """
    num_pairs = (degree - core.ndim) // 2
    places = positions_of_type((2,) * num_pairs + (1,) * core.ndim)
    total = np.zeros((len(metric),) * degree)
    for place in places:
        pairs, legs = place[:num_pairs], [axis for (axis,) in place[num_pairs:]]
        operands: list[object] = [core, legs]
        for pair in pairs:
            operands += [metric, list(pair)]
        total += np.einsum(*operands, list(range(degree)))  # type: ignore[call-overload]
    return total / len(places)


def radial_core(tensor: FloatArray, radial: int) -> FloatArray:
    """Core of the orthogonal projection of a symmetric tensor onto {Sym(core (x) I^radial)}.

    A symmetric tensor of degree d is a homogeneous polynomial on R^n, and splits into |x|^{2r}
    times harmonic polynomials of degree d - 2r. With L the Laplacian and R the multiplication by
    |x|^2, the r-th part is sum_j a_j R^j L^j; the parts r >= radial are kept, and R^radial is left
    out.
    """
    degree = tensor.ndim
    size = len(tensor)
    if radial == 0:
        return tensor
    laplacians = [tensor]
    for _ in range(degree // 2):
        last = laplacians[-1]
        laplacians.append(np.asarray(last.ndim * (last.ndim - 1) * np.trace(last)))
    core = np.zeros((size,) * (degree - 2 * radial))
    for r in range(radial, degree // 2 + 1):
        for j in range(r, degree // 2 + 1):
            lifted = expand_core(laplacians[j], np.eye(size), degree - 2 * radial)
            core = core + _projector_coefficient(size, degree, r, j) * lifted
    return core


def _projector_coefficient(size: int, degree: int, r: int, j: int) -> float:
    """a_j of the projector onto |x|^{2r} times harmonic polynomials, for 1 <= r <= j.

    (-1)^r (c - r) / (4^j r! (j - r)! c (1-c)(2-c)...(j-c)), where c - r cancels against a factor
    below: for n = 2 both vanish.
    """
    c = degree - r + size / 2 - 1
    rising = c * prod(i - c for i in range(1, j + 1) if i != r)
    return (-1.0) ** (r + 1) / (4.0**j * factorial(r) * factorial(j - r) * rising)


# ---- activations --------------------------------------------------------------------------------


def activation_step(
    cumulants: Cumulants,
    activation: ScalarActivation | Sequence[ScalarActivation],
    order: int,
    augmented: bool,
) -> Cumulants:
    """Cumulants of phi(Z), by the truncated diagram expansion, from those of Z.

    Parameters
    ----------
    cumulants
        Of Z: every tracked degree.
    activation
        One function, or one for each unit.
    order, augmented
        Which diagrams and slices are kept.

    Returns
    -------
    degree -> tensor, for the same degrees; slices that are not computed are zero.
    """
    max_degree = max(tracked_degrees(order, augmented))
    budget = diagram_budget(order, augmented)
    wick = wick_table(activation, cumulants[1], np.diagonal(cumulants[2]), 2 * budget, max_degree)
    powers = power_cumulants(cumulants, wick, order, augmented)
    size = cumulants[1].size
    result = {degree: np.zeros((size,) * degree) for degree in range(1, max_degree + 1)}
    for p in powers:
        values = cumulant_slice(powers, p, size)
        axes = _neuron_axes(size, len(p))
        for blocks in positions_of_type(p):
            block_of = {leg: a for a, block in enumerate(blocks) for leg in block}
            result[sum(p)][tuple(axes[block_of[leg]] for leg in range(sum(p)))] += values
    return result


def power_cumulants(
    cumulants: Cumulants, wick: FloatArray, order: int, augmented: bool
) -> dict[tuple[int, ...], FloatArray]:
    """Joint cumulants of the powers phi(Z_i1)^p1, ..., phi(Z_im)^pm, for every slice type p.

    pK_p(i) = sum over diagrams nu of c(nu) prod_v kappa_v(i) prod_a w_{k_a}^{(p_a)}(i_a), with k
    the sum of the blocks v. It holds at distinct neurons; other entries mean nothing.

    Parameters
    ----------
    cumulants
        Of Z.
    wick
        w_k^{(p)}, indexed [p, k, unit].
    order, augmented
        Which diagrams and slices are kept.

    Returns
    -------
    p -> array of shape (n,) * len(p).
    """
    size = cumulants[1].size
    max_degree = max(tracked_degrees(order, augmented))
    budget = diagram_budget(order, augmented)
    result = {}
    for p in slice_types(order, max_degree):
        num_neurons = len(p)
        axes = _neuron_axes(size, num_neurons)

        def kappa(block: Block, axes: tuple[npt.NDArray[np.intp], ...] = axes) -> FloatArray:
            legs = tuple(axes[a] for a, times in enumerate(block) for _ in range(times))
            return cumulants[sum(block)][legs]

        total = np.zeros((size,) * num_neurons)
        for nu in diagrams(num_neurons, budget, max_degree):
            k = total_vector(nu, num_neurons)
            gaussian = prod(wick[p[a], k[a]][axes[a]] for a in range(num_neurons))
            total += float(weight(nu)) * prod((kappa(v) for v in nu), start=gaussian)
        result[p] = total
    return result


def cumulant_slice(
    powers: Mapping[tuple[int, ...], FloatArray], p: tuple[int, ...], size: int
) -> FloatArray:
    """K_p at distinct neurons, zero elsewhere, from the power cumulants.

    Parameters
    ----------
    powers
        q -> pK_q, for at least every q that appears in the expansion of K_p.
    p
        The slice type.
    size
        Number of neurons n.

    Returns
    -------
    Shape (n,) * len(p).
    """
    total = np.zeros((size,) * len(p))
    for coefficient, rho in cumulant_from_powers(p):
        total += coefficient * prod(_power_cumulant(powers, v, size) for v in rho)
    axes = _neuron_axes(size, len(p))
    for first, second in combinations(axes, 2):
        total = np.where(first == second, 0.0, total)
    return total


def _power_cumulant(
    powers: Mapping[tuple[int, ...], FloatArray], block: Block, size: int
) -> FloatArray:
    """pK_v with its legs on the axes of the block's support and length one on the others.

    Slices are stored with descending powers: pK_{1,2}(i, j) is pK_{2,1}(j, i).
    """
    support = [a for a, times in enumerate(block) if times]
    stored = sorted(support, key=lambda a: -block[a])
    values = powers[tuple(block[a] for a in stored)]
    ordered = values.transpose([stored.index(a) for a in support])
    return ordered.reshape([size if times else 1 for times in block])


def _neuron_axes(size: int, num_neurons: int) -> tuple[npt.NDArray[np.intp], ...]:
    """One index array for each neuron of a slice; together they broadcast to all tuples."""
    return tuple(np.ix_(*[np.arange(size)] * num_neurons))
