"""Laws of outputs: projections, tails, quantiles, JSON, text, joining."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from pushforward.cumulants.laws import GaussianLaw
from pushforward.cumulants.monte_carlo import monte_carlo
from pushforward.cumulants.output import ErrorBar, Moments, OutputLaw, concatenate
from pushforward.cumulants.propagation import propagate
from pushforward.errors import OptionError, ShapeError
from pushforward.gaussians.tails import quantile, tail_probability
from pushforward.runs.estimate import Check
from scenarios import correlated_law, he_network, normal, standard_law

ORDERS = [(1, None), (2, False), (2, True), (3, None)]
every_order = pytest.mark.parametrize(("order", "augmented"), ORDERS)
HIGHER = ORDERS[1:]
FIELDS = ("mean", "variance", "covariance", "third", "fourth")


def law_of(order=2, augmented=True, *, outputs=5, bias=0.2, **options):
    net = he_network(16, 2, outputs=outputs, bias=bias, seed=1)
    return propagate(net, standard_law(16), order, augmented=augmented, **options)


# --- projections ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "augmented"), HIGHER)
@pytest.mark.parametrize("bias", [0.0, 0.2], ids=["sphere", "biases"])
@pytest.mark.parametrize("with_offset", [False, True])
def test_projecting_is_composing_the_last_layer(order, augmented, bias, with_offset):
    net, law = he_network(16, 2, outputs=5, bias=bias, seed=1), standard_law(16)
    outputs = propagate(net, law, order, augmented=augmented)
    assert any(c.name == "angular-gauge" for c in outputs.checks) is (bias == 0)
    matrix = normal(2, 3, 5)
    offset = normal(3, 3) if with_offset else None
    found = outputs.project(matrix, offset)
    composed = he_network(16, 2, outputs=5, bias=bias, seed=1)
    composed[-1] = nn.Linear(16, 3, bias=bias > 0).double()
    with torch.no_grad():
        composed[-1].weight.copy_(matrix @ net[-1].weight)
        if bias:
            composed[-1].bias.copy_(matrix @ net[-1].bias)
    expected = propagate(composed, law, order, augmented=augmented)
    for name in FIELDS:
        mine, other = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (other is None)
        if name == "mean" and with_offset:
            other = other + offset
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias", [0.0, 0.2], ids=["sphere", "biases"])
@every_order
def test_projecting_a_projection(order, augmented, bias):
    outputs = law_of(order, augmented, bias=bias)
    first, second = normal(4, 4, 5), normal(5, 2, 4)
    a, b = normal(6, 4), normal(7, 2)
    twice = outputs.project(first, a).project(second, b)
    once = outputs.project(second @ first, second @ a + b)
    torch.testing.assert_close(twice.mean, once.mean)
    if order != 1:  # order 1 takes the intermediate outputs as independent
        for name in FIELDS[1:]:
            if getattr(once, name) is not None:
                torch.testing.assert_close(
                    getattr(twice, name), getattr(once, name), rtol=1e-9, atol=1e-12
                )
    identity = outputs.project(torch.eye(5).double())
    for name in ("mean", "variance", "third", "fourth", "standard_error"):
        if getattr(outputs, name) is not None:
            torch.testing.assert_close(getattr(identity, name), getattr(outputs, name))


def test_projection_at_order_one_takes_outputs_as_independent():
    outputs, matrix = law_of(1, None), normal(8, 2, 5)
    found = outputs.project(matrix, torch.ones(2).double())
    torch.testing.assert_close(found.mean, matrix @ outputs.mean + 1)
    torch.testing.assert_close(found.variance, matrix.square() @ outputs.variance)
    assert found.covariance is None


@every_order
def test_a_projection_has_its_own_error_bar(order, augmented):
    outputs = law_of(order, augmented)
    margin = torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0]]).double()
    found = outputs.project(margin)
    assert found.standard_error.shape == (1,)
    difference = margin @ outputs._error.difference
    pooled = outputs._error.relative * found.variance
    torch.testing.assert_close(found.standard_error.square(), (difference**2 + pooled) / 2)
    assert law_of(order, augmented, standard_error=False).project(margin).standard_error is None
    assert (found.flops, found.seconds, found.checks) == (
        outputs.flops,
        outputs.seconds,
        outputs.checks,
    )


@pytest.mark.statistical
def test_margins_agree_with_monte_carlo():
    net, law = he_network(32, 2, outputs=4, bias=0.3, seed=2), standard_law(32)
    matrix, offset = normal(9, 3, 4), normal(10, 3)
    sampled = monte_carlo(net, law, 2**16, projection=matrix, offset=offset)
    found = propagate(net, law, 3).project(matrix, offset)
    error = (found.standard_error.square() + sampled.standard_error.square()).sqrt()
    assert ((found.mean - sampled.mean) / error).abs().max() < 5
    assert (found.variance / sampled.variance - 1).abs().max() < 0.05
    # Skewness is less accurate than the variance: measured 0.14 at this width.
    assert ((found.third - sampled.third) / sampled.variance**1.5).abs().max() < 0.2


@every_order
def test_projections_of_a_batch(order, augmented):
    net = he_network(6, 2, outputs=3, bias=0.2)
    means, covariance = normal(11, 2, 6), correlated_law(6).covariance
    matrix, offset = normal(12, 2, 3), normal(13, 2)

    def projected(mean):
        law = propagate(net, GaussianLaw(mean, covariance), order, augmented=augmented)
        return law.project(matrix, offset)

    batch = projected(means)
    assert batch.mean.shape == (2, 2)
    for index in range(2):
        single = projected(means[index])
        for name in (*FIELDS, "standard_error"):
            if getattr(single, name) is not None:
                torch.testing.assert_close(
                    getattr(batch, name)[index], getattr(single, name), rtol=1e-8, atol=1e-11
                )


@pytest.mark.parametrize("matrix", [torch.ones(5), torch.ones(2, 4), torch.ones(5, 2)])
def test_projections_of_another_size_are_refused(matrix):
    with pytest.raises(ShapeError, match=r"5 outputs.*Give one row of 5 numbers"):
        law_of().project(matrix)


def test_hidden_layers_can_be_projected():
    outputs = law_of(2, True, bias=0.0, layers=True)
    hidden = outputs.layers["3"]
    matrix = normal(14, 2, 16)
    found = hidden.project(matrix)
    torch.testing.assert_close(found.mean, matrix @ hidden.mean)
    torch.testing.assert_close(found.covariance, matrix @ hidden.covariance @ matrix.T)


def test_a_law_written_by_hand_keeps_its_correlations():
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    one = OutputLaw(
        torch.zeros(2).double(),
        covariance.diagonal(),
        covariance,
        None,
        None,
        None,
        0.0,
        0.0,
        2,
        False,
    )
    difference = one.project(torch.tensor([[1.0, -1.0]]).double())
    expected = torch.tensor([0.2], dtype=torch.float64)
    torch.testing.assert_close(difference.variance, expected)
    torch.testing.assert_close(difference.project(expected[None]).variance, expected**3)


# --- tails ---------------------------------------------------------------------------------------


@every_order
@pytest.mark.parametrize("method", ["saddlepoint", "edgeworth", "gaussian"])
def test_tails_are_those_of_the_marginal_cumulants(order, augmented, method):
    outputs = law_of(order, augmented)
    arguments = (outputs.mean, outputs.variance, outputs.third, outputs.fourth)
    for threshold in (0.3, normal(15, 5), normal(16, 2, 5), torch.tensor(0.3)):
        found = outputs.tail_probability(threshold, method)
        level = torch.as_tensor(threshold, dtype=torch.float64)
        torch.testing.assert_close(found, tail_probability(level, *arguments, method))
    q = torch.tensor([0.1, 0.5, 0.9, 0.99, 0.001]).double()
    torch.testing.assert_close(outputs.quantile(q, method), quantile(q, *arguments, method))
    assert outputs.quantile(0.5).shape == (5,)


def test_tails_of_low_orders_are_gaussian():
    for order, augmented in ((1, None), (2, False)):
        outputs = law_of(order, augmented)
        gaussian = outputs.tail_probability(1.0, "gaussian")
        torch.testing.assert_close(outputs.tail_probability(1.0), gaussian)


@pytest.mark.statistical
def test_tails_agree_with_monte_carlo():
    net, law = he_network(48, 2, outputs=4, bias=0.2, seed=3), standard_law(48)
    outputs = propagate(net, law, 3)
    levels = outputs.mean.detach() + outputs.variance.detach().sqrt() * torch.tensor([[1.0], [2.0]])
    seen = monte_carlo(net, law, 2**17, thresholds=levels).exceedance
    found = outputs.tail_probability(levels)
    ratio = (found / seen.probability).log().abs()
    assert ratio[0].max() < 0.06
    assert ratio[1].max() < 0.15
    # Worse by far without the cumulants.
    gaussian = (outputs.tail_probability(levels, "gaussian") / seen.probability).log().abs()
    assert ratio[1].mean() < 0.5 * gaussian[1].mean()


@pytest.mark.statistical
def test_quantiles_agree_with_monte_carlo():
    net, law = he_network(48, 2, outputs=3, bias=0.2, seed=4), standard_law(48)
    outputs = propagate(net, law, 3)
    seen = monte_carlo(net, law, 2**16, thresholds=outputs.quantile(0.95)).exceedance
    assert (seen.probability - 0.05).abs().max() < 0.005


def test_unusable_requests_are_refused():
    with pytest.raises(OptionError, match="no method 'exact'"):
        law_of().tail_probability(0.0, "exact")
    with pytest.raises(OptionError, match="quantile"):
        law_of().quantile(1.0)


def test_tails_are_differentiable():
    net, law = he_network(8, 1, outputs=2, bias=0.1), standard_law(8)
    outputs = propagate(net, law, 2, augmented=True, standard_error=False)
    outputs.tail_probability(0.7).sum().backward()
    gradient = net[0].weight.grad.clone()
    assert bool(gradient.isfinite().all())
    assert gradient.abs().max() > 0


def test_tails_of_a_batch():
    net = he_network(6, 1, outputs=3, bias=0.1)
    outputs = propagate(net, GaussianLaw(normal(17, 4, 6), 0.5), augmented=True)
    assert outputs.tail_probability(0.2).shape == (4, 3)
    assert outputs.tail_probability(normal(18, 3)).shape == (4, 3)
    assert outputs.quantile(0.9).shape == (4, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_results_are_computed_in_double(dtype):
    net = he_network(16, 2, outputs=5, bias=0.2, seed=1).to(dtype)
    outputs = propagate(net, GaussianLaw.standard(16, dtype=dtype))
    exact = propagate(net.double(), standard_law(16))
    found = outputs.tail_probability(0.5)
    assert found.dtype == dtype
    torch.testing.assert_close(found, exact.tail_probability(0.5).to(dtype), rtol=0, atol=0)
    far = exact.mean + 8 * exact.variance.sqrt()
    assert bool((outputs.tail_probability(far) > 0).all())
    projected = outputs.project(normal(19, 2, 5).to(dtype))
    assert projected.mean.dtype == dtype


# --- error bars, JSON, text ----------------------------------------------------------------------


def test_error_bars_by_hand():
    one = Moments(torch.tensor([1.0, 2.0]).double(), torch.tensor([4.0, 0.0]).double())
    two = Moments(torch.tensor([1.5, 2.0]).double(), torch.tensor([4.0, 0.0]).double())
    bar = ErrorBar.between(one, two)
    torch.testing.assert_close(bar.difference, torch.tensor([-0.5, 0.0]).double())
    torch.testing.assert_close(bar.relative, torch.tensor(0.25 / 4).double())
    expected = torch.tensor([0.25, 0.0]).double()
    torch.testing.assert_close(bar.standard_error(one.variance).square(), expected)
    # An output whose two estimates agree by accident has the error of the others.
    both = Moments(one.mean, torch.tensor([4.0, 4.0]).double())
    agreeing = ErrorBar.between(both, Moments(two.mean, both.variance))
    assert agreeing.standard_error(both.variance)[1] > 0.1


def test_moments_map():
    one = Moments(torch.ones(2), torch.ones(2), None, torch.zeros(2), None)
    found = one.cast(torch.float64)
    assert found.mean.dtype == found.third.dtype == torch.float64
    assert found.covariance is None
    assert found.fourth is None


@every_order
def test_json_round_trip(order, augmented):
    plain = law_of(order, augmented, layers=True).to_dict()
    assert json.loads(json.dumps(plain)) == plain
    public = {name for name in OutputLaw.__dataclass_fields__ if not name.startswith("_")}
    assert set(plain) == public
    assert len(plain["mean"]) == 5


def test_text_for_people():
    text = repr(law_of())
    first = text.splitlines()[0]
    assert first.startswith("OutputLaw of 5 outputs by order 2 augmented (")
    assert "FLOPs" in first
    assert len(text.splitlines()) >= 7
    assert "..." not in text
    many = repr(law_of(outputs=12))
    assert "... 2 more" in many
    assert "±" in text
    assert "±" not in repr(law_of(standard_error=False))
    batch = propagate(he_network(6, 1, outputs=3), GaussianLaw(normal(20, 4, 6), 1.0))
    assert repr(batch).startswith("OutputLaw of 4 x 3 outputs")
    worried = replace(law_of(), checks=(Check("odd", "warn", "strange.", "Look."),))
    assert "[warn] odd: strange. Look." in repr(worried)
    assert worried.status == "warn"
    assert worried.method == "order 2 augmented"
    assert (worried.cost.flops, worried.cost.seconds) == (worried.flops, worried.seconds)


# --- joining batches -----------------------------------------------------------------------------


@every_order
@pytest.mark.parametrize("bias", [0.0, 0.2], ids=["sphere", "biases"])
def test_joined_laws_are_one_batch(order, augmented, bias):
    net = he_network(6, 2, outputs=3, bias=bias)
    mean = torch.zeros(5, 6).double() if bias == 0 else normal(21, 5, 6)
    law = GaussianLaw(mean, 0.7)

    def run(rows):
        return propagate(net, law.select(rows), order, augmented=augmented, layers=True)

    whole = run(slice(0, 5))
    parts = [run(slice(0, 2)), run(slice(2, 5))]
    joined = concatenate(parts)
    matrix = normal(22, 2, 3)
    for one, other in (
        (joined, whole),
        (joined.project(matrix), whole.project(matrix)),
        *((joined.layers[name], whole.layers[name]) for name in whole.layers),
    ):
        for name in (*FIELDS, "standard_error"):
            mine, full = getattr(one, name), getattr(other, name)
            assert (mine is None) == (full is None)
            if full is not None:
                torch.testing.assert_close(mine, full)
    assert joined.flops == pytest.approx(sum(part.flops for part in parts))
    assert concatenate(parts[:1]) is parts[0]


def test_the_worst_check_is_kept():
    good, bad = Check("a", "pass", "fine."), Check("a", "fail", "broken.", "Stop.")
    net = he_network(6, 1, outputs=3)
    one = propagate(net, GaussianLaw(normal(23, 2, 6), 1.0))
    joined = concatenate([replace(one, checks=(good,)), replace(one, checks=(bad,))])
    assert joined.checks == (bad,)
    joined = concatenate([replace(one, checks=(bad,)), replace(one, checks=(good,))])
    assert joined.checks == (bad,)
