"""Defects that a review of the samplers found, each by what a user would have run into."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.errors import DataError, NetworkError, OptionError, ShapeError, WeightsError
from pushforward.sampling.kernel import State
from pushforward.sampling.noise import Noise

F64 = torch.float64
X = torch.linspace(-1, 1, 36, dtype=F64).view(12, 3).sin()
Y = X.sum(1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def posterior(loss=None, targets=Y):
    return pf.Potential.of_network(network(), (X, targets), loss or pf.Gaussian(0.1))


def draw(kernel, **options):
    return pf.sample(
        kernel, **{"num_draws": 4, "num_chains": 2, "num_warmup": 4, "progress": False} | options
    )


def squares(outputs, targets):
    return (outputs - targets).square().sum(-1)


def test_a_loss_that_broadcasts_examples_against_each_other_is_refused():
    # Outputs (n, 1) and targets (n,): each example would get the errors of all targets, summed.
    with pytest.raises(OptionError, match="depends on the other examples") as caught:
        posterior(squares, Y)
    assert "broadcast" in str(caught.value)
    right = posterior(squares, Y[:, None])
    weights = right.space.ravel(dict(network().named_parameters()))[None]
    expected = squares(network()(X), Y[:, None]).sum() + weights.square().sum() / 2
    torch.testing.assert_close(right.value(weights.detach())[0], expected.detach())


def test_initial_values_that_are_missing_are_named_before_shapes_are_judged():
    initial = {"0.weight": network()[0].weight}
    with pytest.raises(ShapeError, match=r"0\.bias: it is missing"):
        draw(pf.HMC(posterior()), initial=initial)


def test_initial_values_that_are_not_finite_are_refused_with_their_name():
    initial = {name: value.clone() for name, value in network().state_dict().items()}
    initial["2.bias"][0] = torch.nan
    with pytest.raises(DataError, match=r"initial, parameter 2\.bias: it holds NaN"):
        draw(pf.HMC(posterior()), initial=initial)


@pytest.mark.wrong_types
def test_initial_values_may_be_arrays():
    arrays = {name: value.numpy() for name, value in network().state_dict().items()}
    found = draw(pf.HMC(posterior()), initial=arrays).parameters["0.weight"]
    expected = draw(pf.HMC(posterior()), initial=network()).parameters["0.weight"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.wrong_types
@pytest.mark.parametrize("given", [posterior(), pf.HMC, None])
def test_what_is_no_kernel_is_refused(given):
    with pytest.raises(OptionError, match=r"pf\.HMC\(potential\)"):
        draw(given)


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    "build",
    [
        pf.HMC,
        pf.NUTS,
        pf.MALA,
        lambda net: pf.SGLD(net, step_size=0.1),
        lambda net: pf.SGHMC(net, step_size=0.1, friction=1.0),
        lambda net: pf.SGNHT(net, step_size=0.1),
    ],
)
def test_what_is_no_potential_is_refused(build):
    with pytest.raises(OptionError, match="Sequential is no potential"):
        build(network())


class Unmoved(pf.HMC):
    """Does not let chains move."""

    def step(self, state: State, noise: Noise) -> State:  # noqa: ARG002
        raise AssertionError("the chains moved before the record was tried")


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    "record", [lambda _: 1.0, lambda _: None, lambda p: p["2.bias"].sum().item()]
)
def test_a_record_that_cannot_be_taken_is_refused_before_the_warm_up(record):
    with pytest.raises(OptionError, match=r"^record: .*vmap"):
        draw(Unmoved(posterior()), record=record)


def test_errors_of_the_library_pass_through_a_record():
    def fail(_):
        raise NetworkError("not this", where="somewhere", advice="Else.")

    with pytest.raises(NetworkError, match="somewhere"):
        draw(pf.HMC(posterior()), record=fail)


def test_a_checkpoint_is_not_continued_with_another_record(tmp_path):
    kernel = pf.HMC(posterior())
    draw(kernel, record=lambda p: {"one": p["2.bias"]}, checkpoint=tmp_path)
    draw(kernel, record=lambda p: {"one": 2 * p["2.bias"]}, checkpoint=tmp_path)
    for other in (lambda p: {"two": p["2.bias"]}, lambda p: {"one": p["0.bias"]}, None):
        with pytest.raises(WeightsError, match="recorded"):
            draw(kernel, record=other, checkpoint=tmp_path)


def test_a_warm_up_that_was_too_short_is_not_answered_by_a_smaller_step_size_alone():
    kernel = pf.HMC(pf.Potential.of_density(lambda p: -5e5 * (p["x"] ** 2).sum(), {"x": X[0]}))
    chains = draw(kernel, num_warmup=1)
    (check,) = (check for check in chains.checks if check.name == "acceptance")
    assert check.status == "fail"
    assert "num_warmup=1000" in check.advice


def test_lengths_of_trajectories_do_not_depend_on_the_default_dtype():
    kernel = pf.HMC(posterior())
    state = {"turn": torch.arange(10**8, 10**8 + 400), "step_size": torch.ones(400, dtype=F64)}
    counts = kernel._counts(state)
    # In float32 the golden ratio times 1e8 has no fraction: all trajectories were the shortest.
    seen = torch.bincount(counts, minlength=25)[8:25]
    assert seen.min() >= 20
    assert seen.max() <= 27


# --- noise behind every map -----------------------------------------------------------------------


def noisy(noise=0.1, **options):
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    return pf.IntermediateNoiseNetwork(net, noise, 0.1, **options)


@pytest.mark.wrong_types
@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_variances_may_be_arrays(kind):
    assert list(noisy(kind([0.25, 0.5])).variances.values()) == [0.25, 0.1, 0.5]
    with pytest.raises(OptionError, match="3 variances for 2 maps"):
        noisy(kind([0.25, 0.5, 1.0]))


@pytest.mark.wrong_types
def test_examples_that_are_no_tensors_are_refused():
    with pytest.raises(DataError, match="x: it is ndarray, not a tensor"):
        pf.gibbs(noisy(), X.numpy(), Y)
    with pytest.raises(DataError, match="y: it is NoneType, not a tensor"):
        pf.gibbs(noisy(), X, None)


def test_precisions_of_the_prior_keep_their_digits():
    # Nothing but the prior: x = 0, so that the weight is a normal number over sqrt(precision).
    net = nn.Sequential(nn.Linear(1, 1, bias=False))
    model = pf.IntermediateNoiseNetwork(net, 1.0, 1.0, prior_precision=0.1)
    kernel = pf.gibbs(model, torch.zeros(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64))
    size = kernel.noise_size
    noise = Noise(torch.ones(1, size.normals, dtype=F64), torch.empty(1, 0, dtype=F64))
    state = kernel.start(
        None, Noise(torch.zeros(1, kernel.start_size.normals, dtype=F64), noise.uniforms)
    )
    found = kernel.step(state, noise)["0.weight"]
    torch.testing.assert_close(found, torch.full_like(found, 10**0.5), rtol=1e-14, atol=0)


# --- thermalisation -------------------------------------------------------------------------------


@pytest.mark.wrong_types
def test_seeds_may_be_numbers_of_numpy(tmp_path):
    def run(seeds):
        problem = pf.TeacherStudent(noisy(), np.int64(10), np.int64(10))
        return pf.thermalize(
            problem,
            lambda i: pf.gibbs(i.model, i.inputs, i.targets),
            budget=np.int64(64),
            seeds=seeds,
            checkpoint=tmp_path,
        )

    found = run(np.int64(2))
    assert [one.seed for one in found.instances] == [0, 1]
    again = run([np.int64(0), 1])  # the same run by its checkpoint
    assert again.success == found.success


@pytest.mark.wrong_types
@pytest.mark.parametrize("seeds", [2.5, True, "ab", None])
def test_seeds_of_another_kind_are_refused(seeds):
    problem = pf.TeacherStudent(noisy(), 10, 10)
    with pytest.raises(OptionError, match=r"^seeds:"):
        pf.thermalize(
            problem, lambda i: pf.gibbs(i.model, i.inputs, i.targets), budget=32, seeds=seeds
        )


@pytest.mark.parametrize("test_inputs", [X[:, :2], X.float()])
def test_test_inputs_that_are_not_like_the_inputs_are_refused(test_inputs):
    with pytest.raises(DataError, match=r"^test_inputs: they are"):
        pf.TeacherStudent(noisy(), X, test_inputs)


@pytest.mark.parametrize("returned", [None, 3.0, {"weight": "abc"}])
def test_a_foreign_sampler_that_returns_nonsense(returned):
    problem = pf.TeacherStudent(
        torch.nn.Sequential(torch.nn.Linear(2, 1)).double(), 10, 20, likelihood=pf.Gaussian(0.5)
    )
    with pytest.raises(DataError, match="what the sampler returned"):
        pf.thermalize(problem, lambda _instance, _count, _seed: returned, budget=8, seeds=2)


def test_a_foreign_sampler_may_return_arrays():
    problem = pf.TeacherStudent(
        torch.nn.Sequential(torch.nn.Linear(2, 1)).double(), 10, 20, likelihood=pf.Gaussian(0.5)
    )

    def prior(_instance, count, seed):
        numbers = np.random.default_rng(seed % 2**32)
        return {"0.weight": numbers.normal(size=(count, 1, 2)), "0.bias": np.zeros((count, 1))}

    report = pf.thermalize(problem, prior, budget=16, seeds=2)
    assert len(report.instances) == 2
