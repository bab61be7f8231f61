"""``FunctionSummary``: what a network was over its data, and the distance of others from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt
from time import perf_counter
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.errors import OptionError, ResourceError, WeightsError
from pushforward.function_space.anchored import AnchoredStep, anchored_values, push_anchored
from pushforward.function_space.chain import Change, Moments, affine_changes
from pushforward.function_space.gated import GatedStep, Gates, gated_values, push_gated
from pushforward.function_space.metrics import Metric, check_metric, discrepancy
from pushforward.function_space.network import Other, ReferenceNetwork, select_outputs
from pushforward.function_space.output_change import mean_discrepancy
from pushforward.function_space.probes import NUM_PROBES, probe
from pushforward.function_space.published import published_values, push_published, with_jitter
from pushforward.function_space.sampled import sampled_outputs
from pushforward.function_space.statistics import Statistics
from pushforward.networks.graph import NetworkGraph
from pushforward.runs.estimate import Check, Cost, Estimate
from pushforward.runs.plan import format_bytes
from pushforward.runs.rng import stream
from pushforward.typing import Params

__all__ = ["Estimator", "FunctionSummary", "InputMoments"]

Estimator: TypeAlias = Literal["gated", "gaussian", "anchored", "reference", "sampled", "synthetic"]
InputMoments: TypeAlias = Literal["full", "diagonal"] | int
_WIDEST = 1024  # units of a stage, beyond which sampling is the default
_TOO_WIDE = 8192  # and beyond which covariances are not formed at all
_NUM_SAMPLES = 1024


@dataclass(frozen=True, eq=False, repr=False)
class FunctionSummary:
    """A network and moments of its data, from which distances of other weights are estimated.

    No example is in it. Made by `pushforward.summarize`.

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

    Examples
    --------
    >>> import pushforward as pf, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> summary = pf.summarize(net, torch.randn(100, 3))
    >>> float(summary.distance(net))
    0.0
    """

    reference: ReferenceNetwork
    statistics: Statistics
    input_moments: InputMoments
    probe_distances: Tensor

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
        return all(stage.layer is not None for stage in self.statistics.stages)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Numbers that are kept, by what they are; the weights are those of the network."""
        inputs = self.statistics.inputs
        components, width = inputs.mean.shape
        covariance = inputs.covariance.numel()
        if isinstance(self.input_moments, int):
            covariance = components * width * (self.input_moments + 1)
        stages = self.statistics.stages
        units = [g.units for s in self.reference.graph.stages for g in s.groups if not g.carried]
        count = components * sum(u.stop - u.start for u in units)
        same = all(torch.equal(s.gate_mean, s.gate_square) for s in stages)
        layers = sum(
            s.layer.mean.numel() + s.layer.covariance.numel() + s.coactivation.numel()
            for s in stages
            if s.layer is not None and s.coactivation is not None
        )
        outputs = self.statistics.outputs
        kept = (outputs.moments.mean, outputs.moments.covariance, outputs.fisher, outputs.softmax)
        sizes = {
            "weights": self.reference.num_parameters,
            "input mean": inputs.mean.numel(),
            "input covariance": covariance,
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
        return (
            f"FunctionSummary of {net} over {self.num_examples:,} examples{of}\n"
            f"  numbers: {numbers}\n"
            f"  {format_bytes(self.num_bytes)} besides the weights; no example is kept"
        )

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

    def __add__(self, other: FunctionSummary) -> FunctionSummary:
        """The summary of both parts of the data, as if they had been one."""
        mine, theirs = self.reference, other.reference
        if mine.architecture != theirs.architecture or not mine.unchanged(theirs.tensors):
            raise WeightsError(
                "the two summaries are of different networks",
                where="summary + summary",
                advice="Summarise every part of the data with the same weights.",
            )
        for name in ("num_components", "input_moments", "layer_moments"):
            if getattr(self, name) != getattr(other, name):
                raise OptionError(
                    f"{name} is {getattr(self, name)!r} in one and {getattr(other, name)!r} in the "
                    "other",
                    where="summary + summary",
                    advice="Summarise every part in the same way, with the same classes.",
                )
        share = other.num_examples / (self.num_examples + other.num_examples)
        statistics = self.statistics + other.statistics
        if isinstance(self.input_moments, int):
            statistics = replace(
                statistics, inputs=of_low_rank(statistics.inputs, self.input_moments)
            )
        return replace(
            self,
            statistics=statistics,
            probe_distances=torch.lerp(self.probe_distances, other.probe_distances, share),
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

    @property
    def default_estimator(self) -> Estimator:
        """What `distance` uses unless told."""
        if self._widest > _WIDEST:
            return "synthetic"
        return "anchored" if self.layer_moments else "gaussian"

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
            ``"anchored"``: the same with pairs of gates, brought back to the moments of the data
            behind every layer (needs ``layer_moments=True``). ``"reference"``: the published
            estimator. ``"sampled"``: random gates on random inputs. ``"synthetic"``: both networks
            themselves, on random inputs with the moments of the data. Default: ``"anchored"`` if it
            can be, else ``"gaussian"``, and ``"synthetic"`` for layers of more than 1,024 units.
        outputs
            Numbers of the outputs that count, such as one head's; default all.
        num_samples
            Draws in each component, where there are any. The same `seed` gives the same draws, so
            that two distances can be compared.
        seed
            Of the draws.

        Returns
        -------
        Tensor
            A scalar in the type of the weights, differentiable in those of `other`; exactly 0 at
            the weights of the reference.

        Raises
        ------
        OptionError
            For an unknown metric or estimator, or one that this summary does not have what it takes
            for.
        ShapeError
            When `outputs` are out of range.
        WeightsError
            When `other` is of another architecture.
        NetworkError
            When its weights are not finite.
        ResourceError
            When a closed form would need covariances of layers that are too wide.
        """
        values, _ = self._components(
            other,
            metric=metric,
            estimator=estimator,
            outputs=outputs,
            num_samples=num_samples,
            seed=seed,
        )
        return (self.weights.to(values.device) * values).sum().to(self._dtype_of(other))

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
        chosen = estimator or self.default_estimator
        with torch.no_grad():
            values, spread = self._components(
                other,
                metric=metric,
                estimator=chosen,
                outputs=outputs,
                num_samples=num_samples,
                seed=seed,
            )
        value = (self.weights * values).sum()
        drawn = (self.weights * spread).square().sum().sqrt()
        ratios = self.calibration(metric=metric, estimator=chosen)
        relative = float(ratios.square().mean().sqrt()) if len(ratios) else 0.0
        error = (drawn.square() + (relative * value).square()).sqrt()
        return Estimate(
            value,
            error,
            Cost(0.0, perf_counter() - start),
            f"the {chosen} estimator of the {metric} distance",
            (_calibration_check(relative, ratios),),
        )

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
        chosen = estimator or self.default_estimator
        known = self._calibrations.get((metric, chosen))
        if known is None:
            column = self.probe_distances[:, list(get_args(Metric)).index(metric)]
            logs = []
            with torch.no_grad():
                for number, truth in enumerate(column.tolist()):
                    if truth > 0:
                        weights = probe(self.reference, number)
                        guess = float(self.distance(weights, metric=metric, estimator=chosen))
                        logs.append(torch.tensor(max(guess, 1e-300) / truth).log())
            known = torch.stack(logs).double() if logs else torch.zeros(0, dtype=torch.float64)
            self._calibrations[metric, chosen] = known
        return known

    @cached_property
    def _calibrations(self) -> dict[tuple[str, str], Tensor]:
        return {}

    def _components(
        self,
        other: Other,
        *,
        metric: Metric,
        estimator: Estimator | None,
        outputs: slice | Sequence[int] | Tensor | None,
        num_samples: int,
        seed: int,
    ) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Mean discrepancy of each component and its standard error from the draws."""
        check_metric(metric)
        estimator = estimator or self.default_estimator
        if estimator not in get_args(Estimator):
            raise OptionError(
                f"unknown estimator {estimator!r}",
                where="estimator",
                advice=f"Choose one of {', '.join(get_args(Estimator))}.",
            )
        if num_samples < 2:
            raise OptionError(
                f"{num_samples!r} draws", where="num_samples", advice="Give two or more."
            )
        chosen = select_outputs(self.reference.graph.output_features, outputs)
        tensors = self.reference.tensors_of(other)
        if estimator == "synthetic":
            return self._synthetic(tensors, metric, chosen, num_samples, seed)
        graph = self.reference.graph_of(tensors)
        if estimator == "sampled":
            rows = self._drawn_inputs(num_samples, seed)
            generator = stream(seed, "function-space gates", device=rows.device)
            old, moved = sampled_outputs(self.reference.graph, graph, rows, self._gates, generator)
            each = discrepancy(_pick(old, chosen), _pick(old + moved, chosen), metric)
            return each.mean(1), each.std(1) / sqrt(each.shape[1])
        change, closure = self._closed_form(graph, estimator)
        values = mean_discrepancy(
            change,
            closure,
            self.statistics.outputs,
            metric,
            chosen=chosen,
            moved=not self.reference.unchanged(tensors),
            num_samples=num_samples,
            seed=seed,
        )
        return values, torch.zeros_like(values)

    def _closed_form(self, graph: NetworkGraph, estimator: Estimator) -> tuple[Change, Moments]:
        """Moments of the change of the outputs, and of the outputs as the closed form has them."""
        if self._widest > _TOO_WIDE:
            raise ResourceError(
                f"a layer has {self._widest:,} units, whose covariances take "
                f"{format_bytes(8 * self._widest**2 * self.num_components)} each",
                where=f"estimator={estimator!r}",
                advice='Use estimator="synthetic" or "sampled", which form none.',
            )
        own, inputs = self.reference.graph, self._inputs
        if estimator == "gated":
            steps = self._gated_steps
            return push_gated(own, graph, inputs, steps), self._outputs_of(steps, inputs)
        if estimator == "reference":
            jittered, published = with_jitter(inputs), self._published_steps
            pushed = push_published(own, graph, jittered, published)
            return pushed, self._outputs_of(published, jittered)
        if estimator == "anchored":
            if not self.layer_moments:
                raise OptionError(
                    "this summary has no moments of the layers",
                    where='estimator="anchored"',
                    advice="Make it with pf.summarize(..., layer_moments=True).",
                )
            anchored = self._anchored_steps
            return push_anchored(own, graph, inputs, anchored), self._outputs_of(anchored, inputs)
        from pushforward.function_space.gaussian import push_gaussian

        prepared = self._gaussian_steps
        return push_gaussian(own, graph, inputs, prepared), self._outputs_of(prepared, inputs)

    def _outputs_of(self, steps: Sequence[Any], inputs: Moments) -> Moments:
        values = steps[-1].after if steps else inputs
        own = self.reference.graph
        return affine_changes(own, own)[1].push(values)

    def _synthetic(
        self, tensors: Params, metric: Metric, chosen: Tensor | None, num_samples: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        rows = self._drawn_inputs(num_samples, seed)
        flat = rows.flatten(0, 1).to(self.reference.dtype)
        inputs = flat.unflatten(1, self.reference.event_shape)
        with torch.no_grad():
            old = self.reference.outputs(self.reference.tensors, inputs)
        new = self.reference.outputs(tensors, inputs)
        each = discrepancy(_pick(old, chosen), _pick(new, chosen), metric)
        each = each.double().unflatten(0, rows.shape[:2])
        return each.mean(1), each.std(1) / sqrt(each.shape[1])

    def _drawn_inputs(self, num_samples: int, seed: int) -> Float[Tensor, "c s d"]:
        """Gaussian inputs of each component, in antithetic pairs."""
        mean, factor = self._inputs.mean, self._input_factor
        generator = stream(seed, "function-space inputs", device=mean.device)
        half = (len(mean), -(-num_samples // 2), mean.shape[1])
        draws = torch.randn(half, generator=generator, dtype=mean.dtype, device=mean.device)
        normals = torch.cat([draws, -draws], dim=1)[:, :num_samples]
        spread = normals * factor.unsqueeze(1) if factor.dim() == 2 else normals @ factor.mT
        return mean.unsqueeze(1) + spread

    # --- what depends on the reference alone, made once ------------------------------------------

    @cached_property
    def _widest(self) -> int:
        """Entries of the largest state a closed form would need the covariance of."""
        graph = self.reference.graph
        states = [stage.affine.linear.out_features for stage in graph.stages]
        return max([graph.input_features, *states])

    @cached_property
    def _inputs(self) -> Moments:
        """With a whole covariance."""
        inputs = self.statistics.inputs
        if inputs.covariance.dim() == 3:
            return inputs
        return Moments(inputs.mean, torch.diag_embed(inputs.covariance))

    @cached_property
    def _input_factor(self) -> Tensor:
        """Standard deviations ``(c, d)``, or ``L`` with ``L L^T`` the covariance ``(c, d, d)``."""
        covariance = self.statistics.inputs.covariance
        if covariance.dim() == 2:
            return covariance.clamp(min=0).sqrt()
        values, vectors = torch.linalg.eigh(covariance)
        return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)

    @cached_property
    def _gates(self) -> tuple[Gates, ...]:
        return tuple(Gates(s.gate_mean, s.gate_square) for s in self.statistics.stages)

    @cached_property
    def _gated_steps(self) -> tuple[GatedStep, ...]:
        return gated_values(self.reference.graph, self._inputs, self._gates)

    @cached_property
    def _published_steps(self) -> tuple[GatedStep, ...]:
        return published_values(self.reference.graph, with_jitter(self._inputs), self._gates)

    @cached_property
    def _anchored_steps(self) -> tuple[AnchoredStep, ...]:
        return anchored_values(self.reference.graph, self._inputs, self.statistics.stages)

    @cached_property
    def _gaussian_steps(self) -> Any:
        from pushforward.function_space.gaussian import gaussian_values

        return gaussian_values(self.reference.graph, self._inputs)

    def _dtype_of(self, other: Other) -> torch.dtype:
        tensors = other.parameters() if isinstance(other, nn.Module) else other.values()
        kinds = [t.dtype for t in tensors if t.is_floating_point()]
        return kinds[0] if kinds else self.reference.dtype


def of_low_rank(inputs: Moments, rank: int) -> Moments:
    """The covariance of each component by its largest directions and the variance they leave.

    Parameters
    ----------
    inputs
        With whole covariances ``(c, d, d)``.
    rank
        Directions that are kept.

    Returns
    -------
    Moments
        Covariances ``U U^T + diag(rest)``, whole again: the diagonal is exact.
    """
    values, vectors = torch.linalg.eigh(inputs.covariance)
    factor = vectors[..., -rank:] * values[..., -rank:].clamp(min=0).sqrt().unsqueeze(-2)
    low = factor @ factor.mT
    rest = (inputs.covariance - low).diagonal(dim1=-2, dim2=-1).clamp(min=0)
    return Moments(inputs.mean, low + torch.diag_embed(rest))


def _pick(rows: Tensor, chosen: Tensor | None) -> Tensor:
    return rows if chosen is None else rows[..., chosen.to(rows.device)]


def _calibration_check(relative: float, ratios: Tensor) -> Check:
    seen = f"rms log(estimate / truth) {relative:.3f} on {len(ratios)} of {NUM_PROBES} probes"
    if len(ratios) == 0:
        return Check("calibrated", "warn", "no probe moved the outputs", "Measure on some data.")
    if relative > _LOUD:
        return Check(
            "calibrated",
            "warn",
            seen,
            "This closed form misses much of this network: keep layer_moments=True, or classes.",
        )
    return Check("calibrated", "pass", seen)


_LOUD = 0.5
