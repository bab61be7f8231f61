import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pushforward.errors import NetworkError, WeightsError
from pushforward.function_space.summarize import summarize
from pushforward.function_space.summary import FunctionSummary
from pushforward.runs.store import save_tensors
from scenarios import moved, small_mlp


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    net, x = small_mlp(activation=nn.GELU), torch.randn(90, 4, dtype=torch.float64)
    summary = summarize(net, (x, torch.arange(90) % 3), classes="targets", layer_moments=True)
    summary.save(tmp_path / "summary.safetensors")
    return net, summary, tmp_path / "summary.safetensors"


def test_a_file_gives_back_every_distance(saved):
    net, summary, path = saved
    loaded = FunctionSummary.load(path, small_mlp(activation=nn.GELU, seed=99))
    other = moved(net, 0.2)
    assert loaded.num_examples == 90
    assert loaded.sizes == summary.sizes
    assert loaded.reference.unchanged(summary.reference.tensors)
    for estimator in ("gated", "gaussian", "anchored", "reference", "sampled", "synthetic"):
        for metric in ("euclidean", "kl"):
            options = {"estimator": estimator, "metric": metric}
            with torch.no_grad():
                assert torch.equal(
                    loaded.distance(other, **options), summary.distance(other, **options)
                )
    assert torch.equal(loaded.calibration(), summary.calibration())


def test_loading_leaves_the_given_network_alone(saved):
    _, _, path = saved
    blank = small_mlp(activation=nn.GELU, seed=99)
    before = blank[0].weight.clone()
    FunctionSummary.load(path, blank)
    assert torch.equal(blank[0].weight, before)
    assert blank[0].weight.requires_grad


def test_no_example_is_in_the_file(saved):
    _, _, path = saved
    tensors = load_file(path)
    assert all(90 not in tensor.shape for tensor in tensors.values())


def test_laws_of_tokens_come_back(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, tokens):
            return self.head(self.norm(self.embed(tokens)).mean(1))

    torch.manual_seed(1)
    net = Net()
    summary = summarize(net, torch.randint(0, 5, (40, 3)))
    summary.save(tmp_path / "tokens.safetensors")
    loaded = FunctionSummary.load(tmp_path / "tokens.safetensors", Net())
    other = moved(net, 0.2)
    with torch.no_grad():
        assert torch.equal(loaded.distance(other), summary.distance(other))


@pytest.mark.parametrize("kept", ["diagonal", 2])
def test_less_is_kept_on_disk_too(tmp_path, kept):
    torch.manual_seed(0)
    net, x = small_mlp((40, 3)), torch.randn(90, 40, dtype=torch.float64)
    summary, full = summarize(net, x, input_moments=kept), summarize(net, x)
    for name, kind in (("kept", summary), ("full", full)):
        kind.save(tmp_path / name)
    sizes = [(tmp_path / name).stat().st_size for name in ("kept", "full")]
    saved = full.num_bytes - summary.num_bytes
    assert sizes[1] - sizes[0] == pytest.approx(saved, abs=500)  # of names
    loaded = FunctionSummary.load(tmp_path / "kept", net)
    other = moved(net, 0.1)
    for estimator in ("gaussian", "synthetic"):
        with torch.no_grad():
            expected = summary.distance(other, estimator=estimator)
            assert torch.equal(loaded.distance(other, estimator=estimator), expected)


@pytest.mark.parametrize(
    "other",
    [small_mlp(), small_mlp((4, 6, 6, 3), nn.GELU), nn.Linear(4, 3)],
    ids=["activation", "width", "depth"],
)
def test_a_file_of_another_network_is_refused(saved, other):
    with pytest.raises(WeightsError, match="of another network"):
        FunctionSummary.load(saved[2], other)


def test_damaged_files_are_refused(saved, tmp_path):
    net, _, path = saved
    whole = path.read_bytes()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="damaged"):
        FunctionSummary.load(broken, net)
    flipped = bytearray(whole)
    flipped[-5] ^= 0x10
    broken.write_bytes(flipped)
    with pytest.raises(WeightsError, match="not those that were written"):
        FunctionSummary.load(broken, net)
    with pytest.raises(WeightsError, match="no such file"):
        FunctionSummary.load(tmp_path / "none.safetensors", net)
    save_file({"a": torch.zeros(1)}, broken)
    with pytest.raises(WeightsError):
        FunctionSummary.load(broken, net)
    save_tensors(
        broken, {"a": torch.zeros(1)}, {}, schema="pushforward.function_summary", version=1
    )
    with pytest.raises(WeightsError, match="no whole summary"):
        FunctionSummary.load(broken, net)


def test_buffers_that_no_state_dict_has_come_back_too(tmp_path):
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.inner = nn.Linear(4, 3)
            self.register_buffer("scale", torch.tensor(scale), persistent=False)

        def forward(self, x):
            return self.scale * self.inner(x)

    net = Scaled(5.0)
    summarize(net, torch.randn(50, 4)).save(tmp_path / "scaled.safetensors")
    loaded = FunctionSummary.load(tmp_path / "scaled.safetensors", Scaled(1.0))
    assert loaded.distance(net).item() == 0.0


def test_a_changed_header_is_refused(saved, tmp_path):
    net, _, path = saved
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes().replace(rb"\"num_stages\": 2", rb"\"num_stages\": 0"))
    assert broken.read_bytes() != path.read_bytes()
    with pytest.raises(WeightsError):
        FunctionSummary.load(broken, net)


@pytest.mark.wrong_types
def test_what_is_no_network_is_refused(saved):
    for given in (None, saved[0].state_dict()):
        with pytest.raises(NetworkError, match=r"^net: got"):
            FunctionSummary.load(saved[2], given)


def test_wrapped_networks_are_looked_through(saved):
    net, summary, path = saved
    loaded = FunctionSummary.load(path, nn.DataParallel(net))
    assert loaded.reference.unchanged(summary.reference.tensors)
