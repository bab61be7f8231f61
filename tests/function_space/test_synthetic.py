"""Distances on synthetic inputs: exact cases, gradients, errors, anchoring, and what is refused."""

import pytest
import torch
from torch import nn

from pushforward.errors import LawError, OptionError, ShapeError
from pushforward.function_space.metrics import discrepancy
from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.synthetic import SyntheticRun
from pushforward.function_space.synthetic_inputs import (
    SyntheticInputs,
    allocate,
    covariance_factor,
    draw_gaussian,
    token_inputs,
)
from pushforward.function_space.token_law import TokenLaw
from pushforward.runs.rng import stream
from scenarios import generator, normal
from token_networks import MaskedTransformer, TinyTransformer, moved, pairs, randomised

F64 = torch.float64
ONE = torch.ones(1, dtype=F64)
METRICS = ("euclidean", "softmax", "kl", "fisher")


def synthetic_distance(reference, tensors, inputs, metric="euclidean", outputs=None, *, chunk=1024):
    return SyntheticRun.of(reference, inputs, chunk=chunk).distance(tensors, metric, outputs)


def gaussian_inputs(reference, mean, covariance, weights, *, num, seed, antithetic=True):
    samples, component = draw_gaussian(
        mean,
        covariance_factor(covariance),
        allocate(weights, num, antithetic=antithetic),
        stream(seed, "tests"),
        antithetic=antithetic,
    )
    shaped = samples.reshape(len(samples), *reference.event_shape).to(reference.dtype)
    return SyntheticInputs(shaped, component, weights, antithetic)


def transformer(seed=0, *, pooled=False):
    return ReferenceNetwork.of(randomised(TinyTransformer(pooled=pooled), seed), (3,))


def drawn_pairs(reference, num=64, seed=0, order="independent"):
    return token_inputs(reference, [TokenLaw.of(pairs(), order=order)], ONE, num=num, seed=seed)


def exact(reference, tensors, inputs, metric="euclidean"):
    with torch.no_grad():
        old = reference.outputs(reference.tensors, inputs)
        new = reference.outputs(tensors, inputs)
    return discrepancy(old, new, metric).mean()


def mlp(seed=0, inputs=4):
    net = nn.Sequential(nn.Linear(inputs, 6), nn.GELU(), nn.Linear(6, 3))
    return ReferenceNetwork.of(randomised(net, seed), (inputs,))


def gradient(value, tensors):
    return torch.autograd.grad(value, list(tensors.values()))


# Exact cases


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("chunk", [1024, 10])
def test_nothing_moved_is_exactly_zero(metric, chunk):
    reference = transformer()
    same = {name: t.clone().requires_grad_() for name, t in reference.tensors.items()}
    found = synthetic_distance(reference, same, drawn_pairs(reference), metric, chunk=chunk)
    assert found.value.item() == 0
    assert found.standard_error.item() == 0
    # The derivative of kl ends in a sum of probabilities, which is one up to rounding.
    bound = 1e-12 if metric == "kl" else 0
    assert all(bool((g.abs() <= bound).all()) for g in gradient(found.value, same))


def test_single_precision_is_exactly_zero_too():
    net = randomised(TinyTransformer(), 1).float()
    reference = ReferenceNetwork.of(net, (3,))
    found = synthetic_distance(reference, reference.tensors_of(net), drawn_pairs(reference, 50))
    assert found.value.item() == 0
    assert found.value.dtype == torch.float32


@pytest.mark.statistical
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_with_the_law_of_the_data_it_is_the_distance(metric, pooled):
    # All pairs occur equally often, so that independent tokens have the law of the data.
    reference = transformer(pooled=pooled)
    for seed in range(3):
        tensors = moved(reference.module, seed)
        found = synthetic_distance(reference, tensors, drawn_pairs(reference, 200, seed), metric)
        truth = exact(reference, tensors, pairs(), metric)
        assert abs(found.value.item() - truth) < 4 * found.standard_error
        assert 0 < found.standard_error < 0.2 * truth


def test_bigrams_of_two_tokens_are_the_data():
    # Not the independent law: the second token is a function of the first.
    tokens = torch.stack([torch.arange(8), (torch.arange(8) * 3) % 8], 1)
    net = randomised(TinyTransformer(vocabulary=8, length=2), 2)
    reference = ReferenceNetwork.of(net, (2,))
    tensors = moved(net, 4)
    truth = exact(reference, tensors, tokens)
    values = {}
    for order in ("bigram", "independent"):
        inputs = token_inputs(reference, [TokenLaw.of(tokens, order=order)], ONE, num=64, seed=0)
        values[order] = synthetic_distance(reference, tensors, inputs).value.detach()
    torch.testing.assert_close(values["bigram"], truth, rtol=1e-10, atol=0)
    assert abs(values["independent"] / truth - 1) > 0.01


@pytest.mark.statistical
def test_gaussian_inputs_agree_with_brute_force():
    reference = mlp()
    tensors = moved(reference.module, 1)
    root = normal(2, 2, 4, 4)
    mean, covariance = normal(3, 2, 4), root @ root.mT
    weights = torch.tensor([0.3, 0.7], dtype=F64)
    truth, variance = 0.0, 0.0
    for c in range(2):
        x = mean[c] + normal(4 + c, 200_000, 4) @ torch.linalg.cholesky(covariance[c]).T
        rows = discrepancy(
            reference.outputs(reference.tensors, x), reference.outputs(tensors, x), "euclidean"
        ).detach()
        truth += float(weights[c] * rows.mean())
        variance += float(weights[c] ** 2 * rows.var() / len(rows))
    for antithetic in (False, True):
        inputs = gaussian_inputs(
            reference, mean, covariance, weights, num=4000, seed=5, antithetic=antithetic
        )
        found = synthetic_distance(reference, tensors, inputs)
        error = (float(found.standard_error) ** 2 + variance) ** 0.5
        assert abs(found.value.item() - truth) < 4 * error
        assert error < 0.1 * truth


@pytest.mark.statistical
@pytest.mark.parametrize("antithetic", [False, True])
def test_the_standard_error_is_the_spread_over_seeds(antithetic):
    reference = mlp()
    tensors = reference.tensors_of(moved(reference.module, 1))
    mean, covariance = normal(3, 1, 4), torch.eye(4, dtype=F64)[None]
    found = [
        synthetic_distance(
            reference,
            tensors,
            gaussian_inputs(
                reference, mean, covariance, ONE, num=40, seed=seed, antithetic=antithetic
            ),
        )
        for seed in range(200)
    ]
    spread = torch.stack([f.value.detach() for f in found]).std()
    claimed = torch.stack([f.standard_error for f in found]).square().mean().sqrt()
    # 200 draws of heavy tails: the ratio has a standard error of about 0.07. Antithetic draws have
    # exact second moments, which the stated error does not know: it is an upper bound.
    assert (0.2 if antithetic else 0.7) < spread / claimed < 1.3


def test_components_are_weighted():
    reference = mlp()
    tensors = moved(reference.module, 1)
    inputs = gaussian_inputs(
        reference,
        normal(1, 2, 4),
        torch.ones(2, 4, dtype=F64),
        torch.tensor([0.25, 0.75], dtype=F64),
        num=40,
        seed=0,
    )
    found = synthetic_distance(reference, tensors, inputs)
    first, second = found.rows[:10].mean(), found.rows[10:].mean()
    torch.testing.assert_close(found.value, 0.25 * first + 0.75 * second)
    torch.testing.assert_close(found.component_values, torch.stack([first, second]))
    torch.testing.assert_close(
        found.standard_error,
        torch.tensor([0.25, 0.75], dtype=F64).mul(found.component_errors).norm(),
    )


# Gradients


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_are_finite_differences(metric):
    reference = transformer()
    tensors = moved(reference.module, 4)
    run = SyntheticRun.of(reference, drawn_pairs(reference, 12))
    slopes = gradient(run.distance(tensors, metric).value, tensors)
    direction = {name: normal(5, *t.shape) for name, t in tensors.items()}
    slope = sum((g * d).sum() for g, d in zip(slopes, direction.values(), strict=True))
    step = 1e-5
    high, low = (
        run.distance({n: t + s * direction[n] for n, t in tensors.items()}, metric).value
        for s in (step, -step)
    )
    torch.testing.assert_close(((high - low) / (2 * step)).detach(), slope, rtol=1e-6, atol=1e-9)


def test_chunks_change_nothing_but_memory():
    reference = transformer()
    tensors = moved(reference.module, 4)
    inputs = drawn_pairs(reference, 50)
    whole, parts = (
        synthetic_distance(reference, tensors, inputs, chunk=chunk) for chunk in (50, 7)
    )
    torch.testing.assert_close(whole.value, parts.value)
    for first, second in zip(
        gradient(whole.value, tensors), gradient(parts.value, tensors), strict=True
    ):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("chunk", [16, 5])
def test_there_is_a_second_derivative(chunk):
    # At the reference it is the Gauss-Newton matrix: twice the distance of a small step.
    reference = transformer()
    tensors = {name: t.clone().requires_grad_() for name, t in reference.tensors.items()}
    run = SyntheticRun.of(reference, drawn_pairs(reference, 16), chunk=chunk)
    direction = [normal(6, *t.shape) for t in tensors.values()]
    slopes = torch.autograd.grad(
        run.distance(tensors).value, list(tensors.values()), create_graph=True
    )
    along = sum((g * d).sum() for g, d in zip(slopes, direction, strict=True))
    curved = torch.autograd.grad(along, list(tensors.values()))
    curvature = sum((h * d).sum() for h, d in zip(curved, direction, strict=True))
    step = 1e-4
    near = {n: t + step * d for (n, t), d in zip(tensors.items(), direction, strict=True)}
    small = 2 * run.distance(near).value.detach() / step**2
    torch.testing.assert_close(curvature, small, rtol=1e-2, atol=0)


def test_fused_attention_is_back_afterwards():
    reference = transformer()
    assert torch.backends.mha.get_fastpath_enabled()
    SyntheticRun.of(reference, drawn_pairs(reference))
    assert torch.backends.mha.get_fastpath_enabled()


# Inputs


def test_a_mapping_with_a_mask():
    net = randomised(MaskedTransformer(), 0)
    reference = ReferenceNetwork.of(net, (4,))
    noise = generator(1)
    sizes = torch.randint(1, 5, (40,), generator=noise)
    real = torch.arange(4) < sizes[:, None]
    tokens = (1 + torch.randint(6, (40, 4), generator=noise)) * real
    data = {"input_ids": tokens, "attention_mask": real.long()}
    inputs = token_inputs(reference, [TokenLaw.of(data)], ONE, num=300, seed=0)
    tensors = moved(net, 2)
    truth = exact(reference, tensors, data)
    found = synthetic_distance(reference, tensors, inputs, chunk=64)
    assert abs(found.value.item() / truth.item() - 1) < 0.2
    assert all(bool(torch.isfinite(g).all()) for g in gradient(found.value, tensors))


def test_selected_outputs():
    reference = transformer()
    tensors = moved(reference.module, 1)
    run = SyntheticRun.of(reference, drawn_pairs(reference, 20))
    whole = run.distance(tensors).value
    parts = [run.distance(tensors, outputs=[k]).value for k in range(11)]
    torch.testing.assert_close(sum(parts), whole)
    with pytest.raises(ShapeError, match="outputs"):
        run.distance(tensors, outputs=[11])


def test_other_dtypes_of_the_other_weights():
    reference = transformer()
    tensors = {
        n: t.detach().float().requires_grad_() for n, t in moved(reference.module, 1).items()
    }
    found = synthetic_distance(reference, tensors, drawn_pairs(reference, 20)).value
    assert found.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in gradient(found, tensors))


def test_the_seed_decides():
    reference = mlp()
    law = {"mean": normal(0, 1, 4), "covariance": torch.ones(1, 4, dtype=F64), "weights": ONE}
    first, again, other = (
        gaussian_inputs(reference, **law, num=8, seed=seed).inputs for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_antithetic_pairs_mirror_each_other():
    mean, factor = normal(0, 2, 3), normal(1, 2, 3, 2)
    x, component = draw_gaussian(mean, factor, torch.tensor([4, 6]), generator(0))
    assert component.tolist() == [0] * 4 + [1] * 6
    torch.testing.assert_close((x[::2] + x[1::2]) / 2, mean[component[::2]])


@pytest.mark.statistical
def test_gaussian_samples_have_the_moments():
    mean, factor = normal(0, 1, 3), normal(1, 1, 3, 2)
    x, _ = draw_gaussian(mean, factor, torch.tensor([100_000]), generator(0), antithetic=False)
    covariance = (factor @ factor.mT)[0]
    variance = covariance.diagonal()
    bound = 4 * ((covariance**2 + variance * variance[:, None]) / len(x)).sqrt()
    assert bool(((torch.cov(x.T) - covariance).abs() < bound).all())
    assert bool(((x.mean(0) - mean[0]).abs() < 4 * (variance / len(x)).sqrt()).all())


def test_factors_may_be_of_low_rank():
    factor = normal(1, 1, 4, 2)
    nowhere = torch.zeros(1, 4, dtype=F64)
    rows, _ = draw_gaussian(nowhere, factor, torch.tensor([10]), generator(0))
    assert torch.linalg.matrix_rank(rows) == 2
    assert torch.linalg.matrix_rank(torch.cat([rows, factor[0].T])) == 2
    torch.testing.assert_close(rows.T @ rows / 10, factor[0] @ factor[0].T)


def test_samples_are_shared_out():
    weights = torch.tensor([0.1, 0.9, 0.0], dtype=F64)
    assert allocate(weights, 30).tolist() == [3, 27, 2]
    assert allocate(weights, 30, antithetic=True).tolist() == [4, 28, 4]


# Refusals


def test_what_does_not_fit_is_refused():
    reference = mlp()
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.1], dtype=F64))[None]
    mean = torch.zeros(1, 4, dtype=F64)
    with pytest.raises(LawError, match="indefinite"):
        gaussian_inputs(reference, mean, indefinite, ONE, num=8, seed=0)
    with pytest.raises(LawError, match="weights"):
        gaussian_inputs(reference, mean, indefinite.abs(), 2 * ONE, num=8, seed=0)
    with pytest.raises(ShapeError, match="draw_gaussian"):
        draw_gaussian(mean, indefinite[:, :2], torch.tensor([4]), generator(0))
    with pytest.raises(ShapeError, match="draw_gaussian"):
        draw_gaussian(mean, indefinite, torch.tensor([3]), generator(0))
    law = TokenLaw.of(pairs())
    with pytest.raises(ShapeError, match="2 laws"):
        token_inputs(reference, [law, law], ONE, num=8, seed=0)
    with pytest.raises(OptionError, match="counts"):
        SyntheticInputs(mean, torch.zeros(1, dtype=torch.int64), ONE)
    with pytest.raises(OptionError, match="chunk"):
        SyntheticRun.of(reference, drawn_pairs(reference), chunk=0)


@pytest.mark.parametrize(("antithetic", "square"), [(True, 1.0), (False, 14 / 12)])
def test_standard_errors_by_hand(antithetic, square):
    """Pairs count as one draw each; squares are divided by one less than there are."""
    weights = torch.ones(1, dtype=torch.float64)
    component = torch.zeros(4, dtype=torch.long)
    sample = SyntheticInputs(torch.zeros(4, 2), component, weights, antithetic)
    errors = sample.component_errors(torch.tensor([1.0, 3.0, 2.0, 6.0], dtype=torch.float64))
    assert errors.tolist() == pytest.approx([square**0.5])


def test_the_seed_decides_the_tokens():
    reference = transformer()
    first, again, other = (drawn_pairs(reference, seed=seed).inputs for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
