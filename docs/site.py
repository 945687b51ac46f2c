"""What the pages and docstrings need on their way to the site: see mkdocs.yml."""

import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

OUTSIDE = re.compile(r"\[([^\]\n]*)\]\(\.\./[^)\n]*\)")  # the repository's other files are no part of the site
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.S)  # pymdownx.arithmatex's, TeX between \( and \) or \[ and \]
ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ become their text: a page of the site stands alone."""
    return OUTSIDE.sub(r"\1", markdown)


def on_page_content(text: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves."""

    def drawn(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]).strip()[2:-2], display="block" if found[1] == "div" else "inline")

    return FORMULA.sub(drawn, text)


class Roles(griffe.Extension):
    """Docstrings in reStructuredText's small way, as Markdown: :func:`name` is code, and what follows a line's last :: is a block."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"::$", ":", ROLE.sub(r"`\1`", obj.docstring.value), flags=re.M)
