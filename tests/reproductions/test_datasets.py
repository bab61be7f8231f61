"""Images are read, turned and corrupted as stated."""

import importlib

import numpy as np
import pytest
import torch

from image_files import colour_gradients
from pushforward.errors import DataError, OptionError

TEST = 32


@pytest.fixture
def datasets():
    return importlib.import_module("reproductions.datasets")


def test_mnist_is_read_as_it_was_written(datasets, image_folder, monkeypatch):
    images = datasets.load_mnist("train", image_folder)
    with np.load(image_folder / "mnist.npz") as file:
        assert np.array_equal(images.pixels[:, 0].numpy(), file["x_train"])
        assert images.labels.tolist() == file["y_train"].tolist()
    assert images.slice(3, 8).labels.tolist() == [3, 4, 5, 6, 7]
    expected = (images.pixels[5, 0, 9, 9].item() / 255 - 0.1307) / 0.3081
    assert images.inputs()[5, 0, 9, 9].item() == pytest.approx(expected, abs=1e-6)
    monkeypatch.setenv("PUSHFORWARD_DATA", str(image_folder))
    assert len(datasets.load_mnist("test")) == TEST


def test_cifar10_is_decoded_and_cached(datasets, image_folder, tmp_path):
    cache = tmp_path / "cache"
    images = datasets.load_cifar10("test", image_folder)
    written = colour_gradients(TEST, seed=1).transpose(0, 3, 1, 2)
    assert images.pixels.shape == (TEST, 3, 32, 32)
    assert np.abs(images.pixels.numpy() - written).max() < 12  # what JPEG loses
    decoded = datasets.load_cifar10("test", image_folder, cache=cache)
    (file,) = cache.iterdir()
    assert torch.equal(decoded.pixels, images.pixels)
    np.save(file, 255 - images.pixels.numpy())
    assert torch.equal(
        datasets.load_cifar10("test", image_folder, cache=cache).pixels, 255 - images.pixels
    )


def test_missing_or_damaged_data_is_refused_with_advice(
    datasets, image_folder, tmp_path, monkeypatch
):
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
    with np.load(image_folder / "cifar10_jpeg.npz") as file:
        arrays = dict(file)
    arrays["jpeg_test"] = np.zeros_like(arrays["jpeg_test"])
    np.savez(image_folder / "cifar10_jpeg.npz", **arrays)
    with pytest.raises(DataError, match="image 0 is no JPEG"):
        datasets.load_cifar10("test", image_folder)


def test_rotation_turns_anticlockwise(datasets, image_folder):
    images = datasets.unit_images(datasets.load_mnist("test", image_folder).pixels[:4])
    assert torch.allclose(datasets.rotate(images, 0.0), images, atol=1e-5)
    for quarters in (1, 2, 3):
        turned = datasets.rotate(images, 90.0 * quarters)
        assert torch.allclose(turned, torch.rot90(images, quarters, (2, 3)), atol=1e-4)
    assert datasets.rotate(torch.ones_like(images), 45.0)[0, 0, 0, 0] == 0


def test_corruptions_are_as_strong_as_stated(datasets, image_folder):
    images = datasets.unit_images(datasets.load_cifar10("test", image_folder).pixels)
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


def test_foreign_images_look_like_the_networks_own(datasets, image_folder):
    for name, shape in (("mnist", (TEST, 1, 28, 28)), ("cifar10", (TEST, 3, 32, 32))):
        own = datasets.unit_images(datasets.load_images(name, "test", image_folder).pixels)
        sets = datasets.out_of_distribution(name, image_folder)
        again = datasets.out_of_distribution(name, image_folder)
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
