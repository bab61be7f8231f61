"""`laplace` and its plan: fixed points, invariance, every form of every option, every bad input."""

import subprocess
import sys
from dataclasses import replace
from math import log

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pushforward as pf
from laplace_scenarios import PROBLEMS, classification, numbers, regression
from oracles.linear_gaussian import (
    DenseModel,
    categorical,
    dense_jacobian,
    gaussian,
    gaussian_log_evidence,
    mackay,
    type_two_maximum,
)
from pushforward.errors import (
    DataError,
    NetworkError,
    OptionError,
    ResourceError,
    ShapeError,
    WeightsError,
)
from pushforward.linearised_laplace import fit
from pushforward.networks.model import FunctionalModel

REGRESSION = replace(PROBLEMS["gaussian"], likelihood=pf.Gaussian())
CATEGORICAL = PROBLEMS["categorical"]


def posterior_of(problem, **settings):
    return pf.laplace(problem.net, problem.data, problem.likelihood, **settings)


def precisions(posterior):
    return posterior.prior.precision


# --- fixed points -------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", ["affine", "linear"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_precision_is_the_fixed_point(name, offset):
    problem = PROBLEMS[name]
    posterior = posterior_of(problem, method="exact", offset=offset)
    dense = problem.dense(affine=offset == "affine")
    alpha, _ = mackay(dense, problem.groups("isotropic"), 1.0)
    torch.testing.assert_close(precisions(posterior), alpha, rtol=1e-6, atol=0)
    learned = posterior.prior_precision
    evidence = dense.log_evidence(learned)
    torch.testing.assert_close(posterior.log_evidence.value, evidence, rtol=1e-8, atol=0)
    gamma = dense.effective_dimensions(learned)
    torch.testing.assert_close(posterior.effective_dimension.value, gamma.sum())
    torch.testing.assert_close(posterior.mode, dense.mode(learned), rtol=1e-3, atol=1e-4)
    assert posterior.method == "exact"
    assert posterior.offset == offset


@pytest.mark.parametrize(
    ("name", "offset"),
    [("bernoulli", "affine"), ("poisson", "affine"), ("poisson", "linear"), ("gaussian", "linear")],
)
def test_the_precisions_of_layers_are_the_fixed_point(name, offset):
    problem = PROBLEMS[name]
    posterior = posterior_of(problem, method="exact", offset=offset, prior="layerwise")
    dense, groups = problem.dense(affine=offset == "affine"), problem.groups("layerwise")
    alpha, _ = mackay(dense, groups, 1.0)
    torch.testing.assert_close(precisions(posterior), alpha, rtol=1e-5, atol=0)
    gammas = dense.effective_dimensions(alpha[groups])
    layers = torch.zeros(2, dtype=torch.float64).index_add(0, groups, gammas)
    torch.testing.assert_close(
        posterior.layer_effective_dimension.value, layers, rtol=1e-4, atol=1e-5
    )
    assert posterior.prior_precision.keys() == {"0", "2"}


@pytest.mark.parametrize("name", ["gaussian", "categorical", "bernoulli", "poisson"])
def test_the_precision_of_a_g_prior_is_the_fixed_point(name):
    problem = PROBLEMS[name]
    posterior = posterior_of(problem, method="exact", prior="gprior")
    dense = problem.dense().g_prior()
    torch.testing.assert_close(posterior.prior.scale, dense.scale)
    alpha, _ = mackay(dense, problem.groups("gprior"), 1.0)
    torch.testing.assert_close(precisions(posterior), alpha, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", ["affine", "linear"])
def test_precision_and_noise_are_the_type_two_maximum(offset):
    posterior = posterior_of(REGRESSION, method="exact", offset=offset)
    dense = replace(REGRESSION.dense(affine=offset == "affine"), log_prob=gaussian(0.1))
    (alpha,), noise = mackay(dense, REGRESSION.groups("isotropic"), 1.0, noise=0.5)
    assert posterior.prior_precision == pytest.approx(alpha.item(), rel=1e-6)
    assert posterior.noise_variance == pytest.approx(noise, rel=1e-6)
    best = type_two_maximum(dense, 1.0, 0.5)
    assert posterior.prior_precision == pytest.approx(best[0].item(), rel=1e-5)
    assert posterior.noise_variance == pytest.approx(best[1].item(), rel=1e-5)
    evidence = gaussian_log_evidence(dense, *best)
    assert posterior.log_evidence.value.item() == pytest.approx(evidence.item(), rel=1e-8)


def test_noise_alone_can_be_learned():
    posterior = posterior_of(REGRESSION, method="exact", prior_precision=3.0)
    dense = REGRESSION.dense()
    _, noise = mackay(dense, REGRESSION.groups("isotropic"), 3.0, noise=0.5, learn_prior=False)
    assert posterior.prior_precision == 3.0
    assert posterior.noise_variance == pytest.approx(noise, rel=1e-6)


def test_weights_and_outputs_give_the_same_fit(monkeypatch):
    found = []
    for primal in (True, False):
        monkeypatch.setattr(fit, "use_weights", lambda _linear, primal=primal: primal)
        found.append(posterior_of(REGRESSION, method="exact", prior_precision=2.0))
    first, second = found
    assert first.noise_variance == pytest.approx(second.noise_variance, rel=1e-8)
    torch.testing.assert_close(
        first.log_evidence.value, second.log_evidence.value, rtol=1e-8, atol=0
    )
    torch.testing.assert_close(
        first.predict(REGRESSION.x).epistemic_variance,
        second.predict(REGRESSION.x).epistemic_variance, rtol=1e-8, atol=0,
    )  # fmt: skip


# --- invariance ---------------------------------------------------------------------------------


def convolutional(k, perturbed=0.0):
    """Convolutions that feed normalisation layers, times k: the same function."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.GroupNorm(1, 3, eps=1e-12), nn.Tanh(),
        nn.Conv2d(3, 4, 3, bias=False), nn.GroupNorm(2, 4, eps=1e-12), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for i, layer in enumerate((net[0], net[3], net[8])):
            shape = layer.weight.shape
            layer.weight.copy_(numbers(*shape, seed=60 + i))
            layer.weight.add_(perturbed * numbers(*shape, seed=80 + i))
        net[8].bias.copy_(numbers(2, seed=70))
        net[0].weight.mul_(k)
        net[3].weight.mul_(k)
    return net


def mean_variance(k, kind):
    x = numbers(40, 1, 6, 6, seed=71)
    y = convolutional(1.0, 0.5)(x).detach() + 0.1 * numbers(40, 2, seed=72)
    net = convolutional(k)
    torch.testing.assert_close(net(x), convolutional(1.0)(x), rtol=1e-8, atol=1e-9)
    posterior = pf.laplace(net, (x, y), pf.Gaussian(0.05), method="exact", prior=kind)
    return posterior.predict(x).epistemic_variance.mean().item()


@pytest.mark.parametrize("kind", ["layerwise", "gprior"])
def test_rescaling_weights_in_front_of_a_normalisation_changes_nothing(kind):
    small, plain, large = (mean_variance(k, kind) for k in (0.1, 1.0, 10.0))
    assert small == pytest.approx(plain, rel=1e-3)
    assert large == pytest.approx(plain, rel=1e-3)
    assert plain > 1e-3


def test_an_isotropic_prior_depends_on_the_scale():
    small, plain, large = (mean_variance(k, "isotropic") for k in (0.1, 1.0, 10.0))
    assert abs(log(small / plain)) > 0.02
    assert abs(log(large / plain)) > 0.02


# --- sampled ------------------------------------------------------------------------------------


@pytest.mark.statistical
@pytest.mark.parametrize("name", PROBLEMS)
def test_sampled_agrees_with_exact(name):
    problem, k = PROBLEMS[name], 512
    settings = {"prior_precision": 2.5}
    exact = posterior_of(problem, method="exact", **settings)
    sampled = posterior_of(
        problem, method="sampled", num_draws=k, block=k, tolerance=0.03, **settings
    )
    spread = (2 * problem.dense().spectrum(2.5).square().sum() / k).sqrt()
    gamma, estimate = exact.effective_dimension.value, sampled.effective_dimension
    assert abs(estimate.value - gamma) < 4 * spread
    assert estimate.standard_error.item() == pytest.approx(spread.item(), rel=0.3)
    x = torch.cat([problem.x[:20], 2 * numbers(20, 3, seed=72)])
    truth, guess = exact.predict(x), sampled.predict(x)
    z = (guess.epistemic_variance - truth.epistemic_variance) / guess.standard_error
    # 40 to 120 correlated scores: 4.5 is exceeded once in a thousand runs.
    assert z.abs().max() < 4.5
    assert z.square().mean() < 6
    torch.testing.assert_close(guess.standard_error, guess.epistemic_variance * (2 / k) ** 0.5)
    assert truth.standard_error.abs().max() == 0


@pytest.mark.parametrize("name", ["gaussian", "categorical", "bernoulli", "poisson"])
def test_the_sampled_evidence_is_within_its_error(name):
    problem = PROBLEMS[name]
    settings = {"prior_precision": 2.5, "num_draws": 16}
    exact = posterior_of(problem, method="exact", **settings)
    sampled = posterior_of(problem, method="sampled", evidence=True, **settings)
    error = sampled.log_evidence.standard_error
    assert 0 < error < 3
    # Eight probes: 5 of Student's t with 7 degrees of freedom is one in 600.
    assert abs(sampled.log_evidence.value - exact.log_evidence.value) < 5 * error + 0.01
    assert posterior_of(problem, method="sampled", **settings).log_evidence is None


def test_the_draws_depend_on_the_seed_alone():
    settings = {"method": "sampled", "num_draws": 5, "prior_precision": 2.5, "tolerance": 0.01}
    first = posterior_of(CATEGORICAL, seed=1, **settings)
    again = posterior_of(CATEGORICAL, seed=1, **settings)
    assert torch.equal(first.draws, again.draws)
    other = posterior_of(CATEGORICAL, seed=2, **settings)
    assert (first.draws - other.draws).abs().max() > 0.1
    small = posterior_of(CATEGORICAL, seed=1, workspace=3_000, **settings)
    torch.testing.assert_close(small.draws, first.draws, rtol=1e-3, atol=1e-3)
    state = torch.get_rng_state()
    posterior_of(CATEGORICAL, seed=1, **settings)
    assert torch.equal(torch.get_rng_state(), state)


def test_auto_chooses_by_size(monkeypatch):
    assert posterior_of(CATEGORICAL, prior_precision=1.0).method == "exact"
    monkeypatch.setattr("pushforward.linearised_laplace.plan._EXACT_SIDE", 10)
    assert posterior_of(CATEGORICAL, prior_precision=1.0).method == "sampled"


def test_outputs_of_any_shape():
    net, x, y = regression(40, 6, seed=9)
    shaped = nn.Sequential(net, nn.Unflatten(1, (2, 3))).double().eval()
    flat = pf.laplace(net, (x, y), pf.Gaussian(0.1), prior_precision=2.0)
    folded = pf.laplace(shaped, (x, y.reshape(-1, 2, 3)), pf.Gaussian(0.1), prior_precision=2.0)
    variance = folded.predict(x).epistemic_variance
    assert variance.shape == (40, 2, 3)
    torch.testing.assert_close(variance.flatten(1), flat.predict(x).epistemic_variance)
    sampled = pf.laplace(
        shaped, (x, y.reshape(-1, 2, 3)), pf.Gaussian(0.1), prior_precision=2.0, method="sampled"
    )
    assert sampled.predict(x).epistemic_variance.shape == (40, 2, 3)


# --- forms of the options -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "sampled"])
@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("isotropic", 2.0, 2.0),
        ("isotropic", torch.tensor(2.0), 2.0),
        ("layerwise", 2.0, {"0": 2.0, "2": 2.0}),
        ("layerwise", {"2": 3.0, "0": 2.0}, {"0": 2.0, "2": 3.0}),
        ("layerwise", torch.tensor([2.0, 3.0]), {"0": 2.0, "2": 3.0}),
        ("gprior", 0.5, 0.5),
    ],
)
def test_every_form_of_the_precision(kind, value, expected, method):
    posterior = posterior_of(
        CATEGORICAL, prior=kind, prior_precision=value, method=method, num_draws=16
    )
    assert posterior.prior_precision == expected
    assert posterior.rounds == ()
    assert posterior.prior.kind == kind


@pytest.mark.parametrize("method", ["exact", "sampled"])
@pytest.mark.parametrize("noise", [0.2, [0.2, 0.4], torch.tensor([0.2, 0.4])])
def test_a_noise_that_is_given_is_kept(noise, method):
    problem = replace(REGRESSION, likelihood=pf.Gaussian(noise))
    posterior = posterior_of(problem, prior_precision=1.0, method=method, num_draws=16)
    expected = 0.2 if isinstance(noise, float) else (0.2, 0.4)
    assert posterior.noise_variance == pytest.approx(expected, rel=1e-7)
    prediction = posterior.predict(problem.x)
    noise = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        prediction.variance, prediction.epistemic_variance + noise, rtol=1e-7, atol=0
    )


def test_a_subset_leaves_the_rest_alone():
    posterior = posterior_of(CATEGORICAL, subset="2", prior_precision=2.0)
    assert posterior.draws.shape == (64, 15)
    dense = CATEGORICAL.dense()
    part = replace(dense, jacobian=dense.jacobian[..., 16:], trained=dense.trained[16:])
    torch.testing.assert_close(posterior.log_evidence.value, part.log_evidence(2.0))
    _, jacobian, _ = dense_jacobian(CATEGORICAL.net, CATEGORICAL.x, ["2.weight", "2.bias"])
    torch.testing.assert_close(
        posterior.predict(CATEGORICAL.x).epistemic_variance, part.variance(2.0, jacobian)
    )


def test_data_in_other_forms():
    expected = posterior_of(CATEGORICAL, prior_precision=2.0).log_evidence.value
    x, y = CATEGORICAL.data
    dataset = TensorDataset(x, y)
    for data in (DataLoader(dataset, 7), [[x[:50], y[:50]], [x[50:], y[50:]]]):
        posterior = pf.laplace(CATEGORICAL.net, data, pf.Categorical(), prior_precision=2.0)
        torch.testing.assert_close(posterior.log_evidence.value, expected)


def test_a_function_instead_of_a_module():
    net = CATEGORICAL.net
    model = FunctionalModel(
        lambda p, x: torch.tanh(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"],
        dict(net.named_parameters()),
    )
    found = pf.laplace(model, CATEGORICAL.data, pf.Categorical(), prior_precision=2.0)
    expected = posterior_of(CATEGORICAL, prior_precision=2.0)
    torch.testing.assert_close(found.log_evidence.value, expected.log_evidence.value)


def test_nothing_is_left_in_the_network():
    net, x, y = classification()
    before = {name: p.clone() for name, p in net.state_dict().items()}
    for method in ("exact", "sampled"):
        pf.laplace(net, (x, y), pf.Categorical(), method=method, num_draws=4)
    for name, p in net.state_dict().items():
        assert torch.equal(p, before[name])
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


# --- what is refused ----------------------------------------------------------------------------


class Augmented(Dataset):
    def __init__(self):
        self.calls = 0

    def __len__(self):
        return len(CATEGORICAL.x)

    def __getitem__(self, index):
        self.calls += 1
        return CATEGORICAL.x[index] + 1e-6 * self.calls, CATEGORICAL.y[index]


DATASET = TensorDataset(CATEGORICAL.x, CATEGORICAL.y)


def with_weight(value):
    net, *_ = classification()
    with torch.no_grad():
        net[0].weight[0, 0] = value
    return net


BAD = {
    "shuffled": ({"data": DataLoader(DATASET, 10, shuffle=True)}, DataError, "shuffle|random"),
    "augmented": ({"data": DataLoader(Augmented(), 10)}, DataError, "augment|differ|chang"),
    "no examples": ({"data": (CATEGORICAL.x[:0], CATEGORICAL.y[:0])}, DataError, "no examples"),
    "no targets": ({"data": CATEGORICAL.x}, DataError, "target"),
    "lengths": ({"data": (CATEGORICAL.x, CATEGORICAL.y[:-1])}, DataError, "90|89"),
    "shapes": ({"data": (CATEGORICAL.x, CATEGORICAL.y[:, None].expand(-1, 2))}, ShapeError, None),
    "labels": ({"data": (CATEGORICAL.x, CATEGORICAL.y + 1)}, DataError, "3"),
    "negative labels": ({"data": (CATEGORICAL.x, CATEGORICAL.y - 1)}, DataError, "-1"),
    "fractional labels": ({"data": (CATEGORICAL.x, CATEGORICAL.y + 0.5)}, DataError, None),
    "nan inputs": (
        {"data": (CATEGORICAL.x.clone().fill_(float("nan")), CATEGORICAL.y)}, DataError, "NaN",
    ),
    "nan weights": ({"net": with_weight(float("nan"))}, NetworkError, "NaN"),
    "infinite weights": ({"net": with_weight(float("inf"))}, NetworkError, "infinite"),
    "train mode": (
        {"net": nn.Sequential(CATEGORICAL.net, nn.Dropout()).train()}, NetworkError, "training",
    ),
    "no likelihood": ({"likelihood": "categorical"}, OptionError, "likelihood"),
    "method": ({"method": "fast"}, OptionError, "no method 'fast'"),
    "offset": ({"offset": "none"}, OptionError, "no offset"),
    "prior": ({"prior": "horseshoe"}, OptionError, "no prior"),
    "zero precision": ({"prior_precision": 0.0}, OptionError, "0 is no precision"),
    "negative precision": ({"prior_precision": -1.0}, OptionError, "-1 is no precision"),
    "subset": ({"subset": "head.*"}, OptionError, "matches no parameter"),
    "no draws": ({"num_draws": 0}, OptionError, "^num_draws: 0 is out of range"),
    "half a draw": ({"num_draws": 2.5}, OptionError, "^num_draws: 2.5 is no whole number"),
    "block": ({"block": 0}, OptionError, "^block: 0 is out of range"),
    "tolerance": ({"tolerance": 0.0}, OptionError, "^tolerance: 0.0"),
    "large tolerance": ({"tolerance": 1.0}, OptionError, "^tolerance: 1.0"),
    "seed": ({"seed": -1, "method": "sampled"}, OptionError, "seed"),
    "data shards": ({"data_shards": 2}, OptionError, "share the data"),
    "no data shards": ({"data_shards": 0}, OptionError, "data_shards"),
    "data shards in words": ({"data_shards": "a"}, OptionError, "data_shards"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    changed, kind, message = BAD[case]
    arguments = {
        "net": CATEGORICAL.net, "data": CATEGORICAL.data, "likelihood": CATEGORICAL.likelihood,
    } | changed  # fmt: skip
    with pytest.raises(kind, match=message) as caught:
        pf.laplace(**arguments)
    assert caught.value.advice
    assert caught.value.where


def test_targets_of_other_likelihoods_are_checked():
    for name, wrong in {"bernoulli": 2.0, "poisson": -1.0, "gaussian": float("nan")}.items():
        problem = PROBLEMS[name]
        y = problem.y.clone()
        y[-1] = wrong
        with pytest.raises(DataError):
            pf.laplace(problem.net, (problem.x, y), problem.likelihood, prior_precision=1.0)


@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_an_example_that_the_network_has_no_answer_to_is_named(method):
    class Logarithm(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, x):
            return 2 * self.layer(x.log())

    x = CATEGORICAL.x.abs() + 1
    x[57, 1] = -1
    with pytest.raises(DataError, match="outputs for example 57 hold NaN"):
        pf.laplace(Logarithm(), (x, CATEGORICAL.y), CATEGORICAL.likelihood, method=method)


def test_a_run_is_not_resumed_with_one_other_label(tmp_path):
    options = {"method": "sampled", "num_draws": 2, "checkpoint": tmp_path}
    pf.laplace(CATEGORICAL.net, CATEGORICAL.data, CATEGORICAL.likelihood, **options)
    labels = CATEGORICAL.y.clone()
    labels[3] = (labels[3] + 1) % 3
    with pytest.raises(WeightsError, match="data"):
        pf.laplace(CATEGORICAL.net, (CATEGORICAL.x, labels), CATEGORICAL.likelihood, **options)


def test_a_random_network_is_refused():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=torch.float64)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.layer(x) + self.calls

    with pytest.raises(DataError, match="different outputs"):
        pf.laplace(Noisy(), CATEGORICAL.data, pf.Categorical())


# --- the plan -----------------------------------------------------------------------------------


def test_the_plan_of_a_sampled_posterior():
    plan = pf.plan_laplace(
        CATEGORICAL.net, CATEGORICAL.data, pf.Categorical(), method="sampled", num_draws=16
    )
    more = pf.plan_laplace(
        CATEGORICAL.net, CATEGORICAL.data, pf.Categorical(), method="sampled", num_draws=64
    )
    items = {item.name: item.bytes for item in plan.items}
    assert items["finished draws"] == 16 * 31 * 8
    assert plan.total_bytes == sum(items.values())
    assert more.total_bytes > plan.total_bytes
    assert plan.examples == 90
    fixed = pf.plan_laplace(
        CATEGORICAL.net, CATEGORICAL.data, pf.Categorical(), method="sampled",
        num_draws=16, prior_precision=1.0,
    )  # fmt: skip
    assert 0 < fixed.passes < plan.passes
    posterior = posterior_of(CATEGORICAL, method="sampled", num_draws=16, prior_precision=1.0)
    spent = posterior.cost.evaluations / 90 / 16
    assert fixed.passes / 4 < spent < 4 * fixed.passes


def test_the_plan_of_an_exact_posterior():
    plan = pf.plan_laplace(CATEGORICAL.net, CATEGORICAL.data, pf.Categorical())
    assert plan.total_bytes >= 2 * 8 * 31**2
    assert plan.total_bytes < 100 * 8 * 31**2


@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_what_does_not_fit_is_refused_before_it_begins(method, monkeypatch):
    monkeypatch.setattr(fit, "available_memory", lambda _device: 10_000)
    with pytest.raises(ResourceError) as caught:
        posterior_of(CATEGORICAL, method=method)
    assert caught.value.advice


MEMORY = """
import resource, sys, torch, pushforward as pf
torch.set_num_threads(1)
classes = int(sys.argv[1])
net = torch.nn.Sequential(
    torch.nn.Linear(100, 100), torch.nn.Tanh(), torch.nn.Linear(100, int(sys.argv[2])),
    torch.nn.Tanh(), torch.nn.Linear(int(sys.argv[2]), classes),
).eval()
generator = torch.Generator().manual_seed(0)
x = torch.randn(256, 100, generator=generator)
y = torch.randint(classes, (256,), generator=generator)
def run(count):
    return pf.laplace(net, (x[:count], y[:count]), pf.Categorical(), method="sampled",
                      num_draws=16, prior_precision=1.0, tolerance=0.3)
small = torch.nn.Linear(100, 2)
pf.laplace(small, (x[:8], y[:8] % 2), pf.Categorical(), method="sampled", num_draws=2,
           prior_precision=1.0).predict(x[:4])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
posterior = run(256)
posterior.predict(x[:64])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(posterior.model.space.size, (after - before) / 1024)
"""


@pytest.mark.parametrize(("classes", "width"), [(100, 54), (1000, 10)])
def test_memory_does_not_grow_with_the_outputs(classes, width):
    # 21,000 weights: a Jacobian of 256 examples would take 2 GB and 20 GB.
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(classes), str(width)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    size, megabytes = (float(word) for word in done.stdout.split())
    assert 20_000 < size < 23_000
    assert megabytes < 300


def test_evidence_by_hand():
    # One weight, one example: everything is a formula.
    line = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        line.weight.fill_(2.0)
    x, y = torch.tensor([[3.0]]).double(), torch.tensor([[5.0]]).double()
    posterior = pf.laplace(line, (x, y), pf.Gaussian(0.5), prior_precision=4.0)
    variance = 9 / 4 + 0.5
    expected = -0.5 * (25 / variance + log(2 * torch.pi * variance))
    assert posterior.log_evidence.value.item() == pytest.approx(expected, rel=1e-10)
    precision = 9 / 0.5 + 4
    prediction = posterior.predict(torch.tensor([[1.0]]).double())
    assert prediction.mean.item() == 2.0
    assert prediction.epistemic_variance.item() == pytest.approx(1 / precision)
    assert posterior.effective_dimension.value.item() == pytest.approx(18 / precision)


# --- weights that were never trained ------------------------------------------------------------


class Branches(nn.Module):
    """Two groups of weights, all of a size that says nothing of the prior."""

    def __init__(self, by):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3).double(), nn.Linear(2, 3).double()
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(by * numbers(*p.shape, seed=60 + i))

    def forward(self, x):
        return self.a(x[:, :2]) + self.b(x[:, 2:].sin())


def untrained(by, likelihood=None):
    x = numbers(120, 4, seed=70)
    outputs = x @ numbers(4, 3, seed=71)
    if isinstance(likelihood, pf.Gaussian):
        return Branches(by), x, outputs + 0.1 * numbers(120, 3, seed=72)
    return Branches(by), x, (outputs + 2 * numbers(120, 3, seed=72)).argmax(-1)


@pytest.mark.parametrize("kind", ["isotropic", "layerwise", "gprior"])
@pytest.mark.parametrize("by", [0.0, 1e-4, 1e-3, 1e-2])
def test_weights_that_are_small_for_want_of_training_do_not_hold_the_precision(kind, by):
    net, x, y = untrained(by)
    found = pf.laplace(net, (x, y), pf.Categorical(), method="exact", prior=kind)
    dense = DenseModel.of(net, x, y, categorical)
    dense = dense.g_prior() if kind == "gprior" else dense
    index = FunctionalModel.of(net).space.layer_index()
    groups = index if kind == "layerwise" else torch.zeros_like(index)
    expected, _ = mackay(dense, groups, 1.0)
    torch.testing.assert_close(precisions(found), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        found.log_evidence.value, dense.log_evidence(expected[groups]), rtol=1e-7, atol=0
    )
    assert {c.name: c.status for c in found.checks} == {
        "prior-settled": "pass",
        "prior-not-pruned": "pass",
    }
    drawn = pf.laplace(
        net, (x, y), pf.Categorical(), method="sampled", prior=kind, num_draws=16, progress=False
    )
    # Learned from eight draws, so that the effective dimensions have errors of a fifth or so.
    assert (precisions(drawn) / expected).log().abs().max() < 1
    assert {c.name: c.status for c in drawn.checks}["prior-not-pruned"] == "pass"


@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_a_change_that_begins_at_zero_is_learned_with_the_noise(method):
    net, x, y = untrained(0.0, pf.Gaussian())
    base = untrained(0.3)[0].state_dict()

    def changed(p, inputs):
        moved = {name: value + p[f"d_{name}".replace(".", "_")] for name, value in base.items()}
        return torch.func.functional_call(net, moved, (inputs,))

    zeros = {f"d_{name}".replace(".", "_"): torch.zeros_like(v) for name, v in base.items()}
    model = FunctionalModel(changed, zeros)
    found = pf.laplace(model, (x, y), pf.Gaussian(), method=method, num_draws=16, seed=1)
    dense = DenseModel.of(net, x, y - torch.func.functional_call(net, base, (x,)), gaussian(0.1))
    best = type_two_maximum(dense, 1.0, 0.1)
    exactness = (1e-5, 1e-5) if method == "exact" else (1.0, 0.1)
    assert found.prior.precision.log().item() == pytest.approx(
        best[0].log().item(), abs=exactness[0]
    )
    assert found.noise_variance == pytest.approx(best[1].item(), rel=exactness[1])


@pytest.mark.parametrize("kind", ["isotropic", "layerwise", "gprior"])
@pytest.mark.parametrize("method", ["exact", "sampled"])
@pytest.mark.parametrize("by", [0.0, 1.0])
def test_labels_without_a_pattern_switch_the_weights_off(kind, method, by):
    # Every input has every label: the best function is none at all.
    net, x, _ = untrained(by)
    x, y = x.repeat(3, 1), torch.arange(3).repeat_interleave(len(x))
    found = pf.laplace(net, (x, y), pf.Categorical(), method=method, prior=kind, num_draws=16)
    checks = {c.name: c.status for c in found.checks}
    assert checks["prior-settled"] == "pass"
    assert checks["prior-not-pruned"] == "warn"
    assert found.effective_dimension.value < 0.1
