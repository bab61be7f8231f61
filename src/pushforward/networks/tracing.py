"""A module traced by torch.fx, and the refusal of what a trace would lose without a word.

Hooks are unseen by a trace, and so is what an operation in place does to values that were read
under another name.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from pushforward.errors import UnsupportedLayerError
from pushforward.networks.activations import is_activation_module
from pushforward.networks.layers import DROPOUTS, RESHAPES

__all__ = ["trace"]

_IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ipow")


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


class _Tracer(fx.Tracer):
    """Keeps modules with a registered activation whole."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return is_activation_module(module) or super().is_leaf_module(module, qualified_name)


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
        return isinstance(module, (nn.Flatten, nn.Unflatten, nn.Identity, *DROPOUTS))
    views = (*RESHAPES, operator.getitem, torch.permute, torch.transpose, "permute", "transpose")
    return node.op in {"call_function", "call_method"} and node.target in views


def _in_place(node: fx.Node, net: nn.Module) -> bool:
    if not node.args:
        return False
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False)) and not isinstance(module, DROPOUTS)
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        own = getattr(node.target, "__module__", "") == "_operator" and name in _IN_PLACE_OPERATORS
        return bool(node.kwargs.get("inplace", False)) or name.endswith("_") or own
    return False
