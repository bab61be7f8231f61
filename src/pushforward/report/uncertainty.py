"""The section of the page on how sure a network is: Laplace beside the network alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pushforward.errors import ShapeError
from pushforward.linearised_laplace.calibration import Metric, auroc
from pushforward.linearised_laplace.evaluation import Evaluation, Scores
from pushforward.linearised_laplace.posterior import LaplacePosterior
from pushforward.networks.data import Examples
from pushforward.report.figures import Line, calibration_svg, can_draw, survival_svg
from pushforward.report.formatting import (
    MINUS,
    MISSING,
    duration,
    number,
    with_error,
)
from pushforward.report.page import (
    Cell,
    CheckList,
    Figure,
    Paragraph,
    Section,
    Table,
    Tile,
    Tone,
    Verdict,
)
from pushforward.report.thumbnails import thumbnails
from pushforward.report.uncertain_inputs import Ranking, rank
from pushforward.runs.estimate import Check, worst_status

__all__ = ["uncertainty_section"]

_SIGNIFICANT = 2.0  # standard errors
_LISTED = 12
_FEWEST = 5  # examples in a bin that is drawn
_LAYERS_SHOWN = 20
_GROUPS = 10  # of examples in the figure of a regression
_Z95 = 1.959963984540054


def uncertainty_section(
    posterior: LaplacePosterior,
    data: Any,
    *,
    validation: Any = None,
    labels: Sequence[str] | None = None,
    image_shape: Sequence[int] = (),
    bins: int = 15,
    progress: bool | None = None,
) -> Section:
    """The section of the page on the uncertainty of a network's predictions.

    Parameters
    ----------
    posterior
        What predicts.
    data
        Inputs and targets that the network was not trained on.
    validation
        More such data, on which the temperature of the rival is fitted.
    labels
        Names of the outputs, in order; default their numbers.
    image_shape
        Shape in which to draw an input: (height, width) or (channels, height, width). Default: as
        the inputs have it, if that is a picture's.
    bins
        Of the calibration error.
    progress
        Whether to show a bar; None: on a terminal, when it takes long.

    Returns
    -------
    Section
        For a `Report`.

    Raises
    ------
    ShapeError
        When the labels do not fit the outputs, or `image_shape` not the inputs.
    """
    examples = Examples.read(data, device=posterior.model.device)
    result = posterior.evaluate(examples, validation=validation, bins=bins, progress=progress)
    names = _names(result, labels)
    ranked = rank(posterior.likelihood, result, names)
    order = ranked.uncertainty.argsort(descending=True, stable=True)[:_LISTED]
    checks = (
        *(("posterior", check) for check in posterior.checks),
        *(("held-out data", check) for check in result.checks),
    )
    return Section(
        key="uncertainty",
        title="Uncertainty",
        question="How sure is the network of its predictions, and are they as sure as they should "
        "be?",
        verdict=_verdict(posterior, result, ranked, [check for _, check in checks]),
        blocks=(
            _assumption(posterior, result),
            _scores_table(result),
            *_figures(result, ranked),
            _uncertain_table(examples, ranked, order, image_shape),
            _prior_table(posterior),
            CheckList("Checks", checks),
        ),
        results={
            "posterior": posterior.to_dict(),
            "evaluation": result.to_dict(),
            "most_uncertain": [
                {"input": int(i), "uncertainty": float(ranked.uncertainty[i])}
                | {head: _plain(entry(int(i))) for head, entry in ranked.columns.items()}
                for i in order
            ],
        },
    )


def _names(result: Evaluation, labels: Sequence[str] | None) -> tuple[str, ...]:
    """One for each output of the last axis.

    Returns
    -------
    tuple of str
        As given, or numbers.

    Raises
    ------
    ShapeError
        When there are more or fewer.
    """
    outputs = result.prediction.mean.shape[-1]
    if labels is not None and len(labels) != outputs:
        raise ShapeError(
            f"{len(labels)} labels for {outputs} outputs",
            where="labels",
            advice="Give one label for each output.",
        )
    return tuple(map(str, range(outputs))) if labels is None else tuple(labels)


def _verdict(
    posterior: LaplacePosterior, result: Evaluation, ranked: Ranking, checks: list[Check]
) -> Verdict:
    mine, alone = result.laplace, result.baseline
    gap = mine.difference
    assert gap is not None
    raised = [check for check in checks if check.status != "pass"]
    dimension = posterior.effective_dimension
    tiles = [
        Tile(
            f"NLL, Laplace {MINUS} MAP",
            f"{_signed(gap.value)} nats",
            f"± {number(gap.standard_error, 2)}, paired over {gap.count:,} examples; negative is "
            "better",
            _tone(mine),
        )
    ]
    if mine.ece is not None and alone.ece is not None:
        tiles.append(
            Tile(
                "Calibration error",
                _percent(mine.ece.value),
                f"± {_percent(mine.ece.standard_error)} with Laplace; the network alone has "
                f"{_percent(alone.ece.value)}",
            )
        )
    tiles += _tile_of_errors(result, ranked)
    if mine.coverage is not None and alone.coverage is not None:
        at = int((mine.coverage.levels - 0.95).abs().argmin())
        tiles.append(
            Tile(
                "Targets in their 95 % interval",
                _percent(float(mine.coverage.coverage[at])),
                f"± {_percent(float(mine.coverage.standard_error[at]))} with Laplace; the noise "
                f"alone has {_percent(float(alone.coverage.coverage[at]))}",
            )
        )
    tiles.append(
        Tile(
            "Effective dimension",
            number(float(dimension), 3),
            f"directions that the data determine, of {posterior.prior.space.size:,} weights",
        )
    )
    return Verdict(
        status=worst_status(checks),
        headline=_headline(result),
        sentences=tuple(f"{_capital(check.detail)} {check.advice}".strip() for check in raised),
        tiles=tuple(tiles),
    )


def _headline(result: Evaluation) -> str:
    mine, alone = result.laplace, result.baseline
    gap = mine.difference
    assert gap is not None
    values = f"NLL {number(alone.nll.value, 3)} alone, {number(mine.nll.value, 3)} with Laplace"
    if mine.is_worse:
        return (
            "The weights' uncertainty makes these predictions worse than those of the network "
            f"alone: {values}."
        )
    if gap.value < -_SIGNIFICANT * gap.standard_error:
        return f"The weights' uncertainty makes the predictions better: {values}."
    return f"The weights' uncertainty changes the predictions little: {values}."


def _tile_of_errors(result: Evaluation, ranked: Ranking) -> list[Tile]:
    """How well uncertainty points at wrong answers, where there are both kinds."""
    right, alone, mine = ranked.right, result.baseline.error_auroc, result.laplace.error_auroc
    if right is None or alone is None or mine is None:
        return []
    spread = auroc(ranked.spread[~right], ranked.spread[right])
    return [
        Tile(
            "Wrong answers told by confidence",
            f"{mine.value:.3f}",
            f"± {number(mine.standard_error, 2)}: chance that a wrong answer has less confidence "
            f"than a right one; {alone.value:.3f} by the network alone, {spread.value:.3f} by the "
            "spread over the draws",
        )
    ]


def _assumption(posterior: LaplacePosterior, result: Evaluation) -> Paragraph:
    space = posterior.prior.space
    how = (
        "exactly, by Cholesky factorisation"
        if posterior.method == "exact"
        else f"by {posterior.num_draws} posterior draws"
    )
    origin = (
        f"learned from {posterior.num_examples:,} training examples"
        if posterior.rounds
        else f"given; {posterior.num_examples:,} training examples make the posterior"
    )
    scaled = (
        f" Its covariance is multiplied by the temperature {number(posterior.temperature, 3)}."
        if posterior.temperature != 1
        else ""
    )
    return Paragraph(
        f"The network {posterior.model.name} is replaced by its tangent at the trained weights. "
        f"{space.size:,} weights are uncertain, under a Gaussian prior ({posterior.prior.kind}) "
        f"whose precision was {origin}. The posterior is represented {how}.{scaled} Predictions "
        f"keep the outputs of the network; what is judged here, on {result.num_examples:,} "
        "examples that it was not trained on, is the uncertainty put around them. Uncertainty of "
        "the tangent says nothing of other networks that training might have found.",
        title="What is assumed",
    )


def _scores_table(result: Evaluation) -> Table:
    columns = result.columns()
    rows = []
    for i, row in enumerate(result.rows):
        cells = [Cell(row.name)]
        for head, column in columns.items():
            entry = column[i]
            tone: Tone = _tone(row) if "difference" in head else ""
            cells.append(Cell(_metric(entry), tone))
        rows.append(tuple(cells))
    note = (
        "MAP is the network alone. NLL: negative log-likelihood of an example, in nats; its "
        "difference to MAP is taken example by example. ± is one standard error over examples."
    )
    if result.task == "classification":
        note += (
            " Probit: in closed form from the variances; Monte Carlo: the average over the draws. "
            "ECE: expected calibration error. AUROC of errors: chance that a wrong answer has less "
            "confidence than a right one."
        )
    if result.map_temperature is not None:
        what = "noise variance multiplied" if result.task == "regression" else "logits divided"
        note += (
            f" The second row has the network's {what} by {number(result.map_temperature, 3)}, as "
            "the validation data ask for."
        )
    return Table(
        "Laplace beside the network alone",
        ("", *columns),
        tuple(rows),
        note,
        strong=result.rows.index(result.laplace),
    )


def _figures(result: Evaluation, ranked: Ranking) -> list[Figure | Paragraph]:
    if not can_draw():
        return [
            Paragraph(
                "matplotlib is not installed, so this page has tables only. For the figures: "
                "pip install 'pushforward[plot]'."
            )
        ]
    found: list[Figure | Paragraph] = []
    lines = [_line(row, result.laplace) for row in (result.baseline, result.laplace)]
    drawn = [line for line in lines if line is not None]
    if result.task == "classification":
        found.append(
            Figure(
                "Are the probabilities right?",
                calibration_svg(drawn, "reliability", xlabel="confidence", ylabel="accuracy"),
                "Below the diagonal answers are right less often than their confidence says, above "
                "it more often. Bars: 95 % intervals. Bins with fewer than "
                f"{_FEWEST} examples are left out; they are in result.json.",
                "Accuracy against confidence for each way to predict. The numbers are in "
                "result.json.",
            )
        )
    elif result.task == "regression":
        found.append(
            Figure(
                "Are the intervals right?",
                calibration_svg(
                    drawn,
                    "coverage",
                    xlabel="level of the interval",
                    ylabel="share of targets inside",
                ),
                "Below the diagonal the intervals are too narrow, above it too wide. Bars: 95 % "
                "intervals.",
                "Coverage against level for each way to predict. The numbers are in result.json.",
            )
        )
        found.append(_error_figure(result))
    right = ranked.right
    if right is not None and bool(right.any()) and not bool(right.all()):
        groups = [
            (name, ranked.spread[which].tolist())
            for name, which in (("right predictions", right), ("wrong predictions", ~right))
        ]
        xlabel = "spread of the predicted class's probability over the draws"
        found.append(
            Figure(
                "Does it know when it is wrong?",
                survival_svg(groups, "spread-of-errors", xlabel=xlabel),
                "The further apart the two curves, the better the spread tells wrong answers from "
                "right ones.",
                "Share of right and of wrong predictions whose spread exceeds a threshold.",
            )
        )
    return found


def _line(row: Scores, main: Scores) -> Line | None:
    role: Any = "main" if row is main else "rival"
    columns: tuple[Tensor, ...]
    if row.reliability is not None:
        curve = row.reliability
        shown = curve.count >= min(_FEWEST, int(curve.count.max()))
        columns = tuple(
            values[shown]
            for values in (
                curve.confidence,
                curve.accuracy,
                curve.accuracy_lower,
                curve.accuracy_upper,
            )
        )
    elif row.coverage is not None:
        cover = row.coverage
        reach = _Z95 * cover.standard_error
        if not bool(torch.isfinite(reach).all()):
            reach = torch.zeros_like(reach)
        columns = (cover.levels, cover.coverage, cover.coverage - reach, cover.coverage + reach)
    else:
        return None
    return Line(row.name, role, *(column.tolist() for column in columns))


def _error_figure(result: Evaluation) -> Figure:
    """Promised against found errors, in groups of examples with similar promises."""
    prediction = result.prediction
    lines = []
    for row, variance in (
        (result.baseline, prediction.noise_variance),
        (result.laplace, prediction.variance),
    ):
        assert variance is not None
        spread = variance.expand(prediction.mean.shape).double().reshape(-1)
        error = (result.targets.double() - prediction.mean.double()).reshape(-1).square()
        groups = [g for g in spread.argsort(stable=True).chunk(_GROUPS) if len(g) > 1]
        promised = [float(spread[g].mean().sqrt()) for g in groups]
        squares = [(float(error[g].mean()), float(error[g].std()) / len(g) ** 0.5) for g in groups]
        lines.append(
            Line(
                row.name,
                "rival" if row is result.baseline else "main",
                promised,
                [mean**0.5 for mean, _ in squares],
                [max(mean - _Z95 * error, 0.0) ** 0.5 for mean, error in squares],
                [(mean + _Z95 * error) ** 0.5 for mean, error in squares],
            )
        )
    return Figure(
        "Are larger errors foreseen?",
        calibration_svg(
            lines,
            "errors",
            xlabel="predicted standard deviation of a target",
            ylabel="root mean squared error",
            upper=None,
        ),
        f"{_GROUPS} groups of targets with similar predicted standard deviations. Bars: 95 % "
        "intervals. Points above the diagonal: errors larger than predicted.",
        "Root mean squared error against predicted standard deviation, with and without Laplace.",
    )


def _uncertain_table(
    examples: Examples, ranked: Ranking, order: Tensor, image_shape: Sequence[int]
) -> Table:
    inputs = examples.select(order.cpu()).inputs
    pictures = thumbnails(inputs, image_shape) if isinstance(inputs, Tensor) else None
    rows = []
    for place, i in enumerate(order.tolist()):
        name = Cell(f"{i:,}", image="" if pictures is None else pictures[place])
        rows.append((name, *(entry(i) for entry in ranked.columns.values())))
    return Table(
        "The most uncertain inputs",
        ("input", *ranked.columns),
        tuple(rows),
        ranked.note + " Inputs are numbered from 0 in the order of the held-out data.",
    )


def _prior_table(posterior: LaplacePosterior) -> Table:
    space, prior = posterior.prior.space, posterior.prior
    dimension = posterior.layer_effective_dimension
    precisions = prior.precision.tolist()
    if prior.kind != "layerwise":
        precisions = precisions * len(space.layers)
    rows = [
        (
            Cell(layer),
            Cell(f"{size:,}"),
            Cell(number(precision, 3)),
            Cell(with_error(value, error if error > 0 else None)),
            Cell(_percent(value / size)),
        )
        for layer, size, precision, value, error in zip(
            space.layers,
            space.layer_sizes,
            precisions,
            dimension.value.tolist(),
            dimension.standard_error.tolist(),
            strict=True,
        )
    ]
    left_out = len(rows) - _LAYERS_SHOWN
    facts = [f"prior {prior.kind}"]
    if posterior.noise_variance is not None:
        facts.append(f"noise variance of the targets {_numbers(posterior.noise_variance)}")
    if posterior.log_evidence is not None:
        value, error = float(posterior.log_evidence), float(posterior.log_evidence.standard_error)
        facts.append(f"log evidence {with_error(value, error if error > 0 else None)} nats")
    facts.append(f"made in {duration(posterior.cost.seconds)}")
    note = (
        f"{_capital('; '.join(facts))}. Effective dimension: directions in weight space that the "
        "data determine rather than the prior."
    )
    if prior.kind == "gprior":
        note += " The precision of a g-prior is in units of each weight's own curvature."
    if left_out > 0:
        note += f" {left_out} more layers are in result.json."
    return Table(
        "The prior, and what the data determine",
        ("layer", "weights", "prior precision", "effective dimension", "share of the weights"),
        tuple(rows[:_LAYERS_SHOWN]),
        note,
    )


def _tone(row: Scores) -> Tone:
    gap = row.difference
    if gap is None:
        return ""
    if row.is_worse:
        return "warn"
    return "good" if gap.value < -_SIGNIFICANT * gap.standard_error else ""


def _metric(entry: Metric | None) -> str:
    return MISSING if entry is None else with_error(entry.value, entry.standard_error)


def _percent(fraction: float) -> str:
    return f"{number(100 * fraction, 3)} %"


def _signed(value: float) -> str:
    return f"+{number(value, 3)}" if value > 0 else number(value, 3)


def _numbers(values: float | tuple[float, ...]) -> str:
    each = values if isinstance(values, tuple) else (values,)
    return ", ".join(number(value, 3) for value in each)


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _plain(cell: Cell) -> str:
    return cell.text
