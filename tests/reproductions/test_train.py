"""Training, on a few images."""

import importlib

import pytest
import torch

from pushforward.errors import DataError, OptionError


@pytest.fixture
def script():
    return importlib.import_module("reproductions.train")


@pytest.fixture
def networks():
    return importlib.import_module("reproductions.networks")


def _options(script, image_folder, output, **settings):
    defaults = {"seeds": (0,), "epochs": 1, "batch_size": 16, "data_dir": image_folder}
    return script.Training(folder=output, **{"network": "lenet", **defaults, **settings})


def test_training_learns_and_says_what_it_used(script, image_folder, tmp_path, capsys):
    output = tmp_path / "networks"
    arguments = [
        *("--network", "lenet", "--folder", str(output), "--data-dir", str(image_folder)),
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
    images = script.training_images(summary, image_folder)
    with torch.no_grad():
        outputs = net(images.inputs()).double()
    accuracy = (outputs.argmax(1) == images.labels).double().mean().item()
    assert summary["train"]["accuracy"] == pytest.approx(accuracy)
    loss = torch.nn.functional.cross_entropy(outputs, images.labels).item()
    assert summary["train"]["nll"] == pytest.approx(loss, rel=1e-4)
    assert 0 <= summary["train"]["ece"] <= 1


def test_finished_seeds_are_kept_and_other_settings_refused(script, image_folder, tmp_path):
    output = tmp_path / "networks"
    list(script.train(_options(script, image_folder, output)))
    path = script.weights_path(output, "lenet", 0)
    weights, written = path.read_bytes(), path.stat().st_mtime_ns
    first, second = script.train(_options(script, image_folder, output, seeds=(0, 1)))
    assert (first["seed"], second["seed"]) == (0, 1)
    assert path.stat().st_mtime_ns == written
    path.with_suffix(".json").unlink()  # as after an interruption
    list(script.train(_options(script, image_folder, output)))
    assert path.read_bytes() == weights
    with pytest.raises(OptionError, match="epochs was 1 and is now 2"):
        list(script.train(_options(script, image_folder, output, epochs=2)))
    with pytest.raises(DataError, match="not trained from seed 7"):
        script.load_trained(output, "lenet", 7)


def test_resnet20_trains_on_augmented_images_in_half_precision(script, image_folder, tmp_path):
    options = _options(
        script, image_folder, tmp_path, network="resnet20", num_train=16, precision="bfloat16"
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


def test_impossible_requests_are_refused(script, image_folder, tmp_path, capsys):
    with pytest.raises(OptionError, match="epochs: 0 is not positive"):
        _options(script, image_folder, tmp_path, epochs=0)
    with pytest.raises(OptionError, match="only 64 training images, not 65"):
        list(script.train(_options(script, image_folder, tmp_path, num_train=65)))
    with pytest.raises(OptionError, match="more than the 12 training images"):
        list(script.train(_options(script, image_folder, tmp_path, num_train=12)))
    assert script.main(["--network", "lenet", "--folder", str(tmp_path)]) == 2
    assert "PUSHFORWARD_DATA" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))
