"""A network as a function of the parameters that are uncertain; everything else is frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from pushforward.errors import NetworkError, OptionError, PushforwardError, ShapeError
from pushforward.networks.parameters import ParameterSpace, as_patterns, match_names
from pushforward.typing import Params

__all__ = ["FunctionalModel", "Inputs", "check_weights"]

Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a network is called with: ``net(x)``, ``net(*inputs)`` or ``net(**inputs)``."""

_FINAL = (PushforwardError, Warning, torch.OutOfMemoryError, MemoryError)  # they say enough


@dataclass(frozen=True, eq=False)
class FunctionalModel:
    """A function of parameters and inputs, with the parameters at which it was trained.

    Parameters
    ----------
    function
        ``function(parameters, inputs) -> outputs``; outputs ``(B, *event)``, or a mapping or object
        with them as ``logits``. A row of the outputs may depend on that row of the inputs only.
    parameters
        The uncertain parameters by name, all floating point of one dtype on one device.
    name
        How messages call it.
    left_out
        Parameters of the network that are held fixed, by name, with the reason.
    frozen
        Parameters and buffers that `function` holds fixed, as far as they are known: they tell
        networks apart.
    module
        The network itself, where there is one.

    Examples
    --------
    >>> import torch
    >>> line = FunctionalModel(lambda p, x: x * p["slope"], {"slope": torch.tensor([2.0])})
    >>> line.predict(torch.ones(3, 1)).shape
    torch.Size([3, 1])
    """

    function: Callable[[Params, Inputs], Any]
    # Not shown: vmap asks what it is given for its repr, and tensors take long to print.
    parameters: Params = field(repr=False)
    name: str = "net"
    left_out: Mapping[str, str] = field(default_factory=dict)
    frozen: Params = field(default_factory=dict, repr=False)
    module: nn.Module | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_weights({**self.parameters, **self.frozen}, where=self.name)
        kinds = {(p.dtype, p.device) for p in self.parameters.values()}
        if len(kinds) > 1 or any(not dtype.is_floating_point for dtype, _ in kinds):
            raise NetworkError(
                f"its parameters are of several kinds: {sorted(map(str, kinds))}",
                where=self.name,
                advice="Bring the uncertain parameters to one floating dtype and one device.",
            )
        for name, parameter in self.parameters.items():
            if not bool(torch.isfinite(parameter).all()):
                raise NetworkError(
                    "it holds NaN or infinite entries",
                    where=f"parameter {name}",
                    advice="Load a checkpoint from before training diverged.",
                )
        detached = {name: p.detach() for name, p in self.parameters.items()}
        object.__setattr__(self, "parameters", detached)

    @classmethod
    def of(
        cls, net: nn.Module | FunctionalModel, subset: str | Iterable[str] | None = None
    ) -> FunctionalModel:
        """A module as such a function.

        Parameters
        ----------
        net
            In evaluation mode as far as dropout and batch statistics are concerned. Buffers, such
            as running statistics, are frozen.
        subset
            Patterns of parameter names, such as ``"blocks.3.*"`` or a module's name; only these are
            uncertain. Default: every parameter that requires a gradient (every one if none does),
            except scale and shift of normalisation layers. Those count only when named in full.

        Returns
        -------
        FunctionalModel
            Sharing the tensors of the module; nothing is copied.

        Raises
        ------
        NetworkError
            For what is no module, in training mode, with normalisation by the batch, or for
            weights that are not there (meta device, lazy layers), not finite, or made in inference
            mode.
        OptionError
            For what is no pattern, when one matches nothing, or nothing is left.
        """
        if isinstance(net, FunctionalModel):
            if subset is None:
                return net
            chosen = match_names(tuple(net.parameters), subset)
            return _restricted(net, chosen)
        if not isinstance(net, nn.Module):
            raise NetworkError(
                f"got {type(net).__name__}",
                where="net",
                advice="Pass a torch.nn.Module; wrap a function of parameters and inputs as "
                "pf.FunctionalModel(function, parameters).",
            )
        _require_evaluation_mode(net)
        everything = dict(net.named_parameters())
        norm = _normalisation_parameters(net)
        if subset is None:
            trained = {name for name, p in everything.items() if p.requires_grad} or set(everything)
            reasons = {
                name: "scale or shift of a normalisation layer" if name in norm else "frozen"
                for name in everything
                if name in norm or name not in trained
            }
        else:
            patterns = as_patterns(subset)
            chosen = match_names(tuple(everything), patterns)
            reasons = {
                name: "scale or shift of a normalisation layer" if name in norm else "not in subset"
                for name in everything
                if name not in chosen or (name in norm and name not in patterns)
            }
        if len(reasons) == len(everything):
            raise OptionError(
                "no parameter is left to be uncertain",
                where="subset",
                advice="Scale and shift of normalisation layers count only when named in full.",
            )
        frozen: dict[str, Tensor] = {name: everything[name].detach() for name in reasons}
        frozen |= {name: buffer.detach() for name, buffer in net.named_buffers()}

        def function(parameters: Params, inputs: Inputs) -> Any:
            arguments, keywords = _as_arguments(inputs)
            return functional_call(net, {**frozen, **parameters}, arguments, keywords)

        uncertain: Params = {name: p for name, p in everything.items() if name not in reasons}
        return cls(function, uncertain, type(net).__name__, reasons, frozen, net)

    @cached_property
    def space(self) -> ParameterSpace:
        """Of the uncertain parameters."""
        return ParameterSpace.of(self.parameters)

    @cached_property
    def vector(self) -> Float[Tensor, " P"]:
        """The uncertain parameters as a vector ``(P,)``."""
        return self.space.ravel(self.parameters)

    @property
    def dtype(self) -> torch.dtype:
        """Of the uncertain parameters."""
        return next(iter(self.parameters.values())).dtype

    @property
    def device(self) -> torch.device:
        """Of the uncertain parameters."""
        return next(iter(self.parameters.values())).device

    def __call__(self, parameters: Params, inputs: Inputs) -> Float[Tensor, "B *event"]:
        """Outputs ``(B, *event)`` for any values of the uncertain parameters."""
        return _outputs_of(self.function(parameters, inputs), self.name)

    @torch.no_grad()
    def predict(self, inputs: Inputs) -> Float[Tensor, "B *event"]:
        """Outputs at the trained parameters.

        Parameters
        ----------
        inputs
            A batch.

        Returns
        -------
        Tensor
            ``(B, *event)``.

        Raises
        ------
        NetworkError
            When the network cannot take these inputs, or was brought into training mode.
        """
        self.check_mode()
        try:
            return self(self.parameters, inputs)
        except _FINAL:
            raise
        except Exception as error:  # a network may raise anything
            raise self._explained(error, inputs) from error

    def check_mode(self) -> None:
        """Refuse a network that was brought into training mode after it was read.

        Its outputs would depend on chance or on the batch, and calling it would change its running
        statistics.
        """
        if self.module is not None:
            _require_evaluation_mode(self.module)

    def _explained(self, error: Exception, inputs: Inputs) -> NetworkError:
        # Other dtypes and shapes than in training are most of what goes wrong.
        advice = (
            f"Bring floating-point inputs to {self.dtype}, the type of the parameters, "
            "and to the shape that the network expects behind the axis of the examples."
        )
        reason = str(error)
        if isinstance(error, IndexError):
            advice = (
                "If the inputs are token ids, bring them below the number of embeddings; else "
                "check their shape behind the axis of the examples."
            )
        elif isinstance(error, KeyError):
            advice = "Give the inputs as a mapping with every keyword that the network reads."
        elif "scalar types: Long, Int" in reason:
            advice = "Give token ids, which are looked up, as integers; on command lines, --tokens."
        if not isinstance(error, RuntimeError | TypeError | ValueError):
            # "'mask'" alone, or nothing at all, would say little.
            reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        return NetworkError(
            f"it cannot take inputs of {_described(inputs)}: {reason}",
            where=self.name,
            advice=advice,
        )

    def fingerprint(self) -> str:
        """A short hash of names, shapes and values of all parameters and buffers.

        Returns
        -------
        str
            Sixteen hexadecimal digits; any changed weight changes it.
        """
        digest = hashlib.blake2b(self.space.fingerprint().encode(), digest_size=8)
        for name, tensor in (*self.parameters.items(), *sorted(self.frozen.items())):
            values = tensor.detach().cpu().contiguous().flatten()
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(values.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def check_weights(tensors: Mapping[str, Tensor], *, where: str = "weights") -> None:
    """Refuse tensors that hold no numbers, or that cannot be differentiated.

    Parameters
    ----------
    tensors
        Parameters and buffers of a network by name.
    where
        How messages call them.

    Raises
    ------
    NetworkError
        For tensors on the meta device, of lazy layers, or made under ``torch.inference_mode()``.
    """
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            what = "it belongs to a lazy layer and has no shape yet"
            advice = "Call the network once on some inputs first."
        elif tensor.is_meta:
            what = "it is on the meta device and holds no numbers"
            advice = "Load the weights first: net.to_empty(device='cpu'), then load_state_dict."
        elif tensor.is_inference():
            what = "it was made under torch.inference_mode() and cannot be differentiated"
            advice = (
                "Build the network outside of torch.inference_mode(), or copy it there: "
                "copy.deepcopy(net)."
            )
        else:
            continue
        raise NetworkError(what, where=f"{where}, {name}", advice=advice)


def _restricted(model: FunctionalModel, chosen: tuple[str, ...]) -> FunctionalModel:
    frozen = {name: p for name, p in model.parameters.items() if name not in chosen}
    return FunctionalModel(
        lambda parameters, inputs: model.function({**frozen, **parameters}, inputs),
        {name: model.parameters[name] for name in chosen},
        model.name,
        {**model.left_out, **dict.fromkeys(frozen, "not in subset")},
        {**model.frozen, **frozen},
        model.module,
    )


def _described(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return f"{inputs.dtype} {tuple(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return ", ".join(f"{key}: {_described(value)}" for key, value in inputs.items())
    if isinstance(inputs, tuple | list):
        return ", ".join(map(_described, inputs))
    return type(inputs).__name__


def _as_arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _outputs_of(value: Any, name: str) -> Tensor:
    if isinstance(value, Mapping) and "logits" in value:
        value = value["logits"]
    elif not isinstance(value, Tensor) and hasattr(value, "logits"):
        value = value.logits
    if not isinstance(value, Tensor):
        raise NetworkError(
            f"it returned {type(value).__name__}",
            where=name,
            advice="Return a tensor, or something with the outputs as logits; wrap the network.",
        )
    if value.dim() == 0:
        raise ShapeError(
            "it returned a single number",
            where=name,
            advice="Return one row of outputs for each example.",
        )
    return value if value.dim() > 1 else value.unsqueeze(-1)


def _require_evaluation_mode(net: nn.Module) -> None:
    for name, module in net.named_modules():
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        batch = isinstance(module, nn.modules.batchnorm._NormBase)
        attention = isinstance(module, nn.MultiheadAttention) and module.dropout > 0
        recurrent = isinstance(module, nn.RNNBase) and module.dropout > 0
        if module.training and (random or batch or attention or recurrent):
            raise NetworkError(
                f"{type(module).__name__} is in training mode",
                where=f"module {name or type(net).__name__}",
                advice="Call net.eval() first: the outputs must not depend on chance or the batch.",
            )
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise NetworkError(
                f"{type(module).__name__} normalises by the batch even in evaluation mode",
                where=f"module {name or type(net).__name__}",
                advice="Train it with track_running_stats=True: the output of an example must not "
                "depend on the others of its batch.",
            )


def _normalisation_parameters(net: nn.Module) -> set[str]:
    """Names of scales and shifts: parameters that normalisation layers own directly.

    Returns
    -------
    set of str
        Torch's layers, and others whose class is called ``...Norm`` or ``...Norm2d``.
    """
    known = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    return {
        f"{path}.{name}" if path else name
        for path, module in net.named_modules()
        if isinstance(module, known) or type(module).__name__.rstrip("123d").endswith("Norm")
        for name, _ in module.named_parameters(recurse=False)
    }
