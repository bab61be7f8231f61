"""The reader of a traced network: each module and call in it turned into an affine form.

Layers that are affine lead from one form to another, an activation makes a new atom, and what has
no rule is refused by name.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from pushforward.errors import NetworkError, UnsupportedLayerError
from pushforward.gaussians.activations import Activation, identity
from pushforward.networks import affine_layers, layers
from pushforward.networks.activations import activation_of_call, activation_of_module
from pushforward.networks.forms import Atom, Form, concatenated
from pushforward.networks.layers import refuse
from pushforward.networks.linear_maps import Identity, LinearMap
from pushforward.networks.pooling import (
    MaxPooling,
    PairMaxima,
    gathered,
    is_increasing,
    max_pooling_of_call,
    max_pooling_of_module,
    pair_maxima,
)
from pushforward.networks.tracing import trace

__all__ = ["trace_forms"]


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


class _Reader:
    """Walks a traced graph and gives each value its affine form."""

    def __init__(self, net: nn.Module, event_shape: tuple[int, ...], device: torch.device) -> None:
        self.net = net
        self.event_shape = event_shape
        self.device = device
        self.atoms = [Atom(0, math.prod(event_shape), "input", None, None)]

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
                size = self.atoms[0].size
                zeros = torch.zeros(size, dtype=torch.float64, device=self.device)
                values[node] = Form({0: Identity(size)}, zeros, self.event_shape, "input")
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

    # --- modules and calls -----------------------------------------------------------------------

    def module(
        self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        kind = type(module).__name__
        form = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(form, Form) or len(args) + len(kwargs) != 1:
            refuse(path, kind, "it takes more than one input")
        activation = activation_of_module(module)
        if activation is not None:
            return self.activate(path, activation, form)
        if isinstance(module, nn.Identity):
            return form
        if isinstance(module, (*layers.DROPOUTS, *layers.BATCH_NORMS)):
            if module.training and getattr(module, "p", 1) > 0:
                raise NetworkError(
                    f"{kind} is in training mode",
                    where=f"module {path!r}",
                    advice="Call net.eval() first: only a deterministic network has an output law.",
                )
            if isinstance(module, layers.DROPOUTS):
                return form
            return affine_layers.batch_norm(path, form, module)
        if isinstance(module, nn.Linear):
            return affine_layers.linear(path, form, module.weight, module.bias)
        if isinstance(module, tuple(layers.CONVOLUTIONS)):
            return affine_layers.convolution(path, form, module)
        if isinstance(module, layers.POOLINGS):
            return form.structured(path, kind, module.forward)
        max_pooling = max_pooling_of_module(module)
        if max_pooling is not None:
            return self.max_pooled(path, kind, max_pooling, form)
        if getattr(module, "return_indices", False):
            refuse(path, kind, "it returns indices")
        if not isinstance(module, nn.Flatten | nn.Unflatten):
            refuse(path, kind)
        return form.reshaped(path, kind, module)

    def call(self, name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        label = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        if not _holds_form((args, kwargs)):
            try:  # arithmetic on sizes and constants, which does not touch the input
                return _called(target, args, kwargs)
            except Exception as error:  # whatever a function of the network raises
                refuse(name, label, f"{type(error).__name__}: {error}", cause=error)
        if target in {getattr, "size", "dim"}:
            answer = _shape_query(target, args)
            if isinstance(answer, Tensor):
                refuse(name, f"the attribute {args[1]!r}")
            return answer
        if isinstance(args[0] if args else None, Form) and not _holds_form((args[1:], kwargs)):
            result = self.call_on_form(name, target, label, args[0], args[1:], kwargs)
            if result is not None:
                return result
        if target in layers.CONCATENATIONS:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return concatenated(name, list(args[0] if args else kwargs["tensors"]), dim)
        result = _arithmetic(name, target, args, kwargs)
        if result is None:
            refuse(name, label)
        return result

    def call_on_form(
        self,
        name: str,
        target: Any,
        label: str,
        form: Form,
        rest: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Form | None:
        """The value of a call whose first argument is the only form, if it has a rule for that."""
        activation = activation_of_call(target, rest, kwargs)
        if activation is not None:
            return self.activate(name, activation, form)
        if target in layers.DROPOUT_FUNCTIONS:
            probability = kwargs.get("p", rest[0] if rest else 0.5)
            training = kwargs.get("training", rest[1] if len(rest) > 1 else True)
            if training and probability > 0:
                raise NetworkError(
                    "dropout is active",
                    where=f"{label} ({name})",
                    advice="Call net.eval() first.",
                )
            return form
        if target is functional.linear and isinstance(rest[0] if rest else None, Tensor):
            bias = kwargs.get("bias", rest[1] if len(rest) > 1 else None)
            return affine_layers.linear(name, form, rest[0], bias)
        max_pooling = max_pooling_of_call(target, rest, kwargs)
        if max_pooling is not None:
            return self.max_pooled(name, label, max_pooling, form)

        def function(x: Tensor) -> Tensor:
            result: Tensor = _called(target, (x, *rest), kwargs)
            return result

        if target in layers.RESHAPES:
            return form.reshaped(name, label, function)
        if target in layers.LINEAR_CALLS:
            return form.structured(name, label, function)
        return None

    # --- activations and maxima ------------------------------------------------------------------

    def activate(self, name: str, activation: Activation, form: Form) -> Form:
        level = 1 + max((self.atoms[a].level for a in form.maps), default=0)
        self.atoms.append(Atom(level, form.bias.numel(), name, activation, form))
        size = form.bias.numel()
        maps: dict[int, LinearMap] = {len(self.atoms) - 1: Identity(size)}
        return Form(maps, torch.zeros_like(form.bias), form.shape, name)

    def max_pooled(self, name: str, label: str, pooling: MaxPooling, form: Form) -> Form:
        shape = tuple(form.image(name, label, pooling.function).shape[1:])
        before = len(form.shape) - pooling.dimensions
        plans = {}
        for axis in range(before, len(form.shape)):
            windows = pooling.windows(axis - before, form.shape[axis], shape[axis])
            if not all(windows):
                refuse(name, label, "one of its windows holds nothing but padding")
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
            form = form.mapped(name, gather, gather.out_shape)
        if activation is None:
            return form
        return self.activate(name, activation, replace(form, name=f"{name}.max"))

    def before_increasing(self, form: Form) -> tuple[Activation | None, Form]:
        """An increasing activation and what it acts on, if a value is its output as it is."""
        if len(form.maps) == 1 and not form.has_bias:
            (source, linear), *_ = form.maps.items()
            atom = self.atoms[source]
            if isinstance(linear, Identity) and atom.form and is_increasing(atom.activation):
                return atom.activation, replace(atom.form, shape=form.shape)
        return None, form

    def pair_maxima(self, name: str, form: Form, axis: int, level: PairMaxima) -> Form:
        """``max(a, b) = a + relu(b - a)``, with ``a`` carried beside the units of the ReLU."""
        maps = level.maps(form.shape, axis, self.device)
        kept = form.mapped(form.name, maps.first, maps.first.out_shape)
        steps = form.mapped(f"{name}.difference", maps.steps, maps.steps.out_shape)
        relu = activation_of_module(nn.ReLU())
        assert relu is not None
        gains = self.activate(f"{name}.gain", relu, steps)
        # Carried as entries of their own: what they are gathered from need not be kept then.
        kept = self.activate("", identity(), kept)
        return kept.plus(name, gains.mapped(name, maps.place, kept.shape))


def _arithmetic(
    name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Form | None:
    """Sums and differences with forms, and products with constants."""
    if kwargs or len(args) not in {1, 2}:
        return None
    if target in layers.NEGATIONS:
        return args[0].negated(name)
    if len(args) != 2:
        return None
    a, b = args
    if target in layers.SUBTRACTIONS:
        b = b.negated(name) if isinstance(b, Form) else -b
    if target in (*layers.ADDITIONS, *layers.SUBTRACTIONS):
        return a.plus(name, b) if isinstance(a, Form) else b.plus(name, a)
    both = isinstance(a, Form) and isinstance(b, Form)
    if target in layers.PRODUCTS and not both:
        form, factor = (a, b) if isinstance(a, Form) else (b, a)
        return form.scaled(name, form.constant(name, factor))
    if target in layers.QUOTIENTS and isinstance(a, Form) and not both:
        return a.scaled(name, 1 / a.constant(name, b))
    return None


def _called(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function makes of its arguments, or the method of that name of the first of them."""
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def _shape_query(target: Any, args: tuple[Any, ...]) -> Any:
    form, rest = args[0], args[1:]
    if target is getattr:
        return getattr(form.shadow(), *rest)
    return getattr(form.shadow(), target)(*rest)


def _holds_form(value: Any) -> bool:
    if isinstance(value, dict):
        return _holds_form(list(value.values()))
    if isinstance(value, list | tuple):
        return any(_holds_form(item) for item in value)
    return isinstance(value, Form)
