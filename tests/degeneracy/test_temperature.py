"""The map over step sizes and temperatures: plateau, lost chains, resumption."""

import json
import math

import pytest
import torch

from degeneracy_problems import UNIT, regression
from pushforward.degeneracy import temperature as module
from pushforward.degeneracy.quadrature import quadratic
from pushforward.degeneracy.temperature import EpsilonBetaMap, learning_coefficient_map
from pushforward.degeneracy.walk import Walk
from pushforward.errors import OptionError

STEPS = [0.0005, 0.03, 0.12, 1.0]
BETAS = [5.0, 20.0]


@pytest.fixture(scope="module")
def found():
    net, data, _ = regression()
    return learning_coefficient_map(
        net, data, UNIT, step_sizes=STEPS[::-1], nbetas=BETAS, localization=2.0, progress=False
    )


@pytest.mark.statistical
def test_cells_are_those_of_theory(found):
    _, _, curvatures = regression()
    assert found.step_sizes == tuple(STEPS)
    assert found.localization == 2.0
    checked = 0
    for i, nbeta in enumerate(BETAS):
        stiffest = nbeta * float(curvatures.max()) + 2
        for j in (1, 2, 3):
            if STEPS[j] * stiffest > 4:
                assert found.dead[i, j] == 4
                continue
            truth = quadratic(curvatures, nbeta, 2.0)
            error = float(found.standard_errors[i, j])
            assert abs(float(found.values[i, j]) - truth) < 4 * error  # 1 in 16,000
            checked += 1
    assert checked >= 3


def test_chains_that_are_lost_are_shown(found):
    assert found.dead[:, -1].tolist() == [4, 4]
    assert found.values[:, -1].isnan().all()
    assert found.done.all()
    assert "4 lost" in repr(found)


def test_the_plateau_is_where_the_step_size_does_not_matter(found):
    assert found.plateau[0].tolist() == [False, True, True, False]
    # Too small a step: chains are still on their way.
    assert float(found.values[0, 0]) < 0.7 * float(found.values[0, 1])
    assert "*" in repr(found)


def test_dictionaries_and_pictures(found):
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["values"][0][-1] is None
    assert plain["dead"][0][-1] == 4
    assert plain["plateau"][0] == [False, True, True, False]
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    figure = found.plot()
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("4 lost") == int((found.dead == 4).sum())
    assert len(figure.axes[0].patches) == int(found.plateau.sum())
    pyplot.close(figure)


def test_what_counts_as_a_plateau():
    def plateau(values, errors, dead=None, settled=None):
        count = len(values)
        return (
            EpsilonBetaMap(
                step_sizes=tuple(float(k + 1) for k in range(count)),
                nbetas=(1.0,),
                values=torch.tensor([values], dtype=torch.float64),
                standard_errors=torch.tensor([errors], dtype=torch.float64),
                dead=torch.tensor([dead or [0] * count]),
                settled=torch.tensor([settled or [True] * count]),
                done=torch.ones(1, count, dtype=torch.bool),
                localization=1.0,
                sampler="sgld",
                num_chains=4,
                num_draws=10,
            )
            .plateau[0]
            .tolist()
        )

    assert plateau([1.0, 2.0, 2.1, 4.0], [0.01] * 4) == [False, True, True, False]
    assert plateau([1.0, 2.0, 3.0, 4.0], [0.01] * 4) == [False] * 4
    assert plateau([1.0, 2.0, 3.0, 4.0], [1.0] * 4) == [True] * 4
    assert plateau([2.0, 2.0, 2.0], [0.01] * 3, dead=[0, 1, 0]) == [False] * 3
    assert plateau([2.0, 2.0, 2.0], [0.01] * 3, settled=[True, True, False]) == [True, True, False]
    assert plateau([-2.0, -2.0], [0.01] * 2) == [False, False]


def test_the_default_grid_lies_around_what_curvature_asks_for():
    net, data, curvatures = regression()
    found = learning_coefficient_map(
        net, data, UNIT, num_draws=40, num_chains=2, num_warmup=0, progress=False
    )
    middle = 100 / math.log(100)
    assert found.nbetas == pytest.approx([middle * 4.0**k for k in range(-2, 4)])
    ratio = found.step_sizes[4] * (middle * float(curvatures.max()) + found.localization)
    assert 0.4 < ratio < 1.6
    assert found.step_sizes == pytest.approx([found.step_sizes[4] * 4.0**k for k in range(-4, 3)])
    assert (found.dead[2:, -1] == 2).all()
    assert (found.dead[:, 0] == 0).all()


def test_finished_cells_are_kept(tmp_path, monkeypatch):
    net, data, _ = regression()

    def run(folder):
        return learning_coefficient_map(
            net,
            data,
            UNIT,
            step_sizes=[0.01, 0.04],
            nbetas=BETAS,
            localization=1.0,
            num_draws=30,
            checkpoint=folder,
            progress=False,
        )

    whole, run_once, calls = run(None), Walk.run, []

    def interrupted(self, *args, **options):
        calls.append(options["step_size"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run_once(self, *args, **options)

    monkeypatch.setattr(Walk, "run", interrupted)
    part = run(tmp_path)
    assert part.done.tolist() == [[True, True], [True, False]]
    assert torch.equal(part.values[part.done], whole.values[part.done])
    assert part.values[1, 1].isnan()
    assert part.to_dict()["values"][1][1] is None
    after = run(tmp_path)
    assert len(calls) == 5  # the missing one alone
    assert torch.equal(after.values, whole.values)
    assert torch.equal(after.standard_errors, whole.standard_errors)


def test_interrupted_before_anything_was_done(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_cell", interrupted)
    net, data, _ = regression()
    with pytest.raises(KeyboardInterrupt):
        learning_coefficient_map(
            net, data, UNIT, step_sizes=STEPS, nbetas=BETAS, localization=1.0, progress=False
        )


def test_axes_out_of_range():
    net, data, _ = regression()
    for options in ({"step_sizes": []}, {"nbetas": [0.0]}, {"step_sizes": [math.inf]}):
        with pytest.raises(OptionError, match="is no axis"):
            learning_coefficient_map(net, data, UNIT, num_draws=16, **options)


@pytest.mark.wrong_types
def test_samplers_that_find_their_own_step_size():
    net, data, _ = regression()
    with pytest.raises(OptionError, match="'hmc' finds its own step size"):
        learning_coefficient_map(net, data, UNIT, sampler="hmc")
