"""A torch.nn.Module read as alternating affine maps and activations, or a refusal that says why.

The module is traced by torch.fx. Each value in it is an affine function of *atoms*: the input and
the outputs of the activations. Atoms that depend on each other only through affine maps form a
stage, and atoms that a later stage needs again (residual connections, concatenations) are carried
along unchanged. What results is a plain chain,

    state_0 = input,   pre_s = A_s state_{s-1} + b_s,   state_s = phi_s(pre_s),
    output = A state_S + b,

in which a carried atom is a unit with the identity as its activation. Every propagation rule then
needs two steps only: an affine one and an elementwise one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from pushforward.errors import NetworkError, UnsupportedLayerError
from pushforward.gaussians.activations import Activation, identity
from pushforward.networks.form_reader import trace_forms
from pushforward.networks.forms import Atom, Form
from pushforward.networks.linear_maps import (
    Block,
    Identity,
    JointMap,
)

__all__ = ["AffineMap", "NetworkGraph", "Stage", "UnitGroup", "read_network"]


@dataclass(frozen=True)
class AffineMap:
    """``x -> linear(x) + bias`` on flat rows, float64."""

    linear: JointMap
    bias: Tensor

    def apply(self, rows: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Map each row.

        Returns
        -------
        Tensor
            With the bias added.
        """
        return self.linear.apply(rows) + self.bias


@dataclass(frozen=True)
class UnitGroup:
    """Units of a stage that share an activation.

    Parameters
    ----------
    name
        Module path or traced name of the activation; empty for a carried atom.
    input_name
        Module path or traced name of what feeds it.
    activation
        What they compute.
    units
        Which entries of the stage they are.
    """

    name: str
    input_name: str
    activation: Activation
    units: slice

    @property
    def carried(self) -> bool:
        """Whether the group only carries an earlier result along."""
        return not self.name


@dataclass(frozen=True)
class Stage:
    """An affine map and the activations behind it."""

    affine: AffineMap
    groups: tuple[UnitGroup, ...]

    @property
    def width(self) -> int:
        """Number of units that an activation acts on; carried units do not count."""
        return sum(g.units.stop - g.units.start for g in self.groups if not g.carried)


@dataclass(frozen=True)
class NetworkGraph:
    """A network as a chain of stages and a last affine map.

    Parameters
    ----------
    input_features
        Entries of one flattened example.
    stages
        From input to output; empty for an affine network.
    output
        The map from the last state to the outputs.
    output_name
        Module path or traced name of the output.
    dtype, device
        Of the parameters; what is computed inside is float64 on the same device.
    stacked
        Names of activations that act directly on the output of another one.
    """

    input_features: int
    stages: tuple[Stage, ...]
    output: AffineMap
    output_name: str
    dtype: torch.dtype
    device: torch.device
    stacked: tuple[str, ...] = ()

    @property
    def output_features(self) -> int:
        """Number of outputs."""
        return self.output.linear.out_features

    @property
    def depth(self) -> int:
        """Number of stages: the ``L`` of ``L / n``."""
        return len(self.stages)

    @property
    def positively_homogeneous(self) -> bool:
        """Whether ``f(a x) = a f(x)`` for every ``a > 0``: no biases, homogeneous activations."""
        affines = [stage.affine for stage in self.stages] + [self.output]
        return all(
            group.activation.positively_homogeneous for s in self.stages for group in s.groups
        ) and not any(bool(affine.bias.any()) for affine in affines)


def read_network(
    net: nn.Module, event_shape: tuple[int, ...], traced: fx.Graph | None = None
) -> NetworkGraph:
    """Read a module as a chain of affine maps and activations.

    The weights are not copied out of autograd: what is computed from the graph is differentiable
    in them.

    Parameters
    ----------
    net
        Any module that torch.fx can trace and whose layers are known.
    event_shape
        Shape of one input example, without the batch dimension.
    traced
        From `pushforward.networks.tracing.trace`, where the network is read again and again with
        other weights.

    Returns
    -------
    NetworkGraph
        In float64 on the device of the parameters.

    Raises
    ------
    UnsupportedLayerError
        For a layer or function without a rule, or control flow that cannot be traced.
    NetworkError
        For weights that are not finite, several devices, or dropout and BatchNorm in training mode.
    ShapeError
        When a layer expects another number of features than it gets.
    """
    if not isinstance(net, nn.Module):
        raise UnsupportedLayerError(
            f"got {type(net).__name__}, not a torch.nn.Module",
            where="net",
            advice="Cumulants are propagated through layers: wrap the computation in an nn.Module, "
            "or use pushforward.monte_carlo for a function.",
        )
    dtype, device = _common_dtype_and_device(net)
    _check_finite(net)
    atoms, output = trace_forms(net, tuple(event_shape), device, traced)
    return _lower(atoms, output, dtype, device)


def _lower(
    atoms: list[Atom], output: Form, dtype: torch.dtype, device: torch.device
) -> NetworkGraph:
    """Order the atoms into stages, carrying along what later stages still need."""
    depth = max(atom.level for atom in atoms)
    last_use = [0] * len(atoms)
    for atom in atoms[1:]:
        assert atom.form is not None
        for source in atom.form.maps:
            last_use[source] = max(last_use[source], atom.level)
    for source in output.maps:
        last_use[source] = depth + 1

    layout = {0: slice(0, atoms[0].size)}
    stages = []
    for level in range(1, depth + 1):
        new = [i for i, atom in enumerate(atoms) if atom.level == level and last_use[i] > level]
        kept = [i for i, atom in enumerate(atoms) if atom.level < level and last_use[i] > level]
        forms = [atoms[i].form for i in new] + [
            Form(
                {i: Identity(atoms[i].size)},
                torch.zeros(atoms[i].size, dtype=torch.float64, device=device),
                (),
                "",
            )
            for i in kept
        ]
        groups, position, next_layout = [], 0, {}
        for i, form in zip([*new, *kept], forms, strict=True):
            assert form is not None
            units = slice(position, position + atoms[i].size)
            fresh = i in new
            activation = atoms[i].activation if fresh else identity()
            assert activation is not None
            groups.append(
                UnitGroup(
                    atoms[i].name if fresh else "", form.name if fresh else "", activation, units
                )
            )
            next_layout[i] = units
            position = units.stop
        stages.append(Stage(_joint(forms, layout), tuple(groups)))
        layout = next_layout
    return NetworkGraph(
        atoms[0].size,
        tuple(stages),
        _joint([output], layout),
        output.name,
        dtype,
        device,
        tuple(atom.name for atom in atoms if _acts_on_activation(atom, atoms)),
    )


def _acts_on_activation(atom: Atom, atoms: list[Atom]) -> bool:
    """Whether an activation gets the output of another one unit by unit, not mixed by a layer."""
    if atom.form is None or len(atom.form.maps) != 1:
        return False
    (source, linear), *_ = atom.form.maps.items()
    return isinstance(linear, Identity) and atoms[source].activation is not None


def _joint(forms: list[Any], layout: dict[int, slice]) -> AffineMap:
    blocks = tuple(
        Block(
            form.bias.numel(),
            tuple((layout[atom], linear) for atom, linear in form.maps.items()),
        )
        for form in forms
    )
    columns = max(s.stop for s in layout.values())
    return AffineMap(JointMap(columns, blocks), torch.cat([form.bias for form in forms]))


def _common_dtype_and_device(net: nn.Module) -> tuple[torch.dtype, torch.device]:
    tensors = {
        n: t for n, t in [*net.named_parameters(), *net.named_buffers()] if t.is_floating_point()
    }
    devices = {t.device for t in tensors.values()}
    if len(devices) > 1:
        raise NetworkError(
            f"parameters lie on several devices: {', '.join(sorted(map(str, devices)))}",
            where="net",
            advice="Move the network to one device with net.to(device).",
        )
    device = devices.pop() if devices else torch.device("cpu")
    if device.type == "mps":
        raise NetworkError(
            "MPS devices have no float64, in which cumulants are computed",
            where="net",
            advice="Move the network and the law to the CPU; it is fast there.",
        )
    dtypes = [t.dtype for t in tensors.values()]
    dtype = dtypes[0] if dtypes else torch.get_default_dtype()
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype, device


def _check_finite(net: nn.Module) -> None:
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
            count = int((~torch.isfinite(tensor.detach())).sum())
            raise NetworkError(
                f"{count} of {tensor.numel()} entries are NaN or infinite",
                where=f"parameter {name!r}",
                advice="Load a checkpoint from before training diverged.",
            )
