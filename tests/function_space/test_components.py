import pytest
import torch

from pushforward.errors import DataError, OptionError
from pushforward.function_space.components import cluster_inputs, label_components
from pushforward.networks.data import Examples


def _examples(labels):
    return Examples.read((torch.randn(len(labels), 2), torch.as_tensor(labels)))


def test_targets_or_given_labels_are_the_components():
    examples = _examples([2, 0, 1, 1])
    assert label_components(examples, "targets").tolist() == [2, 0, 1, 1]
    assert label_components(examples, torch.tensor([1, 0, 0, 1])).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 2, 2]), "class 1 has no example"),
        (torch.tensor([0, 3, 3]), "class 1 has no example, like 1 more"),
        (torch.tensor([0, 1]), r"shape \(2,\) for 3 examples"),
        (torch.tensor([0.0, 1.0, 1.0]), "float32 labels"),
        (torch.tensor([0, -1, 0]), "whole number from 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        label_components(_examples([0, 1, 2]), labels)


@pytest.mark.parametrize("labels", [["cat", "dog", "cat"], [[0], [1, 2], [0]], [0, None, 1]])
def test_labels_that_are_no_numbers_are_refused(labels):
    with pytest.raises(DataError, match=r"^classes: list holds no numbers"):
        label_components(_examples([0, 1, 2]), labels)


def test_data_without_targets_have_no_classes():
    with pytest.raises(DataError, match="no targets"):
        label_components(Examples.read(torch.randn(4, 2), targets=False), "targets")


@pytest.mark.wrong_types
def test_another_word_is_refused():
    with pytest.raises(OptionError, match="'labels'"):
        label_components(_examples([0, 1]), "labels")


def test_clusters_that_lie_apart_are_found():
    torch.manual_seed(0)
    truth = torch.arange(90) % 3
    x = 0.1 * torch.randn(90, 2) + 10.0 * torch.tensor([[0.0, 0], [1, 0], [0, 1]])[truth]
    examples = Examples.read(x, targets=False)
    found = cluster_inputs(examples, 3, seed=0)
    assert torch.equal(found, cluster_inputs(examples, 3, seed=0))
    pairs = {(a, b) for a, b in zip(truth.tolist(), found.tolist(), strict=True)}
    assert len(pairs) == 3


def test_clusters_that_stay_empty_are_dropped():
    x = torch.zeros(10, 2)
    x[5:] = 1.0
    found = cluster_inputs(Examples.read(x, targets=False), 4, seed=0)
    assert sorted(set(found.tolist())) == [0, 1]


@pytest.mark.parametrize("clusters", [0, 11])
def test_more_clusters_than_examples_are_refused(clusters):
    with pytest.raises(
        OptionError, match=rf"^clusters: {clusters} is out of range\. .* examples, 10"
    ):
        cluster_inputs(Examples.read(torch.randn(10, 2), targets=False), clusters, seed=0)
