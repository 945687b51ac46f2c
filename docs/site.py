"""What the pages and docstrings need on their way to the site: see mkdocs.yml."""

import re
from typing import Any

import griffe

OUTSIDE = re.compile(r"\[([^\]\n]*)\]\(\.\./[^)\n]*\)")  # the repository's other files are no part of the site
ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ become their text: a page of the site stands alone."""
    return OUTSIDE.sub(r"\1", markdown)


class Roles(griffe.Extension):
    """Docstrings in reStructuredText's small way, as Markdown: :func:`name` is code, and what follows a line's last :: is a block."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"::$", ":", ROLE.sub(r"`\1`", obj.docstring.value), flags=re.M)
