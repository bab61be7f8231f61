"""The command line of the studies of the local learning coefficient."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from reproductions.learning_coefficient.deep_linear import (
    DeepLinear,
    deep_linear,
    deep_linear_table,
    name_of,
)
from reproductions.learning_coefficient.digits import Digits, digits, digits_table
from reproductions.learning_coefficient.mnist import Mnist, mnist, mnist_table
from reproductions.results import report

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the experiments from the command line.

    Returns
    -------
    int
        0, or 2 when something was refused.
    """
    import tyro

    chosen: DeepLinear | Digits | Mnist = tyro.extras.subcommand_cli_from_dict(
        {"deep-linear": DeepLinear, "digits": Digits, "mnist": Mnist},
        prog="python -m reproductions.learning_coefficient",
        args=argv,
    )
    match chosen:
        case DeepLinear():
            path = chosen.output / f"{name_of(chosen)}.md"
            return report(path, deep_linear(chosen), deep_linear_table)
        case Digits():
            return report(chosen.output / "digits.md", digits(chosen), digits_table)
        case Mnist():
            return report(chosen.output / "mnist.md", mnist(chosen), mnist_table)


if __name__ == "__main__":
    sys.exit(main())
