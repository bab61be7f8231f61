"""Which parameters of a network are uncertain, and the function of them that it becomes."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from laplace_scenarios import multilayer, numbers
from pushforward.errors import NetworkError, OptionError, ShapeError
from pushforward.networks.model import FunctionalModel


def double(net):
    return net.double().eval()


def normalised():
    return double(
        nn.Sequential(
            nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(),
            nn.Linear(8, 3), nn.LayerNorm(3), nn.Linear(3, 2),
        )
    )  # fmt: skip


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.gain * x / x.square().mean(-1, keepdim=True).sqrt()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.encoder(x)))


def test_a_module_becomes_the_same_function():
    net = multilayer(3, 4, 2)
    model, x = FunctionalModel.of(net), numbers(5, 3, seed=1)
    assert torch.equal(model.predict(x), net(x))
    assert not model.predict(x).requires_grad
    assert model.name == "Sequential"
    assert model.left_out == {}
    moved = {name: p + 1 for name, p in model.parameters.items()}
    other = multilayer(3, 4, 2)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    assert torch.equal(model(moved, x), other(x))
    assert torch.equal(model.vector, torch.cat([p.flatten() for p in net.parameters()]))
    assert model.dtype == torch.float64
    assert model.device == torch.device("cpu")


def test_parameters_are_shared_and_detached():
    net = multilayer(3, 2)
    model = FunctionalModel.of(net)
    assert model.parameters["0.weight"].data_ptr() == net[0].weight.data_ptr()
    assert not any(p.requires_grad for p in model.parameters.values())
    assert all(p.requires_grad for p in net.parameters())


def test_scale_and_shift_of_normalisation_layers_are_left_out():
    model = FunctionalModel.of(normalised())
    assert tuple(model.parameters) == ("0.weight", "4.weight", "4.bias", "6.weight", "6.bias")
    assert set(model.left_out) == {"1.weight", "1.bias", "5.weight", "5.bias"}
    assert set(model.left_out.values()) == {"scale or shift of a normalisation layer"}


def test_normalisation_layers_of_others_are_known_by_their_name():
    model = FunctionalModel.of(double(nn.Sequential(nn.Linear(3, 3), RMSNorm(), nn.Linear(3, 1))))
    assert set(model.left_out) == {"1.gain"}


def test_scale_and_shift_count_when_named_in_full():
    model = FunctionalModel.of(normalised(), ["5.weight", "6"])
    assert tuple(model.parameters) == ("5.weight", "6.weight", "6.bias")
    wildcard = FunctionalModel.of(normalised(), "*.weight")
    assert tuple(wildcard.parameters) == ("0.weight", "4.weight", "6.weight")
    with pytest.raises(OptionError, match="no parameter is left"):
        FunctionalModel.of(normalised(), "5")


def test_frozen_parameters_are_left_out():
    net = multilayer(3, 4, 2)
    net[0].requires_grad_(False)
    model = FunctionalModel.of(net)
    assert tuple(model.parameters) == ("2.weight", "2.bias")
    assert set(model.left_out.values()) == {"frozen"}
    # A subset is explicit, and a network without any gradient was loaded for inference.
    assert tuple(FunctionalModel.of(net, "0").parameters) == ("0.weight", "0.bias")
    assert FunctionalModel.of(net.requires_grad_(False)).space.size == 26


def test_frozen_parameters_and_buffers_take_part_in_the_function():
    net, x = normalised(), numbers(4, 1, 4, 4, seed=1)
    with torch.no_grad():
        net[1].running_mean.copy_(torch.tensor([0.3, -0.2]))
        net[1].running_var.copy_(torch.tensor([0.5, 2.0]))
    model, before = FunctionalModel.of(net), net[1].running_mean.clone()
    assert torch.equal(model.predict(x), net(x))
    model(model.parameters, 5 * x)
    assert torch.equal(net[1].running_mean, before)


def test_tied_weights_count_once():
    net, x = double(Tied()), numbers(4, 3, seed=2)
    model = FunctionalModel.of(net)
    assert model.space.size == 9
    moved = model({"encoder.weight": 2 * net.encoder.weight}, x)
    expected = torch.tanh(x @ (2 * net.encoder.weight).T) @ (2 * net.encoder.weight).T
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (torch.ones(2, 3), 1.0),
        ((torch.ones(2, 3), 2 * torch.ones(2, 3)), 3.0),
        ({"b": 5 * torch.ones(2, 3), "a": torch.ones(2, 3)}, 6.0),
    ],
    ids=["tensor", "tuple", "dict"],
)
def test_tuples_and_mappings_are_arguments(inputs, expected):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, a, b=0.0):
            return self.scale * (a + b)

    assert torch.equal(FunctionalModel.of(Sum()).predict(inputs), torch.full((2, 3), expected))


@pytest.mark.parametrize(
    "wrap", [lambda y: {"logits": y, "x": 1}, lambda y: SimpleNamespace(logits=y)]
)
def test_logits_are_found(wrap):
    model = FunctionalModel(lambda p, x: wrap(x * p["a"]), {"a": torch.tensor([2.0])})
    assert model.predict(torch.ones(3, 1)).tolist() == [[2.0]] * 3


def test_one_output_for_each_example_gets_an_axis():
    model = FunctionalModel(lambda p, x: (x * p["a"]).sum(-1), {"a": torch.tensor([2.0])})
    assert model.predict(torch.ones(3, 1)).shape == (3, 1)


def test_outputs_that_are_no_tensor_are_refused():
    model = FunctionalModel(lambda _parameters, x: [x], {"a": torch.tensor([2.0])})
    with pytest.raises(NetworkError, match="it returned list"):
        model.predict(torch.ones(3, 1))
    model = FunctionalModel(lambda p, x: (x * p["a"]).sum(), {"a": torch.tensor([2.0])})
    with pytest.raises(ShapeError, match="a single number"):
        model.predict(torch.ones(3, 1))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Dropout(0.1), "Dropout"),
        (nn.Dropout2d(0.1), "Dropout2d"),
        (nn.BatchNorm1d(3), "BatchNorm1d"),
        (nn.MultiheadAttention(4, 2, dropout=0.1), "MultiheadAttention"),
    ],
)
def test_training_mode_is_refused(module, name):
    net = nn.Sequential(nn.Linear(3, 3), module)
    with pytest.raises(NetworkError, match=f"{name} is in training mode") as caught:
        FunctionalModel.of(net)
    assert "net.eval()" in caught.value.advice
    assert caught.value.where == "module 1"
    FunctionalModel.of(net.eval())


def test_training_mode_without_chance_or_statistics_is_harmless():
    assert FunctionalModel.of(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0))).space.size == 12


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    net = multilayer(3, 4, 2)
    with torch.no_grad():
        net[2].weight[0, 1] = value
    with pytest.raises(NetworkError, match="NaN or infinite") as caught:
        FunctionalModel.of(net)
    assert caught.value.where == "parameter 2.weight"


def test_several_dtypes_are_refused():
    with pytest.raises(NetworkError, match="several kinds"):
        FunctionalModel.of(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double()))


def test_a_function_can_be_restricted():
    model = FunctionalModel(
        lambda p, x: x * p["a"] + p["b"], {"a": torch.tensor([2.0]), "b": torch.tensor([3.0])}
    )
    part = FunctionalModel.of(model, "b")
    assert part.space.names == ("b",)
    assert part.left_out == {"a": "not in subset"}
    assert torch.equal(part.predict(torch.ones(2, 1)), model.predict(torch.ones(2, 1)))
    assert FunctionalModel.of(model) is model


def test_fingerprint_sees_every_weight():
    net = multilayer(3, 4, 2)
    before = FunctionalModel.of(net).fingerprint()
    assert before == FunctionalModel.of(multilayer(3, 4, 2)).fingerprint()
    with torch.no_grad():
        net[2].bias[-1] += 1e-12
    assert FunctionalModel.of(net).fingerprint() != before
    assert FunctionalModel.of(net, "0").fingerprint() != FunctionalModel.of(net).fingerprint()


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.BatchNorm1d(3)])
def test_training_mode_after_the_network_was_read_is_refused(module):
    net = nn.Sequential(nn.Linear(3, 3), module).double().eval()
    model, x = FunctionalModel.of(net), numbers(4, 3, seed=1)
    before, state = model.predict(x), {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    for reading in (model, FunctionalModel.of(model, "0.weight")):
        with pytest.raises(NetworkError, match="is in training mode") as caught:
            reading.predict(x)
        assert caught.value.where == "module 1"
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())
    net.eval()
    assert torch.equal(model.predict(x), before)


class Raises(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error, self.scale = error, nn.Parameter(torch.ones(1))

    def forward(self, *_inputs, **_keywords):
        raise self.error


@pytest.mark.parametrize(
    ("error", "said", "advised"),
    [
        (IndexError("index out of range in self"), "IndexError: index out of range", "token ids"),
        (KeyError("mask"), "KeyError: 'mask'", "every keyword"),
        (AssertionError(), "AssertionError", "shape"),
        (AttributeError("no attribute 'x'"), "AttributeError: no attribute 'x'", "shape"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError", "shape"),
        (RuntimeError("mat1 and mat2"), "float32 (2, 3): mat1 and mat2", "torch.float32"),
    ],
)
def test_the_network_s_own_errors_are_named(error, said, advised):
    with pytest.raises(NetworkError, match="it cannot take inputs of") as caught:
        FunctionalModel.of(Raises(error)).predict(torch.ones(2, 3))
    assert said in caught.value.what
    assert advised in caught.value.advice
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("all gone"),
        MemoryError(),
        UserWarning("turned into an error"),
        OptionError("a", where="b", advice="c"),
    ],
)
def test_errors_that_say_enough_are_left(error):
    with pytest.raises(type(error)) as caught:
        FunctionalModel.of(Raises(error)).predict(torch.ones(2, 3))
    assert caught.value is error


def test_tokens_as_floating_point_numbers_are_told_from_other_dtypes():
    model = FunctionalModel.of(nn.Embedding(5, 2))
    with pytest.raises(NetworkError, match="float32") as caught:
        model.predict(torch.ones(2, 3))
    assert "token ids" in caught.value.advice
    with pytest.raises(NetworkError, match="IndexError"):
        model.predict(torch.tensor([[7]]))


def test_inputs_that_are_no_tensors_are_described():
    model = FunctionalModel.of(Raises(KeyError("x")))
    with pytest.raises(
        NetworkError, match=r"of a: torch.float32 \(2,\), b: str, NoneType, c: int:"
    ):
        model.predict({"a": torch.ones(2), "b": ["text", None], "c": 3})


def test_weights_on_the_meta_device_are_refused():
    with pytest.raises(NetworkError, match="meta device") as caught:
        FunctionalModel.of(nn.Linear(3, 2, device="meta"))
    assert "to_empty" in caught.value.advice
    assert "load_state_dict" in caught.value.advice
    half = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2, device="meta"))
    with pytest.raises(NetworkError, match=r"1\.weight: it is on the meta device"):
        FunctionalModel.of(half, "0")
    with pytest.raises(NetworkError, match="meta device"):
        FunctionalModel(lambda p, x: x * p["a"], {"a": torch.ones(1, device="meta")})


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        net = nn.Linear(3, 2)
    with pytest.raises(NetworkError, match="inference_mode") as caught:
        FunctionalModel.of(net)
    assert "copy.deepcopy" in caught.value.advice
    assert FunctionalModel.of(deepcopy(net)).space.size == 8


def test_lazy_layers_are_refused():
    net = nn.LazyLinear(2)
    with pytest.raises(NetworkError, match="lazy layer"):
        FunctionalModel.of(net)
    net(torch.ones(1, 3))
    assert FunctionalModel.of(net).space.size == 8


@pytest.mark.wrong_types
@pytest.mark.parametrize("subset", [5, ["0", 3], [None], (b"0",)])
def test_what_is_no_pattern_is_refused(subset):
    net = multilayer(3, 4, 2)
    for reading in (net, FunctionalModel.of(net)):
        with pytest.raises(OptionError, match="is no pattern") as caught:
            FunctionalModel.of(reading, subset)
        assert caught.value.where == "subset"
