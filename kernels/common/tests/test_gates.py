"""Gates on made-up statistics, and the readers of PTX and SASS on made-up text; real kernels: tests/test_aot.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blackwell_kernels.common.testing import compile as aot
from blackwell_kernels.common.testing import statistics
from blackwell_kernels.common.testing.gates import AotCase, gates
from blackwell_kernels.common.testing.interpreter import interpreting

GOOD = statistics.Statistics(
    kernel="gemm",
    arch=100,
    target="sm_100a",
    grid=(1, 1, 1),
    warps=8,
    registers=168,
    stack=0,
    shared=200_000,
    tmem=256,
    traps=0,
    mma=("fp8",),
    tma=2,
    tensormap_replace=0,
    instructions=900,
    mma_loop=90,
)
CASE = AotCase("case", lambda: None, mma={"gemm": "fp8"})


def test_a_good_kernel_passes():
    assert gates([GOOD], CASE) == []
    assert gates([GOOD], AotCase("case", lambda: None, mma="required", tma=frozenset({"gemm"}))) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"target": "sm_100"}, "compiled for sm_100"),
        ({"target": ""}, "an unknown target"),
        ({"shared": 232_449}, "shared memory"),
        ({"tmem": 513}, "tensor memory"),
        ({"traps": 1}, "traps"),
        ({"stack": 8}, "stack 8 B"),
        ({"registers": 255, "warps": 16}, "255 registers x 512 threads over 65,536"),
        ({"grid": (1, 1, 65_536)}, "grid"),
        ({"grid": (2**31,)}, "grid"),
        ({"grid": (1, 1, 1, 1)}, "grid"),
        ({"tensormap_replace": 3}, "built on the device"),
        ({"mma": ()}, "tensor-core instructions none, expected fp8"),
        ({"mma": ("fp8", "mma.sync")}, "fp8 + mma.sync, expected fp8"),
    ],
)
def test_each_limit_is_held(change, problem):
    (found,) = gates([replace(GOOD, **change)], CASE)
    assert problem in found
    assert found.startswith("gemm (sm_100a): ")


def test_the_limits_themselves_pass():
    edge = replace(GOOD, shared=232_448, tmem=512, registers=128, warps=16, grid=(2**31 - 1, 65_535, 65_535))
    assert gates([edge], CASE) == []


def test_allowances_may_be_for_one_arch():
    case = replace(CASE, spill_allowance={"gemm@100": 64, "gemm": 0}, mma={"gemm": "fp8", "gemm@90": "fp8+mma.sync"})
    assert gates([replace(GOOD, stack=64)], case) == []
    hopper = replace(GOOD, arch=90, target="sm_90a", mma=("fp8", "mma.sync"))
    assert gates([hopper], case) == []
    assert "allowed 0" in gates([replace(hopper, stack=64)], case)[0]


def test_kernels_without_an_expectation_use_no_tensor_cores():
    assert gates([GOOD, replace(GOOD, kernel="other", mma=())], CASE) == []
    assert "expected none" in gates([GOOD, replace(GOOD, kernel="other")], CASE)[0]


PTX = """
.target sm_100a
\ttcgen05.mma.cta_group::1.kind::f8f6f4 [ %r1 + 0 ], %rd1, %rd2, %r2, %p1;
\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0;
"""


def test_kinds_of_mma_instructions():
    assert statistics.mma_kinds(PTX) == ("f16", "fp8")
    assert statistics.mma_kinds("\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1};") == ("mma.sync",)
    assert statistics.mma_kinds("\twgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%f1};") == ("tf32",)
    assert statistics.mma_kinds("\tfma.rn.f32 %f1, %f2, %f3, %f4;\n\twgmma.wait_group.sync.aligned 0;") == ()


# two nested loops; the outer has an MMA of its own; a later loop has none
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/               @P0 FADD R2, R2, R3 ;
        /*0030*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24 ;
        /*0040*/              @!P1 BRA 0x20 ;
        /*0050*/              @UP2 BRA.U 0x10 ;
        /*0060*/                   FADD R2, R2, R3 ;
        /*0070*/               @P0 BRA 0x60 ;
        /*0080*/                   BRA 0x80 ;
"""


def test_the_innermost_loop_with_an_mma_is_measured():
    instructions = statistics.parse_sass(SASS)
    assert len(instructions) == 9
    assert instructions[2] == (0x20, "FADD R2, R2, R3")
    assert statistics.innermost_mma_loop(instructions) == 3
    assert statistics.innermost_mma_loop([i for i in instructions if "MMA" not in i[1]]) == 0


def enter(arch: int) -> None:
    with aot.compile_only(arch):
        pytest.fail("entered")


def test_compile_only_says_what_it_needs():
    with pytest.raises(ValueError, match="no chip of arch 80; supported: 90, 100"):
        enter(80)
    if interpreting():
        with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
            enter(90)


def test_a_module_that_does_not_import_is_a_failed_case():
    (result,) = aot.run("blackwell_kernels.no_such_family.aot", [90])
    assert result.case == "(import)"
    assert "No module named 'blackwell_kernels.no_such_family'" in result.problems[0]


def test_the_command_reports_and_its_exit_status_tells(monkeypatch, capsys):
    result = aot.CaseResult("m", "case", 100, (GOOD,), ())
    monkeypatch.setattr(aot, "run", lambda module, archs, cases: [result])
    assert aot.main(["--family", "gdn", "--arch", "100"]) == 0
    assert "ok   case sm_100a" in capsys.readouterr().out
    result = replace(result, problems=("it traps",))
    assert aot.main(["--module", "m", "--json"]) == 1
    assert '"it traps"' in capsys.readouterr().out
