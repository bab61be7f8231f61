"""Laws of inputs: what is accepted, what is refused, moments of data, draws."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pushforward.cumulants.laws import GaussianLaw
from pushforward.errors import LawError, OptionError, ShapeError
from scenarios import correlated_law, normal, standard_law

D = 4
ROOT = normal(0, D, D)
FULL = ROOT @ ROOT.T
MEAN = normal(1, D)


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("covariance", "dense"),
    [
        (torch.tensor(2.0).double(), 2 * torch.eye(D).double()),
        (torch.arange(D).double(), torch.diag(torch.arange(D).double())),
        (FULL, FULL),
        (3.0, 3 * torch.eye(D).double()),
        (np.float64(0.5), 0.5 * torch.eye(D).double()),
        (FULL.numpy(), FULL),
    ],
    ids=["scalar", "diagonal", "full", "number", "numpy scalar", "numpy"],
)
def test_kinds_of_covariance(covariance, dense):
    law = GaussianLaw(MEAN, covariance)
    assert law.dimension == D
    assert law.batch_shape == ()
    assert law.event_shape == (D,)
    torch.testing.assert_close(law.dense_covariance(), dense)
    torch.testing.assert_close(law.diagonal(), dense.diagonal())
    root = law.root()
    torch.testing.assert_close(root @ root.T, dense, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(root, root.T)


def test_batches():
    means = normal(2, 3, D)
    shared = GaussianLaw(means, FULL)
    assert shared.batch_shape == (3,)
    assert shared.diagonal().shape == (3, D)
    assert shared.dense_covariance().shape == (D, D)
    own = GaussianLaw(means, torch.stack([FULL, 2 * FULL, torch.eye(D).double()]))
    assert own.dense_covariance().shape == (3, D, D)
    torch.testing.assert_close(own.diagonal()[1], 2 * FULL.diagonal())
    torch.testing.assert_close(own.root()[1] @ own.root()[1], 2 * FULL)
    assert GaussianLaw(means, 1.0).diagonal().shape == (3, D)
    part = own.select(slice(1, 3))
    torch.testing.assert_close(part.mean, means[1:])
    torch.testing.assert_close(part.covariance, own.covariance[1:])
    torch.testing.assert_close(shared.select(slice(0, 1)).covariance, FULL)


def test_standard_laws():
    law = GaussianLaw.standard(6, dtype=torch.float32, event_shape=(1, 2, 3))
    assert law.mean.dtype == law.covariance.dtype == torch.float32
    assert law.event_shape == (1, 2, 3)
    assert law.is_isotropic_centred
    torch.testing.assert_close(law.dense_covariance(), torch.eye(6))
    assert GaussianLaw.standard(2).mean.dtype == torch.get_default_dtype()


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        (standard_law(3), True),
        (GaussianLaw(torch.zeros(3), 4.0), True),
        (GaussianLaw(torch.tensor([0.0, 1e-9, 0.0]), 1.0), False),
        (GaussianLaw(torch.zeros(3), torch.ones(3)), False),
        (GaussianLaw(torch.zeros(3), torch.eye(3)), False),
    ],
)
def test_isotropic_centred_laws(law, expected):
    assert law.is_isotropic_centred is expected


def test_a_number_is_not_rounded_to_single_precision():
    assert GaussianLaw(torch.zeros(2).double(), 0.1).covariance.item() == 0.1
    assert GaussianLaw(torch.zeros(2).double(), np.float64(0.1)).covariance.item() == 0.1


def test_integers_become_floats():
    law = GaussianLaw(torch.zeros(3, dtype=torch.long), torch.tensor([1, 2, 3]))
    assert law.mean.dtype == law.covariance.dtype == torch.get_default_dtype()


@pytest.mark.parametrize(
    ("law", "expected"),
    [
        (standard_law(3), "GaussianLaw(d=3, isotropic covariance)"),
        (GaussianLaw(torch.zeros(2, 3), torch.ones(3)), "diagonal covariance, batch of 2"),
        (standard_law(4, event_shape=(1, 2, 2)), "examples of shape (1, 2, 2)"),
        (correlated_law(3), "full covariance"),
    ],
)
def test_repr(law, expected):
    assert expected in repr(law)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "covariance", "event_shape"),
    [
        (torch.zeros(()), 1.0, ()),
        (torch.zeros(2, 3, 4), 1.0, ()),
        (torch.zeros(0), 1.0, ()),
        (torch.zeros(3), torch.ones(4), ()),
        (torch.zeros(3), torch.eye(4), ()),
        (torch.zeros(3), torch.eye(3).expand(2, 3, 3), ()),
        (torch.zeros(2, 3), torch.eye(3).expand(4, 3, 3), ()),
        (torch.zeros(3), torch.ones(1), ()),
        (torch.zeros(4), 1.0, (2, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(mean, covariance, event_shape):
    with pytest.raises(ShapeError, match="GaussianLaw"):
        GaussianLaw(mean, covariance, event_shape)


def _damaged(position, value):
    matrix = FULL.clone()
    matrix[position] = value
    return matrix


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (torch.tensor([0.0, torch.nan, torch.inf]), 1.0, "mean: 2 of 3 entries"),
        (MEAN, _damaged((1, 2), torch.nan), "covariance: 1 of 16 entries"),
        (MEAN, -1.0, r"a variance is negative \(-1\)"),
        (MEAN, torch.tensor([1.0, -0.5, 1.0, 1.0]), r"a variance is negative \(-0.5\)"),
        (MEAN, _damaged((0, 1), 7.0), "not symmetric: entries differ by up to"),
        (MEAN, FULL - 3 * torch.eye(D).double(), "smallest eigenvalue -"),
        (torch.zeros(2, D), torch.stack([FULL, -FULL]), "smallest eigenvalue -"),
    ],
)
def test_what_is_no_law_is_refused(mean, covariance, message):
    with pytest.raises(LawError, match=message) as caught:
        GaussianLaw(mean, covariance)
    assert caught.value.advice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_covariances_and_rounding_are_accepted(dtype):
    x = normal(3, 3, 10).to(dtype)
    covariance = x.T @ x  # rank three in ten dimensions
    law = GaussianLaw(torch.zeros(10, dtype=dtype), covariance)
    root = law.root().to(dtype)
    torch.testing.assert_close(root @ root.T, covariance, rtol=1e-4, atol=1e-5)
    GaussianLaw(torch.zeros(10, dtype=dtype), torch.zeros(10, 10, dtype=dtype))
    rounded = covariance.clone()
    rounded[0, 1] *= 1 + torch.finfo(dtype).eps
    GaussianLaw(torch.zeros(10, dtype=dtype), rounded)


# --- data ----------------------------------------------------------------------------------------

DATA = normal(4, 57, 3, 2) * torch.tensor([1.0, 5.0]) + 100.0


def _batches(*sizes):
    return list(DATA.split(sizes))


@pytest.mark.parametrize(
    "source",
    [
        DATA,
        DATA.numpy(),
        _batches(57),
        _batches(1, 50, 6),
        _batches(20, 1, 1, 35),
        [(x, None) for x in _batches(30, 27)],
        [{"x": x, "y": 0} for x in _batches(10, 47)],
        DataLoader(TensorDataset(DATA, torch.arange(57)), batch_size=10),
    ],
    ids=["tensor", "array", "one", "first of one", "ones within", "tuples", "dicts", "loader"],
)
def test_moments_of_data_are_those_of_numpy(source):
    law = GaussianLaw.from_data(source)
    flat = DATA.flatten(1).numpy()
    np.testing.assert_allclose(law.mean.numpy(), flat.mean(0), rtol=1e-13)
    np.testing.assert_allclose(law.covariance.numpy(), np.cov(flat.T), rtol=1e-11, atol=1e-12)
    assert law.event_shape == (3, 2)
    assert law.mean.dtype == torch.float64


def test_kinds_of_covariance_of_data():
    full = np.cov(DATA.flatten(1).numpy().T)
    diagonal = GaussianLaw.from_data(_batches(1, 56), covariance="diagonal")
    np.testing.assert_allclose(diagonal.covariance.numpy(), np.diag(full), rtol=1e-12)
    isotropic = GaussianLaw.from_data(_batches(20, 37), covariance="isotropic")
    assert isotropic.covariance.dim() == 0
    assert isotropic.covariance.item() == pytest.approx(np.diag(full).mean())
    with pytest.raises(OptionError, match="no covariance 'spherical'"):
        GaussianLaw.from_data(DATA, covariance="spherical")


def test_single_precision_data_far_from_the_origin():
    # Accumulating squares instead of centred squares would lose every digit of the covariance.
    x = (normal(5, 500, 2) + 1e4).to(torch.float32)
    law = GaussianLaw.from_data(x.split(7))
    expected = np.cov(x.double().numpy().T)
    np.testing.assert_allclose(law.covariance.numpy(), expected, rtol=1e-9)


def test_fewer_examples_than_features_give_a_singular_law():
    law = GaussianLaw.from_data(normal(6, 3, 10))
    assert int(torch.linalg.matrix_rank(law.covariance)) == 2


def test_one_example_is_refused():
    with pytest.raises(LawError, match="1 example has no covariance"):
        GaussianLaw.from_data(normal(7, 1, 3))


def test_data_keep_their_device():
    assert GaussianLaw.from_data(DATA, device="cpu").mean.device.type == "cpu"


# --- draws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance", [2.0, torch.arange(1, D + 1).double(), FULL])
def test_transform_has_the_moments_of_the_law(covariance):
    # The sample is whitened, so the moments agree to rounding and not to a standard error.
    law = GaussianLaw(MEAN, covariance)
    z = normal(8, 200, D)
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / len(z))).T
    x = law.transform(z)
    torch.testing.assert_close(x.mean(0), MEAN, rtol=1e-9, atol=1e-12)
    centred = x - x.mean(0)
    torch.testing.assert_close(centred.T @ centred / len(z), law.dense_covariance())


@pytest.mark.parametrize("covariance", [2.25, torch.arange(1, D + 1).double(), FULL])
def test_transform_moves_along_the_root(covariance):
    law, z = GaussianLaw(MEAN, covariance), normal(9, 5, D)
    torch.testing.assert_close(law.transform(z), MEAN + z @ law.root())


def test_transform_follows_the_points():
    z = normal(9, 5, D).float()
    assert GaussianLaw(MEAN, FULL).transform(z).dtype == torch.float32
    for law, points in (
        (GaussianLaw(normal(10, 2, D), FULL), normal(11, 5, D)),
        (GaussianLaw(MEAN, FULL), normal(11, 5, D + 1)),
    ):
        with pytest.raises(ShapeError, match="transform"):
            law.transform(points)


def test_equality_is_identity():
    assert standard_law(2) != standard_law(2)
    assert len({standard_law(2), standard_law(2)}) == 2
