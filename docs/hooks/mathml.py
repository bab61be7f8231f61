"""Formulas become MathML when the site is built: readable offline, without scripts."""

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)


def on_page_content(content: str, **_: object) -> str:
    """Replace the formulas of a page, given as HTML."""
    return _FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    # The converter knows the environment by its older name only.
    tex = html.unescape(match["tex"]).strip().replace("{aligned}", "{align*}")
    return convert(tex, display="block" if match["open"] == "[" else "inline")
