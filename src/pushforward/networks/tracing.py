"""A traced module turned into affine forms of atoms: the input and the outputs of activations.

Every value in a traced network is an affine function of atoms, ``sum_a maps[a](atom_a) + bias``.
Linear layers compose the maps, residual connections add them, and an activation makes a new atom.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from pushforward.errors import NetworkError, ShapeError, UnsupportedLayerError
from pushforward.gaussians.activations import Activation, identity
from pushforward.networks.activations import (
    activation_of_call,
    activation_of_module,
    is_activation_module,
    supported_activations,
)
from pushforward.networks.linear_maps import (
    Dense,
    Identity,
    LinearMap,
    Structured,
    add,
    compose,
)
from pushforward.networks.pooling import (
    MaxPooling,
    PairMaxima,
    gathered,
    is_increasing,
    max_pooling_of_call,
    max_pooling_of_module,
    pair_maxima,
)

__all__ = ["Atom", "Form", "trace", "trace_forms"]

_LINEAR_MODULES = (
    "Linear, Conv1d-3d, AvgPool1d-3d, AdaptiveAvgPool1d-3d, MaxPool1d-3d, AdaptiveMaxPool1d-3d, "
    "BatchNorm1d-3d and Dropout in eval mode, Flatten, Unflatten, Identity"
)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}
_POOLINGS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
_LINEAR_FUNCTIONS = (
    functional.avg_pool1d,
    functional.avg_pool2d,
    functional.avg_pool3d,
    functional.adaptive_avg_pool1d,
    functional.adaptive_avg_pool2d,
    functional.adaptive_avg_pool3d,
    functional.pad,
    torch.mean,
    torch.sum,
    torch.permute,
    torch.transpose,
    operator.getitem,
)
_LINEAR_METHODS = ("mean", "sum", "permute", "transpose")
_RESHAPES = (
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    torch.unsqueeze,
    "flatten",
    "reshape",
    "view",
    "squeeze",
    "unsqueeze",
    "contiguous",
    "unflatten",
)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_SUBTRACTIONS = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
_NEGATIONS = (operator.neg, torch.neg, "neg")
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ipow")
# The batch size that shape queries report. No number of features is equal to it by accident, so a
# reshaping that mixes examples shows; nothing of this size is ever computed.
_SHADOW_BATCH = 7919


@dataclass(frozen=True)
class Form:
    """An affine function of atoms, ``sum_a maps[a](atom_a) + bias``, and its example shape."""

    maps: dict[int, LinearMap]
    bias: Tensor
    shape: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class Atom:
    """The input (level 0) or the output of an activation applied to a form."""

    level: int
    size: int
    name: str
    activation: Activation | None
    form: Form | None


def trace(net: nn.Module) -> fx.Graph:
    """Trace a module; what comes out holds for any weights of it.

    Parameters
    ----------
    net
        The module.

    Returns
    -------
    fx.Graph
        Without values that nothing uses.

    Raises
    ------
    UnsupportedLayerError
        When torch.fx cannot trace the module.
    """
    _refuse_hooks(net)
    try:
        traced = _Tracer().trace(net)
    except Exception as error:  # torch.fx raises anything that the module's own forward raises
        raise UnsupportedLayerError(
            f"torch.fx cannot trace it ({type(error).__name__}: {error})",
            where=f"network {type(net).__name__}",
            advice="Python control flow on tensor values has no cumulants; express the network by "
            "modules and elementwise functions, or use pushforward.monte_carlo.",
        ) from error
    _refuse_overwritten_values(traced, net)
    for node in reversed(traced.nodes):
        if not node.users and node.op not in {"placeholder", "output"}:
            traced.erase_node(node)
    return traced


def trace_forms(
    net: nn.Module,
    event_shape: tuple[int, ...],
    device: torch.device,
    traced: fx.Graph | None = None,
) -> tuple[list[Atom], Form]:
    """Trace a module and give its output as an affine form of atoms.

    Parameters
    ----------
    net
        The module.
    event_shape
        Of one input example.
    device
        Of its parameters.
    traced
        From `trace`, if it is at hand: tracing takes longer than reading.

    Returns
    -------
    atoms
        The input first, then the output of each activation.
    output
        Of the network.

    Raises
    ------
    UnsupportedLayerError
        When torch.fx cannot trace the module, or a layer has no rule.
    """
    with torch.device(device):
        reader = _Reader(net, event_shape, device)
        output = reader.run(trace(net) if traced is None else traced)
    return reader.atoms, output


class _Tracer(fx.Tracer):
    """Keeps modules with a registered activation whole."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return is_activation_module(module) or super().is_leaf_module(module, qualified_name)


class _Reader:
    """Walks a traced graph and gives each value its affine form."""

    def __init__(self, net: nn.Module, event_shape: tuple[int, ...], device: torch.device) -> None:
        self.net = net
        self.event_shape = event_shape
        self.device = device
        size = math.prod(event_shape)
        self.atoms = [Atom(0, size, "input", None, None)]
        self.like = torch.zeros((), dtype=torch.float64, device=device)

    def run(self, traced: fx.Graph) -> Form:
        values: dict[fx.Node, Any] = {}
        names = {path for path, _ in self.net.named_modules()}
        calls: Counter[str] = Counter()
        inputs = 0
        for node in traced.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                if inputs and not node.users:
                    continue  # an optional argument that the forward does not need
                inputs += 1
                if inputs > 1:
                    raise UnsupportedLayerError(
                        f"its forward takes a second input {node.target!r}",
                        where=f"network {type(self.net).__name__}",
                        advice="Give a network of one input, or wrap the others as constants.",
                    )
                size = math.prod(self.event_shape)
                values[node] = Form(
                    {0: Identity(size)}, self.like.new_zeros(size), self.event_shape, "input"
                )
            elif node.op == "get_attr":
                constant = operator.attrgetter(str(node.target))(self.net)
                is_float = isinstance(constant, Tensor) and constant.is_floating_point()
                values[node] = constant.to(torch.float64) if is_float else constant
            elif node.op == "call_module":
                path = str(node.target)
                name = path
                while calls[path] and name in names:
                    name = f"{path}_{calls[path]}"
                    calls[path] += name in names
                calls[path] += 1
                names.add(name)
                values[node] = self.module(self.net.get_submodule(path), name, args, kwargs)
            elif node.op in {"call_function", "call_method"}:
                values[node] = self.call(node.name, node.target, args, kwargs)
            else:
                result = args[0]
        if not isinstance(result, Form):
            raise UnsupportedLayerError(
                f"it returns {type(result).__name__}",
                where=f"network {type(self.net).__name__}",
                advice="Return one tensor; wrap the network so that it picks the one of interest.",
            )
        return result

    # --- modules ---------------------------------------------------------------------------------

    def module(
        self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        form = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(form, Form) or len(args) + len(kwargs) != 1:
            raise self.unsupported(path, type(module).__name__, "it takes more than one input")
        activation = activation_of_module(module)
        if activation is not None:
            return self.activate(path, activation, form)
        if isinstance(module, nn.Identity):
            return form
        if isinstance(module, (*_DROPOUTS, *_BATCH_NORMS)):
            if module.training and getattr(module, "p", 1) > 0:
                raise NetworkError(
                    f"{type(module).__name__} is in training mode",
                    where=f"module {path!r}",
                    advice="Call net.eval() first: only a deterministic network has an output law.",
                )
            return form if isinstance(module, _DROPOUTS) else self.batch_norm(path, module, form)
        if isinstance(module, nn.Linear):
            return self.linear(path, form, module.weight, module.bias)
        if isinstance(module, tuple(_CONVOLUTIONS)):
            return self.convolution(path, module, form)
        if isinstance(module, _POOLINGS):
            return self.structured(path, type(module).__name__, module.forward, form)
        max_pooling = max_pooling_of_module(module)
        if max_pooling is not None:
            return self.max_pooled(path, type(module).__name__, max_pooling, form)
        if getattr(module, "return_indices", False):
            raise self.unsupported(path, type(module).__name__, "it returns indices")
        if isinstance(module, nn.Flatten):
            return self.reshaped(path, "Flatten", form, module)
        if isinstance(module, nn.Unflatten):
            return self.reshaped(path, "Unflatten", form, module)
        raise self.unsupported(path, type(module).__name__, "")

    def linear(self, path: str, form: Form, weight: Tensor, bias: Tensor | None) -> Form:
        if form.shape[-1:] != weight.shape[1:]:
            features = form.shape[-1] if form.shape else "a scalar"
            raise ShapeError(
                f"expects {weight.shape[1]} features but gets {features} "
                f"(one example has shape {form.shape} there)",
                where=f"module {path!r} (Linear)",
                advice="Check the dimension of the law, and Flatten before the first Linear layer.",
            )
        matrix = weight.to(torch.float64)
        shape = (*form.shape[:-1], weight.shape[0])
        if len(form.shape) == 1:
            linear: LinearMap = Dense(matrix)
        else:
            linear = Structured(
                lambda x: x @ matrix.mT, form.shape, shape, _rows_flops(shape, matrix)
            )
        offset = None if bias is None else bias.to(torch.float64).expand(shape).reshape(-1)
        return self.mapped(path, form, linear, offset, shape)

    def convolution(self, path: str, module: Any, form: Form) -> Form:
        if module.padding_mode != "zeros":
            raise self.unsupported(
                path, type(module).__name__, f"padding_mode={module.padding_mode!r}"
            )
        weight = module.weight.to(torch.float64)
        convolve = next(f for kind, f in _CONVOLUTIONS.items() if isinstance(module, kind))

        def function(x: Tensor) -> Tensor:
            return convolve(
                x, weight, None, module.stride, module.padding, module.dilation, module.groups
            )

        if len(form.shape) != weight.dim() - 1 or form.shape[0] != module.in_channels:
            raise ShapeError(
                f"expects examples of {module.in_channels} channels and {weight.dim() - 2} spatial "
                f"dimensions but gets shape {form.shape}",
                where=f"module {path!r} ({type(module).__name__})",
                advice="Give the law the event_shape of one image, for example (1, 28, 28).",
            )
        shape = tuple(function(self.like.new_zeros(1, *form.shape)).shape[1:])
        linear = Structured(function, form.shape, shape, 2.0 * weight[0].numel() * math.prod(shape))
        offset = None
        if module.bias is not None:
            per_channel = module.bias.to(torch.float64).reshape(-1, *[1] * (len(shape) - 1))
            offset = per_channel.expand(shape).reshape(-1)
        return self.mapped(path, form, linear, offset, shape)

    def batch_norm(self, path: str, module: Any, form: Form) -> Form:
        if module.running_mean is None:
            raise NetworkError(
                "BatchNorm keeps no running statistics",
                where=f"module {path!r}",
                advice="Without them its output depends on the batch: track_running_stats=True.",
            )
        if form.shape[0] != module.num_features:
            raise ShapeError(
                f"expects {module.num_features} features but gets shape {form.shape}",
                where=f"module {path!r} ({type(module).__name__})",
                advice="Check the layer in front of it.",
            )
        scale = torch.rsqrt(module.running_var.to(torch.float64) + module.eps)
        if module.weight is not None:
            scale = scale * module.weight.to(torch.float64)
        shift = -scale * module.running_mean.to(torch.float64)
        if module.bias is not None:
            shift = shift + module.bias.to(torch.float64)
        spread = [1] * (len(form.shape) - 1)
        scales = scale.reshape(-1, *spread).expand(form.shape).reshape(-1)
        offset = shift.reshape(-1, *spread).expand(form.shape).reshape(-1)
        return self.scaled(path, form, scales, offset)

    # --- functions and methods -------------------------------------------------------------------

    def call(self, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        label = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        forms = [a for a in fx.node.map_aggregate(args, lambda a: a) if isinstance(a, Form)]
        if not forms and not any(isinstance(a, Form) for a in _leaves((args, kwargs))):
            return self.plain(name, target, label, args, kwargs)
        if target in {getattr, "size", "dim"}:
            answer = _shape_query(target, args)
            if isinstance(answer, Tensor):
                raise self.unsupported(name, f"the attribute {args[1]!r}", "")
            return answer
        first, rest = args[0] if args else None, args[1:]
        if isinstance(first, Form) and not any(
            isinstance(a, Form) for a in _leaves((rest, kwargs))
        ):
            activation = activation_of_call(target, rest, kwargs)
            if activation is not None:
                return self.activate(name, activation, first)
            if target in {functional.dropout, functional.dropout1d, functional.dropout2d}:
                probability = kwargs.get("p", rest[0] if rest else 0.5)
                training = kwargs.get("training", rest[1] if len(rest) > 1 else True)
                if training and probability > 0:
                    raise NetworkError(
                        "dropout is active",
                        where=f"{label} ({name})",
                        advice="Call net.eval() first.",
                    )
                return first
            if target in {functional.linear} and isinstance(rest[0] if rest else None, Tensor):
                bias = kwargs.get("bias", rest[1] if len(rest) > 1 else None)
                return self.linear(name, first, rest[0], bias)
            max_pooling = max_pooling_of_call(target, rest, kwargs)
            if max_pooling is not None:
                return self.max_pooled(name, label, max_pooling, first)
            if target in _RESHAPES:
                return self.reshape_call(name, target, label, first, rest, kwargs)
            if target in _LINEAR_FUNCTIONS:
                return self.structured(name, label, lambda x: target(x, *rest, **kwargs), first)
            if target in _LINEAR_METHODS:
                return self.structured(
                    name, label, lambda x: getattr(x, str(target))(*rest, **kwargs), first
                )
        if target in _CONCATENATIONS:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return self.concatenated(name, args[0] if args else kwargs["tensors"], dim)
        result = self.arithmetic(name, target, args, kwargs)
        if result is None:
            raise self.unsupported(name, label, "")
        return result

    def plain(
        self, name: str, target: Any, label: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Arithmetic on sizes and constants, which does not touch the input."""
        try:
            return (
                getattr(args[0], target)(*args[1:], **kwargs)
                if isinstance(target, str)
                else target(*args, **kwargs)
            )
        except Exception as error:
            raise self.unsupported(name, label, f"{type(error).__name__}: {error}") from error

    def arithmetic(
        self, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Form | None:
        if kwargs or len(args) not in {1, 2}:
            return None
        if target in _NEGATIONS:
            return self.scaled(name, args[0], self.like - 1)
        if len(args) != 2:
            return None
        a, b = args
        if target in _SUBTRACTIONS:
            negated = self.scaled(name, b, self.like - 1) if isinstance(b, Form) else -b
            return self.summed(name, a, negated)
        if target in _ADDITIONS:
            return self.summed(name, a, b)
        both = isinstance(a, Form) and isinstance(b, Form)
        if target in _PRODUCTS and not both:
            form, factor = (a, b) if isinstance(a, Form) else (b, a)
            return self.scaled(name, form, self.constant(name, factor, form.shape))
        if target in _QUOTIENTS and isinstance(a, Form) and not both:
            return self.scaled(name, a, 1 / self.constant(name, b, a.shape))
        return None

    def reshape_call(
        self, name: str, target: Any, label: str, form: Form, rest: Any, kwargs: dict[str, Any]
    ) -> Form:
        def reshape(x: Tensor) -> Tensor:
            call = getattr(x, target) if isinstance(target, str) else partial(target, x)
            result: Tensor = call(*rest, **kwargs)
            return result

        return self.reshaped(name, label, form, reshape)

    def reshaped(
        self, name: str, label: str, form: Form, function: Callable[[Tensor], Tensor]
    ) -> Form:
        try:
            shape = tuple(function(_shadow(form)).shape)
        except (RuntimeError, IndexError) as error:
            raise ShapeError(
                str(error), where=f"{label} ({name})", advice="Check the event_shape of the law."
            ) from error
        if not shape or shape[0] != _SHADOW_BATCH:
            raise self.unsupported(name, label, "it mixes the batch dimension into the features")
        return Form(form.maps, form.bias, shape[1:], form.name)

    # --- forms -----------------------------------------------------------------------------------

    def activate(self, name: str, activation: Activation, form: Form) -> Form:
        level = 1 + max((self.atoms[a].level for a in form.maps), default=0)
        self.atoms.append(Atom(level, form.bias.numel(), name, activation, form))
        size = form.bias.numel()
        maps: dict[int, LinearMap] = {len(self.atoms) - 1: Identity(size)}
        return Form(maps, torch.zeros_like(form.bias), form.shape, name)

    def max_pooled(self, name: str, label: str, pooling: MaxPooling, form: Form) -> Form:
        shape = tuple(self.image(name, label, pooling.function, form).shape[1:])
        before = len(form.shape) - pooling.dimensions
        plans = {}
        for axis in range(before, len(form.shape)):
            windows = pooling.windows(axis - before, form.shape[axis], shape[axis])
            if not all(windows):
                raise self.unsupported(name, label, "one of its windows holds nothing but padding")
            plans[axis] = pair_maxima(windows)
        # max(phi(z)) = phi(max(z)) for an increasing phi, which has fewer units to act on then,
        # and values closer to Gaussian to compare.
        activation, form = self.before_increasing(form)
        # What shrinks most goes first: the other axes then have fewer maxima to take.
        levels = 0
        for axis in sorted(plans, key=lambda axis: shape[axis] / form.shape[axis]):
            for level in plans[axis][0]:
                levels += 1
                form = self.pair_maxima(f"{name}.{levels}", form, axis, level)
            gather = gathered(form.shape, axis, plans[axis][1], self.device)
            form = self.mapped(name, form, gather, None, gather.out_shape)
        if activation is None:
            return form
        return self.activate(name, activation, replace(form, name=f"{name}.max"))

    def before_increasing(self, form: Form) -> tuple[Activation | None, Form]:
        """An increasing activation and what it acts on, if a value is its output as it is."""
        if len(form.maps) == 1 and not _matters(form.bias):
            (source, linear), *_ = form.maps.items()
            atom = self.atoms[source]
            if isinstance(linear, Identity) and atom.form and is_increasing(atom.activation):
                return atom.activation, replace(atom.form, shape=form.shape)
        return None, form

    def pair_maxima(self, name: str, form: Form, axis: int, level: PairMaxima) -> Form:
        """``max(a, b) = a + relu(b - a)``, with ``a`` carried beside the units of the ReLU."""
        maps = level.maps(form.shape, axis, self.device)
        kept = self.mapped(form.name, form, maps.first, None, maps.first.out_shape)
        steps = self.mapped(f"{name}.difference", form, maps.steps, None, maps.steps.out_shape)
        relu = activation_of_module(nn.ReLU())
        assert relu is not None
        gains = self.activate(f"{name}.gain", relu, steps)
        # Carried as entries of their own: what they are gathered from need not be kept then.
        kept = self.activate("", identity(), kept)
        return self.summed(name, kept, self.mapped(name, gains, maps.place, None, kept.shape))

    def mapped(
        self,
        name: str,
        form: Form,
        linear: LinearMap,
        offset: Tensor | None,
        shape: tuple[int, ...],
    ) -> Form:
        maps = {atom: compose(linear, inner) for atom, inner in form.maps.items()}
        bias = linear.apply(form.bias) if _matters(form.bias) else self.zeros(linear.out_features)
        return Form(maps, bias if offset is None else bias + offset, shape, name)

    def scaled(self, name: str, form: Form, factor: Tensor, offset: Tensor | None = None) -> Form:
        def scale(linear: LinearMap) -> LinearMap:
            if isinstance(linear, Dense):
                return Dense(linear.matrix * (factor[:, None] if factor.dim() else factor))
            size = linear.out_features
            return compose(Structured(lambda x: x * factor, (size,), (size,), float(size)), linear)

        maps = {atom: scale(linear) for atom, linear in form.maps.items()}
        bias = form.bias * factor if _matters(form.bias) else self.zeros(form.bias.numel())
        return Form(maps, bias if offset is None else bias + offset, form.shape, name)

    def image(
        self, name: str, label: str, function: Callable[[Tensor], Tensor], form: Form
    ) -> Tensor:
        """What a function makes of a batch of two zeros, checked to keep examples apart."""

        def image(batch: int) -> Tensor:
            probe = torch.zeros(batch, *form.shape, dtype=torch.float64, device=self.device)
            try:
                return function(probe)
            except (RuntimeError, IndexError, TypeError) as error:
                raise ShapeError(
                    str(error),
                    where=f"{label} ({name})",
                    advice="Check the event_shape of the law.",
                ) from error

        # Two sizes of batch, so that no dimension of the features passes for the batch.
        two, three = image(2), image(3)
        if (*two.shape[:1], *three.shape) != (2, 3, *two.shape[1:]):
            raise self.unsupported(name, label, "it mixes or drops the batch dimension")
        return two

    def structured(
        self, name: str, label: str, function: Callable[[Tensor], Tensor], form: Form
    ) -> Form:
        two = self.image(name, label, function, form)
        shape = tuple(two.shape[1:])
        offset = two[0] if bool(two.any()) else None  # padding with a value is not linear

        def linear_part(x: Tensor) -> Tensor:
            return function(x) if offset is None else function(x) - offset

        linear = Structured(linear_part, form.shape, shape, float(math.prod(form.shape)))
        flat = None if offset is None else offset.reshape(-1)
        return self.mapped(name, form, linear, flat, shape)

    def summed(self, name: str, a: Any, b: Any) -> Form:
        if not isinstance(a, Form):
            a, b = b, a
        if not isinstance(b, Form):
            return Form(a.maps, a.bias + self.constant(name, b, a.shape), a.shape, name)
        if a.shape != b.shape:
            raise self.unsupported(name, "add", f"it broadcasts shapes {a.shape} and {b.shape}")
        maps = dict(a.maps)
        for atom, linear in b.maps.items():
            maps[atom] = add(maps[atom], linear, self.like) if atom in maps else linear
        return Form(maps, a.bias + b.bias, a.shape, name)

    def concatenated(self, name: str, parts: Any, dim: int) -> Form:
        parts = list(parts)
        constants = [p for p in parts if not isinstance(p, Form)]
        if constants or (dim % (len(parts[0].shape) + 1)) != 1:
            raise self.unsupported(name, "cat", f"along dimension {dim}, or with constants")
        if len({part.shape[1:] for part in parts}) > 1:
            raise ShapeError(
                f"it joins examples of shapes {', '.join(str(part.shape) for part in parts)}",
                where=f"cat ({name})",
                advice="All dimensions but the first of an example must agree.",
            )
        sizes = [part.bias.numel() for part in parts]
        total = sum(sizes)
        maps: dict[int, LinearMap] = {}
        start = 0
        for part, size in zip(parts, sizes, strict=True):
            for atom, linear in part.maps.items():
                block = linear.dense(self.like)
                above = block.new_zeros(start, block.shape[1])
                below = block.new_zeros(total - start - size, block.shape[1])
                placed = Dense(torch.cat([above, block, below]))
                maps[atom] = add(maps[atom], placed, self.like) if atom in maps else placed
            start += size
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return Form(maps, torch.cat([part.bias for part in parts]), shape, name)

    def zeros(self, size: int) -> Tensor:
        return self.like.new_zeros(size)

    def constant(self, name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
        """A scalar, or a constant tensor spread over the features of one example."""
        if isinstance(value, int | float):
            return self.like + value
        if isinstance(value, Tensor):
            value = value.to(torch.float64)
            if value.dim() == len(shape) + 1 and value.shape[0] == 1:
                value = value[0]
            try:
                return value.expand(shape).reshape(-1)
            except RuntimeError as error:
                raise ShapeError(
                    f"a constant of shape {tuple(value.shape)} meets an example of shape {shape}",
                    where=name,
                    advice="Constants must broadcast over one example.",
                ) from error
        raise self.unsupported(name, type(value).__name__, "as a constant")

    def unsupported(self, path: str, kind: str, reason: str) -> UnsupportedLayerError:
        why = f" ({reason})" if reason else ""
        return UnsupportedLayerError(
            f"no propagation rule for {kind}{why}",
            where=f"module {path!r}",
            advice=f"Supported: {_LINEAR_MODULES}; residual additions and concatenations; "
            f"activations {', '.join(supported_activations())}, abs, sign, heaviside and powers. "
            "Add an elementwise function with pushforward.register_activation, or use "
            "pushforward.monte_carlo.",
        )


def _shadow(form: Form) -> Tensor:
    """A batch of such values without storage, for the shapes of what becomes of it."""
    return torch.empty(_SHADOW_BATCH, *form.shape, device="meta")


def _shape_query(target: Any, args: tuple[Any, ...]) -> Any:
    form, rest = args[0], args[1:]
    if target is getattr:
        return getattr(_shadow(form), *rest)
    return getattr(_shadow(form), target)(*rest)


def _refuse_hooks(net: nn.Module) -> None:
    """A hook changes what a module computes, unseen by a trace."""
    for path, module in net.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedLayerError(
                "it has a forward hook, which a trace cannot see",
                where=f"module {path!r} ({type(module).__name__})",
                advice="Remove it. torch.nn.utils.parametrizations does what the hooks of "
                "torch.nn.utils.weight_norm and spectral_norm did; prune.remove makes pruning "
                "permanent.",
            )


def _refuse_overwritten_values(traced: fx.Graph, net: nn.Module) -> None:
    """An operation in place changes what later readers of its storage see; a trace does not."""
    order = {node: position for position, node in enumerate(traced.nodes)}
    # The value whose storage a node shares, as far as views and operations in place tell.
    roots: dict[fx.Node, fx.Node] = {}
    for node in traced.nodes:
        source = node.args[0] if node.args else None
        shares = isinstance(source, fx.Node) and (_in_place(node, net) or _is_view(node, net))
        roots[node] = roots[source] if shares and isinstance(source, fx.Node) else node
    for node in traced.nodes:
        if not _in_place(node, net) or not isinstance(node.args[0], fx.Node):
            continue
        aliases = [other for other, root in roots.items() if root is roots[node]]
        # What is derived from the result itself sees the change; everything else does not.
        current = {node}
        for other in aliases:
            if order[other] > order[node] and other.args and other.args[0] in current:
                current.add(other)
        later = [
            user
            for alias in aliases
            if alias not in current
            for user in alias.users
            if order[user] > order[node] and user not in current
        ]
        if later:
            label = str(node.target) if node.op == "call_module" else node.name
            raise UnsupportedLayerError(
                f"it changes its input in place, which {later[0].name!r} reads afterwards",
                where=f"module {label!r}",
                advice="Use the version that is not in place (inplace=False).",
            )


def _is_view(node: fx.Node, net: nn.Module) -> bool:
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        return isinstance(module, (nn.Flatten, nn.Unflatten, nn.Identity, *_DROPOUTS))
    views = (*_RESHAPES, operator.getitem, torch.permute, torch.transpose, "permute", "transpose")
    return node.op in {"call_function", "call_method"} and node.target in views


def _in_place(node: fx.Node, net: nn.Module) -> bool:
    if not node.args:
        return False
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False)) and not isinstance(module, _DROPOUTS)
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        own = getattr(node.target, "__module__", "") == "_operator" and name in _IN_PLACE_OPERATORS
        return bool(node.kwargs.get("inplace", False)) or name.endswith("_") or own
    return False


def _matters(bias: Tensor) -> bool:
    """Whether a bias is there at all: a zero that is no parameter stays out of autograd."""
    return bias.requires_grad or bool(bias.any())


def _rows_flops(shape: tuple[int, ...], matrix: Tensor) -> float:
    return 2.0 * math.prod(shape[:-1]) * matrix.numel()


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]
