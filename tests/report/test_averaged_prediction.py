"""The average over draws against loops over draws, and the law of the largest entry."""

import math

import pytest
import torch

import pushforward as pf
from pushforward.errors import OptionError
from pushforward.report.averaged_prediction import LargestEntry, average_prediction


def predict(parameters, inputs):
    return inputs @ parameters["w"]


def problem(outputs, count=23, draws=7):
    generator = torch.Generator().manual_seed(outputs)
    w = torch.randn(draws, 4, outputs, generator=generator, dtype=torch.float64)
    return {"w": w}, torch.randn(count, 4, generator=generator, dtype=torch.float64), generator


def test_the_average_is_that_of_a_loop():
    draws, x, generator = problem(3)
    y = torch.randint(3, (23,), generator=generator)
    alone = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    found = average_prediction(
        predict, draws, pf.Categorical(), pf.Categorical(), (x, y), alone=lambda x: x @ alone
    )
    laws = torch.stack([(x @ w).softmax(1) for w in draws["w"]])
    chosen = laws.gather(2, y.expand(7, 23)[..., None])[..., 0]
    assert torch.allclose(found.expected, laws.mean(0))
    trained, single, average = found.rows
    assert average.nll.value == pytest.approx(float(-chosen.mean(0).log().mean()))
    assert single.nll.value == pytest.approx(float(-chosen.log().mean()))
    assert single.accuracy.value == pytest.approx(float((laws.argmax(2) == y).double().mean()))
    right = (laws.mean(0).argmax(1) == y).double().mean()
    assert average.accuracy.value == pytest.approx(float(right))
    own = torch.nn.functional.cross_entropy(x @ alone, y)
    assert trained.nll.value == pytest.approx(float(own))
    assert average.difference.value == pytest.approx(average.nll.value - trained.nll.value)
    assert trained.difference is None
    assert list(found.columns()) == [
        "NLL",
        "difference to trained network",
        "accuracy",
        "ECE",
    ]
    assert found.to_dict()["num_draws"] == 7


def test_a_mixture_of_gaussians_is_scored_as_such():
    from scipy.stats import norm

    draws, x, generator = problem(2)
    y = torch.randn(23, 2, generator=generator, dtype=torch.float64)
    law = pf.Gaussian(0.3)
    found = average_prediction(predict, draws, law, law, (x, y))
    densities = [
        math.prod(float(norm.pdf(y[i, k], (x[i] @ w)[k], 0.3**0.5)) for k in range(2))
        for w in draws["w"]
        for i in range(23)
    ]
    mixture = torch.tensor(densities, dtype=torch.float64).view(7, 23).mean(0)
    assert found.average.nll.value == pytest.approx(float(-mixture.log().mean()))
    mean = torch.stack([x @ w for w in draws["w"]]).mean(0)
    assert found.average.rmse.value == pytest.approx(float((y - mean).square().mean().sqrt()))
    assert [row.name for row in found.rows] == ["a single draw", "average over the draws"]
    assert "accuracy" not in found.columns()


@pytest.mark.parametrize("likelihood", [pf.Bernoulli(), pf.Poisson()], ids=["bernoulli", "poisson"])
def test_other_targets(likelihood):
    draws, x, generator = problem(1)
    y = torch.randint(2, (23, 1), generator=generator)
    found = average_prediction(predict, draws, likelihood, likelihood, (x, y))
    each = torch.stack([likelihood.log_prob(x @ w, y) for w in draws["w"]])
    mixed = each.exp().mean(0).log()
    assert found.average.nll.value == pytest.approx(float(-mixed.mean()))
    assert (found.average.accuracy is None) == isinstance(likelihood, pf.Poisson)


def test_draws_are_thinned_evenly_and_none_are_refused():
    draws, x, generator = problem(3, draws=9)
    y = torch.randint(3, (23,), generator=generator)
    law = pf.Categorical()
    found = average_prediction(predict, draws, law, law, (x, y), num_draws=3)
    kept = {"w": draws["w"][[0, 4, 8]]}
    again = average_prediction(predict, kept, law, law, (x, y))
    assert found.num_draws == 3
    assert torch.equal(found.expected, again.expected)
    with pytest.raises(OptionError, match="Keep the parameters"):
        average_prediction(predict, {}, law, law, (x, y))


def test_the_largest_of_two_entries_is_a_probit():
    from scipy.stats import norm

    outputs = torch.tensor([[0.0, 0.0], [1.0, -0.5], [30.0, 0.0]], dtype=torch.float64)
    law = LargestEntry(0.7).mean(outputs)
    exact = norm.cdf((outputs[:, 0] - outputs[:, 1]).numpy() / math.sqrt(2 * 0.7))
    assert law[:, 0].tolist() == pytest.approx(exact.tolist(), abs=1e-5)
    assert torch.allclose(law.sum(1), torch.ones(3, dtype=torch.float64))


def test_the_largest_of_several_entries_against_quadrature():
    from scipy import integrate
    from scipy.stats import norm

    outputs = torch.tensor([0.3, -1.0, 1.2, 0.9], dtype=torch.float64)
    law = LargestEntry(2.0)

    def density(z, c):
        others = [(outputs[c] - outputs[j]) / 2**0.5 + z for j in range(4) if j != c]
        return norm.pdf(z) * math.prod(norm.cdf(float(value)) for value in others)

    exact = [integrate.quad(density, -9, 9, args=(c,))[0] for c in range(4)]
    assert law.mean(outputs[None])[0].tolist() == pytest.approx(exact, abs=1e-5)
    rows = outputs.expand(5, 2, 4)  # draws, examples, classes
    logs = law.log_prob(rows, torch.tensor([1, 3]))
    assert logs.shape == (5, 2)
    assert logs[0].exp().tolist() == pytest.approx([exact[1], exact[3]], abs=1e-5)
