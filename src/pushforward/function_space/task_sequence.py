"""What learning tasks one after the other gave: how much of each was kept, and what it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

__all__ = ["TaskSequence"]


@dataclass(frozen=True, eq=False, repr=False)
class TaskSequence:
    """Accuracies while tasks are learned one after the other.

    Parameters
    ----------
    names
        Of the tasks.
    accuracy
        ``(T, T)``, float64: of task ``i`` after training on task ``j`` in entry ``[i, j]``; NaN
        before the task was learned.
    losses, penalties
        ``(T, epochs)``, float64: means over each epoch of the loss on the present task, and of the
        penalty.
    training_seconds, summary_seconds
        Of each task.
    num_bytes
        What was kept of each task besides weights, as far as its measure says; 0 for the last,
        of which nothing is kept.
    """

    names: tuple[str, ...]
    accuracy: Float[Tensor, "T T"]
    losses: Float[Tensor, "T epochs"]
    penalties: Float[Tensor, "T epochs"]
    training_seconds: tuple[float, ...]
    summary_seconds: tuple[float, ...]
    num_bytes: tuple[int, ...]

    @property
    def final(self) -> Float[Tensor, " T"]:
        """Accuracy of each task at the end."""
        return self.accuracy[:, -1]

    @property
    def mean_accuracy(self) -> float:
        """Mean over the tasks, at the end."""
        return float(self.final.mean())

    @property
    def backward_transfer(self) -> float:
        """Mean change since each task was learned, over all but the last; negative: forgetting.

        ``sum_{i < T} (accuracy[i, T] - accuracy[i, i]) / (T - 1)`` (Lopez-Paz and Ranzato, arXiv
        1706.08840); 0 for a single task.
        """
        change = (self.final - self.accuracy.diagonal())[:-1]
        return float(change.mean()) if len(change) else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            Accuracies that do not exist are None.
        """
        accuracy = [[None if a != a else a for a in row] for row in self.accuracy.tolist()]
        return {
            "names": list(self.names),
            "accuracy": accuracy,
            "mean_accuracy": self.mean_accuracy,
            "backward_transfer": self.backward_transfer,
            "losses": self.losses.tolist(),
            "penalties": self.penalties.tolist(),
            "training_seconds": list(self.training_seconds),
            "summary_seconds": list(self.summary_seconds),
            "num_bytes": list(self.num_bytes),
        }

    def plot(self) -> Any:
        """Accuracy of each task against the number of tasks learned, and the mean.

        Returns
        -------
        matplotlib.figure.Figure
            One line for each task, from where it was learned.

        Raises
        ------
        OptionError
            When matplotlib is not installed.
        """
        from pushforward.runs.pictures import import_pyplot

        pyplot = import_pyplot()
        figure, axes = pyplot.subplots(figsize=(6.8, 3.8), layout="constrained")
        count = len(self.names)
        steps = list(range(1, count + 1))
        for i, name in enumerate(self.names):
            shade = pyplot.get_cmap("viridis")(i / max(count - 1, 1))
            axes.plot(steps[i:], self.accuracy[i, i:], "o-", color=shade, ms=3, lw=1, label=name)
        axes.plot(steps, self.accuracy.nanmean(0), "--", color="black", lw=2, label="mean so far")
        axes.set_xlabel("tasks learned")
        axes.set_ylabel("accuracy")
        axes.set_xticks(steps)
        axes.legend(fontsize=7, ncols=2)
        return figure

    def __repr__(self) -> str:
        width = max(len(name) for name in self.names)
        lines = [
            f"{len(self.names)} tasks one after the other: mean accuracy "
            f"{self.mean_accuracy:.4f}, backward transfer {self.backward_transfer:+.4f}"
        ]
        for i, name in enumerate(self.names):
            learned, final = float(self.accuracy[i, i]), float(self.final[i])
            lines.append(
                f"  {name.ljust(width)}  {learned:.4f} when learned, {final:.4f} at the end"
            )
        spent = sum(self.training_seconds), sum(self.summary_seconds)
        lines.append(f"  {spent[0]:.1f} s of training, {spent[1]:.1f} s of summaries")
        return "\n".join(lines)
