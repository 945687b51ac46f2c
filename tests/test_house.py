"""Rules of the house that a linter does not know: short lists of parameters, short files, and a loss that is added in three steps."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import rlkern

from . import mutants

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("rlkern", "kernels", "bench")


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function, with the file that it is in."""
    for folder in SOURCES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef):
                    yield str(file.relative_to(ROOT)), node


def test_parameters_are_few():
    """At most 12, but for what users call (and its definition in the reference, of the same name) and for kernels, which Triton wants flat."""
    found = []
    for file, node in functions():
        count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
        of_users = node.name in rlkern.__all__ or file.startswith("rlkern/integrations/")
        if count > 12 and not of_users and not (file.startswith("kernels/") and node.name.endswith("_kernel")):
            found.append(f"{file}: {node.name} takes {count}")
    assert found == []


def test_files_are_short():
    """The long docstrings of public functions aside, a reader gets through a file in one go."""
    lengths = {f: len(f.read_text().splitlines()) for folder in SOURCES for f in (ROOT / folder).rglob("*.py")}
    assert [f"{f.relative_to(ROOT)}: {n} lines" for f, n in lengths.items() if n > 520] == []


STEPS = {
    # 1. The formula.
    "rlkern/reference/policy.py": [
        (
            "SURROGATES = {",
            '''def halved_surrogate(t: Token, c: PolicyLossConfig) -> Tensor:
    """-A r / 2."""
    return -product(t.A, t.r) / 2


SURROGATES = {
    "halved": halved_surrogate,''',
        )
    ],
    # 2. The term, for each device.
    "kernels/policy.py": [
        (
            "@triton.jit\ndef reinforce(",
            """@triton.jit
def halved(lp, old, log_r, A, o):
    loss = -0.5 * A * tl.exp(log_r)
    return loss, 0.0 * loss, loss


@triton.jit
def reinforce(""",
        )
    ],
    "rlkern/ops/torch_backend/terms.py": [
        (
            "def reinforce(",
            """def halved(lp: Tensor, old: Tensor, log_r: Tensor, A: Tensor, o: Options) -> tuple[Tensor, Derivative, Derivative]:
    loss = -0.5 * A * log_r.exp()
    return loss, 0.0, loss


def reinforce(""",
        )
    ],
    # 3. The name and the preset.
    "rlkern/surrogates.py": [("TABLE = {", 'TABLE = {\n    "halved": Surrogate("halved"),')],
    "rlkern/config.py": [
        (
            "    @classmethod\n    def reinforce(",
            """    @classmethod
    def halved(cls, **overrides: Any) -> PolicyLossConfig:
        return cls(**{"surrogate": "halved", **overrides})

    @classmethod
    def reinforce(""",
        )
    ],
}


def test_a_loss_is_added_in_three_steps(tmp_path):
    """CONTRIBUTING's, and nothing else: the tests that go over the table run it on both backends, at all depths."""
    for folder in ("rlkern", "kernels", "tests", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name, changes in STEPS.items():
        text = (tmp_path / name).read_text()
        for before, after in changes:
            assert text.count(before) == 1, f"{name}: {before}"
            text = text.replace(before, after)
        (tmp_path / name).write_text(text)
        assert name in (ROOT / "CONTRIBUTING.md").read_text()
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "halved", "tests/test_policy_loss.py", "tests/test_fused.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 7


def test_every_fault_of_make_mutants_still_has_its_place():
    for fault in mutants.FAULTS:
        assert (ROOT / fault.file).read_text().count(fault.is_now) == 1, f"{fault.file}: {fault.is_now}"
        assert all((ROOT / "tests" / f"test_{name}.py").exists() for name in fault.tests.split())
