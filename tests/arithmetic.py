"""The suite under other arithmetic than this processor's choice: ``python -m tests.arithmetic [setting ...]`` prints a row of a table for each."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = [
    "ATEN_CPU_CAPABILITY=default",
    "ATEN_CPU_CAPABILITY=avx2",
    "MKL_ENABLE_INSTRUCTIONS=AVX2",
    "MKL_ENABLE_INSTRUCTIONS=SSE4_2",
    "ONEDNN_MAX_CPU_ISA=AVX2",
    "OMP_NUM_THREADS=1",
    "OMP_NUM_THREADS=2",
]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "logical", "--maxprocesses", "8", "--dist", "loadgroup", "-p", "no:cacheprovider"]


def processor() -> str:
    """Its name, where the system says it."""
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    return found.group(1) if found else "unknown"


def main(settings: list[str]) -> int:
    failures = 0
    print("| setting | processor | result |\n|---|---|---|")
    for setting in settings or SETTINGS:
        name, _, value = setting.partition("=")
        with tempfile.TemporaryDirectory() as cache:  # Inductor's keeps code for vectors of another width, and would run it
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, name: value}
            done = subprocess.run(PYTEST, env=environment, capture_output=True, text=True)
        print(f"| `{setting}` | {processor()} | {done.stdout.strip().splitlines()[-1]} |", flush=True)
        if done.returncode:
            failures += 1
            print("\n".join(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))), file=sys.stderr)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
