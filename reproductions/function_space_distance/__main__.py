"""The command line of the comparison of function-space distances."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from reproductions.function_space_distance.compression import (
    Compression,
    compression,
    compression_table,
)
from reproductions.function_space_distance.nets import Nets, nets, nets_table
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

    chosen: Nets | Compression = tyro.extras.subcommand_cli_from_dict(
        {"nets": Nets, "compression": Compression},
        prog="python -m reproductions.function_space_distance",
        args=argv,
    )
    if isinstance(chosen, Nets):
        return report(chosen.output / f"{chosen.network}.md", nets(chosen), nets_table)
    path = chosen.output / f"compression-{chosen.pooling}.md"
    return report(path, compression(chosen), compression_table)


if __name__ == "__main__":
    sys.exit(main())
