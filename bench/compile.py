"""What the compilers make of every kernel, for GPUs that need not be there: registers, spills, shared memory, load widths, occupancy,
and on NVIDIA the instructions that it issues for each column (bench/instructions.py).

    python -m bench.compile                                        # every kernel of bench/launches.py, for every target
    python -m bench.compile --kernel statistics --target sm_90 --json

The specialisations are not written down: the calls of ``bench/launches.py`` run with a driver that stands in for a GPU of each target, and what the
launchers pass is compiled exactly as a launch would (types, constexprs, warps, divisibility by 16), then not launched.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench import instructions
from rlkern import _backend


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: its multiprocessors (AMD: compute units) and what each holds, by the CUDA programming guide and AMD's CDNA3 guide."""

    gpu: GPUTarget
    multiprocessors: int  # of the A100, H200, B200, MI300X
    shared: int  # bytes
    warps: int
    registers: int  # NVIDIA: 32-bit registers; AMD: vector registers of one lane of a SIMD, of which there are four
    blocks: int = 32


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), multiprocessors=108, shared=164 << 10, warps=64, registers=65536),
    "sm_90": Target(GPUTarget("cuda", 90, 32), multiprocessors=132, shared=228 << 10, warps=64, registers=65536),
    "sm_100": Target(GPUTarget("cuda", 100, 32), multiprocessors=148, shared=228 << 10, warps=64, registers=65536),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), multiprocessors=304, shared=64 << 10, warps=32, registers=512),
}


# ---- recording ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specialisation:
    """One variant of one kernel, as its launcher asks for it."""

    target: str
    kernel: str
    launch: str  # the first call of bench/launches.py that needs it
    shapes: tuple[tuple[int, ...], ...]  # of the tensors it was given
    fn: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[Any, Any]
    attrs: Mapping[Any, Any]
    options: Mapping[str, Any]


class _Driver:
    """As much of a Triton driver as a launch asks before it compiles."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target].gpu


def record(launches: Mapping[str, Callable[[], Any]], target: str) -> list[Specialisation]:
    """Run the calls, on CPU tensors, and return every specialisation that they would launch on ``target``. Their results are garbage."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("with TRITON_INTERPRET=1 kernels are not compiled; unset it")
    found: dict[Any, Specialisation] = {}
    current: dict[str, Any] = {}
    run = JITFunction.run

    def run_recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        current["shapes"] = tuple(_shapes((args, tuple(kwargs.values()))))
        return run(self, *args, **kwargs)

    def compile_recorded(self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any, attrs: Any, warmup: bool) -> None:
        spec = Specialisation(target, self.__name__, current["launch"], current["shapes"], self, signature, constexprs, attrs, options.__dict__)
        found.setdefault((self, key), spec)  # returning None ends the launch here, and leaves nothing in the kernel's cache

    with contextlib.ExitStack() as stack:
        stack.enter_context(_active(_Driver(target)))
        stack.enter_context(replaced(JITFunction, run=run_recorded, _do_compile=compile_recorded))
        # The library refuses CPU tensors unless it believes itself interpreted, and asks PyTorch whose GPU it is, and how large.
        stack.enter_context(replaced(_backend, INTERPRETED=True))
        for module in [m for name, m in sys.modules.items() if name.startswith("rlkern.") and hasattr(m, "multiprocessors")]:
            stack.enter_context(replaced(module, multiprocessors=lambda x: TARGETS[target].multiprocessors))
        stack.enter_context(replaced(torch.version, hip="AMD" if TARGETS[target].gpu.backend == "hip" else None))
        for current["launch"], launch in launches.items():
            launch()
    return list(found.values())


def _shapes(arguments: Any) -> Iterator[tuple[int, ...]]:
    """Of the tensors among a kernel's arguments, and in the tuples among them."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield tuple(argument.shape)
        elif isinstance(argument, tuple):
            yield from _shapes(argument)


@contextlib.contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def _active(driver: _Driver) -> Iterator[None]:
    triton.runtime.driver.set_active(driver)
    try:
        yield
    finally:
        triton.runtime.driver.set_active(None)  # the machine's own again, when it is next asked for


# ---- compiling and reading the result ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """What a thread does in a turn of a loop, the code of all branches counted; "column" is one of a vocabulary or of tokens."""

    issued: float  # instructions for each column that it loads (or where it loads none, stores)
    units: dict[str, float] = field(hash=False)  # of these by the unit that executes them
    column_bytes: float  # loaded and stored for each column
    in_flight: int  # bytes that a multiprocessor's resident threads ask for in a turn
    headroom: dict[str, float] = field(hash=False)  # of each GPU of the target: see bench/instructions.py


@dataclass(frozen=True)
class Report:
    """What one specialisation compiles to. Bytes, unless it says bits."""

    target: str
    kernel: str
    launch: str
    shapes: tuple[tuple[int, ...], ...]
    error: str = ""  # why it does not compile; all below is then 0
    warps: int = 0
    registers: int = 0
    spilled: int = 0  # bytes of local memory and stack
    shared: int = 0
    occupancy: float = 0.0  # resident warps of the most that fit, as far as registers and shared memory decide
    load_bits: int = 0  # the widest load from global memory
    loop_load_bits: tuple[int, ...] = ()  # every width that loops load with
    loops: int = 0  # NVIDIA: innermost loops over memory
    # NVIDIA: of a kernel over logits the loops that load; else the one that loads (or stores) most, or the whole program where there is no loop.
    passes: tuple[Pass, ...] = ()


def compile_one(spec: Specialisation) -> Report:
    """Compile for the target, with no need of it. Triton's own cache on disk makes a second time quick."""
    target = TARGETS[spec.target]
    source = ASTSource(spec.fn, spec.signature, spec.constexprs, spec.attrs)
    try:
        kernel = triton.compile(source, target=target.gpu, options=dict(spec.options))
    except triton.TritonError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the device function that fails, not the kernels that call it
            cause = cause.__cause__
        return Report(spec.target, spec.kernel, spec.launch, spec.shapes, error=f"{error}\n{cause}" if str(cause) not in str(error) else str(error))
    if target.gpu.backend == "cuda":
        text, loads = kernel.asm["ptx"], _PTX_LOAD
        registers, spilled, static = _cubin_usage(kernel.asm["cubin"])
    else:
        text, loads = kernel.asm["amdgcn"], _GCN_LOAD
        registers, spilled, static = _gcn_usage(text)
    warps, shared = kernel.metadata.num_warps, max(static, kernel.metadata.shared)
    everywhere, in_loops = load_widths(text, loads)
    occupied = occupancy(target, registers, warps, shared)
    issue = _issue(spec, kernel.asm["cubin"], round(occupied * target.warps) * 32) if target.gpu.backend == "cuda" else {}
    return Report(
        spec.target,
        spec.kernel,
        spec.launch,
        spec.shapes,
        warps=warps,
        registers=registers,
        spilled=spilled,
        shared=shared,
        occupancy=occupied,
        load_bits=max(everywhere, default=0),
        loop_load_bits=tuple(sorted(in_loops)),
        **issue,
    )


def _issue(spec: Specialisation, cubin: bytes, threads: int) -> dict[str, Any]:
    """The figures of a report that are counted in machine code, with so many resident threads. Loops are over x, and of divergences y."""
    kinds = [spec.signature[name].lstrip("*") for name in ("x_ptr", "y_ptr", "LOGITS") if isinstance(spec.signature.get(name), str)]
    itemsizes = [_ITEMSIZES[kind] for kind in kinds if kind in _ITEMSIZES]
    code = instructions.disassembled(cubin)
    found = instructions.loops(code)
    loops = found[:1] or [instructions.whole(code)]
    if itemsizes:  # each goes over the columns once; over tokens there are as many loops as there are inputs to add up
        loops = [loop for loop in found if loop.loaded] or loops
    chips = {name: chip for name, chip in instructions.CHIPS.items() if chip.target == spec.target}
    passes = []
    for loop in loops:
        # A kernel over tokens has no column of one tensor; four bytes stand for one.
        columns = (loop.loaded or loop.stored) / (sum(itemsizes) or 4)
        if columns:
            passes.append(
                Pass(
                    round(loop.instructions / columns, 2),
                    {name: round(count / columns, 2) for name, count in loop.by_unit.items()},
                    round((loop.loaded + loop.stored) / columns, 2),
                    threads * loop.loaded,
                    {name: round(chip.headroom(loop), 2) for name, chip in chips.items()},
                )
            )
    return {"loops": len(found), "passes": tuple(passes)}


_ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def _cubin_usage(cubin: bytes) -> tuple[int, int, int]:
    """(registers, bytes of local memory and stack, static shared memory), by the cuobjdump that Triton ships."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", said)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], usage["SHARED"]


def _gcn_usage(assembly: str) -> tuple[int, int, int]:
    """(vector registers, bytes of scratch memory, static shared memory), by the metadata in the assembly."""
    number = {
        name: int(value)
        for name, value in re.findall(r"^\s*\.(vgpr_count|private_segment_fixed_size|group_segment_fixed_size):\s*(\d+)", assembly, re.M)
    }
    return number["vgpr_count"], number["private_segment_fixed_size"], number["group_segment_fixed_size"]


def occupancy(target: Target, registers: int, warps: int, shared: int) -> float:
    """Resident warps, of the most that a multiprocessor holds."""
    if target.gpu.backend == "cuda":
        # Registers are given out 256 at a time to a warp; a block's shared memory has 1 KiB of the system's.
        by_registers = target.registers // (-(-registers * 32 // 256) * 256) // warps
        by_shared = target.shared // (shared + 1024)
    else:
        # Eight registers at a time; a wave stays on its SIMD, which holds eight.
        by_registers = min(8, target.registers // (-(-registers // 8) * 8)) * 4 // warps
        by_shared = target.shared // shared if shared else target.blocks
    return min(target.blocks, by_registers, by_shared, target.warps // warps) * warps / target.warps


# PTX: `ld.global.v4.b32`, and asynchronous copies to shared memory, which name their bytes: `cp.async.cg.shared.global [..], [..], 0x10`.
_PTX_LOAD = re.compile(
    r"\bld\.global(?:\.[a-zL][\w:]*)*?(?:\.v(?P<count>\d))?\.[bfsu](?P<bits>\d+)\b"
    r"|\bcp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (?P<bytes>0x[0-9a-f]+|\d+)"
)
# GCN: `global_load_dwordx4`, `buffer_load_ushort`.
_GCN_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(?:(?P<word>dword)(?:x(?P<count>\d))?|[us]?(?P<name>byte|short)\w*)")


def load_widths(assembly: str, pattern: re.Pattern[str]) -> tuple[set[int], set[int]]:
    """Widths in bits of the loads from global memory: of all, and of those in loops."""
    everywhere: set[int] = set()
    looped: set[int] = set()
    for block, in_loop in _blocks(assembly):
        widths = {_width(m.groupdict()) for line in block for m in pattern.finditer(line)}
        everywhere |= widths
        if in_loop:
            looped |= widths
    return everywhere, looped


_LABEL = re.compile(r"\s*([$.\w]+):")
_BRANCH = re.compile(r"(?P<predicate>@!?%\w+\s+)?\b(?P<op>bra(?:\.uni)?|s_c?branch\w*)\s+(?P<to>[$.\w]+)")
_END = re.compile(r"\s*(ret|s_endpgm)\b")


def _blocks(assembly: str) -> list[tuple[list[str], bool]]:
    """The basic blocks, each with whether control can come back to it. Text order does not tell: compilers move cold code to the end."""
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    jumps: list[list[str]] = [[]]  # labels that a block may jump to
    falls: list[bool] = [True]  # whether it may go on to the next one
    for line in assembly.splitlines():
        label = _LABEL.match(line)
        if label or (blocks[-1] and (jumps[-1] or not falls[-1])):
            blocks.append([])
            jumps.append([])
            falls.append(True)
        if label:
            labels[label[1]] = len(blocks) - 1
        blocks[-1].append(line)
        if branch := _BRANCH.search(line):
            jumps[-1].append(branch["to"])
            falls[-1] = bool(branch["predicate"]) or branch["op"].startswith("s_cbranch")
        elif _END.match(line):
            falls[-1] = False
    after = [{labels[to] for to in jumps[i] if to in labels} | ({i + 1} if falls[i] and i + 1 < len(blocks) else set()) for i in range(len(blocks))]

    def returns(start: int) -> bool:
        seen: set[int] = set()
        ahead = set(after[start])
        while ahead:
            block = ahead.pop()
            seen.add(block)
            ahead |= after[block] - seen
        return start in seen

    return [(block, returns(i)) for i, block in enumerate(blocks)]


def _width(load: dict[str, str | None]) -> int:
    if load.get("bytes"):
        return 8 * int(str(load["bytes"]), 0)
    if load.get("name"):
        return {"byte": 8, "short": 16}[str(load["name"])]
    return int(load.get("bits") or 32) * int(load.get("count") or 1)


# ---- command line ---------------------------------------------------------------------------------------------------------------------------

_jobs: list[Specialisation] = []


def _compile_job(i: int) -> Report:
    return compile_one(_jobs[i])


def compile_all(
    launches: Mapping[str, Callable[[], Any]],
    targets: Sequence[str],
    *,
    kernel: str = "",
    once: Collection[str] = (),
    processes: int | None = None,
) -> list[Report]:
    """Record and compile, in parallel, the kernels whose name contains ``kernel``; the launches named in ``once`` for the first target alone."""
    _jobs[:] = [
        spec
        for target in targets
        for spec in record({name: call for name, call in launches.items() if target == targets[0] or name not in once}, target)
        if kernel in spec.kernel
    ]
    # Forked, since a kernel and its constexprs cannot be pickled; the children never use PyTorch, whose threads do not survive a fork.
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count()) as pool:
        return pool.map(_compile_job, range(len(_jobs)), chunksize=1)


def _print_table(reports: list[Report]) -> None:
    row = "{:8}{:28}{:48}{:>6}{:>6}{:>9}{:>8}{:>11}{:>11}{:>9}{:>12}  {:24}{}"
    print(f"triton {triton.__version__}")
    print(
        row.format(
            "target",
            "kernel",
            "first launched by",
            "warps",
            "regs",
            "spilled",
            "shared",
            "occupancy",
            "load bits",
            "in loops",
            "issued",
            "headroom",
            "by unit",
        )
    )
    for r in sorted(reports, key=lambda r: (r.kernel, r.launch, r.target)):
        if r.error:
            print(f"{r.target:8}{r.kernel:28}{r.launch:48}does not compile")
        else:
            widths = " ".join(map(str, r.loop_load_bits))
            figures = (r.warps, r.registers, r.spilled, r.shared, f"{r.occupancy:.0%}", r.load_bits, widths)
            issued = " + ".join(f"{p.issued:.1f}" for p in r.passes)
            headroom = " + ".join(" ".join(f"{name} {x:.2f}" for name, x in p.headroom.items()) for p in r.passes)
            units = " + ".join(", ".join(f"{unit} {x:.1f}" for unit, x in sorted(p.units.items(), key=lambda u: -u[1])) for p in r.passes)
            print(row.format(r.target, r.kernel, r.launch, *figures, issued, headroom, units))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--launches", default="bench.launches", help="the module whose table LAUNCHES names the calls to record (%(default)s)")
    parser.add_argument("--thin", action="store_true", help="compile the launches that its list VARIATIONS names for the first target alone")
    parser.add_argument("--json", action="store_true", help="print a JSON list, one object a specialisation")
    parser.add_argument("--processes", type=int, help="compile so many at a time (default: one a core)")
    options = parser.parse_args(argv)
    table = importlib.import_module(options.launches)
    once = table.VARIATIONS if options.thin else ()
    reports = compile_all(table.LAUNCHES, options.target, kernel=options.kernel, once=once, processes=options.processes)
    if options.json:
        json.dump([dataclasses.asdict(r) for r in reports], sys.stdout)
        return 0
    _print_table(reports)
    errors = dict.fromkeys(f"{r.kernel}: {r.error}" for r in reports if r.error)
    print("\n".join(errors))
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
