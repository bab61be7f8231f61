"""The law that is sampled, against its formula; what its metric does not see; what is refused."""

from math import inf, log, nan

import pytest
import torch
from torch import nn
from torch.func import functional_call

import pushforward as pf
from degeneracy_problems import (
    F64,
    UNIT,
    draws,
    linear,
    neighbourhood,
    network,
    regression,
    relu_network,
    scaled,
)
from pushforward.degeneracy.neighbourhood import PROBED_EXAMPLES, default_nbeta
from pushforward.errors import DataError, NetworkError, OptionError, PushforwardError, ShapeError


def outputs_of(net, around, vector, inputs):
    parameters = around.potential.space.unravel(vector)
    return functional_call(net, parameters, (inputs,))


# --- the law -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["euclidean", "layerwise"])
@pytest.mark.parametrize("batch_size", [None, 7, 60])
def test_the_energy_is_its_formula(metric, batch_size):
    net, (x, y) = relu_network()
    around = neighbourhood(
        net, (x, y), metric=metric, nbeta=9.0, localization=2.5, batch_size=batch_size
    )
    for seed in range(3):
        vector = around.centre + 0.3 * draws(around.num_parameters, seed=seed)
        loss = -UNIT.log_prob(outputs_of(net, around, vector, x), y).mean()
        away = ((vector - around.centre) / around.scale).square().sum()
        energy = 9.0 * loss + 0.5 * 2.5 * away
        found = around.potential.value(vector[None])
        torch.testing.assert_close(found[0], energy.detach(), rtol=1e-12, atol=1e-12)
        distance = around.squared_distances(around.potential.space.unravel(vector[None]))[0]
        torch.testing.assert_close(distance, away, rtol=1e-12, atol=1e-12)
        excess = around.excess(found[0], distance)
        expected = 9.0 * (loss + UNIT.log_prob(net(x), y).mean())
        torch.testing.assert_close(excess, expected.detach(), rtol=1e-9, atol=1e-9)


def test_the_temperature_is_that_of_all_data_whatever_the_batch():
    net, data = relu_network()
    expected = 60 / log(60)
    for batch_size in (None, 5, 60):
        around = neighbourhood(net, data, batch_size=batch_size)
        assert around.nbeta == pytest.approx(expected)
        assert around.potential.inverse_temperature * 60 == pytest.approx(expected)
    assert default_nbeta(1000) == pytest.approx(144.765, abs=1e-3)
    assert default_nbeta(10**6) == pytest.approx(72382.4, abs=0.1)
    assert default_nbeta(1) < default_nbeta(2) < default_nbeta(3) < 3  # no division by ln 1


def test_a_batch_of_all_is_no_batch():
    net, data, _ = regression()
    for given, kept in ((None, None), (100, None), (10, 10)):
        around = neighbourhood(net, data, batch_size=given)
        assert around.potential.batch_size == kept
    long = (draws(300, 4), draws(300, 1))
    assert neighbourhood(net, long).potential.batch_size == 256


def test_another_spring_on_the_same_network():
    net, data = relu_network()
    around = neighbourhood(net, data, metric="layerwise")
    assert around.localization == 1.0
    losses = around.potential.anchor_losses
    other = around.localized(6.0)
    assert other.localization == 6.0
    assert other.potential.anchor_losses is losses  # not measured twice
    vector = around.centre + 0.1
    away = other.squared_distances(other.potential.space.unravel(vector[None]))[0]
    difference = other.potential.value(vector[None]) - around.potential.value(vector[None])
    torch.testing.assert_close(difference[0], 2.5 * away)


def test_sizes_and_the_loss_at_the_weights():
    net, (x, y), _ = regression()
    around = neighbourhood(net, (x, y + 1.0), pf.Gaussian(0.5))
    assert (around.num_examples, around.num_parameters) == (100, 4)
    assert around.euclidean
    assert not neighbourhood(net, (x, y), metric="layerwise").euclidean
    exact = -pf.Gaussian(0.5).log_prob(net(x).detach(), y + 1.0).mean()
    assert around.initial_loss == pytest.approx(float(exact), abs=1e-12)
    assert torch.equal(around.centre, net[0].weight.detach().flatten())


def test_curvature_is_probed_on_part_of_the_data(monkeypatch):
    net, data, _ = regression()
    assert neighbourhood(net, data).probed.num_examples == 100
    monkeypatch.setattr("pushforward.degeneracy.neighbourhood.PROBED_EXAMPLES", 10)
    part = neighbourhood(net, data, batch_size=5).probed
    assert part.num_examples == 10
    assert part.batch_size is None
    assert part.inverse_temperature * 10 == pytest.approx(default_nbeta(100))
    assert PROBED_EXAMPLES == 2048


# --- the metric ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factor", [1e-4, 1e-2, 3.0, 1e4])
def test_scales_go_with_the_layers(factor, bias):
    net, data = relu_network(bias=bias)
    here = neighbourhood(net, data, metric="layerwise")
    there = neighbourhood(scaled(net, factor), data, metric="layerwise")
    first = ("0.weight", "0.bias")
    for name, at in here.potential.space.slices.items():
        expected = factor if name in first else 1 / factor if name == "2.weight" else 1.0
        ratio = there.scale[at] / here.scale[at]
        torch.testing.assert_close(ratio, torch.full_like(ratio, expected), rtol=1e-6, atol=0)
        assert len(here.scale[at].unique()) == 1  # one scale a tensor


def test_scales_of_a_power_of_two_are_exact():
    """No rounding: whatever follows from the scales is then the same bit for bit."""
    net, data = relu_network()
    here = neighbourhood(net, data, metric="layerwise")
    there = neighbourhood(scaled(net, 2.0**13), data, metric="layerwise")
    assert torch.equal(there.centre / there.scale, here.centre / here.scale)
    vector = here.centre + here.scale * draws(here.num_parameters)
    other = there.centre + there.scale * draws(here.num_parameters)
    assert torch.equal(here.potential.value(vector[None]), there.potential.value(other[None]))


def test_scales_are_inverse_roots_of_the_mean_curvature():
    net, (x, y) = relu_network()
    around = neighbourhood(net, (x, y), metric="layerwise", nbeta=60.0)

    def loss(vector):
        return -UNIT.log_prob(outputs_of(net, around, vector, x), y).sum()

    hessian = torch.autograd.functional.hessian(loss, around.centre)
    slices = around.potential.space.slices
    mean = torch.stack([hessian.diagonal()[at].mean() for at in slices.values()])
    found = torch.stack([around.scale[at][0] for at in slices.values()]).pow(-2)
    ratio = found / mean
    # Four probes of a trace of a few entries: only its size can be told.
    assert (ratio / ratio.median()).min() > 0.2
    assert (ratio / ratio.median()).max() < 5
    # The common factor: the weights are as long as if every entry were of size 1.
    length = (around.centre / around.scale).square().sum()
    assert length == pytest.approx(around.num_parameters, rel=1e-6)


def test_scales_are_exact_to_rounding():
    net, data = relu_network()
    around = neighbourhood(net, data, metric="layerwise")
    length = (around.centre / around.scale).square().sum()
    assert length == pytest.approx(around.num_parameters, rel=1e-12)


def test_a_dead_layer_keeps_its_own_size():
    net = network(linear(3, 4), nn.ReLU, linear(4, 1))
    with torch.no_grad():
        net[0].bias.fill_(-100.0)  # nothing passes
    around = neighbourhood(net, (draws(20, 3), draws(20, 1)), metric="layerwise")
    scale = around.scale[around.potential.space.slices["0.weight"]]
    expected = net[0].weight.detach().square().mean().sqrt()
    torch.testing.assert_close(scale, expected.expand_as(scale))
    assert bool((around.scale > 0).all())


def test_a_network_of_zeros_has_no_scale():
    net = network(linear(3, 1))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    with pytest.raises(DataError, match=r"no curvature.*\n?.*metric='euclidean'"):
        neighbourhood(net, (draws(20, 3), draws(20, 1)), metric="layerwise")


# --- which parameters ----------------------------------------------------------------------------


def normalised():
    net = network(linear(3, 4), lambda: nn.LayerNorm(4), nn.Tanh, linear(4, 1))
    return net, (draws(30, 3), draws(30, 1))


@pytest.mark.parametrize(
    ("subset", "names"),
    [
        (None, ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]),
        ("1.*", ["1.weight", "1.bias"]),
        (["*.weight"], ["0.weight", "1.weight", "3.weight"]),
        (["0.bias", "3.*"], ["0.bias", "3.weight", "3.bias"]),
    ],
)
def test_patterns_choose_and_normalisation_counts(subset, names):
    net, data = normalised()
    around = neighbourhood(net, data, subset=subset)
    assert list(around.potential.space.names) == names
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    assert around.num_parameters == sum(sizes[name] for name in names)
    vector = around.centre + 0.2
    loss = -UNIT.log_prob(outputs_of(net, around, vector, data[0]), data[1]).mean()
    away = 0.5 * 0.04 * around.num_parameters
    expected = around.nbeta * loss.detach() + away
    torch.testing.assert_close(around.potential.value(vector[None])[0], expected)


def test_parameters_that_need_no_gradient_are_held():
    net, data = normalised()
    net[0].requires_grad_(False)
    assert neighbourhood(net, data).num_parameters == 8 + 5
    net.requires_grad_(False)
    assert neighbourhood(net, data).num_parameters == 16 + 8 + 5  # none is as good as all


def test_patterns_that_match_nothing_are_refused():
    net, data = normalised()
    for subset in ("conv*", ["0.*", "conv*"], []):
        with pytest.raises(OptionError, match=r"subset: .*matches no parameter.*\n?.*0\.weight"):
            neighbourhood(net, data, subset=subset)


# --- realisable ----------------------------------------------------------------------------------


def own_loss(outputs, targets):
    return (outputs - targets).pow(4).sum(1)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (pf.Categorical(), torch.arange(30) % 3),
        (pf.Bernoulli(), (torch.arange(90).reshape(30, 3) % 2).to(F64)),
        (pf.Gaussian(0.3), draws(30, 3, seed=5)),
        (own_loss, draws(30, 3, seed=5)),
    ],
)
def test_realisable_weights_are_a_minimum_whatever_the_targets(loss, targets):
    net = network(linear(2, 4), nn.Tanh, linear(4, 3))
    data = (draws(30, 2), targets)
    plain = neighbourhood(net, data, loss)
    around = neighbourhood(net, data, loss, realisable=True)
    centre = around.centre[None]
    _, slope = plain.potential.value_and_gradient(centre)
    assert slope.norm() > 0.1
    _, slope = around.potential.value_and_gradient(centre)
    assert slope.norm() < 1e-12 * around.nbeta
    assert around.num_examples == 30
    below = around.potential.losses(around.centre + 0.3 * draws(50, around.num_parameters))
    assert (below > around.initial_loss).all()


def test_the_expected_loss_of_a_classifier_is_cross_entropy_and_entropy():
    net = network(linear(2, 3))
    x = draws(30, 2)
    around = neighbourhood(net, (x, torch.arange(30) % 3), pf.Categorical(), realisable=True)
    own = torch.distributions.Categorical(logits=net(x).detach())
    assert around.initial_loss == pytest.approx(float(own.entropy().mean()), abs=1e-12)
    vector = around.centre + draws(around.num_parameters)
    other = torch.distributions.Categorical(logits=outputs_of(net, around, vector, x).detach())
    divergence = torch.distributions.kl_divergence(own, other).mean()
    found = around.potential.losses(vector[None])[0] - around.initial_loss
    torch.testing.assert_close(found, divergence, rtol=1e-10, atol=1e-12)


def test_the_expected_loss_of_coins():
    net = network(linear(2, 1))
    x = draws(30, 2)
    around = neighbourhood(net, (x, torch.ones(30, 1, dtype=F64)), pf.Bernoulli(), realisable=True)
    own = torch.distributions.Bernoulli(logits=net(x).detach())
    assert around.initial_loss == pytest.approx(float(own.entropy().mean()), abs=1e-12)


def test_realisable_counts_are_refused():
    net, (x, y), _ = regression()
    with pytest.raises(OptionError, match=r"realisable: Poisson .*\n?.*Gaussian, Categorical"):
        neighbourhood(net, (x, y.abs().round()), pf.Poisson(), realisable=True)


# --- data of other forms -------------------------------------------------------------------------


class Words(nn.Module):
    """A transformer in small, called with keywords as language models are."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.project = nn.Linear(8, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        hidden = self.embed(input_ids)
        q, k, v = self.project(self.norm(hidden)).chunk(3, -1)
        mask = attention_mask[:, None, :].bool()
        hidden = hidden + nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        kept = attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * kept).sum(1) / kept.sum(1))


def sentences(count=20):
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(11, (count, 5), generator=generator),
        "attention_mask": (torch.arange(5) < 3 + torch.arange(count)[:, None] % 3).long(),
        "labels": torch.arange(count) % 3,
    }


@pytest.mark.parametrize("realisable", [False, True])
@pytest.mark.parametrize("batch_size", [None, 6])
def test_mappings_of_columns(realisable, batch_size):
    net = network(Words)
    words = net[0]
    columns = sentences()
    loader = [{name: c[i : i + 7] for name, c in columns.items()} for i in (0, 7, 14)]
    options = {"realisable": realisable, "batch_size": batch_size}
    around = neighbourhood(words, loader, pf.Categorical(), **options)
    assert around.num_examples == 20
    assert around.num_parameters == sum(p.numel() for p in words.parameters())
    logits = words(columns["input_ids"], columns["attention_mask"]).detach()
    law = torch.distributions.Categorical(logits=logits)
    expected = law.entropy() if realisable else -law.log_prob(columns["labels"])
    assert around.initial_loss == pytest.approx(float(expected.mean()), abs=1e-12)
    vectors = around.centre + 0.1 * draws(2, around.num_parameters)
    uniforms = torch.rand(2, batch_size or 0, dtype=F64)
    value, slope = around.potential.stochastic_value_and_gradient(vectors, uniforms)
    assert bool(value.isfinite().all())
    assert bool(slope.isfinite().all())
    product = around.probed.curvature_product(vectors, torch.ones_like(vectors))
    assert bool(product.isfinite().all())


def test_a_transformer_of_the_hub():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=3,
    )
    torch.manual_seed(0)
    net = transformers.BertForSequenceClassification(config).double().eval()
    around = neighbourhood(net, [sentences()], pf.Categorical(), subset="classifier*")
    assert around.num_parameters == 27
    logits = net(**{k: v for k, v in sentences().items() if k != "labels"}).logits
    loss = nn.functional.cross_entropy(logits, sentences()["labels"])
    assert around.initial_loss == pytest.approx(float(loss.detach()), abs=1e-9)
    found = pf.learning_coefficient(
        net,
        [sentences()],
        pf.Categorical(),
        sampler="langevin",
        num_chains=2,
        num_draws=20,
        batch_size=2,
        realisable=True,
    )
    assert found.num_parameters == sum(p.numel() for p in net.parameters())
    assert 0 < float(found) < found.num_parameters / 2


def test_a_loader_is_its_tensors():
    net, (x, y) = relu_network()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    whole, parts = neighbourhood(net, (x, y)), neighbourhood(net, loader)
    assert parts.nbeta == whole.nbeta
    assert parts.initial_loss == pytest.approx(whole.initial_loss, rel=1e-14)
    assert parts.potential.batch_size is None
    vectors = whole.centre + draws(2, whole.num_parameters)
    torch.testing.assert_close(parts.potential.value(vectors), whole.potential.value(vectors))


@pytest.mark.statistical
@pytest.mark.parametrize("scaled_by", [0.5, 1.0])
def test_the_virial_counts_the_parameters(scaled_by):
    """Of draws from a normal law exactly, and a quarter of it where they are half as wide."""
    net, (x, y), _ = regression()
    with torch.no_grad():
        y = net(x)
    around = neighbourhood(net, (x, y), localization=3.0)
    precision = around.nbeta * x.mT @ x / len(x) + 3.0 * torch.eye(x.shape[1], dtype=F64)
    normals = draws(4000, around.num_parameters, seed=4)
    away = torch.linalg.solve_triangular(
        torch.linalg.cholesky(precision).mT, normals.mT, upper=True
    ).mT
    parameters = around.potential.space.unravel(around.centre + scaled_by * away)
    found = around.virials(parameters)
    error = float(found.std()) / 4000**0.5
    assert abs(float(found.mean()) - scaled_by**2 * around.num_parameters) < 4.5 * error


# --- what is refused -----------------------------------------------------------------------------


def with_layer(layer):
    return nn.Sequential(nn.Linear(4, 2), layer, nn.Linear(2, 1)).to(F64).train()


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(2), nn.Dropout(0.1)])
def test_networks_in_training_mode_are_refused(layer):
    _, data, _ = regression()
    with pytest.raises(
        NetworkError, match=rf"{type(layer).__name__} is in training mode.*\n?.*eval"
    ):
        neighbourhood(with_layer(layer), data)
    assert neighbourhood(with_layer(layer).eval(), data).num_examples == 100


def mean_loss(outputs, targets):
    return (outputs - targets).square().mean()


def wide_loss(outputs, targets):
    return (outputs - targets).square()


def broadcasting_loss(outputs, targets):
    return (outputs - targets[:, 0]).square().mean(1)


def batch_loss(outputs, targets):
    return (outputs - targets).square().sum(1) / len(outputs)


def lost_loss(outputs, targets):
    return (outputs - targets).square().sum(1) * nan


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (mean_loss, OptionError, r"returned \(\) for 8.*\n?.*reduction='none'"),
        (wide_loss, OptionError, r"returned \(8, 1\) for 8"),
        (broadcasting_loss, OptionError, "depends on the other examples"),
        (batch_loss, OptionError, "depends on the other examples"),
        (lost_loss, DataError, "not finite at the network's weights"),
        (pf.Gaussian(), OptionError, "noise variance"),
    ],
)
def test_losses_that_are_none(loss, error, message):
    net, (x, y), _ = regression()
    with pytest.raises(error, match=message) as caught:
        neighbourhood(net, (x, y + 1.0), loss)
    assert "loss" in str(caught.value)


@pytest.mark.wrong_types
def test_a_name_is_no_loss():
    net, data, _ = regression()
    with pytest.raises(OptionError, match="'mse' is no loss"):
        neighbourhood(net, data, "mse")


@pytest.mark.parametrize(
    ("cut", "error", "message"),
    [
        (lambda x, y: (x[:0], y[:0]), DataError, "no examples"),
        (lambda _x, _y: [], DataError, "no examples"),
        (lambda x, y: (x, y[:-1]), DataError, "inputs 100, targets 99"),
        (lambda x, y: [(x[:50], y[:50]), (x[50:], y[50:-1])], DataError, "batch 1.*50, targets 49"),
        (lambda x, y: (x * inf, y), DataError, "inputs of example 0"),
        (lambda x, y: (x, y * nan), DataError, "target"),
        (lambda x, y: (x, torch.cat([y, y], 1)), ShapeError, "target"),
        (lambda x, y: (x[:, :2], y), PushforwardError, "inputs"),
        (lambda x, _y: x, DataError, "no targets"),
    ],
)
def test_data_that_do_not_fit(cut, error, message):
    net, data, _ = regression()
    with pytest.raises(error, match=message):
        neighbourhood(net, cut(*data))


def test_shuffled_data_are_refused():
    net, (x, y), _ = regression()
    data = torch.utils.data.TensorDataset(x, y)
    shuffled = torch.utils.data.DataLoader(data, batch_size=10, shuffle=True)
    with pytest.raises(DataError, match="shuffle"):
        neighbourhood(net, shuffled)


@pytest.mark.parametrize("size", [0, -1, 101])
def test_batches_that_there_are_not(size):
    net, data, _ = regression()
    with pytest.raises(OptionError, match=rf"^batch_size: {size} is out of range.* from 1 to 100"):
        neighbourhood(net, data, batch_size=size)


def test_weights_that_are_not_finite():
    net, data, _ = regression()
    with torch.no_grad():
        net[0].weight[0, 1] = nan
    with pytest.raises(NetworkError, match=r"0\.weight.*NaN"):
        neighbourhood(net, data)


@pytest.mark.wrong_types
def test_what_is_no_network():
    _, data, _ = regression()
    with pytest.raises(NetworkError, match="got str"):
        neighbourhood("net", data)


def test_the_virial_is_distance_times_gradient():
    """Of each chain, not in the mean alone: where the centre is counts for nothing."""
    net, (x, y), _ = regression()
    around = neighbourhood(net, (x, y), localization=3.0)
    precision = around.nbeta * x.mT @ x / len(x) + 3.0 * torch.eye(x.shape[1], dtype=F64)
    away = draws(5, around.num_parameters, seed=4)
    found = around.virials(around.potential.space.unravel(around.centre + away))
    torch.testing.assert_close(found, ((away @ precision) * away).sum(1))
