"""The network that distances are measured from, and others of its architecture."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from inspect import signature
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.func import functional_call

from pushforward.errors import NetworkError, ShapeError, WeightsError
from pushforward.networks.batches import Inputs as Columns
from pushforward.networks.batches import Table
from pushforward.networks.data import Examples
from pushforward.networks.graph import NetworkGraph, read_network
from pushforward.networks.model import FunctionalModel, Inputs
from pushforward.networks.problem import check_problem
from pushforward.networks.tracing import trace
from pushforward.typing import Params

__all__ = ["Other", "ReferenceNetwork", "require_finite_outputs", "unwrapped"]

Other: TypeAlias = nn.Module | Mapping[str, Tensor]
"""Other weights of the same architecture: a module, or its tensors by name."""

_ONE_ARCHITECTURE = "A distance is between two sets of weights of one architecture."
_PASSED_BY = (nn.modules.dropout._DropoutNd, nn.Identity)  # in evaluation mode
_PASSED_BY_ELSEWHERE = ("DropPath", "StochasticDepth")
# Options of torch's modules that do not count in evaluation mode at given weights.
_OF_TRAINING = frozenset(
    (
        *("p", "dropout", "inplace", "momentum", "process_group", "init"),
        *("sparse", "scale_grad_by_freq"),
    )
)
_OF_TRAINING_TOLD = re.compile(r"(^|, )(drop\w*|inplace|momentum)=[^,]*")
_FUNCTION = (FunctionType, BuiltinFunctionType)
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class ReferenceNetwork:
    """A frozen copy of a network, called with its own weights or with those of others.

    The copy is always in evaluation mode: a distance between functions has no dropout, and
    BatchNorm uses the running statistics of each set of weights. It can be pickled wherever its
    modules can.

    Parameters
    ----------
    module
        A private copy; use `of`.
    event_shape
        Shape of one input example.
    output_shape
        Shape of the outputs of one example, where it has been seen.
    """

    module: nn.Module = field(repr=False)
    event_shape: tuple[int, ...]
    output_shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, net: nn.Module, event_shape: tuple[int, ...]) -> ReferenceNetwork:
        """Copy a network.

        Parameters
        ----------
        net
            A module; it stays as it is, also in training mode. Wrappers are looked through, see
            `unwrapped`.
        event_shape
            Shape of one input example.

        Returns
        -------
        ReferenceNetwork
            With weights of its own.

        Raises
        ------
        NetworkError
            For what is no module, one without parameters, and weights that are complex or not
            finite.
        """
        if not isinstance(net, nn.Module):
            raise NetworkError(
                f"got {type(net).__name__}", where="net", advice="Pass a torch.nn.Module."
            )
        module = copy.deepcopy(unwrapped(net)).eval().requires_grad_(False)
        reference = cls(module, tuple(event_shape))
        if not reference.parameter_names:
            raise NetworkError("it has no weights", where="net", advice="Pass a trained network.")
        # Buffers may be complex, such as the rotations of positions.
        _require_real({name: reference.tensors[name] for name in reference.parameter_names}, "net")
        _require_finite(reference.tensors, "net")
        _ = reference._function  # refuses normalisation by the batch
        return reference

    def __getstate__(self) -> dict[str, Any]:
        # What is made when it is needed holds functions of functions, which cannot be pickled.
        return {name: getattr(self, name) for name in ("module", "event_shape", "output_shape")}

    @cached_property
    def tensors(self) -> Params:
        """Parameters and buffers by name, detached."""
        named = (*self.module.named_parameters(), *self.module.named_buffers())
        return {name: tensor.detach() for name, tensor in named}

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """Of the parameters alone."""
        return tuple(name for name, _ in self.module.named_parameters())

    @property
    def num_parameters(self) -> int:
        """Entries of all parameters."""
        return sum(self.tensors[name].numel() for name in self.parameter_names)

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(iter(self.tensors.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        kinds = [t.dtype for t in self.tensors.values() if t.is_floating_point()]
        return kinds[0] if kinds else torch.get_default_dtype()

    @cached_property
    def graph(self) -> NetworkGraph:
        """The network as a chain of affine maps and activations, at its own weights."""
        return read_network(self.module, self.event_shape, self._traced)

    @cached_property
    def _traced(self) -> fx.Graph:
        return trace(self.module)

    @cached_property
    def _function(self) -> FunctionalModel:
        # Its uncertain parameters are of one type. Those of another count as frozen there, but
        # calls replace them as well.
        first = next((p for p in self.module.parameters() if p.is_floating_point()), None)
        names = [
            name
            for name, p in self.module.named_parameters()
            if first is None or (p.dtype, p.device) == (first.dtype, first.device)
        ]
        return FunctionalModel.of(self.module, names)

    @cached_property
    def architecture(self) -> str:
        """A short hash of the modules and of names and shapes of all tensors."""
        digest = hashlib.blake2b(repr(self.module).encode(), digest_size=8)
        for name, tensor in self.tensors.items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
        return digest.hexdigest()

    @cached_property
    def _parts(self) -> dict[str, tuple[Any, ...]]:
        return _described(self.module)

    def tensors_of(self, other: Other) -> Params:
        """Weights of a network of the same architecture.

        Distances call the reference with these weights, so a module has to compute the same: its
        parts have to be of classes of the same names, with the same options as far as constructors
        of torch's modules, functions among the attributes, and ``extra_repr`` tell. What counts in
        training alone does not matter (mode, dropout and its rates, momentum of running statistics,
        work in place), nor do wrappers (see `unwrapped`). What a forward of one's own reads
        elsewhere is not seen. A subclass counts as another class even if it changes nothing: give
        its tensors by name.

        Parameters
        ----------
        other
            A module, or tensors by name; buffers that a mapping lacks are those of the reference.

        Returns
        -------
        Params
            Under the names of the reference, still part of the autograd graph, on its device.

        Raises
        ------
        WeightsError
            When names, shapes or modules are not those of the reference.
        NetworkError
            When entries are not finite, or complex where those of the reference are real.
        """
        other = unwrapped(other) if isinstance(other, nn.Module) else other
        if not isinstance(other, nn.Module | Mapping) or any(
            not isinstance(t, Tensor)
            for t in (other.values() if isinstance(other, Mapping) else ())
        ):
            raise WeightsError(
                f"got {type(other).__name__}",
                where="other",
                advice="Give a network of the same architecture, or its tensors by name.",
            )
        if isinstance(other, nn.Module):
            given: dict[str, Tensor] = {
                **dict(other.named_parameters()),
                **dict(other.named_buffers()),
            }
        else:
            buffers = {n: t for n, t in self.tensors.items() if n not in self.parameter_names}
            given = {**buffers, **self._without_aliases(other)}
        missing = [name for name in self.tensors if name not in given]
        unknown = [name for name in given if name not in self.tensors]
        if missing or unknown:
            odd = [f"no {name!r}" for name in missing[:3]] + [
                f"an unknown {name!r}" for name in unknown[:3]
            ]
            raise WeightsError(
                f"its weights are not those of {type(self.module).__name__}: {', '.join(odd)}",
                where="other",
                advice=_ONE_ARCHITECTURE,
            )
        for name, own in self.tensors.items():
            if given[name].shape != own.shape:
                raise WeightsError(
                    f"{name!r} has shape {tuple(given[name].shape)}, in the reference "
                    f"{tuple(own.shape)}",
                    where="other",
                    advice=_ONE_ARCHITECTURE,
                )
        if isinstance(other, nn.Module):
            self._require_same_modules(other)
        reals = {name: given[name] for name, own in self.tensors.items() if not own.is_complex()}
        _require_real(reals, "other")
        _require_finite(given, "other")
        return {name: given[name].to(self.device) for name in self.tensors}

    def _require_same_modules(self, other: nn.Module) -> None:
        """The same names and shapes of tensors do not make the same function.

        Raises
        ------
        WeightsError
            With the first module that differs.
        """
        own, given = self._parts, _described(other)
        if own == given:
            return
        name = next(n for n in (*own, *given) if own.get(n) != given.get(n))
        one, two = _told(given.get(name)), _told(own.get(name))
        raise WeightsError(
            f"its module {name!r} is {one}, in the reference {two}"
            if name
            else f"it is a {one}, the reference a {two}",
            where="other",
            advice=f"{_ONE_ARCHITECTURE} Where both compute the same, give the tensors by name: "
            "net.state_dict().",
        )

    def _without_aliases(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without the second names that a state dict has for tied weights, where they agree."""
        names = self.module.state_dict(keep_vars=True)
        first = {id(t): name for name, t in names.items() if name in self.tensors}
        kept = {}
        for name, tensor in other.items():
            own = names.get(name)
            known = None if own is None or name in self.tensors else first.get(id(own))
            if known is None or known not in other or not torch.equal(other[known], tensor):
                kept[name] = tensor
        return kept

    def graph_of(self, tensors: Params) -> NetworkGraph:
        """The same chain at other weights; differentiable in them.

        Parameters
        ----------
        tensors
            From `tensors_of`.

        Returns
        -------
        NetworkGraph
            Stage by stage like `graph`.
        """
        reader = _GraphReader(self.module)
        return functional_call(
            reader, {f"inner.{n}": t for n, t in tensors.items()}, (self.event_shape, self._traced)
        )

    def outputs(self, tensors: Params, inputs: Inputs) -> Float[Tensor, "B K"]:
        """Outputs at any weights, flattened to a row for each example.

        Parameters
        ----------
        tensors
            From `tensors_of`, or `tensors`.
        inputs
            A batch.

        Returns
        -------
        Tensor
            ``(B, K)``, differentiable in the weights.
        """
        # Mixed precision would compare numbers of two precisions and call rounding a distance.
        with torch.autocast(device_type=self.device.type, enabled=False):
            rows: Tensor = self._function(tensors, inputs)
        return rows.flatten(1)

    def predict(self, inputs: Columns) -> Float[Tensor, "B K"]:
        """Outputs at its own weights, of inputs that it may not take.

        Parameters
        ----------
        inputs
            A batch.

        Returns
        -------
        Tensor
            ``(B, K)``, without a gradient.

        Raises
        ------
        NetworkError
            When it cannot take these inputs.
        ShapeError
            When the outputs have not one row for each example.
        """
        with torch.autocast(device_type=self.device.type, enabled=False):
            rows = self._function.predict(inputs)
        self._require_rows(rows, len(Table(inputs, None)))
        return rows.flatten(1)

    def seen_on(self, inputs: Columns) -> ReferenceNetwork:
        """The same network with the shape of its outputs, after a look at whether it is a function.

        Parameters
        ----------
        inputs
            A few examples: with one alone it is not seen whether they are mixed.

        Returns
        -------
        ReferenceNetwork
            Its outputs are ``(K,)``, or have several axes, which `outputs` joins into one.

        Raises
        ------
        NetworkError
            When it cannot take these inputs, or outputs are no real numbers or not finite.
        ShapeError
            When the outputs have not one row for each example.
        DataError
            When outputs change from call to call, or depend on other examples of the batch.
        """
        count = len(Table(inputs, None))
        # A placeholder for targets tells a tuple of inputs from inputs with targets.
        examples = Examples.read((inputs, torch.zeros(count)), device=self.device)

        with torch.autocast(device_type=self.device.type, enabled=False):
            rows = self._function.predict(inputs)
            self._require_rows(rows, count)
            if not rows.is_floating_point():
                raise NetworkError(
                    f"its outputs are {rows.dtype}",
                    where=self._function.name,
                    advice="Return real numbers, such as logits in place of classes.",
                )
            require_finite_outputs(rows)
            check_problem(self._function, examples)
        return replace(self, output_shape=tuple(rows.shape[1:]))

    def _require_rows(self, rows: Tensor, count: int) -> None:
        if len(rows) != count:
            raise ShapeError(
                f"{len(rows)} rows of outputs for {count} examples",
                where=self._function.name,
                advice="The first axis of the outputs has to be that of the examples.",
            )

    def unchanged(self, tensors: Params) -> bool:
        """Whether every entry is that of the reference, bit for bit."""
        return all(bool((tensors[n].detach() == own).all()) for n, own in self.tensors.items())


class _GraphReader(nn.Module):
    """Reads a graph inside `functional_call`, where the module has the weights of another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, event_shape: tuple[int, ...], traced: fx.Graph) -> Any:
        return read_network(self.inner, event_shape, traced)


def unwrapped(net: nn.Module) -> nn.Module:
    """The module itself, with the names that it has without wrappers.

    Parameters
    ----------
    net
        A module; that of ``torch.compile``, `torch.nn.DataParallel` and
        `torch.nn.parallel.DistributedDataParallel` is looked through, however often wrapped. A
        compiled part of a network is not.

    Returns
    -------
    torch.nn.Module
        The innermost; `net` itself if it is bare.
    """
    while True:
        inner = getattr(net, "_orig_mod", None)  # of torch.compile
        if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = net.module
        if not isinstance(inner, nn.Module):
            return net
        net = inner


def _described(net: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What each module computes by its path, as far as it can be told: its class and its options.

    Returns
    -------
    dict
        Without the modules that do nothing in evaluation mode.
    """
    found = {}
    # A module that is used twice does as two that are alike do.
    for path, module in net.named_modules(remove_duplicate=False):
        kind: Any = type(module)
        if kind.__module__ == "torch.nn.utils.parametrize" and hasattr(module, "parametrizations"):
            kind = kind.__mro__[1]  # each parametrised module has a class of its own
        name, of_torch = kind.__name__, kind.__module__.startswith("torch.nn.")
        if isinstance(module, _PASSED_BY) or name in _PASSED_BY_ELSEWHERE:
            continue
        if of_torch and isinstance(module, nn.modules.batchnorm._BatchNorm):
            name = "BatchNorm"  # with the statistics of several processes or one
        own = vars(module)
        if of_torch:
            told, names = "", [option for option in _options(kind) if option in own]
        else:
            # Numbers and words of a class of one's own may be counters, if it does not tell them.
            told = _OF_TRAINING_TOLD.sub("", module.extra_repr())
            names = [
                option
                for option, value in own.items()
                if isinstance(value, _FUNCTION) and option != "_compiled_call_impl"
            ]
        options = [(option, _comparable(own[option])) for option in names]
        found[path] = (name, told, options)
    return found


@cache
def _options(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of what a class of torch is made with."""
    made = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    made_with = {name for function in made for name in signature(function).parameters}
    return tuple(sorted(made_with - _OF_TRAINING))


def _comparable(value: Any) -> Any:
    """An option as it comes from every copy of a module; functions by name, None for an object."""
    if isinstance(value, _FUNCTION):
        if value.__name__ == "<lambda>" and isinstance(value, FunctionType):
            return f"lambda of {', '.join(value.__code__.co_names)}"
        return value.__name__
    if isinstance(value, tuple | list):
        return tuple(map(_comparable, value))
    return value if isinstance(value, _PLAIN) else None


def _told(module: tuple[Any, ...] | None) -> str:
    """A module from `_described` in a message."""
    if module is None:
        return "missing"
    name, told, options = module
    return f"{name}({', '.join((told,) * bool(told) + tuple(f'{n}={v!r}' for n, v in options))})"


def _require_real(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_complex():
            raise NetworkError(
                f"{name!r} is complex",
                where=where,
                advice="Keep real and imaginary parts as two real parameters.",
            )


def require_finite_outputs(rows: Float[Tensor, "B *event"]) -> None:
    """Refuse outputs whose distances would be no numbers.

    Raises
    ------
    NetworkError
        When their squares are not finite.
    """
    if not bool(torch.isfinite(rows.double().square().sum())):
        raise NetworkError(
            "its outputs are not finite, or too large to be squared",
            where="net",
            advice="Look at the network and at the scale of its inputs.",
        )


def _require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
            raise NetworkError(
                f"{name!r} holds NaN or infinite entries",
                where=where,
                advice="Load a checkpoint from before training diverged.",
            )


def select_outputs(count: int, outputs: Any) -> Tensor | None:
    """Numbers of the outputs that a metric looks at.

    Parameters
    ----------
    count
        How many outputs the network has.
    outputs
        None for all, or a slice, a range, a sequence or tensor of numbers, a boolean mask.

    Returns
    -------
    Tensor or None
        Indices ``(k,)`` in order; None for all.

    Raises
    ------
    ShapeError
        When they are out of range, repeated, or none.
    """
    if outputs is None:
        return None
    everything = torch.arange(count)
    if isinstance(outputs, slice):
        chosen = everything[outputs]
    else:
        try:
            chosen = torch.as_tensor(list(outputs) if isinstance(outputs, range) else outputs)
        except (TypeError, ValueError, RuntimeError):
            chosen = torch.empty(0)
        if chosen.dtype == torch.bool and chosen.shape == (count,):
            chosen = everything[chosen.cpu()]
    chosen = chosen.cpu()
    fits = (
        chosen.dim() == 1
        and len(chosen) > 0
        and not chosen.is_floating_point()
        and chosen.dtype != torch.bool
        and int(chosen.min()) >= 0
        and int(chosen.max()) < count
        and len(chosen.unique()) == len(chosen)
    )
    if not fits:
        raise ShapeError(
            f"{outputs!r} does not select outputs of a network that has {count}",
            where="outputs",
            advice=f"Give different numbers from 0 to {count - 1}, a slice, or a mask.",
        )
    return chosen.long()
