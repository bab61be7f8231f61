"""Synthetic problems: what a teacher makes, and that it is a posterior draw."""

import pytest
import torch
from torch import nn

from pushforward.errors import DataError, OptionError
from pushforward.networks.likelihoods import Bernoulli, Categorical, Gaussian
from pushforward.networks.model import FunctionalModel
from pushforward.sampling.intermediate_noise.gibbs import gibbs
from pushforward.sampling.intermediate_noise.network import IntermediateNoiseNetwork
from pushforward.sampling.noise import Noise
from pushforward.sampling.thermalization.teacher_student import TeacherStudent
from thermalising import FEATURES, linear_posterior, linear_problem


def _noisy(output="regression", outputs=1, **options):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, outputs))
    return TeacherStudent(IntermediateNoiseNetwork(net, 0.1, 0.2, output), 25, 40, **options)


def _mlp(likelihood, outputs=1, **options):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    return TeacherStudent(net, 25, 40, likelihood=likelihood, **options)


@pytest.mark.parametrize(
    "problem",
    [linear_problem(), _noisy(), _noisy("classification", 3), _mlp(Categorical(), 3)],
    ids=["linear", "noisy", "noisy classes", "classes"],
)
def test_an_instance_is_a_function_of_its_seed(problem):
    first, again, other = problem.instance(3), problem.instance(3), problem.instance(4)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    for name, value in first.start("prior", 2, 5).items():
        assert torch.equal(value, again.start("prior", 2, 5)[name])
    assert not torch.equal(first.inputs, other.inputs)
    assert not torch.equal(
        first.teacher[problem.space.names[0]], other.teacher[problem.space.names[0]]
    )


def test_inputs_that_are_given_are_shared():
    inputs = torch.randn(12, FEATURES, dtype=torch.float64)
    net = nn.Linear(FEATURES, 1).double()
    problem = TeacherStudent(net, inputs, 9, likelihood=Gaussian(0.1))
    assert problem.instance(0).inputs is problem.instance(1).inputs
    assert problem.instance(0).test_inputs.shape == (9, FEATURES)


def test_the_present_weights_of_the_network_play_no_part():
    other = linear_problem()
    with torch.no_grad():
        other.network.weight.mul_(100.0)
    assert torch.equal(linear_problem().instance(0).targets, other.instance(0).targets)
    assert linear_problem().identity() == other.identity()


@pytest.mark.statistical
def test_the_teacher_is_a_draw_from_the_posterior():
    """Whitened by the posterior in closed form, teachers are standard normal (|z| < 4.5)."""
    problem = linear_problem(noise=0.7, prior_precision=1.0)
    whitened = []
    for seed in range(200):
        instance = problem.instance(seed)
        mean, factor = linear_posterior(instance)
        away = problem.space.ravel(instance.start("informed", 1))[0] - mean
        whitened.append(torch.linalg.solve_triangular(factor, away[:, None], upper=False)[:, 0])
    values = torch.stack(whitened)
    assert float(values.mean(0).abs().max()) < 4.5 / 200**0.5
    assert float((values.square().mean(0) - 1).abs().max()) < 4.5 * (2 / 200) ** 0.5


@pytest.mark.statistical
def test_teachers_follow_the_prior_by_name():
    problem = _mlp(Gaussian(0.1), prior_precision={"0": 3.0, "2": 40.0})
    assert problem.precisions["0.weight"] == pytest.approx(3.0)
    teachers = [problem.instance(seed).teacher for seed in range(150)]
    for name, precision in problem.precisions.items():
        values = torch.stack([teacher[name] for teacher in teachers]).flatten()
        deviation = float(precision * values.square().mean() - 1)
        assert abs(deviation) < 4.5 * (2 / len(values)) ** 0.5, name


@pytest.mark.statistical
def test_latent_variables_have_the_noise_of_the_model():
    problem = _noisy()
    totals = []
    for seed in range(40):
        at = problem.instance(seed)
        found = problem.model.residual_energies(at.teacher, at.latents, at.inputs, at.targets)
        totals.append(torch.stack(list(found.values())))
    counts = torch.tensor([100.0, 100.0, 25.0], dtype=torch.float64)
    z = (torch.stack(totals).mean(0) - counts) / (2 * counts / 40).sqrt()
    assert float(z.abs().max()) < 4.5


def test_labels_without_noise_are_those_of_the_network_alone():
    problem = _noisy(label_noise=False)
    instance = problem.instance(0)
    assert not instance.exact
    expected = problem.model.outputs(instance.teacher, instance.inputs)
    assert torch.allclose(instance.targets, expected)
    hidden = instance.latents
    assert torch.equal(hidden["latent.1"], hidden["latent.0"].relu())
    classes = _mlp(Categorical(), 3, label_noise=False).instance(0)
    assert torch.equal(classes.targets, classes.predict(classes.teacher, classes.inputs).argmax(-1))
    binary = _mlp(Bernoulli(), label_noise=False).instance(0)
    assert set(binary.targets.unique().tolist()) <= {0.0, 1.0}


def test_starts():
    instance = _noisy().instance(1)
    informed = instance.start("informed", 3)
    assert all(torch.equal(informed[n][2], v) for n, v in instance.teacher.items())
    assert all(torch.equal(informed[n][0], v) for n, v in instance.latents.items())
    zero = instance.start("zero", 3)
    assert all(float(zero[name].abs().max()) < 1e-3 for name in zero)
    assert all(not zero[name].any() for name in instance.latents)
    assert not torch.equal(zero["0.weight"][0], zero["0.weight"][1])
    prior = instance.start("prior", 3)
    assert prior["latent.1"].shape == (3, 25, 4)
    assert not torch.equal(prior["0.weight"], instance.start("prior", 3, seed=1)["0.weight"])
    with pytest.raises(OptionError, match="there is no start"):
        instance.start("nowhere", 3)


@pytest.mark.parametrize("kind", ["informed", "zero", "prior"])
def test_every_start_of_a_classifier_is_allowed_by_its_labels(kind):
    instance = _noisy("classification", 3).instance(2)
    start = instance.start(kind, 4)
    value = instance.potential.value(instance.potential.space.ravel(start))
    assert bool(torch.isfinite(value).all())
    kernel = gibbs(instance.model, instance.inputs, instance.targets)
    size = kernel.start_size
    noise = Noise(
        torch.zeros(4, size.normals, dtype=torch.float64), torch.zeros(4, 0, dtype=torch.float64)
    )
    state = kernel.start(start, noise)
    assert torch.equal(state["latent.2"], start["latent.2"])


def test_the_potentials_are_the_posteriors():
    noisy = _noisy().instance(0)
    start = noisy.start("prior", 2)
    expected = -noisy.model.log_joint(
        {n: start[n] for n in noisy.teacher},
        {n: start[n] for n in noisy.latents},
        noisy.inputs,
        noisy.targets,
    )
    found = noisy.potential.value(noisy.potential.space.ravel(start))
    assert torch.allclose(found, expected)
    plain = linear_problem(0.3).instance(0)
    start = plain.start("prior", 2)
    rest = plain.outputs(start, plain.inputs) - plain.targets
    expected = rest.square().sum((1, 2)) / 0.6
    expected = expected + 0.5 * plain.problem.space.ravel(start).square().sum(1)
    found = plain.potential.value(plain.problem.space.ravel(start))
    assert torch.allclose(found - found[0], expected - expected[0])


def test_errors_are_distances_from_the_teacher():
    plain = linear_problem().instance(0)
    outputs = torch.stack([plain.test_outputs, plain.test_outputs + 2.0])
    assert plain.errors(outputs).tolist() == pytest.approx([0.0, 4.0])
    classes = _noisy("classification", 3).instance(0)
    outputs = torch.stack([classes.test_outputs, -classes.test_outputs])
    assert classes.errors(outputs).tolist() == [0.0, 1.0]
    binary = _mlp(Bernoulli()).instance(0)
    outputs = torch.stack([binary.test_outputs, -binary.test_outputs])
    assert binary.errors(outputs).tolist() == [0.0, 1.0]


def test_a_functional_model_is_a_network():
    line = FunctionalModel(lambda p, x: x * p["slope"], {"slope": torch.tensor([2.0])})
    problem = TeacherStudent(line, 5, 6, likelihood=Gaussian(1.0), example_shape=(1,))
    assert problem.instance(0).targets.shape == (5, 1)
    with pytest.raises(OptionError, match="shape of an input is not known"):
        TeacherStudent(line, 5, 6, likelihood=Gaussian(1.0)).instance(0)


def test_what_is_refused():
    net = nn.Linear(2, 1)
    with pytest.raises(OptionError, match="makes no targets"):
        TeacherStudent(net, 5)
    with pytest.raises(OptionError, match="of its own"):
        TeacherStudent(_noisy().network, 5, likelihood=Gaussian(1.0))
    with pytest.raises(OptionError, match=r"^inputs: 0 is out of range"):
        TeacherStudent(net, 0, likelihood=Gaussian(1.0))
    with pytest.raises(DataError, match="a tensor"):
        TeacherStudent(net, torch.ones(3), likelihood=Gaussian(1.0))
    with pytest.raises(DataError, match="NaN"):
        TeacherStudent(net, torch.full((3, 2), torch.nan), likelihood=Gaussian(1.0))
    with pytest.raises(OptionError, match="flat prior"):
        TeacherStudent(net, 5, likelihood=Gaussian(1.0), prior_precision=0.0).instance(0)
    with pytest.raises(OptionError, match="noise variance is still to be learned"):
        TeacherStudent(net, 5, likelihood=Gaussian()).instance(0)


def test_it_says_what_it_is():
    assert "8 parameters, 30 inputs, 40 for testing" in repr(linear_problem())
    assert "labels without noise" in repr(_noisy(label_noise=False))
