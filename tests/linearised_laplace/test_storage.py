"""A posterior comes back from its file as it was, and goes with its own network only."""

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import pushforward as pf
from pushforward.errors import NetworkError, OptionError, WeightsError
from pushforward.linearised_laplace.exact import DualFactor, PrimalFactor
from pushforward.linearised_laplace.storage import load_posterior, save_posterior
from pushforward.networks.model import FunctionalModel
from pushforward.runs.store import load_tensors, save_tensors

LIKELIHOODS = {
    "categorical": pf.Categorical(),
    "bernoulli": pf.Bernoulli(),
    "poisson": pf.Poisson(),
    "gaussian": pf.Gaussian(),
    "two noises": pf.Gaussian([0.1, 0.3, 0.2]),
}


def network(width=5, outputs=3, dtype=torch.float64, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.LayerNorm(width), nn.Linear(width, outputs)
        )
    return net.to(dtype).eval()


def examples(net, likelihood, count=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    parameter = next(net.parameters())
    x = torch.randn(count, 2, generator=generator, dtype=parameter.dtype)
    law = likelihood.with_noise(0.1) if isinstance(likelihood, pf.Gaussian) else likelihood
    with torch.no_grad():
        return x, law.sample(net(x), generator)


def make(likelihood=LIKELIHOODS["categorical"], net=None, count=24, **options):
    net = network() if net is None else net
    data = examples(net, likelihood, count)
    options = {"prior_precision": 2.0, "num_draws": 6, "seed": 3} | options
    return net, pf.laplace(net, data, likelihood, **options)


def assert_same(first, second, x, *, links=("probit", "monte_carlo")):
    assert first.to_dict() | {"plan": None} == second.to_dict()
    assert torch.equal(first.draws, second.draws)
    for link in links:
        ours, theirs = first.predict(x, link=link), second.predict(x, link=link)
        for name in ("mean", "epistemic_variance", "expected", "map_expected", "standard_error"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), (link, name)
        if ours.noise_variance is not None:
            assert torch.equal(ours.noise_variance, theirs.noise_variance)


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_predictions_are_the_same_bit_for_bit(tmp_path, kind, method):
    net, posterior = make(LIKELIHOODS[kind], method=method, prior_precision=None)
    path = tmp_path / "folder" / "posterior.safetensors"
    posterior.save(path)
    loaded = pf.LaplacePosterior.load(path, net)
    assert loaded.plan is None
    assert loaded.likelihood == posterior.likelihood
    assert loaded.rounds == posterior.rounds
    assert len(loaded.rounds) > 0
    assert loaded.checks == posterior.checks
    assert torch.equal(loaded.mode, posterior.mode)
    assert_same(posterior, loaded, torch.linspace(-2, 2, 10, dtype=torch.float64).reshape(5, 2))


@pytest.mark.parametrize("prior", ["isotropic", "layerwise", "gprior"])
@pytest.mark.parametrize(("count", "kind"), [(24, PrimalFactor), (3, DualFactor)])
def test_either_factor_in_any_prior_comes_back(tmp_path, prior, count, kind):
    net, posterior = make(prior=prior, method="exact", count=count)
    assert isinstance(posterior._factor, kind)
    save_posterior(posterior, tmp_path / "p.safetensors")
    loaded = load_posterior(tmp_path / "p.safetensors", net)
    assert isinstance(loaded._factor, kind)
    assert loaded.prior.kind == prior
    assert loaded.prior_precision == posterior.prior_precision
    assert_same(posterior, loaded, torch.ones(4, 2, dtype=torch.float64))


def test_temperature_evidence_and_float32_come_back(tmp_path):
    net, posterior = make(net=network(dtype=torch.float32), method="sampled", evidence=True)
    posterior = posterior.with_temperature(0.3)
    posterior.save(tmp_path / "p")
    loaded = pf.LaplacePosterior.load(tmp_path / "p", net)
    assert loaded.temperature == 0.3
    assert loaded.draws.dtype == torch.float32
    assert float(loaded.log_evidence) == float(posterior.log_evidence)
    assert_same(posterior, loaded, torch.ones(4, 2))
    assert_same(posterior.with_temperature(1.0), loaded.with_temperature(1.0), torch.ones(4, 2))


def test_the_subset_is_in_the_file(tmp_path):
    net, posterior = make(subset=("3", "2.weight"))
    posterior.save(tmp_path / "p")
    loaded = pf.LaplacePosterior.load(tmp_path / "p", net)
    assert loaded.prior.space.names == ("2.weight", "3.weight", "3.bias")
    assert_same(posterior, loaded, torch.ones(4, 2, dtype=torch.float64))


def test_functional_models_come_back(tmp_path):
    net = network()
    _, posterior = make(net=net, subset="3")
    posterior.save(tmp_path / "p")
    loaded = pf.LaplacePosterior.load(tmp_path / "p", FunctionalModel.of(net, "3"))
    assert_same(posterior, loaded, torch.ones(4, 2, dtype=torch.float64))
    with pytest.raises(WeightsError, match=r"2 missing \(3.weight, 3.bias\)"):
        pf.LaplacePosterior.load(tmp_path / "p", FunctionalModel.of(net, "0"))


def changed(net, name):
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.get_parameter(name).flatten()[0] += 1e-12
    return other


def deeper():
    net = network()
    net.append(nn.Linear(3, 3).double())
    return net


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda _: network(width=6), "of another shape .0.weight .6, 2. instead of .5, 2."),
        (lambda _: nn.Sequential(nn.Linear(2, 5)).double(), "missing .3.weight, 3.bias"),
        (lambda _: deeper(), "extra .4.weight, 4.bias"),
        (lambda _: network(dtype=torch.float32), "float32 instead of float64"),
        (lambda _: network(seed=5), "only the values differ, in 4 of 6"),
        (lambda net: changed(net, "3.bias"), "only the values differ, in 1 of 6 .* .3.bias."),
    ],
)
def test_other_networks_are_refused_with_what_differs(tmp_path, other, message):
    net, posterior = make()
    posterior.save(tmp_path / "p")
    with pytest.raises(WeightsError, match=message):
        pf.LaplacePosterior.load(tmp_path / "p", other(net))


def test_training_mode_is_refused_as_everywhere(tmp_path):
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5)).double().eval()
    _, posterior = make(net=net)
    posterior.save(tmp_path / "p")
    with pytest.raises(NetworkError, match="training mode"):
        pf.LaplacePosterior.load(tmp_path / "p", net.train())


def test_damaged_files_are_refused(tmp_path):
    net, posterior = make()
    path = tmp_path / "p"
    posterior.save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\x80\x04pickle", whole[:-3] + b"abc"):
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match=r"damaged|safetensors"):
            pf.LaplacePosterior.load(path, net)
    with pytest.raises(WeightsError, match="no such file"):
        pf.LaplacePosterior.load(tmp_path / "absent", net)


def test_a_file_that_lacks_a_part_is_refused(tmp_path):
    net, posterior = make(method="sampled")
    path = tmp_path / "p"
    posterior.save(path)
    tensors, metadata = load_tensors(path, schema="pushforward.laplace", version=1)
    del tensors["draws"]
    save_tensors(path, tensors, metadata, schema="pushforward.laplace", version=1)
    with pytest.raises(WeightsError, match="damaged: its contents do not belong together"):
        pf.LaplacePosterior.load(path, net)


def test_damage_beside_the_tensors_is_noticed_too(tmp_path):
    net, posterior = make(LIKELIHOODS["gaussian"].with_noise(0.5))
    path = tmp_path / "p"
    posterior.save(path)
    whole = path.read_bytes()
    noise = rb"noise_variance\": 0.5"
    assert whole.count(noise) == 1
    path.write_bytes(whole.replace(noise, noise.replace(b"0.5", b"5.5")))
    with pytest.raises(WeightsError, match="damaged"):
        pf.LaplacePosterior.load(path, net)


@pytest.mark.parametrize("path", [None, 7])
def test_what_is_no_path_is_refused(path):
    net, posterior = make()
    with pytest.raises(OptionError, match=f"path: {path} is no path"):
        posterior.save(path)
    with pytest.raises(OptionError, match=f"path: {path} is no path"):
        pf.LaplacePosterior.load(path, net)


@pytest.mark.parametrize("other", [None, torch.sin], ids=["none", "function"])
def test_what_is_no_network_is_refused_as_by_laplace(tmp_path, other):
    _, posterior = make()
    posterior.save(tmp_path / "p")
    with pytest.raises(NetworkError) as expected:
        pf.laplace(other, (torch.ones(2, 2), torch.ones(2)), pf.Gaussian(1.0))
    with pytest.raises(NetworkError) as found:
        pf.LaplacePosterior.load(tmp_path / "p", other)
    assert str(found.value) == str(expected.value)


def test_a_network_without_weights_is_refused(tmp_path):
    _, posterior = make()
    posterior.save(tmp_path / "p")
    with pytest.raises(NetworkError, match="Load the weights first"):
        pf.LaplacePosterior.load(tmp_path / "p", network().to("meta"))


def test_other_kinds_and_newer_versions_are_refused(tmp_path):
    net, posterior = make()
    path = tmp_path / "p"
    posterior.save(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=header | {"version": "2"})
    with pytest.raises(WeightsError, match=r"version '2' of pushforward\.laplace"):
        pf.LaplacePosterior.load(path, net)
    save_file(net.state_dict(), path)
    with pytest.raises(WeightsError, match="not written by this library"):
        pf.LaplacePosterior.load(path, net)


# A network that is trained on, below a posterior that shares its tensors


class Scaled(nn.Module):
    """With a weight, a frozen weight and a buffer, of which only the first is uncertain."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(2, 4), nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x):
        return self.head(self.scale * self.body(x).tanh())


def on_its_head(method="exact"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Scaled().double().eval()
    return make(net=net, subset="head.*", method=method)


USES = {
    "predict": lambda posterior, data, _: posterior.predict(data[0]),
    "output_draws": lambda posterior, data, _: posterior.output_draws(data[0]),
    "log_likelihood": lambda posterior, data, _: posterior.log_likelihood(*data),
    "evaluate": lambda posterior, data, _: posterior.evaluate(data),
    "fit_temperature": lambda posterior, data, _: posterior.fit_temperature(data),
    "weights": lambda posterior, _data, _: posterior.weights(),
    "save": lambda posterior, _data, path: posterior.save(path),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_a_network_that_has_changed_is_refused(tmp_path, use, method):
    net, posterior = on_its_head(method)
    posterior = posterior.with_temperature(0.5)
    data, path = examples(net, LIKELIHOODS["categorical"]), tmp_path / "p"
    before = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net.head.weight.mul_(3)
    with pytest.raises(NetworkError, match=r"changed since .* in 1 of 5 tensors \(head.weight\)"):
        use(posterior, data, path)
    with pytest.raises(NetworkError, match="changed"):  # and not hidden by a new copy
        use(posterior.with_temperature(1.0), data, path)
    assert not path.exists()
    net.load_state_dict(before)
    use(posterior, data, path)


@pytest.mark.parametrize("name", ["head.bias", "body.weight", "scale"])
def test_everything_that_the_outputs_depend_on_is_watched(name):
    net, posterior = on_its_head()
    tensor = net.scale if name == "scale" else net.get_parameter(name)
    x = torch.ones(4, 2, dtype=torch.float64)
    posterior.predict(x)
    tensor.data.neg_()  # past the count of changes that PyTorch keeps
    with pytest.raises(NetworkError, match=rf"in 1 of 5 tensors \({name}\)"):
        posterior.predict(x)
    tensor.data.neg_()
    posterior.predict(x)


def test_a_loaded_posterior_watches_its_network_too(tmp_path):
    net, posterior = make()
    posterior.save(tmp_path / "p")
    loaded = pf.LaplacePosterior.load(tmp_path / "p", net)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    x, y = examples(net, LIKELIHOODS["categorical"])
    nn.functional.cross_entropy(net(x), y).backward()
    optimiser.step()
    # The scale and shift of the normalisation, which are not uncertain, are trained on as well.
    with pytest.raises(NetworkError, match=r"in 6 of 6 tensors \(.*, \.\.\.\)"):
        loaded.predict(x)
