"""What one round of learning the prior takes for a ResNet-50 with 1,000 outputs.

    python -m reproductions.large_network --images 32 --draws 4

The weights are random and the images are noise: time and memory do not depend on either. Every
building block of a round is run on a few images, with its memory; a round over a whole data set is
extrapolated from them, and said to be.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import pushforward as pf
from pushforward.linalg.conjugate_gradients import advance, begin
from pushforward.linearised_laplace.linear_model import LinearModel
from pushforward.linearised_laplace.priors import Prior
from pushforward.linearised_laplace.sampled import prior_draws, right_hand_sides
from pushforward.networks.data import Examples
from pushforward.networks.model import FunctionalModel
from pushforward.runs.plan import format_bytes, format_seconds
from reproductions.networks import resnet50

__all__ = ["LargeNetwork", "main", "measure"]

_IMAGENET = 1_281_167
_STEPS = 6  # of conjugate gradients: what a later round takes on the problems measured here


@dataclass(frozen=True)
class LargeNetwork:
    """Measure the passes of one round of learning the prior.

    Parameters
    ----------
    images
        Noise images.
    draws
        Posterior draws that are solved together.
    size
        Height and width of the images, in pixels.
    device
        Such as cpu or cuda.
    output
        JSON file for the result; default none.
    """

    images: int = 32
    draws: int = 4
    size: int = 224
    device: str = "cpu"
    output: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement from the command line.

    Returns
    -------
    int
        0.
    """
    import tyro

    options = tyro.cli(LargeNetwork, args=argv)
    result = measure(options)
    text = json.dumps(result, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(_table(result))
    return 0


def measure(options: LargeNetwork) -> dict[str, Any]:
    """Sketch, a step of the solver and the estimate of the precision, on a few images.

    Returns
    -------
    dict
        Seconds and peak memory of each, and what they would take on all of ImageNet.
    """
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.images, 3, options.size, options.size, generator=generator)
    labels = torch.randint(0, 1000, (options.images,), generator=generator)
    before = _peak(device)
    net = resnet50().to(device)
    model = FunctionalModel.of(net)
    linear = LinearModel(
        model,
        Examples.read((images, labels), device=device),
        pf.Categorical(),
        Prior.start("isotropic", model.space, 1.0, device),
    )
    seconds: dict[str, float] = {}
    network_bytes = _peak(device)

    def timed(name: str, began: float) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[name] = perf_counter() - began

    began = perf_counter()
    sketch = linear.sketch(range(options.draws), seed=0)
    timed("sketch", began)
    prior = linear.prior.with_scale(sketch.diagonal)
    linear = linear.with_prior(prior)
    draws = range(options.draws)
    start = prior_draws(prior, sketch.vectors, draws, 0)
    right = right_hand_sides(prior, sketch.vectors, draws, 0, None)
    precision = prior.diagonal(model.dtype)

    def product(vectors: torch.Tensor) -> torch.Tensor:
        return linear.product(vectors) + precision * vectors

    def precondition(vectors: torch.Tensor) -> torch.Tensor:
        return vectors / precision

    began = perf_counter()
    state = begin(product, right, start, precondition)
    state = advance(state, product, precondition)
    timed("two products", began)
    began = perf_counter()
    (state.solution * linear.product(state.solution)).sum(1)
    timed("effective dimension", began)
    one_pass = (seconds["two products"] + seconds["effective dimension"]) / 3
    per_image = one_pass / options.images
    round_passes = _STEPS + 2  # and the sketch, which costs half a pass
    return {
        "parameters": model.space.size,
        "outputs": 1000,
        "images": options.images,
        "pixels": options.size,
        "draws": options.draws,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "seconds a pass": one_pass,
        "seconds an image and draw": per_image / options.draws,
        "bytes before the network": before,
        "bytes with the network": network_bytes,
        "peak bytes": _peak(device),
        "extrapolated": {
            "images": _IMAGENET,
            "solver steps a round": _STEPS,
            "seconds a round": (round_passes * per_image + seconds["sketch"] / options.images)
            * _IMAGENET,
        },
    }


def _peak(device: torch.device) -> float:
    """Largest memory of this process so far, in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) * (1 if sys.platform == "darwin" else 1024)


def _table(result: dict[str, Any]) -> str:
    whole = result["extrapolated"]
    network = result["bytes with the network"]
    rows = {
        "uncertain parameters, outputs": f"{result['parameters']:,}, {result['outputs']:,}",
        "images, draws": f"{result['images']} of {result['pixels']} pixels, {result['draws']}",
        "a pass with all draws": format_seconds(result["seconds a pass"]),
        "an image and draw": f"{result['seconds an image and draw']:.3g} s",
        "memory, network and images": format_bytes(network),
        "memory, peak": format_bytes(result["peak bytes"]),
        f"a round over {whole['images']:,} images, extrapolated": format_seconds(
            whole["seconds a round"]
        ),
    }
    return "\n".join(f"{name:55} {value}" for name, value in rows.items())


if __name__ == "__main__":
    sys.exit(main())
