"""Defects that were found once in the linearised Laplace posterior and must not come back."""

import pytest
import torch
from torch import nn

import pushforward as pf
from pushforward.errors import DataError, NetworkError, OptionError


def _classification(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype).eval()
    return net, (torch.randn(30, 3, dtype=dtype), torch.randint(0, 3, (30,)))


def _sampled(net, data, likelihood, **options):
    return pf.laplace(
        net, data, likelihood, method="sampled", num_draws=32, progress=False, **options
    )


def _check(posterior, name):
    return next(check for check in posterior.checks if check.name == name)


def test_draws_lost_in_float32_are_told_of():
    net, data = _classification()
    posterior = _sampled(net, data, pf.Categorical(), prior_precision=1e-12)
    # The solver's own estimate, held against an impossible effective dimension, was content.
    assert _check(posterior, "draws-solved").status == "warn"


def test_the_same_problem_is_solved_in_float64():
    net, data = _classification(torch.float64)
    posterior = _sampled(net, data, pf.Categorical(), prior_precision=1e-4)
    assert _check(posterior, "draws-solved").status == "pass"
    exact = pf.laplace(net, data, pf.Categorical(), method="exact", prior_precision=1e-4)
    gamma = posterior.effective_dimension
    assert abs(float(gamma) - float(exact.effective_dimension)) < 4 * float(gamma.standard_error)


def test_without_any_curvature_the_solver_error_is_a_number():
    net, data = nn.Linear(3, 2, bias=False), (torch.zeros(9, 3), torch.zeros(9, dtype=torch.long))
    posterior = _sampled(net, data, pf.Categorical(), prior_precision=1.0)
    assert "nan" not in _check(posterior, "draws-solved").detail
    assert float(posterior.effective_dimension) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype):
    net, data = _classification(dtype)
    with pytest.raises(NetworkError, match=r"net\.float\(\)"):
        _sampled(net, data, pf.Categorical())


@pytest.mark.parametrize("noise", [1e-20, 1e20])
def test_learned_noise_scales_with_the_units_of_the_targets(noise):
    torch.manual_seed(0)
    x, unit = torch.randn(60, 2, dtype=torch.float64), noise**0.5
    y = unit * (x @ torch.tensor([[1.0], [2.0]], dtype=torch.float64) + torch.randn(60, 1).double())
    net = nn.Linear(2, 1).double()
    with torch.no_grad():
        solution = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], 1), y).solution
        net.weight.copy_(solution[:2].T)
        net.bias.copy_(solution[2])
    options = {"prior_precision": 1e-2 / noise}
    exact = pf.laplace(net, (x, y), pf.Gaussian(), method="exact", progress=False, **options)
    sampled = _sampled(net, (x, y), pf.Gaussian(), **options)
    assert 0.5 * noise < exact.noise_variance < 2 * noise
    assert sampled.noise_variance == pytest.approx(exact.noise_variance, rel=0.05)


def test_noise_that_vanishes_is_told_of():
    torch.manual_seed(0)
    net, x = nn.Linear(3, 1), torch.randn(30, 3)
    posterior = pf.laplace(
        net, (x, torch.zeros(30, 1)), pf.Gaussian(), method="exact", progress=False
    )
    assert _check(posterior, "noise-not-vanished").status == "warn"


def test_no_noise_at_all_is_refused():
    net, x = nn.Linear(3, 1), torch.randn(30, 3)
    with pytest.raises(DataError, match="noise_variance"):
        pf.laplace(net, (x, net(x).detach()), pf.Gaussian(), progress=False)


def test_a_precision_lost_in_rounding_is_explained():
    net, (x, y) = _classification()
    with pytest.raises(OptionError, match="larger precision"):
        pf.laplace(net, (x, y), pf.Categorical(), method="exact", prior_precision=1e-20)


@pytest.mark.wrong_types
@pytest.mark.parametrize("precision", ["big", 1j, [1.0, None], {"0": "a", "2": 1.0}])
def test_precisions_that_are_no_numbers_are_refused(precision):
    net, data = _classification()
    with pytest.raises(OptionError, match="prior_precision"):
        pf.laplace(net, data, pf.Categorical(), prior="layerwise", prior_precision=precision)


def test_inputs_of_another_dtype_are_explained():
    net, (x, y) = _classification()
    with pytest.raises(NetworkError, match=r"float64 .* to torch\.float32"):
        pf.laplace(net, (x.double(), y), pf.Categorical())
    posterior = pf.laplace(net, (x, y), pf.Categorical(), prior_precision=1.0, progress=False)
    with pytest.raises(NetworkError, match=r"to torch\.float32"):
        posterior.predict(x.double())


@pytest.mark.wrong_types
def test_a_plain_function_is_refused_as_network():
    with pytest.raises(NetworkError, match="FunctionalModel"):
        pf.laplace(lambda x: x, (torch.zeros(3, 1), torch.zeros(3, 1)), pf.Gaussian(1.0))


def test_batch_normalisation_without_statistics_is_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    _, data = _classification()
    with pytest.raises(NetworkError, match="track_running_stats"):
        pf.laplace(net, data, pf.Categorical())


def test_a_checkpoint_that_cannot_be_written_is_told_of_before_the_work(tmp_path, monkeypatch):
    net, data = _classification()
    (tmp_path / "file").write_text("")

    def work(*_arguments):
        raise AssertionError("work was done first")

    monkeypatch.setattr("pushforward.linearised_laplace.resumable.step", work)
    with pytest.raises(OptionError, match="folder"):
        _sampled(net, data, pf.Categorical(), checkpoint=tmp_path / "file")


def test_a_posterior_is_not_saved_over_a_folder(tmp_path):
    net, data = _classification()
    posterior = pf.laplace(net, data, pf.Categorical(), prior_precision=1.0, progress=False)
    with pytest.raises(OptionError, match="folder"):
        posterior.save(tmp_path)


@pytest.mark.parametrize("prior", ["isotropic", "layerwise", "gprior"])
def test_the_precision_of_weights_without_curvature_is_a_number(prior):
    net = nn.Linear(3, 2, bias=False)
    data = torch.zeros(9, 3), torch.zeros(9, dtype=torch.long)
    posterior = pf.laplace(net, data, pf.Categorical(), prior=prior, method="exact", progress=False)
    assert bool(torch.isfinite(posterior.prior.precision).all())
    assert _check(posterior, "prior-not-pruned").status == "warn"
