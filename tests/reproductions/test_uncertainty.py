"""The study of uncertainty, on a few digits."""

import importlib


def test_uncertainty_of_a_tiny_run(image_folder, tmp_path):
    script = importlib.import_module("reproductions.train")
    study = importlib.import_module("reproductions.uncertainty")
    networks, output = tmp_path / "networks", tmp_path / "output"
    options = ["--network", "lenet", "--seeds", "0", "--data-dir", str(image_folder)]
    assert (
        script.main([*options, "--folder", str(networks), "--epochs", "1", "--batch-size", "32"])
        == 0
    )
    call = [*options, "--networks", str(networks), "--output", str(output), "--draws", "2"]
    call += ["--num-validation", "8", "--num-test", "16", "--num-train", "24"]
    assert study.main(call) == 0
    stored = study.Uncertainty("lenet", networks, output, (0,), data_dir=image_folder)
    (result,) = study.study(stored)  # reads what was written
    assert result["train_images"] == 24
    assert result["draws"] == 2
    assert "all layers, for all images" in result["scores"]  # 24 stand for 64
    for scores in result["scores"].values():
        assert 0 <= scores["accuracy"] <= 1
        assert scores["NLL"] > 0
        assert 0 <= scores["AUROC, permuted_pixels"] <= 1
    table = (output / "lenet.md").read_text()
    assert all(f" {name} |" in table for name in result["scores"])
    assert (output / "lenet-0-posterior.safetensors").exists()
