"""Every registered activation computes what torch computes, and its table is right."""

import inspect
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional

from oracles.hermite_tables import assert_table
from pushforward.errors import OptionError
from pushforward.gaussians.activations import PiecewisePolynomial, SmoothActivation
from pushforward.networks import activations as registry
from pushforward.networks.activations import (
    activation_of_call,
    activation_of_module,
    register_activation,
    supported_activations,
)

MODULES = [
    registry.Abs(),
    registry.Sign(),
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.LeakyReLU(0.2),
    nn.Hardtanh(-0.5, 2.0),
    nn.Hardsigmoid(),
    nn.Hardswish(),
    nn.Threshold(0.3, -1.0),
    nn.Softshrink(0.7),
    nn.Hardshrink(0.4),
    nn.ELU(0.7),
    nn.CELU(1.5),
    nn.SELU(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Softplus(),
    nn.Softplus(beta=3.0),
    nn.SiLU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Mish(),
    nn.Softsign(),
    nn.LogSigmoid(),
    nn.Tanhshrink(),
]
CALLS = [
    (functional.relu, (), {}),
    (torch.relu, (), {}),
    ("relu", (), {}),
    (functional.relu6, (), {}),
    (functional.leaky_relu, (0.3,), {}),
    (functional.leaky_relu, (), {"negative_slope": 0.1, "inplace": False}),
    (torch.abs, (), {}),
    (operator.abs, (), {}),
    (functional.hardtanh, (-2.0, 0.5), {}),
    (torch.clamp, (), {"min": -0.3}),
    ("clamp", (-1.0, 0.6), {}),
    ("clip", (), {"max": 0.4}),
    (functional.hardsigmoid, (), {}),
    (functional.hardswish, (), {}),
    (functional.threshold, (0.1, 0.0), {}),
    (functional.softshrink, (0.2,), {}),
    (torch.hardshrink, (), {}),
    (torch.sign, (), {}),
    (torch.heaviside, (torch.tensor(0.5, dtype=torch.float64),), {}),
    (torch.square, (), {}),
    (torch.pow, (1,), {}),
    (torch.pow, (3,), {}),
    (operator.pow, (2.0,), {}),
    ("pow", (), {"exponent": 4}),
    (functional.elu, (0.5,), {}),
    (torch.celu, (), {}),
    (functional.selu, (), {}),
    (functional.gelu, (), {}),
    (functional.gelu, (), {"approximate": "tanh"}),
    (functional.softplus, (2.0,), {}),
    (functional.silu, (), {"inplace": False}),
    (torch.tanh, (), {}),
    ("sigmoid", (), {}),
    (functional.mish, (), {}),
    (functional.softsign, (), {}),
    (functional.logsigmoid, (), {}),
    (functional.tanhshrink, (), {}),
    (torch.special.erf, (), {}),
]
POINTS = torch.linspace(-7, 7, 57, dtype=torch.float64) + 1e-3  # off every breakpoint
MEAN = torch.tensor([0.2, -1.1, 2.5], dtype=torch.float64)
STD = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)


def name_of(value):
    if isinstance(value, nn.Module):
        return repr(value)
    return value if isinstance(value, str) else getattr(value, "__name__", None)


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_modules(module):
    activation = activation_of_module(module)
    torch.testing.assert_close(activation(POINTS), module(POINTS.clone()), rtol=1e-12, atol=1e-8)
    assert_table(activation, MEAN, STD, relative=1e-10)


@pytest.mark.parametrize(("target", "args", "kwargs"), CALLS, ids=name_of)
def test_calls(target, args, kwargs):
    activation = activation_of_call(target, args, kwargs)
    function = getattr(torch.Tensor, target) if isinstance(target, str) else target
    expected = function(POINTS.clone(), *args, **kwargs)
    torch.testing.assert_close(activation(POINTS), expected, rtol=1e-12, atol=1e-8)
    assert_table(activation, MEAN, STD, relative=1e-10)


def test_every_registered_module_and_function_is_tested():
    assert {type(module) for module in MODULES} >= set(registry._MODULES)
    rules = {activation_of_call(*call).name for call in CALLS}
    for target, rule in registry._CALLS.items():
        needed = [p for p in inspect.signature(rule).parameters.values() if p.default is p.empty]
        activation = rule(*[2.0] * len(needed))
        assert activation.name.split()[0] in {name.split()[0] for name in rules}, target


def test_a_subclass_may_compute_something_else():
    class Shifted(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1

    assert activation_of_module(Shifted()) is None
    assert activation_of_module(nn.Linear(1, 1)) is None
    assert activation_of_call(torch.softmax, (), {}) is None


@pytest.mark.parametrize("exponent", [0.5, -1, 0, 9])
def test_other_powers_are_not_known(exponent):
    assert activation_of_call(torch.pow, (exponent,), {}) is None


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(x)


def test_registering_a_module_and_a_function(monkeypatch):
    monkeypatch.setattr(registry, "_MODULES", dict(registry._MODULES))
    monkeypatch.setattr(registry, "_CALLS", dict(registry._CALLS))
    sine = SmoothActivation("sine", torch.sin)
    register_activation(Sine, lambda module: sine)  # noqa: ARG005
    register_activation(torch.sin, lambda: sine)
    register_activation("sin", lambda: sine)
    assert activation_of_module(Sine()) is sine
    assert activation_of_call(torch.sin, (), {}) is sine
    assert activation_of_call("sin", (), {}) is sine
    assert "Sine" in supported_activations()
    with pytest.raises(OptionError, match="cannot register an activation for 3"):
        register_activation(3, lambda: sine)


def test_names_are_sorted():
    names = supported_activations()
    assert list(names) == sorted(names)
    assert {"ReLU", "GELU", "Tanh"} <= set(names)


def test_homogeneous_modules():
    for module, expected in ((nn.ReLU(), True), (nn.LeakyReLU(0.3), True), (nn.GELU(), False)):
        activation = activation_of_module(module)
        assert activation.positively_homogeneous is expected
        kind = PiecewisePolynomial if expected else SmoothActivation
        assert isinstance(activation, kind)
