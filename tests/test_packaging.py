"""The top-level folder kernels/ is rlkern.kernels, from a checkout and installed, and never shadows the published package `kernels`."""

import ast
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import rlkern
from rlkern import _backend, _versions
from rlkern._backend import choose_backend

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("packaging")  # one process, since the distributions are built once

USE = """
import sys, torch, rlkern
assert "triton" not in sys.modules, "importing rlkern imports triton"
logprobs = rlkern.token_logprobs(torch.zeros(2, 4), torch.tensor([0, 3]))
assert torch.allclose(logprobs, torch.full((2,), 0.25).log())
from rlkern.kernels import logits
print(rlkern.__file__, logits.__file__, rlkern.__version__, sep="\\n")
"""


def python(code: str, *, cwd: Path, path: Path | None = None) -> list[str]:
    """Run code in a fresh interpreter that knows nothing of this checkout, but for what stands in ``path``."""
    # -S: without the site's .pth files, among which an editable install of this checkout would answer first.
    setup = f"import sys; sys.path[:0] = {[str(path)] if path else []}; sys.path.append({sysconfig.get_path('purelib')!r})\n"
    done = subprocess.run([sys.executable, "-S", "-c", setup + code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The files that git would keep, copied: a build leaves rlkern.egg-info and build/ behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for file in _own_files():
        (copy / file).parent.mkdir(parents=True, exist_ok=True)
        (copy / file).write_bytes((ROOT / file).read_bytes())
    return copy


FOLDERS = ("rlkern", "kernels", "tests", "bench", "docs", "examples", ".ci")


def _own_files() -> list[Path]:
    files = [*ROOT.iterdir(), *(f for folder in FOLDERS for f in (ROOT / folder).rglob("*"))]
    return [f.relative_to(ROOT) for f in files if f.is_file() and "__pycache__" not in f.parts]


@pytest.fixture(scope="module")
def distributions(checkout, tmp_path_factory) -> tuple[Path, Path]:
    """(wheel, source distribution), built with no network by the setuptools that is installed."""
    out = tmp_path_factory.mktemp("dist")
    code = f"from setuptools import build_meta as b; print(b.build_sdist({str(out)!r})); print(b.build_wheel({str(out)!r}))"
    python(code, cwd=checkout)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_wheel_holds_the_kernels_and_nothing_beside_the_package(distributions):
    names = zipfile.ZipFile(distributions[0]).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"rlkern", f"rlkern-{rlkern.__version__}.dist-info"}
    assert {f"rlkern/kernels/{f.name}" for f in (ROOT / "kernels").glob("*.py")} <= set(names)
    assert "rlkern/py.typed" in names


def test_wheel_computes_from_an_empty_directory(distributions, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(distributions[0]).extractall(site)
    package, kernel, version = python(USE, cwd=empty, path=site)
    assert Path(package) == site / "rlkern" / "__init__.py"
    assert Path(kernel) == site / "rlkern" / "kernels" / "logits.py"
    assert version == rlkern.__version__


def test_installed_package_does_not_lend_itself_a_stranger_s_kernels(distributions, tmp_path):
    """In site-packages, the folder `kernels` beside rlkern is the published package of that name."""
    zipfile.ZipFile(distributions[0]).extractall(tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("mine = True")
    (tmp_path / "kernels" / "stranger.py").write_text("")
    code = "import kernels, rlkern.kernels.logits, importlib.util as u; print(kernels.mine, u.find_spec('rlkern.kernels.stranger'))"
    assert python(code, cwd=tmp_path, path=tmp_path) == ["True None"]


def test_source_distribution_is_the_repository(distributions):
    with tarfile.open(distributions[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {str(f) for f in _own_files() if f.parts[0] in FOLDERS}
    assert wanted <= names
    assert {"rlkern/kernels/__init__.py", "Makefile", "LICENSE", "README.md", "CHANGELOG.md", "requirements.txt"} <= names


def test_editable_install_computes_from_elsewhere(checkout, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    install = [sys.executable, "-m", "pip", "install", *options, "--editable", "."]
    subprocess.run(install, cwd=checkout, check=True, capture_output=True, timeout=120)
    package, kernel, _ = python(f"import site; site.addsitedir({str(site)!r})\n" + USE, cwd=empty, path=site)
    assert Path(package) == checkout / "rlkern" / "__init__.py"
    assert Path(kernel) == checkout / "kernels" / "logits.py"


def test_our_folder_does_not_stand_for_the_published_package():
    """transformers asks for `kernels`; from our root it must find Hugging Face's, or none."""
    code = "import importlib.util as u, transformers; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    (origin,) = python(code, cwd=ROOT, path=ROOT)
    assert Path(origin).parent != ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


# ---- versions -------------------------------------------------------------------------------------------------------------------------------


def test_least_versions_are_those_of_the_metadata():
    wanted = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    assert {package: wanted[package] for package in _versions.LEAST} == _versions.LEAST


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rlkern.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_what_is_too_old_is_an_error_that_names_both_versions(monkeypatch):
    monkeypatch.setattr(_versions, "version", lambda package: "2.8.1+cu128")
    with pytest.raises(ImportError, match=r"torch 2.8.1\+cu128 is too old: rlkern needs torch 2.9 or newer"):
        _versions.require("torch")
    monkeypatch.setattr(_backend, "TRITON_TOO_OLD", _versions.too_old("triton"))
    with pytest.raises(ValueError, match=r"backend='triton' cannot run here: triton 2.8.1\+cu128 is too old: rlkern needs triton 3.5 or newer"):
        choose_backend("triton", torch.ones(1))
    monkeypatch.setattr(_versions, "version", lambda package: "10.0a1")
    _versions.require(*_versions.LEAST)
    monkeypatch.undo()


# ---- the rules of the house -----------------------------------------------------------------------------------------------------------------


def imported(file: Path) -> set[str]:
    """The modules that a file imports when it runs, wherever in it: absolute names, and relative ones with their dots."""
    names: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(file.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" if node.module else module + alias.name for alias in node.names}
    return names


def offences(folder: str, pattern: str) -> list[str]:
    """Imports in a folder's (or a file's) sources whose name matches."""
    files = [ROOT / folder] if folder.endswith(".py") else sorted((ROOT / folder).rglob("*.py"))
    assert files
    return [f"{f.relative_to(ROOT)} imports {name}" for f in files for name in sorted(imported(f)) if re.match(pattern, name)]


@pytest.mark.parametrize("folder", ["rlkern", "kernels", "tests", "bench"])
def test_nobody_imports_a_bare_kernels(folder):
    assert offences(folder, r"kernels\b") == []


def test_imports_point_one_way():
    """kernels <- ops <- losses, advantages <- integrations, trainers; the reference imports torch alone."""
    assert offences("kernels", r"(?!triton\b|typing\b|\.\w)") == []
    assert offences("rlkern/ops", r"(rlkern|\.\.)\.?(losses|advantages|logprobs|integrations|trainers)\b") == []
    assert offences("rlkern/reference", r"(?!torch\b|math\b|typing\b|collections\b|__future__\b|\.\w|\.\.config\b)") == []
    for file in ("ops", "integrations", *(f.name for f in (ROOT / "rlkern").glob("*.py"))):  # a witness, not a supplier
        assert offences(f"rlkern/{file}", r"(rlkern|\.+)\.?reference\b") == []
    heavy = r"(transformers|accelerate|trl|verl|matplotlib|tqdm|yaml)\b|.*\b(trainers|integrations)\b"
    for file in sorted((ROOT / "rlkern").glob("*.py")):
        if file.name not in {"cli.py", "__main__.py"}:
            assert offences(f"rlkern/{file.name}", heavy) == []
    assert offences("rlkern/ops", heavy) == []


def test_every_public_name_exists_and_is_documented():
    documents = "\n".join(f.read_text() for f in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    for name in rlkern.__all__:
        assert hasattr(rlkern, name)
        if not name.startswith("__"):
            assert getattr(rlkern, name).__doc__, f"rlkern.{name} has no docstring"
            assert re.search(rf"\b{name}\b", documents), f"rlkern.{name} is named neither in README.md nor in docs/"
