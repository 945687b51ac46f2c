"""The library as a repository of Hugging Face's kernel hub: ``python docs/hub.py FOLDER``, or ``make hub``. How to publish it: docs/hub.md."""

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(
    "__pycache__", "kernels", "trainers", "integrations", "cli.py", "__main__.py"
)  # no part of the functions on tensors


BACKENDS = ("cpu", "cuda")  # the hub wants a build for each; ours are the same files, since all of it is Python


def write(folder: Path) -> None:
    """``folder/build/torch-<backend>``, README.md and LICENSE. What was in ``build`` before is gone."""
    version = re.search(r'^__version__ = "(.+)"', (ROOT / "rlkern" / "__init__.py").read_text(), re.M)
    assert version is not None
    shutil.rmtree(folder / "build", ignore_errors=True)
    for backend in BACKENDS:
        build = folder / "build" / f"torch-{backend}"
        shutil.copytree(ROOT / "rlkern", build, ignore=LEFT_OUT)
        shutil.copytree(ROOT / "kernels", build / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
        metadata = {
            # The module's name, and the namespace of its operators: an installed rlkern, or another version, can live beside it.
            "id": f"_rlkern_{backend}_{re.sub(r'[^0-9a-zA-Z]', '_', version[1])}",
            "name": "rlkern",
            "version": 1,  # of the hub's branch v1: raised where callers must change
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    (folder / "README.md").write_text(CARD)


CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernels]
---
# rlkern

Fused Triton kernels for reinforcement-learning post-training of language models: log-probs and entropy from logits or hidden states, policy
losses, KL, GAE.

```python
from kernels import get_kernel

rlkern = get_kernel("OWNER/rlkern", version=1, trust_remote_code=True)
logprobs, entropy = rlkern.token_logprobs(logits, ids, with_entropy=True)
```
"""

if __name__ == "__main__":
    write(Path(sys.argv[1]))
