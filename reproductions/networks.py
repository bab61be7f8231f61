"""The networks of the reproductions: LeNet with normalisation, ResNet-20, ResNet-50.

All begin from weights that are a function of the seed alone, and none writes in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from pushforward.runs.rng import stream

__all__ = [
    "NETWORKS",
    "NetworkName",
    "lenet_small",
    "num_bayesian_parameters",
    "resnet20",
    "resnet50",
    "set_batch_statistics",
]

NetworkName = Literal["lenet", "resnet20"]


def lenet_small(num_classes: int = 10, *, seed: int = 0) -> nn.Sequential:
    """Build the small LeNet: ``(B, 1, 28, 28)`` to ``(B, num_classes)``.

    Three convolutions of stride 2 without bias (5x5 to 16 channels, 3x3 to 32, 3x3 to 32), each
    followed by ReLU and *then* batch normalisation; mean over the positions; one linear layer. With
    10 classes there are 14,554 parameters outside the normalisation layers, and 160 inside.

    Parameters
    ----------
    num_classes
        Number of outputs.
    seed
        Of the initial weights.

    Returns
    -------
    torch.nn.Sequential
        In training mode.
    """

    def build() -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels, wider, size in ((1, 16, 5), (16, 32, 3), (32, 32, 3)):
            layers += [
                nn.Conv2d(channels, wider, size, stride=2, padding=size // 2, bias=False),
                nn.ReLU(),
                nn.BatchNorm2d(wider),
            ]
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_classes)
        )

    return _initialised(build, "lenet", seed)


def resnet20(num_classes: int = 10, *, seed: int = 0) -> nn.Sequential:
    """Build the ResNet-20 for CIFAR: ``(B, 3, 32, 32)`` to ``(B, num_classes)``.

    Three groups of three blocks with 16, 32 and 64 channels [1]_; where the shape changes, the
    shortcut is a 1x1 convolution with batch normalisation. 272,474 parameters with 10 classes.

    Parameters
    ----------
    num_classes
        Number of outputs.
    seed
        Of the initial weights.

    Returns
    -------
    torch.nn.Sequential
        In training mode.

    References
    ----------
    .. [1] He, Zhang, Ren, Sun, Deep residual learning for image recognition, section 4.2,
       arXiv:1512.03385.
    """

    def build() -> nn.Sequential:
        layers: list[nn.Module] = [_convolution(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
        channels = 16
        for wider, stride in ((16, 1), (32, 2), (64, 2)):
            for position in range(3):
                layers.append(_basic_block(channels, wider, stride if position == 0 else 1))
                channels = wider
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
        )

    return _initialised(build, "resnet20", seed)


def resnet50(
    num_classes: int = 1000, *, seed: int = 0, images: Iterable[Tensor] | None = None
) -> nn.Sequential:
    """Build the ResNet-50 for ImageNet with random weights, ready for evaluation.

    ``(B, 3, height, width)`` to ``(B, num_classes)``; 25,557,032 parameters with 1,000 classes. The
    stride of a bottleneck is in its 3x3 convolution, as in most released weights.

    Parameters
    ----------
    num_classes
        Number of outputs.
    seed
        Of the weights, and of the noise images.
    images
        Batches that set the statistics of the normalisation layers; default 4 batches of 8 images
        of white noise, 128 x 128, whose statistics hardly depend on the size.

    Returns
    -------
    torch.nn.Sequential
        In evaluation mode.
    """

    def build() -> nn.Sequential:
        layers: list[nn.Module] = [
            _convolution(3, 64, 7, stride=2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
        channels = 64
        for width, stride, blocks in ((64, 1, 3), (128, 2, 4), (256, 2, 6), (512, 2, 3)):
            for position in range(blocks):
                layers.append(_bottleneck(channels, width, stride if position == 0 else 1))
                channels = 4 * width
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
        )

    net = _initialised(build, "resnet50", seed)
    if images is None:
        generator = stream(seed, "reproductions", "resnet50", "images")
        images = [torch.randn(8, 3, 128, 128, generator=generator) for _ in range(4)]
    set_batch_statistics(net, images)
    return net


NETWORKS: dict[NetworkName, Callable[..., nn.Sequential]] = {
    "lenet": lenet_small,
    "resnet20": resnet20,
}


def set_batch_statistics(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of every batch normalisation to their mean over `batches`.

    The network is left in evaluation mode.
    """
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    net.train()
    with torch.no_grad():
        for batch in batches:
            net(batch)
    net.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def num_bayesian_parameters(net: nn.Module) -> int:
    """Count the parameters outside the batch normalisations."""
    inside = {
        id(parameter)
        for module in net.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters()
    }
    return sum(p.numel() for p in net.parameters() if id(p) not in inside)


class _Residual(nn.Module):
    """The branch plus the shortcut, then ReLU."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, channels, height, width)`` to the block's output."""
        return self.activation(self.branch(x) + self.shortcut(x))


def _convolution(channels: int, wider: int, size: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, wider, size, stride=stride, padding=size // 2, bias=False)


def _shortcut(channels: int, wider: int, stride: int) -> nn.Module:
    if stride == 1 and channels == wider:
        return nn.Identity()
    return nn.Sequential(_convolution(channels, wider, 1, stride=stride), nn.BatchNorm2d(wider))


def _basic_block(channels: int, wider: int, stride: int) -> _Residual:
    branch = nn.Sequential(
        _convolution(channels, wider, 3, stride=stride),
        nn.BatchNorm2d(wider),
        nn.ReLU(),
        _convolution(wider, wider, 3),
        nn.BatchNorm2d(wider),
    )
    return _Residual(branch, _shortcut(channels, wider, stride))


def _bottleneck(channels: int, width: int, stride: int) -> _Residual:
    branch = nn.Sequential(
        _convolution(channels, width, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _convolution(width, width, 3, stride=stride),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _convolution(width, 4 * width, 1),
        nn.BatchNorm2d(4 * width),
    )
    return _Residual(branch, _shortcut(channels, 4 * width, stride))


def _initialised(build: Callable[[], nn.Sequential], name: str, seed: int) -> nn.Sequential:
    """Weights from a named stream; torch's global generator is left as it was found."""
    with torch.random.fork_rng(devices=[]):
        net = build()
    generator = stream(seed, "reproductions", name, "weights")
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", generator=generator)
            elif isinstance(module, nn.Linear):
                bound = 1.0 / math.sqrt(module.in_features)
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
    return net
