"""Every family's kernels compile for sm_90a and sm_100a and pass the gates; every gate refuses what it is there for."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from blackwell_kernels.common.testing import compile as aot
from blackwell_kernels.common.testing.inventory import kernels

pytest.importorskip("triton")
pytestmark = pytest.mark.aot

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("moe", "dsa", "gdn")

# what the gate must say of each faulty case; None: it must pass
VERDICTS = {
    "honest fp8": None,
    "honest bf16": None,
    "honest fill": None,
    "honest descriptor": None,
    "traps": r"traps \(sm_\d+a\): its code traps",
    "tensor memory": r"tensor memory \d+ columns over 512",
    "shared memory": r"shared memory [\d,]+ B over 232,448",
    "spills": r"stack \d+ B a thread \(spills\), allowed 0",
    "mma.sync": r"falls back to mma\.sync",
    "other kind": r"tensor-core instructions f16, expected fp8",
    "unexpected mma": r"tensor-core instructions f16, expected none",
    "no mma": r"no kernel uses tensor cores",
    "no tma": r"no TMA copy",
    "descriptor": r"a descriptor is built on the device",
    "grid": r"grid \(1, 65536, 1\) over",
    "loop": r"\d+ instructions in the innermost MMA loop, limit 5",
    "misnamed": r"mma names kernels that were not launched: fil",
    "launches nothing": r"no kernel was launched",
    "raises": r"aot_faulty\.py:\d+: CompilationError",
    "aborts": r"the compiler died: exit status -6",
    "honest after the abort": None,
}


@functools.cache
def family_results(family: str, arch: int) -> list[aot.CaseResult]:
    return aot.run(f"blackwell_kernels.{family}.aot", [arch])


@functools.cache
def faulty_results() -> dict[tuple[str, int], aot.CaseResult]:
    results = aot.run("aot_faulty", path=Path(__file__).parent)
    return {(result.case, result.arch): result for result in results}


@pytest.mark.parametrize("case", VERDICTS)
def test_each_gate_refuses_what_it_is_there_for(case):
    found = {arch: faulty_results().get((case, arch)) for arch in aot.ARCHS}
    verdict = VERDICTS[case]
    results = [result for result in found.values() if result is not None]
    assert results, f"{case} was not run"
    for result in results:
        if verdict is None:
            assert result.problems == ()
            assert result.kernels
        else:
            assert any(re.search(verdict, problem) for problem in result.problems), result.problems


def test_no_faulty_case_is_forgotten():
    assert {case for case, _ in faulty_results()} == set(VERDICTS)


def test_tensor_memory_over_the_limit_shows_as_a_trap_too():
    result = faulty_results()["tensor memory", 100]
    assert any("its code traps" in problem for problem in result.problems)


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_passes_the_gates(family, arch):
    results = family_results(family, arch)
    assert results, f"{family} has no case for sm_{arch}a"
    problems = [f"{result.case}: {problem}" for result in results for problem in result.problems]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_is_compiled_by_some_case(family):
    for arch in aot.ARCHS:
        others = tuple(f"_sm{other}" for other in aot.ARCHS if other != arch)
        wanted = {name for name in kernels(ROOT / "kernels" / family) if not name.endswith(others)}
        compiled = {s.kernel for result in family_results(family, arch) for s in result.kernels}
        assert wanted, f"no kernel found in {family}"
        assert wanted <= compiled, f"never launched on sm_{arch}a: {sorted(wanted - compiled)}"
