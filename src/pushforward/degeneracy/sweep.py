"""What a sweep over checkpoints says: one table, one plot, and which were no minima."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pushforward.degeneracy.checkpoint_weights import Label
from pushforward.degeneracy.coefficient import LearningCoefficient, Verdict
from pushforward.errors import OptionError

__all__ = ["CheckpointSweep"]

_HEADER = ("checkpoint", "coefficient", "verdict", "initial loss", "if quadratic", "R-hat")


@dataclass(frozen=True, repr=False)
class CheckpointSweep:
    """Learning coefficients of checkpoints that were measured alike.

    Parameters
    ----------
    entries
        Labels and estimates, in the order of the checkpoints.
    missing
        Labels of the checkpoints that an interruption left out.
    step_size
        That all share; NaN for samplers that learn theirs.
    """

    entries: tuple[tuple[Label, LearningCoefficient], ...]
    _: KW_ONLY
    missing: tuple[Label, ...] = ()
    step_size: float = torch.nan

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[Label, LearningCoefficient]]:
        return iter(self.entries)

    def __getitem__(self, label: Label) -> LearningCoefficient:
        for known, found in self.entries:
            if known == label:
                return found
        raise KeyError(label)

    @property
    def labels(self) -> tuple[Label, ...]:
        """Of the checkpoints that were measured."""
        return tuple(label for label, _ in self.entries)

    @property
    def values(self) -> Float[Tensor, " checkpoints"]:
        """The coefficients, float64."""
        return torch.tensor([float(found.value) for _, found in self.entries], dtype=torch.float64)

    @property
    def standard_errors(self) -> Float[Tensor, " checkpoints"]:
        """Theirs, float64."""
        errors = [float(found.standard_error) for _, found in self.entries]
        return torch.tensor(errors, dtype=torch.float64)

    @property
    def initial_losses(self) -> Float[Tensor, " checkpoints"]:
        """``L(w*)``, float64."""
        losses = [found.initial_loss for _, found in self.entries]
        return torch.tensor(losses, dtype=torch.float64)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One for each checkpoint."""
        return tuple(found.verdict for _, found in self.entries)

    @property
    def not_minima(self) -> tuple[Label, ...]:
        """Checkpoints from which chains go down: their numbers are no measure of degeneracy."""
        return tuple(label for label, found in self.entries if found.verdict == "NOT_A_MINIMUM")

    def table(self, style: Literal["text", "markdown"] = "text") -> str:
        """One line for each checkpoint.

        Parameters
        ----------
        style
            Plain text, aligned; or Markdown.

        Returns
        -------
        str
            Coefficient with standard error, verdict, loss at the checkpoint, and what the
            coefficient would be if the loss were quadratic.

        Raises
        ------
        OptionError
            For another style.
        """
        if style not in {"text", "markdown"}:
            raise OptionError(
                f"there is no style {style!r}", where="style", advice="Take 'text' or 'markdown'."
            )
        rows = [_HEADER, *(_row(label, found) for label, found in self.entries)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
        padded = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
        if style == "text":
            return "\n".join("  ".join(cells).rstrip() for cells in padded)
        lines = [f"| {' | '.join(cells)} |" for cells in padded]
        rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
        return "\n".join([lines[0], rule, *lines[1:]])

    def plot(self) -> Any:
        """Coefficient ± 2 standard errors and training loss against the label.

        Returns
        -------
        matplotlib.figure.Figure
            Checkpoints whose verdict is not OK are marked.

        Raises
        ------
        OptionError
            When matplotlib is not installed.
        """
        from pushforward.degeneracy.sweep_plots import plot_sweep

        return plot_sweep(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON; numbers that are not finite become None.

        Returns
        -------
        dict
            What is shared, and a list of the checkpoints.
        """
        return {
            "step_size": self.step_size if self.step_size == self.step_size else None,
            "not_minima": list(self.not_minima),
            "missing": list(self.missing),
            "checkpoints": [{"label": label, **found.to_dict()} for label, found in self.entries],
        }

    def __repr__(self) -> str:
        if not self.entries:
            return "Learning coefficients of no checkpoint"
        first = self.entries[0][1]
        lines = [
            f"Learning coefficients of {len(self)} checkpoints by {first.method}",
            self.table(),
        ]
        if self.not_minima:
            named = ", ".join(map(str, self.not_minima))
            lines.append(f"no minimum at this temperature: {named}. Train on, or realisable=True.")
        if self.missing:
            lines.append(f"interrupted before: {', '.join(map(str, self.missing))}")
        return "\n".join(lines)


def _row(label: Label, found: LearningCoefficient) -> tuple[str, ...]:
    return (
        str(label),
        f"{float(found.value):.4g} ± {float(found.standard_error):.2g}",
        found.verdict,
        f"{found.initial_loss:.4g}",
        "" if found.quadratic is None else str(found.quadratic),
        f"{found.r_hat:.3f}",
    )
