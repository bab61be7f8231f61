"""Which activation of the Gaussian calculus a torch module or function stands for.

To add an activation, describe it once as a `PiecewisePolynomial` or a `SmoothActivation` and
register the module type or the function that computes it:

>>> import torch
>>> from pushforward.gaussians.activations import SmoothActivation
>>> class Sine(torch.nn.Module):
...     def forward(self, x):
...         return torch.sin(x)
>>> register_activation(Sine, lambda module: SmoothActivation("sine", torch.sin))
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pushforward.errors import OptionError, UnsupportedLayerError
from pushforward.gaussians.activations import Activation, PiecewisePolynomial, SmoothActivation

__all__ = [
    "Abs",
    "Sign",
    "activation_of_call",
    "activation_of_module",
    "is_activation_module",
    "register_activation",
    "supported_activations",
]

_NO_SOFTPLUS_STEP = 20.0

ModuleRule = Callable[[Any], Activation | None]
CallRule = Callable[..., Activation | None]


class Abs(nn.Module):
    """The absolute value as a module, for an `nn.Sequential`; torch has none."""

    def forward(self, z: Tensor) -> Tensor:
        """Apply it elementwise."""
        return z.abs()


class Sign(nn.Module):
    """The sign as a module, for an `nn.Sequential`; torch has none."""

    def forward(self, z: Tensor) -> Tensor:
        """Apply it elementwise."""
        return z.sign()


_MODULES: dict[type[nn.Module], ModuleRule] = {}
_CALLS: dict[Any, CallRule] = {}


def register_activation(
    target: type[nn.Module] | Callable[..., Tensor] | str, rule: Callable[..., Activation | None]
) -> None:
    """Teach the library an activation.

    Parameters
    ----------
    target
        A module class, a function such as ``torch.sin``, or the name of a tensor method.
    rule
        For a module class: the module instance -> `Activation`. For a function or method: its
        arguments behind the input, positional and keyword -> `Activation`. The activation must act
        elementwise.

    Raises
    ------
    OptionError
        When `target` is none of the three.
    """
    if isinstance(target, type) and issubclass(target, nn.Module):
        _MODULES[target] = rule
    elif callable(target) or isinstance(target, str):
        _CALLS[target] = rule
    else:
        raise OptionError(
            f"cannot register an activation for {target!r}",
            where="register_activation",
            advice="Pass a module class, a function, or the name of a tensor method.",
        )


def activation_of_module(module: nn.Module) -> Activation | None:
    """The activation that a module applies, or None when it is not a known activation.

    Returns
    -------
    Activation or None
        Matched on the exact type: a subclass may compute something else.
    """
    rule = _MODULES.get(type(module))
    return None if rule is None else rule(module)


def is_activation_module(module: nn.Module) -> bool:
    """Whether `activation_of_module` has a rule for the module.

    Returns
    -------
    bool
        By the exact type.
    """
    return type(module) in _MODULES


def activation_of_call(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Activation | None:
    """The activation that a function or tensor method applies, or None.

    Parameters
    ----------
    target
        The function, or the name of the method.
    args, kwargs
        Its arguments behind the input.

    Returns
    -------
    Activation or None
        None when `target` is not a known activation.

    Raises
    ------
    UnsupportedLayerError
        For an activation whose parameters are vectors or learned.
    """
    rule = _CALLS.get(target)
    if rule is None:
        return None
    kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and (value.numel() != 1 or value.requires_grad):
            raise UnsupportedLayerError(
                "an activation with a vector or a learned parameter",
                where=getattr(target, "__name__", str(target)),
                advice="Its parameters must be plain numbers, the same for all units; "
                "pushforward.monte_carlo takes any network.",
            )
    return rule(*args, **kwargs)


def supported_activations() -> tuple[str, ...]:
    """Names of the registered module classes, for messages.

    Returns
    -------
    tuple of str
        Sorted.
    """
    return tuple(sorted(kind.__name__ for kind in _MODULES))


# --- the activations that ship -------------------------------------------------------------------


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Activation:  # noqa: ARG001
    return PiecewisePolynomial("leaky_relu", (0.0,), ((0.0, float(negative_slope)), (0.0, 1.0)))


def _relu(inplace: bool = False) -> Activation:  # noqa: ARG001
    return PiecewisePolynomial("relu", (0.0,), ((0.0,), (0.0, 1.0)))


def _relu6(inplace: bool = False) -> Activation:  # noqa: ARG001
    return PiecewisePolynomial("relu6", (0.0, 6.0), ((0.0,), (0.0, 1.0), (6.0,)))


def _abs() -> Activation:
    return PiecewisePolynomial("abs", (0.0,), ((0.0, -1.0), (0.0, 1.0)))


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Activation:  # noqa: ARG001
    low, high = float(min_val), float(max_val)
    return PiecewisePolynomial("hardtanh", (low, high), ((low,), (0.0, 1.0), (high,)))


def _clamp(min: float | None = None, max: float | None = None) -> Activation:
    breakpoints: list[float] = []
    pieces: list[tuple[float, ...]] = [(0.0, 1.0)]
    if min is not None:
        breakpoints.append(float(min))
        pieces.insert(0, (float(min),))
    if max is not None:
        breakpoints.append(float(max))
        pieces.append((float(max),))
    return PiecewisePolynomial("clamp", tuple(breakpoints), tuple(pieces))


def _hardsigmoid(inplace: bool = False) -> Activation:  # noqa: ARG001
    return PiecewisePolynomial("hardsigmoid", (-3.0, 3.0), ((0.0,), (0.5, 1 / 6), (1.0,)))


def _hardswish(inplace: bool = False) -> Activation:  # noqa: ARG001
    pieces = ((0.0,), (0.0, 0.5, 1 / 6), (0.0, 1.0))
    return PiecewisePolynomial("hardswish", (-3.0, 3.0), pieces)


def _threshold(threshold: float, value: float, inplace: bool = False) -> Activation:  # noqa: ARG001
    return PiecewisePolynomial("threshold", (float(threshold),), ((float(value),), (0.0, 1.0)))


def _softshrink(lambd: float = 0.5) -> Activation:
    pieces = ((lambd, 1.0), (0.0,), (-lambd, 1.0))
    return PiecewisePolynomial("softshrink", (-float(lambd), float(lambd)), pieces)


def _hardshrink(lambd: float = 0.5) -> Activation:
    pieces = ((0.0, 1.0), (0.0,), (0.0, 1.0))
    return PiecewisePolynomial("hardshrink", (-float(lambd), float(lambd)), pieces)


def _sign() -> Activation:
    return PiecewisePolynomial("sign", (0.0,), ((-1.0,), (1.0,)))


def _heaviside(values: object = None) -> Activation:  # noqa: ARG001 - the value at 0 has no mass
    return PiecewisePolynomial("heaviside", (0.0,), ((0.0,), (1.0,)))


def _power(exponent: int | float) -> Activation | None:
    if int(exponent) != exponent or not 1 <= exponent <= 8:
        return None
    degree = int(exponent)
    return PiecewisePolynomial(f"power {degree}", (), ((0.0,) * degree + (1.0,),))


def _elu(alpha: float = 1.0, inplace: bool = False) -> Activation:  # noqa: ARG001
    return SmoothActivation("elu", lambda z: functional.elu(z, float(alpha)), (0.0,))


def _celu(alpha: float = 1.0, inplace: bool = False) -> Activation:  # noqa: ARG001
    return SmoothActivation("celu", lambda z: functional.celu(z, float(alpha)), (0.0,))


def _selu(inplace: bool = False) -> Activation:  # noqa: ARG001
    return SmoothActivation("selu", functional.selu, (0.0,))


def _gelu(approximate: str = "none") -> Activation:
    name = "gelu" if approximate == "none" else "gelu_tanh"
    return SmoothActivation(name, lambda z: functional.gelu(z, approximate=approximate))


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> Activation:
    slope, switch = float(beta), float(threshold)
    # Above the threshold torch switches to the identity: by default a step of exp(-20), no kink to
    # speak of, which would only cost panels; below it the step counts.
    visible = switch < _NO_SOFTPLUS_STEP
    breakpoints = (switch / slope,) if visible else ()
    switch = switch if visible else 2 * _NO_SOFTPLUS_STEP
    return SmoothActivation(
        "softplus", lambda z: functional.softplus(z, slope, switch), breakpoints
    )


def _smooth(name: str, function: Callable[[Tensor], Tensor], *breakpoints: float) -> CallRule:
    def rule(inplace: bool = False) -> Activation:  # noqa: ARG001
        return SmoothActivation(name, function, breakpoints)

    return rule


def _register_defaults() -> None:
    def module(rule: CallRule, *attributes: str) -> ModuleRule:
        return lambda instance: rule(*(getattr(instance, name) for name in attributes))

    silu = _smooth("silu", functional.silu)
    tanh = _smooth("tanh", torch.tanh)
    sigmoid = _smooth("sigmoid", torch.sigmoid)
    mish = _smooth("mish", functional.mish)
    softsign = _smooth("softsign", functional.softsign, 0.0)
    logsigmoid = _smooth("logsigmoid", functional.logsigmoid)
    tanhshrink = _smooth("tanhshrink", lambda z: z - torch.tanh(z))
    erf = _smooth("erf", torch.erf)
    modules: list[tuple[type[nn.Module], ModuleRule]] = [
        (nn.ReLU, module(_relu)),
        (nn.ReLU6, module(_relu6)),
        (nn.LeakyReLU, module(_leaky_relu, "negative_slope")),
        (nn.Hardtanh, module(_hardtanh, "min_val", "max_val")),
        (nn.Hardsigmoid, module(_hardsigmoid)),
        (nn.Hardswish, module(_hardswish)),
        (nn.Threshold, module(_threshold, "threshold", "value")),
        (nn.Softshrink, module(_softshrink, "lambd")),
        (nn.Hardshrink, module(_hardshrink, "lambd")),
        (nn.ELU, module(_elu, "alpha")),
        (nn.CELU, module(_celu, "alpha")),
        (nn.SELU, module(_selu)),
        (nn.GELU, module(_gelu, "approximate")),
        (nn.Softplus, module(_softplus, "beta", "threshold")),
        (nn.SiLU, module(silu)),
        (nn.Tanh, module(tanh)),
        (nn.Sigmoid, module(sigmoid)),
        (nn.Mish, module(mish)),
        (nn.Softsign, module(softsign)),
        (nn.LogSigmoid, module(logsigmoid)),
        (nn.Tanhshrink, module(tanhshrink)),
        (Abs, module(_abs)),
        (Sign, module(_sign)),
    ]
    calls: list[tuple[tuple[Any, ...], CallRule]] = [
        ((functional.relu, torch.relu, torch.relu_, "relu", "relu_"), _relu),
        ((functional.relu6,), _relu6),
        ((functional.leaky_relu,), _leaky_relu),
        ((torch.abs, torch.absolute, operator.abs, "abs"), _abs),
        ((functional.hardtanh,), _hardtanh),
        ((torch.clamp, torch.clip, "clamp", "clip"), _clamp),
        ((functional.hardsigmoid,), _hardsigmoid),
        ((functional.hardswish,), _hardswish),
        ((functional.threshold,), _threshold),
        ((functional.softshrink,), _softshrink),
        ((functional.hardshrink, torch.hardshrink), _hardshrink),
        ((torch.sign, torch.sgn, "sign"), _sign),
        ((torch.heaviside, "heaviside"), _heaviside),
        ((torch.square, "square"), lambda: _power(2)),
        ((torch.pow, operator.pow, "pow"), _power),
        ((functional.elu,), _elu),
        ((functional.celu, torch.celu), _celu),
        ((functional.selu, torch.selu), _selu),
        ((functional.gelu,), _gelu),
        ((functional.softplus,), _softplus),
        ((functional.silu,), silu),
        ((torch.tanh, functional.tanh, "tanh"), tanh),
        ((torch.sigmoid, functional.sigmoid, "sigmoid"), sigmoid),
        ((functional.mish,), mish),
        ((functional.softsign,), softsign),
        ((functional.logsigmoid,), logsigmoid),
        ((functional.tanhshrink,), tanhshrink),
        ((torch.erf, torch.special.erf, "erf"), erf),
    ]
    for kind, rule in modules:
        register_activation(kind, rule)
    for targets, call_rule in calls:
        for target in targets:
            register_activation(target, call_rule)


_register_defaults()
