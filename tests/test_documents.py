"""The documents keep their word: every code block and example runs, every name and link exists."""

import doctest
import importlib
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import pushforward

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "pushforward"
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
MODULES = sorted(m.name for m in pkgutil.walk_packages(pushforward.__path__, "pushforward."))

# ```python blocks are executed, ```pycon blocks compared with their output, and a comment that
# opens with "check" is code too, unseen by readers: it holds the page to what its prose says.
_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<kind>python|pycon)[^\n]*\n(?P<code>.*?)^ *```$"
    r"|^<!-- check\n(?P<check>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    code: str
    line: int
    shows_output: bool


def blocks_of(text):
    found = []
    for match in _BLOCK.finditer(text):
        group = "code" if match["code"] is not None else "check"
        width = len(match["indent"] or "")
        code = "".join(line[width:] or "\n" for line in match[group].splitlines(keepends=True))
        line = text.count("\n", 0, match.start(group))
        found.append(Block(code, line, match["kind"] == "pycon"))
    return found


def run(block, page, namespace):
    if not block.shows_output:
        # The empty lines in front make tracebacks point into the page.
        exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
        return
    test = doctest.DocTestParser().get_doctest(
        block.code, namespace, page.name, str(page), block.line
    )
    report = []
    runner = doctest.DocTestRunner(optionflags=_OPTIONS)
    failed = runner.run(test, out=report.append, clear_globs=False).failed
    namespace.update(test.globs)  # the parser copies the namespace
    assert not failed, "".join(report)


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """An empty working directory, no windows, and the random state of the other tests untouched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_default_dtype(torch.float32)


def test_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n<!-- check\nassert x\n-->\n```console\n$ no\n```\n"
    text += "- b\n\n    ```pycon\n    >>> x\n    1\n    ```\n"
    assert blocks_of(text) == [
        Block("x = 1\n", 2, False),
        Block("assert x\n", 5, False),
        Block(">>> x\n1\n", 13, True),
    ]
    namespace = {}
    for block in blocks_of(text):
        run(block, Path("page.md"), namespace)
    with pytest.raises(AssertionError, match="Expected"):
        run(Block(">>> x\n2\n", 0, True), Path("page.md"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("sandbox")
def test_code_of_a_page_runs(page):
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        run(block, page, namespace)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("sandbox")
def test_examples_of_a_module(name):
    report = []
    runner = doctest.DocTestRunner(optionflags=_OPTIONS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)):
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", (ROOT / name).read_text("utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert [page for page in pages if page not in navigation] == []


def test_every_check_is_explained():
    source = "\n".join(path.read_text("utf-8") for path in SOURCE.rglob("*.py"))
    names = set(re.findall(r"\bCheck\(\s*\"([a-z-]+)\"", source))
    explained = (DOCS / "trust.md").read_text("utf-8")
    assert len(names) > 5
    assert sorted(name for name in names if f"`{name}`" not in explained) == []


def test_every_public_name_has_a_reference():
    reference = "\n".join(page.read_text("utf-8") for page in (DOCS / "api").glob("*.md"))
    homes = {name: getattr(pushforward, name).__module__ for name in pushforward.__all__}
    pages = [line.split()[1] for line in reference.splitlines() if line.startswith(":::")]
    missing = [f"{home}.{name}" for name, home in homes.items() if home not in pages]
    assert missing == []


def test_names_in_the_notation_exist():
    source = "\n".join(path.read_text("utf-8") for path in SOURCE.rglob("*.py"))
    table = (DOCS / "notation.md").read_text("utf-8").split("## Words")[0]
    names = set(re.findall(r"[A-Za-z_]{4,}", " ".join(re.findall(r"`([^`]+)`", table))))
    assert len(names) > 30
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", source)) == []


def test_files_that_contributors_are_sent_to_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    files = set(re.findall(r"`((?:\w+/)+\w+\.py)`", text))
    assert files
    assert [f for f in files if not (ROOT / f).exists() and not (SOURCE / f).exists()] == []


def test_sections_that_the_code_cites_exist():
    source = "\n".join(path.read_text("utf-8") for path in SOURCE.rglob("*.py"))
    cited = set(
        re.findall(
            r"(?<![\d.])(\d\.\d{1,2})(?=[^\d])",
            "".join(re.findall(r"sections?\s(?:[\d.]+(?:,\s|\sand\s)?)+", source)),
        )
    )
    headings = set(re.findall(r"^#+ (\d\.\d{1,2}) ", (DOCS / "method.md").read_text("utf-8"), re.M))
    assert cited
    assert cited <= headings
