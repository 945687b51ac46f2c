"""What a result depends on besides the code: versions, device, clocks, threads, commit."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import rlkern

ROOT = Path(__file__).parents[1]
PEERS = {
    "TRL": "trl",
    "Liger Kernel": "liger-kernel",
    "Cut Cross-Entropy": "cut-cross-entropy",
    "flash-attention": "flash-attn",
    "verl": "verl",
    "TorchRL": "torchrl",
    "transformers": "transformers",
}


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def said(*command: str) -> str | None:
    """What a program prints, None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str | None:
    """Short hash; with a + where files that are measured differ from it."""
    head = said("git", "rev-parse", "--short", "HEAD")
    changed = said("git", "status", "--porcelain", "--untracked-files=no", "--", "rlkern", "kernels", "bench/*.py", "bench/contests")
    return head and head + ("+" if changed else "")


def cpu() -> dict[str, Any]:
    """Name, and MHz of each core now where the system says."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []

    def values(key: str) -> list[str]:
        return [line.split(":", 1)[1].strip() for line in lines if line.startswith(key)]

    return {"name": next(iter(values("model name")), platform.processor() or platform.machine()), "mhz": [float(x) for x in values("cpu MHz")]}


def environment(device: torch.device) -> dict[str, Any]:
    """For the result file."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "rlkern": rlkern.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "peers": {name: version(package) for name, package in PEERS.items()},
        "system": platform.platform(terse=True),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        clocks = said("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader")
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return found | {
            "device": properties.name,
            "memory_bytes": properties.total_memory,
            "clocks": clocks,
            "driver": driver,
            "cuda": torch.version.cuda,
        }
    processor = cpu()
    return found | {"device": processor["name"], "clocks": processor["mhz"]}
