"""Energies of networks: against a slow loop, from minibatches, in pieces, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

import pushforward as pf
from pushforward.errors import DataError, NetworkError, OptionError, ShapeError
from pushforward.networks.data import Examples
from pushforward.sampling import network_potential as module
from pushforward.sampling.potential import Potential

F64 = torch.float64
CHAINS = 3
LIKELIHOODS = {
    "categorical": (pf.Categorical(), 3),
    "bernoulli": (pf.Bernoulli(), 1),
    "poisson": (pf.Poisson(), 2),
    "gaussian": (pf.Gaussian(0.3), 2),
}


def network(outputs=3, dtype=F64, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, outputs))
    return net.to(dtype).eval()


def data_for(net, likelihood, count=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2, generator=generator, dtype=next(net.parameters()).dtype)
    with torch.no_grad():
        return x, likelihood.sample(net(x), generator)


def problem(kind="categorical", dtype=F64, count=7, **options):
    likelihood, outputs = LIKELIHOODS[kind]
    net = network(outputs, dtype)
    data = data_for(net, likelihood, count)
    return net, data, Potential.of_network(net, data, likelihood, **options)


def points(potential, chains=CHAINS, seed=2):
    generator = torch.Generator().manual_seed(seed)
    size = potential.space.size
    return torch.randn(chains, size, generator=generator, dtype=F64).to(potential.dtype)


def by_hand(potential, vectors, loss, *, prior=1.0, beta=1.0, gamma=0.0):
    """One chain, one example at a time; `loss` maps parameters and an example's number."""
    values, gradients = [], []
    for vector in vectors:
        leaf = vector.clone().requires_grad_()
        parameters = {
            name: leaf[where].reshape(shape)
            for (name, where), shape in zip(
                potential.space.slices.items(), potential.space.shapes, strict=True
            )
        }
        energy = sum(0.5 * prior * tensor.square().sum() for tensor in parameters.values())
        anchor = potential.model.parameters
        away = [(parameters[name] - anchor[name]).square().sum() for name in parameters]
        energy = energy + 0.5 * gamma * sum(away)
        for i in range(potential.num_examples):
            energy = energy + beta * loss(parameters, i)
        (gradient,) = torch.autograd.grad(energy, leaf)
        values.append(energy.detach())
        gradients.append(gradient)
    return torch.stack(values).double(), torch.stack(gradients)


def assert_agrees(potential, vectors, expected, tolerance=1e-10):
    value, gradient = potential.value_and_gradient(vectors)
    assert value.dtype == F64
    assert gradient.dtype == potential.dtype
    assert not value.requires_grad
    assert not gradient.requires_grad
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(value, expected[0], **close)
    torch.testing.assert_close(gradient, expected[1], **close)
    torch.testing.assert_close(potential.value(vectors), value, rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_value_and_gradient_are_those_of_a_loop(kind):
    options = {"prior_precision": 2.5, "inverse_temperature": 0.7, "localization": 0.4}
    net, (x, y), potential = problem(kind, **options)
    likelihood = LIKELIHOODS[kind][0]

    def loss(parameters, i):
        outputs = functional_call(net, parameters, (x[i : i + 1],))
        return -likelihood.log_prob(outputs, y[i : i + 1]).sum()

    vectors = points(potential)
    expected = by_hand(potential, vectors, loss, prior=2.5, beta=0.7, gamma=0.4)
    assert_agrees(potential, vectors, expected)


def test_the_gradient_is_the_slope_of_the_value():
    _, _, potential = problem(localization=0.3, inverse_temperature=2.0)
    vectors, step = points(potential), 1e-5
    _, gradient = potential.value_and_gradient(vectors)
    for entry in range(potential.space.size):
        shift = torch.zeros(potential.space.size, dtype=F64)
        shift[entry] = step
        slope = (potential.value(vectors + shift) - potential.value(vectors - shift)) / (2 * step)
        torch.testing.assert_close(gradient[:, entry], slope, rtol=1e-7, atol=1e-7)


def test_chains_do_not_see_each_other():
    _, _, potential = problem(batch_size=3)
    vectors = points(potential, 5)
    uniforms = torch.rand(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    broken = vectors.clone()
    broken[2] = torch.nan
    for method in (
        potential.value_and_gradient,
        lambda v: potential.stochastic_value_and_gradient(v, uniforms),
    ):
        expected, found = method(vectors), method(broken)
        for whole, part in zip(expected, found, strict=True):
            assert part[2].isnan().all()
            kept = [0, 1, 3, 4]
            torch.testing.assert_close(part[kept], whole[kept], rtol=1e-13, atol=1e-13)


def test_float32_is_summed_in_float64():
    flat = {"prior_precision": 0.0}
    _, _, single = problem("gaussian", torch.float32, count=50, **flat)
    net, (x, y), _ = problem("gaussian", torch.float32, count=50)
    double = Potential.of_network(net.double(), (x.double(), y.double()), pf.Gaussian(0.3), **flat)
    vectors = points(single)
    value, gradient = single.value_and_gradient(vectors)
    expected, slope = double.value_and_gradient(vectors.double())
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=3e-6, atol=0)
    assert (value.float().double() != value).all()  # float32 could not hold the sums
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-4, atol=1e-3)


def test_a_function_can_be_the_loss():
    net, (x, y), of_likelihood = problem()
    vectors, uniforms = points(of_likelihood), torch.rand(CHAINS, 4, dtype=F64)

    def loss(outputs, targets):
        return cross_entropy(outputs, targets, reduction="none")

    for options in ({}, {"batch_size": 4}, {"batch_size": 4, "control_variate": "gradient"}):
        first = Potential.of_network(net, (x, y), pf.Categorical(), **options)
        second = Potential.of_network(net, (x, y), loss, **options)
        close = {"rtol": 1e-12, "atol": 1e-12}
        for ours, theirs in zip(
            first.stochastic_value_and_gradient(vectors, uniforms),
            second.stochastic_value_and_gradient(vectors, uniforms),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, **close)
        torch.testing.assert_close(first.losses(vectors), second.losses(vectors), **close)


def test_mean_loss_leaves_out_prior_temperature_and_localisation():
    net, (x, y), plain = problem(prior_precision=0.0)
    vectors = points(plain)
    other = Potential.of_network(
        net, (x, y), pf.Categorical(), inverse_temperature=3.0, localization=2.0
    )
    torch.testing.assert_close(other.losses(vectors), plain.value(vectors) / len(x))


# --- minibatches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("control_variate", ["none", "value", "gradient"])
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_batches_of_one_are_unbiased_exactly(kind, control_variate):
    """The mean over all examples that a batch of one can be is the whole."""
    options = {"localization": 0.3, "inverse_temperature": 0.6, "prior_precision": 2.0}
    net, data, _ = problem(kind)
    potential = Potential.of_network(
        net, data, LIKELIHOODS[kind][0], batch_size=1, control_variate=control_variate, **options
    )
    assert potential.batch_uniforms == 1
    count = potential.num_examples
    vectors = points(potential)
    uniforms = (torch.arange(count, dtype=F64) + 0.5) / count
    every = [
        potential.stochastic_value_and_gradient(vectors, u.expand(CHAINS, 1)) for u in uniforms
    ]
    values, gradients = map(torch.stack, zip(*every, strict=True))
    assert gradients.std(0).max() > 0.1
    value, gradient = potential.value_and_gradient(vectors)
    torch.testing.assert_close(values.mean(0), value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients.mean(0), gradient, rtol=1e-12, atol=1e-12)
    alone = potential.stochastic_gradient(vectors, uniforms[2].expand(CHAINS, 1))
    assert torch.equal(alone, gradients[2])


@pytest.mark.parametrize("control_variate", ["none", "value", "gradient"])
def test_a_batch_of_all_examples_is_the_whole(control_variate):
    net, data, _ = problem("poisson")
    count = len(data[0])
    potential = Potential.of_network(
        net, data, pf.Poisson(), batch_size=count, control_variate=control_variate
    )
    vectors = points(potential)
    order = torch.stack([torch.randperm(count) for _ in range(CHAINS)])
    found = potential.stochastic_value_and_gradient(vectors, (order + 0.25) / count)
    for ours, whole in zip(found, potential.value_and_gradient(vectors), strict=True):
        torch.testing.assert_close(ours, whole.to(ours.dtype), rtol=1e-12, atol=1e-12)


def test_each_chain_has_a_batch_of_its_own():
    _, (x, y), potential = problem(batch_size=2)
    uniforms = torch.tensor([[0.0, 0.0], [0.15, 0.999999], [1 - 2**-53, 0.5]], dtype=F64)
    batch = potential.minibatch(uniforms)
    expected = torch.tensor([[0, 0], [1, 6], [6, 3]])
    assert torch.equal(batch.inputs, x[expected])
    assert torch.equal(batch.targets, y[expected])


def test_control_variates_know_the_anchor_exactly():
    net, data, _ = problem()
    uniforms = torch.rand(20, 2, dtype=F64, generator=torch.Generator().manual_seed(4))
    there, near = (
        torch.cat([p.detach().flatten() for p in net.parameters()]) + shift for shift in (0.0, 0.01)
    )
    spread = {}
    for control_variate in ("none", "value", "gradient"):
        potential = Potential.of_network(
            net, data, pf.Categorical(), batch_size=2, control_variate=control_variate
        )
        exact = potential.value_and_gradient(there[None])
        found = potential.stochastic_value_and_gradient(there.expand(20, -1), uniforms)
        errors = [float((o - w).abs().max()) for o, w in zip(found, exact, strict=True)]
        assert (errors[0] < 1e-12) == (control_variate != "none")
        assert (errors[1] < 1e-12) == (control_variate == "gradient")
        spread[control_variate] = potential.stochastic_gradient(near.expand(20, -1), uniforms).std(
            0
        )
    assert spread["gradient"].max() < 0.05 * spread["none"].max()
    assert torch.equal(spread["value"], spread["none"])


def test_without_batches_nothing_is_random():
    _, _, potential = problem()
    assert potential.batch_uniforms == 0
    vectors = points(potential)
    found = potential.stochastic_value_and_gradient(vectors, torch.empty(CHAINS, 0, dtype=F64))
    for ours, whole in zip(found, potential.value_and_gradient(vectors), strict=True):
        assert torch.equal(ours, whole)


# --- data in pieces, and in other forms ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_a_small_workspace_gives_the_same(kind, monkeypatch):
    net, data, whole = problem(kind, count=41)
    vectors = points(whole)
    pieces = []
    original = module.NetworkPotential._loss_sum

    def counted(self, vectors, table):
        pieces.append(len(table))
        return original(self, vectors, table)

    monkeypatch.setattr(module.NetworkPotential, "_loss_sum", counted)
    expected = whole.value_and_gradient(vectors)
    assert pieces == [41]
    for workspace, most in ((1, 1), (whole.activation_bytes * CHAINS * 7, 7)):
        potential = Potential.of_network(net, data, LIKELIHOODS[kind][0], workspace=workspace)
        pieces.clear()
        assert_agrees(potential, vectors, expected, 1e-12)
        assert max(pieces) == most
        assert sum(pieces) == 2 * 41  # once for the gradient, once for the value alone


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("control_variate", ["none", "value", "gradient"])
def test_data_that_are_not_held_give_the_same(kind, control_variate, monkeypatch):
    net, (x, y), _ = problem(kind)
    likelihood = LIKELIHOODS[kind][0]
    if kind == "bernoulli":
        y = y.flatten()  # a form that has to be brought to that of the outputs
    options = {"batch_size": 3, "control_variate": control_variate, "workspace": 1}
    held = Potential.of_network(net, (x, y), likelihood, **options)
    vectors, uniforms = points(held), torch.rand(CHAINS, 3, dtype=F64)
    expected = held.value_and_gradient(vectors)
    estimates = held.stochastic_value_and_gradient(vectors, uniforms)
    monkeypatch.setattr(module, "_HELD_BYTES", 0)
    read = Potential.of_network(net, (x, y), likelihood, **options)
    assert read._held is None
    assert held._held is not None
    assert_agrees(read, vectors, expected, 1e-12)
    for ours, theirs in zip(
        read.stochastic_value_and_gradient(vectors, uniforms), estimates, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class Two(nn.Module):
    """Called with two inputs, by position or by name."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, left, right):
        return self.inner(torch.cat([left, right], -1))


@pytest.mark.parametrize("form", ["tuple", "dict", "loader"])
@pytest.mark.parametrize("held", [True, False])
def test_inputs_of_other_forms(form, held, monkeypatch):
    plain_net, (x, y), plain = problem(batch_size=3)
    net = Two().eval()
    net.inner.load_state_dict(plain_net.state_dict())
    left, right = x[:, :1], x[:, 1:]
    if form == "loader":
        net = plain_net
        dataset = torch.utils.data.TensorDataset(x, y)
        data = torch.utils.data.DataLoader(dataset, batch_size=3)
    else:
        data = (
            ((left, right), y) if form == "tuple" else {"left": left, "right": right, "labels": y}
        )
    if not held:
        monkeypatch.setattr(module, "_HELD_BYTES", 0)
    potential = Potential.of_network(net, data, pf.Categorical(), batch_size=3)
    vectors, uniforms = points(plain), torch.rand(CHAINS, 3, dtype=F64)
    assert_agrees(potential, vectors, plain.value_and_gradient(vectors), 1e-12)
    torch.testing.assert_close(
        potential.stochastic_gradient(vectors, uniforms),
        plain.stochastic_gradient(vectors, uniforms),
        rtol=1e-12,
        atol=1e-12,
    )


def test_a_subset_leaves_the_rest_where_it_is():
    net, data, whole = problem(prior_precision=0.0)
    part = Potential.of_network(net, data, pf.Categorical(), subset="2", prior_precision=0.0)
    assert part.space.names == ("2.weight", "2.bias")
    vectors = points(part)
    full = whole.model.vector.repeat(CHAINS, 1)
    where = torch.cat(
        [torch.arange(whole.space.size)[whole.space.slices[n]] for n in part.space.names]
    )
    full[:, where] = vectors
    value, gradient = whole.value_and_gradient(full)
    assert_agrees(part, vectors, (value, gradient[:, where]), 1e-12)


def test_priors_by_pattern():
    net, data, _ = problem()
    precisions = {"*": 1.0, "0": 3.0, "*.bias": 5.0}
    potential = Potential.of_network(
        net, data, pf.Categorical(), prior_precision=precisions, inverse_temperature=0.0
    )
    vectors = points(potential)
    parameters = potential.space.unravel(vectors)
    expected = {"0.weight": 3.0, "0.bias": 5.0, "2.weight": 1.0, "2.bias": 5.0}
    energy = sum(0.5 * a * parameters[n].square().flatten(1).sum(1) for n, a in expected.items())
    torch.testing.assert_close(potential.value(vectors), energy)


# --- where chains begin, and what tells potentials apart -----------------------------------------


def test_chains_begin_in_the_prior():
    _, _, potential = problem(prior_precision={"0": 4.0, "2": 0.25})
    assert potential.start_normals == potential.space.size
    normals = points(potential)
    found = potential.space.unravel(potential.start(None, normals))
    expected = potential.space.unravel(normals)
    for name, tensor in found.items():
        factor = 0.5 if name.startswith("0") else 2.0
        torch.testing.assert_close(tensor, factor * expected[name])


def test_localised_chains_begin_at_the_network():
    _, _, potential = problem(localization=1.0, prior_precision=0.0)
    found = potential.start(None, points(potential))
    assert torch.equal(found, potential.model.vector.expand(CHAINS, -1))
    found += 1.0  # a copy: the network is not touched
    assert not torch.equal(found[0], potential.model.vector)


def test_given_beginnings_are_taken():
    _, _, potential = problem()
    wanted = points(potential)
    found = potential.start(potential.space.unravel(wanted), 0 * wanted)
    assert torch.equal(found, wanted)


def test_a_flat_prior_has_no_beginning():
    _, _, potential = problem(prior_precision={"*": 1.0, "2.bias": 0.0})
    with pytest.raises(OptionError, match="flat prior"):
        potential.start(None, points(potential))


def test_identity_tells_potentials_apart():
    net, (x, y), potential = problem()
    first = json.dumps(potential.identity())
    _, _, again = problem()
    assert json.dumps(again.identity()) == first
    moved = network()
    with torch.no_grad():
        moved[0].bias[0] += 1e-9
    other_x = x.clone()
    other_x[0, 0] += 1e-9

    def make(net=net, data=(x, y), loss=LIKELIHOODS["categorical"][0], **options):
        return json.dumps(Potential.of_network(net, data, loss, **options).identity())

    def smoothed(outputs, targets):
        return cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)

    others = [
        make(moved),
        make(data=(other_x, y)),
        make(loss=smoothed),
        make(loss=lambda *pair: 2 * smoothed(*pair)),
        make(prior_precision=2.0),
        make(inverse_temperature=2.0),
        make(localization=1.0),
        make(batch_size=3),
        make(batch_size=3, control_variate="gradient"),
        make(subset="2"),
    ]
    assert len({first, *others}) == 1 + len(others)
    assert make(loss=smoothed) == others[2]


def test_memory_grows_with_the_batch():
    _, _, small = problem(batch_size=1, count=200)
    _, _, large = problem(batch_size=150, count=200)
    assert small.bytes_per_chain >= 8 * small.space.size
    difference = large.bytes_per_chain - small.bytes_per_chain
    assert difference == 3 * 149 * small.activation_bytes
    assert small.activation_bytes >= 8 * (2 + 4 + 3)


# --- densities -----------------------------------------------------------------------------------


def density():
    parameters = {"a": torch.zeros(2, dtype=F64), "b": torch.ones((), dtype=F64)}

    def log_density(p):
        return -(p["a"] ** 4).sum() - (p["b"] - p["a"].sum()) ** 2

    return log_density, parameters, Potential.of_density(log_density, parameters)


def test_densities_are_differentiated():
    log_density, parameters, potential = density()
    vectors = points(potential)
    for vector, value, gradient in zip(
        vectors, *potential.value_and_gradient(vectors), strict=True
    ):
        leaf = {"a": vector[:2].clone().requires_grad_(), "b": vector[2].clone().requires_grad_()}
        energy = -log_density(leaf)
        energy.backward()
        assert float(value) == pytest.approx(float(energy.detach()), rel=1e-12)
        slopes = torch.cat([leaf["a"].grad, leaf["b"].grad[None]])
        torch.testing.assert_close(gradient, slopes, rtol=1e-12, atol=1e-12)
    assert torch.equal(potential.value(vectors), potential.value_and_gradient(vectors)[0])
    normals = points(potential, seed=5)
    expected = normals + torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    assert torch.equal(potential.start(None, normals), expected)
    assert torch.equal(potential.start(potential.space.unravel(vectors), normals), vectors)
    assert potential.space.names == tuple(parameters)


def test_densities_of_another_shape_are_refused():
    potential = Potential.of_density(lambda p: -(p["x"] ** 2), {"x": torch.zeros(3, dtype=F64)})
    with pytest.raises(OptionError, match=r"shape \(3,\)"):
        potential.value(torch.ones(2, 3, dtype=F64))


def test_identity_tells_densities_apart():
    log_density, parameters, potential = density()
    same = Potential.of_density(log_density, parameters)
    other = Potential.of_density(lambda p: 0.5 * log_density(p), parameters)
    assert json.dumps(same.identity()) == json.dumps(potential.identity())
    assert json.dumps(other.identity()) != json.dumps(potential.identity())


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "^batch_size: 0 .* from 1 to 7"),
        ({"batch_size": 8}, "^batch_size: 8 .* from 1 to 7"),
        ({"inverse_temperature": -1.0}, "inverse_temperature"),
        ({"inverse_temperature": math.nan}, "inverse_temperature"),
        ({"localization": -0.1}, "localization"),
        ({"localization": math.inf}, "localization"),
        ({"prior_precision": -1.0}, "prior_precision"),
        ({"prior_precision": math.nan}, "prior_precision"),
        ({"prior_precision": {"0": 1.0}}, r"2\.weight, 2\.bias"),
        ({"prior_precision": {"*": 1.0, "nothing": 1.0}}, "'nothing' matches no parameter"),
        ({"subset": "7"}, "'7' matches no parameter"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        problem(**options)


@pytest.mark.wrong_types
@pytest.mark.parametrize("options", [{"batch_size": 2.0}, {"prior_precision": "1"}])
def test_options_of_a_wrong_type_are_refused(options):
    with pytest.raises(OptionError):
        problem(**options)


@pytest.mark.wrong_types
def test_what_is_no_loss_is_refused():
    net, data, _ = problem()
    with pytest.raises(OptionError, match="is no loss"):
        Potential.of_network(net, data, "mse")


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (cross_entropy, OptionError, r"returned \(\) for 7 examples"),
        (lambda o, _: o, OptionError, r"returned \(7, 3\)"),
        (mse_loss, NetworkError, "cannot take outputs"),
        (lambda o, _: o.sum(1) * torch.nan, DataError, "not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_losses_that_are_none_are_refused(loss, error, message):
    net, (x, y), _ = problem()
    with pytest.raises(error, match=message):
        Potential.of_network(net, (x, y), loss)


def test_data_that_are_not_finite_are_refused():
    net, (x, y), _ = problem()
    x[4, 1] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        Potential.of_network(net, (x, y), pf.Categorical())


def test_targets_that_do_not_fit_are_refused():
    net, (x, y), _ = problem()
    with pytest.raises(DataError):
        Potential.of_network(net, (x, y + 3), pf.Categorical())
    with pytest.raises(ShapeError):
        Potential.of_network(net, (x, y), pf.Gaussian())


def test_targets_out_of_range_further_on_are_refused():
    net, (x, y), _ = problem(count=30)
    y[20] = 3
    potential = Potential.of_network(net, (x, y), pf.Categorical())
    with pytest.raises(DataError, match=r"position \[20\]"):
        potential.value(points(potential))


def test_training_mode_is_refused():
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)).double()
    data = data_for(net, pf.Categorical())
    with pytest.raises(NetworkError, match="training mode"):
        Potential.of_network(net, data, pf.Categorical())


def test_opened_examples_are_taken_as_they_are():
    net, data, potential = problem()
    opened = Examples.read(data)
    other = Potential.of_network(net, opened, pf.Categorical())
    assert json.dumps(other.identity()) == json.dumps(potential.identity())
    assert replace(other, batch_size=2).batch_uniforms == 2


def test_a_density_of_all_chains_at_once():
    start = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}

    def one(p):
        return -(p["a"] ** 4).sum() - (p["b"] - 1) ** 2

    def many(p):
        return -(p["a"] ** 4).sum(-1) - (p["b"] - 1) ** 2

    vectors = torch.randn(5, 3, dtype=torch.float64)
    slow, fast = Potential.of_density(one, start), Potential.of_density(many, start, batched=True)
    for ours, theirs in zip(
        fast.value_and_gradient(vectors), slow.value_and_gradient(vectors), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(OptionError, match=r"shape \(\)"):
        Potential.of_density(lambda p: p["a"].sum(), start, batched=True).value(vectors)


# --- losses of examples, other springs, part of the data -----------------------------------------


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_losses_of_examples_are_minus_log_probabilities(kind):
    net, (x, y), potential = problem(kind, workspace=1)  # an example at a time
    likelihood = LIKELIHOODS[kind][0]
    with torch.no_grad():
        expected = -likelihood.log_prob(net(x), y)
        found = potential.example_losses(potential.model.parameters)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(potential.anchor_losses, expected)
    torch.testing.assert_close(
        potential.losses(potential.model.vector[None])[0], potential.anchor_losses.mean()
    )


@pytest.mark.parametrize("workspace", [1, 2**25])
def test_losses_of_examples_under_vmap(workspace):
    _, _, potential = problem(workspace=workspace)
    potential.anchor_losses  # noqa: B018 - reads the data, which vmap must not
    vectors = points(potential)

    def losses(parameters):
        return potential.example_losses(parameters, at_once=CHAINS)

    found = torch.func.vmap(losses)(potential.space.unravel(vectors))
    assert found.shape == (CHAINS, potential.num_examples)
    torch.testing.assert_close(found.mean(1), potential.losses(vectors))


def test_losses_at_the_network_are_kept_in_double_precision():
    _, _, potential = problem(dtype=torch.float32)
    assert potential.anchor_losses.dtype == F64
    assert potential.anchor_losses is potential.anchor_losses
    assert not potential.anchor_losses.requires_grad


@pytest.mark.parametrize("batch_size", [None, 3])
def test_another_spring_changes_nothing_else(batch_size):
    options = {"batch_size": batch_size, "control_variate": "value"}
    net, data, potential = problem(localization=0.3, inverse_temperature=2.0, **options)
    spring = torch.linspace(0, 2, potential.space.size, dtype=F64)
    vectors = points(potential)
    uniforms = torch.rand(CHAINS, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    kept = potential.anchor_losses
    for given in (5.0, spring):
        found = potential.localized(given)
        assert found.anchor_losses is kept
        new = Potential.of_network(
            net, data, pf.Categorical(), localization=given, inverse_temperature=2.0, **options
        )
        ours = found.stochastic_value_and_gradient(vectors, uniforms)
        for one, other in zip(
            ours, new.stochastic_value_and_gradient(vectors, uniforms), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)
        assert found.identity() == new.identity()
    assert bool((potential.localization == 0.3).all())  # as it was


@pytest.mark.parametrize("given", [-1.0, math.nan, math.inf, torch.ones(3), torch.tensor(-1.0)])
def test_springs_that_are_none_are_refused(given):
    _, _, potential = problem()
    with pytest.raises(OptionError, match="localization"):
        potential.localized(given)


def test_a_spring_of_one_number_each_pulls_each_entry():
    _, _, potential = problem("gaussian", prior_precision=0.0)
    spring = torch.linspace(0, 2, potential.space.size, dtype=F64)
    vectors = points(potential)
    away = vectors - potential.model.vector
    difference = potential.localized(spring).value(vectors) - potential.value(vectors)
    torch.testing.assert_close(difference, 0.5 * (spring * away.square()).sum(1))
    _, slope = potential.localized(spring).value_and_gradient(vectors)
    torch.testing.assert_close(slope, potential.value_and_gradient(vectors)[1] + spring * away)


def test_part_of_the_data_stands_for_all():
    options = {"localization": 0.4, "inverse_temperature": 3.0, "batch_size": 2}
    net, (x, y), potential = problem(count=9, **options)
    part = potential.on_part(3)
    assert part.num_examples == 3
    assert part.batch_size is None
    assert part.inverse_temperature == pytest.approx(9.0)
    at = torch.tensor([0, 4, 8])  # spread evenly, both ends included
    few = Potential.of_network(
        net, (x[at], y[at]), pf.Categorical(), localization=0.4, inverse_temperature=9.0
    )
    vectors = points(potential)
    torch.testing.assert_close(part.value(vectors), few.value(vectors))
    one, other = (p.value_and_gradient(vectors)[1] for p in (part, few))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("count", [7, 8, 10**6])
def test_all_of_the_data_is_a_part(count):
    _, _, potential = problem(batch_size=2)
    whole = potential.on_part(count)
    assert whole.num_examples == 7
    assert whole.batch_size is None
    vectors = points(potential)
    torch.testing.assert_close(whole.value(vectors), potential.value(vectors))


def test_part_of_data_in_columns():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, first, second):
            return self.layer(first + second)

    net = Sum().double().eval()
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 9, 2, dtype=F64, generator=generator)
    columns = {"first": first, "second": second, "labels": torch.arange(9) % 3}
    potential = Potential.of_network(net, [columns], pf.Categorical())
    part = potential.on_part(3)
    at = torch.tensor([0, 4, 8])
    with torch.no_grad():
        logits = net(first[at], second[at])
    expected = cross_entropy(logits, columns["labels"][at], reduction="none")
    torch.testing.assert_close(part.anchor_losses, expected)


class LooksAtItsInputs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.map = torch.nn.Linear(3, 2).double()

    def forward(self, x):
        return self.map(x) if bool((x[:, 0] > -100).all()) else 0 * self.map(x)


def test_chains_take_turns_where_a_network_looks_at_its_inputs():
    torch.manual_seed(0)
    net = LooksAtItsInputs().eval()
    plain = torch.nn.Sequential(net.map)
    data = torch.randn(9, 3, dtype=F64), torch.randint(2, (9,))
    turns, together = (
        Potential.of_network(each, data, pf.Categorical(), batch_size=4, control_variate="value")
        for each in (net, plain)
    )
    assert not turns._takes_batches_apart
    assert together._takes_batches_apart
    uniforms = torch.rand(3, 4, dtype=F64)
    vectors = torch.randn(3, turns.space.size, dtype=F64)
    for ours, theirs in zip(
        turns.stochastic_value_and_gradient(vectors, uniforms),
        together.stochastic_value_and_gradient(vectors, uniforms),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
