import math

import pytest
import torch
from scipy import special

from pushforward.cumulants import designs
from pushforward.cumulants.designs import (
    Antithetic,
    Frames,
    Layout,
    Plain,
    Sobol,
    resolve_design,
)
from pushforward.errors import OptionError

CPU = torch.device("cpu")
DESIGNS = [
    Plain(),
    Antithetic(),
    Frames(),
    Frames(radii="independent"),
    Frames(radii="shared"),
    Sobol(),
    Sobol(replicates=3),
]


def identify(design):
    return f"{design.name}-{getattr(design, 'radii', getattr(design, 'replicates', ''))}"


every_design = pytest.mark.parametrize("design", DESIGNS, ids=identify)


def points_of(design, dimension, num_samples, *, seed=0, max_block=1024, dtype=torch.float64):
    layout = design.layout(dimension, num_samples, max_block)
    blocks = list(design.blocks(layout, seed, dtype=dtype, device=CPU))
    assert [len(block) for block in blocks] == list(layout.block_sizes())
    return torch.cat(blocks), layout


def z_of_units(values, layout, expected):
    """How many standard errors the mean of `values` (N, ...) lies from `expected`."""
    units = values.unflatten(0, (layout.num_units, layout.unit_size)).mean(1)
    error = units.std(0) / layout.num_units**0.5
    return (units.mean(0) - expected) / error


def kolmogorov_p(sample):
    """p-value of a sample against the standard normal law, asymptotic."""
    levels = special.ndtr(sample.sort().values.numpy())
    count = len(levels)
    above = (torch.arange(1, count + 1).numpy() / count - levels).max()
    below = (levels - torch.arange(count).numpy() / count).max()
    return special.kolmogorov(math.sqrt(count) * max(above, below))


@every_design
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_have_the_shape_and_precision_asked_for(design, dtype):
    points, layout = points_of(design, 3, 200, dtype=dtype)
    assert points.shape == (layout.num_samples, 3)
    assert layout.num_samples == layout.unit_size * layout.num_units >= 200
    assert points.dtype == dtype
    assert points.isfinite().all()


@every_design
def test_each_point_of_a_unit_is_standard_normal(design):
    # One fixed position within the unit, over independent units (Sobol: over seeds), so that
    # the sample is independent and identically distributed. p > 1e-4 each: over the 7 designs and
    # 2 positions the false-alarm rate is 1.4e-3.
    dimension = 3
    for position in (0, -1):
        rows = []
        for seed in range(1 if design.name != "sobol" else 25):
            points, layout = points_of(design, dimension, 6 * 600, seed=seed)
            units = points.unflatten(0, (layout.num_units, layout.unit_size))
            rows.append(units[:, position])
        sample = torch.cat(rows)
        assert kolmogorov_p(sample[:, 0]) > 1e-4
        # The squared length is chi-square: catches radii that do not fit the directions.
        length = special.ndtri(special.chdtr(dimension, (sample**2).sum(1).numpy()))
        assert kolmogorov_p(torch.as_tensor(length)) > 1e-4


@pytest.mark.statistical
@every_design
def test_moments_over_all_points_are_standard_normal(design):
    # |z| < 4 for 25 moments a design and 7 designs: false-alarm rate 1.1 %.
    if design.name == "sobol":  # few units: a t statistic, so take many short sequences
        design = Sobol(replicates=500)
    points, layout = points_of(design, 4, 8 * 2000, max_block=4096)
    # Odd moments vanish to rounding in the symmetric designs, which leaves nothing to test there.
    if design.name in {"plain", "sobol"}:
        assert z_of_units(points, layout, 0.0).abs().max() < 4
    squares = points.unsqueeze(1) * points.unsqueeze(2)
    z = z_of_units(squares, layout, torch.eye(4, dtype=torch.float64))
    exact = design.name == "frames" and getattr(design, "radii", "") == "shared"
    z = z.diagonal() if exact else z  # products of distinct coordinates cancel there, too
    assert z.abs().max() < 4
    assert z_of_units(points**4, layout, 3.0).abs().max() < 4


@pytest.mark.statistical
@every_design
def test_unbiased_for_a_function_without_symmetry(design):
    # E exp(a.x) = exp(|a|^2 / 2); E 1(b.x > c) = 1 - Phi(c / |b|). |z| < 4 on 2 statistics.
    slope = torch.tensor([0.6, -0.3, 0.2, 0.5], dtype=torch.float64)
    if design.name == "sobol":
        design = Sobol(replicates=200)
    points, layout = points_of(design, 4, 8 * 1000, seed=1)
    values = torch.stack(((points @ slope).exp(), (points @ slope > 0.7).double()), dim=1)
    tail = special.ndtr(-0.7 / slope.norm().item())
    expected = torch.tensor([math.exp(0.5 * (slope @ slope).item()), tail], dtype=torch.float64)
    assert z_of_units(values, layout, expected).abs().max() < 4


@every_design
def test_same_seed_same_points_other_seed_others(design):
    first, _ = points_of(design, 3, 64, seed=1)
    assert torch.equal(first, points_of(design, 3, 64, seed=1)[0])
    assert not (first == points_of(design, 3, 64, seed=2)[0]).any()


@every_design
def test_blocks_do_not_repeat_each_other(design):
    points, _ = points_of(design, 2, 256, max_block=16)
    assert len(points.unique(dim=0)) == len(points)


def test_antithetic_units_are_opposite_pairs():
    points, layout = points_of(Antithetic(), 3, 10)
    assert layout.unit_size == 2
    assert torch.equal(points[0::2], -points[1::2])


def test_frames_are_orthogonal_and_symmetric():
    points, layout = points_of(Frames(), 5, 40)
    for unit in points.unflatten(0, (layout.num_units, 10)):
        torch.testing.assert_close(unit[:5], -unit[5:])
        gram = unit[:5] @ unit[:5].T
        torch.testing.assert_close(gram, gram.diagonal().diag_embed(), atol=1e-12, rtol=0)


def test_stratified_radii_fill_every_stratum_once():
    dimension = 6
    points, layout = points_of(Frames(), dimension, 2 * dimension * 10)
    half = points.unflatten(0, (layout.num_units, 2, dimension))[:, 0]
    levels = special.chdtr(dimension, (half**2).sum(-1).numpy())
    strata = torch.as_tensor(levels * dimension).floor().sort(dim=1).values
    assert torch.equal(strata, torch.arange(6.0, dtype=torch.float64).expand(10, 6))


def test_shared_radius_is_shared():
    points, layout = points_of(Frames(radii="shared"), 4, 16)
    lengths = points.norm(dim=1).unflatten(0, (layout.num_units, layout.unit_size))
    torch.testing.assert_close(lengths, lengths[:, :1].expand_as(lengths))


def test_frames_integrate_cubics_on_the_sphere_exactly():
    # The mean of (a.q)^2 over a frame is |a|^2 / d whatever the frame.
    points, layout = points_of(Frames(), 7, 28)
    directions = points / points.norm(dim=1, keepdim=True)
    slope = torch.arange(1.0, 8.0, dtype=torch.float64)
    squares = ((directions @ slope) ** 2).unflatten(0, (layout.num_units, -1)).mean(1)
    torch.testing.assert_close(squares, (slope @ slope / 7).expand_as(squares))


def test_sobol_units_are_balanced_and_scrambled_independently():
    # In a scrambled Sobol sequence of 2^m points every dyadic cell of size 2^-m holds exactly one.
    points, _ = points_of(Sobol(), 5, 16 * 64)
    cells = torch.special.ndtr(points).unflatten(0, (16, 64)).mul(64).floor().sort(dim=1).values
    assert torch.equal(
        cells, torch.arange(64.0, dtype=torch.float64).view(1, 64, 1).expand_as(cells)
    )
    units = points.unflatten(0, (16, 64))
    assert len(units[:, 0].unique(dim=0)) == 16


def test_sobol_points_do_not_depend_on_the_block_size_beyond_the_finest_cell():
    whole, _ = points_of(Sobol(), 3, 16 * 64, max_block=1024)
    pieces, layout = points_of(Sobol(), 3, 16 * 64, max_block=20)
    assert layout.block_size == 16 < layout.unit_size
    torch.testing.assert_close(
        torch.special.ndtr(whole), torch.special.ndtr(pieces), atol=2.0**-29, rtol=0
    )


def test_first_sobol_point_is_not_rounded_to_single_precision():
    # Single precision resolves the upper half of the unit interval to multiples of 2^-24 only.
    engine = designs._sobol_engine(100, 0, 0)
    corner = designs._sobol_points(engine, 2)[0] * 2**30
    assert (corner[corner > 2**29] % 64 != 0).any()


@pytest.mark.wrong_types  # a stand-in for the engine
def test_sobol_survives_corners_of_the_cube(monkeypatch):
    # An engine that returns the extreme values, and a first point rounded up to one.
    class Corners:
        num_generated = 0
        quasi = torch.full((2,), 2**30 - 1)

        def draw(self, count, dtype):
            self.num_generated += count
            return torch.tensor([1.0, 0.0], dtype=dtype).repeat(count, 1)

    monkeypatch.setattr(
        "pushforward.cumulants.designs._sobol_engine", lambda *_arguments: Corners()
    )
    for dtype in (torch.float32, torch.float64):
        points, _ = points_of(Sobol(replicates=2), 2, 8, dtype=dtype)
        assert points.isfinite().all()
        assert points.abs().max() < 12


@every_design
@pytest.mark.parametrize("max_block", [1, 7, 64, 5000])
def test_blocks_are_powers_of_two_of_units_or_the_converse(design, max_block):
    layout = design.layout(5, 999, max_block)
    larger, smaller = sorted((layout.block_size, layout.unit_size))[::-1]
    ratio = larger / smaller
    if design.name == "sobol":
        assert ratio == int(ratio)
    else:
        assert layout.block_size >= layout.unit_size
        assert math.log2(ratio).is_integer()
        assert layout.block_size <= max(max_block, layout.unit_size)
    assert sum(layout.block_sizes()) == layout.num_samples


@pytest.mark.parametrize(
    ("design", "wanted", "drawn"),
    [
        (Plain(), 33, 33),
        (Antithetic(), 33, 34),
        (Frames(), 33, 40),
        (Sobol(), 33, 64),
        (Sobol(), 64, 64),
        (Sobol(), 65, 128),
        (Sobol(replicates=3), 33, 48),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else str(value),
)
def test_samples_are_rounded_up_to_whole_units(design, wanted, drawn):
    assert design.layout(5, wanted, 64).num_samples == drawn


def test_flops_count_the_factorisation_of_frames():
    layout = Frames().layout(300, 1200, 4096)
    assert layout.num_units == 2
    assert Frames().flops(layout) == pytest.approx(2 * 8 / 3 * 300**3, rel=0.01)
    plain = Plain().layout(300, 1200, 4096)
    assert Plain().flops(plain) == 1200 * 300
    assert Sobol().flops(Layout(3, 8, 16, 128)) >= 128 * 3


@pytest.mark.parametrize(
    ("design", "dimension", "num_samples", "message"),
    [
        (Plain(), 4, 1, "two units of 1 points"),
        (Antithetic(), 4, 3, "two units of 2 points"),
        (Frames(), 4, 15, "two units of 8 points.*4 dimensions"),
        (Sobol(), 4, 15, "16 Sobol sequences"),
        (Sobol(), 21_202, 64, "21201 dimensions and the law has 21202"),
        (Sobol(), 2, 16 * 2**30 + 1, "ends after"),
    ],
    ids=["plain", "antithetic", "frames", "sobol-few", "sobol-dimension", "sobol-long"],
)
def test_layouts_out_of_reach_are_refused(design, dimension, num_samples, message):
    with pytest.raises(OptionError, match=message):
        design.layout(dimension, num_samples, 1024)


def test_settings_out_of_range_are_refused():
    with pytest.raises(OptionError, match="replicates"):
        Sobol(replicates=1)
    with pytest.raises(OptionError, match="radii"):
        Frames(radii="square")


def test_designs_are_found_by_name():
    for name in ("frames", "antithetic", "sobol", "plain"):
        assert resolve_design(name).name == name
    own = Sobol(replicates=4)
    assert resolve_design(own) is own
    with pytest.raises(OptionError, match="'frames', 'antithetic', 'sobol', 'plain'"):
        resolve_design("lattice")
