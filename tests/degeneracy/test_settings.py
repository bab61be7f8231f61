"""Options: which are refused, and what those that were left open become."""

from math import inf, nan

import pytest

from degeneracy_problems import UNIT, neighbourhood, regression
from pushforward.degeneracy import settings as module
from pushforward.degeneracy.settings import Settings
from pushforward.errors import OptionError


@pytest.mark.parametrize("value", [0, 0.0, -1.0, nan, inf, -inf])
@pytest.mark.parametrize("name", ["nbeta", "localization", "step_size"])
def test_numbers_have_to_be_positive(name, value):
    with pytest.raises(OptionError, match=name) as caught:
        Settings(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("metric", "fisher", "'euclidean', 'layerwise'"),
        ("sampler", "nuts", "'auto', 'langevin', 'sgld', 'hmc', 'mala'"),
    ],
)
def test_names_that_there_are_not(name, value, choices):
    with pytest.raises(OptionError, match=f"{name}: there is no {name} '{value}'") as caught:
        Settings(**{name: value})
    assert choices in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("num_chains", 1, 2),
        ("num_chains", 0, 2),
        ("num_chains", -4, 2),
        ("num_draws", 15, 16),
        ("num_draws", 0, 16),
        ("num_warmup", -1, 0),
    ],
)
def test_counts_that_are_too_small(name, value, least):
    with pytest.raises(OptionError, match=f"{name}: {value} is out of range.*from {least} on"):
        Settings(**{name: value})


@pytest.mark.wrong_types
@pytest.mark.parametrize("name", ["num_chains", "num_draws", "num_warmup"])
@pytest.mark.parametrize("value", [20.0, True, "20"])
def test_counts_are_integers(name, value):
    with pytest.raises(OptionError, match=name):
        Settings(**{name: value})


@pytest.mark.wrong_types
@pytest.mark.parametrize("value", [None, True, "small", [0.1]])
def test_step_sizes_are_numbers(value):
    with pytest.raises(OptionError, match=r"^step_size: .* is no number"):
        Settings(step_size=value)


@pytest.mark.wrong_types
@pytest.mark.parametrize("name", ["nbeta", "localization"])
@pytest.mark.parametrize("value", ["strong", True])
def test_temperature_and_localization_are_numbers(name, value):
    with pytest.raises(OptionError, match=name):
        Settings(**{name: value})


def test_the_least_that_is_allowed():
    found = Settings(num_chains=2, num_draws=16, num_warmup=0)
    assert (found.num_chains, found.num_draws, found.num_warmup) == (2, 16, 0)


def test_integers_are_numbers():
    found = Settings(step_size=1, nbeta=1, localization=2)
    assert found.fixed_step == 1.0
    assert isinstance(found.fixed_step, float)


def test_what_is_left_open():
    found = Settings()
    assert found.fixed_step is None
    assert [found.draws_of(name) for name in ("hmc", "langevin", "sgld", "mala")] == [
        300,
        2000,
        2000,
        2000,
    ]
    assert Settings(num_draws=77).draws_of("hmc") == 77


def test_the_sampler_is_exact_where_that_is_cheap(monkeypatch):
    net, data, _ = regression()
    around = neighbourhood(net, data)
    assert Settings().sampler_for(around) == "hmc"
    for name in ("langevin", "sgld", "hmc", "mala"):
        assert Settings(sampler=name).sampler_for(around) == name
    for limit, count in (("_HMC_PARAMETERS", 4), ("_HMC_SIZE", 400)):
        with monkeypatch.context() as patched:
            patched.setattr(module, limit, count)
            assert Settings().sampler_for(around) == "hmc"
            patched.setattr(module, limit, count - 1)
            assert Settings().sampler_for(around) == "langevin"
    assert Settings(batch_size=10).sampler_for(around) == "langevin"
    assert Settings(step_size=0.1).sampler_for(around) == "langevin"


def test_options_reach_the_neighbourhood():
    net, data, _ = regression()
    found = Settings(nbeta=7.0, localization=3.0, batch_size=10).neighbourhood(
        net, data, UNIT, subset=None, realisable=False, seed=0
    )
    assert (found.nbeta, found.localization, found.metric) == (7.0, 3.0, "euclidean")
    assert found.potential.batch_size == 10
