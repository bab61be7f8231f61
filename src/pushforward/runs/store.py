"""Results and states on disk: tensors and JSON in one safetensors file, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pushforward.errors import OptionError, WeightsError

__all__ = ["Checkpoint", "fingerprint", "load_tensors", "save_tensors"]

_CHECKPOINT_SCHEMA = "pushforward.checkpoint"
_CHECKPOINT_VERSION = 1
_STATE_FILE = "state.safetensors"
_PARTIAL = ".partial"
_DIGEST = "digest"
_SHOWN = 32  # characters of a value in a message


def save_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    schema: str,
    version: int,
) -> None:
    """Write tensors and what belongs to them to a file.

    The file appears under its name only when it is complete and on the disk: whatever interrupts
    the writing, `path` holds what it held before. A hash of all its contents is in the file, so
    that `load_tensors` notices a single changed bit.

    Parameters
    ----------
    path
        A safetensors file, replaced if it exists. Folders are made.
    tensors
        Dense tensors by name, on any device, kept bit for bit.
    metadata
        Whatever JSON can hold, by name; floats come back exactly, tuples as lists.
    schema
        What kind of file this is, such as ``"pushforward.laplace"``.
    version
        Of the schema, from 1; raised whenever older readers would misunderstand the file.

    Raises
    ------
    OptionError
        If `metadata` hold something that JSON cannot, the folder cannot be made, or `path` is one
        or no path at all.
    """
    path = _path(path)
    if path.is_dir():
        raise OptionError(
            "it is a folder", where=str(path), advice="Give the name of a file, in it say."
        )
    header = {
        "schema": schema,
        "version": str(version),
        "metadata": _to_json(dict(metadata), "metadata"),
    }
    storable = _storable(tensors)
    header[_DIGEST] = _digest(header, {name: _hash_of(name, storable[name]) for name in storable})
    _make_folder(path.parent)
    # In the same folder, because only within one file system is replacing a single step.
    partial = path.with_name(f".{path.name}.{uuid4().hex}{_PARTIAL}")
    try:
        save_file(storable, partial, metadata=header)
        _flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _flush(path.parent)


def load_tensors(
    path: str | os.PathLike[str],
    *,
    schema: str,
    version: int,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` has written.

    Parameters
    ----------
    path
        The file.
    schema
        What kind of file is wanted.
    version
        The newest version of the schema that the caller understands.
    device
        Where the tensors go.

    Returns
    -------
    tensors : dict[str, Tensor]
        By name.
    metadata : dict
        As JSON gives them back.

    Raises
    ------
    OptionError
        If `path` is none.
    WeightsError
        If there is no such file, it is damaged or incomplete, of another schema, or newer than
        `version`.
    """
    path = _path(path)
    where = str(path)
    tensors, hashes = {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            _check_schema(header, schema, version, where)
            metadata = json.loads(header["metadata"])
            for name in file.keys():  # noqa: SIM118 - no mapping
                # A copy: the file stays mapped, and may not be replaced on some systems, otherwise.
                tensor = file.get_tensor(name).clone()
                hashes[name] = _hash_of(name, tensor)
                tensors[name] = tensor.to(device)
    except FileNotFoundError as error:
        raise WeightsError("no such file", where=where, advice="Check the path.") from error
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise WeightsError(
            f"damaged, or not a complete safetensors file ({error})",
            where=where,
            advice="Write it anew; pickles and other formats are not read.",
        ) from error
    if header.get(_DIGEST) != _digest(header, hashes):
        raise WeightsError(
            "damaged: its contents are not those that were written"
            if _DIGEST in header
            else "damaged, or from before the first release: its checksum is missing",
            where=where,
            advice="Write it anew, or restore a copy; a run begins again without its checkpoint.",
        )
    return tensors, metadata


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """What tells these tensors, such as the parameters and buffers of a network, from others.

    Parameters
    ----------
    tensors
        By name.

    Returns
    -------
    str
        Hash of names, shapes, types and every byte; neither device nor order matter.
    """
    digest = blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().resolve_conj().resolve_neg().cpu().contiguous()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """The last good state of one long computation, in a folder of its own.

    Parameters
    ----------
    folder
        Made when the first state is saved. Only one process may save.
    identity
        What the state belongs to, in JSON's types: settings, seed, fingerprints of network and
        data. A state of another identity is refused.

    Examples
    --------
    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint = Checkpoint(folder, {"seed": 0})
    ...     checkpoint.save({"draws": torch.zeros(2)}, {"step": 5})
    ...     tensors, state = checkpoint.load()
    >>> state
    {'step': 5}
    """

    folder: str | os.PathLike[str]
    identity: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file that holds the state."""
        return Path(self.folder) / _STATE_FILE

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the state; interrupted at any moment, the one before is still there.

        Parameters
        ----------
        tensors
            All tensors of the state, by name.
        state
            All the rest, in JSON's types.

        Raises
        ------
        OptionError
            If `state` holds something that JSON cannot, or the folder cannot be made.
        """
        metadata = {"identity": dict(self.identity), "state": dict(state)}
        save_tensors(
            self.path,
            tensors,
            metadata,
            schema=_CHECKPOINT_SCHEMA,
            version=_CHECKPOINT_VERSION,
        )
        for remains in self.path.parent.glob(f".{_STATE_FILE}.*{_PARTIAL}"):
            remains.unlink(missing_ok=True)  # of a run that was killed while it wrote

    def load(
        self, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The last state that was saved.

        Parameters
        ----------
        device
            Where the tensors go.

        Returns
        -------
        tuple or None
            Tensors and state as they were given to `save`; None when nothing has been saved yet.

        Raises
        ------
        WeightsError
            If the state belongs to something else (the message names what differs), or the file is
            damaged or of a newer release.
        """
        if not self.path.exists():
            return None
        tensors, metadata = load_tensors(
            self.path, schema=_CHECKPOINT_SCHEMA, version=_CHECKPOINT_VERSION, device=device
        )
        ours = json.loads(_to_json(dict(self.identity), "identity"))
        differences = _differences(metadata.get("identity", {}), ours)
        if differences:
            raise WeightsError(
                f"this checkpoint is of another computation: {'; '.join(differences)}",
                where=str(self.path),
                advice="Choose another folder, delete this one, or go back to what it belongs to.",
            )
        return tensors, metadata["state"]


def _path(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise OptionError(
            f"{path!r} is no path",
            where="path",
            advice="Give the name of a file, as a string or a pathlib.Path.",
        )
    return Path(path)


def _hash_of(name: str, tensor: Tensor) -> str:
    """Of one tensor at a time: from a GPU, all of them need not be on the CPU together."""
    return fingerprint({name: tensor})


def _digest(header: Mapping[str, str], hashes: Mapping[str, str]) -> str:
    """Hash of everything in a file, from its header and the hash of each tensor.

    Returns
    -------
    str
        The order of neither matters; an entry of an earlier digest is left out.
    """
    told = {key: value for key, value in header.items() if key != _DIGEST}
    return blake2b(json.dumps([told, hashes], sort_keys=True).encode(), digest_size=16).hexdigest()


def _check_schema(header: Mapping[str, str], schema: str, version: int, where: str) -> None:
    found = header.get("schema")
    if found != schema:
        raise WeightsError(
            "not written by this library" if found is None else f"a file of the kind {found}",
            where=where,
            advice=f"Give a file of the kind {schema}.",
        )
    number = header.get("version", "")
    if not number.isdecimal() or int(number) > version:
        raise WeightsError(
            f"version {number!r} of {schema}, of which this release reads up to {version}",
            where=where,
            advice="Upgrade pushforward, or write the file with this release.",
        )


def _differences(theirs: Any, ours: Any, name: str = "") -> list[str]:
    """What differs between two JSON values, by its path."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [*theirs, *(key for key in ours if key not in theirs)]
        prefix = f"{name}." if name else ""
        missing = object()
        return [
            line
            for key in keys
            for line in _differences(
                theirs.get(key, missing), ours.get(key, missing), f"{prefix}{key}"
            )
        ]
    if theirs == ours or (theirs != theirs and ours != ours):  # NaN is the same as NaN
        return []
    return [f"{name} was {_shown(theirs)} and is {_shown(ours)}"]


def _shown(value: Any) -> str:
    if type(value) is object:
        return "absent"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _to_json(value: Any, where: str) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"cannot be written as JSON ({error})",
            where=where,
            advice="Use strings, numbers, booleans, None, lists and dicts; tensors go elsewhere.",
        ) from error


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous and without shared memory, as the format wants it; copied only if need be."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        if plain.untyped_storage().data_ptr() in seen:
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"cannot be made a folder ({error.strerror})",
            where=str(folder),
            advice="Choose a folder that you may write to.",
        ) from error


def _flush(path: Path) -> None:
    """Wait until the file, or the folder's list of files, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # elsewhere folders cannot be opened
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
