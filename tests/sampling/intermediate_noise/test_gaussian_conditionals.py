"""Each Gaussian conditional has the law that the energy says, to rounding; no Monte Carlo."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from oracles.gaussian_conditionals import assert_same_law, law_of_draws
from pushforward.runs.rng import stream
from pushforward.sampling.intermediate_noise import gaussian_conditionals as gaussian
from pushforward.sampling.intermediate_noise.convolutions import (
    Convolution,
    block_means,
    spread_blocks,
)

NOISE, VARIANCE = 0.37, 0.61


def numbers(*shape, name="data"):
    return torch.randn(*shape, generator=stream(5, name, *shape), dtype=torch.float64)


def on_chains(tensor, normals):
    return tensor.expand(len(normals), *tensor.shape)


# --- weights and biases ---------------------------------------------------------------------------


def linear_problem(n, d, p):
    x, z = numbers(n, d), numbers(n, p, name="targets")
    precision = torch.tensor([1.7] + [0.6] * d, dtype=torch.float64)

    def energy(weights):
        rest = z - functional.linear(x, weights[1:].T, weights[0])
        prior = (precision[:, None] * weights**2).sum()
        return 0.5 * rest.square().sum() / NOISE + 0.5 * prior

    return x, z, precision, energy, torch.zeros(1 + d, p)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("n", "d", "p"), [(7, 3, 2), (6, 2, 1), (3, 5, 2)])
def test_weights_and_bias(n, d, p, shared):
    x, z, precision, energy, like = linear_problem(n, d, p)
    design = gaussian.with_ones(x)

    def draw(normals):
        gram = design.T @ design
        lower = gaussian.ridge_factor(
            gram if shared else on_chains(gram, normals), NOISE, precision
        )
        return gaussian.ridge(lower, NOISE, on_chains(design.T @ z, normals), normals)

    assert_same_law(draw, (1 + d) * p, energy, like)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("n", "d", "p"), [(3, 5, 2), (1, 4, 1), (6, 2, 3)])
def test_wide_weights_and_bias(n, d, p, shared):
    x, z, precision, energy, like = linear_problem(n, d, p)

    def draw(normals):
        design = gaussian.with_ones(x if shared else on_chains(x, normals))
        lower = gaussian.wide_ridge_factor(design, NOISE, precision)
        targets = on_chains(z, normals)
        return gaussian.wide_ridge(lower, design, NOISE, precision, targets, normals)

    assert_same_law(draw, (1 + d + n) * p, energy, like)


def test_weights_with_variances_of_their_own_for_each_chain():
    noises = torch.tensor([0.1, 2.0], dtype=torch.float64)
    precisions = torch.tensor([[1.0, 2.0, 2.0], [3.0, 0.5, 0.5]], dtype=torch.float64)
    x, z = gaussian.with_ones(numbers(5, 2)), numbers(2, 5, 3, name="targets")
    normals, wide_normals = numbers(2, 9), numbers(2, 24)
    both = gaussian.ridge(
        gaussian.ridge_factor(x.T @ x, noises, precisions), noises, x.T @ z, normals
    )
    wide_lower = gaussian.wide_ridge_factor(x, noises, precisions)
    both_wide = gaussian.wide_ridge(wide_lower, x, noises, precisions, z, wide_normals)
    for chain in range(2):
        one, noise, precision = slice(chain, chain + 1), float(noises[chain]), precisions[chain]
        lower = gaussian.ridge_factor(x.T @ x, noise, precision)
        alone = gaussian.ridge(lower, noise, x.T @ z[one], normals[one])
        assert torch.allclose(both[one], alone, rtol=1e-12, atol=1e-12)
        lower = gaussian.wide_ridge_factor(x, noise, precision)
        alone = gaussian.wide_ridge(lower, x, noise, precision, z[one], wide_normals[one])
        assert torch.allclose(both_wide[one], alone, rtol=1e-12, atol=1e-12)


def test_tiny_noise_reaches_least_squares():
    x = gaussian.with_ones(numbers(50, 3))
    z = x @ numbers(4, 2, name="truth")
    precision = torch.ones(4, dtype=torch.float64)
    lower = gaussian.ridge_factor(x.T @ x, 1e-14, precision)
    drawn = gaussian.ridge(lower, 1e-14, (x.T @ z)[None], numbers(1, 8))
    assert torch.allclose(drawn[0], numbers(4, 2, name="truth"), atol=1e-6)


def test_a_chain_that_is_lost_does_not_stop_the_others():
    gram = torch.stack([torch.eye(2), torch.full((2, 2), torch.nan)]).double()
    lower = gaussian.ridge_factor(gram, 1.0, torch.ones(2, dtype=torch.float64))
    assert torch.isfinite(lower[0]).all()
    assert lower[1].isnan().any()


# --- inputs of a linear map -----------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("n", "d", "p"), [(3, 4, 1), (2, 5, 3), (2, 3, 3), (3, 2, 5)])
def test_inputs_of_a_linear_map(n, d, p, zero):
    weight = numbers(p, d, name="weight") * (not zero)
    mean, target = numbers(n, d), numbers(n, p, name="targets")

    def energy(x):
        behind = (target - functional.linear(x, weight)).square().sum() / NOISE
        return 0.5 * behind + 0.5 * (x - mean).square().sum() / VARIANCE

    def draw(normals):
        data = on_chains(weight, normals), VARIANCE, NOISE, on_chains(mean, normals)
        return gaussian.linear_inputs(*data, target[None], normals)

    size = n * gaussian.linear_inputs_size(d, p)
    assert_same_law(draw, size, energy, mean)


# --- convolutions and pooling ---------------------------------------------------------------------

GEOMETRIES = {
    "plain": Convolution((3, 3), (1, 1), (0, 0), (1, 4, 5), 2),
    "odd": Convolution((2, 3), (1, 2), (0, 0), (2, 4, 5), 3),
    "padded": Convolution((2, 3), (2, 1), (1, 1), (2, 3, 3), 1),
    "leaves a rim": Convolution((2, 2), (3, 3), (0, 0), (1, 4, 4), 2),
}


@pytest.fixture(params=GEOMETRIES.values(), ids=GEOMETRIES.keys())
def geometry(request):
    return request.param


def torch_convolution(geometry, images, weight, bias=None):
    return functional.conv2d(images, weight, bias, geometry.stride, geometry.padding)


def filters(geometry):
    return numbers(geometry.channels, geometry.input_shape[0], *geometry.kernel, name="weight")


def test_the_convolution_is_that_of_torch(geometry, monkeypatch):
    weight = torch.stack([filters(geometry), 2 * filters(geometry) + 1])
    images = numbers(2, 5, *geometry.input_shape)
    expected = torch.stack(
        [torch_convolution(geometry, i, w) for i, w in zip(images, weight, strict=True)]
    )
    assert torch.allclose(geometry.apply(images, weight), expected, atol=1e-12)
    monkeypatch.setattr("pushforward.sampling.intermediate_noise.convolutions._CHUNK_ELEMENTS", 1)
    assert torch.allclose(geometry.apply(images, weight), expected, atol=1e-12)
    dense = geometry.dense(weight)
    flat = images.flatten(2) @ dense.mT
    assert torch.allclose(flat, expected.flatten(2), atol=1e-12)
    back = geometry.adjoint(expected, weight).flatten(2)
    assert torch.allclose(back, expected.flatten(2) @ dense, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("chunk", [1, 2**22])
def test_filters_and_bias(geometry, bias, shared, chunk, monkeypatch):
    monkeypatch.setattr(
        "pushforward.sampling.intermediate_noise.convolutions._CHUNK_ELEMENTS", chunk
    )
    images = numbers(3, *geometry.input_shape)
    target = numbers(3, *geometry.output_shape, name="targets")
    precision = torch.tensor([1.7] * bias + [0.6] * geometry.patch, dtype=torch.float64)
    shape = (geometry.channels, geometry.input_shape[0], *geometry.kernel)

    def energy(weights):
        weight = weights[bias:].T.reshape(shape)
        made = torch_convolution(geometry, images, weight, weights[0] if bias else None)
        prior = (precision[:, None] * weights**2).sum()
        return 0.5 * (target - made).square().sum() / NOISE + 0.5 * prior

    def draw(normals):
        seen = images if shared else on_chains(images, normals)
        lower = gaussian.ridge_factor(geometry.gram(seen, bias), NOISE, precision)
        cross = geometry.cross(seen, on_chains(target, normals), bias)
        return gaussian.ridge(lower, NOISE, cross, normals)

    like = torch.zeros(bias + geometry.patch, geometry.channels)
    assert_same_law(draw, like.numel(), energy, like)


def test_inputs_of_a_convolution(geometry):
    weight = filters(geometry)
    mean = numbers(2, *geometry.input_shape)
    target = numbers(2, *geometry.output_shape, name="targets")

    def energy(x):
        behind = (target - torch_convolution(geometry, x, weight)).square().sum() / NOISE
        return 0.5 * behind + 0.5 * (x - mean).square().sum() / VARIANCE

    def draw(normals):
        images, unsolved = gaussian.convolution_inputs(
            geometry,
            on_chains(weight, normals),
            VARIANCE,
            NOISE,
            on_chains(mean, normals),
            target[None],
            normals,
            tolerance=1e-13,
        )
        assert not unsolved.any()
        return images

    assert_same_law(draw, mean.numel() + target.numel(), energy, mean)


def test_conjugate_gradients_leave_solved_images_alone_and_own_up():
    geometry = GEOMETRIES["odd"]
    weight = torch.stack([filters(geometry), 0 * filters(geometry), 5 * filters(geometry)])
    mean = numbers(3, 2, *geometry.input_shape)
    target = numbers(3, 2, *geometry.output_shape, name="targets")
    normals = numbers(3, mean[0].numel() + target[0].numel(), name="normals")
    data = (geometry, weight, VARIANCE, 1e-3, mean, target, normals)
    together, unsolved = gaussian.convolution_inputs(*data)
    assert not unsolved.any()
    for k in range(3):
        alone, _ = gaussian.convolution_inputs(
            *data[:1], weight[k : k + 1], VARIANCE, 1e-3, *(t[k : k + 1] for t in data[4:])
        )
        assert torch.allclose(together[k], alone[0], rtol=1e-12, atol=1e-12)
    _, unsolved = gaussian.convolution_inputs(*data, most_steps=2)
    assert unsolved.tolist() == [2, 0, 2]


@pytest.mark.parametrize(("size", "kernel"), [((5, 7), (2, 3)), ((4, 4), (2, 2)), ((3, 2), (1, 1))])
def test_inputs_of_a_pooling(size, kernel):
    mean = numbers(2, 2, *size)
    target = numbers(2, 2, size[0] // kernel[0], size[1] // kernel[1], name="targets")
    assert torch.allclose(block_means(mean, kernel), functional.avg_pool2d(mean, kernel))
    spread = spread_blocks(target, kernel, size)
    assert torch.allclose(block_means(spread, kernel), target)
    assert spread.abs().gt(0).sum() == target.numel() * kernel[0] * kernel[1]

    def energy(x):
        behind = (target - functional.avg_pool2d(x, kernel)).square().sum() / NOISE
        return 0.5 * behind + 0.5 * (x - mean).square().sum() / VARIANCE

    def draw(normals):
        data = on_chains(mean, normals), on_chains(target, normals)
        return gaussian.pooling_inputs(kernel, VARIANCE, NOISE, *data, normals)

    assert_same_law(draw, mean.numel(), energy, mean)


def test_inputs_of_the_identity():
    mean, target = numbers(3, 2), numbers(3, 2, name="targets")

    def energy(x):
        behind = (target - x).square().sum() / NOISE
        return 0.5 * behind + 0.5 * (x - mean).square().sum() / VARIANCE

    def draw(normals):
        data = on_chains(mean, normals), on_chains(target, normals)
        return gaussian.identity_inputs(VARIANCE, NOISE, *data, normals)

    assert_same_law(draw, mean.numel(), energy, mean)


def test_variances_of_their_own_for_each_chain():
    variances, noises = torch.tensor([[0.1, 2.0], [3.0, 0.2]], dtype=torch.float64)
    geometry = GEOMETRIES["odd"]
    flat, wide = numbers(2, 3, 4), numbers(2, 3, 2, name="wide")
    images, filtered = numbers(2, 3, 2, 4, 5), numbers(2, 3, *geometry.output_shape)
    cases = [
        (partial(gaussian.linear_inputs, numbers(2, 2, 4)), (flat, wide), 18),
        (partial(gaussian.linear_inputs, numbers(2, 1, 4)), (flat, wide[..., :1]), 15),
        (partial(gaussian.linear_inputs, numbers(2, 4, 2)), (wide, flat), 6),
        (partial(gaussian.pooling_inputs, (2, 2)), (images, block_means(images, (2, 2))), 120),
        (gaussian.identity_inputs, (flat, 2 * flat), 12),
        (
            lambda *args: gaussian.convolution_inputs(geometry, *args)[0],
            (images, filtered),
            120 + filtered[0].numel(),
        ),
    ]
    for k, (function, data, size) in enumerate(cases):
        normals = numbers(2, size, name="normals")
        weights = (numbers(2, *filters(geometry).shape),) if k == len(cases) - 1 else ()
        both = function(*weights, variances, noises, *data, normals)
        for chain in range(2):
            one = slice(chain, chain + 1)
            alone_of = function
            if isinstance(function, partial) and isinstance(function.args[0], torch.Tensor):
                alone_of = partial(function.func, function.args[0][one])
            alone = alone_of(
                *(w[one] for w in weights),
                float(variances[chain]),
                float(noises[chain]),
                *(item[one] for item in data),
                normals[one],
            )
            assert torch.allclose(both[one], alone, rtol=1e-9, atol=1e-9)


# --- over-relaxation ------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-0.9, -0.3, 0.5])
def test_over_relaxation_moves_the_present_value_as_adler_says(alpha):
    weight, mean, target = numbers(1, 2, 3), numbers(1, 4, 3), numbers(1, 4, 2)
    size = 4 * gaussian.linear_inputs_size(3, 2)

    def fresh(normals):
        chains = len(normals)
        data = (t.expand(chains, -1, -1) for t in (weight, mean, target))
        first, *rest = data
        return gaussian.linear_inputs(first, VARIANCE, NOISE, *rest, normals)

    present = numbers(1, 4, 3, name="present")

    def moved(normals):
        chains = len(normals)
        conditional = partial(
            gaussian.linear_inputs, weight.expand(chains, -1, -1), VARIANCE, NOISE
        )
        data = mean.expand(chains, -1, -1), target.expand(chains, -1, -1)
        return gaussian.over_relaxed(conditional, data, normals, present, alpha)

    center, covariance = law_of_draws(fresh, size)
    moved_center, moved_covariance = law_of_draws(moved, size)
    expected = center + alpha * (present.flatten() - center)
    assert torch.allclose(moved_center, expected, atol=1e-12)
    assert torch.allclose(moved_covariance, (1 - alpha**2) * covariance, atol=1e-12)


# --- seeded faults --------------------------------------------------------------------------------

FAULTS = {
    "noise x 1.05": lambda f: lambda w, v, d, m, t, z: f(w, v, d, m, t, 1.05 * z),
    "variances swapped": lambda f: lambda w, v, d, m, t, z: f(w, d, v, m, t, z),
    "a variance dropped": lambda f: lambda w, v, d, m, t, z: f(w, v, d / d, m, t, z),
    "prior mean dropped": lambda f: lambda w, v, d, m, t, z: f(w, v, d, 0 * m, t, z),
    "noise shared by two numbers": lambda f: (
        lambda w, v, d, m, t, z: f(w, v, d, m, t, torch.cat([z[:, :1], z[:, :1], z[:, 2:]], 1))
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize(("n", "d", "p"), [(3, 4, 1), (3, 2, 5)])
def test_faults_are_caught(fault, n, d, p, monkeypatch):
    monkeypatch.setattr(gaussian, "linear_inputs", fault(gaussian.linear_inputs))
    with pytest.raises(AssertionError):
        test_inputs_of_a_linear_map(n, d, p, False)


@pytest.mark.parametrize("factor", [1.05, 0.95, 1.001])
def test_faulty_weights_are_caught(factor, monkeypatch):
    right = gaussian.ridge
    monkeypatch.setattr(
        gaussian, "ridge", lambda lower, noise, cross, z: right(lower, noise, cross, factor * z)
    )
    with pytest.raises(AssertionError):
        test_weights_and_bias(7, 3, 2, True)
    with pytest.raises(AssertionError):
        test_filters_and_bias(GEOMETRIES["odd"], True, True, 1, monkeypatch)
