"""The public names exist, are lazy, and importing them costs no plotting or statistics package."""

import importlib
import subprocess
import sys

import pytest

import pushforward

SLOW = ("matplotlib", "sklearn", "scipy.stats", "pandas", "xarray", "arviz_stats")


def run(code):
    """Run code in a fresh interpreter; its output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", pushforward.__all__)
def test_every_public_name_is_what_its_home_defines(name):
    home = importlib.import_module(f"pushforward.{pushforward._HOMES[name]}")
    assert getattr(pushforward, name) is getattr(home, name)
    assert name in home.__all__


def test_the_list_is_complete():
    assert sorted(pushforward.__all__) == sorted(pushforward._HOMES)
    assert set(dir(pushforward)) == {*pushforward.__all__, "__version__"}


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'propagat'"):
        pushforward.propagat  # noqa: B018


def test_the_version_is_the_installed_one():
    from importlib.metadata import version

    assert pushforward.__version__ == version("pushforward")


def test_importing_is_lazy():
    loaded = run(
        "import sys, pushforward\n"
        "print([m for m in sys.modules if m.startswith('pushforward.')], 'torch' in sys.modules)"
    )
    assert loaded == "[] False"


def test_using_every_name_imports_nothing_slow():
    loaded = run(
        "import sys, pushforward\n"
        "for name in pushforward.__all__: getattr(pushforward, name)\n"
        f"print([m for m in {SLOW!r} if m in sys.modules])"
    )
    assert loaded == "[]"


def test_a_propagation_imports_nothing_slow():
    loaded = run(
        "import sys, torch, pushforward as pf\n"
        "net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 2))\n"
        "out = pf.propagate(net, pf.GaussianLaw.standard(3))\n"
        "out.tail_probability(0.1); out.quantile(0.9); repr(out); out.to_dict()\n"
        "pf.monte_carlo(net, pf.GaussianLaw.standard(3), 1000)\n"
        f"print([m for m in {SLOW!r} if m in sys.modules])"
    )
    assert loaded == "[]"


def test_importing_leaves_the_random_state_alone():
    unchanged = run(
        "import torch\n"
        "before = torch.get_rng_state()\n"
        "import pushforward as pf\n"
        "net = torch.nn.ReLU()\n"
        "law = pf.GaussianLaw.standard(3)\n"
        "pf.propagate(net, law); pf.monte_carlo(net, law, 100)\n"
        "print(bool((torch.get_rng_state() == before).all()))"
    )
    assert unchanged == "True"
