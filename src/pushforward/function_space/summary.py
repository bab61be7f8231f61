"""``FunctionSummary``: what a network was over its data, and the distance of others from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from time import perf_counter
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.errors import OptionError, WeightsError
from pushforward.function_space.answers import as_distance
from pushforward.function_space.estimators import DEFAULT, Estimator, Estimators
from pushforward.function_space.metrics import Metric, check_metric
from pushforward.function_space.network import Other, ReferenceNetwork
from pushforward.function_space.probes import NUM_PROBES, probe
from pushforward.function_space.statistics import LowRankMoments, Statistics
from pushforward.function_space.token_law import TokenLaw
from pushforward.runs.estimate import Check, Cost, Estimate
from pushforward.runs.plan import format_bytes

__all__ = ["Components", "FunctionSummary", "InputMoments"]

Components: TypeAlias = Literal["all", "classes", "clusters"]
InputMoments: TypeAlias = Literal["full", "diagonal"] | int
_NUM_SAMPLES = 2048
_LOUD = 0.5  # rms log ratio, beyond which a number is off by half of itself


@dataclass(frozen=True, eq=False, repr=False)
class FunctionSummary:
    """A network and moments of its data, from which distances of other weights are estimated.

    No example is in it, but moments of few examples, and counts of neighbouring tokens where
    sequences share few, tell much of them. Made by `pushforward.summarize`.

    Parameters
    ----------
    reference
        The network, with its weights.
    statistics
        Of the data, in components.
    input_moments
        What is kept of the covariance of the inputs: ``"full"``, ``"diagonal"``, or a rank.
    probe_distances
        True mean discrepancy of the weights of `pushforward.function_space.probes.probe`,
        ``(probes, metrics)``: from them `estimate` takes its error.
    components
        What the components are: ``"all"`` data in one, ``"classes"`` or ``"clusters"``.
    tokens
        For inputs that are whole numbers their law in each component, which has the place of
        moments.

    Examples
    --------
    >>> import pushforward as pf, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> summary = pf.summarize(net, torch.randn(100, 3))
    >>> float(summary.distance(net).detach())
    0.0
    """

    reference: ReferenceNetwork
    statistics: Statistics
    input_moments: InputMoments
    probe_distances: Tensor
    components: Components = "all"
    tokens: tuple[TokenLaw, ...] = ()

    # --- what it is ------------------------------------------------------------------------------

    @property
    def num_examples(self) -> int:
        """Examples that were summarised."""
        return int(self.statistics.counts.sum())

    @property
    def num_components(self) -> int:
        """Classes or clusters that are kept apart."""
        return len(self.statistics.counts)

    @property
    def weights(self) -> Float[Tensor, " c"]:
        """Share of each component."""
        return self.statistics.counts / self.statistics.counts.sum()

    @property
    def layer_moments(self) -> bool:
        """Whether moments of the activations were kept, which ``anchored`` needs."""
        return any(stage.layer is not None for stage in self.statistics.stages)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Numbers that are kept, by what they are; the weights are those of the network."""
        inputs, stages = self.statistics.inputs, self.statistics.stages
        mean = 0 if inputs is None else inputs.mean.numel()
        covariance = 0
        if isinstance(inputs, LowRankMoments):
            covariance = inputs.factor.numel() + inputs.rest.numel()
        elif inputs is not None:
            covariance = inputs.covariance.numel()
        chain = self.reference.graph.stages if stages else ()
        count = self.num_components * sum(stage.width for stage in chain)
        same = all(torch.equal(s.gate_mean, s.gate_square) for s in stages)
        layers = sum(
            s.layer.mean.numel() + s.layer.covariance.numel() for s in stages if s.layer is not None
        )
        outputs = self.statistics.outputs
        kept = (outputs.moments.mean, outputs.moments.covariance, outputs.fisher, outputs.softmax)
        sizes = {
            "weights": self.reference.num_parameters,
            "input mean": mean,
            "input covariance": covariance,
            "token counts": sum(law.num_bytes // 8 for law in self.tokens),
            "gates": count if same else 2 * count,
            "layers": layers,
            "outputs": sum(t.numel() for t in kept),
        }
        return {name: size for name, size in sizes.items() if size}

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept besides the weights."""
        return 8 * sum(size for name, size in self.sizes.items() if name != "weights")

    def __repr__(self) -> str:
        net = type(self.reference.module).__name__
        parts = self.num_components
        of = f" in {parts} components" if parts > 1 else ""
        numbers = ", ".join(f"{name} {size:,}" for name, size in self.sizes.items())
        # Chains of tokens that hardly branch are the sequences they were counted on.
        kept = "counts of neighbouring tokens are" if self.tokens else "no example is"
        return (
            f"FunctionSummary of {net} over {self.num_examples:,} examples{of}\n"
            f"  numbers: {numbers}\n"
            f"  {format_bytes(self.num_bytes)} besides the weights; {kept} kept"
        )

    def plot(self, metric: Metric = "euclidean", estimator: Estimator | None = None) -> Any:
        """Estimate over truth on the weights for which the truth was kept; see `calibration`."""
        from pushforward.function_space.plots import plot_calibration

        return plot_calibration(self, metric, estimator)

    def to_dict(self) -> dict[str, Any]:
        """What it holds, without the numbers themselves.

        Returns
        -------
        dict
            Ready for JSON.
        """
        return {
            "network": type(self.reference.module).__name__,
            "num_examples": self.num_examples,
            "num_components": self.num_components,
            "input_moments": self.input_moments,
            "layer_moments": self.layer_moments,
            "sizes": dict(self.sizes),
            "num_bytes": self.num_bytes,
        }

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: without what estimators keep, which is made again when wanted."""
        return {name: kept for name, kept in self.__dict__.items() if name != "_estimators"}

    def __radd__(self, other: object) -> FunctionSummary:
        """Itself, added to the 0 with which Python's ``sum`` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __add__(self, other: object) -> FunctionSummary:
        """The summary of both parts of the data, as if they had been one."""
        if not isinstance(other, FunctionSummary):
            return NotImplemented
        mine, theirs = self.reference, other.reference
        if mine.architecture != theirs.architecture or not mine.unchanged(theirs.tensors):
            raise WeightsError(
                "the two summaries are of different networks",
                where="summary + summary",
                advice="Summarise every part of the data with the same weights.",
            )
        if self.components == "clusters" or other.components == "clusters":
            raise OptionError(
                "clusters of one part of the data are not those of another",
                where="summary + summary",
                advice="Use classes, or one component.",
            )
        for name in ("components", "num_components", "input_moments", "layer_moments"):
            if getattr(self, name) != getattr(other, name):
                raise OptionError(
                    f"{name} is {getattr(self, name)!r} in one and {getattr(other, name)!r} in the "
                    "other",
                    where="summary + summary",
                    advice="Summarise every part in the same way, with the same num_classes.",
                )
        share = other.num_examples / (self.num_examples + other.num_examples)
        return replace(
            self,
            statistics=self.statistics + other.statistics,
            probe_distances=torch.lerp(self.probe_distances, other.probe_distances, share),
            tokens=tuple(a + b for a, b in zip(self.tokens, other.tokens, strict=True)),
        )

    # --- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file: the weights, and numbers as `sizes` lists them.

        Parameters
        ----------
        path
            Replaced if it exists, and never half written.
        """
        from pushforward.function_space.storage import save_summary

        save_summary(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str], net: nn.Module) -> FunctionSummary:
        """Read a file that `save` has written.

        Parameters
        ----------
        path
            The file.
        net
            A network of the same architecture, with any weights; those of the reference are in the
            file.

        Returns
        -------
        FunctionSummary
            On the device of `net`.

        Raises
        ------
        WeightsError
            If the file is damaged, of another kind, newer than this release, or of another network.
        """
        from pushforward.function_space.storage import load_summary

        return load_summary(path, net)

    # --- distances -------------------------------------------------------------------------------

    def distance(
        self,
        other: Other,
        *,
        metric: Metric = "euclidean",
        estimator: Estimator | None = None,
        outputs: slice | Sequence[int] | Tensor | None = None,
        num_samples: int = _NUM_SAMPLES,
        seed: int = 0,
    ) -> Float[Tensor, ""]:
        """Mean discrepancy between the outputs of other weights and those of the reference.

        Parameters
        ----------
        other
            A network of the same architecture, or its tensors by name.
        metric
            How two rows of outputs are compared; see
            `pushforward.function_space.metrics.discrepancy`.
        estimator
            ``"gaussian"``: closed form, pre-activations and their changes jointly Gaussian in every
            layer. ``"gated"``: closed form of independent gates with the frequencies of the data.
            ``"anchored"``: the Gaussian one, brought back to the moments of the data behind every
            layer (needs ``layer_moments=True``). ``"reference"``: the published
            estimator. ``"sampled"``: random gates on random inputs. ``"synthetic"``: both networks
            themselves, on random inputs with the moments of the data; the default.
        outputs
            Numbers of the outputs that count, such as one head's; default all.
        num_samples
            Draws, where there are any, of all components together. The same `seed` gives the same
            draws, so that two distances can be compared.
        seed
            Of the draws.

        Returns
        -------
        Tensor
            A scalar in the type of the other weights, but at least float32; differentiable in them,
            and exactly 0 at the weights of the reference.

        Raises
        ------
        OptionError
            For an unknown metric or estimator, or one that this summary does not have what it takes
            for.
        ShapeError
            When `outputs` are out of range, or the only one where probabilities are compared.
        WeightsError
            When `other` is of another architecture.
        NetworkError
            When its weights, its outputs or the distance are not finite.
        ResourceError
            When a closed form would need covariances of layers that are too wide.
        """
        values, _ = self._estimators.components(
            other,
            metric=metric,
            estimator=estimator,
            outputs=outputs,
            num_samples=num_samples,
            seed=seed,
        )
        value = (self.weights.to(values.device) * values).sum()
        return as_distance(value, self.reference, other)

    def estimate(
        self,
        other: Other,
        *,
        metric: Metric = "euclidean",
        estimator: Estimator | None = None,
        outputs: slice | Sequence[int] | Tensor | None = None,
        num_samples: int = _NUM_SAMPLES,
        seed: int = 0,
    ) -> Estimate:
        """The same distance with its error.

        The error has two parts: that of the draws, where there are any, and the relative error that
        the estimator has on weights for which the truth is known: noise, pruning, quantisation and
        mixed inputs, whose true distances were computed while the data were there.

        Parameters
        ----------
        other, metric, estimator, outputs, num_samples, seed
            As in `distance`.

        Returns
        -------
        Estimate
            Without a gradient.
        """
        start = perf_counter()
        chosen = estimator or DEFAULT
        with torch.no_grad():
            values, spread = self._estimators.components(
                other,
                metric=metric,
                estimator=chosen,
                outputs=outputs,
                num_samples=num_samples,
                seed=seed,
            )
        value = (self.weights * values).sum()
        drawn = (self.weights * spread.to(values.device)).square().sum().sqrt()
        ratios = self.calibration(metric=metric, estimator=chosen)
        relative = float(ratios.square().mean().sqrt()) if len(ratios) else 0.0
        error = (drawn.square() + (relative * value).square()).sqrt()
        return Estimate(
            value,
            error,
            Cost(0.0, perf_counter() - start),
            f"the {chosen} estimator of the {metric} distance",
            (self.calibration_check(metric=metric, estimator=chosen),),
        )

    def calibration_check(
        self, *, metric: Metric = "euclidean", estimator: Estimator | None = None
    ) -> Check:
        """How well an estimator does on weights for which the truth was kept, with advice.

        Parameters
        ----------
        metric, estimator
            As in `distance`; all outputs count.

        Returns
        -------
        Check
            Named ``calibrated``.
        """
        chosen = estimator or DEFAULT
        ratios = self.calibration(metric=metric, estimator=chosen)
        return _calibration_check(ratios, _advice(metric, chosen, self.num_components))

    def calibration(
        self, *, metric: Metric = "euclidean", estimator: Estimator | None = None
    ) -> Float[Tensor, " probes"]:
        """``log(estimate / truth)`` on weights for which the truth was kept.

        Parameters
        ----------
        metric, estimator
            As in `distance`; all outputs count.

        Returns
        -------
        Tensor
            One number for each probe that has a distance at all.
        """
        check_metric(metric)
        chosen = estimator or DEFAULT
        known = self._calibrations.get((metric, chosen))
        if known is None:
            column = self.probe_distances[:, list(get_args(Metric)).index(metric)]
            logs = []
            with torch.no_grad():
                for number, truth in enumerate(column.tolist()):
                    if truth > 0:
                        weights = probe(self.reference, number)
                        guess = float(self.distance(weights, metric=metric, estimator=chosen))
                        logs.append(log(max(guess, 1e-300) / truth))
            known = torch.tensor(logs, dtype=torch.float64)
            self._calibrations[metric, chosen] = known
        return known

    @cached_property
    def _estimators(self) -> Estimators:
        return Estimators(self.reference, self.statistics, self.tokens)

    @cached_property
    def _calibrations(self) -> dict[tuple[str, str], Tensor]:
        return {}


def _calibration_check(ratios: Tensor, advice: str) -> Check:
    relative = float(ratios.square().mean().sqrt()) if len(ratios) else 0.0
    seen = f"rms log(estimate / truth) {relative:.3f} on {len(ratios)} of {NUM_PROBES} probes"
    if len(ratios) == 0:
        return Check("calibrated", "warn", "no probe moved the outputs", "Measure on some data.")
    if relative > _LOUD:
        return Check("calibrated", "warn", seen, advice)
    return Check("calibrated", "pass", seen)


def _advice(metric: Metric, estimator: Estimator, num_components: int) -> str:
    """What would make an estimate better."""
    if metric != "euclidean" and num_components == 1:
        return (
            "On inputs drawn from one law for all data the network is less sure than on the data: "
            "summarise with classes or clusters."
        )
    if estimator == "synthetic":
        return (
            "Inputs drawn from what was kept are unlike the data: keep classes, more clusters, or "
            "the whole covariance."
        )
    return f'Use estimator="{DEFAULT}", or keep classes or clusters.'
