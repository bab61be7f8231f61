"""One contract for all likelihoods, then what is particular to each."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import distributions

from pushforward.errors import DataError, OptionError, ShapeError
from pushforward.networks.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    Likelihood,
    Poisson,
    likelihood_from_config,
)
from pushforward.runs.rng import stream
from scenarios import normal

# name: likelihood, shape of the outputs, the same law by torch.distributions
CASES = {
    "gaussian": (Gaussian(0.7), (5, 3), lambda f: distributions.Normal(f, 0.7**0.5)),
    "gaussian, one output": (Gaussian(2.0), (5,), lambda f: distributions.Normal(f, 2.0**0.5)),
    "gaussian, noise per output": (
        Gaussian([0.3, 1.7, 4.0]),
        (4, 2, 3),
        lambda f: distributions.Normal(f, f.new_tensor([0.3, 1.7, 4.0]).sqrt()),
    ),
    "categorical": (Categorical(), (5, 4), lambda f: distributions.Categorical(logits=f)),
    "categorical, positions": (
        Categorical(),
        (4, 2, 3),
        lambda f: distributions.Categorical(logits=f),
    ),
    "bernoulli": (Bernoulli(), (5, 3), lambda f: distributions.Bernoulli(logits=f)),
    "bernoulli, one output": (Bernoulli(), (5,), lambda f: distributions.Bernoulli(logits=f)),
    "poisson": (Poisson(), (4, 2, 2), lambda f: distributions.Poisson(f.exp())),
}


@pytest.fixture(params=CASES)
def case(request):
    """A likelihood, outputs (B, *event), targets that can occur, and the law from elsewhere."""
    likelihood, shape, law = CASES[request.param]
    outputs = 1.2 * normal(3, *shape)
    targets = likelihood.sample(outputs, stream(4, request.param))
    return likelihood, outputs, targets, law


def indicators(likelihood, targets, outputs):
    """Targets as numbers, one for each output: labels as indicators of the classes."""
    if isinstance(likelihood, Categorical):
        return torch.nn.functional.one_hot(targets, outputs.shape[-1]).to(outputs.dtype)
    return targets


def dense_hessian(likelihood, outputs, targets):
    """Negative Hessian (C, C) of one example's log-probability, by automatic differentiation."""

    def function(flat):
        return -likelihood.log_prob(flat.reshape(1, *outputs.shape), targets[None]).sum()

    return torch.autograd.functional.hessian(function, outputs.flatten())


def columns(product, outputs):
    """The matrix (C, C) of a linear map of one example's outputs, from the unit vectors."""
    units = torch.eye(outputs.numel(), dtype=outputs.dtype)
    return product(outputs[None], units.reshape(-1, 1, *outputs.shape)).flatten(1).mT


def test_every_likelihood_is_under_contract():
    covered = {likelihood.to_config()["kind"] for likelihood, *_ in CASES.values()}
    with pytest.raises(OptionError) as caught:
        likelihood_from_config({"kind": "?"})
    assert all(kind in caught.value.advice for kind in covered)
    assert len(covered) == caught.value.advice.count(",") + 1


def test_log_prob_is_that_of_the_law(case):
    likelihood, outputs, targets, law = case
    each = law(outputs).log_prob(targets)
    expected = each.flatten(1).sum(1) if each.dim() > 1 else each
    torch.testing.assert_close(likelihood.log_prob(outputs, targets), expected)


def test_mean_and_variance_are_those_of_the_law(case):
    likelihood, outputs, _, law = case
    if isinstance(likelihood, Categorical):
        p = law(outputs).probs
        mean, variance = p, p * (1 - p)
    else:
        mean, variance = law(outputs).mean, law(outputs).variance
    torch.testing.assert_close(likelihood.mean(outputs), mean)
    torch.testing.assert_close(likelihood.variance(outputs), variance)
    assert likelihood.variance(outputs).shape == outputs.shape


@pytest.mark.parametrize("index", [0, 3])
def test_probabilities_add_up_to_one(case, index):
    likelihood, outputs, targets, law = case
    one, labels = outputs[index : index + 1], targets[index : index + 1]
    if isinstance(likelihood, Gaussian):
        # The last target runs over a grid; what the others contribute is taken out.
        grid = torch.linspace(-25, 25, 4001, dtype=torch.float64)
        every = labels.repeat(len(grid), *[1] * (labels.dim() - 1))
        every.view(len(grid), -1)[:, -1] = grid
        others = law(one).log_prob(labels).flatten()[:-1].sum()
        density = likelihood.log_prob(one.expand(every.shape), every) - others
        total = torch.trapezoid(density.exp(), grid)
    else:
        last = {Bernoulli: 2, Categorical: outputs.shape[-1], Poisson: 30}[type(likelihood)]
        if isinstance(likelihood, Poisson):
            one = one.clamp(max=1.0)
            values = itertools.product(range(last), repeat=2)  # two outputs; the others at zero
            grid = torch.tensor(list(values), dtype=torch.float64)
            every = torch.zeros(len(grid), *labels.shape[1:], dtype=torch.float64)
            every[:, 0] = grid
            off = likelihood.mean(one)[0, 1].sum()  # minus the log-probability of two zeros
        else:
            values = itertools.product(range(last), repeat=labels.numel())
            every = torch.tensor(list(values)).reshape(-1, *labels.shape[1:])
            off = torch.zeros(())
        every = likelihood.check_targets(one.expand(len(every), *one.shape[1:]), every)
        density = likelihood.log_prob(one.expand(len(every), *one.shape[1:]), every)
        total = (density + off).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-10)


def test_score_is_the_gradient(case):
    likelihood, outputs, targets, _ = case
    stacked = torch.stack([outputs, outputs - 0.3, 2 * outputs]).requires_grad_()
    log_prob = likelihood.log_prob(stacked, targets)
    assert log_prob.shape == (3, len(outputs))
    (gradient,) = torch.autograd.grad(log_prob.sum(), stacked)
    torch.testing.assert_close(likelihood.score(stacked, targets), gradient)
    torch.testing.assert_close(likelihood.score(outputs, targets), gradient[0])


def test_curvature_is_the_negative_hessian(case):
    likelihood, outputs, targets, _ = case
    for f, y in zip(outputs, targets, strict=True):
        hessian = dense_hessian(likelihood, f, y)
        torch.testing.assert_close(columns(likelihood.curvature_product, f), hessian)
        factor = columns(likelihood.curvature_factor, f)
        torch.testing.assert_close(factor @ factor.mT, hessian)
        adjoint = columns(likelihood.curvature_factor_adjoint, f)
        torch.testing.assert_close(adjoint, factor.mT)


def test_products_take_leading_axes_and_batches(case):
    likelihood, outputs, _, _ = case
    vectors = normal(6, 2, 3, *outputs.shape)
    for name in ("curvature_product", "curvature_factor", "curvature_factor_adjoint"):
        product = getattr(likelihood, name)
        together = product(outputs, vectors)
        assert together.shape == vectors.shape
        for i, j in itertools.product(range(2), range(3)):
            torch.testing.assert_close(together[i, j], product(outputs, vectors[i, j]))
        single = product(outputs[1:2], vectors[0, 0, 1:2])
        torch.testing.assert_close(together[0, 0, 1:2], single)


def test_factor_and_its_adjoint_fit(case):
    likelihood, outputs, _, _ = case
    noise, vectors = normal(7, 3, *outputs.shape), normal(8, 3, *outputs.shape)
    left = (likelihood.curvature_factor(outputs, noise) * vectors).sum()
    right = (noise * likelihood.curvature_factor_adjoint(outputs, vectors)).sum()
    torch.testing.assert_close(left, right)
    squared = likelihood.curvature_factor_adjoint(outputs, vectors).square().sum()
    product = (vectors * likelihood.curvature_product(outputs, vectors)).sum()
    torch.testing.assert_close(squared, product)


@pytest.mark.statistical
def test_samples_have_the_mean_and_variance_of_the_law(case):
    likelihood, outputs, targets, _ = case
    draws = 20_000
    stacked = outputs.expand(draws, *outputs.shape)
    drawn = likelihood.sample(stacked, stream(9, "draws"))
    assert drawn.shape == (draws, *targets.shape)
    assert drawn.dtype == targets.dtype
    values = indicators(likelihood, drawn, outputs)
    mean, variance = likelihood.mean(outputs), likelihood.variance(outputs)
    residual = values - mean
    # At most 24 entries, two comparisons each: one seed in 300 would fail by chance.
    z = residual.mean(0) / (variance / draws).sqrt()
    assert float(z.abs().max()) < 4
    squared = residual.square()
    z = (squared.mean(0) - variance) / (squared.std(0) / draws**0.5)
    assert float(z.abs().max()) < 4


@pytest.mark.statistical
def test_samples_of_different_outputs_are_independent(case):
    likelihood, outputs, _, _ = case
    draws = 4_000
    drawn = likelihood.sample(outputs.expand(draws, *outputs.shape), stream(10, "draws"))
    values = indicators(likelihood, drawn, outputs)[:, 1:3].reshape(draws, 2, -1)
    residual = values - values.mean(0)
    correlation = (residual[:, 0] * residual[:, 1]).mean(0) / values.std(0).prod(0)
    assert float(correlation.abs().max()) < 4 / draws**0.5


def test_a_stream_decides_the_samples(case):
    likelihood, outputs, targets, _ = case
    first = likelihood.sample(outputs, stream(11, "a"))
    assert torch.equal(first, likelihood.sample(outputs, stream(11, "a")))
    assert torch.equal(likelihood.check_targets(outputs, first), first)
    torch.testing.assert_close(likelihood.check_targets(outputs, targets), targets)


def test_float32_stays_float32(case):
    likelihood, outputs, targets, _ = case
    f = outputs.float()
    y = likelihood.check_targets(f, targets)
    assert y.dtype == (torch.int64 if isinstance(likelihood, Categorical) else torch.float32)
    drawn = likelihood.sample(f, stream(12, "a"))
    assert drawn.dtype == y.dtype
    for got, exact in [
        (likelihood.log_prob(f, y), likelihood.log_prob(outputs, targets)),
        (likelihood.score(f, y), likelihood.score(outputs, targets)),
        (likelihood.curvature_product(f, f), likelihood.curvature_product(outputs, outputs)),
        (likelihood.curvature_factor(f, f), likelihood.curvature_factor(outputs, outputs)),
        (likelihood.mean(f), likelihood.mean(outputs)),
        (likelihood.variance(f), likelihood.variance(outputs)),
        (likelihood.probit_mean(f, f**2), likelihood.probit_mean(outputs, outputs**2)),
    ]:
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_outputs_give_no_nan(case, dtype, scale):
    likelihood, outputs, targets, _ = case
    f = torch.full_like(outputs, scale, dtype=dtype)
    f.view(-1)[::2] = 0.0
    y = likelihood.check_targets(f, targets)
    zero, vectors = torch.zeros_like(f), torch.ones_like(f)
    values = [
        likelihood.log_prob(f, y),
        likelihood.score(f, y),
        likelihood.mean(f),
        likelihood.variance(f),
        likelihood.probit_mean(f, vectors),
    ]
    for name in ("curvature_product", "curvature_factor", "curvature_factor_adjoint"):
        product = getattr(likelihood, name)
        values += [product(f, vectors), product(f, zero)]
        assert not product(f, zero).any()
    assert not any(value.isnan().any() for value in values)
    assert all(value.isfinite().all() for value in values[1:])
    if not (isinstance(likelihood, Poisson) and scale > 0):
        assert likelihood.sample(f, stream(13, "a")).isfinite().all()


def test_gaussian_outputs_without_variance_leave_the_mean(case):
    likelihood, outputs, _, _ = case
    moderated = likelihood.probit_mean(outputs, torch.zeros_like(outputs))
    torch.testing.assert_close(moderated, likelihood.mean(outputs))


def test_empty_batches(case):
    likelihood, outputs, targets, _ = case
    f, y = outputs[:0], likelihood.check_targets(outputs[:0], targets[:0])
    assert likelihood.log_prob(f, y).shape == (0,)
    assert likelihood.score(f, y).shape == f.shape
    assert likelihood.sample(f, stream(14, "a")).shape == y.shape


def test_products_work_under_vmap(case):
    likelihood, outputs, _, _ = case
    vectors = normal(15, 3, *outputs.shape)
    mapped = torch.func.vmap(lambda v: likelihood.curvature_product(outputs, v))(vectors)
    torch.testing.assert_close(mapped, likelihood.curvature_product(outputs, vectors))


def test_config_round_trip(case):
    likelihood, *_ = case
    config = json.loads(json.dumps(likelihood.to_config()))
    again = likelihood_from_config(config)
    assert again == likelihood
    assert hash(again) == hash(likelihood)
    assert type(again) is type(likelihood)


# --- moderated means ---------------------------------------------------------------------------


def gauss_hermite(points=200):
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


GRID = torch.cartesian_prod(
    torch.linspace(-6, 6, 13, dtype=torch.float64),
    torch.tensor([0.01, 0.5, 2.0, 8.0], dtype=torch.float64),
)


def quadrature(function, outputs, variance):
    nodes, weights = gauss_hermite()
    return (weights * function(outputs[:, None] + variance.sqrt()[:, None] * nodes)).sum(1)


@pytest.mark.parametrize("likelihood", [Gaussian(0.3), Poisson()], ids=["gaussian", "poisson"])
def test_probit_mean_is_exact_where_it_can_be(likelihood):
    outputs, variance = GRID.unbind(1)
    exact = quadrature(likelihood.mean, outputs, variance)
    torch.testing.assert_close(likelihood.probit_mean(outputs, variance), exact)


def test_probit_mean_of_a_logit_is_close():
    outputs, variance = GRID.unbind(1)
    exact = quadrature(torch.sigmoid, outputs, variance)
    error = (Bernoulli().probit_mean(outputs, variance) - exact).abs()
    assert float(error.max()) < 0.025
    naive = (torch.sigmoid(outputs) - exact).abs()
    assert float(naive.max()) > 0.15


def test_probit_mean_of_classes_is_the_element_wise_formula():
    outputs, variance = 2 * normal(16, 6, 3), 3 * normal(17, 6, 3).abs()
    got = Categorical().probit_mean(outputs, variance)
    for b in range(6):
        kappa = [1 / math.sqrt(1 + math.pi * v / 8) for v in variance[b].tolist()]
        weights = [math.exp(k * f) for k, f in zip(kappa, outputs[b].tolist(), strict=True)]
        expected = [w / sum(weights) for w in weights]
        assert got[b].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.statistical
def test_probit_mean_of_classes_is_close():
    outputs, variance = 1.5 * normal(18, 40, 3), torch.full((40, 3), 1.5, dtype=torch.float64)
    noise = torch.randn(20_000, 40, 3, generator=stream(19, "mc"), dtype=torch.float64)
    sampled = (outputs + variance.sqrt() * noise).softmax(-1).mean(0)  # to 0.003
    error = (Categorical().probit_mean(outputs, variance) - sampled).abs()
    assert float(error.max()) < 0.08
    assert float(error.max()) < 0.5 * float((outputs.softmax(-1) - sampled).abs().max())


# --- targets -----------------------------------------------------------------------------------

F53 = torch.zeros(5, 3)
F5 = torch.zeros(5)
NAN = float("nan")


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "message"),
    [
        (Gaussian(), F53, torch.zeros(5, 2), r"shape \(5, 2\), the outputs \(5, 3\)"),
        (Gaussian(), F53, torch.zeros(4, 3), r"shape \(4, 3\)"),
        (Gaussian(), F53, torch.zeros(5), r"shape \(5,\)"),
        (Gaussian(), F53, torch.zeros(15), r"shape \(15,\)"),
        (Gaussian(), F5[:, None], torch.zeros(4), r"shape \(4,\)"),
        (Gaussian(), F5[:1, None], torch.zeros(()), r"shape \(\)"),
        (Gaussian([1, 2]), F53, F53, "2 noise variances for 3 outputs"),
        (Gaussian([1.0] * 5), F5, F5, "5 noise variances for one output"),
        (Categorical(), F53, torch.zeros(4, dtype=torch.int64), r"shape \(4,\)"),
        (Categorical(), F53, torch.zeros(5, 3, dtype=torch.int64), r"shape \(5, 3\)"),
        (Categorical(), F5, torch.zeros(5, dtype=torch.int64), "no axis with two classes"),
        (Categorical(), F5[:, None], torch.zeros(5, dtype=torch.int64), "no axis with two"),
        (Categorical(), torch.zeros(5, 2, 3), torch.zeros(5, dtype=torch.int64), r"shape \(5,\)"),
        (Bernoulli(), F53, torch.zeros(3, 5), r"shape \(3, 5\)"),
        (Poisson(), F53, torch.zeros(5, 3, 1), r"shape \(5, 3, 1\)"),
    ],
)
def test_shapes_that_disagree_are_refused(likelihood, outputs, targets, message):
    with pytest.raises(ShapeError, match=message):
        likelihood.check_targets(outputs, targets, "batch 2 of data")


@pytest.mark.parametrize(
    ("likelihood", "shape", "value", "dtype", "message"),
    [
        (Gaussian(), (5, 3), NAN, torch.float32, "nan at position [3, 1] is not a finite"),
        (Gaussian(), (5, 3), -math.inf, torch.float32, "-inf at position [3, 1]"),
        (Gaussian(), (5, 3), 1e300, torch.float64, "1e+300 at position [3, 1]"),
        (Bernoulli(), (5, 3), 0.5, torch.float32, "0.5 at position [3, 1] is neither 0 nor 1"),
        (Bernoulli(), (5, 3), 2, torch.int64, "2 at position [3, 1] is neither"),
        (Bernoulli(), (5, 3), NAN, torch.float32, "nan at position [3, 1]"),
        (Poisson(), (5, 3), -1, torch.int64, "-1 at position [3, 1] is not a count"),
        (Poisson(), (5, 3), 1.5, torch.float32, "1.5 at position [3, 1] is not a count"),
        (Poisson(), (5, 3), math.inf, torch.float32, "inf at position [3, 1] is not a count"),
        (Poisson(), (5, 3), NAN, torch.float32, "nan at position [3, 1] is not a count"),
        (Categorical(), (5, 3, 4), 4, torch.int64, "4 at position [3, 1] is outside the classes 0"),
        (Categorical(), (5, 3, 4), -100, torch.int64, "-100 at position [3, 1] is outside"),
    ],
)
def test_the_first_target_out_of_range_is_named(likelihood, shape, value, dtype, message):
    targets = torch.zeros(5, 3, dtype=dtype)
    targets[3, 1] = targets[4, 0] = value
    with pytest.raises(DataError) as caught:
        likelihood.check_targets(torch.zeros(shape), targets, "batch 2 of data")
    assert message in caught.value.what
    assert caught.value.where == "batch 2 of data"


def test_the_first_label_out_of_range_is_named_in_a_flat_batch():
    targets = torch.tensor([0, 2, 3, 7, 1])
    with pytest.raises(DataError, match=r"3 at position \[2\] is outside the classes 0 to 2"):
        Categorical().check_targets(F53, targets)


@pytest.mark.parametrize(
    ("likelihood", "targets"),
    [
        (Categorical(), torch.zeros(5)),
        (Categorical(), torch.zeros(5, 3)),
        (Categorical(), torch.zeros(5, dtype=torch.bool)),
        (Gaussian(), torch.zeros(5, 3, dtype=torch.complex64)),
        (Bernoulli(), torch.zeros(5, 3, dtype=torch.complex64)),
        (Poisson(), torch.zeros(5, 3, dtype=torch.complex64)),
    ],
)
def test_targets_of_a_wrong_kind_are_refused(likelihood, targets):
    with pytest.raises(DataError, match=str(targets.dtype)):
        likelihood.check_targets(F53, targets)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_integers_of_all_sizes_serve(dtype):
    values = torch.tensor([0, 1, 1, 0, 1], dtype=dtype)
    labels = Categorical().check_targets(F53, values)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 1, 0, 1]
    for likelihood in (Gaussian(), Bernoulli(), Poisson()):
        assert torch.equal(likelihood.check_targets(F5, values), values.float())


def test_booleans_serve_as_answers():
    answers = torch.tensor([True, False, True, False, False])
    assert Bernoulli().check_targets(F5, answers).tolist() == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("likelihood", [Gaussian(1.0), Bernoulli(), Poisson()])
@pytest.mark.parametrize(("outputs", "targets"), [((5, 1), (5,)), ((5,), (5, 1)), ((1, 1), (1,))])
def test_a_single_target_may_miss_its_axis(likelihood, outputs, targets):
    values = torch.arange(5.0)[: targets[0]].remainder(2)
    checked = likelihood.check_targets(torch.zeros(outputs), values.reshape(targets))
    assert checked.shape == outputs
    assert torch.equal(checked.flatten(), values)


def test_a_single_label_may_have_an_axis():
    labels = torch.tensor([[0], [2], [1], [1], [0]])
    assert Categorical().check_targets(F53, labels).tolist() == [0, 2, 1, 1, 0]


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets"),
    [
        (Gaussian(1.0), torch.zeros(4, 1), torch.zeros(4)),
        (Bernoulli(), torch.zeros(4), torch.zeros(4, 1)),
        (Poisson(), torch.zeros(4), torch.zeros(())),
        (Categorical(), torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.int64)),
        (Categorical(), torch.zeros(4, 3), torch.zeros(1, dtype=torch.int64)),
    ],
)
def test_unchecked_targets_do_not_broadcast(likelihood, outputs, targets):
    for method in (likelihood.log_prob, likelihood.score):
        with pytest.raises(ShapeError, match="targets have shape"):
            method(outputs, targets)


def test_targets_carry_no_gradient():
    targets = torch.zeros(5, requires_grad=True)
    assert not Gaussian().check_targets(F5, targets).requires_grad


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (0.5, 0.5),
        (2, 2.0),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([0.5], requires_grad=True), 0.5),
        (torch.tensor([0.5, 2.0], dtype=torch.bfloat16), (0.5, 2.0)),
        (np.array([0.5, 2.0]), (0.5, 2.0)),
        ([1, 2.0], (1.0, 2.0)),
        ((0.25,), 0.25),
        (None, None),
    ],
)
def test_noise_is_kept_as_numbers(given, kept):
    likelihood = Gaussian(given)
    assert likelihood.noise_variance == kept
    assert likelihood == Gaussian(kept)
    if given is not None:
        assert Gaussian().with_noise(given) == likelihood
        assert Gaussian(9.0).with_noise(given) == likelihood


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0.0, "^noise_variance: 0 is not"),
        (-1.0, "-1 is not"),
        (NAN, "nan is not"),
        (math.inf, "inf is not"),
        ([1.0, 0.0, -1.0], "0 at position 1 is not"),
        (torch.tensor([1.0, NAN]), "nan at position 1 is not"),
        (torch.ones(2, 2), "is not a noise variance"),
        ([], "is not a noise variance"),
        ("much", "'much' is not a noise variance"),
        ([None, 1.0], "is not a noise variance"),
    ],
)
def test_noise_that_is_none_is_refused(given, message):
    with pytest.raises(OptionError, match=message):
        Gaussian(given)
    with pytest.raises(OptionError, match=message):
        Gaussian().with_noise(given)


def test_noise_that_is_to_be_learned_must_be_set():
    likelihood, outputs = Gaussian(), normal(20, 4, 2)
    assert torch.equal(likelihood.check_targets(outputs, outputs), outputs)
    assert torch.equal(likelihood.mean(outputs), outputs)
    assert torch.equal(likelihood.probit_mean(outputs, outputs**2), outputs)
    for method in ("log_prob", "score", "curvature_product", "curvature_factor"):
        with pytest.raises(OptionError, match="still to be learned"):
            getattr(likelihood, method)(outputs, outputs)
    with pytest.raises(OptionError, match="with_noise"):
        likelihood.variance(outputs)
    with pytest.raises(OptionError, match="with_noise"):
        likelihood.sample(outputs, stream(0, "a"))
    assert likelihood_from_config(likelihood.to_config()) == likelihood


def test_noise_for_other_outputs_is_refused():
    with pytest.raises(ShapeError, match="2 noise variances for 3 outputs"):
        Gaussian([1.0, 2.0]).curvature_product(F53, F53)


def test_rates_without_distinct_counts_are_not_sampled():
    with pytest.raises(DataError, match=r"at position \[1\] is a rate beyond"):
        Poisson().sample(torch.tensor([0.0, 50.0]), stream(0, "a"))


def test_agreeing_answers_have_an_accurate_score():
    outputs = torch.tensor([30.0, -30.0])
    score = Bernoulli().score(outputs, torch.tensor([1.0, 0.0]))
    assert score.tolist() == pytest.approx([math.exp(-30), -math.exp(-30)], rel=1e-5, abs=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "None is not a likelihood"),
        ({"kind": "cauchy"}, "'cauchy' is not a likelihood"),
        ({"kind": ["gaussian"]}, "is not a likelihood"),
        ({"kind": "poisson", "noise_variance": 1.0}, "poisson has no setting 'noise_variance'"),
        ({"kind": "gaussian", "noise": 1.0}, "gaussian has no setting 'noise'"),
        ({"kind": "gaussian", "noise_variance": -1.0}, "-1 is not a noise variance"),
    ],
)
def test_unknown_configs_are_refused(config, message):
    with pytest.raises(OptionError, match=message):
        likelihood_from_config(config)


def test_likelihoods_are_frozen_and_abstract():
    with pytest.raises(AttributeError):
        Gaussian(1.0).noise_variance = 2.0
    with pytest.raises(TypeError):
        Likelihood()
