"""Networks with intermediate noise: what is read, generated and refused, and the joint density."""

import json
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.func import grad, vmap

from pushforward.errors import DataError, NetworkError, OptionError
from pushforward.networks.activations import Abs, Sign
from pushforward.runs.rng import stream
from pushforward.sampling.intermediate_noise.network import IntermediateNoiseNetwork


def numbers(*shape, name="data"):
    return torch.randn(*shape, generator=stream(7, name, *shape), dtype=torch.float64)


def small_mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def small_cnn():
    return nn.Sequential(
        nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 0)),
        nn.AvgPool2d(2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 3 * 1, 4),
    )


def test_latent_variables_have_the_names_and_shapes_of_the_modules():
    model = IntermediateNoiseNetwork(small_cnn(), 0.1, 0.2, "classification")
    assert model.latent_shapes((2, 5, 7)) == {
        "latent.0": (3, 6, 3),
        "latent.1": (3, 3, 1),
        "latent.2": (3, 3, 1),
        "latent.4": (4,),
    }
    assert model.variances == {"0": 0.1, "1": 0.2, "2": 0.2, "4": 0.1}
    assert model.precisions == {"0.weight": 12, "0.bias": 12, "4.weight": 9, "4.bias": 9}


def test_variances_and_precisions_are_given_in_many_ways():
    model = IntermediateNoiseNetwork(
        small_mlp(), 0.1, [0.2], output_noise=0.3, prior_precision={"0": 5.0, "2.bias": 7.0}
    )
    assert model.variances == {"0": 0.1, "1": 0.2, "2": 0.3}
    assert model.precisions == {"0.weight": 5, "0.bias": 5, "2.weight": 4, "2.bias": 7}
    for given in ([0.1], [0.1, 0.9]):
        again = IntermediateNoiseNetwork(small_mlp(), given, 0.2, output_noise=0.3)
        assert again.variances == model.variances
    model = IntermediateNoiseNetwork(small_mlp(), [0.1, 0.4], 0.2, prior_precision=2.0)
    assert model.variances == {"0": 0.1, "1": 0.2, "2": 0.4}
    assert set(model.precisions.values()) == {2.0}


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_outputs_are_those_of_the_network(lead):
    for net, example in ((small_mlp(), (3,)), (small_cnn(), (2, 5, 7))):
        net = net.double()
        model = IntermediateNoiseNetwork(net, 0.1, 0.1)
        parameters = {
            name: numbers(*lead, *value.shape, name=name) for name, value in net.named_parameters()
        }
        x = numbers(6, *example)
        found = model.outputs(parameters, x)
        assert found.shape == (*lead, 6, model.units)
        flat = {
            name: p.flatten(0, len(lead) - 1) if lead else p[None] for name, p in parameters.items()
        }
        rows = found.reshape(-1, 6, model.units)
        for chain, row in enumerate(rows):
            one = {name: value[chain] for name, value in flat.items()}
            expected = torch.func.functional_call(net, one, (x,))
            assert torch.allclose(row, expected, atol=1e-12)


def test_without_noise_a_teacher_gives_the_outputs():
    model = IntermediateNoiseNetwork(small_cnn(), 0.1, 0.2)
    x = numbers(4, 2, 5, 7)
    parameters = model.sample_prior(stream(0, "prior"), 3)
    latents, y = model.generate(parameters, x, torch.zeros(3, model.generate_size(x)).double())
    assert torch.allclose(y, model.outputs(parameters, x))
    assert set(latents) == set(model.latent_shapes((2, 5, 7)))
    energies = model.residual_energies(parameters, latents, x, y)
    assert all(float(value.max()) < 1e-20 for value in energies.values())


def test_a_teacher_is_noise_at_every_map():
    model = IntermediateNoiseNetwork(small_cnn(), [0.1, 0.5], [0.2, 0.3])
    x = numbers(4, 2, 5, 7)
    parameters = model.sample_prior(stream(0, "prior"), 3)
    noise = numbers(3, model.generate_size(x))
    latents, y = model.generate(parameters, x, noise)
    energies = model.residual_energies(parameters, latents, x, y)
    parts = noise.split([4 * 54, 4 * 9, 4 * 9, 4 * 4], 1)
    for value, part in zip(energies.values(), parts, strict=True):
        assert torch.allclose(value, part.square().sum(1), rtol=1e-10)


def test_labels_are_the_largest_latent_outputs():
    model = IntermediateNoiseNetwork(small_mlp(), 0.1, 0.2, "classification")
    x = numbers(9, 3)
    parameters = model.sample_prior(stream(0, "prior"), 5)
    latents, labels = model.generate(parameters, x, stream(1, "noise"))
    assert torch.equal(latents["latent.2"].argmax(2), labels)
    assert torch.isfinite(model.log_joint(parameters, latents, x, labels)).all()
    assert (model.log_joint(parameters, latents, x, 1 - labels) == -math.inf).all()


@pytest.mark.parametrize("output", ["regression", "classification"])
def test_the_joint_density_is_a_product_of_normal_densities(output):
    net = nn.Sequential(
        nn.Conv2d(1, 2, 2, bias=False),
        Abs(),
        nn.AvgPool2d((2, 1)),
        nn.Flatten(),
        nn.Linear(2 * 1 * 3, 2),
        Sign(),
        nn.Linear(2, 3),
    )
    model = IntermediateNoiseNetwork(net, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], output)
    x = numbers(2, 1, 4, 4)
    parameters = model.sample_prior(stream(0, "prior"), 1)
    latents, y = model.generate(parameters, x, stream(1, "noise"))
    one = {name: value[0] for name, value in parameters.items()}
    v = {name: value[0] for name, value in latents.items()}

    def normal(value, mean, variance):
        return Normal(mean, math.sqrt(variance)).log_prob(value).sum()

    functional = nn.functional
    last = v["latent.6"] if output == "classification" else y[0]
    expected = (
        normal(v["latent.0"], functional.conv2d(x, one["0.weight"]), 0.1)
        + normal(v["latent.1"], v["latent.0"].abs(), 0.4)
        + normal(v["latent.2"], functional.avg_pool2d(v["latent.1"], (2, 1)), 0.5)
        + normal(
            v["latent.4"],
            functional.linear(v["latent.2"].flatten(1), one["4.weight"], one["4.bias"]),
            0.2,
        )
        + normal(v["latent.5"], v["latent.4"].sign(), 0.6)
        + normal(last, functional.linear(v["latent.5"], one["6.weight"], one["6.bias"]), 0.3)
        + sum(
            normal(one[name], torch.zeros(()).double(), 1 / fan_in)
            for name, fan_in in (
                ("0.weight", 4), ("4.weight", 6), ("4.bias", 6), ("6.weight", 2), ("6.bias", 2),
            )
        )
    )  # fmt: skip
    assert torch.allclose(model.log_joint(one, v, x, y[0]), expected, rtol=1e-12)
    assert torch.allclose(model.log_joint(parameters, latents, x, y[0])[0], expected, rtol=1e-12)


def test_the_joint_density_can_be_mapped_over_chains_and_differentiated():
    for net, example in ((small_mlp(), (3,)), (small_cnn(), (2, 5, 7))):
        model = IntermediateNoiseNetwork(net, 0.1, 0.2)
        x = numbers(4, *example)
        parameters = model.sample_prior(stream(0, "prior"), 3)
        latents, y = model.generate(parameters, x, stream(1, "noise"))

        def density(p, v, model=model, x=x, y=y):
            return model.log_joint(p, v, x, y[0])

        direct = density(parameters, latents)
        assert torch.allclose(vmap(density)(parameters, latents), direct, rtol=1e-12)
        slopes = vmap(grad(density, (0, 1)))(parameters, latents)
        for values, name in ((parameters, "0.weight"), (latents, "latent.1")):
            moves = 1e-6 * numbers(*values[name].shape)
            ends = [
                density(*(v | {name: v[name] + s * moves} if v is values else v for v in both))
                for both in [(parameters, latents)]
                for s in (-1, 1)
            ]
            expected = 2 * (slopes[values is latents][name] * moves).flatten(1).sum(1)
            assert torch.allclose(ends[1] - ends[0], expected, rtol=1e-4, atol=1e-10)


def test_the_description_is_json_and_tells_models_apart():
    models = [
        IntermediateNoiseNetwork(small_mlp(), 0.1, 0.2),
        IntermediateNoiseNetwork(small_mlp(), 0.1, 0.3),
        IntermediateNoiseNetwork(small_mlp(), 0.1, 0.2, prior_precision=3.0),
        IntermediateNoiseNetwork(small_mlp(), 0.1, 0.2, "classification"),
        *(
            IntermediateNoiseNetwork(nn.Sequential(nn.Linear(3, 4), f, nn.Linear(4, 2)), 0.1, 0.2)
            for f in (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), nn.Softplus(), nn.Softplus(2.0))
        ),
        IntermediateNoiseNetwork(small_cnn(), 0.1, 0.2),
    ]
    texts = [json.dumps(model.to_config()) for model in models]
    assert len(set(texts)) == len(texts)
    again = IntermediateNoiseNetwork(small_mlp(), [0.1, 0.1], [0.2])
    assert json.dumps(again.to_config()) == texts[0]


def test_an_activation_may_stand_at_two_places():
    relu = nn.ReLU()
    net = nn.Sequential(nn.Linear(3, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2))
    model = IntermediateNoiseNetwork(net, 0.1, 0.2)
    assert list(model.latent_shapes((3,))) == ["latent.0", "latent.1", "latent.2", "latent.3"]


def test_an_inplace_activation_leaves_its_argument_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    model = IntermediateNoiseNetwork(net, 0.1, 0.2)
    z = numbers(5, 4)
    kept = z.clone()
    model.maps[1].mean({}, z)
    assert torch.equal(z, kept)
    assert net[1].inplace


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def shared_weights():
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), Doubled(), nn.Linear(3, 1)), "layer 1 .Doubled"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 1)), "position 1"),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 2, groups=2), nn.Linear(3, 1)), "groups"),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 2, dilation=2), nn.Linear(3, 1)), "dilation"),
        (
            lambda: nn.Sequential(
                nn.Conv2d(2, 2, 2, padding=1, padding_mode="reflect"), nn.Linear(3, 1)
            ),
            "padding_mode",
        ),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 2, padding="same"), nn.Linear(3, 1)), "same"),
        (lambda: nn.Sequential(nn.AvgPool2d(2, stride=1), nn.Linear(3, 1)), "overlap"),
        (lambda: nn.Sequential(nn.MaxPool2d(2), nn.Linear(3, 1)), "AvgPool2d"),
        (lambda: nn.Sequential(nn.PReLU(), nn.Linear(3, 1)), "layer 0 .PReLU"),
        (lambda: nn.Sequential(nn.Linear(3, 1), nn.ReLU()), "does not end in a linear layer"),
        (lambda: nn.Sequential(), "does not end in a linear layer"),
        (shared_weights, "shared"),
    ],
)
def test_networks_that_are_refused(net, said):
    with pytest.raises(NetworkError, match=said):
        IntermediateNoiseNetwork(net(), 0.1, 0.1)


@pytest.mark.wrong_types
def test_other_modules_are_refused():
    with pytest.raises(NetworkError, match=r"nn\.Sequential"):
        IntermediateNoiseNetwork(nn.Linear(3, 1), 0.1, 0.1)
    with pytest.raises(OptionError, match="there is no output 'softmax'"):
        IntermediateNoiseNetwork(small_mlp(), 0.1, 0.1, "softmax")


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"preactivation_noise": 0.0}, "preactivation_noise"),
        ({"postactivation_noise": -1.0}, "postactivation_noise"),
        ({"postactivation_noise": math.nan}, "postactivation_noise"),
        ({"postactivation_noise": [0.1, 0.2]}, "postactivation_noise"),
        ({"preactivation_noise": [0.1]}, "preactivation_noise"),
        ({"output_noise": 0.0}, "output_noise"),
        ({"prior_precision": 0.0}, "prior_precision"),
        ({"prior_precision": {"0.bias": math.inf}}, "prior_precision"),
        ({"prior_precision": {"9.bias": 1.0}}, "'9.bias' matches no parameter"),
    ],
)
def test_options_that_are_refused(options, where):
    given = {"preactivation_noise": 0.1, "postactivation_noise": 0.1} | options
    with pytest.raises(OptionError, match=where):
        IntermediateNoiseNetwork(small_mlp(), **given)


def test_one_class_is_refused():
    with pytest.raises(NetworkError, match="one output"):
        IntermediateNoiseNetwork(nn.Sequential(nn.Linear(3, 1)), 0.1, 0.1, "classification")


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        (numbers(4, 3), numbers(4), "targets have shape"),
        (numbers(4, 3), numbers(5, 2), "targets have shape"),
        (numbers(4, 3), torch.full((4, 2), math.nan), "y: it holds NaN"),
        (torch.full((4, 3), math.inf), numbers(4, 2), "example 0 holds NaN or infinite"),
        (torch.zeros(4, 3, dtype=torch.long), numbers(4, 2), "floating-point"),
        (numbers(0, 3), numbers(0, 2), "at least one"),
    ],
)
def test_data_that_are_refused(x, y, said):
    with pytest.raises(DataError, match=said):
        IntermediateNoiseNetwork(small_mlp(), 0.1, 0.1).check_data(x, y)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.tensor([0, 1, 2]), "labels are 0 to 1"),
        (torch.tensor([0, -1, 1]), "labels are 0 to 1"),
        (torch.tensor([0.0, 1.0, 1.0]), "integers"),
        (torch.tensor([0, 1]), "integers"),
    ],
)
def test_labels_that_are_refused(labels, said):
    model = IntermediateNoiseNetwork(small_mlp(), 0.1, 0.1, "classification")
    with pytest.raises(DataError, match=said):
        model.check_data(numbers(3, 3), labels)


def test_data_of_another_shape_are_refused():
    with pytest.raises(NetworkError, match="layer 0: its inputs have shape"):
        IntermediateNoiseNetwork(small_mlp(), 0.1, 0.1).check_data(numbers(4, 5), numbers(4, 2))
    model = IntermediateNoiseNetwork(small_cnn(), 0.1, 0.1)
    for example, said in (
        ((3, 5, 7), "layer 0"), ((5,), "layer 0"), ((2, 9, 9), "layer 4"), ((2, 1, 2), "fit"),
    ):  # fmt: skip
        with pytest.raises(NetworkError, match=said):
            model.check_data(numbers(4, *example), numbers(4, 4))


def test_targets_of_one_output_may_be_a_vector():
    net = nn.Sequential(nn.Linear(3, 1))
    x, y = IntermediateNoiseNetwork(net, 0.1, 0.1).check_data(numbers(4, 3), torch.zeros(4))
    assert y.shape == (4, 1)
    assert y.dtype == x.dtype
