"""Which examples a summary keeps apart: classes given by labels, or clusters of the inputs."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pushforward.errors import DataError, OptionError
from pushforward.networks.data import Examples
from pushforward.options import whole_number
from pushforward.runs.rng import derived_seed, stream

__all__ = ["cluster_inputs", "label_components"]

_BATCH_SIZE = 1024
_CLUSTERED = 10_000  # examples that decide where the centres are


def label_components(
    examples: Examples, classes: Literal["targets"] | Tensor | Any, num_classes: int | None = None
) -> Int64[Tensor, " N"]:
    """The component of every example from labels.

    Parameters
    ----------
    examples
        The data.
    classes
        ``"targets"``, or a label for each example.
    num_classes
        How many there are, where not all of them need occur.

    Returns
    -------
    Tensor
        Numbers from 0; every one occurs unless `num_classes` is given.

    Raises
    ------
    OptionError
        For another word than ``"targets"``.
    DataError
        When labels are no whole numbers from 0, their number is not that of the examples, or a
        class between others has no example.
    """
    if isinstance(classes, str):
        if classes != "targets":
            raise OptionError(
                f"{classes!r}", where="classes", advice='Give "targets", or a label an example.'
            )
        parts = [batch.targets for batch in examples.batches(_BATCH_SIZE)]
        if any(part is None for part in parts):
            raise DataError(
                "the data have no targets", where="classes", advice="Give a label an example."
            )
        labels = torch.cat([part for part in parts if part is not None])
    else:
        try:
            labels = torch.as_tensor(classes)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{type(classes).__name__} holds no numbers ({error})",
                where="classes",
                advice="Give one whole number from 0 for each example; numpy.unique(names, "
                "return_inverse=True)[1] numbers names.",
            ) from error
    labels = labels.cpu()
    whole = not labels.is_floating_point() and not labels.is_complex()
    if labels.shape != (examples.num_examples,) or not whole or int(labels.min()) < 0:
        raise DataError(
            f"{labels.dtype} labels of shape {tuple(labels.shape)} for {examples.num_examples} "
            "examples",
            where="classes",
            advice="Give one whole number from 0 for each example.",
        )
    labels = labels.long()
    if num_classes is not None and int(labels.max()) >= num_classes:
        raise DataError(
            f"label {int(labels.max())} with num_classes={num_classes}",
            where="classes",
            advice="Number the classes from 0.",
        )
    empty = torch.nonzero(torch.bincount(labels) == 0)[:, 0].tolist()
    if empty and num_classes is None:
        raise DataError(
            f"class {empty[0]} has no example"
            + (f", like {len(empty) - 1} more" * (len(empty) > 1)),
            where="classes",
            advice="Give num_classes= if this is a part of the data that lacks some of them; else "
            "number those that occur without gaps, torch.unique(labels, return_inverse=True)[1].",
        )
    return labels


def cluster_inputs(examples: Examples, clusters: int, seed: int) -> Int64[Tensor, " N"]:
    """The component of every example by k-means on the flattened inputs.

    Parameters
    ----------
    examples
        The data.
    clusters
        How many.
    seed
        Of the first centres.

    Returns
    -------
    Tensor
        Numbers from 0, every one of which occurs; fewer than `clusters` if some stay empty.

    Raises
    ------
    OptionError
        When there are fewer examples than clusters, or the inputs are no tensor.
    """
    clusters = whole_number(
        clusters,
        "clusters",
        most=examples.num_examples,
        advice=f"Choose from 1 to the number of examples, {examples.num_examples}.",
    )
    from scipy.cluster.vq import kmeans2  # takes a while to import

    generator = stream(seed, "clusters")
    order = torch.randperm(examples.num_examples, generator=generator)[:_CLUSTERED]
    sample = _rows(examples.select(order).inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clusters that stay empty are dropped below
        centres, _ = kmeans2(
            sample.numpy(), clusters, minit="++", rng=derived_seed(seed, "clusters")
        )
    points = torch.from_numpy(centres)
    nearest = [
        torch.cdist(_rows(batch.inputs), points).argmin(1)
        for batch in examples.batches(_BATCH_SIZE)
    ]
    return torch.unique(torch.cat(nearest), return_inverse=True)[1]


def _rows(inputs: Any) -> Float[Tensor, "B d"]:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise OptionError(
            "inputs that are no floating-point tensor cannot be clustered",
            where="clusters",
            advice="Give classes, or neither.",
        )
    return inputs.flatten(1).to("cpu", torch.float64)
