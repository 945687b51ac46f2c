"""The code in the documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def snippet(page: str, containing: str) -> str:
    """The one block of code of the page that contains this text."""
    blocks = [block for block in re.findall(r"^```py\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S) if containing in block]
    assert len(blocks) == 1, f"{len(blocks)} blocks of {page} contain {containing!r}"
    return blocks[0]


def before_and_after(page: str, containing: str) -> tuple[str, str]:
    """The two programs of a block whose lines may end in ``# before`` or ``# after``: each without the lines of the other."""
    lines = snippet(page, containing).splitlines()
    before, after = ("\n".join(line for line in lines if not line.rstrip().endswith(other)) for other in ("# after", "# before"))
    assert before != after
    return before, after
