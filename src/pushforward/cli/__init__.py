"""The command line: ``pushforward report``, ``expect``, ``sample`` and the others."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Annotated

from pushforward.errors import PushforwardError

__all__ = ["main"]

_DESCRIPTION = """Push the law of the inputs through a network: expected outputs, spread and tails \
with error bars, without sampling. Ask how sure it is of its predictions; draw networks from the \
posterior of its weights, and test whether a sampler reaches it; measure how degenerate a solution \
is, and how far other weights are from it as functions. A network is named as \
package.module:factory, a function that returns a torch.nn.Module; its weights come from a \
safetensors file. No pickle is ever loaded."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv
        Arguments without the name of the program; default those of the process.

    Returns
    -------
    int
        0 when the command succeeded, 2 when its input was refused, 130 when it was interrupted.
        ``thermalize`` adds 3 (not converged), 4 (wrong kernel) and 5 (inconclusive);
        ``degeneracy`` 3 (not equilibrated), 4 (step too large), 5 (not a minimum) and 6 (dead
        chains).
    """
    import tyro

    from pushforward.cli.commands import Demo, Expect, Report, Uncertainty
    from pushforward.cli.degeneracy import Degeneracy
    from pushforward.cli.distance import Distance
    from pushforward.cli.sampling import Sample
    from pushforward.cli.thermalization import Thermalize

    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["--version"], ["-V"]):
        from pushforward import __version__

        print(f"pushforward {__version__}")
        return 0
    commands = (
        Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Expect, tyro.conf.subcommand("expect")]
        | Annotated[Uncertainty, tyro.conf.subcommand("uncertainty")]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Thermalize, tyro.conf.subcommand("thermalize")]
        | Annotated[Degeneracy, tyro.conf.subcommand("degeneracy")]
        | Annotated[Distance, tyro.conf.subcommand("distance")]
        | Annotated[Demo, tyro.conf.subcommand("demo")]
    )
    try:
        command: (
            Report | Expect | Uncertainty | Sample | Thermalize | Degeneracy | Distance | Demo
        ) = tyro.cli(
            commands,
            prog="pushforward",
            description=_DESCRIPTION,
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
        )
        command.run(shlex.join(["pushforward", *arguments]))
    except SystemExit as request:
        return request.code if isinstance(request.code, int) else 0
    except PushforwardError as error:
        print(f"error: {error.where}: {error.what}\n  {error.advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
