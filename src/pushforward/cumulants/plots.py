"""Pictures of output laws; matplotlib is imported when they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pushforward.errors import ShapeError
from pushforward.runs.pictures import import_pyplot

if TYPE_CHECKING:
    from pushforward.cumulants.output import OutputLaw

__all__ = ["plot_outputs"]


def plot_outputs(law: OutputLaw, labels: list[str] | None = None) -> Any:
    """Expected output with its error bar, over the range that holds 95 % of the outputs.

    Parameters
    ----------
    law
        One output law, not a batch.
    labels
        Names of the outputs; default their numbers.

    Returns
    -------
    matplotlib.figure.Figure
        One panel.

    Raises
    ------
    ShapeError
        For a batch of laws or a wrong number of labels.
    """
    if law.mean.dim() != 1:
        raise ShapeError(
            f"a batch of {law.mean.shape[0]} laws",
            where="OutputLaw.plot",
            advice="Plot one law at a time.",
        )
    count = len(law.mean)
    names = [str(i) for i in range(count)] if labels is None else labels
    if len(names) != count:
        raise ShapeError(
            f"{len(names)} labels for {count} outputs",
            where="OutputLaw.plot",
            advice="Give one label for each output.",
        )
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(max(4.0, 0.6 * count + 2), 3.6), layout="constrained")
    low, high = law.quantile(0.025).tolist(), law.quantile(0.975).tolist()
    mean = law.mean.detach().tolist()
    positions = list(range(count))
    axes.vlines(positions, low, high, color="#9db8d9", linewidth=7, label="95 % of outputs")
    error = None if law.standard_error is None else law.standard_error.tolist()
    axes.errorbar(
        positions,
        mean,
        yerr=error,
        fmt="o",
        color="#1f3a5f",
        capsize=4,
        label="expected output ± standard error",
    )
    axes.set_xticks(positions, names)
    axes.set_xlabel("output")
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_title(f"Law of the outputs, {law.method}")
    axes.legend(frameon=False)
    return figure
