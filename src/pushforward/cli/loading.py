"""Networks, weights and data from files, checked before anything is computed. No pickle is read."""

from __future__ import annotations

import importlib
import json
import math
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pushforward.cli.options import ExampleOptions, LawOptions, NetworkOptions
from pushforward.cumulants.laws import GaussianLaw
from pushforward.errors import DataError, NetworkError, OptionError, ShapeError, WeightsError
from pushforward.networks.data import DataStream
from pushforward.networks.model import check_weights

__all__ = [
    "LoadedLaw",
    "load_data",
    "load_examples",
    "load_inputs",
    "load_law",
    "load_network",
    "load_weights",
]

_KEYS = ("x", "inputs", "data", "X")
_TARGET_KEYS = ("y", "targets", "target", "labels", "label", "Y")
_NAMES_SHOWN = 6


@dataclass(frozen=True, eq=False)
class LoadedLaw:
    """The law of the inputs and the examples it was made from.

    Parameters
    ----------
    law
        Float64 for data.
    examples
        ``(N, *law.event_shape)``; None for the standard law.
    """

    law: GaussianLaw
    examples: Tensor | None


def load_network(options: NetworkOptions, *, seed: int = 0) -> nn.Module:
    """Call the factory, load the weights and switch to evaluation mode.

    Parameters
    ----------
    options
        What to load.
    seed
        Of PyTorch's global generator while the factory runs, so that random weights are the same
        each time. The generator is put back afterwards.

    Returns
    -------
    nn.Module
        In eval mode, without gradients, on the wanted device.

    Raises
    ------
    NetworkError
        When the factory cannot be imported or called, or returns something else, such as a network
        without numbers (meta device).
    """
    device = _device(options.device)
    keywords = _keywords(options.factory_options)
    where = options.network
    module_name, _, name = where.partition(":")
    if not module_name or not name:
        raise NetworkError(
            "no factory is named",
            where=where,
            advice="Write it as package.module:function.",
        )
    with _current_folder_on_path(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        factory = _import_factory(module_name, name)
        try:
            net = factory(**keywords)
        except Exception as error:
            raise NetworkError(
                f"calling it raised {type(error).__name__}: {error}",
                where=where,
                advice="It is called with the keyword arguments of --factory-options alone.",
            ) from error
    if not isinstance(net, nn.Module):
        raise NetworkError(
            f"it returned {type(net).__name__}, not a torch.nn.Module",
            where=where,
            advice="Name a function that builds and returns the network.",
        )
    check_weights({**dict(net.named_parameters()), **dict(net.named_buffers())}, where=where)
    if options.weights is not None:
        load_weights(net, options.weights)
    return net.requires_grad_(False).eval().to(device)


def load_weights(net: nn.Module, path: Path) -> None:
    """Copy the tensors of a safetensors file into a network that has exactly those.

    Parameters
    ----------
    net
        Changed in place. Tensors that share memory (tied weights) need to be in the file once only.
    path
        The file.

    Raises
    ------
    WeightsError
        When the file cannot be read, or keys or shapes differ: the message lists them.
    """
    tensors = _read_safetensors(path)
    state = net.state_dict()
    present = {_place(state[key]) for key in tensors if key in state}
    missing = [key for key in state if key not in tensors and _place(state[key]) not in present]
    extra = [key for key in tensors if key not in state]
    wrong = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(state[key].shape)}"
        for key in tensors
        if key in state and tensors[key].shape != state[key].shape
    ]
    problems = [
        f"{len(names)} {kind} ({_listed(names)})"
        for kind, names in (("missing", missing), ("extra", extra), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise WeightsError(
            f"its tensors do not belong to {type(net).__name__}: {'; '.join(problems)}",
            where=str(path),
            advice=_advice_on_keys(missing, extra),
        )
    net.load_state_dict(tensors, strict=False)  # strictness is checked above, ties allowed


def load_law(options: LawOptions, *, device: str = "cpu") -> LoadedLaw:
    """The law of the inputs from data, or the standard normal one.

    Parameters
    ----------
    options
        Which.
    device
        Where the law lives.

    Returns
    -------
    LoadedLaw
        With the examples, if there are any.

    Raises
    ------
    OptionError
        When both or neither of data and the standard law are asked for, or a size or the scale is
        impossible.
    ShapeError
        When the data do not have the shape asked for.
    """
    target = _device(device)
    if (options.data is None) == (not options.standard):
        raise OptionError(
            "neither is given" if options.data is None else "both are given",
            where="--data and --standard",
            advice="Give --data FILE.npz for the law of data, or --standard DIM for N(0, I).",
        )
    for name, shape in (("--standard", options.standard), ("--input-shape", options.input_shape)):
        if any(size < 1 for size in shape):
            raise OptionError(f"{shape}", where=name, advice="Give positive sizes.")
    _check_scale(options.scale)
    if options.data is None:
        shape = options.input_shape or options.standard
        if math.prod(shape) != math.prod(options.standard):
            _refuse_shape(options.input_shape, options.standard, "--standard")
        law = GaussianLaw.standard(
            math.prod(shape), dtype=torch.float64, device=target, event_shape=shape
        )
        return LoadedLaw(law, None)
    examples = load_data(options.data, key=options.key) * options.scale
    shape = options.input_shape or tuple(examples.shape[1:])
    if math.prod(shape) != math.prod(examples.shape[1:]):
        _refuse_shape(shape, tuple(examples.shape[1:]), str(options.data))
    examples = examples.reshape(len(examples), *shape).to(target)
    return LoadedLaw(GaussianLaw.from_data(examples, covariance=options.covariance), examples)


def load_data(path: Path, *, key: str | None = None) -> Tensor:
    """An array of examples from a NumPy archive.

    Parameters
    ----------
    path
        ``.npz`` (or ``.npy``, a single array).
    key
        Name of the array; default x, inputs, data or X, or the only one with two or more axes.

    Returns
    -------
    Tensor
        ``(N, ...)``, floating point as stored; integers become float64.

    Raises
    ------
    DataError
        When the file cannot be read or holds pickled objects, the array is missing, not numeric,
        empty, or has NaN or infinite entries.
    """
    name, array = _read_examples(path, key)
    kept = array.dtype in {np.dtype(np.float32), np.dtype(np.float64)}
    return _checked(array if kept else array.astype(np.float64), f"{path}[{name!r}]")


def _load_tokens(path: Path, options: ExampleOptions) -> Tensor:
    """An array of integers, which stay integers.

    Returns
    -------
    Tensor
        ``(N, ...)``, int64.

    Raises
    ------
    DataError
        When the array holds other numbers, and for whatever `load_data` refuses.
    OptionError
        When they are to be scaled.
    """
    if options.scale != 1:
        raise OptionError(
            f"{options.scale:g} times a token is no token",
            where="--scale and --tokens",
            advice="Leave out one of them.",
        )
    name, array = _read_examples(path, options.key)
    where = f"{path}[{name!r}]"
    if array.dtype.kind not in "iu":
        raise DataError(
            f"it has dtype {array.dtype}",
            where=where,
            advice="Save token ids as integers, or leave out --tokens.",
        )
    return _checked(array.astype(np.int64), where)


def _read_examples(path: Path, key: str | None) -> tuple[str, np.ndarray[Any, np.dtype[Any]]]:
    return _read_array(path, lambda archive: _pick_key(archive, key, str(path)))


def _checked(array: np.ndarray[Any, np.dtype[Any]], where: str) -> Tensor:
    examples = torch.from_numpy(np.ascontiguousarray(array))
    for _ in DataStream(examples, name=where).inputs():
        pass  # the pass itself refuses NaN, no examples, and examples without features
    return examples


def load_examples(
    path: Path, options: ExampleOptions, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs and targets from a NumPy archive.

    Parameters
    ----------
    path
        ``.npz`` with two arrays.
    options
        Their names, and what is done to the inputs.
    device
        Where they go.
    dtype
        Of the inputs, tokens excepted, and of targets that are not integers; None leaves them.

    Returns
    -------
    tuple
        ``(N, *input_shape)``, and ``(N, ...)`` targets: labels as int64.

    Raises
    ------
    DataError
        When the file cannot be read, an array is missing, or they differ in length.
    ShapeError
        When the inputs do not have the shape asked for.
    OptionError
        When the scale is impossible.
    """
    where = str(path)
    inputs = load_inputs(path, options, device=device, dtype=dtype)
    name, array = _read_array(path, lambda archive: _pick_target(archive, options, where))
    whole = array.dtype.kind in "iub"
    targets = torch.from_numpy(np.ascontiguousarray(array.astype(np.int64) if whole else array))
    if len(targets) != len(inputs):
        raise DataError(
            f"{len(inputs):,} inputs and {len(targets):,} targets ({name!r})",
            where=where,
            advice="Give one target for each input.",
        )
    return inputs, targets.to(inputs.device, None if whole else dtype)


def load_inputs(
    path: Path, options: ExampleOptions, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> Tensor:
    """Inputs alone from a NumPy archive.

    Parameters
    ----------
    path
        ``.npz``, or ``.npy``.
    options
        Their name, and what is done to them.
    device, dtype
        Where they go, and what they become unless they are tokens; None leaves them.

    Returns
    -------
    Tensor
        ``(N, *input_shape)``.

    Raises
    ------
    DataError
        When the file cannot be read, or the array is missing.
    ShapeError
        When the inputs do not have the shape asked for.
    OptionError
        When the scale is impossible.
    """
    _check_scale(options.scale)
    if options.tokens:
        inputs, dtype = _load_tokens(path, options), None
    else:
        inputs = load_data(path, key=options.key) * options.scale
    shape = options.input_shape or tuple(inputs.shape[1:])
    if math.prod(shape) != math.prod(inputs.shape[1:]):
        _refuse_shape(shape, tuple(inputs.shape[1:]), str(path))
    return inputs.reshape(len(inputs), *shape).to(_device(device), dtype)


def _read_array(
    path: Path, choose: Callable[[Mapping[str, Any]], str]
) -> tuple[str, np.ndarray[Any, np.dtype[Any]]]:
    """One numeric array of an archive, with its name.

    Returns
    -------
    tuple
        What `choose` chose.

    Raises
    ------
    DataError
        When the file cannot be read, or the array is not numeric.
    """
    where = str(path)
    try:
        # Objects are refused: reading them would run code from the file.
        with path.open("rb") as file, _as_archive(np.load(file, allow_pickle=False)) as archive:
            name = choose(archive)
            array = np.asarray(archive[name])
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError("no such file", where=where, advice="Check the path.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        pickled = "pickle" in str(error).lower()
        raise DataError(
            "it holds pickled Python objects or is no NumPy archive"
            if pickled
            else f"it cannot be read ({error})",
            where=where,
            advice="Save numeric arrays with numpy.savez(path, x=examples); pickles are not read.",
        ) from error
    if array.dtype.kind not in "fiub":
        raise DataError(
            f"array {name!r} has dtype {array.dtype}",
            where=where,
            advice="Save real numbers.",
        )
    return name, array


# --- parts ---------------------------------------------------------------------------------------


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except Exception as error:  # each backend fails in its own way
        reason = str(error).partition("\n")[0]
        raise OptionError(
            f"cannot compute in float64 there ({reason})",
            where=f"--device {name}",
            advice="Use cpu, or cuda on a machine that has it.",
        ) from error
    return device


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale) or scale == 0:
        raise OptionError(
            f"{scale:g}", where="--scale", advice="Give a finite factor other than 0."
        )


def _keywords(text: str) -> dict[str, Any]:
    try:
        keywords = json.loads(text)
    except ValueError as error:
        raise OptionError(
            f"{text!r} is no JSON ({error})",
            where="--factory-options",
            advice="Write an object such as '{\"width\": 64}'.",
        ) from error
    if not isinstance(keywords, dict):
        raise OptionError(
            f"{text!r} is no JSON object",
            where="--factory-options",
            advice="Write an object such as '{\"width\": 64}'.",
        )
    return keywords


@contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """Let the factory be in the current folder, as ``python -m`` would.

    Yields
    ------
    None
        While the folder is searched first.
    """
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _import_factory(module_name: str, name: str) -> Any:
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a module may raise anything while it is imported
        raise NetworkError(
            f"module {module_name!r} cannot be imported ({type(error).__name__}: {error})",
            where=f"{module_name}:{name}",
            advice="Check its name, and run the command from the folder that contains it.",
        ) from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise NetworkError(
            f"module {module_name!r} has no {name!r}",
            where=f"{module_name}:{name}",
            advice="Name a function of that module.",
        ) from error
    if not callable(found) or isinstance(found, nn.Module):
        raise NetworkError(
            f"{name!r} is {type(found).__name__}, not a function that builds a network",
            where=f"{module_name}:{name}",
            advice="Name a function or class that returns a torch.nn.Module when it is called.",
        )
    return found


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError as error:
        raise WeightsError("no such file", where=str(path), advice="Check the path.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"not a complete safetensors file ({error})",
            where=str(path),
            advice="Write it with safetensors.torch.save_file(net.state_dict(), path); other "
            "formats, pickles included, are not read.",
        ) from error


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Memory behind a tensor: equal for tied weights.

    Returns
    -------
    tuple
        Address, shape and strides.
    """
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _listed(names: list[str]) -> str:
    left = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f", ... {left} more" if left > 0 else "")


def _advice_on_keys(missing: list[str], extra: list[str]) -> str:
    for prefix in ("module.", "_orig_mod.", "model.", "net."):
        if missing and {key.removeprefix(prefix) for key in extra} >= set(missing):
            return f"Its keys have the prefix {prefix!r}: save the state_dict of the inner module."
    return "Use the factory, and its options, with which the file was made."


@contextmanager
def _as_archive(loaded: Any) -> Iterator[Mapping[str, Any]]:
    """An archive as it is, a single array as an archive of one.

    Yields
    ------
    Mapping
        Name to array.
    """
    if isinstance(loaded, np.ndarray):
        yield {"x": loaded}
        return
    with loaded as archive:
        yield archive


def _pick_key(archive: Mapping[str, Any], key: str | None, where: str) -> str:
    names = list(archive)
    if key is not None:
        if key not in names:
            raise DataError(
                f"no array {key!r}", where=where, advice=f"It has {_listed(names) or 'none'}."
            )
        return key
    for usual in _KEYS:
        if usual in names:
            return usual
    candidates = [name for name in names if archive[name].ndim >= 2]
    if len(candidates) != 1:
        raise DataError(
            f"{len(candidates)} arrays could be the examples",
            where=where,
            advice=f"Choose with --key; the archive has {_listed(names) or 'no arrays'}.",
        )
    return candidates[0]


def _pick_target(archive: Mapping[str, Any], options: ExampleOptions, where: str) -> str:
    wanted = _TARGET_KEYS if options.target_key is None else (options.target_key,)
    for name in wanted:
        if name in archive:
            return name
    raise DataError(
        f"no array {' or '.join(map(repr, wanted))} of targets",
        where=where,
        advice=f"Choose with --target-key; the archive has {_listed(list(archive))}.",
    )


def _refuse_shape(shape: tuple[int, ...], given: tuple[int, ...], where: str) -> NoReturn:
    """Say that examples cannot be brought into a shape.

    Raises
    ------
    ShapeError
        Always.
    """
    raise ShapeError(
        f"examples of shape {given} have {math.prod(given)} entries, --input-shape {shape} has "
        f"{math.prod(shape)}",
        where=where,
        advice="Their products must agree.",
    )
