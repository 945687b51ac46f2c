"""Every kernel compiles for every target with no GPU at hand, keeps its state in registers and reads the vocabulary 128 bits at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from bench import guard
from bench.compile import _GCN_LOAD, _PTX_LOAD, TARGETS, load_widths, occupancy
from bench.launches import LAUNCHES, VOCABULARY

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("compile")  # one process, since the reports are made once


def python(*arguments: str, **variables: str) -> str:
    """What a process that does not interpret kernels prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def reports(*arguments: str) -> list[dict]:
    """``python -m bench.compile --json``"""
    return json.loads(python("-m", "bench.compile", "--json", *arguments))


@pytest.fixture(scope="module")
def ours() -> list[dict]:
    return reports("--thin", "--target", "sm_90", "sm_80", "sm_100", "gfx942")


def label(r: dict) -> str:
    return f"{r['kernel']} for {r['target']}, launched by {r['launch']!r}"


def test_every_kernel_compiles_for_every_target(ours):
    assert [f"{label(r)}: {r['error']}" for r in ours if r["error"]] == []
    kernels = {r["kernel"] for r in ours}
    assert {(r["kernel"], r["target"]) for r in ours} == {(kernel, target) for kernel in kernels for target in TARGETS}


def test_every_entry_kernel_is_covered(ours):
    """A kernel of kernels/*.py that no call of bench/launches.py launches would be compiled for the first time on a user's GPU."""
    written = {name for file in (ROOT / "kernels").glob("*.py") for name in _functions(file) if name.endswith("_kernel")}
    assert written == {r["kernel"] for r in ours}


def test_nothing_spills(ours):
    assert [f"{label(r)}: {r['spilled']} bytes" for r in ours if r["spilled"]] == []


def test_vocabulary_is_loaded_128_bits_at_a_time(ours):
    """No loop over the vocabulary loads in narrower pieces where V and the strides are multiples of 16, nor does a gradient's in any case.
    restrict_kernel gathers a few tokens."""
    walkers = [r for r in ours if any(shape and shape[-1] == VOCABULARY for shape in r["shapes"]) and r["kernel"] != "restrict_kernel"]
    walkers += [r for r in ours if "backward" in r["kernel"] and "odd" in r["launch"]]
    in_loops = [r for r in walkers if r["loop_load_bits"]]
    assert walkers
    assert in_loops
    assert [f"{label(r)}: {r['loop_load_bits']}" for r in in_loops if r["loop_load_bits"] != [128]] == []


def test_launches_ask_for_products_and_sums_as_one_instruction():
    """Which Triton may not make by itself."""
    program = """
from bench import compile, launches
print(sorted({s.kernel for s in compile.record(launches.LAUNCHES, "sm_90") if not s.options["enable_fp_fusion"]}))
"""
    assert python("-c", program, TRITON_DEFAULT_FP_FUSION="0").strip() == "[]"


def test_no_worse_than_the_baseline(ours):
    baseline = guard.read()
    if baseline["versions"]["triton"] != triton.__version__:
        pytest.skip(f"the baseline is of triton {baseline['versions']['triton']}, this is {triton.__version__}: registers differ")
    assert guard.worse(guard.compiled(ours), baseline["compiled"]) == [], f"if this is meant: {guard.RENEW}"


def test_launches_name_what_they_do():
    assert all(len(name) <= 48 for name in LAUNCHES), "the table of bench.compile has 48 columns for it"


def _functions(file: Path) -> list[str]:
    return [line.split("def ")[1].split("(")[0] for line in file.read_text().splitlines() if line.startswith("def ")]


# ---- the tool itself ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples() -> dict[str, dict[str, dict]]:
    """launch -> target -> report, for kernels with known faults."""
    by_launch: dict[str, dict[str, dict]] = {}
    for r in reports("--launches", "tests.compile_samples", "--target", "sm_90", "gfx942"):
        by_launch.setdefault(r["launch"], {})[r["target"]] = r
    return by_launch


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_tool_sees_widths_spills_and_errors(samples, target):
    wide, narrow, spills = (samples[name][target] for name in ("wide bf16", "narrow", "spills"))
    assert (wide["loop_load_bits"], wide["spilled"], wide["warps"]) == ([128], 0, 4)
    assert 0.5 < wide["occupancy"] <= 1
    assert narrow["loop_load_bits"] == [16]
    assert spills["occupancy"] < 0.2
    assert spills["spilled"] > 0 or target == "gfx942"  # which has twice the registers
    assert "incompatible dimensions" in samples["broken"][target]["error"]


def test_tool_takes_constexpr_functions_and_tuples(samples):
    assert samples["options"]["sm_90"]["error"] == ""


def test_same_specialisation_is_compiled_once(samples):
    assert "the same again" not in samples


def test_load_widths_of_loops():
    ptx = """
        ld.global.b64 {%rd1}, [%rd2];
    $L__BB0_1:
        @%p1 ld.global.L1::evict_first.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        cp.async.cg.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x10, %r7;
        @%p2 bra $L__BB0_1;
        ld.global.b16 %rs1, [%rd3];
        bra.uni $L__BB0_2;
    $L__BB0_2:
        ret;
    """
    assert load_widths(ptx, _PTX_LOAD) == ({64, 128, 16}, {128})
    gcn = """
        global_load_dwordx2 v[0:1], v2, s[0:1]
    .LBB0_1:
        buffer_load_dwordx4 v[3:6], v2, s[8:11], 0 offen
        s_cbranch_scc1 .LBB0_1
        s_branch .LBB0_3
    .LBB0_2:
        global_load_ushort v1, v0, s[2:3]
        s_endpgm
    .LBB0_3:
        global_load_ubyte v1, v0, s[2:3]
        s_branch .LBB0_2
    """
    assert load_widths(gcn, _GCN_LOAD) == ({64, 128, 16, 8}, {128})  # the branch back to LBB0_2 makes no loop


def test_occupancy():
    assert occupancy(TARGETS["sm_90"], registers=32, warps=4, shared=0) == 1.0
    assert occupancy(TARGETS["sm_90"], registers=64, warps=8, shared=0) == 0.5
    assert occupancy(TARGETS["sm_90"], registers=255, warps=8, shared=0) == 0.125
    assert occupancy(TARGETS["sm_90"], registers=32, warps=4, shared=113 * 1024) == 0.125  # two blocks by shared memory
    assert occupancy(TARGETS["gfx942"], registers=64, warps=4, shared=0) == 1.0
    assert occupancy(TARGETS["gfx942"], registers=256, warps=4, shared=0) == 0.25
