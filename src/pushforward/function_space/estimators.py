"""The estimators of a distance from what a summary keeps, each made ready once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from pushforward.errors import NetworkError, OptionError, ResourceError
from pushforward.function_space.anchored import AnchoredStep, anchored_values, push_anchored
from pushforward.function_space.chain import Change, Moments, affine_changes
from pushforward.function_space.gated import GatedStep, Gates, gated_values, push_gated
from pushforward.function_space.gaussian import GaussianStep, gaussian_values, push_gaussian
from pushforward.function_space.metrics import (
    Metric,
    check_axes,
    check_metric,
    check_probabilities,
    discrepancy,
)
from pushforward.function_space.network import Other, ReferenceNetwork, select_outputs
from pushforward.function_space.output_change import OutputAnchor, mean_discrepancy
from pushforward.function_space.published import published_values, push_published, with_jitter
from pushforward.function_space.sampled import sampled_outputs
from pushforward.function_space.statistics import LowRankMoments, Statistics
from pushforward.function_space.synthetic import SyntheticRun
from pushforward.function_space.synthetic_inputs import (
    SyntheticInputs,
    covariance_factor,
    draw_gaussian,
    token_inputs,
)
from pushforward.function_space.token_law import TokenLaw
from pushforward.networks.graph import NetworkGraph
from pushforward.options import choice, whole_number
from pushforward.runs.plan import format_bytes
from pushforward.runs.rng import stream

__all__ = ["DEFAULT", "Estimator", "Estimators"]

Estimator: TypeAlias = Literal["gated", "gaussian", "anchored", "reference", "sampled", "synthetic"]
"""How a distance is estimated."""

DEFAULT: Estimator = "synthetic"
"""On every network measured the most accurate in the euclidean metric, and in all metrics where
classes are kept apart; and the cheapest from 100 units on."""

_ANCHORING = 1024  # draws of each component that decide how outputs are anchored
_TOO_WIDE = 8192  # units of a stage, beyond which covariances are not formed


@dataclass(frozen=True, eq=False)
class Estimators:
    """What depends on the reference and its data alone, made when it is first needed.

    Parameters
    ----------
    reference
        The network.
    kept
        Statistics of the data.
    tokens
        As in `pushforward.function_space.summary.FunctionSummary`.
    """

    reference: ReferenceNetwork
    kept: Statistics
    tokens: tuple[TokenLaw, ...]

    @property
    def num_components(self) -> int:
        """Classes or clusters that are kept apart."""
        return len(self.kept.counts)

    def components(
        self,
        other: Other,
        *,
        metric: Metric,
        estimator: Estimator | None,
        outputs: slice | Sequence[int] | Tensor | None,
        num_samples: int,
        seed: int,
    ) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Mean discrepancy of each component.

        Parameters
        ----------
        other, metric, estimator, outputs, num_samples, seed
            As in `pushforward.function_space.summary.FunctionSummary.distance`.

        Returns
        -------
        values : Tensor
            ``(c,)``, float64, differentiable in the weights of `other`.
        standard_errors : Tensor
            ``(c,)``, of the draws; 0 in closed form.

        Raises
        ------
        OptionError
            For options out of range, or an estimator that needs what was not kept.
        ResourceError
            When a closed form would need covariances of layers that are too wide.
        NetworkError
            When outputs are not finite.
        """
        wanted = torch.is_grad_enabled()
        # What is kept for the next call must not be of inference mode; to leave it turns gradients
        # on.
        with torch.inference_mode(False), torch.set_grad_enabled(wanted):
            values, errors = self._components(
                other, metric, estimator or DEFAULT, outputs, num_samples, seed
            )
        if not bool(torch.isfinite(values.detach()).all()):
            raise NetworkError(
                "its outputs are not finite, or too large to be squared",
                where="other",
                advice="Load a checkpoint from before training diverged.",
            )
        return values, errors

    def _components(
        self,
        other: Other,
        metric: Metric,
        estimator: Estimator,
        outputs: slice | Sequence[int] | Tensor | None,
        num_samples: int,
        seed: int,
    ) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        check_metric(metric)
        choice(estimator, "estimator", get_args(Estimator))
        num_samples = whole_number(num_samples, "num_samples", least=2)
        check_axes(self.reference.output_shape, metric)
        chosen = select_outputs(self.kept.outputs.fisher.shape[-1], outputs)
        check_probabilities(
            self.kept.outputs.fisher.shape[-1] if chosen is None else len(chosen), metric
        )
        tensors = self.reference.tensors_of(other)
        if estimator == "synthetic":
            run = self._synthetic(num_samples, seed)
            component = run.sample.component.to(self.reference.device)

            def adjusted(old: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
                # Inputs that are drawn leave the network less sure than the data do. In metrics of
                # probabilities that matters, and class by class an affine map repairs it.
                anchor = self._output_anchor
                if metric == "fisher" and chosen is None and self.num_components == 1:
                    # One law for all data cannot say how sure the network is where; the data did.
                    change = change @ anchor.curvature[0]
                return anchor.apply(old, component), change

            drawn = run.distance(
                tensors, metric, chosen, adjusted=None if metric == "euclidean" else adjusted
            )
            return drawn.component_values, drawn.component_errors
        graph = self.reference.graph_of(tensors)
        if estimator == "sampled":
            flat, _ = self._drawn_inputs(num_samples, seed)
            rows = flat.to(self.reference.device).unflatten(0, (self.num_components, -1))
            generator = stream(seed, "function-space gates", device=rows.device)
            old, moved = sampled_outputs(self.reference.graph, graph, rows, self._gates, generator)
            each = discrepancy(_pick(old, chosen), _pick(old + moved, chosen), metric)
            return each.mean(1), each.std(1) / sqrt(each.shape[1])
        change, closure = self._closed_form(graph, estimator)
        values = mean_discrepancy(
            change,
            closure,
            self.kept.outputs,
            metric,
            chosen=chosen,
            moved=not self.reference.unchanged(tensors),
            num_samples=max(2, num_samples // self.num_components),
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
            if any(stage.layer is None for stage in self.kept.stages):
                raise OptionError(
                    "this summary has no moments of the layers",
                    where='estimator="anchored"',
                    advice="Make it with pf.summarize(..., layer_moments=True).",
                )
            anchored = self._anchored_steps
            return push_anchored(own, graph, inputs, anchored), self._outputs_of(anchored, inputs)
        prepared = self._gaussian_steps
        return push_gaussian(own, graph, inputs, prepared), self._outputs_of(prepared, inputs)

    def _outputs_of(self, steps: Sequence[Any], inputs: Moments) -> Moments:
        values = steps[-1].after if steps else inputs
        own = self.reference.graph
        return affine_changes(own, own)[1].push(values)

    def _synthetic(self, num_samples: int, seed: int) -> SyntheticRun:
        """The reference on drawn inputs; the last one is kept for the next distance."""
        known = self._runs.get((num_samples, seed))
        if known is None:
            known = self._run(num_samples, seed)
            self._runs.clear()
            self._runs[num_samples, seed] = known
        return known

    def _run(self, num_samples: int, seed: int) -> SyntheticRun:
        if self.tokens:
            sample = token_inputs(
                self.reference, self.tokens, self._weights, num=num_samples, seed=seed
            )
        else:
            rows, component = self._drawn_inputs(num_samples, seed)
            shaped = rows.unflatten(1, self.reference.event_shape)
            inputs = shaped.to(self.reference.device, self.reference.dtype)
            sample = SyntheticInputs(inputs, component, self._weights, antithetic=True)
        return SyntheticRun.of(self.reference, sample)

    def _drawn_inputs(
        self, num_samples: int, seed: int
    ) -> tuple[Float[Tensor, "n d"], Int64[Tensor, " n"]]:
        """Gaussian inputs in antithetic pairs, as many of each component."""
        each = max(2, num_samples // (2 * self.num_components)) * 2
        counts = torch.full((self.num_components,), each)
        generator = stream(seed, "function-space inputs")
        rows, component = draw_gaussian(self._mean, self._factor, counts, generator)
        if self._own_spread is not None:
            nowhere = torch.zeros_like(self._own_spread)
            rows = rows + draw_gaussian(nowhere, self._own_spread, counts, generator)[0]
        return rows, component

    # --- what depends on the reference alone, made once ------------------------------------------

    @cached_property
    def _widest(self) -> int:
        """Entries of the largest state a closed form would need the covariance of."""
        graph = self.reference.graph
        states = [stage.affine.linear.out_features for stage in graph.stages]
        return max([graph.input_features, *states])

    @property
    def _kept_inputs(self) -> Moments | LowRankMoments:
        if self.kept.inputs is None:
            raise OptionError(
                "the inputs are no numbers and have no moments",
                where="estimator",
                advice='Use estimator="synthetic".',
            )
        return self.kept.inputs

    @cached_property
    def _inputs(self) -> Moments:
        """With a whole covariance."""
        inputs = self._kept_inputs
        if isinstance(inputs, LowRankMoments):
            return inputs.whole
        if inputs.covariance.dim() == 3:
            return inputs
        return Moments(inputs.mean, torch.diag_embed(inputs.covariance))

    @cached_property
    def _mean(self) -> Float[Tensor, "c d"]:
        """On the CPU, where inputs are drawn."""
        return self._kept_inputs.mean.cpu()

    @cached_property
    def _factor(self) -> Float[Tensor, "c d r"] | Float[Tensor, "c d"]:
        """``L`` with ``L L^T`` the covariance, or part of it; on the CPU."""
        inputs = self._kept_inputs
        if isinstance(inputs, LowRankMoments):
            return inputs.factor.cpu()
        return covariance_factor(inputs.covariance.cpu())

    @cached_property
    def _own_spread(self) -> Float[Tensor, "c d"] | None:
        """Standard deviations that a factor of low rank leaves to every entry of the input."""
        inputs = self.kept.inputs
        return inputs.rest.cpu().sqrt() if isinstance(inputs, LowRankMoments) else None

    @cached_property
    def _output_anchor(self) -> OutputAnchor:
        each = max(_ANCHORING, 20 * self.kept.outputs.fisher.shape[-1])
        run = self._run(each * self.num_components, 0)
        component = run.sample.component.to(run.outputs.device)
        return OutputAnchor.of(run.outputs.double(), component, self.kept.outputs)

    @cached_property
    def _runs(self) -> dict[tuple[int, int], SyntheticRun]:
        return {}

    @cached_property
    def _gates(self) -> tuple[Gates, ...]:
        return tuple(Gates(s.gate_mean, s.gate_square) for s in self.kept.stages)

    @cached_property
    def _gated_steps(self) -> tuple[GatedStep, ...]:
        return gated_values(self.reference.graph, self._inputs, self._gates)

    @cached_property
    def _published_steps(self) -> tuple[GatedStep, ...]:
        return published_values(self.reference.graph, with_jitter(self._inputs), self._gates)

    @cached_property
    def _anchored_steps(self) -> tuple[AnchoredStep, ...]:
        layers = [stage.layer for stage in self.kept.stages if stage.layer is not None]
        return anchored_values(self.reference.graph, self._inputs, layers)

    @cached_property
    def _gaussian_steps(self) -> tuple[GaussianStep, ...]:
        return gaussian_values(self.reference.graph, self._inputs)

    @property
    def _weights(self) -> Float64[Tensor, " c"]:
        return (self.kept.counts / self.kept.counts.sum()).cpu()


def _pick(rows: Tensor, chosen: Tensor | None) -> Tensor:
    return rows if chosen is None else rows[..., chosen.to(rows.device)]
