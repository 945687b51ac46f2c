"""Measurements: time and memory (``python -m bench``), bytes moved (``traffic``), code generated (``compile``), and their guard (``guard``)."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler, which counts memory on CPUs, prints its start and stop otherwise
