"""The last part of a network on its own, when it is all that is uncertain: the rest runs once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pushforward.networks.data import Examples
from pushforward.networks.model import FunctionalModel, Inputs
from pushforward.typing import Params

__all__ = ["split_head"]

_BATCH = 256
_LARGEST = 2 * 2**30  # bytes of features


def split_head(
    model: FunctionalModel,
    examples: Examples,
    advance: Callable[[int], None] = lambda _count: None,
) -> tuple[FunctionalModel, Examples] | None:
    """The module that holds every uncertain parameter, and what reaches it, if it ends the network.

    Parameters
    ----------
    model
        A network of which a part is uncertain.
    examples
        Its data, run through the network once.
    advance
        Called with the number of examples after every batch.

    Returns
    -------
    tuple or None
        The end of the network as a function of the same parameters, and its inputs with the
        targets; None when there is nothing to gain or the end cannot be told: the parameters are
        spread over the network or used before it too, the module is not called exactly once, its
        output is not the network's, or is written to afterwards, or its inputs take more than
        2 GiB.
    """
    probe = examples.select(torch.tensor([0]))
    for path in _ancestors(model):
        assert model.module is not None
        end = model.module.get_submodule(path)
        with torch.enable_grad():  # a gradient tells what depends on the uncertain parameters
            uncertain = {k: p.detach().requires_grad_() for k, p in model.parameters.items()}
            caught = _caught(model, end, probe.inputs, uncertain)
        if caught is None or any(x.requires_grad for x in caught):
            continue
        if len(examples) * sum(x.numel() * x.element_size() for x in caught) > _LARGEST:
            return None
        features = _features(model, end, examples, advance)
        return None if features is None else (_head(model, path), features)
    return None


def _ancestors(model: FunctionalModel) -> Iterator[str]:
    """Modules that hold all uncertain parameters, the smallest first, without the network itself.

    Yields
    ------
    str
        Their paths.
    """
    if model.module is None:
        return
    paths = [name.split(".")[:-1] for name in model.parameters]
    common = 0
    while len({tuple(path[: common + 1]) for path in paths}) == 1 and common < len(paths[0]):
        common += 1
    for length in range(common, 0, -1):
        yield ".".join(paths[0][:length])


@dataclass
class _Call:
    """One call of a module, and how often its tensors had been written to by then."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    versions: tuple[int, ...]
    output: Any = None
    output_version: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether it was called with tensors alone, that nobody has written to since."""
        if self.keywords or not self.arguments:
            return False
        if not all(isinstance(x, Tensor) and x.dim() > 0 for x in self.arguments):
            return False
        return tuple(map(_version, self.arguments)) == self.versions


def _version(value: Any) -> int:
    """How often a tensor has been written to; the same object can hold other numbers by now."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[_Call]]:
    calls: list[_Call] = []

    def before(_module: nn.Module, arguments: Any, keywords: Any) -> None:
        calls.append(_Call(arguments, keywords, tuple(map(_version, arguments))))

    def after(_module: nn.Module, _arguments: Any, output: Any) -> None:
        calls[-1].output, calls[-1].output_version = output, _version(output)

    handles = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    )
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _caught(
    model: FunctionalModel, end: nn.Module, inputs: Inputs, parameters: Params
) -> tuple[Tensor, ...] | None:
    """What the end of the network is called with; None when it is not its end."""
    with _watched(end) as calls:
        output = model.function(parameters, inputs)
    if len(calls) != 1 or not calls[0].is_plain:
        return None
    call = calls[0]
    if call.output is not output or _version(output) != call.output_version:
        return None
    return call.arguments


def _features(
    model: FunctionalModel, end: nn.Module, examples: Examples, advance: Callable[[int], None]
) -> Examples | None:
    """What reaches the end, for all examples; None when for some of them it is not the end."""
    table: list[Tensor] = []
    targets: list[Tensor] = []
    for batch in examples.batches(_BATCH):
        with torch.no_grad():
            found = _caught(model, end, batch.inputs, model.parameters)
        if found is None:
            return None
        rows = slice(int(batch.indices[0]), int(batch.indices[-1]) + 1)
        for column, part in enumerate(found):
            if len(table) == column:
                table.append(part.new_empty(len(examples), *part.shape[1:]))
            table[column][rows] = part
        if batch.targets is not None:
            targets.append(batch.targets)
        advance(len(batch))
    inputs = table[0] if len(table) == 1 else tuple(table)
    return Examples.read((inputs, torch.cat(targets)), name=examples.name, device=examples.device)


def _head(model: FunctionalModel, path: str) -> FunctionalModel:
    assert model.module is not None
    end, prefix = model.module.get_submodule(path), f"{path}."
    frozen = {k.removeprefix(prefix): v for k, v in model.frozen.items() if k.startswith(prefix)}

    def function(parameters: Params, inputs: Inputs) -> Any:
        own = {name.removeprefix(prefix): p for name, p in parameters.items()}
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        return functional_call(end, {**frozen, **own}, arguments)

    return FunctionalModel(function, model.parameters, model.name, model.left_out, model.frozen)
