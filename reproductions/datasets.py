"""The image sets of the reproductions, read offline, and how they are rotated and corrupted.

Images are uint8 while they are stored; `unit_images` are float32 in [0, 1], and `standardise` turns
these into what the networks are fed. Rotations and corruptions act on unit images.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pushforward.errors import DataError, OptionError
from pushforward.runs.rng import stream

__all__ = [
    "CORRUPTIONS",
    "Corruption",
    "DataName",
    "Images",
    "corrupt",
    "data_folder",
    "load_cifar10",
    "load_images",
    "load_mnist",
    "out_of_distribution",
    "rotate",
    "standardise",
    "unit_images",
]

DataName = Literal["mnist", "cifar10"]
Split = Literal["train", "test"]
Corruption = Literal["noise", "blur", "contrast", "brightness"]

VARIABLE = "PUSHFORWARD_DATA"

# Channel means and standard deviations of the training pixels, as usually stated.
_STATISTICS: dict[DataName, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}

# Strength at severity 1 to 5, for unit images. Like the usual corruption benchmarks in kind and
# size, but not those very images: the numbers are to be compared between methods only.
CORRUPTIONS: dict[Corruption, tuple[float, ...]] = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation of white noise
    "blur": (0.4, 0.6, 0.8, 1.0, 1.5),  # standard deviation of a Gaussian, in pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor on the distance from the image's mean
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to every pixel
}


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Parameters
    ----------
    name
        Of the data set, which fixes how its images are standardised.
    pixels
        ``(N, channels, height, width)``, uint8.
    labels
        ``(N,)``, int64.
    """

    name: DataName
    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def slice(self, start: int, stop: int) -> Images:
        """Images `start` to `stop`, the last excluded; no copy."""
        return Images(self.name, self.pixels[start:stop], self.labels[start:stop])

    def inputs(self) -> Tensor:
        """All images as the networks want them, standardised float32."""
        return standardise(unit_images(self.pixels), self.name)


def data_folder(given: Path | None = None) -> Path:
    """Find the folder that holds the data.

    Parameters
    ----------
    given
        The folder, or None for the one that the environment variable PUSHFORWARD_DATA names.

    Returns
    -------
    pathlib.Path
        An existing folder.

    Raises
    ------
    DataError
        If neither names a folder that exists.
    """
    named = given if given is not None else os.environ.get(VARIABLE)
    if not named:
        raise DataError(
            "no data folder is named",
            where="--data-dir",
            advice=f"Give --data-dir or set {VARIABLE}; reproductions/README.md says how to get "
            "the data.",
        )
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}",
            where="--data-dir" if given is not None else VARIABLE,
            advice="Name the folder that holds the data; reproductions/README.md says how to get "
            "it.",
        )
    return folder


def load_images(
    name: DataName, split: Split, data_dir: Path | None = None, *, cache: Path | None = None
) -> Images:
    """Load one of the sets by its name: see `load_mnist` and `load_cifar10`."""
    if name == "mnist":
        return load_mnist(split, data_dir)
    return load_cifar10(split, data_dir, cache=cache)


def load_mnist(split: Split, data_dir: Path | None = None) -> Images:
    """Load handwritten digits from ``mnist.npz``: 60,000 to train, 10,000 to test.

    Parameters
    ----------
    split
        Which part.
    data_dir
        As in `data_folder`.

    Returns
    -------
    Images
        ``(N, 1, 28, 28)``.

    Raises
    ------
    DataError
        If the file is missing or has another format.
    """
    path = _existing(data_folder(data_dir) / "mnist.npz")
    pixels, labels = _arrays(path, (f"x_{split}", f"y_{split}"))
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (28, 28):
        _refuse(path, f"x_{split} is {pixels.dtype} {pixels.shape}, not uint8 (N, 28, 28)")
    return _checked(path, "mnist", pixels[:, None], labels)


def load_cifar10(
    split: Split, data_dir: Path | None = None, *, cache: Path | None = None
) -> Images:
    """Load CIFAR-10 from the JPEG files in ``cifar10_jpeg.npz``: 50,000 to train, 10,000 to test.

    Parameters
    ----------
    split
        Which part.
    data_dir
        As in `data_folder`.
    cache
        Folder for the decoded array, so that the next call need not decode; None: no cache. The
        name of the file is a digest of what was decoded, so that another file is never mistaken
        for this one.

    Returns
    -------
    Images
        ``(N, 3, 32, 32)``.

    Raises
    ------
    DataError
        If the file is missing, has another format, or holds an image that cannot be decoded.
    """
    path = _existing(data_folder(data_dir) / "cifar10_jpeg.npz")
    files, offsets, labels = _arrays(path, (f"jpeg_{split}", f"offsets_{split}", f"y_{split}"))
    count = len(offsets) - 1
    if files.dtype != np.uint8 or files.ndim != 1 or count < 1 or offsets[-1] != len(files):
        _refuse(path, f"offsets_{split} does not divide jpeg_{split}")
    if cache is None:
        return _checked(path, "cifar10", _decoded(path, files, offsets), labels)
    digest = hashlib.blake2b(files.tobytes() + offsets.tobytes(), digest_size=8).hexdigest()
    decoded_path = cache / f"cifar10-{split}-{digest}.npy"
    if decoded_path.exists():
        pixels = np.load(decoded_path, allow_pickle=False)
    else:
        pixels = _decoded(path, files, offsets)
        cache.mkdir(parents=True, exist_ok=True)
        # Never a half-written cache, even when two processes decode at once.
        partial = decoded_path.with_suffix(f".{os.getpid()}.tmp")
        with partial.open("wb") as file:
            np.save(file, pixels)
        partial.replace(decoded_path)
    return _checked(path, "cifar10", pixels, labels)


def unit_images(pixels: Tensor) -> Tensor:
    """Turn uint8 pixels into float32 in [0, 1]."""
    return pixels.to(torch.float32).div_(255.0)


def standardise(images: Tensor, name: DataName) -> Tensor:
    """Centre and scale unit images ``(N, channels, height, width)`` by the set's constants."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in _STATISTICS[name])
    return (images - mean) / std


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Turn unit images anticlockwise about their centre.

    Parameters
    ----------
    images
        ``(N, channels, height, width)``, square.
    degrees
        The angle.

    Returns
    -------
    Tensor
        Of the same shape; bilinear interpolation, zero (black) where nothing was.
    """
    angle = math.radians(degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    # The map from a pixel of the result to where it is read; the vertical axis points down.
    matrix = images.new_tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]])
    grid = functional.affine_grid(
        matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images, grid, align_corners=False)


def corrupt(images: Tensor, kind: Corruption, severity: int, *, seed: int = 0) -> Tensor:
    """Corrupt unit images; the strengths are those of `CORRUPTIONS`.

    Parameters
    ----------
    images
        ``(N, channels, height, width)`` in [0, 1].
    kind
        noise, blur, contrast or brightness.
    severity
        1 to 5.
    seed
        Of the noise.

    Returns
    -------
    Tensor
        Of the same shape, in [0, 1].

    Raises
    ------
    OptionError
        If the kind or the severity is none of those.
    """
    if kind not in CORRUPTIONS or severity not in range(1, 6):
        raise OptionError(
            f"{kind!r} at severity {severity!r} is not defined",
            where="corruption",
            advice=f"Use one of {', '.join(CORRUPTIONS)} at severity 1 to 5.",
        )
    strength = CORRUPTIONS[kind][severity - 1]
    match kind:
        case "noise":
            generator = stream(seed, "reproductions", "noise", severity)
            images = images + strength * torch.randn(images.shape, generator=generator)
        case "blur":
            images = _blurred(images, strength)
        case "contrast":
            mean = images.mean(dim=(2, 3), keepdim=True)
            images = mean + strength * (images - mean)
        case "brightness":
            images = images + strength
    return images.clamp(0.0, 1.0)


def out_of_distribution(
    name: DataName, data_dir: Path | None = None, *, cache: Path | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Images that a network trained on `name` has no business being sure about.

    For MNIST: ``cifar10_grey`` (grey CIFAR-10 test images, resized to 28 x 28) and
    ``permuted_pixels`` (digits whose pixels all change places, in the same way). For CIFAR-10:
    ``mnist_coloured`` (digits resized to 32 x 32, ink and paper of random colours),
    ``permuted_pixels`` and ``uniform_noise``.

    Parameters
    ----------
    name
        The set that the network was trained on.
    data_dir, cache
        As in `load_cifar10`.
    seed
        Of colours, noise and permutation.

    Returns
    -------
    dict[str, Tensor]
        Unit images, not yet standardised, by the name of their set; as many as test images.
    """
    own = unit_images(load_images(name, "test", data_dir, cache=cache).pixels)
    size = own.shape[-1]

    def drawn(purpose: str) -> torch.Generator:
        return stream(seed, "reproductions", "out of distribution", purpose)

    order = torch.randperm(size * size, generator=drawn("permutation"))
    permuted = own.flatten(2)[:, :, order].reshape(own.shape)
    if name == "mnist":
        colour = unit_images(load_cifar10("test", data_dir, cache=cache).pixels)
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # luma of ITU-R BT.601
        grey = (colour * weights).sum(dim=1, keepdim=True)
        return {"cifar10_grey": _resized(grey, size), "permuted_pixels": permuted}
    digits = _resized(unit_images(load_mnist("test", data_dir).pixels), size)
    ink, paper = torch.rand(2, len(digits), 3, 1, 1, generator=drawn("colours"))
    return {
        "mnist_coloured": paper + (ink - paper) * digits,
        "permuted_pixels": permuted,
        "uniform_noise": torch.rand(own.shape, generator=drawn("noise")),
    }


def _resized(images: Tensor, size: int) -> Tensor:
    resized = functional.interpolate(
        images, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return resized.clamp(0.0, 1.0)


def _blurred(images: Tensor, std: float) -> Tensor:
    """A Gaussian filter, three standard deviations wide, reflected at the border."""
    reach = max(1, math.ceil(3.0 * std))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / std).square())
    weights = (weights / weights.sum()).to(images.dtype)
    channels = images.shape[1]
    padded = functional.pad(images, (reach,) * 4, mode="reflect")
    row = weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    across = functional.conv2d(padded, row, groups=channels)
    return functional.conv2d(across, row.transpose(2, 3), groups=channels)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            "the file does not exist",
            where=str(path),
            advice="reproductions/README.md says how to get it, and what it holds.",
        )
    return path


def _arrays(path: Path, names: tuple[str, ...]) -> list[np.ndarray[Any, np.dtype[Any]]]:
    """Read some arrays of an npz file; pickled objects are refused.

    Returns
    -------
    list of numpy.ndarray
        In the order of the names.

    Raises
    ------
    DataError
        If the file is no npz file or lacks one of them.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file]
            if missing:
                _refuse(path, f"there is no array {missing[0]}")
            return [file[name] for name in names]
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy each have errors of their own
        _refuse(path, f"it cannot be read as an npz file ({error})")


def _checked(
    path: Path,
    name: DataName,
    pixels: np.ndarray[Any, np.dtype[Any]],
    labels: np.ndarray[Any, np.dtype[Any]],
) -> Images:
    if labels.shape != (len(pixels),) or not len(labels):
        _refuse(path, f"{len(pixels)} images have labels of shape {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() > 9:
        _refuse(path, "labels are not integers from 0 to 9")
    return Images(name, torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))


def _decoded(
    path: Path, files: np.ndarray[Any, np.dtype[Any]], offsets: np.ndarray[Any, np.dtype[Any]]
) -> np.ndarray[Any, np.dtype[Any]]:
    """Decode JPEG files laid end to end.

    Returns
    -------
    numpy.ndarray
        ``(N, 3, 32, 32)``, uint8.

    Raises
    ------
    DataError
        If Pillow is not installed, or an image is damaged or has another size.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "reading JPEG files needs Pillow",
            where=str(path),
            advice="Install it: pip install pillow.",
        ) from error
    pixels = np.empty((len(offsets) - 1, 32, 32, 3), dtype=np.uint8)
    for i in range(len(pixels)):
        try:
            with Image.open(io.BytesIO(files[offsets[i] : offsets[i + 1]].tobytes())) as image:
                pixels[i] = np.asarray(image.convert("RGB"))
        except (OSError, ValueError):
            _refuse(path, f"image {i} is no JPEG file of 32 x 32 pixels")
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _refuse(path: Path, what: str) -> NoReturn:
    raise DataError(
        what,
        where=str(path),
        advice="reproductions/README.md says what the file holds; get it anew.",
    )
