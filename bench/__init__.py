"""Measurements: bytes moved (``traffic``), code generated (``compile``), time and memory (``harness`` and the ``test_*`` files)."""
