"""The scripts of the reproductions, on a few synthetic images in the files' formats."""

import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pushforward.errors import DataError, OptionError

ROOT = Path(__file__).resolve().parents[1]
TRAIN, TEST = 64, 32


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("PUSHFORWARD_DATA", raising=False)


@pytest.fixture
def datasets():
    return importlib.import_module("reproductions.datasets")


@pytest.fixture
def networks():
    return importlib.import_module("reproductions.networks")


@pytest.fixture
def script():
    return importlib.import_module("reproductions.train")


def _smooth_images(rng, count):
    """Colour gradients, which JPEG keeps almost unchanged."""
    ramp = np.linspace(0.0, 1.0, 32)
    corners = rng.uniform(40.0, 215.0, size=(count, 2, 3))
    return (corners[:, :1] + (corners[:, 1:] - corners[:, :1]) * ramp[None, :, None])[:, None] * (
        np.ones((1, 32, 1, 1))
    )


@pytest.fixture
def folder(tmp_path):
    """A data folder: digits are a bright square in the place of their class."""
    image_module = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    digits, colours = {}, {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = rng.integers(0, 40, size=(count, 28, 28)).astype(np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            row, column = divmod(int(label), 4)
            image[2 + 8 * row : 9 + 8 * row, 7 * column : 7 + 7 * column] = 230
        digits |= {f"x_{split}": pixels, f"y_{split}": labels}
        files = []
        for image in _smooth_images(rng, count).astype(np.uint8):
            buffer = io.BytesIO()
            image_module.fromarray(image).save(buffer, "JPEG", quality=95)
            files.append(buffer.getvalue())
        colours |= {
            f"jpeg_{split}": np.frombuffer(b"".join(files), np.uint8),
            f"offsets_{split}": np.cumsum([0, *map(len, files)]),
            f"y_{split}": labels,
        }
    data = tmp_path / "data"
    data.mkdir()
    np.savez(data / "mnist.npz", **digits)
    np.savez(data / "cifar10_jpeg.npz", **colours)
    return data


def _options(script, folder, output, **settings):
    defaults = {"seeds": (0,), "epochs": 1, "batch_size": 16, "data_dir": folder}
    return script.Training(folder=output, **{"network": "lenet", **defaults, **settings})


# --- networks ------------------------------------------------------------------------------------


def test_networks_have_the_published_sizes(networks):
    lenet = networks.lenet_small()
    assert networks.num_bayesian_parameters(lenet) == 14_554
    assert sum(p.numel() for p in lenet.parameters()) == 14_554 + 160
    assert [type(layer).__name__ for layer in lenet[:3]] == ["Conv2d", "ReLU", "BatchNorm2d"]
    resnet = networks.resnet20()
    assert sum(p.numel() for p in resnet.parameters()) == 272_474
    convolutions = [m for m in resnet.modules() if getattr(m, "kernel_size", None) == (3, 3)]
    assert len(convolutions) == 19  # and one linear layer
    assert resnet(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert resnet[:-3](torch.zeros(2, 3, 32, 32)).shape == (2, 64, 8, 8)


def test_resnet50_has_the_published_size_and_sensible_statistics(networks):
    images = torch.randn(3, 8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    net = networks.resnet50(images=images[:2])
    assert sum(p.numel() for p in net.parameters()) == 25_557_032
    assert not net.training
    with torch.no_grad():
        outputs = net(images[2])
        first = net[0](images[:2].flatten(0, 1))
    assert outputs.shape == (8, 1000)
    assert 0.1 < outputs.std() < 3.0  # 8 with the initial statistics
    assert torch.allclose(net[1].running_mean, first.mean(dim=(0, 2, 3)), atol=1e-5)
    assert net[1].momentum == 0.1


def test_weights_depend_on_the_seed_alone(networks):
    state = torch.random.get_rng_state()
    first, again, other = (networks.lenet_small(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first[0].weight, again[0].weight)
    assert torch.equal(first[-1].bias, again[-1].bias)
    assert not torch.equal(first[0].weight, other[0].weight)


# --- data ----------------------------------------------------------------------------------------


def test_mnist_is_read_as_it_was_written(datasets, folder, monkeypatch):
    images = datasets.load_mnist("train", folder)
    with np.load(folder / "mnist.npz") as file:
        assert np.array_equal(images.pixels[:, 0].numpy(), file["x_train"])
        assert images.labels.tolist() == file["y_train"].tolist()
    assert images.slice(3, 8).labels.tolist() == [3, 4, 5, 6, 7]
    expected = (images.pixels[5, 0, 9, 9].item() / 255 - 0.1307) / 0.3081
    assert images.inputs()[5, 0, 9, 9].item() == pytest.approx(expected, abs=1e-6)
    monkeypatch.setenv("PUSHFORWARD_DATA", str(folder))
    assert len(datasets.load_mnist("test")) == TEST


def test_cifar10_is_decoded_and_cached(datasets, folder, tmp_path):
    cache = tmp_path / "cache"
    images = datasets.load_cifar10("test", folder)
    rng = np.random.default_rng(0)
    rng.integers(0, 40, size=(TRAIN, 28, 28))
    _smooth_images(rng, TRAIN)
    rng.integers(0, 40, size=(TEST, 28, 28))
    written = _smooth_images(rng, TEST).transpose(0, 3, 1, 2)
    assert images.pixels.shape == (TEST, 3, 32, 32)
    assert np.abs(images.pixels.numpy() - written).max() < 12  # what JPEG loses
    decoded = datasets.load_cifar10("test", folder, cache=cache)
    (file,) = cache.iterdir()
    assert torch.equal(decoded.pixels, images.pixels)
    np.save(file, 255 - images.pixels.numpy())
    assert torch.equal(
        datasets.load_cifar10("test", folder, cache=cache).pixels, 255 - images.pixels
    )


def test_missing_or_damaged_data_is_refused_with_advice(datasets, folder, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"no data folder.*PUSHFORWARD_DATA.*README"):
        datasets.load_mnist("train")
    monkeypatch.setenv("PUSHFORWARD_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"^PUSHFORWARD_DATA: there is no folder"):
        datasets.load_mnist("train")
    with pytest.raises(DataError, match=r"mnist\.npz: the file does not exist.*README"):
        datasets.load_mnist("train", tmp_path)
    (tmp_path / "mnist.npz").write_text("not an archive")
    with pytest.raises(DataError, match="cannot be read"):
        datasets.load_mnist("train", tmp_path)
    np.savez(tmp_path / "mnist.npz", x_train=np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(DataError, match="no array y_train"):
        datasets.load_mnist("train", tmp_path)
    with np.load(folder / "cifar10_jpeg.npz") as file:
        arrays = dict(file)
    arrays["jpeg_test"] = np.zeros_like(arrays["jpeg_test"])
    np.savez(folder / "cifar10_jpeg.npz", **arrays)
    with pytest.raises(DataError, match="image 0 is no JPEG"):
        datasets.load_cifar10("test", folder)


def test_rotation_turns_anticlockwise(datasets, folder):
    images = datasets.unit_images(datasets.load_mnist("test", folder).pixels[:4])
    assert torch.allclose(datasets.rotate(images, 0.0), images, atol=1e-5)
    for quarters in (1, 2, 3):
        turned = datasets.rotate(images, 90.0 * quarters)
        assert torch.allclose(turned, torch.rot90(images, quarters, (2, 3)), atol=1e-4)
    assert datasets.rotate(torch.ones_like(images), 45.0)[0, 0, 0, 0] == 0


def test_corruptions_are_as_strong_as_stated(datasets, folder):
    images = datasets.unit_images(datasets.load_cifar10("test", folder).pixels)
    for kind in datasets.CORRUPTIONS:
        sizes = []
        for severity in range(1, 6):
            corrupted = datasets.corrupt(images, kind, severity)
            assert corrupted.shape == images.shape
            assert corrupted.min() >= 0
            assert corrupted.max() <= 1
            sizes.append((corrupted - images).abs().mean().item())
        assert sizes == sorted(sizes)
        assert sizes[0] > 0
    grey = torch.full((4, 3, 32, 32), 0.5)
    noise = datasets.corrupt(grey, "noise", 3) - grey
    # 12,288 numbers: the relative standard error of their spread is 0.6 %.
    assert noise.std().item() == pytest.approx(0.08, rel=0.03)
    assert torch.equal(noise, datasets.corrupt(grey, "noise", 3) - grey)
    assert torch.allclose(datasets.corrupt(grey, "blur", 5), grey, atol=1e-6)
    spike = torch.zeros(1, 1, 31, 31)
    spike[0, 0, 15, 15] = 1.0
    blurred = datasets.corrupt(spike, "blur", 4)[0, 0]
    assert blurred.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert (blurred[15, 16] / blurred[15, 15]).item() == pytest.approx(np.exp(-0.5), abs=1e-5)
    contrast = datasets.corrupt(images, "contrast", 2)
    assert torch.allclose(contrast.mean(dim=(2, 3)), images.mean(dim=(2, 3)), atol=1e-5)
    assert torch.allclose(contrast.std(dim=(2, 3)), 0.5 * images.std(dim=(2, 3)), atol=1e-5)
    assert torch.allclose(datasets.corrupt(grey, "brightness", 1), grey + 0.05)
    with pytest.raises(OptionError, match="severity 6"):
        datasets.corrupt(images, "blur", 6)


def test_foreign_images_look_like_the_networks_own(datasets, folder):
    for name, shape in (("mnist", (TEST, 1, 28, 28)), ("cifar10", (TEST, 3, 32, 32))):
        own = datasets.unit_images(datasets.load_images(name, "test", folder).pixels)
        sets = datasets.out_of_distribution(name, folder)
        again = datasets.out_of_distribution(name, folder)
        for key, images in sets.items():
            assert images.shape == shape
            assert images.dtype == torch.float32
            assert images.min() >= 0
            assert images.max() <= 1
            assert (images - own).abs().mean() > 0.02
            assert torch.equal(images, again[key])
        assert torch.allclose(
            sets["permuted_pixels"].flatten(2).sort().values, own.flatten(2).sort().values
        )


# --- training ------------------------------------------------------------------------------------


def test_training_learns_and_says_what_it_used(script, folder, tmp_path, capsys):
    output = tmp_path / "networks"
    arguments = [
        *("--network", "lenet", "--folder", str(output), "--data-dir", str(folder)),
        *("--seeds", "0", "1", "--epochs", "12", "--num-train", "60", "--batch-size", "15"),
    ]
    assert script.main(arguments) == 0
    assert capsys.readouterr().out.count("test accuracy") == 2
    net, summary = script.load_trained(output, "lenet", 1)
    assert summary["train_images"] == {"start": 0, "stop": 60}
    assert summary["seed"] == 1
    assert len(summary["loss_by_epoch"]) == 12
    assert summary["loss_by_epoch"][-1] < 0.5 * summary["loss_by_epoch"][0]
    assert not net.training
    images = script.training_images(summary, folder)
    with torch.no_grad():
        outputs = net(images.inputs()).double()
    accuracy = (outputs.argmax(1) == images.labels).double().mean().item()
    assert summary["train"]["accuracy"] == pytest.approx(accuracy)
    loss = torch.nn.functional.cross_entropy(outputs, images.labels).item()
    assert summary["train"]["nll"] == pytest.approx(loss, rel=1e-4)
    assert 0 <= summary["train"]["ece"] <= 1


def test_finished_seeds_are_kept_and_other_settings_refused(script, folder, tmp_path):
    output = tmp_path / "networks"
    list(script.train(_options(script, folder, output)))
    path = script.weights_path(output, "lenet", 0)
    weights, written = path.read_bytes(), path.stat().st_mtime_ns
    first, second = script.train(_options(script, folder, output, seeds=(0, 1)))
    assert (first["seed"], second["seed"]) == (0, 1)
    assert path.stat().st_mtime_ns == written
    path.with_suffix(".json").unlink()  # as after an interruption
    list(script.train(_options(script, folder, output)))
    assert path.read_bytes() == weights
    with pytest.raises(OptionError, match="epochs was 1 and is now 2"):
        list(script.train(_options(script, folder, output, epochs=2)))
    with pytest.raises(DataError, match="not trained from seed 7"):
        script.load_trained(output, "lenet", 7)


def test_resnet20_trains_on_augmented_images_in_half_precision(script, folder, tmp_path):
    options = _options(
        script, folder, tmp_path, network="resnet20", num_train=16, precision="bfloat16"
    )
    (summary,) = script.train(options)
    assert summary["data"] == "cifar10"
    assert summary["precision"] == "bfloat16"
    net, _ = script.load_trained(tmp_path, "resnet20", 0)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert list((tmp_path / "cache").glob("*.npy"))


def test_augmentation_shifts_and_mirrors(script):
    pixels = torch.arange(1, 1 + 32 * 32).remainder(251).add(1).to(torch.uint8)
    pixels = pixels.view(1, 1, 32, 32).expand(200, 3, 32, 32)
    augmented = script._augmented(pixels, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(pixels[0], (4, 4, 4, 4))
    possible = {}
    for dy in range(9):
        for dx in range(9):
            window = padded[:, dy : dy + 32, dx : dx + 32]
            possible[window.numpy().tobytes()] = (dy, dx, False)
            possible[window.flip(2).numpy().tobytes()] = (dy, dx, True)
    seen = [possible[image.contiguous().numpy().tobytes()] for image in augmented]
    assert {dy for dy, _, _ in seen} == {dx for _, dx, _ in seen} == set(range(9))
    assert 60 < sum(mirrored for _, _, mirrored in seen) < 140  # 5.7 standard deviations


def test_weight_decay_spares_the_normalisation_layers(script, networks):
    decayed, free = script._parameter_groups(networks.resnet20(), 0.1)
    assert sum(p.numel() for p in decayed["params"]) == 270_906
    assert sum(p.numel() for p in free["params"]) == 272_474 - 270_906
    assert free["weight_decay"] == 0.0


def test_the_learning_rate_rises_and_falls(script):
    rates = [script._one_cycle(done / 100) for done in range(101)]
    assert max(rates) == rates[25] == 1.0
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_impossible_requests_are_refused(script, folder, tmp_path, capsys):
    with pytest.raises(OptionError, match="epochs: 0 is not positive"):
        _options(script, folder, tmp_path, epochs=0)
    with pytest.raises(OptionError, match="only 64 training images, not 65"):
        list(script.train(_options(script, folder, tmp_path, num_train=65)))
    with pytest.raises(OptionError, match="more than the 12 training images"):
        list(script.train(_options(script, folder, tmp_path, num_train=12)))
    assert script.main(["--network", "lenet", "--folder", str(tmp_path)]) == 2
    assert "PUSHFORWARD_DATA" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_uncertainty_of_a_tiny_run(script, folder, tmp_path):
    study = importlib.import_module("reproductions.uncertainty")
    networks, output = tmp_path / "networks", tmp_path / "output"
    options = ["--network", "lenet", "--seeds", "0", "--data-dir", str(folder)]
    assert (
        script.main([*options, "--folder", str(networks), "--epochs", "1", "--batch-size", "32"])
        == 0
    )
    call = [*options, "--networks", str(networks), "--output", str(output), "--draws", "2"]
    call += ["--num-validation", "8", "--num-test", "16", "--num-train", "24"]
    assert study.main(call) == 0
    stored = study.Uncertainty("lenet", networks, output, (0,), data_dir=folder)
    (result,) = study.study(stored)  # reads what was written
    assert result["train_images"] == 24
    assert result["draws"] == 2
    for scores in result["scores"].values():
        assert 0 <= scores["accuracy"] <= 1
        assert scores["NLL"] > 0
        assert 0 <= scores["AUROC, permuted_pixels"] <= 1
    table = (output / "lenet.md").read_text()
    assert all(f" {name} |" in table for name in result["scores"])
    assert (output / "lenet-0-posterior.safetensors").exists()


@pytest.mark.parametrize(
    ("network", "sampler"),
    [("mlp", "gibbs"), ("mlp", "hmc"), ("mlp", "mala"), ("cnn", "gibbs"), ("cnn", "mala")],
)
def test_posteriors_of_a_few_digits(network, sampler, folder, tmp_path, capsys):
    module = importlib.import_module("reproductions.mnist_posterior")
    arguments = ["--network", network, "--sampler", sampler, "--steps", "4", "--every", "2"]
    arguments += ["--leapfrogs", "3", "--output", str(tmp_path), "--data-dir", str(folder)]
    assert module.main(arguments) == 0
    (path,) = tmp_path.glob(f"{network}-{sampler}-*.json")
    result = json.loads(path.read_text("utf-8"))
    assert result["steps"] == [2, 4]
    assert all(0 <= error <= 1 for error in result["test error"])
    assert result["training images"] == TRAIN
    assert "2 steps  test error" in capsys.readouterr().out


def test_the_posterior_of_digits_is_the_published_one(folder, tmp_path):
    """Cross-entropy over twice the noise, and prior precisions equal to the fan-in."""
    module = importlib.import_module("reproductions.mnist_posterior")
    net = module.build("mlp").double()
    x, y = torch.randn(6, 1, 28, 28, dtype=torch.float64), torch.arange(6)
    options = module.MnistPosterior(sampler="hmc", output=tmp_path, data_dir=folder)
    kernel, initial = module._kernel(options, net, x, y, noise=2.0)
    weights = {name: value[0] for name, value in initial.items()}
    loss = torch.nn.functional.cross_entropy(
        torch.func.functional_call(net, weights, (x,)), y, reduction="sum"
    )
    prior = 784 * (weights["1.weight"].square().sum() + weights["1.bias"].square().sum())
    prior += 12 * (weights["3.weight"].square().sum() + weights["3.bias"].square().sum())
    vector = kernel.potential.space.ravel(initial)
    torch.testing.assert_close(kernel.potential.value(vector)[0], loss / 4 + prior / 2)


def test_a_large_network_in_small(tmp_path, capsys):
    module = importlib.import_module("reproductions.large_network")
    output = tmp_path / "result.json"
    arguments = ["--images", "1", "--draws", "1", "--size", "32", "--output", str(output)]
    assert module.main(arguments) == 0
    result = json.loads(output.read_text("utf-8"))
    assert result["parameters"] == 25_503_912
    assert result["peak bytes"] > 5 * 4 * result["parameters"]
    assert result["seconds a pass"] > 0
    assert "a round over 1,281,167 images, extrapolated" in capsys.readouterr().out
