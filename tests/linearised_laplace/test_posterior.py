"""What a posterior predicts: moments, links, likelihoods of batches, temperature."""

from dataclasses import replace

import pytest
import torch

import pushforward as pf
from laplace_scenarios import PROBLEMS, numbers
from oracles.linear_gaussian import dense_jacobian
from pushforward.errors import DataError, OptionError, ResourceError
from pushforward.linearised_laplace import posterior as posterior_module

X = 1.5 * numbers(12, 3, seed=90)


@pytest.fixture(params=PROBLEMS, ids=str)
def problem(request):
    return PROBLEMS[request.param]


def posterior_of(problem, method="exact", **settings):
    defaults = {"prior_precision": 2.5, "num_draws": 20}
    return pf.laplace(
        problem.net, problem.data, problem.likelihood, method=method, **(defaults | settings)
    )


def moved(problem, posterior):
    """What the draws add to the outputs, by the dense Jacobian."""
    outputs, jacobian, _ = dense_jacobian(problem.net, X)
    return outputs, torch.einsum("bcp,kp->kbc", jacobian, posterior.draws)


@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_the_mean_is_the_network(problem, method):
    prediction = posterior_of(problem, method).predict(X)
    torch.testing.assert_close(prediction.mean, problem.net(X).detach())
    torch.testing.assert_close(prediction.map_expected, problem.likelihood.mean(prediction.mean))


def test_exact_variances(problem):
    posterior = posterior_of(problem)
    outputs, jacobian, _ = dense_jacobian(problem.net, X)
    expected = problem.dense().variance(2.5, jacobian)
    prediction = posterior.predict(X)
    torch.testing.assert_close(prediction.epistemic_variance, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(
        prediction.expected, problem.likelihood.probit_mean(outputs, expected)
    )


def test_sampled_variances_are_mean_squares_of_the_draws(problem):
    posterior = posterior_of(problem, "sampled")
    _, shift = moved(problem, posterior)
    prediction = posterior.predict(X)
    torch.testing.assert_close(prediction.epistemic_variance, shift.square().mean(0))
    torch.testing.assert_close(
        prediction.standard_error, prediction.epistemic_variance * (2 / 20) ** 0.5
    )


@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_monte_carlo_averages_over_the_draws(problem, method):
    posterior = posterior_of(problem, method)
    outputs, shift = moved(problem, posterior)
    prediction = posterior.predict(X, link="monte_carlo")
    expected = problem.likelihood.mean(outputs + shift).mean(0)
    torch.testing.assert_close(prediction.expected, expected)


@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_outputs_of_every_draw(problem, method):
    posterior = posterior_of(problem, method)
    outputs, shift = moved(problem, posterior)
    torch.testing.assert_close(posterior.output_draws(X), outputs + shift)
    loader = torch.utils.data.DataLoader(X, batch_size=5)
    torch.testing.assert_close(posterior.output_draws(loader), outputs + shift)
    hot = posterior.with_temperature(4.0)
    torch.testing.assert_close(hot.output_draws(X), outputs + 2 * shift)


def test_outputs_of_every_draw_need_memory(monkeypatch):
    posterior = posterior_of(PROBLEMS["categorical"])
    monkeypatch.setattr(posterior_module, "available_memory", lambda _device: 1_000)
    with pytest.raises(
        ResourceError, match=r"20 draws for 12 examples.*Give at most \d+ examples\."
    ):
        posterior.output_draws(X)


def test_probabilities_belong_to_classifications(problem):
    prediction = posterior_of(problem).predict(X)
    if isinstance(problem.likelihood, pf.Categorical | pf.Bernoulli):
        assert prediction.probabilities is prediction.expected
        assert ((prediction.probabilities > 0) & (prediction.probabilities < 1)).all()
    else:
        assert prediction.probabilities is None
    if isinstance(problem.likelihood, pf.Categorical):
        torch.testing.assert_close(prediction.expected.sum(-1), torch.ones(12).double())
    gaussian = isinstance(problem.likelihood, pf.Gaussian)
    assert (prediction.noise_variance is not None) == gaussian


@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_log_likelihoods_by_hand(problem, method):
    posterior = posterior_of(problem, method)
    y = problem.y[:12]
    outputs, shift = moved(problem, posterior)
    rows = []
    for draw in shift:
        single = [problem.log_prob((outputs + draw)[i : i + 1], y[i : i + 1]) for i in range(12)]
        rows.append(torch.stack(single))
    scores = torch.stack(rows)
    marginal = scores.exp().mean(0).log()
    found = posterior.log_likelihood(X, y)
    torch.testing.assert_close(found.value, marginal.mean())
    torch.testing.assert_close(found.standard_error, marginal.std() / 12**0.5)
    joint = scores.sum(1).exp().mean().log()
    torch.testing.assert_close(posterior.log_likelihood((X, y), joint=True).value, joint)


@pytest.mark.parametrize("joint", [False, True])
def test_large_counts_in_single_precision(joint):
    net = torch.nn.Sequential(torch.nn.Linear(3, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(0.1 * numbers(1, 3, seed=4))
        net[0].bias.fill_(14.0)
        counts = net(X).exp().round()
    values = []
    for kind in (torch.float32, torch.float64):
        own = net.to(kind)
        posterior = pf.laplace(
            own, (X.to(kind), counts), pf.Poisson(), prior_precision=1.0, num_draws=16, seed=1
        )
        found = posterior.log_likelihood(X.to(kind), counts, joint=joint)
        assert found.cost.evaluations == 12 * 17
        values.append((float(found), float(posterior.log_evidence)))
    # A single float32 log-density of such a count is off by more than a tenth.
    assert values[0][0] == pytest.approx(values[1][0], abs=0.01)
    assert values[0][1] == pytest.approx(values[1][1], abs=0.02)


def test_the_temperature_multiplies_the_covariance(problem):
    for method in ("exact", "sampled"):
        posterior = posterior_of(problem, method)
        hot = posterior.with_temperature(4.0)
        torch.testing.assert_close(hot.draws, 2 * posterior.draws)
        torch.testing.assert_close(
            hot.predict(X).epistemic_variance, 4 * posterior.predict(X).epistemic_variance
        )
        assert hot.with_temperature(1.0).temperature == 1
        torch.testing.assert_close(hot.with_temperature(1.0).draws, posterior.draws)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_has_to_be_positive(value):
    with pytest.raises(OptionError, match=r"^temperature: "):
        posterior_of(PROBLEMS["gaussian"]).with_temperature(value)


def test_weights_by_name(problem):
    posterior = posterior_of(problem)
    weights = posterior.weights()
    trained = dict(problem.net.named_parameters())
    deviations = posterior.prior.space.unravel(posterior.draws)
    for name, value in weights.items():
        torch.testing.assert_close(value, trained[name].detach() + deviations[name])
        assert value.shape == (20, *trained[name].shape)


def test_draws_of_a_g_prior_are_in_weight_space():
    problem = PROBLEMS["categorical"]
    posterior = posterior_of(problem, prior="gprior", num_draws=4000)
    dense = problem.dense().g_prior()
    covariance = dense.scale[:, None] * dense.covariance(2.5) * dense.scale
    factor = torch.linalg.inv(torch.linalg.cholesky(covariance))
    white = posterior.draws @ factor.T
    found = white.T @ white / 4000
    assert (found - torch.eye(31)).abs().max() < 5 * (2 / 4000) ** 0.5


def test_batches_do_not_matter(problem, monkeypatch):
    for method in ("exact", "sampled"):
        posterior = posterior_of(problem, method)
        whole = posterior.predict(X)
        with monkeypatch.context() as patch:
            patch.setattr(type(posterior), "_batch_size", lambda _posterior, _examples: 5)
            parts = posterior.predict(X)
        torch.testing.assert_close(parts.epistemic_variance, whole.epistemic_variance)
        torch.testing.assert_close(parts.expected, whole.expected)


def test_targets_in_a_loader_are_ignored():
    problem = PROBLEMS["categorical"]
    posterior = posterior_of(problem)
    found = posterior.predict([(X[:5], torch.zeros(5)), (X[5:], torch.zeros(7))])
    torch.testing.assert_close(found.expected, posterior.predict(X).expected)


def test_an_unknown_link_is_refused():
    with pytest.raises(OptionError, match="no link 'logit'"):
        posterior_of(PROBLEMS["categorical"]).predict(X, link="logit")


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(DataError):
        posterior_of(PROBLEMS["categorical"]).predict(X.log())


def test_a_posterior_says_what_it_is():
    problem = replace(PROBLEMS["gaussian"], likelihood=pf.Gaussian())
    posterior = posterior_of(problem, prior_precision=None)
    text = repr(posterior)
    for words in ("exact", "26 weights", "70 examples", "noise variance", "log evidence"):
        assert words in text
    fields = posterior.to_dict()
    assert fields["prior"] == "isotropic"
    assert fields["prior_precision"] == posterior.prior_precision
    assert "_factor" not in fields or fields["_factor"] is None
