"""Device code. In a checkout this file lends the package the top-level folder ``kernels/``; an installed rlkern has no need of it."""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
# Without setup.py beside it, a folder of that name is another package's.
if (_root / "setup.py").exists():
    __path__.append(str(_root / "kernels"))
