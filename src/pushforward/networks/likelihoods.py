"""Likelihoods: the law of targets given a network's outputs, with its curvature in linear time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import logsigmoid

from pushforward.errors import DataError, OptionError, ShapeError

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "Poisson",
    "likelihood_from_config",
]

NoiseVariance: TypeAlias = float | Tensor | np.ndarray[Any, np.dtype[Any]] | Sequence[float]

_LARGEST_RATE = 2.0**53  # beyond it neighbouring counts have the same float64


@dataclass(frozen=True)
class Likelihood(ABC):
    """The law of targets given outputs of a network, independent between examples.

    Outputs have shape ``(..., B, *event)``: a batch of B examples with C scalar outputs each, in
    any shape, behind any number of leading axes (draws). Targets have shape ``(B, ...)`` and are
    shared by the leading axes. Only `check_targets` looks at values; everything else is free of
    data-dependent branches and stays in the dtype and on the device of the outputs.

    ``B`` denotes the negative Hessian of the log-probability in the outputs of one example, a
    C × C matrix that is never formed: all products with it and with its factor cost O(C) time and
    memory. All links are canonical, so that it does not depend on the targets.
    """

    @abstractmethod
    def check_targets(
        self,
        outputs: Float[Tensor, "*outputs"],
        targets: Shaped[Tensor, "*targets"],
        where: str = "targets",
    ) -> Shaped[Tensor, "*checked"]:
        """Validate the targets of one batch and bring them into the form that all else expects.

        Parameters
        ----------
        outputs
            ``(B, *event)``, what the network says; only its shape, dtype and device are used.
        targets
            One target for each output, or one label for each row of classes. Where an example has
            a single target, a last axis of length one may be missing or superfluous.
        where
            How messages call the targets.

        Returns
        -------
        Tensor
            Same values on the device of the outputs: int64 labels for `Categorical`, otherwise the
            shape and dtype of the outputs.

        Raises
        ------
        ShapeError
            If the shapes do not fit.
        DataError
            For targets of a wrong kind or out of range; the message has the first one's position.
        """

    @abstractmethod
    def log_prob(
        self, outputs: Float[Tensor, "*outputs"], targets: Shaped[Tensor, "*targets"]
    ) -> Float[Tensor, "*batch"]:
        """Log-density of the targets with all its constants, in nats.

        Parameters
        ----------
        outputs
            ``(..., B, *event)``.
        targets
            ``(B, ...)``, as `check_targets` returns them.

        Returns
        -------
        Tensor
            ``(..., B)``, summed over the outputs of an example.

        Raises
        ------
        ShapeError
            If the shapes do not fit.
        """

    @abstractmethod
    def score(
        self, outputs: Float[Tensor, "*shape"], targets: Shaped[Tensor, "*targets"]
    ) -> Float[Tensor, "*shape"]:
        """Gradient of the log-probability in the outputs.

        Parameters
        ----------
        outputs
            ``(..., B, *event)``.
        targets
            ``(B, ...)``, as `check_targets` returns them.

        Returns
        -------
        Tensor
            Shape of the outputs.

        Raises
        ------
        ShapeError
            If the shapes do not fit.
        """

    @abstractmethod
    def curvature_product(
        self, outputs: Float[Tensor, "*outputs"], vectors: Float[Tensor, "*vectors"]
    ) -> Float[Tensor, "*vectors"]:
        """Product ``B v`` with the negative Hessian of the log-probability.

        Parameters
        ----------
        outputs
            ``(B, *event)``, where the Hessian is taken.
        vectors
            ``(..., B, *event)``.

        Returns
        -------
        Tensor
            Shape of the vectors.
        """

    @abstractmethod
    def curvature_factor(
        self, outputs: Float[Tensor, "*outputs"], noise: Float[Tensor, "*vectors"]
    ) -> Float[Tensor, "*vectors"]:
        """Product ``L e`` with the factor ``L Lᵀ = B``: of standard normal noise, a draw N(0, B).

        Parameters
        ----------
        outputs
            ``(B, *event)``, where the Hessian is taken.
        noise
            ``(..., B, *event)``.

        Returns
        -------
        Tensor
            Shape of the noise.
        """

    @abstractmethod
    def curvature_factor_adjoint(
        self, outputs: Float[Tensor, "*outputs"], vectors: Float[Tensor, "*vectors"]
    ) -> Float[Tensor, "*vectors"]:
        """Product ``Lᵀ v`` with the adjoint of the factor, so that ``‖Lᵀ v‖² = vᵀ B v``.

        Parameters
        ----------
        outputs
            ``(B, *event)``, where the Hessian is taken.
        vectors
            ``(..., B, *event)``.

        Returns
        -------
        Tensor
            Shape of the vectors.
        """

    @abstractmethod
    def mean(self, outputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Expected target ``E[y | f]``; of a label, the probabilities of the classes.

        Returns
        -------
        Tensor
            Shape of the outputs.
        """

    @abstractmethod
    def variance(self, outputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Variance ``Var[y | f]``, in squared units of the target; of a label, of its indicators.

        Returns
        -------
        Tensor
            Shape of the outputs.
        """

    @abstractmethod
    def probit_mean(
        self, outputs: Float[Tensor, "*shape"], variance: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """Expected target when the outputs are Gaussian, in closed form.

        Exact for `Gaussian` and `Poisson`; MacKay's approximation for `Bernoulli` and
        `Categorical`, whose error is a few hundredths of probability.

        Parameters
        ----------
        outputs
            ``(..., B, *event)``, means.
        variance
            Variances, same shape. Covariances between the outputs are not used.

        Returns
        -------
        Tensor
            Shape of the outputs.
        """

    @abstractmethod
    def sample(
        self, outputs: Float[Tensor, "*outputs"], generator: torch.Generator
    ) -> Shaped[Tensor, "*drawn"]:
        """Draw one target for each output, or one label for each row of classes.

        Parameters
        ----------
        outputs
            ``(..., B, *event)``.
        generator
            Source of the randomness; its device decides where the numbers are drawn.

        Returns
        -------
        Tensor
            ``(..., B, ...)`` on the device of the outputs, in the dtype of `check_targets`.

        Raises
        ------
        DataError
            If a Poisson rate is so large that its counts cannot be told apart.
        """

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Plain Python objects from which `likelihood_from_config` builds an equal likelihood.

        Returns
        -------
        dict
            Ready for JSON, with the key ``"kind"``.
        """


@dataclass(frozen=True)
class _Separate(Likelihood):
    """A likelihood in which every output has a target of its own: the curvature is diagonal."""

    def check_targets(
        self,
        outputs: Float[Tensor, "*outputs"],
        targets: Shaped[Tensor, "*targets"],
        where: str = "targets",
    ) -> Float[Tensor, "*outputs"]:
        """Values that the law can take, in the shape and dtype of the outputs."""
        if targets.is_complex():
            raise DataError(f"targets are {targets.dtype}", where=where, advice="Use real numbers.")
        targets = _in_shape(targets, outputs, tuple(outputs.shape), where)
        values = targets.to(outputs.dtype)
        bad, complaint = self._impossible(values)
        _refuse_first(bad, targets, complaint, where)
        return values

    def log_prob(
        self, outputs: Float[Tensor, "*outputs"], targets: Shaped[Tensor, "*targets"]
    ) -> Float[Tensor, "*batch"]:
        """Sum of the log-densities of an example's targets."""
        _check_batch(outputs, targets, 0)
        return _sum_event(self._log_density(outputs, targets), targets.dim() - 1)

    def score(
        self, outputs: Float[Tensor, "*shape"], targets: Shaped[Tensor, "*targets"]
    ) -> Float[Tensor, "*shape"]:
        """Derivative of each log-density in its own output."""
        _check_batch(outputs, targets, 0)
        return self._slope(outputs, targets)

    def curvature_product(
        self, outputs: Float[Tensor, "*outputs"], vectors: Float[Tensor, "*vectors"]
    ) -> Float[Tensor, "*vectors"]:
        """Each entry times the curvature of its output."""
        return self._curvature(outputs) * vectors

    def curvature_factor(
        self, outputs: Float[Tensor, "*outputs"], noise: Float[Tensor, "*vectors"]
    ) -> Float[Tensor, "*vectors"]:
        """Each entry times the root of the curvature of its output."""
        return self._curvature(outputs).sqrt() * noise

    def curvature_factor_adjoint(
        self, outputs: Float[Tensor, "*outputs"], vectors: Float[Tensor, "*vectors"]
    ) -> Float[Tensor, "*vectors"]:
        """The same as the factor, which is symmetric."""
        return self._curvature(outputs).sqrt() * vectors

    @abstractmethod
    def _impossible(self, targets: Tensor) -> tuple[Tensor, str]:
        """Where targets are values that the law cannot take, and what to say about them."""

    @abstractmethod
    def _log_density(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Log-density of each target."""

    @abstractmethod
    def _slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """First derivative of each log-density in its output."""

    @abstractmethod
    def _curvature(self, outputs: Tensor) -> Tensor:
        """Negative second derivative of each log-density in its output."""


@final
@dataclass(frozen=True, init=False)
class Gaussian(_Separate):
    """Independent normal noise around every output: ``y ~ N(f, noise_variance)``.

    Parameters
    ----------
    noise_variance
        Variance of the noise, in squared units of the targets: a number, or one for each output
        along the last axis. None (default): to be learned; until `with_noise` sets it, methods
        that need it raise `OptionError`.

    Raises
    ------
    OptionError
        If a variance is not a positive finite number.

    Examples
    --------
    >>> import torch
    >>> Gaussian(0.25).log_prob(torch.zeros(1), torch.zeros(1))
    tensor([-0.2258])
    """

    noise_variance: float | tuple[float, ...] | None

    def __init__(self, noise_variance: NoiseVariance | None = None) -> None:
        variance = None if noise_variance is None else _read_variance(noise_variance)
        object.__setattr__(self, "noise_variance", variance)

    def with_noise(self, variance: NoiseVariance) -> Gaussian:
        """The same likelihood with this noise variance.

        Returns
        -------
        Gaussian
            A new object.

        Raises
        ------
        OptionError
            If a variance is not a positive finite number.
        """
        return Gaussian(variance)

    def mean(self, outputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The outputs themselves."""
        return outputs

    def variance(self, outputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The noise variance, expanded to the outputs."""
        return self._noise(outputs).expand(outputs.shape)

    def probit_mean(
        self,
        outputs: Float[Tensor, "*shape"],
        variance: Float[Tensor, "*shape"],  # noqa: ARG002
    ) -> Float[Tensor, "*shape"]:
        """The outputs themselves, whatever their variance."""
        return outputs

    def sample(
        self, outputs: Float[Tensor, "*outputs"], generator: torch.Generator
    ) -> Shaped[Tensor, "*drawn"]:
        """``f + σ e``."""
        noise = torch.empty(outputs.shape, dtype=outputs.dtype, device=generator.device)
        noise.normal_(generator=generator)
        return outputs + self._noise(outputs).sqrt() * noise.to(outputs.device)

    def to_config(self) -> dict[str, Any]:
        """``{"kind": "gaussian", "noise_variance": ...}``."""
        noise = self.noise_variance
        return {
            "kind": "gaussian",
            "noise_variance": list(noise) if isinstance(noise, tuple) else noise,
        }

    def _impossible(self, targets: Tensor) -> tuple[Tensor, str]:
        # Only here is the batch axis known: outputs (B,) have no axis for several variances.
        if isinstance(self.noise_variance, tuple):
            _check_length(self.noise_variance, tuple(targets.shape[1:]))
        return ~torch.isfinite(targets), "not a finite number"

    def _log_density(self, outputs: Tensor, targets: Tensor) -> Tensor:
        noise = self._noise(outputs)
        return -0.5 * ((targets - outputs).square() / noise + torch.log(2 * math.pi * noise))

    def _slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (targets - outputs) / self._noise(outputs)

    def _curvature(self, outputs: Tensor) -> Tensor:
        return self._noise(outputs).reciprocal()

    def _noise(self, like: Tensor) -> Tensor:
        """The variance as a tensor that broadcasts over the last axis.

        Returns
        -------
        Tensor
            ``()`` or ``(C,)``.

        Raises
        ------
        OptionError
            While the noise is still to be learned.
        """
        noise = self.noise_variance
        if noise is None:
            raise OptionError(
                "the noise variance is still to be learned",
                where="Gaussian",
                advice="Set it by with_noise(variance), or give Gaussian(noise_variance=...).",
            )
        if isinstance(noise, tuple):
            _check_length(noise, tuple(like.shape))
            return torch.tensor(noise, dtype=like.dtype, device=like.device)
        return torch.full((), noise, dtype=like.dtype, device=like.device)


@final
@dataclass(frozen=True)
class Bernoulli(_Separate):
    """An independent yes or no for every output, whose logit it is; targets are 0 or 1.

    Examples
    --------
    >>> import torch
    >>> Bernoulli().log_prob(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
    tensor([-1.3863])
    """

    def mean(self, outputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Probability of a one."""
        return torch.sigmoid(outputs)

    def variance(self, outputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``p (1 − p)``."""
        return torch.sigmoid(outputs) * torch.sigmoid(-outputs)

    def probit_mean(
        self, outputs: Float[Tensor, "*shape"], variance: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """``sigmoid(κ f)`` with ``κ = (1 + π v/8)^{−1/2}``."""
        return torch.sigmoid(_kappa(variance) * outputs)

    def sample(
        self, outputs: Float[Tensor, "*outputs"], generator: torch.Generator
    ) -> Shaped[Tensor, "*drawn"]:
        """Ones where a uniform number falls below the probability."""
        uniform = torch.empty(outputs.shape, dtype=outputs.dtype, device=generator.device)
        uniform.uniform_(generator=generator)
        return (uniform.to(outputs.device) < torch.sigmoid(outputs)).to(outputs.dtype)

    def to_config(self) -> dict[str, Any]:
        """``{"kind": "bernoulli"}``."""
        return {"kind": "bernoulli"}

    def _impossible(self, targets: Tensor) -> tuple[Tensor, str]:
        return (targets != 0) & (targets != 1), "neither 0 nor 1"

    def _log_density(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return logsigmoid((2 * targets - 1) * outputs)

    def _slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        # y - sigmoid(f) would cancel where the two agree.
        sign = 2 * targets - 1
        return sign * torch.sigmoid(-sign * outputs)

    def _curvature(self, outputs: Tensor) -> Tensor:
        return self.variance(outputs)


@final
@dataclass(frozen=True)
class Poisson(_Separate):
    """An independent count for every output, the logarithm of its rate; targets 0, 1, 2, ...

    Rates are held at half the largest number of the dtype.

    Examples
    --------
    >>> import torch
    >>> Poisson().log_prob(torch.zeros(1), torch.tensor([2.0]))
    tensor([-1.6931])
    """

    def mean(self, outputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rate, ``exp f``."""
        return _rate(outputs)

    def variance(self, outputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rate, ``exp f``."""
        return _rate(outputs)

    def probit_mean(
        self, outputs: Float[Tensor, "*shape"], variance: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """``exp(f + v/2)``, exact."""
        return _rate(outputs + 0.5 * variance)

    def sample(
        self, outputs: Float[Tensor, "*outputs"], generator: torch.Generator
    ) -> Shaped[Tensor, "*drawn"]:
        """Counts; rates beyond 2⁵³ are refused."""
        rate = _rate(outputs.detach())
        complaint = "a rate beyond 2**53, whose counts cannot be told apart"
        _refuse_first(rate > _LARGEST_RATE, rate, complaint, "outputs")
        return torch.poisson(rate.to(generator.device), generator=generator).to(outputs.device)

    def to_config(self) -> dict[str, Any]:
        """``{"kind": "poisson"}``."""
        return {"kind": "poisson"}

    def _impossible(self, targets: Tensor) -> tuple[Tensor, str]:
        counts = torch.isfinite(targets) & (targets >= 0) & (targets == targets.round())
        return ~counts, "not a count 0, 1, 2, ..."

    def _log_density(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return targets * outputs - _rate(outputs) - torch.lgamma(targets + 1)

    def _slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return targets - _rate(outputs)

    def _curvature(self, outputs: Tensor) -> Tensor:
        return _rate(outputs)


@final
@dataclass(frozen=True)
class Categorical(Likelihood):
    """One label out of C classes; the outputs are logits, the classes their last axis.

    Outputs ``(B, C)`` go with labels ``(B,)``; outputs ``(B, T, C)`` with ``(B, T)``, one label for
    each of T positions, over which the log-probability is summed. Labels are integers from 0 to
    C − 1.

    Notes
    -----
    ``B = diag(p) − p pᵀ`` has the factor ``L = (I − p 1ᵀ) diag(√p)``, applied in O(C).

    Examples
    --------
    >>> import torch
    >>> Categorical().log_prob(torch.zeros(1, 4), torch.tensor([2]))
    tensor([-1.3863])
    """

    def check_targets(
        self,
        outputs: Float[Tensor, "*outputs"],
        targets: Shaped[Tensor, "*targets"],
        where: str = "targets",
    ) -> Shaped[Tensor, "*checked"]:
        """Integer labels from 0 to C − 1, in int64."""
        if outputs.dim() < 2 or outputs.shape[-1] < 2:
            raise ShapeError(
                f"outputs of shape {tuple(outputs.shape)} have no axis with two classes or more",
                where="Categorical",
                advice="Put the classes on the last axis; one logit is what Bernoulli() takes.",
            )
        if targets.dtype == torch.bool or targets.is_floating_point() or targets.is_complex():
            raise DataError(
                f"labels are {targets.dtype}",
                where=where,
                advice="Give integers: targets.long(), or targets.argmax(-1) for one-hot rows.",
            )
        classes = outputs.shape[-1]
        labels = _in_shape(targets, outputs, tuple(outputs.shape[:-1]), where).long()
        outside = (labels < 0) | (labels >= classes)
        _refuse_first(outside, labels, f"outside the classes 0 to {classes - 1}", where)
        return labels

    def log_prob(
        self, outputs: Float[Tensor, "*outputs"], targets: Shaped[Tensor, "*targets"]
    ) -> Float[Tensor, "*batch"]:
        """``f_y − log Σ_c exp f_c``, summed over the positions of an example."""
        _check_batch(outputs, targets, 1)
        index = targets.expand(outputs.shape[:-1]).unsqueeze(-1)
        chosen = outputs.log_softmax(-1).gather(-1, index).squeeze(-1)
        return _sum_event(chosen, targets.dim() - 1)

    def score(
        self, outputs: Float[Tensor, "*shape"], targets: Shaped[Tensor, "*targets"]
    ) -> Float[Tensor, "*shape"]:
        """``onehot(y) − p``."""
        _check_batch(outputs, targets, 1)
        index = targets.expand(outputs.shape[:-1]).unsqueeze(-1)
        one = outputs.new_ones(()).expand(index.shape)
        return outputs.softmax(-1).neg().scatter_add(-1, index, one)

    def curvature_product(
        self, outputs: Float[Tensor, "*outputs"], vectors: Float[Tensor, "*vectors"]
    ) -> Float[Tensor, "*vectors"]:
        """``p ⊙ (v − pᵀv)``."""
        p = outputs.softmax(-1)
        return p * (vectors - (p * vectors).sum(-1, keepdim=True))

    def curvature_factor(
        self, outputs: Float[Tensor, "*outputs"], noise: Float[Tensor, "*vectors"]
    ) -> Float[Tensor, "*vectors"]:
        """``√p ⊙ e − p (√pᵀe)``."""
        p = outputs.softmax(-1)
        scaled = p.sqrt() * noise
        return scaled - p * scaled.sum(-1, keepdim=True)

    def curvature_factor_adjoint(
        self, outputs: Float[Tensor, "*outputs"], vectors: Float[Tensor, "*vectors"]
    ) -> Float[Tensor, "*vectors"]:
        """``√p ⊙ (v − pᵀv)``."""
        p = outputs.softmax(-1)
        return p.sqrt() * (vectors - (p * vectors).sum(-1, keepdim=True))

    def mean(self, outputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Probabilities of the classes."""
        return outputs.softmax(-1)

    def variance(self, outputs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``p (1 − p)``, class by class."""
        p = outputs.softmax(-1)
        return p * (1 - p)

    def probit_mean(
        self, outputs: Float[Tensor, "*shape"], variance: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """``softmax(κ ⊙ f)`` with ``κ_c = (1 + π v_c/8)^{−1/2}``, class by class."""
        # With unequal variances this depends on a constant added to all logits, as MacKay's
        # formula does wherever it is applied class by class.
        return (_kappa(variance) * outputs).softmax(-1)

    def sample(
        self, outputs: Float[Tensor, "*outputs"], generator: torch.Generator
    ) -> Shaped[Tensor, "*drawn"]:
        """Labels by the race of exponential clocks: class c wins with probability ``p_c``."""
        clocks = torch.empty(outputs.shape, dtype=outputs.dtype, device=generator.device)
        clocks.exponential_(generator=generator)
        return (outputs - clocks.to(outputs.device).log()).argmax(-1)

    def to_config(self) -> dict[str, Any]:
        """``{"kind": "categorical"}``."""
        return {"kind": "categorical"}


def likelihood_from_config(config: Mapping[str, Any]) -> Likelihood:
    """Build the likelihood that `Likelihood.to_config` described.

    Parameters
    ----------
    config
        A mapping with the key ``"kind"``, and ``"noise_variance"`` for ``"gaussian"``.

    Returns
    -------
    Likelihood
        Equal to the one that was described.

    Raises
    ------
    OptionError
        For an unknown kind, unknown settings or settings out of range.

    Examples
    --------
    >>> likelihood_from_config({"kind": "gaussian", "noise_variance": 0.5})
    Gaussian(noise_variance=0.5)
    """
    kinds = {
        "gaussian": Gaussian,
        "categorical": Categorical,
        "bernoulli": Bernoulli,
        "poisson": Poisson,
    }
    settings = {str(key): value for key, value in config.items() if key != "kind"}
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise OptionError(
            f"{kind!r} is not a likelihood",
            where="likelihood",
            advice=f"Use one of {', '.join(kinds)} as its kind.",
        )
    allowed = {"noise_variance"} if kind == "gaussian" else set()
    if unknown := sorted(set(settings) - allowed):
        raise OptionError(
            f"{kind} has no setting {unknown[0]!r}",
            where="likelihood",
            advice=f"Leave it out; allowed: {', '.join(sorted(allowed)) or 'none'}.",
        )
    return kinds[kind](**settings)


def _kappa(variance: Tensor) -> Tensor:
    """MacKay's factor, which moderates a logit by its variance."""
    return torch.rsqrt(1 + (math.pi / 8) * variance)


def _rate(outputs: Tensor) -> Tensor:
    """``exp f``, held below overflow: an infinite rate times zero would be NaN."""
    largest = torch.finfo(outputs.dtype).max / 2  # a half, as the logarithm is rounded
    return outputs.clamp(max=math.log(largest)).exp()


def _sum_event(values: Tensor, dimensions: int) -> Tensor:
    return values.sum(tuple(range(-dimensions, 0))) if dimensions else values


def _read_variance(value: NoiseVariance) -> float | tuple[float, ...]:
    """Floats, so that likelihoods compare, hash and write themselves; one entry is a number.

    Returns
    -------
    float or tuple of float
        One variance, or one for each output.

    Raises
    ------
    OptionError
        If a variance is not a positive finite number.
    """
    try:
        if isinstance(value, Tensor):
            value = value.detach().to("cpu", torch.float64).numpy()
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        array = np.empty((0,))
    valid = array.ndim <= 1 and array.size > 0
    bad = [] if not valid else np.flatnonzero(~(np.isfinite(array) & (array > 0))).tolist()
    if not valid or bad:
        at = f" at position {bad[0]}" if bad and array.ndim else ""
        what = f"{array.flat[bad[0]]:g}{at}" if bad else repr(value)
        raise OptionError(
            f"{what} is not a noise variance",
            where="noise_variance",
            advice="Give a positive finite number, one for each output, or None to learn it.",
        )
    return float(array.flat[0]) if array.size == 1 else tuple(array.tolist())


def _check_length(noise: tuple[float, ...], event: tuple[int, ...]) -> None:
    if not event or event[-1] != len(noise):
        last = f"{event[-1]} outputs along the last axis" if event else "one output per example"
        raise ShapeError(
            f"{len(noise)} noise variances for {last}",
            where="noise_variance",
            advice="Give a single number, or one for each output.",
        )


def _check_batch(outputs: Tensor, targets: Tensor, class_axes: int) -> None:
    """Refuse shapes that would broadcast into something else than one target for each output."""
    shape = tuple(outputs.shape[: outputs.dim() - class_axes])
    if targets.dim() == 0 or shape[-targets.dim() :] != tuple(targets.shape):
        raise ShapeError(
            f"targets have shape {tuple(targets.shape)}, outputs {tuple(outputs.shape)}",
            where="targets",
            advice="Pass them through check_targets first.",
        )


def _in_shape(targets: Tensor, outputs: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    """The targets on the outputs' device, with a last axis of length one added or taken away.

    Returns
    -------
    Tensor
        Of the wanted shape.

    Raises
    ------
    ShapeError
        If the targets have another shape.
    """
    targets = targets.detach().to(outputs.device)
    if tuple(targets.shape) == shape:
        return targets
    single = math.prod(shape[1:]) == 1 and math.prod(targets.shape[1:]) == 1
    if not single or not targets.dim() or len(targets) != shape[0]:
        raise ShapeError(
            f"targets have shape {tuple(targets.shape)}, the outputs {tuple(outputs.shape)} "
            f"need {shape}",
            where=where,
            advice="Give one target for each output, or one integer label for each row of "
            "classes, which are the last axis.",
        )
    return targets.reshape(shape)


def _refuse_first(bad: Tensor, values: Tensor, complaint: str, where: str) -> None:
    """Refuse with the position of the first entry that is wrong, if there is one."""
    if not bool(bad.any()):
        return
    position = tuple(bad.nonzero()[0].tolist())
    value = values[position].item()
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    at = ", ".join(map(str, position))
    raise DataError(
        f"{shown} at position [{at}] is {complaint}",
        where=where,
        advice="Correct or leave out this example.",
    )
