"""The one call: from a trained network and its data to a posterior over its weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.errors import DataError, NetworkError, OptionError
from pushforward.linalg.lanczos import quadratic_forms
from pushforward.linearised_laplace.exact import dual_factor, primal_factor
from pushforward.linearised_laplace.exact_fit import fit_exactly
from pushforward.linearised_laplace.linear_model import LinearModel, Offset
from pushforward.linearised_laplace.mode import find_mode
from pushforward.linearised_laplace.plan import (
    choose_method,
    exact_plan,
    recyclable,
    sampled_plan,
    use_weights,
)
from pushforward.linearised_laplace.posterior import LaplacePosterior
from pushforward.linearised_laplace.priors import Prior
from pushforward.linearised_laplace.resumable import run
from pushforward.linearised_laplace.sampled import (
    SMALLEST_NOISE,
    SampledState,
    SampledTask,
    current_likelihood,
)
from pushforward.networks.data import Examples
from pushforward.networks.head import split_head
from pushforward.networks.likelihoods import Gaussian, Likelihood
from pushforward.networks.model import FunctionalModel
from pushforward.networks.problem import check_problem
from pushforward.options import choice, number, whole_number
from pushforward.runs.distributed import ProcessGrid
from pushforward.runs.estimate import Check, Cost, Estimate
from pushforward.runs.plan import Plan, available_memory
from pushforward.runs.progress import track
from pushforward.runs.rng import stream
from pushforward.runs.store import Checkpoint

__all__ = ["laplace", "plan_laplace"]

_FEW_DRAWS = 16
_PRUNED = 0.5  # directions
_EVIDENCE_PROBES, _EVIDENCE_STEPS = 8, 30
_WORKSPACE = {"cpu": 2**25, "cuda": 2**30}


@dataclass(frozen=True, eq=False)
class _Problem:
    """The arguments of a call, read and checked."""

    linear: LinearModel
    learn_prior: bool
    noise: float | None  # where learning begins; None when the noise is not learned
    model: FunctionalModel  # the whole network and its data;
    examples: Examples  # `linear` may have the network's end alone, and what reaches it


def laplace(
    net: nn.Module | FunctionalModel,
    data: Any,
    likelihood: Likelihood,
    *,
    method: Literal["auto", "exact", "sampled"] = "auto",
    subset: str | Iterable[str] | None = None,
    prior: Literal["isotropic", "layerwise", "gprior"] = "isotropic",
    prior_precision: float | Mapping[str, float] | Tensor | None = None,
    num_draws: int = 64,
    offset: Offset = "affine",
    tolerance: float = 0.1,
    block: int = 64,
    evidence: bool = False,
    data_shards: int | None = None,
    workspace: int | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> LaplacePosterior:
    """How sure a trained network is: the Gaussian posterior of its linearisation.

    The network is replaced by its tangent ``f(x) + J(x)(theta - theta*)`` at the trained weights.
    The posterior over the weights is then Gaussian with precision ``H = J^T B J + A`` (``B`` the
    curvature of the likelihood, ``A`` the prior's precision); predictions keep the network's own
    outputs as their mean and get ``J H^{-1} J^T`` as their epistemic covariance.

    Small problems are solved by Cholesky factorisation; large ones by posterior draws, each the
    solution of a linear system, all solved together by block conjugate gradients from products with
    the Jacobian alone. Nothing of size examples x outputs x weights is ever formed.

    Parameters
    ----------
    net
        Trained, in evaluation mode; or a `FunctionalModel`.
    data
        Its training data, always in the same order and without augmentation: a pair of tensors, or
        a loader of ``(inputs, targets)`` or of mappings.
    likelihood
        `Gaussian`, `Categorical`, `Bernoulli` or `Poisson`; ``Gaussian()`` learns its noise.
    method
        ``"exact"`` for up to about 5,000 weights or outputs, ``"sampled"`` for any size;
        ``"auto"`` chooses.
    subset
        Patterns of the parameters that are uncertain, such as ``"head.*"``. Default: all that
        require a gradient, without scale and shift of normalisation layers.
    prior
        ``"isotropic"``: one precision. ``"layerwise"``: one for each module, needed with
        normalisation layers. ``"gprior"``: one, in units of the features; it does not depend on
        how the network is parametrised.
    prior_precision
        A positive number, or one for each layer by name; None learns it from the data.
    num_draws
        Posterior draws. The relative standard error of a variance is ``sqrt(2 / num_draws)``.
    offset
        The linear model from which prior and noise are learned: ``"affine"`` is the tangent,
        ``"linear"`` drops its offset, ``J(x) theta``.
    tolerance
        Error of the sampled draws, relative to their spread over the training outputs.
    block
        Draws solved together. More converge in fewer passes and need more memory. Blocks are what
        processes share when `data_shards` leaves them draws to share.
    evidence
        Whether to estimate the log evidence of a sampled posterior; it costs about 30 passes with
        eight vectors. An exact posterior always has it.
    data_shards
        Under torchrun, processes that share the data; the rest share the blocks of draws. Default:
        all share the data, which gives the result of one process up to rounding.
    workspace
        Bytes of activations to hold at a time. Default 32 MiB on a CPU, whose caches it should not
        exceed by much, 1 GiB on a GPU.
    seed
        Of all noise.
    checkpoint
        Folder in which a sampled run keeps its state; the same call resumes it.
    progress
        Whether to show a bar; None: on a terminal, when it takes long.

    Returns
    -------
    LaplacePosterior
        Predicts, saves, and says how far to trust it.

    Raises
    ------
    OptionError
        For an option out of range, or when `subset` matches nothing.
    NetworkError
        For a network in training mode, in half precision, with weights that are not finite, or that
        cannot take the inputs.
    DataError
        For data that are empty, shuffled, augmented, not finite, or targets out of range.
    ShapeError
        When targets do not fit the outputs.
    ResourceError
        When it does not fit into memory; the message says what takes most.
    WeightsError
        When the checkpoint belongs to another network, other data or other settings.

    Examples
    --------
    >>> import torch, pushforward as pf
    >>> x = torch.linspace(-1, 1, 20).double().unsqueeze(1)
    >>> net = torch.nn.Linear(1, 1).double()
    >>> posterior = pf.laplace(net, (x, 2 * x), pf.Gaussian(0.01), prior_precision=1.0)
    >>> posterior.predict(x).epistemic_variance.shape
    torch.Size([20, 1])

    Notes
    -----
    The method, sections 4.1 to 4.7: the linear model and its evidence (arXiv 2206.08900), draws by
    optimisation and learning the prior from them (arXiv 2210.04994; arXiv 2404.19157).
    """
    began = perf_counter()
    problem = _read_problem(
        net, data, likelihood, subset, prior, prior_precision, offset, data_shards, workspace
    )
    num_draws, block = whole_number(num_draws, "num_draws"), whole_number(block, "block")
    tolerance = number(
        tolerance, "tolerance", above=0, below=1, advice="Give a number between 0 and 1: 0.1."
    )
    chosen = choose_method(method, problem.linear)
    problem = _without_the_fixed_part(problem, progress)
    problem.linear.require_finite_outputs()
    if chosen == "exact":
        return _exact(problem, num_draws, seed, progress, began)
    task = SampledTask(
        problem.linear,
        num_draws,
        seed,
        problem.learn_prior,
        problem.noise is not None,
        tolerance=tolerance,
        block=block,
        recycled=recyclable(problem.linear),
    )
    folder = None if checkpoint is None else Path(checkpoint)
    return _sampled(problem, task, folder, evidence, progress, began)


def plan_laplace(
    net: nn.Module | FunctionalModel,
    data: Any,
    likelihood: Likelihood,
    *,
    method: Literal["auto", "exact", "sampled"] = "auto",
    subset: str | Iterable[str] | None = None,
    prior: Literal["isotropic", "layerwise", "gprior"] = "isotropic",
    prior_precision: float | Mapping[str, float] | Tensor | None = None,
    num_draws: int = 64,
    block: int = 64,
    data_shards: int | None = None,
    workspace: int | None = None,
) -> Plan:
    """What `laplace` will need, without running it.

    Parameters
    ----------
    net, data, likelihood, method, subset, prior, prior_precision, num_draws, block, data_shards, \
workspace
        As in `laplace`.

    Returns
    -------
    Plan
        Memory, passes over the data and expected time.
    """
    problem = _read_problem(
        net, data, likelihood, subset, prior, prior_precision, "affine", data_shards, workspace
    )
    num_draws, block = whole_number(num_draws, "num_draws"), whole_number(block, "block")
    if choose_method(method, problem.linear) == "exact":
        return exact_plan(problem.linear)
    learn = problem.learn_prior or problem.noise is not None
    return sampled_plan(problem.linear, num_draws, block, learn=learn)


def _read_problem(
    net: nn.Module | FunctionalModel,
    data: Any,
    likelihood: Likelihood,
    subset: str | Iterable[str] | None,
    kind: str,
    precision: float | Mapping[str, float] | Tensor | None,
    offset: str,
    data_shards: int | None,
    workspace: int | None,
) -> _Problem:
    if not isinstance(likelihood, Likelihood):
        raise OptionError(
            f"{likelihood!r} is no likelihood",
            where="likelihood",
            advice="Pass pf.Gaussian(), pf.Categorical(), pf.Bernoulli() or pf.Poisson().",
        )
    choice(offset, "offset", ("affine", "linear"))
    if workspace is not None:
        workspace = whole_number(
            workspace, "workspace", advice="Give a positive whole number of bytes, or None."
        )
    model = FunctionalModel.of(net, subset)
    if model.dtype not in (torch.float32, torch.float64):
        raise NetworkError(
            f"its parameters are {model.dtype}, too coarse to solve linear systems in",
            where=model.name,
            advice="Use net.float(), and inputs of that type.",
        )
    start = 1.0 if precision is None else precision
    weights = Prior.start(kind, model.space, start, model.device)
    examples = Examples.read(data, device=model.device)
    noise = None
    if isinstance(likelihood, Gaussian) and likelihood.noise_variance is None:
        likelihood, noise = likelihood.with_noise(1.0), 1.0
    check_problem(model, examples, likelihood)
    linear = LinearModel(
        model,
        examples,
        likelihood,
        weights,
        "affine" if offset == "affine" else "linear",
        _WORKSPACE.get(model.device.type, 2**27) if workspace is None else workspace,
        _grid(data_shards),
    )
    if noise is not None:
        noise = _starting_noise(linear)
    return _Problem(linear, precision is None, noise, model, examples)


def _without_the_fixed_part(problem: _Problem, progress: bool | None) -> _Problem:
    """Of a network that is uncertain in its end alone, the rest is run only once."""
    examples = problem.linear.examples
    with track(len(examples), "Features of all examples", enabled=progress) as advance:
        found = split_head(problem.model, examples, advance)
    if found is None:
        return problem
    end, features = found
    return replace(problem, linear=replace(problem.linear, model=end, examples=features))


def _grid(data_shards: int | None) -> ProcessGrid:
    if data_shards is None:
        initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
        data_shards = torch.distributed.get_world_size() if initialised else 1
    return ProcessGrid.from_environment(data_shards)


def _starting_noise(linear: LinearModel) -> float:
    """The network's own mean squared error: too small when it overfits, which learning corrects.

    Returns
    -------
    float
        In squared units of the targets.

    Raises
    ------
    DataError
        When there is no error.
    """
    at_trained = replace(linear, offset="affine")
    count = len(linear.examples) * linear.num_outputs
    noise = float(at_trained.squared_residuals(linear.model.vector)) / count
    zero = torch.zeros_like(linear.model.vector)
    power = float(replace(linear, offset="linear").squared_residuals(zero)) / count
    if noise <= (16 * torch.finfo(linear.model.dtype).eps) ** 2 * power:
        raise DataError(
            "the network's outputs equal the targets up to rounding: there is no noise to learn",
            where=linear.examples.name,
            advice="Give the noise: pf.Gaussian(noise_variance=...).",
        )
    return noise


def _exact(
    problem: _Problem, num_draws: int, seed: int, progress: bool | None, began: float
) -> LaplacePosterior:
    linear = problem.linear
    plan = exact_plan(linear)
    plan.require(available_memory(linear.model.device))
    with track(len(linear.examples), "Jacobians of all examples", enabled=progress) as advance:
        counted = replace(linear, advance=advance)
        factor = primal_factor(counted) if use_weights(linear) else dual_factor(counted)
    prior = linear.prior.with_scale(factor.diagonal)
    scaled = factor.rescaled(prior.scale)
    if problem.learn_prior:
        weight = 1.0 if problem.noise is None else 1 / problem.noise
        prior = prior.matched_to(linear.model.vector, weight * factor.diagonal)
    linear = linear.with_prior(prior)
    with track(None, "Learning prior and noise", enabled=progress) as advance:
        fit = fit_exactly(
            linear,
            scaled,
            noise=problem.noise,
            learn_prior=problem.learn_prior,
            after_round=lambda _round: advance(1),
        )
    layers = fit.factor.effective_dimensions()
    cost = Cost(0.0, perf_counter() - began)
    checks = (
        *_prior_checks(fit.prior, layers, fit.settled or not fit.rounds),
        *_noise_checks(problem.noise, fit.noise_variance),
    )
    return LaplacePosterior(
        likelihood=current_likelihood(linear.likelihood, fit.noise_variance),
        method="exact",
        offset=linear.offset,
        effective_dimension=_exactly(layers.sum(), "Cholesky factorisation", cost),
        layer_effective_dimension=_exactly(layers, "Cholesky factorisation", cost),
        log_evidence=_exactly(
            torch.tensor(fit.log_evidence, dtype=torch.float64), "Cholesky factorisation", cost
        ),
        rounds=fit.rounds,
        num_examples=len(linear.examples),
        checks=checks,
        cost=cost,
        plan=plan,
        num_draws=num_draws,
        seed=seed,
        model=problem.model,
        prior=fit.prior,
        mode=fit.prior.scaled(fit.mode),
        _factor=fit.factor,
    )


def _sampled(
    problem: _Problem,
    task: SampledTask,
    folder: Path | None,
    evidence: bool,
    progress: bool | None,
    began: float,
) -> LaplacePosterior:
    linear = problem.linear
    learn = problem.learn_prior or task.learn_noise
    plan = sampled_plan(linear, task.num_draws, task.block, learn=learn)
    plan.require(available_memory(linear.model.device))
    grid = linear.grid
    store = None
    if folder is not None:
        if grid.draw_shards > 1:
            folder = folder / f"draws-{grid.draw_index}"
        store = Checkpoint(folder, _identity(problem, task))
    shown = progress if grid.is_first else False
    with track(None, "Posterior draws", enabled=shown) as advance:
        counted = replace(task, linear=replace(linear, advance=advance))
        state = run(counted, linear.prior, problem.noise, store)
        log_evidence = _evidence(counted, state) if evidence else None
    return _assembled(problem, task, state, plan, log_evidence, perf_counter() - began)


def _assembled(
    problem: _Problem,
    task: SampledTask,
    state: SampledState,
    plan: Plan,
    log_evidence: Estimate | None,
    seconds: float,
) -> LaplacePosterior:
    linear, grid = problem.linear, problem.linear.grid
    assert state.draws is not None
    assert state.gammas is not None
    assert state.errors is not None
    draws = grid.gather_draws(state.prior.scaled(state.draws))
    gammas, errors = grid.gather_draws(state.gammas), grid.gather_draws(state.errors)
    cost = Cost(0.0, seconds, round(state.work * len(linear.examples)))
    unsolved = float(errors.mean())
    totals = gammas.sum(1)
    # Draws that rounding has kept from their solution can hide behind the solver's own estimate.
    most = linear.most_dimensions + 4 * float(_error(totals, 0.0))
    solved = unsolved <= 1.01 * task.tolerance**2 and float(totals.mean()) <= most
    checks = (
        *_prior_checks(state.prior, gammas.mean(0), state.settled),
        *_noise_checks(problem.noise, state.noise_variance),
        Check(
            "draws-solved",
            "pass" if solved else "warn",
            f"their error is {unsolved**0.5:.2g} of their spread over the training outputs"
            if float(totals.mean()) <= most
            else f"their effective dimension {float(totals.mean()):.3g} exceeds the "
            f"{linear.most_dimensions:,} that are possible",
            ""
            if solved
            else "Their variances are too large where the data decide. Use float64, a larger "
            "prior precision, or more steps.",
        ),
        Check(
            "enough-draws",
            "pass" if len(draws) >= _FEW_DRAWS else "warn",
            f"{len(draws)} draws: variances have a relative error of "
            f"{100 * (2 / len(draws)) ** 0.5:.0f} %",
            "" if len(draws) >= _FEW_DRAWS else "Take 64 or more.",
        ),
    )
    method = f"{len(draws)} posterior draws"
    return LaplacePosterior(
        likelihood=current_likelihood(linear.likelihood, state.noise_variance),
        method="sampled",
        offset=linear.offset,
        effective_dimension=Estimate(totals.mean(), _error(totals, unsolved), cost, method, checks),
        layer_effective_dimension=Estimate(
            gammas.mean(0), _error(gammas, unsolved), cost, method, checks
        ),
        log_evidence=log_evidence,
        rounds=state.rounds,
        num_examples=len(linear.examples),
        checks=checks,
        cost=cost,
        plan=plan,
        num_draws=task.num_draws,
        seed=task.seed,
        model=problem.model,
        prior=state.prior,
        mode=None if state.mode is None else state.prior.scaled(state.mode),
        _draws=draws,
    )


def _error(gammas: Tensor, unsolved: float) -> Tensor:
    """Standard error over draws, and what the solver left undone, added in squares."""
    mean = gammas.mean(0)
    count = len(gammas)
    sampling = gammas.std(0) / count**0.5 if count > 1 else (2 * mean.clamp(min=0)).sqrt()
    return (sampling.square() + (unsolved * mean).square()).sqrt()


def _exactly(value: Tensor, method: str, cost: Cost) -> Estimate:
    return Estimate(value, torch.zeros_like(value), cost, method)


def _prior_checks(
    prior: Prior, dimensions: Float[Tensor, " layers"], settled: bool
) -> tuple[Check, ...]:
    pruned = [
        name
        for name, left in zip(prior.groups, prior.pool(dimensions).tolist(), strict=True)
        if left < _PRUNED
    ]
    return (
        Check(
            "prior-settled",
            "pass" if settled else "warn",
            "the prior's precision reached its fixed point" if settled else "it was still moving",
            "" if settled else "Look at posterior.rounds, or give prior_precision.",
        ),
        Check(
            "prior-not-pruned",
            "warn" if pruned else "pass",
            f"the data determine less than half a direction of {', '.join(pruned)}"
            if pruned
            else "the data determine directions in every group of weights",
            "The prior has switched these weights off. Give a smaller precision"
            + ("." if prior.kind == "gprior" else ", or use prior='gprior'.")
            if pruned
            else "",
        ),
    )


def _noise_checks(start: float | None, learned: float | None) -> tuple[Check, ...]:
    if start is None or learned is None:
        return ()
    vanished = learned <= 2 * SMALLEST_NOISE * start
    return (
        Check(
            "noise-not-vanished",
            "warn" if vanished else "pass",
            "the linear model fits the targets exactly: its noise fell to nothing"
            if vanished
            else "the targets keep some noise",
            "Variances are far too small. Give pf.Gaussian(noise_variance=...), or more data."
            if vanished
            else "",
        ),
    )


def _evidence(task: SampledTask, state: SampledState) -> Estimate:
    """Log evidence at the mode, its log-determinant by stochastic Lanczos quadrature."""
    likelihood = current_likelihood(task.linear.likelihood, state.noise_variance)
    linear = task.linear.with_prior(state.prior).with_likelihood(likelihood)
    began, prior = perf_counter(), state.prior
    start = linear.model.vector if state.mode is None else prior.scaled(state.mode)
    root = prior.diagonal(linear.model.dtype).rsqrt()
    mode = find_mode(
        linear, prior.coordinates(start), lambda rows: root.square() * rows, tolerance=1e-3
    )
    signs = stream(task.seed, "evidence", device=linear.model.device)
    shape = (_EVIDENCE_PROBES, linear.model.space.size)
    probes = 2.0 * torch.randint(2, shape, generator=signs, device=linear.model.device) - 1
    forms = quadratic_forms(
        lambda rows: root * linear.product(root * rows),
        probes.to(linear.model.dtype),
        lambda values: values.clamp(min=0).log1p(),
        _EVIDENCE_STEPS,
    )
    norms = prior.group_sums(mode.point.double().square())
    value = -mode.loss - 0.5 * (prior.precision * norms).sum() - 0.5 * forms.mean()
    error = 0.5 * forms.std() / len(forms) ** 0.5
    passes = mode.passes + _EVIDENCE_STEPS * _EVIDENCE_PROBES
    cost = Cost(0.0, perf_counter() - began, round(passes * len(linear.examples)))
    return Estimate(value, error, cost, "stochastic Lanczos quadrature at the linear mode")


def _identity(problem: _Problem, task: SampledTask) -> dict[str, Any]:
    linear = problem.linear
    return {
        "network": linear.model.fingerprint(),
        "parameters": linear.model.space.fingerprint(),
        "data": problem.examples.fingerprint(),
        "likelihood": linear.likelihood.to_config(),
        "prior": linear.prior.to_config(),
        "learn": [task.learn_prior, task.learn_noise],
        "offset": linear.offset,
        "num_draws": task.num_draws,
        "block": task.block,
        "tolerance": task.tolerance,
        "seed": task.seed,
        "shards": [linear.grid.draw_shards, linear.grid.data_shards],
    }
