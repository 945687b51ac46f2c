"""Packaging that a declarative file cannot express: the top-level folder ``kernels/`` is installed as ``rlkern.kernels``.

Everything else stands in pyproject.toml. The folder has no ``__init__.py`` of its own, so it never answers to a bare
``import kernels``, which is the name of another published package.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rlkern", "rlkern.*"], exclude=["rlkern.kernels"]), "rlkern.kernels"],
    package_dir={"rlkern.kernels": "kernels"},
)
