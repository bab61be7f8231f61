"""What measures answer with, the same for summaries and baselines: type, range, precision."""

import copy
import math

import pytest
import torch
from torch import nn

from baseline_networks import convolutional, moved, multilayer, numbers, sentences, words
from pushforward.errors import NetworkError, OptionError, PushforwardError
from pushforward.function_space.answers import check_options, weights_dtype
from pushforward.function_space.baselines.diagonal import DiagonalDistance
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.baselines.kronecker import KroneckerDistance
from pushforward.function_space.baselines.subset import SubsetDistance
from pushforward.function_space.baselines.tangent import TangentDistance
from pushforward.function_space.network import ReferenceNetwork
from pushforward.function_space.summarize import summarize

MEASURES = {
    "summary": summarize,
    "exact": ExactDistance.of,
    "subset": lambda net, x: SubsetDistance.of(net, x, 30, seed=0),
    "tangent": TangentDistance.of,
    "diagonal": DiagonalDistance.of,
    "kronecker": KroneckerDistance.of,
}
measures = pytest.mark.parametrize("measure", MEASURES)


def data(kind):
    return numbers(60, 3, seed=1).to(kind)


@measures
@pytest.mark.parametrize(("kind", "step"), [(torch.float16, 0.002), (torch.bfloat16, 0.02)])
def test_a_network_in_half_precision_gets_its_distance_in_single_precision(measure, kind, step):
    net, x = multilayer().to(kind), data(kind)
    with torch.no_grad():
        for p in net[4].parameters():
            p.mul_(2**-4)  # so that distances are below what float16 holds
    near, far = copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        near[0].weight[0, 0] += step
        far[4].bias[0] += 400.0
    # Rounded outputs move in steps of their last place, or not at all.
    wide = MEASURES[measure](copy.deepcopy(net).double(), x.double())
    found = MEASURES[measure](net, x)
    for other, within in ((near, 4.0), (far, 1.1)):
        value, truth = found.distance(other), wide.distance(copy.deepcopy(other).double()).item()
        assert value.dtype == torch.float32
        assert truth / within < value.item() < within * truth
        value.backward()
        slopes = torch.cat([p.grad.flatten() for p in other.parameters()])
        assert slopes.dtype == kind
        assert slopes.any()
        assert torch.isfinite(slopes).all()
        if kind == torch.float16:  # where it would have been nothing, or infinite
            assert torch.tensor(truth).half() in (0, math.inf)
    assert found.distance(net).item() == 0.0


@measures
def test_a_distance_that_leaves_the_range_of_its_type_is_refused(measure):
    net = multilayer().float()
    found = MEASURES[measure](net, data(torch.float32))
    far = copy.deepcopy(net)
    with torch.no_grad():
        far[4].bias.add_(1e25)
    with pytest.raises(NetworkError, match=r"^other: its outputs .* in float32"):
        found.distance(far)
    wide = {name: p.double() for name, p in far.named_parameters()}
    value = found.distance(wide).item()
    assert value == pytest.approx(1.5e50, rel=1e-4)  # three outputs
    everything = {name: 1e30 * p for name, p in net.named_parameters()}
    with pytest.raises(NetworkError, match=r"^other: its outputs are not finite"):
        found.distance(everything)


def test_the_distance_of_each_example_is_a_number_as_well():
    net = multilayer().float()
    everything = {name: 1e30 * p for name, p in net.named_parameters()}
    with pytest.raises(NetworkError, match=r"^other: its outputs are not finite"):
        ExactDistance.of(net, data(torch.float32)).per_example(everything)


@measures
@pytest.mark.parametrize(
    ("net", "x"),
    [
        (multilayer().float(), numbers(60, 3, seed=1).float()),
        (convolutional(normalised=True).float(), numbers(60, 2, 5, 4, seed=2).float()),
        (words().float(), sentences(60)),
    ],
    ids=["multilayer", "convolutional", "words"],
)
def test_mixed_precision_counts_neither_when_made_nor_when_asked(measure, net, x):
    other = moved(net)
    plain = MEASURES[measure](net, x)
    with torch.autocast("cpu", torch.bfloat16):
        made = MEASURES[measure](net, x)
        asked = plain.distance(other)
    expected = plain.distance(other).item()
    assert asked.item() == expected > 0
    assert made.distance(other).item() == pytest.approx(expected, rel=1e-6)


def test_the_type_is_that_of_the_other_parameters():
    net = multilayer()
    reference = ReferenceNetwork.of(net, (3,))
    kinds = {"float16": "float32", "bfloat16": "float32", "float32": "float32"}
    for kind, expected in {**kinds, "float64": "float64"}.items():
        other = copy.deepcopy(net).to(getattr(torch, kind))
        for given in (other, dict(other.named_parameters()), nn.DataParallel(other)):
            assert weights_dtype(reference, given) == getattr(torch, expected), (kind, given)


def test_options_that_a_measure_does_not_take_are_refused():
    class Wide:
        reference = ReferenceNetwork.of(multilayer(), (3,))

        def distance(self, other, **options):  # noqa: ARG002
            return torch.zeros(())

    exact = ExactDistance.of(multilayer(), data(torch.float64))
    check_options(exact, ["metric", "outputs"])
    check_options(Wide(), ["anything"])
    message = r"^seed: ExactDistance\.distance does not take seed\. It takes other, metric, outputs"
    with pytest.raises(OptionError, match=message):
        check_options(exact, ["metric", "seed"])
    with pytest.raises(OptionError, match=r"^options: .* does not take seed, estimator"):
        check_options(exact, ["seed", "estimator"])


@measures
def test_every_measure_knows_of_how_many_examples_it_was_made(measure):
    assert MEASURES[measure](multilayer(), data(torch.float64)).num_examples == 60


@pytest.mark.parametrize("metric", ["softmax", "kl", "fisher"])
@pytest.mark.parametrize("outputs", [None, [1]])
@measures
def test_probabilities_of_one_output_are_refused_by_all(measure, metric, outputs):
    """They are 1 whatever the weights: the distance would be a silent zero."""
    net = multilayer()
    if outputs is None:
        net = nn.Sequential(*net, nn.Linear(3, 1).double())
    x = data(torch.float64)

    def asked():
        if measure in {"diagonal", "kronecker"}:
            kind = DiagonalDistance if measure == "diagonal" else KroneckerDistance
            return kind.of(net, x, metric=metric, outputs=outputs)
        found = MEASURES[measure](net, x)
        return found.distance(moved(net), metric=metric, outputs=outputs)

    with pytest.raises(PushforwardError, match="probabilities of several outputs, and there is 1"):
        asked()
    value = MEASURES[measure](net, x).distance(moved(net)).item()
    assert math.isfinite(value)
    assert value > 0
