"""The section of the page on draws of a posterior: how chains moved, agree, and predict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pushforward.linearised_laplace.calibration import Metric
from pushforward.linearised_laplace.evaluation import Scores
from pushforward.report.averaged_prediction import AveragedPrediction
from pushforward.report.chain_figures import Panel, traces_svg
from pushforward.report.figures import Line, calibration_svg, can_draw
from pushforward.report.formatting import MISSING, duration, number, with_error
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
from pushforward.sampling.chains import Chains
from pushforward.sampling.diagnostics import Diagnosis, Quantity, looked_at

__all__ = ["posterior_samples_section"]

_WELL, _WORRYING = 1.01, 1.1  # R-hat
_STUCK = 0.01  # acceptance
_FEW = 400.0  # effective draws
_MOST_TRACES = 5
_MOST_ROWS = 24
_CHAINS_LISTED = 16
_FEWEST = 5  # examples in a bin that is drawn
_STATISTICS = {
    "acceptance": "acceptance",
    "step_size": "step size",
    "divergent": "diverged",
    "tree_depth": "depth of the trees",
    "leapfrog_steps": "leapfrog steps",
    "temperature": "temperature of the momenta",
    "thermostat": "friction in force",
    "gradient_norm": "norm of the gradient",
}


def posterior_samples_section(
    chains: Chains,
    *,
    averaged: AveragedPrediction | None = None,
    about: str = "",
    notes: Sequence[str] = (),
) -> Section:
    """The section of the page on draws of a posterior.

    Parameters
    ----------
    chains
        The draws.
    averaged
        What they predict on held-out data.
    about
        What was sampled, in a sentence or two.
    notes
        What was chosen on behalf of the reader.

    Returns
    -------
    Section
        For a `Report`.
    """
    blocks: list[Table | Figure | Paragraph | CheckList] = [
        Paragraph(" ".join([about, *notes, _run(chains)]).strip(), title="What was sampled")
    ]
    if can_draw():
        blocks += _trace_figure(chains)
    else:
        blocks.append(
            Paragraph(
                "matplotlib is not installed, so this page has tables only. For the figures: "
                "pip install 'pushforward[plot]'."
            )
        )
    blocks.append(_diagnosis_table(chains.diagnosis))
    if averaged is not None:
        blocks.append(_scores_table(averaged))
        blocks += _reliability(averaged)
    if chains.statistics:
        blocks.append(_statistics_table(chains))
    blocks.append(CheckList("Checks", tuple((chains.kernel, check) for check in chains.checks)))
    return Section(
        key="posterior-samples",
        title="Posterior samples",
        question="Which networks explain the data, and do the chains agree about what they say?",
        verdict=_verdict(chains, averaged),
        blocks=tuple(blocks),
        results={
            "chains": chains.to_dict(),
            "prediction": None if averaged is None else averaged.to_dict(),
            "notes": list(notes),
        },
    )


def _verdict(chains: Chains, averaged: AveragedPrediction | None) -> Verdict:
    told = _told(chains.diagnosis)
    tiles = []
    if told:
        r_hat = max((q.worst_r_hat for q in told), default=math.nan)
        effective = min((q.fewest_effective for q in told), default=math.nan)
        tiles += [
            Tile(
                "Largest R-hat",
                _r_hat(r_hat),
                f"of the {_kinds(told)}; below {_WELL} chains cannot be told apart",
                _r_hat_tone(r_hat),
            ),
            Tile(
                "Effective draws",
                number(effective, 3),
                f"at least, of {chains.num_chains * chains.num_draws:,} draws",
                "good" if effective >= _FEW else "warn",
            ),
        ]
    accepted = chains.statistics.get("acceptance")
    if accepted is not None:
        share = float(accepted.nanmean())
        tiles.append(
            Tile("Accepted proposals", _percent(share), "over all draws", _accepted_tone(share))
        )
    tiles += _prediction_tiles(averaged)
    raised = [check for check in chains.checks if check.status != "pass"]
    return Verdict(
        status=chains.status,
        headline=_headline(chains, told),
        sentences=tuple(f"{_capital(check.detail)}. {check.advice}".strip() for check in raised),
        tiles=tuple(tiles),
    )


def _headline(chains: Chains, told: Sequence[Quantity]) -> str:
    what = f"{chains.num_chains} chains of {chains.kernel}"
    if not chains.diagnosis.enough_draws:
        return f"{what} made {chains.num_draws} draws each: too few to compare them."
    accepted = chains.statistics.get("acceptance")
    finite = [q.worst_r_hat for q in told if math.isfinite(q.worst_r_hat)]
    if not finite or (accepted is not None and float(accepted.nanmean()) < _STUCK):
        return f"{what} did not move: there is nothing to average."
    r_hat = max(finite)
    if r_hat <= _WELL:
        return f"{what} agree about the {_kinds(told)}: R-hat is {r_hat:.3f} at most."
    verb = "hardly agree" if r_hat <= _WORRYING else "do not agree"
    return f"{what} {verb} about the {_kinds(told)}: R-hat is up to {r_hat:.3g}."


def _run(chains: Chains) -> str:
    size = sum(value[0].numel() for value in chains.moments.mean.values())
    return (
        f"{chains.kernel} moved {chains.num_chains} chains of {size:,} parameters by "
        f"{chains.num_warmup:,} steps of warm-up and {chains.num_draws * chains.thin:,} more, of "
        f"which every {'' if chains.thin == 1 else f'{chains.thin:,}th '}one is a draw, in "
        f"{duration(chains.cost.seconds)}. Chains that agree may still have missed the posterior "
        "together: pushforward thermalize tests that on problems with a known answer."
    )


# --- traces ---------------------------------------------------------------------------------------


def _trace_figure(chains: Chains) -> Iterator[Figure]:
    panels = list(_panels(chains))
    if not panels:
        return
    yield Figure(
        "How the chains moved",
        traces_svg(panels, "traces", thin=chains.thin),
        "One line a chain, the warm-up in grey before step 0. Chains that have forgotten where "
        "they began look alike and wander around one level. Shown are the potential, minus the log "
        "density, and what agrees least.",
        "Traces of the chains against the step. Their R-hat and effective draws are in the table.",
    )


def _panels(chains: Chains) -> Iterator[Panel]:
    if "potential" in chains.statistics:
        warmup = chains.warmup_statistics.get("potential")
        yield Panel(
            "potential",
            chains.statistics["potential"].tolist(),
            [] if warmup is None else warmup.tolist(),
        )
    shown = chains.observations or chains.parameters
    kind = "observation" if chains.observations else "parameter"
    found = sorted(
        (-score, place, name, component)
        for place, (name, value) in enumerate(shown.items())
        for component, score in _scored(chains.diagnosis, kind, name, value)
    )
    for _, _, name, component in found[: _MOST_TRACES - 1]:
        value = shown[name]
        where = _where(component, tuple(value.shape[2:]))
        yield (
            Panel(f"{name}{where}", value.flatten(2)[..., component].tolist())
            if where
            else (Panel(name, value.reshape(value.shape[0], value.shape[1]).tolist()))
        )


def _scored(
    diagnosis: Diagnosis, kind: str, name: str, value: Tensor
) -> Iterator[tuple[int, float]]:
    components = looked_at(value.shape[2:].numel()).tolist()
    known = [q for q in diagnosis.quantities if (q.kind, q.name) == (kind, name)]
    scores = known[0].r_hat.nan_to_num(0.0).tolist() if known else [0.0] * len(components)
    yield from zip(components, scores, strict=True)


def _where(component: int, shape: tuple[int, ...]) -> str:
    if not shape:
        return ""
    position = torch.unravel_index(torch.tensor(component), shape)
    return f"[{', '.join(str(int(i)) for i in position)}]"


# --- tables ---------------------------------------------------------------------------------------


def _diagnosis_table(diagnosis: Diagnosis) -> Table:
    rows = []
    for quantity in diagnosis.quantities[:_MOST_ROWS]:
        error = (quantity.standard_error / quantity.std).nan_to_num(0.0)
        rows.append(
            (
                Cell(quantity.name),
                Cell(f"{len(quantity.mean):,}"),
                Cell(_r_hat(quantity.worst_r_hat), _r_hat_tone(quantity.worst_r_hat)),
                Cell(number(_least(quantity.ess_bulk), 3)),
                Cell(number(_least(quantity.ess_tail), 3)),
                Cell(number(float(error.max()) if len(error) else math.nan, 2)),
            )
        )
    left_out = len(diagnosis.quantities) - len(rows)
    note = (
        "The worst component of each. R-hat compares the chains with each other, by ranks and in "
        "halves. ESS: how many independent draws would know the centre, and the 5 % and 95 % "
        "quantiles, as well. Weights may disagree where what the network says agrees: hidden units "
        "can be permuted."
    )
    if left_out > 0:
        note += f" {left_out} more are in result.json."
    if not rows:
        note = f"{diagnosis.num_draws} draws of each chain are too few to compare chains."
    return Table(
        "Do the chains agree?",
        ("", "numbers", "R-hat", "ESS, bulk", "ESS, tail", "error of the mean, s.d."),
        tuple(rows),
        note,
    )


def _statistics_table(chains: Chains) -> Table:
    names = [name for name in _STATISTICS if name in chains.statistics]
    rows = []
    for chain in range(min(chains.num_chains, _CHAINS_LISTED)):
        cells = [Cell(f"chain {chain}")]
        for name in names:
            values = chains.statistics[name][chain].double()
            mean = float(values.nanmean())
            share = name in {"acceptance", "divergent"}
            tone: Tone = _accepted_tone(mean) if name == "acceptance" else ""
            if name == "divergent" and mean > 0:
                tone = "warn"
            cells.append(Cell(_percent(mean) if share else number(mean, 3), tone))
        potential = chains.statistics.get("potential")
        if potential is not None:
            cells.append(Cell(number(float(potential[chain].mean()), 5)))
        rows.append(tuple(cells))
    heads = [_STATISTICS[name] for name in names]
    if "potential" in chains.statistics:
        heads.append("potential")
    more = chains.num_chains - len(rows)
    note = "Means over the draws of a chain."
    if more > 0:
        note += f" {more} more chains are in chains.safetensors."
    return Table("Chain by chain", ("", *heads), tuple(rows), note)


def _scores_table(averaged: AveragedPrediction) -> Table:
    columns = averaged.columns()
    rows = []
    for i, row in enumerate(averaged.rows):
        cells = [Cell(row.name)]
        for head, column in columns.items():
            tone: Tone = _difference_tone(row) if "difference" in head else ""
            cells.append(Cell(_metric(column[i]), tone))
        rows.append(tuple(cells))
    return Table(
        "What the draws predict",
        ("", *columns),
        tuple(rows),
        f"On {averaged.num_examples:,} examples that the chains have not seen, with "
        f"{averaged.num_draws:,} draws. NLL: negative log-likelihood of an example, in nats; "
        "differences are taken example by example. A single draw: the mean over draws of what each "
        "scores alone. ECE: expected calibration error. ± is one standard error over examples.",
        strong=len(rows) - 1,
    )


def _reliability(averaged: AveragedPrediction) -> Iterator[Figure]:
    lines = []
    for row in averaged.rows:
        curve = row.reliability
        if curve is None:
            continue
        shown = curve.count >= min(_FEWEST, int(curve.count.max()))
        columns = (curve.confidence, curve.accuracy, curve.accuracy_lower, curve.accuracy_upper)
        last = row is averaged.average
        lines.append(
            Line(row.name, "main" if last else "rival", *(c[shown].tolist() for c in columns))
        )
    if lines and can_draw():
        yield Figure(
            "Are the probabilities right?",
            calibration_svg(lines, "samples-reliability", xlabel="confidence", ylabel="accuracy"),
            "Below the diagonal answers are right less often than their confidence says, above it "
            "more often. Bars: 95 % intervals.",
            "Accuracy against confidence. The numbers are in result.json.",
        )


def _prediction_tiles(averaged: AveragedPrediction | None) -> Iterator[Tile]:
    if averaged is None:
        return
    mine, other = averaged.average, averaged.rows[0]
    yield Tile(
        "NLL of the average",
        f"{number(mine.nll.value, 3)} nats",
        f"± {number(mine.nll.standard_error, 2)}; {other.name}: {number(other.nll.value, 3)}",
        _difference_tone(mine),
    )
    if mine.accuracy is not None and other.accuracy is not None:
        yield Tile(
            "Accuracy of the average",
            _percent(mine.accuracy.value),
            f"± {_percent(mine.accuracy.standard_error)}; {other.name}: "
            f"{_percent(other.accuracy.value)}",
        )


# --- words ----------------------------------------------------------------------------------------


def _told(diagnosis: Diagnosis) -> list[Quantity]:
    """What chains are judged by: observations, else the potential, else parameters."""
    for kind in ("observation", "potential", "parameter"):
        found = [q for q in diagnosis.quantities if q.kind == kind]
        found = [q for q in found if math.isfinite(q.worst_r_hat)]
        if found:
            return found
    return []


def _kinds(told: Sequence[Quantity]) -> str:
    names = {"observation": "predictions", "potential": "potential", "parameter": "parameters"}
    return names[told[0].kind] if told else "potential"


def _least(values: Tensor) -> float:
    kept = values[~values.isnan()]
    return float(kept.min()) if len(kept) else math.nan


def _r_hat(value: float) -> str:
    if not math.isfinite(value):
        return MISSING
    return f"{value:.3f}" if value < 10 else "above 10"


def _r_hat_tone(value: float) -> Tone:
    if not math.isfinite(value):
        return "muted"
    return "good" if value <= _WELL else "warn" if value <= _WORRYING else "bad"


def _accepted_tone(share: float) -> Tone:
    return "bad" if not share >= _STUCK else "warn" if share < 0.2 else ""


def _difference_tone(row: Scores) -> Tone:
    gap = row.difference
    if gap is None or not math.isfinite(gap.standard_error):
        return ""
    if row.is_worse:
        return "warn"
    return "good" if gap.value < -2 * gap.standard_error else ""


def _metric(entry: Metric | None) -> str:
    return MISSING if entry is None else with_error(entry.value, entry.standard_error)


def _percent(fraction: float) -> str:
    return f"{number(100 * fraction, 3)} %"


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"
