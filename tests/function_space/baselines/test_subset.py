import pytest
import torch

from baseline_networks import moved, multilayer, numbers, sentences, words
from pushforward.errors import OptionError
from pushforward.function_space.baselines.exact import ExactDistance
from pushforward.function_space.baselines.subset import SubsetDistance


def test_it_is_the_exact_distance_on_the_examples_that_it_names():
    net, x = multilayer(), numbers(30, 3, seed=1)
    other = moved(net)
    subset = SubsetDistance.of(net, x, 7, seed=3)
    rows = ExactDistance.of(net, x).per_example(other, metric="kl", outputs=[0, 1])
    found = float(subset.distance(other, metric="kl", outputs=[0, 1]).detach())
    assert len(subset.indices.unique()) == 7
    assert found == pytest.approx(float(rows[subset.indices].mean()), rel=1e-12)
    assert found > 0


def test_the_seed_decides():
    net, x = multilayer(), numbers(30, 3, seed=1)
    one, same, other = (SubsetDistance.of(net, x, 7, seed=seed).indices for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_it_keeps_a_copy_and_no_more():
    net, x = multilayer(), numbers(30, 3, seed=1)
    other = moved(net)
    subset = SubsetDistance.of(net, (x, torch.zeros(30)), 7, seed=3)
    before = float(subset.distance(other).detach())
    x.zero_()
    assert float(subset.distance(other).detach()) == before
    assert subset.num_bytes == 7 * 3 * 8
    assert subset.name == "subset of 7"


def test_all_examples_give_the_exact_distance_of_any_inputs():
    net, x = words(), sentences(9)
    other = moved(net)
    found = SubsetDistance.of(net, x, 9, seed=0, batch_size=4).distance(other)
    exact = ExactDistance.of(net, x).distance(other)
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-12)


def test_zero_at_the_same_weights():
    net = multilayer()
    same = moved(net, by=0.0)
    found = SubsetDistance.of(net, numbers(30, 3, seed=1), 7, seed=3).distance(same, metric="kl")
    found.backward()
    assert float(found.detach()) == 0
    assert not any(p.grad.any() for p in same.parameters())


@pytest.mark.parametrize("count", [0, 31])
def test_more_examples_than_there_are_are_refused(count):
    with pytest.raises(OptionError, match=r"^num_examples: .* from 1 to 30"):
        SubsetDistance.of(multilayer(), numbers(30, 3, seed=1), count, seed=0)


@pytest.mark.parametrize("size", [0, -3])
def test_a_batch_has_examples(size):
    """Of a negative size there would be no batch at all, and a distance of 0."""
    with pytest.raises(OptionError, match=rf"^batch_size: {size} is out of range"):
        SubsetDistance.of(multilayer(), numbers(30, 3, seed=1), 5, seed=0, batch_size=size)


def test_it_stands_for_the_data_that_it_was_drawn_from():
    assert SubsetDistance.of(multilayer(), numbers(30, 3, seed=1), 5, seed=0).num_examples == 30
