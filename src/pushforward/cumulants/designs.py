"""Monte Carlo designs: where to put the points so that fewer of them do.

Every design makes *units*: independent, identically distributed groups of points. Each point alone
is a standard normal vector, so the average over any number of units is unbiased for any function;
the points within a unit are arranged to cancel each other's errors. The variance *between* unit
averages therefore gives an honest standard error, whatever happens within.

Measured variance of an estimated mean, times samples, over the variance of the output (1 is plain
sampling) with 8,192 forward passes of He-initialised ReLU networks with four hidden layers, three
networks each:

===================================  ========  ========  =========
design                               width 16  width 64  width 256
===================================  ========  ========  =========
antithetic                           0.75      0.76      0.78
Sobol, 16 replicates                 0.19      0.28      0.46
Sobol, 4 replicates                  0.16      0.24      0.33
frames, stratified radii (default)   0.20      0.20      0.23
frames, independent radii            0.25      0.23      0.24
frames, one radius each              1.1       1.8       1.9
===================================  ========  ========  =========
"""

# ruff: noqa: D102 (the methods of a design are documented once, in the protocol)

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from pushforward.errors import OptionError
from pushforward.options import choice, whole_number
from pushforward.runs.rng import stream

__all__ = [
    "Antithetic",
    "Design",
    "DesignName",
    "Frames",
    "Layout",
    "Plain",
    "Sobol",
    "resolve_design",
]

DesignName = Literal["frames", "antithetic", "sobol", "plain"]

_SOBOL_BITS = torch.quasirandom.SobolEngine.MAXBIT
_SOBOL_DIMENSIONS = torch.quasirandom.SobolEngine.MAXDIM


@dataclass(frozen=True)
class Layout:
    """How many points a run draws, and in which portions.

    Points are numbered; unit ``j`` is the points ``[j * unit_size, (j + 1) * unit_size)``. They are
    generated in blocks of `block_size` points, each from its own random stream. A block is a power
    of two of whole units, or all of them, or, for units too large for that, a unit is a power of
    two of blocks.

    Parameters
    ----------
    dimension
        Features of a point.
    unit_size
        Points in a unit.
    num_units
        Independent units.
    block_size
        Points generated together; the last block may be shorter.
    """

    dimension: int
    unit_size: int
    num_units: int
    block_size: int

    @property
    def num_samples(self) -> int:
        """Points altogether."""
        return self.unit_size * self.num_units

    def block_sizes(self) -> Iterator[int]:
        """Points in each block, in order.

        Yields
        ------
        int
            `block_size`, and what remains at the end.
        """
        for start in range(0, self.num_samples, self.block_size):
            yield min(self.block_size, self.num_samples - start)


@runtime_checkable
class Design(Protocol):
    """A way to arrange standard normal points."""

    name: ClassVar[str]

    def layout(self, dimension: int, num_samples: int, max_block: int) -> Layout:
        """Round a wanted number of points up to whole units.

        Parameters
        ----------
        dimension
            Features of a point.
        num_samples
            Points wanted.
        max_block
            Points that may be held at once; exceeded only when a single unit needs more.

        Returns
        -------
        Layout
            At least `num_samples` points in at least two units.

        Raises
        ------
        OptionError
            If the wanted number does not fill two units, or the dimension is out of reach.
        """
        ...

    def blocks(
        self, layout: Layout, seed: int, *, dtype: torch.dtype, device: torch.device
    ) -> Iterator[Float[Tensor, "N D"]]:
        """Generate the points of a layout, block by block.

        Parameters
        ----------
        layout
            From :meth:`layout` of the same design.
        seed
            Seed of all streams.
        dtype
            float32 or float64.
        device
            Where the points are wanted.

        Yields
        ------
        Tensor
            Points, one row each.
        """
        ...

    def flops(self, layout: Layout) -> float:
        """Floating-point operations to generate the points of a layout.

        Returns
        -------
        float
            One per random number drawn or scaled, plus the factorisations.
        """
        ...


@dataclass(frozen=True)
class Plain:
    """Independent points; a unit is one point. The yardstick of the others."""

    name: ClassVar[str] = "plain"

    def layout(self, dimension: int, num_samples: int, max_block: int) -> Layout:
        return _whole_units(self.name, dimension, 1, num_samples, max_block)

    def blocks(
        self, layout: Layout, seed: int, *, dtype: torch.dtype, device: torch.device
    ) -> Iterator[Float[Tensor, "N D"]]:
        for index, size in enumerate(layout.block_sizes()):
            noise = stream(seed, "monte_carlo", self.name, index, device=device)
            yield _normal((size, layout.dimension), noise, dtype)

    def flops(self, layout: Layout) -> float:
        return float(layout.num_samples * layout.dimension)


@dataclass(frozen=True)
class Antithetic:
    """Pairs ``±z``; a unit is one pair.

    Integrates every odd function exactly, hence also the linear part of a network. An even function
    gains nothing and pays double.
    """

    name: ClassVar[str] = "antithetic"

    def layout(self, dimension: int, num_samples: int, max_block: int) -> Layout:
        return _whole_units(self.name, dimension, 2, num_samples, max_block)

    def blocks(
        self, layout: Layout, seed: int, *, dtype: torch.dtype, device: torch.device
    ) -> Iterator[Float[Tensor, "N D"]]:
        for index, size in enumerate(layout.block_sizes()):
            noise = stream(seed, "monte_carlo", self.name, index, device=device)
            half = _normal((size // 2, layout.dimension), noise, dtype)
            yield torch.stack((half, -half), dim=1).flatten(0, 1)

    def flops(self, layout: Layout) -> float:
        return float(layout.num_samples * layout.dimension)


@dataclass(frozen=True)
class Frames:
    """Random orthogonal frames ``±r_i q_i``; a unit is ``2 d`` points.

    The directions ``q_1, ..., q_d`` are the columns of a Haar-distributed orthogonal matrix, the
    radii have the chi distribution with ``d`` degrees of freedom, independent of the directions.
    On each sphere a frame integrates polynomials up to degree three exactly.

    Parameters
    ----------
    radii
        ``"stratified"``: one radius in each of the ``d`` equally likely strata, dealt to the
        directions at random. ``"independent"``: drawn one by one. ``"shared"``: one for the whole
        frame. All three are unbiased for every function; see the module's table: stratified radii
        beat independent ones, most of all in few dimensions, and a shared radius
        spoils the design.

    Notes
    -----
    Orthogonal directions come from the QR factorisation of a Gaussian matrix, with the signs that
    make it Haar (F. Mezzadri, Notices of the AMS 54, 2007, section 5). It costs ``8/3 d^3``
    operations a frame, ``4/3 d^2`` a point: little beside a network whose layers are at least as
    wide as the input, but for inputs of more than about a thousand features feeding a narrow
    network it exceeds the forward pass. The count of :meth:`flops` includes it.
    """

    radii: Literal["stratified", "independent", "shared"] = "stratified"
    name: ClassVar[str] = "frames"

    def __post_init__(self) -> None:
        choice(self.radii, "radii", ("stratified", "independent", "shared"))

    def layout(self, dimension: int, num_samples: int, max_block: int) -> Layout:
        return _whole_units(self.name, dimension, 2 * dimension, num_samples, max_block)

    def blocks(
        self, layout: Layout, seed: int, *, dtype: torch.dtype, device: torch.device
    ) -> Iterator[Float[Tensor, "N D"]]:
        for index, size in enumerate(layout.block_sizes()):
            noise = stream(seed, "monte_carlo", self.name, index, device=device)
            frames = size // layout.unit_size
            axes = _haar_frames(frames, layout.dimension, noise, dtype)
            half = axes * self._radii(frames, layout.dimension, noise).to(dtype).unsqueeze(-1)
            yield torch.stack((half, -half), dim=1).reshape(size, layout.dimension)

    def flops(self, layout: Layout) -> float:
        frame = 8 / 3 * layout.dimension**3 + 3 * layout.dimension**2
        return layout.num_units * frame

    def _radii(
        self, frames: int, dimension: int, noise: torch.Generator
    ) -> Float[Tensor, "frames D"]:
        shape = (frames, 1 if self.radii == "shared" else dimension)
        levels = torch.rand(shape, generator=noise, dtype=torch.float64, device=noise.device)
        if self.radii == "stratified":
            keys = torch.rand(shape, generator=noise, dtype=torch.float64, device=noise.device)
            levels = (keys.argsort(dim=1) + levels) / dimension
        # Squared radius over two is a gamma variable; PyTorch has no inverse of its distribution.
        gamma = special.gammaincinv(dimension / 2, levels.cpu().numpy())
        radii = (2 * torch.as_tensor(gamma, dtype=torch.float64, device=noise.device)).sqrt()
        return radii.expand(frames, dimension)


@dataclass(frozen=True)
class Sobol:
    """Randomised Sobol sequences through the normal quantile; a unit is one whole sequence.

    Each of the `replicates` sequences gets a scrambling of its own, which makes them independent,
    and is a power of two long, without which its balance is lost. The number of samples is
    therefore rounded up to `replicates` times a power of two.

    Parameters
    ----------
    replicates
        Independent sequences, at least two. More of them make the standard error more reliable
        (it has ``replicates - 1`` degrees of freedom) and each sequence shorter.

    Notes
    -----
    Points come from ``torch.quasirandom.SobolEngine`` (direction numbers of S. Joe and F. Y. Kuo,
    SIAM J. Sci. Comput. 30, 2008; random linear scramble and digital shift of 30 bits), on the CPU.
    A uniform offset within the finest cell makes every coordinate exactly uniform and keeps it off
    zero and one.
    """

    replicates: int = 16
    name: ClassVar[str] = "sobol"

    def __post_init__(self) -> None:
        advice = "Use at least 2, which leave a variance to estimate, better 16."
        replicates = whole_number(self.replicates, "replicates", least=2, advice=advice)
        object.__setattr__(self, "replicates", replicates)

    def layout(self, dimension: int, num_samples: int, max_block: int) -> Layout:
        if dimension > _SOBOL_DIMENSIONS:
            raise OptionError(
                f"Sobol sequences reach {_SOBOL_DIMENSIONS} dimensions and the law has {dimension}",
                where="design",
                advice="Use design='antithetic' or design='frames'.",
            )
        if num_samples < self.replicates:
            raise OptionError(
                f"{num_samples} samples do not fill {self.replicates} Sobol sequences",
                where="num_samples",
                advice=f"Ask for at least {self.replicates} samples, or for design='antithetic'.",
            )
        length = _power_of_two_above(num_samples / self.replicates)
        if length > 2**_SOBOL_BITS:
            raise OptionError(
                f"a Sobol sequence ends after 2**{_SOBOL_BITS} points and {length} are needed",
                where="num_samples",
                advice="Use Sobol(replicates=...) with more replicates.",
            )
        block = _power_of_two_below(max_block)
        if length < block:
            block = length * min(block // length, self.replicates)
        return Layout(dimension, length, self.replicates, block)

    def blocks(
        self, layout: Layout, seed: int, *, dtype: torch.dtype, device: torch.device
    ) -> Iterator[Float[Tensor, "N D"]]:
        replicate = -1
        position = layout.unit_size
        for index, size in enumerate(layout.block_sizes()):
            pieces = []
            for _ in range(max(1, size // layout.unit_size)):
                if position == layout.unit_size:
                    replicate, position = replicate + 1, 0
                    engine = _sobol_engine(layout.dimension, seed, replicate)
                piece = min(size, layout.unit_size)
                pieces.append(_sobol_points(engine, piece))
                position += piece
            noise = stream(seed, "monte_carlo", self.name, "cell", index, device=device)
            corners = torch.cat(pieces).to(device)
            offsets = torch.rand(
                corners.shape, generator=noise, dtype=torch.float64, device=device
            ).clamp(min=torch.finfo(torch.float64).eps)
            # Below the largest double under one, which a full cell plus its offset may round to.
            levels = (corners + offsets * 2.0**-_SOBOL_BITS).clamp(max=1 - 2.0**-53)
            yield torch.special.ndtri(levels).to(dtype)

    def flops(self, layout: Layout) -> float:
        # The sequence, the offset and the quantile: one elementwise pass each.
        return 3.0 * layout.num_samples * layout.dimension


_DESIGNS: dict[str, Design] = {
    "frames": Frames(),
    "antithetic": Antithetic(),
    "sobol": Sobol(),
    "plain": Plain(),
}


def resolve_design(design: DesignName | Design) -> Design:
    """Turn the name of a design into the design with its default settings.

    Parameters
    ----------
    design
        A name, or a design, which is returned as it is.

    Returns
    -------
    Design
        The design.

    Raises
    ------
    OptionError
        If no design has that name.
    """
    if not isinstance(design, str):
        return design
    return _DESIGNS[choice(design, "design", _DESIGNS)]


def _whole_units(
    name: str, dimension: int, unit_size: int, num_samples: int, max_block: int
) -> Layout:
    if num_samples < 2 * unit_size:
        raise OptionError(
            f"{num_samples} samples do not fill two units of {unit_size} points, "
            f"which design={name!r} needs in {dimension} dimensions",
            where="num_samples",
            advice=f"Ask for at least {2 * unit_size} samples"
            + (", or for design='antithetic'." if unit_size > 2 else "."),
        )
    units = -(-num_samples // unit_size)
    units_a_block = _power_of_two_below(max(1, max_block // unit_size))
    return Layout(dimension, unit_size, units, unit_size * units_a_block)


def _normal(shape: tuple[int, ...], noise: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=noise, dtype=dtype, device=noise.device)


def _haar_frames(
    frames: int, dimension: int, noise: torch.Generator, dtype: torch.dtype
) -> Float[Tensor, "frames D D"]:
    factors = torch.linalg.qr(_normal((frames, dimension, dimension), noise, dtype))
    diagonal = factors.R.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -1.0, 1.0).to(dtype)
    haar: Tensor = factors.Q * signs.unsqueeze(-2)
    return haar.mT


def _sobol_engine(dimension: int, seed: int, replicate: int) -> torch.quasirandom.SobolEngine:
    key = stream(seed, "monte_carlo", "sobol", "scramble", replicate).initial_seed()
    return torch.quasirandom.SobolEngine(dimension, scramble=True, seed=key)


def _sobol_points(engine: torch.quasirandom.SobolEngine, count: int) -> Float[Tensor, "count D"]:
    first = engine.num_generated == 0
    origin = engine.quasi.double() / 2**_SOBOL_BITS if first else None
    points = engine.draw(count, dtype=torch.float64)
    if origin is not None:
        # The engine computes its first point in the default dtype, which may round it up to one.
        points[0] = origin
    return points


def _power_of_two_above(value: float) -> int:
    return 1 << (math.ceil(value) - 1).bit_length()


def _power_of_two_below(value: int) -> int:
    return 1 << (max(1, value).bit_length() - 1)
