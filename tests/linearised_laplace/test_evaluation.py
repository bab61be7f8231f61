"""Every row of an evaluation is what its definition says, and useless uncertainty is told."""

import json
import math

import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.errors import OptionError
from pushforward.linearised_laplace.evaluation import log_likelihoods


def network(outputs, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, outputs)).double().eval()


def inputs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def draw(net, likelihood, count, seed):
    x = inputs(count, seed)
    with torch.no_grad():
        return x, likelihood.sample(net(x), torch.Generator().manual_seed(seed + 100))


def problem(likelihood, outputs=3, precision=1.0, train=40, **options):
    net = network(outputs)
    data = draw(net, likelihood, train, 1)
    posterior = pf.laplace(
        net, data, likelihood, prior_precision=precision, num_draws=20, **options
    )
    return posterior, draw(net, likelihood, 50, 2), draw(net, likelihood, 45, 3)


def by_name(evaluation):
    return {row.name: row for row in evaluation.rows}


@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_a_classification_has_the_rows_of_its_definition(method):
    posterior, test, validation = problem(pf.Categorical(), method=method)
    result = posterior.evaluate(test, validation=validation, bins=7)
    rows = by_name(result)
    assert list(rows) == [
        "MAP",
        "MAP, temperature-scaled",
        "Laplace, probit",
        "Laplace, Monte Carlo",
    ]
    x, y = test
    with torch.no_grad():
        f = posterior.model.predict(x)
    picked = torch.arange(len(y)), y
    laws = {
        "MAP": f.softmax(-1),
        "MAP, temperature-scaled": (f / result.map_temperature).softmax(-1),
        "Laplace, probit": posterior.predict(x).expected,
        "Laplace, Monte Carlo": posterior.predict(x, link="monte_carlo").expected,
    }
    first = -laws["MAP"][picked].log()
    for name, law in laws.items():
        losses = -law[picked].log()
        row = rows[name]
        assert row.nll.value == pytest.approx(float(losses.mean()), rel=1e-9)
        assert row.nll.standard_error == pytest.approx(float(losses.std() / 50**0.5), rel=1e-9)
        assert row.accuracy.value == pytest.approx(float((law.argmax(1) == y).double().mean()))
        confidence, guess = law.max(1)
        bins = (confidence * 7).ceil()
        gaps = [
            abs(float(((guess == y).double() - confidence)[bins == b].sum())) for b in range(1, 8)
        ]
        assert row.ece.value == pytest.approx(sum(gaps) / 50, rel=1e-9)
        assert int(row.reliability.count.sum()) == 50
        good, bad = confidence[guess == y], confidence[guess != y]
        below = (bad[:, None] < good).double().mean()
        assert row.error_auroc.value == pytest.approx(float(below), rel=1e-9)
        assert (row.rmse, row.coverage) == (None, None)
        if name == "MAP":
            assert row.difference is None
            continue
        paired = losses - first
        assert row.difference.value == pytest.approx(float(paired.mean()), rel=1e-7)
        assert row.difference.standard_error == pytest.approx(
            float(paired.std() / 50**0.5), rel=1e-7
        )
    assert result.baseline is rows["MAP"]
    assert result.laplace is rows["Laplace, probit"]


def test_the_spread_is_that_of_the_probabilities_over_the_draws():
    posterior, (x, y), _ = problem(pf.Categorical(), method="sampled")
    result = posterior.evaluate((x, y))
    from pushforward.networks.tangent import Tangent

    moved = Tangent(posterior.model).jvp(x, posterior.draws)
    expected = (posterior.model.predict(x) + moved).softmax(-1).std(0)
    torch.testing.assert_close(result.spread, expected)
    prediction = posterior.predict(x)
    torch.testing.assert_close(result.prediction.expected, prediction.expected)
    torch.testing.assert_close(result.prediction.map_expected, prediction.map_expected)
    torch.testing.assert_close(result.prediction.epistemic_variance, prediction.epistemic_variance)
    assert torch.equal(result.targets, y)


def test_a_regression_has_noise_alone_in_the_first_row():
    posterior, (x, y), validation = problem(pf.Gaussian([0.2, 0.5]), outputs=2)
    result = posterior.evaluate((x, y), validation=validation)
    rows = by_name(result)
    assert list(rows) == ["MAP", "MAP, noise rescaled", "Laplace"]
    prediction = posterior.predict(x)
    noise = torch.tensor([0.2, 0.5], dtype=torch.float64).expand(50, 2)
    held = posterior.model.predict(validation[0])
    factor = float(((validation[1] - held).square() / noise[0]).mean())
    assert result.map_temperature == pytest.approx(factor, rel=1e-12)
    for name, variance in (
        ("MAP", noise),
        ("MAP, noise rescaled", factor * noise),
        ("Laplace", noise + prediction.epistemic_variance),
    ):
        law = torch.distributions.Normal(prediction.mean, variance.sqrt())
        losses = -law.log_prob(y).sum(1)
        assert rows[name].nll.value == pytest.approx(float(losses.mean()), rel=1e-9)
        inside = ((y - prediction.mean).abs() <= 1.959963985 * variance.sqrt()).double().mean()
        coverage = rows[name].coverage
        assert float(coverage.coverage[coverage.levels == 0.95]) == pytest.approx(float(inside))
        squared = (y - prediction.mean).square().mean(1)
        assert rows[name].rmse.value == pytest.approx(float(squared.mean().sqrt()), rel=1e-9)
        assert rows[name].rmse.standard_error == pytest.approx(
            float(squared.std() / 50**0.5 / (2 * squared.mean().sqrt())), rel=1e-9
        )
        assert rows[name].accuracy is None
    torch.testing.assert_close(result.spread, prediction.epistemic_variance.sqrt())


def test_counts_are_scored_by_their_draws():
    posterior, (x, y), validation = problem(pf.Poisson(), outputs=1)
    result = posterior.evaluate((x, y), validation=validation)
    rows = by_name(result)
    assert list(rows) == ["MAP", "Laplace, Monte Carlo"]
    assert result.map_temperature is None
    rate = posterior.model.predict(x).exp()
    losses = -torch.distributions.Poisson(rate).log_prob(y).sum(1)
    assert rows["MAP"].nll.value == pytest.approx(float(losses.mean()), rel=1e-9)
    marginal = -float(posterior.log_likelihood(x, y))
    assert rows["Laplace, Monte Carlo"].nll.value == pytest.approx(marginal, rel=1e-9)
    assert result.laplace.name == "Laplace, Monte Carlo"
    with pytest.raises(OptionError, match="counts have neither"):
        result.plot()


def test_binary_targets_are_labels_of_two_classes():
    posterior, (x, y), validation = problem(pf.Bernoulli(), outputs=2)
    result = posterior.evaluate((x, y), validation=validation)
    p = posterior.model.predict(x).sigmoid()
    losses = torch.nn.functional.binary_cross_entropy(p, y, reduction="none").mean(1)
    assert result.baseline.nll.value == pytest.approx(float(losses.mean()), rel=1e-9)
    # The labels of one example belong together: the error is over examples.
    assert result.baseline.nll.standard_error == pytest.approx(
        float(losses.std() / 50**0.5), rel=1e-9
    )
    right = ((p > 0.5) == (y > 0.5)).double().mean()
    assert result.baseline.accuracy.value == pytest.approx(float(right))
    assert result.map_temperature > 0


def test_positions_of_an_example_are_averaged():
    net = nn.Sequential(network(6), nn.Unflatten(1, (2, 3)))
    x, y = draw(net, pf.Categorical(), 30, 1)
    posterior = pf.laplace(net, (x, y), pf.Categorical(), prior_precision=1.0, num_draws=8)
    result = posterior.evaluate((x, y), validation=draw(net, pf.Categorical(), 20, 2))
    f = posterior.model.predict(x)
    losses = nn.functional.cross_entropy(f.mT, y, reduction="none").mean(1)
    assert result.baseline.nll.value == pytest.approx(float(losses.mean()), rel=1e-9)
    assert result.spread.shape == (30, 2, 3)


def test_needless_uncertainty_is_told_with_a_remedy():
    net = network(3)
    with torch.no_grad():
        net[2].weight *= 20  # labels are all but certain, and it knows
    data = draw(net, pf.Categorical(), 60, 1)
    posterior = pf.laplace(net, data, pf.Categorical(), prior_precision=0.01, num_draws=20)
    result = posterior.evaluate(draw(net, pf.Categorical(), 200, 2))
    assert result.laplace.is_worse
    (check,) = (item for item in result.checks if item.name == "not-worse-than-map")
    assert check.status == "warn"
    assert "fit_temperature" in check.advice
    assert "choose_prior_precision" in check.advice
    assert "not-worse-than-map" in repr(result)
    cold = posterior.with_temperature(1e-9).evaluate(draw(net, pf.Categorical(), 200, 2))
    assert cold.status == "pass"
    assert not cold.laplace.is_worse


def test_validation_on_the_test_data_is_told():
    posterior, test, validation = problem(pf.Categorical())
    assert posterior.evaluate(test, validation=validation).checks[1].status == "pass"
    check = posterior.evaluate(test, validation=test).checks[1]
    assert (check.name, check.status) == ("validation-separate", "warn")


def test_a_table_and_json_can_be_read():
    posterior, test, validation = problem(pf.Categorical())
    result = posterior.evaluate(test, validation=validation)
    lines = repr(result).splitlines()
    assert lines[0] == "Evaluation on 50 examples"
    assert all(head in lines[1] for head in ("accuracy", "NLL", "ECE", "difference to MAP"))
    assert lines[2].split()[0] == "MAP"
    assert len({line.index("±") for line in lines[2:6]}) == 1
    saved = json.loads(json.dumps(result.to_dict()))
    assert saved["rows"][0]["nll"]["value"] == result.baseline.nll.value
    assert "prediction" not in saved
    assert saved["task"] == "classification"


@pytest.mark.parametrize("likelihood", [pf.Categorical(), pf.Gaussian(0.3)])
def test_a_plot_shows_every_row(likelihood, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    from matplotlib import pyplot

    posterior, test, validation = problem(likelihood, outputs=2)
    result = posterior.evaluate(test, validation=validation)
    figure = result.plot()
    drawn = {bars.get_label(): bars for bars in figure.axes[0].containers}
    assert list(drawn) == [row.name for row in result.rows]
    first = result.rows[0]
    values = first.reliability.accuracy if first.reliability else first.coverage.coverage
    assert drawn["MAP"].lines[0].get_ydata().tolist() == values.tolist()
    pyplot.close(figure)


def test_closed_forms_of_log_likelihoods():
    f = torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    v = torch.tensor([[0.5, 2.0]], dtype=torch.float64)
    kappa = (1 + math.pi * v / 8).rsqrt()
    y = torch.tensor([1])
    expected = (kappa * f).log_softmax(-1)[0, 1]
    assert float(log_likelihoods(pf.Categorical(), f, v, y)) == pytest.approx(float(expected))
    binary = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    p = (kappa * f).sigmoid()[0]
    expected = (p[0].log() + (1 - p[1]).log()) / 2
    assert float(log_likelihoods(pf.Bernoulli(), f, v, binary)) == pytest.approx(float(expected))
    normal = torch.distributions.Normal(f, (v + 0.1).sqrt()).log_prob(binary).sum()
    gaussian = log_likelihoods(pf.Gaussian(0.1), f, v, binary)
    assert float(gaussian) == pytest.approx(float(normal))
