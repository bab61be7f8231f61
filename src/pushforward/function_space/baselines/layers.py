"""Linear layers of a network on a batch: what enters them, and what comes back to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, unfold

from pushforward.function_space.network import ReferenceNetwork
from pushforward.networks.batches import Inputs, Table
from pushforward.typing import Params

__all__ = [
    "LayerGradient",
    "LinearLayer",
    "closeness",
    "find_layers",
    "layer_gradients",
    "other_squares",
    "squares",
    "watched",
    "wide",
]

_CHUNK = 2**22  # entries of the gradients of single examples held at a time


@runtime_checkable  # for run-time type checks
class _Located(Protocol):
    @property
    def path(self) -> str: ...


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A Linear or Conv2d layer whose weight is used there and nowhere else.

    Parameters
    ----------
    path
        Of the module.
    weight, bias
        Names of its parameters; None without a bias.
    shape
        Of the weight.
    """

    path: str
    weight: str
    bias: str | None
    shape: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of its parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def matrix(self, tensors: Params) -> Float[Tensor, "*batch out in"]:
        """Weight and bias side by side, behind leading axes that they share."""
        weight = tensors[self.weight]
        leading = weight.shape[: weight.dim() - len(self.shape)]
        rows = weight.reshape(*leading, self.shape[0], -1)
        if self.bias is None:
            return rows
        return torch.cat([rows, tensors[self.bias].unsqueeze(-1)], -1)

    def tensors(self, matrix: Float[Tensor, "*batch out in"]) -> Params:
        """What `matrix` put side by side."""
        leading = matrix.shape[:-2]
        if self.bias is None:
            return {self.weight: matrix.reshape(*leading, *self.shape)}
        weight = matrix[..., :-1].reshape(*leading, *self.shape)
        return {self.weight: weight, self.bias: matrix[..., -1]}


@dataclass(frozen=True, eq=False)
class LayerGradient:
    """Gradients of the examples of a batch in one layer: of b it is ``sum_t g_bt a_bt^T``.

    Parameters
    ----------
    number
        Of the cotangent.
    layer
        Which.
    activations
        ``(B, T, in)``, with a one behind them where there is a bias. T counts positions: of an
        image, of a sequence, and of calls.
    gradients
        ``(B, T, out)`` at its outputs.
    """

    number: int
    layer: LinearLayer
    activations: Float[Tensor, "B T in"]
    gradients: Float[Tensor, "B T out"]


def layer_gradients(
    reference: ReferenceNetwork,
    layers: tuple[LinearLayer, ...],
    inputs: Inputs,
    cotangents: Callable[[Tensor], Tensor],
) -> Iterator[LayerGradient]:
    """Run a batch forwards once, and backwards once for every cotangent.

    Parameters
    ----------
    reference
        The network.
    layers
        Those to look at.
    inputs
        A batch.
    cotangents
        ``rows -> (R, B, K)``: cotangents at the outputs.

    Yields
    ------
    LayerGradient
        For every cotangent those of all layers.
    """
    if not layers:
        return
    with watched(reference.module, layers) as (seen, probes), torch.enable_grad():
        rows = reference.outputs(reference.tensors, inputs)
    modules = [reference.module.get_submodule(layer.path) for layer in layers]
    activations = [
        wide(torch.cat([_entering(layer, module, x) for x in seen[layer.path]], 1))
        for layer, module in zip(layers, modules, strict=True)
    ]
    flat = [probe for layer in layers for probe in probes[layer.path]]
    for number, direction in enumerate(cotangents(rows.detach()).to(rows.dtype)):
        pulled = iter(
            torch.autograd.grad(
                rows, flat, direction, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )
        for layer, module, entered in zip(layers, modules, activations, strict=True):
            calls = [_leaving(module, next(pulled)) for _ in probes[layer.path]]
            yield LayerGradient(number, layer, entered, wide(torch.cat(calls, 1)))


def find_layers(reference: ReferenceNetwork, inputs: Inputs) -> tuple[LinearLayer, ...]:
    """Linear and Conv2d layers whose gradients are products of activations and gradients.

    A layer counts when on three examples the product equals the gradient of a single one by
    autograd: that excludes weights used outside of their module, tied ones, and layers that see
    examples on another axis than the first.

    Parameters
    ----------
    reference
        The network.
    inputs
        A batch of three examples, which may be the same.

    Returns
    -------
    tuple of LinearLayer
        In order; without groups and with zeros for padding.
    """
    layers = tuple(_candidates(reference.module))
    with watched(reference.module, layers) as (_, probes), torch.no_grad():
        rows = reference.outputs(reference.tensors, inputs)
    layers = tuple(layer for layer in layers if _has_example_axis(probes[layer.path], len(rows)))
    if not layers:
        return ()
    direction = torch.zeros_like(rows)
    direction[0] = torch.linspace(-1, 2, rows.shape[1], dtype=rows.dtype, device=rows.device)
    found = layer_gradients(reference, layers, inputs, lambda _rows: direction.unsqueeze(0))
    # Of that example alone: what reaches the rows of others betrays a foreign axis.
    products = {
        part.layer.path: torch.einsum("to,ti->oi", part.gradients[0], part.activations[0])
        for part in found
    }
    names = [name for layer in layers for name in layer.names]
    leaves = {name: reference.tensors[name].clone().requires_grad_() for name in names}
    with torch.enable_grad():
        rows = reference.outputs({**reference.tensors, **leaves}, inputs)
        values = torch.autograd.grad(
            rows, list(leaves.values()), direction, allow_unused=True, materialize_grads=True
        )
    truth = dict(zip(leaves, values, strict=True))
    kept = []
    for layer in layers:
        product = products[layer.path]
        expected = layer.matrix(truth)
        near = closeness(expected.dtype) * float(expected.abs().max())
        if torch.allclose(product, wide(expected), rtol=0, atol=near):
            kept.append(layer)
    return tuple(kept)


def squares(
    activations: Float[Tensor, "B T in"],
    gradients: Float[Tensor, "B T out"],
    rotated: Callable[[Float[Tensor, "b out in"]], Float[Tensor, "b o i"]] | None = None,
) -> Float[Tensor, "o i"]:
    """Sum over examples of the squares of their gradients, entry by entry.

    Parameters
    ----------
    activations, gradients
        Of a `LayerGradient`.
    rotated
        Of gradients, before they are squared; None: as they are.

    Returns
    -------
    Tensor
        ``(out, in)`` float64, or as `rotated` has it.
    """
    if activations.shape[1] == 1 and rotated is None:
        return (gradients[:, 0].square().T @ activations[:, 0].square()).double()
    size = max(1, _CHUNK // (activations.shape[2] * gradients.shape[2]))
    total: Tensor | None = None
    for a, g in zip(activations.split(size), gradients.split(size), strict=True):
        products = g.transpose(1, 2) @ a
        own = products if rotated is None else rotated(products)
        entries = own.square().sum(0, dtype=torch.float64)
        total = entries if total is None else total + entries
    assert total is not None  # there are examples
    return total


def other_squares(
    reference: ReferenceNetwork,
    names: tuple[str, ...],
    inputs: Inputs,
    cotangents: Float[Tensor, "R B K"],
) -> Params:
    """Squares of gradients of single examples for any parameters, summed over a batch.

    Parameters
    ----------
    reference
        The network.
    names
        Of the parameters.
    inputs
        A batch.
    cotangents
        At its outputs.

    Returns
    -------
    Params
        Sums over examples and cotangents in float64.
    """
    if not names:
        return {}
    point = {name: reference.tensors[name] for name in names}
    fixed = {name: t for name, t in reference.tensors.items() if name not in point}

    def one(example: Any, directions: Tensor) -> Params:
        single = Table(example, None).map(lambda x: x.unsqueeze(0)).inputs
        _, pull, *_ = vjp(lambda p: reference.outputs({**fixed, **p}, single)[0], point)
        pulled = vmap(lambda u: pull(u)[0])(directions)
        return {name: wide(g).square().sum(0) for name, g in pulled.items()}

    per_example = len(cotangents) * sum(t.numel() for t in point.values())
    chunk = max(1, _CHUNK // per_example)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        found = vmap(one, in_dims=(0, 1), chunk_size=chunk)(inputs, cotangents)
    return {name: g.sum(0, dtype=torch.float64) for name, g in found.items()}


def wide(tensor: Tensor) -> Tensor:
    """At least in float32: squares of half-precision numbers leave the range of float16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def closeness(kind: torch.dtype) -> float:
    """Relative difference up to which two ways of taking a gradient agree, by rounding alone."""
    return max(1e-3, 8 * torch.finfo(kind).eps)


def _candidates(module: nn.Module) -> Iterator[LinearLayer]:
    owners = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    names = {id(p): name for name, p in module.named_parameters()}
    for path, part in module.named_modules():
        if type(part) is nn.Conv2d:
            if part.groups != 1 or part.padding_mode != "zeros":
                continue
        elif type(part) is not nn.Linear:
            continue
        own = dict(part.named_parameters(recurse=False))
        if "weight" not in own or any(owners[id(p)] > 1 for p in own.values()):
            continue
        bias = own.get("bias")
        if (bias is None) != (part.bias is None):
            continue  # made from something else at every call
        yield LinearLayer(
            path,
            names[id(own["weight"])],
            None if bias is None else names[id(bias)],
            tuple(own["weight"].shape),
        )


def _has_example_axis(probes: list[Tensor], count: int) -> bool:
    return bool(probes) and all(probe.dim() > 1 and len(probe) == count for probe in probes)


@contextmanager
def watched(
    module: nn.Module, layers: Sequence[_Located]
) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]]:
    """Collect what enters layers, and add zeros behind them whose gradients can be asked for.

    Parameters
    ----------
    module
        The network.
    layers
        With the paths of modules that return a tensor.

    Yields
    ------
    tuple
        By path, for every call inside the context: what entered, and the zeros.
    """
    seen: dict[str, list[Tensor]] = {layer.path: [] for layer in layers}
    probes: dict[str, list[Tensor]] = {layer.path: [] for layer in layers}

    def hook(path: str) -> Any:
        def note(_module: nn.Module, arguments: Any, keywords: Any, output: Tensor) -> Tensor:
            entering = arguments[0] if arguments else keywords["input"]
            # A copy: the network may write into its activations later.
            seen[path].append(entering.detach().clone())
            probe = torch.zeros_like(output, requires_grad=True)
            probes[path].append(probe)
            return output + probe

        return note

    handles = [
        module.get_submodule(layer.path).register_forward_hook(hook(layer.path), with_kwargs=True)
        for layer in layers
    ]
    try:
        yield seen, probes
    finally:
        for handle in handles:
            handle.remove()


def _entering(layer: LinearLayer, module: nn.Module, x: Tensor) -> Float[Tensor, "B T in"]:
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        down, right = module.dilation
        if module.padding == "same":
            rows, columns = down * (height - 1), right * (width - 1)
            left, top = columns // 2, rows // 2
            x = pad(x, (left, columns - left, top, rows - top))
        padding = 0 if isinstance(module.padding, str) else module.padding
        patches = unfold(x, module.kernel_size, module.dilation, padding, module.stride).transpose(
            1, 2
        )
    else:
        patches = x.reshape(len(x), -1, x.shape[-1])
    if layer.bias is None:
        return patches
    return torch.cat([patches, patches.new_ones(*patches.shape[:2], 1)], -1)


def _leaving(module: nn.Module, g: Tensor) -> Float[Tensor, "B T out"]:
    if isinstance(module, nn.Conv2d):
        return g.flatten(2).transpose(1, 2)
    return g.reshape(len(g), -1, g.shape[-1])
