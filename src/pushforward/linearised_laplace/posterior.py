"""A Gaussian posterior over the weights of the linear model, and what it predicts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import log
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.errors import DataError, NetworkError, ResourceError
from pushforward.linearised_laplace.exact import DualFactor, PrimalFactor
from pushforward.linearised_laplace.linear_model import Offset
from pushforward.linearised_laplace.prediction import Prediction
from pushforward.linearised_laplace.priors import Prior
from pushforward.linearised_laplace.sampled import Round
from pushforward.networks.checksums import checksums
from pushforward.networks.data import Batch, Examples
from pushforward.networks.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.networks.problem import activation_bytes
from pushforward.networks.tangent import Tangent
from pushforward.options import choice, number
from pushforward.runs.estimate import Check, Cost, Estimate, Status, to_jsonable, worst_status
from pushforward.runs.plan import Plan, available_memory, format_bytes
from pushforward.runs.progress import track
from pushforward.typing import Params

if TYPE_CHECKING:  # these modules import this one
    from pushforward.linearised_laplace.evaluation import Evaluation

__all__ = ["LaplacePosterior", "Link", "Prediction"]

Link = Literal["probit", "monte_carlo"]

_LINKS = ("probit", "monte_carlo")
_WORKSPACE = 2**26  # bytes of activations, or of a Jacobian
_DRAWS_AT_ONCE = 8
_NAMES_SHOWN = 4
_HIDDEN: dict[str, Any] = {"json": False}


@dataclass(frozen=True, eq=False)
class LaplacePosterior:
    """Gaussian posterior over a network's weights, linearised where they were trained.

    Made by `laplace`, or read from a file by `LaplacePosterior.load`. It uses the weights of the
    network and keeps no copy: when they have changed since, it predicts and saves no more
    (`NetworkError`) until they are back.

    Parameters
    ----------
    likelihood
        With its noise, given or learned.
    method
        ``"exact"`` or ``"sampled"``.
    offset
        Which linear model the prior was learned with.
    effective_dimension
        Directions in weight space that the data determine: trace of ``H^{-1} M``.
    layer_effective_dimension
        The same, layer by layer.
    log_evidence
        Of the linear model at its mode, in nats; None when it was not asked for.
    rounds
        How the prior was learned; empty when it was given.
    num_examples
        Of the training data.
    checks
        What was verified.
    cost
        What it took.
    plan
        What it was expected to take; None for a posterior from a file.
    num_draws
        Posterior draws, ``K``.
    seed
        Of the draws.
    temperature
        By which the posterior covariance is multiplied.
    model, prior, mode
        The network; the prior with its coordinates; the mode of the linear model in weight space,
        ``(P,)``, None when nothing was learned.
    """

    likelihood: Likelihood
    method: Literal["exact", "sampled"]
    offset: Offset
    effective_dimension: Estimate
    layer_effective_dimension: Estimate
    log_evidence: Estimate | None
    rounds: tuple[Round, ...]
    num_examples: int
    checks: tuple[Check, ...]
    cost: Cost
    plan: Plan | None
    num_draws: int
    seed: int
    model: FunctionalModel = field(metadata=_HIDDEN)
    prior: Prior = field(metadata=_HIDDEN)
    mode: Float[Tensor, " P"] | None = field(metadata=_HIDDEN)
    temperature: float = 1.0
    _factor: PrimalFactor | DualFactor | None = None
    _draws: Float[Tensor, "K P"] | None = None
    _checksums: Mapping[str, int] | None = None  # of the network when the posterior was made

    def __post_init__(self) -> None:
        if self._checksums is None:
            object.__setattr__(self, "_checksums", checksums(self._weights_and_buffers))

    @property
    def prior_precision(self) -> float | dict[str, float]:
        """Precision of the prior; of a layerwise one, by layer."""
        values = self.prior.precision.tolist()
        if self.prior.kind != "layerwise":
            return float(values[0])
        return dict(zip(self.prior.groups, values, strict=True))

    @property
    def noise_variance(self) -> float | tuple[float, ...] | None:
        """Of a Gaussian likelihood, in squared units of the targets; None for others."""
        return self.likelihood.noise_variance if isinstance(self.likelihood, Gaussian) else None

    @property
    def status(self) -> Status:
        """The worst status among the checks."""
        return worst_status(self.checks)

    @cached_property
    def draws(self) -> Float[Tensor, "K P"]:
        """Deviations from the trained weights, a posterior draw in each row, ``(K, P)``."""
        if self._draws is None:
            assert self._factor is not None
            drawn = self._factor.sample(self.num_draws, self.seed)
            unscaled = self.prior.scaled(drawn).to(self.model.dtype)
        else:
            unscaled = self._draws
        return unscaled if self.temperature == 1 else unscaled * self.temperature**0.5

    def weights(self) -> Params:
        """Posterior draws of the weights by name, each with a leading axis ``K``.

        Returns
        -------
        dict
            Trained weights plus deviations, for `torch.func.functional_call` under `vmap`.
        """
        self._require_unchanged()
        return self.prior.space.unravel(self.model.vector + self.draws)

    def with_temperature(self, temperature: float) -> LaplacePosterior:
        """The same posterior with its covariance multiplied.

        Parameters
        ----------
        temperature
            Positive; 1 is the posterior itself, towards 0 it becomes the trained network.

        Returns
        -------
        LaplacePosterior
            Sharing factor and draws.

        Raises
        ------
        OptionError
            When it is not positive and finite.
        """
        advice = "Give a positive number; 1 is the posterior itself."
        return replace(self, temperature=number(temperature, "temperature", above=0, advice=advice))

    def fit_temperature(self, validation: Any, link: Link = "probit") -> LaplacePosterior:
        """The same posterior with the temperature that makes validation data most likely.

        The prior that the evidence prefers can leave predictions under-confident; held-out data
        settle the size of the uncertainty, and leave its shape.

        Parameters
        ----------
        validation
            Inputs and targets that neither the network nor this posterior was made from.
        link
            With which it will predict; Poisson likelihoods take ``"monte_carlo"`` only.

        Returns
        -------
        LaplacePosterior
            Sharing factor and draws, with a check that says what was gained. The present
            temperature does not matter.

        Raises
        ------
        OptionError
            For a link that there is not.
        ResourceError
            When the moved outputs of all draws do not fit into memory (Monte Carlo only).
        """
        from pushforward.linearised_laplace.validation import fit_temperature

        self._require_unchanged()
        return fit_temperature(self, validation, link)

    def evaluate(
        self,
        data: Any,
        *,
        validation: Any = None,
        bins: int = 15,
        progress: bool | None = None,
    ) -> Evaluation:
        """How good the predictions are on held-out data, beside those of the network alone.

        Parameters
        ----------
        data
            Inputs and targets that the network was not trained on.
        validation
            More such data, not those in `data`, for a temperature-scaled network as the rival.
        bins
            Of the expected calibration error.
        progress
            Whether to show a bar; None: on a terminal, when it takes long.

        Returns
        -------
        Evaluation
            A row of scores for each way to predict.
        """
        from pushforward.linearised_laplace.evaluation import evaluate

        self._require_unchanged()
        return evaluate(self, data, validation=validation, bins=bins, progress=progress)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that predictions need, except the network, to a safetensors file.

        Parameters
        ----------
        path
            Replaced if it exists; folders are made.

        Raises
        ------
        OptionError
            When `path` is none, a folder, or in a folder that cannot be made.
        NetworkError
            When the network has changed since the posterior was made.
        """
        from pushforward.linearised_laplace.storage import save_posterior

        self._require_unchanged()
        save_posterior(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str], net: nn.Module | FunctionalModel) -> LaplacePosterior:
        """Read what `save` has written; predictions are the same bit for bit.

        Parameters
        ----------
        path
            The file.
        net
            The network with which the posterior was made, in evaluation mode.

        Returns
        -------
        LaplacePosterior
            On the device of the network.

        Raises
        ------
        WeightsError
            If the file is damaged, newer than this release, or of another network: the message says
            whether the parameters are others or only their values.
        NetworkError
            For what is no network, in training mode, or without weights yet.
        OptionError
            If `path` is none.
        """
        from pushforward.linearised_laplace.storage import load_posterior

        return load_posterior(path, net)

    def predict(
        self, x: Any, link: Link = "probit", *, progress: bool | None = False
    ) -> Prediction:
        """Outputs with their epistemic variance, and expected targets.

        Parameters
        ----------
        x
            Inputs: a tensor, a dict of tensors, or a loader. The last of a tuple of several is
            taken for the targets and ignored: several inputs without targets are a dict.
        link
            How uncertainty enters expected targets. ``"probit"``: in closed form from the variances
            (exact for Gaussian and Poisson likelihoods, else MacKay's approximation).
            ``"monte_carlo"``: the average over the draws, with their correlations.
        progress
            Whether to show a bar; None: on a terminal, when it takes long.

        Returns
        -------
        Prediction
            On the device and in the dtype of the network.

        Raises
        ------
        OptionError
            For another link.
        NetworkError
            When the network has changed since the posterior was made, or cannot take the inputs.
        """
        check_link(link)
        self._require_unchanged()
        examples = Examples.read(x, name="x", device=self.model.device, targets=False)
        parts = []
        with track(len(examples), "Predicting", enabled=progress) as advance:
            for batch in examples.batches(self._batch_size(examples)):
                parts.append(self._predict_batch(batch, link))
                advance(len(batch))
        columns = [torch.cat(column) for column in zip(*parts, strict=True)]
        mean, variance, error, expected = columns
        noise = None
        if isinstance(self.likelihood, Gaussian):
            noise = torch.as_tensor(self.likelihood.noise_variance).to(mean)
        return Prediction(
            mean,
            variance,
            noise,
            expected,
            self.likelihood.mean(mean),
            error,
            isinstance(self.likelihood, Categorical | Bernoulli),
        )

    def output_draws(self, x: Any, *, progress: bool | None = False) -> Float[Tensor, "K B *event"]:
        """Outputs of the linear model at every posterior draw: functions, seen at some inputs.

        They are correlated between inputs and between outputs as the posterior says, so whatever
        is not a mean or a variance (a quantile, the largest output, a difference) comes from here.

        Parameters
        ----------
        x
            Inputs, as in `predict`.
        progress
            Whether to show a bar; None: on a terminal, when it takes long.

        Returns
        -------
        Tensor
            ``(K, B, *event)``, before any link (logits, say), on the device and in the dtype of the
            network.

        Raises
        ------
        ResourceError
            When the outputs of all draws do not fit into memory.
        """
        self._require_unchanged()
        examples = Examples.read(x, name="x", device=self.model.device, targets=False)
        parts: list[Tensor] = []
        with track(len(examples), "Drawing outputs", enabled=progress) as advance:
            for batch in self._batches(examples):
                moved = self._moved(batch)
                if not parts:  # joined in the end: a second copy
                    require_memory(moved, len(examples), "x", moved.element_size())
                parts.append(self.model.predict(batch.inputs) + moved)
                advance(len(batch))
        return torch.cat(parts, 1)

    def log_likelihood(self, x: Any, y: Tensor | None = None, *, joint: bool = False) -> Estimate:
        """Log-probability of targets under the posterior predictive, by its draws.

        Parameters
        ----------
        x
            Inputs, or data with targets.
        y
            Targets, when `x` is inputs only.
        joint
            False: the mean over examples of their marginal log-probabilities. True: the
            log-probability of all targets together, which sees correlations between inputs.

        Returns
        -------
        Estimate
            In nats. Its standard error is over examples (marginal) or draws (joint: by the delta
            method on the average likelihood, too small when few draws carry it all).
        """
        began = perf_counter()
        self._require_unchanged()
        source = x if y is None else (x, y)
        examples = Examples.read(source, device=self.model.device)
        scores = torch.cat(
            [self._log_probabilities(b, examples.name) for b in self._batches(examples)], 1
        )
        count = log(len(scores))
        evaluations = len(examples) * (1 + len(scores))
        cost = Cost(0.0, perf_counter() - began, evaluations)
        if not joint:
            marginal = scores.logsumexp(0) - count
            error = (
                marginal.std() / len(marginal) ** 0.5 if len(marginal) > 1 else torch.tensor(0.0)
            )
            return Estimate(marginal.mean(), error, cost, f"{len(scores)} draws, marginal")
        total = scores.sum(1)
        weights = (total - total.logsumexp(0)).exp()
        error = (weights.square().sum() - 1 / len(total)).clamp(min=0).sqrt()
        share = float(weights.max())
        check = Check(
            "joint-draws",
            "warn" if share > 0.5 else "pass",
            f"the best draw carries {100 * share:.0f} % of the average",
            "Score fewer examples together, or take more draws." if share > 0.5 else "",
        )
        return Estimate(
            total.logsumexp(0) - count,
            error,
            cost,
            f"{len(scores)} draws, joint over {len(examples)} examples",
            (check,),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain Python objects, ready for JSON.

        Returns
        -------
        dict
            Without weights and draws.
        """
        fields: dict[str, Any] = to_jsonable(self)
        return fields | {
            "likelihood": self.likelihood.to_config(),
            "prior": self.prior.kind,
            "prior_precision": self.prior_precision,
            "noise_variance": self.noise_variance,
        }

    def __repr__(self) -> str:
        space, dimension = self.prior.space, self.effective_dimension
        error = float(dimension.standard_error)
        shown = f"{float(dimension):.4g}" + (f" ± {error:.2g}" if error > 0 else "")
        precision = self.prior_precision
        if isinstance(precision, dict):
            precise = ", ".join(f"{name} {value:.3g}" for name, value in precision.items())
        else:
            precise = f"{precision:.4g}"
        lines = [
            f"LaplacePosterior of {self.model.name}, {self.method}",
            f"  {space.size:,} weights in {len(space.layers)} layers, "
            f"{self.num_examples:,} examples",
            f"  prior              {self.prior.kind}, precision {precise}",
            f"  effective dimension {shown}",
        ]
        if isinstance(self.likelihood, Gaussian):
            lines.append(f"  noise variance     {self.noise_variance}")
        if self.log_evidence is not None:
            lines.append(f"  log evidence       {float(self.log_evidence):.2f}")
        if self.temperature != 1:
            lines.append(f"  temperature        {self.temperature:.3g}")
        lines.append(f"  cost               {self.cost}")
        lines += [f"  {check}" for check in self.checks if check.status != "pass"]
        return "\n".join(lines)

    @property
    def _weights_and_buffers(self) -> Params:
        return {**self.model.parameters, **self.model.frozen}

    def _require_unchanged(self) -> None:
        """Refuse to mix the covariance of one network with the outputs of another.

        The network's own tensors are used, not copies: whoever trains on changes them here too.

        Raises
        ------
        NetworkError
            With the tensors that are not those with which the posterior was made.
        """
        now, then = checksums(self._weights_and_buffers), self._checksums or {}
        changed = [name for name, value in now.items() if value != then.get(name)]
        if changed:
            raise NetworkError(
                f"its weights have changed since the posterior was made, in {len(changed)} of "
                f"{len(now)} tensors ({', '.join(changed[:_NAMES_SHOWN])}"
                f"{', ...' if len(changed) > _NAMES_SHOWN else ''})",
                where=self.model.name,
                advice="Load the weights back with which it was made, or make it again: "
                "pf.laplace(net, data, likelihood).",
            )

    def _predict_batch(self, batch: Batch, link: Link) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs, variance, error, moved = self._moments(batch, draws=link == "monte_carlo")
        if link == "probit":
            return outputs, variance, error, self.likelihood.probit_mean(outputs, variance)
        assert moved is not None
        return outputs, variance, error, self.likelihood.mean(outputs + moved).mean(0)

    def _moments(
        self, batch: Batch, *, draws: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Outputs, their epistemic variance, its standard error, and what the draws add to them.

        Returns
        -------
        tuple
            ``(B, *event)`` three times and ``(K, B, *event)``; the last is None when the variance
            is exact and no `draws` are wanted.
        """
        outputs = self.model.predict(batch.inputs)
        moved = self._moved(batch) if draws or self._factor is None else None
        if self._factor is not None:
            rows = self.prior.scaled(Tangent(self.model).jacobian(batch.inputs).double())
            form = self._factor.variance_form(rows).diagonal(dim1=1, dim2=2)
            variance = (self.temperature * form).reshape(outputs.shape).to(outputs.dtype)
            return outputs, variance, torch.zeros_like(variance), moved
        assert moved is not None
        variance = moved.square().mean(0)
        # K independent draws of a centred Gaussian: the mean square is a scaled chi-squared.
        return outputs, variance, variance * (2 / len(moved)) ** 0.5, moved

    def _log_probabilities(self, batch: Batch, name: str) -> Tensor:
        # In float64: a count of a million leaves nothing of float32 behind.
        outputs = self.model.predict(batch.inputs).double()
        assert batch.targets is not None
        targets = self.likelihood.check_targets(outputs, batch.targets, name)
        return self.likelihood.log_prob(outputs + self._moved(batch), targets)

    def _moved(self, batch: Batch) -> Tensor:
        moved = Tangent(self.model, _DRAWS_AT_ONCE).jvp(batch.inputs, self.draws)
        if not bool(torch.isfinite(moved).all()):
            raise DataError(
                "a posterior draw moves the outputs by NaN or infinity",
                where="x",
                advice="Check the inputs; in half precision, predict with a float32 network.",
            )
        return moved

    def _batches(self, examples: Examples) -> Iterator[Batch]:
        return examples.batches(self._batch_size(examples))

    def _batch_size(self, examples: Examples) -> int:
        probe = examples.select(torch.tensor([0]))
        outputs = self.model.predict(probe.inputs).numel()
        room = _WORKSPACE // activation_bytes(self.model, probe)
        if self._factor is not None:
            room = min(room, _WORKSPACE // (8 * outputs * self.prior.space.size))
        # The moved outputs of all draws are held at once.
        room = min(room, 8 * _WORKSPACE // (4 * self.num_draws * outputs))
        return int(max(1, min(1024, room // 2)))


def check_link(link: str) -> None:
    """Refuse a link that there is not.

    Raises
    ------
    OptionError
        With those that there are.
    """
    choice(link, "link", _LINKS)


def require_memory(
    moved: Float[Tensor, "K B *event"],
    examples: int,
    where: str,
    work: int,
    otherwise: str = "",
) -> None:
    """Refuse before what all draws add to the outputs fills the memory.

    Parameters
    ----------
    moved
        Of a first batch.
    examples
        In all.
    where
        Name of the data.
    work
        Bytes for each number besides its own.
    otherwise
        What else can be done than give fewer.

    Raises
    ------
    ResourceError
        With how much it would take.
    """
    each = moved[:, 0].numel() * (moved.element_size() + work)
    room = available_memory(moved.device)
    if each * examples > room:
        raise ResourceError(
            f"the moved outputs of {len(moved)} draws for {examples:,} examples need "
            f"{format_bytes(each * examples)} of memory where {format_bytes(room)} are available",
            where=where,
            advice=f"Give at most {room // each:,} examples{otherwise}.",
        )
