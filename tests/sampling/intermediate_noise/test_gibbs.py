"""Gibbs sweeps: blocks have the law that the joint density says, chains reach posteriors."""

import json
import math

import pytest
import torch
from torch import nn

from oracles.gaussian_conditionals import assert_same_law
from oracles.one_unit_networks import (
    binary_probit,
    one_unit_regression,
    one_unit_smooth,
    one_unit_without_bias,
    segments_of,
    three_class_probit,
)
from pushforward.errors import DataError, OptionError, ShapeError
from pushforward.networks.activations import Abs, Sign
from pushforward.runs.rng import stream
from pushforward.sampling.intermediate_noise import gaussian_conditionals
from pushforward.sampling.intermediate_noise import moves as gibbs_moves
from pushforward.sampling.intermediate_noise.gibbs import gibbs
from pushforward.sampling.intermediate_noise.moves import (
    ClassMove,
    LatentMove,
    ParameterMove,
)
from pushforward.sampling.intermediate_noise.network import IntermediateNoiseNetwork
from pushforward.sampling.intermediate_noise.scales import PrecisionMove, ScaleMove
from pushforward.sampling.noise import ChainNoise, Noise


def numbers(*shape, name="data"):
    return torch.randn(*shape, generator=stream(11, name, *shape), dtype=torch.float64)


def noise_of(kernel, chains, purpose="steps", seed=0):
    size = kernel.start_size if purpose == "start" else kernel.noise_size
    return ChainNoise(
        seed, range(chains), size, purpose=purpose, dtype=kernel.dtype, device=kernel.device
    )


def started(kernel, chains, initial=None, seed=0):
    return kernel.start(initial, noise_of(kernel, chains, "start", seed).at(0))


# --- each block against the joint density ---------------------------------------------------------

MODELS = {
    "MLP": (
        nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)),
        (3,),
        ([0.4, 0.2], [0.3], "regression"),
    ),
    "deep, two outputs, more inputs than examples": (
        nn.Sequential(
            nn.Linear(6, 5, bias=False),
            nn.LeakyReLU(0.1),
            nn.Linear(5, 3),
            nn.Identity(),
            nn.Linear(3, 4),
            nn.Linear(4, 2),
        ),
        (6,),
        ([0.4, 0.2, 0.7, 0.5], [0.3, 0.6], "regression"),
    ),
    "classes": (
        nn.Sequential(nn.Linear(2, 3), Abs(), nn.Linear(3, 4)),
        (2,),
        ([0.4, 0.2], [0.3], "classification"),
    ),
    "CNN": (
        nn.Sequential(
            nn.Conv2d(1, 2, (2, 3), stride=(1, 2), padding=(0, 1)),
            nn.AvgPool2d(2),
            nn.ReLU(),
            nn.Conv2d(2, 1, (2, 1), bias=False),
            nn.Hardtanh(),
            nn.Flatten(),
            nn.Linear(1, 2),
        ),
        (1, 6, 5),
        ([0.4, 0.2, 0.7], [0.3, 0.6, 0.5], "classification"),
    ),
    "pooled data": (
        nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 1)),
        (1, 3, 5),
        ([0.4, 0.2], [0.3], "regression"),
    ),
}


def problem(name, count=4, chains=1, **options):
    net, example, settings = MODELS[name]
    model = IntermediateNoiseNetwork(net, *settings)
    x = numbers(count, *example)
    parameters = model.sample_prior(stream(0, "teacher"), chains)
    latents, y = model.generate(parameters, x, stream(1, "teacher"))
    return gibbs(model, x, y[0], **options), parameters, latents


def values_of(kernel, state, chains):
    values = {name: value.expand(chains, *value.shape[1:]) for name, value in state.items()}
    values["input"] = kernel.x
    if kernel.model.output == "regression":
        return values | {"target": kernel.y[None]}
    return values | {"labels": kernel.y}


def check_gaussian_blocks(kernel, state, model, alpha=0.0):
    """Each Gaussian block of the plan has the law that the joint density of `model` gives it."""
    checked = 0
    parameters, latents = kernel.model_parameters(state), kernel.latents(state)
    point = {name: value[0] for name, value in (parameters | latents).items()}
    for move, _, _ in kernel._plan:
        if not move.size.normals:
            continue
        names = move._names if isinstance(move, ParameterMove) else [move._name]
        shapes = [point[name].shape for name in names]
        sizes = [shape.numel() for shape in shapes]

        def energy(flat, names=names, sizes=sizes, shapes=shapes):
            parts = zip(names, flat.split(sizes), shapes, strict=True)
            moved = point | {name: part.reshape(shape) for name, part, shape in parts}
            free = {name: moved[name] for name in parameters}
            hidden = {name: moved[name] for name in latents}
            return -model.log_joint(free, hidden, kernel.x, kernel.y)

        def draw(normals, move=move, names=names):
            values = values_of(kernel, state, len(normals))
            move.apply(values, normals, normals[:, :0])
            return torch.cat([values[name].flatten(1) for name in names], 1)

        present = torch.cat([point[name].flatten() for name in names])
        assert_same_law(
            draw, move.size.normals, energy, torch.zeros(sum(sizes)), 1e-8, present, alpha
        )
        checked += 1
    return checked


@pytest.mark.parametrize(
    ("name", "blocks"),
    list(zip(MODELS, (3, 8, 3, 6, 4), strict=True)),
)
@pytest.mark.parametrize("dense", [True, False])
def test_gaussian_blocks_have_the_law_of_the_joint_density(name, blocks, dense, monkeypatch):
    if not dense:
        monkeypatch.setattr(gibbs_moves, "_DENSE_SIZE", 0)
    kernel, _, _ = problem(name)
    assert check_gaussian_blocks(kernel, started(kernel, 1), kernel.model) == blocks


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dense", [True, False])
def test_over_relaxed_blocks_have_the_law_of_the_joint_density(name, dense, monkeypatch):
    if not dense:
        monkeypatch.setattr(gibbs_moves, "_DENSE_SIZE", 0)
    kernel, _, _ = problem(name, overrelaxation=-0.8)
    assert check_gaussian_blocks(kernel, started(kernel, 1), kernel.model, -0.8)
    with pytest.raises(AssertionError):
        check_gaussian_blocks(kernel, started(kernel, 1), kernel.model, -0.79)


def test_learned_variances_are_those_that_blocks_are_drawn_with():
    for name in ("deep, two outputs, more inputs than examples", "CNN"):
        kernel, _, _ = problem(name, learn_noise=True, learn_prior_precision=True)
        state = started(kernel, 1)
        model = kernel.model
        for k, (key, value) in enumerate(state.items()):
            if key.startswith(("noise.", "precision.")):
                state[key] = value * (0.7 + 0.1 * k)
        noises = {key: float(state[f"noise.{key}"]) for key in model.variances}
        affine = [item.name for item in model.affine]
        learned = IntermediateNoiseNetwork(
            model.net,
            [noises[key] for key in affine],
            [value for key, value in noises.items() if key not in affine],
            model.output,
            prior_precision={key: float(state[f"precision.{key}"]) for key in model.precisions},
        )
        assert check_gaussian_blocks(kernel, state, learned)
        with pytest.raises(AssertionError):
            check_gaussian_blocks(kernel, state, model)


FAULTS = {
    "ridge": lambda f: lambda lower, noise, cross, z: f(lower, noise, cross, 1.05 * z),
    "linear_inputs": lambda f: lambda w, v, d, m, t, z: f(w, v, d, m, t, 1.05 * z),
    "linear_inputs, variances swapped": lambda f: lambda w, v, d, m, t, z: f(w, d, v, m, t, z),
    "pooling_inputs": lambda f: lambda k, v, d, m, t, z: f(k, v, d, m, t, 1.05 * z),
    "ridge_factor": lambda f: lambda gram, noise, precision: f(gram, 1.0, noise * 0 + precision),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_blocks_are_caught(fault, monkeypatch):
    name = fault.split(",")[0]
    wrong = FAULTS[fault](getattr(gaussian_conditionals, name))
    monkeypatch.setattr(gaussian_conditionals, name, wrong)
    kernel, _, _ = problem("CNN")
    with pytest.raises(AssertionError):
        check_gaussian_blocks(kernel, started(kernel, 1), kernel.model)


def distribution_at(values, log_density, point):
    """Distribution function at a point from log densities on a grid, by the trapezoidal rule."""
    density = (log_density - log_density.max()).exp()
    steps = 0.5 * (density[1:] + density[:-1]) * values.diff()
    cumulative = torch.cat([torch.zeros(1), steps.cumsum(0)]) / steps.sum()
    k = int(torch.searchsorted(values, torch.tensor(float(point), dtype=torch.float64))) - 1
    share = (point - values[k]) / (values[k + 1] - values[k])
    return float(cumulative[k] + share * (cumulative[k + 1] - cumulative[k]))


@pytest.mark.parametrize("name", ["MLP", "classes", "CNN"])
def test_preactivations_are_quantiles_of_the_joint_density(name):
    kernel, _, _ = problem(name)
    state = started(kernel, 1)
    moves = [m for m, _, _ in kernel._plan if isinstance(m, LatentMove) and m.size.uniforms]
    assert moves
    for move in moves:
        for level in (0.03, 0.4, 0.9):
            values = values_of(kernel, state, 1)
            uniforms = torch.full((1, move.size.uniforms), level, dtype=torch.float64)
            move.apply(values, uniforms[:, :0], uniforms)
            drawn = values[move._name].flatten()
            for place in (0, drawn.numel() - 1):
                grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
                latents = {
                    k: v.expand(4001, *v.shape[1:]) for k, v in kernel.latents(state).items()
                }
                moved = latents[move._name].flatten(1).clone()
                moved[:, place] = grid
                latents[move._name] = moved.reshape(latents[move._name].shape)
                density = kernel.model.log_joint(
                    {
                        k: v.expand(4001, *v.shape[1:])
                        for k, v in kernel.model_parameters(state).items()
                    },
                    latents,
                    kernel.x,
                    kernel.y,
                )
                assert abs(distribution_at(grid, density, drawn[place]) - level) < 1e-3


@pytest.mark.parametrize("which", ["noise.0", "noise.2", "precision.0.weight", "precision.2.bias"])
def test_learned_variances_are_quantiles_of_the_potential(which):
    kernel, _, _ = problem("MLP", learn_noise=True, learn_prior_precision=True, hyperprior=1.5)
    state = started(kernel, 1)
    (move,) = (m for m, _, _ in kernel._plan if isinstance(m, PrecisionMove))
    for level in (0.1, 0.6, 0.95):
        values = values_of(kernel, state, 1)
        uniforms = torch.full((1, move.size.uniforms), level, dtype=torch.float64)
        move.apply(values, uniforms[:, :0], uniforms)
        inverse = torch.linspace(1e-4, 60, 40001, dtype=torch.float64)
        wide = {name: value.expand(40001, *value.shape[1:]) for name, value in state.items()}
        wide[which] = 1 / inverse if which.startswith("noise") else inverse
        density = -kernel.statistics(wide)["potential"]
        drawn = 1 / values[which] if which.startswith("noise") else values[which]
        assert abs(distribution_at(inverse, density, float(drawn)) - level) < 1e-4


@pytest.mark.parametrize("name", ["MLP", "deep, two outputs, more inputs than examples", "CNN"])
@pytest.mark.parametrize("learned", [False, True])
def test_scales_have_the_law_of_the_joint_density_along_the_orbit(name, learned):
    options = {"learn_noise": True, "learn_prior_precision": True} if learned else {}
    kernel, _, _ = problem(name, scale_move=True, **options)
    state = started(kernel, 1)
    moves = [m for m, _, _ in kernel._plan if isinstance(m, ScaleMove)]
    assert len(moves) == {"MLP": 1, "CNN": 1}.get(name, 3)
    for move in moves:
        uniforms = torch.full((1, move.size.uniforms), 0.3, dtype=torch.float64)
        uniforms[:, move.size.uniforms // 2 :] = 1 - 2.0**-53  # accept whatever is proposed
        values = values_of(kernel, state, 1)
        move.apply(values, uniforms[:, :0], uniforms)
        named = kernel.model_parameters(state) | kernel.latents(state)
        factors = {}
        for key, before in named.items():
            ratio = values[key] / before
            factors[key] = torch.where(before == 0, 1.0, ratio)
        first = factors[move._first.weight].flatten(2)[0, :, 0]
        # Scale one unit and count how the joint density and the volume change.
        for unit in range(len(first)):
            grow = {
                k: torch.isclose(f, first[unit].expand_as(f), rtol=1e-9) & (named[k] != 0)
                for k, f in factors.items()
            }
            shrink = {
                k: torch.isclose(f, 1 / first[unit].expand_as(f), rtol=1e-9) & (named[k] != 0)
                for k, f in factors.items()
            }
            exponent = sum(int(g.sum()) for g in grow.values())
            exponent -= sum(int(s.sum()) for s in shrink.values())
            # Rectified means may be zero, their noisy images never are: every variable is counted.
            grid = torch.linspace(0.02, 12, 6001, dtype=torch.float64)
            u = grid.sqrt()
            wide = {k: v.expand(len(u), *v.shape[1:]) for k, v in state.items()}
            for key in named:
                shape = (-1, *(1,) * (named[key].dim() - 1))
                scale = torch.where(grow[key], u.view(shape), 1.0)
                scale = torch.where(shrink[key], 1 / u.view(shape), scale)
                wide[key] = named[key] * scale
            potential = kernel.statistics(wide)["potential"]
            law = -potential + (exponent / 2 - 1) * grid.log()
            # The proposal is this law without the outgoing weights' prior.
            key = move._last.weight
            squares = (named[key][shrink[key]] ** 2).sum()
            precision = state.get(f"precision.{key}", kernel.model.precisions[key])
            proposal = law + 0.5 * precision * squares / grid
            level = distribution_at(grid, proposal, float(first[unit] ** 2))
            assert abs(level - 0.3) < 1e-4


# --- small posteriors by quadrature ---------------------------------------------------------------


def assert_moments(
    kernel, mean, std, *, chains=300, burn_in=120, draws=200, tolerance=4.0, of=None
):
    """Mean and mean square of every parameter within 4 standard errors, over independent chains."""
    state, noise = started(kernel, chains), noise_of(kernel, chains)
    first, second = 0.0, 0.0
    for step in range(burn_in + draws):
        state = kernel.step(state, noise.at(step))
        if step >= burn_in:
            vector = kernel.vectors(state) if of is None else of(kernel.vectors(state))
            first, second = first + vector / draws, second + vector**2 / draws
    for values, expected in ((first, mean), (second, std**2 + mean**2)):
        error = values.std(0) / math.sqrt(chains)
        z = (values.mean(0) - expected) / error
        assert (z.abs() < tolerance).all(), z
    # The comparison is sharp: a standard error is a small part of the posterior's spread.
    assert (first.std(0) / math.sqrt(chains) < 0.1 * std).all()


X1 = torch.tensor([-1.0, -0.4, 0.6, 1.5], dtype=torch.float64)
Y1 = torch.tensor([0.1, -0.3, 0.9, 1.2], dtype=torch.float64)
NOISES = (0.5, 0.3, 0.6)
ACTIVATIONS = {
    "relu": (nn.ReLU(), segments_of((0.0,), (0.0, 1.0), (0.0, 0.0))),
    "leaky": (nn.LeakyReLU(0.1), segments_of((0.0,), (0.1, 1.0), (0.0, 0.0))),
    "abs": (Abs(), segments_of((0.0,), (-1.0, 1.0), (0.0, 0.0))),
    "sign": (Sign(), segments_of((0.0,), (0.0, 0.0), (-1.0, 1.0))),
    "identity": (nn.Identity(), segments_of((), (1.0,), (0.0,))),
    "hardtanh": (nn.Hardtanh(), segments_of((-1.0, 1.0), (0.0, 1.0, 0.0), (-1.0, 0.0, 1.0))),
}


def one_unit(activation, bias=False, precision=None, **options):
    net = nn.Sequential(nn.Linear(1, 1, bias=bias), activation, nn.Linear(1, 1, bias=bias))
    given = {"0.weight": 1.0, "2.weight": 1.5} if precision is None else precision
    model = IntermediateNoiseNetwork(
        net, NOISES[0], NOISES[1], output_noise=NOISES[2], prior_precision=given
    )
    return gibbs(model, X1[:, None], Y1, **options)


@pytest.mark.statistical  # |z| < 4 for four numbers: one in 4000 by chance
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_one_unit_posteriors(name):
    activation, segments = ACTIVATIONS[name]
    mean, std = one_unit_without_bias(X1, Y1, segments, NOISES, (1.0, 1.5))
    assert_moments(one_unit(activation), mean, std)


@pytest.mark.statistical
@pytest.mark.parametrize("name", ["relu", "identity"])
@pytest.mark.parametrize(
    "options",
    [
        {"scale_move": True},
        {"overrelaxation": -0.9},
        {"scale_move": True, "overrelaxation": -0.6},
    ],
)
def test_one_unit_posteriors_with_faster_moves(name, options):
    activation, segments = ACTIVATIONS[name]
    mean, std = one_unit_without_bias(X1, Y1, segments, NOISES, (1.0, 1.5))
    assert_moments(one_unit(activation, **options), mean, std)


@pytest.mark.statistical
def test_a_smooth_one_unit_posterior():
    mean, std = one_unit_smooth(X1, Y1, torch.tanh, NOISES, (1.0, 1.5))
    assert_moments(one_unit(nn.Tanh()), mean, std, chains=200)


PRECISIONS = (1.0, 1.5, 1.2, 2.0)


@pytest.mark.statistical
def test_a_one_unit_posterior_with_biases():
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    activation, segments = ACTIVATIONS["relu"]
    _, mean, std = one_unit_regression(X1, Y1, segments, NOISES, PRECISIONS)
    kernel = one_unit(activation, True, dict(zip(names, PRECISIONS, strict=True)))
    assert_moments(kernel, mean, std)


@pytest.mark.statistical
def test_binary_probit():
    x = torch.tensor([-2.0, -1.0, 0.3, 0.8, 2.0], dtype=torch.float64)
    labels = torch.tensor([1, 1, 0, 1, 0])
    model = IntermediateNoiseNetwork(
        nn.Sequential(nn.Linear(1, 2)), 0.7, 1.0, "classification", prior_precision=0.8
    )
    mean, std = binary_probit(x, labels, 0.7, (0.8, 0.8))

    def differences(v):
        return torch.stack([v[:, 1] - v[:, 0], v[:, 3] - v[:, 2]], 1)

    assert_moments(gibbs(model, x[:, None], labels), mean, std, of=differences)


@pytest.mark.statistical
def test_three_class_probit():
    x = torch.tensor([-2.0, -1.0, 0.3, 0.8, 2.0], dtype=torch.float64)
    labels = torch.tensor([1, 1, 2, 0, 0])
    model = IntermediateNoiseNetwork(
        nn.Sequential(nn.Linear(1, 3, bias=False)), 0.7, 1.0, "classification", prior_precision=0.8
    )
    mean, std = three_class_probit(x, labels, 0.7, 0.8)
    assert_moments(gibbs(model, x[:, None], labels), mean, std)


# --- informed chains stay where they are ----------------------------------------------------------

INFORMED = {
    "deep": (
        nn.Sequential(
            nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.LeakyReLU(0.2), nn.Linear(3, 2)
        ),
        (4,),
        "regression",
    ),
    "classes": (
        nn.Sequential(nn.Linear(3, 3), nn.Hardtanh(), nn.Linear(3, 3)),
        (3,),
        "classification",
    ),
    "smooth": (nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), (2,), "regression"),
    "CNN": (
        nn.Sequential(
            nn.Conv2d(1, 2, (2, 3), stride=(1, 2)),
            nn.AvgPool2d((2, 1)),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * 2 * 3, 3),
        ),
        (1, 6, 7),
        "classification",
    ),
}


def informed(name, chains, **options):
    """A kernel, and a teacher with data of its own for each chain: an exact posterior draw."""
    net, example, output = INFORMED[name]
    model = IntermediateNoiseNetwork(net, 0.3, 0.2, output, prior_precision=1.5)
    x = numbers(6, *example)
    parameters = model.sample_prior(stream(3, "teachers"), chains)
    latents, y = model.generate(parameters, x, stream(4, "teachers"))
    kernel = gibbs(model, x, y[0], **options)
    state = started(kernel, chains, parameters | (latents if output == "regression" else {}))
    return kernel, state | latents, y


def drift(kernel, state, y, sweeps=15):
    """Standard scores of energies and squared parameters after some sweeps, by their known laws."""
    noise = noise_of(kernel, len(y), seed=5)
    for step in range(sweeps):
        state = kernel.sweep(state, noise.at(step), y)
    scores = []
    parameters = kernel.model_parameters(state)
    residuals = kernel.model.residuals(parameters, kernel.latents(state), kernel.x, y)
    for item, rest, axes in residuals:
        squares = rest.flatten(-axes).square() / kernel.model.variances[item.name]
        scores.append((squares.sum(1) - squares.shape[1]) / math.sqrt(2 * squares.shape[1]))
    for name, value in parameters.items():
        squares = value.flatten(1).square() * kernel.model.precisions[name]
        scores.append((squares.sum(1) - squares.shape[1]) / math.sqrt(2 * squares.shape[1]))
    # Each is a standardised chi-square variable, one for each chain.
    return torch.stack([score.mean() * math.sqrt(len(score)) for score in scores])


@pytest.mark.statistical  # about ten numbers with |z| < 4
@pytest.mark.parametrize("name", INFORMED)
@pytest.mark.parametrize(
    "options", [{}, {"scale_move": True, "overrelaxation": -0.7}], ids=["plain", "fast"]
)
def test_informed_chains_keep_the_law_of_the_teacher(name, options):
    if options and name in {"classes", "smooth"}:
        options = {"overrelaxation": -0.7}
    kernel, state, y = informed(name, 800, **options)
    scores = drift(kernel, state, y)
    assert (scores.abs() < 4).all(), scores


@pytest.mark.statistical
@pytest.mark.parametrize("move", [ParameterMove, LatentMove, ClassMove, ScaleMove])
def test_a_faulty_sweep_moves_informed_chains(move, monkeypatch):
    right = move.apply

    def wrong(self, values, normals, uniforms):
        if move is ScaleMove:
            object.__setattr__(self, "_shape", self._shape * 1.0 + 2.0)
        if move is ClassMove:  # forgets the variance
            self._link = type(self._link)(**{**vars(self._link), "variance": 1.0})
        right(self, values, 1.1 * normals, uniforms)

    monkeypatch.setattr(move, "apply", wrong)
    name = "classes" if move is ClassMove else "deep"
    kernel, state, y = informed(name, 1500, scale_move=move is ScaleMove)
    assert (drift(kernel, state, y).abs() > 6).any()


# --- the kernel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("learned", [False, True])
def test_steps_keep_names_shapes_and_rows(name, learned):
    kernel, _, _ = problem(name, learn_noise=learned, learn_prior_precision=learned)
    state, noise = started(kernel, 3), noise_of(kernel, 3)
    kept = {key: value.clone() for key, value in state.items()}
    moved = kernel.step(kernel.step(state, noise.at(0)), noise.at(1))
    assert {k: (v.shape, v.dtype) for k, v in moved.items()} == {
        k: (v.shape, v.dtype) for k, v in state.items()
    }
    assert all(torch.equal(state[key], value) for key, value in kept.items())
    alone = {key: value[1:2] for key, value in state.items()}
    for step in range(2):
        both = noise.at(step)
        alone = kernel.step(alone, Noise(both.normals[1:2], both.uniforms[1:2]))
    for key, value in moved.items():
        assert torch.allclose(alone[key][0], value[1], rtol=1e-9, atol=1e-11), key
    assert kernel.vectors(moved).shape == (3, kernel.space.size)
    statistics = kernel.statistics(moved)
    assert all(value.shape == (3,) for value in statistics.values())
    assert all(torch.isfinite(value).all() for value in statistics.values())
    assert kernel.bytes_per_chain > sum(v[0].numel() * 8 for v in state.values())
    json.dumps(kernel.identity())


def test_the_potential_is_minus_the_joint_density():
    for name in MODELS:
        kernel, _, _ = problem(name)
        state = started(kernel, 3)
        density = kernel.model.log_joint(
            kernel.model_parameters(state), kernel.latents(state), kernel.x, kernel.y
        )
        assert torch.allclose(kernel.statistics(state)["potential"], -density, rtol=1e-12)


def test_identities_tell_kernels_apart():
    kernels = [
        problem("MLP")[0],
        problem("MLP", count=5)[0],
        problem("classes")[0],
        problem("MLP", scale_move=True)[0],
        problem("MLP", overrelaxation=-0.5)[0],
        problem("MLP", learn_noise=True)[0],
        problem("MLP", learn_noise=True, hyperprior=2.0)[0],
    ]
    texts = {json.dumps(kernel.identity()) for kernel in kernels}
    assert len(texts) == len(kernels)
    assert json.dumps(problem("MLP")[0].identity()) in texts


def test_chains_start_where_they_are_told():
    kernel, parameters, latents = problem("classes", chains=1)
    drawn = started(kernel, 4)
    assert len({float(v) for v in drawn["0.weight"][:, 0, 0]}) == 4
    informed_state = started(kernel, 1, parameters | latents)
    for name, value in (parameters | latents).items():
        assert torch.equal(informed_state[name], value)
    forward = started(kernel, 1, parameters)
    assert torch.equal(forward["0.weight"], parameters["0.weight"])
    assert not torch.equal(forward["latent.0"], latents["latent.0"])
    assert torch.isfinite(kernel.statistics(forward)["potential"]).all()
    chosen = forward["latent.2"].gather(2, kernel.y[None, :, None])
    assert (chosen >= forward["latent.2"]).all()
    zero = started(kernel, 2, kernel.zero_start(2))
    assert not any(value.any() for value in zero.values())
    after = kernel.step(zero, noise_of(kernel, 2).at(0))
    assert all(torch.isfinite(value).all() for value in after.values())


def test_starts_that_are_refused():
    kernel, parameters, latents = problem("classes")
    for initial, said in (
        ({"0.weight": parameters["0.weight"]}, "0.bias, 2.weight, 2.bias missing"),
        (latents, "without parameters"),
        (parameters | {"latent.0": latents["latent.0"]}, "latent.1, latent.2 missing"),
        (parameters | {"3.weight": parameters["0.bias"]}, "'3.weight'"),
        ({k: v[:, :1] for k, v in parameters.items()}, "of shape"),
    ):
        with pytest.raises(ShapeError, match=said):
            started(kernel, 1, initial)
    wrong = latents | {"latent.2": -latents["latent.2"]}
    with pytest.raises(DataError, match="not that of its label"):
        started(kernel, 1, parameters | wrong)


def test_options_that_are_refused():
    for options, said in (
        ({"overrelaxation": -1.0}, "^overrelaxation: "),
        ({"overrelaxation": 0.5}, "^overrelaxation: "),
        ({"hyperprior": 0.0}, "Gamma law"),
    ):
        with pytest.raises(OptionError, match=said):
            problem("MLP", **options)
    model = IntermediateNoiseNetwork(
        nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)), 0.1, 0.1
    )
    with pytest.raises(OptionError, match="positively homogeneous"):
        gibbs(model, numbers(5, 2), numbers(5), scale_move=True)
    model = IntermediateNoiseNetwork(
        nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 40)), 0.1, 0.1
    )
    with pytest.raises(OptionError, match="40 outgoing weights"):
        gibbs(model, numbers(5, 1), numbers(5, 40), scale_move=True)


def test_labels_out_of_range_are_refused():
    kernel, _, _ = problem("classes")
    with pytest.raises(DataError, match="labels are 0 to 3"):
        gibbs(kernel.model, kernel.x, torch.tensor([0, 1, 2, 4]))


def test_single_precision_runs_and_agrees():
    net, _, settings = MODELS["MLP"]
    model = IntermediateNoiseNetwork(net, *settings)
    x, y = numbers(40, 3), numbers(40)
    fine, coarse = gibbs(model, x, y), gibbs(model, x.float(), y.float())
    state, noise = started(fine, 2), noise_of(fine, 2).at(0)
    single = {name: value.float() for name, value in state.items()}
    moved = fine.step(state, noise)
    other = coarse.step(single, Noise(noise.normals.float(), noise.uniforms))
    for name, value in moved.items():
        assert other[name].dtype == torch.float32
        assert torch.allclose(other[name].double(), value, atol=2e-4), name


def test_gaussian_blocks_are_not_broken_by_tiny_noise():
    net, _, _ = MODELS["MLP"]
    model = IntermediateNoiseNetwork(net, 1e-10, 1e-10)
    x = numbers(30, 3)
    parameters = model.sample_prior(stream(0, "teacher"), 1)
    latents, y = model.generate(parameters, x, stream(1, "teacher"))
    kernel = gibbs(model, x, y[0])
    state, noise = started(kernel, 1, parameters | latents), noise_of(kernel, 1)
    for step in range(20):
        state = kernel.step(state, noise.at(step))
    energies = [v for k, v in kernel.statistics(state).items() if k.startswith("energy")]
    for energy, count in zip(energies, (60, 60, 30), strict=True):
        assert abs(float(energy) - count) < 6 * math.sqrt(2 * count)
