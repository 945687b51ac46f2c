"""The least versions of the packages that this one works with, as pyproject.toml has them: what is older fails late, and elsewhere."""

import re
from importlib.metadata import PackageNotFoundError, version

LEAST = {"torch": "2.9", "triton": "3.5", "transformers": "4.57", "accelerate": "1.7", "peft": "0.18"}


def too_old(package: str) -> str | None:
    """What is wrong with the installed version of a package, naming both; None where nothing is, or where it is not there to ask."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return None
    mine, least = (tuple(int(part) for part in re.findall(r"\d+", text)[:2]) for text in (found, LEAST[package]))
    return None if mine >= least else f"{package} {found} is too old: rlkern needs {package} {LEAST[package]} or newer"


def require(*packages: str) -> None:
    """An ImportError where one of them is too old."""
    for package in packages:
        if wrong := too_old(package):
            raise ImportError(wrong)


require("torch")  # when rlkern is imported, before anything uses it
