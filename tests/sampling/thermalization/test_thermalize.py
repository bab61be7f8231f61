"""The whole test, on kernels that are right, slow, stuck and wrong."""

import json

import pytest
import torch
from torch import nn

from pushforward.errors import DataError, OptionError, WeightsError
from pushforward.networks.likelihoods import Categorical, Gaussian
from pushforward.sampling.hmc import HMC
from pushforward.sampling.intermediate_noise.gibbs import gibbs
from pushforward.sampling.intermediate_noise.network import IntermediateNoiseNetwork
from pushforward.sampling.mala import MALA
from pushforward.sampling.thermalization import thermalize as thermalization
from pushforward.sampling.thermalization.identities import (
    identity_values,
    judge_identities,
    observe,
)
from pushforward.sampling.thermalization.teacher_student import TeacherStudent
from pushforward.sampling.thermalization.thermalize import thermalize
from thermalising import FEATURES, Relaxation, linear_posterior, linear_problem

QUICK = {"budget": 32, "records": 32, "num_chains": 6, "progress": False}


def _relaxation(**settings):
    return lambda instance: Relaxation(instance, **settings)


@pytest.fixture(scope="module")
def right():
    return thermalize(linear_problem(), _relaxation(), seeds=12, **QUICK)


@pytest.mark.statistical
def test_a_right_kernel_passes(right):
    assert right.verdict == "PASS"
    assert {start: found.thermalized for start, found in right.success.items()} == {
        "zero": 12,
        "prior": 12,
    }
    assert right.identities
    assert not any(found.rejected for found in right.identities)
    assert {test.start for test in right.ranks} == {"informed", "zero", "prior"}
    assert not any(test.rejected for test in right.ranks)


def test_a_report_reads(right, tmp_path):
    text = repr(right)
    assert text.startswith("PASS: relaxation on 12 problems")
    assert "12 of 12 thermalised" in text
    assert "they pass when chains are stuck together" in text
    right.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["verdict"] == "PASS"
    assert saved["success"]["zero"]["interval"] == pytest.approx([0.7575, 1.0], abs=1e-4)
    assert saved["instances"][3]["comparisons"]["zero"]["outcome"] == "thermalized"
    steps, curve = right.curves[3]["informed"]
    assert len(steps) == len(curve) > 20
    assert steps[-1] == 32


def test_a_report_is_drawn(right):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = right.plot()
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == [f"problem {seed}" for seed in range(9)]
    assert "zero: thermalized" in [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    pyplot.close(figure)


def test_chains_that_never_move_do_not_pass():
    found = thermalize(linear_problem(), _relaxation(memory=1.0), seeds=8, **QUICK)
    assert found.verdict != "PASS"
    assert all(success.thermalized == 0 for success in found.success.values())
    # what is usually looked at of the informed chains sees nothing wrong with them
    for result in found.instances:
        assert result.local["informed"].score == 0.0
        assert result.local["informed"].residuals < 4.5
    assert not any(identity.rejected for identity in found.identities)
    assert "informed chains never moved" in repr(found)


@pytest.mark.statistical
def test_a_slow_kernel_needs_its_budget():
    """With this noise the zero start is some forty posterior standard deviations away."""
    settings = {"seeds": 6, "num_chains": 12, "records": 64, "starts": ("informed", "zero")}
    problem, sampler = linear_problem(noise=0.001), _relaxation(memory=0.9)
    short = thermalize(problem, sampler, budget=40, **settings)
    long = thermalize(problem, sampler, budget=640, **settings)
    assert short.verdict == "NOT_CONVERGED"
    assert short.success["zero"].thermalized == 0
    assert long.verdict == "PASS"
    for before, after in zip(short.instances, long.instances, strict=True):
        assert before.comparisons["zero"].ratio > 3 > after.comparisons["zero"].ratio


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("fault", "named"),
    [({"inflation": 1.4}, "virial of weight"), ({"shift": 0.3}, "second moment of weight")],
)
def test_a_wrong_kernel_is_found_out_though_its_chains_meet(fault, named):
    found = thermalize(linear_problem(), _relaxation(**fault), seeds=16, **QUICK)
    assert all(success.fraction > 0.9 for success in found.success.values())
    assert found.verdict == "KERNEL_BUG"
    assert named in [identity.name for identity in found.identities if identity.rejected]


class _Careless(HMC):
    """Accepts whatever the integrator gives: its step size changes the law."""

    def step(self, state, noise):
        accepting = type(noise)(noise.normals, torch.full_like(noise.uniforms, -1.0))
        return super().step(state, accepting)


@pytest.mark.statistical
def test_hmc_without_its_acceptance_is_found_out():
    problem = linear_problem()
    settings = {"step_size": 0.15, "num_steps": 4, "mass": "identity"}
    run = {"seeds": 14, "budget": 48, "records": 48, "num_warmup": 0}
    right = thermalize(problem, lambda i: HMC(i.potential, **settings), **run)
    wrong = thermalize(problem, lambda i: _Careless(i.potential, **settings), **run)
    assert right.verdict in {"PASS", "INCONCLUSIVE"}
    assert wrong.verdict == "KERNEL_BUG"


def _noisy(output="regression", outputs=1, variance=0.3):
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, outputs))
    return TeacherStudent(IntermediateNoiseNetwork(net, variance, variance, output), 20, 50)


@pytest.mark.statistical
def test_gibbs_keeps_its_identities():
    problem = _noisy()
    found = thermalize(
        problem,
        lambda i: gibbs(i.model, i.inputs, i.targets),
        seeds=10,
        budget=192,
        records=32,
    )
    assert found.verdict != "KERNEL_BUG"
    names = {identity.name for identity in found.identities}
    assert {"residual of 0", "residual of 1", "residual of 2", "score of 0.weight"} <= names
    assert not any(identity.rejected for identity in found.identities)


@pytest.mark.statistical
def test_gibbs_for_another_noise_is_found_out():
    problem, wrong = _noisy(), _noisy(variance=0.6).model
    found = thermalize(
        problem,
        lambda i: gibbs(wrong, i.inputs, i.targets),
        starts=("informed", "zero"),
        seeds=10,
        budget=96,
        records=32,
    )
    assert found.verdict == "KERNEL_BUG"
    assert any("residual" in i.name for i in found.identities if i.rejected)


def test_hmc_samples_latent_variables_too():
    found = thermalize(
        _noisy(),
        lambda i: HMC(i.potential, num_steps=3),
        seeds=2,
        budget=48,
        records=16,
        num_chains=2,
    )
    assert "residual of 1" in found.instances[0].identities
    assert found.identities == ()  # two problems have no spread
    assert "too few problems" in repr(found)
    assert 0 < found.instances[0].acceptance["zero"] <= 1


def test_classes_are_compared_by_disagreement():
    problem = _noisy("classification", 3)
    found = thermalize(
        problem, lambda i: gibbs(i.model, i.inputs, i.targets), seeds=2, budget=64, records=32
    )
    assert all(0 <= e <= 1 for e in found.instances[0].curves["prior"])
    logits = TeacherStudent(nn.Linear(2, 3).double(), 20, 50, likelihood=Categorical())
    found = thermalize(logits, lambda i: MALA(i.potential), seeds=2, budget=64, records=16)
    assert "residuals" not in found.instances[0].identities
    assert "score of weight" in found.instances[0].identities


def test_any_distance_from_the_teacher_will_do():
    def largest(instance, outputs):
        return (outputs - instance.test_outputs).abs().flatten(1).amax(1)

    usual = thermalize(linear_problem(), _relaxation(), seeds=2, **QUICK)
    other = thermalize(linear_problem(), _relaxation(), seeds=2, statistic=largest, **QUICK)
    for one, two in zip(usual.instances, other.instances, strict=True):
        assert two.equilibrium.mean > one.equilibrium.mean**0.5
        assert two.comparisons["zero"].outcome == "thermalized"
        assert one.identities == two.identities


@pytest.mark.parametrize("wrong", [lambda *_: 1.0, lambda _, outputs: outputs.mean()])
def test_a_statistic_is_one_number_a_draw(wrong):
    with pytest.raises(OptionError, match="one number a draw"):
        thermalize(linear_problem(), _relaxation(), seeds=1, statistic=wrong, **QUICK)


def test_a_teacher_without_noise_has_no_identities():
    found = thermalize(linear_problem(label_noise=False), _relaxation(), seeds=8, **QUICK)
    assert not found.identities
    assert not found.ranks
    assert "labels without noise" in repr(found)


@pytest.mark.statistical
def test_samplers_of_other_libraries():
    def relaxed(instance, initial, num_chains, num_steps, seed):
        assert initial["weight"].shape == (num_chains, 1, FEATURES)
        mean, factor = linear_posterior(instance)
        generator = torch.Generator().manual_seed(seed % 2**31)
        shape = (num_chains, num_steps, FEATURES + 1)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return instance.problem.space.unravel(mean + noise @ factor.T)

    found = thermalize(linear_problem(), relaxed, seeds=10, **QUICK)
    assert found.verdict == "PASS"
    assert found.kernel == "relaxed"
    assert found.instances[0].steps[-1] == 32


def _independent(width):
    def draw(instance, num_draws, seed):
        mean, factor = linear_posterior(instance)
        generator = torch.Generator().manual_seed(seed % 2**31)
        noise = torch.randn(num_draws, FEATURES + 1, generator=generator, dtype=torch.float64)
        return instance.problem.space.unravel(mean + width * noise @ factor.T)

    return draw


@pytest.mark.statistical
def test_samplers_without_a_start_are_ranked():
    good = thermalize(linear_problem(), _independent(1.0), seeds=80, budget=31)
    assert good.verdict == "PASS"
    assert not good.success
    assert "ranks evenly" in repr(good)
    assert thermalize(linear_problem(), _independent(0.4), seeds=80, budget=31).verdict == (
        "NOT_CALIBRATED"
    )
    few = thermalize(linear_problem(), _independent(1.0), seeds=3, budget=31)
    assert few.verdict == "INCONCLUSIVE"
    with pytest.raises(OptionError, match="no curves"):
        few.plot()


def test_identities_hold_for_closed_form_draws_and_compare_with_the_teacher():
    problem = linear_problem()
    values = []
    for seed in range(5):
        instance = problem.instance(seed)
        rows = problem.space.ravel(instance.start("informed", 6))
        found = {n: v.view(2, 3) for n, v in observe(instance, problem.space.unravel(rows)).items()}
        values.append(identity_values(instance, found, 1))
    assert values[0]["second moment of weight"] == pytest.approx(0.0, abs=1e-12)
    assert values[0]["train loss"] == pytest.approx(0.0, abs=1e-12)
    assert "error" not in values[0]
    rest = instance.predict(instance.teacher, instance.inputs) - instance.targets
    energy = float(rest.square().sum() / 0.5)
    assert values[-1]["residuals"] == pytest.approx((energy - 30) / 60**0.5)
    assert judge_identities(values[:3]) == ()
    assert not any(found.rejected for found in judge_identities(values))
    broken = [{"x": 1.0 + 1e-3 * i} for i in range(5)]
    assert judge_identities(broken)[0].rejected
    assert judge_identities([{"x": float("nan")}] * 5)[0].rejected


def test_scores_are_gradients():
    instance = linear_problem(0.3).instance(0)
    parameters = {n: v.clone().requires_grad_() for n, v in instance.start("prior", 1).items()}
    with torch.enable_grad():
        rest = instance.predict({n: v[0] for n, v in parameters.items()}, instance.inputs)
        energy = (rest - instance.targets).square().sum() / 0.6
        energy = energy + sum(v.square().sum() for v in parameters.values()) / 2
        energy.backward()
    found = observe(instance, {n: v.detach() for n, v in parameters.items()})
    slope = -parameters["weight"].grad[0]
    assert float(found["score of weight"]) == pytest.approx(float(slope.mean()))
    virial = float((slope * parameters["weight"].detach()[0]).mean()) + 1
    assert float(found["virial of weight"]) == pytest.approx(virial)


def test_finished_problems_are_not_run_again(tmp_path, monkeypatch):
    settings = {"checkpoint": tmp_path / "run", **QUICK}
    whole = thermalize(linear_problem(), _relaxation(), seeds=3, **QUICK)
    thermalize(linear_problem(), _relaxation(), seeds=2, **settings)
    ran = []
    run = thermalization.run_problem

    def counted(plan, number, checkpoint):
        ran.append(number)
        return run(plan, number, checkpoint)

    monkeypatch.setattr(thermalization, "run_problem", counted)
    again = thermalize(linear_problem(), _relaxation(), seeds=3, **settings)
    assert ran == [2]
    for one, other in zip(whole.instances, again.instances, strict=True):
        assert one.comparisons == other.comparisons
        assert one.curves == other.curves
        assert one.identities == other.identities
        assert one.ranks == other.ranks
    assert not list((tmp_path / "run").glob("running-*"))
    with pytest.raises(WeightsError, match="settings changed"):
        thermalize(linear_problem(), _relaxation(memory=0.5), seeds=2, **settings)
    (tmp_path / "run" / "problem-0.json").write_text("{")
    with pytest.raises(WeightsError, match="damaged"):
        thermalize(linear_problem(), _relaxation(), seeds=2, **settings)


def test_interrupted_it_reports_what_there_is(monkeypatch):
    run = thermalization.run_problem

    def interrupted(plan, number, checkpoint):
        if number == 2:
            raise KeyboardInterrupt
        return run(plan, number, checkpoint)

    monkeypatch.setattr(thermalization, "run_problem", interrupted)
    found = thermalize(linear_problem(), _relaxation(), seeds=5, **QUICK)
    assert found.interrupted
    assert len(found.instances) == 2
    assert "(interrupted)" in repr(found)
    with pytest.raises(KeyboardInterrupt):
        thermalize(linear_problem(), _relaxation(), seeds=[2, 3], **QUICK)


def test_what_is_refused():
    problem, kernel = linear_problem(), _relaxation()
    for options, message in (
        ({"seeds": 0}, "^seeds: 0 is out of range"),
        ({"seeds": []}, "names no problems"),
        ({"seeds": [1, 1]}, "twice"),
        ({"starts": ("zero",)}, "where equilibrium is"),
        ({"starts": ("informed", "warm")}, "Choose among"),
        ({"num_chains": 0}, "num_chains"),
        ({"records": 3}, "records"),
        ({"budget": 5}, "budget"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"required": 0.0}, "required"),
        ({"num_warmup": 20}, "at most a quarter"),
    ):
        with pytest.raises(OptionError, match=message):
            thermalize(problem, kernel, **{**QUICK, "seeds": 1, **options})
    with pytest.raises(OptionError, match="takes 2 arguments"):
        thermalize(problem, lambda _a, _b: None, seeds=1, **QUICK)
    with pytest.raises(OptionError, match="not callable"):
        thermalize(problem, "HMC", seeds=1, **QUICK)
    with pytest.raises(DataError, match="it returned NoneType"):
        thermalize(problem, lambda _: None, seeds=1, **QUICK)
    with pytest.raises(DataError, match="parameter bias: it is missing"):
        thermalize(
            problem, lambda _i, n, _s: {"weight": torch.zeros(n, 1, FEATURES)}, seeds=1, budget=8
        )
    other = TeacherStudent(nn.Sequential(nn.Linear(2, 1)), 9, 9, likelihood=Gaussian(1.0))
    with pytest.raises(DataError, match="does not sample"):
        thermalize(problem, lambda _: MALA(other.instance(0).potential), seeds=1, **QUICK)
