"""Held-out data choose temperature and precision as a search by brute force would."""

import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.errors import OptionError, ResourceError
from pushforward.linearised_laplace import posterior as posterior_module

GRID = (0.01, 0.3, 3.0, 40.0, 1000.0)


def network(outputs, boast=1.0):
    """Outputs `boast` times as large as they should be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
    with torch.no_grad():
        for parameter in net[2].parameters():
            parameter *= boast
    return net.eval()


def draw(net, likelihood, count, seed, boast=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = 1.5 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return x, likelihood.sample(net(x) / boast, generator)


def problem(likelihood, outputs=3, boast=3.0, **options):
    net = network(outputs, boast)
    data = draw(net, likelihood, 40, 1, boast)
    options = {"prior_precision": 1.0, "num_draws": 24} | options
    return pf.laplace(net, data, likelihood, **options), draw(net, likelihood, 60, 2, boast), data


def score(posterior, held_out, link):
    x, y = held_out
    if isinstance(posterior.likelihood, pf.Gaussian):
        prediction = posterior.predict(x)
        law = torch.distributions.Normal(prediction.mean, prediction.variance.sqrt())
        return float(law.log_prob(y).sum(1).mean())
    p = posterior.predict(x, link=link).expected
    return float(p[torch.arange(len(y)), y].log().mean())


@pytest.mark.parametrize("method", ["exact", "sampled"])
@pytest.mark.parametrize("link", ["probit", "monte_carlo"])
def test_no_other_temperature_is_better(method, link):
    posterior, held_out, _ = problem(pf.Categorical(), method=method)
    fitted = posterior.fit_temperature(held_out, link)
    assert 1e-3 < fitted.temperature < 1e3
    best = score(fitted, held_out, link)
    for temperature in torch.logspace(-4, 4, 41).tolist():
        assert score(posterior.with_temperature(temperature), held_out, link) <= best + 1e-7
    for factor in (0.97, 1.03):
        nearby = posterior.with_temperature(factor * fitted.temperature)
        assert score(nearby, held_out, link) <= best + 1e-9
    # Where one began does not matter.
    again = fitted.with_temperature(7.0).fit_temperature(held_out, link)
    assert again.temperature == fitted.temperature
    assert again.checks == fitted.checks
    check = fitted.checks[-1]
    assert check.name == "temperature-fitted"
    gain = best - score(posterior, held_out, link)
    assert gain > 0
    assert f"{gain:+.3g}" in check.detail


def test_a_regression_gets_its_temperature_in_closed_form():
    posterior, held_out, _ = problem(pf.Gaussian(0.05), outputs=1, prior_precision=100.0)
    fitted = posterior.fit_temperature(held_out)
    best = score(fitted, held_out, "probit")
    for factor in (0.9, 0.97, 1.03, 1.1):
        nearby = posterior.with_temperature(factor * fitted.temperature)
        assert score(nearby, held_out, "probit") <= best + 1e-9


def test_the_end_of_the_range_is_told():
    net = network(2)
    with torch.no_grad():
        net[2].weight *= 30
    data = draw(net, pf.Categorical(), 40, 1)
    posterior = pf.laplace(net, data, pf.Categorical(), prior_precision=1.0, num_draws=8)
    fitted = posterior.fit_temperature(draw(net, pf.Categorical(), 300, 2))
    if fitted.temperature > 2e-4:
        pytest.fail(f"expected no uncertainty to be wanted, got {fitted.temperature}")
    assert fitted.checks[-1].status == "warn"
    assert "no epistemic uncertainty" in fitted.checks[-1].advice


def test_counts_take_draws_only():
    posterior, held_out, data = problem(pf.Poisson(), outputs=1)
    with pytest.raises(OptionError, match="no closed form"):
        posterior.fit_temperature(held_out)
    fitted = posterior.fit_temperature(held_out, "monte_carlo")
    best = float(fitted.log_likelihood(held_out))
    for factor in (0.8, 1.25):
        nearby = posterior.with_temperature(factor * fitted.temperature)
        assert float(nearby.log_likelihood(held_out)) <= best + 1e-9
    with pytest.raises(OptionError, match="no link"):
        posterior.fit_temperature(held_out, "bridge")
    with pytest.raises(OptionError, match="no closed form"):
        pf.choose_prior_precision(network(1), data, pf.Poisson(), held_out)


def test_what_does_not_fit_is_refused(monkeypatch):
    posterior, held_out, _ = problem(pf.Categorical())
    monkeypatch.setattr(posterior_module, "available_memory", lambda _device: 10_000)
    with pytest.raises(ResourceError, match=r"24 draws for 60 examples.*Give at most.*probit"):
        posterior.fit_temperature(held_out, "monte_carlo")
    posterior.fit_temperature(held_out)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "options"),
    [
        (pf.Categorical(), 3, {"method": "exact"}),
        (pf.Categorical(), 3, {"method": "exact", "prior": "gprior"}),
        (pf.Categorical(), 3, {"method": "exact", "train": 4}),
        (pf.Categorical(), 3, {"method": "sampled"}),
        (pf.Gaussian(0.05), 1, {"method": "exact"}),
        (pf.Gaussian(), 1, {"method": "exact"}),
    ],
)
def test_the_best_precision_of_a_grid_is_found(likelihood, outputs, options):
    train = options.pop("train", 40)
    net = network(outputs, 3.0)
    law = pf.Gaussian(0.05) if isinstance(likelihood, pf.Gaussian) else likelihood
    data, held_out = draw(net, law, train, 1, 3.0), draw(net, law, 60, 2, 3.0)
    options |= {"num_draws": 16, "seed": 5}
    chosen = pf.choose_prior_precision(net, data, likelihood, held_out, grid=GRID, **options)
    refits = {
        precision: pf.laplace(net, data, likelihood, prior_precision=precision, **options)
        for precision in GRID
    }
    scores = {p: score(posterior, held_out, "probit") for p, posterior in refits.items()}
    best = max(scores, key=scores.get)
    assert chosen.prior_precision == pytest.approx(best)
    detail = chosen.checks[-1].detail
    assert chosen.checks[-1].name == "precision-validated"
    for precision, value in scores.items():
        assert f"{precision:.3g}: {value:.4g}" in detail
    torch.testing.assert_close(chosen.draws, refits[best].draws)
    assert chosen.num_draws == 16


def test_the_default_grid_surrounds_the_weights_and_is_refined():
    net = network(3)
    data, held_out = (
        draw(net, pf.Categorical(), 40, 1, 1.0),
        draw(net, pf.Categorical(), 60, 2, 1.0),
    )
    chosen = pf.choose_prior_precision(net, data, pf.Categorical(), held_out, subset="2")
    listed = chosen.checks[-1].detail.split("precision: ")[1].split(";")[0].split(", ")
    tried = [float(entry.split(":")[0]) for entry in listed]
    weights = torch.cat([p.detach().flatten() for p in net[2].parameters()])
    centre = len(weights) / float(weights.square().sum())
    assert len(tried) == 9
    assert tried[0] == pytest.approx(centre / 100, rel=0.01)
    assert chosen.prior.space.names == ("2.weight", "2.bias")
    assert any(value == pytest.approx(chosen.prior_precision, rel=0.01) for value in tried)


@pytest.mark.parametrize(
    ("boast", "grid", "told"),
    [
        (6.0, [1e4, 1e5], "The smallest wins: give a grid that begins lower."),
        (0.2, [1e-6, 1e-5], "The largest wins"),
    ],
)
def test_the_ends_of_a_grid_are_told(boast, grid, told):
    net = network(3, boast)
    data = draw(net, pf.Categorical(), 40, 1, boast)
    held_out = draw(net, pf.Categorical(), 200, 2, boast)
    chosen = pf.choose_prior_precision(net, data, pf.Categorical(), held_out, grid=grid)
    check = chosen.checks[-1]
    assert check.status == "warn"
    assert check.advice.startswith(told)


def test_a_checkpoint_serves_every_precision(tmp_path):
    net = network(2)
    data, held_out = draw(net, pf.Categorical(), 30, 1), draw(net, pf.Categorical(), 30, 2)
    options = {"method": "sampled", "num_draws": 4, "checkpoint": tmp_path, "grid": [0.1, 1.0]}
    first = pf.choose_prior_precision(net, data, pf.Categorical(), held_out, **options)
    assert len(list(tmp_path.iterdir())) == 2
    again = pf.choose_prior_precision(net, data, pf.Categorical(), held_out, **options)
    assert torch.equal(first.draws, again.draws)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": "layerwise"}, "too many precisions"),
        ({"prior_precision": 1.0}, "what is to be chosen"),
        ({"grid": []}, "are not precisions"),
        ({"grid": 5.0}, "5.0 are not precisions"),
        ({"grid": ["large"]}, "are not precisions"),
        ({"num_draws": "many"}, "num_draws"),
        ({"grid": [1.0, -2.0]}, "are not precisions"),
        ({"grid": [float("inf")]}, "are not precisions"),
        ({"link": "bridge"}, "no link"),
    ],
)
def test_bad_options_are_refused(options, message):
    net = network(2)
    data = draw(net, pf.Categorical(), 10, 1)
    with pytest.raises(OptionError, match=message):
        pf.choose_prior_precision(net, data, pf.Categorical(), data, **options)
