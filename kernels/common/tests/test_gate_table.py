"""The gate table: what is chosen, what a line says, exit codes; the compiler itself is made up here."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from blackwell_kernels.common.testing import gate_table
from blackwell_kernels.common.testing.compile import CaseResult
from blackwell_kernels.common.testing.statistics import Statistics

GOOD = Statistics(
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


def result(case, *kernels, problems=()):
    return CaseResult("module", case, 100, kernels, problems)


def test_cases_that_share_their_code_share_a_line_and_failures_come_first():
    spilling = replace(GOOD, kernel="scan", stack=64, mma=())
    found = gate_table.cells(
        [
            result("small", GOOD),
            result("large", replace(GOOD, grid=(99, 1, 1))),
            result("spills", spilling, problems=("scan (sm_100a): stack 64 B a thread (spills), allowed 0",)),
            result("dies", problems=("the compiler died: exit status -6",)),
        ]
    )
    assert all(len(line) == len(gate_table.HEAD) for line in found)
    assert [(line[0], line[2], line[-1]) for line in found] == [
        ("dies", "1", "the compiler died: exit status -6"),
        ("scan", "1", "stack 64 B a thread (spills), allowed 0"),
        ("gemm", "2", "ok"),
    ]
    assert found[2][1:11] == ["sm_100a", "2", "8", "168", "0", "200,000", "256", "fp8", "2", "900"]


def test_a_sample_has_one_case_of_each_kind_and_all_has_all():
    sample, everything = (gate_table.names("gdn", everything=wanted) for wanted in (False, True))
    assert set(sample) < set(everything)
    kinds = [[gate_table._VARIANT.sub("", name) for name in found] for found in (sample, everything)]
    assert set(kinds[0]) == set(kinds[1])
    assert len(set(kinds[0])) == len(sample) > 5
    assert all("spec" in name for name in gate_table.names("gdn", everything=False, part="spec"))


@pytest.fixture
def compiled(monkeypatch):
    asked = []

    def run(module, archs, cases):
        asked.append((module, archs, tuple(cases)))
        return [CaseResult(module, case, archs[0], (replace(GOOD, arch=archs[0]),), problems) for case in cases]

    problems: tuple[str, ...] = ()
    monkeypatch.setattr(gate_table.aot, "run", run)
    return asked


def command(*arguments):
    return CliRunner().invoke(gate_table.app, list(arguments))


def test_every_chosen_case_is_compiled_once_for_each_arch(compiled):
    done = command("--arch", "sm_100a", "--family", "gdn", "--all")
    assert done.exit_code == 0, done.output
    assert {(module, archs) for module, archs, _ in compiled} == {("blackwell_kernels.gdn.aot", (100,))}
    wanted = gate_table.names("gdn", everything=True)
    assert sorted(case for _, _, cases in compiled for case in cases) == sorted(wanted)
    assert f"[{len(wanted)}/{len(wanted)}] gdn: 0 failed" in done.output
    assert f"{len(wanted)} cases pass, 0 fail" in done.output
    compiled.clear()
    assert command("--family", "dsa", "--case", "topk").exit_code == 0
    assert {archs for _, archs, _ in compiled} == {(90,), (100,)}


def test_json_carries_every_number_and_a_failure_exits_with_1(monkeypatch):
    monkeypatch.setattr(
        gate_table.aot, "run", lambda module, archs, cases: [result(case, GOOD, problems=("bad",)) for case in cases]
    )
    done = command("--arch", "100", "--family", "moe", "--json")
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert {case["verdict"] for case in told["cases"]} == {"failed"}
    assert told["cases"][0]["kernels"][0]["registers"] == 168


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--arch", "sm_120a"), "no arch is named 'sm_120a'; there are sm_90a, sm_100a"),
        (("--family", "attention"), "no family is named 'attention'"),
        (("--case", "no such case"), "no case has 'no such case'"),
    ],
)
def test_usage_errors_exit_with_2(arguments, complaint):
    done = command(*arguments)
    assert done.exit_code == 2
    assert complaint in done.output
