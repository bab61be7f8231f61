"""The end of a network on its own gives what the whole gives."""

import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.networks.data import Examples
from pushforward.networks.head import split_head
from pushforward.networks.model import FunctionalModel


class Counted(nn.Module):
    """A layer that counts how many examples it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(3, 8), 0

    def forward(self, x):
        self.seen += len(x)
        return self.linear(x).tanh()


@pytest.fixture
def problem():
    torch.manual_seed(0)
    net = nn.Sequential(Counted(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randn(300, 3, dtype=torch.float64)
    return net, x, torch.randint(0, 2, (300,))


def wrapped(net, subset):
    """The same function, of which nobody knows that it is a module."""
    model = FunctionalModel.of(net, subset)
    return FunctionalModel(model.function, model.parameters, "net", {}, model.frozen)


@pytest.mark.parametrize("subset", ["3", ["1", "3"], "1.bias", "3.weight"])
@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_same_posterior_as_through_the_whole_network(problem, subset, method):
    net, x, y = problem
    options = {"prior": "gprior", "num_draws": 8, "method": method, "seed": 3}
    ours = pf.laplace(net, (x, y), pf.Categorical(), subset=subset, **options)
    slow = pf.laplace(wrapped(net, subset), (x, y), pf.Categorical(), **options)
    torch.testing.assert_close(ours.prior_precision, slow.prior_precision, rtol=1e-6, atol=0.0)
    for mine, theirs in (
        (ours.predict(x[:9]).epistemic_variance, slow.predict(x[:9]).epistemic_variance),
        (ours.predict(x[:9]).mean, slow.predict(x[:9]).mean),
        (ours.effective_dimension.value, slow.effective_dimension.value),
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-12)


def test_the_fixed_part_sees_the_data_a_few_times_only(problem):
    net, x, y = problem
    pf.laplace(net, (x, y), pf.Categorical(), subset="3")
    assert net[0].seen < 2 * len(x)


def test_the_end_and_its_inputs(problem):
    net, x, y = problem
    model = FunctionalModel.of(net, "3")
    end, features = split_head(model, Examples.read((x, y)))
    batch = features.select(torch.tensor([5, 0]))
    assert batch.inputs.shape == (2, 6)
    torch.testing.assert_close(end.predict(batch.inputs), model.predict(x[[5, 0]]))
    assert batch.targets.tolist() == y[[5, 0]].tolist()
    assert end.space == model.space


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.end = nn.Linear(3, 3)

    def forward(self, x):
        return self.end(self.end(x))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.end = nn.Linear(3, 3)

    def forward(self, x):
        return 2 * self.end(x)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.end = nn.Linear(3, 3)

    def forward(self, x):
        return self.end(input=x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.end = nn.Linear(3, 3), nn.Linear(3, 3)
        self.first.weight = self.end.weight

    def forward(self, x):
        return self.end(self.first(x))


class Reused(nn.Module):
    """The end's weight is used by hand as well, behind the back of every module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.end = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.end(self.first(x) @ self.end.weight)


class WrittenTo(nn.Module):
    """The output is the end's own tensor, with other numbers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.end = nn.Linear(3, 3)

    def forward(self, x):
        return self.end(x).relu_()


class WritesIntoItsInput(nn.Module):
    """What reaches the end is gone when it has been called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.end = nn.Linear(3, 3), Increment()

    def forward(self, x):
        return self.end(self.first(x))


class Increment(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def forward(self, x):
        with torch.no_grad():
            x += 1
        return super().forward(x)


class Sometimes(nn.Module):
    """The end of the network for some inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.end = nn.Linear(3, 3)

    def forward(self, x):
        outputs = self.end(x)
        return outputs if (x[:, 0] >= 0).all() else 2 * outputs


def test_what_is_the_end_for_some_examples_only_is_none():
    x = torch.rand(5, 3)
    x[3] = -1
    model = FunctionalModel.of(Sometimes(), "end")
    assert split_head(model, Examples.read((x, torch.zeros(5)))) is None
    assert split_head(model, Examples.read((x[:3], torch.zeros(3)))) is not None


@pytest.mark.parametrize("network", [Twice, Scaled, Keyword, WrittenTo, WritesIntoItsInput])
def test_no_end_to_be_told(network):
    x = torch.randn(5, 3)
    model = FunctionalModel.of(network(), "end")
    assert split_head(model, Examples.read((x, torch.zeros(5)))) is None


def test_tied_weights_are_not_an_end():
    model = FunctionalModel.of(Tied(), ["first.weight"])
    assert split_head(model, Examples.read((torch.randn(5, 3), torch.zeros(5)))) is None


def test_weights_used_before_the_end_are_not_an_end():
    model = FunctionalModel.of(Reused(), "end")
    assert split_head(model, Examples.read((torch.randn(5, 3), torch.zeros(5)))) is None


def test_a_function_has_no_end():
    model = FunctionalModel(lambda p, x: x * p["a"], {"a": torch.ones(1)})
    assert split_head(model, Examples.read((torch.randn(5, 1), torch.zeros(5)))) is None


def test_spread_parameters_are_no_end(problem):
    net, x, y = problem
    assert split_head(FunctionalModel.of(net, ["0", "3"]), Examples.read((x, y))) is None
