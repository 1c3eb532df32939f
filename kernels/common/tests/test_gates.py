"""Gates on made-up statistics, and the readers of PTX and SASS on made-up text; real kernels: tests/test_aot.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blackwell_kernels.common.testing import compile as aot
from blackwell_kernels.common.testing import sass, statistics
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
        ({"unwritten": ("R5", "UR13")}, "reads R5, UR13, which nothing writes"),
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
    instructions = sass.parse(SASS)
    assert len(instructions) == 9
    assert instructions[2] == (0x20, "FADD R2, R2, R3")
    assert sass.innermost_mma_loop(instructions) == 3
    assert sass.innermost_mma_loop([i for i in instructions if "MMA" not in i[1]]) == 0


# how ptxas 12.8 made an address for wgmma, wrong on an H200: UR13 comes from nowhere
MISCOMPILED = """
        /*0000*/                   R2UR UR12, R2 ;
        /*0010*/                   UIADD3 UR4, UP0, UR13, 0x40, URZ ;
        /*0020*/                   UIADD3.X UR5, UR13, -0x7fffffe0, URZ, UP0, !UPT ;
        /*0030*/                   UMOV UR26, UR4 ;
        /*0040*/                   UMOV UR27, UR5 ;
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R24, R64, gdesc[UR24].tnspB, R24 ;
"""


def test_a_register_that_nothing_writes_is_found():
    defined = "/*0000*/ CS2R R64, SRZ ;\n /*0010*/ LDC.64 R2, c[0x0][0x28] ;\n"
    code = sass.parse(f" {defined} {MISCOMPILED}")
    assert sass.unwritten(code) == ("UR13",)
    assert sass.unwritten([(at, text.replace("R2UR UR12", "R2UR UR13")) for at, text in code]) == ()


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("STS.128 [R4+UR2], R8", ("R4", "R8", "UR2")),
        ("IMAD R5, R4, R4, R6", ("R4", "R6")),
        ("ISETP.GE.AND P1, PT, R0, 0x1, PT", ("R0",)),
        ("LOP3.LUT P0, R2, R6, 0x1f, RZ, 0xc0, !PT", ("R6",)),
        ("REDUX.SUM.S32 UR28, R18", ("R18",)),
        ("HGMMA.64x16x16.F32.BF16 R8, gdesc[UR8], R8", ("UR8", "UR9", "UR10", "UR11")),
        ("HGMMA.64x16x16.F32.BF16 R8, R40, gdesc[UR8].tnspB, R8", ("R40", "UR10", "UR11")),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR9], idesc[UR10], UPT", ("UR4", "UR5", "UR6", "UR7", "UR9", "UR10")),
    ],
)
def test_what_an_instruction_reads(text, read):
    assert set(sass.unwritten([(0, text)])) == set(read)


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("LDG.E.128 R4, desc[UR4][R2.64]", 7),
        ("LDC.64 R4, c[0x0][0x210]", 5),
        ("CS2R R4, SRZ", 5),
        ("CS2R.32 R4, SR_CLOCKLO", 4),
        ("IMAD.WIDE R4, R2, 0x4, R8", 5),
        ("FMUL2 R4, R80.F32x2.HI_LO, R48.F32x2.HI_LO", 5),
        ("LDSM.16.M88.4 R4, [R2]", 7),
        ("HMMA.16816.F32.BF16 R4, R20, R24, RZ", 7),
        ("HGMMA.64x64x16.F32.BF16 R4, gdesc[UR8], RZ, !UPT", 35),
        ("LDTM.x32 R4, tmem[UR10]", 35),
        ("FADD R4, R2, R3", 4),
    ],
)
def test_what_an_instruction_writes(text, last):
    uses = [(0, text), *((i, f"STG.E [R200.64], R{i}") for i in range(4, 40))]
    found = [f"R{i}" for i in range(4, 40) if f"R{i}" in sass.unwritten(uses)]
    assert found[0] == f"R{last + 1}" if "LDTM" not in text else not found


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
