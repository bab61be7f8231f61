"""`propagate`: the law of the outputs of a network with Gaussian inputs, without sampling."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from pushforward.cumulants.activation_step import Closure, StepReport, activate
from pushforward.cumulants.flops import propagation_flops, unit_flops
from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.mean_propagation import (
    UnitMoments,
    activate_units,
    affine_units,
    first_affine_units,
)
from pushforward.cumulants.output import (
    ErrorBar,
    Moments,
    OutputLaw,
    concatenate,
    moments_of,
)
from pushforward.cumulants.towers import CumulantTower, Metric, Radius, gram
from pushforward.errors import OptionError, ResourceError, ShapeError
from pushforward.networks.graph import AffineMap, NetworkGraph, UnitGroup, read_network
from pushforward.options import choice, number, whole_number
from pushforward.runs.estimate import Check

__all__ = ["VarianceForm", "depth_over_width", "propagate"]

VarianceForm = Literal["unit", "scalar"]

_BREAKDOWN_RATIO = 1 / 8
_THIRD_ORDER_BYTES = 4e9
_EXACT_ABOVE = 0.5
# A batch of laws is worked through in portions whose covariances take about this much.
_BATCH_BYTES = 1 << 30


@dataclass(frozen=True)
class _Settings:
    metric: Metric
    exact_above: float | None
    angular: bool


class _Law(NamedTuple):
    """What is known of the outputs of the network, or of a layer."""

    moments: Moments
    tower: CumulantTower | None
    radius: Radius | None


@dataclass(frozen=True)
class _Pass:
    """One run through the network."""

    output: _Law
    reports: tuple[StepReport, ...]
    layers: dict[str, _Law]

    @property
    def moments(self) -> Moments:
        return self.output.moments

    @property
    def broken(self) -> int:
        return sum(report.negative_variances for report in self.reports)


def propagate(
    net: nn.Module | NetworkGraph,
    law: GaussianLaw,
    order: int = 2,
    *,
    augmented: bool | None = None,
    metric: Metric = "exact",
    variance: VarianceForm = "unit",
    exact_above: float | None = _EXACT_ABOVE,
    angular: bool | None = None,
    standard_error: bool = True,
    layers: bool = False,
) -> OutputLaw:
    """Law of the outputs of a network whose inputs are Gaussian, from its weights alone.

    Cumulants are pushed through the network layer by layer (arXiv 2605.05179). The cost does not
    depend on how rare an event is, and the error falls with the width ``n`` of the network like
    ``n^-order``.

    Parameters
    ----------
    net
        A module that torch.fx can trace, in eval mode: Linear, convolution, pooling, BatchNorm,
        the usual activations, residual additions and concatenations. A graph from `read_network`
        is accepted too.
    law
        Of the inputs: one law or a batch.
    order
        1: means and independent variances, ``O(n^2)`` a layer. 2: covariances, ``O(n^3)``. 3: the
        full third cumulant in factored form, ``O(L n^3)`` a layer for ``L`` layers behind it.
    augmented
        For order 2, whether to track the radial parts of the third and fourth cumulant as well:
        one and a half to twice the cost, a third to a half of the squared error on wide networks,
        and what tail probabilities need. None switches it on unless depth over width is 1/8 or
        more, where it does harm.
    metric
        ``"average"`` replaces ``W W^T`` by its mean diagonal in the radial cumulants: cheaper and
        less accurate.
    variance
        At order 1, one variance for each unit or, as published, one ``"scalar"`` for each layer.
    exact_above
        Pairs of units correlated more strongly than this get an exact bivariate kernel, and the
        first layer, where units are exactly Gaussian, is treated exactly throughout. None gives
        the published expansion.
    angular
        Propagate on the sphere and put the radius back exactly. None does so where it is exact: no
        biases, positively homogeneous activations, an isotropic centred law, at least two hidden
        layers, order 2 or 3, and no gradient asked for biases or the mean of the law, which would
        not be exact. The members of a batch of laws are treated alike.
    standard_error
        Whether to run a second order for the error bar. Order 1 is compared with order 2; order 2
        with order 3; order 3 with order 2 augmented, which bounds its error from above rather than
        estimating it.
    layers
        Whether to return the laws of all hidden layers.

    Returns
    -------
    OutputLaw
        In the wider dtype of the network and the law, computed in float64. Differentiable in
        weights and law, except where the correlation of a pair crosses `exact_above`.

    Raises
    ------
    OptionError
        For an unknown order or option.
    ShapeError
        When the law has another dimension than the network expects, or lies on another device.
    ResourceError
        When the covariances do not fit into memory.

    Examples
    --------
    >>> import torch, pushforward as pf
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    >>> outputs = pf.propagate(net, pf.GaussianLaw.standard(4))
    >>> tuple(outputs.mean.shape)
    (2,)
    """
    start = time.perf_counter()
    advice = "Use 1 (means), 2 (covariances) or 3 (third cumulants)."
    order = whole_number(order, "order", most=3, advice=advice)
    choice(metric, "metric", get_args(Metric))
    choice(variance, "variance", get_args(VarianceForm))
    if exact_above is not None:
        advice = "It is a correlation from 0 to 1; None switches the exact kernel off."
        exact_above = number(exact_above, "exact_above", least=0, most=1, advice=advice)
    graph = net if isinstance(net, NetworkGraph) else read_network(net, law.event_shape)
    inputs = _prepare_law(graph, law)
    on_sphere = _use_sphere(graph, law, order, angular)
    portions = _portions(graph, inputs, order)
    if len(portions) > 1:
        options: dict[str, Any] = {
            "augmented": augmented,
            "metric": metric,
            "variance": variance,
            "exact_above": exact_above,
            "angular": on_sphere,
            "standard_error": standard_error,
            "layers": layers,
        }
        parts = [propagate(graph, law.select(rows), order, **options) for rows in portions]
        return replace(concatenate(parts), seconds=time.perf_counter() - start)
    settings = _Settings(metric, exact_above, on_sphere)
    ratio = depth_over_width(graph)
    if augmented is None:
        augmented = order == 2 and ratio < _BREAKDOWN_RATIO
    if augmented and order != 2:
        raise OptionError(
            f"augmented=True with order={order}",
            where="propagate",
            advice="Only order 2 has an augmented form; order 3 goes beyond it.",
        )
    with _memory_errors(graph, inputs):
        if order == 1:
            main = _run_units(graph, inputs, variance, metric, layers)
            flops = _unit_cost(graph, inputs)
        else:
            closure = _closure(order, augmented)
            main = _run(graph, inputs, closure, settings, layers)
            flops = _cost(graph, closure, main, inputs)
        reference, name = None, ""
        if standard_error:
            reference, name, extra = _reference(graph, inputs, order, augmented, settings)
            flops += extra

    bar = None
    if reference is not None:
        bar = ErrorBar.between(main.moments, reference.moments)
    checks = _checks(graph, ratio, order, main, reference, name, bar, settings)
    dtype = torch.promote_types(graph.dtype, law.mean.dtype)
    single = not law.batch_shape

    def assemble(part: _Law, error: ErrorBar | None) -> OutputLaw:
        moments, tower = part.moments, part.tower
        if single:
            moments = moments.map(lambda x: x.squeeze(0))
            tower = None if tower is None else tower.squeezed()
            error = None if error is None else ErrorBar(*(x.squeeze(0) for x in error))
        result = OutputLaw.from_moments(
            moments,
            order=order,
            augmented=augmented,
            dtype=dtype,
            tower=tower,
            radius=part.radius,
            error=error,
        )
        return replace(result, checks=checks)

    return replace(
        assemble(main.output, bar),
        flops=flops,
        seconds=time.perf_counter() - start,
        layers={name: assemble(part, None) for name, part in main.layers.items()},
    )


def depth_over_width(graph: NetworkGraph) -> float:
    """``sum_l 1 / n_l`` over the hidden layers: the ``L / n`` that governs the error.

    Parameters
    ----------
    graph
        The network.

    Returns
    -------
    float
        0 below two hidden layers: the means behind a single one are exact.
    """
    if graph.depth < 2:
        return 0.0
    return sum((1 / max(1, stage.width) for stage in graph.stages), start=0.0)


# --- the passes ----------------------------------------------------------------------------------


def _run(
    graph: NetworkGraph, law: GaussianLaw, closure: Closure, settings: _Settings, keep: bool
) -> _Pass:
    """Orders 2 and 3."""
    radius = Radius(graph.input_features) if settings.angular else None
    on_sphere = radius is not None and closure != "covariance"
    batch = law.mean.shape[0]
    reports: list[StepReport] = []
    kept: dict[str, _Law] = {}
    tower: CumulantTower | None = None
    here: Radius | None = radius if on_sphere else None
    for index, stage in enumerate(graph.stages):
        if tower is None:
            core = radius.fourth_core if radius is not None and on_sphere else None
            tower = _first_affine(law, stage.affine, core, settings.metric)
        else:
            tower = tower.affine(stage.affine, settings.metric)
        if keep:
            kept |= _hidden_laws(stage.groups, tower.expanded(batch), here, before=True)
        tower, report = activate(tower.expanded(batch), stage.groups, closure, settings.exact_above)
        reports.append(report)
        if keep:
            kept |= _hidden_laws(stage.groups, tower, here, before=False)
        if radius is not None and not on_sphere and index == 0:
            # Behind the first layer, which is exact for Gaussian inputs, change to the sphere.
            tower, here = radius.remove(tower), radius
    if tower is None:
        tower = _first_affine(law, graph.output, None, settings.metric)
    else:
        tower = tower.affine(graph.output, settings.metric)
    tower = tower.expanded(batch)
    moments = moments_of(tower, radius)
    if closure != "covariance" and moments.third is None:
        zeros = torch.zeros_like(moments.mean)
        moments = moments._replace(third=zeros, fourth=zeros)
    return _Pass(_Law(moments, tower, radius), tuple(reports), kept)


def _run_units(
    graph: NetworkGraph, law: GaussianLaw, variance: VarianceForm, metric: Metric, keep: bool
) -> _Pass:
    """Order 1."""
    scalar = variance == "scalar"
    reports = []
    kept: dict[str, _Law] = {}
    units: UnitMoments | None = None
    affines: list[tuple[AffineMap, tuple[UnitGroup, ...]]] = [
        *((stage.affine, stage.groups) for stage in graph.stages),
        (graph.output, ()),
    ]
    for affine, groups in affines:
        if units is None:
            units = first_affine_units(law, affine, scalar, metric)
        else:
            units = affine_units(units, affine, scalar, metric)
        if keep:
            kept |= _hidden_laws(groups, units, None, before=True)
        if groups:
            units, broken = activate_units(units, groups)
            reports.append(StepReport(broken, 0, 0, 0.0))
        if keep:
            kept |= _hidden_laws(groups, units, None, before=False)
    assert units is not None
    moments = Moments(units.mean, units.variance.expand_as(units.mean))
    return _Pass(_Law(moments, None, None), tuple(reports), kept)


def _first_affine(
    law: GaussianLaw, affine: AffineMap, fourth_core: float | None, metric: Metric
) -> CumulantTower:
    """Tower behind the first affine map, at the least cost that the covariance allows."""
    linear, covariance = affine.linear, law.covariance
    mean = affine.apply(law.mean)
    fourth = metric_matrix = None
    if covariance.dim() == 0:
        product = gram(linear, mean)
        image = covariance * product
        if fourth_core is not None:
            fourth, metric_matrix = covariance.square() * fourth_core, product
            if metric == "average":
                metric_matrix = torch.eye(len(product)).to(product) * product.diagonal().mean()
    elif covariance.dim() == 1:
        image = linear.apply(linear.dense(mean) * covariance)
    else:
        image = linear.apply(linear.apply(covariance).mT)
    return CumulantTower(mean, image, None, fourth, metric_matrix)


def _reference(
    graph: NetworkGraph, law: GaussianLaw, order: int, augmented: bool, settings: _Settings
) -> tuple[_Pass, str, float]:
    """The pass that the error bar compares with, its name and its cost."""
    closure: Closure
    if order == 1:
        closure, name = "covariance", "order 2"
    elif order == 2 and _third_order_bytes(graph, law) < _THIRD_ORDER_BYTES:
        closure, name = "full", "order 3"
    elif order == 2:
        closure = "covariance" if augmented else "radial"
        name = "order 2" if augmented else "order 2 augmented"
    else:
        closure, name = "radial", "order 2 augmented"
    with torch.no_grad():
        result = _run(graph, law, closure, settings, keep=False)
    return result, name, _cost(graph, closure, result, law)


def _closure(order: int, augmented: bool) -> Closure:
    if order == 3:
        return "full"
    return "radial" if augmented else "covariance"


# --- costs ---------------------------------------------------------------------------------------


def _cost(graph: NetworkGraph, closure: Closure, result: _Pass, law: GaussianLaw) -> float:
    strong = sum(report.strong_pairs for report in result.reports)
    return (
        propagation_flops(graph, closure) * law.mean.shape[0]
        + propagation_flops(graph, closure, strong)
        - propagation_flops(graph, closure)
    )


def _portions(graph: NetworkGraph, law: GaussianLaw, order: int) -> list[slice]:
    """Rows of a batch of laws whose covariances fit the memory budget together."""
    batch = law.mean.shape[0]
    widths = [s.affine.linear.out_features for s in graph.stages]
    widest = max([graph.input_features, graph.output_features, *widths])
    numbers = 4.0 * widest if order == 1 else 4.0 * widest**2 + 3.0 * widest * sum(widths)
    size = max(1, int(_BATCH_BYTES / (8 * numbers)))
    return [slice(start, start + size) for start in range(0, batch, size)]


def _unit_cost(graph: NetworkGraph, law: GaussianLaw) -> float:
    return unit_flops(graph, full_input=law.covariance.dim() >= 2) * law.mean.shape[0]


def _third_order_bytes(graph: NetworkGraph, law: GaussianLaw) -> float:
    widths = [stage.affine.linear.out_features for stage in graph.stages]
    return 3 * 8.0 * law.mean.shape[0] * sum(widths) * max([*widths, 1])


# --- checks --------------------------------------------------------------------------------------


def _checks(
    graph: NetworkGraph,
    ratio: float,
    order: int,
    main: _Pass,
    reference: _Pass | None,
    name: str,
    bar: ErrorBar | None,
    settings: _Settings,
) -> tuple[Check, ...]:
    checks = [_check_variance(main, reference), _check_depth(ratio, graph)]
    if bar is not None and reference is not None:
        spread = torch.maximum(reference.moments.variance, main.moments.variance)
        checks.append(_check_agreement(bar, spread.detach(), name, order))
        checks.append(_check_spread(main, reference, name, order))
    if order > 1:
        checks += _check_pairs(main, settings)
        checks.append(_check_covariance(main))
    if graph.stacked:
        checks.append(
            Check(
                "stacked-activations",
                "warn",
                f"{', '.join(graph.stacked)} act directly on the output of another activation.",
                "Their inputs are far from Gaussian: compare with pushforward.monte_carlo.",
            )
        )
    if settings.angular:
        detail = "bias-free and homogeneous: propagated on the sphere, radius restored exactly"
        checks.append(Check("angular-gauge", "pass", detail))
    return tuple(checks)


def _check_variance(main: _Pass, reference: _Pass | None) -> Check:
    output = int((main.moments.variance.detach() < 0).sum())
    if main.broken or output:
        return Check(
            "positive-variance",
            "fail",
            f"{main.broken} hidden and {output} output variances came out negative.",
            "The expansion has broken down: use a lower order, order 2 without augmentation, or "
            "pushforward.monte_carlo.",
        )
    if reference is not None and reference.broken:
        return Check(
            "positive-variance",
            "warn",
            f"the order behind the error bar gave {reference.broken} negative variances.",
            "The error bar is not reliable: compare with pushforward.monte_carlo.",
        )
    return Check("positive-variance", "pass", "all propagated variances are positive.")


def _check_depth(ratio: float, graph: NetworkGraph) -> Check:
    detail = f"sum of 1 / width over {graph.depth} hidden layers is {ratio:.3g}"
    if ratio >= _BREAKDOWN_RATIO:
        return Check(
            "depth-over-width",
            "warn",
            f"{detail}, at least 1/8.",
            "At this depth higher orders no longer improve on lower ones: trust the error bar only "
            "roughly, or use pushforward.monte_carlo.",
        )
    return Check("depth-over-width", "pass", f"{detail}.")


def _check_agreement(bar: ErrorBar, spread: Tensor, name: str, order: int) -> Check:
    total = spread.clamp(min=0).sum(-1).clamp(min=1e-300)
    size = float((bar.difference.square().sum(-1) / total).max()) ** 0.5
    detail = f"the means differ from {name} by {size:.2g} standard deviations of the outputs"
    if not size < 1.0:
        advice = "Nothing is known at this order: use pushforward.monte_carlo."
        return Check("orders-agree", "fail", f"{detail}.", advice)
    if size > 0.2:
        better = "a higher order or " if order < 3 else ""
        advice = f"The expansion converges slowly here: use {better}pushforward.monte_carlo."
        return Check("orders-agree", "warn", f"{detail}.", advice)
    return Check("orders-agree", "pass", f"{detail}.")


def _check_spread(main: _Pass, reference: _Pass, name: str, order: int) -> Check:
    own, other = main.moments.variance.detach(), reference.moments.variance.detach()
    # Outputs that hardly vary beside the others do not decide.
    visible = other > 1e-6 * other.amax(-1, keepdim=True)
    ratio = (own / other.clamp(min=1e-300))[visible]
    low, high = (float(ratio.min()), float(ratio.max())) if ratio.numel() else (1.0, 1.0)
    detail = f"output variances are {low:.3g} to {high:.3g} times those of {name}"
    if low < 0.5 or high > 2.0:
        advice = (
            "Order 1 takes units as independent, which trained networks are not: use order 2 for "
            "variances."
            if order == 1
            else "Do not rely on the variances and tails: compare with pushforward.monte_carlo."
        )
        return Check("variances-agree", "warn", f"{detail}.", advice)
    return Check("variances-agree", "pass", f"{detail}.")


def _check_pairs(main: _Pass, settings: _Settings) -> list[Check]:
    strong = sum(report.strong_pairs for report in main.reports)
    pairs = sum(report.pairs for report in main.reports)
    truncation = max((report.truncation for report in main.reports), default=0.0)
    if settings.exact_above is None or not pairs:
        return []
    share = f"{strong} of {pairs} pairs of units have |correlation| > {settings.exact_above:g}"
    checks = [Check("correlated-units", "pass", f"{share} and use the exact bivariate kernel.")]
    if truncation > 1e-3:
        checks.append(
            Check(
                "kernel-series",
                "warn",
                f"a covariance of activations may be off by {truncation:.2g} of its scale.",
                "An activation is steep on the scale of its input; the variances are less certain.",
            )
        )
    return checks


def _check_covariance(main: _Pass) -> Check:
    covariance = main.moments.covariance
    assert covariance is not None
    # A Cholesky factorisation decides; the eigenvalues, ten times dearer, are for the message.
    matrix = covariance.detach()
    rounding = 1e-9 * matrix.diagonal(dim1=-2, dim2=-1).abs().amax().clamp(min=1e-300)
    shifted = matrix + rounding * torch.eye(matrix.shape[-1]).to(matrix)
    if bool(torch.linalg.cholesky_ex(shifted).info.any()):
        values = torch.linalg.eigvalsh(matrix)
        return Check(
            "covariance-psd",
            "warn",
            f"the output covariance has an eigenvalue {float(values.min()):.2g} (largest "
            f"{float(values.max()):.2g}).",
            "Some linear functional has a negative variance: check the ones you need.",
        )
    return Check("covariance-psd", "pass", "the output covariance is positive semi-definite.")


# --- arguments -----------------------------------------------------------------------------------


def _use_sphere(graph: NetworkGraph, law: GaussianLaw, order: int, angular: bool | None) -> bool:
    if angular is False or order == 1:
        return False
    possible = law.is_isotropic_centred and graph.positively_homogeneous
    if angular is None and torch.is_grad_enabled():
        # Exact at zero biases and a zero mean only: a gradient with respect to them would be wrong.
        biases = [*(stage.affine.bias for stage in graph.stages), graph.output.bias]
        possible = possible and not any(x.requires_grad for x in (law.mean, *biases))
    if angular and not possible:
        raise OptionError(
            "angular=True needs a bias-free positively homogeneous network and a law N(0, c I)",
            where="propagate",
            advice="Leave angular=None: it is switched on where it is exact.",
        )
    return possible and (graph.depth >= 2 or bool(angular))


def _prepare_law(graph: NetworkGraph, law: GaussianLaw) -> GaussianLaw:
    """The law in float64 with a batch dimension."""
    if law.dimension != graph.input_features:
        raise ShapeError(
            f"the law has {law.dimension} features, the network takes {graph.input_features}",
            where="propagate",
            advice="Build the law from the data that the network was made for.",
        )
    if law.mean.device != graph.device:
        raise ShapeError(
            f"the law lies on {law.mean.device}, the network on {graph.device}",
            where="propagate",
            advice="Move one of them; GaussianLaw.from_data takes device=.",
        )
    mean = law.mean.to(torch.float64)
    prepared = object.__new__(
        GaussianLaw
    )  # already validated: only the dtype and a batch axis change
    for name, value in (
        ("mean", mean if mean.dim() == 2 else mean[None]),
        ("covariance", law.covariance.to(torch.float64)),
        ("event_shape", law.event_shape),
    ):
        object.__setattr__(prepared, name, value)
    return prepared


@contextmanager
def _memory_errors(graph: NetworkGraph, law: GaussianLaw) -> Iterator[None]:
    """Say what was too large when torch cannot allocate it."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        width = max([graph.input_features, *(s.affine.linear.out_features for s in graph.stages)])
        size = 8 * law.mean.shape[0] * width**2 / 1e9
        raise ResourceError(
            f"a covariance of {width} units for {law.mean.shape[0]} law(s) takes {size:.3g} GB, "
            "and several are needed",
            where="propagate",
            advice="Use order=1, a smaller batch of laws, standard_error=False, or "
            "pushforward.monte_carlo.",
        ) from error


def _hidden_laws(
    groups: tuple[UnitGroup, ...],
    state: CumulantTower | UnitMoments,
    radius: Radius | None,
    *,
    before: bool,
) -> dict[str, _Law]:
    """Laws before or behind the activations of a stage, by module path."""
    laws = {}
    for group in groups:
        if group.carried:
            continue
        if isinstance(state, CumulantTower):
            tower = state.select(group.units)
            law = _Law(moments_of(tower, radius), tower, radius)
        else:
            mean, variance = state.mean, state.variance.expand_as(state.mean)
            law = _Law(Moments(mean[..., group.units], variance[..., group.units]), None, None)
        laws[group.input_name if before else group.name] = law
    return laws
