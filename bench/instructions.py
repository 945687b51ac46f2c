"""What a GPU issues for each element: instructions counted in the machine code of a loop, by the unit that executes them.

A multiprocessor issues four instructions for 32 threads a clock, and its units take fewer, each of its own kind. A loop that needs more clocks for an
element, to issue or in one of the units, than memory needs to bring it cannot reach the memory's bandwidth, whatever the launch configuration: its
headroom, the time to bring its bytes over that time, is below 1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import triton

# Results of a unit for each multiprocessor and clock, by the CUDA C++ Programming Guide; four instructions are 128.
RATES = {"multiply-add": 128, "integer and logic": 64, "conversion": 64, "special": 16}
ISSUED = 128


@dataclass(frozen=True)
class Chip:
    """Published figures: multiprocessors, their boost clock in GHz, and memory bandwidth in TB/s, of which a copy reaches nine tenths."""

    target: str
    multiprocessors: int
    clock: float
    bandwidth: float
    latency: float = 0.8e-6  # seconds from a load to its data, about, under load
    rates: Mapping[str, int] = field(default_factory=lambda: RATES, hash=False)

    def headroom(self, loop: Loop) -> float:
        """Time to move the bytes of a loop over the time to issue its instructions, or that of its busiest unit if this is longer."""
        clocks = max(loop.instructions / ISSUED, *(loop.by_unit.get(unit, 0) / rate for unit, rate in self.rates.items()))
        moving = (loop.loaded + loop.stored) / (0.9 * self.bandwidth * 1e12)
        return moving / (clocks / (self.multiprocessors * self.clock * 1e9))

    @property
    def bytes_in_flight(self) -> float:
        """That a multiprocessor must have asked for at any time, for its share of the bandwidth."""
        return self.latency * 0.9 * self.bandwidth * 1e12 / self.multiprocessors


CHIPS = {
    "A100": Chip("sm_80", 108, 1.41, 2.04, rates=RATES | {"multiply-add": 64}),
    "H100": Chip("sm_90", 132, 1.755, 3.35),
    "H200": Chip("sm_90", 132, 1.755, 4.8),
    "B200": Chip("sm_100", 148, 1.85, 8.0),
}

# The unit that executes an instruction, by how its name begins; the first that fits. Whatever fits none is the integer and logic unit's.
UNITS = (
    ("load/store", re.compile(r"LDG|STG|LDS|STS|LD\.|ST\.|LDC|LDGSTS|ATOM|RED\b|UBLK|LDSM|STSM")),
    ("synchronisation", re.compile(r"BAR|DEPBAR|LDGDEPBAR|MEMBAR|WARPSYNC|SHFL|VOTE|SYNCS|ERRBAR|FENCE|CCTL|REDUX|MATCH")),
    ("special", re.compile(r"MUFU")),
    ("conversion", re.compile(r"F2F|F2I|I2F|F2FP|I2FP|FRND|F2IP")),
    ("multiply-add", re.compile(r"FFMA|FMUL|FADD|FFMA2|FMUL2|FADD2|HFMA2|HADD2|HMUL2|IMAD|FSWZADD")),
    ("control", re.compile(r"BRA|BSSY|BSYNC|EXIT|RET|CALL|BREAK|BMOV|NOP|NANOSLEEP|YIELD|WARPGROUP|PLOP3")),
)


@dataclass(frozen=True)
class Loop:
    """An innermost loop that reads or writes memory: what a thread does in one turn, the code of every branch counted."""

    instructions: int
    by_unit: dict[str, int] = field(hash=False)
    loaded: int  # bytes from global memory
    stored: int
    widest_load: int  # bits


_LINE = re.compile(r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<text>[^;]*);", re.M)
_LABEL = re.compile(r"^(?P<label>\.[\w.]+):", re.M)
_MEMORY = re.compile(r"^(?P<op>LDG|STG)(?:STS)?\.E(?P<flags>[\w.]*)")  # LDGSTS: an asynchronous copy


Code = list[tuple[str, str]]


def disassembled(cubin: bytes) -> Code:
    """(opcode with its flags, label that it jumps to or ""), instruction by instruction; labels stand as (":", label)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            found.append((":", label["label"]))
        elif instruction := _LINE.match(line):
            words = re.sub(r"^@!?U?P\w+\s+", "", instruction["text"].strip())
            target = re.search(r"`\((\.[\w.]+)\)", words) if words.startswith("BRA") else None
            found.append((words.split()[0], target[1] if target else ""))
    return found


def loops(code: Code) -> list[Loop]:
    """The innermost loops over memory, the one that loads most first."""
    at = {label: i for i, (op, label) in enumerate(code) if op == ":"}
    spans = sorted({(at[to], i) for i, (op, to) in enumerate(code) if op.startswith("BRA") and to in at and at[to] < i})
    innermost = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b and _moves(code[c : d + 1]) for c, d in spans)]
    found = [_loop([op for op, _ in code[a : b + 1] if op != ":"]) for a, b in innermost]
    return sorted((loop for loop in found if loop.loaded or loop.stored), key=lambda loop: (-loop.loaded, -loop.stored))


def whole(code: Code) -> Loop:
    """The whole program, as if it ran through once: of kernels without a loop."""
    ops = [op for op, _ in code if op != ":"]
    while ops and ops[-1].startswith(("NOP", "BRA")):  # what pads the end
        ops.pop()
    return _loop(ops)


def _moves(code: Code) -> bool:
    return any(_MEMORY.match(op) for op, _ in code)


def _loop(ops: list[str]) -> Loop:
    units = Counter(next((name for name, pattern in UNITS if pattern.match(op)), "integer and logic") for op in ops)
    moved = {"LDG": 0, "STG": 0}
    widest = 0
    for op in ops:
        if m := _MEMORY.match(op):
            bits = next((int(n) for n in re.findall(r"\.(128|64)\b", m["flags"])), 0) or (
                16 if "16" in m["flags"] else 8 if "8" in m["flags"] else 32
            )
            moved[m["op"]] += bits // 8
            widest = max(widest, bits if m["op"] == "LDG" else 0)
    return Loop(len(ops), dict(units), moved["LDG"], moved["STG"], widest)
