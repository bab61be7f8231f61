"""Networks, weights and data from files: what fits is loaded, what does not is named."""

from __future__ import annotations

import pickle
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pushforward.cli.loading import (
    load_data,
    load_examples,
    load_inputs,
    load_law,
    load_network,
    load_weights,
)
from pushforward.cli.options import ExampleOptions, LawOptions, NetworkOptions
from pushforward.errors import (
    DataError,
    LawError,
    NetworkError,
    OptionError,
    PushforwardError,
    ShapeError,
    WeightsError,
)

FACTORIES = """
    import torch
    from torch import nn

    def small(width=4):
        return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 2))

    def broken():
        raise RuntimeError("no luck")

    def number():
        return 3

    def meta():
        with torch.device("meta"):
            return small()

    @torch.inference_mode()
    def inference():
        return small()

    instance = small()
    constant = 3

    class Holder:
        @staticmethod
        def build():
            return small()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("factories")
    (path / "loading_factories.py").write_text(textwrap.dedent(FACTORIES))
    (path / "loading_broken.py").write_text("raise ValueError('at import')")
    return path


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def says(error: pytest.ExceptionInfo[PushforwardError], *parts: str) -> None:
    assert error.value.advice
    for part in parts:
        assert part in str(error.value)


# --- networks ------------------------------------------------------------------------------------


def test_factory_in_the_current_folder_is_found_and_put_in_eval_mode() -> None:
    options = NetworkOptions("loading_factories:small", factory_options='{"width": 7}')
    net = load_network(options)
    assert net[0].out_features == 7  # type: ignore[index, union-attr]
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert load_network(NetworkOptions("loading_factories:Holder.build")) is not None


def test_weights_of_the_factory_depend_on_the_seed_alone() -> None:
    options = NetworkOptions("loading_factories:small")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load_network(options, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = load_network(options, seed=3).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("network", "part"),
    [
        ("loading_factories", "no factory is named"),
        ("no_such_module:small", "cannot be imported"),
        ("loading_broken:small", "ValueError: at import"),
        ("loading_factories:absent", "has no 'absent'"),
        ("loading_factories:broken", "RuntimeError: no luck"),
        ("loading_factories:number", "returned int"),
        ("loading_factories:constant", "is int"),
        ("loading_factories:instance", "is Sequential"),
    ],
)
def test_factory_that_cannot_be_used_is_refused(network: str, part: str) -> None:
    with pytest.raises(NetworkError) as error:
        load_network(NetworkOptions(network))
    says(error, part, network)


@pytest.mark.parametrize("text", ["{", "[1]", "width=3"])
def test_factory_options_must_be_a_json_object(text: str) -> None:
    with pytest.raises(OptionError, match="--factory-options"):
        load_network(NetworkOptions("loading_factories:small", factory_options=text))


@pytest.mark.parametrize("device", ["nowhere", "meta"])
def test_device_that_cannot_compute_is_refused(device: str) -> None:
    with pytest.raises(OptionError, match="--device"):
        load_network(NetworkOptions("loading_factories:small", device=device))


# --- weights -------------------------------------------------------------------------------------


def test_weights_are_copied(tmp_path: Path) -> None:
    source, target = small(), small()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    load_weights(target, tmp_path / "model.safetensors")
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def test_missing_extra_and_misshapen_tensors_are_all_listed(tmp_path: Path) -> None:
    state = small().state_dict()
    del state["0.bias"]
    state["head.weight"] = torch.zeros(1)
    state["2.weight"] = torch.zeros(2, 5)
    save_file(state, tmp_path / "model.safetensors")
    net = small()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(net, tmp_path / "model.safetensors")
    says(error, "1 missing (0.bias)", "1 extra (head.weight)", "2.weight (2, 5) instead of (2, 4)")
    says(error, str(tmp_path / "model.safetensors"))
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_prefix_of_a_wrapper_is_recognised(tmp_path: Path) -> None:
    state = {f"_orig_mod.{key}": value for key, value in small().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"prefix '_orig_mod\.'"):
        load_weights(small(), tmp_path / "model.safetensors")


def test_tied_weights_may_be_stored_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    state = {key: value + 1 for key, value in net.state_dict().items() if key != "1.weight"}
    save_file(state, tmp_path / "model.safetensors")
    load_weights(net, tmp_path / "model.safetensors")
    assert torch.equal(net[1].weight, state["0.weight"])


@pytest.mark.parametrize("content", [b"", b"not a header at all", pickle.dumps({"a": 1})])
def test_damaged_weights_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError) as error:
        load_weights(small(), tmp_path / "model.safetensors")
    says(error, "not a complete safetensors file", "pickles included")


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WeightsError, match="not a complete"):
        load_weights(small(), path)


def test_absent_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        load_weights(small(), tmp_path / "model.safetensors")


@pytest.mark.parametrize("weights", [None, Path("model.safetensors")])
def test_networks_without_numbers_are_refused(weights: Path | None) -> None:
    with pytest.raises(NetworkError) as error:
        load_network(NetworkOptions("loading_factories:meta", weights))
    says(error, "loading_factories:meta", "0.weight", "meta device")
    with pytest.raises(NetworkError) as error:
        load_network(NetworkOptions("loading_factories:inference", weights))
    says(error, "loading_factories:inference", "inference_mode")


# --- data ----------------------------------------------------------------------------------------


def archive(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


class Trap:
    """Leaves a mark when it is unpickled."""

    touched = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return spring, ()


def spring() -> None:
    Trap.touched = True


def test_usual_names_and_single_candidates_are_found(tmp_path: Path) -> None:
    x, other = np.arange(6.0).reshape(3, 2), np.ones((3, 2))
    labels = np.arange(3)
    cases: list[dict[str, Any]] = [
        {"y": labels, "other": other, "x": x},
        {"y": labels, "anything": x},
        {"X": x, "other": other},
    ]
    for index, arrays in enumerate(cases):
        loaded = load_data(archive(tmp_path / f"{index}.npz", **arrays))
        assert loaded.tolist() == x.tolist()
    assert load_data(tmp_path / "0.npz", key="other").tolist() == other.tolist()
    np.save(tmp_path / "single.npy", x)
    assert load_data(tmp_path / "single.npy").tolist() == x.tolist()


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (np.uint8, torch.float64),
        (np.bool_, torch.float64),
        (np.float16, torch.float64),
        (np.float32, torch.float32),
        (">f8", torch.float64),
    ],
)
def test_numbers_of_any_kind_become_floating_point(
    tmp_path: Path, stored: Any, dtype: torch.dtype
) -> None:
    loaded = load_data(archive(tmp_path / "d.npz", x=np.array([[0, 1], [1, 1]], dtype=stored)))
    assert loaded.dtype == dtype
    assert loaded.tolist() == [[0, 1], [1, 1]]


def test_pickled_objects_are_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, allow_pickle=True, x=np.array([[Trap(), 1]], dtype=object))
    with pytest.raises(DataError) as error:
        load_data(path)
    says(error, "pickled Python objects", "pickles are not read")
    raw = tmp_path / "raw.npz"
    raw.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="pickle"):
        load_data(raw)
    assert not Trap.touched


@pytest.mark.parametrize(
    ("arrays", "key", "part"),
    [
        ({"x": np.zeros((3, 2))}, "z", "no array 'z'"),
        ({"a": np.zeros((3, 2)), "b": np.zeros((3, 2))}, None, "2 arrays could be the examples"),
        ({"a": np.zeros(3)}, None, "0 arrays could be the examples"),
        ({"x": np.array([["a", "b"]])}, None, "dtype <U1"),
        ({"x": np.ones((2, 2), dtype=complex)}, None, "dtype complex128"),
        ({"x": np.zeros(3)}, None, "shape (3,)"),
        ({"x": np.zeros((0, 3))}, None, "no examples"),
        ({"x": np.array([[1.0, 2.0], [np.nan, 1.0]])}, None, "example 1 holds NaN"),
        ({"x": np.array([[np.inf, 2.0]])}, None, "example 0 holds NaN or infinite"),
    ],
)
def test_arrays_that_are_no_examples_are_refused(
    tmp_path: Path, arrays: dict[str, Any], key: str | None, part: str
) -> None:
    with pytest.raises(DataError) as error:
        load_data(archive(tmp_path / "d.npz", **arrays), key=key)
    says(error, part, str(tmp_path / "d.npz"))


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_damaged_archive_is_refused(tmp_path: Path, keep: int) -> None:
    path = archive(tmp_path / "d.npz", x=np.arange(100.0).reshape(10, 10))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError):
        load_data(path)


def test_archive_with_flipped_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=np.arange(400.0).reshape(20, 20))
    content = bytearray(path.read_bytes())
    content[120:160] = bytes(40)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError):
        load_data(path)


def test_absent_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_data(tmp_path / "d.npz")


# --- laws ----------------------------------------------------------------------------------------


def test_law_of_data_has_their_moments(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (50, 2, 3)).astype(np.uint8)
    path = archive(tmp_path / "d.npz", x=values)
    loaded = load_law(LawOptions(data=path, scale=1 / 255, input_shape=(1, 2, 3)))
    scaled = values.reshape(50, 6) / 255
    assert loaded.law.event_shape == (1, 2, 3)
    assert loaded.law.mean.tolist() == pytest.approx(scaled.mean(0).tolist())
    expected = torch.tensor(np.cov(scaled, rowvar=False))
    torch.testing.assert_close(loaded.law.covariance, expected)
    assert loaded.examples is not None
    assert loaded.examples.shape == (50, 1, 2, 3)
    diagonal = load_law(LawOptions(data=path, covariance="diagonal"))
    assert diagonal.law.covariance.shape == (6,)


def test_standard_law_takes_the_shape_of_one_example() -> None:
    loaded = load_law(LawOptions(standard=(2, 3)))
    assert loaded.law.event_shape == (2, 3)
    assert loaded.law.is_isotropic_centred
    assert loaded.examples is None


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (LawOptions(), OptionError),
        (LawOptions(data=Path("d.npz"), standard=(3,)), OptionError),
        (LawOptions(standard=(0,)), OptionError),
        (LawOptions(standard=(3,), scale=0.0), OptionError),
        (LawOptions(standard=(3,), scale=float("nan")), OptionError),
        (LawOptions(standard=(3,), input_shape=(2, 2)), ShapeError),
        (LawOptions(standard=(3,), input_shape=(-3,)), OptionError),
    ],
)
def test_laws_that_cannot_be_are_refused(options: LawOptions, kind: type[PushforwardError]) -> None:
    with pytest.raises(kind):
        load_law(options)


def test_shape_of_data_must_fit(tmp_path: Path) -> None:
    path = archive(tmp_path / "d.npz", x=np.zeros((4, 6)))
    with pytest.raises(ShapeError, match="--input-shape"):
        load_law(LawOptions(data=path, input_shape=(2, 2)))


def test_one_example_has_no_law(tmp_path: Path) -> None:
    with pytest.raises(LawError):
        load_law(LawOptions(data=archive(tmp_path / "d.npz", x=np.ones((1, 3)))))


def test_examples_come_with_their_targets(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.uint8).reshape(4, 6)
    path = archive(tmp_path / "d.npz", x=x, y=np.array([2, 0, 1, 2], dtype=np.uint8))
    options = ExampleOptions(scale=0.5, input_shape=(1, 2, 3))
    inputs, targets = load_examples(path, options, dtype=torch.float32)
    assert inputs.dtype == torch.float32
    assert inputs[1].tolist() == [[[3.0, 3.5, 4.0], [4.5, 5.0, 5.5]]]
    assert targets.dtype == torch.int64
    assert targets.tolist() == [2, 0, 1, 2]
    numbers = np.array([[0.5], [1.5], [2.5], [3.5]])
    path = archive(tmp_path / "r.npz", pixels=x, rate=numbers, y=np.zeros(4))
    named = ExampleOptions(key="pixels", target_key="rate")
    inputs, targets = load_examples(path, named, dtype=torch.float32)
    assert targets.dtype == torch.float32
    assert targets.tolist() == numbers.tolist()


def test_examples_that_do_not_fit_their_targets_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "d.npz", x=np.ones((4, 6)), y=np.zeros(3))
    with pytest.raises(DataError, match="4 inputs and 3 targets"):
        load_examples(path, ExampleOptions())
    with pytest.raises(DataError, match="no array 'z' of targets"):
        load_examples(path, ExampleOptions(target_key="z"))
    with pytest.raises(ShapeError, match="6 entries"):
        load_examples(path, ExampleOptions(input_shape=(2, 2)))
    with pytest.raises(DataError, match="dtype <U1"):
        load_examples(
            archive(tmp_path / "s.npz", x=np.ones((2, 6)), y=np.array(["a", "b"])),
            ExampleOptions(),
        )


@pytest.mark.parametrize("stored", [np.uint8, np.int16, np.int64])
def test_tokens_stay_integers(tmp_path: Path, stored: Any) -> None:
    x = np.array([[0, 6], [3, 1]], dtype=stored)
    path = archive(tmp_path / "d.npz", x=x, y=np.array([0.5, 1.5]))
    inputs, targets = load_examples(path, ExampleOptions(tokens=True), dtype=torch.float32)
    assert inputs.dtype == torch.int64
    assert inputs.tolist() == [[0, 6], [3, 1]]
    assert targets.dtype == torch.float32
    assert load_inputs(path, ExampleOptions(), dtype=torch.float32).dtype == torch.float32


def test_tokens_beyond_the_integers_of_floating_point_numbers_are_exact(tmp_path: Path) -> None:
    path = archive(tmp_path / "d.npz", x=np.array([[2**53 + 1]]))
    assert load_inputs(path, ExampleOptions(tokens=True)).tolist() == [[2**53 + 1]]


def test_tokens_that_are_none_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "d.npz", x=np.ones((2, 3)), whole=np.ones((2, 3), dtype=int))
    with pytest.raises(DataError) as error:
        load_inputs(path, ExampleOptions(tokens=True))
    says(error, "dtype float64", "d.npz['x']", "--tokens")
    with pytest.raises(OptionError, match="--tokens"):
        load_inputs(path, ExampleOptions(key="whole", tokens=True, scale=0.5))
    shaped = ExampleOptions(key="whole", tokens=True, input_shape=(3, 1))
    assert load_inputs(path, shaped).shape == (2, 3, 1)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_scales_that_cannot_be_are_refused(tmp_path: Path, scale: float) -> None:
    path = archive(tmp_path / "d.npz", x=np.ones((2, 3)), y=np.ones(2))
    with pytest.raises(OptionError, match="--scale"):
        load_inputs(path, ExampleOptions(scale=scale))
    with pytest.raises(OptionError, match="--scale"):
        load_examples(path, ExampleOptions(scale=scale))
