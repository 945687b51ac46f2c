"""The examples in the documentation run as they stand, those of one page after each other."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import rlkern

from .ranks import on_ranks

ROOT = Path(__file__).parents[1]
FIRST_RUN = ROOT / "docs" / "trl.md"
WITH_EXAMPLES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if "```python" in page.read_text()]
PAGES = [page for page in WITH_EXAMPLES if page != FIRST_RUN]  # that one needs TRL, and has a test of its own


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(page)


def test_the_first_run_in_trl_learns(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")
    monkeypatch.chdir(tmp_path)
    rewards = run_examples(FIRST_RUN)["rewards"]
    assert rewards[-1] > rewards[0] + 0.3


def run_examples(page: Path) -> dict[str, Any]:
    """What the examples of a page define."""
    namespace: dict[str, Any] = {"__name__": "example"}
    for block in re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        line = page.read_text()[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)
    return namespace


def test_the_formulas_are_computed_alike_in_both_languages():
    """The two pages differ in their prose and comments only."""

    def code(page: str) -> list[str]:
        blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)
        return [ast.dump(ast.parse(block)) for block in blocks]

    def formulas(page: str) -> int:
        return len(re.findall(r"^\$\$.*\$\$$", (ROOT / "docs" / page).read_text(), re.M))

    assert len(code("formulas.md")) >= 9
    assert code("formulas.md") == code("formulas.zh.md")
    assert formulas("formulas.md") == formulas("formulas.zh.md") >= 9


def test_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed (it needs Python 3.11)")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "example"}
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "a notebook is committed without outputs"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    assert namespace["rewards"][-1] > namespace["rewards"][0] + 0.3
    assert len(namespace["losses"]) == 3


def call_distributed_examples(rank: int, world: int) -> None:
    """Those of docs/distributed.md only define functions."""
    examples = run_examples(ROOT / "docs" / "distributed.md")
    g = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 11, bias=False)
    ids, tokens = torch.randint(11, (3, 6), generator=g), (torch.full((3, 6), -2.4), torch.randn(3, generator=g), torch.ones(3, 6))
    gradients = []
    for name in ("on_each_rank", "on_each_rank_with_a_share", "loss_under_fsdp"):
        hidden = (0.1 * torch.randn(3, 6, 8, generator=g.manual_seed(1))).requires_grad_()
        head.weight.grad = None
        if name == "loss_under_fsdp":
            examples[name](hidden, head, ids, *tokens).backward()
        else:
            examples[name](dist.group.WORLD, hidden, head.weight, ids, *tokens)
        assert hidden.grad is not None
        assert head.weight.grad is not None
        gradients.append((hidden.grad, head.weight.grad))
    assert all(bool(x.any()) for x in gradients[0])
    for mine in gradients[1:]:
        for a, b in zip(mine, gradients[0], strict=True):
            torch.testing.assert_close(a, b)
    assert {name for name, x in examples.items() if callable(x)} == {"on_each_rank", "on_each_rank_with_a_share", "loss_under_fsdp"}


def test_distributed_examples_run_when_called():
    on_ranks(1, call_distributed_examples)


WRITTEN = [page for folder in ("", "docs", "bench", "examples") for page in sorted((ROOT / folder).glob("*.md"))]


def prose(page: Path) -> str:
    """The page without its blocks of code, in which brackets and # mean something else."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    headings = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text) for text in re.findall(r"^#{1,6} (.*)$", prose(page), re.M))
    return {re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-") for text in headings}


def dead_links(page: Path) -> list[str]:
    dead = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose(page)):
        goal = page.parent / target if target else page
        if "://" not in target and not (goal.exists() and (not anchor or anchor in anchors(goal))):
            dead.append(f"{target}#{anchor}" if anchor else target)
    return dead


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(page):
    assert dead_links(page) == []


def test_dead_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `heading`, here\n[a](#a-heading-here) [b](#no) [c](page.md#no-more) [d](gone.md) [e](https://example.org/#x)\n```\n[f](no.md)\n```\n"
    )
    assert dead_links(page) == ["#no", "page.md#no-more", "gone.md"]


def test_every_page_and_public_name_is_on_the_site():
    site = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"(\S+\.md)$", site.split("\nnav:")[1].split("\nplugins:")[0], re.M))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}
    described = {line.rpartition(".")[2] for line in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.M)}
    assert {name for name in rlkern.__all__ if not name.startswith("__")} <= described
