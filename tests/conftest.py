"""Settings of every test run, and how tests behave when types are checked (`make shapes`)."""

from contextlib import contextmanager

import jaxtyping
import pytest
import torch

# The tensors of the tests are small; threads would only compete with pytest-xdist's workers.
torch.set_num_threads(1)


def _types_are_checked(config):
    return bool(config.getoption("jaxtyping_packages", default=None))


def pytest_collection_modifyitems(config, items):
    if _types_are_checked(config):
        skip = pytest.mark.skip(reason="passes wrong types on purpose")
        for item in items:
            if item.get_closest_marker("wrong_types"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _either_refusal_will_do(request, monkeypatch):
    """Skip a test of a refusal where the run-time type check refuses before the library can."""
    if not _types_are_checked(request.config):
        return
    raises = pytest.raises

    def patched(expected, *args, **kwargs):
        if args:  # the call form: raises(Error, function, ...)
            return raises(expected, *args, **kwargs)
        return _raises_or_skips(raises(expected, **kwargs))

    monkeypatch.setattr(pytest, "raises", patched)


@contextmanager
def _raises_or_skips(context):
    with context as caught:
        try:
            yield caught
        except jaxtyping.TypeCheckError:
            pytest.skip("the run-time type check refuses first")
