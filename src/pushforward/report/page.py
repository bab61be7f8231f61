"""The page as plain data, and how it becomes one HTML file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, NoReturn

from jinja2 import Environment, PackageLoader, StrictUndefined

from pushforward.errors import OptionError
from pushforward.runs.estimate import Check, Status, to_jsonable

__all__ = [
    "Cell",
    "CheckList",
    "Figure",
    "Paragraph",
    "Report",
    "Section",
    "Table",
    "Tile",
    "Tone",
    "Verdict",
    "render",
    "write",
    "write_json",
]

Tone = Literal["", "good", "warn", "bad", "muted"]


class Cell(NamedTuple):
    """One entry of a table.

    Attributes
    ----------
    text
        What is shown.
    tone
        Colour that says how to take it.
    image
        A small picture in front of the text: a ``data:`` URI made by this library.
    """

    text: str
    tone: Tone = ""
    image: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column holds names, the others numbers, aligned to the right.

    Parameters
    ----------
    title
        Heading.
    columns
        Heads of the columns.
    rows
        As many entries as columns each; a plain string is an entry without tone.
    note
        How to read it.
    strong
        Index of a row to emphasise.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    note: str = ""
    strong: int | None = None
    kind: ClassVar[str] = "table"

    @property
    def cells(self) -> list[list[Cell]]:
        """All entries with their tone."""
        return [[x if isinstance(x, Cell) else Cell(x) for x in row] for row in self.rows]


@dataclass(frozen=True)
class Figure:
    """A drawing.

    Parameters
    ----------
    title
        Heading.
    svg
        Inline SVG, inserted as it is: only drawings made by this library belong here.
    caption
        How to read it.
    alternative
        What it shows, for those who cannot see it.
    """

    title: str
    svg: str
    caption: str
    alternative: str
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Paragraph:
    """Running text.

    Parameters
    ----------
    text
        Without markup.
    title
        Heading, if it deserves one.
    """

    text: str
    title: str = ""
    kind: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class CheckList:
    """Everything that was verified.

    Parameters
    ----------
    title
        Heading.
    checks
        Pairs of what was checked and the check.
    """

    title: str
    checks: tuple[tuple[str, Check], ...]
    kind: ClassVar[str] = "checks"

    @property
    def passed(self) -> list[tuple[str, Check]]:
        """Checks that give no cause for concern."""
        return [pair for pair in self.checks if pair[1].status == "pass"]

    @property
    def raised(self) -> list[tuple[str, Check]]:
        """Checks with advice, the worst first."""
        order = {"fail": 0, "warn": 1}
        raised = [pair for pair in self.checks if pair[1].status != "pass"]
        return sorted(raised, key=lambda pair: order[pair[1].status])


class Tile(NamedTuple):
    """One number that sums up a part of the answer.

    Attributes
    ----------
    label
        What it is.
    value
        The number with its unit.
    detail
        What it means, in a few words.
    tone
        Colour that says how to take it.
    """

    label: str
    value: str
    detail: str
    tone: Tone = ""


@dataclass(frozen=True)
class Verdict:
    """The answer in short.

    Parameters
    ----------
    status
        Worst status among the checks.
    headline
        One sentence.
    sentences
        What supports it.
    tiles
        The numbers to remember.
    """

    status: Status
    headline: str
    sentences: tuple[str, ...] = ()
    tiles: tuple[Tile, ...] = ()


@dataclass(frozen=True)
class Section:
    """The answer to one question.

    Parameters
    ----------
    key
        Anchor on the page and key in ``result.json``.
    title
        Heading.
    question
        What it answers, in the words of the reader.
    verdict
        The answer in short.
    blocks
        The answer at length, in order.
    results
        Every number behind it, for ``result.json``: a result dataclass or a mapping.
    """

    key: str
    title: str
    question: str
    verdict: Verdict
    blocks: tuple[Table | Figure | Paragraph | CheckList, ...]
    results: Any = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A page.

    Parameters
    ----------
    title, subtitle
        What it is about.
    sections
        One for each question.
    environment
        What made the page, name to value: versions, network, law, seed, command.
    """

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def render(report: Report) -> str:
    """The report as one HTML page that needs no other file.

    Parameters
    ----------
    report
        What to show. All text is escaped.

    Returns
    -------
    str
        HTML.
    """
    environment = Environment(
        loader=PackageLoader("pushforward.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(report=report)


def write(report: Report, path: Path) -> Path:
    """Write the page, and every number behind it to ``result.json`` beside it.

    Parameters
    ----------
    report
        What to write.
    path
        The HTML file; its folder is made when it does not exist.

    Returns
    -------
    Path
        The HTML file.

    Raises
    ------
    OptionError
        When the files cannot be written.
    """
    results = {
        "title": report.title,
        "environment": dict(report.environment),
        "sections": {
            section.key: {
                "status": section.verdict.status,
                "headline": section.verdict.headline,
                "results": section.results,
            }
            for section in report.sections
        },
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(report), encoding="utf-8")
    except OSError as error:
        _refuse_to_write(path, error)
    write_json(results, path.with_name("result.json"))
    return path


def write_json(result: Any, path: Path) -> Path:
    """Write numbers as JSON, with null in place of NaN and infinity.

    Parameters
    ----------
    result
        Whatever `to_jsonable` takes.
    path
        The file.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    OptionError
        When it cannot be written.
    """
    text = json.dumps(_finite(to_jsonable(result)), indent=1, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        _refuse_to_write(path, error)
    return path


def _refuse_to_write(path: Path, error: OSError) -> NoReturn:
    """Say why a file could not be written.

    Raises
    ------
    OptionError
        Always.
    """
    raise OptionError(
        f"cannot be written ({error.strerror or error})",
        where=str(path),
        advice="Choose a folder that you may write to.",
    ) from error


def _finite(value: Any) -> Any:
    """The same with None in place of NaN and infinity, which JSON does not know.

    Returns
    -------
    object
        A copy.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
