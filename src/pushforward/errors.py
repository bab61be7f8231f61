"""Errors that say what is wrong, where it is, and what to do about it."""

from __future__ import annotations

__all__ = [
    "DataError",
    "LawError",
    "NetworkError",
    "OptionError",
    "PushforwardError",
    "ResourceError",
    "SamplingError",
    "ShapeError",
    "UnsupportedLayerError",
    "WeightsError",
]


class PushforwardError(Exception):
    """Base of every error that the library raises on purpose.

    Parameters
    ----------
    what
        What is wrong, as a clause without a full stop.
    where
        The argument, module path or file in which it was found.
    advice
        What the reader can do about it, as a sentence.
    """

    def __init__(self, what: str, *, where: str, advice: str) -> None:
        self.what = what
        self.where = where
        self.advice = advice
        super().__init__(f"{where}: {what}. {advice}")

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments would otherwise be lost between processes (pytest-xdist, loaders).
        return _rebuild, (type(self), self.what, self.where, self.advice)


def _rebuild(kind: type[PushforwardError], what: str, where: str, advice: str) -> PushforwardError:
    return kind(what, where=where, advice=advice)


class LawError(PushforwardError, ValueError):
    """A law is not one: covariance not symmetric or indefinite, NaN, unusable moments."""


class ShapeError(PushforwardError, ValueError):
    """Sizes that do not fit together: features, dimensions of a law, rows of a matrix."""


class OptionError(PushforwardError, ValueError):
    """An option outside its closed list or range."""


class UnsupportedLayerError(PushforwardError, TypeError):
    """A module or function for which no propagation rule is known, or that cannot be traced."""


class NetworkError(PushforwardError, ValueError):
    """A network that cannot be used as it is: NaN weights, training mode, mixed devices."""


class WeightsError(PushforwardError, ValueError):
    """A weight file that does not belong to the network, or that is damaged."""


class DataError(PushforwardError, ValueError):
    """Data that cannot be read, is empty, changes its shape, or holds NaN."""


class SamplingError(PushforwardError, RuntimeError):
    """Chains that cannot go on: all of them left for NaN or infinity."""


class ResourceError(PushforwardError, MemoryError):
    """More memory than there is; the message says how much and what would need less."""
