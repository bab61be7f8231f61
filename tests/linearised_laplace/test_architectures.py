"""Posteriors of networks whose layers cannot be vectorised over examples, and their misuse."""

import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.errors import NetworkError

PRECISION = 2.0


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.head = kind(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.body(x)[0][:, -1])


class WritesIntoBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 3), nn.Linear(3, 2)

    def forward(self, x):
        hidden = torch.tanh(self.body(x.flatten(1)))
        found = torch.zeros(len(x), 3, dtype=x.dtype)  # not x.new_zeros, which vmap vectorises
        found[:, 0] = hidden[:, 0]
        found[:, 1:] = hidden[:, 1:].square()
        return self.head(found)


BUILD = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "RNN": lambda: Recurrent(nn.RNN),
    "buffer": WritesIntoBuffer,
}


def drawn(net, seed=0):
    """In single precision, as networks are built, with weights that do not depend on torch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return net.eval()


def data(count=60):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, 2, generator=generator)
    return x, (x[:, -1, 0] + x[:, 0, 1] > 0).long()


def posterior(net, method, **options):
    return pf.laplace(
        net, data(), pf.Categorical(), method=method, prior_precision=PRECISION, **options
    )


@pytest.fixture(params=BUILD, ids=str)
def net(request):
    return drawn(BUILD[request.param]())


def test_the_exact_posterior_is_that_of_autograd(net):
    """Variances by rows of the Jacobian from plain autograd, in double precision."""
    x, _ = data()
    found = posterior(net, "exact")
    twin = drawn(net).double()
    parameters = list(twin.parameters())
    outputs = twin(x.double())
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(outputs[i, c], parameters, retain_graph=True)]
        )
        for i in range(len(x))
        for c in range(2)
    ]
    jacobian = torch.stack(rows).reshape(len(x), 2, -1)
    p = outputs.detach().softmax(-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    matrix = torch.einsum("bcp,bcd,bdq->pq", jacobian, curvature, jacobian)
    covariance = torch.linalg.inv(matrix + PRECISION * torch.eye(len(matrix)))
    variances = torch.einsum("bcp,pq,bcq->bc", jacobian, covariance, jacobian)[:7]
    torch.testing.assert_close(
        found.predict(x[:7]).variance.double(), variances, rtol=1e-3, atol=1e-6
    )


@pytest.mark.statistical
def test_sampled_and_exact_posteriors_agree(net):
    exact, sampled = posterior(net, "exact"), posterior(net, "sampled", num_draws=256, seed=3)
    found, dimension = sampled.effective_dimension, float(exact.effective_dimension.value)
    assert abs(float(found.value) - dimension) < 4 * float(found.standard_error)
    assert float(found.standard_error) < 0.05 * dimension
    x, _ = data()
    ratio = sampled.predict(x).variance / exact.predict(x).variance
    assert (ratio.mean(0) - 1).abs().max() < 4 * (2 / 256) ** 0.5


@pytest.mark.parametrize("method", ["exact", "sampled"])
@pytest.mark.parametrize("subset", ["body", "head"])
def test_a_part_can_be_uncertain(net, method, subset):
    x, _ = data()
    variance = posterior(net, method, subset=subset, num_draws=8).predict(x[:5]).variance
    assert variance.shape == (5, 2)
    assert (variance > 0).all()


@pytest.mark.parametrize("method", ["exact", "sampled"])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout(0.5)], ids=["norm", "dropout"])
def test_training_mode_after_the_fit_is_refused(layer, method):
    net = nn.Sequential(nn.Flatten(), layer, drawn(nn.Linear(8, 2))).eval()
    found, (x, _) = posterior(net, method, num_draws=8), data()
    before, state = found.predict(x), {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    with pytest.raises(NetworkError, match="is in training mode") as caught:
        found.predict(x)
    assert "net.eval()" in caught.value.advice
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())
    net.eval()
    assert torch.equal(found.predict(x).mean, before.mean)
    assert torch.equal(found.predict(x).variance, before.variance)


@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_tokens_out_of_range_are_named(method):
    net = drawn(nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2)))
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(5, (30, 3), generator=generator)
    y = (x[:, 0] > 2).long()
    found = pf.laplace(net, (x, y), pf.Categorical(), method=method, num_draws=8)
    wrong = torch.tensor([[0, 1, 5]])
    with pytest.raises(NetworkError, match="IndexError") as caught:
        found.predict(wrong)
    assert "token ids" in caught.value.advice
    with pytest.raises(NetworkError, match="IndexError"):
        pf.laplace(net, (wrong, torch.tensor([0])), pf.Categorical(), method=method)


def test_predictions_inside_inference_mode_are_the_same(net):
    x, _ = data()
    for method in ("exact", "sampled"):
        found = posterior(net, method, num_draws=8)
        expected = found.predict(x[:5]).variance
        with torch.inference_mode():
            inside = found.predict(x[:5].clone()).variance
        torch.testing.assert_close(inside.clone(), expected)
