"""The section of the page on how degenerate a solution is: its local learning coefficient."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pushforward.degeneracy.coefficient import LearningCoefficient, Measured
from pushforward.degeneracy.plots import running_means
from pushforward.report.chain_figures import Panel, traces_svg
from pushforward.report.figures import can_draw
from pushforward.report.formatting import MISSING, duration, number, ratio, with_error
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
from pushforward.runs.estimate import Check, Status

__all__ = ["degeneracy_section"]

_HEADLINES = {
    "OK": "The local learning coefficient is {value}; a regular model with {size} parameters "
    "has {half}.",
    "NOT_EQUILIBRATED": "{value} is not yet the local learning coefficient.",
    "STEP_TOO_LARGE": "{value} depends on the step size: it is not the local learning coefficient.",
    "NOT_A_MINIMUM": "{value} is no measure of degeneracy: the network is not at a minimum.",
    "DEAD_CHAINS": "{value}, without the {dead} of {chains} chains that were lost.",
}
_TONES: dict[Status, Tone] = {"pass": "good", "warn": "warn", "fail": "bad"}
_WELL, _WORRYING = 1.01, 1.1  # R-hat
_SAMPLERS = {
    "langevin": "SGLD with averaged noise, on minibatches",
    "sgld": "SGLD, on minibatches",
    "hmc": "HMC, on all data",
    "mala": "MALA, on all data",
}
_CROSSCHECKS = {
    "two temperatures": "two temperatures, without the loss of the network",
    "variance": "variance of the loss, without the loss of the network",
}


def degeneracy_section(
    found: LearningCoefficient, *, about: str = "", notes: Sequence[str] = ()
) -> Section:
    """The section of the page on how degenerate a solution is.

    Parameters
    ----------
    found
        Of `pushforward.learning_coefficient`.
    about
        Which network on which data, in a sentence or two.
    notes
        What was chosen on behalf of the reader.

    Returns
    -------
    Section
        For a `Report`.
    """
    blocks: list[Table | Figure | Paragraph | CheckList] = [_method(found, about, notes)]
    if can_draw():
        blocks.append(_traces(found))
    else:
        blocks.append(
            Paragraph(
                "matplotlib is not installed, so this page has tables only. For the figures: "
                "pip install 'pushforward[plot]'."
            )
        )
    blocks += [
        _roads_table(found),
        _draws_table(found),
        _settings_table(found),
        CheckList("Checks", tuple((found.sampler, check) for check in found.checks)),
    ]
    return Section(
        key="degeneracy",
        title="Degeneracy",
        question="How degenerate is this solution: by how many parameters do the data hold it?",
        verdict=_verdict(found),
        blocks=tuple(blocks),
        results={**found.to_dict(), "notes": list(notes)},
    )


def _verdict(found: LearningCoefficient) -> Verdict:
    value = _answer(found)
    headline = _HEADLINES[found.verdict].format(
        value=value,
        size=f"{found.num_parameters:,}",
        half=_half(found),
        dead=found.dead_chains,
        chains=found.num_chains,
    )
    sentences = [] if found.verdict == "OK" else [found.advice]
    for check in found.checks:
        if check.status == "pass":
            continue
        advice = f" {check.advice}" if found.verdict == "OK" else ""  # else the verdict has it
        sentences.append(f"{_sentence(check)}.{advice}")
    unit = "" if found.metric == "euclidean" else ", in units of the scales,"
    sentences.append(
        "It counts what chains feel at this temperature and localisation: directions in which the "
        f"loss curves less than {number(found.localization / found.nbeta, 2)}{unit} do not count. "
        "Compare networks at the same numbers only."
    )
    tone: Tone = "bad" if found.verdict != "OK" else _TONES[found.status]
    return Verdict(found.status, headline, tuple(sentences), (_tile(found, tone), *_tiles(found)))


def _tile(found: LearningCoefficient, tone: Tone) -> Tile:
    twice = 2 * float(found.value)
    detail = f"as for a regular model with {number(twice, 2 if twice < 10 else 3)} parameters"
    if found.verdict != "OK":
        detail = found.verdict.replace("_", " ")
    return Tile("Learning coefficient", _answer(found), detail, tone)


def _tiles(found: LearningCoefficient) -> list[Tile]:
    tiles = [Tile("Half the parameters", _half(found), "what a regular model of this size has")]
    if found.quadratic is not None:
        detail = "from the curvature at the weights alone"
        tiles.append(Tile("If the loss were quadratic", _measured(found.quadratic), detail))
    drift = found.drift
    moved = abs(drift.value) > 3 * drift.standard_error
    alarm: Tone = "bad" if moved and _status(found, "equilibrated") != "pass" else "good"
    draws = (found.num_chains - found.dead_chains) * found.num_draws
    effective = f"{found.effective_draws:,.0f}" if found.effective_draws > 0 else MISSING
    tiles += [
        Tile("Drift", _measured(drift), "second half of the run minus the first", alarm),
        Tile(
            "R-hat",
            number(found.r_hat, 4),
            f"{effective} effective draws of {draws:,}",
            _r_hat_tone(found.r_hat),
        ),
    ]
    if len(found.runs) < 2:
        return [*tiles, Tile("Step size", "exact", "by a Metropolis test on all data", "good")]
    change = found.runs[1].value - found.runs[0].value
    error = math.hypot(found.runs[0].standard_error, found.runs[1].standard_error)
    return [
        *tiles,
        Tile(
            "Halving the step",
            with_error(change, error),
            "is what it adds to the coefficient",
            _TONES[_status(found, "step-size")],
        ),
    ]


def _method(found: LearningCoefficient, about: str, notes: Sequence[str]) -> Paragraph:
    text = (
        f"{about} The local learning coefficient is n beta times the mean excess of the loss over "
        "that of the network, when the weights are drawn from exp(-n beta loss), held near those "
        "of the network by a spring. It is half the number of parameters when each of them "
        "matters to the data, and less the more of them can be changed together without changing "
        "the fit: the smaller, the more degenerate, and in theory the better the solution "
        f"generalises for its loss. {_SAMPLERS[found.sampler]}: {found.num_chains} chains from the "
        f"weights, {found.num_warmup:,} steps of warm-up, {found.num_draws:,} draws, in "
        f"{duration(found.cost.seconds)}."
    )
    return Paragraph(" ".join([text.strip(), *notes]), title="What is measured")


def _traces(found: LearningCoefficient) -> Figure:
    draws = found.excess.double().cpu()
    warmup = found.warmup_excess.double().cpu().tolist() if found.warmup_excess.shape[1] else []
    value, error = float(found.value), float(found.standard_error)
    strip = (value - 2 * error, value + 2 * error) if math.isfinite(error) else None
    # The first means are single draws and would flatten the rest.
    means = running_means(draws)
    means[:, : draws.shape[1] // 20] = math.nan
    panels = [
        Panel("n beta times the excess loss", draws.tolist(), warmup),
        Panel("its mean so far", means.tolist(), strip=strip),
    ]
    extrapolated = "" if len(found.runs) < 2 else ", extrapolated to step size 0 from two runs,"
    before = (
        "the warm-up in grey before step 0. All chains start at the network, where the excess is "
        "0, and should rise, flatten, and agree"
        if warmup
        else "after the warm-up. All should wander around one level"
    )
    return Figure(
        "Where the chains are",
        traces_svg(panels, "degeneracy-traces"),
        f"One line a chain, {before}. The strip below is the answer{extrapolated} and two "
        "standard errors on either side.",
        "Excess loss of each chain against the step, and its mean so far. The value of each chain "
        "is in result.json.",
    )


def _roads_table(found: LearningCoefficient) -> Table:
    rows = [("the answer", Measured(float(found.value), float(found.standard_error)))]
    if len(found.runs) > 1:
        rows += [
            (f"main run, step size {number(found.step_size, 3)}", found.runs[0]),
            (f"second run, step size {number(found.step_size / 2, 3)}", found.runs[1]),
        ]
    rows += [(_CROSSCHECKS.get(name, name), one) for name, one in found.crosschecks.items()]
    if found.quadratic is not None:
        rows.append(("curvature at the weights, if the loss were quadratic", found.quadratic))
    answer = float(found.value)
    shown = tuple(
        (
            Cell(name),
            Cell(_measured(one)),
            Cell(ratio(one.value / answer) if answer > 0 < one.value else MISSING),
        )
        for name, one in rows
    )
    return Table(
        "Other roads to the number",
        ("", "coefficient", "over the answer"),
        shown,
        "Two temperatures and the variance do without the loss of the network. They equal the "
        "coefficient only where the localisation is weak; otherwise they are smaller, as a rule, "
        "and noisier at all times. The quadratic value sees directions that are flat at the "
        "weights themselves, but no degeneracy beyond: the gap between it and the answer is what "
        "counting flat directions misses.",
        strong=0,
    )


def _draws_table(found: LearningCoefficient) -> Table:
    values = found.chain_values.tolist()
    rows = [
        ("mean of a chain, lowest to highest", f"{_few(min(values))} to {_few(max(values))}"),
        ("acceptance by a Metropolis test on the same examples", _percent(found.acceptance)),
    ]
    if len(found.runs) > 1:
        rows.append(("bias that theory expects of step and minibatches", _few(found.expected_bias)))
    if math.isfinite(found.slope):
        rows.append(("what a slope at the weights adds, if quadratic", _few(found.slope)))
    rows.append(("loss of the network", with_error(found.initial_loss, found.initial_loss_error)))
    if found.singular_fluctuation is not None:
        rows += [
            ("singular fluctuation", _measured(found.singular_fluctuation)),
            ("WAIC, nats an example", number(found.waic, 5)),
            ("WBIC, nats in all", number(found.wbic, 6)),
        ]
    how = "that of the sampler."
    if len(found.runs) > 1:
        how = (
            "that of single Langevin steps at the main step size; near 100 % the step is short "
            "beside what it meets."
        )
    return Table(
        "What else the draws say",
        ("", "value"),
        tuple((Cell(name), Cell(text)) for name, text in rows),
        f"The acceptance is {how} A slope is 0 at a minimum. The error of the network's loss is "
        "about new data, and no part of that of the coefficient. WAIC and WBIC are those of the "
        "law that was sampled, at its temperature and localisation.",
    )


def _settings_table(found: LearningCoefficient) -> Table:
    learned = not math.isfinite(found.step_size)
    rows = {
        "n beta": number(found.nbeta, 5),
        "localisation": f"{found.localization:.4g}",
        "metric": found.metric,
        "sampler": found.sampler,
        "step size": "learned" if learned else number(found.step_size, 3),
        "examples": f"{found.num_examples:,}",
        "examples in a minibatch": "all"
        if found.batch_size >= found.num_examples
        else f"{found.batch_size:,}",
        "parameters sampled": f"{found.num_parameters:,}",
        "chains": f"{found.num_chains:,}",
        "chains lost": f"{found.dead_chains:,}",
        "steps of warm-up": f"{found.num_warmup:,}",
        "draws of each chain": f"{found.num_draws:,}",
    }
    return Table(
        "Settings",
        ("", "value"),
        tuple(
            (Cell(name), Cell(text, "bad" if name == "chains lost" and found.dead_chains else ""))
            for name, text in rows.items()
        ),
        "With n / ln n for n beta, the default, the coefficient is that of Watanabe's WBIC. The "
        "localisation is relative to the weights in the layerwise metric, and absolute in the "
        "Euclidean one.",
    )


def _sentence(check: Check) -> str:
    if check.name == "standard-error":
        return f"The standard error is {check.detail}"
    return f"{check.detail[:1].upper()}{check.detail[1:]}"


def _status(found: LearningCoefficient, name: str) -> Status:
    return next((check.status for check in found.checks if check.name == name), "pass")


def _answer(found: LearningCoefficient) -> str:
    return with_error(float(found.value), float(found.standard_error))


def _half(found: LearningCoefficient) -> str:
    return f"{found.num_parameters / 2:,.1f}".removesuffix(".0")


def _measured(one: Measured) -> str:
    return with_error(one.value, one.standard_error)


def _few(value: float) -> str:
    return number(value, 3)


def _percent(fraction: float) -> str:
    return f"{number(100 * fraction, 3)} %" if math.isfinite(fraction) else MISSING


def _r_hat_tone(value: float) -> Tone:
    if not math.isfinite(value):
        return "muted"
    return "good" if value <= _WELL else "warn" if value <= _WORRYING else "bad"
