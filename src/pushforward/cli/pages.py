"""What all commands that write a page need: a folder, a subtitle, and what made the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pushforward.cli.options import NetworkOptions

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "check_writable",
    "make_folder",
    "page_environment",
    "refuse_overwriting",
    "size_of",
]


def size_of(options: NetworkOptions, net: nn.Module) -> str:
    """The network's name with the number of its parameters, for subtitles."""
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return f"{options.network}, {parameters:,} parameters"


def page_environment(
    options: NetworkOptions, net: nn.Module, command: str, seed: int, more: dict[str, str]
) -> dict[str, str]:
    """What made a page, name to value.

    Parameters
    ----------
    options, net
        The network.
    command, seed
        Of the run.
    more
        Entries of this command.

    Returns
    -------
    dict
        With versions, device, precision and the fingerprint of the weights.
    """
    import datetime
    import hashlib
    import platform

    import torch

    from pushforward import __version__

    weights = "as the factory made them"
    if options.weights is not None:
        digest = hashlib.sha256(options.weights.read_bytes()).hexdigest()
        weights = f"{options.weights} (SHA-256 {digest[:16]}…)"
    parameter = next(net.parameters(), None)
    precision = "" if parameter is None else str(parameter.dtype).removeprefix("torch.")
    return {
        "Command": command,
        "Weights": weights,
        **more,
        "Network precision": precision or "no parameters",
        "Seed": str(seed),
        "Device": f"{options.device}, {torch.get_num_threads()} threads",
        "pushforward": __version__,
        "PyTorch": torch.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "Made": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    }


def make_folder(path: Path) -> None:
    """Refuse a folder that cannot be written to before the work, not after it.

    Parameters
    ----------
    path
        Made when it does not exist.

    Raises
    ------
    OptionError
        With the reason.
    """
    from pushforward.errors import OptionError

    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"cannot be written ({error.strerror or error})",
            where=str(path),
            advice="Choose a folder that you may write to.",
        ) from error


def check_writable(path: Path) -> None:
    """Refuse a file that cannot be written, without touching one that is there.

    Parameters
    ----------
    path
        The file; its folder is made.

    Raises
    ------
    OptionError
        With the reason.
    """
    import os

    from pushforward.errors import OptionError

    make_folder(path.parent)
    reason = None
    if path.is_dir():
        reason = "it is a folder"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "permission denied"
    if reason is not None:
        raise OptionError(
            f"cannot be written ({reason})",
            where=str(path),
            advice="Choose a file that you may write.",
        )


def refuse_overwriting(
    read: Sequence[tuple[str, Path | None]], written: Sequence[tuple[str, Path | None]]
) -> None:
    """Refuse to write where something is read, or where something else is written.

    Parameters
    ----------
    read, written
        Options with their files, of which None are not there.

    Raises
    ------
    OptionError
        For the first file that would be lost.
    """
    from pushforward.errors import OptionError

    for number, (option, path) in enumerate(written):
        for name, given in (*read, *written[:number]):
            if path is not None and given is not None and _same_file(path, given):
                raise OptionError(
                    f"{path} is also {name}",
                    where=option.removeprefix("a file of "),
                    advice="It would be overwritten: give another one.",
                )


def _same_file(one: Path, other: Path) -> bool:
    """Whether two paths are one file, which need not exist."""
    try:
        return one.resolve() == other.resolve() or one.samefile(other)
    except (OSError, RuntimeError):  # one does not exist, or links go round
        return False
