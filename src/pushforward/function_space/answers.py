"""What a measure can be asked, and the one number with which it answers."""

from __future__ import annotations

from collections.abc import Iterable
from inspect import Parameter, signature

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pushforward.errors import NetworkError, OptionError
from pushforward.function_space.measure import DistanceMeasure
from pushforward.function_space.network import Other, ReferenceNetwork, unwrapped

__all__ = ["as_distance", "check_finite", "check_options", "weights_dtype"]


def weights_dtype(reference: ReferenceNetwork, other: Other) -> torch.dtype:
    """Type in which another network gets its distance.

    Parameters
    ----------
    reference
        The network that distances are measured from.
    other
        A module of the same architecture, or its tensors by name.

    Returns
    -------
    dtype
        That of the other parameters, and of half precision float32: a squared difference of two
        outputs soon leaves the range of float16, from 6e-8 to 65,504, at either end.
    """
    given = dict(unwrapped(other).named_parameters()) if isinstance(other, nn.Module) else other
    kinds = [given[name].dtype for name in reference.parameter_names if name in given]
    own = next((kind for kind in kinds if kind.is_floating_point), reference.dtype)
    return torch.promote_types(own, torch.float32)


def as_distance(
    value: Float[Tensor, ""], reference: ReferenceNetwork, other: Other
) -> Float[Tensor, ""]:
    """A number as a measure returns it.

    Parameters
    ----------
    value
        A distance in float64.
    reference
        The network that it is measured from.
    other
        The weights that it is about.

    Returns
    -------
    Tensor
        In the type of `weights_dtype`, with its history.

    Raises
    ------
    NetworkError
        If it is not finite there.
    """
    found = value.to(weights_dtype(reference, other))
    check_finite(found)
    return found


def check_finite(values: Float[Tensor, "..."]) -> None:
    """Refuse weights whose distance is no number.

    Parameters
    ----------
    values
        Distances.

    Raises
    ------
    NetworkError
        If one is NaN or infinite.
    """
    if not bool(torch.isfinite(values.detach()).all()):
        name = str(values.dtype).removeprefix("torch.")
        raise NetworkError(
            f"its outputs are not finite, or too far away for a distance in {name}",
            where="other",
            advice="Load a checkpoint from before training diverged.",
        )


def check_options(measure: DistanceMeasure, names: Iterable[str]) -> None:
    """Refuse options that the ``distance`` of a measure does not take.

    Parameters
    ----------
    measure
        Which.
    names
        Of arguments that would be passed by keyword.

    Raises
    ------
    OptionError
        Under the name of the option, or as ``options`` if there are several.
    """
    known = signature(measure.distance).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in known.values()):
        return
    unknown = [name for name in names if name not in known]
    if unknown:
        raise OptionError(
            f"{type(measure).__name__}.distance does not take {', '.join(unknown)}",
            where=unknown[0] if len(unknown) == 1 else "options",
            advice=f"It takes {', '.join(known)}.",
        )
