import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pushforward.errors import (
    DataError,
    NetworkError,
    OptionError,
    ShapeError,
    UnsupportedLayerError,
)
from pushforward.function_space import summarize as module
from pushforward.function_space.metrics import discrepancy
from pushforward.function_space.summarize import summarize
from scenarios import Residual, moved, small_mlp


def _inputs(count=400, seed=1):
    torch.manual_seed(seed)
    return torch.randn(count, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64) + 0.5


def _near(summary, net, other, x, within, **options):
    with torch.no_grad():
        truth = float(discrepancy(net(x), other(x), "euclidean").mean())
        got = float(summary.distance(other, **options))
    return truth / within < got < truth * within


def test_tensors_loaders_and_batch_sizes_come_to_the_same():
    net, x = small_mlp(), _inputs()
    other = moved(net)
    whole = summarize(net, x)
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=37)
    for summary in (summarize(net, loader), summarize(net, x, batch_size=7)):
        assert torch.allclose(
            summary.statistics.inputs.covariance, whole.statistics.inputs.covariance
        )
        for estimator in ("gated", "gaussian"):
            with torch.no_grad():
                got = summary.distance(other, estimator=estimator)
                assert torch.allclose(got, whole.distance(other, estimator=estimator))


def test_the_order_of_the_examples_does_not_matter():
    net, x = small_mlp(), _inputs()
    first, second = summarize(net, x), summarize(net, x.flip(0))
    assert torch.allclose(first.probe_distances, second.probe_distances)
    assert torch.allclose(first.statistics.inputs.covariance, second.statistics.inputs.covariance)


def test_probe_distances_are_true_ones():
    net, x = small_mlp(), _inputs()
    summary = summarize(net, x, batch_size=64)
    weights = module.probe(summary.reference, 0)
    with torch.no_grad():
        new = torch.func.functional_call(net, weights, (x,))
        truth = discrepancy(net(x), new, "euclidean").mean()
    assert torch.allclose(summary.probe_distances[0, 0], truth)


def test_diagonals_and_low_ranks_keep_less():
    net, x = small_mlp(), _inputs()
    full = summarize(net, x)
    diagonal, low = summarize(net, x, input_moments="diagonal"), summarize(net, x, input_moments=2)
    variances = full.statistics.inputs.covariance.diagonal(dim1=-2, dim2=-1)
    assert torch.allclose(diagonal.statistics.inputs.covariance, variances)
    kept = low.statistics.inputs.whole.covariance
    assert torch.allclose(kept.diagonal(dim1=-2, dim2=-1), variances)
    off = full.statistics.inputs.covariance - kept
    assert (
        0
        < off.abs().max()
        < (full.statistics.inputs.covariance - torch.diag_embed(variances)).abs().max()
    )
    assert diagonal.sizes["input covariance"] == 4
    assert low.sizes["input covariance"] == 4 * 3
    other = moved(net, 0.2)
    for summary in (diagonal, low):
        for estimator in ("gaussian", "synthetic"):
            assert _near(summary, net, other, x, 3.0, estimator=estimator)


def test_clusters_and_classes_are_components():
    net, x = small_mlp(), _inputs()
    y = (x[:, 0] > 0).long()
    assert summarize(net, x, clusters=5).num_components == 5
    by_label = summarize(net, (x, y), classes="targets")
    assert by_label.num_components == 2
    assert torch.allclose(by_label.weights, torch.bincount(y).double() / len(y))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.LeakyReLU, nn.Tanh, nn.Hardtanh])
def test_activations_through_the_closed_forms(activation):
    net, x = small_mlp((4, 12, 12, 3), activation), _inputs(2000)
    summary = summarize(net, x, layer_moments=True)
    other = moved(net, 0.1)
    # Independent gates are coarse among a dozen units.
    for estimator, within in {
        "gated": 3.0,
        "gaussian": 2.0,
        "anchored": 2.0,
        "synthetic": 1.1,
    }.items():
        assert _near(summary, net, other, x, within, estimator=estimator), estimator


def test_residual_additions_have_joint_moments():
    torch.manual_seed(0)
    net, x = Residual(4, 8, 3).double(), _inputs(2000)
    summary = summarize(net, x, layer_moments=True)
    other = moved(net, 0.1)
    for estimator in ("gated", "gaussian", "anchored", "sampled", "synthetic"):
        assert _near(summary, net, other, x, 1.4, estimator=estimator), estimator


class _Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.pool, self.drop = nn.AvgPool2d(2), nn.Dropout(0.5)
        self.head = nn.Linear(3 * 3 * 3, 4)

    def forward(self, x):
        h = self.pool(torch.relu(self.norm(self.conv(x))))
        return self.head(self.drop(h.flatten(1)))


def test_images_with_normalisation_pooling_and_dropout():
    torch.manual_seed(2)
    net, x = _Image().double(), torch.randn(1500, 1, 6, 6, dtype=torch.float64)
    net(x)  # running statistics, in training mode
    assert net.training
    summary = summarize(net, x)
    other = moved(net, 0.1)
    with torch.no_grad():
        other.norm.running_mean += 0.3
    net.eval()
    other.eval()
    for estimator, within in {
        "gated": 2.5,
        "gaussian": 2.0,
        "sampled": 2.5,
        "synthetic": 1.1,
    }.items():
        assert _near(summary, net, other, x, within, estimator=estimator), estimator


class _Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.head = nn.Linear(16, 7)

    def forward(self, tokens):
        return self.head(self.block(self.embed(tokens))[:, -1])


def test_transformers_on_tokens_by_running_them():
    torch.manual_seed(3)
    net = _Tokens()
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    tokens = torch.stack([pairs[:, 0], torch.full((49,), 3), pairs[:, 1]], 1)
    summary = summarize(net, tokens)
    other = moved(net, 0.05)
    net.eval()
    other.eval()
    assert _near(summary, net, other, tokens, 1.2)
    assert summary.statistics.inputs is None
    with pytest.raises(UnsupportedLayerError, match="Embedding"):
        summary.distance(other, estimator="gaussian")
    with pytest.raises(UnsupportedLayerError, match="Embedding"):
        summarize(net, tokens, layer_moments=True)
    other_half = summarize(net, tokens[:20])
    assert (summary + other_half).num_examples == 69


def test_networks_that_are_no_chain_are_run_on_drawn_inputs():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

        def forward(self, x):
            return self.a(x) * torch.sigmoid(self.b(x))

    torch.manual_seed(4)
    net, x = Product(), _inputs(2000)
    summary = summarize(net, x)
    other = moved(net, 0.1)
    assert _near(summary, net, other, x, 1.3)
    with pytest.raises(UnsupportedLayerError):
        summary.distance(other, estimator="gated")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 2, "classes": "targets"}, "both classes and clusters"),
        ({"input_moments": 0}, "positive rank"),
        ({"batch_size": 0}, "^batch_size: 0"),
        ({"seed": -1}, "^seed: -1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        summarize(small_mlp(), (_inputs(), torch.zeros(400, dtype=torch.long)), **options)


@pytest.mark.wrong_types
@pytest.mark.parametrize("answer", ["yes", 1, None])
def test_moments_of_layers_are_kept_or_not(answer):
    with pytest.raises(OptionError, match=r"^layer_moments: .* neither True nor False"):
        summarize(small_mlp(), _inputs(), layer_moments=answer)


@pytest.mark.wrong_types
def test_an_unknown_word_for_moments_is_refused():
    with pytest.raises(OptionError, match="'half'"):
        summarize(small_mlp(), _inputs(), input_moments="half")


def test_layers_too_wide_for_pairs_are_refused(monkeypatch):
    monkeypatch.setattr(module, "_PAIRED", 5)
    with pytest.raises(ShapeError, match="a layer has 6 units"):
        summarize(small_mlp(), _inputs(), layer_moments=True)


def test_bad_data_and_weights_are_refused():
    net, x = small_mlp(), _inputs()
    with pytest.raises(DataError, match="no examples"):
        summarize(net, x[:0])
    with pytest.raises(DataError, match="NaN"):
        summarize(net, x.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(DataError, match="shuffle"):
        summarize(net, DataLoader(TensorDataset(x, x), shuffle=True))
    with torch.no_grad():
        net[0].bias[0] = torch.inf
    with pytest.raises(NetworkError, match=r"'0\.bias' holds NaN"):
        summarize(net, x)


def test_augmenting_loaders_are_refused():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, i):
            return torch.randn(4, dtype=torch.float64), i

    with pytest.raises(DataError, match="random augmentation"):
        summarize(small_mlp(), DataLoader(Noisy()))


@pytest.mark.parametrize(
    "inputs", [torch.zeros(9, 1, 4, 4, dtype=torch.uint8), torch.ones(9, 4) > 0]
)
def test_integer_images_are_no_tokens(inputs):
    with pytest.raises(DataError, match="Convert images and features to floating point"):
        summarize(small_mlp(), inputs)


class _Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, tokens):
        return self.head(self.embed(tokens).mean(1))


def _unknown_token_in_batch(number):
    tokens = torch.arange(120).reshape(40, 3) % 5
    tokens[10 * number] = 7
    return tokens


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (small_mlp(), torch.arange(40).reshape(10, 4)),
        (small_mlp(), torch.zeros(10, 5, dtype=torch.float64)),
        (_Embedded(), torch.ones(10, 3)),
        (_Embedded(), _unknown_token_in_batch(0)),
        (_Embedded(), _unknown_token_in_batch(2)),
    ],
    ids=["features taken for tokens", "sizes", "tokens taken for numbers", "first", "later"],
)
def test_inputs_that_the_network_does_not_take_are_named(net, inputs):
    kind = str(inputs.dtype)
    with pytest.raises(NetworkError, match=f"it cannot take inputs of {kind}") as caught:
        summarize(net, inputs, batch_size=10)
    assert caught.value.where == type(net).__name__


@pytest.mark.parametrize("kept", ["diagonal", 3])
def test_moments_of_tokens_are_refused(kept):
    tokens = torch.arange(120).reshape(40, 3) % 5
    with pytest.raises(OptionError, match=r"^input_moments: .*inputs are tokens"):
        summarize(_Embedded(), tokens, input_moments=kept)


class _Odd(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.linear, self.compute = nn.Linear(4, 3).double(), compute

    def forward(self, x):
        return self.compute(self.linear, x)


@pytest.mark.parametrize(
    ("compute", "kind", "message"),
    [
        (lambda f, x: f(x + torch.randn_like(x)), DataError, "different outputs"),
        (lambda f, x: nn.functional.dropout(f(x), 0.5), DataError, "different outputs"),
        (lambda f, x: f(x) - f(x).mean(0), DataError, "depend on the other examples"),
        (lambda f, x: f(x).T, ShapeError, "3 rows of outputs for 8 examples"),
        (lambda f, x: f(x).repeat(1 + (len(x) == 40), 1), ShapeError, "80 rows .* 40 examples"),
    ],
    ids=["noise", "dropout that is always on", "mixed", "transposed", "in a later batch"],
)
def test_what_is_no_function_of_each_example_is_refused(compute, kind, message):
    with pytest.raises(kind, match=message):
        summarize(_Odd(compute), _inputs(40))


def test_networks_that_take_one_example_at_a_time():
    x = _inputs(20)
    alone = _Odd(lambda f, x: f(x) if len(x) == 1 else 1 / 0)
    summary, bare = summarize(alone, x, batch_size=1), summarize(alone.linear, x)
    assert summary.num_examples == 20
    assert torch.allclose(summary.probe_distances, bare.probe_distances)
    with pytest.raises(NetworkError, match="division by zero"):
        summarize(alone, x)


def test_normalisation_alone_is_summarised():
    net, x = nn.LayerNorm(4).double(), _inputs()
    other = moved(net, 0.1)
    assert _near(summarize(net, x), net, other, x, 1.2)


def test_summaries_go_from_process_to_process():
    net, x = small_mlp(), _inputs()
    other = moved(net)
    parts = [summarize(net, x[:150]), summarize(net, x[150:])]
    size = len(pickle.dumps(parts[0]))
    parts[0].distance(other)
    assert len(pickle.dumps(parts[0])) == size  # what it keeps for the next call is not sent along
    parts[0].calibration()
    sent = [pickle.loads(pickle.dumps(part)) for part in parts]
    whole, got = summarize(net, x), sent[0] + sent[1]
    assert got.num_examples == 400
    assert got.reference.output_shape == (3,)
    for estimator in ("gated", "gaussian", "synthetic"):
        with torch.no_grad():
            expected = (parts[0] + parts[1]).distance(other, estimator=estimator)
            assert torch.equal(got.distance(other, estimator=estimator), expected)
    assert torch.allclose(got.probe_distances, whole.probe_distances)


def test_memory_does_not_grow_with_examples_times_squared_outputs():
    """1,024 examples of 600 outputs: matrices of each would take 3 GB."""
    net, x = nn.Linear(3, 600), torch.randn(1024, 3)
    summary = summarize(net, x)
    with torch.no_grad():
        p = net(x).double().softmax(1)
    fisher = torch.diag(p.mean(0)) - p.mT @ p / len(p)
    assert torch.allclose(summary.statistics.outputs.fisher[0], fisher, atol=1e-12)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    "options", [{"clusters": 1.5}, {"input_moments": [3]}, {"batch_size": 2.5}, {"num_classes": 0}]
)
def test_numbers_that_are_none_are_refused(options):
    with pytest.raises(OptionError):
        summarize(small_mlp(), _inputs(), **options)
