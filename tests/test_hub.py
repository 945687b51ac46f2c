"""The repository for Hugging Face's kernel hub: loaded from its folder, in a process that has no rlkern, its functions compute."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlkern
from rlkern import reference

ROOT = Path(__file__).parents[1]
_spec = importlib.util.find_spec("kernels")
KERNELS = _spec and _spec.origin  # None for our own folder of that name, which is no package
SITE = str(Path(torch.__file__).parents[1])

USE = """
import torch
logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
logprobs, entropy = module.token_logprobs(logits, torch.tensor([0, 1, 2]), with_entropy=True)
(logprobs.sum() + entropy.sum()).backward()
advantages, _ = module.gae(torch.ones(1, 3), torch.zeros(1, 3), gamma=1.0, lam=1.0)
from importlib import import_module
import_module(module.__name__ + ".kernels.logits")  # the device code goes with it
assert not [name for name in sys.modules if name.partition(".")[0] == "rlkern"]
print(json.dumps([module.__version__, logprobs.tolist(), entropy.tolist(), logits.grad.tolist(), advantages.tolist()]))
"""
# As the package `kernels` does it: the file, under the name that the metadata gives.
BY_HAND = """
build = folder / "build" / "torch-cpu"
name = json.loads((build / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
"""
BY_KERNELS = """
from kernels import get_local_kernel
module = get_local_kernel(folder, backend="cpu")
"""


def computed(load: str, folder: Path) -> list:
    """What ``USE`` prints, with the module that ``load`` makes of the folder; in an interpreter without the site's .pth files, and elsewhere."""
    paths = [SITE, *([str(Path(KERNELS).parents[1])] if KERNELS else [])]
    start = f"import importlib.util, json, sys; from pathlib import Path; sys.path += {paths}; folder = Path({str(folder)!r})\n"
    start += "assert importlib.util.find_spec('rlkern') is None\n"
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-B", "-S", "-c", start + load + USE], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "build" / "torch-old").mkdir(parents=True)
    subprocess.run([sys.executable, ROOT / "docs" / "hub.py", folder], check=True, timeout=60)
    return folder


def assert_right(results: list) -> None:
    version, logprobs, entropy, gradient, advantages = results
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    expected, expected_entropy = reference.token_logprobs(logits, torch.tensor([0, 1, 2]), with_entropy=True)
    (expected.sum() + expected_entropy.sum()).backward()
    assert version == rlkern.__version__
    for mine, exact in ((logprobs, expected.detach()), (entropy, expected_entropy.detach()), (gradient, logits.grad)):
        torch.testing.assert_close(torch.tensor(mine).double(), exact, atol=1e-5, rtol=0)  # float32, numbers of about 1
    assert advantages == [[3.0, 2.0, 1.0]]


def test_computes_in_a_process_without_rlkern(repository):
    assert_right(computed(BY_HAND, repository))


@pytest.mark.skipif(not KERNELS, reason="Hugging Face's package `kernels` is not installed")
def test_computes_when_loaded_by_the_package_kernels(repository):
    assert_right(computed(BY_KERNELS, repository))


def test_what_is_written(repository):
    builds = sorted((repository / "build").iterdir())
    assert [build.name for build in builds] == ["torch-cpu", "torch-cuda"]
    for build in builds:
        metadata = json.loads((build / "metadata.json").read_text())
        assert metadata["backend"] == {"type": build.name.removeprefix("torch-")}
        assert metadata["id"].isidentifier()
        assert {f.name for f in (ROOT / "kernels").glob("*.py")} <= {f.name for f in (build / "kernels").iterdir()}
        assert not {"trainers", "integrations", "cli.py"} & {f.name for f in build.iterdir()}
        assert not list(build.rglob("__pycache__"))
    assert {f.name for f in repository.iterdir()} == {"build", "README.md", "LICENSE"}
