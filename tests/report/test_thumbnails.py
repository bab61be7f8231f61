"""Pictures that decode to the pixels of the inputs."""

import base64
import io

import numpy as np
import pytest
import torch

from pushforward.errors import ShapeError
from pushforward.report.thumbnails import thumbnails


def decoded(uri):
    image = pytest.importorskip("matplotlib.image")
    prefix = "data:image/png;base64,"
    assert uri.startswith(prefix)
    return image.imread(io.BytesIO(base64.b64decode(uri.removeprefix(prefix))))


@pytest.mark.parametrize(
    ("shape", "image_shape"),
    [((5, 7), ()), ((1, 5, 7), ()), ((35,), (5, 7)), ((35,), (1, 5, 7)), ((7, 5), (5, 7))],
)
def test_grey_pictures_keep_their_pixels(shape, image_shape):
    x = torch.arange(70.0).reshape(2, *shape)
    first, second = thumbnails(x, image_shape)
    both = np.stack([decoded(first), decoded(second)])
    expected = torch.arange(70.0).reshape(2, 5, 7) / 69
    np.testing.assert_allclose(both, expected.numpy(), atol=0.5 / 255 + 1e-6)


def test_colours_stay_in_their_channels():
    x = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, 0, 0, 0], x[0, 1, 0, 0] = 0.0, 1.0
    (uri,) = thumbnails(x)
    pixels = decoded(uri)[..., :3]
    np.testing.assert_allclose(pixels, x[0].permute(1, 2, 0).numpy(), atol=0.51 / 255)


def test_large_pictures_become_small_and_flat_ones_black():
    (uri,) = thumbnails(torch.ones(1, 300, 200))
    assert decoded(uri).shape[:2] == (60, 40)
    assert decoded(uri).max() == 0
    assert thumbnails(torch.ones(0, 4, 4)) == []


def test_what_is_no_picture_has_none():
    assert thumbnails(torch.ones(3, 64)) is None
    assert thumbnails(torch.ones(3, 5, 8, 8)) is None


@pytest.mark.parametrize("shape", [(8, 9), (64,), (2, 4, 8), (1, 1, 8, 8)])
def test_impossible_shapes_are_refused(shape):
    with pytest.raises(ShapeError, match="no shape of a picture with 64 entries"):
        thumbnails(torch.ones(3, 64), shape)
