"""One HTML file that needs no other, in which all text is escaped, and the numbers beside it."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from pushforward.errors import OptionError
from pushforward.report.page import (
    Cell,
    CheckList,
    Figure,
    Paragraph,
    Report,
    Section,
    Table,
    Tile,
    Verdict,
    render,
    write,
)
from pushforward.runs.estimate import Check

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = '<script>alert("x")</script>'


class Outline(HTMLParser):
    """Collects tags and attributes, and refuses tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def example_report() -> Report:
    blocks = (
        Paragraph(f"Text {HOSTILE}", title=f"Heading {HOSTILE}"),
        Table(
            f"Table {HOSTILE}",
            ("name", f"column {HOSTILE}"),
            ((f"row {HOSTILE}", Cell("1.25", "warn")), ("other", f"cell {HOSTILE}")),
            f"note {HOSTILE}",
            strong=1,
        ),
        Figure("Drawing", "<svg><path d='M0 0'/></svg>", f"caption {HOSTILE}", f'"alt {HOSTILE}'),
        CheckList(
            "Checks",
            (
                ("a", Check("first", "pass", "fine")),
                ("b", Check("second", "warn", f"doubtful {HOSTILE}", "Do this.")),
                ("c", Check("third", "fail", "wrong", "Do that.")),
            ),
        ),
    )
    verdict = Verdict("warn", f"Verdict {HOSTILE}", (HOSTILE,), (Tile("label", "42", HOSTILE),))
    results = {"value": torch.tensor([1.5, math.nan]), "bound": math.inf, "count": 3}
    section = Section("first", f"Title {HOSTILE}", f"Question {HOSTILE}?", verdict, blocks, results)
    other = Section("second", "Other", "And?", Verdict("pass", "Yes."), ())
    return Report(f"Page {HOSTILE}", HOSTILE, (section, other), {"Name": HOSTILE})


def test_page_is_well_formed_and_needs_no_other_file() -> None:
    outline = Outline(render(example_report()))
    assert not {"link", "img", "iframe", "script"} & set(outline.tags)
    references = [v for name, v in outline.attributes if name in {"src", "href", "xlink:href"}]
    assert references == ["#first", "#second"]


def test_all_text_is_escaped() -> None:
    page = render(example_report())
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 15


def test_worst_checks_come_first_and_passed_ones_are_folded() -> None:
    page = render(example_report())
    assert page.index("third") < page.index("second</strong>") < page.index("1 checks passed")
    assert page.index("1 checks passed") < page.index("first</strong>")


def test_files_are_written_with_null_for_what_json_cannot_say(tmp_path: Path) -> None:
    path = write(example_report(), tmp_path / "deep" / "index.html")
    assert path.read_text(encoding="utf-8") == render(example_report())
    result = json.loads((tmp_path / "deep" / "result.json").read_text(encoding="utf-8"))
    assert result["sections"]["first"]["status"] == "warn"
    assert result["sections"]["first"]["results"] == {
        "value": [1.5, None],
        "bound": None,
        "count": 3,
    }


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError) as caught:
        write(example_report(), tmp_path / "file" / "index.html")
    assert "file" in caught.value.where


def test_pictures_stand_in_front_of_the_text_of_their_entry() -> None:
    uri = "data:image/png;base64,AAAA+/=="
    table = Table("t", ("input", "n"), ((Cell("7", image=uri), Cell("1", image=uri)), ("8", "2")))
    report = Report("r", "s", (Section("k", "t", "q", Verdict("pass", "fine"), (table,)),))
    outline = Outline(render(report))
    sources = [value for name, value in outline.attributes if name == "src"]
    assert sources == [uri, uri]
    assert f'<img class="thumb" src="{uri}" alt="">7</th>' in render(report)
