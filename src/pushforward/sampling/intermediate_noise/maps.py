"""The maps of a network that noise is put behind, read from an `nn.Sequential`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pushforward.errors import NetworkError
from pushforward.gaussians.activations import Activation, PiecewisePolynomial
from pushforward.networks.activations import activation_of_module
from pushforward.sampling.intermediate_noise.convolutions import Convolution, block_means

__all__ = ["ActivationMap", "AffineMap", "NoisyMap", "PoolingMap", "read_maps"]

_SUPPORTED = (
    "Linear, Conv2d (zero padding, one group, no dilation), AvgPool2d (stride equal to kernel), "
    "Flatten, Identity, Abs and Sign of pushforward.networks.activations, and elementwise "
    "activations such as ReLU, LeakyReLU, Hardtanh, Tanh, GELU, SiLU, Sigmoid, Softplus"
)
_IMAGE = 3


@dataclass(frozen=True)
class AffineMap:
    """A linear map or a convolution; its noise is that of a pre-activation.

    Parameters
    ----------
    name
        Of the module.
    weight, bias
        Names of the parameters; the bias may be missing.
    units
        Outputs, or output channels.
    fan_in
        Inputs of each unit.
    flatten
        Whether its input is laid flat first.
    kernel, stride, padding
        Of a convolution; None for a linear map.
    """

    name: str
    weight: str
    bias: str | None
    units: int
    fan_in: int
    flatten: bool
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of an output for an input of this shape."""
        return (self.units,) if self.kernel is None else self.convolution(shape).output_shape

    def convolution(self, shape: tuple[int, ...]) -> Convolution:
        """The geometry for images of a shape.

        Returns
        -------
        Convolution
            Only of a convolution.

        Raises
        ------
        NetworkError
            When the images do not fit.
        """
        channels = self.fan_in // math.prod(self.kernel or (1,))
        if self.kernel is None or len(shape) != _IMAGE or shape[0] != channels:
            raise NetworkError(
                f"its inputs have shape {shape}",
                where=f"layer {self.name}",
                advice=f"A convolution takes images ({channels}, height, width).",
            )
        images = (shape[0], shape[1], shape[2])
        return Convolution(self.kernel, self.stride, self.padding, images, self.units)

    def mean(self, parameters: Mapping[str, Tensor], value: Tensor) -> Tensor:
        """Outputs without noise, ``(*lead, n, *output)``.

        Parameters
        ----------
        parameters
            With the leading axes of `value`, or none.
        value
            ``(*lead, n, *shape)``; without leading axes when all share it.

        Returns
        -------
        Tensor
            With the leading axes of either.
        """
        weight = parameters[self.weight]
        bias = None if self.bias is None else parameters[self.bias]
        if self.kernel is None:
            if bias is None:
                return value @ weight.mT
            if value.dim() == weight.dim() == _IMAGE:
                return torch.baddbmm(bias.unsqueeze(-2), value, weight.mT)
            if (value.dim(), weight.dim(), bias.dim()) == (2, 3, 2):  # one matrix for all chains
                flat = torch.addmm(bias.flatten(), value, weight.flatten(0, 1).mT)
                return flat.unflatten(1, bias.shape).movedim(1, 0).contiguous()
            return value @ weight.mT + bias.unsqueeze(-2)
        images = self.convolution(tuple(value.shape[-3:])).apply(value, weight)
        return images if bias is None else images + bias[..., None, :, None, None]


@dataclass(frozen=True)
class PoolingMap:
    """Average pooling over whole blocks; its noise is that of a post-activation.

    Parameters
    ----------
    name
        Of the module.
    kernel
        Height and width of a block.
    """

    name: str
    kernel: tuple[int, int]
    flatten: bool = False

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of an output for an input of this shape.

        Returns
        -------
        tuple of int
            Of an image.

        Raises
        ------
        NetworkError
            When the input is not an image, or smaller than a block.
        """
        sizes = [size // width for size, width in zip(shape[1:], self.kernel, strict=False)]
        if len(shape) != _IMAGE or min(sizes) < 1:
            raise NetworkError(
                f"its inputs have shape {shape}",
                where=f"layer {self.name}",
                advice=f"Pooling by {self.kernel} takes images at least as large.",
            )
        return (shape[0], *sizes)

    def mean(self, parameters: Mapping[str, Tensor], value: Tensor) -> Tensor:  # noqa: ARG002
        """Outputs without noise, ``(*lead, n, *output)``."""
        return block_means(value, self.kernel)


@dataclass(frozen=True)
class ActivationMap:
    """An elementwise activation; its noise is that of a post-activation.

    Parameters
    ----------
    name
        Of the module.
    activation
        As the Gaussian calculus describes it.
    function
        Computes it.
    """

    name: str
    activation: Activation
    function: Callable[[Tensor], Tensor] = field(compare=False)
    flatten: bool = False

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape itself."""
        return shape

    def mean(self, parameters: Mapping[str, Tensor], value: Tensor) -> Tensor:  # noqa: ARG002
        """Outputs without noise, of the shape of `value`."""
        return self.function(value)

    @property
    def signature(self) -> str:
        """What tells the activation from others, parameters such as a slope included."""
        if isinstance(self.activation, PiecewisePolynomial):
            return repr(self.activation)
        points = torch.linspace(-3, 3, 7, dtype=torch.float64)
        return f"{self.activation.name} {self.function(points).tolist()}"


NoisyMap: TypeAlias = AffineMap | PoolingMap | ActivationMap


# --- reading -------------------------------------------------------------------------------------


def read_maps(net: nn.Sequential) -> tuple[NoisyMap, ...]:
    """The maps of a network in order.

    Parameters
    ----------
    net
        An `nn.Sequential`; sequences inside it are read through.

    Returns
    -------
    tuple
        Each map says whether its input is laid flat first.

    Raises
    ------
    NetworkError
        For a layer that is not supported, a last layer that is not linear, or a parameter that is
        shared by two layers.
    """
    if not isinstance(net, nn.Sequential):
        raise NetworkError(
            f"it is a {type(net).__name__}",
            where="net",
            advice=f"Give an nn.Sequential of {_SUPPORTED}.",
        )
    found: list[NoisyMap] = []
    flatten = False
    for position, (name, module) in enumerate(_leaves(net)):
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            flatten = True
            continue
        found.append(_read_module(name, position, module, flatten))
        flatten = False
    last = found[-1] if found else None
    if flatten or not isinstance(last, AffineMap) or last.kernel is not None:
        raise NetworkError(
            "it does not end in a linear layer",
            where="net",
            advice="Let an nn.Linear be last; its outputs are targets or classes.",
        )
    named = {
        name for item in found if isinstance(item, AffineMap) for name in (item.weight, item.bias)
    }
    present = set(dict(net.named_parameters()))
    if present != named - {None}:
        raise NetworkError(
            f"its parameters are shared, or missing: {sorted(map(str, present ^ named))}",
            where="net",
            advice="Every linear layer and convolution needs parameters of its own.",
        )
    return tuple(found)


def _leaves(net: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    # Not named_children, which leaves out a module that stands at two places.
    for name, module in zip(net._modules, net, strict=True):
        if type(module) is nn.Sequential:
            yield from _leaves(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _read_module(name: str, position: int, module: nn.Module, flatten: bool) -> NoisyMap:
    where = f"layer {name} ({type(module).__name__}, position {position})"
    if type(module) is nn.Linear:
        bias = None if module.bias is None else f"{name}.bias"
        return AffineMap(
            name, f"{name}.weight", bias, module.out_features, module.in_features, flatten
        )
    if type(module) is nn.Conv2d:
        return _read_convolution(name, where, module, flatten)
    if type(module) is nn.AvgPool2d:
        return _read_pooling(name, where, module, flatten)
    if type(module) is nn.Identity:
        return ActivationMap(
            name, PiecewisePolynomial("identity", (), ((0.0, 1.0),)), _unchanged, flatten
        )
    activation = activation_of_module(module)
    if activation is None or any(True for _ in module.parameters()):
        raise NetworkError(
            "it is not supported", where=where, advice=f"Supported are {_SUPPORTED}."
        )
    return ActivationMap(name, activation, _pure(module), flatten)


def _read_convolution(name: str, where: str, module: nn.Conv2d, flatten: bool) -> AffineMap:
    padding = module.padding
    if isinstance(padding, str) and padding == "valid":
        padding = (0, 0)
    refused = {
        "groups": module.groups != 1,
        "dilation": tuple(module.dilation) != (1, 1),
        "padding_mode": module.padding_mode != "zeros",
        "padding='same'": isinstance(padding, str),
    }
    for option, present in refused.items():
        if present:
            raise NetworkError(
                f"{option} is not supported",
                where=where,
                advice="Convolutions may have a stride and padding with zeros, given as numbers.",
            )
    kernel, stride = _pair(module.kernel_size), _pair(module.stride)
    fan_in = module.in_channels * math.prod(kernel)
    bias = None if module.bias is None else f"{name}.bias"
    weight, size = f"{name}.weight", _pair(padding)
    return AffineMap(name, weight, bias, module.out_channels, fan_in, flatten, kernel, stride, size)


def _read_pooling(name: str, where: str, module: nn.AvgPool2d, flatten: bool) -> PoolingMap:
    kernel = _pair(module.kernel_size)
    plain = _pair(module.padding) == (0, 0) and module.divisor_override is None
    if _pair(module.stride) != kernel or not plain or module.ceil_mode:
        raise NetworkError(
            "its blocks overlap, leave gaps or reach beyond the image",
            where=where,
            advice="Use a stride equal to the kernel, and neither padding, ceil_mode nor "
            "divisor_override.",
        )
    return PoolingMap(name, kernel, flatten)


def _pair(value: object) -> tuple[int, int]:
    if isinstance(value, tuple | list):
        return int(value[0]), int(value[1])
    return int(str(value)), int(str(value))


def _unchanged(z: Tensor) -> Tensor:
    return z


def _pure(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The module as a function that leaves its argument as it is."""
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        setattr(module, "inplace", False)  # noqa: B010 - modules are typed to hold tensors
    return module.forward
